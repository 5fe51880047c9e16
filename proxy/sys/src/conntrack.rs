//! Deletes conntrack entries of UDP flows that predate the publication of a port. They would keep an outdated
//! translation, or the lack of one (ctnetlink; `conntrack -D -p udp --orig-port-dst`).

use std::io;
use std::net::SocketAddr;

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NetlinkPayload};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Protocol, Tuple,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use nix::sys::socket::SockProtocol;

use crate::netlink::Client;

/// The family of conntrack entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4
    V4,
    /// IPv6
    V6,
}

impl From<Family> for NetfilterProtoFamily {
    fn from(family: Family) -> Self {
        match family {
            Family::V4 => Self::IPv4,
            Family::V6 => Self::IPv6,
        }
    }
}

/// The source and destination of the original direction of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Direction {
    /// The sender of the first datagram.
    pub source: SocketAddr,
    /// Its destination.
    pub destination: SocketAddr,
}

/// An entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The direction of the first datagram, as it was sent.
    pub original: Direction,
    /// That of its answers, as they arrive: its destination is another one than the source of the first datagram if that
    /// was translated.
    pub reply: Option<Direction>,
}

/// Deletes the UDP entries for which `is_stale` returns `true`, and returns their number. Entries are processed as the kernel
/// lists them, so memory use does not depend on their number.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`; `EPROTONOSUPPORT` if the kernel does not track connections.
pub fn delete_udp(family: Family, mut is_stale: impl FnMut(Entry) -> bool) -> io::Result<usize> {
    let open = || Client::open(SockProtocol::NetlinkNetFilter);
    let (lister, deleter) = (open()?, open()?);
    let mut deleted = 0;
    list(&lister, family, |Tuples { original, reply }| {
        let reply = reply.as_deref().and_then(udp_direction);
        if udp_direction(&original).is_some_and(|original| is_stale(Entry { original, reply })) {
            deleted += usize::from(delete(&deleter, family, original)?);
        }
        Ok(())
    })?;
    Ok(deleted)
}

