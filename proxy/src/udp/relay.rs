//! The task that serves all UDP mappings of a process.
//!
//! One epoll instance watches the listeners and the flows' sockets, and the runtime watches that.
//! Each turn takes a bounded batch from each socket that has something, so that no flow waits for
//! another one's backlog. The flows of a listener share its way out: while that is full, answers stay
//! in the sockets of their flows, each of which gets the same share of it, in turn.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use nix::sys::epoll::{Epoll, EpollEvent, EpollFlags};
use rproxy_sys::udp::{BATCH, RecvBatch, Transmit};
use socket2::SockRef;
use tracing::{debug, error, warn};

use super::capacity::{Capacity, has_run_out};
use super::flow::{Flow, FlowKey, Wanted};
use super::listeners::Listeners;
use super::payload::{Part, Payload};
use super::shares::AT_A_TIME;
use super::table::{Bounds, Ended, FlowId, FlowTable, MappingId, Side};
use super::tally::{Tally, Towards, is_lost_peer};
use super::turn::{Events, Turn, slots_for};
use crate::addr::canonical;
use crate::descriptors::explain;
use crate::log_limit::LogLimit;
use crate::poll::{PORT, Poll};
use crate::service::{Assignment, Route};
use crate::stats::Trouble;
use crate::task::{FlowOrder, Order, Orders};

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

/// Memory of the batch that is kept for what comes next.
const KEPT_BYTES: usize = 64 * 1024;

/// More than that is given back when less was received within this time.
const IN_USE: Duration = Duration::from_secs(1);

/// Flows that expire, and sockets of ended ones that are closed, in one turn: thousands may end at a
/// time, and closing a socket takes some microseconds.
const ENDS_PER_TURN: usize = 64;

/// All UDP mappings of a process.
pub(crate) struct UdpRelay {
    pub(super) poll: Poll,
    orders: Orders,
    pub(super) listeners: Listeners,
    pub(super) table: FlowTable<FlowKey, Flow>,
    pub(super) capacity: Capacity,
    /// Where the flows begin that are yet to get another share of the kernel's memory, if there are any.
    next_share: Option<usize>,
    /// Flows that are over, whose sockets are yet to be closed.
    ended: VecDeque<Ended<Flow>>,
    /// Made when the first datagram arrives: an idle mapping has no buffers.
    batch: Option<Box<RecvBatch>>,
    /// Bytes received since the batch was looked at last, about.
    taken: usize,
    /// When the batch is looked at next, if it has more memory than is kept.
    next_look: Option<Instant>,
    /// Which flow the datagram in each slot of the batch belongs to.
    slots: Vec<(FlowId, usize)>,
    turn: Turn,
    /// Tells whether there are flows, so that connections go to other workers.
    has_flows: Arc<AtomicBool>,
    draining: bool,
    /// Why no listener is left, if that is so.
    failed: Option<io::Error>,
}

impl UdpRelay {
    /// A relay without mappings. `beside_tcp` says whether connections need descriptors too; `has_flows` is
    /// told whether there are flows. It ends when nobody can give `orders` any more.
    pub(crate) fn new(poll: Poll, orders: Orders, beside_tcp: bool, has_flows: Arc<AtomicBool>) -> Self {
        let capacity = Capacity::of_this_host(beside_tcp);
        Self {
            poll,
            orders,
            listeners: Listeners::default(),
            table: FlowTable::new(capacity.most(Instant::now())),
            capacity,
            next_share: None,
            ended: VecDeque::new(),
            batch: None,
            taken: 0,
            next_look: None,
            slots: Vec::new(),
            turn: Turn::default(),
            has_flows,
            draining: false,
            failed: None,
        }
    }

