//! What the supervisor asks its relay: `docs/control.md` describes the protocol.

use std::os::fd::BorrowedFd;

use rproxy_mapping::source::Source;
use rproxy_mapping::wire::{WireLimits, WireMapping};
use serde::{Deserialize, Serialize};

use super::held::{Held, Range};
use crate::host_ip::HostIp;
use crate::relay::channel::Channel;
use crate::relayed::{RelayedPort, ports};

/// The version of the protocol.
const VERSION: u32 = 1;

#[derive(Serialize)]
struct Envelope {
    v: u32,
    #[serde(rename = "do")]
    request: Request,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Request {
    /// Serve these mappings as well.
    Add { mappings: Vec<WireMapping> },
    /// Serve this mapping no more, and cut its connections.
    Remove { name: String, cut: bool },
    /// Serve exactly these mappings, and cut the connections of others.
    Apply { mappings: Vec<WireMapping>, cut: bool },
}

#[derive(Deserialize)]
struct Answer {
    error: Option<Refusal>,
}

#[derive(Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Refusal {
    pub(super) message: String,
    /// The name of the mapping because of which it refuses, if there is one.
    pub(super) mapping: Option<String>,
}

impl Refusal {
    fn of(message: String) -> Self {
        Self { message, mapping: None }
    }
}

/// Why the relay does not serve what it should.
#[derive(Debug)]
pub(super) enum Failed {
    /// It refuses.
    Refused(Refusal),
    /// It does not answer.
    Silent(String),
}

impl Failed {
    /// The reason.
    pub(super) fn why(self) -> String {
        match self {
            Self::Refused(Refusal { message: why, .. }) | Self::Silent(why) => why,
        }
    }
}

/// Has the relay serve exactly the ports of `wanted`, of which the new ones have these sockets.
pub(super) fn apply(channel: &mut Channel, wanted: &Held, sockets: &[BorrowedFd<'_>]) -> Result<(), Failed> {
    ask(channel, Request::Apply { mappings: mappings(wanted), cut: true }, sockets)
}

/// Has the relay serve the ports of `more` as well, which have these sockets: all of them, or none.
pub(super) fn add(channel: &mut Channel, more: &Held, sockets: &[BorrowedFd<'_>]) -> Result<(), Failed> {
    ask(channel, Request::Add { mappings: mappings(more) }, sockets)
}

/// Has the relay serve a range no more.
pub(super) fn remove(channel: &mut Channel, range: &Range) -> Result<(), Failed> {
    ask(channel, Request::Remove { name: range.name(), cut: true }, &[])
}

fn ask(channel: &mut Channel, request: Request, sockets: &[BorrowedFd<'_>]) -> Result<(), Failed> {
    let envelope = Envelope { v: VERSION, request };
    let line =
        serde_json::to_string(&envelope).map_err(|error| Failed::Refused(Refusal::of(error.to_string())))?;
    let failed = |error| Failed::Silent(format!("it does not answer: {error}"));
    channel.send(line, sockets).map_err(failed)?;
    let line = channel.receive().map_err(failed)?;
    understood(&line.text)
}

/// What the relay has answered.
fn understood(line: &[u8]) -> Result<(), Failed> {
    let answer: Answer = serde_json::from_slice(line)
        .map_err(|error| Failed::Refused(Refusal::of(format!("its answer is not understood: {error}"))))?;
    answer.error.map_or(Ok(()), |refusal| Err(Failed::Refused(refusal)))
}

fn mappings(ports: &Held) -> Vec<WireMapping> {
    let ranges = ports.ranges();
    ranges.iter().filter_map(Range::ends).map(|(first, last)| mapping(first, last)).collect()
}

/// The mapping of a range of ports.
fn mapping(first: &RelayedPort, last: &RelayedPort) -> WireMapping {
    WireMapping {
        name: Some(first.name(last.key.port)),
        // Without one, the relay listens on all addresses, as the socket does, with and without IPv6.
        host: (first.key.host != HostIp::Any).then(|| first.host()),
        host_ports: Some(ports(first.key.port, last.key.port)),
        to: first.to.ip().to_string(),
        to_ports: ports(first.to.port(), last.to.port()),
        proto: Some(first.key.proto.to_string()),
        v6only: first.is_v6only(),
        limits: WireLimits {
            source: first.keeps_source.then(|| Source::Client.to_string()),
            ..WireLimits::default()
        },
        ..WireMapping::default()
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use rproxy_mapping::addr::{Protocol, ScopedIp};
    use rproxy_mapping::interfaces::NoInterfaces;

    use super::*;
    use crate::model::MappingKey;

    #[test]
    fn a_refusal_names_its_mapping() {
        let refused = |line: &str| match understood(line.as_bytes()) {
            Err(Failed::Refused(refusal)) => (refusal.message, refusal.mapping),
            other => panic!("{other:?}"),
        };
        let text = |text: &str| text.to_owned();
        assert_eq!(
            refused(r#"{"v":1,"error":{"kind":"loop","message":"no","mapping":"web/tcp/[::]:80"}}"#),
            (text("no"), Some(text("web/tcp/[::]:80")))
        );
        assert_eq!(refused(r#"{"v":1,"error":{"kind":"busy","message":"no"}}"#), (text("no"), None));
        assert!(refused("{").0.starts_with("its answer is not understood: "));
        understood(br#"{"v":1,"ok":{"added":1}}"#).unwrap();
    }

    #[test]
    fn ports_are_a_mapping_that_the_relay_understands() {
        for (host, listens) in
            [("*", "[::]:53"), ("[::]", "[::]:53"), ("0.0.0.0", "0.0.0.0:53"), ("10.0.0.11", "10.0.0.11:53")]
        {
            let key = MappingKey { proto: Protocol::Udp, host: host.parse().unwrap(), port: 53 };
            let to: SocketAddr = "172.17.0.2:5353".parse().unwrap();
            let first = RelayedPort { key, owner: "dns".parse().unwrap(), to, keeps_source: true };
            let mut last = first.clone();
            (last.key.port, last.to) = (54, "172.17.0.2:5354".parse().unwrap());
            for (last, count) in [(&first, 1), (&last, 2)] {
                let read = mapping(&first, last).read(&NoInterfaces, ScopedIp::ANY).unwrap();
                let port = read.port_mappings().next().unwrap();
                assert_eq!((port.host.to_string().as_str(), read.port_mappings().count()), (listens, count));
                assert_eq!((port.backend.socket_addr(), port.v6only), (to, host == "[::]"));
            }
        }
    }
}
