//! The edges of the forwarding graph: where clients connect, and where they are forwarded.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rproxy_mapping::addr::{Protocol, ScopedIp};
use rproxy_mapping::name::Name;
use rproxy_mapping::ports::PortRange;
use rproxy_mapping::{HostPorts, Mapping, PortMapping};

/// A range of ports of one mapping and protocol, and the equally long range of backend ports.
#[derive(Clone, Copy, Debug)]
pub struct Hop<'a> {
    /// The index of the mapping, as used by the caller.
    pub mapping: usize,
    /// The explicit name of the mapping, if it has one.
    pub name: Option<&'a Name>,
    /// The protocol of both sides.
    pub protocol: Protocol,
    /// The address that clients connect to.
    pub host: ScopedIp,
    /// Whether an IPv6 wildcard excludes IPv4 clients.
    pub v6only: bool,
    /// The ports that clients connect to.
    pub host_ports: PortRange,
    /// The address of the backend; of one with a name, the first.
    pub backend: ScopedIp,
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
            let sides = mapping
                .addresses()
                .iter()
                .flat_map(move |host| mapping.protocols().iter().map(move |protocol| (*host, protocol)));
            sides.map(move |(host, protocol)| Self {
                mapping: index,
                name: mapping.given_name(),
                protocol,
                host,
                v6only: mapping.is_v6only(),
                host_ports,
                backend: mapping.backend().first_ip(),
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
            let Some(next) = Self::of_socket(index, mapping.given_name(), &socket) else { continue };
            match hops.last_mut().and_then(|last| last.joined(&next).map(|joined| (last, joined))) {
                Some((last, joined)) => *last = joined,
                None => hops.push(next),
            }
        }
        hops
    }

    /// The hop of one socket, or `None` if a port is 0.
    pub fn of_socket(index: usize, name: Option<&'a Name>, socket: &PortMapping) -> Option<Self> {
        let (host, backend) = (socket.host.socket_addr(), socket.backend.socket_addr());
        // A connect to the unspecified address reaches this machine (docker-proxy accepts such a backend).
        let to = match backend.ip() {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED) => IpAddr::from(Ipv4Addr::LOCALHOST).into(),
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) => IpAddr::from(Ipv6Addr::LOCALHOST).into(),
            _ => backend.into(),
        };
        Some(Self {
            mapping: index,
            name,
            protocol: socket.protocol,
            host: host.into(),
            v6only: socket.v6only,
            host_ports: PortRange::single(host.port()).ok()?,
            backend: to,
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
        let mut text = if host.is_wildcard() && !self.v6only {
            format!("{port}/{protocol}")
        } else {
            format!("{host}:{port}/{protocol}")
        };
        if let Some(name) = self.name {
            // Writing to a string does not fail.
            write!(text, " ({name})").ok();
        }
        text
    }
}
