//! The ports of a network, each with its socket.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::model::MappingKey;
use crate::relayed::RelayedPort;

/// Ports and their sockets, in the order of the ports.
#[derive(Debug, Default, Clone)]
pub(super) struct Held {
    ports: BTreeMap<MappingKey, Arc<HeldPort>>,
    /// The number of the last change that has added ports.
    change: u64,
}

#[derive(Debug)]
pub(super) struct HeldPort {
    pub(super) port: RelayedPort,
    pub(super) socket: Arc<OwnedFd>,
    /// The number of the change that has added it.
    change: u64,
}

/// The ports that the relay serves as one mapping, which takes it a tenth of the memory. Ports that were added by different
/// changes do not share one, so that a change leaves the mappings of others as they are.
#[derive(Debug, Clone)]
pub(super) struct Range(Vec<Arc<HeldPort>>);

impl Range {
    /// The first and the last port.
    pub(super) fn ends(&self) -> Option<(&RelayedPort, &RelayedPort)> {
        self.0.first().zip(self.0.last()).map(|(first, last)| (&first.port, &last.port))
    }

    /// The name of the mapping.
    pub(super) fn name(&self) -> String {
        self.ends().map_or_else(String::new, |(first, last)| first.name(last.key.port))
    }

    /// The ports.
    pub(super) fn keys(&self) -> impl Iterator<Item = MappingKey> {
        self.0.iter().map(|held| held.port.key)
    }

    fn is_same(&self, other: &Self) -> bool {
        let same = |(one, other)| Arc::ptr_eq(one, other);
        self.0.len() == other.0.len() && self.0.iter().zip(&other.0).all(same)
    }
}

/// What has to change.
#[derive(Debug, Default)]
pub(super) struct Difference {
    /// The ranges that are no more, or are others.
    pub(super) gone: Vec<Range>,
    /// The ports of those that have come.
    pub(super) new: Held,
}

impl Held {
    pub(super) fn is_empty(&self) -> bool {
        self.ports.is_empty()
    }

    pub(super) fn contains(&self, key: &MappingKey) -> bool {
        self.ports.contains_key(key)
    }

    pub(super) fn ports(&self) -> impl Iterator<Item = &RelayedPort> {
        self.ports.values().map(|held| &held.port)
    }

    /// The ports with their sockets.
    pub(super) fn held(&self) -> impl Iterator<Item = &HeldPort> {
        self.ports.values().map(Arc::as_ref)
    }

    /// The ranges, in the order of their first ports.
    pub(super) fn ranges(&self) -> Vec<Range> {
        let ports: Vec<_> = self.ports.values().cloned().collect();
        let belong = |one: &Arc<HeldPort>, other: &Arc<HeldPort>| {
            one.change == other.change && one.port.precedes(&other.port)
        };
        ports.chunk_by(belong).map(|range| Range(range.to_vec())).collect()
    }

    /// How this differs from `before`.
    pub(super) fn beyond(&self, before: &Self) -> Difference {
        let (before, after) = (before.ranges(), self.ranges());
        let differing = |ranges: &[Range], others: &[Range]| {
            let others: BTreeMap<_, _> = others.iter().map(|other| (other.keys().next(), other)).collect();
            let is_other =
                |range: &&Range| !others.get(&range.keys().next()).is_some_and(|other| range.is_same(other));
            ranges.iter().filter(is_other).cloned().collect::<Vec<_>>()
        };
        let new = self.of(&differing(&after, &before));
        Difference { gone: differing(&before, &after), new }
    }

    /// The ports of some ranges.
    fn of(&self, ranges: &[Range]) -> Self {
        let ports = ranges.iter().flat_map(|range| &range.0);
        Self { ports: ports.map(|held| (held.port.key, Arc::clone(held))).collect(), change: self.change }
    }

    /// Both halves of the ranges; `None` if there is only one.
    pub(super) fn halves(&self) -> Option<(Self, Self)> {
        let ranges = self.ranges();
        let (first, second) = ranges.split_at(ranges.len() / 2);
        (!first.is_empty()).then(|| (self.of(first), self.of(second)))
    }

    /// These ports, and others.
    pub(super) fn and(mut self, others: &Self) -> Self {
        self.ports.extend(others.ports.iter().map(|(key, held)| (*key, Arc::clone(held))));
        self
    }

    /// These ports without some of them.
    pub(super) fn without(&self, is_removed: impl Fn(&MappingKey) -> bool) -> Self {
        let kept = self.ports.iter().filter(|(key, _)| !is_removed(key));
        Self { ports: kept.map(|(key, held)| (*key, Arc::clone(held))).collect(), change: self.change }
    }

    /// Gives a port another socket.
    pub(super) fn replace_socket(&mut self, key: &MappingKey, socket: OwnedFd) {
        if let Some(held) = self.ports.get_mut(key) {
            let (port, change) = (held.port.clone(), held.change);
            *held = Arc::new(HeldPort { port, socket: Arc::new(socket), change });
        }
    }

