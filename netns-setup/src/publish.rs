//! Expands `-p` and `--expose` into single ports.

use std::cell::RefCell;
use std::net::IpAddr;
use std::str::FromStr;

use rproxy_mapping::HostPorts;
use rproxy_mapping::addr::{AddrError, Protocol, Protocols, ScopedIp};
use rproxy_mapping::host::HostAddr;
use rproxy_mapping::interfaces::Interfaces;
use rproxy_mapping::ports::PortRange;
use rproxy_mapping::publish::{ExposedPorts, PublishSpec, SpecError};

use crate::host_ip::HostIp;
use crate::interfaces::HostInterfaces;
use crate::name::NameError;

/// The requested host port of a container port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostPort {
    /// Any free port.
    Random,
    /// The first free port of this range.
    FirstFreeOf(PortRange),
    /// This port.
    Exactly(u16),
}

impl HostPort {
    /// Whether a mapping at `port` satisfies the request. `random` says that the port was chosen at random.
    #[must_use]
    pub fn admits(self, port: u16, random: bool) -> bool {
        match self {
            Self::Random => random,
            Self::FirstFreeOf(range) => range.contains(port),
            Self::Exactly(exact) => exact == port,
        }
    }
}

/// A container port to publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRequest {
    /// The transport protocol.
    pub proto: Protocol,
    /// The host addresses.
    pub host: HostIp,
    /// The requested host port.
    pub host_port: HostPort,
    /// The container port.
    pub container_port: u16,
}

/// A `-p` argument: the grammar of [`PublishSpec`], with a host address of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Publication {
    host: HostIp,
    host_ports: HostPorts,
    ports: PortRange,
    protocols: Protocols,
}

impl Publication {
    /// The single ports, TCP first.
    pub fn requests(self) -> impl Iterator<Item = PortRequest> {
        let Self { host, host_ports, ports, protocols } = self;
        protocols.iter().flat_map(move |proto| {
            let ports = ports.iter().enumerate();
            ports.map(move |(index, container_port)| {
                let host_port = match host_ports {
                    HostPorts::Random => HostPort::Random,
                    HostPorts::FirstFree(range) => HostPort::FirstFreeOf(range),
                    HostPorts::Exactly(range) => {
                        range.iter().nth(index).map_or(HostPort::FirstFreeOf(range), HostPort::Exactly)
                    }
                };
                PortRequest { proto, host, host_port, container_port }
            })
        })
    }
}

impl FromStr for Publication {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = Names::default();
        let spec = PublishSpec::parse(text, &names).map_err(|error| error.to_string())?;
        refuse_sctp(spec.protocols)?;
        let PublishSpec { host, host_ports, ports, protocols } = spec;
        let host = match host {
            None => HostIp::Any,
            Some(HostAddr::Ip(host)) => host_ip(host, &names)?,
            Some(HostAddr::Interface(name)) => {
                return Err(format!(
                    "netns-setup publishes at addresses, and {name} is an interface; write an address, or have `rproxy -p` follow it"
                ));
            }
            Some(HostAddr::Unix(addr)) => {
                return Err(format!(
                    "netns-setup publishes at addresses, and {addr} is a Unix socket; write an address, or have `rproxy -p` listen there"
                ));
            }
        };
        Ok(Self { host, host_ports, ports, protocols })
    }
}

/// Published ports of a container: a `-p` argument, or one port as `publish` and `list` print it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published(Vec<PortRequest>);

impl Published {
    /// The single ports.
    pub fn requests(&self) -> impl Iterator<Item = PortRequest> {
        self.0.iter().copied()
    }
}

impl FromStr for Published {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains("->") {
            return text.parse().map(|Listed(request)| Self(vec![request]));
        }
        let spec: Publication = text.parse()?;
        Ok(Self(spec.requests().collect()))
    }
}

/// One published port as `list` prints it, `*:80->80/tcp (both)`, or `publish`, `*:80/tcp -> 172.17.0.2:80`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listed(pub PortRequest);

impl FromStr for Listed {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        read_listed(text).map(Self).ok_or_else(|| {
            format!("{text:?} is not a published port; write it as `netns-setup list` shows it, such as '*:80->80/tcp'")
        })
    }
}

fn read_listed(text: &str) -> Option<PortRequest> {
    let (outside, inside) = text.trim().trim_end_matches(',').split_once("->")?;
    // In brackets is what relays it.
    let inside = inside.split_once(" (").map_or(inside, |(inside, _via)| inside).trim();
    let (outside, container_port, proto) = match outside.trim().rsplit_once('/') {
        Some((outside, proto)) => (outside, inside.rsplit_once(':')?.1, proto),
        None => {
            let (container_port, proto) = inside.rsplit_once('/')?;
            (outside.trim(), container_port, proto)
        }
    };
    let (host, host_port) = outside.rsplit_once(':')?;
    Some(PortRequest {
        proto: Protocol::ALL.into_iter().find(|known| known.as_str() == proto)?,
        host: host.parse().ok()?,
        host_port: HostPort::Exactly(host_port.parse().ok()?),
        container_port: container_port.parse().ok()?,
    })
}

/// Accepts any interface name, so that a mapping whose interface was removed can be unpublished.
#[derive(Default)]
struct Names {
    name: RefCell<Option<String>>,
}

impl Names {
    /// Stands for the name that was read. The kernel's indexes are positive `int`s, and so below it.
    const NAMED: u32 = 1 << 31;
}

