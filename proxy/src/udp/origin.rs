//! Detects datagrams that no client can have sent: relaying them would create a loop.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rproxy_mapping::PortMapping;
use rproxy_mapping::addr::wildcard_of;
use rproxy_sys::udp::is_local;

/// The listeners of this process, by port.
#[derive(Debug, Default)]
pub(super) struct OwnPorts(BTreeSet<(u16, IpAddr)>);

impl OwnPorts {
    /// Adds a listener.
    pub(super) fn add(&mut self, port_mapping: &PortMapping) {
        self.0.extend(places(port_mapping));
    }

    /// Removes a listener.
    pub(super) fn remove(&mut self, port_mapping: &PortMapping) {
        for place in places(port_mapping) {
            self.0.remove(&place);
        }
    }

    /// Whether a datagram for `forward` cannot come from a client: its `source` is the backend, a listener of this
    /// process, or not a valid source address (RFC 1122, section 3.2.1.3).
    pub(super) fn is_forged(&self, source: SocketAddr, port_mapping: &PortMapping) -> bool {
        let (ip, port) = (source.ip().to_canonical(), source.port());
        if port == 0 || ip.is_unspecified() || ip.is_multicast() {
            return true;
        }
        let backend = port_mapping.backend.socket_addr();
        if port == backend.port() && ip == backend.ip().to_canonical() {
            return true;
        }
        let has = |host: IpAddr| self.0.contains(&(port, host));
        has(ip) || has(wildcard_of(ip)) && is_local(source)
    }
}

/// The scopes of a listener: one for each family that it serves.
fn places(port_mapping: &PortMapping) -> impl Iterator<Item = (u16, IpAddr)> {
    let host = port_mapping.host.inet_addr();
    let ip = host.map(|host| host.ip().to_canonical());
    let serves_both = ip == Some(Ipv6Addr::UNSPECIFIED.into()) && !port_mapping.v6only;
    let v4 = serves_both.then_some(Ipv4Addr::UNSPECIFIED.into());
    let port = host.map_or(0, |host| host.port());
    ip.into_iter().chain(v4).map(move |ip| (port, ip))
}

#[cfg(test)]
mod tests {
    use rproxy_mapping::addr::Protocol;

    use super::*;

    fn port_mapping(host: &str, backend: &str) -> PortMapping {
        let (host, backend) = (host.parse().unwrap(), backend.parse().unwrap());
        PortMapping { protocol: Protocol::Udp, host, backend, v6only: false }
    }

    #[test]
    fn what_comes_from_the_backend_a_listener_or_nobody_is_forged() {
        let first = port_mapping("0.0.0.0:9000", "192.0.2.1:53");
        let mut own = OwnPorts::default();
        [
            first.clone(),
            port_mapping("192.0.2.9:9001", "192.0.2.1:53"),
            port_mapping("[::]:9002", "192.0.2.1:53"),
        ]
        .iter()
        .for_each(|port_mapping| own.add(port_mapping));
        let is_forged = |source: &str| own.is_forged(source.parse().unwrap(), &first);
        for forged in [
            "192.0.2.1:53",
            "[::ffff:192.0.2.1]:53",
            "0.0.0.0:7",
            "[::]:7",
            "[::ffff:0.0.0.0]:7",
            "224.0.0.1:7",
            "192.0.2.7:0",
            "127.0.0.1:9000",
            "127.0.0.1:9002",
            "[::1]:9002",
            "[::ffff:127.0.0.1]:9002",
            "192.0.2.9:9001",
        ] {
            assert!(is_forged(forged), "{forged}");
        }
        for genuine in ["192.0.2.1:54", "192.0.2.2:53", "192.0.2.7:9000", "127.0.0.1:9001", "127.0.0.1:53"] {
            assert!(!is_forged(genuine), "{genuine}");
        }
        own.remove(&first);
        assert!(!own.is_forged("127.0.0.1:9000".parse().unwrap(), &first));
    }
}
