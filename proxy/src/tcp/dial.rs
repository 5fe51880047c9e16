//! Connecting to backends. This is the one place that does: a policy for source addresses goes here.
//!
//! The socket is there before a connection is handed over to a worker, so that a client for whom none
//! can be had is not given up, but waits.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use nix::errno::Errno;
use socket2::{Domain, SockRef, Socket, Type};
use tokio::time::timeout;

use super::stream::Stream;
use crate::addr::BackendAddr;
use crate::listen::set_stream_options;

/// Connects `socket`, as [`open`] gave it, to `backend` within `limit`; without one, as long as the kernel
/// tries.
///
/// The last segment of the handshake is held back: it saves one if it can go with the client's first
/// bytes. If there are none yet, [`Stream::acknowledge`] sends it, without which the backend would
/// learn of the connection up to 200 ms late.
pub(super) async fn dial(
    socket: io::Result<Socket>,
    backend: BackendAddr,
    limit: Option<Duration>,
) -> Result<Stream, DialError> {
    let addr = backend.socket_addr();
    let socket = socket.map_err(|source| DialError::Open { addr, source })?;
    let connected = async {
        let stream = start(socket, addr)?;
        stream.writable().await;
        let failure = match stream.has_failed() {
            true => Some(stream.take_failure()),
            false => is_connected_to_itself(&stream, addr).then(|| io::ErrorKind::ConnectionRefused.into()),
        };
        match failure {
            None => Ok(stream),
            Some(source) => Err(DialError::Connect { addr, source }),
        }
    };
    match limit {
        None => connected.await,
        Some(limit) => timeout(limit, connected).await.unwrap_or(Err(DialError::Timeout { addr, limit })),
    }
}

/// A socket to connect to `backend` with.
///
/// # Errors
/// Those of socket(2) and setsockopt(2).
pub(super) fn open(backend: BackendAddr) -> io::Result<Socket> {
    let domain = Domain::for_address(backend.socket_addr());
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), None)?;
    set_stream_options(&SockRef::from(&socket))?;
    // Before the connect, it holds its acknowledgement back (tcp(7)); afterwards all is as usual.
    socket.set_tcp_quickack(false)?;
    Ok(socket)
}

/// Begins to connect to `addr`. The end of that is reported as [`Stream::writable`].
fn start(socket: Socket, addr: SocketAddr) -> Result<Stream, DialError> {
    if let Err(source) = socket.connect(&addr.into())
        && source.raw_os_error() != Some(Errno::EINPROGRESS as i32)
    {
        return Err(DialError::Connect { addr, source });
    }
    Stream::new(socket).map_err(|source| DialError::Open { addr, source })
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
}

/// The kernel's answer, in clearer words where it is misleading.
fn explain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrNotAvailable => {
            "all local ports towards it are in use (net.ipv4.ip_local_port_range)".to_owned()
        }
        _ => error.to_string(),
    }
}
