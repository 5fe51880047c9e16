//! Readiness of the sockets of a worker's connections.
//!
//! Each worker has one epoll instance for all of them, which the event loop watches. An idle socket then
//! costs a table entry, a tenth of the event loop's own state for a socket. Closing a socket needs no
//! epoll_ctl(2), because it ends the watch by itself (epoll(7)). The price is a second epoll_wait(2) per
//! wake-up.
//!
//! Threads share nothing here: a socket is watched, polled and forgotten on the same thread.

use std::cell::RefCell;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use nix::sys::epoll::EpollFlags;
use rproxy_sys::watch::Watched;
use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::io::Errno;
use tokio::io::Interest;

/// Events per epoll_wait(2).
const EVENTS: usize = 128;

/// The events that a socket is watched for. Edge-triggered: each is reported once, when it occurs.
const WATCHED: EpollFlags = EpollFlags::EPOLLIN
    .union(EpollFlags::EPOLLOUT)
    .union(EpollFlags::EPOLLPRI)
    .union(EpollFlags::EPOLLRDHUP)
    .union(EpollFlags::EPOLLET);

thread_local! {
    /// The reactor of this worker, from its first connection to the end of its runtime.
    static REACTOR: RefCell<Option<Reactor>> = const { RefCell::new(None) };
}

/// Identifies a watched socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Key {
    index: u32,
    /// Distinguishes events of this socket from late ones of an earlier socket with the same index.
    generation: u32,
}

impl Key {
    fn from_data(data: EventData) -> Self {
        let [a, b, c, d, e, f, g, h] = data.u64().to_ne_bytes();
        Self { index: u32::from_ne_bytes([a, b, c, d]), generation: u32::from_ne_bytes([e, f, g, h]) }
    }

    fn data(self) -> EventData {
        let [a, b, c, d] = self.index.to_ne_bytes();
        let [e, f, g, h] = self.generation.to_ne_bytes();
        EventData::new_u64(u64::from_ne_bytes([a, b, c, d, e, f, g, h]))
    }
}

/// Starts to watch `socket`, which must be non-blocking. Its current readiness is also reported.
///
/// # Errors
/// Those of epoll_ctl(2); for the first socket of a worker also those of epoll_create1(2).
///
/// # Panics
/// Outside a tokio runtime.
pub(super) fn watch(socket: impl AsFd) -> io::Result<Key> {
    REACTOR.with_borrow_mut(|reactor| started(reactor)?.watch(socket))
}

/// Starts the reactor of this worker if necessary. After that, watching a socket needs no descriptor.
///
/// # Errors
/// Those of epoll_create1(2) and epoll_ctl(2).
///
/// # Panics
/// Outside a tokio runtime.
pub(super) fn start() -> io::Result<()> {
    REACTOR.with_borrow_mut(|reactor| started(reactor).map(drop))
}

/// Creates the reactor of a worker inside the current runtime. The returned closure installs it on the
/// worker's thread.
///
/// # Errors
/// Those of epoll_create1(2) and epoll_ctl(2).
///
/// # Panics
/// Outside a tokio runtime.
pub(crate) fn prepare() -> io::Result<Box<dyn FnOnce() + Send>> {
    let reactor = Reactor::start()?;
    Ok(Box::new(|| REACTOR.set(Some(reactor))))
}

fn started(reactor: &mut Option<Reactor>) -> io::Result<&mut Reactor> {
    match reactor {
        Some(reactor) => Ok(reactor),
        none => Ok(none.insert(Reactor::start()?)),
    }
}

/// Stops watching a socket, which must be closed next.
pub(super) fn forget(key: Key) {
    // Dropped after the borrow ends, because the waker may be the last reference to a task.
    let _waker = REACTOR.with_borrow_mut(|reactor| reactor.as_mut()?.forget(key));
}

/// Waits until the socket is ready for one of `wanted`. Only one task may wait for a socket.
pub(super) fn poll(key: Key, wanted: EpollFlags, cx: &Context<'_>) -> Poll<()> {
    with_source(key, |source| {
        if source.ready.intersects(wanted) {
            return Poll::Ready(());
        }
        match &mut source.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    })
    .unwrap_or(Poll::Pending)
}

