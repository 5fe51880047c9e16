//! The viewers of the status page, who get an event a second.
//!
//! One task asks the manager and compares, for all viewers together. Without viewers it waits for one.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::{Body, Frame};
use rproxy_sys::memory::release_unused;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use super::snapshot::{Process, Snapshot, end};
use crate::metrics::source::{Source, SourceError};

/// The maximum number of viewers.
pub(super) const MOST_VIEWERS: usize = 16;

/// How many events wait for a viewer that reads slowly. One that lets more wait has to connect again.
const WAITING: usize = 4;

/// The time between two events.
const PERIOD: Duration = Duration::from_secs(1);

/// Where viewers are admitted. All clones admit to the same places.
#[derive(Clone, Debug)]
pub(crate) struct Viewers {
    places: Arc<Semaphore>,
    arriving: mpsc::Sender<Viewer>,
}

/// What a viewer gets its events by.
type Viewer = mpsc::Sender<Bytes>;

/// The events of one viewer, as the body of a response (<https://html.spec.whatwg.org/multipage/server-sent-events.html>).
/// It ends when the process does, or no longer serves.
#[derive(Debug)]
pub(crate) struct Events {
    events: mpsc::Receiver<Bytes>,
    _place: OwnedSemaphorePermit,
}

impl Viewers {
    /// Starts the task, which ends when `source` does.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub(crate) fn start(source: Source) -> Self {
        let (arriving, arrived) = mpsc::channel(MOST_VIEWERS);
        tokio::spawn(serve_all(source, arrived));
        Self { places: Arc::new(Semaphore::new(MOST_VIEWERS)), arriving }
    }

    /// Admits a viewer; `None` if there are too many.
    pub(crate) async fn admit(&self) -> Option<Events> {
        let place = self.places.clone().try_acquire_owned().ok()?;
        let (viewer, events) = mpsc::channel(WAITING);
        // Those who came and went at once may still wait there. If the task has ended, so do the events.
        drop(self.arriving.send(viewer).await);
        Some(Events { events, _place: place })
    }
}

impl Body for Events {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.events.poll_recv(context).map(|event| event.map(|event| Ok(Frame::data(event))))
    }
}

/// Serves viewers until `source` ends.
async fn serve_all(source: Source, mut arriving: mpsc::Receiver<Viewer>) {
    let process = Arc::new(Process::starting());
    while let Some(first) = arriving.recv().await {
        let mut viewers = vec![first];
        if let Err(error) = serve_until_gone(&source, process.clone(), &mut viewers, &mut arriving).await {
            let event = end(reason(error));
            send(&mut viewers, &event);
        }
        drop(viewers);
        release_unused();
    }
}

/// Sends events until the last viewer has gone.
async fn serve_until_gone(
    source: &Source,
    process: Arc<Process>,
    viewers: &mut Vec<Viewer>,
    arriving: &mut mpsc::Receiver<Viewer>,
) -> Result<(), SourceError> {
    let mut snapshot = Snapshot::first(process, source.status(None).await?);
    send(viewers, &snapshot.state());
    let mut ticks = interval_at(Instant::now() + PERIOD, PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !viewers.is_empty() {
        tokio::select! {
            Some(viewer) = arriving.recv() => {
                // What the others know, so that the next changes are those since then for all.
                let mut arrived = vec![viewer];
                send(&mut arrived, &snapshot.state());
                viewers.append(&mut arrived);
            }
            _ = ticks.tick() => {
                let status = match source.status(Some(snapshot.revision())).await {
                    Err(SourceError::Busy) => continue,
                    status => status?,
                };
                let next = snapshot.next(status);
                send(viewers, &next.changes_since(&snapshot));
                snapshot = next;
            }
        }
    }
    Ok(())
}

/// Why events end, as the page knows it.
fn reason(error: SourceError) -> &'static str {
    match error {
        SourceError::Ending | SourceError::Draining => "draining",
        SourceError::Busy | SourceError::Stuck => "busy",
    }
}

/// Sends an event to all viewers, and forgets those who have left or do not keep up.
fn send(viewers: &mut Vec<Viewer>, event: &Bytes) {
    viewers.retain(|viewer| viewer.try_send(event.clone()).is_ok());
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::metrics::source::Query;
    use crate::metrics::status::{ProcessStatus, Status};

    /// Answers queries as a manager without mappings.
    async fn manage(mut asked: mpsc::Receiver<Query>) {
        while let Some(query) = asked.recv().await {
            let Query::Status(known, answer) = query else { panic!("{query:?}") };
            let stats = serde_json::from_value(json!({ "mappings": [], "draining": [] })).unwrap();
            let descriptions = known.is_none().then(Vec::new);
            drop(answer.send(Status { stats, descriptions, revision: 1, process: ProcessStatus::default() }));
        }
    }

    #[tokio::test]
    async fn those_who_came_and_went_do_not_keep_others_out() {
        let (queries, asked) = mpsc::channel(1);
        let (calls, _called) = mpsc::channel(1);
        let viewers = Viewers::start(Source { queries, calls });
        for _ in 0..MOST_VIEWERS {
            drop(viewers.admit().await.unwrap());
        }
        tokio::spawn(manage(asked));
        let mut events = viewers.admit().await.unwrap();
        let event = events.events.recv().await.expect("a viewer gets events");
        assert!(event.starts_with(b"event: state"), "{event:?}");
    }
}
