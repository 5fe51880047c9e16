//! The task that serves all UDP mappings of a process.
//!
//! One epoll instance watches the listeners and the flows' sockets, and the runtime watches that.
//! Each turn takes a bounded batch from each socket that has something, so that no flow waits for
//! another one's backlog.

use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::pin;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use nix::errno::Errno;
use nix::libc;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::resource::{Resource, getrlimit};
use rproxy_sys::udp::{BATCH, RecvBatch, Transmit};
use rproxy_sys::watch::Watched;
use tokio::io::Interest;
use tokio::sync::watch;
use tracing::{debug, error, warn};

use super::flow::{Flow, FlowKey};
use super::payload::{Part, Payload};
use super::send::{Backlog, log_lost};
use super::table::{Bounds, FlowId, FlowTable, Side};
use crate::addr::BackendAddr;
use crate::limits::Limits;
use crate::log_limit::LogLimit;
use crate::mapping::Forward;

/// Sockets looked after in one turn.
const EVENTS: usize = 256;

/// Batches taken from a listener in one turn, before flows get theirs.
const LISTENER_BATCHES: usize = 4;

/// Datagrams, or trains of them, taken from a flow in one turn.
const FLOW_BATCH: usize = BATCH / 2;

/// Turns after which other tasks of the worker get theirs, however much there is to do here.
const TURNS_IN_A_ROW: u32 = 2;

/// When draining, flows are over once none had traffic for this long.
const QUIET: Duration = Duration::from_secs(1);

/// Descriptors kept for other things than flows.
const RESERVED_DESCRIPTORS: usize = 64;

/// All UDP mappings of a process.
pub(crate) struct UdpRelay {
    epoll: Epoll,
    watched: Watched,
    listeners: Vec<Listener>,
    table: FlowTable<FlowKey, Flow>,
    /// Made when the first datagram arrives: an idle mapping has no buffers.
    batch: Option<Box<RecvBatch>>,
    /// Which flow the datagram in each slot of the batch belongs to.
    slots: Vec<(FlowId, usize)>,
    draining: bool,
}

struct Listener {
    socket: UdpSocket,
    mapping: Forward,
    backlog: Backlog,
}

