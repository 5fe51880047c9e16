//! Handles a listener whose send buffer is full: each flow that sends while it is full gets its own [client
//! socket](super::client_socket), for as long as it uses it.
//!
//! If that is full, too, the client's path is the bottleneck: its own link, or one shared with other clients. Such
//! flows take turns with the listener, so that flows of a saturated link get equal shares.

use std::collections::HashSet;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::epoll::EpollFlags;
use rproxy_mapping::addr::canonical;
use rproxy_sys::udp::dropped;
use tracing::debug;

use super::batch::Batch;
use super::client_socket::ClientSocket;
use super::client_sockets::{Full, GRACE, Retired, Unneeded};
use super::flow::Blocked;
use super::key::FlowKey;
use super::relay::UdpRelay;
use super::routed::Routed;
use super::table::FlowId;
use super::tally::{Tally, Towards, is_lost_peer};
use super::token::{Token, Wanted, event, interest};
use super::turn::{LISTENER_BATCHES, Turn, slots_for};

/// After a client socket could not be opened, flows of the listener do not try again for this long.
pub(super) const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A flow whose client blocks gets no client socket for this long, doubled each time.
const BLOCKED_FOR: Duration = Duration::from_secs(4);

/// The maximum of that time.
const BLOCKED_MOST: Duration = Duration::from_secs(256);

/// How many waiting flows are checked at a time for whether they may get client sockets.
const CHECKED_AT_ONCE: usize = 64;

/// Maximum number of batches that are received at once from a socket that is about to be closed.
const LAST_BATCHES: usize = 64;

