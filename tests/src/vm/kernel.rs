//! Kernels of Debian, as its packages have them.
//!
//! They come from the archive that this machine installs packages from, by apt with lists of its own: nothing of the
//! machine changes. What a machine needs of a package is kept in the target directory, so that it is fetched once.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use super::image::archive;
use crate::require;
use crate::rproxy;

/// The package that depends on the newest kernel of a release.
const NEWEST: &str = "linux-image-cloud-amd64";

/// Modules that a machine may load, as directories and files of a package.
const MODULES: [&str; 8] = [
    "kernel/net",
    "kernel/lib",
    "kernel/crypto",
    "kernel/arch/x86/crypto",
    "kernel/drivers/net/veth.ko",
    "kernel/drivers/net/dummy.ko",
    "kernel/drivers/net/ifb.ko",
    "kernel/drivers/net/macvlan.ko",
];

/// A kernel, by its version and the release of Debian that has it.
#[derive(Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The first two numbers of its version.
    pub version: &'static str,
    /// The release.
    pub release: &'static str,
}

/// The kernels of the stable releases of Debian, oldest first.
pub static KERNELS: [Kernel; 3] = [
    Kernel { version: "5.10", release: "bullseye" },
    Kernel { version: "6.1", release: "bookworm" },
    Kernel { version: "6.12", release: "trixie" },
];

/// The errors of kernels that could not be fetched by this process, so that each is tried once; none if it is there.
static TRIED: Mutex<BTreeMap<&'static str, Option<String>>> = Mutex::new(BTreeMap::new());

impl Kernel {
    /// Fetches it, unless it is there.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub fn fetch(&'static self) -> Result<(), String> {
        let mut tried = TRIED.lock().unwrap();
        let outcome = tried.entry(self.version).or_insert_with(|| self.fetch_once().err());
        outcome.clone().map_or(Ok(()), Err)
    }

    fn fetch_once(&self) -> Result<(), String> {
        let dir = self.kept();
        // The file that is written last.
        if self.program().exists() {
            return Ok(());
        }
        let scratch = dir.join("scratch");
        fs::remove_dir_all(&scratch).ok();
        let fetched = self.fetch_into(&scratch);
        fs::remove_dir_all(&scratch).ok();
        fetched
    }

    fn fetch_into(&self, scratch: &Path) -> Result<(), String> {
        let text = |error: io::Error| error.to_string();
        fs::create_dir_all(scratch.join("lists/partial")).map_err(text)?;
        fs::write(scratch.join("sources.list"), format!("deb {} {} main\n", archive_uri()?, self.release))
            .map_err(text)?;
        output(apt("apt-get", scratch).arg("update"))?;
        let newest = output(apt("apt-cache", scratch).args(["show", "--no-all-versions", NEWEST]))?;
        let package = newest
            .lines()
            .find_map(|line| line.strip_prefix("Depends: ")?.split([' ', ',']).next())
            .ok_or_else(|| format!("{NEWEST} of {} depends on no kernel", self.release))?;
        output(apt("apt-get", scratch).args(["download", package]).current_dir(scratch))?;
        let file = fs::read_dir(scratch)
            .map_err(text)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .ok_or_else(|| format!("{package} was not downloaded"))?;
        let root = scratch.join("root");
        output(command("dpkg")?.arg("-x").args([&file, &root]))?;
        self.keep(&root)
    }

    /// Keeps the kernel of an unpacked package, and an archive of its modules.
    fn keep(&self, package: &Path) -> Result<(), String> {
        let text = |error: io::Error| error.to_string();
        // Since Debian 13, the first of them.
        let dirs = ["usr/lib/modules", "lib/modules"].map(|dir| package.join(dir));
        let dir = dirs.iter().find(|dir| dir.exists()).ok_or("a package without modules")?;
        let mut versions = fs::read_dir(dir).map_err(text)?;
        let version = versions.next().ok_or("a kernel without modules")?.map_err(text)?.file_name();
        let version = version.to_string_lossy();
        let all = dir.join(&*version);
        let staged = package.join("staged");
        let few = staged.join("usr/lib/modules").join(&*version);
        fs::create_dir_all(&few).map_err(text)?;
        for name in ["modules.builtin", "modules.order"] {
            fs::copy(all.join(name), few.join(name)).map_err(text)?;
        }
        for module in MODULES {
            let at = few.join(module);
            fs::create_dir_all(at.parent().unwrap()).map_err(text)?;
            // The extension of a compressed one is longer; a directory has none.
            let from = ["", ".xz"].map(|more| all.join(format!("{module}{more}")));
            let Some(from) = from.iter().find(|path| path.exists()) else { continue };
            output(command("cp")?.arg("-r").arg(from).arg(at.parent().unwrap()))?;
        }
        let compressed = "find . -name '*.ko.xz' -exec busybox unxz {} +";
        output(command("sh")?.args(["-c", compressed]).current_dir(&few))?;
        // As in the machine: /lib is /usr/lib.
        std::os::unix::fs::symlink("usr/lib", staged.join("lib")).map_err(text)?;
        output(command("busybox")?.args(["depmod", "-b"]).arg(&staged).arg(&*version))?;
        fs::remove_file(staged.join("lib")).map_err(text)?;
        archive(&staged, &self.modules())?;
        let program = package.join("boot").join(format!("vmlinuz-{version}"));
        fs::copy(program, self.kept().join("new")).map_err(text)?;
        fs::rename(self.kept().join("new"), self.program()).map_err(text)
    }

    /// Its directory, in the target directory.
    pub(super) fn kept(&self) -> PathBuf {
        let dir = rproxy::target_dir().join("vm").join(self.version);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    /// The file of the kernel.
    pub(super) fn program(&self) -> PathBuf {
        self.kept().join("vmlinuz")
    }

    /// The archive of its modules.
    pub(super) fn modules(&self) -> PathBuf {
        self.kept().join("modules.cpio")
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Linux {} of Debian's {}", self.version, self.release)
    }
}

/// The archive that this machine installs the packages of Debian from.
pub(super) fn archive_uri() -> Result<String, String> {
    let format = "$(ORIGIN)|$(LABEL)|$(REPO_URI)";
    let targets = output(command("apt-get")?.args(["indextargets", "--format", format]))?;
    let uri = targets.lines().find_map(|line| line.strip_prefix("Debian|Debian|"));
    uri.map(str::to_owned).ok_or_else(|| "apt knows no archive of Debian".to_owned())
}

/// A program of apt that knows the lists in `scratch` alone.
fn apt(program: &str, scratch: &Path) -> Command {
    let mut command = Command::new(program);
    let options = [
        ("Dir::Etc::sourcelist", scratch.join("sources.list")),
        ("Dir::Etc::sourceparts", "-".into()),
        ("Dir::State::lists", scratch.join("lists")),
        ("Dir::Cache", scratch.to_owned()),
        ("APT::Sandbox::User", "root".into()),
        ("Acquire::Languages", "none".into()),
    ];
    for (name, value) in options {
        command.arg("-o").arg(format!("{name}={}", value.display()));
    }
    command
}

pub(super) fn command(program: &str) -> Result<Command, String> {
    let found = require::find(program).map(Command::new);
    found.ok_or_else(|| format!("{program} is not installed"))
}

/// What a program prints.
pub(super) fn output(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output().map_err(|error| format!("{name}: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let reason = String::from_utf8_lossy(&output.stderr);
    Err(format!("{name}: {}", reason.lines().last().unwrap_or("failed")))
}
