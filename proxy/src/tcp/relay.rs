//! A whole connection: two directions that end independently.

use std::fmt;
use std::io;
use std::net::Shutdown;
use std::pin::pin;
use std::time::Duration;

use socket2::SockRef;

use super::direction::{Direction, End};
use super::half::{pump, pump_on};
use super::meter::Meter;
use super::proxy_header::Header;
use super::stream::{Stream, close_in_order, deliver_then_reset, reset_on_close};
use super::transfer::{self, Step};
use crate::state::ConnectionGuard;
use crate::state::stats::FailureKind;

/// Idle checks per timeout: a connection is reset at most a quarter of it late.
const LOOKS: u32 = 4;

/// How a connection ended, and how much it transferred.
#[derive(Debug)]
pub(super) struct Outcome {
    /// Bytes that the backend accepted.
    to_backend: u64,
    /// Bytes that the client accepted.
    to_client: u64,
    /// What broke the connection; `None` if both sides ended in order.
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

/// Relays between two connected streams until both directions have ended, or until the idle timeout of
/// `guard` has expired. Counts in the statistics of `guard`.
///
/// An end of stream is propagated as a half-close, and the other direction continues. A reset is propagated
/// as a reset: when this returns with a failure, closing the streams resets both.
///
/// The backend gets the `header` before the client's first byte: at once, in case it speaks first, and in one segment with
/// what the client has sent so far.
pub(super) async fn relay(
    client: &Stream,
    backend: &Stream,
    guard: &ConnectionGuard,
    header: Option<Box<Header>>,
) -> Outcome {
    let stats = guard.stats();
    let [to_backend, to_client] = [&stats.bytes_in, &stats.bytes_out].map(Meter::new);
    let up = Direction { source: client, sink: backend, meter: &to_backend, opposite: &to_client };
    let down = Direction { source: backend, sink: client, meter: &to_client, opposite: &to_backend };
    let begun = header.map_or(Step::NotReady, |header| transfer::copy_behind(&header.0, &up));
    let limit = guard.limits().idle_timeout;
    let is_usual = limit.is_none() && matches!(begun, Step::NotReady | Step::Moved(_));
    // On the heap, because few mappings have a timeout, and few backends no room for a header.
    let unusual = (!is_usual).then(|| Box::pin(both_ways_unless_idle(&up, &down, limit, begun)));
    let failure = match unusual {
        None => both_ways(&up, &down, pump(&up)).await,
        Some(both_ways) => both_ways.await,
    };
    if let Some(error) = &failure {
        guard.stats().count(failure_kind(error));
    }
    Outcome { to_backend: to_backend.moved(), to_client: to_client.moved(), failure }
}

/// What an error that broke a connection counts as. A timeout of the kernel (`ETIMEDOUT`: no acknowledgement, or no
/// reply to keepalives) has an error number; [`idle_error`] has none.
fn failure_kind(error: &io::Error) -> FailureKind {
    match error.raw_os_error() {
        None if error.kind() == io::ErrorKind::TimedOut => FailureKind::Idle,
        _ => FailureKind::Broken,
    }
}

/// The error of a connection that was idle for `limit`.
fn idle_error(limit: Duration) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("idle for {limit:?}"))
}

async fn both_ways_unless_idle(
    up: &Direction<'_>,
    down: &Direction<'_>,
    limit: Option<Duration>,
    begun: Step,
) -> Option<io::Error> {
    let upstream = pump_on(begun, up);
    let both_ways = both_ways(up, down, upstream);
    let Some(limit) = limit else { return both_ways.await };
    tokio::select! {
        biased;
        failure = both_ways => failure,
        () = until_idle(limit, [up, down]) => {
            reset_on_close(up.source);
            reset_on_close(up.sink);
            Some(idle_error(limit))
        }
    }
}

/// Waits until there has been no progress for `limit`: no bytes were moved, and no peer acknowledged bytes
/// written before. It polls, so that the data path need not record times.
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

/// Relays until both directions have ended, that of `upstream` and the opposite one, and returns what broke them.
async fn both_ways(
    up: &Direction<'_>,
    down: &Direction<'_>,
    upstream: impl Future<Output = End>,
) -> Option<io::Error> {
    let mut upstream = pin!(upstream);
    let mut downstream = pin!(pump(down));
    tokio::select! {
        biased;
        // On the heap, because it is not needed while both directions run.
        end = &mut upstream => Box::pin(finish(end, up, downstream)).await,
        end = &mut downstream => Box::pin(finish(end, down, upstream)).await,
    }
}

/// Continues after a direction has reached its `end`; `other` is the opposite direction.
async fn finish(end: End, direction: &Direction<'_>, other: impl Future<Output = End>) -> Option<io::Error> {
    let Direction { source, sink, .. } = direction;
    match end {
        End::Eof => finish_after_eof(source, sink, other).await,
        End::SinkFailed(error) => {
            // The sink may have replied before its reset, like a server that refuses an upload. The reply is
            // still in our receive queue, and is delivered first.
            if !matches!(other.await, End::SourceFailedStalled(_)) {
                deliver_then_reset(source).await;
            }
            Some(error)
        }
        failed => pass_failure_on(failed, source, sink).await,
    }
}

/// After the `end` of the direction from `source` to `sink`, resets the side that has not failed. Returns
/// what broke the direction; `None` if nothing did.
async fn pass_failure_on(end: End, source: &Stream, sink: &Stream) -> Option<io::Error> {
    match end {
        End::Eof => None,
        End::SourceFailed(error) => {
            deliver_then_reset(sink).await;
            Some(error)
        }
        // The data before the failure is discarded.
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

/// Propagates the end of `source`, and continues with the opposite direction. A reset of `source` after its
/// end is noticed even if the other side sends nothing.
async fn finish_after_eof(
    source: &Stream,
    sink: &Stream,
    other: impl Future<Output = End>,
) -> Option<io::Error> {
    if let Err(error) = SockRef::from(sink).shutdown(Shutdown::Write) {
        // The sink has failed already, which the opposite direction will detect.
        tracing::trace!(%error, "half-close not propagated");
    }
    close_in_order(sink);
    tokio::select! {
        biased;
        end = other => {
            if let End::Eof = end {
                // Closing the sockets sends the second end of stream.
                close_in_order(source);
            }
            // In the opposite direction, the sink is the source.
            pass_failure_on(end, sink, source).await
        }
        () = source.failed() => {
            deliver_then_reset(sink).await;
            Some(source.take_failure())
        }
    }
}

#[cfg(test)]
mod tests;
