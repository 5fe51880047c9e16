//! The server of metrics, as its owner, the manager, sees it.

use std::io;
use std::sync::{Arc, Weak};
use std::time::SystemTime;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tracing::{error, info, warn};

use super::descriptors::OpenDescriptors;
use super::listener::{Acceptor, MetricsListener, MetricsSocket};
use super::routes::Routes;
use super::server::serve;
use super::snapshot::{Process, Reloads, Snapshot, UpgradeAttempt};
use super::source::{QUERIES, Query, Source};
use super::status::{ProcessStatus, Status};
use crate::control::clients::Call;
use crate::engine::Server;
use crate::engine::observation::Observation;

/// A running server. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Endpoint {
    pub(crate) socket: MetricsSocket,
    pub(crate) queries: Queries,
    server: JoinHandle<()>,
}

impl Endpoint {
    /// Serves `listener` on the runtime of the calling thread. Requests of the control protocol go to `calls`.
    /// `is_configured` says whether there is a configuration, which has been applied; `has_plane` whether ports can be
    /// attached.
    ///
    /// # Errors
    /// Those of dup(2).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub(crate) fn start(
        mut listener: MetricsListener,
        calls: mpsc::Sender<Call>,
        is_configured: bool,
        has_plane: bool,
    ) -> io::Result<Self> {
        let address = listener.bound();
        if address.is_local() {
            info!(%address, "serving metrics");
        } else {
            warn!(%address, "serving metrics, without authentication: anybody who reaches this address can read them");
        }
        let started = SystemTime::now();
        let descriptors = listener.take_descriptors();
        let (acceptor, socket) = listener.into_parts()?;
        let (queries, asked) = mpsc::channel(QUERIES);
        let source = Source { queries, calls };
        let server = tokio::spawn(serve_until_dropped(acceptor, source, address.is_loopback()));
        let reloads = is_configured.then(|| Reloads::started(started));
        let (upgrade, drained, observed) = (None, None, Shared::new());
        let queries = Queries { asked, started, reloads, upgrade, has_plane, descriptors, drained, observed };
        Ok(Self { socket, queries, server })
    }

    /// The socket, which can be passed to another process, and the queries.
    pub(crate) fn split(&mut self) -> (&MetricsSocket, &mut Queries) {
        (&self.socket, &mut self.queries)
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

/// The queries of HTTP clients, and what is needed to answer them beside the server.
#[derive(Debug)]
pub(crate) struct Queries {
    asked: mpsc::Receiver<Query>,
    started: SystemTime,
    reloads: Option<Reloads>,
    upgrade: Option<UpgradeAttempt>,
    has_plane: bool,
    descriptors: Option<OpenDescriptors>,
    /// What is drained, once nothing else is served.
    drained: Option<Arc<Observation>>,
    /// What the last scrape was given, for others while somebody still reads that: it grows with the mappings.
    observed: Shared<Observation>,
}

impl Queries {
    /// Waits for the next query.
    pub(crate) async fn next(&mut self) -> Query {
        match self.asked.recv().await {
            Some(query) => query,
            // The server has failed, which is logged.
            None => std::future::pending().await,
        }
    }

    /// Records a reload of the configuration.
    pub(crate) fn reloaded(&mut self, succeeded: bool) {
        if let Some(reloads) = &mut self.reloads {
            reloads.record(SystemTime::now(), succeeded);
        }
    }

    /// Records that an upgrade is under way, or that it `has_failed`.
    pub(crate) fn upgrading(&mut self, has_failed: bool) {
        self.upgrade = Some(UpgradeAttempt { since: SystemTime::now(), has_failed });
    }

    /// Keeps what can be seen of `server`, which drains from now on.
    pub(crate) fn drain(&mut self, server: &Server) {
        self.drained = Some(Arc::new(server.observe()));
    }

    /// Answers a query. There is no `server` while it drains.
    pub(crate) fn answer(&mut self, query: Query, server: Option<&Server>) {
        // The client may be gone.
        match query {
            Query::Probe(answer) => drop(answer.send(server.map(Server::probe_tasks))),
            // Without an answer, the client learns that the process is ending.
            Query::Status(known, answer) => {
                if let Some(server) = server {
                    let process = ProcessStatus::of(&self.process(), &server.resources());
                    drop(answer.send(Status::of(server.registry(), known, process)));
                }
            }
            Query::Snapshot(answer) => {
                let seen =
                    server.map(|server| self.observed.get(server.mappings_version(), || server.observe()));
                if let Some(seen) = seen.or_else(|| self.drained.clone()) {
                    drop(answer.send(self.snapshot(seen)));
                }
            }
        }
    }

    fn snapshot(&self, server: Arc<Observation>) -> Snapshot {
        let (is_draining, has_plane) = (self.drained.is_some(), self.has_plane);
        Snapshot { server, is_draining, has_plane, process: self.process() }
    }

    fn process(&self) -> Process {
        let descriptors = self.descriptors.as_ref().and_then(OpenDescriptors::count);
        let Self { started, reloads, upgrade, .. } = *self;
        Process { started, reloads, upgrade, descriptors }
    }
}

/// A value that those who ask for the same version share.
#[derive(Debug)]
struct Shared<T> {
    version: (u64, usize, u64),
    value: Weak<T>,
}

impl<T> Shared<T> {
    fn new() -> Self {
        Self { version: Default::default(), value: Weak::new() }
    }

    /// Returns the value of this version, and makes it unless somebody has it.
    fn get(&mut self, version: (u64, usize, u64), make: impl FnOnce() -> T) -> Arc<T> {
        if let (Some(value), true) = (self.value.upgrade(), version == self.version) {
            return value;
        }
        let value = Arc::new(make());
        (self.version, self.value) = (version, Arc::downgrade(&value));
        value
    }
}

async fn serve_until_dropped(acceptor: Acceptor, source: Source, is_loopback: bool) {
    let Err(error) = serve(acceptor, Routes::new(source, is_loopback)).await;
    error!(%error, "metrics are not served any more");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_somebody_still_reads_is_shared_until_it_changes() {
        let mut shared = Shared::new();
        let first = shared.get((1, 0, 0), || 1);
        assert!(Arc::ptr_eq(&first, &shared.get((1, 0, 0), || 2)));
        let second = shared.get((2, 0, 0), || 3);
        assert_eq!((*first, *second, *shared.get((2, 0, 0), || 4)), (1, 3, 3));
        drop((first, second));
        assert_eq!(*shared.get((2, 0, 0), || 5), 5, "nothing is kept for nobody");
    }
}
