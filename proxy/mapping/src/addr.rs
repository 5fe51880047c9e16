//! Addresses by role: where a mapping listens and where it forwards to.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::interfaces::{Interfaces, NoInterfaces};
use crate::ports::{PortError, PortRange};
use crate::unix::{UnixAddr, UnixAddrError};

/// The transport protocol of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP: a byte stream per connection.
    Tcp,
    /// UDP: datagrams, grouped into flows.
    Udp,
    /// SCTP: messages in streams of a connection, as one-to-one sockets have it (RFC 6458, section 4).
    Sctp,
}

impl Protocol {
    /// All protocols, in the order in which a mapping lists its ports.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// Whether clients connect, and are accepted.
    pub fn has_connections(self) -> bool {
        self != Self::Udp
    }

    /// Its name, as after the port in `80/tcp`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The transport protocols of a mapping: one, or both at the same ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocols {
    /// One protocol.
    One(Protocol),
    /// TCP and UDP, written `tcp+udp`, as DNS servers need.
    Both,
}

impl Protocols {
    /// The protocols in order, TCP first.
    pub fn iter(self) -> impl Iterator<Item = Protocol> {
        Protocol::ALL.into_iter().filter(move |protocol| self.contains(*protocol))
    }

    /// Whether `protocol` is included.
    pub fn contains(self, protocol: Protocol) -> bool {
        match self {
            Self::One(one) => one == protocol,
            Self::Both => protocol != Protocol::Sctp,
        }
    }
}

impl fmt::Display for Protocols {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(protocol) => protocol.fmt(f),
            Self::Both => f.write_str("tcp+udp"),
        }
    }
}

impl FromStr for Protocols {
    type Err = ProtocolError;

    fn from_str(text: &str) -> Result<Self, ProtocolError> {
        match text {
            "tcp" => Ok(Self::One(Protocol::Tcp)),
            "udp" => Ok(Self::One(Protocol::Udp)),
            "sctp" => Ok(Self::One(Protocol::Sctp)),
            "tcp+udp" | "udp+tcp" => Ok(Self::Both),
            _ => Err(ProtocolError(text.to_owned())),
        }
    }
}

/// The name of a protocol that is not supported.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a protocol that is relayed; write tcp, udp, sctp or tcp+udp")]
pub struct ProtocolError(String);

/// An IP address. A link-local IPv6 address includes its interface (its zone, RFC 4007).
///
/// Its text forms are `10.0.0.11`, `[fd00::1]`, `fd00::1` and `[fe80::1%eth0]`. An IPv4-mapped IPv6 address becomes the
/// IPv4 address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ScopedIp {
    ip: IpAddr,
    zone: u32,
}

impl ScopedIp {
    /// Every address of the machine, IPv4 and IPv6, as one dual-stack socket listens on.
    pub const ANY: Self = Self { ip: IpAddr::V6(Ipv6Addr::UNSPECIFIED), zone: 0 };
    /// Every IPv4 address of the machine.
    pub const ANY_V4: Self = Self { ip: IpAddr::V4(Ipv4Addr::UNSPECIFIED), zone: 0 };

    /// An IPv6 address without a zone.
    pub const fn of_v6(ip: Ipv6Addr) -> Self {
        Self { ip: IpAddr::V6(ip), zone: 0 }
    }

    /// The address without its zone.
    pub fn ip(self) -> IpAddr {
        self.ip
    }

    /// The index of its interface, or 0 without one.
    pub fn zone(self) -> u32 {
        self.zone
    }

    /// The socket address of this address and `port`.
    pub fn at(self, port: u16) -> SocketAddr {
        match self.ip {
            IpAddr::V4(ip) => (ip, port).into(),
            IpAddr::V6(ip) => SocketAddrV6::new(ip, port, 0, self.zone).into(),
        }
    }

    /// Refuses an address that clients cannot connect to. Multicast and broadcast addresses are valid, because
    /// datagrams can be sent to them.
    ///
    /// # Errors
    /// [`AddrError::NoClient`]
    pub fn ensure_connectable(self, protocols: Protocols) -> Result<(), AddrError> {
        let kind = match self.ip {
            IpAddr::V4(Ipv4Addr::BROADCAST) => "a broadcast address",
            ip if ip.is_multicast() => "the address of a group (multicast)",
            _ => return Ok(()),
        };
        if protocols.iter().any(Protocol::has_connections) {
            Err(AddrError::NoClient(self, kind))
        } else {
            Ok(())
        }
    }

    /// Whether it is a wildcard, of one family or of both.
    pub fn is_wildcard(self) -> bool {
        self.ip.is_unspecified()
    }
}

impl From<IpAddr> for ScopedIp {
    fn from(ip: IpAddr) -> Self {
        SocketAddr::new(ip, 0).into()
    }
}

