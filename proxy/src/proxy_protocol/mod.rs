//! The PROXY protocol: a header before the first byte of a connection, or in a datagram, tells a server the address of
//! the client behind a proxy (HAProxy, doc/proxy-protocol.txt; sections are those of that text).
//!
//! This is the codec alone: it neither reads nor writes sockets.

mod v1;
mod v2;

use std::net::SocketAddr;

use rproxy_mapping::addr::{Protocol, canonical, wildcard_of};
use rproxy_mapping::proxy_protocol::ProxyVersion;

/// The longest header that is accepted, in bytes. Senders are told not to exceed it, as it fits a segment of any path
/// (section 2.2).
pub const LONGEST: usize = 536;

/// The two ends of a client's connection or flow, of one address family and without IPv4-mapped addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Endpoints {
    source: SocketAddr,
    destination: SocketAddr,
}

impl Endpoints {
    /// From the client at `source` to the address that it asked, `destination`. If that is of the other family, it
    /// becomes the unspecified address: a header has one family.
    pub fn new(source: SocketAddr, destination: SocketAddr) -> Self {
        let [source, mut destination] = [source, destination].map(|addr| {
            // A scope means nothing to another machine.
            SocketAddr::new(canonical(addr).ip(), addr.port())
        });
        if source.is_ipv4() != destination.is_ipv4() {
            destination.set_ip(wildcard_of(source.ip()));
        }
        Self { source, destination }
    }

    /// The client's address.
    pub fn source(&self) -> SocketAddr {
        self.source
    }

    /// The address that the client asked.
    pub fn destination(&self) -> SocketAddr {
        self.destination
    }

    /// The header in `version` for a connection of these endpoints, or version 2 for their datagrams.
    pub fn header(&self, version: ProxyVersion, protocol: Protocol) -> Vec<u8> {
        let mut header = Vec::with_capacity(v1::LONGEST);
        match (version, protocol) {
            (ProxyVersion::V1, Protocol::Tcp) => v1::encode(self, &mut header),
            _ => v2::encode(self, protocol, &mut header),
        }
        header
    }
}

/// The header in `version` for a connection whose client has no address (`UNKNOWN`, `UNSPEC`): it has come by a Unix socket.
pub fn header_without_addresses(version: ProxyVersion) -> Vec<u8> {
    let mut header = Vec::with_capacity(v2::FIXED);
    match version {
        ProxyVersion::V1 => v1::encode_unknown(&mut header),
        ProxyVersion::V2 => v2::encode_unspecified(&mut header),
    }
    header
}

/// A header that was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Its length in bytes, with everything that is skipped. What follows is the client's.
    pub len: usize,
    /// Whom it speaks for. `None` if it leaves that to the connection: a health check of the proxy itself (`LOCAL`), or
    /// an address that is not one of this protocol (`UNKNOWN`, `UNSPEC`, Unix sockets).
    pub endpoints: Option<Endpoints>,
}

/// Reads the header at the start of a connection. Returns `None` if `bytes` are the start of one, and there have to be
/// more.
///
/// # Errors
/// [`HeaderError`], as soon as no more bytes can make them a header.
pub fn decode_stream(bytes: &[u8]) -> Result<Option<Header>, HeaderError> {
    let starts_like = |signature: &[u8]| {
        let len = signature.len().min(bytes.len());
        bytes[..len] == signature[..len]
    };
    if starts_like(v1::SIGNATURE) {
        v1::decode(bytes)
    } else if starts_like(v2::SIGNATURE) {
        v2::decode(bytes, Protocol::Tcp)
    } else {
        Err(HeaderError::Missing)
    }
}

/// Reads the header at the start of a datagram, which is in version 2 and complete.
///
/// # Errors
/// [`HeaderError`]
pub fn decode_datagram(bytes: &[u8]) -> Result<Header, HeaderError> {
    if !bytes.starts_with(v2::SIGNATURE) {
        return Err(HeaderError::Missing);
    }
    v2::decode(bytes, Protocol::Udp)?.ok_or(HeaderError::Incomplete)
}

