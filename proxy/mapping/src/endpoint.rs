//! `ADDRESS:PORTS`: where a mapping listens, and its backend.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use crate::addr::{AddrError, BackendAddr, HostSocketAddr, ScopedIp};
use crate::backend::BackendHost;
use crate::host::HostAddr;
use crate::interfaces::{Interfaces, NoInterfaces};
use crate::ports::PortRange;
use crate::unix;

/// Where a mapping listens: `0.0.0.0:80`, `[::]:8000-8010`, netstat's `:::80`, `%eth0:80`, `unix:/run/front.sock`;
/// `127.0.0.1:0` for random ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostSpec {
    /// The address that clients connect to, the interface, or the Unix socket.
    pub host: HostAddr,
    /// The ports that clients connect to; `None` for random ones, [`PortRange::OF_UNIX`] of a Unix socket.
    pub ports: Option<PortRange>,
}

impl HostSpec {
    /// Whether it requests `host`, or may do so as an interface.
    pub fn contains(&self, host: &HostSocketAddr) -> bool {
        let has_port = || host.port().is_some_and(|port| self.ports.is_none_or(|ports| ports.contains(port)));
        match &self.host {
            HostAddr::Ip(own) => host.inet_addr().is_some_and(|addr| *own == addr.into()) && has_port(),
            HostAddr::Interface(_) => has_port(),
            HostAddr::Unix(own) => host.unix_addr() == Some(own),
        }
    }

    /// Parses any of the text forms. Interfaces are indexes, or names among `interfaces`.
    ///
    /// # Errors
    /// [`AddrError`], which names the part at fault.
    pub fn parse(text: &str, interfaces: &dyn Interfaces) -> Result<Self, AddrError> {
        if let Some(rest) = text.strip_prefix('*') {
            let ports = rest.strip_prefix(':').filter(|ports| !ports.is_empty()).unwrap_or("80");
            parse_host_ports(ports)?;
            return Err(AddrError::Star(ports.to_owned()));
        }
        if text.starts_with(unix::PREFIX) {
            return Ok(Self { host: HostAddr::parse(text, interfaces)?, ports: Some(PortRange::OF_UNIX) });
        }
        let (host, ports) = match Parts::of(text, |text| HostAddr::parse(text, interfaces))? {
            Parts::Both(host, ports) => (host, ports),
            Parts::Address(host) => return Err(AddrError::MissingPort(host.to_string())),
            Parts::Ports(ports) => {
                parse_host_ports(ports)?;
                return Err(AddrError::NoHostAddress(ports.to_owned()));
            }
        };
        Ok(Self { host, ports: parse_host_ports(ports)? })
    }
}

impl fmt::Display for HostSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.host, self.ports) {
            (HostAddr::Unix(addr), _) => addr.fmt(f),
            (host, Some(ports)) => write!(f, "{host}:{ports}"),
            (host, None) => write!(f, "{host}:0"),
        }
    }
}

/// Parses what [`Display`](fmt::Display) writes, with interfaces as indexes. [`HostSpec::parse`] also accepts their
/// names.
impl FromStr for HostSpec {
    type Err = AddrError;

    fn from_str(text: &str) -> Result<Self, AddrError> {
        Self::parse(text, &NoInterfaces)
    }
}

fn parse_host_ports(text: &str) -> Result<Option<PortRange>, AddrError> {
    if text == "0" { Ok(None) } else { Ok(Some(text.parse()?)) }
}

impl FromStr for HostSocketAddr {
    type Err = AddrError;

    fn from_str(text: &str) -> Result<Self, AddrError> {
        let HostSpec { host, ports } = text.parse()?;
        let ip = match host {
            HostAddr::Ip(ip) => ip,
            HostAddr::Unix(addr) => return Ok(addr.into()),
            HostAddr::Interface(_) => return Err(AddrError::BadAddress(host.to_string())),
        };
        Ok(Self::new(ip, ports.map_or(Ok(0), PortRange::one)?))
    }
}

/// The backend of a mapping: `172.17.0.2:80`, `[fd00::2]:8000-8010`, `web.internal:80`, `unix:/run/app.sock`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackendSpec {
    /// The address or name of the backend.
    pub host: BackendHost,
    /// The ports of the backend; [`PortRange::OF_UNIX`] of a Unix socket.
    pub ports: PortRange,
}

impl fmt::Display for BackendSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            BackendHost::Unix(addr) => addr.fmt(f),
            host => write!(f, "{host}:{}", self.ports),
        }
    }
}