impl From<SocketAddr> for ScopedIp {
    fn from(addr: SocketAddr) -> Self {
        let addr = canonical(addr);
        let zone = match addr {
            SocketAddr::V4(_) => 0,
            SocketAddr::V6(addr) => addr.scope_id(),
        };
        Self { ip: addr.ip(), zone }
    }
}

impl fmt::Display for ScopedIp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self { ip: IpAddr::V4(ip), .. } => ip.fmt(f),
            Self { ip: IpAddr::V6(ip), zone: 0 } => write!(f, "[{ip}]"),
            Self { ip: IpAddr::V6(ip), zone } => write!(f, "[{ip}%{zone}]"),
        }
    }
}

impl ScopedIp {
    /// Parses any of the text forms. Interfaces are indexes, or names among `interfaces`.
    ///
    /// # Errors
    /// [`AddrError`] for an invalid address, or a link-local one without an existing interface.
    pub fn parse(text: &str, interfaces: &dyn Interfaces) -> Result<Self, AddrError> {
        let bare = match text.strip_prefix('[') {
            Some(rest) => rest.strip_suffix(']').ok_or_else(|| AddrError::BadAddress(text.to_owned()))?,
            None => text,
        };
        parse_ip(bare, interfaces).map(Self::from)
    }
}

/// Parses what [`Display`](fmt::Display) writes, with interfaces as indexes. [`ScopedIp::parse`] also accepts their
/// names.
impl FromStr for ScopedIp {
    type Err = AddrError;

    fn from_str(text: &str) -> Result<Self, AddrError> {
        Self::parse(text, &NoInterfaces)
    }
}

/// The address of a socket, of any family that is relayed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SockAddr {
    /// An IP address and a port.
    Inet(SocketAddr),
    /// A Unix socket.
    Unix(UnixAddr),
}

impl fmt::Display for SockAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inet(addr) => addr.fmt(f),
            Self::Unix(addr) => addr.fmt(f),
        }
    }
}

/// The address and port that clients connect to; port 0 asks the kernel for a free one.
///
/// Its text forms are `0.0.0.0:80`, `[::]:80`, netstat's `:::80`, and `unix:/run/front.sock` for a Unix socket. An IPv4-mapped
/// IPv6 address becomes the IPv4 address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostSocketAddr(SockAddr);

impl HostSocketAddr {
    /// The host address with `ip` and `port`.
    pub fn new(ip: impl Into<ScopedIp>, port: u16) -> Self {
        Self(SockAddr::Inet(ip.into().at(port)))
    }

    /// What to bind.
    pub fn sockaddr(&self) -> &SockAddr {
        &self.0
    }

    /// The IP address and port to bind; `None` for a Unix socket.
    pub fn inet_addr(&self) -> Option<SocketAddr> {
        match self.0 {
            SockAddr::Inet(addr) => Some(addr),
            SockAddr::Unix(_) => None,
        }
    }

    /// The port to bind; `None` for a Unix socket.
    pub fn port(&self) -> Option<u16> {
        self.inet_addr().map(|addr| addr.port())
    }

    /// The Unix socket, if it is one.
    pub fn unix_addr(&self) -> Option<&UnixAddr> {
        match &self.0 {
            SockAddr::Inet(_) => None,
            SockAddr::Unix(addr) => Some(addr),
        }
    }
}

impl From<SocketAddr> for HostSocketAddr {
    fn from(addr: SocketAddr) -> Self {
        Self(SockAddr::Inet(canonical(addr)))
    }
}

impl From<UnixAddr> for HostSocketAddr {
    fn from(addr: UnixAddr) -> Self {
        Self(SockAddr::Unix(addr))
    }
}

impl fmt::Display for HostSocketAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The backend's address, to which connections and datagrams are forwarded: an IP address and a port, or a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct BackendAddr(SockAddr);

impl BackendAddr {
    /// The backend address with `ip` and `port`.
    ///
    /// # Errors
    /// [`AddrError::ZeroPort`], because port 0 cannot be reached.
    pub fn new(ip: impl Into<ScopedIp>, port: u16) -> Result<Self, AddrError> {
        Self::try_from(ip.into().at(port))
    }

