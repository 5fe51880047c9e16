//! The flow table: which flow a datagram belongs to, and which flow goes when there are too many.
//!
//! It is a pure data structure over a clock that is passed in. Flows live in slots; each slot is in
//! two lists, ordered by how long it has been idle: one of all flows of its standing, one of those
//! that have its source address too. All operations take constant time, so that a flood costs no
//! more per datagram than a friend.
//!
//! A flow starts out as *new*, and is *established* once its client has sent something after the
//! backend answered, as in the kernel's connection tracking (`ASSURED`). A flow that is never answered
//! is established when its client still sends after [`LASTING`]. At the cap the longest idle new flow
//! goes: datagrams with forged sources, whose senders see no answer, displace each other. New flows
//! have a share of the table to themselves, in which a client's first exchange can come to its end
//! while a flood passes; only for that share, a flow that is established has to go.

use std::collections::HashMap;
use std::collections::hash_map::{Entry, RandomState};
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

/// A client that still sends after this long means it, even if nobody answers (syslog, metrics).
const LASTING: Duration = Duration::from_secs(1);

/// One place in this many is for new flows, even if established ones have to make room.
const NEW_SHARE: usize = 8;

/// Names a flow while it exists. The generation tells it from a later flow in the same slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FlowId {
    slot: u32,
    generation: u32,
}

impl FlowId {
    /// Generations of a slot before they repeat. The highest bit of [`Self::to_u64`] stays clear.
    const GENERATIONS: u32 = 1 << 31;

    /// As one number, for the event loop.
    pub(super) fn to_u64(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.slot)
    }

    /// The reverse of [`Self::to_u64`].
    pub(super) fn from_u64(number: u64) -> Self {
        let [low, high] = [number & u64::from(u32::MAX), number >> 32];
        let part = |number| u32::try_from(number).unwrap_or(u32::MAX);
        Self { slot: part(low), generation: part(high) }
    }
}

/// How many flows there may be, and for how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bounds {
    /// Flows in all, at least 1.
    pub(super) flows: usize,
    /// Flows of one source address, at least 1.
    pub(super) flows_per_source: usize,
    /// A flow without traffic for this long is over.
    pub(super) idle: Duration,
}

/// Which side of a flow a datagram came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Client,
    Backend,
}

/// The table. `K` tells flows apart; `F` is what a flow consists of.
#[derive(Debug)]
pub(super) struct FlowTable<K, F> {
    bounds: Bounds,
    /// Keyed at random (SipHash): an attacker chooses the keys.
    index: HashMap<K, u32, RandomState>,
    slots: Vec<Slot<K, F>>,
    free: Vec<u32>,
    all: ByStanding,
    sources: HashMap<Source, ByStanding, RandomState>,
}

#[derive(Debug)]
struct Slot<K, F> {
    generation: u32,
    used: Option<Used<K, F>>,
}

#[derive(Debug)]
struct Used<K, F> {
    key: K,
    flow: F,
    source: Source,
    opened: Instant,
    last_active: Instant,
    is_answered: bool,
    standing: Standing,
    in_all: Links,
    in_source: Links,
}

impl<K, F> Used<K, F> {
    /// Takes note of a datagram.
    fn note(&mut self, from: Side, now: Instant) {
        self.last_active = now;
        match from {
            Side::Backend => self.is_answered = true,
            Side::Client if self.is_answered || now.saturating_duration_since(self.opened) >= LASTING => {
                self.standing = Standing::Established;
            }
            Side::Client => {}
        }
    }
}

/// How much there has been of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    New,
    Established,
}

/// A source for the quota: an IPv4 address, or the /64 of an IPv6 one, as whoever has one of its
/// addresses has them all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Source(IpAddr);

impl Source {
    fn of(ip: IpAddr) -> Self {
        Self(match ip.to_canonical() {
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX)).into(),
            v4 => v4,
        })
    }
}

