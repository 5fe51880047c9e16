//! Version 2: a binary header (section 2.2).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use bytes::{Buf, BufMut};
use rproxy_mapping::addr::Protocol;

use super::{Endpoints, Header, HeaderError, LONGEST};

/// What it begins with.
pub(super) const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// The signature, then version and command, family and protocol, and the length of what follows.
pub(super) const FIXED: usize = SIGNATURE.len() + 4;

/// Version 2, in the upper four bits.
const VERSION: u8 = 2;

/// The commands: the proxy speaks for itself, or for a client.
const LOCAL: u8 = 0;
const PROXY: u8 = 1;

/// The address families, in the upper four bits.
const UNSPEC: u8 = 0;
const INET: u8 = 1;
const INET6: u8 = 2;
const UNIX: u8 = 3;

/// The transport protocols, in the lower four bits.
const STREAM: u8 = 1;
const DGRAM: u8 = 2;

/// Writes the header of a connection, or of a datagram.
pub(super) fn encode(endpoints: &Endpoints, protocol: Protocol, out: &mut impl BufMut) {
    let ends = [endpoints.source(), endpoints.destination()];
    let (family, len) = match endpoints.source() {
        SocketAddr::V4(_) => (INET, 12),
        SocketAddr::V6(_) => (INET6, 36),
    };
    out.put_slice(SIGNATURE);
    out.put_u8(VERSION << 4 | PROXY);
    out.put_u8(family << 4 | transport(protocol));
    out.put_u16(len);
    for end in ends {
        match end.ip() {
            IpAddr::V4(ip) => out.put_u32(ip.into()),
            IpAddr::V6(ip) => out.put_u128(ip.into()),
        }
    }
    ends.iter().for_each(|end| out.put_u16(end.port()));
}

/// Writes the header of a connection without addresses that the protocol can tell.
pub(super) fn encode_unspecified(out: &mut impl BufMut) {
    out.put_slice(SIGNATURE);
    out.put_u8(VERSION << 4 | PROXY);
    out.put_u8(UNSPEC << 4);
    out.put_u16(0);
}

fn transport(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp | Protocol::Sctp => STREAM,
        Protocol::Udp => DGRAM,
    }
}

/// Reads a header of a connection or a datagram that begins with [`SIGNATURE`], as far as that is there. What follows
/// the addresses (TLVs) is skipped.
///
/// # Errors
/// [`HeaderError`]
pub(super) fn decode(bytes: &[u8], protocol: Protocol) -> Result<Option<Header>, HeaderError> {
    let Some(mut fields) = bytes.get(SIGNATURE.len()..FIXED) else { return Ok(None) };
    let (version_and_command, family_and_protocol) = (fields.get_u8(), fields.get_u8());
    let len = FIXED + usize::from(fields.get_u16());
    let (version, command) = (version_and_command >> 4, version_and_command & 0xf);
    if version != VERSION {
        return Err(HeaderError::Version(version));
    }
    if len > LONGEST {
        return Err(HeaderError::Long(len));
    }
    match command {
        LOCAL => Ok((bytes.len() >= len).then_some(Header { len, endpoints: None })),
        PROXY => {
            let (family, kind) = (family_and_protocol >> 4, family_and_protocol & 0xf);
            if family > UNIX || kind > DGRAM {
                return Err(HeaderError::Family(family_and_protocol));
            }
            let Some(rest) = bytes.get(FIXED..len) else { return Ok(None) };
            let is_right = kind == transport(protocol) && family != UNSPEC && family != UNIX;
            let endpoints = if is_right { Some(addresses(family, rest)?) } else { None };
            Ok(Some(Header { len, endpoints }))
        }
        unknown => Err(HeaderError::Command(unknown)),
    }
}

fn addresses(family: u8, mut rest: &[u8]) -> Result<Endpoints, HeaderError> {
    let short = |_short| HeaderError::Short;
    let mut ip = || -> Result<IpAddr, bytes::TryGetError> {
        Ok(match family {
            INET => Ipv4Addr::from(rest.try_get_u32()?).into(),
            _ => Ipv6Addr::from(rest.try_get_u128()?).into(),
        })
    };
    let (from, to) = (ip().map_err(short)?, ip().map_err(short)?);
    let source = SocketAddr::new(from, rest.try_get_u16().map_err(short)?);
    Ok(Endpoints::new(source, SocketAddr::new(to, rest.try_get_u16().map_err(short)?)))
}

#[cfg(test)]
mod tests {
    use super::super::tests::endpoints;
    use super::*;

