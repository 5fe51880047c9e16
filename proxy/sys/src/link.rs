//! The interfaces and their addresses, and how they change (rtnetlink(7)). This takes no privilege.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::{io, iter};

use netlink_packet_core::{
    DecodeError, NLM_F_DUMP, NetlinkDeserializable, NetlinkHeader, NetlinkPayload, NlaBuffer, NlasIterator,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::LinkMessage;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{MsgFlags, NetlinkAddr, SockProtocol, bind, recv, recvfrom};

use crate::netlink::{BUFFER_SIZE, Client, messages};

/// A dump during which something has changed (`NLM_F_DUMP_INTR`, linux/netlink.h).
const DUMP_INTERRUPTED: u16 = 0x10;

/// The most datagrams that are discarded before a dump, which is more than the queue of a socket can have.
const MOST_QUEUED: usize = 4096;

/// The lengths of `struct ifinfomsg` and `struct ifaddrmsg`, before the attributes.
const LINK_HEADER: usize = 16;
const ADDRESS_HEADER: usize = 8;

/// An interface or one of its addresses, as it is from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// An interface has these names.
    Link {
        /// Its index.
        index: u32,
        /// Its name, and then its alternative ones (ip-link(8), `altname`).
        names: Vec<String>,
    },
    /// There is no such interface any more.
    NoLink {
        /// Its index.
        index: u32,
    },
    /// An interface has this address.
    Address {
        /// The index of the interface.
        index: u32,
        /// The address.
        address: Address,
        /// Whether it can be bound: no duplicate of it is looked for (RFC 4862, section 5.4), or has been found.
        is_usable: bool,
    },
    /// An interface has this address no longer.
    NoAddress {
        /// The index of the interface.
        index: u32,
        /// The address.
        address: Address,
    },
}

/// An address of an interface, as the kernel tells them apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Of IPv4, the address of the peer, or the address itself, and the length of the prefix: an interface may have an address
    /// more than once. It has one of IPv6 once, whose peer may change.
    pub network: Option<(IpAddr, u8)>,
}

/// Opens a socket, for the network namespace of this thread. It is told nothing yet.
///
/// # Errors
/// Those of socket(2).
pub fn open() -> io::Result<OwnedFd> {
    Client::open(SockProtocol::NetlinkRoute).map(Client::into_inner)
}

/// Has a socket be told of all changes from now on. Once is enough.
///
/// # Errors
/// Those of bind(2).
pub fn subscribe(socket: BorrowedFd<'_>) -> io::Result<()> {
    let groups = libc::RTMGRP_LINK | libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR;
    Ok(bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups.cast_unsigned()))?)
}

/// Calls `take` with all interfaces and addresses, as they are now, and then with changes that came meanwhile, in order.
/// Returns whether that is all: if not, something was lost, and it has to be called again.
///
/// # Errors
/// Those of sendmsg(2) and recv(2), and those that the kernel answers.
pub fn dump(socket: BorrowedFd<'_>, mut take: impl FnMut(Change)) -> io::Result<bool> {
    static SEQUENCE: AtomicU32 = AtomicU32::new(1);

    let links = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let addresses = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let mut is_whole = discard(socket)?;
    let mut changes = Vec::new();
    for request in [links, addresses] {
        let sequence = SEQUENCE.fetch_add(1, Ordering::Relaxed);
        Client::on(socket).send_as(sequence, request, NLM_F_DUMP)?;
        is_whole &= dumped(socket, sequence, &mut take, &mut changes)?;
    }
    // The last change of something is at least as new as what was listed of it, whichever was received first.
    changes.into_iter().for_each(take);
    Ok(is_whole)
}

