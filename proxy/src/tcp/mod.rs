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

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use tokio::net::TcpStream;
use tracing::{debug, warn};

use self::dial::DialError;
use crate::log_limit::LogLimit;
use crate::service::Place;
use crate::stats::Trouble;
use crate::worker::Seat;

/// Serves one accepted connection to its end. `place` and `seat` are given up when it is over.
async fn serve(client: OwnedFd, peer: SocketAddr, place: Place, seat: Seat) {
    static FAILED_DIALS: LogLimit = LogLimit::new();

    let client = match TcpStream::from_std(client.into()) {
        Ok(client) => client,
        Err(error) => return warn!(%peer, %error, "cannot watch an accepted connection"),
    };
    match dial::dial(place.forward().backend, place.limits().connect_timeout).await {
        Ok(backend) => {
            let outcome = relay::relay(&client, &backend).await;
            outcome.count(place.stats());
            debug!(%peer, mapping = %place.forward(), %outcome, "connection ended");
        }
        Err(error) => {
            place.stats().count(trouble(&error));
            if let Some(suppressed) = FAILED_DIALS.permit() {
                warn!(%peer, %error, suppressed, "connection reset: no backend");
            }
            stream::reset_on_close(&client);
        }
    }
    drop((place, seat));
}

fn trouble(error: &DialError) -> Trouble {
    match error {
        DialError::Timeout { .. } => Trouble::ConnectTimeout,
        DialError::Connect { source, .. } if source.kind() == io::ErrorKind::ConnectionRefused => {
            Trouble::Refused
        }
        DialError::Connect { .. } | DialError::Open { .. } => Trouble::ConnectFailed,
    }
}
