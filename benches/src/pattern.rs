//! The stream data, which the receiver can verify without a copy.
//!
//! A stream is a position-dependent pattern followed by a trailer with the length of the pattern. The pattern
//! repeats after a prime number of words. Bytes that are lost, duplicated or reordered shift what follows,
//! unless their number is a multiple of that period, which the trailer reveals.

use std::io;
use std::sync::LazyLock;

/// The length of the pattern in bytes: small enough for the second-level cache, so that generating data is
/// cheap, and not a multiple of a page, a segment or a pipe.
const PERIOD: usize = 16_381 * 8;

/// The length of the trailer: [`MAGIC`] and the number of bytes before it.
const TRAILER: usize = 16;

const MAGIC: u64 = 0x5eed_0f70_7261_696c;

/// One read out of this many is compared completely; of the others, only both ends. A shift shows at an end,
/// so this only misses bytes changed in place, which are detected if they occur often.
const FULL_CHECK: u32 = 16;

/// Twice the period, so that a period starting anywhere is one slice.
static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let word = |index: u64| {
        // The finaliser of splitmix64, which makes neighbouring words independent.
        let mut x = index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)).to_le_bytes()
    };
    (0..PERIOD as u64 / 8).flat_map(word).collect::<Vec<_>>().repeat(2)
});

/// At most `len` bytes of the pattern starting at `offset`: less if `len` is more than a period.
pub(crate) fn from(offset: u64, len: usize) -> &'static [u8] {
    at(offset, len.min(PERIOD))
}

/// `len` bytes of the pattern starting at `offset`; `len` is at most a period.
pub(crate) fn at(offset: u64, len: usize) -> &'static [u8] {
    // The remainder is below PERIOD, so it fits.
    let start = usize::try_from(offset % PERIOD as u64).unwrap_or_default();
    &PATTERN[start..start + len]
}

/// A difference from what was sent. It fails the run.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Wrong(pub(crate) String);

/// The sending half of a stream.
#[derive(Debug, Default)]
pub(crate) struct Outgoing {
    sent: u64,
    /// The trailer and how much of it was sent, after the end of the data.
    trailer: Option<([u8; TRAILER], usize)>,
}

impl Outgoing {
    /// What to send next; empty if everything is sent.
    pub(crate) fn chunk(&self) -> &[u8] {
        match &self.trailer {
            None => at(self.sent, PERIOD),
            Some((trailer, sent)) => &trailer[*sent..],
        }
    }

    /// Records that `count` bytes of the chunk were sent.
    pub(crate) fn advance(&mut self, count: usize) {
        match &mut self.trailer {
            None => self.sent += count as u64,
            Some((_, sent)) => *sent += count,
        }
    }

    /// Ends the data: only the trailer remains to be sent.
    pub(crate) fn finish(&mut self) {
        let mut trailer = [0; TRAILER];
        trailer[..8].copy_from_slice(&MAGIC.to_le_bytes());
        trailer[8..].copy_from_slice(&self.sent.to_le_bytes());
        self.trailer.get_or_insert((trailer, 0));
    }

    /// Whether the trailer is sent.
    pub(crate) fn is_done(&self) -> bool {
        self.trailer.is_some() && self.chunk().is_empty()
    }

    /// The number of pattern bytes sent.
    pub(crate) fn sent(&self) -> u64 {
        self.sent
    }
}

/// Compares reads with the pattern.
#[derive(Debug, Default)]
pub(crate) struct Checker {
    /// Where in the pattern the next byte belongs.
    place: u64,
    reads: u32,
}

impl Checker {
    /// Expects the pattern from `offset` on.
    pub(crate) fn restart(&mut self, offset: u64) {
        self.place = offset;
    }

    /// Checks what was read next.
    ///
    /// # Errors
    /// [`Wrong`]: it differs from what was sent.
    pub(crate) fn check(&mut self, mut data: &[u8]) -> Result<(), Wrong> {
        self.reads = self.reads.wrapping_add(1);
        let full = self.reads % FULL_CHECK == 1;
        while !data.is_empty() {
            let (piece, rest) = data.split_at(data.len().min(PERIOD));
            let wanted = at(self.place, piece.len());
            let end = piece.len().saturating_sub(8);
            let right = match full || piece.len() < 16 {
                true => piece == wanted,
                false => piece[..8] == wanted[..8] && piece[end..] == wanted[end..],
            };
            if !right {
                let differs = piece.iter().zip(wanted).position(|(is, should)| is != should);
                let place = self.place + differs.unwrap_or_default() as u64;
                return Err(Wrong(format!("byte {place} of the stream differs from what was sent")));
            }
            self.place += piece.len() as u64;
            data = rest;
        }
        Ok(())
    }
}

