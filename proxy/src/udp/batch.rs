//! The buffers for the datagrams of a turn, and the flow of each datagram.

use std::time::{Duration, Instant};

use rproxy_sys::udp::RecvBatch;

use super::proxy_header::HeadedBatch;
use super::routed::Routed;

/// Memory that is kept for the next turn.
const KEPT_BYTES: usize = 64 * 1024;

/// Memory beyond that is freed if less was received within this time.
const IN_USE: Duration = Duration::from_secs(1);

/// Received datagrams, or GSO batches, and their flows.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// The receive buffers.
    pub(super) received: RecvBatch,
    /// The datagrams to be sent, and their flows.
    pub(super) slots: Vec<Routed>,
    /// Those of a flow whose backend gets headers.
    pub(super) headed: HeadedBatch,
}

impl Batch {
    /// The memory of its buffers, in bytes.
    fn memory(&self) -> usize {
        self.received.memory() + self.headed.memory()
    }

    /// The first slot after those to be sent.
    pub(super) fn next_slot(&self) -> usize {
        self.slots.last().map_or(0, |routed| routed.slot + 1)
    }
}

/// The only batch of a relay, allocated on demand: an idle mapping has no buffers.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    batch: Option<Box<Batch>>,
    /// Approximate number of bytes received since the last check.
    taken: usize,
    /// The time of the next check, if the batch holds more memory than is kept.
    pub(super) next_look: Option<Instant>,
}

impl Buffers {
    /// Takes the batch for a turn.
    pub(super) fn take(&mut self) -> Box<Batch> {
        self.batch.take().unwrap_or_default()
    }

    /// Puts the batch back after a turn that received `taken` bytes.
    pub(super) fn put_back(&mut self, batch: Box<Batch>, taken: usize) {
        self.batch = Some(batch);
        self.taken = self.taken.saturating_add(taken);
    }

    /// Frees the memory that a burst left in the batch, unless bursts continue.
    pub(super) fn give_back(&mut self, now: Instant) {
        if self.next_look.is_some_and(|at| now < at) {
            return;
        }
        let Some(batch) = &mut self.batch else { return };
        if batch.memory() <= KEPT_BYTES {
            return;
        }
        if self.next_look.is_some() && self.taken < batch.memory() {
            batch.received.give_back();
            batch.headed.give_back();
        }
        self.next_look = (batch.memory() > KEPT_BYTES).then(|| now + IN_USE);
        self.taken = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use super::*;
    use crate::udp::table::FlowId;

    /// Receives this many datagrams, each of which fills most of a slot.
    fn receive_large(buffers: &mut Buffers, count: usize) -> usize {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(socket.local_addr().unwrap()).unwrap();
        let mut batch = buffers.take();
        for slot in 0..count {
            socket.send(&[7; 60_000]).unwrap();
            // Waits for the datagram.
            assert_eq!(socket.peek(&mut [0]).unwrap(), 1);
            assert_eq!(batch.received.recv(socket.as_fd(), slot, 1, false).unwrap(), 1);
        }
        let memory = batch.received.memory();
        buffers.put_back(batch, memory);
        memory
    }

    fn memory(buffers: &mut Buffers) -> usize {
        let batch = buffers.take();
        let memory = batch.received.memory();
        buffers.put_back(batch, 0);
        memory
    }

    #[test]
    fn what_a_burst_took_is_given_back_when_it_is_over() {
        let mut buffers = Buffers::default();
        let start = Instant::now();
        let took = receive_large(&mut buffers, 3);
        assert!(took >= 3 * 60_000);
        buffers.give_back(start);
        assert_eq!(buffers.next_look, Some(start + IN_USE));
        // The burst continues.
        receive_large(&mut buffers, 4);
        buffers.give_back(start + IN_USE / 2);
        assert_eq!(buffers.next_look, Some(start + IN_USE), "it is not looked at before");
        buffers.give_back(start + IN_USE);
        assert!(memory(&mut buffers) > took);
        assert_eq!(buffers.next_look, Some(start + 2 * IN_USE));
        buffers.give_back(start + 2 * IN_USE);
        assert_eq!((memory(&mut buffers), buffers.next_look), (0, None));
    }

    #[test]
    fn a_little_is_kept() {
        let mut buffers = Buffers::default();
        let start = Instant::now();
        let took = receive_large(&mut buffers, 1);
        assert!(took <= KEPT_BYTES);
        buffers.give_back(start);
        assert_eq!((memory(&mut buffers), buffers.next_look), (took, None));
    }

    #[test]
    fn the_next_slot_is_behind_those_in_use() {
        let mut batch = Batch::default();
        assert_eq!(batch.next_slot(), 0);
        batch.slots.push(Routed::whole(FlowId::from_u64(1), 4));
        assert_eq!(batch.next_slot(), 5);
    }
}
