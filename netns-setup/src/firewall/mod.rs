//! The rules that keep containers closed except for published ports.

pub mod detect;
pub mod iptables;
pub mod nft;
pub mod nft_diff;
pub mod others;
pub mod tool;
pub mod transparent;

use std::net::IpAddr;

use rproxy_mapping::addr::Protocol;

use crate::host_ip::HostIp;
use crate::model::{Endpoint, Mapping, Network, Topology, Via};

/// A published port, for the rules of one address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Translation {
    pub(crate) proto: Protocol,
    /// The address of the host; `None` for all local ones.
    pub(crate) host: Option<IpAddr>,
    pub(crate) host_port: u16,
    pub(crate) container: IpAddr,
    pub(crate) container_port: u16,
    /// Whether the kernel also serves loopback and containers, because there is no relay.
    pub(crate) direct: bool,
}

/// The ports that the kernel translates, for one address family.
pub(crate) fn translations(network: &Network, topology: &Topology, ipv6: bool) -> Vec<Translation> {
    topology
        .active()
        .filter_map(|(_, endpoint, mapping)| translation(network, endpoint, mapping, ipv6))
        .collect()
}

fn translation(network: &Network, endpoint: &Endpoint, mapping: &Mapping, ipv6: bool) -> Option<Translation> {
    if !mapping.via.has_dnat() {
        return None;
    }
    let container = if ipv6 { IpAddr::V6(endpoint.ip6(network)?) } else { IpAddr::V4(endpoint.ip) };
    let direct = mapping.via == Via::Dnat;
    let host = translated_host(mapping.host, ipv6, direct)?;
    Some(Translation {
        proto: mapping.proto,
        host,
        host_port: mapping.host_port,
        container,
        container_port: mapping.container_port,
        direct,
    })
}

/// The address of the host in a translation of one family, in which `None` is every local one; `None` if the kernel
/// translates nothing for it. `direct` says that it also serves loopback.
pub(crate) fn translated_host(host: HostIp, ipv6: bool, direct: bool) -> Option<Option<IpAddr>> {
    match host {
        HostIp::Any => Some(None),
        // The kernel forwards nothing that link-local addresses send: the relay serves them.
        HostIp::Scoped(..) => None,
        HostIp::Ip(ip) if ip.is_ipv6() != ipv6 => None,
        HostIp::Ip(ip) if ip.is_unspecified() => Some(None),
        // If there is a relay, it serves loopback. Packets for ::1 can never leave the loopback interface.
        HostIp::Ip(ip) if ip.is_loopback() && (!direct || ipv6) => None,
        HostIp::Ip(ip) => Some(Some(ip)),
    }
}

/// Ports published on an IPv4 loopback address; packets to them from other hosts are dropped.
pub(crate) fn loopback_ports(topology: &Topology) -> Vec<(IpAddr, Protocol, u16)> {
    let ports = topology.active().filter_map(|(_, _, mapping)| match mapping.host {
        HostIp::Ip(ip @ IpAddr::V4(v4)) if v4.is_loopback() => Some((ip, mapping.proto, mapping.host_port)),
        _ => None,
    });
    ports.collect()
}

/// Whether the kernel routes loopback connections to the bridge.
#[must_use]
pub fn needs_route_localnet(topology: &Topology) -> bool {
    topology.active().any(|(_, _, mapping)| mapping.via == Via::Dnat)
}
