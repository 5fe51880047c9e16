//! Calls on one side of a connection, made so that none is wasted.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use nix::sys::socket::{MsgFlags, recv, send};
use rproxy_sys::socket;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// How long a reset waits for data that the other side's peer has not taken yet.
pub(super) const RESET_GRACE: Duration = Duration::from_secs(1);

/// How often [`deliver_then_reset`] looks whether the peer has taken everything.
const DELIVERY_POLL: Duration = Duration::from_millis(5);

/// Reads what is there into `buf`; 0 at the end of the stream.
///
/// A short read has emptied the socket (epoll(7), edge-triggered use). It is reported to the runtime
/// as such, so that the next wait does not begin with a read that can only return `EAGAIN`.
pub(super) fn read(stream: &TcpStream, buf: &mut [u8]) -> io::Result<usize> {
    let wanted = buf.len();
    transfer(stream, Interest::READABLE, wanted, || Ok(recv(stream.as_raw_fd(), buf, MsgFlags::empty())?))
}

/// Writes what `stream` takes of `data`, with the same treatment of short writes.
pub(super) fn write(stream: &TcpStream, data: &[u8]) -> io::Result<usize> {
    transfer(stream, Interest::WRITABLE, data.len(), || {
        Ok(send(stream.as_raw_fd(), data, MsgFlags::MSG_NOSIGNAL)?)
    })
}

/// Runs `call`, and marks the stream as not ready if it moved less than `wanted` bytes.
fn transfer(
    stream: &TcpStream,
    interest: Interest,
    wanted: usize,
    mut call: impl FnMut() -> io::Result<usize>,
) -> io::Result<usize> {
    let mut moved = 0;
    let result = stream.try_io(interest, || {
        moved = call()?;
        match moved {
            0 => Ok(()),
            short if short < wanted => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(()),
        }
    });
    match result {
        Err(error) if moved == 0 => Err(error),
        _ => Ok(moved),
    }
}

/// Waits until `stream` has failed. The error stays with the socket: whoever reads on meets it behind
/// the data that came before it.
pub(super) async fn failed(stream: &TcpStream) {
    // An error of the event loop itself ends the wait too.
    drop(stream.ready(Interest::ERROR).await);
}

/// How `stream` failed, taken off the socket: a read would now see an orderly end.
pub(super) fn take_failure(stream: &TcpStream) -> io::Error {
    match stream.take_error() {
        Ok(Some(error)) | Err(error) => error,
        // A read or a write took it before us.
        Ok(None) => io::ErrorKind::ConnectionReset.into(),
    }
}

/// Makes the close of `stream` a reset, as its peer's peer ended with one.
pub(super) fn reset_on_close(stream: &TcpStream) {
    if let Err(error) = stream.set_zero_linger() {
        tracing::debug!(%error, "cannot turn the close of a connection into a reset");
    }
}

/// Lets the peer take what was written to `stream`, for [`RESET_GRACE`] at the most, and then makes
/// its close a reset. A reset at once would discard what waits in the send queue.
pub(super) async fn deliver_then_reset(stream: &TcpStream) {
    let delivered = async {
        while socket::unacknowledged(stream.as_fd()).is_ok_and(|bytes| bytes > 0) {
            tokio::time::sleep(DELIVERY_POLL).await;
        }
    };
    if tokio::time::timeout(RESET_GRACE, delivered).await.is_err() {
        tracing::debug!("the peer did not take everything that preceded a reset");
    }
    reset_on_close(stream);
}
