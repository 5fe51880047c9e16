//! Connects to backends. This is the only place that does; [`source`](super::source) says where from.
//!
//! The socket is opened before a connection is sent to a worker, so that clients wait if no socket can be
//! opened, and are not dropped.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use rproxy_mapping::PortMapping;
use rproxy_mapping::addr::{BackendAddr, Protocol};
use rproxy_mapping::backend::HostName;
use rproxy_mapping::dscp::Dscp;
use rproxy_mapping::unix::UnixAddr;
use rproxy_sys::socket::set_traffic_class;
use socket2::{Domain, Protocol as Transport, SockAddr, SockRef, Socket, Type};
use tokio::time::timeout;
use tracing::{debug, warn};

use super::queues;
use super::stream::Stream;
use crate::bind::listen::{set_message_options, set_stream_options, set_timers};
use crate::bind::source::SourceError;
use crate::log::limit::LogLimit;
use crate::state::Target;

/// A socket for a backend, and whether it is on its way there.
pub(super) enum Begun {
    /// As returned by [`open`], and perhaps bound.
    Not(Socket),
    /// [`start`] was successful.
    Yes(Socket),
}

/// Connects `socket` to `backend` over `protocol` within `limit`, or else for as long as the kernel
/// tries. Stops if `client` is reset meanwhile, but not over SCTP: to close a socket whose handshake is not complete
/// sends nothing (`sctp_sf_cookie_echoed_prm_abort` in net/sctp/sm_statefuns.c), so that a backend that has completed it
/// would keep the association until its heartbeats fail.
///
/// The final ACK of the handshake is delayed. It saves a segment if it can be sent with the client's first
/// bytes. If there are none yet, [`Stream::acknowledge`] sends it; otherwise the backend would see the
/// connection up to 200 ms later.
pub(super) async fn dial(
    socket: Begun,
    backend: &BackendAddr,
    protocol: Protocol,
    limit: Option<Duration>,
    client: &Stream,
) -> Result<Stream, DialError> {
    let addr = || backend.clone();
    let has_port = AtomicBool::new(true);
    let connected = async {
        tokio::select! {
            biased;
            connected = connect(socket, backend, &has_port) => connected,
            () = client.failed(), if protocol != Protocol::Sctp => Err(DialError::ClientReset { addr: addr() }),
        }
    };
    let Some(limit) = limit else { return connected.await };
    timeout(limit, connected).await.unwrap_or_else(|_late| match has_port.load(Ordering::Relaxed) {
        true => Err(DialError::Timeout { addr: addr(), limit }),
        false => Err(DialError::Connect { addr: addr(), source: io::ErrorKind::AddrNotAvailable.into() }),
    })
}

/// Connects `socket`, and sets `has_port` according to whether it has a local port.
async fn connect(socket: Begun, backend: &BackendAddr, has_port: &AtomicBool) -> Result<Stream, DialError> {
    let failure = |source| DialError::Connect { addr: backend.clone(), source };
    let socket = match (socket, backend.unix_addr()) {
        (Begun::Yes(socket), _) => socket,
        (Begun::Not(socket), None) => started(socket, backend, has_port).await.map_err(failure)?,
        (Begun::Not(socket), Some(addr)) => {
            connected_to_unix(socket, addr, backend).await.map_err(failure)?
        }
    };
    let stream = Stream::new(socket).map_err(|source| DialError::Open { addr: backend.clone(), source })?;
    let stream = stream.unix(backend.unix_addr().is_some());
    stream.writable().await;
    if stream.has_failed() {
        // A backend may reply and reset before this task runs; its reply is still relayed.
        stream.take_failure_if_first().map_err(failure)?;
    }
    if is_connected_to_itself(&stream, backend.socket_addr()) {
        return Err(failure(io::ErrorKind::ConnectionRefused.into()));
    }
    Ok(stream)
}

/// Starts to connect `socket`, and waits for a local port if there is none.
async fn started(socket: Socket, backend: &BackendAddr, has_port: &AtomicBool) -> io::Result<Socket> {
    let addr = backend.socket_addr();
    let attempt = || match start(&socket, addr) {
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => None,
        started => Some(started),
    };
    // Clients that already wait for a port come first.
    let first = if queues::is_awaited(backend) { None } else { attempt() };
    let started = match first {
        Some(started) => started,
        None => {
            log_out_of_ports(addr);
            has_port.store(false, Ordering::Relaxed);
            let started = queues::wait(backend, attempt).await;
            has_port.store(true, Ordering::Relaxed);
            started
        }
    };
    started.map(|()| socket)
}

