//! What is known of a name, and when it is asked for again.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::message::Found;
use super::shares::FIRST;

/// The shortest time between two questions for a name, whatever its time to live is and however many connections fail.
const SHORTEST: Duration = Duration::from_secs(1);

/// The longest time after a failure until a name is looked up again.
const LONGEST_RETRY: Duration = Duration::from_secs(30);

/// What is known of a name.
#[derive(Debug)]
pub(super) struct Known {
    /// Its addresses as of the last answer that had some; none before.
    pub(super) addresses: Arc<[IpAddr]>,
    /// Those of them that are of this machine, which a confined process cannot find out.
    pub(super) own: Vec<IpAddr>,
    /// Why the last question has failed, if it has.
    pub(super) failure: Option<String>,
    /// When it is asked for again; `None` while an answer is awaited.
    pub(super) due: Option<Instant>,
    /// Whether somebody waits for the next answer.
    pub(super) is_wanted: bool,
    /// The share of the resolver in which its look-ups belong.
    share: usize,
    /// Failures since the last success.
    failures: u32,
    /// When it was asked for last.
    asked: Instant,
}

impl Known {
    /// Nothing, so that it is due.
    pub(super) fn new(now: Instant) -> Self {
        Self::of(Arc::new([]), now)
    }

    /// What somebody else knew, so that it is due.
    pub(super) fn of(addresses: Arc<[IpAddr]>, now: Instant) -> Self {
        Self {
            addresses,
            own: Vec::new(),
            failure: None,
            due: Some(now),
            is_wanted: false,
            share: FIRST,
            failures: 0,
            asked: now,
        }
    }

    /// Asks for it as soon as can be, for somebody who waits.
    pub(super) fn want(&mut self, now: Instant) {
        self.is_wanted = true;
        self.due = self.due.map(|due| due.min(now));
    }

    /// Asks for it again before its time, as it may stand for others by now.
    pub(super) fn doubt(&mut self) {
        self.due = self.due.map(|due| due.min(self.asked + SHORTEST));
    }

    /// The share in which it is looked up. Somebody who waits may know that it is answered by now.
    pub(super) fn share(&self) -> usize {
        if self.is_wanted { FIRST } else { self.share }
    }

    /// Records that it was asked for.
    pub(super) fn await_answer(&mut self, now: Instant) {
        self.asked = now;
        self.due = None;
    }

    /// Has it asked for again, if the question was lost.
    pub(super) fn ask_again(&mut self, now: Instant) {
        self.due = self.due.or(Some(now));
    }

    /// Records in which share it was looked up.
    pub(super) fn belong(&mut self, share: usize) {
        self.share = share;
    }

    /// Records addresses. Returns whether they are others than before.
    pub(super) fn succeed(&mut self, Found { addresses, own, seconds }: Found, now: Instant) -> bool {
        (self.is_wanted, self.failures) = (false, 0);
        self.failure = None;
        self.due = Some(now + Duration::from_secs(seconds).max(SHORTEST));
        self.own = own;
        let (before, after): (HashSet<_>, HashSet<_>) =
            (self.addresses.iter().collect(), addresses.iter().collect());
        if before == after {
            return false;
        }
        self.addresses = with_first(addresses, self.addresses.first().copied()).into();
        true
    }

    /// Records that the question has failed. Returns whether it is the first failure of several.
    pub(super) fn fail(&mut self, why: &str, now: Instant) -> bool {
        self.is_wanted = false;
        let delay = SHORTEST.saturating_mul(1 << self.failures.min(5)).min(LONGEST_RETRY);
        self.failures = self.failures.saturating_add(1);
        self.due = Some(now + delay);
        self.failure = Some(why.to_owned());
        self.failures == 1
    }
}

/// These addresses with `first` in front, if it is one of them: flows stay where they are as long as they can.
fn with_first(mut addresses: Vec<IpAddr>, first: Option<IpAddr>) -> Vec<IpAddr> {
    let place = first.and_then(|first| addresses.iter().position(|ip| *ip == first));
    if let Some(place) = place {
        addresses[..=place].rotate_right(1);
    }
    addresses
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn found(last: &[u8], seconds: u64) -> Found {
        let addresses = last.iter().map(|last| Ipv4Addr::new(192, 0, 2, *last).into()).collect();
        Found { addresses, own: Vec::new(), seconds }
    }

    #[test]
    fn a_name_is_due_when_its_time_is_over_or_somebody_wants_it() {
        let start = Instant::now();
        let mut known = Known::new(start);
        known.want(start);
        known.await_answer(start);
        assert!(known.succeed(found(&[1], 3600), start) && !known.is_wanted);
        assert_eq!(known.due, Some(start + Duration::from_hours(1)));
        known.doubt();
        assert_eq!(known.due, Some(start + SHORTEST));
        known.want(start);
        assert!(known.is_wanted && known.due == Some(start), "at once");
        known.await_answer(start);
        known.want(start);
        known.doubt();
        assert_eq!(known.due, None, "it is asked for already");
        known.ask_again(start);
        assert_eq!(known.due, Some(start), "the question was lost");
        assert!(!known.succeed(found(&[1], 0), start));
        assert_eq!(known.due, Some(start + SHORTEST));
    }

    #[test]
    fn what_somebody_waits_for_is_among_the_first() {
        let start = Instant::now();
        let mut known = Known::new(start);
        known.belong(2);
        assert_eq!(known.share(), 2);
        known.want(start);
        assert_eq!(known.share(), FIRST);
    }

    #[test]
    fn the_first_failure_of_several_is_told() {
        let start = Instant::now();
        let mut known = Known::new(start);
        let told: Vec<bool> = (0..3).map(|_| known.fail("no", start)).collect();
        assert_eq!((told, known.due), (vec![true, false, false], Some(start + Duration::from_secs(4))));
        for _ in 0..9 {
            known.fail("no", start);
        }
        assert_eq!(known.due, Some(start + LONGEST_RETRY));
        known.succeed(found(&[1], 1), start);
        assert!(known.failure.is_none() && known.fail("no", start));
    }

    #[test]
    fn the_first_address_stays_the_first() {
        let (mut known, now) = (Known::new(Instant::now()), Instant::now());
        assert!(known.succeed(found(&[2], 1), now));
        assert!(known.succeed(found(&[1, 2, 3], 1), now));
        assert_eq!(known.addresses[..], found(&[2, 1, 3], 1).addresses);
        assert!(!known.succeed(found(&[3, 1, 2], 1), now), "the same");
    }
}
