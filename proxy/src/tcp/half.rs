//! One direction of a connection.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::task::{Context, Poll, ready};

use tokio::task::coop::consume_budget;

use super::meter::Meter;
use super::stream::{Stream, while_taking};
use super::{bulk, pipe};

/// The size of the worker's copy buffer. Larger ones gain nothing over splicing, which takes over.
const BUFFER_SIZE: usize = 64 * 1024;

/// A half that fills the buffer this many times in a row is a bulk transfer.
const BULK_AFTER: u32 = 4;

thread_local! {
    /// The buffer that all connections of this worker copy through: none of them keeps one while it
    /// waits.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER_SIZE].into_boxed_slice());
}

/// How a direction ended. In each case what was read before was written, as far as the sink took it.
#[derive(Debug)]
pub(super) enum End {
    /// The source sent its last byte. The sink may hold data back until it is told so.
    Eof,
    /// The source was reset, or failed in another way.
    SourceFailed(io::Error),
    /// The same, and the sink's peer no longer takes what came before it.
    SourceFailedStalled(io::Error),
    /// The sink was reset, or failed in another way.
    SinkFailed(io::Error),
}

/// One way through a connection.
#[derive(Debug)]
pub(super) struct Direction<'a> {
    /// Where bytes are read.
    pub(super) source: &'a Stream,
    /// Where they are written.
    pub(super) sink: &'a Stream,
    /// Counts those that the sink took.
    pub(super) meter: Meter<'a>,
}

/// Moves bytes from the source to the sink until one of them ends.
pub(super) async fn pump(direction: &Direction<'_>) -> End {
    loop {
        // While both sides keep up, nothing here waits: other tasks of the worker get their turn.
        consume_budget().await;
        let result = match poll_fn(|cx| copy(direction, cx)).await {
            // On the heap, as most connections wait for requests, most of the time: these states would
            // take room in each of them.
            Copied::Blocked(rest) => Box::pin(flush(&rest, direction)).await,
            Copied::Bulk => match pipe::take() {
                Some(pipe) => Box::pin(bulk::splice(pipe, direction)).await,
                None => Ok(()),
            },
            Copied::Ended(end) => Err(end),
        };
        if let Err(end) = result {
            return end;
        }
    }
}

/// Why copying stopped.
enum Copied {
    /// The sink took less than was read: this remains.
    Blocked(Box<[u8]>),
    /// So much flows that splicing is cheaper.
    Bulk,
    Ended(End),
}

/// Copies through the worker's buffer as long as there is something to read and the sink takes it.
fn copy(direction: &Direction<'_>, cx: &mut Context<'_>) -> Poll<Copied> {
    let mut full_reads = 0;
    loop {
        ready!(direction.source.poll_readable(cx));
        let step = BUFFER.with_borrow_mut(|buf| copy_once(direction, buf));
        match step {
            Step::Moved { full: true } => full_reads += 1,
            Step::Moved { full: false } => full_reads = 0,
            Step::NotReady => {}
            Step::Stop(copied) => return Poll::Ready(copied),
        }
        if full_reads == BULK_AFTER {
            return Poll::Ready(Copied::Bulk);
        }
    }
}

/// What one read and one write came to.
enum Step {
    /// All that was read was written; `full` if the read filled the buffer.
    Moved {
        full: bool,
    },
    /// There was nothing to read after all.
    NotReady,
    Stop(Copied),
}

/// One read and, if it brought something, one write.
fn copy_once(direction: &Direction<'_>, buf: &mut [u8]) -> Step {
    let Direction { source, sink, meter } = direction;
    let read = match source.read(buf) {
        Ok(0) => return Step::Stop(Copied::Ended(End::Eof)),
        Ok(read) => read,
        Err(error) if is_transient(&error) => return Step::NotReady,
        Err(error) => return Step::Stop(Copied::Ended(End::SourceFailed(error))),
    };
    let is_last = source.is_at_end();
    let data = &buf[..read];
    let result = if is_last { sink.write_last(data) } else { sink.write(data) };
    let written = match result {
        Ok(written) => written,
        Err(error) if is_transient(&error) => 0,
        Err(error) => return Step::Stop(Copied::Ended(End::SinkFailed(error))),
    };
    meter.add(written);
    if written < read {
        return Step::Stop(Copied::Blocked(data[written..].into()));
    }
    if is_last {
        return Step::Stop(Copied::Ended(End::Eof));
    }
    Step::Moved { full: read == buf.len() }
}

/// Writes all of `rest`, as the sink takes it.
pub(super) async fn flush(mut rest: &[u8], direction: &Direction<'_>) -> Result<(), End> {
    let Direction { source, sink, meter } = direction;
    while !rest.is_empty() {
        match sink.write(rest) {
            Ok(written) => {
                meter.add(written);
                rest = &rest[written..];
            }
            Err(error) if is_transient(&error) => writable(source, sink).await?,
            Err(error) => return Err(End::SinkFailed(error)),
        }
    }
    Ok(())
}

/// Waits until `sink` takes bytes again. Should `source` be reset meanwhile, what it sent before is
/// still delivered, but only while the sink's peer goes on taking: a reset must not wait for a stalled peer.
pub(super) async fn writable(source: &Stream, sink: &Stream) -> Result<(), End> {
    tokio::select! {
        biased;
        () = sink.writable() => Ok(()),
        () = source.failed() => {
            let writable = while_taking(sink, sink.writable()).await;
            writable.ok_or_else(|| End::SourceFailedStalled(source.take_failure()))
        }
    }
}

/// Whether a call is to be repeated once the stream is ready again.
pub(super) fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
