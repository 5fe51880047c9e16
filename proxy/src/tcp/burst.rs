//! Bursts: what a direction moves without a pause and without an answer, such as a response or an upload.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

use super::direction::Direction;

/// Bytes of a burst from which on it is spliced; below, copying is cheaper. After a burst of this size, the next one is
/// spliced from its first byte, because the responses of a connection are often alike.
const LARGE: u32 = 64 * 1024;

/// Bytes of a burst from which on it is [relayed in bulk](super::bulk), so that shorter ones do not end with the delay of
/// a tick.
const SUSTAINED: u32 = 4 * 1024 * 1024;

/// A pause that ends a burst, in milliseconds.
const PAUSE: u32 = 1;

/// The burst of a direction. Each connection has two, so the fields are short: the low 32 bits of counts of bytes. That
/// a burst of 4 GiB is taken for a new one costs nothing but a few copies.
#[derive(Debug, Default)]
pub(super) struct Burst {
    /// What this direction had moved when the burst began.
    start: u32,
    /// What the opposite direction had moved then.
    opposite: u32,
    /// When the burst was last moved on, if it is large.
    last: u32,
    /// Whether the burst before it was large.
    follows_large: bool,
}

impl Burst {
    /// Whether to splice.
    pub(super) fn is_large(&self, direction: &Direction<'_>) -> bool {
        self.follows_large || self.moved(direction) >= LARGE
    }

    /// Whether to relay in bulk.
    pub(super) fn is_sustained(&self, direction: &Direction<'_>) -> bool {
        self.moved(direction) >= SUSTAINED
    }

    /// Records that bytes may have been moved.
    pub(super) fn note_progress(&mut self, direction: &Direction<'_>) {
        if self.moved(direction) >= LARGE {
            self.last = now();
        }
    }

    /// Begins another burst if the opposite direction has moved something since, or if there was a pause.
    pub(super) fn begin_next_if_over(&mut self, direction: &Direction<'_>) {
        let is_answered = low(direction.opposite.moved()) != self.opposite;
        let paused = || self.moved(direction) >= LARGE && now().wrapping_sub(self.last) > PAUSE;
        if is_answered || paused() {
            self.restart(direction);
        }
    }

    /// Begins another burst.
    pub(super) fn restart(&mut self, direction: &Direction<'_>) {
        self.follows_large = self.moved(direction) >= LARGE;
        (self.start, self.opposite) = (low(direction.meter.moved()), low(direction.opposite.moved()));
    }

    fn moved(&self, direction: &Direction<'_>) -> u32 {
        low(direction.meter.moved()).wrapping_sub(self.start)
    }
}

fn low(count: u64) -> u32 {
    let [a, b, c, d, ..] = count.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// Milliseconds since this was first called.
fn now() -> u32 {
    static FIRST: LazyLock<Instant> = LazyLock::new(Instant::now);
    let elapsed: Duration = FIRST.elapsed();
    low(elapsed.as_secs().wrapping_mul(1000).wrapping_add(elapsed.subsec_millis().into()))
}
