//! When a relay that has ended is started again.

use std::time::{Duration, Instant};

/// The delay after the second end in a row. It doubles with each further one; the first has none.
const FIRST: Duration = Duration::from_millis(100);

/// The longest delay.
const LONGEST: Duration = Duration::from_secs(30);

/// A relay that ran for so long did not end because of how it was started.
const STEADY: Duration = Duration::from_secs(10);

/// Counts the ends of a relay, and delays its next start.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    started: Option<Instant>,
    due: Option<Instant>,
    /// How often it has ended in a row.
    ends: u32,
    trouble: Option<String>,
}

impl Backoff {
    /// The relay runs.
    pub(super) fn started(&mut self, now: Instant) {
        self.started.get_or_insert(now);
        self.due = None;
    }

    /// The relay has ended, or could not be started, at `now`; returns after how long it is due again.
    pub(super) fn ended(&mut self, how: &str, now: Instant) -> Duration {
        let ran = self.started.take().map(|started| now.saturating_duration_since(started));
        if ran.is_some_and(|ran| ran >= STEADY) {
            self.ends = 0;
        }
        let delay = match self.ends {
            0 => Duration::ZERO,
            ends => FIRST.saturating_mul(1 << (ends - 1).min(16)).min(LONGEST),
        };
        self.ends = self.ends.saturating_add(1);
        self.due = Some(now + delay);
        self.trouble = Some(format!("it ended {} times in a row, and at last it {how}", self.ends));
        delay
    }

    /// When it is to be started again.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Why it does not run, if it does not.
    pub(super) fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }
}

/// When something is due that is due after `delay`.
pub(super) fn when(delay: Duration) -> String {
    if delay.is_zero() { "at once".to_owned() } else { format!("in {delay:?}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_delay_is_at_once() {
        assert_eq!([Duration::ZERO, FIRST, LONGEST].map(when), ["at once", "in 100ms", "in 30s"]);
    }

    #[test]
    fn one_end_is_mended_at_once_and_many_are_slowed_down() {
        let (mut backoff, start) = (Backoff::default(), Instant::now());
        let mut delays = Vec::new();
        for _ in 0..12 {
            backoff.started(start);
            delays.push(backoff.ended("was killed by signal 9", start).as_millis());
        }
        assert_eq!(delays[..5], [0, 100, 200, 400, 800]);
        assert_eq!(delays[11], LONGEST.as_millis());
        assert!(backoff.trouble().unwrap().contains("12 times in a row"), "{backoff:?}");
        backoff.started(start);
        assert_eq!(backoff.due(), None);
        let delay = backoff.ended("was killed by signal 9", start + STEADY);
        assert_eq!((delay, backoff.due()), (Duration::ZERO, Some(start + STEADY)));
    }
}