impl<K: Clone + Eq + Hash, F> FlowTable<K, F> {
    /// An empty table.
    pub(super) fn new(bounds: Bounds) -> Self {
        Self {
            bounds,
            index: HashMap::default(),
            slots: Vec::new(),
            free: Vec::new(),
            all: ByStanding::EMPTY,
            sources: HashMap::default(),
        }
    }

    /// The number of flows.
    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    /// The flow with `key`.
    pub(super) fn find(&self, key: &K) -> Option<FlowId> {
        let slot = *self.index.get(key)?;
        Some(FlowId { slot, generation: self.slots[slot as usize].generation })
    }

    /// What the flow `id` consists of, unless it is over.
    pub(super) fn get(&self, id: FlowId) -> Option<(&K, &F)> {
        let slot = self.slots.get(id.slot as usize)?;
        let used = slot.used.as_ref().filter(|_| slot.generation == id.generation)?;
        Some((&used.key, &used.flow))
    }

    /// As [`Self::get`], to change it.
    pub(super) fn get_mut(&mut self, id: FlowId) -> Option<(&K, &mut F)> {
        let slot = self.slots.get_mut(id.slot as usize)?;
        let used = slot.used.as_mut().filter(|_| slot.generation == id.generation)?;
        Some((&used.key, &mut used.flow))
    }

    /// Takes a flow out that has to go before `source` may have another one, if any has to.
    pub(super) fn make_room(&mut self, source: IpAddr) -> Option<F> {
        let source = Source::of(source);
        let own = self.sources.get(&source).filter(|own| own.len() >= self.bounds.flows_per_source);
        match own {
            Some(own) => own.first_to_go().map(|slot| self.remove_slot(slot)),
            None if self.len() < self.bounds.flows => None,
            None => self.evict(),
        }
    }

    /// Takes out the flow that is the first to go, if there is any.
    pub(super) fn evict(&mut self) -> Option<F> {
        self.all.first_to_go().map(|slot| self.remove_slot(slot))
    }

    /// The name that the next flow to be inserted will have.
    pub(super) fn next_id(&self) -> FlowId {
        match self.free.last() {
            Some(&slot) => FlowId { slot, generation: self.slots[slot as usize].generation },
            None => FlowId { slot: to_slot(self.slots.len()), generation: 0 },
        }
    }

    /// Adds a flow, for which [`Self::make_room`] was asked before. `key` must not be there yet.
    pub(super) fn insert(&mut self, key: K, source: IpAddr, flow: F, now: Instant) -> FlowId {
        let id = self.next_id();
        let slot = id.slot;
        if self.free.pop().is_none() {
            self.slots.push(Slot { generation: id.generation, used: None });
        }
        let source = Source::of(source);
        let previous = self.index.insert(key.clone(), slot);
        debug_assert!(previous.is_none(), "a key names one flow");
        self.slots[slot as usize].used = Some(Used {
            key,
            flow,
            source,
            opened: now,
            last_active: now,
            is_answered: false,
            standing: Standing::New,
            in_all: Links::NONE,
            in_source: Links::NONE,
        });
        self.link(slot);
        id
    }

    /// Notes traffic: the flow is now the one idle for the shortest time.
    pub(super) fn touch(&mut self, id: FlowId, from: Side, now: Instant) {
        if self.get(id).is_none() {
            return;
        }
        self.unlink(id.slot);
        if let Some(used) = &mut self.slots[id.slot as usize].used {
            used.note(from, now);
        }
        self.link(id.slot);
    }

    /// Whether the flow `id` is there and established.
    pub(super) fn is_established(&self, id: FlowId) -> bool {
        self.get(id).is_some() && matches!(self.lists_of(id.slot), Some((_, Standing::Established)))
    }

    /// Makes the flow `id` established, as if its client had gone on after an answer.
    pub(super) fn establish(&mut self, id: FlowId) {
        if self.get(id).is_none() {
            return;
        }
        self.unlink(id.slot);
        if let Some(used) = &mut self.slots[id.slot as usize].used {
            used.standing = Standing::Established;
        }
        self.link(id.slot);
    }

