//! What `-p` says: `[[IP:][HOST_PORT]:]CONTAINER_PORT[/PROTO]`, each port also as a range.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::addr::serde_as_text;

/// Why a text is no publish specification.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("cannot publish {spec:?}: {problem}")]
pub struct SpecError {
    spec: String,
    problem: Problem,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
enum Problem {
    #[error("{0:?} is not a port: use a number from 1 to 65535, or a range such as 8000-8010")]
    Port(String),
    #[error("the range {0} ends before it starts")]
    Backwards(String),
    #[error("{0:?} is not an address: use IPv4, or IPv6 in brackets, before the host port")]
    Address(String),
    #[error("{0:?} is an address, so a host port is missing: write {0}::PORT for a random one")]
    NoHostPort(String),
    #[error("{0} is {1} address, which nobody can connect to: use an address of this host")]
    Nowhere(IpAddr, &'static str),
    #[error("the host port before the ':' is missing")]
    EmptyHostPort,
    #[error("the protocol {0:?} is not relayed: use tcp or udp")]
    Protocol(String),
    #[error("it names two protocols, {0} and {1}")]
    TwoProtocols(Proto, Proto),
    #[error("{host} host ports do not fit {container} container ports: make the ranges equally long")]
    Lengths { host: u32, container: u32 },
    #[error("write it as [[IP:][HOST_PORT]:]CONTAINER_PORT[/PROTO]")]
    Shape,
}

/// A transport protocol that can be published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Proto {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

impl fmt::Display for Proto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

impl FromStr for Proto {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "tcp" => Ok(Self::Tcp),
            "udp" => Ok(Self::Udp),
            _ => Err(format!("{text:?} is neither tcp nor udp")),
        }
    }
}

/// The addresses of the host on which a port is published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HostIp {
    /// Every address, IPv4 and IPv6.
    Any,
    /// One address; an unspecified one means every address of its family.
    Ip(IpAddr),
}

impl HostIp {
    /// Whether one packet could be meant for both.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        match (self, other) {
            (Self::Any, _) | (_, Self::Any) => true,
            (Self::Ip(a), Self::Ip(b)) => {
                a == b || (a.is_ipv4() == b.is_ipv4() && (a.is_unspecified() || b.is_unspecified()))
            }
        }
    }
}

impl fmt::Display for HostIp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Ip(IpAddr::V4(ip)) => write!(f, "{ip}"),
            Self::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]"),
        }
    }
}

impl FromStr for HostIp {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "*" {
            return Ok(Self::Any);
        }
        let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
        bare.parse().map(Self::Ip).map_err(|_ignored| format!("{text:?} is not an address"))
    }
}

serde_as_text!(Proto);
serde_as_text!(HostIp);

/// Ports from `first` to `last`, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    /// How many ports it has.
    #[must_use]
    pub fn len(self) -> u32 {
        u32::from(self.last - self.first) + 1
    }

    /// Never: a range has at least one port.
    #[must_use]
    pub fn is_empty(self) -> bool {
        false
    }

    /// Its ports in order.
    pub fn ports(self) -> impl Iterator<Item = u16> {
        self.first..=self.last
    }
}

/// Which host port one container port is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostPort {
    /// Any that is free.
    Random,
    /// The first of these that is free.
    FirstFreeOf(PortRange),
    /// This one.
    Exactly(u16),
}

impl HostPort {
    /// Whether a mapping at `port` fulfils the wish; `random` when that port was nobody's choice.
    #[must_use]
    pub fn admits(self, port: u16, random: bool) -> bool {
        match self {
            Self::Random => random,
            Self::FirstFreeOf(range) => (range.first..=range.last).contains(&port),
            Self::Exactly(exact) => exact == port,
        }
    }
}

/// One container port to be published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRequest {
    /// The transport protocol.
    pub proto: Proto,
    /// Where on the host.
    pub host: HostIp,
    /// At which port there.
    pub host_port: HostPort,
    /// The port in the container.
    pub container_port: u16,
}

/// One `-p` argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublishSpec {
    proto: Proto,
    host: HostIp,
    host_ports: Option<PortRange>,
    container_ports: PortRange,
}

impl PublishSpec {
    /// The ports it asks for, one by one.
    pub fn requests(self) -> impl Iterator<Item = PortRequest> {
        let Self { proto, host, host_ports, container_ports } = self;
        container_ports.ports().enumerate().map(move |(index, container_port)| {
            let host_port = match host_ports {
                None => HostPort::Random,
                Some(range) if range.len() == container_ports.len() => {
                    range.ports().nth(index).map_or(HostPort::FirstFreeOf(range), HostPort::Exactly)
                }
                Some(range) => HostPort::FirstFreeOf(range),
            };
            PortRequest { proto, host, host_port, container_port }
        })
    }
}

