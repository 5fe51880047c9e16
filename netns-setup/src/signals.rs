//! Signals that ask this program to end. What it has begun by then, it takes back.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::signal::Signal;

/// What a terminal, a service manager and a shell that goes away send.
const SIGNALS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// No signal has this number.
const NONE: usize = 0;

/// The signals of this process, caught instead of ending it.
#[derive(Debug)]
pub struct Signals(Arc<AtomicUsize>);

impl Signals {
    /// Catches them from here on. One that cannot be caught ends the process as before, and what it has begun is for
    /// `repair`.
    #[must_use]
    pub fn catch() -> Self {
        let caught = Arc::new(AtomicUsize::new(NONE));
        for signal in SIGNALS {
            let number = signal as i32;
            let value = usize::try_from(number).expect("numbers of signals are positive");
            drop(signal_hook::flag::register_usize(number, caught.clone(), value));
        }
        Self(caught)
    }

    /// The last one that came.
    #[must_use]
    pub fn caught(&self) -> Option<Signal> {
        let number = i32::try_from(self.0.load(Ordering::SeqCst)).ok()?;
        Signal::try_from(number).ok()
    }

    /// Forgets that one came.
    pub fn forget(&self) {
        self.0.store(NONE, Ordering::SeqCst);
    }
}
