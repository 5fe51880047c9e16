//! Addresses by role: where a mapping listens and where it forwards to.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::str::FromStr;

/// The transport protocol of a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP: a byte stream per connection.
    Tcp,
    /// UDP: datagrams, grouped into flows.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// The address and port that clients connect to; port 0 asks the kernel for a free one.
///
/// Its text forms are `0.0.0.0:80`, `[::]:80`, and netstat's `:::80`. An IPv4-mapped IPv6 address
/// becomes the IPv4 address that it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostAddr(SocketAddr);

impl HostAddr {
    /// The host address made of `ip` and `port`.
    pub fn new(ip: IpAddr, port: u16) -> Self {
        Self(canonical(SocketAddr::new(ip, port)))
    }

    /// The socket address to bind.
    pub fn socket_addr(self) -> SocketAddr {
        self.0
    }

    /// Whether connecting to `backend` from this machine would come back to this address.
    pub fn is_reached_by(self, backend: BackendAddr) -> bool {
        let (host, to) = (self.0, backend.0);
        let same_machine = to.ip() == host.ip()
            || host.ip().is_unspecified() && (to.ip().is_loopback() || to.ip().is_unspecified());
        let same_family = host.is_ipv6() && host.ip().is_unspecified() || host.is_ipv4() == to.is_ipv4();
        host.port() != 0 && host.port() == to.port() && same_machine && same_family
    }
}

impl fmt::Display for HostAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for HostAddr {
    type Err = AddrError;

    fn from_str(text: &str) -> Result<Self, AddrError> {
        parse(text).map(Self)
    }
}

/// The address and port that connections and datagrams are forwarded to, the container's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BackendAddr(SocketAddr);

impl BackendAddr {
    /// The backend address made of `ip` and `port`.
    ///
    /// # Errors
    /// [`AddrError::ZeroPort`]: nothing can be reached on port 0.
    pub fn new(ip: IpAddr, port: u16) -> Result<Self, AddrError> {
        Self::try_from(SocketAddr::new(ip, port))
    }

    /// The socket address to connect to.
    pub fn socket_addr(self) -> SocketAddr {
        self.0
    }
}

impl TryFrom<SocketAddr> for BackendAddr {
    type Error = AddrError;

    fn try_from(addr: SocketAddr) -> Result<Self, AddrError> {
        if addr.port() == 0 {
            return Err(AddrError::ZeroPort);
        }
        Ok(Self(canonical(addr)))
    }
}

impl fmt::Display for BackendAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for BackendAddr {
    type Err = AddrError;

    fn from_str(text: &str) -> Result<Self, AddrError> {
        parse(text)?.try_into()
    }
}

/// Why a text is not an address and port; the message says what would work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddrError {
    /// There is an address but no port.
    #[error("the port is missing; write it as {0}")]
    MissingPort(String),
    /// There is a port but no address.
    #[error("the address is missing; write 0.0.0.0:{0}, or [::]:{0} for IPv6 too")]
    MissingAddress(u16),
    /// The port is not a number that fits.
    #[error("'{0}' is not a port; ports are numbers from 0 to 65535")]
    BadPort(String),
    /// Port 0 where a real one is needed.
    #[error("port 0 cannot be forwarded to; write the port that the backend listens on")]
    ZeroPort,
    /// The host part is no IP address.
    #[error("'{0}' is not an IP address; write one such as 127.0.0.1 or [::1]")]
    BadAddress(String),
    /// An IPv6 address without brackets, which may or may not end in a port.
    #[error("an IPv6 address needs brackets before its port; write [{ip}]:{port}")]
    Unbracketed {
        /// The address, if the last group is the port.
        ip: Ipv6Addr,
        /// The last group.
        port: u16,
    },
    /// The part after `%` names no interface.
    #[error("'{0}' is not a network interface of this machine; `ip link` lists them")]
    NoSuchInterface(String),
}

/// Parses `ADDRESS:PORT` into a canonical socket address.
fn parse(text: &str) -> Result<SocketAddr, AddrError> {
    let (address, port) = match text.strip_prefix('[') {
        Some(rest) => split_brackets(rest)?,
        None => split_bare(text)?,
    };
    let port = port.parse().map_err(|_err| AddrError::BadPort(port.to_owned()))?;
    if address.is_empty() {
        return Err(AddrError::MissingAddress(port));
    }
    parse_ip(address, port).map(canonical)
}

/// Splits what follows the opening bracket of `[ADDRESS]:PORT`.
fn split_brackets(rest: &str) -> Result<(&str, &str), AddrError> {
    let Some((address, tail)) = rest.split_once(']') else {
        return Err(AddrError::BadAddress(format!("[{rest}")));
    };
    match tail.strip_prefix(':') {
        Some(port) if !port.is_empty() => Ok((address, port)),
        _ => Err(AddrError::MissingPort(format!("[{address}]:80"))),
    }
}

