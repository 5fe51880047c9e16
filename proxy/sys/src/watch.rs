//! Descriptors that the event loop watches.
#![expect(unsafe_code, reason = "the event loop has to trust that a descriptor stays open")]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

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
