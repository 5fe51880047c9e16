//! From the slots of a received batch to messages that can be sent: nothing is copied.

use std::io::IoSlice;
use std::ops::Range;

use arrayvec::ArrayVec;
use rproxy_sys::udp::{BATCH, RecvBatch, Transmit};

use super::table::FlowId;
use super::tally::{Amount, Tally};
use super::train::{Chunk, trains};

/// The payloads of some slots, in the order in which they are to be sent.
pub(super) struct Payload<'a> {
    pieces: ArrayVec<IoSlice<'a>, BATCH>,
}

/// The pieces of a [`Payload`] that make one message.
pub(super) struct Part {
    pieces: Range<usize>,
    segment: Option<u16>,
}

impl<'a> Payload<'a> {
    pub(super) fn new() -> Self {
        Self { pieces: ArrayVec::new() }
    }

    /// Adds what was received in the slots of `datagrams`, all of one flow, and passes the messages
    /// that come of it to `part`: joined into trains if the path takes them. In `tally` they count as
    /// relayed, unless they are taken out again.
    pub(super) fn add(
        &mut self,
        batch: &'a RecvBatch,
        datagrams: &[(FlowId, usize)],
        join: bool,
        tally: &mut Tally,
        part: &mut dyn FnMut(Part),
    ) {
        let start = self.pieces.len();
        let mut chunks: ArrayVec<Chunk, BATCH> = ArrayVec::new();
        for (_id, slot) in datagrams {
            let Some(bytes) = batch.payload(*slot) else {
                tally.cut();
                continue;
            };
            chunks.push(Chunk { len: bytes.len(), segment: batch.control(*slot).segment });
            self.pieces.push(IoSlice::new(bytes));
        }
        let mut add = |chunks: Range<usize>, segment| {
            part(Part { pieces: start + chunks.start..start + chunks.end, segment });
        };
        if join {
            trains(&chunks).for_each(|train| add(train.chunks, train.segment));
        } else {
            chunks.iter().enumerate().for_each(|(i, chunk)| add(i..i + 1, chunk.segment));
        }
        tally.relayed += amount_of(&chunks);
    }
}

fn amount_of(chunks: &[Chunk]) -> Amount {
    Amount {
        datagrams: chunks.iter().map(|chunk| chunk.count() as u64).sum(),
        bytes: chunks.iter().map(|chunk| chunk.len as u64).sum(),
    }
}

impl Part {
    /// The message, for a connected socket.
    pub(super) fn message<'a>(&self, payload: &'a Payload<'_>) -> Transmit<'a> {
        let payload = &payload.pieces[self.pieces.clone()];
        Transmit { payload, to: None, source: None, segment: self.segment }
    }
}
