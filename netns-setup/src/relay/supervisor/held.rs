//! The ports of a network, each with its socket.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::model::MappingKey;
use crate::relayed::RelayedPort;

/// Ports and their sockets, in the order of the ports.
#[derive(Debug, Default)]
pub(super) struct Held {
    ports: BTreeMap<MappingKey, HeldPort>,
    /// The number of the last change that has added ports.
    change: u64,
}

#[derive(Debug, Clone)]
struct HeldPort {
    port: RelayedPort,
    socket: Arc<OwnedFd>,
    /// The number of the change that has added it.
    change: u64,
}

impl Held {
    pub(super) fn is_empty(&self) -> bool {
        self.ports.is_empty()
    }

    pub(super) fn ports(&self) -> impl Iterator<Item = &RelayedPort> {
        self.ports.values().map(|held| &held.port)
    }

    /// The first and the last port of each range that the relay serves as one mapping, which takes it a tenth of the
    /// memory. Ports that were added by different changes do not share one, so that a change leaves the mappings of
    /// others as they are.
    pub(super) fn ranges(&self) -> Vec<(&RelayedPort, &RelayedPort)> {
        let ports: Vec<&HeldPort> = self.ports.values().collect();
        let belong =
            |one: &&HeldPort, other: &&HeldPort| one.change == other.change && one.port.precedes(&other.port);
        let ranges = ports.chunk_by(belong).filter_map(|range| range.first().zip(range.last()));
        ranges.map(|(first, last)| (&first.port, &last.port)).collect()
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
        let change = self.change + 1;
        let kept = self.ports.iter().filter(|(key, _)| !removed.contains(key));
        let mut ports: BTreeMap<_, _> = kept.map(|(key, held)| (*key, held.clone())).collect();
        let mut sockets = sockets.into_iter().map(Arc::new);
        for port in add {
            let held = self.ports.get(&port.key).map(|held| Arc::clone(&held.socket));
            let Some(socket) = held.or_else(|| sockets.next()) else { break };
            ports.insert(port.key, HeldPort { port, socket, change });
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
        held.ranges().iter().map(|(first, last)| (first.key.port, last.key.port)).collect()
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
}