/// Discards what the kernel has told before. If changes were lost, these are older: what they say is there may be gone.
/// Returns whether that is all.
fn discard(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let mut byte = [0; 1];
    for _ in 0..MOST_QUEUED {
        match recv(socket.as_raw_fd(), &mut byte, MsgFlags::MSG_DONTWAIT) {
            Err(Errno::EAGAIN) => return Ok(true),
            // What was lost is listed, and the rest of an earlier answer does not matter.
            Ok(_) | Err(Errno::ENOBUFS | Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(false)
}

/// Receives the answers to one request, and puts changes that come meanwhile aside. Returns whether nothing is missing.
fn dumped(
    socket: BorrowedFd<'_>,
    sequence: u32,
    take: &mut impl FnMut(Change),
    changes: &mut Vec<Change>,
) -> io::Result<bool> {
    let (mut buffer, mut is_whole) = (vec![0; BUFFER_SIZE], true);
    loop {
        let (received, from) = match recvfrom::<NetlinkAddr>(socket.as_raw_fd(), &mut buffer) {
            // The kernel has dropped changes, but continues its answer.
            Err(Errno::ENOBUFS) => {
                is_whole = false;
                continue;
            }
            Err(Errno::EINTR) => continue,
            received => received?,
        };
        let is_change = from.is_some_and(|from| from.groups() != 0);
        for message in messages::<Message>(&buffer[..received]) {
            let (header, payload) = message.map_err(io::Error::other)?.into_parts();
            // Others are answers to an earlier request, which was not waited for.
            let is_answer = !is_change && header.sequence_number == sequence;
            is_whole &= !is_answer || header.flags & DUMP_INTERRUPTED == 0;
            match payload {
                NetlinkPayload::InnerMessage(Message(change)) if is_change => changes.extend(change),
                _ if !is_answer => {}
                NetlinkPayload::Done(_) => return Ok(is_whole),
                NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                NetlinkPayload::InnerMessage(Message(change)) => change.into_iter().for_each(&mut *take),
                _ => {}
            }
        }
    }
}

/// Receives one datagram, and calls `take` with its changes.
///
/// # Errors
/// `EAGAIN` if there is none; `ENOBUFS` if some were lost, after which only [`dump`] helps; and others of recv(2).
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut Vec<u8>, mut take: impl FnMut(Change)) -> io::Result<()> {
    buffer.resize(BUFFER_SIZE, 0);
    let received = recv(socket.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT)?;
    for message in messages::<Message>(&buffer[..received]) {
        if let NetlinkPayload::InnerMessage(Message(Some(change))) =
            message.map_err(io::Error::other)?.payload
        {
            take(change);
        }
    }
    Ok(())
}

/// Whether there is a message.
///
/// # Errors
/// `EAGAIN` if there is none, and others that [`receive`] returns.
pub fn has_message(socket: BorrowedFd<'_>) -> io::Result<()> {
    recv(socket.as_raw_fd(), &mut [0; 1], MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK)?;
    Ok(())
}

/// A message of the kernel, of which only what matters here is read: interfaces have dozens of attributes, and newer kernels
/// have others.
#[derive(Debug)]
struct Message(Option<Change>);

impl NetlinkDeserializable for Message {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, DecodeError> {
        Ok(Self(match header.message_type {
            libc::RTM_NEWLINK | libc::RTM_DELLINK => link(payload, header.message_type == libc::RTM_NEWLINK),
            libc::RTM_NEWADDR | libc::RTM_DELADDR => {
                address(payload, header.message_type == libc::RTM_NEWADDR)
            }
            _ => None,
        }))
    }
}

/// Parses `struct ifinfomsg`: family, type, index, flags, and attributes.
fn link(payload: &[u8], is_there: bool) -> Option<Change> {
    let (header, attributes) = payload.split_at_checked(LINK_HEADER)?;
    // Others are of bridges, and say what is a port of one.
    if i32::from(header[0]) != libc::AF_UNSPEC {
        return None;
    }
    let index = word(header.get(4..8)?)?;
    if !is_there {
        return Some(Change::NoLink { index });
    }
    // An event of a wireless interface has its name, and not the others.
    if attribute(attributes, libc::IFLA_WIRELESS).is_some() {
        return None;
    }
    let others = attribute(attributes, libc::IFLA_PROP_LIST).unwrap_or_default();
    let others = all_of(&others).filter(|attribute| attribute.kind() == libc::IFLA_ALT_IFNAME);
    let names = iter::once(text(&attribute(attributes, libc::IFLA_IFNAME)?))
        .chain(others.map(|attribute| text(attribute.value())))
        .collect();
    Some(Change::Link { index, names })
}

/// Parses `struct ifaddrmsg`: family, length of the prefix, flags, scope, index, and attributes.
fn address(payload: &[u8], is_there: bool) -> Option<Change> {
    let (header, attributes) = payload.split_at_checked(ADDRESS_HEADER)?;
    let (index, prefix) = (word(header.get(4..8)?)?, header[1]);
    let family = i32::from(header[0]);
    // Of a point-to-point link, the second is the address of the peer.
    let [own, peer] = [libc::IFA_LOCAL, libc::IFA_ADDRESS].map(|kind| attribute(attributes, kind));
    let ip = ip(family, own.as_ref().or(peer.as_ref())?)?;
    let peer = peer.and_then(|peer| self::ip(family, &peer)).unwrap_or(ip);
    let address = Address { ip, network: ip.is_ipv4().then_some((peer, prefix)) };
    if !is_there {
        return Some(Change::NoAddress { index, address });
    }
    let all_flags = attribute(attributes, libc::IFA_FLAGS).and_then(|bytes| word(&bytes));
    let flags = all_flags.unwrap_or(u32::from(header[2]));
    let is_usable = flags & libc::IFA_F_TENTATIVE == 0 || flags & libc::IFA_F_OPTIMISTIC != 0;
    Some(Change::Address { index, address, is_usable })
}

fn ip(family: i32, bytes: &[u8]) -> Option<IpAddr> {
    match family {
        libc::AF_INET => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into()),
        libc::AF_INET6 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()),
        _ => None,
    }
}

