//! Taking connections from listeners: one task for all of them.
//!
//! Each turn takes a bounded burst from each listener that has something, and hands the connections
//! over to workers. A listener whose mapping is full, or on which accepting fails, is left alone until
//! that is over; what arrives meanwhile waits in its backlog.

use std::io;
use std::os::fd::AsFd;
use std::pin::pin;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use rproxy_sys::socket;
use socket2::{SockRef, Socket};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, error, warn};

use super::{Accepted, dial, serve};
use crate::addr::canonical;
use crate::backoff::Backoff;
use crate::limits::OnLimit;
use crate::listen::set_stream_options;
use crate::log_limit::LogLimit;
use crate::mapping::Forward;
use crate::poll::{PORT, Poll, Port};
use crate::service::{Assignment, Place};
use crate::task::{Order, Orders};
use crate::worker::{Seat, Workers};

/// Listeners looked after in one turn.
const EVENTS: usize = 64;

/// Connections accepted from a listener in one turn.
const BURST: usize = 64;

/// Pending connections at the end; the usual net.core.somaxconn. Under a flood there is always another.
const LONGEST_BACKLOG: usize = 4096;

/// The task that accepts the connections of all TCP mappings of a process.
pub(crate) struct Acceptor {
    poll: Poll,
    orders: Orders,
    /// Told when a mapping has room again that was full.
    room: Arc<Notify>,
    workers: Arc<Workers>,
    /// By the number of their port.
    listeners: Vec<Option<Assignment>>,
    /// The numbers of those whose mapping is full.
    full: Vec<usize>,
    failures: Failures,
}

/// The listeners on which accepting failed, and when they are tried again.
struct Failures {
    listeners: Vec<usize>,
    /// Clients for whom there is no socket to reach the backend with: one for each of the listeners, at the
    /// most.
    clients: Vec<Accepted>,
    backoff: Backoff,
    retry: Instant,
}

impl Acceptor {
    /// A task without listeners. It ends when all senders of `orders` are gone.
    pub(crate) fn new(poll: Poll, orders: Orders, room: Arc<Notify>, workers: Arc<Workers>) -> Self {
        let failures = Failures {
            listeners: Vec::new(),
            clients: Vec::new(),
            backoff: Backoff::default(),
            retry: Instant::now(),
        };
        Self { poll, orders, room, workers, listeners: Vec::new(), full: Vec::new(), failures }
    }

    /// Accepts connections until nobody can give orders any more. What is pending by then is still
    /// accepted: its client has been told that it is connected.
    ///
    /// # Errors
    /// What epoll_wait(2) answered; nothing is accepted any more then.
    pub(crate) async fn run(mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS];
        let room = self.room.clone();
        let mut retry = pin!(sleep_until(self.failures.retry));
        loop {
            tokio::select! {
                // Orders first: a listener may be reported before it is known here.
                biased;
                order = self.orders.recv() => match order {
                    Some(order) => self.obey(order),
                    None => break,
                },
                () = room.notified() => self.resume_full(),
                () = &mut retry, if !self.failures.listeners.is_empty() => self.resume_failed(),
                count = self.poll.wait(&mut events) => {
                    if self.turn(&events[..count?]) {
                        // Under a flood there is always another connection.
                        tokio::task::yield_now().await;
                    }
                    retry.as_mut().reset(self.failures.retry);
                }
            }
        }
        let all: Vec<_> = self.listeners.iter().flatten().map(|listener| listener.port.clone()).collect();
        self.release(&all);
        Ok(())
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Serve(assignments) => {
                for assignment in assignments {
                    let number = assignment.port.number();
                    if self.listeners.len() <= number {
                        self.listeners.resize_with(number + 1, || None);
                    }
                    self.listeners[number] = Some(assignment);
                }
                // There may be other limits now.
                self.resume_all_full();
            }
            Order::Release(ports, done) => {
                self.release(&ports);
                // Closed before anyone hears of it.
                drop(ports);
                // Whoever asked may not wait for it.
                done.send(()).ok();
            }
            // What is pending there is not ours any more.
            Order::Leave => self.listeners.clear(),
            Order::Flows(_) => {}
        }
    }

    /// Accepts what is pending on some listeners, as far as the limits allow, and forgets them.
    fn release(&mut self, ports: &[Arc<Port>]) {
        let mut ready = Vec::new();
        for port in ports {
            let Some(listener) = self.listeners.get_mut(port.number()).and_then(Option::take) else {
                continue;
            };
            // On an error there is nothing more to be had.
            drop(accept_some(&listener, LONGEST_BACKLOG, &mut ready, &mut self.failures.clients));
            debug!(mapping = %listener.route.forward, "listener closed");
        }
        hand_over(ready, &self.workers);
        let is_known = |number: &usize| self.listeners.get(*number).is_some_and(Option::is_some);
        self.full.retain(is_known);
        self.failures.listeners.retain(is_known);
    }

    /// Looks after each listener that has something once. Gives whether one of them may have more.
    fn turn(&mut self, events: &[EpollEvent]) -> bool {
        let mut ready = Vec::new();
        let mut more = false;
        for event in events {
            let number = usize::try_from(event.data() & !PORT).unwrap_or(usize::MAX);
            let Some(Some(listener)) = self.listeners.get(number) else { continue };
            match accept_some(listener, BURST, &mut ready, &mut self.failures.clients) {
                Ok(Stop::Burst) => more = true,
                Ok(Stop::Empty) => self.failures.backoff.reset(),
                Ok(Stop::Full) => {
                    watch(listener, EpollFlags::empty());
                    self.full.push(number);
                }
                Err(error) => {
                    watch(listener, EpollFlags::empty());
                    log_failure(&listener.route.forward, &error);
                    self.failures.add(number);
                }
            }
        }
        hand_over(ready, &self.workers);
        more
    }

    /// Goes on with all listeners whose mapping was full, which may find that it still is.
    fn resume_all_full(&mut self) {
        for number in self.full.drain(..) {
            if let Some(Some(listener)) = self.listeners.get(number) {
                watch(listener, EpollFlags::EPOLLIN);
            }
        }
    }

    /// Goes on with the listeners whose mapping is not full any more.
    fn resume_full(&mut self) {
        let listeners = &self.listeners;
        self.full.retain(|number| match listeners.get(*number) {
            Some(Some(listener)) if !listener.route.service.live.is_full() => {
                watch(listener, EpollFlags::EPOLLIN);
                false
            }
            known => known.is_some_and(Option::is_some),
        });
    }

    /// Tries the listeners again on which accepting failed, once the clients that were accepted before are
    /// on their way.
    fn resume_failed(&mut self) {
        let mut ready = Vec::new();
        while let Some(client) = self.failures.clients.pop() {
            match dial::open(client.place.forward().backend) {
                Err(error) if is_exhaustion(&error) => {
                    self.failures.clients.push(client);
                    self.failures.retry = Instant::now() + self.failures.backoff.next_delay();
                    break;
                }
                backend => ready.push((client, backend)),
            }
        }
        hand_over(ready, &self.workers);
        if !self.failures.clients.is_empty() {
            return;
        }
        for number in self.failures.listeners.drain(..) {
            if let Some(Some(listener)) = self.listeners.get(number) {
                watch(listener, EpollFlags::EPOLLIN);
            }
        }
    }
}