    /// The sockets of ports that `other` has not, or has another socket for.
    pub(super) fn sockets_beyond(&self, other: &Self) -> Vec<BorrowedFd<'_>> {
        let is_new = |key: &MappingKey, held: &HeldPort| {
            !other.ports.get(key).is_some_and(|known| Arc::ptr_eq(&known.socket, &held.socket))
        };
        let new = self.ports.iter().filter(|(key, held)| is_new(key, held));
        new.map(|(_key, held)| held.socket.as_fd()).collect()
    }

    /// These ports without some of them, and with others. Those that are held already keep their sockets; those of the
    /// others are in the same order.
    pub(super) fn changed(
        &self,
        remove: &[MappingKey],
        add: Vec<RelayedPort>,
        sockets: Vec<OwnedFd>,
    ) -> Result<Self, String> {
        let new = add.iter().filter(|port| !self.ports.contains_key(&port.key)).count();
        if new != sockets.len() {
            return Err(format!("{} sockets came for {new} ports", sockets.len()));
        }
        let removed: BTreeSet<_> = remove.iter().collect();
        let Self { mut ports, .. } = self.without(|key| removed.contains(key));
        let change = self.change + 1;
        let mut sockets = sockets.into_iter().map(Arc::new);
        for port in add {
            let held = self.ports.get(&port.key).map(|held| Arc::clone(&held.socket));
            let Some(socket) = held.or_else(|| sockets.next()) else { break };
            ports.insert(port.key, Arc::new(HeldPort { port, socket, change }));
        }
        Ok(Self { ports, change })
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use rproxy_mapping::addr::Protocol;

    use super::*;

    fn port(number: u16) -> RelayedPort {
        let key = MappingKey { proto: Protocol::Tcp, host: "*".parse().unwrap(), port: number };
        RelayedPort {
            key,
            owner: "web".parse().unwrap(),
            to: ([172, 17, 0, 2], number).into(),
            keeps_source: false,
        }
    }

    fn with(held: &Held, ports: impl IntoIterator<Item = u16>) -> Held {
        let add: Vec<_> = ports.into_iter().map(port).collect();
        let sockets = add.iter().map(|_| TcpListener::bind("127.0.0.1:0").unwrap().into()).collect();
        held.changed(&[], add, sockets).unwrap()
    }

    fn without(held: &Held, ports: impl IntoIterator<Item = u16>) -> Held {
        let remove: Vec<_> = ports.into_iter().map(|number| port(number).key).collect();
        held.changed(&remove, vec![], vec![]).unwrap()
    }

    fn numbers(held: &Held) -> Vec<u16> {
        held.ports().map(|port| port.key.port).collect()
    }

    fn ranges(held: &Held) -> Vec<(u16, u16)> {
        let ranges = held.ranges();
        let ends = ranges.iter().filter_map(Range::ends);
        ends.map(|(first, last)| (first.key.port, last.key.port)).collect()
    }

    #[test]
    fn ports_come_and_go_with_their_sockets() {
        let none = Held::default();
        let two = with(&none, [80, 81]);
        assert_eq!((numbers(&two), two.sockets_beyond(&none).len()), (vec![80, 81], 2));
        let other = with(&without(&two, [80]), [82]);
        assert_eq!((numbers(&other), other.sockets_beyond(&two).len()), (vec![81, 82], 1));
        // A port that leads elsewhere keeps its socket.
        let moved = RelayedPort { to: ([172, 17, 0, 3], 81).into(), ..port(81) };
        let again = other.changed(&[moved.key], vec![moved.clone()], vec![]).unwrap();
        assert_eq!((numbers(&again), again.sockets_beyond(&other).len()), (vec![81, 82], 0));
        assert_eq!(again.ports().next(), Some(&moved));
        assert!(without(&other, [81, 82]).is_empty());
        assert!(none.changed(&[], vec![port(80)], vec![]).is_err());
    }

    #[test]
    fn ports_that_came_together_are_ranges() {
        let first = with(&Held::default(), [80, 81, 82, 90]);
        assert_eq!(ranges(&first), [(80, 82), (90, 90)]);
        let second = with(&first, [83, 84]);
        assert_eq!(ranges(&second), [(80, 82), (83, 84), (90, 90)]);
        assert_eq!(ranges(&without(&second, [81])), [(80, 80), (82, 82), (83, 84), (90, 90)]);
    }

    #[test]
    fn a_difference_has_whole_ranges() {
        let first = with(&Held::default(), [80, 81, 82]);
        let Difference { gone, new } = with(&first, [90]).beyond(&first);
        assert_eq!((gone.len(), numbers(&new)), (0, vec![90]));
        let Difference { gone, new } = without(&first, [81]).beyond(&first);
        assert_eq!((gone.len(), ranges(&new)), (1, vec![(80, 80), (82, 82)]));
        assert_eq!(gone[0].name(), "web/tcp/[::]:80-82");
        let Difference { gone, new } = first.beyond(&first.clone());
        assert!(gone.is_empty() && new.is_empty());
        let mut other = first.clone();
        other.replace_socket(&port(81).key, TcpListener::bind("127.0.0.1:0").unwrap().into());
        assert_eq!((other.beyond(&first).gone.len(), other.sockets_beyond(&first).len()), (1, 1));
    }

    #[test]
    fn ranges_are_halved_until_one_is_left() {
        let three = with(&with(&Held::default(), [80, 81]), [90, 95]);
        let (first, second) = three.halves().unwrap();
        assert_eq!((numbers(&first), numbers(&second)), (vec![80, 81], vec![90, 95]));
        assert!(first.halves().is_none() && Held::default().halves().is_none());
        assert_eq!(numbers(&first.and(&second)), [80, 81, 90, 95]);
    }
}
