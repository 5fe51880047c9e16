//! A minimal transparent relay: its sockets to the backend are bound to the client's address and port.

use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;

use socket2::{Domain, Socket, Type};

use crate::backend::TcpBackend;
use crate::netns::Namespace;
use crate::udp;

/// Relays one port over TCP and UDP, from inside a namespace.
pub struct TransparentRelay {
    _tcp: TcpBackend,
    _udp: udp::Backend,
}

impl TransparentRelay {
    /// Relays what arrives at `listen` to `backend`.
    ///
    /// # Panics
    /// If it cannot listen there.
    #[track_caller]
    pub fn start(host: &Namespace, listen: SocketAddr, backend: SocketAddr) -> Self {
        host.run(|| {
            let handler = move |client: &TcpStream| relay(client, backend);
            Self {
                _tcp: TcpBackend::serve(TcpListener::bind(listen).unwrap(), handler),
                _udp: relay_datagrams(UdpSocket::bind(listen).unwrap(), backend),
            }
        })
    }
}

/// A socket with the transparent flag (`IP_TRANSPARENT` of ip(7), `IPV6_TRANSPARENT` of linux/in6.h), bound to
/// an address that the host need not have.
///
/// # Errors
/// If the caller lacks `CAP_NET_ADMIN`, or the address is in use.
pub fn bound(address: SocketAddr, kind: Type) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), kind, None)?;
    if address.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else {
        socket.set_only_v6(true)?;
        socket.set_ip_transparent_v6(true)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Ends when either side has closed, and then closes both: a socket that is closed first has to be found, too.
fn relay(client: &TcpStream, backend: SocketAddr) -> io::Result<()> {
    let socket = bound(client.peer_addr()?, Type::STREAM)?;
    socket.connect_timeout(&backend.into(), crate::PATIENCE)?;
    let server = TcpStream::from(socket);
    let copy = |mut from: &TcpStream, mut to: &TcpStream| {
        // An error ends the connection like an end of stream.
        io::copy(&mut from, &mut to).ok();
        for stream in [from, to] {
            stream.shutdown(Shutdown::Both).ok();
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| copy(&server, client));
        copy(client, &server);
    });
    Ok(())
}

fn relay_datagrams(listener: UdpSocket, backend: SocketAddr) -> udp::Backend {
    let mut flows: HashMap<SocketAddr, (Socket, udp::Backend)> = HashMap::new();
    udp::Backend::serve(listener, move |listener, bytes, client| {
        let (to_backend, _replies) =
            flows.entry(client).or_insert_with(|| flow(listener, client, backend).unwrap());
        to_backend.send(bytes).ok();
    })
}

/// A flow's socket to the backend, and what sends the replies to the client.
fn flow(listener: &UdpSocket, client: SocketAddr, backend: SocketAddr) -> io::Result<(Socket, udp::Backend)> {
    let socket = bound(client, Type::DGRAM)?;
    socket.connect(&backend.into())?;
    let listener = listener.try_clone()?;
    let replies = udp::Backend::serve(socket.try_clone()?.into(), move |_, bytes, _| {
        listener.send_to(bytes, client).ok();
    });
    Ok((socket, replies))
}