impl Failures {
    fn add(&mut self, listener: usize) {
        if self.listeners.is_empty() {
            self.retry = Instant::now() + self.backoff.next_delay();
        }
        self.listeners.push(listener);
    }
}

/// A connection on its way to a worker, and the socket to reach its backend with.
type Ready = (Accepted, io::Result<Socket>);

/// Why no more connections were accepted from a listener.
enum Stop {
    /// There was none.
    Empty,
    /// It was enough for one turn.
    Burst,
    /// The mapping has as many as it may have.
    Full,
}

/// Accepts up to `most` connections, and resets those that are not to be served. On an error, there may be
/// one more in `waiting`, for whom there is no second socket.
fn accept_some(
    listener: &Assignment,
    most: usize,
    ready: &mut Vec<Ready>,
    waiting: &mut Vec<Accepted>,
) -> io::Result<Stop> {
    let Assignment { port, route } = listener;
    let service = &route.service;
    for _ in 0..most {
        let has_room = service.has_room();
        if !has_room && service.limits.on_limit == OnLimit::Wait {
            route.is_full();
            return Ok(Stop::Full);
        }
        let (client, peer) = match socket::accept(port.as_fd()) {
            Ok((client, peer)) => (client, canonical(peer)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Stop::Empty),
            Err(error) if is_the_clients(&error) => continue,
            Err(error) => return Err(error),
        };
        if port.is_mptcp()
            && let Err(error) = set_stream_options(&SockRef::from(&client))
        {
            debug!(mapping = %route.forward, %error, "an accepted connection lacks an option");
        }
        // Those that are dropped here are reset, as their listener was told (`set_stream_options`).
        if !route.admits(peer) {
            continue;
        }
        if !has_room {
            route.is_over_limit(peer);
            continue;
        }
        let accepted = Accepted { client, peer, place: Place::take(route) };
        match dial::open(route.forward.backend) {
            Err(error) if is_exhaustion(&error) => {
                waiting.push(accepted);
                return Err(error);
            }
            backend => ready.push((accepted, backend)),
        }
    }
    Ok(Stop::Burst)
}

/// Whether it is one connection that failed, not the listener (accept(2), "Error handling").
fn is_the_clients(error: &io::Error) -> bool {
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or(0));
    matches!(errno, Errno::ECONNABORTED | Errno::EINTR | Errno::EPROTO | Errno::EPERM)
}

/// Whether there is a lack of something that others may give back, as of descriptors.
fn is_exhaustion(error: &io::Error) -> bool {
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or(0));
    matches!(errno, Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM)
}

fn watch(listener: &Assignment, flags: EpollFlags) {
    if let Err(error) = listener.port.watch(flags) {
        error!(mapping = %listener.route.forward, %error, "cannot change what a listener is watched for");
    }
}

/// Gives connections to workers, each of which is woken once for all that it gets.
fn hand_over(ready: Vec<Ready>, workers: &Workers) {
    let mut seated: Vec<(Seat, Ready)> = ready.into_iter().map(|client| (workers.seat(), client)).collect();
    seated.sort_by_key(|(seat, _client)| seat.worker());
    while let Some((seat, _client)) = seated.last() {
        let (worker, runtime) = (seat.worker(), seat.runtime());
        let first = seated.partition_point(|(seat, _client)| seat.worker() < worker);
        let group = seated.split_off(first);
        runtime.spawn(async move {
            for (seat, (accepted, backend)) in group {
                tokio::spawn(serve(accepted, backend, seat));
            }
        });
    }
}

fn log_failure(forward: &Forward, error: &io::Error) {
    static FAILED: LogLimit = LogLimit::new();

    if let Some(suppressed) = FAILED.permit() {
        warn!(mapping = %forward, error = %explain(error), suppressed, "cannot accept a connection");
    }
}

/// The kernel's answer, with a way out where there is one.
fn explain(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(nix::libc::EMFILE) => format!("{error}; raise this process's limit (`ulimit -n`)"),
        Some(nix::libc::ENFILE) => format!("{error}; raise the machine's limit (fs.file-max)"),
        _ => error.to_string(),
    }
}