impl UdpRelay {
    /// A relay without mappings, whose flows are bounded by `limits`.
    ///
    /// # Errors
    /// What epoll_create1(2) or epoll_ctl(2) answered.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub(crate) fn new(limits: &Limits) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let watched = Watched::new(epoll.0.try_clone()?, Interest::READABLE)?;
        Ok(Self {
            epoll,
            watched,
            listeners: Vec::new(),
            table: FlowTable::new(bounds(limits)),
            batch: None,
            slots: Vec::new(),
            draining: false,
        })
    }

    /// Serves `mapping` on `socket`, which has to be non-blocking.
    ///
    /// # Errors
    /// What epoll_ctl(2) answered.
    pub(crate) fn add(&mut self, mapping: Forward, socket: UdpSocket) -> io::Result<()> {
        let token = Token::Listener(self.listeners.len());
        self.epoll.add(&socket, Wanted::Receive.event(token))?;
        self.listeners.push(Listener { socket, mapping, backlog: Backlog::default() });
        Ok(())
    }

    /// Relays until `stop` changes or its sender is gone, and then until the flows are quiet.
    pub(crate) async fn run(mut self, mut stop: watch::Receiver<()>) {
        let mut events = vec![EpollEvent::empty(); EVENTS];
        let mut alarm = pin!(tokio::time::sleep(Duration::ZERO));
        let mut turns = 0_u32;
        while !(self.draining && self.is_quiet(Instant::now())) {
            tokio::select! {
                // Signals and timers first: under a flood there is always another datagram.
                biased;
                _ = stop.changed(), if !self.draining => {
                    self.draining = true;
                    alarm.as_mut().reset(tokio::time::Instant::now());
                }
                () = &mut alarm, if self.table.len() > 0 => {
                    self.expire();
                    alarm.as_mut().reset(self.next_deadline().into());
                }
                count = wait(&self.watched, &self.epoll, &mut events) => match count {
                    Ok(count) => self.turn(&events[..count]),
                    Err(error) => return error!(%error, "the UDP relay ends: epoll_wait failed"),
                },
            }
            turns = turns.wrapping_add(1);
            if turns.is_multiple_of(TURNS_IN_A_ROW) {
                tokio::task::yield_now().await;
            }
        }
        debug!("no UDP flow is active any more");
    }

    fn is_quiet(&self, now: Instant) -> bool {
        self.table.last_active().is_none_or(|at| now.saturating_duration_since(at) >= QUIET)
    }

    /// When there is something to do without any datagram. Traffic only moves it further away.
    fn next_deadline(&self) -> Instant {
        let quiet = self.table.last_active().filter(|_| self.draining).map(|at| at + QUIET);
        let next = [self.table.next_expiry(), quiet].into_iter().flatten().min();
        next.unwrap_or_else(Instant::now)
    }

    fn expire(&mut self) {
        let now = Instant::now();
        while self.table.expire(now).is_some() {}
    }

    /// Looks after each socket that has something once.
    fn turn(&mut self, events: &[EpollEvent]) {
        let now = Instant::now();
        let mut batch = self.batch.take().unwrap_or_default();
        let mut replies = 0;
        for event in events {
            match Token::from_u64(event.data()) {
                Token::Listener(index) => {
                    self.send_replies(&batch, &mut replies);
                    self.serve_listener(index, event.events(), &mut batch, now);
                }
                Token::Flow(id) => self.serve_flow(id, event.events(), &mut batch, &mut replies, now),
            }
        }
        self.send_replies(&batch, &mut replies);
        self.batch = Some(batch);
    }

    fn serve_listener(&mut self, index: usize, ready: EpollFlags, batch: &mut RecvBatch, now: Instant) {
        if ready.contains(EpollFlags::EPOLLOUT) {
            let Listener { socket, backlog, .. } = &mut self.listeners[index];
            if backlog.flush(socket.as_fd()) {
                interest(&self.epoll, socket.as_fd(), Token::Listener(index), Wanted::Receive);
            }
        }
        for _ in 0..LISTENER_BATCHES {
            match batch.recv(self.listeners[index].socket.as_fd(), 0, BATCH, true) {
                Ok(count) => {
                    self.forward(index, batch, count, now);
                    if count < BATCH {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => return log_lost(&error),
            }
        }
    }

    /// Sends the `count` datagrams in `batch` to the backend, each through its flow.
    fn forward(&mut self, listener: usize, batch: &RecvBatch, count: usize, now: Instant) {
        self.slots.clear();
        let mut previous: Option<(FlowKey, FlowId)> = None;
        for slot in 0..count {
            let Some(client) = batch.sender(slot) else { continue };
            let number = u32::try_from(listener).unwrap_or(u32::MAX);
            let key = FlowKey::new(number, client, batch.control(slot).local);
            let id = match previous {
                Some((same, id)) if same == key => id,
                _ => match self.find_or_open(&key, now) {
                    Some(id) => id,
                    None => continue,
                },
            };
            previous = Some((key, id));
            self.slots.push((id, slot));
        }
        // A flow's datagrams stay in order: the sort is stable.
        self.slots.sort_by_key(|(id, _slot)| id.to_u64());
        for datagrams in self.slots.chunk_by(|a, b| a.0 == b.0) {
            let id = datagrams[0].0;
            let Some((_key, flow)) = self.table.get_mut(id) else { continue };
            if flow.send(batch, datagrams) {
                interest(&self.epoll, flow.as_fd(), Token::Flow(id), Wanted::ReceiveAndSend);
            }
        }
    }

    /// The flow with `key`, opened if it is not there; noted as active, so that it is not the one to
    /// go when the next one is opened.
    fn find_or_open(&mut self, key: &FlowKey, now: Instant) -> Option<FlowId> {
        static FAILED: LogLimit = LogLimit::new();

        if let Some(id) = self.table.find(key) {
            self.table.touch(id, Side::Client, now);
            return Some(id);
        }
        if self.draining {
            return None;
        }
        let source = key.client.ip();
        drop(self.table.make_room(source));
        let mapping = &self.listeners[key.listener as usize].mapping;
        let opened = open(&mut self.table, mapping.backend).and_then(|flow| {
            let id = self.table.next_id();
            self.epoll.add(&flow, Wanted::Receive.event(Token::Flow(id)))?;
            Ok(self.table.insert(*key, source, flow, now))
        });
        match opened {
            Ok(id) => {
                self.table.touch(id, Side::Client, now);
                Some(id)
            }
            Err(error) => {
                if let Some(suppressed) = FAILED.permit() {
                    warn!(%mapping, client = %key.client, %error, suppressed, "cannot open a flow");
                }
                None
            }
        }
    }

    /// Receives what the backend answered into the batch, whose first `replies` slots hold answers
    /// already.
    fn serve_flow(
        &mut self,
        id: FlowId,
        ready: EpollFlags,
        batch: &mut RecvBatch,
        replies: &mut usize,
        now: Instant,
    ) {
        if *replies == BATCH {
            self.send_replies(batch, replies);
        }
        let Some((_key, flow)) = self.table.get_mut(id) else { return };
        if ready.contains(EpollFlags::EPOLLOUT) && flow.flush() {
            interest(&self.epoll, flow.as_fd(), Token::Flow(id), Wanted::Receive);
        }
        let count = match batch.recv(flow.as_fd(), *replies, FLOW_BATCH, false) {
            Ok(count) => count,
            // Nothing, or the error of a datagram that found no one: the next one may.
            Err(_nothing) => return,
        };
        self.table.touch(id, Side::Backend, now);
        if *replies == 0 {
            self.slots.clear();
        }
        self.slots.extend((*replies..*replies + count).map(|slot| (id, slot)));
        *replies += count;
    }

    /// Sends the answers in the first `replies` slots to the clients.
    fn send_replies(&mut self, batch: &RecvBatch, replies: &mut usize) {
        if std::mem::take(replies) == 0 {
            return;
        }
        let slots = std::mem::take(&mut self.slots);
        let listener_of = |(id, _slot): &(FlowId, usize)| Some(self.table.get(*id)?.0.listener);
        let runs: ArrayVec<_, BATCH> = slots
            .chunk_by(|a, b| listener_of(a) == listener_of(b))
            .filter_map(|run| Some((listener_of(run.first()?)?, run)))
            .collect();
        for (listener, run) in runs {
            self.send_to_clients(listener as usize, batch, run);
        }
        self.slots = slots;
    }

    /// Sends answers of flows that share a listener.
    fn send_to_clients(&mut self, listener: usize, batch: &RecvBatch, datagrams: &[(FlowId, usize)]) {
        let mut payload = Payload::new();
        let mut parts: ArrayVec<(FlowId, Part), BATCH> = ArrayVec::new();
        for datagrams in datagrams.chunk_by(|a, b| a.0 == b.0) {
            let id = datagrams[0].0;
            let trains = self.table.get(id).is_some_and(|(_key, flow)| flow.trains_out);
            payload.add(batch, datagrams, trains, &mut |part| parts.push((id, part)));
        }
        let message = |(id, part): &(FlowId, Part)| {
            let (key, _flow) = self.table.get(*id)?;
            Some(Transmit { to: Some(key.client), source: key.local, ..part.message(&payload) })
        };
        let messages: ArrayVec<Transmit<'_>, BATCH> = parts.iter().filter_map(message).collect();
        let Listener { socket, backlog, .. } = &mut self.listeners[listener];
        let mut refused: ArrayVec<FlowId, BATCH> = ArrayVec::new();
        if backlog.send(socket.as_fd(), &messages, &mut |index| refused.push(parts[index].0)) {
            interest(&self.epoll, socket.as_fd(), Token::Listener(listener), Wanted::ReceiveAndSend);
        }
        for id in refused {
            if let Some((_key, flow)) = self.table.get_mut(id) {
                flow.trains_out = false;
            }
        }
    }
}

/// How many flows there may be: what was asked for, or what descriptors and local ports allow.
fn bounds(limits: &Limits) -> Bounds {
    let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _hard)| soft);
    let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
    let most = descriptors.saturating_sub(RESERVED_DESCRIPTORS).min(local_ports() / 2);
    let flows = limits.udp_max_flows.unwrap_or(most).max(1);
    let per_source = limits.udp_max_flows_per_source.unwrap_or(flows.div_ceil(4) * 3).max(1);
    Bounds { flows, flows_per_source: per_source, idle: limits.udp_timeout }
}

