//! The bulk mode of a direction: splicing with few wake-ups.
//!
//! splice(2) moves bytes from socket to pipe to socket, without a copy through user space. A sustained
//! transfer also raises `SO_RCVLOWAT` on its source, and is then woken once per megabyte instead of once per
//! segment. To bound the added latency, a direction that gets no event within a tick reads the bytes below
//! the watermark and returns to copying.

use std::os::fd::AsFd;
use std::time::Duration;

use rproxy_sys::socket::set_receive_low_watermark;
use tokio::task::coop::consume_budget;
use tokio::time::timeout;

use super::direction::{Direction, End, flush, is_transient, writable};
use super::pipe::{self, Pipe};
use super::stream::Stream;

/// How long a source may be quiet before bulk mode ends. The runtime's timer has a resolution of 1 ms and
/// rounds up, so no byte waits below the watermark for more than 2 ms.
const TICK: Duration = Duration::from_millis(1);

/// Bytes to splice in bulk mode before the watermark is raised, so that shorter transfers do not end with the
/// delay of a tick.
const SUSTAINED: u64 = 4 * 1024 * 1024;

/// The first watermark, in bytes. It doubles whenever the source reaches it within a tick.
const FIRST_WATERMARK: u32 = 256 * 1024;

/// The highest watermark: the capacity of a full-sized pipe.
const LAST_WATERMARK: u32 = 1024 * 1024;

/// Splices from the source to the sink until the source is quiet for a tick, or until only a read can
/// proceed: at the end of the stream, at urgent data, or if splice(2) is refused. The pipe is returned to its
/// pool.
///
/// # Errors
/// The [`End`] of the direction, if it has ended.
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
            // The end of the stream, or an urgent byte before it (tcp_splice_read in net/ipv4/tcp.c). A read
            // will tell.
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

/// How the pipe was drained.
enum Emptied {
    Spliced,
    /// Through a buffer, because splice(2) was refused.
    Copied,
}

/// Drains the pipe into the sink, waiting for it as necessary.
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

/// The `SO_RCVLOWAT` of a source. Dropping it restores the default, upon which the kernel reports what is
/// already queued.
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
