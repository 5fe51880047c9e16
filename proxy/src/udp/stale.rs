//! Deletes conntrack entries of flows from before a port was published.
//!
//! If a client keeps sending to a port that was published by other means before, or not at all, connection tracking
//! keeps applying its former decision, and the client would never reach `rproxy`.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};

use rproxy_mapping::PortMapping;
use rproxy_mapping::addr::Protocol;
use rproxy_sys::conntrack::{Direction, Family, delete_udp};
use rproxy_sys::udp::is_local;
use tracing::debug;

/// Serialises searches through the kernel's table.
static TURN: Mutex<()> = Mutex::new(());

/// Deletes the kernel's conntrack entries of flows to and from the UDP ports among `published`, which must be bound
/// already; an IPv6 wildcard includes IPv4 unless it is `v6only`. Best effort: it needs `CAP_NET_ADMIN`, and most hosts
/// have no such entries. A runtime that also publishes by other means does this itself.
pub(crate) fn forget_flows_to<'a>(published: impl IntoIterator<Item = &'a PortMapping>) {
    let udp = published.into_iter().filter(|port_mapping| port_mapping.protocol == Protocol::Udp);
    let published = Published::new(
        udp.filter_map(|port_mapping| Some((port_mapping.host.inet_addr()?, port_mapping.v6only))),
    );
    if published.0.is_empty() {
        return;
    }
    // One search at a time, even if changes follow each other quickly.
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut own = HashMap::new();
    let mut is_own = |addr: SocketAddr| *own.entry(addr.ip()).or_insert_with(|| is_local(addr));
    for family in [Family::V4, Family::V6] {
        match delete_udp(family, |entry| published.is_stale(entry.original, &mut is_own)) {
            Ok(deleted) => debug!(?family, deleted, "stale UDP flows forgotten"),
            Err(error) => debug!(?family, %error, "stale UDP flows not forgotten"),
        }
    }
}

/// Host addresses by port, and whether they exclude IPv4.
struct Published(HashMap<u16, Vec<(IpAddr, bool)>>);

impl Published {
    fn new(published: impl IntoIterator<Item = (SocketAddr, bool)>) -> Self {
        let mut by_port: HashMap<u16, Vec<_>> = HashMap::new();
        for (addr, v6only) in published {
            by_port.entry(addr.port()).or_default().push((addr.ip(), v6only));
        }
        Self(by_port)
    }

    /// Whether an entry diverts datagrams from one of these ports: its flow goes to the port, or started there with a
    /// late reply of the previous user of the port. `is_own` says whether an address is this host's, because others may
    /// send from the same port number.
    fn is_stale(&self, entry: Direction, is_own: &mut dyn FnMut(SocketAddr) -> bool) -> bool {
        self.contains(entry.destination) || self.contains(entry.source) && is_own(entry.source)
    }

    /// Whether a datagram to `destination` is for one of these ports.
    fn contains(&self, destination: SocketAddr) -> bool {
        let is_for = |(host, v6only): &(IpAddr, bool)| match host {
            IpAddr::V4(host) if host.is_unspecified() => destination.is_ipv4(),
            IpAddr::V6(host) if host.is_unspecified() => destination.is_ipv6() || !v6only,
            host => *host == destination.ip(),
        };
        self.0.get(&destination.port()).is_some_and(|hosts| hosts.iter().any(is_for))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_that_began_at_the_port_is_stale_if_this_host_began_it() {
        let addr = |text: &str| text.parse::<SocketAddr>().unwrap();
        let published = Published::new([(addr("0.0.0.0:53"), false)]);
        let is_stale = |source, destination| {
            let entry = Direction { source: addr(source), destination: addr(destination) };
            published.is_stale(entry, &mut |addr| addr.ip().to_string() == "10.0.0.11")
        };
        assert!(is_stale("192.0.2.1:4444", "10.0.0.11:53"));
        assert!(is_stale("10.0.0.11:53", "192.0.2.1:4444"));
        assert!(!is_stale("192.0.2.1:53", "192.0.2.2:4444"));
        assert!(!is_stale("10.0.0.11:54", "192.0.2.1:4444"));
    }

    #[test]
    fn a_wildcard_stands_for_all_addresses_and_others_for_themselves() {
        let addr = |text: &str| text.parse::<SocketAddr>().unwrap();
        let hosts = [("10.0.0.11:53", false), ("0.0.0.0:69", false), ("[::]:123", false), ("[::]:124", true)];
        let published = Published::new(hosts.map(|(host, v6only)| (addr(host), v6only)));
        for inside in ["10.0.0.11:53", "10.0.0.12:69", "10.0.0.12:123", "[fd00::1]:123", "[fd00::1]:124"] {
            assert!(published.contains(addr(inside)), "{inside}");
        }
        for outside in ["10.0.0.12:53", "10.0.0.11:54", "10.0.0.12:124", "[fd00::1]:69", "[fd00::1]:53"] {
            assert!(!published.contains(addr(outside)), "{outside}");
        }
    }
}
