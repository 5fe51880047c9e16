//! Mappings for property tests.

#![expect(clippy::unwrap_used, reason = "the texts here are right")]

use std::time::Duration;

use ipnet::IpNet;
use proptest::prelude::*;

use crate::Mapping;
use crate::access::{AccessList, parse_network};
use crate::keepalive::{Keepalive, Probes};
use crate::limits::{Limits, OnLimit};
use crate::ports::PortRange;
use crate::proxy_protocol::{ProxyDatagrams, ProxyPeers, ProxyProtocol, ProxyVersion};
use crate::rate::Rate;
use crate::source::{Device, Source};

/// Generates any mapping, with or without limits.
pub fn any_mapping() -> impl Strategy<Value = Mapping> {
    let hosts = vec!["[::]", "0.0.0.0", "10.0.0.11", "[::1]", "[fe80::1%1]", "%eth0"];
    let host = proptest::sample::select(hosts);
    let proto = proptest::sample::select(vec!["tcp", "udp", "sctp", "tcp+udp"]);
    let name = proptest::option::of("[a-z0-9_./:+%#@][a-z0-9_./:+%#@\\[\\]-]{0,20}");
    let ports = (1..60_000_u16, 1..60_000_u16, 0..20_u16, any::<bool>());
    (host, ports, proto, name, any::<bool>(), any_limits()).prop_map(
        |(host, (host_port, port, more, random), proto, name, v6only, limits)| {
            let range = |first: u16| PortRange::new(first, first + more).unwrap();
            // An interface cannot have random ports.
            let random = random && !host.starts_with('%');
            let host = (host.parse().unwrap(), (!random).then(|| range(host_port)));
            let backend = ("192.0.2.1".parse().unwrap(), range(port));
            let mapping = Mapping::new(proto.parse().unwrap(), host, backend).unwrap();
            // Some limits are not for SCTP.
            let mapping = mapping.clone().limited(limits).unwrap_or(mapping);
            let mapping = if v6only { mapping.clone().v6only().unwrap_or(mapping) } else { mapping };
            match name {
                Some(name) => mapping.named(name.parse().unwrap()),
                None => mapping,
            }
        },
    )
}

fn any_limits() -> impl Strategy<Value = Limits> {
    let limit = || (1..10_000_000_u64).prop_map(Duration::from_millis);
    let count = || proptest::option::of(1..100_000_usize);
    let optional = || proptest::option::of(limit());
    let user_timeout = proptest::option::of((1..2_000_000_000_u64).prop_map(Duration::from_millis));
    let times = (optional(), optional(), limit(), user_timeout, any_keepalive());
    let rate = (1..10_000_u32, limit(), 1..10_u32)
        .prop_map(|(count, period, times)| Rate::new(count, period, count * times).ok());
    let dscp = proptest::option::of((0..64_u8).prop_map(|bits| bits.to_string().parse().unwrap()));
    let switches = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let access = (any_networks(), any_networks());
    let path = (any_source(), proptest::option::of("[a-z][a-z0-9.-]{0,14}"), dscp);
    (times, switches, (count(), count(), count(), count(), rate), path, any_proxy_protocol(), access)
        .prop_map(
            |(
                (connect_timeout, idle_timeout, udp_timeout, tcp_user_timeout, keepalive),
                is_on,
                counts,
                path,
                proxy_protocol,
                (allow, deny),
            )| Limits {
                connect_timeout,
                idle_timeout,
                tcp_user_timeout,
                keepalive,
                max_connections: counts.0,
                on_limit: if is_on.0 { OnLimit::Reset } else { OnLimit::Wait },
                max_connections_per_source: counts.3,
                rate: counts.4,
                udp_timeout,
                udp_max_flows: counts.1,
                udp_max_flows_per_source: counts.2,
                udp_any_port: is_on.1,
                dscp: path.2,
                source: path.0,
                device: path.1.map(|name| name.parse::<Device>().unwrap()),
                proxy_protocol,
                // It means nothing for an address.
                require_resolved: false,
                access_log: is_on.2,
                freebind: is_on.3,
                // They mean something only at a Unix socket.
                socket: None,
                access: AccessList { allow, deny },
            },
        )
}

fn any_keepalive() -> impl Strategy<Value = Keepalive> {
    let time = || (1..32_768_u64).prop_map(Duration::from_secs);
    let probes = (time(), time(), proptest::option::of(1..128_u32));
    proptest::option::of(probes).prop_map(|probes| match probes {
        Some((idle, interval, count)) => Keepalive::On(Probes { idle, interval, count }),
        None => Keepalive::Off,
    })
}

fn any_networks() -> impl Strategy<Value = Vec<IpNet>> {
    let network = proptest::sample::select(vec!["10.0.0.0/8", "fd00::/8", "192.0.2.7"]);
    proptest::collection::vec(network.prop_map(|text| parse_network(text).unwrap()), 0..3)
}

fn any_proxy_protocol() -> impl Strategy<Value = ProxyProtocol> {
    let version = proptest::sample::select(vec![None, Some(ProxyVersion::V1), Some(ProxyVersion::V2)]);
    let datagrams = proptest::sample::select(vec![ProxyDatagrams::Each, ProxyDatagrams::First]);
    let timeout = (1..10_000_000_u64).prop_map(Duration::from_millis);
    (version, datagrams, any_networks(), timeout).prop_map(|(send, send_udp, accept, timeout)| {
        let accept = accept.into_iter().map(ProxyPeers::Network).collect();
        ProxyProtocol { send, send_udp, accept, timeout }.normalized()
    })
}

/// A source that can reach the backend of [`any_mapping`].
fn any_source() -> impl Strategy<Value = Source> {
    let address = Source::Address("192.0.2.9".parse().unwrap());
    proptest::sample::select(vec![Source::Auto, Source::Client, Source::ClientOnly, address])
}
