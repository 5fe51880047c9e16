//! The TCP relay: accept, dial, and move bytes both ways.
//!
//! A connection lives on one worker from accept to close. [`accept`] takes it from the listener and
//! gives it a worker; [`serve`] there dials the backend ([`dial`]) and relays until both directions
//! have ended ([`relay`]). Each direction is a [`half`], which copies, or splices ([`bulk`]) through
//! a pooled [`pipe`] while much flows.

pub(crate) mod accept;
mod backoff;
mod bulk;
mod connections;
mod dial;
mod direction;
mod half;
mod local_ports;
mod meter;
mod pipe;
pub(crate) mod reactor;
mod relay;
mod stream;

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use rproxy_sys::socket::set_traffic_class;
use socket2::Socket;
use tracing::{debug, warn};

use self::connections::Entry;
use self::dial::DialError;
use self::stream::Stream;
use crate::log::limit::LogLimit;
use crate::mapping::dscp::Dscp;
use crate::runtime::worker::Seat;
use crate::state::Place;
use crate::state::stats::Trouble;

/// A connection that was accepted.
struct Accepted {
    client: OwnedFd,
    peer: SocketAddr,
    place: Place,
}

/// Serves a connection to its end. `backend` is the socket to reach the backend with. The place, the seat
/// and the entry are given up when it is over.
async fn serve(accepted: Accepted, backend: io::Result<Socket>, _seat: Seat, _entry: Entry) {
    static FAILED_DIALS: LogLimit = LogLimit::new();

    // The place is given up after the sockets, which are dropped first, as others may wait for their descriptors.
    let Accepted { client, peer, place } = accepted;
    let client = match Stream::new(client) {
        Ok(client) => client,
        Err(error) => return warn!(%peer, %error, "cannot watch an accepted connection"),
    };
    if let Some(dscp) = place.limits().dscp {
        mark(&client, peer.is_ipv6(), dscp);
        backend
            .iter()
            .for_each(|backend| mark(backend, place.forward().backend.socket_addr().is_ipv6(), dscp));
    }
    // On the heap, so that its timer takes no room once the connection is there.
    let dialled =
        Box::pin(dial::dial(backend, place.forward().backend, place.limits().connect_timeout, &client)).await;
    match dialled {
        Ok(backend) => {
            if !client.is_readable() {
                backend.acknowledge();
            }
            let outcome = relay::relay(&client, &backend, &place).await;
            debug!(%peer, mapping = %place.forward(), %outcome, "connection ended");
            drop(backend);
            local_ports::freed(place.forward().backend.socket_addr());
        }
        Err(error @ DialError::ClientReset { .. }) => {
            place.stats().count(trouble(&error));
            debug!(%peer, mapping = %place.forward(), %error, "connection ended");
        }
        Err(error) => {
            place.stats().count(trouble(&error));
            if let Some(suppressed) = FAILED_DIALS.permit() {
                // Dropped before it came to an end, it is reset.
                warn!(%peer, mapping = %place.forward(), %error, suppressed, "connection reset: no backend");
            }
        }
    }
}

/// Marks what is sent by `socket`.
fn mark(socket: &impl AsFd, ipv6: bool, dscp: Dscp) {
    if let Err(error) = set_traffic_class(socket.as_fd(), ipv6, dscp.bits() << 2) {
        debug!(%error, "a connection goes without its code point");
    }
}

fn trouble(error: &DialError) -> Trouble {
    match error {
        DialError::Timeout { .. } => Trouble::ConnectTimeout,
        DialError::Connect { source, .. } if source.kind() == io::ErrorKind::ConnectionRefused => {
            Trouble::Refused
        }
        DialError::Connect { .. } | DialError::Open { .. } => Trouble::ConnectFailed,
        DialError::ClientReset { .. } => Trouble::Broken,
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;
    use std::sync::Arc;

    use super::*;
    use crate::mapping::Forward;
    use crate::mapping::addr::{BackendAddr, HostAddr, Protocol};
    use crate::mapping::limits::Limits;
    use crate::runtime::new_runtime;
    use crate::runtime::worker::Workers;
    use crate::state::{Route, Service};

    /// An idle connection is this future, its task, and what the runtime keeps for two sockets.
    #[test]
    fn a_connection_takes_little_room() {
        let runtime = new_runtime().unwrap();
        let workers = Workers::new(runtime.handle().clone(), reactor::prepare);
        let localhost = IpAddr::from([127, 0, 0, 1]);
        let forward = Forward {
            protocol: Protocol::Tcp,
            host: HostAddr::new(localhost, 0),
            backend: BackendAddr::new(localhost, 80).unwrap(),
            v6only: false,
        };
        let service = Arc::new(Service { limits: Limits::default(), live: Arc::default() });
        let place = Place::take(&Arc::new(Route { forward, service }));
        let fd = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().into();
        let peer = SocketAddr::from(([127, 0, 0, 1], 1));
        let backend = dial::open(place.forward().backend);
        let mut size = 0;
        let mapping = place.live().clone();
        let _entered = runtime.enter();
        connections::spawn(peer.ip(), &mapping, |entry| {
            let future = serve(Accepted { client: fd, peer, place }, backend, workers.seat(), entry);
            size = size_of_val(&future);
            future
        });
        assert!(size <= 640, "{size} bytes");
    }
}