/// Whether the socket is ready for one of `wanted`, as far as reported.
pub(super) fn is_ready(key: Key, wanted: EpollFlags) -> bool {
    with_source(key, |source| source.ready.intersects(wanted)) == Some(true)
}

/// Records that a call found the socket not ready for `what`. The next edge sets it again.
pub(super) fn not_ready(key: Key, what: EpollFlags) {
    with_source(key, |source| source.ready.remove(what));
}

/// Records that a call found the socket ready for `what`, on behalf of the calling task, which is not woken.
pub(super) fn ready(key: Key, what: EpollFlags) {
    with_source(key, |source| source.ready.insert(what));
}

/// Like [`not_ready`], unless the socket is ready for `unless`.
pub(super) fn not_ready_unless(key: Key, what: EpollFlags, unless: EpollFlags) {
    with_source(key, |source| {
        if !source.ready.intersects(unless) {
            source.ready.remove(what);
        }
    });
}

/// `None` once the runtime of this worker has ended.
fn with_source<R>(key: Key, act: impl FnOnce(&mut Source) -> R) -> Option<R> {
    REACTOR.with_borrow_mut(|reactor| reactor.as_mut()?.source(key).map(act))
}

/// The sockets of a worker and their readiness.
#[derive(Debug)]
struct Reactor {
    /// The epoll instance, shared with the task that drives the reactor.
    epoll: Arc<Watched>,
    sources: Vec<Source>,
    /// The unused indices.
    free: Vec<u32>,
}

/// The state of a socket.
#[derive(Debug)]
struct Source {
    generation: u32,
    /// Reported readiness that no call has contradicted since.
    ready: EpollFlags,
    /// The task that waits for the socket.
    waker: Option<Waker>,
}

impl Reactor {
    /// Starts a reactor that the current runtime drives.
    fn start() -> io::Result<Self> {
        let epoll = Arc::new(Watched::new(epoll::create(CreateFlags::CLOEXEC)?, Interest::READABLE)?);
        tokio::spawn(drive(epoll.clone()));
        Ok(Self { epoll, sources: Vec::new(), free: Vec::new() })
    }

    fn watch(&mut self, socket: impl AsFd) -> io::Result<Key> {
        let index = self.free.pop().unwrap_or_else(|| {
            self.sources.push(Source { generation: 0, ready: EpollFlags::empty(), waker: None });
            u32::try_from(self.sources.len() - 1).expect("a process has fewer descriptors")
        });
        let key = Key { index, generation: self.sources[index as usize].generation };
        let wanted = EventFlags::from_bits_retain(WATCHED.bits().cast_unsigned());
        if let Err(errno) = epoll::add(&*self.epoll, socket, key.data(), wanted) {
            self.free.push(index);
            return Err(errno.into());
        }
        Ok(key)
    }

    fn forget(&mut self, key: Key) -> Option<Waker> {
        let source = self.source(key)?;
        source.generation = source.generation.wrapping_add(1);
        source.ready = EpollFlags::empty();
        let waker = source.waker.take();
        self.free.push(key.index);
        waker
    }

    fn source(&mut self, key: Key) -> Option<&mut Source> {
        self.sources.get_mut(key.index as usize).filter(|source| source.generation == key.generation)
    }

    /// Fetches events from the kernel and wakes the tasks concerned. Returns whether there may be more.
    fn turn(&mut self) -> bool {
        let mut room = [MaybeUninit::uninit(); EVENTS];
        let events = match epoll::wait(&*self.epoll, &mut room, Some(&Timespec::default())) {
            Ok((events, _room)) => &*events,
            Err(Errno::INTR) => return true,
            Err(errno) => unreachable!("epoll_wait(2) refuses nothing but wrong arguments: {errno}"),
        };
        let count = events.len();
        for &Event { flags, data, .. } in events {
            if let Some(source) = self.source(Key::from_data(data)) {
                source.ready |= EpollFlags::from_bits_retain(flags.bits().cast_signed());
                if let Some(waker) = &source.waker {
                    waker.wake_by_ref();
                }
            }
        }
        count == EVENTS
    }
}

