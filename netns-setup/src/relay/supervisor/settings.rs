//! What a process gets from the one that starts it: limits, priority, processors, signals.
//!
//! The relay serves all containers, whichever command was the first. It must not be slower, or end sooner, because that
//! command was started by a service manager or a shell with other settings.

use std::fs;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix::unistd::Pid;
use rproxy_sys::process::{reset_signals, schedule_normally};
use rustix::process::setpriority_process;

use crate::descriptors;

/// What ends a process, or has its calls fail, when it has used so much.
const USED_UP: [Resource; 5] = [
    Resource::RLIMIT_AS,
    Resource::RLIMIT_CPU,
    Resource::RLIMIT_DATA,
    Resource::RLIMIT_FSIZE,
    Resource::RLIMIT_NPROC,
];

/// The mode of new files lacks these rights (umask(2)).
const MASK: u32 = 0o022;

/// The chance to be killed when memory is short, as of a process that nothing is set for (proc_pid_oom_score_adj(5)).
const OOM_SCORE_ADJ: (&str, &str) = ("/proc/self/oom_score_adj", "0");

/// Sets all of it as for a process that nothing is set for. What takes a right that this process lacks stays as it is.
pub(super) fn reset() {
    reset_signals().ok();
    umask(Mode::from_bits_truncate(MASK));
    for resource in USED_UP {
        lift(resource);
    }
    descriptors::raise_hard_limit();
    schedule_normally().ok();
    setpriority_process(None, 0).ok();
    fs::write(OOM_SCORE_ADJ.0, OOM_SCORE_ADJ.1).ok();
    // The kernel leaves out those that the control group does not have.
    let mut all = CpuSet::new();
    for processor in 0..CpuSet::count() {
        all.set(processor).ok();
    }
    sched_setaffinity(Pid::from_raw(0), &all).ok();
}

fn lift(resource: Resource) {
    if let Ok((_soft, hard)) = getrlimit(resource) {
        setrlimit(resource, RLIM_INFINITY, RLIM_INFINITY)
            .or_else(|_denied| setrlimit(resource, hard, hard))
            .ok();
    }
}
