//! The local ports that flows use towards backends.
//!
//! The kernel would choose a port at random, perhaps one that was just closed, and a late reply would reach another
//! client than the intended one. Ports are therefore used in rotation, in an order that differs between processes: a
//! port is reused only after all others of the range (`ip_local_port_range`, ip(7)) and not within [`HELD_BACK`] of its
//! last use.
//!
//! Other programs, including other relays, need ports, too. The fraction of attempts that meet a port in use is an
//! estimate of how many they have; this process leaves a quarter of the range free.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use tracing::debug;

use super::port_settings::{PortRange, Settings};
use crate::state::task::{PortTurn, ROUNDS};

/// A port is not reused within this time of its last datagram. It is how long a resolver waits for a reply
/// (resolv.conf(5), `timeout`).
pub(super) const HELD_BACK: Duration = Duration::from_secs(5);

/// One in this many ports is left to other programs.
const LEFT_TO_OTHERS: usize = 4;

/// Minimum number of ports for a process, regardless of other programs.
const LEAST: usize = 64;

/// After all attempts have met ports in use, there are none for this long: each costs a system call.
const PAUSE: Duration = Duration::from_millis(100);

/// Weight of the history in the estimate of ports in use: one attempt counts as much as one in this many before.
const MEMORY: u32 = 256;

/// Interval of reading the settings, so that reserving a port does not require a restart of every relay.
const READ_AGAIN: Duration = Duration::from_secs(5);

/// The number of bits for the index of a port in the range.
const PLACE_BITS: u32 = 16;

/// A mask for these bits.
const PLACE_MASK: u64 = (1 << PLACE_BITS) - 1;

/// Scale of the estimated probability that a port is in use by another program.
const CERTAIN: u32 = 1 << 16;

/// The ports of the range.
#[derive(Debug)]
pub(super) struct LocalPorts {
    settings: Option<Settings>,
    /// The time of reading the settings again.
    read_again: Option<Instant>,
    first: u16,
    last: u16,
    /// Reserved ports, which the kernel does not assign automatically.
    reserved: Vec<(u16, u16)>,
    /// The number of unusable ports in the range: reserved, or forbidden to this process.
    never: usize,
    /// Allocated for the first flow, so that an idle mapping does not need it.
    order: Option<Order>,
    /// Until when no attempt is made, because all attempts met ports in use.
    paused_until: Option<Instant>,
    /// Estimated probability that the next port is in use by another program, in parts of [`CERTAIN`].
    others: u32,
}

/// The order of ports, and which are unavailable.
#[derive(Debug)]
struct Order {
    /// The number of ports in the range.
    size: usize,
    /// The next position in the order, from 0.
    turn: usize,
    /// The key that makes the order different in each process.
    keys: [u64; ROUNDS],
    /// A bit for each port: in use by this process, held back, or unusable.
    unavailable: Vec<u64>,
    /// The number of unavailable ports.
    count: usize,
    /// Ports that are held back, ordered by their release: the time, in milliseconds since `start`, in the bits above
    /// the index of the port.
    held_back: BinaryHeap<Reverse<u64>>,
    start: Instant,
}

impl LocalPorts {
    /// The ports of this network namespace, with its current settings.
    pub(super) fn of_this_host() -> Self {
        let settings = Settings::open();
        let PortRange { range, reserved } = settings.read().unwrap_or_default();
        Self { settings: Some(settings), ..Self::new(range, reserved) }
    }

    fn new((first, last): (u16, u16), reserved: Vec<(u16, u16)>) -> Self {
        let never = never_used((first, last), &reserved);
        let (settings, read_again, order) = (None, None, None);
        Self { settings, read_again, first, last, reserved, never, order, paused_until: None, others: 0 }
    }

    /// Updates the settings if they have changed.
    pub(super) fn refresh(&mut self, now: Instant) {
        if self.read_again.is_some_and(|at| now < at) {
            return;
        }
        self.read_again = Some(now + READ_AGAIN);
        let Some(PortRange { range, reserved }) = self.settings.as_ref().and_then(Settings::read) else {
            return;
        };
        if (range, &reserved) != ((self.first, self.last), &self.reserved) {
            debug!(?range, ?reserved, "other local ports than before");
            self.change(range, reserved);
        }
    }

