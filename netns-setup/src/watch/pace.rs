//! When the system is compared with the state: soon after something has changed, but not all the time.

use std::time::{Duration, Instant};

/// A change is often one of many, such as those of one command. They are awaited for so long.
const SETTLE: Duration = Duration::from_millis(50);

/// A comparison is followed by a pause of so many times its duration, so that a stream of changes costs at most a fifth
/// of a processor.
const PAUSE: u32 = 4;

/// The longest of these pauses, so that a repair is made within a second.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// The same repair within this time after another one belongs to a row.
const CALM: Duration = Duration::from_secs(1);

/// So many repairs in a row are usual, such as those while a firewall starts. More are a fight with another program.
const USUAL: u32 = 10;

/// The first delay of a repair that another program undoes, or that fails. Each is twice as long as the one before.
const FIRST_DELAY: Duration = Duration::from_secs(1);

/// The longest of these delays.
const LONGEST_DELAY: Duration = Duration::from_secs(60);

/// The outcome of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Nothing differed.
    Same,
    /// What differed was repaired. Whether that was repaired in the same row before.
    Repaired { again: bool },
    /// It could not be repaired.
    Failed,
}

/// Decides when the next comparison is due. A change is compared at once, also during a delay.
#[derive(Debug)]
pub(super) struct Pace {
    due: Instant,
    /// No comparison begins before.
    earliest: Instant,
    /// Failures in a row.
    failures: u32,
    /// Repairs in a row.
    repairs: u32,
    /// The time until which another repair belongs to the row.
    row_ends: Instant,
}

impl Pace {
    /// The first comparison is due at once.
    pub(super) fn new(now: Instant) -> Self {
        Self { due: now, earliest: now, failures: 0, repairs: 0, row_ends: now }
    }

    /// When the next comparison is due.
    pub(super) fn due(&self) -> Instant {
        self.due
    }

    /// Whether a repair that begins now belongs to the row of those before.
    pub(super) fn follows(&self, begun: Instant) -> bool {
        begun <= self.row_ends
    }

    /// Something has changed.
    pub(super) fn changed(&mut self, now: Instant) {
        self.due = self.due.min((now + SETTLE).max(self.earliest));
    }

    /// A comparison that began at `begun` has ended. Without a change, the next one is due after `interval`. Returns how
    /// long a repair has to wait, if that is longer than usual.
    pub(super) fn compared(
        &mut self,
        outcome: Outcome,
        begun: Instant,
        now: Instant,
        interval: Duration,
    ) -> Option<Duration> {
        let delay = match outcome {
            Outcome::Same => {
                self.failures = 0;
                None
            }
            Outcome::Repaired { again } => {
                self.failures = 0;
                match (self.follows(begun), again) {
                    (true, true) => self.repairs += 1,
                    // One of something else neither lengthens the row nor ends it.
                    (true, false) => {}
                    (false, _) => self.repairs = 1,
                }
                self.repairs.checked_sub(USUAL + 1).filter(|_| again).map(delay)
            }
            Outcome::Failed => {
                self.failures += 1;
                Some(delay(self.failures - 1))
            }
        };
        let pause = (now.duration_since(begun) * PAUSE).min(LONGEST_PAUSE);
        self.earliest = now + if outcome == Outcome::Failed { FIRST_DELAY } else { pause };
        self.due = self.earliest.max(now + delay.unwrap_or(interval).min(interval));
        if matches!(outcome, Outcome::Repaired { .. }) {
            // One of something else does not end it.
            self.row_ends = self.row_ends.max(now + delay.unwrap_or(pause) + CALM);
        }
        delay
    }
}

/// The delay after so many others.
fn delay(others: u32) -> Duration {
    FIRST_DELAY.saturating_mul(2u32.saturating_pow(others)).min(LONGEST_DELAY)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVAL: Duration = Duration::from_secs(30);
    const COST: Duration = Duration::from_millis(100);
    const AGAIN: Outcome = Outcome::Repaired { again: true };

    /// Compares when it is due; returns when the next one is due if something changes at once, and the delay.
    fn compare(pace: &mut Pace, outcome: Outcome) -> (Duration, Option<Duration>) {
        let (begun, now) = (pace.due(), pace.due() + COST);
        let delay = pace.compared(outcome, begun, now, INTERVAL);
        pace.changed(now);
        (pace.due() - now, delay)
    }

    #[test]
    fn what_changes_at_once_is_compared_at_once() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        assert_eq!(pace.due(), start);
        pace.compared(Outcome::Same, start, start + COST, INTERVAL);
        assert_eq!(pace.due(), start + COST + INTERVAL);
        let later = start + Duration::from_secs(2);
        pace.changed(later);
        pace.changed(later + Duration::from_millis(20));
        assert_eq!(pace.due(), later + SETTLE);
    }

    #[test]
    fn a_stream_of_changes_leaves_time_for_others() {
        let mut pace = Pace::new(Instant::now());
        for _ in 0..10 {
            assert_eq!(compare(&mut pace, Outcome::Same), (COST * PAUSE, None));
        }
    }

    #[test]
    fn a_fight_has_growing_delays_and_ends() {
        let mut pace = Pace::new(Instant::now());
        let mut delays = Vec::new();
        for _ in 0..18 {
            delays.push(compare(&mut pace, AGAIN).1.map_or(0, |delay| delay.as_secs()));
            // The notifications of the repair itself.
            let rest = delays.last().map_or(Duration::ZERO, |delay| Duration::from_secs(*delay));
            pace.compared(Outcome::Same, pace.due(), pace.due() + COST, rest);
            pace.changed(pace.due());
        }
        assert_eq!(delays[..USUAL as usize], [0; USUAL as usize]);
        assert_eq!(delays[USUAL as usize..], [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(compare(&mut pace, Outcome::Repaired { again: false }).1, None, "another repair");
        let quiet = pace.due() + LONGEST_DELAY + CALM + COST;
        pace.compared(Outcome::Same, quiet, quiet, INTERVAL);
        assert_eq!(compare(&mut pace, AGAIN).1, None);
    }

    #[test]
    fn repairs_of_something_else_do_not_interrupt_a_fight() {
        let mut pace = Pace::new(Instant::now());
        let mut delays = Vec::new();
        for _ in 0..USUAL + 4 {
            delays.push(compare(&mut pace, AGAIN).1.map_or(0, |delay| delay.as_secs()));
            assert_eq!(compare(&mut pace, Outcome::Repaired { again: false }).1, None);
            let rest = Duration::from_secs(*delays.last().unwrap());
            pace.compared(Outcome::Same, pace.due(), pace.due() + COST, rest);
        }
        assert_eq!(delays[USUAL as usize..], [1, 2, 4, 8]);
    }

    #[test]
    fn a_failure_is_tried_again_without_a_change() {
        let mut pace = Pace::new(Instant::now());
        let mut due = Vec::new();
        for _ in 0..8 {
            let (begun, now) = (pace.due(), pace.due() + COST);
            pace.compared(Outcome::Failed, begun, now, INTERVAL);
            due.push((pace.due() - now).as_secs());
        }
        assert_eq!(due, [1, 2, 4, 8, 16, 30, 30, 30]);
        assert_eq!(compare(&mut pace, Outcome::Same).1, None);
        assert_eq!(compare(&mut pace, Outcome::Failed).1, Some(FIRST_DELAY));
    }
}
