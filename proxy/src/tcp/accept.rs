//! Accepts connections: one task for all listeners of TCP and SCTP.
//!
//! Each turn accepts a bounded burst from each ready listener, and sends the connections to workers. A
//! listener whose mapping is full is not watched until a connection ends. While descriptors are exhausted,
//! nothing is accepted. Clients wait in the backlog meanwhile.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use rproxy_mapping::PortMapping;
use rproxy_mapping::addr::{HostSocketAddr, Protocol, canonical};
use rproxy_mapping::limits::OnLimit;
use rproxy_sys::socket;
use rustix::net::connect_unspec;
use socket2::{SockRef, Socket};
use tokio::time::{Instant, sleep_until};
use tracing::{debug, error, warn};

use super::connections::Retargeted;
use super::dial::DialError;
use super::{Accepted, connections, dial, dial_and_relay, report_failed_dial};
use crate::bind::listen::{BACKLOG, set_stream_options};
use crate::log::limit::LogLimit;
use crate::runtime::descriptors::explain;
use crate::runtime::poll::{EventSource, LISTENER, WatchedListener};
use crate::runtime::socket_file::SocketFile;
use crate::runtime::worker::{WorkerSlot, Workers};
use crate::state::client::{ClientAddr, Credentials};
use crate::state::record::Ending;
use crate::state::sources::Place;
use crate::state::task::{Command, Commands, Detached, LiveFlows};
use crate::state::{Binding, Capacity, ConnectionGuard, Target};
use crate::tcp::backoff::Backoff;

/// Listeners serviced in one turn.
const EVENTS: usize = 64;

/// Connections accepted from a listener in one turn.
const BURST: usize = 64;

/// Pending connections to accept at the end; the usual net.core.somaxconn. Bounded, because under a flood
/// there is always another one.
const LONGEST_BACKLOG: usize = 4096;

/// The task that accepts the connections of all mappings.
pub(crate) struct Acceptor {
    poll: EventSource,
    commands: Commands,
    /// Notified when connections and flows end.
    capacity: Arc<Capacity>,
    workers: Arc<Workers>,
    /// Indexed by the number of the listener.
    listeners: Vec<Option<Binding>>,
    /// The numbers of listeners whose mapping is full.
    full: Vec<usize>,
    backends: BackendSockets,
    pause: Pause,
    /// Whether it continues without a listener, because others may be added.
    may_be_idle: bool,
}

/// Whether accepting is suspended because descriptors are exhausted, and when it is retried.
struct Pause {
    is_on: bool,
    backoff: Backoff,
    until: Instant,
    /// Whether this was logged since the last time that no client was left waiting.
    is_logged: bool,
}

impl Acceptor {
    /// A task without listeners. It ends when all senders of `commands` are dropped, and unless it `may_be_idle`, when
    /// its last listener fails.
    pub(crate) fn new(
        poll: EventSource,
        commands: Commands,
        capacity: Arc<Capacity>,
        workers: Arc<Workers>,
        may_be_idle: bool,
    ) -> Self {
        let pause =
            Pause { is_on: false, backoff: Backoff::default(), until: Instant::now(), is_logged: false };
        let (listeners, full, backends) = (Vec::new(), Vec::new(), BackendSockets::default());
        Self { poll, commands, capacity, workers, listeners, full, backends, pause, may_be_idle }
    }

