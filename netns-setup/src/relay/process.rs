//! Processes, as the kernel shows them, and how they are stopped.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{WaitPidFlag, waitpid};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::RelayError;
use crate::model::RelayProcess;

/// How long a process may take to end after `SIGTERM`. Relays and supervisors end at once, unless they hang.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long one may take to end after `SIGKILL`, and its children after it.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Stops a process by `SIGTERM`, and waits until it and its children have exited: a relay, which has the ports, ends a moment
/// after its supervisor. If it already has exited, that is not an error.
///
/// # Errors
/// If it cannot be signalled or does not exit.
pub fn stop(process: RelayProcess) -> Result<(), RelayError> {
    let pid = process.pid;
    let failed = |source: io::Error| RelayError::Stop { pid, source };
    let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return Ok(());
    };
    let pidfd = match pidfd_open(raw, PidfdFlags::empty()) {
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        other => other.map_err(|errno| failed(errno.into()))?,
    };
    // The pidfd pins the process: if it is the right one now, it stays the right one.
    if !is_alive(process) {
        return Ok(());
    }
    let children = children(pid);
    // One that was stopped gets the signal before it when it continues.
    let signals = [(Signal::TERM, Duration::ZERO), (Signal::CONT, PATIENCE), (Signal::KILL, STOP_LIMIT)];
    for (signal, limit) in signals {
        match pidfd_send_signal(&pidfd, signal) {
            Err(rustix::io::Errno::SRCH) => break,
            other => other.map_err(|errno| failed(errno.into()))?,
        }
        if wait_readable(&pidfd, limit).map_err(failed)? {
            break;
        }
    }
    // It is only a child of this process if this run started it; otherwise init reaps it.
    let _reaped = waitpid(nix::unistd::Pid::from_raw(raw.as_raw_nonzero().get()), Some(WaitPidFlag::WNOHANG));
    for child in children {
        wait_readable(&child, STOP_LIMIT).map_err(failed)?;
    }
    if is_alive(process) { Err(failed(io::ErrorKind::TimedOut.into())) } else { Ok(()) }
}

/// The children of all threads of a process.
fn children(pid: u32) -> Vec<OwnedFd> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().filter_map(Result::ok);
    // Kernels without CONFIG_PROC_CHILDREN do not tell.
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let numbers: Vec<_> = lists.flat_map(|list| numbers(&list)).collect();
    numbers.into_iter().filter_map(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()).collect()
}

fn numbers(list: &str) -> Vec<Pid> {
    list.split_whitespace().filter_map(|number| Pid::from_raw(number.parse().ok()?)).collect()
}

fn wait_readable(fd: impl AsFd, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout) {
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok(ready) => return Ok(ready > 0),
        }
    }
}

/// The process with this ID, if it has not ended.
#[must_use]
pub fn running(pid: u32) -> Option<RelayProcess> {
    let (state, started) = stat(pid)?;
    (!has_ended(&state)).then_some(RelayProcess { pid, started })
}

/// Whether this very process has not ended.
#[must_use]
pub fn is_alive(process: RelayProcess) -> bool {
    running(process.pid) == Some(process)
}

/// Whether a process in this state has ended: it waits to be reaped (`Z`), or that happens right now (`X`, and `x` of
/// older kernels; proc_pid_stat(5)).
fn has_ended(state: &str) -> bool {
    matches!(state, "Z" | "X" | "x")
}

/// The state and start time of a process (proc_pid_stat(5), fields 3 and 22).
fn stat(pid: u32) -> Option<(String, u64)> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_stat(text: &str) -> Option<(String, u64)> {
    // The second field is the program's name in parentheses, which may contain anything.
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?.to_owned();
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_stopped_once_and_another_one_is_left_alone() {
        let mut child = Command::new("sleep").arg("600").spawn().unwrap();
        let process = running(child.id()).unwrap();
        let another = RelayProcess { started: process.started + 1, ..process };
        assert!(is_alive(process) && !is_alive(another));
        stop(another).unwrap();
        assert!(is_alive(process), "a process with another start time is not the one that was meant");
        stop(process).unwrap();
        assert!(!is_alive(process));
        stop(process).unwrap();
        // `stop` has reaped it.
        child.wait().unwrap_err();
    }

    #[test]
    fn one_that_hangs_is_stopped_too() {
        for script in ["kill -STOP $$", "trap '' TERM; echo; while :; do sleep 1; done"] {
            let mut child = Command::new("sh").args(["-c", script]).spawn().unwrap();
            let process = running(child.id()).unwrap();
            stop(process).unwrap();
            assert!(!is_alive(process), "{script}");
            drop(child.wait());
        }
    }

    #[test]
    fn a_process_that_waits_to_be_reaped_has_ended() {
        let mut child = Command::new("true").spawn().unwrap();
        let process = running(child.id());
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
        assert!(wait_readable(&pidfd, STOP_LIMIT).unwrap());
        assert_eq!(stat(child.id()).unwrap().0, "Z");
        assert_eq!(running(child.id()), None);
        process.into_iter().for_each(|process| stop(process).unwrap());
        // `stop` may have reaped it.
        drop(child.wait());
    }

    #[test]
    fn the_states_of_an_ended_process_are_known() {
        let rest = " 1 2".repeat(9) + " 77 0";
        for (state, ended) in
            [("R", false), ("S", false), ("D", false), ("T", false), ("Z", true), ("X", true), ("x", true)]
        {
            let (parsed, started) = parse_stat(&format!("7 (a) b) {state}{rest}")).unwrap();
            assert_eq!((has_ended(&parsed), started), (ended, 77), "{state}");
        }
    }
}
