//! One step of a direction: what is queued at the source is copied or spliced to the sink, without waiting.
//!
//! splice(2) moves bytes from socket to pipe to socket, without a copy through user space.

use std::cell::RefCell;
use std::io;

use super::direction::{Direction, End, flush, is_transient, writable};
use super::pipe::{self, Capacity, Pipe};

/// The size of the worker's copy buffer. Larger transfers are spliced, so a larger buffer gains nothing.
const BUFFER_SIZE: usize = 64 * 1024;

thread_local! {
    /// The copy buffer shared by all connections of this worker. A waiting connection owns no buffer.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER_SIZE].into_boxed_slice());
}

/// Lends the worker's buffer to `task`.
pub(super) fn with_buffer<T>(task: impl FnOnce(&mut [u8]) -> T) -> T {
    BUFFER.with_borrow_mut(|buffer| task(buffer))
}

/// The result of a step.
pub(super) enum Step {
    /// Some bytes were moved; there may be more.
    Moved(usize),
    /// There was nothing to move.
    NotReady,
    /// The sink accepted less than was taken from the source.
    Blocked(Rest),
    /// The direction has ended.
    Ended(End),
}

/// What was taken from the source and the sink has not accepted yet.
pub(super) enum Rest {
    Bytes(Box<[u8]>),
    Pipe(Pipe),
}

impl Rest {
    /// Writes it, waiting for the sink as necessary.
    ///
    /// # Errors
    /// The [`End`] of the direction.
    pub(super) async fn flush(self, direction: &Direction<'_>) -> Result<(), End> {
        match self {
            Self::Bytes(bytes) => flush(&bytes, direction).await,
            Self::Pipe(pipe) => drain(pipe, direction).await,
        }
    }
}

/// One read and, if it returned data, one write.
pub(super) fn copy(direction: &Direction<'_>) -> Step {
    copy_behind(&[], direction)
}

/// Writes `header`, of less than the size of the buffer, and what one read returns behind it: one segment has both.
pub(super) fn copy_behind(header: &[u8], direction: &Direction<'_>) -> Step {
    BUFFER.with_borrow_mut(|buffer| copy_through(header, direction, buffer))
}

fn copy_through(header: &[u8], direction: &Direction<'_>, buffer: &mut [u8]) -> Step {
    let Direction { source, sink, meter, .. } = direction;
    let (first, behind) = buffer.split_at_mut(header.len());
    first.copy_from_slice(header);
    let read = match source.read(behind) {
        Ok(0) if header.is_empty() => return Step::Ended(End::Eof),
        Ok(read) => header.len() + read,
        Err(error) if is_transient(&error) && header.is_empty() => return Step::NotReady,
        Err(error) if is_transient(&error) => header.len(),
        Err(error) => return Step::Ended(End::SourceFailed(error)),
    };
    let is_last = source.is_at_end();
    let data = &buffer[..read];
    let result = if is_last { sink.write_last(data) } else { sink.write(data) };
    let written = match result {
        Ok(written) => written,
        Err(error) if is_transient(&error) => 0,
        Err(error) => return Step::Ended(End::SinkFailed(error)),
    };
    meter.add(written);
    if written < read {
        return Step::Blocked(Rest::Bytes(data[written..].into()));
    }
    if is_last { Step::Ended(End::Eof) } else { Step::Moved(read) }
}

/// As [`copy`], through a pipe of the worker, which is empty again at the end of the step unless the sink is full. Returns
/// `None` if only a read can proceed: without a pipe, at the end of the stream, at urgent data, or if splice(2) is
/// refused.
pub(super) fn splice(direction: &Direction<'_>, capacity: Capacity) -> Option<Step> {
    if direction.source.has_urgent_data() {
        return None;
    }
    let mut pipe = pipe::take(capacity)?;
    let step = match pipe.fill(direction.source) {
        // The end of the stream, or an urgent byte before it (tcp_splice_read in net/ipv4/tcp.c). A read will tell.
        Ok(0) => None,
        Ok(filled) => match drain_ready(&mut pipe, direction) {
            Ok(()) => Some(Step::Moved(filled)),
            Err(error) if is_transient(&error) => return Some(Step::Blocked(Rest::Pipe(pipe))),
            Err(error) if pipe::is_refused(&error) => Some(read_back(&mut pipe)),
            Err(error) => Some(Step::Ended(End::SinkFailed(error))),
        },
        Err(error) if pipe::is_refused(&error) => None,
        Err(error) if is_transient(&error) => Some(Step::NotReady),
        Err(error) => Some(Step::Ended(End::SourceFailed(error))),
    };
    pipe::give_back(pipe);
    step
}

/// Drains a pipe into the sink as far as that accepts it.
///
/// # Errors
/// Those of [`Pipe::drain`].
fn drain_ready(pipe: &mut Pipe, direction: &Direction<'_>) -> io::Result<()> {
    while !pipe.is_empty() {
        direction.meter.add(pipe.drain(direction.sink)?);
    }
    Ok(())
}

/// What a pipe holds that cannot be spliced on.
fn read_back(pipe: &mut Pipe) -> Step {
    match pipe.read_all() {
        Ok(held) => Step::Blocked(Rest::Bytes(held.into())),
        Err(error) => Step::Ended(End::SinkFailed(error)),
    }
}

/// Drains a pipe into the sink, waiting for it as necessary.
async fn drain(mut pipe: Pipe, direction: &Direction<'_>) -> Result<(), End> {
    loop {
        match drain_ready(&mut pipe, direction) {
            Ok(()) => break,
            Err(error) if is_transient(&error) => writable(direction.source, direction.sink).await?,
            Err(error) if pipe::is_refused(&error) => {
                let held = pipe.read_all().map_err(End::SinkFailed)?;
                flush(&held, direction).await?;
                break;
            }
            Err(error) => return Err(End::SinkFailed(error)),
        }
    }
    pipe::give_back(pipe);
    Ok(())
}