impl UdpRelay {
    /// Moves the listener's queue to the flows' own client sockets, as far as these are available.
    pub(super) fn use_client_sockets(&mut self, index: usize) {
        self.listeners[index].full_at = Some(self.turn.start());
        if !self.allows_client_sockets(index) {
            return;
        }
        // All datagrams of a flow take one path, which preserves their order.
        let (mut moved, mut stay) = (HashSet::new(), HashSet::new());
        for _ in 0..self.listeners[index].queue.len() {
            let Some(mut waiting) = self.listeners[index].queue.pop() else { break };
            let id = waiting.flow.filter(|id| self.table.get(*id).is_some());
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

    /// Whether replies of a flow may be in the queue of its listener. Clears the flag, because the caller moves them.
    pub(super) fn take_has_queued(&mut self, id: FlowId) -> bool {
        self.table.get_mut(id).is_some_and(|(_key, flow)| std::mem::take(&mut flow.has_queued))
    }

    /// Whether flows of a listener may get client sockets now.
    fn allows_client_sockets(&self, index: usize) -> bool {
        let listener = &self.listeners[index];
        !listener.is_paused && listener.shared_until.is_none_or(|until| self.turn.start() >= until)
    }

    /// Opens a client socket for a flow, if possible. Returns whether it has one.
    pub(super) fn give_client_socket(&mut self, id: FlowId) -> bool {
        let Some((key, flow)) = self.table.get(id) else { return false };
        if flow.client_socket.is_some() {
            return true;
        }
        let key = *key;
        let is_blocked = flow.blocked.is_some_and(|blocked| self.turn.start() < blocked.until);
        if is_blocked || !self.allows_client_sockets(key.listener as usize) {
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
                let mapping = self.listeners[key.listener as usize].target.name();
                debug!(%mapping, client = %canonical(key.client), %error, "a flow goes on sharing its listener's buffer");
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
        let socket = ClientSocket::bind(key, listener.as_fd(), share, &self.listeners.budget)?;
        self.client_sockets.opened(id, &self.table, now);
        let watched = socket
            .connect()
            .and_then(|()| Ok(self.poll.epoll().add(&socket, event(Token::Client(id), Wanted::RECEIVE))?));
        if let Err(error) = watched {
            // It may have received datagrams already.
            self.retire(socket);
            return Err(error);
        }
        let Some((_key, flow)) = self.table.get_mut(id) else { return Ok(()) };
        flow.client_socket = Some(Box::new(socket));
        // The flow does not wait for the listener any more.
        flow.is_waiting = false;
        interest(self.poll.epoll(), flow.as_fd(), Token::Flow(id), flow.wanted());
        Ok(())
    }

    /// Sends replies of a flow through its client socket. Those that do not fit are queued, and so are later replies.
    pub(super) fn send_by_client_socket(&mut self, id: FlowId, batch: &Batch, datagrams: &[Routed]) {
        let Some((key, flow)) = self.table.get_mut(id) else { return };
        let listener = key.listener as usize;
        let dscp = self.listeners[listener].target.policy.limits.dscp;
        let mut tally = Tally::default();
        flow.answer(&batch.received, datagrams, dscp, &mut tally);
        self.settle_answers(id, listener, tally);
    }

    /// Sends the queued replies of a flow, as far as its socket accepts them.
    fn flush_client_socket(&mut self, id: FlowId) {
        let Some((key, flow)) = self.table.get_mut(id) else { return };
        let Some(client) = &mut flow.client_socket else { return };
        let listener = key.listener as usize;
        let mut tally = Tally::default();
        let (socket, queue) = client.parts();
        queue.flush(socket, &mut tally);
        self.settle_answers(id, listener, tally);
    }

    /// Counts the results of sending replies, and pauses the flow while some are queued.
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

    /// Handles events of a flow's client socket: it is writable, or the client has sent datagrams.
    pub(super) fn serve_client_socket(&mut self, id: FlowId, ready: EpollFlags, batch: &mut Batch) {
        if ready.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLRDHUP) {
            return self.take_client_socket(id);
        }
        if ready.contains(EpollFlags::EPOLLOUT) {
            self.flush_client_socket(id);
        }
        for _ in 0..LISTENER_BATCHES {
            // It may have been closed in favour of another flow.
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

    /// Takes away the client socket of a flow, which continues with the listener.
    fn take_client_socket(&mut self, id: FlowId) {
        let Some((_key, flow)) = self.table.get_mut(id) else { return };
        let Some(socket) = flow.client_socket.take() else { return };
        flow.has_queued |= !socket.queue.is_empty();
        if std::mem::take(&mut flow.is_waiting) {
            interest(self.poll.epoll(), flow.as_fd(), Token::Flow(id), flow.wanted());
        }
        self.retire(*socket);
    }

    /// Retires a client socket: its queue moves to the listener, and so do the client's further datagrams.
    pub(super) fn retire(&mut self, mut socket: ClientSocket) {
        // It is not served until it is closed, so epoll would report its events repeatedly.
        self.poll.epoll().delete(socket.as_fd()).ok();
        let index = socket.key.listener as usize;
        if let Err(error) = socket.disconnect() {
            let listener = self.listeners.get_mut(index);
            let mapping = listener.map(|listener| tracing::field::display(listener.target.name()));
            let client = canonical(socket.key.client);
            debug!(mapping, %client, %error, "a client's socket stays connected until it is closed");
        }
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

    /// Retires the client sockets of all listeners that are served, and forwards the datagrams they have received.
    pub(super) fn retire_all(&mut self) {
        for id in self.client_sockets.take_all() {
            self.take_client_socket(id);
        }
        self.close_retired(None);
    }

    /// Retires the client sockets of flows that do not need them any more, because the listener is not full.
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
        freed.into_iter().for_each(|listener| self.open_for_waiting(listener));
    }

    /// Excludes a flow from client sockets for some time, because its client blocks.
    fn note_blocked(&mut self, id: FlowId) {
        if let Some((_key, flow)) = self.table.get_mut(id) {
            let last = flow.blocked.map_or(BLOCKED_FOR / 2, |blocked| blocked.length);
            let length = (last * 2).min(BLOCKED_MOST);
            flow.blocked = Some(Blocked { until: self.turn.start() + length, length });
        }
        self.take_client_socket(id);
    }

    /// Opens client sockets for flows that wait for a listener, when some are available again.
    fn open_for_waiting(&mut self, index: usize) {
        let mut must_move = false;
        for _ in 0..self.listeners[index].waiting.len().min(CHECKED_AT_ONCE) {
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
            self.use_client_sockets(index);
        }
    }

    /// Forwards datagrams that clients sent to retired sockets. Closes those that the kernel cannot be using any more
    /// at `now`, or all if that is `None`.
    pub(super) fn close_retired(&mut self, now: Option<Instant>) {
        let is_due = |since: Instant| now.is_none_or(|now| now.saturating_duration_since(since) >= GRACE);
        // They are in the order of their retirement.
        let retired = &mut self.client_sockets.retired;
        let due = retired.partition_point(|(since, _socket)| is_due(*since));
        let due = retired.drain(..due).collect();
        self.close_client_sockets(due);
    }

    /// Retires and closes the client sockets of some listeners, which are bound to the listeners' ports.
    pub(super) fn close_client_sockets_of(&mut self, listeners: &HashSet<usize>) {
        self.flows_of(listeners).into_iter().for_each(|id| self.take_client_socket(id));
        let retired = std::mem::take(&mut self.client_sockets.retired);
        let is_theirs = |(_since, socket): &Retired| listeners.contains(&(socket.key.listener as usize));
        let (theirs, others) = retired.into_iter().partition::<Vec<_>, _>(is_theirs);
        self.client_sockets.retired = others.into();
        self.close_client_sockets(theirs);
    }

    /// Forwards the datagrams that retired client sockets have received, and closes them.
    fn close_client_sockets(&mut self, sockets: Vec<Retired>) {
        if sockets.is_empty() {
            return;
        }
        self.turn = Turn::default();
        let mut batch = self.buffers.take();
        sockets.iter().for_each(|(_since, socket)| self.close_client_socket(socket, &mut batch));
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
                // The error of an earlier datagram, which is now cleared.
                Err(_) => {}
            }
        }
        let Some(listener) = self.listeners.get_mut(listener) else { return };
        let mut tally = Tally::default();
        tally.dropped(dropped(socket.as_fd()).unwrap_or_default(), &mut 0);
        tally.settle(&listener.target, Towards::Backend);
    }
}

/// Whether an error of a client socket would also occur on the listener, for all clients.
fn is_the_listeners(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    !matches!(errno, Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EINVAL | libc::EADDRNOTAVAIL))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_on_the_way_to_one_client_is_not_the_listeners() {
        let is_the_listeners = |errno| is_the_listeners(&io::Error::from_raw_os_error(errno));
        for errno in [libc::ENETUNREACH, libc::EHOSTUNREACH, libc::EINVAL, libc::EADDRNOTAVAIL] {
            assert!(!is_the_listeners(errno), "{errno}");
        }
        for errno in [libc::EMFILE, libc::EADDRINUSE, libc::EACCES, libc::ENOBUFS] {
            assert!(is_the_listeners(errno), "{errno}");
        }
    }
}
