//! Taking connections from a listener.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rproxy_sys::socket;
use rproxy_sys::watch::Watched;
use tokio::io::Interest;
use tokio::sync::watch;
use tracing::{debug, warn};

use super::{Service, serve};
use crate::backoff::Backoff;
use crate::log_limit::LogLimit;
use crate::worker::Workers;

/// Accepts connections and gives each to a worker, until `stop` changes or its sender is gone. What
/// is pending by then is still accepted: its client has been told that it is connected.
pub(crate) async fn accept_until(
    mut stop: watch::Receiver<()>,
    listener: Arc<Watched>,
    service: Arc<Service>,
    workers: Arc<Workers>,
) {
    tokio::select! {
        never = accept_forever(&listener, &service, &workers) => match never {},
        _ = stop.changed() => {}
    }
    while let Ok((client, peer)) = socket::accept(listener.as_fd()) {
        hand_over(client, peer, &service, &workers);
    }
    debug!(mapping = %service.mapping, "listener closed");
}

async fn accept_forever(
    listener: &Watched,
    service: &Arc<Service>,
    workers: &Workers,
) -> std::convert::Infallible {
    static FAILED: LogLimit = LogLimit::new();

    let mut backoff = Backoff::default();
    loop {
        match listener.io(Interest::READABLE, socket::accept).await {
            Ok((client, peer)) => {
                backoff.reset();
                hand_over(client, peer, service, workers);
            }
            Err(error) => {
                if let Some(suppressed) = FAILED.permit() {
                    warn!(mapping = %service.mapping, error = %explain(&error), suppressed, "cannot accept a connection");
                }
                tokio::time::sleep(backoff.next_delay()).await;
            }
        }
    }
}

fn hand_over(client: OwnedFd, peer: SocketAddr, service: &Arc<Service>, workers: &Workers) {
    let seat = workers.seat();
    seat.runtime().spawn(serve(client, peer, service.clone(), seat));
}

/// The kernel's answer, with a way out where there is one.
fn explain(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(nix::libc::EMFILE) => format!("{error}; raise this process's limit (`ulimit -n`)"),
        Some(nix::libc::ENFILE) => format!("{error}; raise the machine's limit (fs.file-max)"),
        _ => error.to_string(),
    }
}
