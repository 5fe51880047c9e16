//! Forking processes that do not execute another program, and tying one to its parent.
#![expect(
    unsafe_code,
    reason = "fork, close_range, _exit, pre_exec, and what the arguments are overwritten with have no safe form"
)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::Command;

use nix::libc;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{ForkResult, Pid, fork, getpid, getppid};

use crate::fd::close_others;

/// Signals that terminals, service managers and users send.
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

/// The index of the start of the arguments among the fields of `/proc/PID/stat`, counted from 1 (proc(5)).
const ARG_START: usize = 48;

/// Runs `body` in a new process, as [`fork_child`] does. The calling process is not notified of the new one's end: it ignores
/// `SIGCHLD` from now on.
///
/// # Errors
/// Those of [`fork_child`].
pub fn fork_alone<const N: usize>(kept: [OwnedFd; N], body: impl FnOnce([OwnedFd; N])) -> io::Result<()> {
    fork_child(kept, body)?;
    // SAFETY: no handler is installed.
    unsafe { sigaction(Signal::SIGCHLD, &on(SigHandler::SigIgn)) }.ok();
    Ok(())
}

/// Runs `body` in a new process, which then exits, and returns its id. The new process only has the standard descriptors and
/// `kept`, which the calling process no longer has. Signals do nothing there: they have an empty handler, so
/// that they revert to their default in programs that it executes. Only `SIGUSR2` is ignored, also in these
/// programs until they change that.
///
/// # Errors
/// Those of fork(2); `EBUSY` if this process has other threads, whose locks a child would inherit, or if
/// `/proc` cannot be read.
pub fn fork_child<const N: usize>(kept: [OwnedFd; N], body: impl FnOnce([OwnedFd; N])) -> io::Result<Pid> {
    if std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count) != 1 {
        return Err(io::Error::from_raw_os_error(libc::EBUSY));
    }
    // SAFETY: no other thread holds a lock that would stay locked in the child forever.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            // Unwinding further would return into the parent's program.
            drop(catch_unwind(AssertUnwindSafe(|| {
                settle(&kept);
                body(kept);
            })));
            // SAFETY: this ends the process, and runs no exit handlers of the parent.
            unsafe { libc::_exit(0) }
        }
    }
}

/// The first steps of a new process.
fn settle(kept: &[OwnedFd]) {
    // None of them is essential, and a forked process cannot report errors.
    for signal in CAUGHT {
        // SAFETY: the handler does nothing.
        if let Ok(previous) = unsafe { sigaction(signal, &on(SigHandler::Handler(do_nothing))) }
            && matches!(previous.handler(), SigHandler::SigIgn)
        {
            // Keeps the effect of nohup(1), also for programs that are executed.
            // SAFETY: no handler is installed.
            unsafe { sigaction(signal, &previous) }.ok();
        }
    }
    // SAFETY: no handler is installed.
    unsafe { sigaction(Signal::SIGUSR2, &on(SigHandler::SigIgn)) }.ok();
    // The parent may have been started with it ignored, in which case wait(2) would not return exit statuses.
    // SAFETY: no handler is installed.
    unsafe { sigaction(Signal::SIGCHLD, &on(SigHandler::SigDfl)) }.ok();
    // Their owners in the parent's memory are neither used nor dropped here, because the process exits
    // without returning.
    close_others(&kept.iter().map(AsRawFd::as_raw_fd).collect::<Vec<_>>()).ok();
}

/// Makes the process that `command` starts end with the calling thread (`PR_SET_PDEATHSIG`, prctl(2)), by `SIGKILL`. It
/// cannot be started any more once that thread's process has ended.
pub fn end_with_parent(command: &mut Command) -> &mut Command {
    let parent = getpid();
    let tie = move || {
        set_pdeathsig(Signal::SIGKILL)?;
        // The signal is not sent if the parent had ended before.
        if getppid() == parent { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ESRCH)) }
    };
    // SAFETY: the closure makes two system calls, and neither allocates nor locks.
    unsafe { command.pre_exec(tie) }
}