    /// Takes a flow out that has been idle for too long at `now`; call it until it gives `None`.
    pub(super) fn expire(&mut self, now: Instant) -> Option<F> {
        let oldest = self.oldest()?;
        let idle_since = self.slots[oldest as usize].used.as_ref()?.last_active;
        let is_over = now.saturating_duration_since(idle_since) >= self.bounds.idle;
        is_over.then(|| self.remove_slot(oldest))
    }

    /// All flows, by name, with the time of their last traffic.
    pub(super) fn iter(&self) -> impl Iterator<Item = (FlowId, &K, Instant)> {
        (0..).zip(&self.slots).filter_map(|(slot, Slot { generation, used })| {
            let used = used.as_ref()?;
            Some((FlowId { slot, generation: *generation }, &used.key, used.last_active))
        })
    }

    /// Takes the flow `id` out, unless it is over.
    pub(super) fn remove(&mut self, id: FlowId) -> Option<F> {
        self.get(id)?;
        Some(self.remove_slot(id.slot))
    }

    /// When the next flow will have been idle for too long.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        let oldest = self.slots[self.oldest()? as usize].used.as_ref()?;
        Some(oldest.last_active + self.bounds.idle)
    }

    /// When there was traffic last, in any flow.
    pub(super) fn last_active(&self) -> Option<Instant> {
        self.all.newest().into_iter().flatten().filter_map(|slot| self.active_at(slot)).max()
    }

    /// The slot of the flow that has been idle the longest.
    fn oldest(&self) -> Option<u32> {
        self.all.oldest().into_iter().flatten().min_by_key(|slot| self.active_at(*slot))
    }

    fn active_at(&self, slot: u32) -> Option<Instant> {
        self.slots[slot as usize].used.as_ref().map(|used| used.last_active)
    }

    /// Puts a slot in use at the newest end of its lists.
    fn link(&mut self, slot: u32) {
        let Some((source, standing)) = self.lists_of(slot) else { return };
        push(&mut self.slots, self.all.of(standing), slot, |used| &mut used.in_all);
        let own = self.sources.entry(source).or_insert(ByStanding::EMPTY);
        push(&mut self.slots, own.of(standing), slot, |used| &mut used.in_source);
    }

    /// Takes a slot in use out of its lists.
    fn unlink(&mut self, slot: u32) {
        let Some((source, standing)) = self.lists_of(slot) else { return };
        unlink(&mut self.slots, self.all.of(standing), slot, |used| &mut used.in_all);
        if let Some(own) = self.sources.get_mut(&source) {
            unlink(&mut self.slots, own.of(standing), slot, |used| &mut used.in_source);
        }
    }

    fn lists_of(&self, slot: u32) -> Option<(Source, Standing)> {
        self.slots[slot as usize].used.as_ref().map(|used| (used.source, used.standing))
    }

    fn remove_slot(&mut self, slot: u32) -> F {
        self.unlink(slot);
        let emptied = &mut self.slots[slot as usize];
        emptied.generation = (emptied.generation + 1) % FlowId::GENERATIONS;
        let used = emptied.used.take().expect("only slots in use are in the lists");
        self.index.remove(&used.key);
        if let Entry::Occupied(own) = self.sources.entry(used.source)
            && own.get().len() == 0
        {
            own.remove();
        }
        self.free.push(slot);
        used.flow
    }
}

fn to_slot(index: usize) -> u32 {
    u32::try_from(index).expect("descriptors run out before slots do")
}

/// A slot's neighbours in a list.
#[derive(Clone, Copy, Debug)]
struct Links {
    older: Option<u32>,
    newer: Option<u32>,
}

impl Links {
    const NONE: Self = Self { older: None, newer: None };
}

/// A list through the slots, from the longest idle to the most recently active.
#[derive(Clone, Copy, Debug)]
struct List {
    oldest: Option<u32>,
    newest: Option<u32>,
    len: usize,
}

impl List {
    const EMPTY: Self = Self { oldest: None, newest: None, len: 0 };
}

