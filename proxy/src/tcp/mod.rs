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

use crate::limits::Limits;
use crate::log_limit::LogLimit;
use crate::mapping::Forward;
use crate::worker::Seat;

/// What the connections of one mapping share.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) mapping: Forward,
    pub(crate) limits: Limits,
}

/// Serves one accepted connection to its end. `seat` is given up when it is over.
async fn serve(client: OwnedFd, peer: SocketAddr, service: Arc<Service>, seat: Seat) {
    static FAILED_DIALS: LogLimit = LogLimit::new();

    let client = match TcpStream::from_std(client.into()) {
        Ok(client) => client,
        Err(error) => return warn!(%peer, %error, "cannot watch an accepted connection"),
    };
    match dial::dial(service.mapping.backend, service.limits.connect_timeout).await {
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