/// The value of the first attribute of this kind.
fn attribute(attributes: &[u8], kind: u16) -> Option<Vec<u8>> {
    let found = all_of(attributes).find(|attribute| attribute.kind() == kind);
    found.map(|attribute| attribute.value().to_vec())
}

fn all_of(attributes: &[u8]) -> impl Iterator<Item = NlaBuffer<&[u8]>> {
    NlasIterator::new(attributes).map_while(Result::ok)
}

/// The text before the final zero.
fn text(bytes: &[u8]) -> String {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(text).into_owned()
}

fn word(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use proptest::prelude::*;

    use super::*;

    fn parse(kind: u16, payload: &[u8]) -> Option<Change> {
        let mut header = NetlinkHeader::default();
        header.message_type = kind;
        Message::deserialize(&header, payload).unwrap().0
    }

    /// An attribute, padded to four bytes.
    fn attribute_of(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).unwrap();
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn address_message(family: i32, flags: u8, attributes: &[Vec<u8>]) -> Vec<u8> {
        let family = u8::try_from(family).unwrap();
        [&[family, 24, flags, 0][..], &2_u32.to_ne_bytes(), &attributes.concat()].concat()
    }

    #[test]
    fn this_machine_has_a_loopback_interface_and_its_address() {
        let socket = open().unwrap();
        subscribe(socket.as_fd()).unwrap();
        let mut changes = Vec::new();
        while !dump(socket.as_fd(), |change| changes.push(change)).unwrap() {}
        assert!(changes.contains(&Change::Link { index: 1, names: vec!["lo".to_owned()] }), "{changes:?}");
        let ip: IpAddr = [127, 0, 0, 1].into();
        let address = Address { ip, network: Some((ip, 8)) };
        assert!(changes.contains(&Change::Address { index: 1, address, is_usable: true }), "{changes:?}");
    }

    #[test]
    fn an_address_can_be_used_once_it_is_not_tentative() {
        let ip: Ipv6Addr = "fd00::1".parse().unwrap();
        for (flags, all_flags, expected) in [
            (0x80, None, true),
            (0x40, None, false),
            // Deprecated, and with a flag that does not fit.
            (0x20, Some(0x120_u32), true),
            (0x40, Some(0x140), false),
            // Duplicate.
            (0x48, Some(0x48), false),
            // Optimistic.
            (0x44, Some(0x44), true),
        ] {
            let mut attributes = vec![attribute_of(libc::IFA_ADDRESS, &ip.octets())];
            attributes.extend(all_flags.map(|all| attribute_of(libc::IFA_FLAGS, &all.to_ne_bytes())));
            let message = address_message(libc::AF_INET6, flags, &attributes);
            let address = Address { ip: ip.into(), network: None };
            let change = Change::Address { index: 2, address, is_usable: expected };
            assert_eq!(parse(libc::RTM_NEWADDR, &message), Some(change), "{flags:x} {all_flags:x?}");
        }
    }

    #[test]
    fn the_address_of_a_peer_is_not_that_of_the_interface() {
        let attributes =
            [attribute_of(libc::IFA_ADDRESS, &[10, 0, 0, 2]), attribute_of(libc::IFA_LOCAL, &[10, 0, 0, 1])];
        let message = address_message(libc::AF_INET, 0, &attributes);
        let address = Address { ip: [10, 0, 0, 1].into(), network: Some(([10, 0, 0, 2].into(), 24)) };
        assert_eq!(parse(libc::RTM_DELADDR, &message), Some(Change::NoAddress { index: 2, address }));
    }

    #[test]
    fn what_bridges_say_of_their_ports_is_not_about_interfaces() {
        let link = |family: i32| {
            let mut message = vec![0; LINK_HEADER];
            message[0] = u8::try_from(family).unwrap();
            message[4..8].copy_from_slice(&3_u32.to_ne_bytes());
            [message, attribute_of(libc::IFLA_IFNAME, b"eth0\0")].concat()
        };
        let is_there = Change::Link { index: 3, names: vec!["eth0".to_owned()] };
        assert_eq!(parse(libc::RTM_NEWLINK, &link(libc::AF_UNSPEC)), Some(is_there));
        assert_eq!(parse(libc::RTM_DELLINK, &link(libc::AF_UNSPEC)), Some(Change::NoLink { index: 3 }));
        assert_eq!(parse(libc::RTM_DELLINK, &link(libc::AF_BRIDGE)), None);
    }

    #[test]
    fn an_interface_may_have_several_names_which_wireless_events_do_not_list() {
        let [one, other] = [b"enp0s3\0", b"enx001\0"].map(|name| attribute_of(libc::IFLA_ALT_IFNAME, name));
        let mut message = vec![0; LINK_HEADER];
        message[4..8].copy_from_slice(&3_u32.to_ne_bytes());
        message.extend(attribute_of(libc::IFLA_IFNAME, b"eth0\0"));
        // NLA_F_NESTED
        message.extend(attribute_of(0x8000 | libc::IFLA_PROP_LIST, &[one, other].concat()));
        let names = ["eth0", "enp0s3", "enx001"].map(str::to_owned).to_vec();
        assert_eq!(parse(libc::RTM_NEWLINK, &message), Some(Change::Link { index: 3, names }));
        message.extend(attribute_of(libc::IFLA_WIRELESS, &[0; 4]));
        assert_eq!(parse(libc::RTM_NEWLINK, &message), None);
    }

    #[test]
    fn a_dump_begins_with_an_empty_queue() {
        let socket = open().unwrap();
        subscribe(socket.as_fd()).unwrap();
        // Nobody receives the answer to this request, which is not that to the next one.
        Client::on(socket.as_fd())
            .send(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP)
            .unwrap();
        let mut changes = Vec::new();
        while !dump(socket.as_fd(), |change| changes.push(change)).unwrap() {}
        let is_loopback = |change: &&Change| matches!(change, Change::Link { index: 1, .. });
        assert_eq!(changes.iter().filter(is_loopback).count(), 1, "{changes:?}");
        assert!(changes.iter().any(|change| matches!(change, Change::Address { .. })), "{changes:?}");
    }

    proptest! {
        #[test]
        fn no_message_does_harm(kind in 14..24_u16, payload in proptest::collection::vec(any::<u8>(), 0..64)) {
            parse(kind, &payload);
        }
    }
}
