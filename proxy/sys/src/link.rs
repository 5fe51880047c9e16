//! The interfaces and their addresses, and how they change (rtnetlink(7)). This takes no privilege.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use netlink_packet_core::{
    DecodeError, NLM_F_DUMP, NetlinkDeserializable, NetlinkHeader, NetlinkPayload, NlasIterator,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::LinkMessage;
use nix::libc;
use nix::sys::socket::{MsgFlags, NetlinkAddr, SockProtocol, bind, recv};

use crate::netlink::{BUFFER_SIZE, Client, messages};

/// A dump during which something has changed (`NLM_F_DUMP_INTR`, linux/netlink.h).
const DUMP_INTERRUPTED: u16 = 0x10;

/// The lengths of `struct ifinfomsg` and `struct ifaddrmsg`, before the attributes.
const LINK_HEADER: usize = 16;
const ADDRESS_HEADER: usize = 8;

/// An interface or one of its addresses, as it is from now on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// An interface has this name.
    Link {
        /// Its index.
        index: u32,
        /// Its name.
        name: String,
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
        ip: IpAddr,
        /// The length of its prefix: an interface may have an address more than once.
        prefix: u8,
        /// Whether it can be bound: no duplicate of it is looked for (RFC 4862, section 5.4), or has been found.
        is_usable: bool,
    },
    /// An interface has this address no longer.
    NoAddress {
        /// The index of the interface.
        index: u32,
        /// The address.
        ip: IpAddr,
        /// The length of its prefix.
        prefix: u8,
    },
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

/// Calls `take` with all interfaces and addresses, as they are now, and with changes that come meanwhile, in order. Returns
/// whether that is all: if not, something was lost, and it has to be called again.
///
/// # Errors
/// Those of sendmsg(2) and recv(2), and those that the kernel answers.
pub fn dump(socket: BorrowedFd<'_>, mut take: impl FnMut(Change)) -> io::Result<bool> {
    let links = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let addresses = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let mut is_whole = true;
    for request in [links, addresses] {
        Client::on(socket).send(request, NLM_F_DUMP)?;
        is_whole &= dumped(socket, &mut take)?;
    }
    Ok(is_whole)
}

/// Receives the answers to one request, and returns whether nothing is missing.
fn dumped(socket: BorrowedFd<'_>, take: &mut impl FnMut(Change)) -> io::Result<bool> {
    let (mut buffer, mut is_whole) = (vec![0; BUFFER_SIZE], true);
    loop {
        let received = match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            // The kernel has dropped changes, but continues its answer.
            Err(nix::errno::Errno::ENOBUFS) => {
                is_whole = false;
                continue;
            }
            received => received?,
        };
        for message in messages::<Message>(&buffer[..received]) {
            let (header, payload) = message.map_err(io::Error::other)?.into_parts();
            is_whole &= header.flags & DUMP_INTERRUPTED == 0;
            match payload {
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
    let name = attribute(attributes, libc::IFLA_IFNAME)?;
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    Some(Change::Link { index, name: String::from_utf8_lossy(name).into_owned() })
}

/// Parses `struct ifaddrmsg`: family, length of the prefix, flags, scope, index, and attributes.
fn address(payload: &[u8], is_there: bool) -> Option<Change> {
    let (header, attributes) = payload.split_at_checked(ADDRESS_HEADER)?;
    let (index, prefix) = (word(header.get(4..8)?)?, header[1]);
    // Of a point-to-point link, IFA_ADDRESS is the address of the peer.
    let bytes =
        attribute(attributes, libc::IFA_LOCAL).or_else(|| attribute(attributes, libc::IFA_ADDRESS))?;
    let ip: IpAddr = match i32::from(header[0]) {
        libc::AF_INET => Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into(),
        libc::AF_INET6 => Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into(),
        _ => return None,
    };
    if !is_there {
        return Some(Change::NoAddress { index, ip, prefix });
    }
    let all_flags = attribute(attributes, libc::IFA_FLAGS).and_then(|bytes| word(&bytes));
    let flags = all_flags.unwrap_or(u32::from(header[2]));
    let is_usable = flags & libc::IFA_F_TENTATIVE == 0 || flags & libc::IFA_F_OPTIMISTIC != 0;
    Some(Change::Address { index, ip, prefix, is_usable })
}

/// The value of the first attribute of this kind.
fn attribute(attributes: &[u8], kind: u16) -> Option<Vec<u8>> {
    let mut all = NlasIterator::new(attributes).map_while(Result::ok);
    all.find(|attribute| attribute.kind() == kind).map(|attribute| attribute.value().to_vec())
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
        assert!(changes.contains(&Change::Link { index: 1, name: "lo".to_owned() }), "{changes:?}");
        let ip = [127, 0, 0, 1].into();
        assert!(
            changes.contains(&Change::Address { index: 1, ip, prefix: 8, is_usable: true }),
            "{changes:?}"
        );
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
            let change = Change::Address { index: 2, ip: ip.into(), prefix: 24, is_usable: expected };
            assert_eq!(parse(libc::RTM_NEWADDR, &message), Some(change), "{flags:x} {all_flags:x?}");
        }
    }

    #[test]
    fn the_address_of_a_peer_is_not_that_of_the_interface() {
        let attributes =
            [attribute_of(libc::IFA_ADDRESS, &[10, 0, 0, 2]), attribute_of(libc::IFA_LOCAL, &[10, 0, 0, 1])];
        let message = address_message(libc::AF_INET, 0, &attributes);
        let ip = [10, 0, 0, 1].into();
        assert_eq!(parse(libc::RTM_DELADDR, &message), Some(Change::NoAddress { index: 2, ip, prefix: 24 }));
    }

    #[test]
    fn what_bridges_say_of_their_ports_is_not_about_interfaces() {
        let link = |family: i32| {
            let mut message = vec![0; LINK_HEADER];
            message[0] = u8::try_from(family).unwrap();
            message[4..8].copy_from_slice(&3_u32.to_ne_bytes());
            [message, attribute_of(libc::IFLA_IFNAME, b"eth0\0")].concat()
        };
        let is_there = Change::Link { index: 3, name: "eth0".to_owned() };
        assert_eq!(parse(libc::RTM_NEWLINK, &link(libc::AF_UNSPEC)), Some(is_there));
        assert_eq!(parse(libc::RTM_DELLINK, &link(libc::AF_UNSPEC)), Some(Change::NoLink { index: 3 }));
        assert_eq!(parse(libc::RTM_DELLINK, &link(libc::AF_BRIDGE)), None);
    }

    proptest! {
        #[test]
        fn no_message_does_harm(kind in 14..24_u16, payload in proptest::collection::vec(any::<u8>(), 0..64)) {
            parse(kind, &payload);
        }
    }
}
