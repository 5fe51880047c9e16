//! The flow table: finds the flow of a datagram, and the flow to evict when there are too many.
//!
//! It is a pure data structure; the current time is passed in. Flows live in slots. Each slot is in lists ordered by
//! idle time ([`scopes`](super::scopes)), with those that share its timeout, its mapping, or its source. All operations
//! take constant time, so that a flood's datagrams cost no more than others.
//!
//! A flow starts as *new*. It is *established* once its client has sent something after a reply, as in the kernel's
//! connection tracking (`ASSURED`). A flow without replies is established when its client still sends after
//! [`ESTABLISHED_AFTER`]. At a limit, the new flow that was idle for longest is evicted: datagrams with forged sources
//! evict each other, and never an established flow. A share of each limit is reserved for new flows, so that legitimate
//! new flows survive a flood. A flow that finds the established share full stays new until there is room.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::Hash;
use std::net::IpAddr;
use std::time::{Duration, Instant};

pub(super) use super::scopes::MappingId;
use super::scopes::{FlowState, LinkStore, Links, SCOPES, ScopeKey, Scopes, first_to_go, most_established};
pub(super) use super::slots::FlowId;
use super::slots::Slots;
use crate::state::sources::Source;

/// A client that still sends after this time is legitimate even if nobody replies (syslog, metrics).
const ESTABLISHED_AFTER: Duration = Duration::from_secs(1);

/// Activity within this time of the last recorded one is not recorded: it would make no relevant difference, and the
/// neighbours of a flow in its lists are not in the processor's cache.
const ACTIVITY_RESOLUTION: Duration = Duration::from_millis(1);

/// The maximum number and idle time of a mapping's flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bounds {
    /// The mapping.
    pub(super) mapping: MappingId,
    /// Maximum number of flows, at least 1.
    pub(super) flows: usize,
    /// Maximum number of flows of one source address, at least 1.
    pub(super) flows_per_source: usize,
    /// Whether a source's flows are counted across all mappings for which this is set.
    pub(super) shares_sources: bool,
    /// A flow expires after this idle time.
    pub(super) idle: Duration,
}

impl Bounds {
    fn source_key(&self, source: IpAddr) -> ScopeKey {
        ScopeKey::Source((!self.shares_sources).then_some(self.mapping), Source::of_ip(source))
    }
}

/// The side of a flow that sent a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Client,
    Backend,
}

/// A flow that was removed from the table.
#[derive(Debug)]
pub(super) struct Ended<F> {
    pub(super) flow: F,
    /// The time of its last activity.
    pub(super) last_active: Instant,
}

/// The table. `K` is the key of a flow, `F` its content.
#[derive(Debug)]
pub(super) struct FlowTable<K, F> {
    /// Maximum number of flows of all mappings, at least 1.
    most: usize,
    /// Number of established flows.
    established: usize,
    /// Uses random keys (SipHash), because an attacker can choose the flow keys.
    index: HashMap<K, u32, RandomState>,
    slots: Slots<Used<K, F>>,
    scopes: Scopes,
}

#[derive(Debug)]
struct Used<K, F> {
    key: K,
    flow: F,
    source: IpAddr,
    opened: Instant,
    last_active: Instant,
    is_answered: bool,
    state: FlowState,
    links: [Links; SCOPES],
}

impl<K, F> Used<K, F> {
    /// Whether a datagram from this side makes the flow established, if there is room.
    fn is_established_by(&self, from: Side, now: Instant) -> bool {
        self.state == FlowState::New
            && from == Side::Client
            && (self.is_answered || now.saturating_duration_since(self.opened) >= ESTABLISHED_AFTER)
    }
}

impl<K, F> LinkStore for Slots<Used<K, F>> {
    fn links(&mut self, slot: u32, which: usize) -> &mut Links {
        &mut self.at_mut(slot).expect("only slots in use are in the lists").links[which]
    }
}

