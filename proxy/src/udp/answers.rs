//! Forwards replies from backends to clients.
//!
//! The flows of a listener share its send buffer. While it is full, replies stay in the receive buffers of their flows,
//! which take turns and send an equal share each.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::AsFd;

use arrayvec::ArrayVec;
use nix::libc;
use nix::sys::epoll::EpollFlags;
use rproxy_sys::udp::{BATCH, Transmit};

use super::batch::Batch;
use super::flow::Flow;
use super::payload::{Part, Payload};
use super::relay::UdpRelay;
use super::routed::Routed;
use super::table::{FlowId, Side};
use super::tally::{Tally, Towards, is_lost_peer, last_dropped};
use super::token::{Token, interest};
use super::turn::{LISTENER_BATCHES, slots_for};
use crate::state::stats::FailureKind;

/// Datagrams or GSO batches received from a flow per turn.
const FLOW_BATCH: usize = BATCH / 2;

/// The same for each flow that waits for its listener: they have to be sent before other flows take their turn.
const WAITING_BATCH: usize = 4;

impl UdpRelay {
    /// Receives the replies of a flow's backend, and appends them to `batch`.
    pub(super) fn serve_flow(&mut self, id: FlowId, ready: EpollFlags, batch: &mut Batch) {
        if batch.next_slot() == BATCH {
            self.send_answers(batch);
        }
        if ready.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLRDHUP) {
            return self.end_without_peer(id);
        }
        let Some((key, flow)) = self.table.get_mut(id) else { return };
        let listener = &mut self.listeners[key.listener as usize];
        let wanted = flow.wanted();
        let mut tally = Tally::default();
        if ready.contains(EpollFlags::EPOLLOUT) {
            flow.flush(&mut tally);
        }
        if flow.is_waiting {
            // Not watched for replies; but epoll reports an error nevertheless, until it is read.
            flow.take_error(&mut tally);
        }
        let has_lost_peer = tally.has_lost_peer();
        tally.settle(&listener.target, Towards::Backend);
        if has_lost_peer {
            return self.end_without_peer(id);
        }
        if flow.wanted() != wanted {
            interest(self.poll.epoll(), flow.as_fd(), Token::Flow(id), flow.wanted());
        }
        if flow.is_waiting {
            return;
        }
        let index = key.listener as usize;
        if flow.client_socket.is_none() && listener.is_crowded() {
            if !self.give_client_socket(id) {
                return self.wait_in_turn(id);
            }
            if self.take_has_queued(id) {
                self.use_client_sockets(index);
            }
        }
        self.receive_answers(id, FLOW_BATCH, batch);
    }

    /// Leaves the replies of a flow in its socket until its turn to use the listener.
    fn wait_in_turn(&mut self, id: FlowId) {
        let Some((key, flow)) = self.table.get_mut(id) else { return };
        let listener = &mut self.listeners[key.listener as usize];
        (flow.is_waiting, flow.has_queued) = (true, true);
        interest(self.poll.epoll(), flow.as_fd(), Token::Flow(id), flow.wanted());
        listener.waiting.push_back(id);
        if listener.waiting.len() > 2 * self.table.len() + BATCH {
            // A flood may queue many flows that end before their turn.
            listener.waiting.retain(|id| self.table.get(*id).is_some());
        }
    }

    /// Serves the flows that wait for a listener, as far as its send buffer has room.
    pub(super) fn serve_waiting(&mut self, index: usize, batch: &mut Batch) {
        for _ in 0..LISTENER_BATCHES {
            let mut tally = Tally::default();
            let listener = &mut self.listeners[index];
            let is_empty = listener.flush(&mut tally);
            tally.settle(&listener.target, Towards::Clients);
            if !is_empty {
                break;
            }
            for _ in 0..self.listeners[index].waiting.len() {
                if batch.next_slot() == BATCH {
                    break;
                }
                self.serve_next_in_turn(index, batch);
            }
            self.send_answers(batch);
        }
        let listener = &self.listeners[index];
        interest(self.poll.epoll(), listener.as_fd(), Token::Listener(index), listener.wanted());
    }

    /// Receives the share of the next flow in the queue, which stays in the queue if it may have more.
    fn serve_next_in_turn(&mut self, listener: usize, batch: &mut Batch) {
        let Some(id) = self.listeners[listener].waiting.pop_front() else { return };
        if self.table.get(id).is_none_or(|(_key, flow)| flow.client_socket.is_some()) {
            // It has ended, or does not need the listener any more.
            return;
        }
        if self.receive_answers(id, WAITING_BATCH, batch) {
            self.listeners[listener].waiting.push_back(id);
        } else if let Some((_key, flow)) = self.table.get_mut(id) {
            flow.is_waiting = false;
            interest(self.poll.epoll(), flow.as_fd(), Token::Flow(id), flow.wanted());
        }
    }

    /// Receives at most `most` replies of a flow, and appends them to `batch`. Returns whether there may be more.
    fn receive_answers(&mut self, id: FlowId, most: usize, batch: &mut Batch) -> bool {
        let Some((key, flow)) = self.table.get_mut(id) else { return false };
        let first = batch.next_slot();
        let most = most.min(slots_for(flow.usual_size)).min(BATCH - first);
        let count = match batch.received.recv(flow.as_fd(), first, most, flow.peer.is_some()) {
            Ok(count) => count,
            // Nothing, or the error of an earlier datagram; the next call may receive a reply.
            Err(error) => {
                let listener = key.listener as usize;
                if is_lost_peer(&error) {
                    self.end_without_peer(id);
                } else {
                    if error.kind() != ErrorKind::WouldBlock {
                        flow.note_lost(&error);
                    }
                    self.note_error(listener, error, Towards::Backend);
                }
                return false;
            }
        };
        let slots = first..first + count;
        flow.usual_size = self.turn.take(&batch.received, slots.clone(), flow.usual_size);
        let dropped = last_dropped(&batch.received, slots.clone());
        if dropped != 0 {
            let mut tally = Tally::default();
            tally.dropped(dropped, &mut flow.dropped);
            tally.settle(flow.target(), Towards::Clients);
        }
        flow.note_answer();
        let before = batch.slots.len();
        match flow.peer {
            None => batch.slots.extend(slots.map(|slot| Routed::whole(id, slot))),
            Some(_) => take_from_backend(id, flow, batch, slots),
        }
        if batch.slots.len() > before {
            self.table.touch(id, Side::Backend, self.turn.start());
        }
        count == most
    }

    /// Sends the replies in `batch` to the clients.
    pub(super) fn send_answers(&mut self, batch: &mut Batch) {
        let listener_of = |routed: &Routed| Some(self.table.get(routed.id)?.0.listener);
        let runs: ArrayVec<_, BATCH> = batch
            .slots
            .chunk_by(|a, b| listener_of(a) == listener_of(b))
            .filter_map(|run| Some((listener_of(run.first()?)?, run)))
            .collect();
        for (listener, run) in runs {
            self.send_to_clients(listener as usize, batch, run);
        }
        batch.slots.clear();
    }

    /// Sends replies of flows that share a listener.
    fn send_to_clients(&mut self, listener: usize, batch: &Batch, datagrams: &[Routed]) {
        let mut payload = Payload::new(self.listeners[listener].target.policy.limits.dscp);
        let mut answers: ArrayVec<Answer, BATCH> = ArrayVec::new();
        let mut tally = Tally::default();
        for datagrams in datagrams.chunk_by(|a, b| a.id == b.id) {
            let id = datagrams[0].id;
            let Some((_key, flow)) = self.table.get(id) else { continue };
            if flow.client_socket.is_some() {
                self.send_by_client_socket(id, batch, datagrams);
                continue;
            }
            let gso = flow.gso_to_client;
            let before = tally.relayed;
            let parts = payload.add(&batch.received, datagrams, gso, &mut tally);
            flow.record_relayed(Towards::Clients, before, &tally);
            answers.extend(parts.into_iter().map(|part| Answer { id, gso, part }));
        }
        let (wanted, waiting) = (self.listeners[listener].wanted(), self.listeners[listener].queue.len());
        for answers in answers.chunk_by(|a, b| a.gso == b.gso) {
            self.send_alike(listener, &payload, answers, &mut tally);
        }
        let is_shut_down = tally.met(libc::EPIPE);
        let listening = &mut self.listeners[listener];
        listening.last_active = self.turn.start();
        tally.settle(&listening.target, Towards::Clients);
        if is_shut_down {
            self.shut_down.push(listener);
        }
        if listening.queue.len() > waiting {
            self.use_client_sockets(listener);
        }
        let listening = &self.listeners[listener];
        if listening.wanted() != wanted {
            interest(self.poll.epoll(), listening.as_fd(), Token::Listener(listener), listening.wanted());
        }
    }

    /// Sends replies that are either all allowed or all not allowed to be sent as GSO batches.
    fn send_alike(&mut self, listener: usize, payload: &Payload<'_>, answers: &[Answer], tally: &mut Tally) {
        let message = |answer: &Answer| {
            let (key, _flow) = self.table.get(answer.id)?;
            Some(Transmit { to: Some(key.client), source: key.local, ..answer.part.message(payload, None) })
        };
        let messages: ArrayVec<Transmit<'_>, BATCH> = answers.iter().filter_map(message).collect();
        let gso = answers.first().is_some_and(|answer| answer.gso);
        let flow_of = |index: usize| Some(answers[index].id);
        for index in self.listeners[listener].send(&messages, gso, flow_of, tally) {
            if let Some((_key, flow)) = self.table.get_mut(answers[index].id) {
                flow.gso_to_client = false;
            }
        }
    }
}

