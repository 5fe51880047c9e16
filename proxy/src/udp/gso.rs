//! Groups datagrams of one flow into GSO batches that are sent with one call (udp(7) `UDP_SEGMENT`).
//!
//! The kernel splits a GSO batch into datagrams of equal size, of which the last may be shorter. Datagram boundaries
//! are preserved: nothing is merged or split that was not sent that way.

use std::ops::Range;

use rproxy_sys::udp::{GSO_BYTES, GSO_SEGMENTS};

/// The result of one receive for a flow: a datagram, or a GSO batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Its length in bytes.
    pub(super) len: usize,
    /// The size of each datagram except the last; `None` for a single one.
    pub(super) segment: Option<u16>,
    /// The traffic class of all datagrams.
    pub(super) class: u8,
}

impl Chunk {
    /// The size of its first datagram.
    pub(super) fn size(self) -> usize {
        match self.segment {
            Some(segment) => self.len.min(usize::from(segment)),
            None => self.len,
        }
    }

    /// The number of datagrams.
    pub(super) fn count(self) -> usize {
        match self.segment {
            Some(segment) => self.len.div_ceil(usize::from(segment)).max(1),
            None => 1,
        }
    }

    /// Whether its last datagram is as long as the others.
    fn is_even(self) -> bool {
        self.len > 0 && self.len.is_multiple_of(self.size())
    }
}

/// Consecutive chunks that are sent together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GsoBatch {
    /// The indexes of the chunks in the sequence.
    pub(super) chunks: Range<usize>,
    /// The segment size; `None` for a single datagram.
    pub(super) segment: Option<u16>,
    /// The traffic class of all datagrams.
    pub(super) class: u8,
}

/// Splits a sequence of chunks into GSO batches, in order.
pub(super) fn gso(chunks: &[Chunk]) -> impl Iterator<Item = GsoBatch> {
    let mut next = 0;
    std::iter::from_fn(move || {
        let batch_of = first_batch(chunks.get(next..)?)?;
        let chunks = next..next + batch_of.chunks.len();
        next = chunks.end;
        Some(GsoBatch { chunks, ..batch_of })
    })
}