/// The source and destination of one direction of an entry, if it is UDP.
fn udp_direction(tuple: &[Tuple]) -> Option<Direction> {
    let (mut ips, mut ports, mut is_udp) = ([None; 2], [None; 2], false);
    for part in tuple {
        match part {
            Tuple::Ip(parts) => {
                for part in parts {
                    match part {
                        IPTuple::SourceAddress(ip) => ips[0] = Some(*ip),
                        IPTuple::DestinationAddress(ip) => ips[1] = Some(*ip),
                        _ => {}
                    }
                }
            }
            Tuple::Proto(parts) => {
                is_udp = parts.contains(&ProtoTuple::Protocol(Protocol::Udp));
                for part in parts {
                    match part {
                        ProtoTuple::SourcePort(port) => ports[0] = Some(*port),
                        ProtoTuple::DestinationPort(port) => ports[1] = Some(*port),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let [source, destination] = [0, 1].map(|end| Some(SocketAddr::new(ips[end]?, ports[end]?)));
    is_udp.then_some(Direction { source: source?, destination: destination? })
}

/// Both directions of an entry.
struct Tuples {
    original: Vec<Tuple>,
    reply: Option<Vec<Tuple>>,
}

/// Calls `take` with each entry. If it fails, the remaining entries are read and ignored, because
/// the kernel has started the dump.
fn list(client: &Client, family: Family, mut take: impl FnMut(Tuples) -> io::Result<()>) -> io::Result<()> {
    client.send(request(family, ConntrackMessage::Get(Vec::new())), NLM_F_DUMP)?;
    let mut result = Ok(());
    client.receive(|payload| match payload {
        NetlinkPayload::Done(_) => Some(()),
        NetlinkPayload::InnerMessage(message) => {
            if let (Ok(()), Some(tuples)) = (&result, tuples(message)) {
                result = take(tuples);
            }
            None
        }
        _ => None,
    })?;
    result
}

/// Deletes one entry; returns `false` if it had already expired.
fn delete(client: &Client, family: Family, tuple: Vec<Tuple>) -> io::Result<bool> {
    let message = ConntrackMessage::Delete(vec![ConntrackAttribute::CtaTupleOrig(tuple)]);
    client.send(request(family, message), NLM_F_ACK)?;
    let answer = client.receive(|payload: NetlinkPayload<NetfilterMessage>| {
        matches!(payload, NetlinkPayload::Error(_)).then_some(())
    });
    match answer {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

fn request(family: Family, message: ConntrackMessage) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(family.into(), 0, 0), message)
}

fn tuples(message: NetfilterMessage) -> Option<Tuples> {
    let NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) = message.inner else {
        return None;
    };
    let (mut original, mut reply) = (None, None);
    for attribute in attributes {
        match attribute {
            ConntrackAttribute::CtaTupleOrig(tuple) => original = original.or(Some(tuple)),
            ConntrackAttribute::CtaTupleReply(tuple) => reply = reply.or(Some(tuple)),
            _ => {}
        }
    }
    Some(Tuples { original: original?, reply })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;
    use crate::netlink::messages;

    /// A dump from the kernel: a connection, and a datagram to 127.0.0.1:5300 that was redirected.
    const DUMP: &[u8] = include_bytes!("../testdata/conntrack.bin");

    /// Where the first datagrams of entries were sent to, and where their answers come from.
    fn destinations(datagram: &[u8]) -> Vec<[SocketAddr; 2]> {
        messages(datagram)
            .filter_map(|message| match message.ok()?.payload {
                NetlinkPayload::InnerMessage(message) => {
                    let Tuples { original, reply } = tuples(message)?;
                    Some([udp_direction(&original)?.destination, udp_direction(&reply?)?.source])
                }
                _ => None,
            })
            .collect()
    }

    #[test]
    fn the_destinations_of_a_dump_are_found() {
        let found = destinations(DUMP);
        assert_eq!((found.len(), found[0][0]), (1, "127.0.0.1:5300".parse().unwrap()));
        assert_ne!(found[0][1], found[0][0], "it was redirected");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

        #[test]
        fn a_damaged_dump_does_no_harm(
            changes in prop::collection::vec((any::<Index>(), any::<u8>()), 0..6),
            cut in any::<Index>(),
            is_cut in any::<bool>(),
        ) {
            let mut dump = DUMP.to_vec();
            for (at, byte) in changes {
                dump[at.index(DUMP.len())] = byte;
            }
            let end = if is_cut { cut.index(DUMP.len()) } else { DUMP.len() };
            destinations(&dump[..end]);
        }
    }

    fn tuple(protocol: Protocol, to: &str, port: u16) -> Vec<Tuple> {
        let source = IPTuple::SourceAddress([10, 0, 0, 9].into());
        let ports = [ProtoTuple::SourcePort(5353), ProtoTuple::DestinationPort(port)];
        vec![
            Tuple::Ip(vec![source, IPTuple::DestinationAddress(to.parse().unwrap())]),
            Tuple::Proto([vec![ProtoTuple::Protocol(protocol)], ports.to_vec()].concat()),
        ]
    }

    #[test]
    fn both_ends_of_a_udp_entry_are_found() {
        let udp = tuple(Protocol::Udp, "10.0.0.11", 53);
        let [source, destination] = ["10.0.0.9:5353", "10.0.0.11:53"].map(|addr| addr.parse().unwrap());
        assert_eq!(udp_direction(&udp), Some(Direction { source, destination }));
        assert_eq!(udp_direction(&tuple(Protocol::Tcp, "10.0.0.11", 53)), None);
        assert_eq!(udp_direction(&udp[..1]), None);
        assert_eq!(udp_direction(&udp[1..]), None);
    }
}