/// Keeps the datagrams in `slots` that come from the backend, from any port, and makes the last one's port that of the
/// flow. An unconnected socket also receives datagrams of others; these are dropped.
fn take_from_backend(id: FlowId, flow: &mut Flow, batch: &mut Batch, slots: Range<usize>) {
    let backend = flow.target().port_mapping.backend.socket_addr();
    for slot in slots {
        match batch.received.sender(slot) {
            Some(sender) if is_from(sender, backend) => {
                flow.peer = Some(sender);
                batch.slots.push(Routed::whole(id, slot));
            }
            _ => flow.target().policy.state.stats.count(FailureKind::Forged),
        }
    }
}

/// Whether a datagram comes from the address of `backend`. Link-local addresses on different interfaces are different.
fn is_from(sender: SocketAddr, backend: SocketAddr) -> bool {
    let mut backend = backend;
    backend.set_port(sender.port());
    match (sender, backend) {
        (SocketAddr::V6(sender), SocketAddr::V6(backend)) if !backend.ip().is_unicast_link_local() => {
            sender.ip() == backend.ip()
        }
        _ => sender == backend,
    }
}

/// A message to a client.
struct Answer {
    id: FlowId,
    /// Whether it may be sent as a GSO batch.
    gso: bool,
    part: Part,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_answers_from_its_address_whatever_the_port() {
        let comes = |sender: &str, backend: &str| is_from(sender.parse().unwrap(), backend.parse().unwrap());
        assert!(comes("192.0.2.1:7", "192.0.2.1:69"));
        assert!(!comes("192.0.2.2:69", "192.0.2.1:69"));
        assert!(comes("[fd00::1]:7", "[fd00::1]:69"));
        assert!(comes("[fd00::1%2]:7", "[fd00::1]:69"), "an interface means nothing to it");
        assert!(!comes("[fd00::2]:69", "[fd00::1]:69"));
        assert!(comes("[fe80::1%2]:7", "[fe80::1%2]:69"));
        assert!(!comes("[fe80::1%3]:69", "[fe80::1%2]:69"), "another host on another link");
    }
}
