//! Taking connections from listeners: one task for all of them.
//!
//! Each turn takes a bounded burst from each listener that has something, and hands the connections
//! over to workers. A listener whose mapping is full is left alone until that is over, and all of them are while
//! there are no descriptors; what arrives meanwhile waits in the backlog.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::pin;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::epoll::{EpollEvent, EpollFlags};
use rproxy_sys::socket::{self, set_traffic_class};
use rustix::net::connect_unspec;
use socket2::{SockRef, Socket};
use tokio::time::{Instant, sleep_until};
use tracing::{debug, error, warn};

use super::dial::DialError;
use super::{Accepted, connections, dial, dial_and_relay, reactor, report_failed_dial};
use crate::bind::listen::{BACKLOG, set_stream_options};
use crate::log::limit::LogLimit;
use crate::mapping::PortMapping;
use crate::mapping::addr::{BackendAddr, HostSocketAddr, canonical};
use crate::mapping::dscp::Dscp;
use crate::mapping::limits::OnLimit;
use crate::runtime::descriptors::explain;
use crate::runtime::poll::{EventSource, LISTENER, WatchedListener};
use crate::runtime::worker::{WorkerSlot, Workers};
use crate::state::task::{Command, Commands};
use crate::state::{Binding, Capacity, ConnectionGuard, MappingPolicy};
use crate::tcp::backoff::Backoff;

/// Listeners looked after in one turn.
const EVENTS: usize = 64;

/// Connections accepted from a listener in one turn.
const BURST: usize = 64;

/// Pending connections at the end; the usual net.core.somaxconn. Under a flood there is always another.
const LONGEST_BACKLOG: usize = 4096;

/// The task that accepts the connections of all TCP mappings of a process.
pub(crate) struct Acceptor {
    poll: EventSource,
    commands: Commands,
    /// What connections and flows give back when they end.
    capacity: Arc<Capacity>,
    workers: Arc<Workers>,
    /// By the number of their port.
    listeners: Vec<Option<Binding>>,
    /// The numbers of those whose mapping is full.
    full: Vec<usize>,
    backends: BackendSockets,
    pause: Pause,
}

/// Whether no connection is accepted for want of descriptors, and when that is tried again.
struct Pause {
    is_on: bool,
    backoff: Backoff,
    until: Instant,
    /// Whether the log says so, since all who waited were served last.
    is_logged: bool,
}

impl Acceptor {
    /// A task without listeners. It ends when all senders of `commands` are gone.
    pub(crate) fn new(
        poll: EventSource,
        commands: Commands,
        capacity: Arc<Capacity>,
        workers: Arc<Workers>,
    ) -> Self {
        let pause =
            Pause { is_on: false, backoff: Backoff::default(), until: Instant::now(), is_logged: false };
        let (listeners, full, backends) = (Vec::new(), Vec::new(), BackendSockets::default());
        Self { poll, commands, capacity, workers, listeners, full, backends, pause }
    }

