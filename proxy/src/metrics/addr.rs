//! Where metrics are served: `--metrics`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use rproxy_mapping::addr::AddrError;
use rproxy_mapping::endpoint::HostSpec;
use rproxy_mapping::escape::escaped;
use rproxy_mapping::ports::PortRange;

use crate::bind::interfaces::HostInterfaces;

/// What the path of a Unix socket follows.
const UNIX: &str = "unix:";

/// The address of the HTTP server: `127.0.0.1:9464`, `[::1]:9464`, or `unix:/run/rproxy-metrics.sock`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetricsAddr {
    /// An address and port; the kernel chooses a port for 0.
    Tcp(SocketAddr),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

impl MetricsAddr {
    /// Whether only this machine can connect: programs on it that may, if it is a Unix socket, and all of them for
    /// loopback.
    pub fn is_local(&self) -> bool {
        self.is_loopback() || matches!(self, Self::Unix(_))
    }

    /// Whether it is a port that only programs on this machine can connect to, web browsers among them.
    pub fn is_loopback(&self) -> bool {
        matches!(self, Self::Tcp(addr) if addr.ip().to_canonical().is_loopback())
    }
}

impl FromStr for MetricsAddr {
    type Err = MetricsAddrError;

    /// Parses what [`Display`](fmt::Display) writes, and addresses with the names of this machine's interfaces.
    fn from_str(text: &str) -> Result<Self, MetricsAddrError> {
        if let Some(path) = text.strip_prefix(UNIX) {
            return match path {
                "" => Err(MetricsAddrError::NoPath),
                _ if path.contains('\0') => Err(MetricsAddrError::Nul),
                _ if path.starts_with('@') => Err(MetricsAddrError::Abstract(path.to_owned())),
                _ => Ok(Self::Unix(path.into())),
            };
        }
        if text.contains('/') {
            let text = text.split_once("://").map_or(text, |(_scheme, rest)| rest);
            return Err(MetricsAddrError::Slash(text.trim_end_matches('/').to_owned()));
        }
        let HostSpec { host, ports } =
            HostSpec::parse(text, &HostInterfaces).map_err(AddrError::of_address)?;
        let ip = host.ip().ok_or_else(|| AddrError::BadAddress(host.to_string()))?;
        let port = ports.map_or(Ok(0), PortRange::one).map_err(|_several| MetricsAddrError::Range)?;
        let addr = ip.at(port);
        let is_broadcast = addr.ip().to_canonical() == IpAddr::V4(Ipv4Addr::BROADCAST);
        if addr.ip().to_canonical().is_multicast() || is_broadcast {
            return Err(MetricsAddrError::NotOfOne(addr.ip()));
        }
        Ok(Self::Tcp(addr))
    }
}

impl fmt::Display for MetricsAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => addr.fmt(f),
            Self::Unix(path) => write!(f, "{UNIX}{}", path.display()),
        }
    }
}

/// Why a text is no [`MetricsAddr`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum MetricsAddrError {
    /// The path is missing.
    #[error("the path is missing; write one, as in unix:/run/rproxy-metrics.sock")]
    NoPath,
    /// The path has a NUL byte.
    #[error("the path has a NUL byte")]
    Nul,
    /// The path is that of an abstract socket.
    #[error("abstract sockets cannot be used; for a file of this name write unix:./{}", escaped(.0))]
    Abstract(String),
    /// No TCP client can connect to the address.
    #[error(
        "{0} is a multicast or broadcast address, to which no client can connect; write an address of this machine, as in 127.0.0.1:9464"
    )]
    NotOfOne(IpAddr),
    /// It is a path or a URL.
    #[error("'{}' is not an address and port; write those, as in 127.0.0.1:9464, or unix:PATH", escaped(.0))]
    Slash(String),
    /// Only the port is there.
    #[error("the address is missing; write 127.0.0.1:{0}, or 0.0.0.0:{0} for every address")]
    NoAddress(String),
    /// Only the address is there.
    #[error("the port is missing; write it after the address, as in 127.0.0.1:9464")]
    NoPort,
    /// There are several ports.
    #[error("one port is needed, and this is a range; write one of them")]
    Range,
    /// Another mistake in the address.
    #[error(transparent)]
    Addr(AddrError),
}

impl From<AddrError> for MetricsAddrError {
    fn from(error: AddrError) -> Self {
        match error {
            AddrError::NoHostAddress(port) => Self::NoAddress(port),
            AddrError::MissingPort(_) | AddrError::Empty => Self::NoPort,
            error => Self::Addr(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<String, String> {
        text.parse::<MetricsAddr>().map(|addr| addr.to_string()).map_err(|error| error.to_string())
    }

    #[test]
    fn an_address_is_that_of_a_port_or_a_path() {
        for (text, shown, is_local) in [
            ("127.0.0.1:9464", "127.0.0.1:9464", true),
            ("127.9.9.9:0", "127.9.9.9:0", true),
            ("[::1]:9464", "[::1]:9464", true),
            ("[::]:9464", "[::]:9464", false),
            (":::9464", "[::]:9464", false),
            ("0.0.0.0:9464", "0.0.0.0:9464", false),
            ("[fe80::1%lo]:9464", "[fe80::1%1]:9464", false),
            ("unix:/run/m.sock", "unix:/run/m.sock", true),
            ("unix:m.sock", "unix:m.sock", true),
        ] {
            let addr: MetricsAddr = text.parse().unwrap();
            assert_eq!((addr.to_string().as_str(), addr.is_local()), (shown, is_local), "{text}");
            assert_eq!(parsed(shown).as_deref(), Ok(shown), "what is passed to another process");
        }
    }

    #[test]
    fn a_mistake_is_named_with_what_works() {
        for (text, part) in [
            ("", "the port is missing; write it after the address, as in 127.0.0.1:9464"),
            ("127.0.0.1", "the port is missing"),
            ("[::1]", "the port is missing"),
            ("9464", "the address is missing; write 127.0.0.1:9464"),
            (":9464", "the address is missing; write 127.0.0.1:9464"),
            ("*:9464", "for all addresses write 0.0.0.0:9464"),
            ("127.0.0.1:9464-9465", "one port is needed"),
            ("127.0.0.1:x", "'x' is not a port"),
            ("localhost:9464", "'localhost' is not an IP address"),
            (
                "web.internal:9464",
                "'web.internal' is not an IP address; write one in its place, such as 127.0.0.1 or [::1]",
            ),
            ("::1:9464", "an IPv6 address needs brackets"),
            ("unix:", "the path is missing"),
            ("unix:a\0b", "NUL"),
            ("unix:@m", "write unix:./@m"),
            ("224.0.0.1:9464", "224.0.0.1 is a multicast or broadcast address"),
            ("[ff02::1]:9464", "ff02::1 is a multicast or broadcast address"),
            ("[::ffff:224.0.0.1]:9464", "multicast"),
            ("255.255.255.255:9464", "broadcast"),
            ("/run/m.sock", "'/run/m.sock' is not an address and port"),
            ("http://127.0.0.1:9464/", "'127.0.0.1:9464' is not an address and port"),
        ] {
            let message = parsed(text).unwrap_err();
            assert!(message.contains(part), "{text}: {message}");
        }
    }
}
