//! The scopes in which flows are counted and ordered: linked lists through the slots of the [`table`](super::table).
//!
//! Each flow is in three scopes: of its timeout, its mapping, and its source. Each scope has two lists, of new and of
//! established flows, from the longest idle to the most recently active.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::time::Duration;

use crate::state::sources::Source;

/// One in this many flows of a scope is reserved for new flows: established ones cannot use that share.
const NEW_SHARE: usize = 8;

/// The number of scopes of a flow.
pub(super) const SCOPES: usize = 3;

/// A mapping, while it has flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct MappingId(pub(super) usize);

/// The state of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FlowState {
    New,
    Established,
}

/// What the flows of a scope have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ScopeKey {
    /// They expire after this idle time.
    Idle(Duration),
    /// They belong to this mapping.
    Mapping(MappingId),
    /// They come from this source, to this mapping or to all mappings without their own limits.
    Source(Option<MappingId>, Source),
}

/// The neighbours of a slot in the list of a scope.
#[derive(Clone, Copy, Debug)]
pub(super) struct Links {
    /// The index of the scope.
    pub(super) scope: u32,
    older: Option<u32>,
    newer: Option<u32>,
}

impl Links {
    /// The links of a slot that is in no list yet.
    pub(super) const fn outside(scope: u32) -> Self {
        Self { scope, older: None, newer: None }
    }
}

/// Access to the links of all slots.
pub(super) trait LinkStore {
    /// The links of `slot`, which is in use, in its scope number `which`.
    fn links(&mut self, slot: u32, which: usize) -> &mut Links;
}

/// A linked list of slots.
#[derive(Clone, Copy, Debug)]
struct List {
    oldest: Option<u32>,
    newest: Option<u32>,
    len: u32,
}

impl List {
    const EMPTY: Self = Self { oldest: None, newest: None, len: 0 };

    /// Appends `slot` at the newest end.
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

    /// Removes `slot` from any position.
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

/// The flows of a scope.
#[derive(Debug)]
pub(super) struct Scope {
    pub(super) key: ScopeKey,
    /// The maximum number of flows.
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

    /// The number of flows.
    pub(super) fn len(&self) -> usize {
        self.new.len as usize + self.established.len as usize
    }

    /// The number of established flows.
    pub(super) fn established(&self) -> usize {
        self.established.len as usize
    }

    /// The slots at the oldest ends: of new and of established flows.
    pub(super) fn oldest(&self) -> [Option<u32>; 2] {
        [self.new.oldest, self.established.oldest]
    }

    /// The slots at the newest ends.
    pub(super) fn newest(&self) -> [Option<u32>; 2] {
        [self.new.newest, self.established.newest]
    }

    /// The slot of the flow to evict next.
    pub(super) fn first_to_go(&self) -> Option<u32> {
        first_to_go(self.oldest(), self.established(), self.most)
    }
}

/// Selects the flow to evict from the oldest new and the oldest established one, when there are `most` flows or more:
/// the new one, unless more flows are established than allowed.
pub(super) fn first_to_go<T>([new, old]: [Option<T>; 2], established: usize, most: usize) -> Option<T> {
    if established > most_established(most) { old.or(new) } else { new.or(old) }
}

/// The maximum number of established flows among `most`. The rest is reserved for new ones, so that there is always one
/// to evict.
pub(super) fn most_established(most: usize) -> usize {
    most - (most / NEW_SHARE).max(1).min(most)
}

/// All scopes that have flows.
#[derive(Debug, Default)]
pub(super) struct Scopes {
    /// Uses random keys (SipHash), because an attacker can choose the sources.
    index: HashMap<ScopeKey, u32, RandomState>,
    slots: Vec<Option<Scope>>,
    free: Vec<u32>,
    /// The timeout scopes; every flow is in one of them.
    idles: Vec<u32>,
}

impl Scopes {
    /// Returns the scope of `key`, creates it if necessary, and sets its maximum to `most` flows.
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

    /// The keys of all scopes.
    pub(super) fn keys(&self) -> impl Iterator<Item = ScopeKey> {
        self.slots.iter().flatten().map(|scope| scope.key)
    }

    pub(super) fn at(&self, scope: u32) -> &Scope {
        self.slots[scope as usize].as_ref().expect("a scope is there as long as its flows")
    }

    pub(super) fn at_mut(&mut self, scope: u32) -> &mut Scope {
        self.slots[scope as usize].as_mut().expect("a scope is there as long as its flows")
    }

    /// The timeout scopes, with their timeouts.
    pub(super) fn idles(&self) -> impl Iterator<Item = (Duration, &Scope)> {
        self.idles.iter().map(|&scope| self.at(scope)).filter_map(|scope| match scope.key {
            ScopeKey::Idle(idle) => Some((idle, scope)),
            ScopeKey::Mapping(_) | ScopeKey::Source(..) => None,
        })
    }

    /// Appends `slot` at the newest end of a list of `scope`, which is its scope number `which`.
    pub(super) fn push(
        &mut self,
        store: &mut impl LinkStore,
        slot: u32,
        (which, scope): (usize, u32),
        to: FlowState,
    ) {
        self.at_mut(scope).list(to).push(store, slot, which);
    }

    /// Removes `slot` from a list of `scope`, which is its scope number `which`.
    pub(super) fn unlink(
        &mut self,
        store: &mut impl LinkStore,
        slot: u32,
        (which, scope): (usize, u32),
        of: FlowState,
    ) {
        self.at_mut(scope).list(of).unlink(store, slot, which);
    }

    /// Removes `scope` if it has no flows.
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

    /// The number of scopes.
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
        let source = |text: &str| Source::of_ip(text.parse().unwrap());
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