    fn header(version_and_command: u8, family_and_protocol: u8, rest: &[u8]) -> Vec<u8> {
        let len = u16::try_from(rest.len()).unwrap().to_be_bytes();
        [SIGNATURE, &[version_and_command, family_and_protocol], &len, rest].concat()
    }

    fn read(bytes: &[u8]) -> Result<Option<Endpoints>, HeaderError> {
        let header = decode(bytes, Protocol::Tcp)?.expect("it is whole");
        assert_eq!(header.len, bytes.len());
        Ok(header.endpoints)
    }

    const V4: [u8; 12] = [192, 0, 2, 1, 192, 0, 2, 2, 0x30, 0x39, 0x01, 0xbb];

    #[test]
    fn the_bytes_are_those_of_the_specification() {
        let ends = endpoints("192.0.2.1:12345", "192.0.2.2:443");
        let mut written = Vec::new();
        encode(&ends, Protocol::Tcp, &mut written);
        assert_eq!(written, b"\x0d\x0a\x0d\x0a\x00\x0d\x0a\x51\x55\x49\x54\x0a\x21\x11\x00\x0c\xc0\x00\x02\x01\xc0\x00\x02\x02\x30\x39\x01\xbb");
        assert_eq!(read(&written), Ok(Some(ends)));

        let ends = endpoints("[2001:db8::1]:12345", "[2001:db8::2]:443");
        written.clear();
        encode(&ends, Protocol::Udp, &mut written);
        assert_eq!((written.len(), &written[12..16]), (52, &b"\x21\x22\x00\x24"[..]));
        assert_eq!(written[16..20], [0x20, 0x01, 0x0d, 0xb8]);
        assert_eq!((written[31], written[47], &written[48..]), (1, 2, &b"\x30\x39\x01\xbb"[..]));
        let read = decode(&written, Protocol::Udp).unwrap().unwrap();
        assert_eq!(read.endpoints, Some(ends));
    }

    #[test]
    fn what_follows_the_addresses_is_skipped() {
        let tlv = [&V4[..], b"\x03\x00\x04\xfd\x16\xee\x60"].concat();
        assert_eq!(read(&header(0x21, 0x11, &tlv)), Ok(Some(endpoints("192.0.2.1:12345", "192.0.2.2:443"))));
        let longest = [&V4[..], &[0; LONGEST - FIXED - 12]].concat();
        assert!(read(&header(0x21, 0x11, &longest)).is_ok_and(|it| it.is_some()));
        let longer = [&longest[..], &[0]].concat();
        assert_eq!(read(&header(0x21, 0x11, &longer)), Err(HeaderError::Long(LONGEST + 1)));
        // It is refused before it is whole.
        let start = &header(0x21, 0x11, &[0; 60_000])[..FIXED];
        assert_eq!(decode(start, Protocol::Tcp), Err(HeaderError::Long(FIXED + 60_000)));
    }

    #[test]
    fn some_headers_leave_the_address_to_the_connection() {
        for (command, family, rest) in [
            (0x20, 0x00, &[][..]),
            (0x20, 0x11, &V4),
            (0x20, 0x11, &[][..]),
            (0x20, 0xff, &[1, 2, 3]),
            (0x21, 0x00, &[][..]),
            (0x21, 0x00, &V4),
            (0x21, 0x10, &V4),
            (0x21, 0x31, &[0; 216]),
            // A datagram in a connection.
            (0x21, 0x12, &V4),
        ] {
            assert_eq!(read(&header(command, family, rest)), Ok(None), "{command:#x} {family:#x}");
        }
        assert_eq!(decode(&header(0x21, 0x11, &V4), Protocol::Udp).unwrap().unwrap().endpoints, None);
    }

    #[test]
    fn other_headers_are_refused() {
        for (command, family, rest, error) in [
            (0x11, 0x11, &V4[..], HeaderError::Version(1)),
            (0x31, 0x11, &V4, HeaderError::Version(3)),
            (0x22, 0x11, &V4, HeaderError::Command(2)),
            (0x21, 0x41, &V4, HeaderError::Family(0x41)),
            (0x21, 0x13, &V4, HeaderError::Family(0x13)),
            (0x21, 0x11, &V4[..11], HeaderError::Short),
            (0x21, 0x21, &V4, HeaderError::Short),
            (0x21, 0x11, &[], HeaderError::Short),
        ] {
            assert_eq!(read(&header(command, family, rest)), Err(error), "{command:#x} {family:#x}");
        }
    }
}
