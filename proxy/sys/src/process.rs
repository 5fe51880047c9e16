//! Processes that are forked without running another program.
#![expect(unsafe_code, reason = "fork, close_range and _exit have no safe form")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::libc;
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use nix::unistd::{ForkResult, fork};

/// Runs `body` in a new process, which ends with it. That process has no descriptors but the standard
/// ones and `kept`, which this one has no more, and takes no signal that can be blocked; the programs
/// that `std::process::Command` starts from there take them as usual, but ignore `SIGUSR2` at first.
///
/// # Errors
/// Those of fork(2); `EBUSY` if this process has other threads, whose locks a child would inherit, or
/// if `/proc` does not tell.
pub fn fork_alone(kept: OwnedFd, body: impl FnOnce(OwnedFd)) -> io::Result<()> {
    if std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count) != 1 {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    // SAFETY: no other thread holds a lock that the child would find locked for ever.
    match unsafe { fork() }? {
        ForkResult::Parent { .. } => Ok(()),
        ForkResult::Child => {
            // Unwinding further would lead back into the program of the parent.
            drop(catch_unwind(AssertUnwindSafe(|| {
                settle(&kept);
                body(kept);
            })));
            // SAFETY: it ends the process, and runs nothing that the parent has left for its own end.
            unsafe { libc::_exit(0) }
        }
    }
}

/// What is done first in a new process.
fn settle(kept: &OwnedFd) {
    // None of these is essential, and a process that was forked has nobody to tell.
    SigSet::all().thread_block().ok();
    // SAFETY: no handler is installed.
    unsafe { signal(Signal::SIGUSR2, SigHandler::SigIgn) }.ok();
    let kept = kept.as_raw_fd().unsigned_abs();
    for (first, last) in [(3, kept - 1), (kept + 1, u32::MAX)] {
        if first <= last {
            // SAFETY: what owned these descriptors in the parent is neither used nor dropped here, as the
            // process ends without returning to it.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_process_with_threads_is_not_forked() {
        // The harness has one for each test.
        let (kept, _other) = UnixStream::pair().unwrap();
        let error = fork_alone(kept.into(), |_kept| ()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
    }
}
