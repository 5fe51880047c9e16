//! Descriptors that the event loop watches.
#![expect(unsafe_code, reason = "the event loop has to trust that a descriptor stays open")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use tokio::io::unix::AsyncFd;
use tokio::io::{Interest, Ready};

/// A non-blocking descriptor registered with the event loop of the current thread.
///
/// It owns the descriptor and never gives it away, so that it stays open while it is registered.
#[derive(Debug)]
pub struct Watched(AsyncFd<OwnedFd>);

impl Watched {
    /// Registers `fd`, which must be non-blocking.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn new(fd: impl Into<OwnedFd>, interest: Interest) -> io::Result<Self> {
        // SAFETY: an `OwnedFd` always names the same open file until it is dropped; it is owned by
        // the `AsyncFd`, which this type neither hands out mutably nor takes apart.
        let watched = unsafe { AsyncFd::register_with_interest(fd.into(), interest) };
        Ok(Self(watched.map_err(io::Error::from)?))
    }

    /// What has been reported of one `interest` and not been cleared since, with a reported end of the stream.
    pub fn readiness(&self, interest: Interest) -> Ready {
        if !self.is_ready(interest) {
            return Ready::EMPTY;
        }
        match pin!(self.0.ready(interest)).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(guard)) => guard.ready(),
            _ => Ready::EMPTY,
        }
    }

    /// Whether [`Self::readiness`] has anything.
    pub fn is_ready(&self, interest: Interest) -> bool {
        self.0.try_io(interest, |_fd| Ok(())).is_ok()
    }

    /// Records that the descriptor is not ready for one `interest`. The next event sets it again. A reported end of the stream stays.
    pub fn clear(&self, interest: Interest) {
        let _cleared = self.0.try_io(interest, |_fd| Err::<(), _>(io::ErrorKind::WouldBlock.into()));
    }

    /// Waits until the descriptor is ready for one of `interest`. Never returns if the runtime ends.
    pub async fn ready(&self, interest: Interest) {
        if self.0.ready(interest).await.is_err() {
            std::future::pending().await
        }
    }

    /// Waits until a read can make progress, without state of its own: only the last task that called this is woken.
    pub fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        match self.0.poll_read_ready(cx) {
            Poll::Ready(Ok(_guard)) => Poll::Ready(()),
            // The event loop fails only when the runtime ends.
            Poll::Ready(Err(_)) | Poll::Pending => Poll::Pending,
        }
    }

    /// Repeats `call` until it returns something other than `EAGAIN`, and waits in between.
    ///
    /// # Errors
    /// Those of `call`.
    pub async fn io<R>(
        &self,
        interest: Interest,
        mut call: impl FnMut(BorrowedFd<'_>) -> io::Result<R>,
    ) -> io::Result<R> {
        self.0.async_io(interest, |fd| call(fd.as_fd())).await
    }

    /// Waits until the descriptor is ready, then repeats `call` until it returns `EAGAIN`, at most `most`
    /// times. That `EAGAIN` clears the readiness, so the next wait needs no call of its own to find out.
    ///
    /// # Errors
    /// The first other error of `call`, which may follow successful calls.
    pub async fn repeat(
        &self,
        interest: Interest,
        most: usize,
        mut call: impl FnMut(BorrowedFd<'_>) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut ready = self.0.ready(interest).await?;
        for _ in 0..most {
            match ready.try_io(|fd| call(fd.as_fd())) {
                Ok(result) => result?,
                Err(_would_block) => break,
            }
        }
        Ok(())
    }
}

impl AsFd for Watched {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