impl FromStr for PublishSpec {
    type Err = SpecError;

    fn from_str(spec: &str) -> Result<Self, SpecError> {
        parse(spec).map_err(|problem| SpecError { spec: spec.to_owned(), problem })
    }
}

fn parse(spec: &str) -> Result<PublishSpec, Problem> {
    let (body, slashed) = match spec.split_once('/') {
        Some((body, proto)) => (body, Some(parse_proto(proto)?)),
        None => (spec, None),
    };
    let (address, ports) = split_address(body)?;
    let (ports, coloned) = split_proto(ports)?;
    let proto = match (slashed, coloned) {
        (Some(a), Some(b)) if a != b => return Err(Problem::TwoProtocols(a, b)),
        (a, b) => a.or(b).unwrap_or(Proto::Tcp),
    };
    let host = address.map_or(Ok(HostIp::Any), parse_address)?;
    let (host_ports, container_ports) = match (ports.split_once(':'), address) {
        (Some(("", container)), Some(_)) => (None, parse_range(container)?),
        (Some(("", _)), None) => return Err(Problem::EmptyHostPort),
        (Some((host, container)), _) => (Some(parse_host_range(host)?), parse_range(container)?),
        (None, Some(address)) => return Err(Problem::NoHostPort(address.to_owned())),
        (None, None) => (None, parse_range(ports)?),
    };
    if let Some(range) = host_ports {
        let (host, container) = (range.len(), container_ports.len());
        if host != container && container != 1 {
            return Err(Problem::Lengths { host, container });
        }
    }
    Ok(PublishSpec { proto, host, host_ports, container_ports })
}

/// Takes a leading address off: in brackets, or the first of three parts that are not a protocol.
fn split_address(body: &str) -> Result<(Option<&str>, &str), Problem> {
    if body.starts_with('[') {
        let (address, ports) = body.split_once("]:").ok_or(Problem::Shape)?;
        return Ok((Some(&address[1..]), ports));
    }
    let is_proto = |part: &str| part.bytes().all(|byte| byte.is_ascii_alphabetic()) && !part.is_empty();
    let parts: Vec<&str> = body.split(':').collect();
    let numeric = parts.iter().filter(|part| !is_proto(part)).count();
    match numeric {
        1 | 2 => Ok((None, body)),
        3 => Ok(body.split_once(':').map_or((None, body), |(address, ports)| (Some(address), ports))),
        _ => Err(Problem::Shape),
    }
}

/// Takes a trailing `:udp` off, the older spelling of `/udp`.
fn split_proto(ports: &str) -> Result<(&str, Option<Proto>), Problem> {
    match ports.rsplit_once(':') {
        Some((rest, last)) if last.bytes().any(|byte| byte.is_ascii_alphabetic()) => {
            Ok((rest, Some(parse_proto(last)?)))
        }
        _ => Ok((ports, None)),
    }
}

fn parse_proto(text: &str) -> Result<Proto, Problem> {
    text.parse().map_err(|_ignored| Problem::Protocol(text.to_owned()))
}

fn parse_address(text: &str) -> Result<HostIp, Problem> {
    let ip: IpAddr = text.parse().map_err(|_ignored| Problem::Address(text.to_owned()))?;
    if ip.is_multicast() {
        return Err(Problem::Nowhere(ip, "a multicast"));
    }
    if ip == IpAddr::V4(Ipv4Addr::BROADCAST) {
        return Err(Problem::Nowhere(ip, "the broadcast"));
    }
    Ok(HostIp::Ip(ip))
}

fn parse_host_range(text: &str) -> Result<PortRange, Problem> {
    parse_range(text).map_err(|problem| match text.parse::<IpAddr>() {
        Ok(_) => Problem::NoHostPort(text.to_owned()),
        Err(_) => problem,
    })
}

