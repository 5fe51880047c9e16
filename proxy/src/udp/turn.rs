//! The work that the relay does before it yields, limited in bytes as well as in datagrams.
//!
//! A datagram may have 64 kB, and so may a received GSO batch; several hundred of them take as long as all other work
//! of the process.

use std::ops::Range;
use std::time::Instant;

use nix::sys::epoll::{EpollEvent, EpollFlags};
use rproxy_sys::udp::{BATCH, RecvBatch};

/// Maximum number of events per epoll_wait(2).
const EVENTS: usize = 256;

/// Bytes to receive before the relay yields: relaying them takes a fraction of a millisecond.
const BYTES: usize = 256 * 1024;

/// Additional cost of each datagram or GSO batch, in bytes.
const OVERHEAD: usize = 256;

/// Minimum number of slots for one receive, for the largest datagrams.
const LEAST_SLOTS: usize = 4;

/// Batches to receive from a listener in one turn, before flows are served.
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
    /// The time of its start.
    pub(super) fn start(&self) -> Instant {
        self.start
    }

    /// Whether the relay should yield.
    pub(super) fn is_over(&self) -> bool {
        self.left == 0
    }

    /// Approximate number of bytes received.
    pub(super) fn taken(&self) -> usize {
        BYTES - self.left
    }

    /// Counts what was received in some slots of `batch`. Returns the new usual size for that socket, which was
    /// `usual`: it grows to a larger size at once, and decreases by halves.
    pub(super) fn take(&mut self, batch: &RecvBatch, slots: Range<usize>, usual: usize) -> usize {
        let count = slots.len().max(1);
        let bytes = batch.bytes(slots);
        self.left = self.left.saturating_sub(bytes + count * OVERHEAD);
        (bytes / count).max(usual / 2)
    }
}

/// The number of datagrams or GSO batches of a usual size to receive at once.
pub(super) fn slots_for(usual_size: usize) -> usize {
    (BYTES / usual_size.max(1)).clamp(LEAST_SLOTS, BATCH)
}

/// Events of sockets, some of which are not handled yet.
#[derive(Debug)]
pub(super) struct Events {
    all: Vec<EpollEvent>,
    left: Range<usize>,
}

impl Events {
    /// No events.
    pub(super) fn new() -> Self {
        Self { all: vec![EpollEvent::new(EpollFlags::empty(), 0); EVENTS], left: 0..0 }
    }

    /// Whether all are handled.
    pub(super) fn is_over(&self) -> bool {
        self.left.is_empty()
    }

    /// The buffer for further events.
    pub(super) fn room(&mut self) -> &mut [EpollEvent] {
        &mut self.all
    }

    /// Records the number of events in the buffer.
    pub(super) fn refill(&mut self, count: usize) {
        self.left = 0..count;
    }

    /// The next event.
    pub(super) fn next(&mut self) -> Option<EpollEvent> {
        self.left.next().map(|index| self.all[index])
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn the_larger_they_are_the_fewer_are_received_at_once() {
        for (size, slots) in [(0, BATCH), (64, BATCH), (1_400, BATCH), (16_384, 16), (65_507, LEAST_SLOTS)] {
            assert_eq!(slots_for(size), slots, "of {size} bytes");
        }
    }

    #[test]
    fn a_turn_is_over_once_enough_was_received_and_the_usual_size_falls_by_halves() {
        let [socket, sender] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        sender.connect(socket.local_addr().unwrap()).unwrap();
        for size in [1000, 600] {
            sender.send(&vec![0; size]).unwrap();
        }
        let mut batch = RecvBatch::new();
        assert_eq!(batch.recv(socket.as_fd(), 0, BATCH, false).unwrap(), 2);

        let mut turn = Turn::default();
        assert!(!turn.is_over() && turn.taken() == 0);
        assert_eq!(turn.take(&batch, 0..2, 0), 800);
        let cost = 1600 + 2 * OVERHEAD;
        assert_eq!(turn.taken(), cost);
        assert_eq!(turn.take(&batch, 0..2, 4000), 2000);
        assert_eq!(turn.take(&batch, 0..0, 100), 50, "nothing was received");
        assert_eq!(turn.taken(), 2 * cost + OVERHEAD);
        for _ in 0..BYTES / cost {
            turn.take(&batch, 0..2, 0);
        }
        assert!(turn.is_over() && turn.taken() == BYTES);
    }
}
