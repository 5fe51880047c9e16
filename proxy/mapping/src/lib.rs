//! The vocabulary of published ports: addresses, ports, Docker's `-p`, mappings and their limits, with their text and
//! JSON forms.
//!
//! This crate does no I/O. What depends on the machine (the indexes of interfaces, the availability of IPv6) is passed
//! in.
//!
//! A [`Mapping`] relates host ports to backend ports. A range of ports is one mapping, with one name and one set of
//! limits; [`Mapping::port_mappings`] iterates over its single ports as [`PortMapping`]s.

pub mod access;
pub mod addr;
pub mod backend;
pub mod dscp;
pub mod duration;
pub mod endpoint;
pub mod escape;
pub mod host;
pub mod interfaces;
pub mod keepalive;
pub mod limits;
pub mod name;
pub mod overlap;
pub mod permissions;
pub mod ports;
pub mod proxy_protocol;
pub mod publish;
pub mod rate;
pub mod source;
#[cfg(any(test, feature = "testdata"))]
pub mod testdata;
pub mod unix;
pub mod wire;

use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, LazyLock};

use crate::addr::{AddrError, BackendAddr, HostSocketAddr, Protocol, Protocols, ScopedIp};
use crate::backend::{BackendHost, NoAddress};
use crate::endpoint::BackendSpec;
use crate::host::{HostAddr, InterfaceAddrs, InterfaceName};
use crate::limits::Limits;
use crate::name::Name;
use crate::ports::PortRange;
use crate::source::{Source, SourceError};
use crate::unix::UnixAddr;

/// Host ports and the backend ports to which they are forwarded.
///
/// Its text form is that of `-p` with all parts: `[::]:8080:80/tcp`. It does not contain the backend's address. A Unix socket
/// has no ports: `[::]:8080:unix/tcp`, `unix:/run/front.sock:80/tcp`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    name: Option<Name>,
    protocols: Protocols,
    host: HostAddr,
    at: InterfaceAddrs,
    host_ports: HostPorts,
    backend: BackendHost,
    backend_ports: PortRange,
    v6only: bool,
    /// Shared with whoever serves it, and those by default by all mappings: a process may have tens of thousands.
    limits: Arc<Limits>,
}

static DEFAULT_LIMITS: LazyLock<Arc<Limits>> = LazyLock::new(Arc::default);

/// The host ports of a mapping, as requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HostPorts {
    /// One host port for each backend port, in order.
    Exactly(PortRange),
    /// The first free port of the range, for a single backend port.
    FirstFree(PortRange),
    /// A random port of [`PortRange::EPHEMERAL`] for each backend port.
    Random,
}

impl HostPorts {
    /// The ports of `range`, or random ones without it, for the `backend` ports.
    ///
    /// # Errors
    /// [`MappingError::Lengths`] if there are several backend ports and a different number of host ports.
    pub fn new(range: Option<PortRange>, backend: PortRange) -> Result<Self, MappingError> {
        match range {
            None => Ok(Self::Random),
            Some(range) if range.count() == backend.count() => Ok(Self::Exactly(range)),
            Some(range) if backend.is_single() => Ok(Self::FirstFree(range)),
            Some(range) => Err(MappingError::Lengths { host: range, backend }),
        }
    }

    /// The requested ports, unless they are random.
    pub fn range(self) -> Option<PortRange> {
        match self {
            Self::Exactly(range) | Self::FirstFree(range) => Some(range),
            Self::Random => None,
        }
    }

    /// The number of alternatives, for ordering: mappings with fewer are bound first, while their ports are still free.
    pub fn freedom(self) -> u8 {
        match self {
            Self::Exactly(_) => 0,
            Self::FirstFree(_) => 1,
            Self::Random => 2,
        }
    }
}

