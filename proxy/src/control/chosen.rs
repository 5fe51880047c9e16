//! What requests choose connections by: the names of mappings, and clients.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use ipnet::IpNet;
use nix::net::if_::if_nametoindex;
use rproxy_mapping::name::{Name, NameError};

use crate::state::client::ClientAddr;

/// Clients: those of a network, or one, as lists show it: `192.0.2.0/24`, `192.0.2.7`, `192.0.2.7:5000`,
/// `[fe80::1%2]:5000`, `unix:pid=4711,uid=33,gid=33`; `unix` for all of Unix sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ClientFilter {
    /// Those with these addresses.
    Inet {
        network: IpNet,
        /// The interface of a link-local address.
        scope: Option<u32>,
        port: Option<u16>,
    },
    /// Those of a Unix socket, or one as it is written.
    Unix(Option<String>),
}

impl ClientFilter {
    /// Whether `client` is meant.
    pub(crate) fn matches(&self, client: ClientAddr) -> bool {
        match (self, client.inet_addr()) {
            (Self::Unix(one), None) => one.as_ref().is_none_or(|one| *one == client.to_string()),
            (Self::Inet { network, scope, port }, Some(client)) => {
                let of_client = match client {
                    SocketAddr::V6(addr) => addr.scope_id(),
                    SocketAddr::V4(_) => 0,
                };
                network.contains(&client.ip().to_canonical())
                    && scope.is_none_or(|wanted| wanted == of_client)
                    && port.is_none_or(|port| port == client.port())
            }
            _ => false,
        }
    }
}

impl FromStr for ClientFilter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const WRONG: &str = "not a client; write an address, a network, or both address and port as lists show \
            them: 192.0.2.7, 10.0.0.0/8, 192.0.2.7:5000, [2001:db8::7]:5000";

        if text == "unix" || text.starts_with("unix:pid=") {
            return Ok(Self::Unix((text != "unix").then(|| text.to_owned())));
        }
        let (host, port) = match text.strip_prefix('[').map(|rest| rest.split_once(']')) {
            Some(Some((host, ""))) => (host, None),
            Some(Some((host, port))) => (host, Some(port.strip_prefix(':').ok_or(WRONG)?)),
            Some(None) => return Err(WRONG.to_owned()),
            // Several colons are those of an IPv6 address.
            None => match text.split_once(':') {
                Some((host, port)) if !port.contains(':') => (host, Some(port)),
                _ => (text, None),
            },
        };
        let port = port.map(|port| port.parse().map_err(|_error| WRONG)).transpose()?;
        let (address, zone) = match host.split_once('%') {
            Some((address, zone)) => (address, Some(zone)),
            None => (host, None),
        };
        let scope = zone.map(scope_of).transpose()?;
        if let Ok(ip) = address.parse::<IpAddr>() {
            return Ok(Self::Inet { network: ip.to_canonical().into(), scope, port });
        }
        // A network may be written by any of its addresses: this only chooses.
        match address.parse::<IpNet>() {
            Ok(network) if scope.is_none() && port.is_none() => {
                let network = rproxy_mapping::access::parse_network(&network.trunc().to_string())?;
                Ok(Self::Inet { network, scope, port })
            }
            _ => Err(WRONG.to_owned()),
        }
    }
}

/// The number of an interface that is written as a number or a name.
fn scope_of(zone: &str) -> Result<u32, String> {
    let by_name = || if_nametoindex(zone).ok();
    zone.parse().ok().or_else(by_name).ok_or_else(|| format!("there is no interface {}", zone.escape_debug()))
}

/// A name of mappings in which `*` stands for any text. Names themselves have no `*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NamePattern(String);

impl NamePattern {
    /// Whether `name` is meant.
    pub(crate) fn matches(&self, name: &str) -> bool {
        let Some((start, rest)) = self.0.split_once('*') else { return name == self.0 };
        let Some(name) = name.strip_prefix(start) else { return false };
        let (middle, end) = rest.rsplit_once('*').unwrap_or(("", rest));
        let Some(mut name) = name.strip_suffix(end) else { return false };
        middle.split('*').all(|part| match name.split_once(part) {
            Some((_before, after)) => {
                name = after;
                true
            }
            None => false,
        })
    }

