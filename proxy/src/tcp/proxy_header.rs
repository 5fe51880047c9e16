//! The header of the PROXY protocol at the start of a connection: that of a proxy in front, and that for the backend.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use rproxy_mapping::addr::Protocol;
use socket2::{SockRef, Socket};
use tokio::time::timeout;
use tracing::{debug, warn};

use super::connections::Entry;
use super::dial::DialError;
use super::direction::is_transient;
use super::duration_ms;
use super::stream::{Stream, close_in_order};
use super::{dial, report_failed_dial};
use crate::log::limit::LogLimit;
use crate::proxy_protocol::{Endpoints, HeaderError, LONGEST, decode_stream, header_without_addresses};
use crate::state::ConnectionGuard;
use crate::state::client::ClientAddr;
use crate::state::record::Ending;
use crate::state::stats::FailureKind;

/// The header for a backend, in bytes. Boxed, it takes one pointer in the future of each connection.
#[derive(Debug)]
pub(super) struct Header(pub(super) Vec<u8>);

/// The connection must not be served: it is reset.
pub(super) struct Refused;

/// Receives the header of a connection if its `peer` is a proxy; the peer is then the client that this speaks for, and the
/// target is that which the mapping has by then, and `socket` one that can connect to its backend. Returns the header for
/// the backend, if that gets one.
///
/// # Errors
/// [`Refused`] if the proxy's header is wrong, or if the mapping does not serve its client.
pub(super) async fn exchange(
    stream: &Stream,
    socket: &mut Socket,
    peer: &mut ClientAddr,
    guard: &mut ConnectionGuard,
    entry: &Entry,
) -> Result<Option<Box<Header>>, Refused> {
    let mut told = None;
    let options = &guard.limits().proxy_protocol;
    if options.expects_header(peer.ip()) {
        let received = receive(stream, options.timeout).await;
        told = received.map_err(|error| refuse(stream, *peer, guard, &error))?;
        if let Some(told) = told {
            *peer = told.source().into();
        }
        let domain = |guard: &ConnectionGuard| dial::domain_of(&guard.port_mapping().backend);
        let domain_before = domain(guard);
        if let Some(target) = entry.set_client(*peer) {
            guard.set_target(target);
        }
        let (client, target) = (peer.canonical(), guard.target());
        guard.record().iter().for_each(|record| record.set_told(client, target));
        if !guard.admits(*peer) {
            guard.end(Ending::Denied);
            return Err(Refused);
        }
        match guard.target().admit_source(*peer) {
            Ok(place) => place.into_iter().for_each(|place| entry.set_place(place)),
            Err(ending) => {
                guard.end(ending);
                return Err(Refused);
            }
        }
        if domain(guard) != domain_before {
            *socket = dial::open_for(guard.target()).map_err(|source| {
                let addr = guard.port_mapping().backend.clone();
                report_failed_dial(*peer, guard, &DialError::Open { addr, source });
                Refused
            })?;
        }
    }
    let send = guard.limits().proxy_protocol.send;
    Ok(send.map(|version| {
        let header = match (told, *peer) {
            (Some(told), _) => told.header(version, Protocol::Tcp),
            (None, ClientAddr::Inet(peer)) => endpoints(stream, peer).header(version, Protocol::Tcp),
            (None, ClientAddr::Unix(_)) => header_without_addresses(version),
        };
        Box::new(Header(header))
    }))
}

/// The endpoints of a connection, as its sockets have them.
fn endpoints(stream: &Stream, peer: SocketAddr) -> Endpoints {
    let local = SockRef::from(stream).local_addr().ok().and_then(|local| local.as_socket());
    Endpoints::new(peer, local.unwrap_or_else(|| SocketAddr::new(peer.ip(), 0)))
}

/// Receives the header of a connection within `limit`, and nothing behind it. Returns whom it speaks for, if it says so.
async fn receive(stream: &Stream, limit: Duration) -> Result<Option<Endpoints>, ReceiveError> {
    timeout(limit, receive_header(stream)).await.unwrap_or(Err(ReceiveError::Late(limit)))
}

async fn receive_header(stream: &Stream) -> Result<Option<Endpoints>, ReceiveError> {
    let mut bytes = [0; LONGEST];
    loop {
        stream.readable().await;
        let peeked = match stream.peek(&mut bytes) {
            Ok(0) => return Err(ReceiveError::Ended),
            Ok(peeked) => peeked,
            Err(error) if is_transient(&error) => continue,
            Err(error) => return Err(ReceiveError::Failed(error)),
        };
        if let Some(header) = decode_stream(&bytes[..peeked])? {
            stream.read_peeked(&mut bytes[..header.len], peeked).map_err(ReceiveError::Failed)?;
            return Ok(header.endpoints);
        }
        // More would have been peeked at; this is the end, a failure, or urgent data, behind which a read does not look.
        if stream.is_readable() {
            return Err(ReceiveError::Cut);
        }
    }
}

/// Why there is no header.
#[derive(Debug, thiserror::Error)]
enum ReceiveError {
    #[error(transparent)]
    Wrong(#[from] HeaderError),
    #[error("the header was not there within {0:?}")]
    Late(Duration),
    #[error("the connection ends within its header")]
    Cut,
    /// It ended without a byte, as some checks for an open port do.
    #[error("the connection ended without a byte")]
    Ended,
    #[error(transparent)]
    Failed(io::Error),
}

/// Counts and logs that the connection of a proxy is not served.
fn refuse(stream: &Stream, peer: ClientAddr, guard: &ConnectionGuard, error: &ReceiveError) -> Refused {
    static WRONG: LogLimit = LogLimit::new();

    let mapping = &guard.state().name;
    let log_end = |ending: Ending| {
        let (duration_ms, reason) = (duration_ms(guard), ending.as_str());
        debug!(client = %peer, %mapping, bytes_in = 0, bytes_out = 0, duration_ms, reason, %error, "connection ended");
    };
    match error {
        ReceiveError::Ended => {
            guard.end(Ending::ClientClosed);
            close_in_order(stream);
            log_end(Ending::ClientClosed);
        }
        ReceiveError::Failed(_) => {
            guard.stats().count(FailureKind::Broken);
            guard.end(Ending::ClientReset);
            log_end(Ending::ClientReset);
        }
        ReceiveError::Wrong(_) | ReceiveError::Late(_) | ReceiveError::Cut => {
            guard.stats().count_of(Protocol::Tcp, FailureKind::BadProxyHeader);
            guard.end(Ending::BadProxyHeader);
            if let Some(suppressed) = WRONG.permit() {
                warn!(client = %peer, %mapping, %error, suppressed, "connection reset: no header of its proxy");
            }
        }
    }
    Refused
}
