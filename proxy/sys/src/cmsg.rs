//! Control messages of UDP sockets: the local address that a datagram was sent to or is sent from (ip(7)
//! `IP_PKTINFO`, ipv6(7) `IPV6_PKTINFO`), its traffic class (ip(7) `IP_TOS`, RFC 3542 `IPV6_TCLASS`), the
//! segment size of a GSO batch (udp(7) `UDP_GRO` and `UDP_SEGMENT`), and the number of dropped datagrams
//! (socket(7) `SO_RXQ_OVFL`).
//!
//! The layout is that of cmsg(3): a header with length, level and type, then the data, each aligned to a
//! word. It is read and written as plain bytes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nix::libc::{
    IP_PKTINFO, IP_TOS, IPPROTO_IP, IPPROTO_IPV6, IPV6_PKTINFO, IPV6_TCLASS, SO_RXQ_OVFL, SOL_SOCKET,
    SOL_UDP, UDP_GRO, UDP_SEGMENT,
};

/// Room for all control messages of a received datagram: both kinds of packet information (32 and 40 bytes
/// with their headers), both kinds of traffic class, a segment size and a drop count (24 each), and further
/// messages, such as timestamps, that whoever passed the socket may have enabled.
pub(crate) const SPACE: usize = 256;

/// Room for those of a datagram to send: one kind of packet information, both kinds of traffic class, and a
/// segment size.
const SENT_SPACE: usize = 128;

const WORD: usize = size_of::<usize>();
/// Length, level and type.
const HEADER: usize = WORD + 2 * size_of::<i32>();

/// A local address, as the kernel reports it for a received datagram or accepts it for one to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LocalAddr {
    /// The address, in the family of the datagram, which may differ from that of the socket.
    pub ip: IpAddr,
    /// The index of the interface. When sending, 0 leaves the choice to the routing table.
    pub interface: u32,
}

/// The decoded control messages of a received datagram.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// The address it was sent to; `None` if the socket does not report it.
    pub local: Option<LocalAddr>,
    /// The size in bytes of the datagrams of a GSO batch, of which the last may be shorter. `None` for a
    /// single datagram.
    pub segment: Option<u16>,
    /// The traffic class (IPv4: type of service): the code point (RFC 2474) in the upper six bits, and ECN
    /// (RFC 3168) in the lower two. 0 if the socket does not report it.
    pub class: u8,
    /// How many datagrams the socket has dropped since it was opened, if reported; the counter wraps.
    pub dropped: u32,
}

/// Decodes the control messages in `bytes`. Unknown, damaged or truncated ones are skipped.
pub(crate) fn decode(mut bytes: &[u8]) -> Received {
    let mut received = Received::default();
    while let Some((level, kind, data, rest)) = next(bytes) {
        match (level, kind) {
            (IPPROTO_IP, IP_PKTINFO) => received.local = pktinfo_v4(data),
            // An IPv6 socket reports both for IPv4 datagrams. This one does not replace broadcast addresses.
            (IPPROTO_IPV6, IPV6_PKTINFO) => received.local = received.local.or_else(|| pktinfo_v6(data)),
            (IPPROTO_IP, IP_TOS) => received.class = data.first().copied().unwrap_or_default(),
            (IPPROTO_IPV6, IPV6_TCLASS) => {
                received.class =
                    read_i32(data).and_then(|class| u8::try_from(class).ok()).unwrap_or_default();
            }
            (SOL_UDP, UDP_GRO) => received.segment = segment(data),
            (SOL_SOCKET, SO_RXQ_OVFL) => {
                received.dropped = read_i32(data).unwrap_or_default().cast_unsigned()
            }
            _ => {}
        }
        bytes = rest;
    }
    received
}

/// Splits off the first control message. Returns its level, type and data, and the rest.
fn next(bytes: &[u8]) -> Option<(i32, i32, &[u8], &[u8])> {
    let (header, _) = bytes.split_at_checked(HEADER)?;
    let (len, level_and_kind) = header.split_at(WORD);
    let len = usize::from_ne_bytes(len.try_into().ok()?);
    let data = bytes.get(HEADER..len)?;
    let (level, kind) = level_and_kind.split_at(size_of::<i32>());
    let rest = bytes.get(len.next_multiple_of(WORD)..).unwrap_or_default();
    Some((read_i32(level)?, read_i32(kind)?, data, rest))
}