impl Mapping {
    /// Maps `host_ports` of `host` to `backend_ports` of `backend`. Without host ports, they are random. If there are
    /// several host ports for one backend port, the first free one is used. A Unix socket has
    /// [`PortRange::OF_UNIX`].
    ///
    /// # Errors
    /// [`MappingError`] if the ranges do not fit, if an interface would have to choose ports, if a Unix socket gets ports or
    /// another protocol than TCP, or if the backend's address is not that of one machine.
    pub fn new(
        protocols: Protocols,
        (host, host_ports): (HostAddr, Option<PortRange>),
        (backend, backend_ports): (BackendHost, PortRange),
    ) -> Result<Self, MappingError> {
        if host.unix_addr().is_some() {
            refuse_at_unix(protocols, host_ports, backend_ports)?;
        }
        let host_ports = HostPorts::new(host_ports, backend_ports)?;
        if let (HostAddr::Interface(name), HostPorts::FirstFree(_) | HostPorts::Random) = (&host, host_ports)
        {
            return Err(MappingError::InterfacePorts(*name));
        }
        match backend {
            BackendHost::Unix(_) if protocols != Protocols::One(Protocol::Tcp) => {
                return Err(MappingError::NotByUnix(protocols));
            }
            BackendHost::Unix(_) if backend_ports != PortRange::OF_UNIX => {
                return Err(MappingError::NotOfUnix("ports".to_owned()));
            }
            BackendHost::Unix(_) => {}
            _ => drop(BackendAddr::reachable(backend.first_ip().at(backend_ports.first()))?),
        }
        let limits = DEFAULT_LIMITS.clone();
        let at = InterfaceAddrs::default();
        Ok(Self {
            name: None,
            protocols,
            host,
            at,
            host_ports,
            backend,
            backend_ports,
            v6only: false,
            limits,
        })
    }

    /// Excludes IPv4 clients from an IPv6 wildcard (`IPV6_V6ONLY`, ipv6(7)).
    ///
    /// # Errors
    /// [`MappingError::V6Only`] for any other host address, for which this has no meaning.
    pub fn v6only(mut self) -> Result<Self, MappingError> {
        if self.host != ScopedIp::ANY {
            return Err(MappingError::V6Only(self.host.clone()));
        }
        self.v6only = true;
        Ok(self)
    }

    /// Returns the mapping with a name other than its default one. The default name counts as no name, so that a
    /// mapping equals itself as listed.
    #[must_use]
    pub fn named(mut self, name: Name) -> Self {
        self.name = Some(name).filter(|name| *name != Name::of(&self));
        self
    }

    /// Returns the mapping with these limits.
    ///
    /// # Errors
    /// [`MappingError::Source`] if their source address cannot reach the backend, [`MappingError::NotOfSctp`],
    /// [`MappingError::NotOfUnix`] and [`MappingError::NotAtUnix`], and [`MappingError::NoFile`] if there is no file whose
    /// permissions could be set.
    pub fn limited(mut self, limits: impl Into<Arc<Limits>>) -> Result<Self, MappingError> {
        let limits = limits.into();
        if self.protocols.contains(Protocol::Sctp)
            && let Some(option) = limits.not_of_sctp()
        {
            return Err(MappingError::NotOfSctp(option));
        }
        if let (BackendHost::Unix(_), Some(option)) = (&self.backend, limits.not_of_unix()) {
            return Err(MappingError::NotOfUnix(option));
        }
        if let (HostAddr::Unix(_), Some(option)) = (&self.host, limits.not_at_unix()) {
            return Err(MappingError::NotAtUnix(option));
        }
        if limits.socket.is_some() && self.host.unix_addr().and_then(UnixAddr::path).is_none() {
            return Err(MappingError::NoFile(self.host.clone()));
        }
        if let (Source::Address(ip), BackendHost::Ip(backend)) = (limits.source, &self.backend)
            && !limits.source.reaches(backend.ip())
        {
            return Err(MappingError::Source(SourceError::Family { ip, backend: backend.ip() }));
        }
        self.limits = if limits == *DEFAULT_LIMITS { DEFAULT_LIMITS.clone() } else { limits };
        Ok(self)
    }