/// The flows of all sources, or of one, by their standing.
#[derive(Clone, Copy, Debug)]
struct ByStanding {
    new: List,
    established: List,
}

impl ByStanding {
    const EMPTY: Self = Self { new: List::EMPTY, established: List::EMPTY };

    fn of(&mut self, standing: Standing) -> &mut List {
        match standing {
            Standing::New => &mut self.new,
            Standing::Established => &mut self.established,
        }
    }

    fn len(&self) -> usize {
        self.new.len + self.established.len
    }

    /// The slot of the flow that goes when one has to: see the head of this file.
    fn first_to_go(&self) -> Option<u32> {
        let share = (self.len() / NEW_SHARE).max(1);
        if self.new.len >= share { self.new.oldest } else { self.established.oldest.or(self.new.oldest) }
    }

    /// The slots at the oldest ends.
    fn oldest(&self) -> [Option<u32>; 2] {
        [self.new.oldest, self.established.oldest]
    }

    /// The slots at the newest ends.
    fn newest(&self) -> [Option<u32>; 2] {
        [self.new.newest, self.established.newest]
    }
}

type LinksOf<K, F> = fn(&mut Used<K, F>) -> &mut Links;

fn links_of<K, F>(slots: &mut [Slot<K, F>], slot: u32, links: LinksOf<K, F>) -> &mut Links {
    links(slots[slot as usize].used.as_mut().expect("only slots in use are in the lists"))
}

/// Adds `slot` at the newest end.
fn push<K, F>(slots: &mut [Slot<K, F>], list: &mut List, slot: u32, links: LinksOf<K, F>) {
    *links_of(slots, slot, links) = Links { older: list.newest, newer: None };
    match list.newest {
        Some(newest) => links_of(slots, newest, links).newer = Some(slot),
        None => list.oldest = Some(slot),
    }
    list.newest = Some(slot);
    list.len += 1;
}

