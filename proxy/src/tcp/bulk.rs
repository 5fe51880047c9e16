//! The bulk mode of a direction: splicing, with few wake-ups.
//!
//! Bytes go from socket to pipe to socket without passing through user space (splice(2)). A transfer
//! that lasts also raises `SO_RCVLOWAT` on its source, so that it is woken once per megabyte instead
//! of once per segment. A tick bounds what that costs: bytes that have waited for one are taken, and
//! the direction goes back to copying.

use std::os::fd::AsFd;
use std::time::Duration;

use rproxy_sys::socket::set_receive_low_watermark;
use tokio::task::coop::consume_budget;
use tokio::time::timeout;

use super::direction::{Direction, End, flush, is_transient, writable};
use super::pipe::{self, Pipe};
use super::stream::Stream;

/// How long a source may be quiet before bulk mode ends. The runtime's timer has a resolution of
/// 1 ms and rounds up, so no byte waits longer than 2 ms below the watermark.
const TICK: Duration = Duration::from_millis(1);

/// Bytes spliced in one go of bulk mode before the watermark is raised: shorter transfers end
/// without the tick's delay in them.
const SUSTAINED: u64 = 4 * 1024 * 1024;

/// The first watermark, in bytes. It doubles each time that the source reaches it within a tick.
const FIRST_WATERMARK: u32 = 256 * 1024;

/// The highest watermark: what a full-sized pipe takes in one call.
const LAST_WATERMARK: u32 = 1024 * 1024;

/// Splices from the source to the sink until the source is quiet for a tick, or something comes up that only
/// copying can deal with: an end of the stream, urgent data, a refusal of splice(2). The pipe goes back to its pool.
///
/// # Errors
/// The [`End`] of the direction, when it came to one.
pub(super) async fn splice(mut pipe: Pipe, direction: &Direction<'_>) -> Result<(), End> {
    let Direction { source, meter, .. } = direction;
    let mut watermark = Watermark::new(source);
    let start = meter.moved();
    let result = loop {
        // As in `half::pump`.
        consume_budget().await;
        if source.has_urgent_data() {
            break Ok(());
        }
        match pipe.fill(source) {
            // The end of the stream, or an urgent byte before it (tcp_splice_read in net/ipv4/tcp.c): a read tells.
            Ok(0) => break Ok(()),
            Ok(_) => match empty(&mut pipe, direction).await {
                Ok(Emptied::Spliced) => {}
                Ok(Emptied::Copied) => break Ok(()),
                Err(end) => break Err(end),
            },
            Err(error) if pipe::is_refused(&error) => break Ok(()),
            Err(error) if is_transient(&error) => {
                if meter.moved() - start >= SUSTAINED {
                    watermark.raise();
                }
                if timeout(TICK, source.readable()).await.is_err() {
                    break Ok(());
                }
            }
            Err(error) => break Err(End::SourceFailed(error)),
        }
    };
    pipe::give_back(pipe);
    result
}

/// How the pipe was emptied.
enum Emptied {
    Spliced,
    /// Through a buffer, as splice(2) was refused.
    Copied,
}

/// Empties the pipe into the sink, as it takes it.
async fn empty(pipe: &mut Pipe, direction: &Direction<'_>) -> Result<Emptied, End> {
    let Direction { source, sink, meter } = direction;
    while !pipe.is_empty() {
        match pipe.drain(sink) {
            Ok(drained) => meter.add(drained),
            Err(error) if is_transient(&error) => writable(source, sink).await?,
            Err(error) if pipe::is_refused(&error) => {
                let held = pipe.read_all().map_err(End::SinkFailed)?;
                flush(&held, direction).await?;
                return Ok(Emptied::Copied);
            }
            Err(error) => return Err(End::SinkFailed(error)),
        }
    }
    Ok(Emptied::Spliced)
}

/// The `SO_RCVLOWAT` of a source. Dropping it puts the default back, and then the kernel reports at
/// once what is already queued.
struct Watermark<'a> {
    source: &'a Stream,
    bytes: u32,
}

impl<'a> Watermark<'a> {
    /// The kernel's default of one byte.
    fn new(source: &'a Stream) -> Self {
        Self { source, bytes: 1 }
    }

    fn raise(&mut self) {
        let wanted = match self.bytes {
            1 => FIRST_WATERMARK,
            bytes => (bytes * 2).min(LAST_WATERMARK),
        };
        if wanted != self.bytes && set_receive_low_watermark(self.source.as_fd(), wanted).is_ok() {
            self.bytes = wanted;
        }
    }
}

impl Drop for Watermark<'_> {
    fn drop(&mut self) {
        if self.bytes == 1 {
            return;
        }
        if let Err(error) = set_receive_low_watermark(self.source.as_fd(), 1) {
            tracing::error!(%error, "cannot lower SO_RCVLOWAT again");
        }
    }
}
