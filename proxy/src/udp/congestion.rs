//! What is done when the way out of a listener is full: each flow that meets it gets a
//! [socket of its own](super::client_socket) towards its client.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::epoll::EpollFlags;
use rproxy_sys::udp::dropped;
use tracing::debug;

use super::batch::Batch;
use super::client_socket::ClientSocket;
use super::client_sockets::Full;
use super::key::FlowKey;
use super::relay::UdpRelay;
use super::table::FlowId;
use super::tally::{Tally, Towards, is_lost_peer};
use super::token::Wanted;
use super::token::{Token, event, interest};
use super::turn::{LISTENER_BATCHES, slots_for};

/// A listener whose flows cannot have sockets of their own is not asked again for this long.
const WITHOUT: Duration = Duration::from_secs(1);

impl UdpRelay {
    /// Sends what waits for a listener by sockets of the flows' own, as far as they can have some.
    pub(super) fn relieve(&mut self, index: usize) {
        let mut moved: Vec<FlowId> = Vec::new();
        for _ in 0..self.listeners[index].queue.len() {
            let Some(mut waiting) = self.listeners[index].queue.pop() else { break };
            let key = waiting.to.map(|client| FlowKey::new(number_of(index), client, waiting.source));
            let id = key.and_then(|key| self.table.find(&key)).filter(|id| self.give_client_socket(*id));
            let socket = id.and_then(|id| self.table.get_mut(id)?.1.client_socket.as_mut());
            match (id, socket) {
                (Some(id), Some(socket)) => {
                    (waiting.to, waiting.source) = (None, None);
                    socket.queue.push(waiting);
                    if !moved.contains(&id) {
                        moved.push(id);
                    }
                }
                _ => self.listeners[index].queue.push(waiting),
            }
        }
        for id in moved {
            self.flush_client_socket(id);
        }
    }

    /// Whether a flow has a socket towards its client. It gets one if it can.
    pub(super) fn give_client_socket(&mut self, id: FlowId) -> bool {
        let Some((key, flow)) = self.table.get(id) else { return false };
        if flow.client_socket.is_some() {
            return true;
        }
        let (key, now) = (*key, self.turn.start());
        let listener = &self.listeners[key.listener as usize];
        if listener.is_paused || listener.shared_until.is_some_and(|until| now < until) {
            return false;
        }
        match self.client_sockets.make_room(&mut self.table) {
            Err(Full) => return false,
            Ok(unused) => unused.into_iter().for_each(|unused| self.retire(*unused)),
        }
        match self.open_client_socket(id, key) {
            Ok(()) => true,
            Err(error) => {
                debug!(%error, "the flows of a listener go on sharing its buffer");
                self.listeners[key.listener as usize].shared_until = Some(now + WITHOUT);
                false
            }
        }
    }

    fn open_client_socket(&mut self, id: FlowId, key: FlowKey) -> std::io::Result<()> {
        let listener = &self.listeners[key.listener as usize];
        let socket = ClientSocket::open(key, listener.as_fd(), &self.listeners.room)?;
        self.poll.epoll().add(&socket, event(Token::Client(id), Wanted::RECEIVE))?;
        self.client_sockets.opened(id);
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
        let Some((_key, flow)) = self.table.get_mut(id) else { return };
        if has_lost_peer {
            let socket = flow.client_socket.take();
            return socket.into_iter().for_each(|socket| self.retire(*socket));
        }
        let Some(client) = &flow.client_socket else { return };
        let is_waiting = !client.queue.is_empty();
        if is_waiting != flow.is_waiting {
            flow.is_waiting = is_waiting;
            interest(self.poll.epoll(), flow.as_fd(), Token::Flow(id), flow.wanted());
            interest(self.poll.epoll(), client.as_fd(), Token::Client(id), client.wanted());
        }
    }

    /// Serves a flow's socket towards its client: it has room, or the client has sent something.
    pub(super) fn serve_client_socket(&mut self, id: FlowId, ready: EpollFlags, batch: &mut Batch) {
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
                Err(error) => {
                    if is_lost_peer(&error) {
                        let socket =
                            self.table.get_mut(id).and_then(|(_key, flow)| flow.client_socket.take());
                        socket.into_iter().for_each(|socket| self.retire(*socket));
                    }
                    return self.note_error(key.listener as usize, error, Towards::Clients);
                }
            }
        }
    }

    /// A flow does without its socket towards the client from now on: the listener has what waits, and what the client
    /// will send.
    pub(super) fn retire(&mut self, mut socket: ClientSocket) {
        self.client_sockets.open -= 1;
        let index = socket.key.listener as usize;
        let Some(listener) = self.listeners.get_mut(index) else { return };
        let mut tally = Tally::default();
        tally.dropped(dropped(socket.as_fd()).unwrap_or_default(), &mut 0);
        tally.settle(&listener.target, Towards::Backend);
        let was_empty = listener.queue.is_empty();
        while let Some(mut waiting) = socket.queue.pop() {
            (waiting.to, waiting.source) = (Some(socket.key.client), socket.key.local);
            listener.queue.push(waiting);
        }
        if was_empty && !listener.queue.is_empty() {
            interest(self.poll.epoll(), listener.as_fd(), Token::Listener(index), listener.wanted());
        }
        if let Err(error) = socket.disconnect() {
            debug!(%error, "a client's socket stays connected until it is closed");
        }
        self.client_sockets.retired.push(socket);
    }

    /// Takes all sockets from the flows of listeners that are served.
    pub(super) fn retire_all(&mut self) {
        let ids: Vec<FlowId> = self.client_sockets.clock.drain(..).collect();
        for id in ids {
            let Some((key, flow)) = self.table.get_mut(id) else { continue };
            if flow.client_socket.is_none() {
                continue;
            }
            if self.listeners[key.listener as usize].is_closing() {
                self.client_sockets.clock.push_back(id);
                continue;
            }
            let socket = flow.client_socket.take();
            if std::mem::take(&mut flow.is_waiting) {
                interest(self.poll.epoll(), flow.as_fd(), Token::Flow(id), flow.wanted());
            }
            socket.into_iter().for_each(|socket| self.retire(*socket));
        }
    }

    /// Closes sockets that no flow has any more, after what their clients sent to them has been passed on.
    pub(super) fn close_retired(&mut self) {
        if self.client_sockets.retired.is_empty() {
            return;
        }
        let mut batch = self.buffers.take();
        while let Some(socket) = self.client_sockets.retired.pop() {
            let FlowKey { listener, local, .. } = socket.key;
            let listener = listener as usize;
            while self.listeners.get_mut(listener).is_some()
                && let Ok(count) = batch.received.recv(socket.as_fd(), 0, slots_for(0), true)
            {
                self.relay_requests(listener, local, &mut batch, count);
            }
        }
        self.buffers.put_back(batch, 0);
    }
}

/// The number of a listener as keys have it.
fn number_of(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}