    /// The name, if it means one mapping.
    pub(crate) fn exact(&self) -> Option<&str> {
        (!self.0.contains('*')).then_some(&self.0)
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for NamePattern {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        // A letter is allowed wherever a * is.
        match text.replace('*', "x").parse::<Name>().is_ok() {
            true => Ok(Self(text.to_owned())),
            false => text.parse().map(|name: Name| Self(name.to_string())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_written_as_lists_show_it() {
        let clients =
            ["192.0.2.7:5000", "192.0.2.8:5000", "[2001:db8::7]:5000", "[fe80::1%5]:5000", "[::1]:80"];
        for (text, expected) in [
            ("192.0.2.7", &clients[..1]),
            ("192.0.2.7:5000", &clients[..1]),
            ("192.0.2.7:5001", &[]),
            ("192.0.2.0/24", &clients[..2]),
            ("192.0.2.9/24", &clients[..2]),
            ("::ffff:192.0.2.7", &clients[..1]),
            ("::ffff:192.0.2.0/120", &clients[..2]),
            ("2001:db8::7", &clients[2..3]),
            ("[2001:db8::7]", &clients[2..3]),
            ("[2001:db8::7]:5000", &clients[2..3]),
            ("fe80::1", &clients[3..4]),
            ("fe80::1%5", &clients[3..4]),
            ("[fe80::1%5]:5000", &clients[3..4]),
            ("[fe80::1%6]:5000", &[]),
            ("::1", &clients[4..]),
            ("::/0", &clients[2..]),
        ] {
            let filter: ClientFilter = text.parse().expect(text);
            let matching: Vec<_> = clients
                .iter()
                .filter(|client| filter.matches(ClientAddr::Inet(client.parse().unwrap())))
                .collect();
            assert_eq!(matching, expected.iter().collect::<Vec<_>>(), "{text}");
        }
        for wrong in [
            "",
            "web",
            "192.0.2.7:",
            "192.0.2.7:x",
            "10.0.0.0/8:80",
            "[::1",
            "[::1]x",
            "::/129",
            "[::1]:99999",
        ] {
            let message = wrong.parse::<ClientFilter>().expect_err(wrong);
            assert!(message.contains("192.0.2.7:5000"), "{message}");
        }
        assert!("fe80::1%nowhere".parse::<ClientFilter>().unwrap_err().contains("no interface nowhere"));
    }

    #[test]
    fn a_star_stands_for_any_text() {
        for (pattern, matching, others) in [
            ("web", &["web"][..], &["web2", "we", "Web"][..]),
            ("web*", &["web", "web2", "web*"], &["aweb"]),
            ("*web", &["web", "aweb"], &["web2"]),
            ("a*a", &["aa", "aba"], &["a", "ab"]),
            ("*/tcp", &["80/tcp", "docker/tcp/0.0.0.0:80/tcp"], &["80/udp"]),
            ("a*b*c*d", &["abcd", "axbxcxd", "abbccd"], &["acbd", "abcdx"]),
            ("*", &["", "x"], &[]),
            ("**", &["x"], &[]),
        ] {
            let pattern: NamePattern = pattern.parse().unwrap();
            matching.iter().for_each(|name| assert!(pattern.matches(name), "{pattern:?} {name}"));
            others.iter().for_each(|name| assert!(!pattern.matches(name), "{pattern:?} {name}"));
        }
        for wrong in ["", "a b", "-x", "a\nb", &"x".repeat(129)] {
            wrong.parse::<NamePattern>().unwrap_err();
        }
        assert_eq!("web".parse::<NamePattern>().unwrap().exact(), Some("web"));
        assert_eq!("we*".parse::<NamePattern>().unwrap().exact(), None);
    }
}
