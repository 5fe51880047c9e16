//! Signals as descriptors (signalfd(2)), and waiting for descriptors.
#![expect(unsafe_code, reason = "sets of signals and of descriptors are passed by raw pointers")]

use core::ptr;
use core::time::Duration;

use crate::arch::number;
use crate::call;
use crate::errno::Errno;
use crate::fd::Fd;
use crate::time::Timespec;

/// A hang-up, or a request to reload (signal(7); the numbers are the same on x86-64 and arm64).
pub const HUP: u32 = 1;
/// The user interrupts, or dockerd ends a proxy.
pub const INT: u32 = 2;
/// The user quits.
pub const QUIT: u32 = 3;
/// For the program's own use.
pub const USR1: u32 = 10;
/// For the program's own use.
pub const USR2: u32 = 12;
/// The reader of a pipe is gone.
pub const PIPE: u32 = 13;
/// A timer.
pub const ALRM: u32 = 14;
/// A request to end.
pub const TERM: u32 = 15;

const SIG_BLOCK: usize = 0;
/// `SFD_NONBLOCK | SFD_CLOEXEC`
const SFD_FLAGS: usize = 0o4000 | 0o2_000_000;
/// The size of the kernel's `sigset_t`.
const SET_SIZE: usize = size_of::<u64>();

const POLLIN: i16 = 1;

/// Blocked signals, which wait until they are read.
#[derive(Debug)]
pub struct Signals(Fd);

impl Signals {
    /// Blocks signals and queues them. Those that were blocked before stay blocked.
    ///
    /// # Errors
    /// Those of sigprocmask(2) and signalfd(2).
    pub fn catch(signals: &[u32]) -> Result<Self, Errno> {
        let set: u64 = signals.iter().fold(0, |set, signal| set | 1 << (signal - 1));
        let set = (&raw const set).expose_provenance();
        let nowhere = ptr::null::<u64>().expose_provenance();
        // SAFETY: the kernel reads a set of `SET_SIZE` bytes, and writes none.
        unsafe { call(number::RT_SIGPROCMASK, [SIG_BLOCK, set, nowhere, SET_SIZE]) }?;
        // SAFETY: the kernel reads a set of `SET_SIZE` bytes; -1 asks for a new descriptor.
        unsafe { call(number::SIGNALFD4, [usize::MAX, set, SET_SIZE, SFD_FLAGS]) }
            .map(|fd| Self(Fd::returned(fd)))
    }

    /// The next signal, if one is queued.
    pub fn next(&self) -> Option<u32> {
        // `struct signalfd_siginfo` starts with the number.
        let mut info = [0; 128];
        let len = self.0.read(&mut info).ok()?;
        info[..len].first_chunk().map(|number| u32::from_ne_bytes(*number))
    }
}

/// `struct pollfd`
#[repr(C)]
struct PollFd {
    fd: i32,
    events: i16,
    ready: i16,
}

/// Waits until a signal is queued or, if there is a second descriptor, that is readable or has failed; at most
/// `timeout` long (ppoll(2)). Returns whether the second one is ready.
///
/// # Errors
/// Those of ppoll(2), including [`Errno::INTR`].
pub fn wait(signals: Option<&Signals>, other: Option<&Fd>, timeout: Option<Duration>) -> Result<bool, Errno> {
    // Negative descriptors are skipped.
    let entry = |fd: Option<&Fd>| PollFd { fd: fd.map_or(-1, Fd::number), events: POLLIN, ready: 0 };
    let mut entries = [entry(signals.map(|signals| &signals.0)), entry(other)];
    let mut timeout = timeout.map(Timespec::from);
    let timeout = timeout.as_mut().map_or(ptr::null_mut(), ptr::from_mut).expose_provenance();
    let list = entries.as_mut_ptr().expose_provenance();
    // SAFETY: the list has as many entries as are announced; the kernel writes into it and into the timeout, both
    // of which are borrowed mutably. Without a set of signals, its size does not matter.
    unsafe { call(number::PPOLL, [list, entries.len(), timeout, 0, SET_SIZE]) }?;
    Ok(entries[1].ready != 0)
}

#[cfg(test)]
mod tests {
    use std::io::pipe;
    use std::os::fd::IntoRawFd;
    use std::thread;

    use super::*;

    /// Blocks signals of one thread only.
    fn on_new_thread(task: impl FnOnce() + Send + 'static) {
        thread::spawn(task).join().unwrap();
    }

    #[test]
    fn a_wait_ends_with_the_timeout_or_with_something_to_read() {
        on_new_thread(|| {
            let signals = Signals::catch(&[USR1]).unwrap();
            let (reader, writer) = pipe().unwrap();
            let (reader, writer) =
                (Fd::claim(reader.into_raw_fd()).unwrap(), Fd::claim(writer.into_raw_fd()).unwrap());
            let timeout = Some(Duration::from_millis(1));
            assert_eq!(wait(Some(&signals), Some(&reader), timeout), Ok(false));
            assert_eq!(wait(None, None, timeout), Ok(false));
            assert_eq!(signals.next(), None);
            writer.write(b"x").unwrap();
            assert_eq!(wait(Some(&signals), Some(&reader), None), Ok(true));
        });
    }
}
