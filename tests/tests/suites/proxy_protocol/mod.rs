//! The PROXY protocol: backends are told who a client is, and proxies in front tell it. The headers that these suites
//! send and expect are made here, not by the program's own codec.

mod accept;
mod changes;
mod options;
mod programs;
mod send;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};

use serde_json::{Value, json};
use socket2::{Domain, SockRef, Socket, Type};

use testkit::PATIENCE;
use testkit::client::{self, own_address, own_listener, patient};
use testkit::controlled::{Controlled, mapping};
use testkit::rproxy::Standalone;
use testkit::suite::Case;

pub(crate) fn cases() -> Vec<Case> {
    testkit::modules![send, accept, changes, options, programs]
}

/// What version 2 begins with.
const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// The networks of proxies that connect over loopback.
const LOOPBACK: &str = "127.0.0.0/8";

/// A client that a proxy tells, and the address that it asked.
pub(crate) fn told() -> [SocketAddr; 2] {
    ["192.0.2.7:4711", "198.51.100.1:443"].map(|address| address.parse().unwrap())
}

/// As [`told`], over IPv6.
fn told_v6() -> [SocketAddr; 2] {
    ["[2001:db8::7]:4711", "[2001:db8::1]:443"].map(|address| address.parse().unwrap())
}

/// The header in version 1.
pub(crate) fn v1([source, destination]: [SocketAddr; 2]) -> Vec<u8> {
    let family = if source.is_ipv4() { "TCP4" } else { "TCP6" };
    let (from, to) = (source.ip(), destination.ip());
    format!("PROXY {family} {from} {to} {} {}\r\n", source.port(), destination.port()).into_bytes()
}

/// The header of a connection in version 2.
pub(crate) fn v2([source, destination]: [SocketAddr; 2]) -> Vec<u8> {
    v2_with([source, destination], &[])
}

/// As [`v2`], with TLVs behind the addresses.
fn v2_with([source, destination]: [SocketAddr; 2], tlvs: &[u8]) -> Vec<u8> {
    let octets = |ip: IpAddr| match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let ips = [octets(source.ip()), octets(destination.ip())].concat();
    let ports = [source.port().to_be_bytes(), destination.port().to_be_bytes()].concat();
    let family = if source.is_ipv4() { 0x11 } else { 0x21 };
    raw_v2(0x21, family, &[&ips, &ports, tlvs].concat())
}

/// Version 2 from its parts: version and command, family and protocol, and what follows the length.
fn raw_v2(version_and_command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    let len = u16::try_from(rest.len()).unwrap().to_be_bytes();
    [SIGNATURE, &[version_and_command, family], &len, rest].concat()
}

/// A TLV, which some proxies add.
fn tlv(kind: u8, value: &[u8]) -> Vec<u8> {
    let len = u16::try_from(value.len()).unwrap().to_be_bytes();
    [&[kind][..], &len, value].concat()
}

/// A relay with these options, and the listener of its backend.
fn relay(options: &[&str]) -> (Standalone, TcpListener) {
    let (backend, to) = own_listener();
    (Standalone::relay_to(to, options), backend)
}

/// The mapping `web` with these limits, and the listener of its backend.
fn serve(limits: &Value) -> Served {
    let (proxy, address) = (Controlled::start(&[]), own_address());
    let (backend, to) = own_listener();
    let served = Served { proxy, address, to, backend };
    served.change(limits);
    served
}

struct Served {
    proxy: Controlled,
    /// Where clients connect.
    address: SocketAddr,
    /// Where the backend listens.
    to: SocketAddr,
    backend: TcpListener,
}

impl Served {
    /// Gives the mapping other limits.
    #[track_caller]
    fn change(&self, limits: &Value) {
        let mut web = mapping("web", "tcp", self.address, self.to);
        web["limits"] = limits.clone();
        self.proxy.apply(&[web]).success();
    }

    /// A connection on which `bytes` have been sent.
    #[track_caller]
    fn send(&self, bytes: &[u8]) -> TcpStream {
        let mut client = client::connect(self.address);
        client.write_all(bytes).unwrap();
        client
    }

    fn errors(&self) -> Value {
        self.proxy.stats("web")["errors"].clone()
    }

    /// Waits until exactly these errors are counted.
    #[track_caller]
    fn expect_errors(&self, errors: &Value) {
        testkit::eventually_equal("the errors", errors, || self.errors());
    }

    /// Checks that the backend has been dialled by nobody.
    #[track_caller]
    fn assert_not_dialled(&self) {
        self.backend.set_nonblocking(true).unwrap();
        let error = self.backend.accept().unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
        self.backend.set_nonblocking(false).unwrap();
    }
}

/// The limits of a mapping with proxies on loopback that tells its backend in version 2.
fn both_ways() -> Value {
    json!({ "accept_proxy": [LOOPBACK], "send_proxy": "v2" })
}

/// The next connection of a backend.
#[track_caller]
fn accept(backend: &TcpListener) -> TcpStream {
    // Of accept(2) as well (socket(7)).
    SockRef::from(backend).set_read_timeout(Some(PATIENCE)).unwrap();
    patient(backend.accept().unwrap().0)
}

/// Checks what comes next.
#[track_caller]
pub(crate) fn receives(mut stream: &TcpStream, expected: &[u8]) {
    let mut received = vec![0; expected.len()];
    stream.read_exact(&mut received).unwrap();
    assert_eq!(received.escape_ascii().to_string(), expected.escape_ascii().to_string());
}

/// Checks that a connection works in both directions.
#[track_caller]
fn converse(mut client: &TcpStream, mut backend: &TcpStream) {
    client.write_all(b"ping").unwrap();
    receives(backend, b"ping");
    backend.write_all(b"pong").unwrap();
    receives(client, b"pong");
}

/// Connects from an address.
#[track_caller]
fn connect_from(source: IpAddr, address: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::new(source, 0).into()).unwrap();
    socket.connect(&address.into()).unwrap();
    patient(socket.into())
}

/// Checks that `address` accepts a client that a proxy on loopback tells, and tells the backend in version 2.
#[track_caller]
fn assert_tells(address: SocketAddr, backend: &TcpListener) -> [TcpStream; 2] {
    let mut client = client::connect(address);
    client.write_all(&[v1(told()), b"hello".to_vec()].concat()).unwrap();
    let stream = accept(backend);
    receives(&stream, &[v2(told()), b"hello".to_vec()].concat());
    converse(&client, &stream);
    [client, stream]
}