/// Ports that the kernel hands out to sockets which do not choose one (ip(7) `ip_local_port_range`).
/// Each flow takes one, and other programs need some.
fn local_ports() -> usize {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let bounds: Vec<usize> = range.split_whitespace().filter_map(|port| port.parse().ok()).collect();
    match bounds[..] {
        [first, last] if first <= last => last - first + 1,
        // The kernel's default.
        _ => 28_232,
    }
}

/// Waits until sockets have something, and says how many are in `events`.
async fn wait(watched: &Watched, epoll: &Epoll, events: &mut [EpollEvent]) -> io::Result<usize> {
    let poll = |_fd: BorrowedFd<'_>| match epoll.wait(events, EpollTimeout::ZERO) {
        Ok(0) | Err(Errno::EINTR) => Err(io::ErrorKind::WouldBlock.into()),
        Ok(count) => Ok(count),
        Err(errno) => Err(errno.into()),
    };
    watched.io(Interest::READABLE, poll).await
}

/// Which socket an event of the epoll instance is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    Listener(usize),
    Flow(FlowId),
}

impl Token {
    /// Set in the numbers of listeners; those of flows leave it clear.
    const LISTENER: u64 = 1 << 63;

    fn to_u64(self) -> u64 {
        match self {
            Self::Listener(index) => Self::LISTENER | index as u64,
            Self::Flow(id) => id.to_u64(),
        }
    }

