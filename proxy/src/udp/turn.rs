//! What is done before others get their turn: bounded in bytes as well as in datagrams.
//!
//! A datagram may be 64 kB, and so may a GSO batch that the kernel hands over as one: a few hundred of them
//! take as long as all other work of the process.

use std::ops::Range;
use std::time::Instant;

use nix::sys::epoll::{EpollEvent, EpollFlags};
use rproxy_sys::udp::{BATCH, RecvBatch};

/// Sockets that are reported at a time.
const EVENTS: usize = 256;

/// Bytes that are taken before others get their turn: it takes a fraction of a millisecond to relay them.
const BYTES: usize = 256 * 1024;

/// Each datagram, or GSO batch, counts for this many bytes more.
const OVERHEAD: usize = 256;

/// The fewest that one receive asks for, of the largest.
const LEAST_SLOTS: usize = 4;

/// Batches taken from a listener in one turn, before flows get theirs.
pub(super) const LISTENER_BATCHES: usize = 4;

/// A turn of the relay.
#[derive(Debug)]
pub(super) struct Turn {
    start: Instant,
    left: usize,
}

impl Default for Turn {
    fn default() -> Self {
        Self { start: Instant::now(), left: BYTES }
    }
}

impl Turn {
    /// When it began.
    pub(super) fn start(&self) -> Instant {
        self.start
    }

    /// Whether it is the turn of others.
    pub(super) fn is_over(&self) -> bool {
        self.left == 0
    }

    /// How many bytes were taken, about.
    pub(super) fn taken(&self) -> usize {
        BYTES - self.left
    }

    /// Counts what was received in some slots of `batch`. Returns the usual size of what comes from there,
    /// which was `usual` before: a large size is believed at once, and forgotten by halves.
    pub(super) fn take(&mut self, batch: &RecvBatch, slots: Range<usize>, usual: usize) -> usize {
        let count = slots.len().max(1);
        let bytes = batch.bytes(slots);
        self.left = self.left.saturating_sub(bytes + count * OVERHEAD);
        (bytes / count).max(usual / 2)
    }
}

/// How many datagrams, or GSO batches, of a usual size are received at once.
pub(super) fn slots_for(usual_size: usize) -> usize {
    (BYTES / usual_size.max(1)).clamp(LEAST_SLOTS, BATCH)
}

/// Sockets that were reported, some of which are yet to be looked after.
#[derive(Debug)]
pub(super) struct Events {
    all: Vec<EpollEvent>,
    left: Range<usize>,
}

impl Events {
    /// None.
    pub(super) fn new() -> Self {
        Self { all: vec![EpollEvent::new(EpollFlags::empty(), 0); EVENTS], left: 0..0 }
    }

    /// Whether all have been looked after.
    pub(super) fn is_over(&self) -> bool {
        self.left.is_empty()
    }

    /// Where others may be reported.
    pub(super) fn room(&mut self) -> &mut [EpollEvent] {
        &mut self.all
    }

    /// As many have been reported.
    pub(super) fn refill(&mut self, count: usize) {
        self.left = 0..count;
    }

    /// The next one.
    pub(super) fn next(&mut self) -> Option<EpollEvent> {
        self.left.next().map(|index| self.all[index])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_larger_they_are_the_fewer_are_received_at_once() {
        for (size, slots) in [(0, BATCH), (64, BATCH), (1_400, BATCH), (16_384, 16), (65_507, LEAST_SLOTS)] {
            assert_eq!(slots_for(size), slots, "of {size} bytes");
        }
    }
}
