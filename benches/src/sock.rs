//! Non-blocking socket calls, and epoll_wait(2).
//!
//! Level-triggered, so that one read per event is enough and no read is made that can only return `EAGAIN`.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollTimeout};
use nix::sys::socket::{MsgFlags, recv, send, setsockopt, sockopt};

pub(crate) use nix::sys::epoll::EpollFlags as Interest;

/// Receive buffer of UDP sockets, in bytes, large enough that only the peer under test loses datagrams.
const UDP_BUFFER: usize = 8 << 20;

/// Reads without waiting; `None` if no data is available.
pub(crate) fn receive(socket: &impl AsRawFd, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    unless_blocked(recv(socket.as_raw_fd(), buffer, MsgFlags::MSG_DONTWAIT))
}

/// Writes without waiting; `None` if there is no room.
pub(crate) fn transmit(socket: &impl AsRawFd, data: &[u8]) -> io::Result<Option<usize>> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    unless_blocked(send(socket.as_raw_fd(), data, flags))
}

/// Writes a small message, for which an idle connection has room.
pub(crate) fn transmit_all(stream: &TcpStream, data: &[u8]) -> io::Result<()> {
    match transmit(stream, data)? {
        Some(sent) if sent == data.len() => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::WriteZero, "an idle connection has no room for a message")),
    }
}

/// Turns `EAGAIN` into `None`.
pub(crate) fn unless_blocked<T>(result: nix::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Errno::EAGAIN | Errno::EINTR) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Enlarges the buffers of a UDP socket; the forced option exceeds the system's limit, but requires root.
pub(crate) fn enlarge_udp_buffers(socket: &impl AsFd) {
    if setsockopt(socket, sockopt::RcvBufForce, &UDP_BUFFER).is_err() {
        // As large as possible is enough: loss is visible in the result.
        setsockopt(socket, sockopt::RcvBuf, &UDP_BUFFER).ok();
    }
}

/// An epoll instance that can be shared: another thread may add sockets to it.
pub(crate) struct Poll(Epoll);

impl Poll {
    /// Creates an empty one.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?))
    }

    /// Watches `socket`; its events carry `token`.
    pub(crate) fn add(&self, socket: &impl AsFd, interest: Interest, token: usize) -> io::Result<()> {
        Ok(self.0.add(socket, EpollEvent::new(interest, token as u64))?)
    }

    /// Changes the events that `socket` is watched for.
    pub(crate) fn modify(&self, socket: &impl AsFd, interest: Interest, token: usize) -> io::Result<()> {
        Ok(self.0.modify(socket, &mut EpollEvent::new(interest, token as u64))?)
    }

    /// Stops watching `socket`.
    pub(crate) fn remove(&self, socket: &impl AsFd) -> io::Result<()> {
        Ok(self.0.delete(socket)?)
    }

    /// Waits for events, at most for `timeout`.
    pub(crate) fn wait<'a>(
        &self,
        events: &'a mut Events,
        timeout: Duration,
    ) -> io::Result<impl Iterator<Item = (usize, Interest)> + use<'a>> {
        let timeout = EpollTimeout::try_from(timeout).unwrap_or(EpollTimeout::ZERO);
        let count = match self.0.wait(&mut events.0, timeout) {
            Err(Errno::EINTR) => 0,
            result => result?,
        };
        // Tokens are converted from `usize` when added.
        Ok(events.0[..count]
            .iter()
            .map(|event| (usize::try_from(event.data()).unwrap_or(usize::MAX), event.events())))
    }
}

/// The buffer for the events of one wait.
pub(crate) struct Events(Vec<EpollEvent>);

impl Events {
    /// As many events as a busy thread handles before it checks the clock.
    pub(crate) fn new() -> Self {
        Self(vec![EpollEvent::empty(); 256])
    }
}