    /// As [`Self::limited`], but without what its protocol cannot have, and if their source address cannot reach the backend,
    /// the kernel chooses another one.
    #[must_use]
    pub fn limited_in_family(self, limits: Limits) -> Self {
        let limits = if self.protocols.contains(Protocol::Sctp) { limits.of_sctp() } else { limits };
        match self.clone().limited(limits.clone()) {
            Ok(limited) => limited,
            Err(_other_family) => {
                Self { limits: Arc::new(Limits { source: Source::Auto, ..limits }), ..self }
            }
        }
    }

    /// Returns the mapping with another backend.
    ///
    /// # Errors
    /// Those of [`Mapping::new`].
    pub fn retargeted(&self, backend: BackendHost, backend_ports: PortRange) -> Result<Self, MappingError> {
        let host = (self.host.clone(), self.host_ports.range());
        let retargeted =
            Self::new(self.protocols, host, (backend, backend_ports))?.limited(self.limits.clone())?;
        Ok(Self { name: self.name.clone(), v6only: self.v6only, at: self.at.clone(), ..retargeted })
    }

    /// Returns the mapping with what the name of its backend stands for, as far as it can be used. Without a name, it is the
    /// same.
    #[must_use]
    pub fn resolved(&self, addresses: &[IpAddr]) -> Self {
        Self { backend: self.backend.resolved(addresses, self.limits.source), ..self.clone() }
    }

    /// Returns the mapping with those addresses of its name that do not lead back to it.
    #[must_use]
    pub fn leading_to(&self, addresses: &[IpAddr]) -> Self {
        if addresses.is_empty() {
            return Self { backend: self.backend.leading_nowhere(NoAddress::Loop), ..self.clone() };
        }
        self.resolved(addresses)
    }

    /// Returns the mapping listening at what its interface has now. At an address, it is the same.
    #[must_use]
    pub fn listening_at(&self, addresses: &[ScopedIp]) -> Self {
        let at = self.interface().map(|_name| InterfaceAddrs(addresses.into()));
        Self { at: at.unwrap_or_default(), ..self.clone() }
    }

    /// Its explicit name, or its [default name](Name::of).
    pub fn name(&self) -> Name {
        self.name.clone().unwrap_or_else(|| Name::of(self))
    }

    /// Its explicit name.
    pub fn given_name(&self) -> Option<&Name> {
        self.name.as_ref()
    }

    /// The transport protocols, the same for host and backend.
    pub fn protocols(&self) -> Protocols {
        self.protocols
    }

    /// Where clients connect to, as asked for.
    pub fn host(&self) -> &HostAddr {
        &self.host
    }

    /// The interface whose addresses clients connect to, if it was asked for.
    pub fn interface(&self) -> Option<InterfaceName> {
        self.host.interface()
    }

    /// The addresses that clients connect to: one, or as many as the interface has, as far as known; none of a Unix socket.
    pub fn addresses(&self) -> &[ScopedIp] {
        match &self.host {
            HostAddr::Ip(ip) => std::slice::from_ref(ip),
            HostAddr::Interface(_) => &self.at.0,
            HostAddr::Unix(_) => &[],
        }
    }

    /// The ports that clients connect to.
    pub fn host_ports(&self) -> HostPorts {
        self.host_ports
    }

    /// The backend's address or name.
    pub fn backend(&self) -> &BackendHost {
        &self.backend
    }

    /// The backend's ports.
    pub fn backend_ports(&self) -> PortRange {
        self.backend_ports
    }

    /// The backend and its ports.
    pub fn backend_spec(&self) -> BackendSpec {
        BackendSpec { host: self.backend.clone(), ports: self.backend_ports }
    }

    /// The backend's ports in the text of a mapping, or `unix`.
    fn backend_part(&self) -> String {
        match self.backend {
            BackendHost::Unix(_) => "unix".to_owned(),
            _ => self.backend_ports.to_string(),
        }
    }

    /// Whether an IPv6 wildcard excludes IPv4 clients.
    pub fn is_v6only(&self) -> bool {
        self.v6only
    }

    /// The limits of its connections and flows.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The same, to share.
    pub fn shared_limits(&self) -> Arc<Limits> {
        self.limits.clone()
    }

