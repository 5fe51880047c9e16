//! What the sources of a mapping's clients have: connections, and buckets of tokens for new ones.
//!
//! Only mappings with a limit per source keep anything here, and only of sources that have something.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rproxy_mapping::rate::Rate;

use super::MappingState;
use crate::state::client::ClientAddr;

/// The maximum number of buckets of a mapping, which take 6 MB. Who has a /40 of IPv6 addresses is as many sources.
const MOST_BUCKETS: usize = 1 << 16;

/// The time between two searches for full buckets if there are as many as can be.
const SOON: Duration = Duration::from_secs(1);

/// That time at most.
const LATE: Duration = Duration::from_secs(60);

/// A smaller table keeps its memory.
const SMALL: usize = 64;

/// A source for quotas.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Source {
    /// An IPv4 address or an IPv6 /64, because the owner of an IPv6 address usually has the whole /64.
    Network(IpAddr),
    /// The user of the processes that connect to a Unix socket.
    User(u32),
}

impl Source {
    /// The source that `client` belongs to.
    pub(crate) fn of(client: ClientAddr) -> Self {
        match client {
            ClientAddr::Inet(addr) => Self::of_ip(addr.ip()),
            ClientAddr::Unix(credentials) => Self::User(credentials.uid),
        }
    }

    /// The source that the client at `ip` belongs to.
    pub(crate) fn of_ip(ip: IpAddr) -> Self {
        Self::Network(match ip.to_canonical() {
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX)).into(),
            v4 => v4,
        })
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network(IpAddr::V4(ip)) => write!(f, "{ip}"),
            Self::Network(IpAddr::V6(ip)) => write!(f, "{ip}/64"),
            Self::User(uid) => write!(f, "uid={uid}"),
        }
    }
}

/// The sources of a mapping.
#[derive(Debug, Default)]
pub(super) struct Sources {
    connections: Mutex<HashMap<Source, usize>>,
    buckets: Mutex<Buckets>,
}

impl Sources {
    /// Takes a token of `source` for a new connection or flow.
    pub(super) fn take_token(&self, source: Source, rate: Rate, now: Instant) -> Token {
        lock(&self.buckets).take(source, rate, now)
    }

    /// Has the buckets fill at another rate from `now` on; without one, they are full.
    pub(super) fn set_rate(&self, rate: Option<Rate>, now: Instant) {
        lock(&self.buckets).set_rate(rate, now);
    }
}

/// Counts a connection of a source until dropped.
#[derive(Debug)]
pub(crate) struct Place {
    mapping: Arc<MappingState>,
    source: Source,
}

impl Place {
    /// Counts another connection of `source`, unless it has as many as `most`.
    pub(crate) fn take(mapping: &Arc<MappingState>, source: Source, most: usize) -> Option<Box<Self>> {
        let mut connections = lock(&mapping.sources().connections);
        let count = connections.get(&source).copied().unwrap_or_default();
        if count >= most {
            return None;
        }
        connections.insert(source, count + 1);
        Some(Box::new(Self { mapping: mapping.clone(), source }))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut connections = lock(&self.mapping.sources().connections);
        match connections.get_mut(&self.source) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                connections.remove(&self.source);
                shrink(&mut connections);
            }
        }
    }
}

/// What a source gets that asks for a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    /// Its bucket had one.
    Taken,
    /// It has no bucket, because others have all that there are.
    Free,
    /// Its bucket is empty.
    None,
}

/// The buckets that are not full. One has no number of tokens, but the time when it will be full.
#[derive(Debug, Default)]
struct Buckets {
    full_at: HashMap<Source, Instant>,
    /// The rate at which they fill: that of the last change, which tasks learn of one after the other.
    rate: Option<Rate>,
    /// When those that were full by then were removed.
    swept: Option<Instant>,
}