fn read_i32(bytes: &[u8]) -> Option<i32> {
    Some(i32::from_ne_bytes(*bytes.first_chunk()?))
}

/// `struct in_pktinfo`: interface, local address, destination in the header. Replies are sent from the
/// second, because the third may be a broadcast address.
fn pktinfo_v4(data: &[u8]) -> Option<LocalAddr> {
    let interface = read_i32(data)?.unsigned_abs();
    let ip = Ipv4Addr::from(*data.get(4..)?.first_chunk::<4>()?);
    usable(ip.into(), interface)
}

/// `struct in6_pktinfo`: destination in the header, interface.
fn pktinfo_v6(data: &[u8]) -> Option<LocalAddr> {
    let ip = Ipv6Addr::from(*data.first_chunk::<16>()?);
    let interface = read_i32(data.get(16..)?)?.unsigned_abs();
    usable(ip.into(), interface)
}

/// Accepts addresses from which a reply can be sent: not multicast addresses, nor the unspecified address of
/// a datagram that was queued before the socket was set to report addresses.
fn usable(ip: IpAddr, interface: u32) -> Option<LocalAddr> {
    let canonical = ip.to_canonical();
    let answerable = !canonical.is_multicast() && !canonical.is_unspecified();
    answerable.then_some(LocalAddr { ip, interface })
}

/// The kernel writes an int. A size too large for a datagram is ignored.
fn segment(data: &[u8]) -> Option<u16> {
    read_i32(data).and_then(|size| u16::try_from(size).ok()).filter(|size| *size > 0)
}

/// Encodes the control messages of a datagram or GSO batch to send.
#[derive(Debug)]
pub(crate) struct Encoder {
    bytes: [u8; SENT_SPACE],
    len: usize,
}

impl Encoder {
    /// Encodes the source address, the segment size and the traffic class. The class is encoded for both
    /// families; the kernel uses the one that fits the destination.
    pub(crate) fn new(source: Option<LocalAddr>, segment: Option<u16>, class: u8) -> Self {
        let mut encoder = Self { bytes: [0; SENT_SPACE], len: 0 };
        match source {
            Some(LocalAddr { ip: IpAddr::V4(ip), interface }) => encoder.push_pktinfo_v4(ip, interface),
            Some(LocalAddr { ip: IpAddr::V6(ip), interface }) => encoder.push_pktinfo_v6(ip, interface),
            None => {}
        }
        if let Some(segment) = segment {
            encoder.push(SOL_UDP, UDP_SEGMENT, &segment.to_ne_bytes());
        }
        if class != 0 {
            let class = i32::from(class).to_ne_bytes();
            encoder.push(IPPROTO_IP, IP_TOS, &class);
            encoder.push(IPPROTO_IPV6, IPV6_TCLASS, &class);
        }
        encoder
    }