/// Splits `ADDRESS:PORT` without brackets. netstat's `:::80` is unmistakable and accepted; `::1:80`
/// is an address of its own and is not.
fn split_bare(text: &str) -> Result<(&str, &str), AddrError> {
    let Some((address, port)) = text.rsplit_once(':') else {
        return Err(match text.parse() {
            Ok(port) => AddrError::MissingAddress(port),
            Err(_) => AddrError::MissingPort(format!("{text}:80")),
        });
    };
    if let Ok(whole) = text.parse::<Ipv6Addr>() {
        return Err(match (address.parse(), port.parse()) {
            (Ok(ip), Ok(port)) => AddrError::Unbracketed { ip, port },
            _ => AddrError::MissingPort(format!("[{whole}]:80")),
        });
    }
    if port.is_empty() {
        return Err(AddrError::MissingPort(format!("{address}:80")));
    }
    Ok((address, port))
}

/// Parses the address part, with an optional `%interface` for IPv6 link-local addresses.
fn parse_ip(address: &str, port: u16) -> Result<SocketAddr, AddrError> {
    let bad_address = || AddrError::BadAddress(address.to_owned());
    let Some((ip, interface)) = address.split_once('%') else {
        let ip = address.parse().map_err(|_err| bad_address())?;
        return Ok(SocketAddr::new(ip, port));
    };
    let ip: Ipv6Addr = ip.parse().map_err(|_err| bad_address())?;
    let scope = interface
        .parse()
        .or_else(|_err| nix::net::if_::if_nametoindex(interface))
        .map_err(|_err| AddrError::NoSuchInterface(interface.to_owned()))?;
    Ok(SocketAddrV6::new(ip, port, 0, scope).into())
}

/// IPv4-mapped addresses as IPv4: an IPv6 socket with `IPV6_V6ONLY` cannot bind or reach them.
fn canonical(addr: SocketAddr) -> SocketAddr {
    match addr.ip().to_canonical() {
        IpAddr::V4(ip) => SocketAddr::new(ip.into(), addr.port()),
        IpAddr::V6(_) => addr,
    }
}

/// All IPv4 addresses of the machine, any free port.
pub const ANY_V4: HostAddr = HostAddr(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0));
/// All addresses of the machine, IPv4 and IPv6, any free port.
pub const ANY: HostAddr = HostAddr(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0));

#[cfg(test)]
mod tests {
    use super::*;

    fn host(text: &str) -> Result<String, String> {
        text.parse::<HostAddr>().map(|addr| addr.to_string()).map_err(|err| err.to_string())
    }

    #[test]
    fn the_forms_that_people_write_are_understood() {
        for (text, addr) in [
            ("0.0.0.0:80", "0.0.0.0:80"),
            ("127.0.0.1:0", "127.0.0.1:0"),
            ("[::]:80", "[::]:80"),
            (":::80", "[::]:80"),
            ("[::1]:8080", "[::1]:8080"),
            ("1:2:3:4:5:6:7:8:80", "[1:2:3:4:5:6:7:8]:80"),
            ("[fe80::1%lo]:80", "[fe80::1%1]:80"),
            ("[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
        ] {
            assert_eq!(host(text).as_deref(), Ok(addr), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_a_way_out() {
        for (text, part) in [
            ("", "port is missing"),
            ("0.0.0.0", "write it as 0.0.0.0:80"),
            ("0.0.0.0:", "write it as 0.0.0.0:80"),
            ("80", "write 0.0.0.0:80"),
            (":80", "write 0.0.0.0:80"),
            ("[::]", "write it as [::]:80"),
            ("[::1", "'[::1' is not an IP address"),
            ("::1:80", "write [::1]:80"),
            ("fe80::1", "write it as [fe80::1]:80"),
            ("localhost:80", "'localhost' is not an IP address"),
            ("0.0.0.0:http", "'http' is not a port"),
            ("0.0.0.0:65536", "'65536' is not a port"),
            ("0.0.0.0:-1", "'-1' is not a port"),
            ("[fe80::1%nosuchif]:80", "'nosuchif' is not a network interface"),
        ] {
            let message = host(text).expect_err(text);
            assert!(message.contains(part), "{text}: {message}");
        }
        let zero = "10.0.0.1:0".parse::<BackendAddr>();
        assert_eq!(zero, Err(AddrError::ZeroPort));
    }

    #[test]
    fn a_mapping_onto_itself_is_seen() {
        let reached =
            |host: &str, to: &str| host.parse::<HostAddr>().unwrap().is_reached_by(to.parse().unwrap());
        assert!(reached("0.0.0.0:80", "127.0.0.1:80"));
        assert!(reached("[::]:80", "127.0.0.1:80"));
        assert!(reached("[::]:80", "[::1]:80"));
        assert!(reached("10.0.0.1:80", "10.0.0.1:80"));
        assert!(!reached("0.0.0.0:80", "[::1]:80"));
        assert!(!reached("0.0.0.0:80", "127.0.0.1:81"));
        assert!(!reached("10.0.0.1:80", "127.0.0.1:80"));
        assert!(!reached("0.0.0.0:80", "172.17.0.2:80"));
    }
}
