//! What is done when the way out of a listener is full: each flow that meets it gets a
//! [socket of its own](super::client_socket) towards its client, for as long as it uses that.
//!
//! If that is full, too, the flow's client is what blocks: by its own link, or by one that it shares with all others. Such
//! flows take turns with the listener, so that those of a saturated link get the same share of it.

use std::collections::HashSet;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::epoll::EpollFlags;
use rproxy_sys::udp::dropped;
use tracing::debug;

use super::batch::Batch;
use super::client_socket::ClientSocket;
use super::client_sockets::{Full, GRACE, Unneeded};
use super::flow::Blocked;
use super::key::FlowKey;
use super::relay::UdpRelay;
use super::table::FlowId;
use super::tally::{Tally, Towards, is_lost_peer};
use super::token::{Token, Wanted, event, interest};
use super::turn::{LISTENER_BATCHES, Turn, slots_for};

/// A listener whose flows cannot have sockets of their own is not asked again for this long.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A flow whose client blocks does without a socket of its own for this long, and for twice that the next time.
const BLOCKED_FOR: Duration = Duration::from_secs(4);

/// That is not for longer than this.
const BLOCKED_MOST: Duration = Duration::from_secs(256);

/// Flows that wait in turn of which it is asked at a time whether they may have sockets of their own.
const MOST_RELIEVED: usize = 64;

/// Batches that are taken at once from a socket that is about to be closed.
const LAST_BATCHES: usize = 64;

impl UdpRelay {
    /// Sends what waits for a listener by sockets of the flows' own, as far as they can have some.
    pub(super) fn relieve(&mut self, index: usize) {
        self.listeners[index].full_at = Some(self.turn.start());
        if !self.can_relieve(index) {
            return;
        }
        // A flow's datagrams stay in order: all of them go one way.
        let (mut moved, mut stay) = (HashSet::new(), HashSet::new());
        for _ in 0..self.listeners[index].queue.len() {
            let Some(mut waiting) = self.listeners[index].queue.pop() else { break };
            let key = waiting.to.map(|client| FlowKey::new(index, client, waiting.source));
            let id = key.and_then(|key| self.table.find(&key));
            let id =
                id.filter(|id| !stay.contains(id) && (self.give_client_socket(*id) || !stay.insert(*id)));
            let socket = id.and_then(|id| self.table.get_mut(id)?.1.client_socket.as_mut());
            match (id, socket) {
                (Some(id), Some(socket)) => {
                    (waiting.to, waiting.source) = (None, None);
                    socket.queue.push(waiting);
                    moved.insert(id);
                }
                _ => self.listeners[index].queue.push(waiting),
            }
        }
        for id in stay {
            if let Some((_key, flow)) = self.table.get_mut(id) {
                flow.has_queued = true;
            }
        }
        for id in moved {
            self.flush_client_socket(id);
        }
    }

    /// Whether answers of a flow may wait on the queue of its listener; the caller moves them.
    pub(super) fn take_has_queued(&mut self, id: FlowId) -> bool {
        self.table.get_mut(id).is_some_and(|(_key, flow)| std::mem::take(&mut flow.has_queued))
    }

    /// Whether flows of a listener may have sockets of their own now.
    fn can_relieve(&self, index: usize) -> bool {
        let listener = &self.listeners[index];
        !listener.is_paused && listener.shared_until.is_none_or(|until| self.turn.start() >= until)
    }

    /// Whether a flow has a socket towards its client. It gets one if it can.
    pub(super) fn give_client_socket(&mut self, id: FlowId) -> bool {
        let Some((key, flow)) = self.table.get(id) else { return false };
        if flow.client_socket.is_some() {
            return true;
        }
        let key = *key;
        let is_blocked = flow.blocked.is_some_and(|blocked| self.turn.start() < blocked.until);
        if is_blocked || !self.can_relieve(key.listener as usize) {
            return false;
        }
        match self.client_sockets.make_room(&mut self.table, self.turn.start()) {
            Err(Full) => return false,
            Ok(None) => {}
            Ok(Some((blocked, true))) => self.note_blocked(blocked),
            Ok(Some((unused, false))) => self.take_client_socket(unused),
        }
        match self.open_client_socket(id, key) {
            Ok(()) => true,
            Err(error) => {
                debug!(%error, "a flow goes on sharing its listener's buffer");
                if is_the_listeners(&error) {
                    let listener = &mut self.listeners[key.listener as usize];
                    listener.shared_until = Some(self.turn.start() + RETRY_AFTER);
                }
                false
            }
        }
    }