    /// Accepts connections until all senders of commands are dropped. Connections that are pending then are
    /// still accepted, because their clients consider them established.
    ///
    /// # Errors
    /// Those of epoll_wait(2), or the failure of the last usable listener; nothing is accepted any more then.
    pub(crate) async fn run(mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS];
        let capacity = self.capacity.clone();
        let mut retry = pin!(sleep_until(self.pause.until));
        loop {
            tokio::select! {
                // Commands first: a listener may become ready before its command is handled.
                biased;
                command = self.commands.recv() => match command {
                    Some(command) => self.handle(command),
                    None => break,
                },
                () = capacity.freed() => {
                    self.pause.is_on = false;
                    self.resume_full();
                }
                () = &mut retry, if self.pause.is_on => self.pause.is_on = false,
                count = self.poll.wait(&mut events), if !self.pause.is_on => {
                    if self.turn(&events[..count?])? {
                        // Under a flood there is always another connection.
                        tokio::task::yield_now().await;
                    }
                    retry.as_mut().reset(self.pause.until);
                }
            }
        }
        let all: Vec<_> = self.listeners.iter().flatten().map(|listener| listener.port.clone()).collect();
        self.release(&all);
        Ok(())
    }

    fn handle(&mut self, command: Command) {
        match command {
            Command::Serve(bindings) => bindings.into_iter().for_each(|binding| drop(self.assign(binding))),
            Command::Retarget(bindings, done) => {
                let retargeted = bindings.into_iter().filter_map(|binding| self.assign(binding)).collect();
                let told = connections::retarget(&self.workers, retargeted);
                tokio::spawn(async move {
                    told.await;
                    // The requester may not wait for the result.
                    done.send(()).ok();
                });
                // The limits may have changed.
                self.resume_all_full();
            }
            Command::Release(ports, done) => {
                self.release(&ports);
                // Closed before the sender is notified.
                drop(ports);
                // The sender may not be waiting.
                done.send(()).ok();
            }
            Command::Close(ports, reason, closed) => {
                match reason {
                    Detached::Orphaned | Detached::Left => self.release(&ports),
                    Detached::Unpublished => self.forget(&ports),
                }
                // Closed before the sender is notified.
                drop(ports);
                // The sender may not be waiting.
                closed.send(LiveFlows::default()).ok();
            }
            Command::Cut(cut, done) => {
                let cut = connections::cut_chosen(&self.workers, cut);
                tokio::spawn(async move {
                    cut.await;
                    // The requester may not wait for the result.
                    done.send(()).ok();
                });
            }
            // Pending connections belong to the other process now.
            Command::Leave => self.listeners.clear(),
            Command::Flows(_) => {}
        }
    }

    /// Serves a listener like this from now on. Returns how its target has changed, if it is of the same mapping.
    fn assign(&mut self, binding: Binding) -> Option<Retargeted> {
        let number = binding.port.number();
        if self.listeners.len() <= number {
            self.listeners.resize_with(number + 1, || None);
        }
        let new = binding.target.clone();
        let old = self.listeners[number].replace(binding)?.target;
        Arc::ptr_eq(&old.policy.state, &new.policy.state).then_some((old, new))
    }

    /// Removes some listeners. The kernel resets what is pending there when they are closed.
    fn forget(&mut self, ports: &[Arc<WatchedListener>]) {
        for port in ports {
            if let Some(listener) = self.listeners.get_mut(port.number()) {
                *listener = None;
            }
        }
        self.full.retain(|number| self.listeners.get(*number).is_some_and(Option::is_some));
    }

    /// Accepts what is pending on some listeners, within their limits, and removes the listeners.
    fn release(&mut self, ports: &[Arc<WatchedListener>]) {
        let mut ready = Vec::new();
        for port in ports {
            let Some(listener) = self.listeners.get_mut(port.number()).and_then(Option::take) else {
                continue;
            };
            // From then on, no other client finds a Unix socket.
            listener.port.file().into_iter().for_each(SocketFile::remove);
            // After an error, nothing more can be accepted.
            drop(accept_some(&listener, LONGEST_BACKLOG, &mut self.backends, &mut ready));
            debug!(mapping = %listener.target.name(), host = %listener.target.port_mapping.host, "listener closed");
        }
        hand_over(ready, &self.workers);
        self.full.retain(|number| self.listeners.get(*number).is_some_and(Option::is_some));
    }

    /// Services each ready listener once. Returns whether one of them may have more connections.
    ///
    /// # Errors
    /// The last listener has failed.
    fn turn(&mut self, events: &[EpollEvent]) -> io::Result<bool> {
        let mut ready = Vec::new();
        let mut more = false;
        for event in events {
            let number = usize::try_from(event.data() & !LISTENER).unwrap_or(usize::MAX);
            let Some(Some(listener)) = self.listeners.get(number) else { continue };
            if is_of_a_client(listener, event.events()) {
                // It would be reported again and again.
                drop(SockRef::from(listener.port.as_ref()).take_error());
            } else if event.events().intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
                self.revive(number)?;
                continue;
            }
            match accept_some(listener, BURST, &mut self.backends, &mut ready) {
                Ok(Stop::Burst) => more = true,
                Ok(Stop::Empty) => self.pause.end(),
                Ok(Stop::Full) => {
                    watch(listener, EpollFlags::empty());
                    self.full.push(number);
                }
                Err(error) => {
                    if !std::mem::replace(&mut self.pause.is_logged, true) {
                        log_failure(&listener.target, &error);
                    }
                    // If the request is new, a connection may have ended just before, so try again.
                    if !is_exhaustion(&error) || self.capacity.request() {
                        self.pause.begin();
                        break;
                    }
                    more = true;
                }
            }
        }
        hand_over(ready, &self.workers);
        Ok(more)
    }

    /// Makes a socket listen again that another process with access to it has shut down, or that the
    /// administrator has destroyed (`ss --kill`). If that fails, it is no longer watched.
    ///
    /// # Errors
    /// It has failed, and no other listener is left.
    fn revive(&mut self, number: usize) -> io::Result<()> {
        static REVIVED: LogLimit = LogLimit::new();

        let Some(Some(Binding { port, target })) = self.listeners.get(number) else { return Ok(()) };
        // A pending error would be reported again and again.
        drop(SockRef::from(port.as_ref()).take_error());
        let (mapping, host) = (target.name(), &target.port_mapping.host);
        match listen_again(port, host) {
            Ok(()) => {
                if let Some(suppressed) = REVIVED.permit() {
                    warn!(%mapping, %host, suppressed, "the listener was shut down from outside; it listens again");
                }
                Ok(())
            }
            Err(source) => {
                let reason = "the listener was shut down from outside, and cannot listen again";
                error!(%mapping, %host, error = %source, "{reason}; its clients are refused");
                if let Err(error) = port.unwatch() {
                    error!(%mapping, %host, %error, "cannot stop watching a listener");
                }
                self.listeners[number] = None;
                match self.may_be_idle || self.listeners.iter().any(Option::is_some) {
                    true => Ok(()),
                    false => Err(io::Error::new(source.kind(), format!("{reason}: {source}"))),
                }
            }
        }
    }

    /// Resumes all listeners whose mapping was full, even if it still is.
    fn resume_all_full(&mut self) {
        for number in self.full.drain(..) {
            if let Some(Some(listener)) = self.listeners.get(number) {
                watch(listener, EpollFlags::EPOLLIN);
            }
        }
    }

    /// Resumes the listeners whose mapping is no longer full.
    fn resume_full(&mut self) {
        let listeners = &self.listeners;
        self.full.retain(|number| match listeners.get(*number) {
            Some(Some(listener)) if !listener.target.policy.state.is_full() => {
                watch(listener, EpollFlags::EPOLLIN);
                false
            }
            known => known.is_some_and(Option::is_some),
        });
    }
}

