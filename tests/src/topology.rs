//! The test network: an outside client, a host, and containers on its bridge.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::netns::Namespace;

/// The outside client, on the host's network (IPv4).
pub const CLIENT_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 12);
/// The outside client (IPv6).
pub const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0, 0x12);
/// The host, as seen by the client (IPv4).
pub const HOST_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 11);
/// The host, as seen by the client (IPv6).
pub const HOST_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0, 0x11);
/// The host's bridge, the gateway of the containers (IPv4).
pub const BRIDGE_V4: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 1);
/// The host's bridge, the gateway of the containers (IPv6).
pub const BRIDGE_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x172, 0x17, 0, 0, 0, 0, 1);
/// The first container (IPv4).
pub const CONTAINER_V4: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 2);
/// The first container (IPv6).
pub const CONTAINER_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x172, 0x17, 0, 0, 0, 0, 2);

/// The name of the bridge in the host's namespace.
pub const BRIDGE: &str = "docker0";

/// ```text
/// client ── eth0 10.0.0.12 ──── 10.0.0.11 eth0 ── host ── docker0 172.17.0.1 ──── 172.17.0.2 eth0 ── container
/// ```
/// with the same over IPv6 (`fd00:10::/64`, `fd00:172:17::/64`). The host forwards nothing and there are no
/// firewall rules: the client can only reach the container through a proxy on the host.
pub struct Topology {
    /// The namespace of outside clients.
    pub client: Namespace,
    /// The namespace of the proxy.
    pub host: Namespace,
    /// The namespace of the backend.
    pub container: Namespace,
}

impl Topology {
    /// Creates the three namespaces and connects them.
    pub fn new() -> Self {
        let (client, host) = client_and_host();
        host.ip(&format!("link add name {BRIDGE} type bridge stp_state 0"));
        host.address(BRIDGE, &format!("{BRIDGE_V4}/16"));
        host.address(BRIDGE, &format!("{BRIDGE_V6}/64"));
        host.ip(&format!("link set dev {BRIDGE} up"));
        let container = add_container(&host, CONTAINER_V4, CONTAINER_V6);
        Self { client, host, container }
    }
}

impl Default for Topology {
    fn default() -> Self {
        Self::new()
    }
}

/// The outside client and the host, on one network.
pub fn client_and_host() -> (Namespace, Namespace) {
    let (client, host) = (Namespace::new(), Namespace::new());
    host.veth("eth0", &client, "eth0");
    host.address("eth0", &format!("{HOST_V4}/24"));
    host.address("eth0", &format!("{HOST_V6}/64"));
    client.address("eth0", &format!("{CLIENT_V4}/24"));
    client.address("eth0", &format!("{CLIENT_V6}/64"));
    (client, host)
}

/// Attaches a new container to the bridge of `host`, with these addresses and the MAC address that Docker
/// derives from the IPv4 address.
pub fn add_container(host: &Namespace, v4: Ipv4Addr, v6: Ipv6Addr) -> Namespace {
    let container = Namespace::new();
    let [a, b, c, d] = v4.octets();
    let port = format!("veth{c:02x}{d:02x}");
    host.veth(&port, &container, "eth0");
    host.ip(&format!("link set dev {port} master {BRIDGE}"));
    container.ip(&format!("link set eth0 address 02:42:{a:02x}:{b:02x}:{c:02x}:{d:02x}"));
    container.address("eth0", &format!("{v4}/16"));
    container.address("eth0", &format!("{v6}/64"));
    container.ip(&format!("route add default via {BRIDGE_V4}"));
    container.ip(&format!("-6 route add default via {BRIDGE_V6}"));
    container
}
