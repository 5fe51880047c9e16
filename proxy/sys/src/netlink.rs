//! Parsing netlink datagrams (netlink(7)).

use netlink_packet_core::{DecodeError, NetlinkDeserializable, NetlinkMessage};

/// The messages in a datagram from the kernel, in order. Parsing stops after one that is invalid.
pub fn messages<M: NetlinkDeserializable>(
    datagram: &[u8],
) -> impl Iterator<Item = Result<NetlinkMessage<M>, DecodeError>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let message = NetlinkMessage::deserialize(rest);
        rest = match &message {
            Ok(message) => rest.get(padded(message.header.length)..).unwrap_or_default(),
            Err(_) => &[],
        };
        Some(message)
    })
}

/// The distance from a message of `length` bytes to the next one: aligned to four bytes (`NLMSG_ALIGN`), and
/// never 0.
fn padded(length: u32) -> usize {
    (length as usize).next_multiple_of(4).max(4)
}