    /// Changes the range. Ports in use or held back remain unavailable.
    fn change(&mut self, (first, last): (u16, u16), reserved: Vec<(u16, u16)>) {
        let (old_first, old_reserved) = (self.first, std::mem::replace(&mut self.reserved, reserved));
        (self.first, self.last) = (first, last);
        self.never = never_used((first, last), &self.reserved);
        let Some(old) = self.order.take() else { return };
        let mut order = Order::new(first, last, &self.reserved);
        let is_ours = |port: u16| (first..=last).contains(&port) && !is_among(&self.reserved, port);
        let place_of = |port: u16| is_ours(port).then(|| usize::from(port - first));
        for port in old.unavailable_ports(old_first).filter(|port| !is_among(&old_reserved, *port)) {
            if let Some(place) = place_of(port) {
                order.set(place, true);
            }
        }
        order.start = old.start;
        order.held_back = old
            .held_back
            .into_iter()
            .filter_map(|Reverse(held)| {
                let port = usize::from(old_first) + usize::try_from(held & PLACE_MASK).unwrap_or(0);
                let place = place_of(u16::try_from(port).ok()?)?;
                Some(Reverse(held & !PLACE_MASK | place as u64))
            })
            .collect();
        self.order = Some(order);
    }

    /// The next position in the order, for another process; `None` if no flow has been opened.
    pub(super) fn turn(&self) -> Option<PortTurn> {
        let Order { turn, keys, .. } = *self.order.as_ref()?;
        Some(PortTurn { range: (self.first, self.last), turn, keys })
    }

    /// Continues at the position of another process, if its range was the same.
    pub(super) fn go_on(&mut self, PortTurn { range, turn, keys }: PortTurn) {
        if range == (self.first, self.last) {
            let order = self.order.get_or_insert_with(|| Order::new(range.0, range.1, &self.reserved));
            (order.turn, order.keys) = (turn % order.size, keys);
        }
    }

    /// The number of usable ports, including those in use by other programs.
    pub(super) fn count(&self) -> usize {
        self.size().saturating_sub(self.never)
    }

    fn size(&self) -> usize {
        usize::from(self.last - self.first) + 1
    }

    /// The number of ports that this process may use at a time, given the estimated use by other programs.
    pub(super) fn room(&self) -> usize {
        let count = self.count();
        let others = count * self.others as usize / CERTAIN as usize;
        (count - count / LEFT_TO_OTHERS).saturating_sub(others).max(LEAST.min(count))
    }

    /// The next port to try. `None` if all are in use by this process or held back, or if all recent attempts met ports
    /// in use. The caller then reports the result of the attempt.
    pub(super) fn candidate(&mut self, now: Instant) -> Option<u16> {
        if self.paused_until.is_some_and(|until| now < until) {
            return None;
        }
        let count = self.size();
        let order = self.order.get_or_insert_with(|| Order::new(self.first, self.last, &self.reserved));
        order.release(now);
        if order.count == count {
            return None;
        }
        loop {
            let place = order.place_of(order.turn);
            order.turn = (order.turn + 1) % count;
            if !order.is_unavailable(place) {
                return u16::try_from(place).ok().map(|place| self.first + place);
            }
            self.others -= self.others.div_ceil(MEMORY);
        }
    }

    /// Marks the candidate as in use by a flow.
    pub(super) fn taken(&mut self, port: u16) {
        self.set_unavailable(port);
        self.paused_until = None;
        self.others -= self.others.div_ceil(MEMORY);
    }

    /// Records that the candidate is in use by another program.
    pub(super) fn others_have(&mut self) {
        self.others += (CERTAIN - self.others) / MEMORY;
    }

    /// Marks the candidate as unusable for this process.
    pub(super) fn forbidden(&mut self, port: u16) {
        self.set_unavailable(port);
        self.never += 1;
    }

    /// Records that all attempts met ports in use.
    pub(super) fn exhausted(&mut self, now: Instant) {
        self.paused_until = Some(now + PAUSE);
    }

    /// Marks a port as in use that another process had chosen for its flow.
    pub(super) fn adopted(&mut self, port: u16) {
        self.set_unavailable(port);
    }

    /// Releases a port, which had its last datagram at `last_active`.
    pub(super) fn given_back(&mut self, port: u16, last_active: Instant) {
        if (self.first..=self.last).contains(&port)
            && !is_among(&self.reserved, port)
            && let Some(order) = &mut self.order
        {
            order.hold_back(usize::from(port - self.first), last_active + HELD_BACK);
        }
    }

