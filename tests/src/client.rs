//! The client's side of a relayed connection, and addresses to relay from.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use socket2::SockRef;

use crate::PATIENCE;

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

/// An IPv4 loopback address that no other case of any suite uses, so that any port of it is free.
pub fn own_loopback() -> Ipv4Addr {
    static NEXT: AtomicU16 = AtomicU16::new(1);
    let [high, low] = NEXT.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    // 127.0 is not used, because 127.0.0.1 is shared by all.
    let suite = u8::try_from(process::id() % 255).unwrap() + 1;
    Ipv4Addr::new(127, suite, high, low)
}

/// A port of [`own_loopback`], for a proxy to bind.
pub fn own_address() -> SocketAddr {
    (own_loopback(), 80).into()
}

/// A port of `ip` that was free a moment ago. [`own_loopback`] is safer where it can be used.
pub fn free_port(ip: impl Into<IpAddr>) -> u16 {
    let listener = TcpListener::bind((ip.into(), 0)).unwrap();
    listener.local_addr().unwrap().port()
}
