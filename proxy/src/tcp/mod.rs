//! The TCP relay: accept, dial, and move bytes both ways.
//!
//! A connection lives on one worker from accept to close. [`accept`] takes it from the listener and
//! gives it a worker; [`serve`] there dials the backend ([`dial`]) and relays until both directions
//! have ended ([`relay`]). Each direction is a [`half`], which copies, or splices ([`bulk`]) through
//! a pooled [`pipe`] while much flows.

pub(crate) mod accept;
mod bulk;
mod dial;
mod half;
mod pipe;
mod relay;
mod stream;

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::net::TcpStream;
use tracing::{debug, warn};

use crate::log_limit::LogLimit;
use crate::mapping::{Limits, Mapping};
use crate::worker::Seat;

/// What the connections of one mapping share.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) mapping: Mapping,
    pub(crate) limits: Limits,
}

/// Serves one accepted connection to its end. `seat` is given up when it is over.
async fn serve(client: OwnedFd, peer: SocketAddr, service: Arc<Service>, seat: Seat) {
    static FAILED_DIALS: LogLimit = LogLimit::new();

    let client = match TcpStream::from_std(client.into()) {
        Ok(client) => client,
        Err(error) => return warn!(%peer, %error, "cannot watch an accepted connection"),
    };
    // On the heap, so that its timer takes no room once the connection is there.
    let dialled = Box::pin(dial::dial(service.mapping.backend, service.limits.connect_timeout)).await;
    match dialled {
        Ok(backend) => {
            let outcome = relay::relay(&client, &backend).await;
            debug!(%peer, mapping = %service.mapping, %outcome, "connection ended");
        }
        Err(error) => {
            if let Some(suppressed) = FAILED_DIALS.permit() {
                warn!(%peer, %error, suppressed, "connection reset: no backend");
            }
            stream::reset_on_close(&client);
        }
    }
    drop(seat);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{BackendAddr, HostAddr, Protocol};
    use crate::runtime::new_runtime;
    use crate::worker::Workers;

    /// An idle connection is this future, its task, and what the runtime keeps for two sockets.
    #[test]
    fn a_connection_takes_little_room() {
        let runtime = new_runtime().unwrap();
        let workers = Workers::new(runtime.handle().clone());
        let localhost = [127, 0, 0, 1].into();
        let mapping = Mapping {
            protocol: Protocol::Tcp,
            host: HostAddr::new(localhost, 0),
            backend: BackendAddr::new(localhost, 80).unwrap(),
            v6only: false,
        };
        let service = Service { mapping, limits: Limits::default() };
        let fd = std::net::UdpSocket::bind("127.0.0.1:0").unwrap().into();
        let peer = SocketAddr::from(([127, 0, 0, 1], 1));
        let future = serve(fd, peer, service.into(), workers.seat());
        let size = size_of_val(&future);
        assert!(size <= 640, "{size} bytes");
    }
}
