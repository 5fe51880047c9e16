//! A whole connection: two directions that end independently.

use std::fmt;
use std::io;
use std::net::Shutdown;
use std::pin::pin;
use std::time::Duration;

use socket2::SockRef;

use super::direction::{Direction, End};
use super::half::pump;
use super::meter::Meter;
use super::stream::{Stream, close_in_order, deliver_then_reset, reset_on_close};
use crate::state::ConnectionGuard;
use crate::state::stats::FailureKind;

/// Looks per idle timeout: a connection is cut at most a fourth of it late.
const LOOKS: u32 = 4;

/// How a connection ended, and what it carried.
#[derive(Debug)]
pub(super) struct Outcome {
    /// Bytes that the backend took.
    to_backend: u64,
    /// Bytes that the client took.
    to_client: u64,
    /// What broke the connection off; `None` if both sides said that they were done.
    failure: Option<io::Error>,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes in, {} bytes out, ", self.to_backend, self.to_client)?;
        match &self.failure {
            None => f.write_str("closed"),
            Some(error) => error.fmt(f),
        }
    }
}

/// Relays between two connected streams until both directions have ended, or nothing has moved for
/// as long as the limits of `guard` say. What happens is counted there.
///
/// The end of a stream is passed on as a half-close, and the other direction goes on. A reset is
/// passed on as a reset: when this returns with a failure, closing the streams resets both.
pub(super) async fn relay(client: &Stream, backend: &Stream, guard: &ConnectionGuard) -> Outcome {
    let stats = guard.stats();
    let up = Direction { source: client, sink: backend, meter: Meter::new(&stats.bytes_in) };
    let down = Direction { source: backend, sink: client, meter: Meter::new(&stats.bytes_out) };
    let failure = match guard.limits().idle_timeout {
        None => both_ways(&up, &down).await,
        // On the heap: few mappings have such a limit.
        Some(limit) => Box::pin(both_ways_unless_idle(&up, &down, limit)).await,
    };
    if let Some(error) = &failure {
        let is_idle = error.kind() == io::ErrorKind::TimedOut && error.raw_os_error().is_none();
        guard.stats().count(if is_idle { FailureKind::Idle } else { FailureKind::Broken });
    }
    Outcome { to_backend: up.meter.moved(), to_client: down.meter.moved(), failure }
}

async fn both_ways_unless_idle(
    up: &Direction<'_>,
    down: &Direction<'_>,
    limit: Duration,
) -> Option<io::Error> {
    tokio::select! {
        biased;
        failure = both_ways(up, down) => failure,
        () = until_idle(limit, [up, down]) => {
            reset_on_close(up.source);
            reset_on_close(up.sink);
            Some(io::Error::new(io::ErrorKind::TimedOut, format!("idle for {limit:?}")))
        }
    }
}

/// Waits until there has been no progress for `limit`: nothing was moved, and no peer took what was written to it
/// before. It looks from time to time, so that what moves need not say when.
async fn until_idle(limit: Duration, directions: [&Direction<'_>; 2]) {
    let look = || directions.map(|direction| (direction.meter.moved(), direction.sink.unacknowledged()));
    let (mut seen, mut quiet) = (look(), 0);
    while quiet < LOOKS {
        tokio::time::sleep(limit / LOOKS).await;
        let now = look();
        quiet = if now == seen { quiet + 1 } else { 0 };
        seen = now;
    }
}

/// Relays until both directions have ended; gives what broke them off.
async fn both_ways(up: &Direction<'_>, down: &Direction<'_>) -> Option<io::Error> {
    let mut upstream = pin!(pump(up));
    let mut downstream = pin!(pump(down));
    tokio::select! {
        biased;
        // On the heap: while both directions run, it would only take room.
        end = &mut upstream => Box::pin(finish(end, up, downstream)).await,
        end = &mut downstream => Box::pin(finish(end, down, upstream)).await,
    }
}

/// Carries on after a direction came to its `end`: `other` is the way back.
async fn finish(end: End, direction: &Direction<'_>, other: impl Future<Output = End>) -> Option<io::Error> {
    let Direction { source, sink, .. } = direction;
    match end {
        End::Eof => finish_after_eof(source, sink, other).await,
        End::SinkFailed(error) => {
            // The sink may have answered before it was reset, as a server does that refuses an
            // upload: its answer is still in our receive queue, and goes first.
            if !matches!(other.await, End::SourceFailedStalled(_)) {
                deliver_then_reset(source).await;
            }
            Some(error)
        }
        failed => pass_failure_on(failed, source, sink).await,
    }
}

/// Resets the side that has not failed, at the `end` of the direction from `source` to `sink`. Returns what
/// broke it off; `None` if nothing did.
async fn pass_failure_on(end: End, source: &Stream, sink: &Stream) -> Option<io::Error> {
    match end {
        End::Eof => None,
        End::SourceFailed(error) => {
            deliver_then_reset(sink).await;
            Some(error)
        }
        // What came before it is given up.
        End::SourceFailedStalled(error) => {
            reset_on_close(sink);
            Some(error)
        }
        End::SinkFailed(error) => {
            deliver_then_reset(source).await;
            Some(error)
        }
    }
}

/// Passes the end of `source` on and lets the way back run. A `source` that is reset after its end
/// is noticed even if the other side says nothing.
async fn finish_after_eof(
    source: &Stream,
    sink: &Stream,
    other: impl Future<Output = End>,
) -> Option<io::Error> {
    if let Err(error) = SockRef::from(sink).shutdown(Shutdown::Write) {
        // The sink is gone already, which the way back is about to find out.
        tracing::trace!(%error, "half-close not passed on");
    }
    close_in_order(sink);
    tokio::select! {
        biased;
        end = other => {
            if let End::Eof = end {
                // Closing the sockets sends the second end of stream.
                close_in_order(source);
            }
            // On the way back, what was the sink is the source.
            pass_failure_on(end, sink, source).await
        }
        () = source.failed() => {
            deliver_then_reset(sink).await;
            Some(source.take_failure())
        }
    }
}