/// The receiving half of a stream.
#[derive(Debug, Default)]
pub(crate) struct Incoming {
    checker: Checker,
    /// The last bytes read, which are the trailer if the stream ends here.
    tail: [u8; TRAILER],
    tail_len: usize,
}

/// The result of a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pulled {
    /// No data was available.
    Nothing,
    /// Data, which was correct.
    Data,
    /// The end: everything has arrived, this many bytes of pattern.
    End(u64),
}

impl Incoming {
    /// Calls `read` with space in `buffer`, and checks the data. `Ok(None)` from `read` means that no data is
    /// available.
    pub(crate) fn pull(
        &mut self,
        buffer: &mut [u8],
        read: impl FnOnce(&mut [u8]) -> io::Result<Option<usize>>,
    ) -> io::Result<Result<Pulled, Wrong>> {
        buffer[..self.tail_len].copy_from_slice(&self.tail[..self.tail_len]);
        let count = match read(&mut buffer[self.tail_len..])? {
            None => return Ok(Ok(Pulled::Nothing)),
            Some(0) => return Ok(self.end().map(Pulled::End)),
            Some(count) => count,
        };
        let have = self.tail_len + count;
        let tail_len = have.min(TRAILER);
        let (data, tail) = buffer[..have].split_at(have - tail_len);
        self.tail[..tail_len].copy_from_slice(tail);
        self.tail_len = tail_len;
        Ok(self.checker.check(data).map(|()| Pulled::Data))
    }

    fn end(&self) -> Result<u64, Wrong> {
        let (magic, total) = self.tail.split_at(8);
        let whole = self.tail_len == TRAILER && magic == MAGIC.to_le_bytes();
        match whole && total == self.checker.place.to_le_bytes() {
            true => Ok(self.checker.place),
            false if whole => {
                Err(Wrong(format!("the stream ended with a wrong count after byte {}", self.checker.place)))
            }
            false => Err(Wrong(format!("the stream ended early, after byte {}", self.checker.place))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Streams `total` bytes in reads of `step`, after `damage` has modified them.
    fn transfer(total: usize, step: usize, damage: impl FnOnce(&mut Vec<u8>)) -> Result<u64, Wrong> {
        let mut outgoing = Outgoing::default();
        let mut wire = Vec::new();
        while !outgoing.is_done() {
            let left = total - usize::try_from(outgoing.sent()).unwrap();
            let chunk = outgoing.chunk();
            let count = if left > 0 { chunk.len().min(left) } else { chunk.len() };
            wire.extend_from_slice(&chunk[..count]);
            outgoing.advance(count);
            if count == left {
                outgoing.finish();
            }
        }
        damage(&mut wire);
        let (mut incoming, mut buffer) = (Incoming::default(), vec![0; step + TRAILER]);
        let mut wire = wire.chunks(step);
        loop {
            let read = |room: &mut [u8]| {
                let chunk = wire.next().unwrap_or_default();
                room[..chunk.len()].copy_from_slice(chunk);
                Ok(Some(chunk.len()))
            };
            if let Pulled::End(total) = incoming.pull(&mut buffer, read).unwrap()? {
                return Ok(total);
            }
        }
    }

    #[test]
    fn an_intact_stream_passes() {
        for step in [1, 15, 16, 17, 1448, 65_536, 300_000] {
            assert_eq!(transfer(700_001, step, |_| ()).unwrap(), 700_001);
        }
    }

    #[test]
    fn loss_doubling_and_truncation_are_found() {
        let pipe = 65_536;
        assert!(transfer(700_000, 1448, |wire| drop(wire.drain(100_000..100_001))).is_err());
        assert!(transfer(700_000, pipe, |wire| drop(wire.drain(pipe..2 * pipe))).is_err());
        assert!(transfer(700_000, 1448, |wire| wire.insert(5, 7)).is_err());
        assert!(transfer(700_000, 1448, |wire| wire.truncate(500_000)).is_err());
        assert!(transfer(700_000, 1448, |wire| wire.truncate(0)).is_err());
        let lost_period = |wire: &mut Vec<u8>| drop(wire.drain(10..10 + PERIOD));
        assert!(transfer(700_000, 1448, lost_period).unwrap_err().0.contains("wrong count"));
    }

    #[test]
    fn a_byte_that_changes_in_every_read_is_found() {
        let change = |wire: &mut Vec<u8>| wire.iter_mut().skip(700).step_by(1448).for_each(|byte| *byte ^= 1);
        assert!(transfer(700_000, 1448, change).is_err());
    }
}
