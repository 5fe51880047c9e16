//! The ports that the relay of a network serves.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use rproxy_mapping::addr::Protocol;
use serde::{Deserialize, Serialize};

use crate::host_ip::HostIp;
use crate::model::MappingKey;
use crate::name::{Id, Name};

/// A port of the host, and where its clients are relayed to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "Flat")]
pub struct RelayedPort {
    /// The port.
    #[serde(flatten)]
    pub key: MappingKey,
    /// The container.
    pub owner: Name,
    /// The address and port of the container.
    pub to: SocketAddr,
    /// Whether the container sees its clients' addresses (`source = "client"`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keeps_source: bool,
}

/// A port as it is written. There are thousands of them, and a flattened structure is read a few times more slowly.
#[derive(Deserialize)]
struct Flat {
    proto: Protocol,
    host: HostIp,
    port: u16,
    owner: Name,
    to: SocketAddr,
    #[serde(default)]
    keeps_source: bool,
}

impl From<Flat> for RelayedPort {
    fn from(Flat { proto, host, port, owner, to, keeps_source }: Flat) -> Self {
        Self { key: MappingKey { proto, host, port }, owner, to, keeps_source }
    }
}

impl RelayedPort {
    /// The name of the mapping from this port to the one with the number `last`, as `rproxy ctl` shows it:
    /// `web/tcp/[::]:80` or `web/tcp/[::]:80-89`.
    #[must_use]
    pub fn name(&self, last: u16) -> String {
        /// What is left of the 128 bytes of a name (`docs/control.md`) beside the longest address and range.
        const LONGEST_OWNER: usize = 50;
        let MappingKey { proto, port, .. } = self.key;
        let owner: String = self.owner.as_str().chars().take(LONGEST_OWNER).collect();
        format!("{owner}/{proto}/{}:{}", bracketed(&self.host()), ports(port, last))
    }

    /// The address that the relay listens on.
    #[must_use]
    pub fn host(&self) -> String {
        match self.key.host {
            HostIp::Any => Ipv6Addr::UNSPECIFIED.to_string(),
            HostIp::Ip(ip) => ip.to_string(),
            HostIp::Scoped(ip, interface) => format!("{ip}%{interface}"),
        }
    }

    /// Whether IPv4 clients are not for it, although its address is that of all IPv6 addresses.
    #[must_use]
    pub fn is_v6only(&self) -> bool {
        self.key.host == HostIp::Ip(IpAddr::V6(Ipv6Addr::UNSPECIFIED))
    }

    /// Whether `other` follows this one, in the host and in the container.
    #[must_use]
    pub fn precedes(&self, other: &Self) -> bool {
        let is_next = |one: u16, other: u16| one.checked_add(1) == Some(other);
        is_next(self.key.port, other.key.port)
            && is_next(self.to.port(), other.to.port())
            && MappingKey { port: self.key.port, ..other.key } == self.key
            && self.to.ip() == other.to.ip()
            && self.owner == other.owner
            && self.keeps_source == other.keeps_source
    }
}

/// A range of ports, or one.
#[must_use]
pub fn ports(first: u16, last: u16) -> String {
    if first == last { first.to_string() } else { format!("{first}-{last}") }
}

fn bracketed(ip: &str) -> String {
    if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() }
}

/// The log of the supervisor in the state directory. The relay's lines are in it, too.
pub const LOG: &str = "relay.log";

/// The relay's control socket in the state directory (`rproxy ctl --control`).
pub const CONTROL: &str = "relay.sock";

/// The supervisor's socket in the state directory.
pub const SUPERVISOR: &str = "supervisor.sock";

/// The files of the relay and its supervisor in the state directory.
pub const FILES: [&str; 3] = [LOG, CONTROL, SUPERVISOR];

/// How the relay of a network is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// The state directory of the network.
    pub state_dir: PathBuf,
    /// The network.
    pub network: Id,
    /// The path of `rproxy`.
    pub program: PathBuf,
}

/// Consecutive ports, as options of `rproxy`: `--host [::]:80-89 --to 172.17.0.2:80-89 --proto tcp`.
#[derive(Debug)]
pub struct Ranges<'a>(Vec<&'a [RelayedPort]>);

