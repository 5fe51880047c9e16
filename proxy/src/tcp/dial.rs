//! Connecting to backends. This is the one place that does: a policy for source addresses goes here.
//!
//! The socket is there before a connection is handed over to a worker, so that a client for whom none
//! can be had is not given up, but waits.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use socket2::{Domain, SockRef, Socket, Type};
use tokio::time::timeout;
use tracing::warn;

use super::local_ports;
use super::stream::Stream;
use crate::bind::listen::set_stream_options;
use crate::log::limit::LogLimit;
use crate::mapping::addr::BackendAddr;

/// Connects `socket`, as [`open`] gave it, to `backend` within `limit`; without one, as long as the kernel
/// tries. It is given up when `client` is reset meanwhile.
///
/// The last segment of the handshake is held back: it saves one if it can go with the client's first
/// bytes. If there are none yet, [`Stream::acknowledge`] sends it, without which the backend would
/// learn of the connection up to 200 ms late.
pub(super) async fn dial(
    socket: io::Result<Socket>,
    backend: BackendAddr,
    limit: Option<Duration>,
    client: &Stream,
) -> Result<Stream, DialError> {
    let addr = backend.socket_addr();
    let socket = socket.map_err(|source| DialError::Open { addr, source })?;
    let has_port = AtomicBool::new(true);
    let connected = async {
        tokio::select! {
            biased;
            connected = connect(socket, addr, &has_port) => connected,
            () = client.failed() => Err(DialError::ClientReset { addr }),
        }
    };
    let Some(limit) = limit else { return connected.await };
    timeout(limit, connected).await.unwrap_or_else(|_late| match has_port.load(Ordering::Relaxed) {
        true => Err(DialError::Timeout { addr, limit }),
        false => Err(DialError::Connect { addr, source: io::ErrorKind::AddrNotAvailable.into() }),
    })
}

/// Connects `socket`; `has_port` says whether it has a local port by then.
async fn connect(socket: Socket, addr: SocketAddr, has_port: &AtomicBool) -> Result<Stream, DialError> {
    let failure = |source| DialError::Connect { addr, source };
    let attempt = || match start(&socket, addr) {
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => None,
        started => Some(started),
    };
    // Not before those who wait already.
    let first = if local_ports::is_awaited(addr) { None } else { attempt() };
    let started = match first {
        Some(started) => started,
        None => {
            log_out_of_ports(addr);
            has_port.store(false, Ordering::Relaxed);
            let started = local_ports::wait(addr, attempt).await;
            has_port.store(true, Ordering::Relaxed);
            started
        }
    };
    started.map_err(failure)?;
    let stream = Stream::new(socket).map_err(|source| DialError::Open { addr, source })?;
    stream.writable().await;
    if stream.has_failed() {
        // A backend may answer and reset before we come to look; its answer counts.
        stream.take_failure_if_first().map_err(failure)?;
    }
    if is_connected_to_itself(&stream, addr) {
        return Err(failure(io::ErrorKind::ConnectionRefused.into()));
    }
    Ok(stream)
}

/// A socket to connect to `backend` with.
///
/// # Errors
/// Those of socket(2) and setsockopt(2).
pub(super) fn open(backend: BackendAddr) -> io::Result<Socket> {
    let domain = Domain::for_address(backend.socket_addr());
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), None)?;
    set_stream_options(&SockRef::from(&socket))?;
    // The local port that it gets does not stand in the way of a mapping that wants to listen there (socket(7)).
    socket.set_reuse_address(true)?;
    // Before the connect, it holds its acknowledgement back (tcp(7)); afterwards all is as usual.
    socket.set_tcp_quickack(false)?;
    Ok(socket)
}

/// Begins to connect to `addr`. The end of that is reported as [`Stream::writable`].
fn start(socket: &Socket, addr: SocketAddr) -> io::Result<()> {
    match socket.connect(&addr.into()) {
        Err(error) if error.raw_os_error() != Some(Errno::EINPROGRESS as i32) => Err(error),
        _ => Ok(()),
    }
}

/// Says that clients wait for one of the local ports, which are all in use.
fn log_out_of_ports(addr: SocketAddr) {
    static OUT_OF_PORTS: LogLimit = LogLimit::new();

    if let Some(suppressed) = OUT_OF_PORTS.permit() {
        let error = explain(&io::ErrorKind::AddrNotAvailable.into());
        warn!(backend = %addr, %error, suppressed, "clients wait for a local port");
    }
}

/// A socket that finds nobody at a local port may be given that same port, and is then connected to
/// itself by a simultaneous open (RFC 9293, 3.5): it would echo, although nobody listens there.
fn is_connected_to_itself(stream: &Stream, dialled: SocketAddr) -> bool {
    let local = SockRef::from(stream).local_addr().ok().and_then(|local| local.as_socket());
    local.is_some_and(|local| (local.ip(), local.port()) == (dialled.ip(), dialled.port()))
}

/// Why a backend could not be reached.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    /// No socket to connect with.
    #[error("cannot open a socket for {addr}: {source}")]
    Open { addr: SocketAddr, source: io::Error },
    #[error("cannot connect to {addr}: {}", explain(source))]
    Connect { addr: SocketAddr, source: io::Error },
    #[error("{addr} did not answer within {limit:?}")]
    Timeout { addr: SocketAddr, limit: Duration },
    /// There is nobody to connect for any more.
    #[error("the client reset before {addr} answered")]
    ClientReset { addr: SocketAddr },
}

/// The kernel's answer, in clearer words where it is misleading.
fn explain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrNotAvailable => {
            "all local ports towards it are in use; widen net.ipv4.ip_local_port_range".to_owned()
        }
        _ => error.to_string(),
    }
}
