//! The resources that a process holds and uses, from `/proc`. They must be the same before and after a fault.

use std::fs;
use std::thread;
use std::time::Duration;

use nix::unistd::Pid;

use crate::eventually;

/// The time between two samples of a process's CPU time. A process that spins uses some of it, however busy
/// the machine is.
const LOOK: Duration = Duration::from_millis(100);

/// The resources that a process holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Holdings {
    /// Descriptors of sockets.
    pub sockets: usize,
    /// Descriptors of pipes: two per pipe.
    pub pipes: usize,
    /// Other descriptors.
    pub others: usize,
    /// Threads.
    pub threads: usize,
}

impl Holdings {
    /// The current resources of process `pid`.
    ///
    /// # Panics
    /// If it has exited.
    #[track_caller]
    pub fn of(pid: Pid) -> Self {
        let mut holdings = Self { threads: tasks(pid).len(), ..Self::default() };
        for entry in fs::read_dir(format!("/proc/{pid}/fd")).unwrap() {
            // It may be closed by now.
            let Ok(target) = fs::read_link(entry.unwrap().path()) else { continue };
            let target = target.to_string_lossy();
            if target.starts_with("socket:") {
                holdings.sockets += 1;
            } else if target.starts_with("pipe:") {
                holdings.pipes += 1;
            } else {
                holdings.others += 1;
            }
        }
        holdings
    }
}

/// What a process has written, in kB (proc(5), `smaps_rollup`). Pages of the program count for nothing, whether or not another
/// process has it in memory, too.
#[track_caller]
pub fn private_memory(pid: Pid) -> usize {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let written = rollup.lines().find_map(|line| line.strip_prefix("Private_Dirty:")).unwrap();
    written.split_whitespace().next().unwrap().parse().unwrap()
}

/// Waits until a process uses no CPU time at all between two samples.
#[track_caller]
pub fn wait_until_idle(pid: Pid) {
    eventually(&format!("process {pid} is idle"), || {
        let before = processor_time(pid);
        thread::sleep(LOOK);
        processor_time(pid) == before
    });
}

/// The run time of all threads in nanoseconds (Documentation/scheduler/sched-stats.rst).
fn processor_time(pid: Pid) -> u64 {
    let of_task = |task: &String| -> u64 {
        let stat = fs::read_to_string(format!("/proc/{pid}/task/{task}/schedstat")).unwrap_or_default();
        stat.split_whitespace().next().map_or(0, |time| time.parse().unwrap())
    };
    tasks(pid).iter().map(of_task).sum()
}

fn tasks(pid: Pid) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.map(|task| task.unwrap().file_name().into_string().unwrap()).collect()
}
