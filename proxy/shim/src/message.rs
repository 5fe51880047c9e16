//! The messages between a shim and the process that it attaches to.
//!
//! They are the packets of a `SOCK_SEQPACKET` connection (unix(7)) to an abstract address. Integers are in
//! network byte order, and every message starts with [`MAGIC`], [`VERSION`] and its kind:
//!
//! | from | kind | content | descriptors |
//! |---|---|---|---|
//! | shim | 1, attach | protocol number (IPv4's), family (4, 6), port, address (16 bytes), scope | the listening socket |
//! | shim | 2, detach | the [`Reason`] | |
//! | other | 3, serving | | |
//! | other | 4, refused | a text in UTF-8 | |
//! | other | 5, unavailable | a text in UTF-8 | |
//! | other | 6, detached | | |

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// The abstract address where shims look for the process to attach to, without its leading NUL.
pub const DEFAULT_NAME: &str = "rproxy";

/// The environment variable with another name. If it is empty, a shim does not attach.
pub const NAME_VARIABLE: &str = "RPROXY_ATTACH";

/// The longest name in bytes: `sun_path` of unix(7) without the leading NUL.
pub const LONGEST_NAME: usize = 107;

/// The first bytes of every message, in every version.
pub const MAGIC: [u8; 4] = *b"RPXY";

/// The version of the messages.
pub const VERSION: u8 = 1;

/// The longest message in bytes.
pub const LONGEST: usize = 512;

/// The length of the part that all messages have: magic, version, kind.
const HEADER: usize = 6;

/// The length of the content of an attach message.
const ATTACH: usize = 24;

const KIND_ATTACH: u8 = 1;
const KIND_DETACH: u8 = 2;
const KIND_SERVING: u8 = 3;
const KIND_REFUSED: u8 = 4;
const KIND_UNAVAILABLE: u8 = 5;
const KIND_DETACHED: u8 = 6;

/// The protocol number of TCP (`IPPROTO_TCP`).
pub const TCP: u8 = 6;

/// The protocol number of UDP (`IPPROTO_UDP`).
pub const UDP: u8 = 17;

/// A message of a shim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Serve the socket that comes with this message.
    Attach(Attach),
    /// The port is no longer published.
    Detach(Reason),
}

/// Where the clients of the socket that comes with it are relayed to. Where they connect is known from the
/// socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attach {
    /// The protocol number, [`TCP`] or [`UDP`]; receivers refuse others.
    pub protocol: u8,
    /// The address of the container.
    pub backend: SocketAddr,
}

/// Why a port is no longer published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The runtime removes it (`SIGINT`): the container goes, and so do connections and flows.
    Unpublished,
    /// The runtime has ended (`SIGTERM`, its parent-death signal): connections and flows may go on.
    RuntimeEnded,
}

/// A message to a shim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer<'a> {
    /// Clients are served.
    Serving,
    /// The request cannot be fulfilled, and not by another process either.
    Refused(&'a str),
    /// This process cannot serve the port, but another one might.
    Unavailable(&'a str),
    /// The port is closed.
    Detached,
}

/// Why a packet is not a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MessageError {
    /// It does not start with [`MAGIC`].
    NotAMessage,
    /// It has another version.
    Version(u8),
    /// Its kind is unknown, or not for this receiver.
    Kind(u8),
    /// Its length does not fit its kind, or exceeds [`LONGEST`].
    Length(usize),
    /// It has an address of an unknown family, or an unknown reason.
    Value(u8),
}

impl core::error::Error for MessageError {}

impl core::fmt::Display for MessageError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Self::NotAMessage => f.write_str("it is not a message of a shim"),
            Self::Version(version) => {
                write!(f, "it has version {version}, and this program speaks version {VERSION}")
            }
            Self::Kind(kind) => write!(f, "it has the unknown kind {kind}"),
            Self::Length(length) => write!(f, "its length is wrong: {length} bytes"),
            Self::Value(value) => write!(f, "it has an unknown value: {value}"),
        }
    }
}

/// An encoded message.
#[derive(Clone, Debug)]
pub struct Encoded {
    bytes: [u8; LONGEST],
    length: usize,
}

impl Encoded {
    fn new(kind: u8, content: &[u8]) -> Self {
        let mut encoded = Self { bytes: [0; LONGEST], length: 0 };
        encoded.push(&MAGIC);
        encoded.push(&[VERSION, kind]);
        encoded.push(content);
        encoded
    }

