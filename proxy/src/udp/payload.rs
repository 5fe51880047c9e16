//! Builds messages from the slots of a received batch without copying.

use std::io::IoSlice;
use std::net::SocketAddr;
use std::ops::Range;

use arrayvec::ArrayVec;
use rproxy_mapping::dscp::Dscp;
use rproxy_sys::udp::{BATCH, RecvBatch, Transmit};

use super::gso::{Chunk, gso};
use super::routed::Routed;
use super::tally::{Amount, Tally};

/// The bits of the traffic class for congestion (ECN, RFC 3168, section 5).
const ECN: u8 = 0b11;

/// The payloads of some slots, in the order of sending.
pub(super) struct Payload<'a> {
    pieces: ArrayVec<IoSlice<'a>, BATCH>,
    dscp: Option<Dscp>,
}

/// The pieces of a [`Payload`] that form one message.
pub(super) struct Part {
    pieces: Range<usize>,
    segment: Option<u16>,
    class: u8,
}

impl<'a> Payload<'a> {
    /// An empty payload, to be sent with the code point `dscp`, or with those of the datagrams. Congestion marks are
    /// kept in both cases.
    pub(super) fn new(dscp: Option<Dscp>) -> Self {
        Self { pieces: ArrayVec::new(), dscp }
    }

    /// Adds datagrams, all of one flow, and returns the resulting messages, as [`Self::add_chunks`] does. Those that were
    /// truncated are lost.
    pub(super) fn add(
        &mut self,
        batch: &'a RecvBatch,
        datagrams: &[Routed],
        join: bool,
        tally: &mut Tally,
    ) -> ArrayVec<Part, BATCH> {
        let whole = datagrams.iter().filter_map(|datagram| datagram.payload(batch));
        let (parts, count) = self.add_chunks(whole, join, tally);
        (count..datagrams.len()).for_each(|_| tally.cut());
        parts
    }

    /// Adds chunks of one flow, at most [`BATCH`] in all, and returns the resulting messages: grouped into GSO batches if
    /// the path accepts them. Also returns the number of chunks. `tally` counts them as relayed; those that are not sent
    /// are subtracted later.
    pub(super) fn add_chunks(
        &mut self,
        added: impl Iterator<Item = (&'a [u8], Chunk)>,
        join: bool,
        tally: &mut Tally,
    ) -> (ArrayVec<Part, BATCH>, usize) {
        let start = self.pieces.len();
        let mut chunks: ArrayVec<Chunk, BATCH> = ArrayVec::new();
        for (bytes, chunk) in added {
            let class = self.dscp.map_or(chunk.class, |dscp| dscp.bits() << 2 | chunk.class & ECN);
            chunks.push(Chunk { class, ..chunk });
            self.pieces.push(IoSlice::new(bytes));
        }
        tally.relayed += amount_of(&chunks);
        let part = |chunks: Range<usize>, segment, class| {
            let pieces = start + chunks.start..start + chunks.end;
            Part { pieces, segment, class }
        };
        let parts = if join {
            gso(&chunks).map(|batch_of| part(batch_of.chunks, batch_of.segment, batch_of.class)).collect()
        } else {
            let chunks = chunks.iter().enumerate();
            chunks.map(|(i, chunk)| part(i..i + 1, chunk.segment, chunk.class)).collect()
        };
        (parts, chunks.len())
    }
}

fn amount_of(chunks: &[Chunk]) -> Amount {
    Amount {
        datagrams: chunks.iter().map(|chunk| chunk.count() as u64).sum(),
        bytes: chunks.iter().map(|chunk| chunk.len as u64).sum(),
    }
}

impl Part {
    /// The message to `to`, or to the peer of a connected socket.
    pub(super) fn message<'a>(&self, payload: &'a Payload<'_>, to: Option<SocketAddr>) -> Transmit<'a> {
        let payload = &payload.pieces[self.pieces.clone()];
        Transmit { payload, to, source: None, segment: self.segment, class: self.class }
    }
}