impl<'a> Ranges<'a> {
    /// The ranges in `ports`.
    #[must_use]
    pub fn of(ports: &'a [RelayedPort]) -> Self {
        Self(ports.chunk_by(RelayedPort::precedes).collect())
    }

    /// The name of each range in the relay.
    pub fn names(&self) -> impl Iterator<Item = String> + use<'_> {
        self.ends().map(|(first, last)| first.name(last.key.port))
    }

    fn ends(&self) -> impl Iterator<Item = (&RelayedPort, &RelayedPort)> + use<'_> {
        self.0.iter().filter_map(|range| range.first().zip(range.last()))
    }

    /// The options of each range.
    pub fn options(&self) -> impl Iterator<Item = String> + use<'_> {
        self.ends().map(|(first, last)| {
            let host = bracketed(&first.host());
            let MappingKey { proto, port, .. } = first.key;
            let (from, to) = (ports(port, last.key.port), ports(first.to.port(), last.to.port()));
            let source = if first.keeps_source { " --source client" } else { "" };
            let v6only = if first.is_v6only() { " --v6only" } else { "" };
            format!(
                "--host {host}:{from} --to {}:{to} --proto {proto}{v6only}{source}",
                bracketed(&first.to.ip().to_string())
            )
        })
    }
}

/// Several ports, as the subject of a sentence.
#[derive(Debug)]
pub struct Listed<'a>(pub &'a [RelayedPort]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => f.write_str("no port"),
            [one] => one.key.fmt(f),
            [one, other] => write!(f, "{} and {}", one.key, other.key),
            [first, rest @ ..] => write!(f, "{} and {} others", first.key, rest.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(proto: Protocol, host: &str, port: u16, to: &str) -> RelayedPort {
        let key = MappingKey { proto, host: host.parse().unwrap(), port };
        RelayedPort { key, owner: "web".parse().unwrap(), to: to.parse().unwrap(), keeps_source: false }
    }

    #[test]
    fn a_port_is_called_by_its_container_and_where_it_listens() {
        let name = |host| port(Protocol::Tcp, host, 80, "172.17.0.2:80").name(80);
        assert_eq!(name("*"), "web/tcp/[::]:80");
        assert_eq!(name("10.0.0.11"), "web/tcp/10.0.0.11:80");
        assert_eq!(name("[fe80::1%eth0]"), "web/tcp/[fe80::1%eth0]:80");
        assert_eq!(port(Protocol::Udp, "*", 80, "172.17.0.2:80").name(89), "web/udp/[::]:80-89");
        // Each is a name for rproxy.
        let longest = RelayedPort {
            owner: "x".repeat(64).parse().unwrap(),
            ..port(
                Protocol::Tcp,
                "[febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff%longinterface0]",
                10_000,
                "172.17.0.2:80",
            )
        };
        longest.name(10_001).parse::<rproxy_mapping::name::Name>().unwrap();
        for host in ["*", "0.0.0.0", "[::]", "[fe80::1%eth0]"] {
            name(host).parse::<rproxy_mapping::name::Name>().unwrap();
        }
    }

    #[test]
    fn consecutive_ports_are_a_range() {
        let tcp = |from, to| port(Protocol::Tcp, "*", from, to);
        let ports = [
            tcp(80, "172.17.0.2:8080"),
            tcp(81, "172.17.0.2:8081"),
            tcp(82, "172.17.0.2:9000"),
            port(Protocol::Udp, "[::]", 53, "[fd00::2]:53"),
        ];
        let options: Vec<_> = Ranges::of(&ports).options().collect();
        assert_eq!(
            options,
            [
                "--host [::]:80-81 --to 172.17.0.2:8080-8081 --proto tcp",
                "--host [::]:82 --to 172.17.0.2:9000 --proto tcp",
                "--host [::]:53 --to [fd00::2]:53 --proto udp --v6only",
            ]
        );
        assert_eq!(Listed(&ports).to_string(), "*:80/tcp and 3 others");
        assert_eq!(Listed(&ports[..2]).to_string(), "*:80/tcp and *:81/tcp");
    }

    #[test]
    fn a_port_is_read_as_it_was_written() {
        let port = port(Protocol::Udp, "[fe80::1%eth0]", 53, "[fd00::2]:53");
        let text = serde_json::to_string(&port).unwrap();
        assert_eq!(serde_json::from_str::<RelayedPort>(&text).unwrap(), port);
    }
}