/// Takes `slot` out, wherever it is.
fn unlink<K, F>(slots: &mut [Slot<K, F>], list: &mut List, slot: u32, links: LinksOf<K, F>) {
    let Links { older, newer } = std::mem::replace(links_of(slots, slot, links), Links::NONE);
    match older {
        Some(older) => links_of(slots, older, links).newer = newer,
        None => list.oldest = newer,
    }
    match newer {
        Some(newer) => links_of(slots, newer, links).older = older,
        None => list.newest = older,
    }
    list.len -= 1;
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const IDLE: Duration = Duration::from_secs(90);

    fn ip(n: u8) -> IpAddr {
        [10, 0, 0, n].into()
    }

    fn table(flows: usize, flows_per_source: usize) -> FlowTable<(u8, u16), u16> {
        FlowTable::new(Bounds { flows, flows_per_source, idle: IDLE })
    }

    fn open(table: &mut FlowTable<(u8, u16), u16>, source: u8, port: u16, now: Instant) -> Option<u16> {
        let evicted = table.make_room(ip(source));
        let id = table.insert((source, port), ip(source), port, now);
        table.touch(id, Side::Client, now);
        evicted
    }

    fn touch(table: &mut FlowTable<(u8, u16), u16>, source: u8, port: u16, from: Side, now: Instant) {
        let id = table.find(&(source, port)).unwrap();
        table.touch(id, from, now);
    }

    fn establish(table: &mut FlowTable<(u8, u16), u16>, source: u8, port: u16, now: Instant) {
        open(table, source, port, now);
        touch(table, source, port, Side::Backend, now);
        touch(table, source, port, Side::Client, now);
    }

    #[test]
    fn at_the_cap_the_longest_idle_flow_goes() {
        let start = Instant::now();
        let mut table = table(3, 3);
        for port in 1..=3 {
            assert_eq!(open(&mut table, 1, port, start), None);
        }
        touch(&mut table, 1, 1, Side::Backend, start);
        assert_eq!(open(&mut table, 2, 4, start), Some(2));
        assert_eq!(open(&mut table, 2, 5, start), Some(3));
        assert_eq!(table.len(), 3);
    }

    #[test]
    fn a_flood_displaces_itself_and_not_flows_in_use() {
        let start = Instant::now();
        let mut table = table(10, 10);
        for port in 1..=5 {
            establish(&mut table, 1, port, start);
        }
        for port in 1000..3000 {
            open(&mut table, (port % 200) as u8 + 2, port, start + Duration::from_secs(1));
        }
        for port in 1..=5 {
            assert!(table.find(&(1, port)).is_some(), "flow {port} is in use");
        }
        assert_eq!(table.len(), 10);
    }

    #[test]
    fn pairs_of_datagrams_from_forged_sources_displace_each_other() {
        let start = Instant::now();
        let mut table = table(16, 16);
        for port in 1..=14 {
            establish(&mut table, 1, port, start);
        }
        for port in 1000..3000 {
            let source = (port % 200) as u8 + 2;
            open(&mut table, source, port, start + LASTING);
            touch(&mut table, source, port, Side::Client, start + LASTING);
        }
        for port in 1..=14 {
            assert!(table.find(&(1, port)).is_some(), "flow {port} is in use");
        }
    }

    #[test]
    fn new_flows_have_a_share_of_a_table_full_of_established_ones() {
        let start = Instant::now();
        let mut table = table(16, 16);
        for port in 1..=16 {
            establish(&mut table, 1, port, start);
        }
        assert_eq!(open(&mut table, 2, 101, start), Some(1));
        assert_eq!(open(&mut table, 2, 102, start), Some(2));
        assert_eq!(open(&mut table, 2, 103, start), Some(101), "the share is full");
    }

    #[test]
    fn a_flow_that_is_never_answered_is_established_by_lasting() {
        let start = Instant::now();
        let mut table = table(2, 2);
        open(&mut table, 1, 1, start);
        open(&mut table, 1, 2, start);
        touch(&mut table, 1, 1, Side::Client, start + LASTING);
        touch(&mut table, 1, 2, Side::Client, start + LASTING / 2);
        assert_eq!(open(&mut table, 2, 3, start + LASTING), Some(2));
    }

    #[test]
    fn a_source_at_its_quota_displaces_its_own_longest_idle_flow() {
        let start = Instant::now();
        let mut table = table(10, 2);
        open(&mut table, 1, 1, start);
        open(&mut table, 2, 2, start);
        open(&mut table, 2, 3, start);
        touch(&mut table, 2, 2, Side::Client, start);
        assert_eq!(open(&mut table, 2, 4, start), Some(3));
        assert!(table.find(&(1, 1)).is_some());
    }

    #[test]
    fn all_addresses_of_a_v6_network_share_a_quota() {
        let source = |text: &str| Source::of(text.parse().unwrap());
        assert_eq!(source("2001:db8::1"), source("2001:db8::2:3:4:5"));
        assert_ne!(source("2001:db8::1"), source("2001:db8:0:1::1"));
        assert_eq!(source("::ffff:10.0.0.1"), source("10.0.0.1"));
        assert_ne!(source("10.0.0.1"), source("10.0.0.2"));
    }

    #[test]
    fn flows_expire_when_neither_side_sends() {
        let start = Instant::now();
        let mut table = table(10, 10);
        open(&mut table, 1, 1, start);
        open(&mut table, 1, 2, start);
        touch(&mut table, 1, 2, Side::Backend, start + IDLE / 2);
        assert_eq!(table.next_expiry(), Some(start + IDLE));
        assert_eq!(table.expire(start + IDLE - Duration::from_millis(1)), None);
        assert_eq!(table.expire(start + IDLE), Some(1));
        assert_eq!(table.expire(start + IDLE), None);
        assert_eq!(table.expire(start + IDLE * 3 / 2), Some(2));
        assert_eq!(table.next_expiry(), None);
    }

    #[test]
    fn a_name_does_not_outlive_its_flow() {
        let start = Instant::now();
        let mut table = table(1, 1);
        open(&mut table, 1, 1, start);
        let old = table.find(&(1, 1)).unwrap();
        assert_eq!(FlowId::from_u64(old.to_u64()), old);
        open(&mut table, 1, 2, start);
        assert!(table.get_mut(old).is_none());
        table.touch(old, Side::Client, start);
        assert_eq!(table.len(), 1);
    }

    /// What the table promises, in the plainest form: a map and a walk through all of it.
    #[derive(Default)]
    struct Model {
        flows: BTreeMap<(u8, u16), ModelFlow>,
        clock: u64,
    }

    struct ModelFlow {
        order: u64,
        opened: Instant,
        at: Instant,
        answered: bool,
        established: bool,
    }

    impl Model {
        fn victim(&self, source: u8, bounds: Bounds) -> Option<(u8, u16)> {
            let own = self.flows.keys().filter(|key| key.0 == source).count();
            if own >= bounds.flows_per_source {
                return self.first_to_go(&|key| key.0 == source);
            }
            (self.flows.len() >= bounds.flows).then(|| self.first_to_go(&|_| true)).flatten()
        }

        fn first_to_go(&self, among: &dyn Fn(&(u8, u16)) -> bool) -> Option<(u8, u16)> {
            let mut flows: Vec<_> = self.flows.iter().filter(|(key, _)| among(key)).collect();
            flows.sort_by_key(|(_, flow)| flow.order);
            let new = flows.iter().filter(|(_, flow)| !flow.established).count();
            let established = new < (flows.len() / 8).max(1);
            flows.iter().find(|(_, flow)| flow.established == established).map(|(key, _)| **key)
        }

        fn touch(&mut self, key: (u8, u16), from: Side, at: Instant) {
            self.clock += 1;
            let opened = ModelFlow { order: 0, opened: at, at, answered: false, established: false };
            let flow = self.flows.entry(key).or_insert(opened);
            (flow.order, flow.at) = (self.clock, at);
            match from {
                Side::Backend => flow.answered = true,
                Side::Client => flow.established |= flow.answered || at - flow.opened >= LASTING,
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Datagram(u8, u16, bool),
        Wait(u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            9 => (0..4_u8, 0..16_u16, any::<bool>()).prop_map(|(s, p, c)| Op::Datagram(s, p, c)),
            1 => prop_oneof![Just(1), 1..60_u64].prop_map(Op::Wait),
        ]
    }

    proptest! {
        #[test]
        fn the_table_does_what_the_model_does(
            ops in prop::collection::vec(op(), 1..300),
            flows in 1..20_usize,
            per_source in 1..18_usize,
        ) {
            let mut now = Instant::now();
            let mut table = table(flows, per_source);
            let bounds = table.bounds;
            let mut model = Model::default();
            for op in ops {
                match op {
                    Op::Datagram(source, port, from_client) => {
                        let key = (source, port);
                        let side = if from_client { Side::Client } else { Side::Backend };
                        if let Some(id) = table.find(&key) {
                            table.touch(id, side, now);
                            model.touch(key, side, now);
                        } else if from_client {
                            let victim = model.victim(source, bounds);
                            prop_assert_eq!(open(&mut table, source, port, now), victim.map(|key| key.1));
                            victim.map(|key| model.flows.remove(&key));
                            model.touch(key, Side::Client, now);
                        }
                    }
                    Op::Wait(seconds) => {
                        now += Duration::from_secs(seconds);
                        while table.expire(now).is_some() {}
                        model.flows.retain(|_, flow| now - flow.at < IDLE);
                    }
                }
                prop_assert_eq!(table.len(), model.flows.len());
                prop_assert_eq!(table.next_expiry(), model.flows.values().map(|flow| flow.at + IDLE).min());
                prop_assert_eq!(table.last_active(), model.flows.values().map(|flow| flow.at).max());
                for key in model.flows.keys() {
                    prop_assert!(table.find(key).is_some());
                }
            }
            prop_assert!(table.sources.len() <= table.len());
        }
    }
}
