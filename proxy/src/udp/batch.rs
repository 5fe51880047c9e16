//! Room for what a turn receives, and which flow each datagram of it belongs to.

use std::time::{Duration, Instant};

use rproxy_sys::udp::RecvBatch;

use super::table::FlowId;

/// Memory that is kept for what comes next.
const KEPT_BYTES: usize = 64 * 1024;

/// More than that is given back when less was received within this time.
const IN_USE: Duration = Duration::from_secs(1);

/// Datagrams that were received, or GSO batches of them, and the flows that they belong to.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// Where they are.
    pub(super) received: RecvBatch,
    /// The flow of the datagram in each slot that is to be sent.
    pub(super) slots: Vec<(FlowId, usize)>,
}

impl Batch {
    /// The first slot behind those that are to be sent.
    pub(super) fn next_slot(&self) -> usize {
        self.slots.last().map_or(0, |(_id, slot)| slot + 1)
    }
}

/// The one batch of a relay, while it has one: an idle mapping has no buffers.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    batch: Option<Box<Batch>>,
    /// Bytes received since the batch was looked at last, about.
    taken: usize,
    /// When the batch is looked at next, if it has more memory than is kept.
    pub(super) next_look: Option<Instant>,
}

impl Buffers {
    /// The batch, for a turn.
    pub(super) fn take(&mut self) -> Box<Batch> {
        self.batch.take().unwrap_or_default()
    }

    /// The batch after a turn, in which `taken` bytes were received.
    pub(super) fn put_back(&mut self, batch: Box<Batch>, taken: usize) {
        self.batch = Some(batch);
        self.taken = self.taken.saturating_add(taken);
    }

    /// Returns the memory back that a burst left in the batch, unless bursts go on.
    pub(super) fn give_back(&mut self, now: Instant) {
        if self.next_look.is_some_and(|at| now < at) {
            return;
        }
        let Some(batch) = &mut self.batch else { return };
        let received = &mut batch.received;
        if received.memory() <= KEPT_BYTES {
            return;
        }
        if self.next_look.is_some() && self.taken < received.memory() {
            received.give_back();
        }
        self.next_look = (received.memory() > KEPT_BYTES).then(|| now + IN_USE);
        self.taken = 0;
    }
}
