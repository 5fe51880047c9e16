//! The host addresses on which a port is published.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::addr::serde_as_text;
use crate::name::IfName;

/// The host addresses on which a port is published.
///
/// Its text forms, also in the state file, are `*`, `10.0.0.11`, `[fd00::1]` and `[fe80::1%eth0]`. An interface is
/// stored by name, because its index may differ after a reboot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HostIp {
    /// Every address, IPv4 and IPv6.
    Any,
    /// One address, or the wildcard of a family.
    Ip(IpAddr),
    /// A link-local address and its interface (RFC 4007).
    Scoped(Ipv6Addr, IfName),
}

impl HostIp {
    /// Whether a packet can match both.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        let (Some(a), Some(b)) = (self.ip(), other.ip()) else {
            return true;
        };
        self == other || (a.is_ipv4() == b.is_ipv4() && (a.is_unspecified() || b.is_unspecified()))
    }

    /// The single address without its interface, if it is one.
    #[must_use]
    pub fn ip(self) -> Option<IpAddr> {
        match self {
            Self::Any => None,
            Self::Ip(ip) => Some(ip),
            Self::Scoped(ip, _) => Some(ip.into()),
        }
    }

    /// Whether it is an IPv6 address, which has no IPv4 clients.
    #[must_use]
    pub fn is_ipv6(self) -> bool {
        self.ip().is_some_and(|ip| ip.is_ipv6())
    }
}

impl fmt::Display for HostIp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Ip(IpAddr::V4(ip)) => write!(f, "{ip}"),
            Self::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]"),
            Self::Scoped(ip, interface) => write!(f, "[{ip}%{interface}]"),
        }
    }
}

impl FromStr for HostIp {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "*" {
            return Ok(Self::Any);
        }
        let wrong = || format!("{text:?} is not an address");
        let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
        match bare.split_once('%') {
            None => bare.parse().map(Self::Ip).map_err(|_ignored| wrong()),
            Some((ip, interface)) => {
                let ip = ip.parse().map_err(|_ignored| wrong())?;
                Ok(Self::Scoped(ip, interface.parse().map_err(|_ignored| wrong())?))
            }
        }
    }
}

serde_as_text!(HostIp);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_overlap_when_one_packet_fits_both() {
        let addr = |text: &str| text.parse::<HostIp>().unwrap();
        assert!(addr("*").overlaps(addr("[::1]")));
        assert!(addr("0.0.0.0").overlaps(addr("10.0.0.11")));
        assert!(addr("[::]").overlaps(addr("[fe80::1%eth0]")));
        assert!(addr("[fe80::1%eth0]").overlaps(addr("[fe80::1%eth0]")));
        assert!(!addr("[fe80::1%eth0]").overlaps(addr("[fe80::1%eth1]")));
        assert!(!addr("0.0.0.0").overlaps(addr("[::]")));
        assert!(!addr("10.0.0.11").overlaps(addr("10.0.0.12")));
    }

    #[test]
    fn the_text_forms_are_read_again() {
        for text in ["*", "10.0.0.11", "[::]", "[fe80::1%eth0]"] {
            assert_eq!(text.parse::<HostIp>().unwrap().to_string(), text);
        }
        for wrong in ["", "x", "[fe80::1%a/b]", "10.0.0.1%eth0"] {
            assert!(wrong.parse::<HostIp>().is_err(), "{wrong}");
        }
    }
}