    /// Relays until nobody can give orders any more, and then until the flows are quiet.
    ///
    /// # Errors
    /// What epoll_wait(2) answered, or what became of the last listener; nothing is served any more then.
    pub(crate) async fn run(mut self) -> io::Result<()> {
        let mut events = Events::new();
        let mut alarm = pin!(tokio::time::sleep(Duration::ZERO));
        let mut turns = 0_u32;
        while !(self.draining && self.is_quiet(Instant::now())) {
            tokio::select! {
                // Orders first: under a flood there is always another datagram.
                biased;
                order = self.orders.recv(), if !self.draining => match order {
                    Some(order) => self.obey(order),
                    None => self.draining = true,
                },
                count = self.poll.wait(events.room()), if events.is_over() => events.refill(count?),
                () = std::future::ready(()), if !events.is_over() || !self.ended.is_empty() => {}
                () = &mut alarm, if self.has_deadline() => {}
            }
            self.serve(&mut events);
            if let Some(error) = self.failed.take() {
                return Err(error);
            }
            let now = Instant::now();
            self.end_some(now);
            self.share_out();
            self.give_back(now);
            let has_flows = self.table.len() > 0;
            if has_flows != self.has_flows.load(Ordering::Relaxed) {
                self.has_flows.store(has_flows, Ordering::Relaxed);
            }
            if self.has_deadline() {
                let deadline = tokio::time::Instant::from_std(self.next_deadline());
                if alarm.is_elapsed() || deadline < alarm.deadline() {
                    alarm.as_mut().reset(deadline);
                }
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
            Order::Serve(assignments) => self.assign(assignments),
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
            Order::Flows(FlowOrder::GiveWay(ports, done)) => {
                self.give_way(&ports);
                // Whoever asked may not wait for it.
                done.send(()).ok();
            }
        }
    }

    /// Serves listeners so from now on. Flows that are not served so any more end: clients that go on get
    /// others. Those that are get the new bounds.
    fn assign(&mut self, assignments: Vec<Assignment>) {
        let now = Instant::now();
        let (mut theirs, mut access) = (HashSet::new(), HashSet::new());
        let mut limits = HashMap::new();
        for assignment in assignments {
            let (number, new) = (assignment.port.number(), assignment.route.clone());
            self.capacity.ask(&new.service.limits);
            let Some(old) = self.listeners.assign(assignment, now) else { continue };
            if mapping_of(&old) != mapping_of(&new) || old.forward.backend != new.forward.backend {
                theirs.insert(number);
            } else if old.service.limits.access != new.service.limits.access {
                access.insert(number);
            }
            if old.service.limits != new.service.limits {
                limits.insert(mapping_of(&new), new);
            }
        }
        self.end_flows(|listeners, key| {
            let number = key.listener as usize;
            theirs.contains(&number)
                || access.contains(&number) && !listeners[number].route.service.would_admit(key.client.ip())
        });
        self.table.set_most(self.capacity.most(now));
        for (mapping, route) in limits {
            let bounds = self.capacity.bounds(mapping, &route.service.limits, now);
            self.table.rebound(&bounds, now);
            while let Some(ended) = self.table.surplus(&bounds) {
                self.displace(ended);
            }
        }
    }

    /// Closes the released listeners whose flows are quiet.
    fn close_listeners(&mut self, now: Instant) {
        let closed: HashSet<usize> = self.listeners.close(now, QUIET).into_iter().collect();
        if !closed.is_empty() {
            self.end_flows(|_listeners, key| closed.contains(&(key.listener as usize)));
        }
    }

    /// Ends some flows. They are gone at once; their sockets are closed by and by.
    fn end_flows(&mut self, are_over: impl Fn(&Listeners, &FlowKey) -> bool) {
        let Self { table, listeners, .. } = self;
        let over = table.iter().filter(|(_id, key, _at)| are_over(listeners, key));
        let over: Vec<FlowId> = over.map(|(id, _key, _at)| id).collect();
        for id in over {
            if let Some(ended) = self.table.remove(id) {
                self.end(ended);
            }
        }
    }

    /// A flow had to go because there was no room for all.
    fn displace(&mut self, ended: Ended<Flow>) {
        ended.flow.route().service.live.stats.count(Trouble::FlowDisplaced);
        self.end(ended);
    }

    /// A flow is over.
    pub(super) fn end(&mut self, ended: Ended<Flow>) {
        let mut tally = Tally::default();
        tally.overflow(ended.flow.unsent() as u64);
        tally.settle(ended.flow.route(), Towards::Backend);
        self.ended.push_back(ended);
    }

    /// Gives flows their share of the kernel's memory when there are more or fewer than before: some in each turn.
    fn share_out(&mut self) {
        let shares = &mut self.capacity.shares;
        if shares.set_flows(self.table.len()) {
            self.next_share = Some(0);
        }
        let Some(first) = self.next_share else { return };
        let (some, next) = self.table.some_from(first, AT_A_TIME);
        some.for_each(|flow| flow.set_share(shares.each()));
        self.next_share = next;
    }

    /// Ends flows whose time is over, and closes sockets of ended ones: as many as do not hold up others.
    fn end_some(&mut self, now: Instant) {
        if self.listeners.are_closing() {
            self.close_listeners(now);
        }
        for _ in 0..ENDS_PER_TURN {
            let Some(ended) = self.table.expire(now) else { break };
            self.end(ended);
        }
        self.close_ended(ENDS_PER_TURN);
    }

    fn close_ended(&mut self, most: usize) {
        for _ in 0..most {
            let Some(Ended { flow, last_active }) = self.ended.pop_front() else { return };
            if flow.is_shared {
                // The other process has the socket open, and then closing it does not end the reports.
                self.poll.epoll().delete(flow.as_fd()).ok();
            }
            self.capacity.ports.given_back(flow.port, last_active);
        }
        if self.ended.is_empty() {
            self.ended.shrink_to_fit();
        }
    }

    /// Gives the memory back that a burst left in the batch, unless bursts go on.
    fn give_back(&mut self, now: Instant) {
        if self.next_look.is_some_and(|at| now < at) {
            return;
        }
        let Some(batch) = self.batch.as_mut().filter(|batch| batch.memory() > KEPT_BYTES) else { return };
        if self.next_look.is_some() && self.taken < batch.memory() {
            batch.give_back();
        }
        self.next_look = (batch.memory() > KEPT_BYTES).then(|| now + IN_USE);
        self.taken = 0;
    }

    fn is_quiet(&self, now: Instant) -> bool {
        self.table.last_active().is_none_or(|at| now.saturating_duration_since(at) >= QUIET)
    }

    /// Whether there is something to do without any datagram.
    fn has_deadline(&self) -> bool {
        self.table.len() > 0 || self.listeners.are_closing() || self.next_look.is_some()
    }

    /// When there is. Traffic only moves it further away, and a new flow nearer.
    fn next_deadline(&self) -> Instant {
        let quiet = self.table.last_active().filter(|_| self.draining).map(|at| at + QUIET);
        let closing = self.listeners.are_closing().then(|| Instant::now() + QUIET);
        let next = [self.table.next_expiry(), quiet, closing, self.next_look].into_iter().flatten().min();
        next.unwrap_or_else(Instant::now)
    }

    /// Looks after sockets that have something, each once, until the turn is over.
    fn serve(&mut self, events: &mut Events) {
        if events.is_over() {
            return;
        }
        self.turn = Turn::default();
        let now = Instant::now();
        let mut batch = self.batch.take().unwrap_or_default();
        let mut replies = 0;
        while !self.turn.is_over()
            && let Some(event) = events.next()
        {
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
        self.taken = self.taken.saturating_add(self.turn.taken());
    }

    fn serve_listener(&mut self, index: usize, ready: EpollFlags, batch: &mut RecvBatch, now: Instant) {
        if self.listeners.get_mut(index).is_none() {
            // It was reported before the order came that says what it is for.
            return;
        }
        if ready.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLRDHUP) {
            return self.give_up(index);
        }
        if ready.contains(EpollFlags::EPOLLOUT) {
            self.serve_waiting(index, batch, now);
        }
        if self.listeners[index].is_paused {
            return;
        }
        for _ in 0..LISTENER_BATCHES {
            let listener = &mut self.listeners[index];
            let most = slots_for(listener.usual_size).min(BATCH);
            match batch.recv(listener.as_fd(), 0, most, true) {
                Ok(count) => {
                    listener.usual_size = self.turn.take(batch, 0..count, listener.usual_size);
                    self.forward(index, batch, count, now);
                    if count < most || self.turn.is_over() {
                        return;
                    }
                }
                Err(error) => return self.note_error(index, error, Towards::Clients),
            }
        }
    }

    /// Closes a listener that somebody who has it open, too, has shut down, which cannot be undone: it would be reported
    /// for ever.
    fn give_up(&mut self, index: usize) {
        let reason = "the listener was shut down from outside";
        let listener = &self.listeners[index];
        error!(mapping = %listener.route.forward, "{reason}; its clients are not served any more");
        // Others may have it open, and then closing it does not end the reports.
        self.poll.epoll().delete(listener.as_fd()).ok();
        self.end_flows(|_listeners, key| key.listener as usize == index);
        self.listeners.close_one(index);
        if self.listeners.iter_served().next().is_none() {
            self.failed = Some(io::Error::other(reason));
        }
    }

    /// Receiving met an error, which is one of a datagram that left before; or there is nothing.
    fn note_error(&self, listener: usize, error: io::Error, to: Towards) {
        if error.kind() != io::ErrorKind::WouldBlock {
            let mut tally = Tally::default();
            tally.lose(1, error);
            tally.settle(&self.listeners[listener].route, to);
        }
    }

    /// Sends the `count` datagrams in `batch` to the backend, each through its flow.
    fn forward(&mut self, listener: usize, batch: &RecvBatch, count: usize, now: Instant) {
        self.slots.clear();
        let number = u32::try_from(listener).unwrap_or(u32::MAX);
        let mut previous: Option<(FlowKey, FlowId)> = None;
        for slot in 0..count {
            let Some(client) = batch.sender(slot) else { continue };
            let key = FlowKey::new(number, client, batch.control(slot).local);
            let id = match previous {
                Some((same, id)) if same == key => id,
                _ => match self.find_or_open(&key, batch, now) {
                    Some(id) => id,
                    None => {
                        // Its flow may have had to go for this one.
                        previous = None;
                        continue;
                    }
                },
            };
            previous = Some((key, id));
            self.slots.push((id, slot));
        }
        self.send_to_backend(listener, batch, now);
    }

    /// Sends the datagrams in the slots to the backend.
    fn send_to_backend(&mut self, listener: usize, batch: &RecvBatch, now: Instant) {
        if self.slots.is_empty() {
            return;
        }
        // A flow's datagrams stay in order: the sort is stable.
        self.slots.sort_by_key(|(id, _slot)| id.to_u64());
        let mut tally = Tally::default();
        for datagrams in self.slots.chunk_by(|a, b| a.0 == b.0) {
            let id = datagrams[0].0;
            let Some((_key, flow)) = self.table.get_mut(id) else { continue };
            if flow.send(batch, datagrams, &mut tally) {
                interest(self.poll.epoll(), flow.as_fd(), Token::Flow(id), flow.wanted());
            }
        }
        if tally.has_lost_peer() {
            self.end_disconnected();
        }
        self.slots.clear();
        let listener = &mut self.listeners[listener];
        listener.last_active = now;
        tally.settle(&listener.route, Towards::Backend);
    }

    /// Ends flows of the slots whose sockets have no peer any more: the next datagram opens others.
    #[cold]
    fn end_disconnected(&mut self) {
        let ids: HashSet<FlowId> = self.slots.iter().map(|(id, _slot)| *id).collect();
        for id in ids {
            let is_connected = self
                .table
                .get(id)
                .is_some_and(|(_key, flow)| SockRef::from(&flow.as_fd()).peer_addr().is_ok());
            if !is_connected && let Some(ended) = self.table.remove(id) {
                self.end(ended);
            }
        }
    }

    /// The flow with `key`, opened if it is not there. What is in the slots may be sent first.
    fn find_or_open(&mut self, key: &FlowKey, batch: &RecvBatch, now: Instant) -> Option<FlowId> {
        static FAILED: LogLimit = LogLimit::new();

        if let Some(id) = self.table.find(key) {
            self.table.touch(id, Side::Client, now);
            return Some(id);
        }
        let index = key.listener as usize;
        let route = self.listeners[index].route.clone();
        let stats = &route.service.live.stats;
        if self.draining || self.listeners[index].is_closing() {
            stats.count(Trouble::FlowFailed);
            return None;
        }
        if self.listeners.own_ports.is_forged(key.client, &route.forward) {
            stats.count(Trouble::Forged);
            log_forged(&route, key);
            return None;
        }
        if !route.admits(key.client) {
            return None;
        }
        match self.open(key, &route, batch, now) {
            Ok(id) => Some(id),
            Err(error) => {
                stats.count(Trouble::FlowFailed);
                if let Some(suppressed) = FAILED.permit() {
                    warn!(mapping = %route.forward, client = %canonical(key.client), error = explain(&error, 1), suppressed, "cannot open a flow");
                }
                None
            }
        }
    }

    /// Opens a flow, for which others may have to go.
    fn open(
        &mut self,
        key: &FlowKey,
        route: &Arc<Route>,
        batch: &RecvBatch,
        now: Instant,
    ) -> io::Result<FlowId> {
        let source = key.client.ip();
        self.table.set_most(self.capacity.most(now));
        let bounds = self.capacity.bounds(mapping_of(route), &route.service.limits, now);
        if self.table.is_full(&bounds, source) {
            // A flow that goes has sent what came for it.
            self.send_to_backend(key.listener as usize, batch, now);
            self.make_room(&bounds, key);
        }
        let mut flow = match self.capacity.open(route, now) {
            Err(error) if has_run_out(&error) => {
                self.capacity.learn(self.table.len(), now);
                self.send_to_backend(key.listener as usize, batch, now);
                if let Some(ended) = self.table.evict() {
                    self.displace(ended);
                }
                // More may have ended that are still open.
                self.close_ended(ENDS_PER_TURN);
                self.capacity.open(route, now)?
            }
            opened => opened?,
        };
        let port = flow.port;
        let id = self.table.next_id();
        if let Err(error) = self.poll.epoll().add(&flow, event(Token::Flow(id), Wanted::RECEIVE)) {
            self.capacity.ports.given_back(port, now);
            return Err(error.into());
        }
        flow.set_share(self.capacity.shares.each());
        self.table.insert(*key, (&bounds, source), flow, now);
        Ok(id)
    }

    /// Takes a flow out so that there is room for another one; and one more if there are fewer places than
    /// before. All at once would be too many, for what others leave is an estimate.
    pub(super) fn make_room(&mut self, bounds: &Bounds, key: &FlowKey) {
        for _ in 0..2 {
            let Some(ended) = self.table.make_room(bounds, key.client.ip()) else { break };
            self.displace(ended);
        }
        self.close_ended(2);
    }

    /// Ends flows at some local ports, which somebody else is to have.
    fn give_way(&mut self, ports: &[u16]) {
        let Self { table, .. } = self;
        let theirs = table.iter().filter_map(|(id, _key, _at)| Some((id, table.get(id)?.1.port)));
        let theirs: Vec<FlowId> =
            theirs.filter(|(_id, port)| ports.contains(port)).map(|(id, _port)| id).collect();
        for id in theirs {
            if let Some(ended) = self.table.remove(id) {
                self.displace(ended);
            }
        }
        // One of them may have ended before.
        self.close_ended(self.ended.len());
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
        let mut tally = Tally::default();
        if ready.contains(EpollFlags::EPOLLOUT) {
            flow.flush(&mut tally);
        }
        if flow.is_waiting {
            // Not asked for answers, but an error is told nevertheless, until it is taken.
            flow.take_error(&mut tally);
        } else if listener.is_crowded() {
            flow.is_waiting = true;
            listener.waiting.push_back(id);
        }
        tally.settle(&listener.route, Towards::Backend);
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
            let mut tally = Tally::default();
            let listener = &mut self.listeners[index];
            let is_empty = listener.flush(&mut tally);
            tally.settle(&listener.route, Towards::Clients);
            if !is_empty {
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
        let Some((key, flow)) = self.table.get_mut(id) else { return false };
        let most = most.min(slots_for(flow.usual_size)).min(BATCH - *replies);
        let count = match batch.recv(flow.as_fd(), *replies, most, false) {
            Ok(count) => count,
            // Nothing, or the error of a datagram that found no one: the next one may.
            Err(error) => {
                let listener = key.listener as usize;
                if is_lost_peer(&error)
                    && let Some(ended) = self.table.remove(id)
                {
                    self.end(ended);
                } else {
                    self.note_error(listener, error, Towards::Backend);
                }
                return false;
            }
        };
        flow.usual_size = self.turn.take(batch, *replies..*replies + count, flow.usual_size);
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
        let mut tally = Tally::default();
        for datagrams in datagrams.chunk_by(|a, b| a.0 == b.0) {
            let id = datagrams[0].0;
            let trains = self.table.get(id).is_some_and(|(_key, flow)| flow.trains_out);
            let mut part = |part| answers.push(Answer { id, trains, part });
            payload.add(batch, datagrams, trains, &mut tally, &mut part);
        }
        let was_crowded = self.listeners[listener].is_crowded();
        for answers in answers.chunk_by(|a, b| a.trains == b.trains) {
            self.send_alike(listener, &payload, answers, &mut tally);
        }
        let listening = &mut self.listeners[listener];
        listening.last_active = self.turn.start();
        tally.settle(&listening.route, Towards::Clients);
        if listening.is_crowded() && !was_crowded {
            interest(self.poll.epoll(), listening.as_fd(), Token::Listener(listener), listening.wanted());
        }
    }

    /// Sends answers that all may, or all may not, go as trains.
    fn send_alike(&mut self, listener: usize, payload: &Payload<'_>, answers: &[Answer], tally: &mut Tally) {
        let message = |answer: &Answer| {
            let (key, _flow) = self.table.get(answer.id)?;
            Some(Transmit { to: Some(key.client), source: key.local, ..answer.part.message(payload) })
        };
        let messages: ArrayVec<Transmit<'_>, BATCH> = answers.iter().filter_map(message).collect();
        let mut refused: ArrayVec<FlowId, BATCH> = ArrayVec::new();
        let trains = answers.first().is_some_and(|answer| answer.trains);
        let mut refuse = |index: usize| refused.push(answers[index].id);
        self.listeners[listener].send(&messages, trains, tally, &mut refuse);
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

/// Which mapping a route is one of: what goes on in it is at one place for as long as it is served.
pub(super) fn mapping_of(route: &Route) -> MappingId {
    MappingId(Arc::as_ptr(&route.service.live).addr())
}

/// Says that a datagram was dropped because no client can have sent it.
fn log_forged(route: &Route, key: &FlowKey) {
    static FORGED: LogLimit = LogLimit::new();
    if let Some(suppressed) = FORGED.permit() {
        let source = canonical(key.client);
        warn!(mapping = %route.forward, %source, suppressed, "datagram dropped: its source is no client's");
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
    flags.set(EpollFlags::EPOLLRDHUP, matches!(token, Token::Listener(_)));
    EpollEvent::new(flags, token.to_u64())
}
