//! The TCP relay: accept, dial, and move bytes in both directions.
//!
//! A connection stays on one worker from accept to close. [`accept`] takes it from the listener and assigns
//! it to a worker. There, [`dial_and_relay`] dials the backend ([`dial`]) and relays until both directions have
//! ended ([`relay`]). Each direction is a [`half`], which copies, or splices ([`bulk`]) through a pooled
//! [`pipe`] during bulk transfers. SCTP takes the same way, but [`messages`] relays what its connections carry.

pub(crate) mod accept;
mod attempts;
mod backoff;
mod bulk;
mod burst;
mod connections;
mod dial;
mod direction;
mod finish;
mod fragments;
mod half;
mod messages;
mod meter;
mod pipe;
mod proxy_header;
mod queues;
mod relay;
mod source;
mod stream;
mod transfer;

use std::io;
use std::os::fd::OwnedFd;

use rproxy_mapping::PortMapping;
use rproxy_mapping::addr::Protocol;
use socket2::Socket;
use tracing::{debug, warn};

pub(crate) use self::connections::reset_all;
use self::connections::{Client, Entry};
use self::dial::DialError;
use self::proxy_header::Refused;
use self::relay::Outcome;
use self::stream::Stream;
use crate::bind::source::{NotAsClient, SourceError};
use crate::log::limit::LogLimit;
use crate::runtime::worker::WorkerSlot;
use crate::state::ConnectionGuard;
use crate::state::client::ClientAddr;
use crate::state::record::{Ending, Time};
use crate::state::sources::Place;
use crate::state::stats::FailureKind;

/// An accepted connection. Its guard is dropped last: its drop notifies others that descriptors are free.
struct Accepted {
    client: OwnedFd,
    /// The socket to connect to the backend with.
    backend: Socket,
    peer: ClientAddr,
    guard: ConnectionGuard,
    /// Its place among the connections of its source, until it is listed.
    place: Option<Box<Place>>,
}

impl Accepted {
    /// Whom it is for, as far as known before its first byte.
    fn client(&self) -> Client {
        match self.guard.limits().proxy_protocol.expects_header(self.peer.ip()) {
            true => Client::Awaited(self.guard.target().clone()),
            false => Client::Known(self.peer),
        }
    }
}

/// Dials the backend of a connection, and relays until both directions have ended. The guard, the slot and the entry
/// are released at the end.
///
/// Not an `async fn`, because the future of one has its arguments twice.
fn dial_and_relay(accepted: Accepted, slot: WorkerSlot, entry: Entry) -> impl Future<Output = ()> + Send {
    let Accepted { client, backend: mut socket, mut peer, mut guard, place: _ } = accepted;
    async move {
        // What a future captures is dropped in the order of its first use: the sockets come before the guard.
        let client = match Stream::new(client) {
            Ok(client) => client.unix(matches!(peer, ClientAddr::Unix(_))),
            Err(error) => return report_unwatched(peer, &guard, &error),
        };
        let mut header = None;
        if guard.limits().proxy_protocol.is_used() {
            // On the heap, because few mappings have it.
            match Box::pin(proxy_header::exchange(&client, &mut socket, &mut peer, &mut guard, &entry)).await
            {
                Ok(for_backend) => header = for_backend,
                Err(Refused) => return,
            }
        }
        // On the heap, so that its timer does not enlarge the future of the connection.
        let Some(backend) = Box::pin(dialled(socket, &client, peer, &mut guard)).await else { return };
        let (guard, _slot) = (&guard, &slot);
        let is_tcp = guard.port_mapping().is_tcp_to_backend();
        if is_tcp && header.is_none() && !client.is_readable() {
            backend.acknowledge();
        }
        let outcome = relay::relay(&client, &backend, guard, header).await;
        guard.end(outcome.finish.ending);
        log_end(peer, guard, &outcome, [&backend, &client]);
        drop(backend);
        queues::freed(&guard.port_mapping().backend);
    }
}