fn parse_range(text: &str) -> Result<PortRange, Problem> {
    let port = |digits: &str| match digits.parse::<u16>() {
        Ok(port) if port > 0 && !digits.starts_with('+') => Ok(port),
        _ => Err(Problem::Port(text.to_owned())),
    };
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let range = PortRange { first: port(first)?, last: port(last)? };
    if range.first > range.last { Err(Problem::Backwards(text.to_owned())) } else { Ok(range) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn one(text: &str) -> PortRequest {
        let requests: Vec<_> = text.parse::<PublishSpec>().unwrap().requests().collect();
        assert_eq!(requests.len(), 1, "{text}");
        requests[0]
    }

    fn request(proto: Proto, host: &str, host_port: HostPort, container_port: u16) -> PortRequest {
        PortRequest { proto, host: host.parse().unwrap(), host_port, container_port }
    }

    #[test]
    fn every_form_of_one_port() {
        use HostPort::{Exactly, Random};
        use Proto::{Tcp, Udp};
        for (text, expected) in [
            ("80", request(Tcp, "*", Random, 80)),
            ("80/udp", request(Udp, "*", Random, 80)),
            ("81:80", request(Tcp, "*", Exactly(81), 80)),
            ("53:53/udp", request(Udp, "*", Exactly(53), 53)),
            ("53:53:udp", request(Udp, "*", Exactly(53), 53)),
            ("53:53:udp/udp", request(Udp, "*", Exactly(53), 53)),
            ("10.0.0.11:81:80", request(Tcp, "10.0.0.11", Exactly(81), 80)),
            ("10.0.0.11::80", request(Tcp, "10.0.0.11", Random, 80)),
            ("10.0.0.11::80:udp", request(Udp, "10.0.0.11", Random, 80)),
            ("10.0.0.11:81:80:udp", request(Udp, "10.0.0.11", Exactly(81), 80)),
            ("0.0.0.0:81:80", request(Tcp, "0.0.0.0", Exactly(81), 80)),
            ("[::1]:81:80", request(Tcp, "[::1]", Exactly(81), 80)),
            ("[::]::80/udp", request(Udp, "[::]", Random, 80)),
        ] {
            assert_eq!(one(text), expected, "{text}");
        }
    }

    #[test]
    fn ranges_pair_up_port_by_port() {
        let spec: PublishSpec = "8000-8010:80-90".parse().unwrap();
        let pairs: Vec<_> =
            spec.requests().map(|request| (request.host_port, request.container_port)).collect();
        assert_eq!(pairs.len(), 11);
        assert_eq!(pairs[0], (HostPort::Exactly(8000), 80));
        assert_eq!(pairs[10], (HostPort::Exactly(8010), 90));
    }

    #[test]
    fn one_container_port_takes_the_first_free_of_a_range() {
        let HostPort::FirstFreeOf(range) = one("8000-8010:80").host_port else { panic!("not a choice") };
        assert_eq!(range.ports().count(), 11);
        assert!(one("8000-8010:80").host_port.admits(8004, false));
        assert!(!one("8000-8010:80").host_port.admits(8011, false));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, part) in [
            ("", "\"\" is not a port"),
            ("0:80", "\"0\" is not a port"),
            ("80:65536", "\"65536\" is not a port"),
            ("+80:80", "\"+80\" is not a port"),
            ("90-80:90-80", "ends before it starts"),
            ("8000-8010:80-81", "11 host ports do not fit 2 container ports"),
            ("80:80/sctp", "\"sctp\" is not relayed"),
            ("80:80:sctp", "\"sctp\" is not relayed"),
            ("80:80/", "\"\" is not relayed"),
            ("80:80:tcp/udp", "two protocols, udp and tcp"),
            ("10.0.0.11:80", "write 10.0.0.11::PORT"),
            ("10.0.0.256:80:80", "\"10.0.0.256\" is not an address"),
            ("[::1:80:80", "[[IP:][HOST_PORT]:]CONTAINER_PORT"),
            ("[zz]:80:80", "\"zz\" is not an address"),
            ("[::1]:80", "a host port is missing"),
            ("::1:80:80", "[[IP:][HOST_PORT]:]CONTAINER_PORT"),
            (":80", "before the ':' is missing"),
        ] {
            let error = text.parse::<PublishSpec>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn addresses_overlap_when_one_packet_fits_both() {
        let addr = |text: &str| text.parse::<HostIp>().unwrap();
        assert!(addr("*").overlaps(addr("[::1]")));
        assert!(addr("0.0.0.0").overlaps(addr("10.0.0.11")));
        assert!(!addr("0.0.0.0").overlaps(addr("[::]")));
        assert!(!addr("10.0.0.11").overlaps(addr("10.0.0.12")));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "[0-9a-z:/\\[\\].*-]{0,24}") {
            if let Ok(spec) = text.parse::<PublishSpec>() {
                prop_assert!(spec.requests().count() >= 1);
            }
        }
    }
}
