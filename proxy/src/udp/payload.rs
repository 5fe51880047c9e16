//! From the slots of a received batch to messages that can be sent: nothing is copied.

use std::io::IoSlice;
use std::net::SocketAddr;
use std::ops::Range;

use arrayvec::ArrayVec;
use rproxy_mapping::dscp::Dscp;
use rproxy_sys::udp::{BATCH, RecvBatch, Transmit};

use super::gso::{Chunk, gso};
use super::table::FlowId;
use super::tally::{Amount, Tally};

/// The bits of a traffic class that are for congestion (RFC 3168, section 5).
const ECN: u8 = 0b11;

/// The payloads of some slots, in the order in which they are to be sent.
pub(super) struct Payload<'a> {
    pieces: ArrayVec<IoSlice<'a>, BATCH>,
    dscp: Option<Dscp>,
}

/// The pieces of a [`Payload`] that make one message.
pub(super) struct Part {
    pieces: Range<usize>,
    segment: Option<u16>,
    class: u8,
}

impl<'a> Payload<'a> {
    /// One that is to be sent with the code point `dscp`, or with those that its datagrams came with. What they say of
    /// congestion is passed on either way.
    pub(super) fn new(dscp: Option<Dscp>) -> Self {
        Self { pieces: ArrayVec::new(), dscp }
    }

    /// Adds what was received in the slots of `datagrams`, all of one flow, and returns the messages that come of it:
    /// joined into GSO batches if the path takes them. In `tally` they count as relayed, unless they are taken out
    /// again.
    pub(super) fn add(
        &mut self,
        batch: &'a RecvBatch,
        datagrams: &[(FlowId, usize)],
        join: bool,
        tally: &mut Tally,
    ) -> ArrayVec<Part, BATCH> {
        let start = self.pieces.len();
        let mut chunks: ArrayVec<Chunk, BATCH> = ArrayVec::new();
        for (_id, slot) in datagrams {
            let Some(bytes) = batch.payload(*slot) else {
                tally.cut();
                continue;
            };
            let control = batch.control(*slot);
            let class = self.dscp.map_or(control.class, |dscp| dscp.bits() << 2 | control.class & ECN);
            chunks.push(Chunk { len: bytes.len(), segment: control.segment, class });
            self.pieces.push(IoSlice::new(bytes));
        }
        tally.relayed += amount_of(&chunks);
        let part = |chunks: Range<usize>, segment, class| {
            let pieces = start + chunks.start..start + chunks.end;
            Part { pieces, segment, class }
        };
        if join {
            gso(&chunks).map(|batch_of| part(batch_of.chunks, batch_of.segment, batch_of.class)).collect()
        } else {
            let chunks = chunks.iter().enumerate();
            chunks.map(|(i, chunk)| part(i..i + 1, chunk.segment, chunk.class)).collect()
        }
    }
}

fn amount_of(chunks: &[Chunk]) -> Amount {
    Amount {
        datagrams: chunks.iter().map(|chunk| chunk.count() as u64).sum(),
        bytes: chunks.iter().map(|chunk| chunk.len as u64).sum(),
    }
}

impl Part {
    /// The message, to `to` or, on a connected socket, to its peer.
    pub(super) fn message<'a>(&self, payload: &'a Payload<'_>, to: Option<SocketAddr>) -> Transmit<'a> {
        let payload = &payload.pieces[self.pieces.clone()];
        Transmit { payload, to, source: None, segment: self.segment, class: self.class }
    }
}