/// Logs that the events of a connection cannot be waited for, because descriptors or memory have run out. It is reset.
fn report_unwatched(peer: ClientAddr, guard: &ConnectionGuard, error: &io::Error) {
    static UNWATCHED: LogLimit = LogLimit::new();

    if let Some(suppressed) = UNWATCHED.permit() {
        let mapping = &guard.state().name;
        warn!(client = %peer, %mapping, %error, suppressed, "connection reset: it cannot be watched");
    }
}

/// Logs the end of a connection, and what its `sinks`, backend and client, have not received when it is reset.
fn log_end(peer: ClientAddr, guard: &ConnectionGuard, outcome: &Outcome, sinks: [&Stream; 2]) {
    let Outcome { to_backend: bytes_in, to_client: bytes_out, finish } = outcome;
    let (mapping, reason, error) = (&guard.state().name, finish.ending.as_str(), finish.failure.as_ref());
    let undelivered = |sink: &Stream| error.map(|_reset| sink.unacknowledged());
    debug!(
        client = %peer, %mapping, bytes_in, bytes_out,
        undelivered_in = undelivered(sinks[0]), undelivered_out = undelivered(sinks[1]),
        duration_ms = duration_ms(guard), reason, error = error.map(tracing::field::display), "connection ended"
    );
}

/// The age of a connection, in milliseconds, for a line at debug level, at which each connection is recorded.
fn duration_ms(guard: &ConnectionGuard) -> Option<u64> {
    guard.record().and_then(|record| u64::try_from(record.age().as_millis()).ok())
}

/// The connection to the backend; `None`, and a report, if there is none. If the name of the backend has several addresses,
/// the target of `guard` has the one that was reached from then on.
async fn dialled(
    socket: Socket,
    client: &Stream,
    peer: ClientAddr,
    guard: &mut ConnectionGuard,
) -> Option<Stream> {
    let begun = guard.record().map(|_recorded| Time::now());
    let dialled = match guard.target().named.clone() {
        None => dial_address(socket, client, peer, guard).await,
        Some(host) => match attempts::dial_named(socket, &host, client, peer, guard).await {
            Ok((stream, target)) => {
                guard.record().iter().for_each(|record| record.set_reached(&target.port_mapping.backend));
                guard.set_target(target);
                Ok(stream)
            }
            Err(error) => Err(error),
        },
    };
    if let (Ok(_), Some(record), Some(begun)) = (&dialled, guard.record(), begun) {
        guard.stats().connect_times.record(record.set_connected(begun));
    }
    dialled.map_err(|error| report_failed_dial(peer, guard, &error)).ok()
}

/// Connects to the backend of a mapping that has one address.
async fn dial_address(
    socket: Socket,
    client: &Stream,
    peer: ClientAddr,
    guard: &ConnectionGuard,
) -> Result<Stream, DialError> {
    let (limits, PortMapping { backend, protocol, .. }) = (guard.limits(), guard.port_mapping());
    let fell_back = |reason: &NotAsClient| report_other_source(peer, guard, reason);
    match source::prepare(socket, guard.target(), peer, fell_back) {
        Ok(socket) => dial::dial(socket, backend, *protocol, limits.connect_timeout, client).await,
        Err(source) => Err(DialError::Source { addr: backend.clone(), source }),
    }
}

/// Counts and logs that the backend sees an address of this host instead of the client's.
fn report_other_source(peer: ClientAddr, guard: &ConnectionGuard, reason: &NotAsClient) {
    static OTHERS: LogLimit = LogLimit::new();

    guard.stats().count_of(Protocol::Tcp, FailureKind::SourceUnavailable);
    if let Some(suppressed) = OTHERS.permit() {
        warn!(client = %peer, mapping = %guard.state().name, %reason, suppressed, "connection not from its client's address");
    }
}

/// Counts and logs that a connection has no backend. Its client is reset when its socket is dropped, because the
/// connection has not ended in order.
fn report_failed_dial(peer: ClientAddr, guard: &ConnectionGuard, error: &DialError) {
    static FAILED_DIALS: LogLimit = LogLimit::new();

    guard.stats().count_of(Protocol::Tcp, failure_kind(error));
    guard.end(ending(error));
    let (mapping, reason) = (&guard.state().name, ending(error).as_str());
    let backend = guard.target().backend_text();
    // Only the target knows why a name leads nowhere.
    let problem = guard.target().unresolved().unwrap_or_else(|| error.to_string());
    if let DialError::ClientReset { .. } = error {
        debug!(client = %peer, %mapping, bytes_in = 0, bytes_out = 0, duration_ms = duration_ms(guard), reason, error = %problem, "connection ended");
    } else if let Some(suppressed) = FAILED_DIALS.permit() {
        warn!(client = %peer, %mapping, %backend, reason, error = %problem, suppressed, "connection reset: no backend");
    }
}

