//! Requests, responses and datagrams: small messages that differ from each other and can be checked.
//!
//! ```text
//! 0        1..4   4..8                8..16      16..
//! service  zero   length or flow, LE  number, LE  pattern, from a place that the number decides
//! ```

use crate::pattern::{self, Wrong};

/// Bytes before the pattern, which is also the minimum length of a message.
pub(crate) const HEADER: usize = 16;

/// The service that the first byte of a connection or datagram selects.
pub(crate) mod service {
    /// Everything is echoed, including this byte.
    pub(crate) const ECHO: u8 = b'E';
    /// One message is echoed, followed by the end of the stream.
    pub(crate) const ONCE: u8 = b'C';
    /// The backend receives a stream, and reports whether it was correct.
    pub(crate) const SINK: u8 = b'S';
    /// The backend sends a stream.
    pub(crate) const SOURCE: u8 = b'G';
    /// A message is answered with as many bytes of the pattern as its argument says, from the same place as its own.
    pub(crate) const GET: u8 = b'R';
    /// The backend reports what it has sent on this connection of QUIC, and what of that was lost.
    pub(crate) const SENT: u8 = b'L';
    /// The backend may send the datagrams of this flow that are below this number.
    pub(crate) const PULL: u8 = b'P';
    /// The backend reports how many datagrams of this flow it has received or sent.
    pub(crate) const COUNT: u8 = b'Q';
}

/// The first bytes of a connection to [`service::SINK`] or [`service::SOURCE`], which takes a duration in
/// milliseconds.
pub(crate) fn hello(service: u8, argument: u32) -> [u8; 8] {
    let [a, b, c, d] = argument.to_le_bytes();
    [service, 0, 0, 0, a, b, c, d]
}

/// The argument of a [`hello`], or the second field of a message.
pub(crate) fn argument(message: &[u8]) -> u32 {
    u32::from_le_bytes([message[4], message[5], message[6], message[7]])
}

/// The number of a message, which must be at least [`HEADER`] long.
pub(crate) fn number(message: &[u8]) -> u64 {
    let mut number = [0; 8];
    number.copy_from_slice(&message[8..HEADER]);
    u64::from_le_bytes(number)
}

/// The length of the header of the PROXY protocol, in version 2, at the start of `bytes`; 0 without one (HAProxy,
/// doc/proxy-protocol.txt). It comes in one piece, because relays send it in one.
pub(crate) fn proxy_header(bytes: &[u8]) -> usize {
    const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
    match bytes.strip_prefix(SIGNATURE) {
        Some([_command, _family, high, low, rest @ ..]) => {
            let len = usize::from(u16::from_be_bytes([*high, *low])).min(rest.len());
            bytes.len() - rest.len() + len
        }
        _ => 0,
    }
}

/// Fills `message` with these fields; its length stays the same.
pub(crate) fn write(message: &mut [u8], service: u8, argument: u32, number: u64) {
    message[..8].copy_from_slice(&hello(service, argument));
    message[8..HEADER].copy_from_slice(&number.to_le_bytes());
    let filler = filler(argument, number, message.len());
    message[HEADER..].copy_from_slice(filler);
}

/// Checks that `message` equals what [`write()`] produces for these fields.
pub(crate) fn check(message: &[u8], service: u8, argument: u32, number: u64) -> Result<(), Wrong> {
    let right = message.len() >= HEADER
        && message[..8] == hello(service, argument)
        && message[8..HEADER] == number.to_le_bytes()
        && message[HEADER..] == *filler(argument, number, message.len());
    if right {
        return Ok(());
    }
    Err(Wrong(format!("a message of {} bytes is not number {number} of flow {argument}", message.len())))
}

fn filler(argument: u32, number: u64, message_len: usize) -> &'static [u8] {
    pattern::at(place(argument, number), message_len - HEADER)
}

/// Where the pattern of a message begins.
pub(crate) fn place(argument: u32, number: u64) -> u64 {
    u64::from(argument).wrapping_mul(7919).wrapping_add(number.wrapping_mul(61))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_a_header_is_the_message() {
        let header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x0a\0\0\x0c\xac\x11\0\x02\x30\x39\x1b\x58";
        assert_eq!(proxy_header(&[&header[..], b"Erest"].concat()), header.len());
        assert_eq!(proxy_header(header), header.len());
        assert_eq!(proxy_header(b"E"), 0);
        assert_eq!(proxy_header(b""), 0);
    }

    #[test]
    fn only_the_same_message_passes() {
        let mut message = [0; 64];
        write(&mut message, service::ECHO, 3, 17);
        assert_eq!((argument(&message), number(&message)), (3, 17));
        check(&message, service::ECHO, 3, 17).unwrap();
        check(&message, service::ECHO, 4, 17).unwrap_err();
        check(&message, service::ECHO, 3, 18).unwrap_err();
        message[40] ^= 1;
        check(&message, service::ECHO, 3, 17).unwrap_err();
    }
}
