//! From the slots of a received batch to messages that can be sent: nothing is copied.

use std::io::IoSlice;
use std::ops::{AddAssign, Range};

use arrayvec::ArrayVec;
use rproxy_sys::udp::{BATCH, RecvBatch, Transmit};
use tracing::warn;

use super::table::FlowId;
use super::train::{Chunk, trains};
use crate::log_limit::LogLimit;

/// The payloads of some slots, in the order in which they are to be sent.
pub(super) struct Payload<'a> {
    pieces: ArrayVec<IoSlice<'a>, BATCH>,
}

/// How much some datagrams are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Amount {
    pub(super) datagrams: u64,
    pub(super) bytes: u64,
}

impl Amount {
    fn of(chunks: &[Chunk]) -> Self {
        let datagrams = |chunk: &Chunk| match chunk.segment {
            Some(size) if chunk.len > 0 => chunk.len.div_ceil(usize::from(size.max(1))),
            _ => 1,
        };
        Self {
            datagrams: chunks.iter().map(|chunk| datagrams(chunk) as u64).sum(),
            bytes: chunks.iter().map(|chunk| chunk.len as u64).sum(),
        }
    }
}

impl AddAssign for Amount {
    fn add_assign(&mut self, other: Self) {
        self.datagrams += other.datagrams;
        self.bytes += other.bytes;
    }
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
    /// that come of it to `part`: joined into trains if the path takes them. Gives how much it is.
    pub(super) fn add(
        &mut self,
        batch: &'a RecvBatch,
        datagrams: &[(FlowId, usize)],
        join: bool,
        part: &mut dyn FnMut(Part),
    ) -> Amount {
        let start = self.pieces.len();
        let mut chunks: ArrayVec<Chunk, BATCH> = ArrayVec::new();
        for (_id, slot) in datagrams {
            let Some(bytes) = batch.payload(*slot) else {
                log_cut();
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
        Amount::of(&chunks)
    }
}

impl Part {
    /// The message, for a connected socket.
    pub(super) fn message<'a>(&self, payload: &'a Payload<'_>) -> Transmit<'a> {
        let payload = &payload.pieces[self.pieces.clone()];
        Transmit { payload, to: None, source: None, segment: self.segment }
    }
}

fn log_cut() {
    static CUT: LogLimit = LogLimit::new();
    if let Some(suppressed) = CUT.permit() {
        warn!(suppressed, "datagram lost: larger than any that IPv4 and IPv6 have");
    }
}