    fn from_u64(number: u64) -> Self {
        if number & Self::LISTENER == 0 {
            return Self::Flow(FlowId::from_u64(number));
        }
        Self::Listener(usize::try_from(number & !Self::LISTENER).unwrap_or(usize::MAX))
    }
}

/// What a socket is watched for.
#[derive(Clone, Copy)]
enum Wanted {
    Receive,
    /// Also for room to send, because something waits.
    ReceiveAndSend,
}

impl Wanted {
    fn event(self, token: Token) -> EpollEvent {
        let flags = match self {
            Self::Receive => EpollFlags::EPOLLIN,
            Self::ReceiveAndSend => EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT,
        };
        EpollEvent::new(flags, token.to_u64())
    }
}

/// Changes what a socket is watched for.
fn interest(epoll: &Epoll, socket: BorrowedFd<'_>, token: Token, wanted: Wanted) {
    if let Err(error) = epoll.modify(socket, &mut wanted.event(token)) {
        error!(%error, ?token, "cannot change what a UDP socket is watched for");
    }
}

/// Opens a flow's socket. Descriptors or local ports may run out below the cap, which is taken as the
/// cap.
fn open(table: &mut FlowTable<FlowKey, Flow>, backend: BackendAddr) -> io::Result<Flow> {
    let has_run_out = |error: &io::Error| {
        // connect(2) gives the last two when all local ports are taken.
        const RUN_OUT: [i32; 4] = [libc::EMFILE, libc::ENFILE, libc::EAGAIN, libc::EADDRNOTAVAIL];
        error.raw_os_error().is_some_and(|errno| RUN_OUT.contains(&errno))
    };
    match Flow::open(backend) {
        Err(error) if has_run_out(&error) && table.evict().is_some() => Flow::open(backend),
        opened => opened,
    }
}
