//! One direction of a connection, how it ends, and the steps that copying and splicing share.

use std::io;

use super::meter::Meter;
use super::stream::{Stream, while_taking};

/// How a direction ended. In each case, what was read before has been written, as far as the sink accepted
/// it.
#[derive(Debug)]
pub(super) enum End {
    /// The source has reached the end of its stream. The sink may hold data back until it is shut down.
    Eof,
    /// The source was reset, or failed in another way.
    SourceFailed(io::Error),
    /// As `SourceFailed`, and the sink's peer has stopped accepting the data before the failure.
    SourceFailedStalled(io::Error),
    /// The sink was reset, or failed in another way.
    SinkFailed(io::Error),
}

/// One direction of a connection.
#[derive(Debug)]
pub(super) struct Direction<'a> {
    /// The stream that is read.
    pub(super) source: &'a Stream,
    /// The stream that is written.
    pub(super) sink: &'a Stream,
    /// Counts the bytes that the sink accepted.
    pub(super) meter: &'a Meter<'a>,
    /// Counts those of the opposite direction.
    pub(super) opposite: &'a Meter<'a>,
}

/// Writes all of `rest`, waiting for the sink as necessary.
pub(super) async fn flush(mut rest: &[u8], direction: &Direction<'_>) -> Result<(), End> {
    let Direction { source, sink, meter, .. } = direction;
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

/// Waits until `sink` is writable. If `source` is reset meanwhile, the data before the reset is still
/// delivered, but only while the sink's peer keeps accepting: a reset must not wait for a stalled peer.
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

/// Whether to repeat a call once the stream is ready again.
pub(super) fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
