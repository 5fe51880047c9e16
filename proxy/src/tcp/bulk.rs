//! Transfers that last: spliced with few wake-ups.
//!
//! They raise `SO_RCVLOWAT` on their source, and are then woken once per megabyte instead of once per segment. To bound
//! the added latency, the mode ends when the source gives no event within a tick, and what is below the watermark is
//! relayed then.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rproxy_sys::socket::set_receive_low_watermark;
use tokio::task::yield_now;
use tokio::time::timeout;

use super::direction::{Direction, End};
use super::pipe::Capacity;
use super::stream::{Stream, report_refused};
use super::transfer::{self, Step};

/// How long a source may be quiet before bulk mode ends. The runtime's timer has a resolution of 1 ms and
/// rounds up, so no byte waits below the watermark for more than 2 ms.
const TICK: Duration = Duration::from_millis(1);

/// The first watermark, in bytes. It doubles whenever the source reaches it within a tick, up to the capacity of the pipe.
const FIRST_WATERMARK: u32 = 256 * 1024;

/// Up to this many transfers of the process have large pipes and watermarks. What more of them would have in flight does
/// not fit into the caches of the processors any more.
const FEW: usize = 8;

/// Bytes moved before other tasks of the worker have their turn.
const TURN: usize = 1024 * 1024;

/// The number of transfers of the process that are relayed in bulk.
static TRANSFERS: AtomicUsize = AtomicUsize::new(0);

/// Splices from the source to the sink until the source is quiet for a tick, until the opposite direction moves something,
/// or until only a read can proceed.
///
/// # Errors
/// The [`End`] of the direction, if it has ended.
pub(super) async fn relay(direction: &Direction<'_>) -> Result<(), End> {
    let Direction { source, opposite, .. } = direction;
    let transfer = Transfer::begin();
    let mut watermark = Watermark::new(source);
    let answered = opposite.moved();
    let mut turn = 0;
    loop {
        match transfer::splice(direction, transfer.capacity()) {
            None => return Ok(()),
            Some(Step::Moved(moved)) => {
                turn += moved;
                if turn >= TURN {
                    turn = 0;
                    yield_now().await;
                }
            }
            Some(Step::Blocked(rest)) => rest.flush(direction).await?,
            Some(Step::Ended(end)) => return Err(end),
            Some(Step::NotReady) => {
                if opposite.moved() != answered {
                    return Ok(());
                }
                watermark.raise(transfer.capacity());
                if timeout(TICK, source.readable()).await.is_err() {
                    return Ok(());
                }
            }
        }
    }
}

/// A transfer, which is counted until dropped.
struct Transfer;

impl Transfer {
    fn begin() -> Self {
        TRANSFERS.fetch_add(1, Ordering::Relaxed);
        Self
    }

    /// The capacity of the pipes that it uses now.
    fn capacity(&self) -> Capacity {
        if TRANSFERS.load(Ordering::Relaxed) <= FEW { Capacity::Full } else { Capacity::Medium }
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        TRANSFERS.fetch_sub(1, Ordering::Relaxed);
    }
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

    fn raise(&mut self, capacity: Capacity) {
        let wanted = match self.bytes {
            1 => FIRST_WATERMARK,
            bytes => bytes * 2,
        };
        let wanted = wanted.min(capacity.bytes());
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
            report_refused("SO_RCVLOWAT", &error, "bytes below the watermark are delayed");
        }
    }
}