/// How a connection ends whose backend cannot be reached.
fn ending(error: &DialError) -> Ending {
    match failure_kind(error) {
        FailureKind::ConnectTimeout => Ending::ConnectTimeout,
        FailureKind::Refused => Ending::ConnectRefused,
        FailureKind::SourceUnavailable => Ending::SourceUnavailable,
        FailureKind::Broken => Ending::ClientReset,
        _ => Ending::ConnectFailed,
    }
}

fn failure_kind(error: &DialError) -> FailureKind {
    match error {
        DialError::Timeout { .. } => FailureKind::ConnectTimeout,
        DialError::Connect { source, .. } if source.kind() == io::ErrorKind::ConnectionRefused => {
            FailureKind::Refused
        }
        DialError::Source { source: SourceError::Client { .. } | SourceError::NoClient, .. } => {
            FailureKind::SourceUnavailable
        }
        DialError::Source { .. }
        | DialError::Connect { .. }
        | DialError::Open { .. }
        | DialError::Unresolved { .. } => FailureKind::ConnectFailed,
        DialError::ClientReset { .. } => FailureKind::Broken,
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::sync::Arc;

    use nix::errno::Errno;
    use rproxy_mapping::PortMapping;
    use rproxy_mapping::addr::{BackendAddr, HostSocketAddr, Protocol};

    use super::*;
    use crate::runtime::new_runtime;
    use crate::runtime::worker::Workers;
    use crate::state::{MappingPolicy, Target};

    /// An idle connection costs this future, its task, and the runtime's state of two sockets.
    #[test]
    fn a_connection_takes_little_room() {
        let runtime = new_runtime().unwrap();
        let workers = Workers::new(runtime.handle().clone());
        let localhost = IpAddr::from([127, 0, 0, 1]);
        let port_mapping = PortMapping {
            protocol: Protocol::Tcp,
            host: HostSocketAddr::new(localhost, 0),
            backend: BackendAddr::new(localhost, 80).unwrap(),
            v6only: false,
        };
        let policy = Arc::new(MappingPolicy { limits: Arc::default(), state: Arc::default() });
        let guard = ConnectionGuard::take(&Arc::new(Target::new(port_mapping, policy)));
        let fd = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().into();
        let peer = ClientAddr::Inet(([127, 0, 0, 1], 1).into());
        let backend = dial::open(guard.port_mapping()).unwrap();
        let mut size = 0;
        let mapping = guard.state().clone();
        let _entered = runtime.enter();
        connections::spawn((Client::Known(peer), None, None), &mapping, |entry| {
            let future = dial_and_relay(
                Accepted { client: fd, backend, peer, guard, place: None },
                workers.slot(),
                entry,
            );
            size = size_of_val(&future);
            future
        });
        assert!(size <= 704, "{size} bytes");
    }

    #[test]
    fn each_reason_for_a_failed_dial_is_counted_as_itself() {
        let addr = || BackendAddr::new(IpAddr::from([127, 0, 0, 1]), 1).unwrap();
        let connect = |errno| DialError::Connect { addr: addr(), source: io::Error::from(errno) };
        for (error, kind) in [
            (connect(Errno::ECONNREFUSED), FailureKind::Refused),
            (connect(Errno::EHOSTUNREACH), FailureKind::ConnectFailed),
            (
                DialError::Open { addr: addr(), source: Errno::EAFNOSUPPORT.into() },
                FailureKind::ConnectFailed,
            ),
            (DialError::ClientReset { addr: addr() }, FailureKind::Broken),
        ] {
            assert_eq!(failure_kind(&error), kind, "{error}");
        }
    }
}
