//! Sets of listening sockets that one task services. Other threads add and remove sockets.
//!
//! One epoll instance watches the sockets, and the event loop watches the epoll instance: an idle listener
//! costs an entry in a list, not a task. A [`WatchedListener`] can be added before its task has a target for
//! it, so that every step that can fail precedes the change.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use rproxy_sys::watch::Watched;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Protocol, SockRef};
use tokio::io::Interest;

use crate::runtime::socket_file::SocketFile;

/// Set in the data of events of a [`WatchedListener`], whose number is in the other bits. A task that also
/// watches other sockets leaves this bit clear for them.
pub(crate) const LISTENER: u64 = 1 << 63;

/// The set, as a handle for adding sockets.
#[derive(Clone, Debug)]
pub(crate) struct PollSet(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    epoll: Epoll,
    numbers: Mutex<Numbers>,
    /// The index of this set among those of a process for the same purpose.
    index: usize,
}

/// The maximum number of sets for the same purpose.
pub(crate) const MOST_SETS: usize = 16;

/// The numbers of listeners. The lowest free number is used first, so that numbers can serve as indices.
#[derive(Debug, Default)]
struct Numbers {
    free: Vec<u32>,
    next: u32,
}

impl PollSet {
    /// An empty set, the only one for its purpose.
    ///
    /// # Errors
    /// Those of epoll_create1(2).
    pub(crate) fn new() -> io::Result<Self> {
        Self::numbered(0)
    }

    /// An empty set, one of up to [`MOST_SETS`] for the same purpose.
    ///
    /// # Errors
    /// Those of epoll_create1(2).
    pub(crate) fn numbered(index: usize) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Self(Arc::new(Shared { epoll, numbers: Mutex::default(), index })))
    }

    /// The number of listeners in it.
    pub(crate) fn len(&self) -> usize {
        let numbers = self.numbers();
        numbers.next as usize - numbers.free.len()
    }

    /// Whether `listener` is in this set.
    pub(crate) fn contains(&self, listener: &WatchedListener) -> bool {
        Arc::ptr_eq(&self.0, &listener.set.0)
    }

    /// The [`WatchedListener::id`] of the listener with this number in the set.
    pub(crate) fn id_of(&self, number: usize) -> usize {
        number * MOST_SETS + self.0.index
    }

    /// Adds `socket`, which must be non-blocking. Events are not reported before [`WatchedListener::watch`].
    ///
    /// # Errors
    /// Those of epoll_ctl(2); `ENOSPC` is the limit of `fs.epoll.max_user_watches`.
    pub(crate) fn add(&self, socket: impl Into<OwnedFd>) -> io::Result<WatchedListener> {
        self.add_with(socket, None)
    }

    /// As [`Self::add`], with the file of a Unix socket if it has one.
    ///
    /// # Errors
    /// Those of [`Self::add`].
    pub(crate) fn add_with(
        &self,
        socket: impl Into<OwnedFd>,
        file: Option<SocketFile>,
    ) -> io::Result<WatchedListener> {
        let socket = socket.into();
        let number = {
            let mut numbers = self.numbers();
            numbers.free.pop().unwrap_or_else(|| {
                numbers.next += 1;
                numbers.next - 1
            })
        };
        let is_mptcp = SockRef::from(&socket).protocol().is_ok_and(|known| known == Some(Protocol::MPTCP));
        let port = WatchedListener { file, socket, number, is_mptcp, set: self.clone() };
        self.epoll().add(&port.socket, port.event(EpollFlags::empty()))?;
        Ok(port)
    }

    /// The epoll instance, to which the task may add other sockets.
    pub(crate) fn epoll(&self) -> &Epoll {
        &self.0.epoll
    }

    fn numbers(&self) -> MutexGuard<'_, Numbers> {
        self.0.numbers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A listening socket in a [`PollSet`]. Dropping it removes its file, if it has one, and closes the socket.
#[derive(Debug)]
pub(crate) struct WatchedListener {
    /// The file of a Unix socket, before the socket: it is removed first.
    file: Option<SocketFile>,
    socket: OwnedFd,
    number: u32,
    is_mptcp: bool,
    set: PollSet,
}

impl WatchedListener {
    /// Its number in the set, unique while this exists.
    pub(crate) fn number(&self) -> usize {
        self.number as usize
    }

    /// Its number among the listeners of all sets for the same purpose.
    pub(crate) fn id(&self) -> usize {
        self.set.id_of(self.number())
    }

