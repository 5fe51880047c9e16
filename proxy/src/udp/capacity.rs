//! Estimates how many flows a process may have, and owns what all flows share.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rproxy_mapping::limits::Limits;

use super::flow::Flow;
use super::send::QueueBudget;
use super::shared::Shared;
use super::shares::Shares;
use super::table::{Bounds, MappingId};
use crate::state::Target;

/// After descriptors have run out, the number of flows at that moment is the limit for this long.
const LEARNT_FOR: Duration = Duration::from_secs(1);

/// The resources that limit flows: descriptors, local ports and memory.
#[derive(Debug)]
pub(super) struct Capacity {
    /// What other UDP tasks use, too.
    pub(super) shared: Arc<Shared>,
    /// The receive buffer size of each flow.
    pub(super) shares: Shares,
    /// The budget for datagrams queued for slow backends.
    pub(super) budget: Arc<QueueBudget>,
    /// The largest number that a mapping requests.
    pub(super) asked: usize,
    /// The number of flows when descriptors ran out, and until when it is the limit.
    learnt: Option<(usize, Instant)>,
}

impl Capacity {
    /// The resources of a task.
    pub(super) fn of_task(shared: Arc<Shared>) -> Self {
        let budget = Arc::new(QueueBudget::of_task(shared.to_backends.clone()));
        Self { shared, shares: Shares::of_this_host(), budget, asked: 0, learnt: None }
    }

    /// The number of descriptors for flows.
    pub(super) fn descriptors(&self) -> usize {
        self.shared.descriptors()
    }

    /// Opens a flow to the backend of `target`.
    ///
    /// # Errors
    /// Those of [`Flow::open`].
    pub(super) fn open(
        &mut self,
        target: &Arc<Target>,
        client: SocketAddr,
        now: Instant,
    ) -> io::Result<Flow> {
        let mut ports = self.shared.ports();
        ports.refresh(now);
        Flow::open(target, client, (&mut ports, &self.shared.client_addrs), &self.budget, now)
    }

    /// The maximum number of flows at `now` for a task that has `own`, at least 1: the requested number, or half of the
    /// local ports; but not more than available resources allow. Tasks share the number, see [`part_of`].
    pub(super) fn most(&self, own: usize, now: Instant) -> usize {
        let (count, room) = {
            let ports = self.shared.ports();
            (ports.count(), ports.room())
        };
        let others = self.shared.flows().saturating_sub(own);
        let usual = part_of(self.shared.descriptors().min(count / 2), others, self.shared.tasks());
        let learnt = self.learnt.filter(|(_most, until)| now < *until).map_or(usize::MAX, |(most, _)| most);
        usual.max(self.asked).min(room.saturating_sub(others)).min(learnt).max(1)
    }

    /// Records that no more than `flows` could be opened.
    pub(super) fn learn(&mut self, flows: usize, now: Instant) {
        self.learnt = Some((flows.max(1), now + LEARNT_FOR));
    }

    /// The bounds of the flows of a mapping with these limits, for a task that has `own` flows.
    pub(super) fn bounds(&self, mapping: MappingId, limits: &Limits, own: usize, now: Instant) -> Bounds {
        let flows = limits.udp_max_flows.unwrap_or_else(|| self.most(own, now)).max(1);
        let per_source = limits.udp_max_flows_per_source;
        Bounds {
            mapping,
            flows,
            flows_per_source: per_source.unwrap_or(flows.div_ceil(4) * 3).max(1),
            shares_sources: limits.udp_max_flows.is_none() && per_source.is_none(),
            idle: limits.udp_timeout,
        }
    }
}

/// The part of `total` flows for one of several tasks, whose `others` have that many. One half is divided equally, so
/// that a flood of one task leaves room for the others. Whoever needs it gets the other half, and what is unused.
fn part_of(total: usize, others: usize, tasks: usize) -> usize {
    let reserved = total / 2 / tasks.max(1);
    let of_others = reserved * tasks.saturating_sub(1);
    total.saturating_sub(others.max(of_others)).max(reserved)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capacity(beside_tcp: bool) -> Capacity {
        let shared = Arc::new(Shared::of_this_host(beside_tcp, false));
        shared.add_task();
        Capacity::of_task(shared)
    }

    #[test]
    fn tcp_gets_half_of_the_descriptors() {
        let (soft, _hard) =
            nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
        let soft = usize::try_from(soft).unwrap();
        assert_eq!(capacity(true).descriptors(), soft / 2);
        assert_eq!(capacity(false).descriptors(), soft - crate::udp::shared::RESERVED_DESCRIPTORS);
    }

    #[test]
    fn flows_use_half_of_the_local_ports_unless_a_mapping_asks_for_more() {
        let (mut capacity, now) = (capacity(true), Instant::now());
        let half = capacity.shared.ports().count() / 2;
        Arc::get_mut(&mut capacity.shared).unwrap().descriptors = usize::MAX;
        assert_eq!(capacity.most(0, now), half);
        capacity.asked = half + 1;
        assert_eq!(capacity.most(0, now), half + 1);
        capacity.asked = usize::MAX;
        assert_eq!(capacity.most(0, now), capacity.shared.ports().room());
    }

    #[test]
    fn the_number_at_which_descriptors_ran_out_is_the_limit_for_a_while() {
        let (mut capacity, now) = (capacity(true), Instant::now());
        let usual = capacity.most(0, now);
        assert!(usual > 3);
        capacity.learn(3, now);
        assert_eq!(capacity.most(0, now), 3);
        assert_eq!(capacity.most(0, now + LEARNT_FOR / 2), 3);
        assert_eq!(capacity.most(0, now + LEARNT_FOR), usual);
        capacity.learn(0, now);
        assert_eq!(capacity.most(0, now), 1);
    }

    #[test]
    fn a_source_may_have_three_quarters_of_the_flows_of_a_mapping() {
        let (capacity, now) = (capacity(true), Instant::now());
        let bounds = |udp_max_flows, udp_max_flows_per_source| {
            let limits = Limits { udp_max_flows, udp_max_flows_per_source, ..Limits::default() };
            let Bounds { flows, flows_per_source, shares_sources, .. } =
                capacity.bounds(MappingId(0), &limits, 0, now);
            (flows, flows_per_source, shares_sources)
        };
        assert_eq!(bounds(Some(100), None), (100, 75, false));
        assert_eq!(bounds(Some(100), Some(7)), (100, 7, false));
        let most = capacity.most(0, now);
        assert_eq!(bounds(None, Some(7)), (most, 7, false));
        assert_eq!(bounds(None, None), (most, most.div_ceil(4) * 3, true), "all mappings share them");
    }

    #[test]
    fn tasks_share_the_flows_and_none_takes_all() {
        assert_eq!(part_of(1000, 0, 1), 1000);
        for (others, part) in [(0, 750), (250, 750), (400, 600), (750, 250), (1000, 250)] {
            assert_eq!(part_of(1000, others, 2), part, "{others}");
        }
        assert_eq!(part_of(1600, 0, 16), 850);
        assert_eq!(part_of(1600, 1600, 16), 50);
    }
}
