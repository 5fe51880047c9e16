//! The host of a backend: an address, a name that stands for some, or a Unix socket.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::Arc;

use crate::addr::{AddrError, BackendAddr, ScopedIp};
use crate::interfaces::{Interfaces, NoInterfaces};
use crate::source::Source;
use crate::unix::{self, UnixAddr};

/// The most characters of a name without its final dot (RFC 1035, section 2.3.4: 255 bytes with all lengths).
const LONGEST_NAME: usize = 253;

/// The most characters of a label (RFC 1035, section 2.3.4).
const LONGEST_LABEL: usize = 63;

/// The name of a host, in lower case: `web.internal`, or with a final dot, `web.internal.`, without search domains.
///
/// Letters, digits and hyphens (RFC 1123, section 2.1), and underscores, as container runtimes have them. Its last label is
/// not a number, which would be an incomplete IPv4 address.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostName(Arc<str>);

impl HostName {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for HostName {
    type Err = AddrError;

    fn from_str(text: &str) -> Result<Self, AddrError> {
        let bare = text.strip_suffix('.').unwrap_or(text);
        let is_valid = bare.len() <= LONGEST_NAME && bare.split('.').all(is_label);
        let last = bare.rsplit('.').next().unwrap_or_default();
        if !is_valid || last.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(AddrError::BadHost(text.to_owned()));
        }
        Ok(Self(text.to_ascii_lowercase().into()))
    }
}

fn is_label(label: &str) -> bool {
    let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
    let is_outer = |byte: Option<&u8>| byte.is_some_and(|byte| *byte != b'-');
    let bytes = label.as_bytes();
    bytes.len() <= LONGEST_LABEL
        && is_outer(bytes.first())
        && is_outer(bytes.last())
        && bytes.iter().all(|byte| is_inner(*byte))
}

/// A name, and the addresses that it stands for now.
///
/// Two are equal if their names are: what a name stands for is looked up, and not part of what somebody has asked for.
#[derive(Clone, Debug)]
pub struct NamedHost {
    name: HostName,
    addresses: Arc<[IpAddr]>,
    /// Why there are no addresses, if there are none.
    no_address: NoAddress,
}

impl NamedHost {
    /// The name.
    pub fn name(&self) -> &HostName {
        &self.name
    }

    /// The addresses to try, in this order; none if the name does not resolve.
    pub fn addresses(&self) -> &Arc<[IpAddr]> {
        &self.addresses
    }

    /// Why there is no address to try, if there is none.
    pub fn no_address(&self) -> Option<NoAddress> {
        self.addresses.is_empty().then_some(self.no_address)
    }
}

/// Why a name leads nowhere, as what is said of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAddress {
    /// It stands for nothing.
    #[error("does not resolve")]
    Unresolved,
    /// What it stands for cannot be reached from the source address of the mapping.
    #[error("has only {} addresses, and source is {source_ip}", if .source_ip.is_ipv4() { "IPv6" } else { "IPv4" })]
    Family {
        /// The source address.
        source_ip: IpAddr,
    },
    /// What it stands for is not the address of one machine that can be reached without naming a link.
    #[error("has only addresses that nobody can connect to, such as {0}")]
    Unusable(IpAddr),
    /// What it stands for leads back to the mapping.
    #[error("has only addresses that lead back to the mapping")]
    Loop,
}

impl PartialEq for NamedHost {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for NamedHost {}

/// The host of a backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendHost {
    /// An address.
    Ip(ScopedIp),
    /// A name.
    Name(NamedHost),
    /// A Unix socket, which has no ports.
    Unix(UnixAddr),
}

impl BackendHost {
    /// Parses an address, a name or a Unix socket. Interfaces are indexes, or names among `interfaces`.
    ///
    /// # Errors
    /// [`AddrError`], which names the part at fault.
    pub fn parse(text: &str, interfaces: &dyn Interfaces) -> Result<Self, AddrError> {
        if text.starts_with(unix::PREFIX) {
            return Ok(Self::Unix(text.parse()?));
        }
        if let Ok(bare) = text.parse::<UnixAddr>() {
            return Err(AddrError::BareUnix(bare.bare().to_owned()));
        }
        match ScopedIp::parse(text, interfaces) {
            Ok(ip) => Ok(Self::Ip(ip)),
            // What contains one of these cannot be a name, and the error about an address helps.
            Err(error) if text.contains([':', '%', '[']) || text.is_empty() => Err(error),
            Err(_no_address) => text.parse().map(Self::of_name),
        }
    }

