//! Looks up the program to start at an upgrade. The lookup is the same as at the start, so a changed link or
//! another directory in `PATH` takes effect.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{self, Path, PathBuf};

use nix::unistd::{AccessFlags, access};

/// The running program, as it was started.
#[derive(Debug)]
pub(super) struct Program {
    /// The name it was started by (`argv[0]`).
    pub(super) name: OsString,
    /// The name to look up, if it leads to the running program. Whoever starts a program may pass any
    /// `argv[0]`.
    looked_up: Option<PathBuf>,
    /// The path of the running file, with links resolved.
    path: PathBuf,
}

impl Program {
    /// The program of this process.
    ///
    /// # Errors
    /// Those of readlink(2) for `/proc/self/exe`.
    pub(super) fn running() -> io::Result<Self> {
        let path = without_mark(env::current_exe()?);
        let name = env::args_os().next().unwrap_or_else(|| path.clone().into());
        let running = fs::metadata("/proc/self/exe").map(identity).ok();
        let is_it = |found: &Path| fs::metadata(found).map(identity).ok() == running;
        let leads_here =
            find(Path::new(&name), env::var_os("PATH").as_deref()).is_some_and(|found| is_it(&found));
        let looked_up =
            leads_here.then(|| if is_path(&name) { absolute(Path::new(&name)) } else { name.clone().into() });
        Ok(Self { name, looked_up, path })
    }

    /// The path that the name resolves to now, or else the path of the running file.
    pub(super) fn now(&self) -> PathBuf {
        let found = self.looked_up.as_deref().and_then(|name| find(name, env::var_os("PATH").as_deref()));
        found.unwrap_or_else(|| self.path.clone())
    }
}

/// Makes `path` absolute, if the current directory exists.
pub(super) fn absolute(path: &Path) -> PathBuf {
    path::absolute(path).unwrap_or_else(|_no_directory| path.to_owned())
}

/// Removes the mark that the kernel appends to the path of a file that was removed or replaced.
fn without_mark(running: PathBuf) -> PathBuf {
    let is_replaced = running.to_str().and_then(|path| path.strip_suffix(" (deleted)"));
    is_replaced.map_or_else(|| running.clone(), PathBuf::from)
}

fn identity(metadata: fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// Whether a name is used as a path and not searched in `PATH`.
fn is_path(name: &OsStr) -> bool {
    name.as_bytes().contains(&b'/')
}

/// Returns the file that a shell would run for `name` ("Command Search and Execution" in POSIX).
fn find(name: &Path, directories: Option<&OsStr>) -> Option<PathBuf> {
    let is_program = |file: &PathBuf| {
        fs::metadata(file).is_ok_and(|metadata| metadata.is_file()) && access(file, AccessFlags::X_OK).is_ok()
    };
    if name.as_os_str().is_empty() {
        return None;
    }
    if is_path(name.as_os_str()) {
        return Some(name.to_owned()).filter(is_program);
    }
    // An empty entry means the current directory.
    let file = |directory: PathBuf| {
        if directory.as_os_str().is_empty() { Path::new(".").join(name) } else { directory.join(name) }
    };
    env::split_paths(directories?).map(file).find(is_program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_was_replaced_is_looked_for_at_its_path() {
        for (link, path) in [("/opt/rproxy", "/opt/rproxy"), ("/opt/rproxy (deleted)", "/opt/rproxy")] {
            assert_eq!(without_mark(link.into()), Path::new(path));
        }
    }

    #[test]
    fn a_name_is_looked_up_as_by_a_shell() {
        let find = |name: &str, path: &str| find(Path::new(name), Some(OsStr::new(path)));
        assert_eq!(find("sh", "/nowhere:/etc:/bin").unwrap(), Path::new("/bin/sh"));
        assert_eq!(find("/bin/sh", "").unwrap(), Path::new("/bin/sh"));
        // Directories and non-executable files do not count.
        for (name, path) in [("passwd", "/etc"), ("bin", "/"), ("", "/bin"), ("sh", "/etc"), ("./sh", "/bin")]
        {
            assert_eq!(find(name, path), None, "{name} in {path}");
        }
    }

    #[test]
    fn a_name_that_means_nothing_does_not_count() {
        let program = |looked_up: Option<&str>| Program {
            name: "rproxy".into(),
            looked_up: looked_up.map(PathBuf::from),
            path: "/opt/rproxy".into(),
        };
        for looked_up in [None, Some("/nowhere/rproxy"), Some("no-such-program")] {
            assert_eq!(program(looked_up).now(), Path::new("/opt/rproxy"));
        }
        assert_eq!(program(Some("/bin/sh")).now(), Path::new("/bin/sh"));
        // Tests are started by their path, like most programs.
        let own = Program::running().unwrap();
        assert!(own.looked_up.is_some() && own.now().is_absolute(), "{own:?}");
    }
}
