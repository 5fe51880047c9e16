//! One side of a connection.

use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use rproxy_sys::watch::Watched;
use rproxy_sys::{sctp, socket};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use socket2::SockRef;
use tokio::io::{Interest, Ready};
use tokio::time::{Instant, sleep, timeout};

use crate::log::limit::LogLimit;

/// How long a reset waits for a peer that has unacknowledged data and makes no progress.
const RESET_GRACE: Duration = Duration::from_secs(1);

/// The first delay between two checks of the peer's progress; each is twice as long as the one before.
pub(super) const FIRST_LOOK: Duration = Duration::from_millis(5);

/// The longest of these delays, which bounds how late a reset is sent.
pub(super) const LONGEST_LOOK: Duration = Duration::from_millis(80);

/// A socket of a connection, used by the task that serves it. No call blocks, and calls that are known to
/// fail with `EAGAIN` are skipped.
#[derive(Debug)]
pub(super) struct Stream {
    socket: Watched,
    /// Whether a call has failed. It may have cleared the socket's error, which is then not reported again.
    has_failed: AtomicBool,
    /// Whether a call has left bytes in the receive queue, although none are reported.
    has_more: AtomicBool,
    is_unix: bool,
}

/// What a socket is used for.
#[derive(Clone, Copy, Debug)]
enum Use {
    Read,
    Write,
}

impl Use {
    fn interest(self) -> Interest {
        match self {
            Self::Read => Interest::READABLE,
            Self::Write => Interest::WRITABLE,
        }
    }
}

