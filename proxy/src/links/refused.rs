//! The addresses of interfaces that cannot be served, and when they are tried again.
//!
//! Whatever is in the way, such as another program's socket or a lack of descriptors, may go without a message of the kernel.

use std::collections::HashMap;
use std::time::Duration;

use rproxy_mapping::addr::ScopedIp;
use rproxy_mapping::name::Name;
use tokio::time::Instant;

/// The delay before the first trial, which doubles with each up to the longest.
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);

/// Addresses that cannot be served.
#[derive(Debug, Default)]
pub(super) struct Refused {
    /// The addresses, and why, as it was logged.
    reasons: HashMap<(Name, ScopedIp), String>,
    delay: Duration,
    again: Option<Instant>,
}

impl Refused {
    /// Records an address, and returns whether the reason is new.
    pub(super) fn add(&mut self, mapping: &Name, ip: ScopedIp, reason: &str) -> bool {
        let before = self.reasons.insert((mapping.clone(), ip), reason.to_owned());
        if before.is_none() {
            (self.delay, self.again) = (Duration::ZERO, None);
        }
        before.as_deref() != Some(reason)
    }

    pub(super) fn has(&self, mapping: &Name, ip: ScopedIp) -> bool {
        self.reasons.contains_key(&(mapping.clone(), ip))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.reasons.is_empty()
    }

    /// Keeps those for which `is_open`, which have been tried `now`.
    pub(super) fn keep(&mut self, now: Instant, is_open: impl Fn(&Name, ScopedIp) -> bool) {
        self.reasons.retain(|(name, ip), _reason| is_open(name, *ip));
        if self.reasons.is_empty() {
            self.again = None;
        } else if self.again.is_none_or(|again| again <= now) {
            self.delay = (self.delay * 2).clamp(FIRST, LONGEST);
            self.again = Some(now + self.delay);
        }
    }

    /// When they are tried again.
    pub(super) fn again(&self) -> Option<Instant> {
        self.again
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trials_become_rarer_until_another_is_refused() {
        let (mut refused, start) = (Refused::default(), Instant::now());
        let [one, other] = ["one", "other"].map(|name| name.parse::<Name>().unwrap());
        let ip: ScopedIp = "10.0.0.1".parse().unwrap();
        assert!(refused.add(&one, ip, "taken"));
        let (mut now, mut times) = (start, Vec::new());
        for _ in 0..7 {
            // Another event has them tried, too.
            refused.keep(now, |_name, _ip| true);
            refused.keep(now + FIRST / 2, |_name, _ip| true);
            now = refused.again().unwrap();
            times.push((now - start).as_secs());
            assert!(!refused.add(&one, ip, "taken"));
        }
        assert_eq!(times, [1, 3, 7, 15, 31, 61, 91]);
        assert!(refused.add(&one, ip, "no descriptors"));
        assert!(refused.add(&other, ip, "taken"));
        refused.keep(now, |_name, _ip| true);
        assert_eq!(refused.again(), Some(now + FIRST));
        refused.keep(now, |_name, _ip| false);
        assert!(refused.is_empty() && refused.again().is_none());
    }
}