/// Connects `socket`, which takes effect at once, or waits while the backlog of the server is full (connect(2), `EAGAIN`).
async fn connected_to_unix(socket: Socket, addr: &UnixAddr, backend: &BackendAddr) -> io::Result<Socket> {
    let addr = SockAddr::unix(addr.sun_path())?;
    let attempt = || match socket.connect(&addr) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
        connected => Some(connected),
    };
    // Clients that already wait for room come first.
    let first = if queues::is_awaited(backend) { None } else { attempt() };
    let connected = match first {
        Some(connected) => connected,
        None => queues::wait(backend, attempt).await,
    };
    connected.map(|()| socket)
}

/// The domain of a socket that can connect to `backend`.
pub(super) fn domain_of(backend: &BackendAddr) -> Domain {
    match backend.unix_addr() {
        None => Domain::for_address(backend.socket_addr()),
        Some(_) => Domain::UNIX,
    }
}

/// Opens a socket for a connection to the backend of `port_mapping`.
///
/// # Errors
/// Those of socket(2) and setsockopt(2).
pub(super) fn open(port_mapping: &PortMapping) -> io::Result<Socket> {
    let domain = domain_of(&port_mapping.backend);
    if port_mapping.protocol == Protocol::Sctp {
        let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Transport::SCTP))?;
        set_message_options(&SockRef::from(&socket))?;
        return Ok(socket);
    }
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), None)?;
    if domain == Domain::UNIX {
        keep_urgent_inline(&SockRef::from(&socket));
        return Ok(socket);
    }
    set_stream_options(&SockRef::from(&socket))?;
    // Lets a mapping listen on the socket's local port (socket(7)).
    socket.set_reuse_address(true)?;
    // Set before the connect, this delays the ACK of the handshake (tcp(7)), and nothing later.
    socket.set_tcp_quickack(false)?;
    Ok(socket)
}

/// Has a Unix socket read an urgent byte as one of the stream (`MSG_OOB`, net/unix/af_unix.c). Kernels without such bytes may refuse.
pub(super) fn keep_urgent_inline(socket: &SockRef<'_>) {
    if let Err(error) = socket.set_out_of_band_inline(true) {
        debug!(%error, "a Unix socket lacks an option");
    }
}

/// Opens a socket for the backend of `target`, with the options that it has.
///
/// # Errors
/// Those of [`open`].
pub(super) fn open_for(target: &Target) -> io::Result<Socket> {
    let socket = open(&target.port_mapping)?;
    set_backend_options(&socket, target);
    Ok(socket)
}

/// Sets the options of a connection to the backend that `target` asks for. A Unix socket has none.
pub(super) fn set_backend_options(socket: &Socket, target: &Target) {
    let backend = &target.port_mapping.backend;
    if backend.unix_addr().is_none() {
        set_options(socket, backend.socket_addr().is_ipv6(), target);
    }
}

/// Sets the options of a connection that `target` asks for, on either side.
pub(super) fn set_options(socket: &impl AsFd, ipv6: bool, target: &Target) {
    let limits = &target.policy.limits;
    if let Some(dscp) = limits.dscp {
        mark(socket, ipv6, dscp, target);
    }
    if limits.has_timers()
        && target.port_mapping.protocol == Protocol::Tcp
        && let Err(error) = set_timers(&SockRef::from(socket), limits)
    {
        debug!(mapping = %target.name(), %error, "cannot set the timers of a connection");
    }
}

/// Sets the code point of what `socket` sends.
fn mark(socket: &impl AsFd, ipv6: bool, dscp: Dscp, target: &Target) {
    if let Err(error) = set_traffic_class(socket.as_fd(), ipv6, dscp.bits() << 2) {
        debug!(mapping = %target.name(), %error, "cannot set the code point of a connection");
    }
}

/// Starts to connect to `addr`. [`Stream::writable`] reports completion.
pub(super) fn start(socket: &Socket, addr: SocketAddr) -> io::Result<()> {
    match socket.connect(&addr.into()) {
        Err(error) if error.raw_os_error() != Some(Errno::EINPROGRESS as i32) => Err(error),
        _ => Ok(()),
    }
}

/// Logs that clients wait for a local port, because all are in use.
fn log_out_of_ports(addr: SocketAddr) {
    static REPORTED: LogLimit = LogLimit::new();

    if let Some(suppressed) = REPORTED.permit() {
        warn!(backend = %addr, error = %OUT_OF_PORTS, suppressed, "clients wait for a local port");
    }
}

