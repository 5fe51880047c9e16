//! One direction of a connection: from where to where, how it ends, and the steps that copying and splicing share.

use std::io;

use super::meter::Meter;
use super::stream::{Stream, while_taking};

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
