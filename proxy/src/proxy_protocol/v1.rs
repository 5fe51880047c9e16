//! Version 1: a line of text (section 2.1).

use std::net::{IpAddr, SocketAddr};

use bytes::BufMut;

use super::{Endpoints, Header, HeaderError};

/// What it begins with.
pub(super) const SIGNATURE: &[u8] = b"PROXY ";

/// The longest line in bytes, with its CRLF.
pub(super) const LONGEST: usize = 107;

/// Writes the header of a connection.
pub(super) fn encode(endpoints: &Endpoints, out: &mut impl BufMut) {
    let (source, destination) = (endpoints.source(), endpoints.destination());
    let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
    let [from, to, from_port, to_port] = [
        source.ip().to_string(),
        destination.ip().to_string(),
        source.port().to_string(),
        destination.port().to_string(),
    ];
    out.put_slice(SIGNATURE);
    out.put_slice([family, &from, &to, &from_port, &to_port].join(" ").as_bytes());
    out.put_slice(b"\r\n");
}

/// Writes the header of a connection without addresses that the protocol can tell.
pub(super) fn encode_unknown(out: &mut impl BufMut) {
    out.put_slice(SIGNATURE);
    out.put_slice(b"UNKNOWN\r\n");
}

/// Reads a header that begins with [`SIGNATURE`], as far as that is there.
///
/// # Errors
/// [`HeaderError`]
pub(super) fn decode(bytes: &[u8]) -> Result<Option<Header>, HeaderError> {
    let within = &bytes[..bytes.len().min(LONGEST)];
    let Some(end) = within.iter().position(|byte| *byte == b'\n') else {
        return if within.len() < LONGEST { Ok(None) } else { Err(HeaderError::Endless) };
    };
    let line = within[..end].strip_suffix(b"\r").and_then(|line| line.strip_prefix(SIGNATURE));
    let line = line.ok_or(HeaderError::Line)?;
    let endpoints = match line.strip_prefix(b"UNKNOWN") {
        // Whatever follows is ignored.
        Some([] | [b' ', ..]) => None,
        _ => Some(str::from_utf8(line).ok().and_then(endpoints).ok_or(HeaderError::Line)?),
    };
    Ok(Some(Header { len: end + 1, endpoints }))
}

/// What is between the signature and the CRLF.
fn endpoints(line: &str) -> Option<Endpoints> {
    let mut words = line.split(' ');
    let is_v4 = match words.next()? {
        "TCP4" => true,
        "TCP6" => false,
        _ => return None,
    };
    let [from, to] = [words.next()?, words.next()?].map(|word| word.parse::<IpAddr>().ok());
    let [from_port, to_port] = [words.next()?, words.next()?].map(port);
    let (source, destination) = (SocketAddr::new(from?, from_port?), SocketAddr::new(to?, to_port?));
    let is_right = words.next().is_none() && source.is_ipv4() == is_v4 && destination.is_ipv4() == is_v4;
    is_right.then(|| Endpoints::new(source, destination))
}

/// A port in decimal, without leading zeros.
fn port(word: &str) -> Option<u16> {
    let port: u16 = word.parse().ok()?;
    (port.to_string() == word).then_some(port)
}

#[cfg(test)]
mod tests {
    use super::super::tests::endpoints;
    use super::*;

    fn read(line: &str) -> Result<Option<Endpoints>, HeaderError> {
        let header = decode(line.as_bytes())?.expect("it is whole");
        assert_eq!(header.len, line.len());
        Ok(header.endpoints)
    }

    #[test]
    fn the_lines_of_the_specification() {
        let most = "255.255.255.255";
        let line = format!("PROXY TCP4 {most} {most} 65535 65535\r\n");
        let ends = endpoints("255.255.255.255:65535", "255.255.255.255:65535");
        assert_eq!((line.len(), read(&line)), (56, Ok(Some(ends))));

        let most = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
        let line = format!("PROXY TCP6 {most} {most} 65535 65535\r\n");
        let ends = endpoints(&format!("[{most}]:65535"), &format!("[{most}]:65535"));
        assert_eq!((line.len(), read(&line)), (104, Ok(Some(ends))));

        assert_eq!(read("PROXY UNKNOWN\r\n"), Ok(None));
        assert_eq!(decode(b"PROXY UNKNOWN \xff\0\r\n"), Ok(Some(Header { len: 18, endpoints: None })));
        let line = format!("PROXY UNKNOWN {most} {most} 65535 65535\r\n");
        assert_eq!((line.len(), read(&line)), (LONGEST, Ok(None)));

        let line = "PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n";
        let ends = endpoints("192.168.0.1:56324", "192.168.0.11:443");
        assert_eq!(read(line), Ok(Some(ends)));
        let mut written = Vec::new();
        encode(&ends, &mut written);
        assert_eq!(written, line.as_bytes());
    }

    #[test]
    fn a_mapped_address_is_an_ipv4_address() {
        let line = "PROXY TCP6 ::ffff:192.0.2.1 ::ffff:192.0.2.2 1 2\r\n";
        assert_eq!(read(line), Ok(Some(endpoints("192.0.2.1:1", "192.0.2.2:2"))));
    }

    #[test]
    fn other_lines_are_refused() {
        for line in [
            "PROXY \r\n",
            "PROXY TCP4\r\n",
            "PROXY tcp4 192.0.2.1 192.0.2.2 1 2\r\n",
            "PROXY UDP4 192.0.2.1 192.0.2.2 1 2\r\n",
            "PROXY TCP5 192.0.2.1 192.0.2.2 1 2\r\n",
            "PROXY TCP4 192.0.2.1 192.0.2.2 1\r\n",
            "PROXY TCP4 192.0.2.1 192.0.2.2 1 2 3\r\n",
            "PROXY TCP4 192.0.2.1 192.0.2.2 1 2 \r\n",
            "PROXY TCP4  192.0.2.1 192.0.2.2 1 2\r\n",
            "PROXY TCP4 192.0.2.1 192.0.2.2 01 2\r\n",
            "PROXY TCP4 192.0.2.1 192.0.2.2 +1 2\r\n",
            "PROXY TCP4 192.0.2.1 192.0.2.2 1 65536\r\n",
            "PROXY TCP4 192.0.2.01 192.0.2.2 1 2\r\n",
            "PROXY TCP4 ::1 ::2 1 2\r\n",
            "PROXY TCP6 192.0.2.1 192.0.2.2 1 2\r\n",
            "PROXY TCP6 fd00::1 192.0.2.2 1 2\r\n",
            "PROXY TCP6 fe80::1%1 fd00::2 1 2\r\n",
            "PROXY UNKNOWN\n",
            "PROXY UNKNOWNS\r\n",
            "PROXY TCP4 192.0.2.1 192.0.2.2 1 2\n",
        ] {
            assert_eq!(decode(line.as_bytes()), Err(HeaderError::Line), "{line:?}");
        }
        let endless = format!("PROXY UNKNOWN {:1$}\r\n", "", LONGEST);
        assert_eq!(decode(endless.as_bytes()), Err(HeaderError::Endless));
    }
}