/// Has signals do what they do by default, and be delivered: a process that ignores or blocks some passes that on to those
/// that it starts (signal(7)). `SIGPIPE`, and those by which the runtime reports an overflow of the stack, are left.
///
/// # Errors
/// Those of sigaction(2) and sigprocmask(2).
pub fn reset_signals() -> io::Result<()> {
    /// Those that cannot be changed, and those that are left.
    const LEFT: [Signal; 5] =
        [Signal::SIGKILL, Signal::SIGSTOP, Signal::SIGPIPE, Signal::SIGSEGV, Signal::SIGBUS];
    for signal in Signal::iterator().filter(|signal| !LEFT.contains(signal)) {
        // SAFETY: no handler is installed.
        unsafe { sigaction(signal, &on(SigHandler::SigDfl)) }?;
    }
    Ok(SigSet::empty().thread_set_mask()?)
}

/// Has the calling thread, and processes that it starts, scheduled as usual (`SCHED_OTHER`, sched(7)).
///
/// # Errors
/// Those of sched_setscheduler(2).
pub fn schedule_normally() -> io::Result<()> {
    // SAFETY: all of its fields are numbers.
    let param: libc::sched_param = unsafe { std::mem::zeroed() };
    // SAFETY: `param` is valid for reads, and outlives the call.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_OTHER, &raw const param) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Ignores a signal in this process from now on.
///
/// # Errors
/// Those of sigaction(2).
pub fn ignore(signal: Signal) -> io::Result<()> {
    // SAFETY: no handler is installed.
    unsafe { sigaction(signal, &on(SigHandler::SigIgn)) }?;
    Ok(())
}

/// Replaces the arguments that are shown for this process (`/proc/PID/cmdline`, proc(5)) by `title`, as far
/// as there is room. [`std::env::args_os`] does not return them any more.
///
/// # Errors
/// Those of reading `/proc/self/stat`; `InvalidData` if it does not contain the address of the arguments.
pub fn set_title(title: &str) -> io::Result<()> {
    let unknown = || io::Error::new(io::ErrorKind::InvalidData, "the place of the arguments is not known");
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // The name, which is the second field, is in parentheses and may contain anything.
    let mut fields =
        stat.rsplit_once(") ").ok_or_else(unknown)?.1.split_ascii_whitespace().skip(ARG_START - 3);
    let mut address = || fields.next()?.parse::<usize>().ok().filter(|address| *address != 0);
    let (start, end) = (address().ok_or_else(unknown)?, address().ok_or_else(unknown)?);
    let length = end.checked_sub(start).filter(|length| *length > 1).ok_or_else(unknown)?;
    let mut text = vec![0; length];
    let shown = title.len().min(length - 1);
    text[..shown].copy_from_slice(&title.as_bytes()[..shown]);
    if shown + 1 < length {
        // If the last byte of the arguments is not NUL, the kernel treats the area as a single text, which
        // ends at the first NUL (`get_mm_cmdline` in fs/proc/base.c).
        text[length - 1] = b' ';
    }
    let arguments = std::ptr::with_exposed_provenance_mut::<u8>(start);
    // SAFETY: the kernel put the arguments there, on the stack, which is writable and is never freed. Their
    // last byte is at `end - 1`. Nothing borrows them: the standard library copies them each time.
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
    use std::os::unix::process::ExitStatusExt;
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    #[test]
    fn a_process_ends_with_the_thread_that_has_started_it() {
        let start = || end_with_parent(Command::new("sleep").arg("600")).spawn().unwrap();
        let mut child = thread::spawn(start).join().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    }

    #[test]
    fn a_process_with_threads_is_not_forked() {
        let (_until_the_end, end) = mpsc::channel::<()>();
        thread::spawn(move || end.recv());
        let (kept, _other) = UnixStream::pair().unwrap();
        let error = fork_alone([kept.into()], |_kept| ()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
    }
}
