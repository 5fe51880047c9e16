//! Virtual machines with kernels of Debian, in which cases of the suites run.
//!
//! A machine is emulated (QEMU's TCG), so it needs no processor that virtualises. It has no network device. Either its image in
//! memory holds the programs under test, the suites themselves, and what both need ([`kernel`]); or it is a whole Debian on a
//! disk ([`debian`]). A process of the suites ([`guest`]) plays the cases that it finds listed, and reports over the serial console.

pub mod debian;
pub mod guest;
mod image;
pub mod kernel;
mod report;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

pub use self::report::Verdict;
use crate::process::Process;
use crate::require;

/// A machine that can be started.
pub trait Bootable {
    /// How long it may run.
    const PATIENCE: Duration;

    /// What is kept of it, in the target directory.
    fn dir(&self) -> PathBuf;

    /// Prepares it to play the cases `names`; files go into `scratch`. QEMU is given what it needs to boot them.
    fn prepare(&self, names: &[String], scratch: &Path, qemu: &mut Command);
}

/// What became of case `name`, one of `names`, on this machine.
///
/// The first process of a test run that asks starts the machine, which plays all of `names`; the others wait for it.
///
/// # Panics
/// If the machine cannot be started.
pub fn verdict<M: Bootable>(machine: &M, names: &[String], name: &str) -> Verdict {
    let dir = machine.dir();
    let lock = File::create(dir.join("lock")).unwrap();
    let _alone = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_file, error)| error).unwrap();
    let (run, console) = (dir.join("run"), dir.join("console"));
    let this_run = this_run();
    if !fs::read_to_string(&run).is_ok_and(|known| known == this_run) {
        fs::remove_file(&console).ok();
        // Before the start, so that a machine that hangs is not started for each case.
        fs::write(&run, this_run).unwrap();
        start(machine, names, &console);
    }
    let text = fs::read(&console).unwrap_or_default();
    report::verdict(&String::from_utf8_lossy(&text), name)
}

/// Identifies the process that runs all cases: its pid, and when it was started.
fn this_run() -> String {
    let parent = nix::unistd::getppid();
    let stat = fs::read_to_string(format!("/proc/{parent}/stat")).unwrap();
    let fields = stat.rsplit_once(") ").unwrap().1;
    format!("{parent} {}", fields.split(' ').nth(19).unwrap())
}

/// Starts a machine and waits for its end.
fn start<M: Bootable>(machine: &M, names: &[String], console: &Path) {
    let scratch = tempfile::tempdir_in(machine.dir()).unwrap();
    let mut command = qemu();
    machine.prepare(names, scratch.path(), &mut command);
    command.arg("-serial").arg(format!("file:{}", console.display()));
    // Where QEMU keeps what a machine writes to a disk.
    command.env("TMPDIR", scratch.path());
    let status = Process::spawn(command).wait_within(M::PATIENCE);
    assert!(status.success(), "{status}");
}

/// A machine without anything to boot.
fn qemu() -> Command {
    let mut command = require::command("qemu-system-x86_64");
    command.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1536"]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
    command
}

/// What a kernel is told. One that panics restarts. Its messages would be mixed with the report. On a busy host, the emulated
/// timer may be too late for the check that it works.
const KERNEL_LINE: &str = "console=ttyS0 panic=-1 loglevel=1 mitigations=off no_timer_check";
