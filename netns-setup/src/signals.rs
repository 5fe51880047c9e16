//! Signals that ask this program to end. It then undoes what it has begun.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::signal::Signal;

/// Signals of a terminal, a service manager, and a shell that exits.
const SIGNALS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// No signal has this number.
const NONE: usize = 0;

/// Catches signals, so that they do not end the process.
#[derive(Debug, Clone)]
pub struct Signals(Arc<AtomicUsize>);

impl Signals {
    /// Catches them from now on. A signal that cannot be caught ends the process, and `repair` has to finish
    /// what it began.
    #[must_use]
    pub fn catch() -> Self {
        let caught = Arc::new(AtomicUsize::new(NONE));
        for signal in SIGNALS.into_iter().filter(|signal| !is_ignored(*signal)) {
            let number = signal as i32;
            let value = usize::try_from(number).expect("numbers of signals are positive");
            drop(signal_hook::flag::register_usize(number, caught.clone(), value));
        }
        Self(caught)
    }

    /// The last signal that arrived.
    #[must_use]
    pub fn caught(&self) -> Option<Signal> {
        let number = i32::try_from(self.0.load(Ordering::SeqCst)).ok()?;
        Signal::try_from(number).ok()
    }

    /// A socket that becomes readable when one arrives from now on.
    ///
    /// # Errors
    /// Those of socketpair(2) and sigaction(2).
    pub fn wake(&self) -> io::Result<UnixStream> {
        let (ours, written) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        for signal in SIGNALS.into_iter().filter(|signal| !is_ignored(*signal)) {
            signal_hook::low_level::pipe::register(signal as i32, written.try_clone()?)?;
        }
        Ok(ours)
    }

    /// Clears the received signal.
    pub fn forget(&self) {
        self.0.store(NONE, Ordering::SeqCst);
    }
}

/// Whether this process was started with the signal ignored, as by nohup(1) (`SigIgn` of proc_pid_status(5)).
fn is_ignored(signal: Signal) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal as i32 - 1) & 1 == 1)
}
