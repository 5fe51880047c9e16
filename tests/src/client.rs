//! The client's side of a relayed connection, and addresses to relay from.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr as UnixSocketAddr, UnixListener};
use std::process;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::Duration;

use socket2::SockRef;

use crate::PATIENCE;
use crate::pattern::Pattern;

/// An address that no machine has: it is reserved for documentation (RFC 5737).
pub const FOREIGN: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

/// Connects, and sets [`PATIENCE`] as the timeout of all operations: instead of hanging, they fail with
/// `WouldBlock`.
///
/// # Panics
/// If the connection fails.
#[track_caller]
pub fn connect(address: SocketAddr) -> TcpStream {
    match TcpStream::connect_timeout(&address, PATIENCE) {
        Ok(stream) => patient(stream),
        Err(error) => panic!("cannot connect to {address}: {error}"),
    }
}

/// Connects to a [`lettered`](crate::backend::TcpBackend::lettered) backend, and reads its letter.
#[track_caller]
pub fn connect_lettered(address: SocketAddr) -> (TcpStream, u8) {
    let mut client = connect(address);
    let mut letter = [0];
    client.read_exact(&mut letter).unwrap();
    (client, letter[0])
}

/// Sets [`PATIENCE`] as the timeout of all operations of a stream.
pub fn patient(stream: TcpStream) -> TcpStream {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Sends `request` on a new connection, half-closes it, and returns the whole response.
pub fn ask(address: SocketAddr, request: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = connect(address);
    stream.write_all(request)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

/// Checks that a new connection to `address` is served by an echo.
#[track_caller]
pub fn assert_echoes(address: SocketAddr) {
    assert_eq!(ask(address, b"hello").unwrap(), b"hello");
}

/// Checks that an echo still answers on a connection.
#[track_caller]
pub fn ping(mut stream: &TcpStream) {
    stream.write_all(b"ping").unwrap();
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"ping");
}

/// Sends `size` bytes of a pattern to an echo, and checks what comes back.
#[track_caller]
pub fn exchange(stream: &TcpStream, seed: u64, size: usize) {
    try_exchange(stream, seed, size).unwrap();
}

/// As [`exchange`], on a connection that may be cut.
///
/// # Panics
/// When other bytes come back.
pub fn try_exchange(stream: &TcpStream, seed: u64, size: usize) -> io::Result<()> {
    // What the echo may have to be read before it takes more of it.
    if size > 60_000 {
        return thread::scope(|scope| {
            let writer = scope.spawn(|| send_pattern(stream, seed, size));
            let result = compare_pattern(stream, seed, size);
            if result.is_err() {
                // Whoever still writes has nobody to write to.
                stream.shutdown(Shutdown::Both).ok();
            }
            writer.join().unwrap().and(result)
        });
    }
    send_pattern(stream, seed, size)?;
    compare_pattern(stream, seed, size)
}

fn send_pattern(mut stream: &TcpStream, seed: u64, size: usize) -> io::Result<()> {
    let mut bytes = vec![0; size];
    Pattern::new(seed).fill(&mut bytes);
    stream.write_all(&bytes)
}

fn compare_pattern(mut stream: &TcpStream, seed: u64, size: usize) -> io::Result<()> {
    let (mut pattern, mut received) = (Pattern::new(seed), 0);
    let (mut buffer, mut expected) = (vec![0; size.min(65_536)], vec![0; size.min(65_536)]);
    while received < size {
        let most = buffer.len().min(size - received);
        let len = match stream.read(&mut buffer[..most]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            result => result?,
        };
        pattern.fill(&mut expected[..len]);
        assert!(buffer[..len] == expected[..len], "other bytes from {received} on");
        received += len;
    }
    Ok(())
}

/// How a peer ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// With an orderly end of stream.
    Eof,
    /// With a reset.
    Reset,
}

/// Reads until the peer ends the connection; returns the data and how it ended.
///
/// # Panics
/// If it does not end within [`PATIENCE`].
#[track_caller]
pub fn read_to_end(mut stream: &TcpStream) -> (Vec<u8>, End) {
    let mut received = Vec::new();
    match stream.read_to_end(&mut received) {
        Ok(_) => (received, End::Eof),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => (received, End::Reset),
        Err(error) => panic!("neither data nor an end: {error}"),
    }
}

/// Closes a connection with a reset, discarding unsent data.
pub fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
}

/// Connects and reads until the peer ends the connection, like [`read_to_end`]. If the peer resets at once,
/// the connect itself may fail, which also counts as a reset.
#[track_caller]
pub fn end_of(address: SocketAddr) -> (Vec<u8>, End) {
    match TcpStream::connect_timeout(&address, PATIENCE) {
        Ok(stream) => read_to_end(&patient(stream)),
        Err(error) if error.kind() == ErrorKind::ConnectionReset => (Vec::new(), End::Reset),
        Err(error) => panic!("cannot connect to {address}: {error}"),
    }
}

/// An IPv4 loopback address that no other case uses while this one runs, or used lately, so that any port of it is free.
/// Connections in TIME_WAIT would be in the way of a bind(2) without `SO_REUSEADDR`.
///
/// # Panics
/// When 255 processes have such addresses already.
pub fn own_loopback() -> Ipv4Addr {
    static NEXT: AtomicU16 = AtomicU16::new(1);
    static NETWORK: OnceLock<(u8, UnixListener)> = OnceLock::new();
    let (network, _claim) = NETWORK.get_or_init(claim_network);
    // The network of each 255th process is the same, but a case starts several.
    let first = u16::try_from(process::id() / 255 % 255).unwrap() << 8;
    let [high, low] = first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)).to_be_bytes();
    Ipv4Addr::new(127, *network, high, low)
}

/// A part of 127.0.0.0/8, and a socket that keeps it for this process: the name is taken in the same network
/// namespace as the addresses are.
fn claim_network() -> (u8, UnixListener) {
    let first = process::id() % 255;
    // 127.0 is not used, because 127.0.0.1 is shared by all.
    let networks = (0..255).map(|next| u8::try_from((first + next) % 255).unwrap() + 1);
    let claim = |network: u8| {
        let name = UnixSocketAddr::from_abstract_name(format!("rproxy-tests/127.{network}")).unwrap();
        Some((network, UnixListener::bind_addr(&name).ok()?))
    };
    networks.filter_map(claim).next().expect("a part of 127.0.0.0/8 is free")
}

/// A port of [`own_loopback`], for a proxy to bind; it needs no privilege.
pub fn own_address() -> SocketAddr {
    (own_loopback(), 8080).into()
}

/// A listener at an address of its own.
pub fn own_listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind((own_loopback(), 0)).unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// A port of `ip` that was free a moment ago. [`own_loopback`] is safer where it can be used.
pub fn free_port(ip: impl Into<IpAddr>) -> u16 {
    let listener = TcpListener::bind((ip.into(), 0)).unwrap();
    listener.local_addr().unwrap().port()
}
