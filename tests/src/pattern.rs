//! Test data.

use std::io::{self, Read};

/// An endless stream of bytes that repeat nowhere, so that loss, duplication and reordering all show. It
/// is made again where it arrives, so that nothing large is kept.
pub struct Pattern(u64);

impl Pattern {
    /// The same stream for the same seed.
    pub fn new(seed: u64) -> Self {
        // Xorshift needs a state that is not zero.
        Self(seed | 1 << 63)
    }

    /// The next bytes.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for byte in buffer {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            *byte = self.0.to_le_bytes()[4];
        }
    }
}

impl Read for Pattern {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.fill(buffer);
        Ok(buffer.len())
    }
}