    /// Accepts connections until nobody can send commands any more. What is pending by then is still
    /// accepted: its client has been told that it is connected.
    ///
    /// # Errors
    /// What epoll_wait(2) answered, or what became of the last listener that could be served; nothing is
    /// accepted any more then.
    pub(crate) async fn run(mut self) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS];
        let capacity = self.capacity.clone();
        let mut retry = pin!(sleep_until(self.pause.until));
        loop {
            tokio::select! {
                // Commands first: a listener may be reported before it is known here.
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
            Command::Serve(bindings) => {
                let mut stricter: Vec<Arc<MappingPolicy>> = Vec::new();
                for binding in bindings {
                    let changed = self.assign(binding);
                    // The ports of a mapping follow each other.
                    if !changed
                        .as_ref()
                        .zip(stricter.last())
                        .is_some_and(|(new, last)| Arc::ptr_eq(new, last))
                    {
                        stricter.extend(changed);
                    }
                }
                stricter.iter().for_each(|policy| self.cut_denied(policy));
                // There may be other limits now.
                self.resume_all_full();
            }
            Command::Release(ports, done) => {
                self.release(&ports);
                // Closed before anyone hears of it.
                drop(ports);
                // Whoever asked may not wait for it.
                done.send(()).ok();
            }
            // What is pending there is not ours any more.
            Command::Leave => self.listeners.clear(),
            Command::Flows(_) => {}
        }
    }

    /// Serves a listener so from now on. Returns the policy of its mapping if that lets other clients in than before.
    fn assign(&mut self, binding: Binding) -> Option<Arc<MappingPolicy>> {
        let number = binding.port.number();
        if self.listeners.len() <= number {
            self.listeners.resize_with(number + 1, || None);
        }
        let policy = binding.target.policy.clone();
        let previous = self.listeners[number].replace(binding)?.target.policy.clone();
        let is_same = Arc::ptr_eq(&previous.state, &policy.state);
        (is_same && previous.limits.access != policy.limits.access).then_some(policy)
    }

    /// Resets connections whose clients are denied from now on. All that were accepted before are on their workers.
    fn cut_denied(&self, policy: &Arc<MappingPolicy>) {
        for runtime in self.workers.runtimes() {
            let policy = policy.clone();
            runtime.spawn(async move { connections::cut_denied(&policy) });
        }
    }

    /// Accepts what is pending on some listeners, as far as the limits allow, and forgets them.
    fn release(&mut self, ports: &[Arc<WatchedListener>]) {
        let mut ready = Vec::new();
        for port in ports {
            let Some(listener) = self.listeners.get_mut(port.number()).and_then(Option::take) else {
                continue;
            };
            // On an error there is nothing more to be had.
            drop(accept_some(&listener, LONGEST_BACKLOG, &mut self.backends, &mut ready));
            debug!(mapping = %listener.target.port_mapping, "listener closed");
        }
        hand_over(ready, &self.workers);
        self.full.retain(|number| self.listeners.get(*number).is_some_and(Option::is_some));
    }

    /// Services each listener that has something once. Returns whether one of them may have more.
    ///
    /// # Errors
    /// The last listener cannot be served any more.
    fn turn(&mut self, events: &[EpollEvent]) -> io::Result<bool> {
        let mut ready = Vec::new();
        let mut more = false;
        for event in events {
            let number = usize::try_from(event.data() & !LISTENER).unwrap_or(usize::MAX);
            let Some(Some(listener)) = self.listeners.get(number) else { continue };
            if event.events().intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
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
                        log_failure(&listener.target.port_mapping, &error);
                    }
                    // Unless it was asked before, a connection may have ended in between.
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

    /// Listens again on a socket that somebody who has it open, too, has shut down, or that the machine's
    /// administrator has destroyed (`ss --kill`). If that cannot be, it is watched no more.
    ///
    /// # Errors
    /// It cannot be, and no other listener is left.
    fn revive(&mut self, number: usize) -> io::Result<()> {
        static REVIVED: LogLimit = LogLimit::new();

        let Some(Some(Binding { port, target })) = self.listeners.get(number) else { return Ok(()) };
        // As long as it is there, it is reported.
        drop(SockRef::from(port.as_ref()).take_error());
        let mapping = &target.port_mapping;
        match listen_again(port, mapping.host) {
            Ok(()) => {
                if let Some(suppressed) = REVIVED.permit() {
                    warn!(%mapping, suppressed, "the listener was shut down from outside; it listens again");
                }
                Ok(())
            }
            Err(source) => {
                let reason = "the listener was shut down from outside, and cannot listen again";
                error!(%mapping, error = %source, "{reason}; its clients are refused");
                if let Err(error) = port.unwatch() {
                    error!(%mapping, %error, "cannot stop to watch a listener");
                }
                self.listeners[number] = None;
                match self.listeners.iter().any(Option::is_some) {
                    true => Ok(()),
                    false => Err(io::Error::new(source.kind(), format!("{reason}: {source}"))),
                }
            }
        }
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

    /// Nobody waits any more.
    fn end(&mut self) {
        self.backoff.reset();
        self.is_logged = false;
    }
}

/// Sockets to reach backends with that are open before there is a connection for them, one for each family at the
/// most: a client that is accepted can be served.
#[derive(Default)]
struct BackendSockets {
    v4: Option<Socket>,
    v6: Option<Socket>,
}

impl BackendSockets {
    /// One for `backend`, or why there cannot be one.
    ///
    /// # Errors
    /// There is none at the moment, for want of something that others may give back.
    fn take(&mut self, backend: BackendAddr) -> io::Result<io::Result<Socket>> {
        if let Some(socket) = self.of(backend).take() {
            return Ok(Ok(socket));
        }
        match dial::open(backend) {
            Err(error) if is_exhaustion(&error) => Err(error),
            opened => Ok(opened),
        }
    }

    /// Keeps what was not needed for `backend`.
    fn keep(&mut self, backend: BackendAddr, socket: io::Result<Socket>) {
        *self.of(backend) = socket.ok();
    }

    fn of(&mut self, backend: BackendAddr) -> &mut Option<Socket> {
        if backend.socket_addr().is_ipv4() { &mut self.v4 } else { &mut self.v6 }
    }
}

/// Why no more connections were accepted from a listener.
enum Stop {
    /// There was none.
    Empty,
    /// It was enough for one turn.
    Burst,
    /// The mapping has as many as it may have.
    Full,
}

/// Accepts up to `most` connections, and resets those that are not to be served.
///
/// # Errors
/// Why accepting failed; the clients wait in the backlog.
fn accept_some(
    listener: &Binding,
    most: usize,
    backends: &mut BackendSockets,
    ready: &mut Vec<Accepted>,
) -> io::Result<Stop> {
    let Binding { port, target } = listener;
    let (policy, addr) = (&target.policy, target.port_mapping.backend);
    // Of the worker that accepts: the others have theirs from their start.
    reactor::start()?;
    for _ in 0..most {
        let has_room = policy.has_room();
        if !has_room && policy.limits.on_limit == OnLimit::Wait {
            target.is_full();
            return Ok(Stop::Full);
        }
        let backend = backends.take(addr)?;
        let (client, peer) = match socket::accept(port.as_fd()) {
            Ok((client, peer)) => (client, canonical(peer)),
            Err(error) => {
                backends.keep(addr, backend);
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
            debug!(mapping = %target.port_mapping, %error, "an accepted connection lacks an option");
        }
        // Those that are dropped here are reset, as their listener was told (`set_stream_options`).
        if !target.admits(peer) {
            backends.keep(addr, backend);
        } else if !has_room {
            backends.keep(addr, backend);
            target.is_over_limit(peer);
        } else {
            if let Some(dscp) = policy.limits.dscp {
                mark(&client, peer.is_ipv6(), dscp);
                backend.iter().for_each(|backend| mark(backend, addr.socket_addr().is_ipv6(), dscp));
            }
            let guard = ConnectionGuard::take(target);
            match backend {
                Ok(backend) => ready.push(Accepted { client, backend, peer, guard }),
                Err(error) => reset_without_backend(client, peer, &guard, error),
            }
        }
    }
    Ok(Stop::Burst)
}

/// Resets a connection for which no socket towards its backend can be opened.
fn reset_without_backend(client: OwnedFd, peer: SocketAddr, guard: &ConnectionGuard, source: io::Error) {
    let addr = guard.port_mapping().backend.socket_addr();
    report_failed_dial(peer, guard, &DialError::Open { addr, source });
    drop(client);
}

/// Marks what is sent by `socket`.
fn mark(socket: &impl AsFd, ipv6: bool, dscp: Dscp) {
    if let Err(error) = set_traffic_class(socket.as_fd(), ipv6, dscp.bits() << 2) {
        debug!(%error, "a connection goes without its code point");
    }
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

/// Makes a socket that listened at `host` do so again.
fn listen_again(port: &WatchedListener, host: HostSocketAddr) -> io::Result<()> {
    let (socket, host) = (SockRef::from(port), host.socket_addr());
    // One that was destroyed has ended both directions, and so would all that it accepts (tcp_done in net/ipv4/tcp.c).
    connect_unspec(port)?;
    let bound = socket.local_addr()?.as_socket().map(|addr| addr.port());
    if bound != Some(host.port()) {
        // One that the kernel chose is lost with the end of listening (tcp_set_state in net/ipv4/tcp.c).
        socket.bind(&host.into())?;
    }
    socket.listen(BACKLOG)
}

fn watch(listener: &Binding, flags: EpollFlags) {
    if let Err(error) = listener.port.watch(flags) {
        error!(mapping = %listener.target.port_mapping, %error, "cannot change what a listener is watched for");
    }
}

/// Returns connections to workers, each of which is woken once for all that it gets.
fn hand_over(ready: Vec<Accepted>, workers: &Workers) {
    let mut assigned: Vec<(WorkerSlot, Accepted)> =
        ready.into_iter().map(|client| (workers.slot(), client)).collect();
    assigned.sort_by_key(|(slot, _client)| slot.worker());
    while let Some((slot, _client)) = assigned.last() {
        let (worker, runtime) = (slot.worker(), slot.runtime());
        let first = assigned.partition_point(|(slot, _client)| slot.worker() < worker);
        let group = assigned.split_off(first);
        runtime.spawn(async move {
            for (slot, accepted) in group {
                let (client, mapping) = (accepted.peer.ip(), accepted.guard.state().clone());
                connections::spawn(client, &mapping, |entry| dial_and_relay(accepted, slot, entry));
            }
        });
    }
}

fn log_failure(port_mapping: &PortMapping, error: &io::Error) {
    static FAILED: LogLimit = LogLimit::new();

    if let Some(suppressed) = FAILED.permit() {
        warn!(mapping = %port_mapping, error = %explain(error, 2), suppressed, "cannot accept a connection");
    }
}
