//! What moves in one direction of a connection.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::stats::Counter;

/// Looks per idle timeout: a connection is cut at most a fourth of it late.
const LOOKS: u32 = 4;

/// Counts the bytes that one direction of a connection has moved, for the connection and its mapping.
#[derive(Debug)]
pub(super) struct Meter<'a> {
    /// Written by the direction alone, and read by [`until_idle`].
    moved: AtomicU64,
    total: &'a Counter,
}

impl<'a> Meter<'a> {
    /// A direction that has moved nothing yet, and counts towards `total`.
    pub(super) fn new(total: &'a Counter) -> Self {
        Self { moved: AtomicU64::new(0), total }
    }

    /// Counts bytes that the sink took.
    pub(super) fn add(&self, bytes: usize) {
        self.moved.store(self.moved() + bytes as u64, Ordering::Relaxed);
        self.total.add(bytes as u64);
    }

    /// The bytes of this connection.
    pub(super) fn moved(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }
}

/// Waits until nothing has moved for `limit`. It looks from time to time, so that what moves need not
/// say when.
pub(super) async fn until_idle(limit: Duration, meters: [&Meter<'_>; 2]) {
    let look = || meters.map(Meter::moved);
    let (mut seen, mut quiet) = (look(), 0);
    while quiet < LOOKS {
        tokio::time::sleep(limit / LOOKS).await;
        let now = look();
        quiet = if now == seen { quiet + 1 } else { 0 };
        seen = now;
    }
}
