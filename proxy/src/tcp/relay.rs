//! A whole connection: two directions that end independently.

use std::fmt;
use std::io;
use std::net::Shutdown;
use std::pin::pin;

use socket2::SockRef;
use tokio::net::TcpStream;

use super::half::{End, pump};
use super::stream;

/// How a connection ended, and what it carried.
#[derive(Debug)]
pub(super) struct Outcome {
    /// Bytes that the backend took.
    to_backend: u64,
    /// Bytes that the client took.
    to_client: u64,
    /// What broke the connection off; `None` if both sides said that they were done.
    failure: Option<io::Error>,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes in, {} bytes out, ", self.to_backend, self.to_client)?;
        match &self.failure {
            None => f.write_str("closed"),
            Some(error) => error.fmt(f),
        }
    }
}

/// Relays between two connected streams until both directions have ended.
///
/// The end of a stream is passed on as a half-close, and the other direction goes on. A reset is
/// passed on as a reset: when this returns with a failure, closing the streams resets both.
pub(super) async fn relay(client: &TcpStream, backend: &TcpStream) -> Outcome {
    let (mut to_backend, mut to_client) = (0, 0);
    let failure = {
        let mut upstream = pin!(pump(client, backend, &mut to_backend));
        let mut downstream = pin!(pump(backend, client, &mut to_client));
        tokio::select! {
            biased;
            // On the heap: while both directions run, it would only take room.
            end = &mut upstream => Box::pin(finish(end, client, backend, downstream)).await,
            end = &mut downstream => Box::pin(finish(end, backend, client, upstream)).await,
        }
    };
    Outcome { to_backend, to_client, failure }
}

/// Carries on after the direction from `source` to `sink` came to its `end`: `other` is the way back.
async fn finish(
    end: End,
    source: &TcpStream,
    sink: &TcpStream,
    other: impl Future<Output = End>,
) -> Option<io::Error> {
    match end {
        End::Eof => finish_after_eof(source, sink, other).await,
        End::SourceFailed(error) => {
            stream::deliver_then_reset(sink).await;
            Some(error)
        }
        End::SinkFailed(error) => {
            // The sink may have answered before it was reset, as a server does that refuses an
            // upload: its answer is still in our receive queue, and goes first.
            other.await;
            stream::deliver_then_reset(source).await;
            Some(error)
        }
    }
}

/// Passes the end of `source` on and lets the way back run. A `source` that is reset after its end
/// is noticed even if the other side says nothing.
async fn finish_after_eof(
    source: &TcpStream,
    sink: &TcpStream,
    other: impl Future<Output = End>,
) -> Option<io::Error> {
    if let Err(error) = SockRef::from(sink).shutdown(Shutdown::Write) {
        // The sink is gone already, which the way back is about to find out.
        tracing::trace!(%error, "half-close not passed on");
    }
    tokio::select! {
        biased;
        end = other => match end {
            // Closing the sockets sends the second end of stream.
            End::Eof => None,
            End::SourceFailed(error) => {
                stream::deliver_then_reset(source).await;
                Some(error)
            }
            End::SinkFailed(error) => {
                stream::deliver_then_reset(sink).await;
                Some(error)
            }
        },
        () = stream::failed(source) => {
            stream::deliver_then_reset(sink).await;
            Some(stream::take_failure(source))
        }
    }
}