    fn push(&mut self, content: &[u8]) {
        let end = self.length + content.len();
        self.bytes[self.length..end].copy_from_slice(content);
        self.length = end;
    }

    /// The bytes of the packet.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl Request {
    /// Encodes it.
    pub fn encode(&self) -> Encoded {
        match self {
            Self::Attach(attach) => Encoded::new(KIND_ATTACH, &attach.content()),
            Self::Detach(Reason::Unpublished) => Encoded::new(KIND_DETACH, &[0]),
            Self::Detach(Reason::RuntimeEnded) => Encoded::new(KIND_DETACH, &[1]),
        }
    }

    /// Decodes a packet.
    ///
    /// # Errors
    /// [`MessageError`]
    pub fn decode(packet: &[u8]) -> Result<Self, MessageError> {
        let (kind, content) = open(packet)?;
        match (kind, content) {
            (KIND_ATTACH, content) => {
                let content = content.try_into().map_err(|_wrong| MessageError::Length(packet.len()))?;
                Attach::read(content).map(Self::Attach)
            }
            (KIND_DETACH, [0]) => Ok(Self::Detach(Reason::Unpublished)),
            (KIND_DETACH, [1]) => Ok(Self::Detach(Reason::RuntimeEnded)),
            (KIND_DETACH, [reason]) => Err(MessageError::Value(*reason)),
            (KIND_DETACH, _) => Err(MessageError::Length(packet.len())),
            _ => Err(MessageError::Kind(kind)),
        }
    }
}

impl Attach {
    fn content(&self) -> [u8; ATTACH] {
        let mut content = [0; ATTACH];
        content[0] = self.protocol;
        content[2..4].copy_from_slice(&self.backend.port().to_be_bytes());
        match self.backend {
            SocketAddr::V4(backend) => {
                content[1] = 4;
                content[4..8].copy_from_slice(&backend.ip().octets());
            }
            SocketAddr::V6(backend) => {
                content[1] = 6;
                content[4..20].copy_from_slice(&backend.ip().octets());
                content[20..24].copy_from_slice(&backend.scope_id().to_be_bytes());
            }
        }
        content
    }

    fn read(content: &[u8; ATTACH]) -> Result<Self, MessageError> {
        let [protocol, family, p0, p1, address @ ..] = *content;
        let port = u16::from_be_bytes([p0, p1]);
        let [a, b, c, d, ..] = address;
        let [ip @ .., s0, s1, s2, s3] = address;
        let backend = match family {
            4 => SocketAddr::new(IpAddr::V4(Ipv4Addr::new(a, b, c, d)), port),
            6 => {
                let scope = u32::from_be_bytes([s0, s1, s2, s3]);
                SocketAddr::V6(SocketAddrV6::new(Ipv6Addr::from(ip), port, 0, scope))
            }
            other => return Err(MessageError::Value(other)),
        };
        Ok(Self { protocol, backend })
    }
}

impl<'a> Answer<'a> {
    /// Encodes it. A text that is too long loses its end.
    pub fn encode(&self) -> Encoded {
        match self {
            Self::Serving => Encoded::new(KIND_SERVING, &[]),
            Self::Refused(text) => Encoded::new(KIND_REFUSED, fitting(text)),
            Self::Unavailable(text) => Encoded::new(KIND_UNAVAILABLE, fitting(text)),
            Self::Detached => Encoded::new(KIND_DETACHED, &[]),
        }
    }

    /// Decodes a packet.
    ///
    /// # Errors
    /// [`MessageError`]
    pub fn decode(packet: &'a [u8]) -> Result<Self, MessageError> {
        let (kind, content) = open(packet)?;
        let text =
            || core::str::from_utf8(content).map_err(|error| MessageError::Length(error.valid_up_to()));
        match kind {
            KIND_REFUSED => Ok(Self::Refused(text()?)),
            KIND_UNAVAILABLE => Ok(Self::Unavailable(text()?)),
            KIND_SERVING | KIND_DETACHED if !content.is_empty() => Err(MessageError::Length(packet.len())),
            KIND_SERVING => Ok(Self::Serving),
            KIND_DETACHED => Ok(Self::Detached),
            _ => Err(MessageError::Kind(kind)),
        }
    }
}

/// The kind and the content of a packet.
fn open(packet: &[u8]) -> Result<(u8, &[u8]), MessageError> {
    let rest = packet.strip_prefix(&MAGIC).ok_or(MessageError::NotAMessage)?;
    match rest {
        [VERSION, kind, content @ ..] if packet.len() <= LONGEST => Ok((*kind, content)),
        [version, ..] if *version != VERSION => Err(MessageError::Version(*version)),
        _ => Err(MessageError::Length(packet.len())),
    }
}

