//! A whole connection: two directions that end independently.

use std::io;
use std::net::Shutdown;
use std::pin::pin;
use std::time::Duration;

use rproxy_mapping::addr::Protocol;
use socket2::SockRef;

use super::direction::{Direction, End};
use super::finish::{Finish, Side};
use super::half::{pump, pump_on};
use super::messages;
use super::meter::Meter;
use super::proxy_header::Header;
use super::stream::{Stream, close_in_order, deliver_then_reset, reset_on_close};
use super::transfer::{self, Step};
use crate::state::ConnectionGuard;
use crate::state::record::Ending;
use crate::state::stats::FailureKind;

/// Idle checks per timeout: a connection is reset at most a quarter of it late.
const LOOKS: u32 = 4;

/// How a connection ended, and how much it transferred.
#[derive(Debug)]
pub(super) struct Outcome {
    /// Bytes that the backend accepted.
    pub(super) to_backend: u64,
    /// Bytes that the client accepted.
    pub(super) to_client: u64,
    /// How it ended.
    pub(super) finish: Finish,
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
    let record = guard.record();
    let to_backend = Meter::new(&stats.tcp_bytes_in, record.map(|record| &record.to_backend));
    let to_client = Meter::new(&stats.tcp_bytes_out, record.map(|record| &record.to_client));
    let up = Direction { source: client, sink: backend, meter: &to_backend, opposite: &to_client };
    let down = Direction { source: backend, sink: client, meter: &to_client, opposite: &to_backend };
    let begun = header.map_or(Step::NotReady, |header| transfer::copy_behind(&header.0, &up));
    let limit = guard.limits().idle_timeout;
    let protocol = guard.port_mapping().protocol;
    let is_usual =
        limit.is_none() && protocol == Protocol::Tcp && matches!(begun, Step::NotReady | Step::Moved(_));
    // On the heap, because few mappings have a timeout or SCTP, and few backends no room for a header.
    let unusual = (!is_usual).then(|| Box::pin(both_ways_unless_idle(&up, &down, limit, begun, protocol)));
    let finish = match unusual {
        None => both_ways(&up, &down, pump(&up)).await,
        Some(both_ways) => both_ways.await,
    };
    match finish.ending {
        Ending::Idle => stats.count(FailureKind::Idle),
        _ if finish.failure.is_some() => stats.count(FailureKind::Broken),
        _ => {}
    }
    Outcome { to_backend: to_backend.moved(), to_client: to_client.moved(), finish }
}

async fn both_ways_unless_idle(
    up: &Direction<'_>,
    down: &Direction<'_>,
    limit: Option<Duration>,
    begun: Step,
    protocol: Protocol,
) -> Finish {
    let both_ways = async {
        match protocol {
            Protocol::Sctp => messages::both_ways(up, down).await,
            _ => both_ways(up, down, pump_on(begun, up)).await,
        }
    };
    let Some(limit) = limit else { return both_ways.await };
    tokio::select! {
        biased;
        finish = both_ways => finish,
        () = until_idle(limit, [up, down]) => {
            reset_on_close(up.source);
            reset_on_close(up.sink);
            Finish { ending: Ending::Idle, failure: Some(io::ErrorKind::TimedOut.into()) }
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

/// Relays until both directions have ended, that of `upstream` and the opposite one.
async fn both_ways(up: &Direction<'_>, down: &Direction<'_>, upstream: impl Future<Output = End>) -> Finish {
    let mut upstream = pin!(upstream);
    let mut downstream = pin!(pump(down));
    tokio::select! {
        biased;
        // On the heap, because it is not needed while both directions run.
        end = &mut upstream => Box::pin(finish(end, Side::Client, up, downstream)).await,
        end = &mut downstream => Box::pin(finish(end, Side::Backend, down, upstream)).await,
    }
}

/// Continues after the direction from `side` has reached its `end`; `other` is the opposite direction.
async fn finish(end: End, side: Side, direction: &Direction<'_>, other: impl Future<Output = End>) -> Finish {
    let Direction { source, sink, .. } = direction;
    match end {
        End::Eof => finish_after_eof(side, direction, other).await,
        End::SinkFailed(error) => {
            // The sink may have replied before its reset, like a server that refuses an upload. The reply is
            // still in our receive queue, and is delivered first.
            if !matches!(other.await, End::SourceFailedStalled(_)) {
                deliver_then_reset(source).await;
            }
            side.other().failed(error)
        }
        End::SourceFailed(error) => {
            deliver_then_reset(sink).await;
            side.failed(error)
        }
        // The data before the failure is discarded.
        End::SourceFailedStalled(error) => {
            reset_on_close(sink);
            side.failed(error)
        }
    }
}

/// Propagates the end of the stream from `side`, and continues with the `other` direction. A reset of that side after its
/// end is noticed even if the other one sends nothing.
async fn finish_after_eof(side: Side, direction: &Direction<'_>, other: impl Future<Output = End>) -> Finish {
    let Direction { source, sink, meter, .. } = direction;
    if let Some(recorded) = meter.recorded {
        recorded.note_end();
    }
    // Fails if the sink has failed already, which the opposite direction will detect.
    drop(SockRef::from(*sink).shutdown(Shutdown::Write));
    close_in_order(sink);
    tokio::select! {
        biased;
        end = other => finish_last(end, side, direction).await,
        () = source.failed() => {
            deliver_then_reset(sink).await;
            side.failed(source.take_failure())
        }
    }
}

/// Ends a connection when the direction towards `side`, which was the first to end its own, has reached its `end`.
async fn finish_last(end: End, side: Side, Direction { source, sink, .. }: &Direction<'_>) -> Finish {
    match end {
        End::Eof => {
            // Closing the sockets sends the second end of stream.
            close_in_order(source);
            side.closed()
        }
        End::SourceFailed(error) => {
            deliver_then_reset(source).await;
            side.other().failed(error)
        }
        End::SourceFailedStalled(error) => {
            reset_on_close(source);
            side.other().failed(error)
        }
        End::SinkFailed(error) => {
            deliver_then_reset(sink).await;
            side.failed(error)
        }
    }
}

#[cfg(test)]
mod tests;
