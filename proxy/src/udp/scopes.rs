//! What flows are counted and ordered in: lists through the slots of the [`table`](super::table).
//!
//! A flow is in three scopes: that of its timeout, of its mapping, and of its source. Each has two
//! lists of flows, new and established ones, from the longest idle to the most recently active.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

/// One place in this many is for new flows: established ones do not fill the others' share.
const NEW_SHARE: usize = 8;

/// Scopes that a flow is in.
pub(super) const SCOPES: usize = 3;

/// A mapping, as long as it has flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct MappingId(pub(super) usize);

/// A source for the quota: an IPv4 address, or the /64 of an IPv6 one, as whoever has one of its
/// addresses has them all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Source(IpAddr);

impl Source {
    pub(super) fn of(ip: IpAddr) -> Self {
        Self(match ip.to_canonical() {
            IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & !u128::from(u64::MAX)).into(),
            v4 => v4,
        })
    }
}

/// How much there has been of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FlowState {
    New,
    Established,
}

/// What the flows of a scope have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ScopeKey {
    /// They are over when they were idle for this long.
    Idle(Duration),
    /// They belong to this mapping.
    Mapping(MappingId),
    /// They come from this source, to this mapping or to all that have no bounds of their own.
    Source(Option<MappingId>, Source),
}

/// The neighbours of a slot in the list of a scope.
#[derive(Clone, Copy, Debug)]
pub(super) struct Links {
    /// Which scope.
    pub(super) scope: u32,
    older: Option<u32>,
    newer: Option<u32>,
}

impl Links {
    /// Links of a slot in no list yet.
    pub(super) const fn outside(scope: u32) -> Self {
        Self { scope, older: None, newer: None }
    }
}

/// Whoever has the links of all slots.
pub(super) trait LinkStore {
    /// The links of `slot`, which is in use, in its scope number `which`.
    fn links(&mut self, slot: u32, which: usize) -> &mut Links;
}

/// A list through the slots.
#[derive(Clone, Copy, Debug)]
struct List {
    oldest: Option<u32>,
    newest: Option<u32>,
    len: u32,
}

impl List {
    const EMPTY: Self = Self { oldest: None, newest: None, len: 0 };

    /// Adds `slot` at the newest end.
    fn push(&mut self, store: &mut impl LinkStore, slot: u32, which: usize) {
        let links = store.links(slot, which);
        (links.older, links.newer) = (self.newest, None);
        match self.newest {
            Some(newest) => store.links(newest, which).newer = Some(slot),
            None => self.oldest = Some(slot),
        }
        self.newest = Some(slot);
        self.len += 1;
    }

    /// Takes `slot` out, wherever it is.
    fn unlink(&mut self, store: &mut impl LinkStore, slot: u32, which: usize) {
        let links = store.links(slot, which);
        let (older, newer) = (links.older.take(), links.newer.take());
        match older {
            Some(older) => store.links(older, which).newer = newer,
            None => self.oldest = newer,
        }
        match newer {
            Some(newer) => store.links(newer, which).older = older,
            None => self.newest = older,
        }
        self.len -= 1;
    }
}

/// The flows that have something in common.
#[derive(Debug)]
pub(super) struct Scope {
    pub(super) key: ScopeKey,
    /// Flows that there may be.
    pub(super) most: usize,
    new: List,
    established: List,
}

impl Scope {
    fn list(&mut self, state: FlowState) -> &mut List {
        match state {
            FlowState::New => &mut self.new,
            FlowState::Established => &mut self.established,
        }
    }

    /// How many flows there are.
    pub(super) fn len(&self) -> usize {
        self.new.len as usize + self.established.len as usize
    }

    /// How many of them are established.
    pub(super) fn established(&self) -> usize {
        self.established.len as usize
    }

    /// The slots at the oldest ends: of a new flow, and of an established one.
    pub(super) fn oldest(&self) -> [Option<u32>; 2] {
        [self.new.oldest, self.established.oldest]
    }

    /// The slots at the newest ends.
    pub(super) fn newest(&self) -> [Option<u32>; 2] {
        [self.new.newest, self.established.newest]
    }

    /// The slot of the flow that goes when one has to.
    pub(super) fn first_to_go(&self) -> Option<u32> {
        first_to_go(self.oldest(), self.established(), self.most)
    }
}

