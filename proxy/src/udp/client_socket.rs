//! A socket towards one client, for when the way out of its listener is full.
//!
//! The answers to all clients of a listener share the send buffer of its socket, and the kernel keeps in it
//! what waits for the address of a neighbour (arp(7)) or for a slow link: one client that cannot be reached
//! would hold up all others. A flow that finds the buffer full gets a socket of its own, bound to the address
//! that was asked and connected to the client: it passes those that block. If it blocks itself, it goes back to the
//! listener ([`congestion`](super::congestion)).
//!
//! The kernel hands over to a connected socket what its peer sends, so that it is received from, too. Before it is
//! closed, it is connected to itself: from then on the listener has the client's datagrams, and none is lost with
//! the socket.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use nix::libc;
use rproxy_sys::udp::{enable_gro, report_class_and_drops, set_buffers};
use socket2::{Domain, SockRef, Socket, Type};

use super::key::FlowKey;
use super::send::{Room, SendQueue};
use super::token::Wanted;

/// Bytes that the client may have on their way, as set: a few datagrams, so that those of many clients fit the queue of a
/// link that they share. What does not fit there is lost, and nobody is told.
const SEND_BUFFER: usize = 4 * 1024;

/// Bytes of the client's datagrams that the kernel may queue at the most.
const RECEIVE_BUFFER: usize = 1024 * 1024;

/// A socket that is connected to a client.
#[derive(Debug)]
pub(super) struct ClientSocket {
    /// The flow whose client it is.
    pub(super) key: FlowKey,
    socket: Socket,
    /// What waits for room on it.
    pub(super) queue: SendQueue,
    /// Whether something was sent since that was asked last.
    pub(super) was_used: bool,
    /// Since when there is no room on it, if that is so.
    pub(super) full_at: Option<Instant>,
}

impl ClientSocket {
    /// Opens one for the client of `key`, which sends to `listener`; the kernel may queue `share` bytes. What waits for
    /// it shares `room`. From now on it gets datagrams, until it is connected those of any client.
    ///
    /// # Errors
    /// Those of socket(2), setsockopt(2) and bind(2): `EACCES` for a port below 1024 without `CAP_NET_BIND_SERVICE`;
    /// `EADDRINUSE` if another user has opened the listener; `EOPNOTSUPP` if whoever passed that has set what would send
    /// answers another way than those of another socket.
    pub(super) fn bind(
        key: FlowKey,
        listener: BorrowedFd<'_>,
        share: usize,
        room: &Arc<Room>,
    ) -> io::Result<Self> {
        let listener = SockRef::from(&listener);
        let mut local = listener
            .local_addr()?
            .as_socket()
            .ok_or_else(|| io::Error::other("the listener has no address"))?;
        if let Some(asked) = key.local {
            local = with_ip(local, asked.ip, asked.interface);
        }
        let socket = Socket::new(Domain::for_address(local), Type::DGRAM.nonblocking(), None)?;
        if local.is_ipv6() {
            socket.set_only_v6(false)?;
        }
        if way(&listener)? != way(&socket)? {
            return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
        }
        // None of this is needed for it to work, only for it to work well.
        drop(enable_gro(socket.as_fd()));
        drop(report_class_and_drops(socket.as_fd(), local.is_ipv6()));
        drop(set_buffers(socket.as_fd(), share.min(RECEIVE_BUFFER), SEND_BUFFER));
        bind_beside(&socket, &listener, local)?;
        Ok(Self { key, socket, queue: SendQueue::new(room.clone()), was_used: true, full_at: None })
    }

    /// Leaves what others send to the listener.
    ///
    /// # Errors
    /// Those of connect(2).
    pub(super) fn connect(&self) -> io::Result<()> {
        self.socket.connect(&self.key.client.into())
    }

    /// The socket, and what waits for it.
    pub(super) fn parts(&mut self) -> (BorrowedFd<'_>, &mut SendQueue) {
        (self.socket.as_fd(), &mut self.queue)
    }

    /// What it has to be watched for now.
    pub(super) fn wanted(&self) -> Wanted {
        Wanted { receive: true, send: !self.queue.is_empty() }
    }

    /// Leaves what the client sends from now on to the listener.
    ///
    /// # Errors
    /// Those of connect(2).
    pub(super) fn disconnect(&self) -> io::Result<()> {
        self.socket.connect(&self.socket.local_addr()?)
    }
}

impl AsFd for ClientSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What decides which way the datagrams of a socket leave, and how.
fn way(socket: &Socket) -> io::Result<impl PartialEq + use<>> {
    let bound = (socket.device()?, socket.freebind_v4()?, socket.ip_transparent_v4()?);
    Ok((bound, socket.mark()?, socket.priority()?, socket.ttl_v4()?, socket.tos_v4()?))
}

/// Binds `socket` to an address that `listener` has already. Sockets of one user that have both set `SO_REUSEPORT`
/// may share a port (socket(7)), which these have for no longer than this takes: no other user can have the port, and no
/// other program keeps it by chance.
/// `SO_REUSEADDR` lets sockets of this kind share it with each other; the listener does not have it. Whoever passed the
/// listener may have set `SO_REUSEPORT` for good.
fn bind_beside(socket: &Socket, listener: &SockRef<'_>, local: SocketAddr) -> io::Result<()> {
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    let is_shared = listener.reuse_port()?;
    listener.set_reuse_port(true)?;
    let bound = socket.bind(&local.into());
    listener.set_reuse_port(is_shared)?;
    socket.set_reuse_port(false)?;
    bound
}

