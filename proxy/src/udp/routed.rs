//! What was received, and the flow that it belongs to.

use std::ops::Range;

use rproxy_sys::udp::RecvBatch;

use super::gso::Chunk;
use super::table::FlowId;

/// A received datagram, a GSO batch, or a part of one, and its flow.
#[derive(Clone, Copy, Debug)]
pub(super) struct Routed {
    pub(super) id: FlowId,
    /// The slot that it was received into.
    pub(super) slot: usize,
    /// The bytes of the slot from `start` to `end`, as far as there are that many.
    start: u32,
    end: u32,
}

impl Routed {
    /// All that was received into a slot.
    pub(super) fn whole(id: FlowId, slot: usize) -> Self {
        Self { id, slot, start: 0, end: u32::MAX }
    }

    /// Some of the bytes in a slot.
    pub(super) fn part(id: FlowId, slot: usize, bytes: Range<usize>) -> Self {
        let [start, end] = [bytes.start, bytes.end].map(|at| u32::try_from(at).unwrap_or(u32::MAX));
        Self { id, slot, start, end }
    }

    /// Divides it after its first datagram.
    pub(super) fn split_first(self, received: &RecvBatch) -> (Self, Option<Self>) {
        let Some((bytes, chunk)) = self.payload(received) else { return (self, None) };
        let start = self.start as usize;
        let middle = start + chunk.size();
        let rest =
            (chunk.size() < bytes.len()).then(|| Self::part(self.id, self.slot, middle..start + bytes.len()));
        (Self::part(self.id, self.slot, start..middle), rest)
    }

    /// Its bytes, and how they are divided into datagrams. `None` if the kernel has truncated them.
    pub(super) fn payload(self, received: &RecvBatch) -> Option<(&[u8], Chunk)> {
        let bytes = received.payload(self.slot)?;
        let bytes = &bytes[self.start as usize..bytes.len().min(self.end as usize)];
        let control = received.control(self.slot);
        // A single datagram is no GSO batch, even if it came in one.
        let segment = control.segment.filter(|segment| bytes.len() > usize::from(*segment));
        Some((bytes, Chunk { len: bytes.len(), segment, class: control.class }))
    }
}