    fn open_client_socket(&mut self, id: FlowId, key: FlowKey) -> io::Result<()> {
        let now = self.turn.start();
        let listener = &self.listeners[key.listener as usize];
        let share = self.capacity.shares.each();
        let socket = ClientSocket::bind(key, listener.as_fd(), share, &self.listeners.room)?;
        self.client_sockets.opened(id, &self.table, now);
        let watched = socket
            .connect()
            .and_then(|()| Ok(self.poll.epoll().add(&socket, event(Token::Client(id), Wanted::RECEIVE))?));
        if let Err(error) = watched {
            // It may have got datagrams by now.
            self.retire(socket);
            return Err(error);
        }
        let Some((_key, flow)) = self.table.get_mut(id) else { return Ok(()) };
        flow.client_socket = Some(Box::new(socket));
        // It waits for the listener no more.
        flow.is_waiting = false;
        interest(self.poll.epoll(), flow.as_fd(), Token::Flow(id), flow.wanted());
        Ok(())
    }

    /// Sends answers of a flow by its socket towards the client. What there is no room for waits, and so do the answers
    /// behind it.
    pub(super) fn send_by_client_socket(&mut self, id: FlowId, batch: &Batch, datagrams: &[(FlowId, usize)]) {
        let Some((key, flow)) = self.table.get_mut(id) else { return };
        let listener = key.listener as usize;
        let dscp = self.listeners[listener].target.policy.limits.dscp;
        let mut tally = Tally::default();
        flow.answer(&batch.received, datagrams, dscp, &mut tally);
        self.settle_answers(id, listener, tally);
    }

    /// Sends what waits for the client of a flow, as far as there is room.
    fn flush_client_socket(&mut self, id: FlowId) {
        let Some((key, flow)) = self.table.get_mut(id) else { return };
        let Some(client) = &mut flow.client_socket else { return };
        let listener = key.listener as usize;
        let mut tally = Tally::default();
        let (socket, queue) = client.parts();
        queue.flush(socket, &mut tally);
        self.settle_answers(id, listener, tally);
    }

    /// Counts what became of answers, and lets the flow wait for as long as some of them do.
    fn settle_answers(&mut self, id: FlowId, listener: usize, tally: Tally) {
        let has_lost_peer = tally.has_lost_peer();
        tally.settle(&self.listeners[listener].target, Towards::Clients);
        if has_lost_peer {
            return self.take_client_socket(id);
        }
        let Some((_key, flow)) = self.table.get_mut(id) else { return };
        let Some(client) = &mut flow.client_socket else { return };
        let is_waiting = !client.queue.is_empty();
        if !is_waiting {
            client.full_at = None;
        } else if client.full_at.is_none() {
            client.full_at = Some(self.turn.start());
        }
        if is_waiting != flow.is_waiting {
            interest(self.poll.epoll(), client.as_fd(), Token::Client(id), client.wanted());
            flow.is_waiting = is_waiting;
            interest(self.poll.epoll(), flow.as_fd(), Token::Flow(id), flow.wanted());
        }
    }

