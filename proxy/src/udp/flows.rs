//! Ends flows, and maintains what they share.

use std::collections::HashSet;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use rproxy_sys::udp::{MOST_DISCARDED, discard, dropped};

use super::capacity::Capacity;
use super::flow::Flow;
use super::key::FlowKey;
use super::listeners::Listeners;
use super::relay::UdpRelay;
use super::routed::Routed;
use super::shares::AT_A_TIME;
use super::table::{Bounds, Ended, FlowId, MappingId};
use super::tally::{Tally, Towards};
use crate::state::Target;
use crate::state::record::Ending;
use crate::state::stats::FailureKind;

/// Maximum number of flows that expire, and of sockets that are closed, in one turn. Thousands may end together, and
/// closing a socket takes some microseconds.
pub(super) const ENDS_PER_TURN: usize = 64;

impl UdpRelay {
    /// Ends some flows because of `ending`. They leave the table at once; their sockets are closed over several turns.
    pub(super) fn end_flows(&mut self, ending: Ending, are_over: impl Fn(&Listeners, &FlowKey) -> bool) {
        self.end_flows_of_sources(|listeners, key, _source| are_over(listeners, key).then_some(ending));
    }

    /// As [`Self::end_flows`], by the address of their client, too, and each because of what `over` returns.
    pub(super) fn end_flows_of_sources(
        &mut self,
        over: impl Fn(&Listeners, &FlowKey, IpAddr) -> Option<Ending>,
    ) {
        let Self { table, listeners, .. } = self;
        let ending = |id, key: &FlowKey| over(listeners, key, table.source(id)?);
        let over: Vec<(FlowId, Ending)> =
            table.iter().filter_map(|(id, key, _at)| Some((id, ending(id, key)?))).collect();
        for (id, ending) in over {
            if let Some(ended) = self.table.remove(id) {
                self.end(ended, ending);
            }
        }
    }

    /// Ends the flows with these records, as a user has asked. Their sockets are closed when this returns.
    pub(super) fn cut(&mut self, records: &HashSet<u64>) {
        let Self { table, .. } = self;
        let is_one = |id: FlowId| table.get(id)?.1.record_id().filter(|record| records.contains(record));
        let cut: Vec<FlowId> =
            table.iter().filter_map(|(id, _key, _at)| is_one(id).map(|_record| id)).collect();
        for id in cut {
            if let Some(ended) = self.table.remove(id) {
                self.end(ended, Ending::Cut);
            }
        }
        self.close_ended(self.ended.len());
    }

    /// Ends all flows before the task ends, for what their sockets dropped since they were last read. A backend that
    /// goes on sending does not hold it up.
    pub(super) fn end_all(&mut self) {
        self.end_flows(Ending::Drain, |_listeners, _key| true);
        self.close_ended(self.ended.len());
    }

    /// Ends a flow that was evicted.
    pub(super) fn displace(&mut self, ended: Ended<Flow>) {
        ended.flow.target().policy.state.stats.count(FailureKind::FlowDisplaced);
        self.end(ended, Ending::Evicted);
    }

    /// Ends a flow because of `ending`. Queued replies are still sent.
    pub(super) fn end(&mut self, mut ended: Ended<Flow>, ending: Ending) {
        ended.flow.record_end(ending);
        if let Some(socket) = ended.flow.client_socket.take() {
            self.retire(*socket);
        }
        let mut tally = Tally::default();
        tally.overflow(ended.flow.unsent() as u64);
        tally.settle(ended.flow.target(), Towards::Backend);
        self.ended.push_back(ended);
    }

    /// Adjusts the receive buffers to the number of flows, some in each turn.
    pub(super) fn share_out(&mut self) {
        let Capacity { shares, shared, .. } = &mut self.capacity;
        if shares.set_flows(shared.flows()) {
            self.next_share = Some(0);
        }
        let Some(first) = self.next_share else { return };
        let (some, next) = self.table.some_from(first, AT_A_TIME);
        some.for_each(|flow| flow.set_share(shares.each()));
        self.next_share = next;
    }

    /// Ends expired flows and closes the sockets of ended ones, in bounded numbers so that others do not wait.
    pub(super) fn end_some(&mut self, now: Instant) {
        if self.listeners.are_closing() {
            self.close_listeners(now);
        }
        for _ in 0..ENDS_PER_TURN {
            let Some(id) = self.table.expired(now) else { break };
            if self.table.get(id).is_some_and(|(_key, flow)| flow.is_waiting) {
                // There may be replies that are not read yet.
                self.table.postpone(id, now);
            } else if let Some(ended) = self.table.remove(id) {
                self.end(ended, Ending::Idle);
            }
        }
        self.close_ended(ENDS_PER_TURN);
    }

    /// Closes at most `most` sockets of ended flows. Counts the datagrams that they received and that were not read.
    pub(super) fn close_ended(&mut self, most: usize) {
        for _ in 0..most {
            let Some(Ended { mut flow, last_active }) = self.ended.pop_front() else { return };
            if flow.is_shared {
                // The other process has the socket open; closing it does not end epoll's reports.
                self.poll.epoll().delete(flow.as_fd()).ok();
            } else {
                let mut tally = Tally::default();
                let unread = discard(flow.as_fd());
                tally.discard(unread as u64);
                let counted = flow.dropped;
                tally.dropped(dropped(flow.as_fd()).unwrap_or(counted), &mut flow.dropped);
                tally.settle(flow.target(), Towards::Clients);
                if unread == MOST_DISCARDED {
                    // There may be more; other tasks do not wait for them.
                    return self.ended.push_front(Ended { flow, last_active });
                }
            }
            self.capacity.shared.ports().given_back(flow.port, last_active);
        }
        if self.ended.is_empty() {
            self.ended.shrink_to_fit();
        }
    }

    /// Ends a flow whose socket has no peer any more, or was shut down; the next datagram opens another one.
    #[cold]
    pub(super) fn end_without_peer(&mut self, id: FlowId) {
        if let Some(mut ended) = self.table.remove(id) {
            // If another process has it open, for example the one that shut it down, closing it does not end epoll's
            // reports.
            ended.flow.is_shared = true;
            self.end(ended, Ending::Cut);
        }
    }

    /// Ends flows of the slots whose socket cannot send any more, while another one could.
    #[cold]
    pub(super) fn end_with_stale_source(&mut self, slots: &[Routed]) {
        let ids: HashSet<FlowId> = slots.iter().map(|routed| routed.id).collect();
        for id in ids {
            let Some((_key, flow)) = self.table.get(id) else { continue };
            if flow.is_stale()
                && let Some(ended) = self.table.remove(id)
            {
                self.end(ended, Ending::SourceUnavailable);
            }
        }
    }

    /// Evicts a flow to make room for another one, and a second one if the limit is lower than before. Evicting all
    /// excess flows at once would be too many, because the limit is an estimate.
    pub(super) fn make_room(&mut self, bounds: &Bounds, source: IpAddr) {
        for _ in 0..2 {
            let Some(ended) = self.table.make_room(bounds, source) else { break };
            self.displace(ended);
        }
        self.close_ended(2);
    }
}

/// Identifies the mapping of a target by the address of its counters, which exist for as long as it is served.
pub(super) fn mapping_of(target: &Target) -> MappingId {
    MappingId(Arc::as_ptr(&target.policy.state).addr())
}
