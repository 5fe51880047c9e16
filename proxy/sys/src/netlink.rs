//! Netlink datagrams (netlink(7)).

use netlink_packet_core::{DecodeError, NetlinkDeserializable, NetlinkMessage};

/// The messages in a datagram of the kernel, in order. One that cannot be read is the last.
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

/// Where the message behind one of `length` bytes begins: on the next four (`NLMSG_ALIGN`), and never at
/// the same place.
fn padded(length: u32) -> usize {
    (length as usize).next_multiple_of(4).max(4)
}
