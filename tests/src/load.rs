//! What goes on while something else happens.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use crate::eventually;

/// Sets a flag when it is dropped, also by a panic.
pub struct SetOnDrop<'a>(pub &'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What [`meanwhile`] does again and again.
#[derive(Debug, Default)]
pub struct Load {
    begun: AtomicUsize,
    over: AtomicBool,
    failed: AtomicBool,
}

impl Load {
    /// How often it has been begun.
    pub fn begun(&self) -> usize {
        self.begun.load(Ordering::Relaxed)
    }

    /// Waits until it has been begun `more` times from now on, or has failed.
    #[track_caller]
    pub fn wait_for(&self, more: usize) {
        let enough = self.begun() + more;
        eventually("the load goes on", || self.begun() >= enough || self.failed.load(Ordering::Relaxed));
    }

    fn repeat(&self, act: &(impl Fn(usize) + Sync)) {
        while !self.over.load(Ordering::Relaxed) {
            let number = self.begun.fetch_add(1, Ordering::Relaxed);
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| act(number))) {
                self.failed.store(true, Ordering::Relaxed);
                resume_unwind(panic);
            }
        }
    }
}

/// Calls `act` with 0, 1, 2 … on so many threads until `body` returns; returns how often.
///
/// # Panics
/// When one of them does.
pub fn meanwhile(threads: usize, act: impl Fn(usize) + Sync, body: impl FnOnce(&Load)) -> usize {
    let load = Load::default();
    thread::scope(|scope| {
        let _end = SetOnDrop(&load.over);
        for _ in 0..threads {
            scope.spawn(|| load.repeat(&act));
        }
        body(&load);
    });
    load.begun()
}
