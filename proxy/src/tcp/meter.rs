//! Byte counts of one direction of a connection.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::state::record::Traffic;
use crate::state::stats::Counter;

/// Counts the bytes that one direction of a connection has moved, for the connection and its mapping.
#[derive(Debug)]
pub(super) struct Meter<'a> {
    /// Written only by the direction, and read by the idle check.
    moved: AtomicU64,
    total: &'a Counter,
    /// The same for whoever asks for this connection, if it is recorded.
    pub(super) recorded: Option<&'a Traffic>,
}

impl<'a> Meter<'a> {
    /// A meter at 0, which also adds to `total`, and to what is `recorded` of the connection.
    pub(super) fn new(total: &'a Counter, recorded: Option<&'a Traffic>) -> Self {
        Self { moved: AtomicU64::new(0), total, recorded }
    }

    /// Counts bytes that the sink accepted.
    pub(super) fn add(&self, bytes: usize) {
        self.moved.store(self.moved() + bytes as u64, Ordering::Relaxed);
        self.total.add(bytes as u64);
        if let Some(recorded) = self.recorded {
            recorded.add(bytes as u64);
        }
    }

    /// The bytes of this connection.
    pub(super) fn moved(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }
}
