//! A socket connected to one client, for use while the listener's send buffer is full.
//!
//! The replies to all clients of a listener share the send buffer of its socket. The kernel also charges to it
//! datagrams that wait for the address of a neighbour (arp(7)) or for a slow link, so one unreachable client could hold
//! up all others. A flow that finds the buffer full therefore gets its own socket, bound to the address that the client
//! sent to and connected to the client: its replies bypass those that block. If this socket blocks, too, the flow
//! returns to the listener ([`congestion`](super::congestion)).
//!
//! The kernel delivers the client's datagrams to the connected socket, so the relay receives from it as well. Before it
//! is closed, it is connected to itself: from then on the kernel delivers the client's datagrams to the listener, and
//! none is lost with the socket.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use nix::libc;
use rproxy_sys::socket::netns_cookie;
use rproxy_sys::udp::{enable_gro, report_class_and_drops, set_buffers};
use socket2::{Domain, SockRef, Socket, Type};

use super::key::FlowKey;
use super::send::{QueueBudget, SendQueue};
use super::token::Wanted;

/// Size of the send buffer, as set: a few datagrams, so that those of many clients fit the queue of a shared link.
/// Datagrams that do not fit there are lost without an error.
const SEND_BUFFER: usize = 4 * 1024;

/// Maximum size of the receive buffer for the client's datagrams.
const RECEIVE_BUFFER: usize = 1024 * 1024;

/// A socket that is connected to a client.
#[derive(Debug)]
pub(super) struct ClientSocket {
    /// The flow of the client.
    pub(super) key: FlowKey,
    socket: Socket,
    /// Datagrams that wait until the socket is writable.
    pub(super) queue: SendQueue,
    /// Whether something was sent since the last check.
    pub(super) was_used: bool,
    /// Since when the socket is full, if it is.
    pub(super) full_at: Option<Instant>,
}

impl ClientSocket {
    /// Opens a socket for the client of `key`, which sends to `listener`, with a receive buffer of `share` bytes. Its
    /// queue uses the `budget`. The socket receives datagrams at once; until it is connected, those of any client.
    ///
    /// # Errors
    /// The errors of socket(2), setsockopt(2) and bind(2): `EACCES` for a port below 1024 without
    /// `CAP_NET_BIND_SERVICE`; `EADDRINUSE` if another user has opened the listener; `EOPNOTSUPP` if the listener was
    /// inherited with options with which replies take another path than those of a new socket.
    pub(super) fn bind(
        key: FlowKey,
        listener: BorrowedFd<'_>,
        share: usize,
        budget: &Arc<QueueBudget>,
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
        // All of this is optional and only improves performance.
        drop(enable_gro(socket.as_fd()));
        drop(report_class_and_drops(socket.as_fd(), local.is_ipv6()));
        drop(set_buffers(socket.as_fd(), share.min(RECEIVE_BUFFER), SEND_BUFFER));
        bind_beside(&socket, &listener, local)?;
        Ok(Self { key, socket, queue: SendQueue::new(budget.clone()), was_used: true, full_at: None })
    }

    /// Connects to the client, so that datagrams of others reach the listener.
    ///
    /// # Errors
    /// The errors of connect(2).
    pub(super) fn connect(&self) -> io::Result<()> {
        self.socket.connect(&self.key.client.into())
    }

    /// The socket and its queue.
    pub(super) fn parts(&mut self) -> (BorrowedFd<'_>, &mut SendQueue) {
        (self.socket.as_fd(), &mut self.queue)
    }

    /// The events to watch it for.
    pub(super) fn wanted(&self) -> Wanted {
        Wanted { receive: true, send: !self.queue.is_empty() }
    }

    /// Connects the socket to itself, so that the client's further datagrams reach the listener.
    ///
    /// # Errors
    /// The errors of connect(2).
    pub(super) fn disconnect(&self) -> io::Result<()> {
        self.socket.connect(&self.socket.local_addr()?)
    }
}

impl AsFd for ClientSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What determines the path of a socket's datagrams: its options, and its network namespace, as far as the kernel tells.
fn way(socket: &Socket) -> io::Result<impl PartialEq + use<>> {
    // A listener may have been passed from another namespace, or may have been left there.
    let namespace = netns_cookie(socket.as_fd()).ok();
    let bound = (socket.device()?, socket.freebind_v4()?, socket.ip_transparent_v4()?);
    Ok((namespace, bound, socket.mark()?, socket.priority()?, socket.ttl_v4()?, socket.tos_v4()?))
}

/// Binds `socket` to the address of `listener`. Sockets of one user that all have `SO_REUSEPORT` may share a port
/// (socket(7)). Both have it only during this call, so that no other user can take the port, and no other program
/// shares it by accident. `SO_REUSEADDR` lets several sockets of this kind share the port; the listener does not have
/// it. An inherited listener may have `SO_REUSEPORT` permanently.
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

/// The IP address `ip` in the family of `addr`, with the port of `addr`. `interface` is only used for link-local
/// addresses.
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

    /// A listener, a client's socket, the client, and another client.
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

    /// The address of `client` as the listener reports it, in the family of `like`.
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