    /// The encoded messages; empty if there are none.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn push_pktinfo_v4(&mut self, ip: Ipv4Addr, interface: u32) {
        let mut info = [0; 12];
        info[..4].copy_from_slice(&interface.to_ne_bytes());
        info[4..8].copy_from_slice(&ip.octets());
        self.push(IPPROTO_IP, IP_PKTINFO, &info);
    }

    fn push_pktinfo_v6(&mut self, ip: Ipv6Addr, interface: u32) {
        let mut info = [0; 20];
        info[..16].copy_from_slice(&ip.octets());
        info[16..].copy_from_slice(&interface.to_ne_bytes());
        self.push(IPPROTO_IPV6, IPV6_PKTINFO, &info);
    }

    fn push(&mut self, level: i32, kind: i32, data: &[u8]) {
        let len = HEADER + data.len();
        let message = &mut self.bytes[self.len..];
        message[..WORD].copy_from_slice(&len.to_ne_bytes());
        message[WORD..WORD + 4].copy_from_slice(&level.to_ne_bytes());
        message[WORD + 4..HEADER].copy_from_slice(&kind.to_ne_bytes());
        message[HEADER..len].copy_from_slice(data);
        self.len += len.next_multiple_of(WORD);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn local(ip: &str, interface: u32) -> LocalAddr {
        LocalAddr { ip: ip.parse().unwrap(), interface }
    }

    #[test]
    fn what_is_encoded_is_decoded() {
        for source in [local("10.0.0.11", 0), local("fe80::1", 7), local("::ffff:10.0.0.11", 0)] {
            for class in [0, 0b1011_1001, u8::MAX] {
                let received = decode(Encoder::new(Some(source), None, class).bytes());
                assert_eq!((received.local, received.class), (Some(source), class));
            }
        }
        assert!(Encoder::new(None, None, 0).bytes().is_empty());
    }

    #[test]
    fn the_layout_is_the_kernels() {
        let encoder = Encoder::new(Some(local("10.0.0.11", 2)), Some(1400), 0);
        let mut wanted = Vec::new();
        wanted.extend(28_usize.to_ne_bytes());
        wanted.extend([IPPROTO_IP, IP_PKTINFO, 2].map(i32::to_ne_bytes).concat());
        wanted.extend([10, 0, 0, 11, 0, 0, 0, 0, 0, 0, 0, 0]);
        wanted.extend(18_usize.to_ne_bytes());
        wanted.extend([SOL_UDP, UDP_SEGMENT].map(i32::to_ne_bytes).concat());
        wanted.extend(1400_u16.to_ne_bytes());
        wanted.extend([0; 6]);
        assert_eq!(encoder.bytes(), wanted);
    }

    #[test]
    fn addresses_that_nothing_can_be_sent_from_are_left_out() {
        for ip in ["0.0.0.0", "::", "224.0.0.251", "ff02::1", "::ffff:224.0.0.1"] {
            let encoder = Encoder::new(Some(local(ip, 1)), None, 0);
            assert_eq!(decode(encoder.bytes()), Received::default(), "{ip}");
        }
    }

    #[test]
    fn the_segment_size_of_a_train_is_read() {
        let mut bytes = Encoder::new(Some(local("::1", 1)), None, 0);
        bytes.push(SOL_UDP, UDP_GRO, &1200_i32.to_ne_bytes());
        let received = decode(bytes.bytes());
        assert_eq!(
            received,
            Received { local: Some(local("::1", 1)), segment: Some(1200), ..Received::default() }
        );
    }

    #[test]
    fn the_class_of_ipv4_is_a_byte_and_that_of_ipv6_an_int() {
        let mut bytes = Encoder::new(None, None, 0);
        bytes.push(IPPROTO_IP, IP_TOS, &[0xb9]);
        bytes.push(SOL_SOCKET, SO_RXQ_OVFL, &u32::MAX.to_ne_bytes());
        assert_eq!(decode(bytes.bytes()), Received { class: 0xb9, dropped: u32::MAX, ..Received::default() });
        for (class, read) in [(0xb9, 0xb9), (-1, 0), (256, 0)] {
            let mut bytes = Encoder::new(None, None, 0);
            bytes.push(IPPROTO_IPV6, IPV6_TCLASS, &i32::to_ne_bytes(class));
            assert_eq!(decode(bytes.bytes()).class, read);
        }
    }

    #[test]
    fn the_class_is_said_for_either_family() {
        let mut wanted = Vec::new();
        for (level, kind) in [(IPPROTO_IP, IP_TOS), (IPPROTO_IPV6, IPV6_TCLASS)] {
            wanted.extend(20_usize.to_ne_bytes());
            wanted.extend([level, kind, 0xb9].map(i32::to_ne_bytes).concat());
            wanted.extend([0; 4]);
        }
        assert_eq!(Encoder::new(None, None, 0xb9).bytes(), wanted);
    }

    #[test]
    fn all_that_can_be_sent_fits() {
        let most = Encoder::new(Some(local("fe80::1", 1)), Some(1400), 1);
        assert!(most.bytes().len() <= SENT_SPACE);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic_or_loop(bytes in prop::collection::vec(any::<u8>(), 0..SPACE)) {
            decode(&bytes);
        }

        #[test]
        fn damage_behind_a_message_does_not_reach_it(tail in prop::collection::vec(any::<u8>(), 0..15)) {
            let source = local("10.0.0.11", 3);
            let mut bytes = Encoder::new(Some(source), None, 0).bytes().to_vec();
            bytes.extend(tail);
            prop_assert_eq!(decode(&bytes).local, Some(source));
        }
    }
}