    /// The backend at `addr`, which must be the address of one machine.
    ///
    /// # Errors
    /// [`AddrError::NoOne`] for a wildcard address, and the errors of [`BackendAddr::new`] and [`BackendAddr::of_one`].
    pub fn reachable(addr: SocketAddr) -> Result<Self, AddrError> {
        let backend = Self::try_from(addr)?.of_one()?;
        match addr.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => Err(AddrError::NoOne("0.0.0.0", "127.0.0.1")),
            IpAddr::V6(ip) if ip.is_unspecified() => Err(AddrError::NoOne("[::]", "[::1]")),
            _ => Ok(backend),
        }
    }

    /// Returns this address, unless it is a multicast or broadcast address. Replies would never come from such an
    /// address: the members of a group reply from their own addresses, and a connected socket does not receive those.
    ///
    /// # Errors
    /// [`AddrError::Broadcast`] and [`AddrError::Group`]
    pub fn of_one(self) -> Result<Self, AddrError> {
        match self.socket_addr().ip() {
            IpAddr::V4(Ipv4Addr::BROADCAST) => Err(AddrError::Broadcast(self.host())),
            ip if ip.is_multicast() => Err(AddrError::Group(self.host())),
            _ => Ok(self),
        }
    }

    /// The address without the port.
    pub fn host(&self) -> ScopedIp {
        self.socket_addr().into()
    }

    /// The IP address and port to connect to. A Unix socket, to which only TCP is relayed, has none:
    /// [`ScopedIp::NOWHERE`].
    pub fn socket_addr(&self) -> SocketAddr {
        match self.0 {
            SockAddr::Inet(addr) => addr,
            SockAddr::Unix(_) => ScopedIp::NOWHERE.at(1),
        }
    }

    /// The Unix socket, if it is one.
    pub fn unix_addr(&self) -> Option<&UnixAddr> {
        match &self.0 {
            SockAddr::Inet(_) => None,
            SockAddr::Unix(addr) => Some(addr),
        }
    }
}

impl From<UnixAddr> for BackendAddr {
    fn from(addr: UnixAddr) -> Self {
        Self(SockAddr::Unix(addr))
    }
}

impl TryFrom<SocketAddr> for BackendAddr {
    type Error = AddrError;

    fn try_from(addr: SocketAddr) -> Result<Self, AddrError> {
        if addr.port() == 0 {
            return Err(AddrError::ZeroPort);
        }
        Ok(Self(SockAddr::Inet(canonical(addr))))
    }
}

impl fmt::Display for BackendAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why a text is not an address and port. The message suggests a valid form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddrError {
    /// The text is empty.
    #[error("it is empty; write an address and a port, as in 172.17.0.2:80")]
    Empty,
    /// An address without a port.
    #[error("the port is missing; write it as {0}:80")]
    MissingPort(String),
    /// Neither an address nor a name.
    #[error(
        "'{0}' is neither an IP address nor the name of a host; write it as 172.17.0.2, [fd00::2] or web.internal"
    )]
    BadHost(String),
    /// A URL, which says more than where to connect.
    #[error("'{url}' is a URL; write {backend}, and leave the rest to whoever connects")]
    Url {
        /// The URL.
        url: String,
        /// Its host and port.
        backend: String,
    },
    /// The address of a Unix socket is wrong.
    #[error(transparent)]
    Unix(#[from] UnixAddrError),
    /// What looks like a Unix socket.
    #[error("'{0}' is not an address; if it is a Unix socket, write unix:{0}")]
    BareUnix(String),
    /// A Unix socket that cannot be part of the name of a mapping.
    #[error(
        "to listen on '{0}', write its path in letters, digits and ._:/+%#@[]-: it is the default name of its mapping"
    )]
    UnixHost(UnixAddr),
    /// Ports to listen on, without an address.
    #[error("the address is missing; write 0.0.0.0:{0}, or [::]:{0} for IPv6 too")]
    NoHostAddress(String),
    /// A `*` for all addresses.
    #[error("'*' is not an IP address; for all addresses write 0.0.0.0:{0}, or [::]:{0} for IPv6 too")]
    Star(String),
    /// Ports of a backend, without an address.
    #[error("the address is missing; write the backend's too, as in 172.17.0.2:{0}")]
    NoBackendAddress(PortRange),
    /// The ports are invalid.
    #[error(transparent)]
    Port(#[from] PortError),
    /// Port 0 where a fixed port is required.
    #[error("port 0 cannot be forwarded to; write the port that the backend listens on")]
    ZeroPort,
    /// The host part is not an IP address.
    #[error("'{0}' is not an IP address; write one in its place, such as 127.0.0.1 or [::1]")]
    BadAddress(String),
    /// The same, and it may be meant as an interface.
    #[error(
        "'{0}' is not an IP address; write one in its place, such as 127.0.0.1 or [::1], or %{1} for those of an interface"
    )]
    PerhapsInterface(String, String),
    /// An IPv6 address without brackets, whose last group may be a port.
    #[error("an IPv6 address needs brackets before its port; write {ip}:{ports}")]
    Unbracketed {
        /// The address, if the last group is the port.
        ip: ScopedIp,
        /// The last group.
        ports: String,
    },
    /// A link-local address without an interface; each interface may have this address.
    #[error("{ip} is a link-local address: on which interface? write {example}; `ip link` lists them")]
    NoZone {
        /// The address.
        ip: Ipv6Addr,
        /// The address with an interface of this machine.
        example: String,
    },
    /// A wildcard address where a single one is required.
    #[error(
        "{0} is where one listens, not the address of a backend; write {1} in its place, for this machine"
    )]
    NoOne(&'static str, &'static str),
    /// An address that clients cannot connect to.
    #[error("{0} is {1}, to which no client can connect; write an address of this machine, or udp")]
    NoClient(ScopedIp, &'static str),
    /// Not the name of an interface.
    #[error(
        "'{0}' is not the name of an interface: at most 15 letters, digits or any of ._+%#@-; write it as in %eth0"
    )]
    BadInterface(String),
    /// A broadcast address.
    #[error("{0} is a broadcast address, from which no answer comes; write that of one machine")]
    Broadcast(ScopedIp),
    /// A multicast address.
    #[error(
        "{0} is the address of a group (multicast), from which no answer comes; write that of one machine"
    )]
    Group(ScopedIp),
    /// The part after `%` is not the name of an interface.
    #[error("'{0}' is not a network interface of this machine; `ip link` lists them")]
    NoSuchInterface(String),
}

