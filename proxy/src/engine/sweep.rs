//! Decides when to sweep finished entries out of a collection.

/// Smaller collections are not swept.
const LEAST: usize = 64;

/// Makes the amortised cost of sweeping constant per entry: the next sweep is due when the collection has
/// doubled in size since the last one.
#[derive(Debug)]
pub(crate) struct Sweep {
    due_at: usize,
}

impl Default for Sweep {
    fn default() -> Self {
        Self { due_at: LEAST }
    }
}

impl Sweep {
    /// Whether a collection of `len` entries is due for a sweep.
    pub(crate) fn is_due(&self, len: usize) -> bool {
        len >= self.due_at
    }

    /// Records that a sweep left `len` entries.
    pub(crate) fn done(&mut self, len: usize) {
        self.due_at = LEAST.max(2 * len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sweeping_takes_a_constant_time_for_each_entry() {
        let (mut sweep, mut entries, mut looked_at) = (Sweep::default(), 0, 0);
        for _ in 0..100_000 {
            entries += 1;
            if sweep.is_due(entries) {
                looked_at += entries;
                sweep.done(entries);
            }
        }
        assert!(looked_at <= 2 * entries, "{looked_at} looks, though nothing is over");
        sweep.done(0);
        assert!(sweep.is_due(LEAST) && !sweep.is_due(LEAST - 1));
    }
}
