//! Test data.

use std::io::{self, Read};

/// An endless byte stream without repetitions, so that loss, duplication and reordering are detected. The
/// receiver generates it again, so that nothing large is stored.
pub struct Pattern(u64);

impl Pattern {
    /// Returns the same stream for the same seed.
    pub fn new(seed: u64) -> Self {
        // The state of Xorshift must not be zero.
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