/// `addr` with another IP address, in the family of `addr`. `interface` matters only to link-local ones.
fn with_ip(addr: SocketAddr, ip: IpAddr, interface: u32) -> SocketAddr {
    let mut addr = addr;
    match (&mut addr, ip) {
        (SocketAddr::V6(addr), IpAddr::V6(ip)) => {
            addr.set_ip(ip);
            addr.set_scope_id(interface);
        }
        (SocketAddr::V6(addr), IpAddr::V4(ip)) => addr.set_ip(ip.to_ipv6_mapped()),
        (SocketAddr::V4(addr), ip) => {
            if let IpAddr::V4(ip) = ip.to_canonical() {
                addr.set_ip(ip);
            }
        }
    }
    addr
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};

    use rproxy_sys::udp::LocalAddr;

    use super::*;

    /// A listener, a client's socket beside it, the client, and another one.
    fn scene(listening: &str, asked: &str, clients: &str) -> (UdpSocket, ClientSocket, [UdpSocket; 2]) {
        let socket = Socket::new(Domain::for_address(listening.parse().unwrap()), Type::DGRAM, None).unwrap();
        if listening.starts_with('[') {
            socket.set_only_v6(false).unwrap();
        }
        socket.bind(&listening.parse::<SocketAddr>().unwrap().into()).unwrap();
        let listener = UdpSocket::from(socket);
        let clients: [_; 2] = [(); 2].map(|()| UdpSocket::bind((clients, 0)).unwrap());
        let mut asked: SocketAddr = asked.parse().unwrap();
        asked.set_port(listener.local_addr().unwrap().port());
        clients.iter().for_each(|client| client.connect(asked).unwrap());
        clients[0].send(b"first").unwrap();
        let (_len, client) = listener.recv_from(&mut [0; 9]).unwrap();
        let local = Some(LocalAddr { ip: asked.ip(), interface: 0 });
        let key = FlowKey::new(0, client, local);
        let own = ClientSocket::bind(key, listener.as_fd(), RECEIVE_BUFFER, &Arc::default()).unwrap();
        own.connect().unwrap();
        (listener, own, clients)
    }

    #[test]
    fn a_client_has_its_socket_and_the_listener_all_others() {
        let mapped = "[::]:0";
        let scenes = [
            ("0.0.0.0:0", "127.0.0.1:0", "127.0.0.1"),
            ("127.0.0.1:0", "127.0.0.1:0", "127.0.0.1"),
            (mapped, "127.0.0.1:0", "127.0.0.1"),
            (mapped, "[::1]:0", "::1"),
            ("[::1]:0", "[::1]:0", "::1"),
        ];
        for (listening, asked, clients) in scenes {
            let (listener, own, [client, other]) = scene(listening, asked, clients);
            let mut bytes = [0; 9];
            own.socket.send(b"answer").unwrap();
            assert_eq!(client.recv(&mut bytes).unwrap(), 6, "{listening}: the client sees whom it asked");
            for _ in 0..20 {
                client.send(b"mine").unwrap();
                other.send(b"theirs").unwrap();
                assert_eq!(receive(&own), 4, "{listening}");
                assert_eq!(listener.recv(&mut bytes).unwrap(), 6, "{listening}");
            }
            let key = FlowKey { client: listener_view(&other, own.key.client), ..own.key };
            drop(ClientSocket::bind(key, listener.as_fd(), RECEIVE_BUFFER, &Arc::default()).unwrap());
            own.disconnect().unwrap();
            client.send(b"again").unwrap();
            assert_eq!(listener.recv(&mut bytes).unwrap(), 5, "{listening}");
        }
    }

    fn receive(own: &ClientSocket) -> usize {
        own.socket.recv(&mut [std::mem::MaybeUninit::uninit(); 9]).unwrap()
    }

    /// How the listener sees `client`, whose family is that of `like`.
    fn listener_view(client: &UdpSocket, like: SocketAddr) -> SocketAddr {
        let client = client.local_addr().unwrap();
        with_ip(SocketAddr::new(like.ip(), client.port()), client.ip(), 0)
    }

    #[test]
    fn nobody_else_can_have_the_port() {
        let (listener, own, _clients) = scene("0.0.0.0:0", "127.0.0.1:0", "127.0.0.1");
        let port = listener.local_addr().unwrap().port();
        let (any, own_ip) = (Ipv4Addr::UNSPECIFIED, Ipv4Addr::LOCALHOST);
        for (ip, port_too) in [(any, true), (any, false), (own_ip, true), (own_ip, false)] {
            let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
            socket.set_reuse_port(port_too).unwrap();
            socket.set_reuse_address(true).unwrap();
            let bound = socket.bind(&SocketAddr::from((ip, port)).into());
            assert_eq!(bound.unwrap_err().kind(), io::ErrorKind::AddrInUse, "{ip}, SO_REUSEPORT: {port_too}");
        }
        drop(own);
        let shared = SockRef::from(&listener);
        shared.set_reuse_port(true).unwrap();
        let key = FlowKey::new(0, SocketAddr::from((own_ip, 9)), None);
        drop(ClientSocket::bind(key, listener.as_fd(), RECEIVE_BUFFER, &Arc::default()).unwrap());
        assert!(shared.reuse_port().unwrap(), "whoever passed it wants that");
    }

    #[test]
    fn addresses_are_of_the_listeners_family() {
        let v6 = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 53));
        let v4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 53));
        let with = |addr, ip: &str, interface| with_ip(addr, ip.parse().unwrap(), interface).to_string();
        assert_eq!(with(v6, "10.0.0.1", 0), "[::ffff:10.0.0.1]:53");
        assert_eq!(with(v6, "fe80::1", 3), "[fe80::1%3]:53");
        assert_eq!(with(v4, "::ffff:10.0.0.1", 0), "10.0.0.1:53");
    }
}
