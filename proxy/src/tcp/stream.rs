//! One side of a connection.

use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::task::{Context, Poll};
use std::time::Duration;

use nix::sys::epoll::EpollFlags;
use rproxy_sys::socket;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use socket2::SockRef;
use tokio::time::{Instant, sleep, timeout};

use super::reactor::{self, Key};

/// How long a reset waits for a peer that has not taken everything and takes nothing more.
const RESET_GRACE: Duration = Duration::from_secs(1);

/// The first pause between two looks at what a peer has taken; each is twice as long as the one before.
const FIRST_LOOK: Duration = Duration::from_millis(5);

/// The longest of these pauses: a reset comes at most this late.
const LONGEST_LOOK: Duration = Duration::from_millis(80);

/// What a socket that has failed is ready for.
const FAILED: EpollFlags = EpollFlags::EPOLLERR;

/// What a socket with urgent data is ready for, from the arrival of the urgent byte on (tcp(7)).
const URGENT: EpollFlags = EpollFlags::EPOLLPRI;

/// A socket of a connection, for the task that serves it. No call waits, and none is made that is
/// known to be in vain.
#[derive(Debug)]
pub(super) struct Stream {
    socket: OwnedFd,
    key: Key,
}

/// A way of using a socket.
#[derive(Clone, Copy, Debug)]
enum Use {
    Read,
    Write,
}

impl Use {
    /// What makes a call worth while.
    fn flags(self) -> EpollFlags {
        let ended = EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR;
        match self {
            Self::Read => EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | URGENT | ended,
            Self::Write => EpollFlags::EPOLLOUT | ended,
        }
    }

    /// What is over when a call has moved less than it could, or would wait. The end of a stream is not: it may have
    /// been reported, and that happens once.
    fn data(self) -> EpollFlags {
        match self {
            Self::Read => EpollFlags::EPOLLIN,
            Self::Write => EpollFlags::EPOLLOUT,
        }
    }

    /// What makes a call move less than it could though there is more: a read stops before an urgent byte,
    /// even if that is kept inline (tcp_recvmsg_locked in net/ipv4/tcp.c).
    fn stopped_by(self) -> EpollFlags {
        match self {
            Self::Read => URGENT,
            Self::Write => EpollFlags::empty(),
        }
    }
}

impl Stream {
    /// Watches `socket`, which has to be non-blocking, on this worker.
    ///
    /// # Errors
    /// Those of [`reactor::watch`].
    pub(super) fn new(socket: impl Into<OwnedFd>) -> io::Result<Self> {
        let socket = socket.into();
        let key = reactor::watch(&socket)?;
        Ok(Self { socket, key })
    }

