//! An `rproxy` whose program file can be replaced while it runs, and the processes that take over.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;

use nix::sys::prctl::set_child_subreaper;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::eventually;
use crate::process::{self, Process, Stream};
use crate::rproxy::rproxy;

/// A separate program file. Dropping it ends all processes that run it, then removes it.
pub struct Program {
    dir: TempDir,
}

impl Default for Program {
    fn default() -> Self {
        Self::new()
    }
}

impl Program {
    /// The release build of `rproxy`, at another path.
    pub fn new() -> Self {
        static REAPER: Once = Once::new();

        // Otherwise, processes that have taken over are not children of the suite, and cannot be waited for.
        REAPER.call_once(|| set_child_subreaper(true).unwrap());
        // On the same file system, so that a link is possible. A copy would have to be written, and if
        // another thread forks meanwhile, that process would have it open for writing, so that it could not be
        // run (ETXTBSY).
        let dir = tempfile::tempdir_in(rproxy().parent().unwrap()).unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let program = Self { dir };
        program.repair();
        program
    }

    /// Its path.
    pub fn path(&self) -> PathBuf {
        self.dir.path().join("rproxy")
    }

    /// The path of its control socket, if it gets one.
    pub fn control(&self) -> PathBuf {
        self.dir.path().join("control")
    }

    /// A command that runs it.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.path());
        command.args(arguments);
        command
    }

    /// Starts it with these arguments, and waits until it is confined, which is just before it serves.
    #[track_caller]
    pub fn start(&self, arguments: &[&str]) -> Process {
        let process = Process::spawn(self.command(arguments));
        process.wait_for_line(Stream::Stderr, |line| line.contains("confined"));
        process
    }

    /// Runs `rproxy ctl` with these arguments.
    #[track_caller]
    pub fn ctl(&self, arguments: &[&str]) -> process::Output {
        let mut command = Command::new(rproxy());
        command.args(["ctl", "--control"]).arg(self.control()).args(arguments);
        process::run(command)
    }

    /// Replaces it with a shell script.
    #[track_caller]
    pub fn replace(&self, script: &str) {
        // In another process; see above.
        let write = r#"printf '#!/bin/sh\n%s\n' "$0" >"$1.new" && chmod 755 "$1.new" && mv "$1.new" "$1""#;
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", write, script]).arg(self.path());
        process::run(shell).success();
    }

    /// Restores the working program.
    #[track_caller]
    pub fn repair(&self) {
        let new = self.dir.path().join("new");
        fs::hard_link(rproxy(), &new).unwrap();
        fs::rename(new, self.path()).unwrap();
    }
}

impl Program {
    /// Ends all processes that run it.
    pub fn end(&self) {
        for pid in running(self.dir.path()) {
            // It may have exited.
            kill(pid, Signal::SIGKILL).ok();
            waitpid(pid, None).ok();
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.end();
    }
}

/// Ends, when dropped, the processes that have taken over from another one: those with its arguments in its network namespace.
pub struct Successors {
    arguments: Vec<u8>,
    namespace: PathBuf,
}

impl Successors {
    /// Those of a running process.
    pub fn of(process: &Process) -> Self {
        let (arguments, namespace) = identity(process.pid()).unwrap();
        Self { arguments, namespace }
    }
}

impl Drop for Successors {
    fn drop(&mut self) {
        for pid in all_processes() {
            if identity(pid).is_ok_and(|(arguments, namespace)| {
                arguments == self.arguments && namespace == self.namespace
            }) {
                // It may have exited.
                kill(pid, Signal::SIGKILL).ok();
            }
        }
    }
}

/// The arguments and the network namespace of a process.
fn identity(pid: Pid) -> std::io::Result<(Vec<u8>, PathBuf)> {
    Ok((fs::read(format!("/proc/{pid}/cmdline"))?, fs::read_link(format!("/proc/{pid}/ns/net"))?))
}

fn all_processes() -> impl Iterator<Item = Pid> {
    let entries = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    entries.filter_map(|entry| Some(Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)))
}

/// The processes that run a program in `dir`.
fn running(dir: &Path) -> Vec<Pid> {
    all_processes()
        .filter(|pid| fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.starts_with(dir)))
        .collect()
}

/// The children that a process's main thread has started.
pub fn children(pid: Pid) -> Vec<Pid> {
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    children.split_whitespace().map(|child| Pid::from_raw(child.parse().unwrap())).collect()
}

/// The only child of a server, which is its launcher.
#[track_caller]
pub fn launcher(pid: Pid) -> Pid {
    let children = children(pid);
    assert_eq!(children.len(), 1, "{children:?}");
    children[0]
}

/// Waits until a process that is not a child of the suite, or has become one, has exited.
#[track_caller]
pub fn wait_for_end(pid: Pid) {
    eventually(&format!("process {pid} is gone"), || {
        waitpid(pid, Some(WaitPidFlag::WNOHANG)).ok();
        !Path::new(&format!("/proc/{pid}")).exists()
    });
}

/// Makes `server` hand over to a new process, which is returned. `first` captures the output of all of them,
/// because they inherit it, and `earlier` is the number of processes that took over before.
#[track_caller]
pub fn upgrade(first: &Process, earlier: usize, server: Pid) -> Pid {
    kill(server, Signal::SIGUSR2).unwrap();
    let lines = first
        .wait_for_lines(Stream::Stderr, earlier + 1, |line| line.contains("a new process has taken over"));
    let process = lines.last().and_then(|line| line.rsplit_once("process=")).unwrap().1;
    Pid::from_raw(process.trim().parse().unwrap())
}