    fn of_name(name: HostName) -> Self {
        Self::Name(NamedHost { name, addresses: Arc::new([]), no_address: NoAddress::Unresolved })
    }

    /// The address that connections and datagrams go to first; [`ScopedIp::NOWHERE`] while a name stands for none, and for a
    /// Unix socket.
    pub fn first_ip(&self) -> ScopedIp {
        match self {
            Self::Ip(ip) => *ip,
            Self::Unix(_) => ScopedIp::NOWHERE,
            Self::Name(host) => host.addresses.first().map_or(ScopedIp::NOWHERE, |ip| (*ip).into()),
        }
    }

    /// All addresses to try, in this order.
    pub fn ips(&self) -> Vec<ScopedIp> {
        match self {
            Self::Ip(ip) => vec![*ip],
            Self::Unix(_) => Vec::new(),
            Self::Name(host) => host.addresses.iter().map(|ip| (*ip).into()).collect(),
        }
    }

    /// The address of its port. Connections and datagrams go there first.
    ///
    /// # Panics
    /// For port 0, which no range has.
    pub fn at(&self, port: u16) -> BackendAddr {
        match self {
            Self::Unix(addr) => addr.clone().into(),
            _ => BackendAddr::new(self.first_ip(), port).expect("a range is without port 0"),
        }
    }

    /// The name, if it has one.
    pub fn name(&self) -> Option<&HostName> {
        match self {
            Self::Ip(_) | Self::Unix(_) => None,
            Self::Name(host) => Some(&host.name),
        }
    }

    /// The same name, which now stands for those of `addresses` that are addresses of one machine and that a connection from
    /// `source` can reach. An address is returned as it is.
    #[must_use]
    pub fn resolved(&self, addresses: &[IpAddr], source: Source) -> Self {
        let Self::Name(NamedHost { name, .. }) = self else { return self.clone() };
        let is_one =
            |ip: &IpAddr| BackendAddr::reachable(ScopedIp::from(*ip).at(1)).is_ok() && !needs_zone(*ip);
        let all = || addresses.iter().copied().map(|ip| ip.to_canonical());
        let usable = all().filter(|ip| is_one(ip) && source.reaches(*ip)).collect();
        let no_address = match (addresses.first(), source) {
            (None, _) => NoAddress::Unresolved,
            (Some(_), Source::Address(source_ip)) if all().any(|ip| is_one(&ip)) => {
                NoAddress::Family { source_ip }
            }
            (Some(ip), _) => NoAddress::Unusable(*ip),
        };
        Self::Name(NamedHost { name: name.clone(), addresses: usable, no_address })
    }

    /// The same name without an address, for this reason. An address is returned as it is.
    #[must_use]
    pub fn leading_nowhere(&self, why: NoAddress) -> Self {
        let Self::Name(NamedHost { name, .. }) = self else { return self.clone() };
        Self::Name(NamedHost { name: name.clone(), addresses: Arc::new([]), no_address: why })
    }
}

/// Whether it is a link-local address, which no record can give an interface.
fn needs_zone(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

impl ScopedIp {
    /// Where nothing is: the address of a backend whose name does not resolve, of a block that is never reached (RFC 6666).
    /// Nothing is sent there, because who relays asks [`BackendAddr::is_nowhere`] first.
    pub const NOWHERE: Self = Self::of_v6(Ipv6Addr::new(0x100, 0, 0, 0, 0, 0, 0, 0));
}

impl BackendAddr {
    /// Whether it is reached by the routes of the machine: it has an IP address, which is known.
    pub fn is_routed(&self) -> bool {
        self.host() != ScopedIp::NOWHERE
    }

    /// Whether the name of the backend does not resolve.
    pub fn is_nowhere(&self) -> bool {
        self.unix_addr().is_none() && self.host() == ScopedIp::NOWHERE
    }
}

impl From<ScopedIp> for BackendHost {
    fn from(ip: ScopedIp) -> Self {
        Self::Ip(ip)
    }
}

impl From<Ipv4Addr> for BackendHost {
    fn from(ip: Ipv4Addr) -> Self {
        Self::Ip(IpAddr::from(ip).into())
    }
}

/// As it was asked for: a name without its addresses.
impl fmt::Display for BackendHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(ip) => ip.fmt(f),
            Self::Name(host) => host.name.fmt(f),
            Self::Unix(addr) => addr.fmt(f),
        }
    }
}

