//! Delays between attempts that fail for an external reason.

use std::time::Duration;

/// The first delay, the same as in Go's net/http.
const FIRST: Duration = Duration::from_millis(5);

/// The longest delay, so that a relay resumes soon after the cause is gone.
const LONGEST: Duration = Duration::from_secs(1);

/// A delay that doubles with each consecutive failure.
#[derive(Debug)]
pub(crate) struct Backoff {
    failures: u32,
    longest: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self::up_to(LONGEST)
    }
}

impl Backoff {
    /// One that gets as long as `longest`.
    pub(crate) fn up_to(longest: Duration) -> Self {
        Self { failures: 0, longest }
    }

    /// The delay before the next attempt.
    pub(crate) fn next_delay(&mut self) -> Duration {
        let delay = FIRST.saturating_mul(1_u32.checked_shl(self.failures).unwrap_or(u32::MAX));
        self.failures = self.failures.saturating_add(1);
        delay.min(self.longest)
    }

    /// Resets the delay after a success.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_a_second_and_start_anew_after_success() {
        let mut backoff = Backoff::default();
        let delays: Vec<_> = (0..10).map(|_| backoff.next_delay().as_millis()).collect();
        assert_eq!(delays, [5, 10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        for _ in 0..100 {
            assert_eq!(backoff.next_delay(), LONGEST);
        }
        backoff.reset();
        assert_eq!(backoff.next_delay(), FIRST);
    }
}
