//! What requests are answered with: the manager, which owns all state, and answers queries in turn.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::snapshot::Snapshot;
use super::status::Status;
use crate::control::answers::Response;
use crate::control::clients::{self, Call};
use crate::control::protocol::{Refusal, RefusalKind, Request};

/// The maximum number of queued queries.
pub(crate) const QUERIES: usize = 16;

/// How long the manager and the tasks that serve clients may take to answer. The manager may be occupied by a reload of
/// ten thousand mappings.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// A query to the manager.
#[derive(Debug)]
pub(crate) enum Query {
    /// Probe the liveness of the tasks that accept clients; `None` if no clients are accepted any more.
    Probe(oneshot::Sender<Option<Probe>>),
    /// Tell the state of the mappings, for somebody who knows the descriptions of this revision.
    Status(Option<u64>, oneshot::Sender<Status>),
    /// Return the state of the process.
    Snapshot(oneshot::Sender<Snapshot>),
}

/// The pending answers of the tasks that accept clients, one each.
pub(crate) type Probe = Vec<oneshot::Receiver<()>>;

/// How HTTP handlers ask the manager.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    /// Queries of this room.
    pub(crate) queries: mpsc::Sender<Query>,
    /// Requests of the control protocol, such as those for live connections.
    pub(crate) calls: mpsc::Sender<Call>,
}

/// Why there is no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SourceError {
    /// The manager does not answer in time.
    #[error("the control thread does not answer")]
    Busy,
    /// The manager has ended.
    #[error("rproxy is ending")]
    Ending,
    /// No new clients are accepted.
    #[error("draining: no new clients are accepted")]
    Draining,
    /// A task that serves clients does not answer in time.
    #[error("a worker does not answer")]
    Stuck,
}

impl Source {
    /// Checks that all tasks which accept clients respond.
    ///
    /// # Errors
    /// [`SourceError`]
    pub(crate) async fn check_live(&self) -> Result<(), SourceError> {
        self.probe().await.map(drop)
    }

    /// Checks that, moreover, new clients are accepted: everything is bound before metrics are served, so that they are until
    /// the process drains.
    ///
    /// # Errors
    /// [`SourceError`]
    pub(crate) async fn check_ready(&self) -> Result<(), SourceError> {
        match self.probe().await? {
            true => Ok(()),
            false => Err(SourceError::Draining),
        }
    }

    /// Waits until all tasks which accept clients have answered. Returns whether there are any.
    async fn probe(&self) -> Result<bool, SourceError> {
        let Some(answers) = self.ask(Query::Probe).await? else { return Ok(false) };
        let all = async {
            for answer in answers {
                // A task that is gone has ended, which the manager reports.
                drop(answer.await);
            }
        };
        timeout(ANSWER_TIMEOUT, all).await.map(|()| true).map_err(|_elapsed| SourceError::Stuck)
    }

    /// The state of the mappings; without their descriptions if they are those of the revision `known`.
    ///
    /// # Errors
    /// [`SourceError`]
    pub(crate) async fn status(&self, known: Option<u64>) -> Result<Status, SourceError> {
        self.ask(|answer| Query::Status(known, answer)).await
    }

    /// Has the manager execute a request of the control protocol.
    ///
    /// # Errors
    /// [`Refusal`]
    pub(crate) async fn call(&self, request: Request) -> Result<Response, Refusal> {
        let call = timeout(ANSWER_TIMEOUT, clients::call(request, &self.calls)).await;
        let busy = |_elapsed| Refusal::new(RefusalKind::Busy, SourceError::Busy.to_string());
        call.map_err(busy)??.result
    }

    /// The state of the process.
    ///
    /// # Errors
    /// [`SourceError`]
    pub(crate) async fn snapshot(&self) -> Result<Snapshot, SourceError> {
        self.ask(Query::Snapshot).await
    }

    async fn ask<T>(&self, query: impl FnOnce(oneshot::Sender<T>) -> Query) -> Result<T, SourceError> {
        let (answer, answered) = oneshot::channel();
        let asked = async {
            self.queries.send(query(answer)).await.map_err(|_gone| SourceError::Ending)?;
            answered.await.map_err(|_gone| SourceError::Ending)
        };
        timeout(ANSWER_TIMEOUT, asked).await.unwrap_or(Err(SourceError::Busy))
    }
}