impl Stream {
    /// Watches `socket`, which must be non-blocking, on this worker.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub(super) fn new(socket: impl Into<OwnedFd>) -> io::Result<Self> {
        let socket = Watched::new(socket, Interest::READABLE | Interest::WRITABLE | Interest::PRIORITY)?;
        Ok(Self {
            socket,
            has_failed: AtomicBool::new(false),
            has_more: AtomicBool::new(false),
            is_unix: false,
        })
    }

    /// The same, which is a Unix socket or not. A call on one may move less than is there, and fail although the socket has not.
    pub(super) fn unix(mut self, is_unix: bool) -> Self {
        self.is_unix = is_unix;
        self
    }

    /// Reads into `buf`. Returns 0 at the end of the stream.
    ///
    /// A short read has emptied the socket (epoll(7), edge-triggered use), so the next wait does not start
    /// with a read that can only fail with `EAGAIN`. This does not hold while there is urgent data, nor of a Unix socket, where a
    /// read ends behind passed descriptors (unix_stream_read_generic in net/unix/af_unix.c).
    pub(super) fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        let wanted = buf.len();
        self.attempt(Use::Read, wanted, |socket| Ok(recv(socket, buf, RecvFlags::empty())?.0))
    }

    /// Reads into `buf` what is queued, and leaves it there. After a short one, [`Self::poll_readable`] waits for more, also if
    /// a Unix socket has more already, behind passed descriptors.
    pub(super) fn peek(&self, buf: &mut [u8]) -> io::Result<usize> {
        let wanted = buf.len();
        let peeked = self.attempt(Use::Read, wanted, |socket| Ok(recv(socket, buf, RecvFlags::PEEK)?.0))?;
        if self.is_unix && peeked < wanted {
            self.note_short(Use::Read);
        }
        Ok(peeked)
    }

    /// Reads the first `buf.len()` of the `peeked` bytes.
    pub(super) fn read_peeked(&self, buf: &mut [u8], peeked: usize) -> io::Result<()> {
        let (read, _len) = recv(self, &mut *buf, RecvFlags::empty())?;
        if peeked > buf.len() || self.is_unix {
            // The rest is there already, or may be, so no event reports it.
            self.has_more.store(true, Ordering::Relaxed);
        }
        if read == buf.len() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    /// Writes as much of `data` as the socket accepts. Short writes are treated like short reads.
    pub(super) fn write(&self, data: &[u8]) -> io::Result<usize> {
        self.send(data, SendFlags::empty())
    }

    /// Like [`Self::write`], for data that is immediately followed by a half-close or a close: one segment
    /// carries the end of the data and the FIN.
    pub(super) fn write_last(&self, data: &[u8]) -> io::Result<usize> {
        self.send(data, SendFlags::MORE)
    }

    fn send(&self, data: &[u8], flags: SendFlags) -> io::Result<usize> {
        self.attempt(Use::Write, data.len(), |socket| Ok(send(socket, data, flags | SendFlags::NOSIGNAL)?))
    }

    /// Makes a call that reads any amount.
    pub(super) fn read_by(
        &self,
        call: impl FnOnce(BorrowedFd<'_>) -> nix::Result<usize>,
    ) -> io::Result<usize> {
        self.attempt(Use::Read, 0, |socket| Ok(call(socket)?))
    }

    /// Makes a call that writes any amount.
    pub(super) fn write_by(
        &self,
        call: impl FnOnce(BorrowedFd<'_>) -> nix::Result<usize>,
    ) -> io::Result<usize> {
        self.attempt(Use::Write, 0, |socket| Ok(call(socket)?))
    }

    /// Makes a call that receives a message of any length but 0.
    pub(super) fn read_by_message(
        &self,
        call: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        self.attempt(Use::Read, 0, |socket| call(socket).map(|()| 0)).map(drop)
    }

    /// Makes a call that sends a message.
    pub(super) fn write_by_message(
        &self,
        call: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        self.attempt(Use::Write, 0, |socket| call(socket).map(|()| 0)).map(drop)
    }

    /// Makes `call`, and records the readiness of the socket if it moves less than `wanted` bytes.
    fn attempt(
        &self,
        kind: Use,
        wanted: usize,
        call: impl FnOnce(BorrowedFd<'_>) -> io::Result<usize>,
    ) -> io::Result<usize> {
        if !self.is_ready(kind) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        match call(self.as_fd()) {
            Ok(moved) => {
                if moved > 0 && moved < wanted && !(self.is_unix && matches!(kind, Use::Read)) {
                    self.note_short(kind);
                }
                Ok(moved)
            }
            Err(error) => {
                match error.kind() {
                    io::ErrorKind::WouldBlock => self.note_would_block(kind),
                    io::ErrorKind::Interrupted => {}
                    _ if is_refusal(&error) => {}
                    // Its peer does not read any more, but may still write (unix_stream_sendmsg in net/unix/af_unix.c).
                    io::ErrorKind::BrokenPipe if self.is_unix => {}
                    _ => self.has_failed.store(true, Ordering::Relaxed),
                }
                Err(error)
            }
        }
    }

    /// Whether a call can make progress, as far as known.
    fn is_ready(&self, kind: Use) -> bool {
        self.socket.is_ready(kind.interest())
            || matches!(kind, Use::Read) && self.has_more.load(Ordering::Relaxed)
            || self.has_failed()
    }

    /// Records that a call has moved less than requested, so that the next one would block. A read says nothing if it may have
    /// stopped before an urgent byte, as it does even if that is inline (tcp_recvmsg_locked in net/ipv4/tcp.c).
    fn note_short(&self, kind: Use) {
        if matches!(kind, Use::Write) || !self.has_urgent_data() {
            self.clear(kind);
        }
    }

    /// Records that a call would block. With urgent data, a signal may be the cause (tcp_recvmsg_locked in net/ipv4/tcp.c),
    /// so the call is repeated once.
    fn note_would_block(&self, kind: Use) {
        if matches!(kind, Use::Read) && self.has_urgent_data() {
            self.socket.clear(Interest::PRIORITY);
        } else {
            self.clear(kind);
        }
    }

    /// Records that a call would block. A reported end of the stream stays, because it is reported only once.
    fn clear(&self, kind: Use) {
        if matches!(kind, Use::Read) {
            self.has_more.store(false, Ordering::Relaxed);
        }
        self.socket.clear(kind.interest());
    }

    /// Waits until a read can make progress. It may miss the failure of an SCTP socket, which [`Self::readable`] does not.
    pub(super) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.has_more.load(Ordering::Relaxed) || self.has_failed.load(Ordering::Relaxed) {
            return Poll::Ready(());
        }
        self.socket.poll_readable(cx)
    }

    /// Whether a read can make progress, as far as known.
    pub(super) fn is_readable(&self) -> bool {
        self.is_ready(Use::Read)
    }

    /// Whether the last byte has been read, as far as known: the end of the stream was reported, and then
    /// a read was short. Another read would return 0.
    pub(super) fn is_at_end(&self) -> bool {
        self.socket.readiness(Interest::READABLE) == Ready::READ_CLOSED
            && !self.has_urgent_data()
            && !self.has_failed()
    }

    /// Whether the receive queue may contain an urgent byte, from its arrival on (tcp(7)).
    pub(super) fn has_urgent_data(&self) -> bool {
        self.socket.readiness(Interest::PRIORITY).is_priority()
    }

    /// Waits until a read can make progress.
    pub(super) async fn readable(&self) {
        self.until(Interest::READABLE | Interest::ERROR, || self.is_readable()).await;
    }

    /// Waits until a write can make progress, or a connect has completed.
    pub(super) async fn writable(&self) {
        self.until(Interest::WRITABLE | Interest::ERROR, || self.has_failed()).await;
    }

    /// Whether the socket has failed, as far as known.
    pub(super) fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::Relaxed) || self.socket.is_ready(Interest::ERROR)
    }

    /// Waits until the socket has failed. The error is not cleared: a read returns it after the data that
    /// preceded it.
    pub(super) async fn failed(&self) {
        self.until(Interest::ERROR, || self.has_failed()).await;
    }

    /// Waits until one of `interest` is reported, or what the task does meanwhile makes it `known`.
    async fn until(&self, interest: Interest, known: impl Fn() -> bool) {
        let mut reported = pin!(self.socket.ready(interest));
        poll_fn(|cx| if known() { Poll::Ready(()) } else { reported.as_mut().poll(cx) }).await;
    }

    /// Returns and clears the error of a failed socket, unless there is data to read before it.
    ///
    /// # Errors
    /// The failure.
    pub(super) fn take_failure_if_first(&self) -> io::Result<()> {
        match recv(self, &mut [0], RecvFlags::PEEK) {
            Ok(_) | Err(Errno::AGAIN) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The number of written bytes that the peer has not acknowledged yet, or of chunks over SCTP.
    pub(super) fn unacknowledged(&self) -> usize {
        // This cannot fail on a connected socket. SCTP has no such ioctl(2).
        socket::unacknowledged(self.as_fd())
            .or_else(|_of_sctp| sctp::unacknowledged(self.as_fd()))
            .unwrap_or(0)
    }

    /// Whether an SCTP socket still has its association.
    pub(super) fn is_associated(&self) -> bool {
        sctp::unacknowledged(self.as_fd()).is_ok()
    }

    /// Sends what [`Self::write_last`] held back (setting `TCP_NODELAY` flushes, tcp(7)).
    fn push(&self) {
        if let Err(error) = SockRef::from(self).set_tcp_nodelay(true) {
            report_refused("TCP_NODELAY", &error, "last bytes are sent late");
        }
    }

    /// Sends a delayed acknowledgement (`TCP_QUICKACK`, tcp(7)).
    pub(super) fn acknowledge(&self) {
        if let Err(error) = SockRef::from(self).set_tcp_quickack(true) {
            report_refused("TCP_QUICKACK", &error, "acknowledgements are sent late");
        }
    }

    /// Returns and clears the error of a failed socket, after which a read would see an orderly end. If a
    /// read or write has already cleared it, it was a reset.
    pub(super) fn take_failure(&self) -> io::Error {
        match SockRef::from(self).take_error() {
            Ok(error) => error.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()),
            Err(error) => error,
        }
    }
}

/// Whether a call was refused by a system call filter or a security module, or for lack of memory, while the
/// socket itself is fine.
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

/// Logs that an option of a connected socket cannot be set. Only a system call filter or a security module of the host
/// refuses that, to all connections of the process.
pub(super) fn report_refused(option: &'static str, error: &io::Error, effect: &'static str) {
    static REFUSED: LogLimit = LogLimit::new();

    // SCTP and Unix sockets have no options of TCP, and hold nothing back.
    if matches!(Errno::from_io_error(error), Some(Errno::NOPROTOOPT | Errno::OPNOTSUPP)) {
        return;
    }
    if let Some(suppressed) = REFUSED.permit() {
        tracing::warn!(option, effect, %error, suppressed, "socket option refused");
    }
}

/// Makes closing `stream` send a FIN. Otherwise it sends a reset (`set_stream_options`); this is called once
/// the peer has received, or is about to receive, everything.
pub(super) fn close_in_order(stream: &Stream) {
    if let Err(error) = SockRef::from(stream).set_linger(None) {
        report_refused("SO_LINGER", &error, "connections are reset instead of closed");
    }
}

/// Makes closing `stream` send a reset again.
pub(super) fn reset_on_close(stream: &Stream) {
    if let Err(error) = SockRef::from(stream).set_linger(Some(Duration::ZERO)) {
        report_refused("SO_LINGER", &error, "connections are closed instead of reset");
    }
}

/// Waits while the peer acknowledges what was written to `stream`, then makes closing it send a reset. An
/// immediate reset would discard the send queue.
pub(super) async fn deliver_then_reset(stream: &Stream) {
    // The last bytes may still be held back for a FIN that will not follow.
    stream.push();
    let delivered = async {
        tokio::select! {
            () = until_acknowledged(stream) => {}
            () = stream.failed() => {}
        }
    };
    // What is not delivered then is logged when the connection ends.
    let _delivered = while_taking(stream, delivered).await;
    reset_on_close(stream);
}

async fn until_acknowledged(stream: &Stream) {
    let mut pause = FIRST_LOOK;
    while stream.unacknowledged() > 0 {
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_LOOK);
    }
}