impl AddrError {
    /// The same error where an interface would not do.
    #[must_use]
    pub fn of_address(self) -> Self {
        match self {
            Self::PerhapsInterface(text, _name) => Self::BadAddress(text),
            other => other,
        }
    }

    /// The same error for an address that is followed by `ports`.
    pub fn before_ports(self, ports: &str) -> Self {
        match self {
            Self::NoZone { ip, example } => Self::NoZone { ip, example: format!("{example}:{ports}") },
            other => other,
        }
    }
}

/// Parses an address without brackets, including IPv6 link-local addresses with `%interface`.
fn parse_ip(address: &str, interfaces: &dyn Interfaces) -> Result<SocketAddr, AddrError> {
    let bad_address = || AddrError::BadAddress(address.to_owned());
    let Some((ip, interface)) = address.split_once('%') else {
        let ip = address.parse().map_err(|_err| bad_address())?;
        return match ip {
            IpAddr::V6(ip) if ip.is_unicast_link_local() => {
                let interface = interfaces.example().unwrap_or_else(|| "eth0".to_owned());
                Err(AddrError::NoZone { ip, example: format!("[{ip}%{interface}]") })
            }
            ip => Ok(SocketAddr::new(ip, 0)),
        };
    };
    let ip: Ipv6Addr = ip.parse().map_err(|_err| bad_address())?;
    // A name may consist of digits.
    let number =
        || interface.bytes().all(|byte| byte.is_ascii_digit()).then(|| interface.parse().ok()).flatten();
    let scope = interfaces.index_of(interface).or_else(number).filter(|index| *index > 0);
    let scope = scope.ok_or_else(|| AddrError::NoSuchInterface(interface.to_owned()))?;
    Ok(SocketAddrV6::new(ip, 0, 0, scope).into())
}

/// The wildcard of the family of an address.
pub fn wildcard_of(ip: IpAddr) -> IpAddr {
    if ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

/// Converts IPv4-mapped addresses to IPv4: an IPv6 socket with `IPV6_V6ONLY` can neither bind nor reach them, and users
/// know the IPv4 clients of a dual-stack socket by their IPv4 addresses.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    match addr.ip().to_canonical() {
        IpAddr::V4(ip) => SocketAddr::new(ip.into(), addr.port()),
        IpAddr::V6(_) => addr,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interfaces::TwoInterfaces;

    #[test]
    fn zones_are_indexes_or_names() {
        let read = |text: &str| ScopedIp::parse(text, &TwoInterfaces).map(|ip| ip.to_string());
        for text in ["fe80::1%eth0", "[fe80::1%eth0]", "[fe80::1%2]"] {
            assert_eq!(read(text).as_deref(), Ok("[fe80::1%2]"), "{text}");
        }
        for text in ["fe80::1%+2", "fe80::1%", "fe80::1%0", "fe80::1%4294967296"] {
            assert!(matches!(read(text), Err(AddrError::NoSuchInterface(_))), "{text}");
        }
        assert_eq!(read("fe80::1%eth1"), Err(AddrError::NoSuchInterface("eth1".to_owned())));
        "fe80::1%eth0".parse::<ScopedIp>().unwrap_err();
        assert_eq!("fe80::1%2".parse::<ScopedIp>().unwrap().to_string(), "[fe80::1%2]");
    }

    #[test]
    fn the_hint_at_an_interface_can_be_followed() {
        for text in ["fe80::1", "[fe80::1]", "febf::1"] {
            let Err(AddrError::NoZone { example, .. }) = ScopedIp::parse(text, &TwoInterfaces) else {
                panic!("{text}")
            };
            assert!(ScopedIp::parse(&example, &TwoInterfaces).is_ok(), "{example}");
        }
    }
}