impl Pause {
    fn begin(&mut self) {
        self.is_on = true;
        self.until = Instant::now() + self.backoff.next_delay();
    }

    /// No client is waiting any more.
    fn end(&mut self) {
        self.backoff.reset();
        self.is_logged = false;
    }
}

/// Sockets for connections to backends, opened before there is a client, at most one per family and protocol. An
/// accepted client can then always be served.
#[derive(Default)]
struct BackendSockets {
    v4: Option<Socket>,
    v6: Option<Socket>,
    sctp_v4: Option<Socket>,
    sctp_v6: Option<Socket>,
    unix: Option<Socket>,
}

impl BackendSockets {
    /// Returns a socket for the backend of `port`, or why none can be opened.
    ///
    /// # Errors
    /// None can be opened now, because a resource is exhausted that others may release.
    fn take(&mut self, port: &PortMapping) -> io::Result<io::Result<Socket>> {
        if let Some(socket) = self.of(port).take() {
            return Ok(Ok(socket));
        }
        match dial::open(port) {
            Err(error) if is_exhaustion(&error) => Err(error),
            opened => Ok(opened),
        }
    }

    /// Keeps a socket for the backend of `port` that was not needed.
    fn keep(&mut self, port: &PortMapping, socket: io::Result<Socket>) {
        *self.of(port) = socket.ok();
    }

    fn of(&mut self, port: &PortMapping) -> &mut Option<Socket> {
        if port.backend.unix_addr().is_some() {
            return &mut self.unix;
        }
        match (port.protocol, port.backend.socket_addr()) {
            (Protocol::Sctp, SocketAddr::V4(_)) => &mut self.sctp_v4,
            (Protocol::Sctp, SocketAddr::V6(_)) => &mut self.sctp_v6,
            (_, SocketAddr::V4(_)) => &mut self.v4,
            (_, SocketAddr::V6(_)) => &mut self.v6,
        }
    }
}

