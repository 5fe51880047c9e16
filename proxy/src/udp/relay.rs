//! The task that serves all UDP mappings of a process.
//!
//! One epoll instance watches the listeners and the flows' sockets, and the runtime watches that.
//! Each turn takes a bounded batch from each socket that has something, so that no flow waits for
//! another one's backlog. The flows of a listener share its way out: while that is full, answers stay
//! in the sockets of their flows, each of which gets the same share of it, in turn.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use nix::libc;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use nix::sys::resource::{Resource, getrlimit};
use rproxy_sys::udp::{BATCH, RecvBatch, Transmit};
use tracing::{debug, error, warn};

use super::flow::{Flow, FlowKey, Wanted};
use super::listeners::Listeners;
use super::payload::{Amount, Part, Payload};
use super::send::log_lost;
use super::table::{Bounds, FlowId, FlowTable, Side};
use crate::addr::canonical;
use crate::limits::Limits;
use crate::log_limit::LogLimit;
use crate::poll::{PORT, Poll};
use crate::service::Route;
use crate::stats::Trouble;
use crate::task::{FlowOrder, Order, Orders};

/// Sockets looked after in one turn.
const EVENTS: usize = 256;

/// Batches taken from a listener in one turn, before flows get theirs.
const LISTENER_BATCHES: usize = 4;

/// Datagrams, or trains of them, taken from a flow in one turn.
const FLOW_BATCH: usize = BATCH / 2;

/// The same from each flow that waits for its listener: what is taken has to leave before others get
/// their turn.
const WAITING_BATCH: usize = 4;

/// Turns after which other tasks of the worker get theirs, however much there is to do here.
const TURNS_IN_A_ROW: u32 = 2;

/// When draining, flows are over once none had traffic for this long.
const QUIET: Duration = Duration::from_secs(1);

/// Descriptors kept for other things than flows.
const RESERVED_DESCRIPTORS: usize = 64;

/// All UDP mappings of a process.
pub(crate) struct UdpRelay {
    pub(super) poll: Poll,
    orders: Orders,
    pub(super) listeners: Listeners,
    pub(super) table: FlowTable<FlowKey, Flow>,
    /// Made when the first datagram arrives: an idle mapping has no buffers.
    batch: Option<Box<RecvBatch>>,
    /// Which flow the datagram in each slot of the batch belongs to.
    slots: Vec<(FlowId, usize)>,
    draining: bool,
}

impl UdpRelay {
    /// A relay without mappings, whose flows are bounded by `limits`. `beside_tcp` says whether
    /// connections need descriptors too. It ends when nobody can give `orders` any more.
    pub(crate) fn new(poll: Poll, orders: Orders, limits: &Limits, beside_tcp: bool) -> Self {
        Self {
            poll,
            orders,
            listeners: Listeners::default(),
            table: FlowTable::new(bounds(limits, beside_tcp)),
            batch: None,
            slots: Vec::new(),
            draining: false,
        }
    }