impl<K: Clone + Eq + Hash, F> FlowTable<K, F> {
    /// An empty table for at most `most` flows.
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            established: 0,
            index: HashMap::default(),
            slots: Slots::default(),
            scopes: Scopes::default(),
        }
    }

    /// The number of flows.
    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    /// Sets the maximum number of flows of all mappings.
    pub(super) fn set_most(&mut self, most: usize) {
        self.most = most.max(1);
    }

    /// The flow with `key`.
    pub(super) fn find(&self, key: &K) -> Option<FlowId> {
        self.index.get(key).map(|slot| self.slots.id_of(*slot))
    }

    /// The content of the flow `id`, unless it was removed.
    pub(super) fn get(&self, id: FlowId) -> Option<(&K, &F)> {
        self.slots.get(id).map(|used| (&used.key, &used.flow))
    }

    /// Like [`Self::get`], but mutable.
    pub(super) fn get_mut(&mut self, id: FlowId) -> Option<(&K, &mut F)> {
        self.slots.get_mut(id).map(|used| (&used.key, &mut used.flow))
    }

    /// The content of at most `count` flows from position `first`. Returns no next position at the end.
    pub(super) fn some_from(
        &mut self,
        first: usize,
        count: usize,
    ) -> (impl Iterator<Item = &mut F>, Option<usize>) {
        let (some, next) = self.slots.some_from(first, count);
        (some.map(|used| &mut used.flow), next)
    }

    /// Whether a flow has to be evicted before `source` may have another one.
    pub(super) fn is_full(&self, bounds: &Bounds, source: IpAddr) -> bool {
        self.victim(bounds, source).is_some()
    }

    /// Evicts a flow if necessary before `source` may have another one. Call it until it returns `None`.
    pub(super) fn make_room(&mut self, bounds: &Bounds, source: IpAddr) -> Option<Ended<F>> {
        self.victim(bounds, source).map(|slot| self.remove_slot(slot))
    }

    fn victim(&self, bounds: &Bounds, source: IpAddr) -> Option<u32> {
        let full = |key: &ScopeKey, most| self.scopes.find(key).filter(|scope| scope.len() >= most);
        full(&bounds.source_key(source), bounds.flows_per_source)
            .or_else(|| full(&ScopeKey::Mapping(bounds.mapping), bounds.flows))
            .map_or_else(
                || (self.len() >= self.most).then(|| self.first_to_go()),
                |scope| Some(scope.first_to_go()),
            )
            .flatten()
    }

    /// Evicts the next flow in order, if there is any.
    pub(super) fn evict(&mut self) -> Option<Ended<F>> {
        self.first_to_go().map(|slot| self.remove_slot(slot))
    }

    /// The slot of the flow to evict among all.
    fn first_to_go(&self) -> Option<u32> {
        let oldest = |state: usize| {
            let slots = self.scopes.idles().filter_map(|(_idle, scope)| scope.oldest()[state]);
            slots.min_by_key(|slot| self.active_at(*slot))
        };
        first_to_go([oldest(0), oldest(1)], self.established, self.most)
    }

    /// The id of the next insertion.
    pub(super) fn next_id(&self) -> FlowId {
        self.slots.next_id()
    }

    /// Inserts a flow after [`Self::make_room`]. `key` must not exist yet.
    pub(super) fn insert(
        &mut self,
        key: K,
        (bounds, source): (&Bounds, IpAddr),
        flow: F,
        now: Instant,
    ) -> FlowId {
        let links = self.enter(bounds, source);
        let used = Used {
            key: key.clone(),
            flow,
            source,
            opened: now,
            last_active: now,
            is_answered: false,
            state: FlowState::New,
            links,
        };
        let id = self.slots.insert(used);
        let previous = self.index.insert(key, id.slot);
        debug_assert!(previous.is_none(), "a key names one flow");
        self.link(id.slot);
        id
    }

    /// The scopes of a flow that is not linked yet.
    fn enter(&mut self, bounds: &Bounds, source: IpAddr) -> [Links; SCOPES] {
        let scopes = [
            (ScopeKey::Idle(bounds.idle), usize::MAX),
            (ScopeKey::Mapping(bounds.mapping), bounds.flows),
            (bounds.source_key(source), bounds.flows_per_source),
        ];
        scopes.map(|(key, most)| Links::outside(self.scopes.enter(key, most)))
    }

    /// Records activity: the flow becomes the most recently active.
    pub(super) fn touch(&mut self, id: FlowId, from: Side, now: Instant) {
        let Some(used) = self.slots.get(id) else { return };
        let rises = used.is_established_by(from, now) && self.has_room_for_established(&used.links);
        let is_news = now.saturating_duration_since(used.last_active) >= ACTIVITY_RESOLUTION;
        if rises || is_news {
            self.unlink(id.slot);
        }
        let Some(used) = self.slots.at_mut(id.slot) else { return };
        used.is_answered |= from == Side::Backend;
        if rises {
            used.state = FlowState::Established;
        }
        if rises || is_news {
            used.last_active = now;
            self.link(id.slot);
        }
    }

    /// Restarts the timeout of the flow `id`, as if it had been active.
    pub(super) fn postpone(&mut self, id: FlowId, now: Instant) {
        if self.slots.get(id).is_none() {
            return;
        }
        self.unlink(id.slot);
        if let Some(used) = self.slots.at_mut(id.slot) {
            used.last_active = now;
        }
        self.link(id.slot);
    }

    fn has_room_for_established(&self, links: &[Links; SCOPES]) -> bool {
        let has_room = |links: &Links| {
            let scope = self.scopes.at(links.scope);
            scope.established() < most_established(scope.most)
        };
        self.established < most_established(self.most) && links.iter().all(has_room)
    }

    /// Whether the flow `id` exists and is established.
    pub(super) fn is_established(&self, id: FlowId) -> bool {
        self.slots.get(id).is_some_and(|used| used.state == FlowState::Established)
    }

    /// Makes the flow `id` established, as if its client had sent something after a reply.
    pub(super) fn establish(&mut self, id: FlowId, now: Instant) {
        self.touch(id, Side::Backend, now);
        self.touch(id, Side::Client, now);
    }

    /// Applies new bounds to the flows of a mapping. Timeouts count from now.
    pub(super) fn rebound(&mut self, bounds: &Bounds, now: Instant) {
        let mapping = ScopeKey::Mapping(bounds.mapping);
        if self.scopes.find(&mapping).is_none() {
            return;
        }
        let is_theirs = |used: &Used<K, F>| self.scopes.at(used.links[MAPPING].scope).key == mapping;
        let theirs = self.slots.iter().filter(|(_slot, used)| is_theirs(used));
        let mut theirs: Vec<(Instant, u32)> = theirs.map(|(slot, used)| (used.last_active, slot)).collect();
        theirs.sort_unstable();
        for (_at, slot) in theirs {
            self.unlink(slot);
            let Some(used) = self.slots.at(slot) else { continue };
            let (source, old) = (used.source, used.links);
            let links = self.enter(bounds, source);
            if let Some(used) = self.slots.at_mut(slot) {
                (used.links, used.last_active) = (links, now);
            }
            self.link(slot);
            old.iter().for_each(|links| self.scopes.leave(links.scope));
        }
    }

    /// Evicts the flows beyond the maximum of a source, of the mapping, or of all.
    pub(super) fn take_surplus(&mut self, bounds: &Bounds) -> Vec<Ended<F>> {
        let shared = (!bounds.shares_sources).then_some(bounds.mapping);
        let sources =
            self.scopes.keys().filter(|key| matches!(key, ScopeKey::Source(of, _) if *of == shared));
        let limits = sources.map(|key| (key, bounds.flows_per_source));
        let limits: Vec<_> = limits.chain([(ScopeKey::Mapping(bounds.mapping), bounds.flows)]).collect();
        let mut surplus = Vec::new();
        for (key, most) in limits {
            while let Some(scope) = self.scopes.find(&key).filter(|scope| scope.len() > most)
                && let Some(slot) = scope.first_to_go()
            {
                surplus.push(self.remove_slot(slot));
            }
        }
        while self.len() > self.most
            && let Some(slot) = self.first_to_go()
        {
            surplus.push(self.remove_slot(slot));
        }
        surplus
    }

    /// Removes a flow that has expired at `now`.
    pub(super) fn expired(&self, now: Instant) -> Option<FlowId> {
        let over = |(idle, slot): &(Duration, u32)| {
            self.active_at(*slot).is_some_and(|at| now.saturating_duration_since(at) >= *idle)
        };
        let (_idle, slot) = self.oldest().find(over)?;
        Some(self.slots.id_of(slot))
    }

    /// All flows, by id, with the time of their last activity.
    pub(super) fn iter(&self) -> impl Iterator<Item = (FlowId, &K, Instant)> {
        self.slots.iter().map(|(slot, used)| (self.slots.id_of(slot), &used.key, used.last_active))
    }

    /// The source address that the flow `id` counts for.
    pub(super) fn source(&self, id: FlowId) -> Option<IpAddr> {
        self.slots.get(id).map(|used| used.source)
    }

    /// Removes the flow `id`, unless it was removed before.
    pub(super) fn remove(&mut self, id: FlowId) -> Option<Ended<F>> {
        self.get(id)?;
        Some(self.remove_slot(id.slot))
    }

    /// The time at which the next flow expires.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.oldest().filter_map(|(idle, slot)| Some(self.active_at(slot)? + idle)).min()
    }

    /// The time of the last activity of any flow.
    pub(super) fn last_active(&self) -> Option<Instant> {
        let newest = self.scopes.idles().flat_map(|(_idle, scope)| scope.newest()).flatten();
        newest.filter_map(|slot| self.active_at(slot)).max()
    }

    /// The slots of the flows that were idle for longest, with their timeouts.
    fn oldest(&self) -> impl Iterator<Item = (Duration, u32)> {
        let oldest = |(idle, scope): (Duration, &super::scopes::Scope)| {
            scope.oldest().into_iter().flatten().map(move |slot| (idle, slot))
        };
        self.scopes.idles().flat_map(oldest)
    }

    fn active_at(&self, slot: u32) -> Option<Instant> {
        self.slots.at(slot).map(|used| used.last_active)
    }

    /// Appends a used slot at the newest end of its lists.
    fn link(&mut self, slot: u32) {
        let Some((links, state)) = self.links_of(slot) else { return };
        self.established += usize::from(state == FlowState::Established);
        for (which, links) in links.iter().enumerate() {
            self.scopes.push(&mut self.slots, slot, (which, links.scope), state);
        }
    }

    /// Removes a used slot from its lists.
    fn unlink(&mut self, slot: u32) {
        let Some((links, state)) = self.links_of(slot) else { return };
        self.established -= usize::from(state == FlowState::Established);
        for (which, links) in links.iter().enumerate() {
            self.scopes.unlink(&mut self.slots, slot, (which, links.scope), state);
        }
    }

    fn links_of(&self, slot: u32) -> Option<([Links; SCOPES], FlowState)> {
        self.slots.at(slot).map(|used| (used.links, used.state))
    }

    fn remove_slot(&mut self, slot: u32) -> Ended<F> {
        self.unlink(slot);
        let used = self.slots.remove(slot).expect("only slots in use are in the lists");
        let Used { key, flow, last_active, links, .. } = used;
        self.index.remove(&key);
        links.iter().for_each(|links| self.scopes.leave(links.scope));
        Ended { flow, last_active }
    }
}