/// Why accepting from a listener stopped.
enum Stop {
    /// No connection was pending.
    Empty,
    /// The burst for this turn is complete.
    Burst,
    /// The mapping has reached `max_connections`.
    Full,
}

/// Accepts up to `most` connections, and resets those that must not be served.
///
/// # Errors
/// Why accepting failed; clients wait in the backlog.
fn accept_some(
    listener: &Binding,
    most: usize,
    backends: &mut BackendSockets,
    ready: &mut Vec<Accepted>,
) -> io::Result<Stop> {
    let Binding { port, target } = listener;
    let (policy, mapped) = (&target.policy, &target.port_mapping);
    for _ in 0..most {
        let has_room = policy.has_room();
        if !has_room && policy.limits.on_limit == OnLimit::Wait {
            target.is_full();
            return Ok(Stop::Full);
        }
        let backend = backends.take(mapped)?;
        let (client, peer) = match accept(port) {
            Ok(accepted) => accepted,
            Err(error) => {
                backends.keep(mapped, backend);
                match error {
                    error if error.kind() == io::ErrorKind::WouldBlock => return Ok(Stop::Empty),
                    error if is_the_clients(&error) => continue,
                    error => return Err(error),
                }
            }
        };
        if port.is_mptcp()
            && let Err(error) = set_stream_options(&SockRef::from(&client))
        {
            debug!(mapping = %target.name(), client = %peer, %error, "an accepted connection lacks an option");
        }
        // Dropping a connection here resets it, because of the options inherited from its listener
        // (`set_stream_options`).
        let place = match admit(target, peer, has_room) {
            Ok(place) => place,
            Err(ending) => {
                backends.keep(mapped, backend);
                target.log_refusal(peer, ending);
                continue;
            }
        };
        match peer {
            ClientAddr::Inet(addr) => dial::set_options(&client, addr.is_ipv6(), target),
            // It does not inherit it.
            ClientAddr::Unix(_) => dial::keep_urgent_inline(&SockRef::from(&client)),
        }
        backend.iter().for_each(|backend| dial::set_backend_options(backend, target));
        let guard = ConnectionGuard::take(target);
        match backend {
            Ok(backend) => ready.push(Accepted { client, backend, peer, guard, place }),
            Err(error) => reset_without_backend(client, peer, guard, error),
        }
    }
    Ok(Stop::Burst)
}

/// Accepts a connection, and finds out who the client is.
fn accept(port: &WatchedListener) -> io::Result<(OwnedFd, ClientAddr)> {
    let (client, peer) = socket::accept(port.as_fd())?;
    let peer = match peer {
        Some(addr) => ClientAddr::Inet(canonical(addr)),
        // It was known when the client connected, so that this does not fail.
        None => ClientAddr::Unix(Credentials::of_peer(&client)?),
    };
    Ok((client, peer))
}

/// The place of the connection of `peer` among those of its source, if these are counted.
///
/// # Errors
/// How the connection ends if it is not served; that is counted and logged.
fn admit(target: &Target, peer: ClientAddr, has_room: bool) -> Result<Option<Box<Place>>, Ending> {
    // The client of a proxy is known later.
    let is_proxy = target.policy.limits.proxy_protocol.expects_header(peer.ip());
    if !is_proxy && !target.admits(peer) {
        return Err(Ending::Denied);
    }
    if !has_room {
        target.is_over_limit(peer);
        return Err(Ending::OverLimit);
    }
    if is_proxy { Ok(None) } else { target.admit_source(peer) }
}

/// Records the connection of `peer`, if anybody can ask for it.
fn record(guard: &mut ConnectionGuard, peer: ClientAddr, client: &OwnedFd) {
    let host = guard.port_mapping().host.clone();
    let local = || SockRef::from(client).local_addr().ok().and_then(|local| local.as_socket());
    let is_wildcard = host.inet_addr().is_some_and(|addr| addr.ip().is_unspecified());
    let asked = move || if is_wildcard { local().map_or(host, HostSocketAddr::from) } else { host };
    guard.record_as(peer, asked);
}

