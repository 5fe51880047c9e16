//! Pumps one direction of a connection: copies, and splices during bulk transfers.

use std::cell::RefCell;
use std::future::poll_fn;
use std::task::{Context, Poll, ready};

use tokio::task::coop::consume_budget;

use super::direction::{Direction, End, flush, is_transient};
use super::{bulk, pipe};

/// The size of the worker's copy buffer. Larger transfers are spliced, so a larger buffer gains nothing.
const BUFFER_SIZE: usize = 64 * 1024;

/// A direction that fills the buffer this many times in a row is a bulk transfer.
const BULK_AFTER: u32 = 4;

thread_local! {
    /// The copy buffer shared by all connections of this worker. A waiting connection owns no buffer.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER_SIZE].into_boxed_slice());
}

/// Moves bytes from the source to the sink until one of them ends.
pub(super) async fn pump(direction: &Direction<'_>) -> End {
    loop {
        // While both sides keep up, nothing here waits, so yield to other tasks of the worker.
        consume_budget().await;
        let result = match poll_fn(|cx| copy(direction, cx)).await {
            // On the heap, because most connections are idle most of the time, and these states would enlarge
            // the future of each.
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
    /// The sink accepted less than was read; this is the rest.
    Blocked(Box<[u8]>),
    /// The transfer is large enough for splicing to be cheaper.
    Bulk,
    Ended(End),
}

/// Copies through the worker's buffer until the source has no data or the sink does not accept more.
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

/// The result of one read and one write.
enum Step {
    /// Everything that was read was written; `full` if the read filled the buffer.
    Moved {
        full: bool,
    },
    /// There was nothing to read.
    NotReady,
    Stop(Copied),
}

/// One read and, if it returned data, one write.
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

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read, Write};
    use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
    use std::thread;
    use std::time::Duration;

    use tokio::sync::oneshot;
    use tokio::task::yield_now;
    use tokio::time::timeout;

    use super::super::meter::Meter;
    use super::super::stream::Stream;
    use super::*;
    use crate::runtime::new_runtime;
    use crate::state::stats::Counter;

    /// Without it, a pump that waits in vain would hang the test.
    const PATIENCE: Duration = Duration::from_secs(20);

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0)
    }

    /// Writes until the send buffer is full. Returns how many bytes it took.
    fn fill(mut stream: &TcpStream) -> usize {
        stream.set_nonblocking(true).unwrap();
        let mut written = 0;
        loop {
            match stream.write(&[0; 4096]) {
                Ok(count) => written += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return written,
                Err(error) => panic!("{error}"),
            }
        }
    }

    #[test]
    fn what_meets_a_sink_that_is_full_from_the_start_waits_for_it() {
        const DATA: &[u8] = b"behind what fills it";

        let ((mut feeder, source), (sink, mut reader)) = (pair(), pair());
        reader.set_read_timeout(Some(PATIENCE)).unwrap();
        source.set_nonblocking(true).unwrap();
        let peeked = source.try_clone().unwrap();
        let before = fill(&sink);
        feeder.write_all(DATA).unwrap();
        let (taken, is_taken) = oneshot::channel();
        let peer = thread::spawn(move || {
            is_taken.blocking_recv().unwrap();
            let mut received = vec![1; before + DATA.len()];
            reader.read_exact(&mut received).unwrap();
            feeder.shutdown(Shutdown::Write).unwrap();
            received.split_off(before)
        });
        let total = Counter::default();
        let end = new_runtime().unwrap().block_on(async {
            let (source, sink) = (Stream::new(source).unwrap(), Stream::new(sink).unwrap());
            let direction = Direction { source: &source, sink: &sink, meter: Meter::new(&total) };
            let told = async {
                while peeked.peek(&mut [0]).is_ok() {
                    yield_now().await;
                }
                taken.send(()).unwrap();
            };
            timeout(PATIENCE, async { tokio::join!(pump(&direction), told).0 }).await
        });
        assert!(matches!(end, Ok(End::Eof)), "{end:?}");
        assert_eq!(peer.join().unwrap(), DATA);
    }
}