    /// The number of sockets it listens on.
    pub fn sockets(&self) -> usize {
        let places = if self.host.unix_addr().is_some() { 1 } else { self.addresses().len() };
        places * self.sockets_per_address()
    }

    /// The number of sockets that it listens on at each address.
    pub fn sockets_per_address(&self) -> usize {
        self.backend_ports.count() * self.protocols.iter().count()
    }

    /// Its single ports: address by address, of each TCP first. The host port is 0 if it is not chosen yet.
    pub fn port_mappings(&self) -> impl Iterator<Item = PortMapping> {
        let at_unix = self.host.unix_addr().map(|addr| PortMapping {
            protocol: Protocol::Tcp,
            host: addr.clone().into(),
            backend: self.backend.at(self.backend_ports.first()),
            v6only: false,
        });
        at_unix.into_iter().chain(self.addresses().iter().flat_map(|ip| self.port_mappings_at(*ip)))
    }

    /// Its single ports at one of its addresses.
    pub fn port_mappings_at(&self, ip: ScopedIp) -> impl Iterator<Item = PortMapping> {
        self.protocols.iter().flat_map(move |protocol| {
            let ports = self.backend_ports.iter().enumerate();
            ports.map(move |(index, port)| self.port_mapping(ip, protocol, self.exact_port(index), port))
        })
    }

    /// One port of the mapping, from the chosen `host_port` of `ip` to `backend_port`.
    pub fn port_mapping(
        &self,
        ip: ScopedIp,
        protocol: Protocol,
        host_port: u16,
        backend_port: u16,
    ) -> PortMapping {
        PortMapping {
            protocol,
            host: HostSocketAddr::new(ip, host_port),
            backend: self.backend.at(backend_port),
            v6only: self.v6only,
        }
    }

    /// The host port for the backend port at `index`, or 0 if it is not chosen yet.
    fn exact_port(&self, index: usize) -> u16 {
        match self.host_ports {
            HostPorts::Exactly(range) => range.iter().nth(index).unwrap_or(0),
            HostPorts::FirstFree(_) | HostPorts::Random => 0,
        }
    }
}

impl fmt::Display for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, host_ports, protocols, .. } = self;
        let backend = self.backend_part();
        match host_ports.range() {
            _ if host.unix_addr().is_some() => write!(f, "{host}:{backend}/{protocols}"),
            Some(range) => write!(f, "{host}:{range}:{backend}/{protocols}"),
            None => write!(f, "{host}::{backend}/{protocols}"),
        }
    }
}

/// Refuses what a mapping cannot have that listens on a Unix socket.
fn refuse_at_unix(
    protocols: Protocols,
    host_ports: Option<PortRange>,
    backend_ports: PortRange,
) -> Result<(), MappingError> {
    if protocols != Protocols::One(Protocol::Tcp) {
        return Err(MappingError::NotByUnix(protocols));
    }
    if host_ports != Some(PortRange::OF_UNIX) {
        return Err(MappingError::PortsAtUnix);
    }
    if backend_ports.is_single() { Ok(()) } else { Err(MappingError::SeveralAtUnix(backend_ports)) }
}

