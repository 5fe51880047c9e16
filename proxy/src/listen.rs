//! Listening sockets: bound by us, or bound by the runtime that started us.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::time::Duration;

use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};

use crate::addr::Protocol;
use crate::mapping::Mapping;

/// The pending-connection queue asked for; the kernel cuts it to `net.core.somaxconn` (listen(2)).
const BACKLOG: i32 = i32::MAX;

/// Idle time before the first keepalive probe and between probes, as Go's net package sets them.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// Binds the host address of a TCP mapping and listens on it.
///
/// # Errors
/// [`BindError`], whose message says what would work.
pub fn bind_tcp(mapping: &Mapping) -> Result<TcpListener, BindError> {
    let addr = mapping.host.socket_addr();
    open_tcp(addr, mapping.v6only).map_err(|source| BindError { protocol: mapping.protocol, addr, source })
}

fn open_tcp(addr: SocketAddr, v6only: bool) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM.nonblocking(), None)?;
    if addr.is_ipv6() {
        // Set either way: the default is a sysctl, net.ipv6.bindv6only.
        socket.set_only_v6(v6only)?;
    }
    // Connections of an earlier run may still be in TIME_WAIT on this port.
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into())?;
    set_stream_options(&SockRef::from(&socket))?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Adopts a TCP socket that the parent process bound and listens on (moby's `-use-listen-fd`).
///
/// # Errors
/// [`AdoptError`] if it is not a TCP socket in the listening state.
pub fn adopt_tcp(fd: OwnedFd) -> Result<TcpListener, AdoptError> {
    let socket = Socket::from(fd);
    let kind = socket.r#type().map_err(AdoptError::NotASocket)?;
    let domain = socket.domain().map_err(AdoptError::NotASocket)?;
    if kind != Type::STREAM || !matches!(domain, Domain::IPV4 | Domain::IPV6) {
        return Err(AdoptError::NotTcp);
    }
    if !socket.is_listener().map_err(AdoptError::Setup)? {
        return Err(AdoptError::NotListening);
    }
    socket.set_nonblocking(true).map_err(AdoptError::Setup)?;
    set_stream_options(&SockRef::from(&socket)).map_err(AdoptError::Setup)?;
    Ok(socket.into())
}

/// Sets on a TCP socket what both sides of a connection have: no Nagle delay, and keepalive probes.
///
/// Sockets accepted from a listener inherit all of it, which saves four calls per connection.
pub(crate) fn set_stream_options(socket: &SockRef<'_>) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE))
}

/// Why a host address could not be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {addr}/{protocol}: {}", self.reason())]
pub struct BindError {
    /// The protocol of the socket.
    pub protocol: Protocol,
    /// The address that was asked for.
    pub addr: SocketAddr,
    /// What the kernel answered.
    pub source: io::Error,
}

impl BindError {
    /// What the kernel's answer means here, and what would work.
    pub fn reason(&self) -> String {
        let Self { addr, source, .. } = self;
        let wildcard = if addr.is_ipv4() { "0.0.0.0" } else { "[::]" };
        match source.kind() {
            io::ErrorKind::AddrInUse => format!(
                "the port is taken by another program; `ss -lnp 'sport = :{}'` shows which, port 0 takes a free one",
                addr.port()
            ),
            io::ErrorKind::AddrNotAvailable => format!(
                "this machine has no such address; `ip address` lists those it has, {wildcard} stands for all"
            ),
            io::ErrorKind::PermissionDenied => {
                "ports below net.ipv4.ip_unprivileged_port_start (1024) need root or CAP_NET_BIND_SERVICE; \
             use a port above"
                    .to_owned()
            }
            _ if source.raw_os_error() == Some(nix::libc::EAFNOSUPPORT) => {
                "this machine has no IPv6; use an IPv4 address".to_owned()
            }
            _ => source.to_string(),
        }
    }
}

/// Why an inherited descriptor cannot serve as the listener.
#[derive(Debug, thiserror::Error)]
pub enum AdoptError {
    /// Nothing is open there, or it is no socket.
    #[error("it is not a socket: {0}")]
    NotASocket(#[source] io::Error),
    /// A socket of another kind.
    #[error("it is not a TCP socket over IPv4 or IPv6")]
    NotTcp,
    /// A TCP socket on which `listen` was not called.
    #[error("it is a TCP socket that does not listen")]
    NotListening,
    /// An option could not be set.
    #[error("its options cannot be set: {0}")]
    Setup(#[source] io::Error),
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_a_listening_tcp_socket_is_adopted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let adopted = adopt_tcp(listener.into()).unwrap();
        assert_eq!(adopted.local_addr().unwrap(), addr);

        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(adopt_tcp(file.into()), Err(AdoptError::NotASocket(_))));
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(matches!(adopt_tcp(udp.into()), Err(AdoptError::NotTcp)));
        let dir = std::env::temp_dir().join(format!("rproxy-adopt-{}", std::process::id()));
        let unix = UnixListener::bind(&dir).unwrap();
        std::fs::remove_file(&dir).unwrap();
        assert!(matches!(adopt_tcp(unix.into()), Err(AdoptError::NotTcp)));
        let idle = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        assert!(matches!(adopt_tcp(idle.into()), Err(AdoptError::NotListening)));
    }
}
