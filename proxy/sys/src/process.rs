//! Processes that are forked without running another program.
#![expect(
    unsafe_code,
    reason = "fork, close_range, _exit, and what the arguments are overwritten with have no safe form"
)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{ForkResult, fork};

use crate::fd::close_others;

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

/// Where the addresses of the arguments are among the fields of `/proc/PID/stat`, counted from 1 (proc(5)).
const ARG_START: usize = 48;

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
    // Whoever started the parent may have ignored it, and then nobody learns how a child has ended (wait(2)).
    // SAFETY: no handler is installed.
    unsafe { sigaction(Signal::SIGCHLD, &on(SigHandler::SigDfl)) }.ok();
    // What owned the others in the parent is neither used nor dropped here, as the process ends without returning to it.
    close_others(&[kept.as_raw_fd()]).ok();
}

/// Ignores a signal from here on, in this process.
///
/// # Errors
/// Those of sigaction(2).
pub fn ignore(signal: Signal) -> io::Result<()> {
    // SAFETY: no handler is installed.
    unsafe { sigaction(signal, &on(SigHandler::SigIgn)) }?;
    Ok(())
}

/// Shows `title` in the place of the arguments of this process (`/proc/PID/cmdline`, proc(5)), as far as they are long
/// enough. [`std::env::args_os`] does not give them any more from here on.
///
/// # Errors
/// Those of reading `/proc/self/stat`; `InvalidData` if that does not say where the arguments are.
pub fn set_title(title: &str) -> io::Result<()> {
    let unknown = || io::Error::new(io::ErrorKind::InvalidData, "the place of the arguments is not known");
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // The name, the second of all fields, is in parentheses and may hold anything.
    let mut fields =
        stat.rsplit_once(") ").ok_or_else(unknown)?.1.split_ascii_whitespace().skip(ARG_START - 3);
    let mut address = || fields.next()?.parse::<usize>().ok().filter(|address| *address != 0);
    let (start, end) = (address().ok_or_else(unknown)?, address().ok_or_else(unknown)?);
    let length = end.checked_sub(start).filter(|length| *length > 1).ok_or_else(unknown)?;
    let mut text = vec![0; length];
    let shown = title.len().min(length - 1);
    text[..shown].copy_from_slice(&title.as_bytes()[..shown]);
    if shown + 1 < length {
        // The end of the arguments that is no NUL says that one text is in their place, which ends before
        // (`get_mm_cmdline` in fs/proc/base.c).
        text[length - 1] = b' ';
    }
    let arguments = std::ptr::with_exposed_provenance_mut::<u8>(start);
    // SAFETY: the kernel put the arguments there, on the stack, which is writable and outlives all else. The last byte
    // that belongs to them is at `end - 1`. Nothing borrows them: the standard library copies them each time.
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), arguments, length) };
    Ok(())
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