/// The start of `text` that fits a message.
fn fitting(text: &str) -> &[u8] {
    let mut end = text.len().min(LONGEST - HEADER);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text.as_bytes()[..end]
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::format;
    use std::string::String;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_arrive_as_they_were_sent() {
        for backend in ["172.17.0.2:80", "[2001:db8::2]:65535", "[fe80::1%7]:53"] {
            let request = Request::Attach(Attach { protocol: UDP, backend: backend.parse().unwrap() });
            assert_eq!(Request::decode(request.encode().as_bytes()), Ok(request));
        }
        for reason in [Reason::Unpublished, Reason::RuntimeEnded] {
            let request = Request::Detach(reason);
            assert_eq!(Request::decode(request.encode().as_bytes()), Ok(request));
        }
    }

    #[test]
    fn answers_arrive_as_they_were_sent_but_for_the_end_of_a_long_text() {
        let long: String = "ä".repeat(LONGEST);
        for answer in [
            Answer::Serving,
            Answer::Refused("no"),
            Answer::Unavailable("täglich"),
            Answer::Unavailable(""),
            Answer::Detached,
        ] {
            assert_eq!(Answer::decode(answer.encode().as_bytes()), Ok(answer));
        }
        let encoded = Answer::Refused(&long).encode();
        assert_eq!(Answer::decode(encoded.as_bytes()), Ok(Answer::Refused(&long[..LONGEST - HEADER])));
    }

    #[test]
    fn an_attach_message_has_the_documented_bytes() {
        let backend = "172.17.0.2:80".parse().unwrap();
        let encoded = Request::Attach(Attach { protocol: TCP, backend }).encode();
        let mut expected = Vec::from(*b"RPXY\x01\x01\x06\x04\x00\x50\xac\x11\x00\x02");
        expected.resize(HEADER + ATTACH, 0);
        assert_eq!(encoded.as_bytes(), expected);
    }

    #[test]
    fn what_is_no_message_is_refused_with_its_reason() {
        let attach = Request::Attach(Attach { protocol: TCP, backend: "192.0.2.1:80".parse().unwrap() });
        let attach = Vec::from(attach.encode().as_bytes());
        let with = |index: usize, byte: u8| {
            let mut packet = attach.clone();
            packet[index] = byte;
            packet
        };
        for (packet, error) in [
            (Vec::new(), MessageError::NotAMessage),
            (with(0, b'X'), MessageError::NotAMessage),
            (with(4, 2), MessageError::Version(2)),
            (with(5, KIND_SERVING), MessageError::Kind(KIND_SERVING)),
            (with(7, 5), MessageError::Value(5)),
            (Vec::from(b"RPXY"), MessageError::Length(4)),
            (Vec::from(b"RPXY\x01"), MessageError::Length(5)),
            (Vec::from(b"RPXY\x01\x02\x02"), MessageError::Value(2)),
            (Vec::from(b"RPXY\x01\x02"), MessageError::Length(6)),
            (Vec::from(&attach[..20]), MessageError::Length(20)),
        ] {
            assert_eq!(Request::decode(&packet), Err(error), "{packet:?}");
        }
        let mut longer = attach.clone();
        longer.resize(LONGEST + 1, 0);
        assert_eq!(Request::decode(&longer), Err(MessageError::Length(LONGEST + 1)));
        assert_eq!(Answer::decode(&attach), Err(MessageError::Kind(KIND_ATTACH)));
        assert_eq!(Answer::decode(b"RPXY\x01\x04\xff"), Err(MessageError::Length(0)));
        assert!(format!("{}", MessageError::Version(9)).contains("speaks version 1"));
    }

    proptest! {
        #[test]
        fn no_packet_makes_the_decoders_panic(header in any::<bool>(), bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            let mut packet = Vec::from(if header { &b"RPXY\x01"[..] } else { &[] });
            packet.extend(bytes);
            if let Ok(request) = Request::decode(&packet) {
                let again = request.encode();
                prop_assert_eq!(Request::decode(again.as_bytes()), Ok(request));
            }
            if let Ok(answer) = Answer::decode(&packet) {
                let again = answer.encode();
                prop_assert_eq!(again.as_bytes(), &packet[..]);
            }
        }
    }
}
