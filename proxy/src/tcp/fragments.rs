//! The size of the fragments in which a source's bytes arrive, which decides how large the pipe of a response should be.
//!
//! A slot of a pipe holds one fragment of a packet. That is a single page if the other end sends files (sendfile(2)), and up
//! to 32 KiB if it writes. splice(2) passes 16 slots to a socket at a time and announces more behind each 16. The socket then
//! sends the whole segments at once, and the rest with the next acknowledgement, in a packet of its own: with single pages
//! in more than 16 slots, up to twice as many packets. With larger fragments, a larger pipe needs fewer calls and packets.

use std::ops::Range;

/// The capacity of a pipe of 16 slots. Pages reach it only by chance, because the end of a packet cuts one of them, and both
/// parts have a slot.
const CAPACITY: usize = 64 * 1024;

/// What such a pipe takes if a page or a part of one is in each slot. What is smaller may be all that was queued, and what is
/// larger one packet of any kind.
const PAGES: Range<usize> = 56 * 1024..63 * 1024;

/// Of so many bursts, one is spliced through pipes of 16 slots, which show whether the source still sends as before.
const LOOK_EVERY: u8 = 8;

/// What is known of a source's fragments.
#[derive(Debug, Default)]
pub(super) struct Fragments {
    /// Whether they were larger than a page when last looked at.
    were_large: bool,
    /// Whether the last pipe of 16 slots was filled to its capacity.
    has_filled: bool,
    /// The number of bursts, modulo [`LOOK_EVERY`].
    bursts: u8,
}

impl Fragments {
    /// Whether the fragments are larger than a page, as far as known. Not while it is time to look.
    pub(super) fn are_large(&self) -> bool {
        self.were_large && self.bursts != 0
    }

    /// Records what a pipe of [16 slots](super::pipe::Capacity::Default) took.
    pub(super) fn note(&mut self, taken: usize) {
        let fills = taken >= CAPACITY;
        if fills && self.has_filled {
            self.were_large = true;
        } else if PAGES.contains(&taken) {
            self.were_large = false;
        }
        self.has_filled = fills;
    }

    /// Another burst begins, which may be sent in another way.
    pub(super) fn begin_next(&mut self) {
        self.bursts = (self.bursts + 1) % LOOK_EVERY;
        self.has_filled = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether the fragments are taken for large in the burst after the one that takes this.
    fn are_large_after(fragments: &mut Fragments, taken: &[usize]) -> bool {
        fragments.bursts = 0;
        taken.iter().for_each(|&taken| fragments.note(taken));
        fragments.begin_next();
        fragments.are_large()
    }

    #[test]
    fn pipes_that_are_filled_to_their_capacity_tell_of_large_fragments() {
        let mut fragments = Fragments::default();
        assert!(!are_large_after(&mut fragments, &[]));
        assert!(!are_large_after(&mut fragments, &[15 * 4096, CAPACITY, 4096, CAPACITY, 15 * 4096]), "pages");
        assert!(!are_large_after(&mut fragments, &[CAPACITY - 376; 4]), "one packet at a time");
        assert!(
            !are_large_after(&mut fragments, &[CAPACITY]) && !are_large_after(&mut fragments, &[CAPACITY])
        );
        assert!(are_large_after(&mut fragments, &[CAPACITY; 2]));
        assert!(are_large_after(&mut fragments, &[20_000, CAPACITY - 376]), "that does not tell");
        assert!(!are_large_after(&mut fragments, &[CAPACITY, 15 * 4096]), "pages again");
    }

    #[test]
    fn one_burst_of_several_looks_again() {
        let mut fragments = Fragments { were_large: true, ..Fragments::default() };
        let looks = (0..4 * LOOK_EVERY).filter(|_| {
            fragments.begin_next();
            !fragments.are_large()
        });
        assert_eq!(looks.count(), 4);
    }
}
