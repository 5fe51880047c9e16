//! The key of a flow.

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};

use rproxy_sys::udp::LocalAddr;

use crate::proxy_protocol::Endpoints;

/// The key of a flow. docker-proxy uses only the client's address. But replies have to come from the address to which
/// the client sent, and a client may send to several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FlowKey {
    /// The listener that received the datagram.
    pub(super) listener: u32,
    /// The sender, in the address family of the listener's socket.
    pub(super) client: SocketAddr,
    /// The local address to which it was sent, if the socket reports it.
    pub(super) local: Option<LocalAddr>,
    /// A keyed hash of whom a proxy has told its client is; 0 for a client without one.
    pub(super) told: u64,
}

impl FlowKey {
    pub(super) fn new(listener: usize, client: SocketAddr, local: Option<LocalAddr>) -> Self {
        let listener = u32::try_from(listener).expect("descriptors run out before listeners do");
        Self { listener, client, local: local.map(forget_interface), told: 0 }
    }

    /// The key of a client for whom a proxy speaks, which is the client of this key. Nobody can choose two with the same
    /// hash without the key of `hasher`.
    pub(super) fn told(self, endpoints: &Endpoints, hasher: &RandomState) -> Self {
        Self { told: hasher.hash_one(endpoints).max(1), ..self }
    }
}

/// Removes the interface. Replies follow the routing table, not the path of the request; only a link-local address
/// needs its interface.
fn forget_interface(local: LocalAddr) -> LocalAddr {
    match local.ip {
        IpAddr::V6(ip) if ip.is_unicast_link_local() => local,
        _ => LocalAddr { interface: 0, ..local },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interface_matters_only_to_link_local_addresses() {
        let client = "[fe80::2]:1".parse().unwrap();
        let key = |ip: &str, interface| {
            FlowKey::new(0, client, Some(LocalAddr { ip: ip.parse().unwrap(), interface }))
        };
        assert_eq!(key("10.0.0.1", 1), key("10.0.0.1", 2));
        assert_eq!(key("2001:db8::1", 1), key("2001:db8::1", 2));
        assert_ne!(key("fe80::1", 1), key("fe80::1", 2));
    }
}
