//! Pumps one direction of a connection: copies what is small, splices what is large, and relays in bulk what lasts.

use std::future::poll_fn;
use std::task::{Context, Poll, ready};

use tokio::task::coop::consume_budget;
use tokio::task::yield_now;

use super::bulk;
use super::burst::Burst;
use super::direction::{Direction, End};
use super::transfer::{self, Rest, Step};

/// Bytes moved before other tasks of the worker have their turn.
const TURN: usize = 1024 * 1024;

/// What a call counts for that moves nothing, although the socket was reported ready: others have their turn even if that
/// never ends.
const NOTHING_MOVED: usize = TURN / 16;

/// The least that a call counts for. A turn then ends after 64 calls, which leaves the opposite direction half of the budget of
/// the task: 128 polls of its sockets (`tokio::task::coop`).
const LITTLE_MOVED: usize = TURN / 64;

/// As [`pump`], after a step that has `begun` it.
pub(super) async fn pump_on(begun: Step, direction: &Direction<'_>) -> End {
    let result = match begun {
        Step::Moved(_) | Step::NotReady => Ok(()),
        Step::Blocked(rest) => rest.flush(direction).await,
        Step::Ended(end) => Err(end),
    };
    match result {
        Ok(()) => pump(direction).await,
        Err(end) => end,
    }
}

/// Moves bytes from the source to the sink until one of them ends.
pub(super) async fn pump(direction: &Direction<'_>) -> End {
    let mut burst = Burst::default();
    loop {
        // While both sides keep up, nothing here waits, so yield to other tasks of the worker.
        consume_budget().await;
        let result = match poll_fn(|cx| relay_ready(direction, &mut burst, cx)).await {
            Stopped::Turn => {
                yield_now().await;
                Ok(())
            }
            // On the heap, because most connections are idle most of the time, and these states would enlarge
            // the future of each.
            Stopped::Blocked(rest) => Box::pin(rest.flush(direction)).await,
            Stopped::Sustained => {
                let result = Box::pin(bulk::relay(direction)).await;
                burst.restart_long(direction);
                result
            }
            Stopped::Ended(end) => Err(end),
        };
        if let Err(end) = result {
            return end;
        }
    }
}

/// Why moving bytes stopped.
enum Stopped {
    /// Others have their turn.
    Turn,
    /// The sink is full.
    Blocked(Rest),
    /// The transfer lasts.
    Sustained,
    Ended(End),
}

/// Moves bytes until the source has none or the sink does not accept more.
fn relay_ready(direction: &Direction<'_>, burst: &mut Burst, cx: &mut Context<'_>) -> Poll<Stopped> {
    ready!(direction.source.poll_readable(cx));
    burst.begin_next_if_over(direction);
    let mut turn = 0;
    loop {
        let capacity = burst.capacity(direction);
        let spliced = match burst.is_large(direction) {
            true => transfer::splice(direction, capacity),
            false => None,
        };
        let is_spliced = spliced.is_some();
        if let (true, Some(recorded)) = (is_spliced, direction.meter.recorded) {
            recorded.note_spliced();
        }
        match spliced.unwrap_or_else(|| transfer::copy(direction)) {
            Step::Moved(moved) => {
                turn += moved.max(LITTLE_MOVED);
                if is_spliced {
                    burst.note_spliced(capacity, moved);
                }
            }
            Step::NotReady => turn += NOTHING_MOVED,
            Step::Blocked(rest) => return Poll::Ready(Stopped::Blocked(rest)),
            Step::Ended(end) => return Poll::Ready(Stopped::Ended(end)),
        }
        burst.note_progress(direction);
        if is_spliced && burst.is_sustained(direction) {
            return Poll::Ready(Stopped::Sustained);
        }
        if turn >= TURN {
            return Poll::Ready(Stopped::Turn);
        }
        ready!(direction.source.poll_readable(cx));
    }
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
            let [meter, opposite] = [&total; 2].map(|total| Meter::new(total, None));
            let direction = Direction { source: &source, sink: &sink, meter: &meter, opposite: &opposite };
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
