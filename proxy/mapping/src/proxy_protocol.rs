//! How a mapping speaks the PROXY protocol, which tells a server the address of the client behind a proxy
//! (HAProxy, doc/proxy-protocol.txt).

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use ipnet::IpNet;

use crate::access::parse_network;

/// What a mapping tells its backend about a client, and whom it believes what they tell about theirs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyProtocol {
    /// The version of the header to send before the first byte of a connection; `None` for no header. Version 1 has no
    /// datagrams, so they always get version 2.
    pub send: Option<ProxyVersion>,
    /// Which datagrams of a flow begin with a header.
    pub send_udp: ProxyDatagrams,
    /// These peers have to send a header; its address is that of the client.
    pub accept: Vec<ProxyPeers>,
    /// The maximum time for the header of a connection to arrive.
    pub timeout: Duration,
}

impl Default for ProxyProtocol {
    fn default() -> Self {
        Self {
            send: None,
            send_udp: ProxyDatagrams::Each,
            accept: Vec::new(),
            timeout: Duration::from_secs(5),
        }
    }
}

impl ProxyProtocol {
    /// The same, where options of what is off have their defaults: they make no difference.
    #[must_use]
    pub fn normalized(self) -> Self {
        let default = Self::default();
        let send_udp = if self.send.is_some() { self.send_udp } else { default.send_udp };
        let timeout = if self.accept.is_empty() { default.timeout } else { self.timeout };
        Self { send_udp, timeout, ..self }
    }

    /// Whether headers are sent, or expected from some peers.
    pub fn is_used(&self) -> bool {
        self.send.is_some() || !self.accept.is_empty()
    }

    /// Whether a peer at `ip` has to send a header, or without an address, one of a Unix socket. An IPv4-mapped address counts
    /// as the IPv4 address.
    pub fn expects_header(&self, ip: Option<IpAddr>) -> bool {
        let ip = ip.map(|ip| ip.to_canonical());
        self.accept.iter().any(|peers| match (peers, ip) {
            (ProxyPeers::Network(network), Some(ip)) => network.contains(&ip),
            (ProxyPeers::Unix, None) => true,
            _ => false,
        })
    }
}

/// Peers that are proxies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyPeers {
    /// Those with an address in a network.
    Network(IpNet),
    /// Those that connect to a Unix socket.
    Unix,
}

/// The text of [`ProxyPeers::Unix`].
const UNIX: &str = "unix";

impl fmt::Display for ProxyPeers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network(network) => network.fmt(f),
            Self::Unix => f.write_str(UNIX),
        }
    }
}

impl FromStr for ProxyPeers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == UNIX { Ok(Self::Unix) } else { parse_network(text).map(Self::Network) }
    }
}

/// A version of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyVersion {
    /// A line of text.
    V1,
    /// Binary.
    V2,
}

impl fmt::Display for ProxyVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        })
    }
}

impl ProxyVersion {
    /// Parses a version, or `off` for no header, which a mapping can have although others have one by default.
    ///
    /// # Errors
    /// [`UnknownWord`]
    pub fn parse(text: &str) -> Result<Option<Self>, UnknownWord> {
        let known = [None, Some(Self::V1), Some(Self::V2)].into_iter();
        let word = |known: &Option<Self>| known.map_or_else(|| "off".to_owned(), |known| known.to_string());
        let known = known.into_iter().find(|known| word(known) == text);
        known.ok_or(UnknownWord("\"v1\", \"v2\" or \"off\""))
    }
}

/// Which datagrams of a flow begin with a header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProxyDatagrams {
    /// Each one, as the protocol has it: any of them may be lost.
    #[default]
    Each,
    /// The first one, for receivers that look for a header only there.
    First,
}

impl fmt::Display for ProxyDatagrams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Each => "each",
            Self::First => "first",
        })
    }
}

impl FromStr for ProxyDatagrams {
    type Err = UnknownWord;

    fn from_str(text: &str) -> Result<Self, UnknownWord> {
        let known = [Self::Each, Self::First].into_iter().find(|known| known.to_string() == text);
        known.ok_or(UnknownWord("\"each\" or \"first\""))
    }
}

/// The text is none of the words that have a meaning there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write {0}")]
pub struct UnknownWord(&'static str);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_expected_from_the_networks_of_proxies() {
        let proxies = ProxyProtocol {
            accept: vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()],
            ..ProxyProtocol::default()
        };
        let expects = |ip: &str| proxies.expects_header(Some(ip.parse().unwrap()));
        assert!(expects("10.1.2.3") && expects("::ffff:10.1.2.3") && expects("fd00::1"));
        assert!(!expects("11.1.2.3") && !expects("::ffff:11.1.2.3") && !expects("fe80::1"));
        assert!(!ProxyProtocol::default().expects_header("10.1.2.3".parse().ok()));
    }

    #[test]
    fn words_are_read_as_they_are_written() {
        for version in [ProxyVersion::V1, ProxyVersion::V2] {
            assert_eq!(ProxyVersion::parse(&version.to_string()), Ok(Some(version)));
        }
        for datagrams in [ProxyDatagrams::Each, ProxyDatagrams::First] {
            assert_eq!(datagrams.to_string().parse(), Ok(datagrams));
        }
        assert_eq!(ProxyVersion::parse("off"), Ok(None));
        let wrong = ProxyVersion::parse("v3").unwrap_err();
        assert_eq!(wrong.to_string(), "write \"v1\", \"v2\" or \"off\"");
        "all".parse::<ProxyDatagrams>().unwrap_err();
    }
}
