//! Connecting to backends. This is the one place that does: a policy for source addresses goes here.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::SockRef;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::addr::BackendAddr;
use crate::listen::set_stream_options;

/// Connects to `backend` within `limit`; without one, as long as the kernel tries.
pub(super) async fn dial(backend: BackendAddr, limit: Option<Duration>) -> Result<TcpStream, DialError> {
    let addr = backend.socket_addr();
    let connected =
        async { open(addr)?.connect(addr).await.map_err(|source| DialError::Connect { addr, source }) };
    match limit {
        None => connected.await,
        Some(limit) => timeout(limit, connected).await.unwrap_or(Err(DialError::Timeout { addr, limit })),
    }
}

fn open(addr: SocketAddr) -> Result<TcpSocket, DialError> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
    socket
        .and_then(|socket| set_stream_options(&SockRef::from(&socket)).map(|()| socket))
        .map_err(|source| DialError::Open { addr, source })
}

/// Why a backend could not be reached.
#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    /// No socket to connect with, mostly for want of descriptors.
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