impl Buckets {
    fn take(&mut self, source: Source, rate: Rate, now: Instant) -> Token {
        let rate = *self.rate.get_or_insert(rate);
        self.sweep(rate, now);
        let when_empty = now + rate.time_to_fill();
        let known = self.full_at.get(&source).copied();
        let before = known.map_or(now, |full_at| full_at.max(now));
        let full_at = before + rate.interval();
        if full_at > when_empty {
            self.full_at.insert(source, before);
            return Token::None;
        }
        if known.is_none() && self.full_at.len() >= MOST_BUCKETS {
            return Token::Free;
        }
        self.full_at.insert(source, full_at);
        Token::Taken
    }

    /// What a bucket lacks to be full is a number of tokens, which another rate brings in another time.
    fn set_rate(&mut self, rate: Option<Rate>, now: Instant) {
        let before = std::mem::replace(&mut self.rate, rate);
        match (before, rate) {
            (Some(before), Some(rate)) if before != rate => {
                self.full_at.retain(|_source, full_at| *full_at > now);
                for full_at in self.full_at.values_mut() {
                    *full_at = now + time_at(rate, *full_at - now, before);
                }
            }
            (_, None) => self.full_at.clear(),
            _ => {}
        }
        shrink(&mut self.full_at);
    }

    /// Removes full buckets, unless that was done a short time ago.
    fn sweep(&mut self, rate: Rate, now: Instant) {
        let is_full = self.full_at.len() >= MOST_BUCKETS;
        let pause = if is_full { SOON } else { rate.time_to_fill().clamp(SOON, LATE) };
        if self.swept.is_some_and(|swept| now.saturating_duration_since(swept) < pause) {
            return;
        }
        self.swept = Some(now);
        self.full_at.retain(|_source, full_at| *full_at > now);
        shrink(&mut self.full_at);
    }
}

/// The time in which `rate` brings as many tokens as `before` does in `time`; no more than a bucket can lack.
fn time_at(rate: Rate, time: Duration, before: Rate) -> Duration {
    // A year at most, in nanoseconds: the product has 110 bits.
    let scaled = time.as_nanos() * rate.interval().as_nanos() / before.interval().as_nanos();
    u64::try_from(scaled).map_or(rate.time_to_fill(), Duration::from_nanos).min(rate.time_to_fill())
}