    /// Reads what is there into `buf`; 0 at the end of the stream.
    ///
    /// A short read has emptied the socket (epoll(7), edge-triggered use), so the next wait does not
    /// begin with a read that can only return `EAGAIN`. While there is urgent data it has not.
    pub(super) fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        let wanted = buf.len();
        self.attempt(Use::Read, wanted, |socket| Ok(recv(socket, buf, RecvFlags::empty())?.0))
    }

    /// Writes what the socket takes of `data`, with the same treatment of short writes.
    pub(super) fn write(&self, data: &[u8]) -> io::Result<usize> {
        self.send(data, SendFlags::empty())
    }

    /// As [`Self::write`], of data that a half-close or a close is to follow at once: one segment carries the
    /// end of both the data and the stream.
    pub(super) fn write_last(&self, data: &[u8]) -> io::Result<usize> {
        self.send(data, SendFlags::MORE)
    }

    fn send(&self, data: &[u8], flags: SendFlags) -> io::Result<usize> {
        self.attempt(Use::Write, data.len(), |socket| Ok(send(socket, data, flags | SendFlags::NOSIGNAL)?))
    }

    /// Makes a call that reads as much as it likes.
    pub(super) fn read_by(
        &self,
        call: impl FnOnce(BorrowedFd<'_>) -> nix::Result<usize>,
    ) -> io::Result<usize> {
        self.attempt(Use::Read, 0, |socket| Ok(call(socket)?))
    }

    /// Makes a call that writes as much as it likes.
    pub(super) fn write_by(
        &self,
        call: impl FnOnce(BorrowedFd<'_>) -> nix::Result<usize>,
    ) -> io::Result<usize> {
        self.attempt(Use::Write, 0, |socket| Ok(call(socket)?))
    }

    /// Makes `call`, and notes what it tells of the socket if it moves less than `wanted` bytes.
    fn attempt(
        &self,
        kind: Use,
        wanted: usize,
        call: impl FnOnce(BorrowedFd<'_>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        if !reactor::is_ready(self.key, kind.flags()) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        match call(self.as_fd()) {
            Ok(moved) => {
                if moved > 0 && moved < wanted {
                    reactor::not_ready_unless(self.key, kind.data(), kind.stopped_by());
                }
                Ok(moved)
            }
            Err(error) => {
                match error.kind() {
                    io::ErrorKind::WouldBlock => self.note_would_block(kind),
                    io::ErrorKind::Interrupted => {}
                    _ if is_refusal(&error) => {}
                    // This call may have taken the error off the socket, which is then reported no more.
                    _ => reactor::ready(self.key, FAILED),
                }
                Err(error)
            }
        }
    }

    /// Notes that a call found nothing to do. An end or a failure that was reported stays: each is reported once. With
    /// urgent data, a signal may be why (tcp_recvmsg_locked in net/ipv4/tcp.c): then the next call tells.
    fn note_would_block(&self, kind: Use) {
        if matches!(kind, Use::Read) && self.has_urgent_data() {
            reactor::not_ready(self.key, URGENT);
        } else {
            reactor::not_ready(self.key, kind.data());
        }
    }

    /// Waits until a read gets somewhere.
    pub(super) fn poll_readable(&self, cx: &Context<'_>) -> Poll<()> {
        reactor::poll(self.key, Use::Read.flags(), cx)
    }

    /// Whether a read gets somewhere, as far as has been reported.
    pub(super) fn is_readable(&self) -> bool {
        reactor::is_ready(self.key, Use::Read.flags())
    }

    /// Whether the last byte has been read, as far as has been reported: the end of the stream was, and
    /// then a read came short. To read on would give 0.
    pub(super) fn is_at_end(&self) -> bool {
        let end = EpollFlags::EPOLLRDHUP;
        reactor::is_ready(self.key, end) && !reactor::is_ready(self.key, Use::Read.flags() & !end)
    }

    /// Whether there may be an urgent byte among what is queued.
    pub(super) fn has_urgent_data(&self) -> bool {
        reactor::is_ready(self.key, URGENT)
    }

    /// As [`Self::poll_readable`].
    pub(super) async fn readable(&self) {
        poll_fn(|cx| self.poll_readable(cx)).await;
    }

    /// Waits until a write gets somewhere, or a connect has finished.
    pub(super) async fn writable(&self) {
        poll_fn(|cx| reactor::poll(self.key, Use::Write.flags(), cx)).await;
    }

    /// Whether the socket has failed, as far as has been reported.
    pub(super) fn has_failed(&self) -> bool {
        reactor::is_ready(self.key, FAILED)
    }

    /// Waits until the socket has failed. The error stays with it: whoever reads on meets it behind
    /// the data that came before it.
    pub(super) async fn failed(&self) {
        poll_fn(|cx| reactor::poll(self.key, FAILED, cx)).await;
    }

    /// Takes the failure off a socket that has failed, unless there is something to read before it.
    ///
    /// # Errors
    /// The failure.
    pub(super) fn take_failure_if_first(&self) -> io::Result<()> {
        match recv(self, &mut [0], RecvFlags::PEEK) {
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// How many bytes written to it the peer has not acknowledged yet.
    pub(super) fn unacknowledged(&self) -> usize {
        // It cannot fail on a connected socket.
        socket::unacknowledged(self.as_fd()).unwrap_or(0)
    }

    /// Sends what [`Self::write_last`] held back (`TCP_NODELAY`, tcp(7): to set it is to flush).
    fn push(&self) {
        if let Err(error) = SockRef::from(self).set_tcp_nodelay(true) {
            tracing::debug!(%error, "the last bytes are sent late");
        }
    }

    /// Sends an acknowledgement that is being held back (`TCP_QUICKACK`, tcp(7)).
    pub(super) fn acknowledge(&self) {
        if let Err(error) = SockRef::from(self).set_tcp_quickack(true) {
            tracing::debug!(%error, "an acknowledgement is sent late");
        }
    }

    /// How a socket failed that did, taken off it: a read would now see an orderly end. If a read or a
    /// write has taken it before, it was a reset.
    pub(super) fn take_failure(&self) -> io::Error {
        match SockRef::from(self).take_error() {
            Ok(error) => error.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()),
            Err(error) => error,
        }
    }
}

/// Whether a call was refused, by a filter of system calls, a security module or for want of memory, while nothing is
/// wrong with the socket.
pub(super) fn is_refusal(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    let refusals = [Errno::PERM, Errno::ACCESS, Errno::NOSYS, Errno::INVAL, Errno::OPNOTSUPP, Errno::NOMEM];
    errno.is_some_and(|errno| refusals.contains(&errno))
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        reactor::forget(self.key);
    }
}

/// Makes the close of `stream` an end of stream. It is a reset from the start (`set_stream_options`), until
/// the peer has got, or is about to get, everything.
pub(super) fn close_in_order(stream: &Stream) {
    if let Err(error) = SockRef::from(stream).set_linger(None) {
        tracing::debug!(%error, "cannot close a connection in order");
    }
}

/// Makes the close of `stream` a reset again.
pub(super) fn reset_on_close(stream: &Stream) {
    if let Err(error) = SockRef::from(stream).set_linger(Some(Duration::ZERO)) {
        tracing::debug!(%error, "cannot turn the close of a connection into a reset");
    }
}

/// Lets the peer take what was written to `stream`, as long as it goes on taking, and then makes its close a
/// reset. A reset at once would discard what waits in the send queue.
pub(super) async fn deliver_then_reset(stream: &Stream) {
    // What was written as the last may still wait for an end of stream that does not come.
    stream.push();
    let delivered = async {
        tokio::select! {
            () = until_acknowledged(stream) => {}
            () = stream.failed() => {}
        }
    };
    if while_taking(stream, delivered).await.is_none() {
        tracing::debug!("the peer did not take everything that preceded a reset");
    }
    reset_on_close(stream);
}

async fn until_acknowledged(stream: &Stream) {
    let mut pause = FIRST_LOOK;
    while stream.unacknowledged() > 0 {
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_LOOK);
    }
}

