//! Topologies and golden files that the unit tests share.

use std::path::Path;

use rproxy_mapping::addr::Protocol;

use crate::host_ip::HostIp;
use crate::model::{Endpoint, Firewall, Mapping, Netns, Network, Topology, Transparent, Via};
use crate::name::{Id, Name};

/// Compares `actual` with a file of `testdata/`, or writes the file when `UPDATE_GOLDEN` is set.
pub(crate) fn golden(file: &str, actual: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata").join(file);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, actual).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(actual, expected, "{file} differs; UPDATE_GOLDEN=1 accepts the new text");
}

pub(crate) fn network() -> Network {
    Network {
        id: Id::from_bytes([0xaa; 32]),
        bridge: "docker0".parse().unwrap(),
        subnet: "172.17.0.0/16".parse().unwrap(),
        subnet6: None,
        mtu: 1500,
        gso_max_size: 0,
        firewall: Firewall::Nft,
        disable_ipv6: false,
        sysctls: vec![],
        persist: None,
        last_ip: None,
    }
}

pub(crate) fn endpoint(name: &str, last: u8) -> (Name, Endpoint) {
    let name: Name = name.parse().unwrap();
    let endpoint = Endpoint {
        id: Id::from_bytes([last; 32]),
        ip: [172, 17, 0, last].into(),
        ip_requested: false,
        netns: Netns::made(&name),
        exposed: vec![],
        mappings: vec![],
    };
    (name, endpoint)
}

pub(crate) fn mapping(proto: Protocol, host: &str, host_port: u16, container_port: u16, via: Via) -> Mapping {
    let host: HostIp = host.parse().unwrap();
    Mapping { proto, host, host_port, random: false, container_port, via, relay: None, suspended: false }
}

/// A simple topology: one container, with port 80 published on all addresses.
pub(crate) fn story() -> Topology {
    let (name, mut web) = endpoint("web", 2);
    web.mappings.push(mapping(Protocol::Tcp, "*", 80, 80, Via::Both));
    Topology { network: Some(network()), endpoints: [(name, web)].into(), ..Topology::default() }
}

/// Both families, both protocols, every way to publish and every kind of address.
pub(crate) fn everything() -> Topology {
    use Protocol::{Tcp, Udp};
    let mut topology = story();
    topology.network = Some(Network { subnet6: Some("fd00:d0c::/64".parse().unwrap()), ..network() });
    let (name, mut dns) = endpoint("dns", 3);
    dns.mappings = vec![
        mapping(Udp, "*", 53, 5353, Via::Both),
        mapping(Udp, "10.0.0.11", 54, 54, Via::Both),
        mapping(Tcp, "0.0.0.0", 55, 55, Via::Dnat),
        mapping(Tcp, "[::]", 56, 56, Via::Dnat),
        mapping(Tcp, "[fd00:1::1]", 57, 57, Via::Both),
        mapping(Tcp, "127.0.0.1", 58, 58, Via::Both),
        mapping(Tcp, "127.0.0.1", 59, 59, Via::Dnat),
        mapping(Tcp, "*", 60, 60, Via::Proxy),
    ];
    topology.endpoints.insert(name, dns);
    topology
}

/// One container with that many ports.
pub(crate) fn with_ports(count: u16) -> Topology {
    let (name, mut web) = endpoint("web", 2);
    web.mappings = (0..count).map(|port| mapping(Protocol::Tcp, "*", 1000 + port, 80, Via::Dnat)).collect();
    Topology { network: Some(network()), endpoints: [(name, web)].into(), ..Topology::default() }
}

/// Two interfaces whose replies to transparent sockets stay here.
pub(crate) fn transparent(firewall: Firewall) -> Topology {
    let interfaces = ["docker0", "br-0123456789ab"].map(|name| name.parse().unwrap()).into();
    let transparent = Some(Transparent { interfaces, firewall, ipv6: true });
    Topology { transparent, ..Topology::default() }
}
