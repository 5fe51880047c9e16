//! Virtual machines with kernels of Debian, in which cases of the suites run.
//!
//! A machine is emulated (QEMU's TCG), so it needs no privilege and no processor that virtualises. It has no disk and no network
//! device: its image holds the programs under test, the suites themselves, and what both need. Its first program
//! ([`guest`]) plays the cases that it finds listed, and reports over the serial console.

pub mod guest;
mod image;
pub mod kernel;
mod report;

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

use self::kernel::Kernel;
pub use self::report::Verdict;
use crate::process::Process;
use crate::require;

/// How long a machine may run. It takes a minute of processor time, and less than that if it has both processors.
pub const PATIENCE: Duration = Duration::from_secs(600);

/// What became of case `name`, one of `names`, on a machine with this kernel.
///
/// The first process of a test run that asks starts the machine, which plays all of `names`; the others wait for it.
///
/// # Panics
/// If the machine cannot be started.
pub fn verdict(kernel: &'static Kernel, names: &[String], name: &str) -> Verdict {
    let dir = kernel.dir();
    let lock = File::create(dir.join("lock")).unwrap();
    let _alone = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_file, error)| error).unwrap();
    let (run, console) = (dir.join("run"), dir.join("console"));
    let this_run = this_run();
    if !fs::read_to_string(&run).is_ok_and(|known| known == this_run) {
        fs::remove_file(&console).ok();
        // Before the start, so that a machine that hangs is not started for each case.
        fs::write(&run, this_run).unwrap();
        start(kernel, names, &console);
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
fn start(kernel: &Kernel, names: &[String], console: &Path) {
    let image = image::write(kernel, names);
    let mut command = machine(kernel, &image);
    command.arg("-serial").arg(format!("file:{}", console.display()));
    let status = Process::spawn(command).wait_within(PATIENCE);
    fs::remove_file(image).ok();
    assert!(status.success(), "{status}");
}

fn machine(kernel: &Kernel, image: &Path) -> Command {
    let mut command = require::command("qemu-system-x86_64");
    command.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1536"]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]);
    command.arg("-kernel").arg(kernel.program()).arg("-initrd").arg(image);
    // A kernel that panics restarts, which ends the machine. Its messages would be mixed with the report. On a busy host,
    // the emulated timer may be too late for the check that it works.
    command.args(["-append", "console=ttyS0 panic=-1 loglevel=1 mitigations=off no_timer_check"]);
    command
}