/// Waits for `awaited`, but gives up with `None` once the peer of `stream` has taken nothing for [`RESET_GRACE`].
/// A slow peer acknowledges what it takes long before the socket counts as writable again.
pub(super) async fn while_taking<T>(stream: &Stream, awaited: impl Future<Output = T>) -> Option<T> {
    let mut awaited = pin!(awaited);
    let (mut left, mut progressed) = (stream.unacknowledged(), Instant::now());
    let mut pause = FIRST_LOOK;
    loop {
        if let Ok(result) = timeout(pause, &mut awaited).await {
            return Some(result);
        }
        let now = stream.unacknowledged();
        if now != left {
            (left, progressed) = (now, Instant::now());
        } else if progressed.elapsed() >= RESET_GRACE {
            return None;
        }
        pause = (pause * 2).min(LONGEST_LOOK);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::runtime::new_runtime;

    fn pair() -> (Stream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (socket, _) = socket::accept(listener.as_fd()).unwrap();
        SockRef::from(&socket).set_out_of_band_inline(true).unwrap();
        (Stream::new(socket).unwrap(), peer)
    }

    fn interrupted(stream: &Stream) {
        let error = stream.read_by(|_socket| Err(nix::errno::Errno::EAGAIN)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_read_that_a_signal_ends_before_an_urgent_byte_is_tried_again() {
        new_runtime().unwrap().block_on(async {
            let (stream, mut peer) = pair();
            SockRef::from(&peer).send_out_of_band(b"X").unwrap();
            peer.flush().unwrap();
            poll_fn(|cx| reactor::poll(stream.key, URGENT, cx)).await;
            interrupted(&stream);
            stream.readable().await;
            assert_eq!(stream.read(&mut [0; 9]).unwrap(), 1);
            interrupted(&stream);
            assert!(!stream.is_readable(), "nothing is left");
        });
    }

    #[test]
    fn a_failure_that_a_call_took_off_the_socket_is_still_known() {
        new_runtime().unwrap().block_on(async {
            let (stream, _peer) = pair();
            stream.writable().await;
            stream.write_by(|_socket| Err(nix::errno::Errno::EPERM)).unwrap_err();
            assert!(!stream.has_failed(), "it is the call that was refused");
            let error = stream.write_by(|_socket| Err(nix::errno::Errno::ECONNRESET)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
            stream.failed().await;
        });
    }
}