impl BackendSpec {
    /// Parses any of the text forms. Interfaces are indexes, or names among `interfaces`.
    ///
    /// # Errors
    /// [`AddrError`], which names the part at fault.
    pub fn parse(text: &str, interfaces: &dyn Interfaces) -> Result<Self, AddrError> {
        if text.starts_with(unix::PREFIX) {
            return Ok(Self { host: BackendHost::Unix(text.parse()?), ports: PortRange::OF_UNIX });
        }
        if let Some((scheme, rest)) = text.split_once("://") {
            return Err(Self::of_url(scheme, rest, interfaces).map_or_else(
                || AddrError::BadHost(text.to_owned()),
                |backend| AddrError::Url { url: text.to_owned(), backend: backend.to_string() },
            ));
        }
        let (host, ports) = match Parts::of(text, |text| BackendHost::parse(text, interfaces))? {
            Parts::Both(host, ports) => (host, parse_backend_ports(ports)?),
            Parts::Address(host) => {
                BackendAddr::reachable(host.first_ip().at(80))?;
                return Err(AddrError::MissingPort(host.to_string()));
            }
            Parts::Ports(ports) => return Err(AddrError::NoBackendAddress(parse_backend_ports(ports)?)),
        };
        BackendAddr::reachable(host.first_ip().at(ports.first()))?;
        Ok(Self { host, ports })
    }
}

impl BackendSpec {
    /// What a URL names, which has the port of its scheme unless it says another one (RFC 3986, section 3.2).
    fn of_url(scheme: &str, rest: &str, interfaces: &dyn Interfaces) -> Option<Self> {
        let authority = rest.split(['/', '?', '#']).next()?;
        let host = authority.rsplit_once('@').map_or(authority, |(_user, host)| host);
        let port = if scheme.eq_ignore_ascii_case("https") { 443 } else { 80 };
        let with_port = || Self::parse(&format!("{host}:{port}"), interfaces);
        Self::parse(host, interfaces).or_else(|_no_port| with_port()).ok()
    }
}

/// Parses what [`Display`](fmt::Display) writes, with interfaces as indexes. [`BackendSpec::parse`] also accepts their
/// names.
impl FromStr for BackendSpec {
    type Err = AddrError;

    fn from_str(text: &str) -> Result<Self, AddrError> {
        Self::parse(text, &NoInterfaces)
    }
}

fn parse_backend_ports(text: &str) -> Result<PortRange, AddrError> {
    if text == "0" { Err(AddrError::ZeroPort) } else { Ok(text.parse()?) }
}

impl FromStr for BackendAddr {
    type Err = AddrError;

    fn from_str(text: &str) -> Result<Self, AddrError> {
        let (ip, ports) = match Parts::of(text, |text| ScopedIp::parse(text, &NoInterfaces))? {
            Parts::Both(ip, ports) => (ip, parse_backend_ports(ports)?),
            Parts::Address(ip) => return Err(AddrError::MissingPort(ip.to_string())),
            Parts::Ports(ports) => return Err(AddrError::NoBackendAddress(parse_backend_ports(ports)?)),
        };
        Self::reachable(ip.at(ports.one()?))
    }
}

