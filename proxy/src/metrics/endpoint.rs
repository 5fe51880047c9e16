//! The server of metrics, as its owner, the manager, sees it.

use std::io;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::{error, info, warn};

use super::listener::{Acceptor, MetricsListener, MetricsSocket};
use super::routes::Routes;
use super::server::serve;
use super::source::{QUERIES, Query, Source};
use crate::control::clients::Call;

/// A running server. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Endpoint {
    socket: MetricsSocket,
    queries: mpsc::Receiver<Query>,
    server: JoinHandle<()>,
}

impl Endpoint {
    /// Serves `listener` on the runtime of the calling thread. Requests of the control protocol go to `calls`.
    ///
    /// # Errors
    /// Those of dup(2).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub(crate) fn start(listener: MetricsListener, calls: mpsc::Sender<Call>) -> io::Result<Self> {
        let address = listener.bound();
        if address.is_local() {
            info!(%address, "serving metrics");
        } else {
            warn!(%address, "serving metrics, without authentication: anybody who reaches this address can read them");
        }
        let (acceptor, socket) = listener.into_parts()?;
        let (queries, asked) = mpsc::channel(QUERIES);
        let server = tokio::spawn(serve_until_dropped(acceptor, Source { queries, calls }));
        Ok(Self { socket, queries: asked, server })
    }

    /// Waits for the next query.
    pub(crate) async fn query(&mut self) -> Query {
        match self.queries.recv().await {
            Some(query) => query,
            // The server has failed, which is logged.
            None => std::future::pending().await,
        }
    }

    /// The socket, which can be passed to another process.
    pub(crate) fn socket(&self) -> &MetricsSocket {
        &self.socket
    }

    /// Accepts no more clients, and leaves the socket and its file to another process. Responses under way end.
    pub(crate) fn leave(mut self) {
        self.socket.leave();
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.server.abort();
    }
}

async fn serve_until_dropped(acceptor: Acceptor, source: Source) {
    let Err(error) = serve(acceptor, Routes::new(source)).await;
    error!(%error, "metrics are not served any more");
}
