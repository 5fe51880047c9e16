//! Forwards datagrams from clients to backends.

use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::libc;
use nix::sys::epoll::EpollFlags;
use rproxy_mapping::addr::canonical;
use rproxy_sys::udp::{BATCH, LocalAddr};
use tracing::warn;

use super::batch::Batch;
use super::flows::{ENDS_PER_TURN, mapping_of};
use super::key::FlowKey;
use super::proxy_header;
use super::relay::UdpRelay;
use super::routed::Routed;
use super::table::{FlowId, Side};
use super::tally::{Tally, Towards, last_dropped};
use super::token::Wanted;
use super::token::{Token, event, interest};
use super::turn::{LISTENER_BATCHES, slots_for};
use crate::log::limit::LogLimit;
use crate::proxy_protocol::{Endpoints, decode_datagram};
use crate::runtime::descriptors::{explain, has_run_out};
use crate::state::Target;
use crate::state::record::Ending;
use crate::state::stats::FailureKind;

/// What send(2) fails with from an address or an interface that is gone.
const STALE: [i32; 4] = [libc::ENETUNREACH, libc::EINVAL, libc::EADDRNOTAVAIL, libc::ENODEV];

impl UdpRelay {
    /// Receives and forwards what clients sent to a listener.
    pub(super) fn serve_listener(&mut self, index: usize, ready: EpollFlags, batch: &mut Batch) {
        if self.listeners.get_mut(index).is_none() {
            // It was reported before the command with its binding arrived.
            return;
        }
        if ready.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLRDHUP) {
            return self.shut_down.push(index);
        }
        if ready.contains(EpollFlags::EPOLLOUT) {
            self.serve_waiting(index, batch);
        }
        if self.listeners[index].is_paused {
            return;
        }
        for _ in 0..LISTENER_BATCHES {
            let listener = &mut self.listeners[index];
            let most = slots_for(listener.usual_size).min(BATCH);
            match batch.received.recv(listener.as_fd(), 0, most, true) {
                Ok(count) => {
                    listener.usual_size = self.turn.take(&batch.received, 0..count, listener.usual_size);
                    let dropped = last_dropped(&batch.received, 0..count);
                    if dropped != 0 {
                        let mut tally = Tally::default();
                        tally.dropped(dropped, &mut listener.dropped);
                        tally.settle(&listener.target, Towards::Backend);
                    }
                    self.relay_requests(index, None, batch, count);
                    if count < most || self.turn.is_over() {
                        return;
                    }
                }
                Err(error) => return self.note_error(index, error, Towards::Clients),
            }
        }
    }

    /// Handles an error of receiving, which is that of an earlier datagram unless nothing was available.
    pub(super) fn note_error(&self, listener: usize, error: io::Error, to: Towards) {
        if error.kind() != io::ErrorKind::WouldBlock {
            let mut tally = Tally::default();
            tally.lose(1, error);
            tally.settle(&self.listeners[listener].target, to);
        }
    }

    /// Forwards the `count` datagrams in `batch` to the backend, each through its flow. `local` is their destination
    /// address, unless they report it themselves.
    pub(super) fn relay_requests(
        &mut self,
        listener: usize,
        local: Option<LocalAddr>,
        batch: &mut Batch,
        count: usize,
    ) {
        let target = self.listeners[listener].target.clone();
        let mut route = Route::default();
        for slot in 0..count {
            let Some(client) = batch.received.sender(slot) else { continue };
            let key = FlowKey::new(listener, client, batch.received.control(slot).local.or(local));
            if route.is_proxy(client.ip(), &target) {
                self.route_behind_headers(&mut route, &target, key, slot, batch);
            } else if let Some(id) = self.flow_of(&mut route, key, None, batch) {
                self.push(listener, Routed::whole(id, slot), batch);
            }
        }
        self.send_to_backend(listener, batch);
    }

    /// Finds the flows of what a proxy sent: each datagram in the slot begins with a header, which is removed.
    fn route_behind_headers(
        &mut self,
        route: &mut Route,
        target: &Target,
        key: FlowKey,
        slot: usize,
        batch: &mut Batch,
    ) {
        let Some(len) = batch.received.payload(slot).map(<[u8]>::len) else {
            let mut tally = Tally::default();
            tally.cut();
            return tally.settle(target, Towards::Backend);
        };
        let size = batch.received.control(slot).segment.map_or(usize::MAX, usize::from).max(1);
        let mut start = 0_usize;
        loop {
            let end = len.min(start.saturating_add(size));
            let payload = batch.received.payload(slot).unwrap_or_default();
            match decode_datagram(&payload[start..end]) {
                Ok(header) => {
                    if let Some(id) = self.flow_of(route, key, header.endpoints.as_ref(), batch) {
                        let part = Routed::part(id, slot, start + header.len..end);
                        self.push(key.listener as usize, part, batch);
                    }
                }
                Err(error) => proxy_header::refuse(key.client, target, &error),
            }
            start = end;
            if start == len {
                return;
            }
        }
    }

    /// Appends a datagram to those to be sent. Sends the others if there are as many as fit.
    fn push(&mut self, listener: usize, routed: Routed, batch: &mut Batch) {
        if batch.slots.len() >= BATCH {
            self.send_to_backend(listener, batch);
        }
        batch.slots.push(routed);
    }

    /// The flow of a client, for whom a proxy may speak. May send what is in the slots before.
    fn flow_of(
        &mut self,
        route: &mut Route,
        key: FlowKey,
        told: Option<&Endpoints>,
        batch: &mut Batch,
    ) -> Option<FlowId> {
        let key = told.map_or(key, |told| key.told(told, &self.told_hasher));
        if let Some((same, id)) = route.previous
            && same == key
        {
            return Some(id);
        }
        let id = self.find_or_open(&key, told, batch);
        // If there is none, its flow may have been evicted for this one.
        route.previous = id.map(|id| (key, id));
        id
    }

    /// Sends the datagrams in the slots to the backend.
    fn send_to_backend(&mut self, listener: usize, batch: &mut Batch) {
        if batch.slots.is_empty() {
            return;
        }
        // The sort is stable, so that a flow's datagrams stay in order.
        batch.slots.sort_by_key(|routed| routed.id.to_u64());
        let dscp = self.listeners[listener].target.policy.limits.dscp;
        let mut tally = Tally::default();
        let mut lost_peer = None;
        let Batch { received, slots, headed } = batch;
        for datagrams in slots.chunk_by(|a, b| a.id == b.id) {
            let id = datagrams[0].id;
            let Some((_key, flow)) = self.table.get_mut(id) else {
                // It ended with those that were sent before.
                tally.discard(datagrams.len() as u64);
                continue;
            };
            if flow.send(received, datagrams, headed, dscp, &mut tally) {
                interest(self.poll.epoll(), flow.as_fd(), Token::Flow(id), flow.wanted());
            }
            if tally.has_lost_peer() {
                // The remaining flows of the batch are checked when their next datagram fails.
                lost_peer.get_or_insert(id);
            }
        }
        if let Some(id) = lost_peer {
            self.end_without_peer(id);
        }
        if STALE.into_iter().any(|errno| tally.met(errno)) {
            self.end_with_stale_source(&batch.slots);
        }
        batch.slots.clear();
        let listener = &mut self.listeners[listener];
        listener.last_active = self.turn.start();
        tally.settle(&listener.target, Towards::Backend);
    }

    /// Finds or opens the flow with `key`. May send what is in the slots before.
    fn find_or_open(&mut self, key: &FlowKey, told: Option<&Endpoints>, batch: &mut Batch) -> Option<FlowId> {
        static FAILED: LogLimit = LogLimit::new();
        static DENIED: LogLimit = LogLimit::new();

        if let Some(id) = self.table.find(key) {
            self.table.touch(id, Side::Client, self.turn.start());
            return Some(id);
        }
        let index = key.listener as usize;
        let target = self.listeners[index].target.clone();
        let stats = &target.policy.state.stats;
        if self.draining || self.listeners[index].is_closing() {
            stats.count(FailureKind::FlowFailed);
            return None;
        }
        if self.capacity.shared.own_ports().is_forged(key.client, &target.port_mapping) {
            stats.count(FailureKind::Forged);
            log_forged(&target, key);
            return None;
        }
        let client = told.map_or(key.client, Endpoints::source);
        if !target.admits(client) {
            // A flood of datagrams does not become one of lines.
            if DENIED.permit().is_some() {
                target.log_refusal(client, Ending::Denied);
            }
            return None;
        }
        if !target.admits_at_rate(client) {
            if DENIED.permit().is_some() {
                target.log_refusal(client, Ending::OverRate);
            }
            return None;
        }
        match self.open(key, told, &target, batch) {
            Ok(id) => Some(id),
            Err(error) => {
                stats.count(FailureKind::FlowFailed);
                if let Some(suppressed) = FAILED.permit() {
                    warn!(mapping = %target.name(), client = %canonical(client), error = explain(&error, 1), suppressed, "cannot open a flow");
                }
                None
            }
        }
    }

    /// Opens a flow, and evicts others if necessary.
    fn open(
        &mut self,
        key: &FlowKey,
        told: Option<&Endpoints>,
        target: &Arc<Target>,
        batch: &mut Batch,
    ) -> io::Result<FlowId> {
        target.ensure_resolved()?;
        let now = self.turn.start();
        let client = told.map_or(key.client, Endpoints::source);
        let source = client.ip();
        let own = self.table.len();
        self.table.set_most(self.capacity.most(own, now));
        let bounds = self.capacity.bounds(mapping_of(target), &target.policy.limits, own, now);
        if self.table.is_full(&bounds, source) {
            // An evicted flow has already sent its datagrams.
            self.send_to_backend(key.listener as usize, batch);
            self.make_room(&bounds, source);
        }
        let mut flow = match self.capacity.open(target, client, now) {
            Err(error) if has_run_out(&error) => {
                self.capacity.learn(self.table.len(), now);
                self.send_to_backend(key.listener as usize, batch);
                if let Some(ended) = self.table.evict() {
                    self.displace(ended);
                }
                // More flows may have ended whose sockets are still open.
                self.close_ended(ENDS_PER_TURN);
                self.capacity.open(target, client, now)?
            }
            opened => opened?,
        };
        let port = flow.port;
        let id = self.table.next_id();
        if let Err(error) = self.poll.epoll().add(&flow, event(Token::Flow(id), Wanted::RECEIVE)) {
            self.capacity.shared.ports().given_back(port, now);
            return Err(error.into());
        }
        flow.set_share(self.capacity.shares.each());
        flow.speak_for(key, told);
        self.table.insert(*key, (&bounds, source), flow, now);
        Ok(id)
    }
}

/// What was found out for the datagram before: it often holds for the next one, too.
#[derive(Default)]
struct Route {
    /// Its flow.
    previous: Option<(FlowKey, FlowId)>,
    /// Its sender, and whether that is a proxy.
    peer: Option<(IpAddr, bool)>,
}

impl Route {
    /// Whether the datagrams of `peer` begin with a header.
    fn is_proxy(&mut self, peer: IpAddr, target: &Target) -> bool {
        match self.peer {
            Some((same, is_proxy)) if same == peer => is_proxy,
            _ => {
                let is_proxy = target.policy.limits.proxy_protocol.expects_header(Some(peer));
                self.peer = Some((peer, is_proxy));
                is_proxy
            }
        }
    }
}

/// Logs that a datagram was dropped because no client can have sent it.
fn log_forged(target: &Target, key: &FlowKey) {
    static FORGED: LogLimit = LogLimit::new();
    if let Some(suppressed) = FORGED.permit() {
        let source = canonical(key.client);
        warn!(mapping = %target.name(), %source, suppressed, "datagram dropped: its source is no client's");
    }
}