impl Interfaces for Names {
    fn index_of(&self, name: &str) -> Option<u32> {
        let is_number = name.bytes().all(|byte| byte.is_ascii_digit());
        if is_number && HostInterfaces.index_of(name).is_none() {
            return None;
        }
        self.name.replace(Some(name.to_owned()));
        Some(Self::NAMED)
    }

    fn example(&self) -> Option<String> {
        HostInterfaces.example()
    }
}

/// The state file's representation of `host`.
fn host_ip(host: ScopedIp, names: &Names) -> Result<HostIp, String> {
    match host.ip() {
        IpAddr::V6(ip) if ip.is_unicast_link_local() || ip.is_multicast() && host.zone() != 0 => {
            let name = match host.zone() {
                Names::NAMED => names.name.take(),
                index => HostInterfaces.name_of(index),
            };
            let name = name.ok_or_else(|| AddrError::NoSuchInterface(host.zone().to_string()).to_string())?;
            Ok(HostIp::Scoped(ip, name.parse().map_err(|error: NameError| error.to_string())?))
        }
        ip => Ok(HostIp::Ip(ip)),
    }
}

/// Parses exposed ports.
///
/// # Errors
/// A message for the user.
pub fn parse_exposed(text: &str) -> Result<ExposedPorts, String> {
    let exposed: ExposedPorts = text.parse().map_err(|error: SpecError| error.to_string())?;
    refuse_sctp(exposed.protocols)?;
    Ok(exposed)
}

/// Neither the firewall rules here nor the relays that are started for them are for SCTP.
fn refuse_sctp(protocols: Protocols) -> Result<(), String> {
    match protocols.contains(Protocol::Sctp) {
        true => {
            Err("netns-setup publishes no sctp, which `rproxy -p` relays; write tcp, udp or tcp+udp"
                .to_owned())
        }
        false => Ok(()),
    }
}

/// The single exposed ports, TCP first.
pub fn exposed(ExposedPorts { ports, protocols }: ExposedPorts) -> impl Iterator<Item = (u16, Protocol)> {
    protocols.iter().flat_map(move |proto| ports.iter().map(move |port| (port, proto)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requests(spec: &str) -> Vec<PortRequest> {
        spec.parse::<Publication>().unwrap().requests().collect()
    }

    #[test]
    fn a_link_local_address_is_kept_with_the_name_of_its_interface() {
        let one = |spec: &str| requests(spec)[0].host.to_string();
        assert_eq!(one("[fe80::1%lo]:80:80"), "[fe80::1%lo]");
        assert_eq!(one("[fe80::1%1]:80:80"), "[fe80::1%lo]");
        assert_eq!(one("[::ffff:10.0.0.11]:80:80"), "10.0.0.11");
        assert_eq!(one("80:80"), "*");
        assert_eq!(one("[fe80::1%gone0]:80:80"), "[fe80::1%gone0]", "it can be unpublished");
        let unknown = "[fe80::1%4000000000]:80:80".parse::<Publication>().unwrap_err();
        assert!(unknown.contains("'4000000000' is not a network interface"), "{unknown}");
    }

    #[test]
    fn ranges_pair_up_port_by_port() {
        let pairs = requests("8000-8010:80-90");
        assert_eq!(pairs.len(), 11);
        assert_eq!((pairs[0].host_port, pairs[0].container_port), (HostPort::Exactly(8000), 80));
        assert_eq!((pairs[10].host_port, pairs[10].container_port), (HostPort::Exactly(8010), 90));
    }

    #[test]
    fn one_container_port_takes_the_first_free_of_a_range() {
        let [request] = requests("8000-8010:80")[..] else { panic!("not one") };
        assert!(matches!(request.host_port, HostPort::FirstFreeOf(range) if range.count() == 11));
        assert!(request.host_port.admits(8004, false));
        assert!(!request.host_port.admits(8011, false));
    }

    #[test]
    fn what_is_printed_of_a_port_names_it() {
        let request = |proto, host: &str, port, container_port| PortRequest {
            proto,
            host: host.parse().unwrap(),
            host_port: HostPort::Exactly(port),
            container_port,
        };
        for (text, expected) in [
            ("*:80->81/tcp (both)", request(Protocol::Tcp, "*", 80, 81)),
            ("127.0.0.1:80->81/udp (dnat, suspended), ", request(Protocol::Udp, "127.0.0.1", 80, 81)),
            ("[fe80::1%eth0]:80->81/tcp", request(Protocol::Tcp, "[fe80::1%eth0]", 80, 81)),
            ("[::1]:80/udp -> 172.17.0.2:81", request(Protocol::Udp, "[::1]", 80, 81)),
        ] {
            assert_eq!(text.parse(), Ok(Published(vec![expected])), "{text}");
        }
        assert_eq!("8080:80/tcp+udp".parse::<Published>().unwrap().requests().count(), 2);
        for wrong in
            ["->", "*:80->", "*:80->80", "80->80/tcp", "*:0x50->80/tcp", "*:80->80/icmp", "*:80/tcp -> x"]
        {
            let error = wrong.parse::<Published>().unwrap_err();
            assert!(error.contains("as `netns-setup list` shows it"), "{error}");
        }
    }

    #[test]
    fn each_protocol_has_its_own_request() {
        let protos: Vec<_> = requests("53:53/tcp+udp").iter().map(|request| request.proto).collect();
        assert_eq!(protos, [Protocol::Tcp, Protocol::Udp]);
        assert_eq!(requests("0:80")[0].host_port, HostPort::Random);
        let ports = exposed("80-81/tcp+udp".parse().unwrap());
        assert_eq!(ports.count(), 4);
    }
}