/// The longest possible GSO batch at the start of `chunks`.
fn first_batch(chunks: &[Chunk]) -> Option<GsoBatch> {
    let first = *chunks.first()?;
    let size = first.size();
    let (mut bytes, mut count, mut is_open) = (first.len, first.count(), first.is_even());
    let mut len = 1;
    for chunk in &chunks[1..] {
        let fits = is_open
            && chunk.class == first.class
            && chunk.len > 0
            && (chunk.size() == size || chunk.count() == 1 && chunk.len < size)
            && bytes + chunk.len <= GSO_BYTES
            && count + chunk.count() <= GSO_SEGMENTS;
        if !fits {
            break;
        }
        bytes += chunk.len;
        count += chunk.count();
        is_open = chunk.size() == size && chunk.is_even();
        len += 1;
    }
    let segment = u16::try_from(size).ok().filter(|_| count > 1);
    Some(GsoBatch { chunks: 0..len, segment, class: first.class })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    impl Chunk {
        /// The datagrams in it, as ranges of its bytes.
        fn datagrams(self) -> impl Iterator<Item = Range<usize>> {
            let size = self.size();
            (0..self.count()).map(move |i| i * size..self.len.min((i + 1) * size))
        }
    }

    fn single(len: usize) -> Chunk {
        Chunk { len, segment: None, class: 0 }
    }

    fn lens(sequence: &[usize]) -> Vec<(usize, Option<u16>)> {
        let chunks: Vec<_> = sequence.iter().map(|len| single(*len)).collect();
        gso(&chunks).map(|batch_of| (batch_of.chunks.len(), batch_of.segment)).collect()
    }

    #[test]
    fn runs_of_equal_size_leave_together_and_a_shorter_one_ends_them() {
        assert_eq!(lens(&[64, 64, 64]), [(3, Some(64))]);
        assert_eq!(lens(&[64, 64, 10, 64]), [(3, Some(64)), (1, None)]);
        assert_eq!(lens(&[10, 64]), [(1, None), (1, None)]);
        assert_eq!(lens(&[64]), [(1, None)]);
        assert_eq!(lens(&[]), []);
    }

    #[test]
    fn a_datagram_without_bytes_travels_alone() {
        assert_eq!(lens(&[64, 0, 64]), [(1, None), (1, None), (1, None)]);
        assert_eq!(lens(&[0, 0]), [(1, None), (1, None)]);
    }

    #[test]
    fn no_train_is_longer_than_the_kernel_takes() {
        assert_eq!(lens(&[64; 100]), [(64, Some(64)), (36, Some(64))]);
        assert_eq!(lens(&[30_000; 3]), [(2, Some(30_000)), (1, None)]);
        assert_eq!(lens(&[65_507, 65_507]), [(1, None), (1, None)]);
    }

    #[test]
    fn trains_that_arrived_as_one_are_joined_and_not_cut() {
        let even = Chunk { len: 300, segment: Some(100), class: 0 };
        let odd = Chunk { len: 250, ..even };
        let result: Vec<_> =
            gso(&[even, odd, single(100)]).map(|batch_of| (batch_of.chunks, batch_of.segment)).collect();
        assert_eq!(result, [(0..2, Some(100)), (2..3, None)]);
    }

    #[test]
    fn a_train_is_of_one_class() {
        let [plain, marked] = [0, 3].map(|class| Chunk { class, ..single(64) });
        let result: Vec<_> = gso(&[plain, plain, marked, marked, plain])
            .map(|batch_of| (batch_of.chunks.len(), batch_of.segment, batch_of.class))
            .collect();
        assert_eq!(result, [(2, Some(64), 0), (2, Some(64), 3), (1, None, 0)]);
    }

    /// The datagram sizes into which the kernel splits a GSO batch.
    fn cut(chunks: &[Chunk], batch_of: &GsoBatch) -> Vec<usize> {
        let bytes: usize = chunks[batch_of.chunks.clone()].iter().map(|chunk| chunk.len).sum();
        let segment = batch_of.segment.map_or(bytes.max(1), usize::from);
        assert!(bytes <= GSO_BYTES || batch_of.chunks.len() == 1);
        let whole = Chunk { len: bytes, segment: Some(u16::try_from(segment).unwrap()), class: 0 };
        assert!(chunks[batch_of.chunks.clone()].iter().all(|chunk| chunk.class == batch_of.class));
        assert!(whole.count() <= GSO_SEGMENTS || batch_of.chunks.len() == 1);
        whole.datagrams().map(|range| range.len()).collect()
    }

    fn chunk() -> impl Strategy<Value = Chunk> {
        let size = prop_oneof![Just(0), Just(1), Just(64), Just(1400), 0..3000_usize, 60_000..65_508_usize];
        let batch_of = (1..200_u16, 1..64_usize, 0..200_usize).prop_map(|(size, count, short)| {
            let len = usize::from(size) * count - short.min(usize::from(size) - 1);
            Chunk { len, segment: Some(size), class: 0 }
        });
        let chunk = prop_oneof![4 => size.prop_map(single), 1 => batch_of];
        let class = prop_oneof![9 => Just(0), 1 => any::<u8>()];
        (chunk, class).prop_map(|(chunk, class)| Chunk { class, ..chunk })
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out_in_order(chunks in prop::collection::vec(chunk(), 0..80)) {
            let wanted: Vec<usize> = chunks.iter().flat_map(|chunk| chunk.datagrams()).map(|r| r.len()).collect();
            let gso: Vec<_> = gso(&chunks).collect();
            let sent: Vec<usize> = gso.iter().flat_map(|batch_of| cut(&chunks, batch_of)).collect();
            prop_assert_eq!(sent, wanted);
            let mut next = 0;
            for batch_of in gso {
                prop_assert_eq!(batch_of.chunks.start, next);
                next = batch_of.chunks.end;
            }
            prop_assert_eq!(next, chunks.len());
        }
    }
}