    fn set_unavailable(&mut self, port: u16) {
        if (self.first..=self.last).contains(&port) {
            let order = self.order.get_or_insert_with(|| Order::new(self.first, self.last, &self.reserved));
            order.set(usize::from(port - self.first), true);
        }
    }
}

fn is_among(ranges: &[(u16, u16)], port: u16) -> bool {
    ranges.iter().any(|(low, high)| (*low..=*high).contains(&port))
}

/// The number of reserved ports in a range.
fn never_used((first, last): (u16, u16), reserved: &[(u16, u16)]) -> usize {
    let in_range = |(low, high): &(u16, u16)| {
        (usize::from((*high).min(last)) + 1).saturating_sub(usize::from((*low).max(first)))
    };
    reserved.iter().map(in_range).sum()
}

impl Order {
    fn new(first: u16, last: u16, reserved: &[(u16, u16)]) -> Self {
        let size = usize::from(last - first) + 1;
        let random = RandomState::new();
        let keys = std::array::from_fn(|round| random.hash_one(round));
        let unavailable = vec![0; size.div_ceil(64)];
        let (held_back, start) = (BinaryHeap::new(), Instant::now());
        let mut order = Self { size, turn: 0, keys, unavailable, count: 0, held_back, start };
        for (low, high) in reserved {
            for port in (*low).max(first)..=(*high).min(last) {
                order.set(usize::from(port - first), true);
            }
        }
        order
    }

