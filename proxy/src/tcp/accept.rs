//! Taking connections from a listener.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
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

/// Connections accepted in a row before other tasks of the worker get theirs.
const BURST: usize = 64;

/// Pending connections at the end; the usual net.core.somaxconn. Under a flood there is always another.
const LONGEST_BACKLOG: usize = 4096;

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
    let pending = std::iter::from_fn(|| socket::accept(listener.as_fd()).ok());
    hand_over(pending.take(LONGEST_BACKLOG).collect(), &service, &workers);
    debug!(mapping = %service.mapping, "listener closed");
}

async fn accept_forever(
    listener: &Watched,
    service: &Arc<Service>,
    workers: &Workers,
) -> std::convert::Infallible {
    static FAILED: LogLimit = LogLimit::new();

    let mut backoff = Backoff::default();
    let mut burst = Vec::new();
    loop {
        let accept = |fd: BorrowedFd<'_>| socket::accept(fd).map(|accepted| burst.push(accepted));
        let result = listener.repeat(Interest::READABLE, BURST, accept).await;
        if !burst.is_empty() {
            backoff.reset();
            hand_over(std::mem::take(&mut burst), service, workers);
        }
        if let Err(error) = result {
            if let Some(suppressed) = FAILED.permit() {
                warn!(mapping = %service.mapping, error = %explain(&error), suppressed, "cannot accept a connection");
            }
            tokio::time::sleep(backoff.next_delay()).await;
        }
    }
}

/// Gives connections to workers, each of which is woken once for all that it gets.
fn hand_over(accepted: Vec<(OwnedFd, SocketAddr)>, service: &Arc<Service>, workers: &Workers) {
    let mut seated: Vec<_> = accepted.into_iter().map(|client| (workers.seat(), client)).collect();
    seated.sort_by_key(|(seat, _client)| seat.worker());
    while let Some((seat, _client)) = seated.last() {
        let (worker, runtime) = (seat.worker(), seat.runtime());
        let first = seated.partition_point(|(seat, _client)| seat.worker() < worker);
        let (group, service) = (seated.split_off(first), service.clone());
        runtime.spawn(async move {
            for (seat, (client, peer)) in group {
                tokio::spawn(serve(client, peer, service.clone(), seat));
            }
        });
    }
}

/// The kernel's answer, with a way out where there is one.
fn explain(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(nix::libc::EMFILE) => format!("{error}; raise this process's limit (`ulimit -n`)"),
        Some(nix::libc::ENFILE) => format!("{error}; raise the machine's limit (fs.file-max)"),
        _ => error.to_string(),
    }
}