/// Why a mapping is not valid. The message suggests a correction.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MappingError {
    /// Ranges of different lengths.
    #[error(
        "{} host ports ({host}) do not fit {} backend ports ({backend}); make both ranges equally long",
        host.count(), backend.count()
    )]
    Lengths {
        /// The host ports.
        host: PortRange,
        /// The backend ports.
        backend: PortRange,
    },
    /// Ports to choose, for the addresses of an interface.
    #[error(
        "the addresses of the interface {0} come and go, and each needs the same ports: write one host port for each \
         backend port, as in %{0}:80"
    )]
    InterfacePorts(InterfaceName),
    /// The backend's address is not that of one machine.
    #[error(transparent)]
    Backend(#[from] AddrError),
    /// `v6only` with an address for which it has no meaning.
    #[error("v6only is for [::], and the host address is {0}")]
    V6Only(HostAddr),
    /// The source address cannot reach the backend.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A protocol that cannot be relayed to or from a Unix socket.
    #[error("only tcp can be relayed to or from a Unix socket, and not {0}")]
    NotByUnix(Protocols),
    /// Ports at a Unix socket.
    #[error("a Unix socket has no ports to listen on; leave them out")]
    PortsAtUnix,
    /// Several backend ports for a Unix socket.
    #[error(
        "a Unix socket stands for one port of the backend, and not for {0}; give each port a socket of its own"
    )]
    SeveralAtUnix(PortRange),
    /// An option that a mapping at a Unix socket cannot have.
    #[error("a mapping that listens on a Unix socket has no {0}; have it for other mappings alone")]
    NotAtUnix(&'static str),
    /// Permissions without a file.
    #[error(
        "socket_mode, socket_user and socket_group are for the file of a Unix socket, and the host {0} has none"
    )]
    NoFile(HostAddr),
    /// An option that a connection to a Unix socket cannot have.
    #[error("a connection to a Unix socket has no {0}; have it for other mappings alone")]
    NotOfUnix(String),
    /// An option that SCTP cannot have.
    #[error("sctp has no {0}; leave it out for this mapping, or relay tcp")]
    NotOfSctp(&'static str),
}

/// One port of a mapping, as served by one socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortMapping {
    /// The transport protocol, the same for host and backend.
    pub protocol: Protocol,
    /// The address that clients connect to.
    pub host: HostSocketAddr,
    /// The backend.
    pub backend: BackendAddr,
    /// Whether an IPv6 wildcard excludes IPv4 clients (`IPV6_V6ONLY`, ipv6(7)).
    pub v6only: bool,
}

impl PortMapping {
    /// Whether TCP goes on to the backend, which is not so for a Unix socket.
    pub fn is_tcp_to_backend(&self) -> bool {
        self.protocol == Protocol::Tcp && self.backend.unix_addr().is_none()
    }

    /// The same with another address of the backend.
    #[must_use]
    pub fn at(&self, ip: IpAddr) -> Self {
        let port = self.backend.socket_addr().port();
        let backend = BackendAddr::new(ip, port).expect("the port of a backend is not 0");
        Self { backend, ..self.clone() }
    }
}