    /// The index of the port at the current position: a pseudorandom permutation of all.
    ///
    /// It is a Feistel network over the bits of an index, or one more, repeated until the result is in the range (Black
    /// and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    fn place_of(&self, turn: usize) -> usize {
        let half = (usize::BITS - (self.size - 1).leading_zeros()).div_ceil(2);
        let mask = (1 << half) - 1;
        let mut place = turn;
        loop {
            let (mut left, mut right) = (place >> half, place & mask);
            for key in self.keys {
                let mixed = (right as u64 ^ key).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 48;
                (left, right) = (right, left ^ usize::try_from(mixed).unwrap_or(0) & mask);
            }
            place = left << half | right;
            if place < self.size {
                return place;
            }
        }
    }

    /// The unavailable ports (in use, held back or unusable) of a range that begins with `first`.
    fn unavailable_ports(&self, first: u16) -> impl Iterator<Item = u16> {
        let places = (0..self.size).filter(|place| self.is_unavailable(*place));
        places.filter_map(move |place| u16::try_from(usize::from(first) + place).ok())
    }

    fn hold_back(&mut self, place: usize, until: Instant) {
        // It may have been reserved when it was taken, but not any more.
        self.set(place, true);
        let millis = until.saturating_duration_since(self.start).as_millis();
        let millis = u64::try_from(millis).unwrap_or(u64::MAX);
        self.held_back.push(Reverse(millis << PLACE_BITS | place as u64));
    }

    /// Makes ports available that have been held back for long enough.
    fn release(&mut self, now: Instant) {
        let millis = u64::try_from(now.saturating_duration_since(self.start).as_millis()).unwrap_or(u64::MAX);
        while let Some(Reverse(first)) = self.held_back.peek().copied()
            && first >> PLACE_BITS <= millis
        {
            self.held_back.pop();
            let place = first & PLACE_MASK;
            self.set(usize::try_from(place).unwrap_or(0), false);
            if self.held_back.is_empty() {
                self.held_back.shrink_to_fit();
            }
        }
    }

    fn is_unavailable(&self, place: usize) -> bool {
        self.unavailable[place / 64] & (1 << (place % 64)) != 0
    }

    fn set(&mut self, place: usize, unavailable: bool) {
        if self.is_unavailable(place) == unavailable {
            return;
        }
        self.unavailable[place / 64] ^= 1 << (place % 64);
        if unavailable {
            self.count += 1;
        } else {
            self.count -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashSet, VecDeque};
    use std::os::unix::fs::FileExt;

    use super::super::port_settings::file_of;
    use super::*;

    fn take(ports: &mut LocalPorts, now: Instant) -> Option<u16> {
        let port = ports.candidate(now)?;
        ports.taken(port);
        Some(port)
    }

    #[test]
    fn ports_that_are_never_used_are_nobodys_share() {
        let mut ports = LocalPorts::new((1000, 1999), vec![(900, 1099), (1200, 1299), (1950, 3000)]);
        assert_eq!((ports.count(), ports.room()), (750, 563));
        let forbidden = ports.candidate(Instant::now()).unwrap();
        ports.forbidden(forbidden);
        assert_eq!(ports.count(), 749);
        assert_eq!(LocalPorts::new((1000, 1001), vec![(1, 65_535)]).count(), 0);
    }

    #[test]
    fn each_port_has_its_turn_before_one_comes_again() {
        for (first, last) in [(40_000, 40_999), (1, 1), (65_000, 65_535), (40_000, 40_006)] {
            let mut ports = LocalPorts::new((first, last), Vec::new());
            let now = Instant::now();
            let mut seen = HashSet::new();
            for _ in 0..ports.count() {
                let port = take(&mut ports, now).unwrap();
                assert!((first..=last).contains(&port) && seen.insert(port), "{port} comes again");
                ports.given_back(port, now - HELD_BACK);
            }
            assert!(seen.contains(&take(&mut ports, now).unwrap()));
        }
    }

    #[test]
    fn a_port_that_another_process_chose_is_not_chosen_again() {
        let mut ports = LocalPorts::new((50_000, 50_009), Vec::new());
        let now = Instant::now();
        [50_003, 8080].into_iter().for_each(|port| ports.adopted(port));
        let rest: HashSet<u16> = std::iter::from_fn(|| take(&mut ports, now)).collect();
        assert_eq!(rest, (50_000..=50_009).filter(|port| *port != 50_003).collect());
    }

    #[test]
    fn ports_of_this_process_are_not_taken_for_those_of_others() {
        let mut ports = LocalPorts::new((50_000, 50_009), Vec::new());
        let now = Instant::now();
        (0..9).for_each(|_| assert!(take(&mut ports, now).is_some()));
        ports.others = CERTAIN;
        // One call may find the free port at once; the next one passes all others.
        (0..2).for_each(|_| assert!(ports.candidate(now).is_some()));
        assert!(ports.others < CERTAIN);
    }

    #[test]
    fn another_process_goes_on_in_turn() {
        let (mut old, mut new) =
            (LocalPorts::new((1000, 1099), vec![]), LocalPorts::new((1000, 1099), vec![]));
        let now = Instant::now();
        assert_eq!(old.turn(), None);
        let used: HashSet<u16> = (0..60).map(|_| take(&mut old, now).unwrap()).collect();
        new.go_on(old.turn().unwrap());
        let rest: HashSet<u16> = (0..40).map(|_| take(&mut new, now).unwrap()).collect();
        assert!(used.is_disjoint(&rest));
        // Another process sends it, so it may have any value.
        let wrong = PortTurn { turn: usize::MAX, ..old.turn().unwrap() };
        new.go_on(wrong);
        assert!(take(&mut new, now).is_some());
        let mut other = LocalPorts::new((1000, 1100), vec![]);
        other.go_on(old.turn().unwrap());
        assert_eq!(other.turn(), None, "that is another range");
    }

    #[test]
    fn a_port_is_held_back_while_answers_may_come() {
        let mut ports = LocalPorts::new((50_000, 50_001), Vec::new());
        let now = Instant::now();
        let first = take(&mut ports, now).unwrap();
        let second = take(&mut ports, now).unwrap();
        assert_eq!(take(&mut ports, now), None);
        ports.given_back(second, now);
        ports.given_back(first, now - HELD_BACK / 2);
        assert_eq!(take(&mut ports, now), None);
        assert_eq!(take(&mut ports, now + HELD_BACK / 2), Some(first));
        assert_eq!(take(&mut ports, now + HELD_BACK), Some(second));
    }

    #[test]
    fn reserved_ports_are_left_alone() {
        let mut ports = LocalPorts::new((50_000, 50_009), vec![(8080, 8080), (50_001, 50_008)]);
        let now = Instant::now();
        let taken: HashSet<u16> = std::iter::from_fn(|| take(&mut ports, now)).collect();
        assert_eq!(taken, HashSet::from([50_000, 50_009]));
    }

    #[test]
    fn another_range_is_followed_and_nothing_of_the_old_one_forgotten() {
        let mut ports = LocalPorts::new((50_000, 50_003), vec![(50_003, 50_003)]);
        let now = Instant::now();
        let used: HashSet<u16> = std::iter::from_fn(|| take(&mut ports, now)).collect();
        assert_eq!(used, HashSet::from([50_000, 50_001, 50_002]));
        ports.given_back(50_001, now);
        ports.change((50_001, 50_005), vec![(50_005, 50_005)]);
        assert_eq!((ports.count(), ports.size()), (4, 5));
        let new: HashSet<u16> = std::iter::from_fn(|| take(&mut ports, now)).collect();
        assert_eq!(new, HashSet::from([50_003, 50_004]));
        assert_eq!(take(&mut ports, now + HELD_BACK), Some(50_001));
        assert_eq!(take(&mut ports, now + HELD_BACK), None, "{ports:?}");
        // A port that was reserved while in use does not become free afterwards.
        ports.change((50_001, 50_005), vec![(50_002, 50_002), (50_005, 50_005)]);
        for port in [50_000, 50_002, 50_003] {
            ports.given_back(port, now - HELD_BACK);
        }
        let free: Vec<u16> = std::iter::from_fn(|| take(&mut ports, now + HELD_BACK)).collect();
        assert_eq!(free, [50_003]);
    }

    #[test]
    fn what_others_have_is_learnt_and_forgotten() {
        let mut ports = LocalPorts::new((20_000, 59_999), Vec::new());
        let now = Instant::now();
        assert_eq!(ports.room(), 30_000);
        let tries = |ports: &mut LocalPorts, others: usize| {
            for number in 0..4000 {
                let port = ports.candidate(now).unwrap();
                if number % 4 < others {
                    ports.others_have();
                } else {
                    ports.taken(port);
                    ports.given_back(port, now - HELD_BACK);
                }
            }
        };
        tries(&mut ports, 2);
        assert!((9_000..11_000).contains(&ports.room()), "half is taken: {}", ports.room());
        tries(&mut ports, 3);
        assert!(ports.room() < 1_000, "three quarters are taken: {}", ports.room());
        tries(&mut ports, 0);
        assert_eq!(ports.room(), 30_000);
    }

    /// Opens and closes flows continuously, so that closed ones hold their ports back.
    #[test]
    fn a_process_beside_another_leaves_a_quarter_of_the_ports() {
        let mut ports = LocalPorts::new((20_000, 59_999), Vec::new());
        let now = Instant::now();
        let others: HashSet<u16> = take_all(&mut LocalPorts::new((20_000, 59_999), Vec::new()), 20_000);
        let (mut own, mut most) = (VecDeque::new(), 0);
        for _ in 0..30_000 {
            if own.len() >= ports.room() {
                own.pop_front().into_iter().for_each(|port| ports.given_back(port, now));
            }
            let Some(port) = ports.candidate(now) else { break };
            if others.contains(&port) {
                ports.others_have();
            } else {
                ports.taken(port);
                own.push_back(port);
            }
            most = most.max(own.len());
        }
        assert!((9_000..12_000).contains(&most), "{most} of 10,000");
    }

    fn take_all(ports: &mut LocalPorts, count: usize) -> HashSet<u16> {
        let now = Instant::now();
        (0..count).map_while(|_| take(ports, now)).collect()
    }

    #[test]
    fn when_others_have_all_ports_none_is_tried_for_a_moment() {
        let mut ports = LocalPorts::new((50_000, 50_009), Vec::new());
        let now = Instant::now();
        ports.exhausted(now);
        assert_eq!(ports.candidate(now), None);
        assert!(ports.candidate(now + PAUSE).is_some());
    }

    #[test]
    fn other_settings_are_noticed_but_not_looked_for_with_each_flow() {
        let (range, now) = (file_of("1000 1999"), Instant::now());
        let settings = Settings::of(range.try_clone().unwrap(), file_of(""));
        let mut ports = LocalPorts { settings: Some(settings), ..LocalPorts::new((1000, 1999), vec![]) };
        let mut bounds_at = |now| {
            ports.refresh(now);
            (ports.first, ports.last)
        };
        assert_eq!(bounds_at(now), (1000, 1999));
        range.write_all_at(b"2000 2999", 0).unwrap();
        assert_eq!(bounds_at(now + READ_AGAIN - Duration::from_millis(1)), (1000, 1999));
        assert_eq!(bounds_at(now + READ_AGAIN), (2000, 2999));
        assert!(LocalPorts::of_this_host().settings.is_some());
    }
}