/// A connect to a local port without a listener may get that same port, and then connects to itself by
/// simultaneous open (RFC 9293, 3.5). It would echo, although nothing listens there.
fn is_connected_to_itself(stream: &Stream, dialled: SocketAddr) -> bool {
    let local = SockRef::from(stream).local_addr().ok().and_then(|local| local.as_socket());
    local.is_some_and(|local| (local.ip(), local.port()) == (dialled.ip(), dialled.port()))
}

/// Why the backend could not be reached.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    /// No socket could be opened.
    #[error("cannot open a socket for {addr}: {source}")]
    Open { addr: BackendAddr, source: io::Error },
    /// The connection cannot come from where it should.
    #[error("cannot connect to {addr}: {source}")]
    Source { addr: BackendAddr, source: SourceError },
    #[error("cannot connect to {addr}: {}", explain(addr, source))]
    Connect { addr: BackendAddr, source: io::Error },
    #[error("{addr} did not answer within {limit:?}")]
    Timeout { addr: BackendAddr, limit: Duration },
    /// The name of the backend does not resolve.
    #[error("the name {host} does not resolve")]
    Unresolved { host: HostName },
    /// There is no client to connect for any more.
    #[error("the client reset before {addr} answered")]
    ClientReset { addr: BackendAddr },
}

/// In place of the kernel's "Cannot assign requested address".
const OUT_OF_PORTS: &str = "all local ports towards it are in use; widen net.ipv4.ip_local_port_range";

/// The kernel's error, reworded where it is misleading.
fn explain(backend: &BackendAddr, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrNotAvailable => OUT_OF_PORTS.to_owned(),
        io::ErrorKind::PermissionDenied if backend.unix_addr().is_some() => {
            format!(
                "{error}; a Unix socket takes write permission for rproxy's user or group, and its directories search permission"
            )
        }
        _ if error.raw_os_error() == Some(Errno::EPROTOTYPE as i32) => {
            format!("{error}; only stream sockets can be relayed to")
        }
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    use rproxy_mapping::addr::HostSocketAddr;
    use rproxy_sys::socket::accept;

    use super::*;
    use crate::runtime::new_runtime;

    /// Dials `backend` on behalf of a client.
    fn dialled(backend: &str) -> Result<Stream, DialError> {
        let backend: SocketAddr = backend.parse().unwrap();
        let backend = BackendAddr::try_from(backend).unwrap();
        let host = HostSocketAddr::new(backend.host(), 0);
        let port_mapping =
            PortMapping { protocol: Protocol::Tcp, host, backend: backend.clone(), v6only: false };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        new_runtime().unwrap().block_on(async {
            let client = Stream::new(accept(listener.as_fd()).unwrap().0).unwrap();
            let socket = Begun::Not(open(&port_mapping).unwrap());
            dial(socket, &backend, Protocol::Tcp, Some(Duration::from_secs(10)), &client).await
        })
    }

    #[test]
    fn a_backend_that_listens_is_reached() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let backend = listener.local_addr().unwrap();
        drop(dialled(&backend.to_string()).unwrap());
    }

    #[test]
    fn what_the_kernel_refuses_at_once_is_told() {
        // No connection leads to a broadcast address.
        let error = dialled("127.255.255.255:9").unwrap_err();
        assert!(matches!(error, DialError::Connect { .. }), "{error}");
    }

    #[test]
    fn a_backend_that_refuses_is_told_from_others() {
        let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let error = dialled(&nobody.to_string()).unwrap_err();
        let is_refused = |source: &io::Error| source.kind() == io::ErrorKind::ConnectionRefused;
        assert!(matches!(&error, DialError::Connect { source, .. } if is_refused(source)), "{error}");
    }

    #[test]
    fn a_connection_with_itself_is_told_from_others() {
        new_runtime().unwrap().block_on(async {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
            let own = socket.local_addr().unwrap();
            socket.connect(&own).unwrap();
            socket.set_nonblocking(true).unwrap();
            let stream = Stream::new(socket).unwrap();
            let own = own.as_socket().unwrap();
            assert!(is_connected_to_itself(&stream, own));
            let [elsewhere, other] = [([127, 0, 0, 2], own.port()), ([127, 0, 0, 1], own.port() ^ 1)];
            assert!(!is_connected_to_itself(&stream, elsewhere.into()));
            assert!(!is_connected_to_itself(&stream, other.into()));
        });
    }

    #[test]
    fn a_lack_of_local_ports_is_explained() {
        let [lack, other] = [io::ErrorKind::AddrNotAvailable, io::ErrorKind::ConnectionRefused];
        let backend = "127.0.0.1:1".parse().unwrap();
        assert!(explain(&backend, &lack.into()).contains("net.ipv4.ip_local_port_range"));
        assert_eq!(explain(&backend, &other.into()), io::Error::from(other).to_string());
    }
}
