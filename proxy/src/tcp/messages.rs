//! Relays SCTP: messages instead of bytes, in the connections that [`relay`](super::relay) relays otherwise.
//!
//! Each message is received and sent as a whole, with its stream, its order and its payload protocol identifier. A longer
//! one than the buffer becomes several. SCTP has no half-close (RFC 9260, section 9.2): a peer that has shut its
//! association down accepts nothing more. So the end of one side ends the other one, once that has got everything.

use std::io;
use std::net::Shutdown;
use std::pin::pin;

use rproxy_sys::sctp::{Label, Received};
use socket2::SockRef;
use tokio::task::coop::consume_budget;

use super::direction::{Direction, End, is_transient, writable};
use super::finish::{Finish, Side};
use super::stream::{
    FIRST_LOOK, LONGEST_LOOK, Stream, close_in_order, deliver_then_reset, reset_on_close, while_taking,
};
use super::transfer::with_buffer;

/// Messages that are discarded before other connections of the worker have their turn.
const TURN: usize = 256;

/// What a step of a direction has led to.
enum Step {
    Sent,
    /// Nothing to receive.
    NotReady,
    /// The sink has no room for the message.
    Blocked(Box<[u8]>, Label),
    Ended(End),
}

/// Relays until one side has ended.
pub(super) async fn both_ways(up: &Direction<'_>, down: &Direction<'_>) -> Finish {
    let (mut upstream, mut downstream) = (pin!(pump(up)), pin!(pump(down)));
    tokio::select! {
        biased;
        end = &mut upstream => finish(end, Side::Client, up, downstream).await,
        end = &mut downstream => finish(end, Side::Backend, down, upstream).await,
    }
}

/// Moves messages from the source to the sink until one of them ends.
async fn pump(direction: &Direction<'_>) -> End {
    loop {
        // While both sides keep up, nothing here waits, so others have their turn.
        consume_budget().await;
        direction.source.readable().await;
        match with_buffer(|buffer| relay_one(direction, buffer)) {
            Step::Sent | Step::NotReady => {}
            Step::Blocked(message, label) => {
                if let Err(end) = flush(&message, label, direction).await {
                    return end;
                }
            }
            Step::Ended(end) => return end,
        }
    }
}

/// Receives a message and, if there is one, sends it.
fn relay_one(direction: &Direction<'_>, buffer: &mut [u8]) -> Step {
    let Direction { source, sink, meter, .. } = direction;
    let (len, label) = match source.receive_message(buffer) {
        Ok(Received::Data(len, label)) => (len, label),
        Ok(Received::Notification) => return Step::Sent,
        Ok(Received::End) => return Step::Ended(End::Eof),
        // An association that was aborted has no end, and its error is reported once.
        Err(error) if is_transient(&error) && source.has_failed() => {
            return Step::Ended(End::SourceFailed(source.take_failure()));
        }
        Err(error) if is_transient(&error) => return Step::NotReady,
        Err(error) => return Step::Ended(End::SourceFailed(error)),
    };
    match sink.send_message(&buffer[..len], label) {
        Ok(()) => {
            meter.add(len);
            Step::Sent
        }
        Err(error) if is_transient(&error) => Step::Blocked(buffer[..len].into(), label),
        Err(error) => Step::Ended(End::SinkFailed(error)),
    }
}

/// Sends `message` when there is room for it.
async fn flush(message: &[u8], label: Label, direction: &Direction<'_>) -> Result<(), End> {
    let Direction { source, sink, meter, .. } = direction;
    loop {
        writable(source, sink).await?;
        match sink.send_message(message, label) {
            Ok(()) => {
                meter.add(message.len());
                return Ok(());
            }
            Err(error) if is_transient(&error) && sink.has_failed() => {
                return Err(End::SinkFailed(sink.take_failure()));
            }
            Err(error) if is_transient(&error) => {}
            Err(error) => return Err(End::SinkFailed(error)),
        }
    }
}

/// Ends the connection after the direction from `side` has reached its `end`; `other` is the opposite direction.
async fn finish(end: End, side: Side, direction: &Direction<'_>, other: impl Future<Output = End>) -> Finish {
    let Direction { source, sink, .. } = direction;
    match end {
        End::Eof => finish_in_order(side, source, sink).await,
        // The sink does not accept this message, as it is too large or of a stream that was not agreed upon.
        End::SinkFailed(error) if !sink.has_failed() => side.other().failed(error),
        // A sink that was shut down accepts nothing, and what it has sent before is still there.
        End::SinkFailed(error) => match other.await {
            End::Eof => finish_in_order(side.other(), sink, source).await,
            End::SourceFailedStalled(_) => {
                reset_on_close(source);
                side.other().failed(error)
            }
            End::SourceFailed(_) | End::SinkFailed(_) => {
                deliver_then_reset(source).await;
                side.other().failed(error)
            }
        },
        End::SourceFailed(error) => {
            deliver_then_reset(sink).await;
            side.failed(error)
        }
        // The messages before the failure are discarded.
        End::SourceFailedStalled(error) => {
            reset_on_close(sink);
            side.failed(error)
        }
    }
}

/// Shuts the other side down after `side`, whose socket is `ended`, has been, and waits until `rest` has got everything.
async fn finish_in_order(side: Side, ended: &Stream, rest: &Stream) -> Finish {
    // Fails if it has failed already, and then there is nothing to wait for.
    drop(SockRef::from(rest).shutdown(Shutdown::Write));
    close_in_order(ended);
    close_in_order(rest);
    // To a peer that stalls, the kernel goes on to send.
    let _shut_down = while_taking(rest, until_shut_down(rest)).await;
    side.closed()
}

/// Waits until the association is gone. What its peer sends meanwhile is discarded: closing a socket with unread data
/// aborts the association (sctp_close in net/sctp/socket.c), and with it what the peer has not received yet.
async fn until_shut_down(stream: &Stream) {
    let mut pause = FIRST_LOOK;
    while stream.is_associated() {
        with_buffer(|buffer| {
            (0..TURN).take_while(|_| matches!(stream.receive_message(buffer), Ok(Received::Data(..)))).count()
        });
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_LOOK);
    }
}

impl Stream {
    /// Receives a message, or a part of it.
    fn receive_message(&self, buffer: &mut [u8]) -> io::Result<Received> {
        let mut received = Received::End;
        self.read_by_message(|socket| {
            received = rproxy_sys::sctp::receive(socket, buffer)?;
            Ok(())
        })?;
        Ok(received)
    }

    /// Sends a message as a whole.
    fn send_message(&self, message: &[u8], label: Label) -> io::Result<()> {
        self.write_by_message(|socket| rproxy_sys::sctp::send(socket, message, label))
    }
}