    /// Serves a flow's socket towards its client: it has room, or the client has sent something.
    pub(super) fn serve_client_socket(&mut self, id: FlowId, ready: EpollFlags, batch: &mut Batch) {
        if ready.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLRDHUP) {
            return self.take_client_socket(id);
        }
        if ready.contains(EpollFlags::EPOLLOUT) {
            self.flush_client_socket(id);
        }
        for _ in 0..LISTENER_BATCHES {
            // It may have been closed to make room for others.
            let Some((key, flow)) = self.table.get(id) else { return };
            let Some(client) = &flow.client_socket else { return };
            let (key, listener) = (*key, &mut self.listeners[key.listener as usize]);
            let most = slots_for(listener.usual_size);
            match batch.received.recv(client.as_fd(), 0, most, true) {
                Ok(count) => {
                    listener.usual_size = self.turn.take(&batch.received, 0..count, listener.usual_size);
                    self.relay_requests(key.listener as usize, key.local, batch, count);
                    if count < most || self.turn.is_over() {
                        return;
                    }
                }
                Err(error) if is_lost_peer(&error) => return self.take_client_socket(id),
                Err(error) => return self.note_error(key.listener as usize, error, Towards::Clients),
            }
        }
    }

    /// Takes its socket towards the client from a flow, which goes on by way of the listener.
    pub(super) fn take_client_socket(&mut self, id: FlowId) {
        let Some((_key, flow)) = self.table.get_mut(id) else { return };
        let Some(socket) = flow.client_socket.take() else { return };
        flow.has_queued |= !socket.queue.is_empty();
        if std::mem::take(&mut flow.is_waiting) {
            interest(self.poll.epoll(), flow.as_fd(), Token::Flow(id), flow.wanted());
        }
        self.retire(*socket);
    }

    /// No flow has this socket any more: the listener has what waits, and what the client will send.
    pub(super) fn retire(&mut self, mut socket: ClientSocket) {
        // Until it is closed, nothing is done about it, so that what is reported would be so again and again.
        self.poll.epoll().delete(socket.as_fd()).ok();
        if let Err(error) = socket.disconnect() {
            debug!(%error, "a client's socket stays connected until it is closed");
        }
        let index = socket.key.listener as usize;
        if let Some(listener) = self.listeners.get_mut(index) {
            let was_empty = listener.queue.is_empty();
            while let Some(mut waiting) = socket.queue.pop() {
                (waiting.to, waiting.source) = (Some(socket.key.client), socket.key.local);
                listener.queue.push(waiting);
            }
            if was_empty && !listener.queue.is_empty() {
                interest(self.poll.epoll(), listener.as_fd(), Token::Listener(index), listener.wanted());
            }
        }
        self.client_sockets.retire(socket, Instant::now());
    }

    /// Takes all sockets from the flows of listeners that are served, and passes on what they have got.
    pub(super) fn retire_all(&mut self) {
        for id in self.client_sockets.take_all() {
            self.take_client_socket(id);
        }
        self.close_retired(None);
    }

    /// Takes their sockets from flows that do not need them any more, as the way out of the listener is free again.
    pub(super) fn retire_unneeded(&mut self, now: Instant) {
        let Self { client_sockets, listeners, table, .. } = self;
        let was_full = |listener: usize, lately: Instant| {
            let listener = &listeners[listener];
            listener.is_crowded() || listener.full_at.is_some_and(|at| at >= lately)
        };
        let Unneeded { idle, blocked } = client_sockets.unneeded(table, was_full, now);
        let listener_of = |id: &FlowId| Some(table.get(*id)?.0.listener as usize);
        let freed: HashSet<usize> = idle.iter().chain(&blocked).filter_map(listener_of).collect();
        idle.into_iter().for_each(|id| self.take_client_socket(id));
        blocked.into_iter().for_each(|id| self.note_blocked(id));
        freed.into_iter().for_each(|listener| self.relieve_waiting(listener));
    }

    /// A flow does without a socket of its own for some time, as its client is what blocks.
    fn note_blocked(&mut self, id: FlowId) {
        if let Some((_key, flow)) = self.table.get_mut(id) {
            let last = flow.blocked.map_or(BLOCKED_FOR / 2, |blocked| blocked.length);
            let length = (last * 2).min(BLOCKED_MOST);
            flow.blocked = Some(Blocked { until: self.turn.start() + length, length });
        }
        self.take_client_socket(id);
    }

    /// Gives sockets of their own to flows that wait for a listener in turn, as far as there are some again.
    fn relieve_waiting(&mut self, index: usize) {
        let mut must_move = false;
        for _ in 0..self.listeners[index].waiting.len().min(MOST_RELIEVED) {
            let Some(id) = self.listeners[index].waiting.pop_front() else { break };
            if self.table.get(id).is_none_or(|(_key, flow)| !flow.is_waiting) {
                continue;
            }
            if self.give_client_socket(id) {
                must_move |= self.take_has_queued(id);
            } else {
                self.listeners[index].waiting.push_back(id);
            }
        }
        if must_move {
            self.relieve(index);
        }
    }

    /// Passes on what clients sent to sockets that no flow has any more, and closes those that nobody can have found for
    /// long enough at `now`; all if that is `None`.
    pub(super) fn close_retired(&mut self, now: Option<Instant>) {
        let is_due = |since: Instant| now.is_none_or(|now| now.saturating_duration_since(since) >= GRACE);
        if !self.client_sockets.retired.front().is_some_and(|(since, _socket)| is_due(*since)) {
            return;
        }
        self.turn = Turn::default();
        let mut batch = self.buffers.take();
        while self.client_sockets.retired.front().is_some_and(|(since, _socket)| is_due(*since))
            && let Some((_since, socket)) = self.client_sockets.retired.pop_front()
        {
            self.close_client_socket(&socket, &mut batch);
        }
        self.buffers.put_back(batch, self.turn.taken());
    }

    fn close_client_socket(&mut self, socket: &ClientSocket, batch: &mut Batch) {
        let FlowKey { listener, local, .. } = socket.key;
        let listener = listener as usize;
        for _ in 0..LAST_BATCHES {
            if self.listeners.get_mut(listener).is_none() {
                return;
            }
            match batch.received.recv(socket.as_fd(), 0, slots_for(0), true) {
                Ok(count) => {
                    self.turn.take(&batch.received, 0..count, 0);
                    self.relay_requests(listener, local, batch, count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // One that an earlier datagram met, which is off the socket now.
                Err(_) => {}
            }
        }
        let Some(listener) = self.listeners.get_mut(listener) else { return };
        let mut tally = Tally::default();
        tally.dropped(dropped(socket.as_fd()).unwrap_or_default(), &mut 0);
        tally.settle(&listener.target, Towards::Backend);
    }
}

/// Whether an error, of a socket for one client, is one that all clients of the listener would meet.
fn is_the_listeners(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    !matches!(errno, Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EINVAL | libc::EADDRNOTAVAIL))
}
