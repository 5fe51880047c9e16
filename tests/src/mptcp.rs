//! Multipath TCP (RFC 8684), which Go's listeners use by default, and systemd with `SocketProtocol=mptcp`.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};

use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::PATIENCE;
use crate::client::patient;

fn socket(address: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::MPTCP))
}

/// Whether the kernel supports it and permits us to use it.
pub fn is_there() -> bool {
    socket(([127, 0, 0, 1], 0).into()).is_ok()
}

/// A listener at `address`. An IPv6 wildcard accepts IPv4 clients, too.
#[track_caller]
pub fn listen(address: SocketAddr) -> TcpListener {
    let socket = socket(address).unwrap();
    if address.is_ipv6() {
        socket.set_only_v6(false).unwrap();
    }
    socket.bind(&address.into()).unwrap();
    socket.listen(128).unwrap();
    socket.into()
}

/// Connects like [`crate::client::connect`], and checks that the other side uses Multipath TCP as well.
#[track_caller]
pub fn connect(address: SocketAddr) -> TcpStream {
    let socket = socket(address).unwrap();
    socket.connect_timeout(&address.into(), PATIENCE).unwrap();
    let stream = TcpStream::from(socket);
    assert_eq!(SockRef::from(&stream).protocol().unwrap(), Some(Protocol::MPTCP));
    patient(stream)
}