/// Drives the reactor of this thread until the runtime ends.
async fn drive(watched: Arc<Watched>) {
    let _end = TakeOnDrop;
    let turn = || REACTOR.with_borrow_mut(|reactor| reactor.as_mut().is_some_and(Reactor::turn));
    // Fewer events than requested means that there are no more, so another epoll_wait(2) is not needed.
    let turn = |_epoll: std::os::fd::BorrowedFd<'_>| match turn() {
        true => Ok(()),
        false => Err(io::ErrorKind::WouldBlock.into()),
    };
    while watched.io(Interest::READABLE, turn).await.is_ok() {
        tokio::task::yield_now().await;
    }
}

/// Removes the reactor from the thread when dropped, so that another runtime starts its own.
struct TakeOnDrop;

impl Drop for TakeOnDrop {
    fn drop(&mut self) {
        drop(REACTOR.take());
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::runtime::new_runtime;

    fn pair() -> (UnixStream, UnixStream) {
        let (watched, other) = UnixStream::pair().unwrap();
        watched.set_nonblocking(true).unwrap();
        (watched, other)
    }

    async fn ready(key: Key, wanted: EpollFlags) {
        std::future::poll_fn(|cx| poll(key, wanted, cx)).await;
    }

    #[test]
    fn what_comes_about_is_reported_until_it_is_found_over() {
        new_runtime().unwrap().block_on(async {
            let (mut watched, mut other) = pair();
            let key = watch(&watched).unwrap();
            ready(key, EpollFlags::EPOLLOUT).await;
            assert!(!is_ready(key, EpollFlags::EPOLLIN));
            for _ in 0..2 {
                other.write_all(b"x").unwrap();
                ready(key, EpollFlags::EPOLLIN).await;
                watched.read_exact(&mut [0]).unwrap();
                assert!(is_ready(key, EpollFlags::EPOLLIN));
                not_ready(key, EpollFlags::EPOLLIN);
                assert!(!is_ready(key, EpollFlags::EPOLLIN));
            }
            assert!(is_ready(key, EpollFlags::EPOLLOUT));
        });
    }

    #[test]
    fn more_sockets_than_fit_one_turn_are_all_reported() {
        new_runtime().unwrap().block_on(async {
            let pairs: Vec<_> = (0..3 * EVENTS).map(|_| pair()).collect();
            let keys: Vec<_> = pairs.iter().map(|(watched, _)| watch(watched).unwrap()).collect();
            for (_, other) in &pairs {
                (&*other).write_all(b"x").unwrap();
            }
            for key in keys {
                ready(key, EpollFlags::EPOLLIN).await;
                forget(key);
            }
        });
    }

    #[test]
    fn an_index_is_used_again_without_what_was_known_of_its_last_socket() {
        new_runtime().unwrap().block_on(async {
            let (watched, mut other) = pair();
            let key = watch(&watched).unwrap();
            other.write_all(b"x").unwrap();
            ready(key, EpollFlags::EPOLLIN).await;
            // As after a fork, when the file stays open elsewhere and its events keep coming.
            let _elsewhere = watched.try_clone().unwrap();
            forget(key);
            drop(watched);
            let (next, _its_other) = pair();
            let next = watch(&next).unwrap();
            assert_eq!((next.index, next.generation), (key.index, key.generation + 1));
            other.write_all(b"x").unwrap();
            ready(next, EpollFlags::EPOLLOUT).await;
            assert!(!is_ready(next, EpollFlags::EPOLLIN));
            assert!(!is_ready(key, EpollFlags::EPOLLOUT));
        });
    }

    #[test]
    fn a_thread_can_have_one_runtime_after_the_other() {
        for _ in 0..2 {
            new_runtime().unwrap().block_on(async {
                let (watched, _other) = pair();
                ready(watch(&watched).unwrap(), EpollFlags::EPOLLOUT).await;
            });
            assert!(REACTOR.with_borrow(Option::is_none));
        }
    }
}
