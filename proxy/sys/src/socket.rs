//! Calls on stream sockets.
#![expect(unsafe_code, reason = "accept4, setsockopt and ioctl take raw pointers")]

use std::ffi::c_int;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::libc;
use socket2::{SockAddr, SockAddrStorage};

use crate::check;

/// The size of an int for setsockopt(2).
const INT_SIZE: libc::socklen_t = c_int::BITS / 8;

/// Accepts a connection as a non-blocking, close-on-exec socket in one call (accept4(2)). Returns also the address of the peer,
/// unless it is that of a Unix socket.
///
/// # Errors
/// Those of accept4(2), including `EAGAIN` if no connection is pending on a non-blocking listener.
pub fn accept(listener: BorrowedFd<'_>) -> io::Result<(OwnedFd, Option<SocketAddr>)> {
    let flags = libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    let mut storage = SockAddrStorage::zeroed();
    let mut len = storage.size_of();
    let address = (&raw mut storage).cast();
    // SAFETY: `address` points to `len` bytes of storage.
    let fd = check(unsafe { libc::accept4(listener.as_raw_fd(), address, &raw mut len, flags) })?;
    // SAFETY: accept4 wrote an address of `len` bytes into the storage.
    let peer = unsafe { SockAddr::new(storage, len) };
    // SAFETY: accept4 returned this new descriptor, which nothing else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    Ok((socket, peer.as_socket()))
}

/// Sets `SO_RCVLOWAT` (socket(7)): poll reports the socket readable once `bytes` are queued, at the end of
/// the stream, or on an error. If enough bytes are already queued, the kernel reports it again.
///
/// # Errors
/// Those of setsockopt(2).
pub fn set_receive_low_watermark(socket: BorrowedFd<'_>, bytes: u32) -> io::Result<()> {
    let value = c_int::try_from(bytes).unwrap_or(c_int::MAX);
    set_int(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, value)
}

/// Sets the traffic class of everything that is sent, for both families if the socket is `ipv6` (ip(7)
/// `IP_TOS`, RFC 3542 `IPV6_TCLASS`). TCP controls the two ECN bits itself.
///
/// # Errors
/// Those of setsockopt(2).
pub fn set_traffic_class(socket: BorrowedFd<'_>, ipv6: bool, class: u8) -> io::Result<()> {
    let v6 = if ipv6 { set_int(socket, libc::IPPROTO_IPV6, libc::IPV6_TCLASS, class.into()) } else { Ok(()) };
    // If a socket does not support one option, it may still support the other.
    set_int(socket, libc::IPPROTO_IP, libc::IP_TOS, class.into()).and(v6)
}

/// Makes bind(2) to port 0 leave the choice of the port to connect(2), which can use a port for several destinations
/// (`IP_BIND_ADDRESS_NO_PORT`, ip(7)).
///
/// # Errors
/// Those of setsockopt(2): `ENOPROTOOPT` before Linux 4.2.
pub fn choose_port_on_connect(socket: BorrowedFd<'_>) -> io::Result<()> {
    set_int(socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)
}

/// Sets an option that takes an int.
pub(crate) fn set_int(socket: BorrowedFd<'_>, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
    let pointer = (&raw const value).cast();
    // SAFETY: the pointer leads to an int, whose size is passed along.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, pointer, INT_SIZE) }).map(drop)
}

/// The MTU of the path to the peer of a connected IPv6 socket, in bytes (`IPV6_MTU`, ipv6(7)).
///
/// # Errors
/// Those of getsockopt(2), including `ENOTCONN`.
pub fn ipv6_mtu(socket: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(get_int(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU)?.unsigned_abs())
}

/// Reads an option that is an int.
pub(crate) fn get_int(socket: BorrowedFd<'_>, level: c_int, name: c_int) -> io::Result<c_int> {
    let (mut value, mut len): (c_int, _) = (0, INT_SIZE);
    let (fd, pointer) = (socket.as_raw_fd(), (&raw mut value).cast());
    // SAFETY: the pointer leads to an int, whose size is passed along.
    check(unsafe { libc::getsockopt(fd, level, name, pointer, &raw mut len) })?;
    Ok(value)
}

/// The cookie of the network namespace that a socket is in: a number that is not given again until the next boot
/// (`SO_NETNS_COOKIE`, net/core/sock.c).
///
/// # Errors
/// Those of getsockopt(2): `ENOPROTOOPT` before Linux 5.14.
pub fn netns_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let (mut value, mut len): (u64, libc::socklen_t) = (0, u64::BITS / 8);
    let (fd, pointer) = (socket.as_raw_fd(), (&raw mut value).cast());
    // SAFETY: the pointer leads to eight bytes, whose number is passed along, and any bytes are a valid integer.
    check(unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_NETNS_COOKIE, pointer, &raw mut len) })?;
    Ok(value)
}

/// The number of bytes written to a TCP socket that the peer has not acknowledged yet (`SIOCOUTQ`, tcp(7)).
///
/// # Errors
/// Those of ioctl(2).
pub fn unacknowledged(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes: c_int = 0;
    // SAFETY: SIOCOUTQ (the same request as TIOCOUTQ) writes one int through the pointer.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) })?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    use nix::fcntl::{F_GETFL, OFlag, fcntl};

    use super::*;

    fn pair() -> (TcpStream, OwnedFd) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (socket, peer) = accept(listener.as_fd()).unwrap();
        assert_eq!(peer, client.local_addr().ok());
        (client, socket)
    }

    #[test]
    fn an_accepted_socket_does_not_block() {
        let (_client, socket) = pair();
        let flags = OFlag::from_bits_retain(fcntl(&socket, F_GETFL).unwrap());
        assert!(flags.contains(OFlag::O_NONBLOCK));
    }

    #[test]
    fn the_way_to_this_machine_takes_the_packets_of_the_loopback_interface() {
        let socket = std::net::UdpSocket::bind("[::1]:0").unwrap();
        ipv6_mtu(socket.as_fd()).unwrap_err();
        socket.connect("[::1]:9").unwrap();
        let mtu = std::fs::read_to_string("/sys/class/net/lo/mtu").unwrap();
        assert_eq!(ipv6_mtu(socket.as_fd()).unwrap(), mtu.trim().parse().unwrap());
    }

    #[test]
    fn accepting_from_a_socket_that_does_not_listen_fails() {
        let (client, _socket) = pair();
        let err = accept(client.as_fd()).unwrap_err();
        assert_eq!(err.raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn acknowledged_bytes_leave_the_queue_and_a_low_watermark_is_taken() {
        let (mut client, socket) = pair();
        set_receive_low_watermark(socket.as_fd(), 4).unwrap();
        client.write_all(b"data").unwrap();
        let mut socket = TcpStream::from(socket);
        socket.set_nonblocking(false).unwrap();
        socket.read_exact(&mut [0; 4]).unwrap();
        assert_eq!(unacknowledged(client.as_fd()).unwrap(), 0);
    }
}