/// Resets a connection because no socket for its backend can be opened.
fn reset_without_backend(client: OwnedFd, peer: ClientAddr, mut guard: ConnectionGuard, source: io::Error) {
    let backend = guard.port_mapping().backend.clone();
    record(&mut guard, peer, &client);
    let error = match &guard.target().named {
        // A kernel without IPv6 opens no socket for it.
        Some(host) if backend.is_nowhere() => DialError::Unresolved { host: host.name().clone() },
        _ => DialError::Open { addr: backend, source },
    };
    report_failed_dial(peer, &guard, &error);
    drop(client);
}

/// Whether an error that a listener reports is that of an SCTP association that was aborted before it was accepted. (The
/// association stays there until it is accepted, `sctp_cmd_delete_tcb` in net/sctp/sm_sideeffect.c.)
fn is_of_a_client(listener: &Binding, reported: EpollFlags) -> bool {
    listener.target.port_mapping.protocol == Protocol::Sctp && !reported.intersects(EpollFlags::EPOLLHUP)
}

/// Whether the error concerns a single connection, not the listener (accept(2), "Error handling" and "EPERM").
fn is_the_clients(error: &io::Error) -> bool {
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or(0));
    let of_network = matches!(
        errno,
        Errno::ENETDOWN
            | Errno::EPROTO
            | Errno::ENOPROTOOPT
            | Errno::EHOSTDOWN
            | Errno::ENONET
            | Errno::EHOSTUNREACH
            | Errno::ENETUNREACH
    );
    of_network || matches!(errno, Errno::ECONNABORTED | Errno::EINTR | Errno::EPERM)
}

/// Whether a resource is exhausted that others may release, such as descriptors.
fn is_exhaustion(error: &io::Error) -> bool {
    let errno = Errno::from_raw(error.raw_os_error().unwrap_or(0));
    matches!(errno, Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM)
}

/// Makes a socket that listened at `host` listen again.
fn listen_again(port: &WatchedListener, host: &HostSocketAddr) -> io::Result<()> {
    // A Unix socket that was shut down stays so (unix_shutdown in net/unix/af_unix.c).
    let (socket, host) = (SockRef::from(port), host.inet_addr().ok_or(io::ErrorKind::Unsupported)?);
    // A destroyed socket has both directions shut down, as would all connections it accepts (tcp_done in
    // net/ipv4/tcp.c).
    connect_unspec(port)?;
    let bound = socket.local_addr()?.as_socket().map(|addr| addr.port());
    if bound != Some(host.port()) {
        // A port that the kernel chose is lost when listening ends (tcp_set_state in net/ipv4/tcp.c).
        socket.bind(&host.into())?;
    }
    socket.listen(BACKLOG)
}

fn watch(listener: &Binding, flags: EpollFlags) {
    if let Err(error) = listener.port.watch(flags) {
        error!(mapping = %listener.target.name(), %error, "cannot change what a listener is watched for");
    }
}

/// Sends connections to workers, each of which is woken once for all it gets.
fn hand_over(ready: Vec<Accepted>, workers: &Workers) {
    let mut assigned: Vec<(WorkerSlot, Accepted)> =
        ready.into_iter().map(|client| (workers.slot(), client)).collect();
    assigned.sort_by_key(|(slot, _client)| slot.worker());
    while let Some((slot, _client)) = assigned.last() {
        let (worker, runtime) = (slot.worker(), slot.runtime());
        let first = assigned.partition_point(|(slot, _client)| slot.worker() < worker);
        let group = assigned.split_off(first);
        runtime.spawn(async move {
            for (slot, mut accepted) in group {
                // Here, so that one thread allocates and frees what a connection needs.
                record(&mut accepted.guard, accepted.peer, &accepted.client);
                let (client, mapping) = (accepted.client(), accepted.guard.state().clone());
                let record = accepted.guard.record().cloned();
                let listed = (client, record, accepted.place.take());
                connections::spawn(listed, &mapping, |entry| dial_and_relay(accepted, slot, entry));
            }
        });
    }
}

fn log_failure(target: &Target, error: &io::Error) {
    static FAILED: LogLimit = LogLimit::new();

    if let Some(suppressed) = FAILED.permit() {
        warn!(mapping = %target.name(), host = %target.port_mapping.host, error = %explain(error, 2), suppressed, "cannot accept a connection");
    }
}

#[cfg(test)]
mod tests;