/// Gives memory back that a table does not need any more.
fn shrink<V>(table: &mut HashMap<Source, V>) {
    if table.capacity() > SMALL && table.len() < table.capacity() / 8 {
        table.shrink_to(SMALL.max(table.len() * 2));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::client::Credentials;

    fn source(number: u32) -> Source {
        Source::of_ip(IpAddr::from(number.to_be_bytes()))
    }

    #[test]
    fn a_source_is_an_address_or_a_network() {
        let of = |ip: &str| Source::of_ip(ip.parse().unwrap()).to_string();
        assert_eq!(of("192.0.2.7"), "192.0.2.7");
        assert_eq!(of("::ffff:192.0.2.7"), "192.0.2.7");
        assert_eq!(of("2001:db8:0:1:2:3:4:5"), "2001:db8:0:1::/64");
        let process = |pid| ClientAddr::Unix(Credentials { pid, uid: 33, gid: 33 });
        assert_eq!(Source::of(process(1)), Source::of(process(2)));
        assert_eq!(Source::of(process(1)).to_string(), "uid=33");
    }

    #[test]
    fn a_source_has_so_many_connections_and_none_is_kept_that_is_gone() {
        let mapping = Arc::<MappingState>::default();
        let taken: Vec<_> = (0..3).map(|_| Place::take(&mapping, source(1), 2)).collect();
        assert_eq!(taken.iter().flatten().count(), 2);
        let other = Place::take(&mapping, source(2), 2);
        assert!(other.is_some());
        drop(taken);
        let again = Place::take(&mapping, source(1), 1);
        assert!(again.is_some() && Place::take(&mapping, source(1), 1).is_none());
        let many: Vec<_> = (0..10_000).map(|number| Place::take(&mapping, source(number), 9)).collect();
        assert!(many.iter().all(Option::is_some));
        drop((other, again, many));
        let connections = lock(&mapping.sources().connections);
        assert!(connections.is_empty() && connections.capacity() < 4 * SMALL, "{}", connections.capacity());
    }

    #[test]
    fn a_bucket_has_its_burst_and_fills_again_evenly() {
        let rate: Rate = "10/s burst 3".parse().unwrap();
        let (mut buckets, start) = (Buckets::default(), Instant::now());
        let mut taken = |millis: u64| {
            buckets.take(source(1), rate, start + Duration::from_millis(millis)) == Token::Taken
        };
        assert_eq!([0, 0, 0, 0, 99, 100, 100].map(&mut taken), [true, true, true, false, false, true, false]);
        assert_eq!([301, 301, 301].map(&mut taken), [true, true, false]);
        assert_eq!([60_000; 4].map(&mut taken), [true, true, true, false]);
        assert_eq!(
            buckets.take(source(2), rate, start + Duration::from_mins(1)),
            Token::Taken,
            "another source"
        );
    }

    #[test]
    fn what_a_bucket_lacks_counts_in_tokens_when_the_rate_changes() {
        let taken_after = |before: &str, uses: u32, change: Option<&str>, millis: u64| {
            let (mut buckets, start) = (Buckets::default(), Instant::now());
            let [before, rate]: [Rate; 2] =
                [before, change.unwrap_or(before)].map(|rate| rate.parse().unwrap());
            for _ in 0..uses {
                buckets.take(source(1), before, start);
            }
            buckets.set_rate(change.map(|_rate| rate), start);
            let now = start + Duration::from_millis(millis);
            // A task that has not learnt of the change yet, and one that has.
            let taken = [before, rate].map(|known| buckets.take(source(1), known, now) == Token::Taken);
            taken.into_iter().filter(|taken| *taken).count()
        };
        for (before, uses, change, millis, taken) in [
            ("2/h", 3, Some("1000/s"), 0, 2),
            ("2/h", 3, Some("2/s"), 0, 0),
            ("2/h", 3, Some("2/s"), 500, 1),
            ("2/h", 3, Some("2/s"), 12_000, 2),
            ("1/day", 1, Some("10/s"), 0, 2),
            ("10/s burst 50", 50, Some("10/s burst 51"), 0, 1),
            // It cannot lack more than it holds.
            ("1000/s", 1000, Some("2/m"), 29_999, 0),
            ("1000/s", 1000, Some("2/m"), 30_000, 1),
            ("1000/s", 1, Some("2/m"), 0, 1),
            // Without a rate in between, nothing is kept.
            ("2/h", 3, None, 0, 2),
        ] {
            assert_eq!(
                taken_after(before, uses, change, millis),
                taken,
                "{uses} of {before}, then {change:?}"
            );
        }
    }

    #[test]
    fn sources_that_are_quiet_are_forgotten() {
        let rate: Rate = "10/s".parse().unwrap();
        let (mut buckets, start) = (Buckets::default(), Instant::now());
        for number in 0..10_000 {
            assert_eq!(buckets.take(source(number), rate, start), Token::Taken);
        }
        buckets.take(source(1), rate, start + Duration::from_secs(2));
        assert_eq!(buckets.full_at.len(), 1);
        assert!(buckets.full_at.capacity() < 4 * SMALL, "{}", buckets.full_at.capacity());
    }

    #[test]
    fn beyond_all_buckets_sources_are_not_limited_until_others_are_full() {
        let rate: Rate = "1/s".parse().unwrap();
        let (mut buckets, start) = (Buckets::default(), Instant::now());
        let most = u32::try_from(MOST_BUCKETS).unwrap();
        for number in 0..most {
            assert_eq!(buckets.take(source(number), rate, start), Token::Taken);
        }
        assert_eq!([0, 0].map(|_| buckets.take(source(most), rate, start)), [Token::Free; 2]);
        assert_eq!(buckets.take(source(0), rate, start), Token::None, "those that have one keep it");
        let later = start + SOON;
        assert_eq!(buckets.take(source(most), rate, later), Token::Taken);
        assert_eq!(buckets.full_at.len(), 1);
    }
}