/// Waits for `awaited`. Returns `None` once the peer of `stream` has acknowledged nothing for
/// [`RESET_GRACE`]. A slow peer acknowledges data long before the socket becomes writable again.
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
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};

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
            stream.socket.ready(Interest::PRIORITY).await;
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

    async fn until_end_is_reported(stream: &Stream) {
        while !stream.socket.readiness(Interest::READABLE).is_read_closed() {
            tokio::task::yield_now().await;
        }
    }

    #[test]
    fn the_end_that_was_reported_with_the_last_bytes_needs_no_read() {
        new_runtime().unwrap().block_on(async {
            let (stream, mut peer) = pair();
            peer.write_all(b"first").unwrap();
            stream.readable().await;
            assert_eq!(stream.read(&mut [0; 9]).unwrap(), 5);
            assert!(!stream.is_at_end(), "more may follow");
            peer.write_all(b"last").unwrap();
            peer.shutdown(Shutdown::Write).unwrap();
            until_end_is_reported(&stream).await;
            assert!(!stream.is_at_end(), "there is something to read");
            assert_eq!(stream.read(&mut [0; 9]).unwrap(), 4);
            assert!(stream.is_at_end());
        });
    }

    #[test]
    fn a_failure_that_a_call_meets_ends_waits_for_it() {
        new_runtime().unwrap().block_on(async {
            let (stream, _peer) = pair();
            stream.writable().await;
            let call = async {
                tokio::task::yield_now().await;
                stream.write_by(|_socket| Err(nix::errno::Errno::ECONNRESET)).unwrap_err()
            };
            tokio::join!(biased; call, stream.failed(), stream.readable());
        });
    }

    #[test]
    fn what_a_peek_has_seen_can_be_read_although_nothing_reports_it_again() {
        new_runtime().unwrap().block_on(async {
            let (stream, mut peer) = pair();
            peer.write_all(b"seen").unwrap();
            stream.readable().await;
            let peeked = stream.peek(&mut [0; 9]).unwrap();
            assert!(peeked > 0 && !stream.is_readable(), "{peeked}");
            stream.read_peeked(&mut [0], peeked).unwrap();
            stream.readable().await;
            assert_eq!(stream.read(&mut [0; 9]).unwrap(), peeked - 1);
            assert!(!stream.is_readable());
        });
    }

    #[test]
    fn the_last_bytes_wait_for_what_ends_the_stream() {
        new_runtime().unwrap().block_on(async {
            let (mut is_held_back, mut is_pushed) = (false, false);
            // The kernel sends them after a while nevertheless, so one try may be too slow.
            for _ in 0..20 {
                let (stream, mut peer) = pair();
                peer.set_nonblocking(true).unwrap();
                stream.writable().await;
                assert_eq!(stream.write_last(b"x").unwrap(), 1);
                let seen = peer.peek(&mut [0]);
                let waits = seen.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock);
                stream.push();
                is_held_back |= waits;
                is_pushed |= waits && peer.peek(&mut [0]).is_ok();
                peer.set_nonblocking(false).unwrap();
                peer.read_exact(&mut [0]).unwrap();
            }
            assert!(is_held_back && is_pushed);
        });
    }

    #[test]
    fn a_socket_is_readable_when_it_has_received_something() {
        new_runtime().unwrap().block_on(async {
            let (stream, mut peer) = pair();
            stream.writable().await;
            let is_readable = async || {
                tokio::select! {
                    biased;
                    () = stream.readable() => true,
                    () = tokio::task::yield_now() => false,
                }
            };
            assert!(!is_readable().await);
            peer.write_all(b"x").unwrap();
            stream.readable().await;
            assert_eq!(stream.read(&mut [0; 9]).unwrap(), 1);
            assert!(!is_readable().await, "nothing is left");
        });
    }
}