    /// Relays until nobody can give orders any more, and then until the flows are quiet.
    ///
    /// # Errors
    /// What epoll_wait(2) answered; nothing is served any more then.
    pub(crate) async fn run(mut self) -> io::Result<()> {
        let mut events = vec![EpollEvent::empty(); EVENTS];
        let mut alarm = pin!(tokio::time::sleep(Duration::ZERO));
        let mut turns = 0_u32;
        while !(self.draining && self.is_quiet(Instant::now())) {
            tokio::select! {
                // Orders and timers first: under a flood there is always another datagram.
                biased;
                order = self.orders.recv(), if !self.draining => {
                    match order {
                        Some(order) => self.obey(order),
                        None => self.draining = true,
                    }
                    alarm.as_mut().reset(tokio::time::Instant::now());
                }
                () = &mut alarm, if self.table.len() > 0 || self.listeners.are_closing() => {
                    self.expire();
                    alarm.as_mut().reset(self.next_deadline().into());
                }
                count = self.poll.wait(&mut events) => self.turn(&events[..count?]),
            }
            turns = turns.wrapping_add(1);
            if turns.is_multiple_of(TURNS_IN_A_ROW) {
                tokio::task::yield_now().await;
            }
        }
        debug!("no UDP flow is active any more");
        Ok(())
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Serve(assignments) => {
                let numbered =
                    assignments.into_iter().map(|assignment| (assignment.port.number(), assignment));
                let anothers = |(number, assignment)| self.listeners.assign(assignment).then_some(number);
                let taken_over: HashSet<usize> = numbered.filter_map(anothers).collect();
                self.end_flows_of(&taken_over);
            }
            Order::Release(ports, done) => {
                let now = Instant::now();
                ports.iter().for_each(|port| self.listeners.release(port.number(), now));
                drop(ports);
                self.close_listeners(now);
                // Whoever asked may not wait for it.
                done.send(()).ok();
            }
            Order::Leave => self.leave(),
            Order::Flows(FlowOrder::Pause(tell)) => drop(tell.send(self.pause())),
            Order::Flows(FlowOrder::Resume) => self.resume(),
            Order::Flows(FlowOrder::Adopt(flows)) => self.adopt(flows),
        }
    }

    /// Closes the released listeners whose flows are quiet.
    fn close_listeners(&mut self, now: Instant) {
        let is_recent = |at: Instant| now.saturating_duration_since(at) < QUIET;
        let recent = self.table.iter().filter(|(_id, _key, last_active)| is_recent(*last_active));
        let busy: HashSet<usize> = recent.map(|(_id, key, _last_active)| key.listener as usize).collect();
        let closed = self.listeners.close(now, |number| busy.contains(&number));
        self.end_flows_of(&closed.into_iter().collect());
    }

    /// Ends the flows of some listeners.
    fn end_flows_of(&mut self, listeners: &HashSet<usize>) {
        if listeners.is_empty() {
            return;
        }
        let theirs = self.table.iter().filter(|(_id, key, _at)| listeners.contains(&(key.listener as usize)));
        let theirs: Vec<FlowId> = theirs.map(|(id, _key, _at)| id).collect();
        for id in theirs {
            drop(self.table.remove(id));
        }
    }

    fn is_quiet(&self, now: Instant) -> bool {
        self.table.last_active().is_none_or(|at| now.saturating_duration_since(at) >= QUIET)
    }

    /// When there is something to do without any datagram. Traffic only moves it further away.
    fn next_deadline(&self) -> Instant {
        let quiet = self.table.last_active().filter(|_| self.draining).map(|at| at + QUIET);
        let closing = self.listeners.are_closing().then(|| Instant::now() + QUIET);
        let next = [self.table.next_expiry(), quiet, closing].into_iter().flatten().min();
        next.unwrap_or_else(Instant::now)
    }

    fn expire(&mut self) {
        let now = Instant::now();
        if self.listeners.are_closing() {
            self.close_listeners(now);
        }
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
        if self.listeners.get_mut(index).is_none() {
            // It was reported before the order came that says what it is for.
            return;
        }
        if ready.contains(EpollFlags::EPOLLOUT) {
            self.serve_waiting(index, batch, now);
        }
        if self.listeners[index].is_paused {
            return;
        }
        for _ in 0..LISTENER_BATCHES {
            match batch.recv(self.listeners[index].as_fd(), 0, BATCH, true) {
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
        let mut amount = Amount::default();
        for datagrams in self.slots.chunk_by(|a, b| a.0 == b.0) {
            let id = datagrams[0].0;
            let Some((_key, flow)) = self.table.get_mut(id) else { continue };
            if flow.send(batch, datagrams, &mut amount) {
                interest(self.poll.epoll(), flow.as_fd(), Token::Flow(id), flow.wanted());
            }
        }
        let stats = &self.listeners[listener].route.service.live.stats;
        stats.datagrams_in.add(amount.datagrams);
        stats.bytes_in.add(amount.bytes);
    }

    /// The flow with `key`, opened if it is not there; noted as active, so that it is not the one to
    /// go when the next one is opened.
    fn find_or_open(&mut self, key: &FlowKey, now: Instant) -> Option<FlowId> {
        static FAILED: LogLimit = LogLimit::new();

        if let Some(id) = self.table.find(key) {
            self.table.touch(id, Side::Client, now);
            return Some(id);
        }
        let listener = &self.listeners[key.listener as usize];
        if self.draining || listener.is_closing() || !listener.route.admits(key.client) {
            return None;
        }
        let route = listener.route.clone();
        // First the new flow, then the end of another one: it may be that none can be opened.
        let opened = open(&mut self.table, &route).and_then(|flow| {
            let source = key.client.ip();
            drop(self.table.make_room(source));
            let id = self.table.next_id();
            self.poll.epoll().add(&flow, event(Token::Flow(id), Wanted::RECEIVE))?;
            Ok(self.table.insert(*key, source, flow, now))
        });
        match opened {
            Ok(id) => {
                self.table.touch(id, Side::Client, now);
                Some(id)
            }
            Err(error) => {
                route.service.live.stats.count(Trouble::FlowFailed);
                if let Some(suppressed) = FAILED.permit() {
                    warn!(mapping = %route.forward, client = %canonical(key.client), %error, suppressed, "cannot open a flow");
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
        let Some((key, flow)) = self.table.get_mut(id) else { return };
        let listener = &mut self.listeners[key.listener as usize];
        let wanted = flow.wanted();
        if ready.contains(EpollFlags::EPOLLOUT) {
            flow.flush();
        }
        if flow.is_waiting {
            // Not asked for answers, but an error is told nevertheless, until it is taken.
            flow.take_error();
        } else if listener.is_crowded() {
            flow.is_waiting = true;
            listener.waiting.push_back(id);
        }
        let is_waiting = flow.is_waiting;
        if flow.wanted() != wanted {
            interest(self.poll.epoll(), flow.as_fd(), Token::Flow(id), flow.wanted());
        }
        if !is_waiting {
            self.receive_answers(id, FLOW_BATCH, batch, replies, now);
        } else if listener.waiting.len() > 2 * self.table.len() + BATCH {
            // A flood may bring many flows that are over before it is their turn.
            listener.waiting.retain(|id| self.table.get(*id).is_some());
        }
    }

    /// Serves the flows that wait for a listener, as far as it has room.
    fn serve_waiting(&mut self, index: usize, batch: &mut RecvBatch, now: Instant) {
        let mut replies = 0;
        for _ in 0..LISTENER_BATCHES {
            if !self.listeners[index].flush() {
                break;
            }
            for _ in 0..self.listeners[index].waiting.len() {
                if replies == BATCH {
                    break;
                }
                self.serve_next_in_turn(index, batch, &mut replies, now);
            }
            self.send_replies(batch, &mut replies);
        }
        let listener = &self.listeners[index];
        interest(self.poll.epoll(), listener.as_fd(), Token::Listener(index), listener.wanted());
    }

    /// Receives the share of the flow that is next in turn. It waits on if there may be more.
    fn serve_next_in_turn(
        &mut self,
        listener: usize,
        batch: &mut RecvBatch,
        replies: &mut usize,
        now: Instant,
    ) {
        let Some(id) = self.listeners[listener].waiting.pop_front() else { return };
        if self.receive_answers(id, WAITING_BATCH, batch, replies, now) {
            self.listeners[listener].waiting.push_back(id);
        } else if let Some((_key, flow)) = self.table.get_mut(id) {
            flow.is_waiting = false;
            interest(self.poll.epoll(), flow.as_fd(), Token::Flow(id), flow.wanted());
        }
    }

    /// Receives up to `most` answers of a flow into the batch, behind the `replies` that are there.
    /// Gives whether it was full, so that there may be more.
    fn receive_answers(
        &mut self,
        id: FlowId,
        most: usize,
        batch: &mut RecvBatch,
        replies: &mut usize,
        now: Instant,
    ) -> bool {
        let Some((_key, flow)) = self.table.get(id) else { return false };
        let most = most.min(BATCH - *replies);
        // Nothing, or the error of a datagram that found no one: the next one may.
        let Ok(count) = batch.recv(flow.as_fd(), *replies, most, false) else { return false };
        self.table.touch(id, Side::Backend, now);
        if *replies == 0 {
            self.slots.clear();
        }
        self.slots.extend((*replies..*replies + count).map(|slot| (id, slot)));
        *replies += count;
        count == most
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
        let mut answers: ArrayVec<Answer, BATCH> = ArrayVec::new();
        let mut amount = Amount::default();
        for datagrams in datagrams.chunk_by(|a, b| a.0 == b.0) {
            let id = datagrams[0].0;
            let trains = self.table.get(id).is_some_and(|(_key, flow)| flow.trains_out);
            amount +=
                payload.add(batch, datagrams, trains, &mut |part| answers.push(Answer { id, trains, part }));
        }
        let was_crowded = self.listeners[listener].is_crowded();
        for answers in answers.chunk_by(|a, b| a.trains == b.trains) {
            self.send_alike(listener, &payload, answers);
        }
        let listening = &self.listeners[listener];
        let stats = &listening.route.service.live.stats;
        stats.datagrams_out.add(amount.datagrams);
        stats.bytes_out.add(amount.bytes);
        if listening.is_crowded() && !was_crowded {
            interest(self.poll.epoll(), listening.as_fd(), Token::Listener(listener), listening.wanted());
        }
    }

    /// Sends answers that all may, or all may not, go as trains.
    fn send_alike(&mut self, listener: usize, payload: &Payload<'_>, answers: &[Answer]) {
        let message = |answer: &Answer| {
            let (key, _flow) = self.table.get(answer.id)?;
            Some(Transmit { to: Some(key.client), source: key.local, ..answer.part.message(payload) })
        };
        let messages: ArrayVec<Transmit<'_>, BATCH> = answers.iter().filter_map(message).collect();
        let mut refused: ArrayVec<FlowId, BATCH> = ArrayVec::new();
        let trains = answers.first().is_some_and(|answer| answer.trains);
        self.listeners[listener].send(&messages, trains, &mut |index| refused.push(answers[index].id));
        for id in refused {
            if let Some((_key, flow)) = self.table.get_mut(id) {
                flow.trains_out = false;
            }
        }
    }
}

/// A message to a client.
struct Answer {
    id: FlowId,
    /// Whether it may be a train.
    trains: bool,
    part: Part,
}

/// How many flows there may be: what was asked for, or what descriptors and local ports allow.
fn bounds(limits: &Limits, beside_tcp: bool) -> Bounds {
    let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _hard)| soft);
    let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
    let share = if beside_tcp { descriptors / 2 } else { descriptors.saturating_sub(RESERVED_DESCRIPTORS) };
    let most = share.min(local_ports() / 2);
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

/// Which socket an event of the epoll instance is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token {
    Listener(usize),
    Flow(FlowId),
}

impl Token {
    fn to_u64(self) -> u64 {
        match self {
            Self::Listener(index) => PORT | index as u64,
            Self::Flow(id) => id.to_u64(),
        }
    }

    fn from_u64(number: u64) -> Self {
        if number & PORT == 0 {
            return Self::Flow(FlowId::from_u64(number));
        }
        Self::Listener(usize::try_from(number & !PORT).unwrap_or(usize::MAX))
    }
}

/// Changes what a socket is watched for.
pub(super) fn interest(epoll: &Epoll, socket: BorrowedFd<'_>, token: Token, wanted: Wanted) {
    if let Err(error) = epoll.modify(socket, &mut event(token, wanted)) {
        error!(%error, ?token, "cannot change what a UDP socket is watched for");
    }
}

pub(super) fn event(token: Token, wanted: Wanted) -> EpollEvent {
    let mut flags = EpollFlags::empty();
    flags.set(EpollFlags::EPOLLIN, wanted.receive);
    flags.set(EpollFlags::EPOLLOUT, wanted.send);
    EpollEvent::new(flags, token.to_u64())
}

/// Opens a flow's socket. Descriptors or local ports may run out below the cap, which is taken as the
/// cap.
fn open(table: &mut FlowTable<FlowKey, Flow>, route: &Arc<Route>) -> io::Result<Flow> {
    let has_run_out = |error: &io::Error| {
        // connect(2) gives the last two when all local ports are taken.
        const RUN_OUT: [i32; 4] = [libc::EMFILE, libc::ENFILE, libc::EAGAIN, libc::EADDRNOTAVAIL];
        error.raw_os_error().is_some_and(|errno| RUN_OUT.contains(&errno))
    };
    match Flow::open(route) {
        Err(error) if has_run_out(&error) && table.evict().is_some() => Flow::open(route),
        opened => opened,
    }
}