    /// Whether it uses Multipath TCP (RFC 8684). Accepted sockets then do not inherit all of its options.
    pub(crate) fn is_mptcp(&self) -> bool {
        self.is_mptcp
    }

    /// The file of a Unix socket.
    pub(crate) fn file(&self) -> Option<&SocketFile> {
        self.file.as_ref()
    }

    /// Starts to report readiness for `flags`.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub(crate) fn watch(&self, flags: EpollFlags) -> io::Result<()> {
        Ok(self.set.epoll().modify(&self.socket, &mut self.event(flags))?)
    }

    /// Stops all reports, even errors, which epoll(7) reports regardless of the flags.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub(crate) fn unwatch(&self) -> io::Result<()> {
        Ok(self.set.epoll().delete(&self.socket)?)
    }

    fn event(&self, flags: EpollFlags) -> EpollEvent {
        EpollEvent::new(flags, LISTENER | u64::from(self.number))
    }
}

impl AsFd for WatchedListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for WatchedListener {
    fn drop(&mut self) {
        // Another process may have the socket open too, in which case closing it here would not remove it
        // from the set.
        if let Err(error) = self.set.epoll().delete(&self.socket) {
            tracing::debug!(%error, "a listener was not watched");
        }
        self.set.numbers().free.push(self.number);
    }
}

/// The side of the task that services a [`PollSet`].
#[derive(Debug)]
pub(crate) struct EventSource {
    watched: Watched,
    set: PollSet,
}

impl EventSource {
    /// Makes the event loop of the current runtime watch `set`.
    ///
    /// # Errors
    /// Those of dup(2) and epoll_ctl(2).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub(crate) fn new(set: PollSet) -> io::Result<Self> {
        let watched = Watched::new(set.epoll().0.try_clone()?, Interest::READABLE)?;
        Ok(Self { watched, set })
    }

    /// The set.
    pub(crate) fn set(&self) -> &PollSet {
        &self.set
    }

    /// Waits for events, writes them to `events`, and returns their number.
    ///
    /// # Errors
    /// Those of epoll_wait(2).
    pub(crate) async fn wait(&self, events: &mut [EpollEvent]) -> io::Result<usize> {
        self.watched.io(Interest::READABLE, |_epoll| self.look(events)).await
    }

    /// Like [`Self::wait`], without waiting.
    ///
    /// # Errors
    /// `EAGAIN` if there are no events; those of epoll_wait(2).
    pub(crate) fn look(&self, events: &mut [EpollEvent]) -> io::Result<usize> {
        match self.epoll().wait(events, EpollTimeout::ZERO) {
            Ok(0) | Err(Errno::EINTR) => Err(io::ErrorKind::WouldBlock.into()),
            Ok(count) => Ok(count),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The epoll instance, to which the task may add other sockets.
    pub(crate) fn epoll(&self) -> &Epoll {
        self.set.epoll()
    }
}

/// Whether the other side of a connection is gone.
pub(crate) fn is_hung_up(connection: &impl AsFd) -> bool {
    let mut polled = [PollFd::new(connection, PollFlags::RDHUP)];
    let over = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    poll(&mut polled, Some(&Timespec::default())).is_err() || polled[0].revents().intersects(over)
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::runtime::new_runtime;

    fn port(set: &PollSet) -> (WatchedListener, std::net::SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        (set.add(listener).unwrap(), addr)
    }

    #[test]
    fn a_port_is_reported_once_it_is_watched_and_until_it_is_dropped() {
        let runtime = new_runtime().unwrap();
        let _entered = runtime.enter();
        let set = PollSet::new().unwrap();
        let poll = EventSource::new(set.clone()).unwrap();
        let mut events = [EpollEvent::empty(); 4];
        let (_quiet, _) = port(&set);
        let (port, addr) = port(&set);
        // As after a handover, when another process has the socket open.
        let _elsewhere = port.as_fd().try_clone_to_owned().unwrap();

        let _client = TcpStream::connect(addr).unwrap();
        assert_eq!(poll.look(&mut events).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        port.watch(EpollFlags::EPOLLIN).unwrap();
        assert_eq!(runtime.block_on(poll.wait(&mut events)).unwrap(), 1);
        assert_eq!(events[0].data(), LISTENER | port.number() as u64);
        drop(port);
        assert_eq!(poll.look(&mut events).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn numbers_are_low_and_used_again() {
        let set = PollSet::new().unwrap();
        let [(first, _), (second, _)] = [port(&set), port(&set)];
        assert_eq!([first.number(), second.number()], [0, 1]);
        drop(first);
        assert_eq!(port(&set).0.number(), 0);
    }
}