/// The parts of a text: an address or name, as `T`, and ports, which are not parsed yet.
enum Parts<'a, T> {
    Both(T, &'a str),
    Address(T),
    Ports(&'a str),
}

impl<'a, T> Parts<'a, T> {
    fn of(text: &'a str, parse: impl Fn(&str) -> Result<T, AddrError>) -> Result<Self, AddrError> {
        let (address, ports) = if text.starts_with('[') { split_brackets(text) } else { split_bare(text) };
        let is_port = |byte: u8| byte.is_ascii_digit() || byte == b'-';
        match (address, ports) {
            ("", None | Some("")) => Err(AddrError::Empty),
            ("", Some(ports)) => Ok(Self::Ports(ports)),
            (ports, None) if ports.bytes().all(is_port) => Ok(Self::Ports(ports)),
            (address, None | Some("")) => {
                Ok(Self::Address(parse(address).map_err(|error| error.before_ports("80"))?))
            }
            (address, Some(ports)) => {
                let parsed = parse(address).map_err(|error| error.before_ports(ports))?;
                // Without brackets, the last group of an IPv6 address may be a port.
                match (text.parse::<Ipv6Addr>(), address.parse::<Ipv6Addr>()) {
                    (Ok(_), Ok(ip)) => {
                        let ip = ScopedIp::from(IpAddr::from(ip));
                        Err(AddrError::Unbracketed { ip, ports: ports.to_owned() })
                    }
                    _ => Ok(Self::Both(parsed, ports)),
                }
            }
        }
    }
}

/// Splits `[ADDRESS]:PORTS` and keeps the brackets.
fn split_brackets(text: &str) -> (&str, Option<&str>) {
    match text.find(']') {
        Some(end) => (&text[..=end], text[end + 1..].strip_prefix(':')),
        None => (text, None),
    }
}

/// Splits `ADDRESS:PORTS` without brackets. netstat's `:::80` is unambiguous; `::80` is an address.
fn split_bare(text: &str) -> (&str, Option<&str>) {
    match text.rsplit_once(':') {
        Some((address, _last))
            if text.parse::<Ipv6Addr>().is_ok() && address.parse::<Ipv6Addr>().is_err() =>
        {
            (text, None)
        }
        Some((address, ports)) => (address, Some(ports)),
        None => (text, None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interfaces::TwoInterfaces;

    fn host(text: &str) -> Result<String, String> {
        HostSpec::parse(text, &TwoInterfaces).map(|host| host.to_string()).map_err(|error| error.to_string())
    }

    fn backend(text: &str) -> Result<String, String> {
        BackendSpec::parse(text, &TwoInterfaces)
            .map(|backend| backend.to_string())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_url_is_told_from_what_it_names() {
        for (url, meant) in [
            ("http://web.internal:80", "web.internal:80"),
            ("http://web.internal/path?q#f", "web.internal:80"),
            ("https://user@web.internal", "web.internal:443"),
            ("http://10.0.0.1:8080/", "10.0.0.1:8080"),
            ("tcp://[fd00::2]:80", "[fd00::2]:80"),
        ] {
            let message = backend(url).expect_err(url);
            assert!(message.starts_with(&format!("'{url}' is a URL; write {meant}, ")), "{message}");
        }
        for text in ["://", "http://", "http://we b"] {
            let message = backend(text).expect_err(text);
            assert!(message.contains("is neither an IP address nor the name of a host"), "{message}");
        }
    }

    #[test]
    fn the_forms_that_people_write_are_understood() {
        for (text, expected) in [
            ("0.0.0.0:80", "0.0.0.0:80"),
            ("127.0.0.1:0", "127.0.0.1:0"),
            ("[::]:80", "[::]:80"),
            (":::80", "[::]:80"),
            ("[::1]:8080-8090", "[::1]:8080-8090"),
            ("10.0.0.1:7000-7005", "10.0.0.1:7000-7005"),
            ("%eth0:80", "%eth0:80"),
            ("eth0.100:80-90", "%eth0.100:80-90"),
            ("1:2:3:4:5:6:7:8:80", "[1:2:3:4:5:6:7:8]:80"),
            ("[fe80::1%lo]:80", "[fe80::1%1]:80"),
            ("[fe80::1%1]:80", "[fe80::1%1]:80"),
            ("[::ffff:10.0.0.1]:80", "10.0.0.1:80"),
        ] {
            assert_eq!(host(text).as_deref(), Ok(expected), "{text}");
        }
        assert_eq!(backend("10.0.0.1:7000-7005").as_deref(), Ok("10.0.0.1:7000-7005"));
    }

    #[test]
    fn what_is_wrong_is_named_with_a_way_out() {
        for (text, part) in [
            ("", "it is empty"),
            (":", "it is empty"),
            ("0.0.0.0", "write it as 0.0.0.0:80"),
            ("0.0.0.0:", "write it as 0.0.0.0:80"),
            ("80", "write 0.0.0.0:80"),
            ("0", "write 0.0.0.0:0"),
            (":80", "write 0.0.0.0:80"),
            ("80-90", "write 0.0.0.0:80-90"),
            ("70000", "'70000' is not a port"),
            ("[::]", "write it as [::]:80"),
            ("[::1", "'[::1' is not an IP address"),
            ("::1:80", "write [::1]:80"),
            ("::1", "write it as [::1]:80"),
            ("fe80::1", "on which interface? write [fe80::1%"),
            ("[fe80::1]:80", "]:80"),
            ("localhost", "'localhost' is not an IP address"),
            ("localhost:80", "'localhost' is not an IP address"),
            ("0.0.0.0:http", "'http' is not a port"),
            ("0.0.0.0:65536", "'65536' is not a port"),
            ("0.0.0.0:-1", "'' is not a port"),
            ("0.0.0.0:90-80", "write 80-90"),
            ("[fe80::1%nosuchif]:80", "'nosuchif' is not a network interface"),
            ("[fe80::1%0]:80", "'0' is not a network interface"),
        ] {
            let message = host(text).expect_err(text);
            assert!(message.contains(part), "{text}: {message}");
        }
        for (text, part) in [
            ("18000", "write the backend's too, as in 172.17.0.2:18000"),
            (":18000", "write the backend's too, as in 172.17.0.2:18000"),
            ("0", "port 0 cannot"),
            ("10.0.0.1:0", "port 0 cannot"),
            ("10.0.0.1", "write it as 10.0.0.1:80"),
            ("0.0.0.0", "write 127.0.0.1 in its place"),
            ("[::]:80", "write [::1] in its place"),
            ("fe80::1:80", "on which interface? write [fe80::1%"),
        ] {
            let message = backend(text).expect_err(text);
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    #[test]
    fn an_address_is_that_of_one_port() {
        let host = |text: &str| text.parse::<HostSocketAddr>().map(|addr| addr.to_string());
        assert_eq!(host("[::ffff:10.0.0.1]:80").as_deref(), Ok("10.0.0.1:80"));
        assert_eq!(host("127.0.0.1:0").as_deref(), Ok("127.0.0.1:0"));
        assert!(host("127.0.0.1:80-90").unwrap_err().to_string().contains("one port is wanted"));
        assert_eq!("10.0.0.1:0".parse::<BackendAddr>(), Err(AddrError::ZeroPort));
        "10.0.0.1:80-90".parse::<BackendAddr>().unwrap_err();
    }
}