/// Parses what [`Display`](fmt::Display) writes, with interfaces as indexes. [`BackendHost::parse`] also accepts their
/// names.
impl FromStr for BackendHost {
    type Err = AddrError;

    fn from_str(text: &str) -> Result<Self, AddrError> {
        Self::parse(text, &NoInterfaces)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<String, String> {
        text.parse::<BackendHost>().map(|host| host.to_string()).map_err(|error| error.to_string())
    }

    #[test]
    fn names_are_those_of_hosts() {
        for (text, expected) in [
            ("web", "web"),
            ("Web.Internal", "web.internal"),
            ("web.internal.", "web.internal."),
            ("my_app-1.prod", "my_app-1.prod"),
            ("1password.com", "1password.com"),
            ("xn--bcher-kva.example", "xn--bcher-kva.example"),
            ("10.0.0.1", "10.0.0.1"),
            ("[fd00::1]", "[fd00::1]"),
        ] {
            assert_eq!(parse(text).as_deref(), Ok(expected), "{text}");
        }
        let (long, label) = ("a.".repeat(128), "a".repeat(64));
        for text in [
            "10.0.0.256",
            "1.2.3",
            "80",
            "a..b",
            ".a",
            "-a",
            "a-",
            "a b",
            "b\u{fc}cher",
            ".",
            "web/x",
            &long,
            &label,
        ] {
            let message = parse(text).expect_err(text);
            assert!(message.contains("is neither an IP address nor the name of a host"), "{text}: {message}");
        }
        assert!(parse("fe80::1%nosuchif").unwrap_err().contains("is not a network interface"));
        assert!(parse("").is_err() && parse("[::1").is_err());
    }

    #[test]
    fn a_name_is_equal_whatever_it_stands_for() {
        let name: BackendHost = "web".parse().unwrap();
        assert_eq!(name.first_ip(), ScopedIp::NOWHERE);
        let addresses = ["127.0.0.1", "::ffff:10.0.0.1", "fe80::1", "224.0.0.1", "0.0.0.0", "fd00::1"];
        let addresses = addresses.map(|text| text.parse().unwrap());
        let resolved = name.resolved(&addresses, Source::Auto);
        let ips: Vec<_> = resolved.ips().iter().map(ToString::to_string).collect();
        assert_eq!(ips, ["127.0.0.1", "10.0.0.1", "[fd00::1]"]);
        assert_eq!(resolved, name);
        let from_v6 = name.resolved(&addresses, Source::Address("fd00::2".parse().unwrap()));
        assert_eq!(from_v6.first_ip().to_string(), "[fd00::1]");
        let address: BackendHost = "10.0.0.1".parse().unwrap();
        assert_eq!(address.resolved(&addresses, Source::Auto), address);
    }

    #[test]
    fn why_a_name_leads_nowhere_is_known() {
        let name: BackendHost = "web".parse().unwrap();
        let why = |addresses: &[&str], source: &str| {
            let addresses: Vec<IpAddr> = addresses.iter().map(|text| text.parse().unwrap()).collect();
            let BackendHost::Name(host) = name.resolved(&addresses, source.parse().unwrap()) else {
                panic!()
            };
            host.no_address().map(|why| why.to_string()).unwrap_or_default()
        };
        assert_eq!(why(&[], "auto"), "does not resolve");
        assert_eq!(why(&["::1"], "auto"), "");
        assert_eq!(why(&["::1"], "127.0.0.1"), "has only IPv6 addresses, and source is 127.0.0.1");
        assert_eq!(
            why(&["10.0.0.1", "fe80::1", "::ffff:10.0.0.2"], "fd00::2"),
            "has only IPv4 addresses, and source is fd00::2"
        );
        let unusable = "has only addresses that nobody can connect to, such as 0.0.0.0";
        assert_eq!(why(&["0.0.0.0", "fe80::1"], "auto"), unusable);
        assert_eq!(why(&["0.0.0.0"], "fd00::2"), unusable);
        let BackendHost::Name(looped) = name.leading_nowhere(NoAddress::Loop) else { panic!() };
        assert!(looped.no_address() == Some(NoAddress::Loop) && looped.addresses().is_empty());
    }
}