/// Why bytes are not a header that is accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// They begin in another way.
    #[error("it does not begin with a header of the PROXY protocol")]
    Missing,
    /// The datagram ends before the header does.
    #[error("the datagram ends before its header")]
    Incomplete,
    /// The line of version 1 does not end where it has to.
    #[error("a header of version 1 has no CRLF within {} bytes", v1::LONGEST)]
    Endless,
    /// The line of version 1 has another form.
    #[error("a header of version 1 is not of the form PROXY TCP4|TCP6 SOURCE DESTINATION PORT PORT")]
    Line,
    /// The version in the binary form.
    #[error("a binary header has version {0}, not 2")]
    Version(u8),
    /// The command of version 2.
    #[error("a header has the unknown command {0}")]
    Command(u8),
    /// The address family and protocol of version 2.
    #[error("a header has the unknown address family and protocol {0:#04x}")]
    Family(u8),
    /// The addresses do not fit in it.
    #[error("a header is too short for its addresses")]
    Short,
    /// It is longer than [`LONGEST`].
    #[error("a header has {0} bytes, more than {LONGEST}")]
    Long(usize),
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::IpAddr;

    use proptest::prelude::*;

    use super::*;

    pub(crate) fn endpoints(source: &str, destination: &str) -> Endpoints {
        Endpoints::new(source.parse().unwrap(), destination.parse().unwrap())
    }

    #[test]
    fn endpoints_are_of_one_family_and_without_mapped_addresses() {
        let told = |source, destination| {
            let endpoints = endpoints(source, destination);
            [endpoints.source().to_string(), endpoints.destination().to_string()]
        };
        assert_eq!(told("[::ffff:10.0.0.1]:1", "[::ffff:10.0.0.2]:2"), ["10.0.0.1:1", "10.0.0.2:2"]);
        assert_eq!(told("[fe80::1%3]:1", "[fd00::2]:2"), ["[fe80::1]:1", "[fd00::2]:2"]);
        assert_eq!(told("10.0.0.1:1", "[::]:2"), ["10.0.0.1:1", "0.0.0.0:2"]);
        assert_eq!(told("[fd00::1]:1", "10.0.0.2:2"), ["[fd00::1]:1", "[::]:2"]);
    }

    #[test]
    fn what_cannot_become_a_header_is_refused_at_its_first_byte() {
        for bytes in [&b"G"[..], b"PROXX", b"PROXY\t", b"\r\n\r\n\0\r\nQUIP", b"\n", b"\0"] {
            assert_eq!(decode_stream(bytes), Err(HeaderError::Missing), "{bytes:?}");
        }
        for bytes in [&b""[..], b"P", b"PROXY ", b"\r", b"\r\n\r\n\0\r\nQUIT\n"] {
            assert_eq!(decode_stream(bytes), Ok(None), "{bytes:?}");
        }
    }

    #[test]
    fn a_datagram_has_a_whole_header_of_version_2() {
        let header = endpoints("192.0.2.1:1", "192.0.2.2:2").header(ProxyVersion::V2, Protocol::Udp);
        assert!(decode_datagram(&header).is_ok());
        assert_eq!(decode_datagram(&header[..header.len() - 1]), Err(HeaderError::Incomplete));
        assert_eq!(decode_datagram(b""), Err(HeaderError::Missing));
        assert_eq!(decode_datagram(b"PROXY UNKNOWN\r\n"), Err(HeaderError::Missing));
    }

    #[test]
    fn datagrams_have_version_2_whatever_is_asked_for() {
        let endpoints = endpoints("192.0.2.1:1", "192.0.2.2:2");
        let [v1, v2] = [ProxyVersion::V1, ProxyVersion::V2].map(|it| endpoints.header(it, Protocol::Udp));
        assert_eq!(v1, v2);
    }

    pub(crate) fn any_endpoints() -> impl Strategy<Value = Endpoints> {
        let addr = || (any::<IpAddr>(), any::<u16>()).prop_map(|(ip, port)| SocketAddr::new(ip, port));
        (addr(), addr()).prop_map(|(source, destination)| Endpoints::new(source, destination))
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_whatever_follows_and_not_before_it_is_whole(
            endpoints in any_endpoints(), rest in prop::collection::vec(any::<u8>(), 0..80), v1 in any::<bool>()
        ) {
            let version = if v1 { ProxyVersion::V1 } else { ProxyVersion::V2 };
            let mut bytes = endpoints.header(version, Protocol::Tcp);
            let len = bytes.len();
            let header = Header { len, endpoints: Some(endpoints) };
            bytes.extend(&rest);
            prop_assert_eq!(decode_stream(&bytes), Ok(Some(header)));
            for end in 0..len {
                prop_assert_eq!(decode_stream(&bytes[..end]), Ok(None));
            }
            let mut datagram = endpoints.header(version, Protocol::Udp);
            let len = datagram.len();
            datagram.extend(&rest);
            prop_assert_eq!(decode_datagram(&datagram), Ok(Header { len, endpoints: Some(endpoints) }));
        }

        #[test]
        fn no_bytes_are_too_much(bytes in prop::collection::vec(any::<u8>(), 0..600), signed in any::<bool>()) {
            let bytes = if signed { [v2::SIGNATURE, &bytes].concat() } else { [v1::SIGNATURE, &bytes].concat() };
            if let Ok(Some(header)) = decode_stream(&bytes) {
                prop_assert!(header.len <= LONGEST.min(bytes.len()));
            }
            decode_datagram(&bytes).ok();
        }
    }
}