/// Of the oldest flows, new and established, the one that goes when there are `most`, or more since
/// there may be fewer than before: a new one, unless more are established than may be.
pub(super) fn first_to_go<T>([new, old]: [Option<T>; 2], established: usize, most: usize) -> Option<T> {
    if established > most_established(most) { old.or(new) } else { new.or(old) }
}

/// How many of `most` flows may be established. The others are for new ones: so there is always one to
/// make room for the next.
pub(super) fn most_established(most: usize) -> usize {
    most - (most / NEW_SHARE).max(1).min(most)
}

/// All scopes that have flows.
#[derive(Debug, Default)]
pub(super) struct Scopes {
    /// Keyed at random (SipHash): an attacker chooses the sources.
    index: HashMap<ScopeKey, u32, RandomState>,
    slots: Vec<Option<Scope>>,
    free: Vec<u32>,
    /// Those of timeouts, which every flow is in one of.
    idles: Vec<u32>,
}

impl Scopes {
    /// The scope of `key`, made if there is none, with room for `most` flows from now on.
    pub(super) fn enter(&mut self, key: ScopeKey, most: usize) -> u32 {
        if let Some(&scope) = self.index.get(&key) {
            self.at_mut(scope).most = most;
            return scope;
        }
        let made = Scope { key, most, new: List::EMPTY, established: List::EMPTY };
        let scope = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            u32::try_from(self.slots.len() - 1).expect("descriptors run out before scopes do")
        });
        self.slots[scope as usize] = Some(made);
        self.index.insert(key, scope);
        if let ScopeKey::Idle(_) = key {
            self.idles.push(scope);
        }
        scope
    }

    /// The scope of `key`, if it has flows.
    pub(super) fn find(&self, key: &ScopeKey) -> Option<&Scope> {
        self.index.get(key).map(|&scope| self.at(scope))
    }

    /// What all of them have in common each.
    pub(super) fn keys(&self) -> impl Iterator<Item = ScopeKey> {
        self.slots.iter().flatten().map(|scope| scope.key)
    }

    pub(super) fn at(&self, scope: u32) -> &Scope {
        self.slots[scope as usize].as_ref().expect("a scope is there as long as its flows")
    }

    pub(super) fn at_mut(&mut self, scope: u32) -> &mut Scope {
        self.slots[scope as usize].as_mut().expect("a scope is there as long as its flows")
    }

    /// The scopes of timeouts, with these.
    pub(super) fn idles(&self) -> impl Iterator<Item = (Duration, &Scope)> {
        self.idles.iter().map(|&scope| self.at(scope)).filter_map(|scope| match scope.key {
            ScopeKey::Idle(idle) => Some((idle, scope)),
            ScopeKey::Mapping(_) | ScopeKey::Source(..) => None,
        })
    }

    /// Adds `slot` at the newest end of a list of `scope`, which is its number `which`.
    pub(super) fn push(
        &mut self,
        store: &mut impl LinkStore,
        slot: u32,
        (which, scope): (usize, u32),
        to: FlowState,
    ) {
        self.at_mut(scope).list(to).push(store, slot, which);
    }

    /// Takes `slot` out of a list of `scope`, which is its number `which`.
    pub(super) fn unlink(
        &mut self,
        store: &mut impl LinkStore,
        slot: u32,
        (which, scope): (usize, u32),
        of: FlowState,
    ) {
        self.at_mut(scope).list(of).unlink(store, slot, which);
    }

    /// Forgets `scope` if it has no flows.
    pub(super) fn leave(&mut self, scope: u32) {
        if self.at(scope).len() > 0 {
            return;
        }
        if let Some(empty) = self.slots[scope as usize].take() {
            self.index.remove(&empty.key);
            self.idles.retain(|idle| *idle != scope);
            self.free.push(scope);
        }
    }

    /// How many there are.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.index.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_addresses_of_a_v6_network_share_a_quota() {
        let source = |text: &str| Source::of(text.parse().unwrap());
        assert_eq!(source("2001:db8::1"), source("2001:db8::2:3:4:5"));
        assert_ne!(source("2001:db8::1"), source("2001:db8:0:1::1"));
        assert_eq!(source("::ffff:10.0.0.1"), source("10.0.0.1"));
        assert_ne!(source("10.0.0.1"), source("10.0.0.2"));
    }

    #[test]
    fn established_flows_leave_a_share_to_new_ones() {
        for (most, established) in [(0, 0), (1, 0), (2, 1), (8, 7), (16, 14), (1000, 875)] {
            assert_eq!(most_established(most), established, "of {most}");
        }
    }
}