impl fmt::Display for PortMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} -> {}", self.host, self.protocol, self.backend)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(host: &str, host_ports: &str, backend: &str, ports: &str) -> Result<Mapping, MappingError> {
        let host_ports = (!host_ports.is_empty()).then(|| host_ports.parse().unwrap());
        let backend = (backend.parse().unwrap(), ports.parse().unwrap());
        Mapping::new(Protocols::Both, (host.parse().unwrap(), host_ports), backend)
    }

    fn refused(host: &str, host_ports: &str, backend: &str, ports: &str) -> String {
        mapping(host, host_ports, backend, ports).expect_err(host).to_string()
    }

    #[test]
    fn a_range_pairs_up_port_by_port_for_each_protocol() {
        let range = mapping("[::]", "8000-8002", "10.0.0.1", "80-82").unwrap();
        let port_mappings: Vec<_> =
            range.port_mappings().map(|port_mapping| port_mapping.to_string()).collect();
        assert_eq!(range.sockets(), port_mappings.len());
        assert_eq!(port_mappings[0], "[::]:8000/tcp -> 10.0.0.1:80");
        assert_eq!(port_mappings[5], "[::]:8002/udp -> 10.0.0.1:82");
        assert_eq!(range.to_string(), "[::]:8000-8002:80-82/tcp+udp");
    }

    #[test]
    fn ports_that_are_yet_to_be_chosen_are_zero() {
        for host_ports in ["", "8000-8010"] {
            let mapping = mapping("10.0.0.11", host_ports, "10.0.0.1", "80").unwrap();
            assert!(mapping.port_mappings().all(|port_mapping| port_mapping.host.port() == Some(0)));
            assert_eq!(mapping.sockets(), 2);
        }
    }

    #[test]
    fn a_retargeted_mapping_keeps_all_but_its_backend() {
        let before = mapping("[::]", "80", "10.0.0.1", "80").unwrap().v6only().unwrap();
        let before = before.named("web".parse().unwrap());
        let after = before.retargeted("10.0.0.2".parse().unwrap(), "8080".parse().unwrap()).unwrap();
        assert_eq!(after.to_string(), "[::]:80:8080/tcp+udp");
        assert_eq!(after.name().to_string(), "web");
        assert!(after.is_v6only());
    }

    fn at_unix(proto: &str, ports: Option<PortRange>, to_ports: &str) -> Result<Mapping, MappingError> {
        let (host, backend) = ("unix:/run/front.sock".parse().unwrap(), "10.0.0.1".parse().unwrap());
        Mapping::new(proto.parse().unwrap(), (host, ports), (backend, to_ports.parse().unwrap()))
    }

    #[test]
    fn a_unix_socket_stands_for_one_port() {
        let mapping = at_unix("tcp", Some(PortRange::OF_UNIX), "80").unwrap();
        let sockets: Vec<_> = mapping.port_mappings().map(|port_mapping| port_mapping.to_string()).collect();
        assert_eq!(sockets, ["unix:/run/front.sock/tcp -> 10.0.0.1:80"]);
        assert_eq!((mapping.sockets(), mapping.addresses().len()), (1, 0));
        assert_eq!(mapping.to_string(), "unix:/run/front.sock:80/tcp");
        assert_eq!(mapping.name().as_str(), "unix:/run/front.sock");
        let one = Some(PortRange::OF_UNIX);
        for (refused, part) in [
            (at_unix("udp", one, "80"), "only tcp"),
            (at_unix("tcp+udp", one, "80"), "only tcp"),
            (at_unix("sctp", one, "80"), "only tcp"),
            (at_unix("tcp", "80".parse().ok(), "80"), "no ports to listen on"),
            (at_unix("tcp", None, "80"), "no ports to listen on"),
            (at_unix("tcp", one, "80-81"), "not for 80-81"),
        ] {
            let message = refused.unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn an_interface_has_the_ports_at_each_of_its_addresses() {
        let before = mapping("%eth0", "8000-8001", "10.0.0.1", "80-81").unwrap();
        assert_eq!((before.sockets(), before.to_string().as_str()), (0, "%eth0:8000-8001:80-81/tcp+udp"));
        let addresses = ["10.0.0.11", "[fe80::1%2]"].map(|ip| ip.parse().unwrap());
        let after = before.listening_at(&addresses);
        assert_eq!((after.sockets(), after.sockets_per_address()), (8, 4));
        assert_eq!(after, before, "what an interface has is not what was asked for");
        let ports: Vec<String> = after.port_mappings().map(|port| port.host.to_string()).collect();
        assert_eq!(ports[..2], ["10.0.0.11:8000", "10.0.0.11:8001"]);
        assert_eq!(ports[7], "[fe80::1%2]:8001");
        let retargeted = after.retargeted("10.0.0.2".parse().unwrap(), "90-91".parse().unwrap()).unwrap();
        assert_eq!(retargeted.addresses(), addresses);
        let one = mapping("10.0.0.11", "80", "10.0.0.1", "80").unwrap();
        assert_eq!(one.listening_at(&addresses).addresses(), ["10.0.0.11".parse().unwrap()]);
    }

    #[test]
    fn what_cannot_work_is_refused() {
        for host_ports in ["", "8000-8010"] {
            assert!(refused("%eth0", host_ports, "10.0.0.1", "80").contains("as in %eth0:80"));
        }
        assert!(refused("[::]", "80-81", "10.0.0.1", "80-82").contains("2 host ports (80-81) do not fit 3"));
        assert!(refused("[::]", "80", "0.0.0.0", "80").contains("write 127.0.0.1"));
        assert!(refused("[::]", "80", "255.255.255.255", "80").contains("is a broadcast address"));
        for group in ["224.0.0.251", "ff02::fb"] {
            assert!(refused("[::]", "80", group, "80").contains("is the address of a group"));
        }
        let v4 = mapping("0.0.0.0", "80", "10.0.0.1", "80").unwrap();
        assert!(v4.v6only().unwrap_err().to_string().contains("v6only is for [::]"));
    }
}
