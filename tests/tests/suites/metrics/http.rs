//! A small HTTP client, which also sends what no good client sends.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;

use testkit::PATIENCE;
use testkit::client;
use testkit::process::{Process, Stream};

/// A response.
#[derive(Clone, Debug)]
pub(super) struct Response {
    /// The version and status: `HTTP/1.1 200 OK`.
    pub(super) status: String,
    /// The headers, in lower case.
    pub(super) headers: String,
    pub(super) body: String,
}

impl Response {
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        let (head, body) = text.split_once("\r\n\r\n")?;
        let (status, headers) = head.split_once("\r\n")?;
        Some(Self { status: status.to_owned(), headers: headers.to_lowercase(), body: body.to_owned() })
    }

    /// The number in its status line.
    pub(super) fn code(&self) -> &str {
        self.status.split(' ').nth(1).unwrap_or_default()
    }
}

/// Where a process says that it serves metrics.
#[track_caller]
pub(super) fn address(process: &Process) -> SocketAddr {
    let line = process.wait_for_line(Stream::Stderr, |line| line.contains("serving metrics"));
    line.split("address=").nth(1).and_then(|address| address.trim().parse().ok()).expect(&line)
}

/// Sends bytes, and returns what comes back until the end of the stream, which may be a reset.
pub(super) fn send(address: SocketAddr, request: &[u8]) -> Vec<u8> {
    let stream = client::connect(address);
    // It may be refused before all is sent.
    (&stream).write_all(request).ok();
    client::read_to_end(&stream).0
}

/// Sends a request without headers of HTTP/1.0, whose response ends with the stream.
#[track_caller]
pub(super) fn get(address: SocketAddr, path: &str) -> Response {
    get_with(address, path, "")
}

/// Sends a request with these headers, which end with line breaks.
#[track_caller]
pub(super) fn get_with(address: SocketAddr, path: &str, headers: &str) -> Response {
    let answer = send(address, format!("GET {path} HTTP/1.0\r\n{headers}\r\n").as_bytes());
    Response::parse(&answer).unwrap_or_else(|| panic!("{:?}", String::from_utf8_lossy(&answer)))
}

/// Sends a request to a Unix socket.
pub(super) fn get_unix(path: &Path, target: &str) -> io::Result<Response> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "GET {target} HTTP/1.0\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Response::parse(&answer).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// Sends a request on a connection that stays open, and returns the response's first bytes.
#[track_caller]
pub(super) fn get_on(mut stream: &TcpStream, path: &str) -> String {
    write!(stream, "GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = [0; 4096];
    let count = stream.read(&mut answer).unwrap();
    String::from_utf8_lossy(&answer[..count]).into_owned()
}
