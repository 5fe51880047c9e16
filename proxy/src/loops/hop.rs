//! The edges of the forwarding graph: where clients connect, and where they are forwarded.

use std::fmt::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rproxy_mapping::addr::{Protocol, ScopedIp};
use rproxy_mapping::backend::BackendHost;
use rproxy_mapping::name::Name;
use rproxy_mapping::ports::PortRange;
use rproxy_mapping::unix::UnixAddr;
use rproxy_mapping::{HostPorts, Mapping, PortMapping};

/// Where a hop begins or leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place<'a> {
    /// An address, which may be a wildcard.
    Ip(ScopedIp),
    /// A Unix socket.
    Unix(&'a UnixAddr),
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(ip) => ip.fmt(f),
            Self::Unix(addr) => addr.fmt(f),
        }
    }
}

/// A range of ports of one mapping and protocol, and the equally long range of backend ports.
#[derive(Clone, Copy, Debug)]
pub struct Hop<'a> {
    /// The index of the mapping, as used by the caller.
    pub mapping: usize,
    /// The explicit name of the mapping, if it has one.
    pub name: Option<&'a Name>,
    /// The protocol of both sides.
    pub protocol: Protocol,
    /// Where clients connect to.
    pub host: Place<'a>,
    /// Whether an IPv6 wildcard excludes IPv4 clients.
    pub v6only: bool,
    /// The ports that clients connect to.
    pub host_ports: PortRange,
    /// Where the backend is; of one with a name, at the first address.
    pub backend: Place<'a>,
    /// The ports of the backend, as many as host ports.
    pub backend_ports: PortRange,
}

impl<'a> Hop<'a> {
    /// The hops of `mapping`, except for ports that are not chosen yet.
    pub fn of(index: usize, mapping: &'a Mapping) -> impl Iterator<Item = Self> {
        let exactly = match mapping.host_ports() {
            HostPorts::Exactly(range) => Some(range),
            HostPorts::FirstFree(_) | HostPorts::Random => None,
        };
        exactly.into_iter().flat_map(move |host_ports| {
            let addresses = mapping.addresses().iter().copied().map(Place::Ip);
            let hosts = addresses.chain(mapping.host().unix_addr().map(Place::Unix));
            let sides =
                hosts.flat_map(move |host| mapping.protocols().iter().map(move |protocol| (host, protocol)));
            sides.map(move |(host, protocol)| Self {
                mapping: index,
                name: mapping.given_name(),
                protocol,
                host,
                v6only: mapping.is_v6only(),
                host_ports,
                backend: unix_backend(mapping).unwrap_or(Place::Ip(mapping.backend().first_ip())),
                backend_ports: mapping.backend_ports(),
            })
        })
    }

    /// The hops of the sockets that serve `mapping`, wherever they listen.
    pub fn of_sockets(
        index: usize,
        mapping: &'a Mapping,
        sockets: impl IntoIterator<Item = PortMapping>,
    ) -> Vec<Self> {
        let mut hops: Vec<Self> = Vec::new();
        for socket in sockets {
            let at_unix = mapping.host().unix_addr().map(Place::Unix);
            let hop = Self::between(index, &socket, at_unix, unix_backend(mapping));
            let Some(next) = hop.map(|hop| Self { name: mapping.given_name(), ..hop }) else { continue };
            match hops.last_mut().and_then(|last| last.joined(&next).map(|joined| (last, joined))) {
                Some((last, joined)) => *last = joined,
                None => hops.push(next),
            }
        }
        hops
    }

    /// The hop of one socket, or `None` if a port is 0.
    pub fn of_socket(index: usize, socket: &'a PortMapping) -> Option<Self> {
        let (host, backend) = (socket.host.unix_addr(), socket.backend.unix_addr());
        Self::between(index, socket, host.map(Place::Unix), backend.map(Place::Unix))
    }

    /// The hop of a socket that may be at a Unix socket, or lead to one.
    fn between(
        index: usize,
        socket: &PortMapping,
        at_unix: Option<Place<'a>>,
        to_unix: Option<Place<'a>>,
    ) -> Option<Self> {
        let (host, host_port) = match socket.host.inet_addr() {
            Some(addr) => (Place::Ip(addr.into()), addr.port()),
            None => (at_unix?, PortRange::OF_UNIX.first()),
        };
        let backend = socket.backend.socket_addr();
        // A connect to the unspecified address reaches this machine (docker-proxy accepts such a backend).
        let to = match backend.ip() {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED) => IpAddr::from(Ipv4Addr::LOCALHOST).into(),
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) => IpAddr::from(Ipv6Addr::LOCALHOST).into(),
            _ => backend.into(),
        };
        Some(Self {
            mapping: index,
            name: None,
            protocol: socket.protocol,
            host,
            v6only: socket.v6only,
            host_ports: PortRange::single(host_port).ok()?,
            backend: to_unix.unwrap_or(Place::Ip(to)),
            backend_ports: PortRange::single(backend.port()).ok()?,
        })
    }

    /// Both hops as one, if `next` continues this one's ranges.
    fn joined(&self, next: &Self) -> Option<Self> {
        let same = |hop: &Self| (hop.mapping, hop.protocol, hop.host, hop.v6only, hop.backend);
        let join = |a: PortRange, b: PortRange| {
            let follows = a.last().checked_add(1) == Some(b.first());
            if follows { PortRange::new(a.first(), b.last()).ok() } else { None }
        };
        let host_ports = join(self.host_ports, next.host_ports)?;
        let backend_ports = join(self.backend_ports, next.backend_ports)?;
        (same(self) == same(next)).then_some(Self { host_ports, backend_ports, ..*self })
    }

    /// Whether it forwards to its own address and port.
    pub(super) fn is_own_backend(&self) -> bool {
        self.host == self.backend && self.host_ports.first() == self.backend_ports.first()
    }

    /// The port of the backend that `host_port` is forwarded to.
    pub(super) fn backend_port(&self, host_port: u16) -> u16 {
        self.backend_ports.first() + (host_port - self.host_ports.first())
    }

    /// The host port that is forwarded to `backend_port`.
    pub(super) fn host_port(&self, backend_port: u16) -> u16 {
        self.host_ports.first() + (backend_port - self.backend_ports.first())
    }

    /// The name of one of its ports in messages.
    pub(super) fn at(&self, port: u16) -> String {
        let Self { host, protocol, .. } = self;
        let mut text = match host {
            Place::Ip(host) if host.is_wildcard() && !self.v6only => format!("{port}/{protocol}"),
            Place::Ip(host) => format!("{host}:{port}/{protocol}"),
            Place::Unix(addr) => addr.to_string(),
        };
        if let Some(name) = self.name {
            // Writing to a string does not fail.
            write!(text, " ({name})").ok();
        }
        text
    }
}

/// The Unix socket that a mapping leads to, if it does.
fn unix_backend(mapping: &Mapping) -> Option<Place<'_>> {
    match mapping.backend() {
        BackendHost::Unix(addr) => Some(Place::Unix(addr)),
        BackendHost::Ip(_) | BackendHost::Name(_) => None,
    }
}