/// The index of the mapping's scope among those of a flow.
const MAPPING: usize = 1;

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const IDLE: Duration = Duration::from_secs(90);

    type Table = FlowTable<(u8, u16), u16>;

    fn ip(n: u8) -> IpAddr {
        [10, 0, 0, n].into()
    }

    fn bounds(flows: usize, flows_per_source: usize) -> Bounds {
        Bounds { mapping: MappingId(0), flows, flows_per_source, shares_sources: false, idle: IDLE }
    }

    /// A table with helpers to open flows; tests control the time.
    struct Scene {
        table: Table,
        bounds: Bounds,
        now: Instant,
    }

    impl<K: Clone + Eq + Hash, F> FlowTable<K, F> {
        /// Removes an expired flow.
        fn expire(&mut self, now: Instant) -> Option<Ended<F>> {
            let id = self.expired(now)?;
            self.remove(id)
        }
    }

    impl Scene {
        fn new(flows: usize, flows_per_source: usize) -> Self {
            let bounds = bounds(flows, flows_per_source);
            Self { table: FlowTable::new(usize::MAX), bounds, now: Instant::now() }
        }

        fn pass(&mut self, time: Duration) {
            self.now += time;
        }

        /// Returns the evicted flow.
        fn open(&mut self, source: u8, port: u16) -> Option<u16> {
            self.open_in(self.bounds, source, port)
        }

        fn open_in(&mut self, bounds: Bounds, source: u8, port: u16) -> Option<u16> {
            self.pass(ACTIVITY_RESOLUTION);
            let evicted = self.table.make_room(&bounds, ip(source)).map(|ended| ended.flow);
            assert!(!self.table.is_full(&bounds, ip(source)));
            let id = self.table.insert((source, port), (&bounds, ip(source)), port, self.now);
            self.table.touch(id, Side::Client, self.now);
            evicted
        }

        fn touch(&mut self, source: u8, port: u16, from: Side) {
            self.pass(ACTIVITY_RESOLUTION);
            let id = self.table.find(&(source, port)).unwrap();
            self.table.touch(id, from, self.now);
        }

        fn establish(&mut self, source: u8, port: u16) {
            self.open(source, port);
            self.touch(source, port, Side::Backend);
            self.touch(source, port, Side::Client);
        }

        fn has(&self, source: u8, port: u16) -> bool {
            self.table.find(&(source, port)).is_some()
        }
    }

    #[test]
    fn at_the_cap_the_longest_idle_flow_goes() {
        let mut scene = Scene::new(3, 3);
        for port in 1..=3 {
            assert_eq!(scene.open(1, port), None);
        }
        scene.touch(1, 1, Side::Backend);
        assert_eq!(scene.open(2, 4), Some(2));
        assert_eq!(scene.open(2, 5), Some(3));
        assert_eq!(scene.table.len(), 3);
    }

    #[test]
    fn a_flood_displaces_itself_and_not_flows_in_use() {
        let mut scene = Scene::new(10, 10);
        (1..=5).for_each(|port| scene.establish(1, port));
        scene.pass(Duration::from_secs(1));
        for port in 1000..3000 {
            scene.open((port % 200) as u8 + 2, port);
        }
        for port in 1..=5 {
            assert!(scene.has(1, port), "flow {port} is in use");
        }
        assert_eq!(scene.table.len(), 10);
    }

    /// Flows that outlast the flood: they were answered and continue, or have been idle for a shorter time.
    #[test]
    fn forged_pairs_displace_no_established_flow_answered_or_not() {
        for answered in [false, true] {
            let mut scene = Scene::new(16, 16);
            (1..=14).for_each(|port| scene.establish(1, port));
            for port in 1000..3000 {
                let source = (port % 200) as u8 + 2;
                scene.open(source, port);
                if answered {
                    scene.touch(source, port, Side::Backend);
                } else {
                    scene.pass(ESTABLISHED_AFTER);
                }
                scene.touch(source, port, Side::Client);
            }
            for port in 1..=14 {
                assert!(scene.has(1, port), "flow {port} is in use");
            }
        }
    }

    #[test]
    fn established_flows_leave_new_ones_their_share() {
        let mut scene = Scene::new(16, 16);
        (1..=16).for_each(|port| scene.establish(1, port));
        assert_eq!(scene.open(2, 101), Some(15), "found no room among the established ones");
        assert_eq!(scene.open(2, 102), Some(16));
        assert_eq!(scene.open(2, 103), Some(101));
        let first = scene.table.find(&(1, 1)).unwrap();
        assert!(scene.table.is_established(first));
        assert!(scene.table.remove(first).is_some());
        scene.touch(2, 103, Side::Backend);
        scene.touch(2, 103, Side::Client);
        assert!(scene.table.is_established(scene.table.find(&(2, 103)).unwrap()), "there is room now");
    }

    #[test]
    fn when_fewer_may_be_established_the_longest_idle_of_them_goes() {
        let mut scene = Scene::new(usize::MAX, usize::MAX);
        (1..=16).for_each(|port| scene.establish(1, port));
        scene.table.set_most(16);
        assert_eq!(scene.open(2, 101), Some(1));
        assert_eq!(scene.open(2, 102), Some(2));
        assert_eq!(scene.open(2, 103), Some(101));
    }

    #[test]
    fn a_flow_without_replies_is_established_if_its_client_keeps_sending() {
        let mut scene = Scene::new(2, 2);
        scene.open(1, 1);
        scene.open(1, 2);
        scene.pass(ESTABLISHED_AFTER);
        scene.touch(1, 1, Side::Client);
        assert_eq!(scene.open(2, 3), Some(2));
    }

    #[test]
    fn a_source_at_its_quota_displaces_its_own_longest_idle_flow() {
        let mut scene = Scene::new(10, 2);
        scene.open(1, 1);
        scene.open(2, 2);
        scene.open(2, 3);
        scene.touch(2, 2, Side::Client);
        assert_eq!(scene.open(2, 4), Some(3));
        assert!(scene.has(1, 1));
    }

    #[test]
    fn mappings_have_bounds_of_their_own() {
        let mut scene = Scene::new(2, 2);
        let other = Bounds { mapping: MappingId(1), flows: 3, idle: IDLE / 2, ..scene.bounds };
        (1..=2).for_each(|port| assert_eq!(scene.open(1, port), None));
        (3..=5).for_each(|number| assert_eq!(scene.open_in(other, number, number.into()), None));
        assert_eq!(scene.open(2, 6), Some(1));
        assert_eq!(scene.open_in(other, 9, 7), Some(3));
        scene.pass(IDLE / 2);
        let expired: Vec<u16> = std::iter::from_fn(|| Some(scene.table.expire(scene.now)?.flow)).collect();
        assert_eq!(expired, [4, 5, 7]);
    }

    #[test]
    fn a_source_may_have_no_more_by_way_of_several_mappings() {
        let mut scene = Scene::new(9, 2);
        let one = Bounds { shares_sources: true, ..scene.bounds };
        let other = Bounds { mapping: MappingId(1), ..one };
        assert_eq!(scene.open_in(one, 1, 1), None);
        assert_eq!(scene.open_in(other, 1, 2), None);
        assert_eq!(scene.open_in(one, 1, 3), Some(1));
    }

    #[test]
    fn other_bounds_apply_to_flows_that_there_are() {
        let mut scene = Scene::new(9, 9);
        (1..=3).for_each(|port| scene.establish(1, port));
        scene.open(1, 4);
        let short = Bounds { flows: 2, idle: IDLE / 2, ..scene.bounds };
        scene.table.rebound(&short, scene.now);
        let mut surplus = |bounds: &Bounds| -> Vec<u16> {
            scene.table.take_surplus(bounds).into_iter().map(|ended| ended.flow).collect()
        };
        assert_eq!(surplus(&short), [1, 2], "the established ones over their share first");
        assert_eq!(scene.table.next_expiry(), Some(scene.now + IDLE / 2));
        assert_eq!(scene.table.scopes.count(), 3);
    }

    #[test]
    fn fewer_flows_in_total_apply_to_those_that_there_are() {
        let mut scene = Scene::new(9, 9);
        (1..=4).for_each(|port| assert_eq!(scene.open(1, port), None));
        scene.table.set_most(2);
        let surplus = scene.table.take_surplus(&scene.bounds);
        assert_eq!(surplus.into_iter().map(|ended| ended.flow).collect::<Vec<_>>(), [1, 2]);
        assert!(scene.table.take_surplus(&scene.bounds).is_empty());
    }

    #[test]
    fn fewer_flows_of_a_source_apply_to_those_that_there_are() {
        let mut scene = Scene::new(9, 9);
        for (source, port) in [(1, 1), (2, 2), (1, 3), (1, 4), (3, 5), (3, 6)] {
            scene.open(source, port);
        }
        let one = Bounds { flows_per_source: 1, ..scene.bounds };
        scene.table.rebound(&one, scene.now);
        let mut surplus: Vec<u16> =
            scene.table.take_surplus(&one).into_iter().map(|ended| ended.flow).collect();
        surplus.sort_unstable();
        assert_eq!(surplus, [1, 3, 5]);
    }

    #[test]
    fn flows_expire_when_neither_side_sends() {
        let mut scene = Scene::new(10, 10);
        scene.open(1, 1);
        let first = scene.now;
        scene.open(1, 2);
        scene.pass(IDLE / 2);
        scene.touch(1, 2, Side::Backend);
        let second = scene.now;
        let mut expire = |at| scene.table.expire(at).map(|ended| ended.flow);
        assert_eq!(expire(first + IDLE - ACTIVITY_RESOLUTION), None);
        assert_eq!(expire(first + IDLE), Some(1));
        assert_eq!(expire(first + IDLE), None);
        assert_eq!(expire(second + IDLE), Some(2));
        assert_eq!(scene.table.next_expiry(), None);
        assert_eq!(scene.table.scopes.count(), 0);
    }

    #[test]
    fn a_name_does_not_outlive_its_flow() {
        let mut scene = Scene::new(1, 1);
        scene.open(1, 1);
        let old = scene.table.find(&(1, 1)).unwrap();
        assert_eq!(FlowId::from_u64(old.to_u64()), old);
        scene.open(1, 2);
        assert!(scene.table.get_mut(old).is_none());
        scene.table.touch(old, Side::Client, scene.now);
        assert_eq!(scene.table.len(), 1);
    }

    /// The specification of the table in its simplest form: a map that is searched as a whole.
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
            if self.count(&|key, _| key.0 == source) >= bounds.flows_per_source {
                return self.first_to_go(&|key| key.0 == source);
            }
            (self.flows.len() >= bounds.flows).then(|| self.first_to_go(&|_| true)).flatten()
        }

        fn count(&self, which: &dyn Fn(&(u8, u16), &ModelFlow) -> bool) -> usize {
            self.flows.iter().filter(|(key, flow)| which(key, flow)).count()
        }

        /// No scope has more established flows than allowed, so the flow is new.
        fn first_to_go(&self, among: &dyn Fn(&(u8, u16)) -> bool) -> Option<(u8, u16)> {
            let new = self.flows.iter().filter(|(key, flow)| among(key) && !flow.established);
            new.min_by_key(|(_, flow)| flow.order).map(|(key, _)| *key)
        }

        fn touch(&mut self, key: (u8, u16), from: Side, at: Instant, bounds: Bounds) {
            self.clock += 1;
            let opened = ModelFlow { order: self.clock, opened: at, at, answered: false, established: false };
            let all = self.count(&|_, flow| flow.established);
            let own = self.count(&|other, flow| flow.established && other.0 == key.0);
            let room =
                all < most_established(bounds.flows) && own < most_established(bounds.flows_per_source);
            let flow = self.flows.entry(key).or_insert(opened);
            let rises = from == Side::Client
                && !flow.established
                && (flow.answered || at - flow.opened >= ESTABLISHED_AFTER)
                && room;
            flow.answered |= from == Side::Backend;
            flow.established |= rises;
            if rises || at - flow.at >= ACTIVITY_RESOLUTION {
                (flow.order, flow.at) = (self.clock, at);
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
            1 => prop_oneof![Just(1), Just(5), 1..60_000_u64].prop_map(Op::Wait),
        ]
    }

    proptest! {
        #[test]
        fn the_table_does_what_the_model_does(
            ops in prop::collection::vec(op(), 1..300),
            flows in 1..20_usize,
            per_source in 1..18_usize,
        ) {
            let bounds = bounds(flows, per_source);
            let mut now = Instant::now();
            let mut table: Table = FlowTable::new(usize::MAX);
            let mut model = Model::default();
            for op in ops {
                match op {
                    Op::Datagram(source, port, from_client) => {
                        let key = (source, port);
                        let side = if from_client { Side::Client } else { Side::Backend };
                        if let Some(id) = table.find(&key) {
                            table.touch(id, side, now);
                            model.touch(key, side, now, bounds);
                        } else if from_client {
                            let victim = model.victim(source, bounds);
                            let evicted = table.make_room(&bounds, ip(source)).map(|ended| ended.flow);
                            prop_assert_eq!(evicted, victim.map(|key| key.1));
                            prop_assert!(!table.is_full(&bounds, ip(source)));
                            table.insert(key, (&bounds, ip(source)), port, now);
                            victim.map(|key| model.flows.remove(&key));
                            model.touch(key, Side::Client, now, bounds);
                        }
                    }
                    Op::Wait(millis) => {
                        now += Duration::from_millis(millis);
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
            prop_assert!(table.scopes.count() <= table.len() + 2);
        }
    }
}
