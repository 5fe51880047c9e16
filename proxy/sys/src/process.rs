//! Processes that are forked without running another program.
#![expect(unsafe_code, reason = "fork, close_range and _exit have no safe form")]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{ForkResult, fork};

/// What terminals, service managers and people send.
const CAUGHT: [Signal; 9] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGALRM,
    Signal::SIGUSR1,
    Signal::SIGTSTP,
    Signal::SIGTTIN,
    Signal::SIGTTOU,
];

/// Runs `body` in a new process, which ends with it. That process has no descriptors but the standard ones
/// and `kept`, which this one has no more, and does nothing on signals: they are caught, and so are at their
/// default again in programs that it starts. Only `SIGUSR2` is ignored there, until they want it.
///
/// This process does not hear of the other one's end: it ignores `SIGCHLD` from here on.
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
        ForkResult::Parent { .. } => {
            // SAFETY: no handler is installed.
            unsafe { sigaction(Signal::SIGCHLD, &on(SigHandler::SigIgn)) }.ok();
            Ok(())
        }
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
    // None of this is essential, and a process that was forked has nobody to tell.
    for signal in CAUGHT {
        // SAFETY: the handler does nothing.
        if let Ok(previous) = unsafe { sigaction(signal, &on(SigHandler::Handler(do_nothing))) }
            && matches!(previous.handler(), SigHandler::SigIgn)
        {
            // As nohup(1) wants it, also for programs that are started.
            // SAFETY: no handler is installed.
            unsafe { sigaction(signal, &previous) }.ok();
        }
    }
    // SAFETY: no handler is installed.
    unsafe { sigaction(Signal::SIGUSR2, &on(SigHandler::SigIgn)) }.ok();
    let kept = kept.as_raw_fd().unsigned_abs();
    for (first, last) in [(3, kept - 1), (kept + 1, u32::MAX)] {
        if first <= last {
            // SAFETY: what owned these descriptors in the parent is neither used nor dropped here, as the
            // process ends without returning to it.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
    }
}

fn on(handler: SigHandler) -> SigAction {
    SigAction::new(handler, SaFlags::SA_RESTART, SigSet::empty())
}

extern "C" fn do_nothing(_signal: libc::c_int) {}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    #[test]
    fn a_process_with_threads_is_not_forked() {
        let (_until_the_end, end) = mpsc::channel::<()>();
        thread::spawn(move || end.recv());
        let (kept, _other) = UnixStream::pair().unwrap();
        let error = fork_alone(kept.into(), |_kept| ()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
    }
}
