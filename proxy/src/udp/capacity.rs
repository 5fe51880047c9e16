//! How many flows a process may have, as far as it knows, and what they share.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::libc;
use nix::sys::resource::{Resource, getrlimit};
use rproxy_mapping::limits::Limits;

use super::flow::Flow;
use super::local_ports::LocalPorts;
use super::send::Room;
use super::shares::Shares;
use super::table::{Bounds, MappingId};
use crate::state::Target;

/// Descriptors kept for other things than flows.
const RESERVED_DESCRIPTORS: usize = 64;

/// When descriptors have run out, what there was then is the most for this long.
const LEARNT_FOR: Duration = Duration::from_secs(1);

/// What flows need that there is not enough of: descriptors, local ports and memory.
#[derive(Debug)]
pub(super) struct Capacity {
    pub(super) ports: LocalPorts,
    /// What the kernel may queue for each flow.
    pub(super) shares: Shares,
    /// For what waits for slow backends.
    pub(super) room: Arc<Room>,
    /// Descriptors that flows may take, unless more are asked for.
    descriptors: usize,
    /// The most that a mapping asks for.
    pub(super) asked: usize,
    /// How many there were when no more could be opened, and until when that counts.
    learnt: Option<(usize, Instant)>,
}

impl Capacity {
    /// What there is on this host. `beside_tcp` says whether connections need descriptors too.
    pub(super) fn of_this_host(beside_tcp: bool) -> Self {
        let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(soft, _hard)| soft);
        let descriptors = usize::try_from(descriptors).unwrap_or(usize::MAX);
        let share =
            if beside_tcp { descriptors / 2 } else { descriptors.saturating_sub(RESERVED_DESCRIPTORS) };
        Self {
            ports: LocalPorts::of_this_host(),
            shares: Shares::of_this_host(),
            room: Arc::default(),
            descriptors: share,
            asked: 0,
            learnt: None,
        }
    }

    /// Descriptors that flows may take.
    pub(super) fn descriptors(&self) -> usize {
        self.descriptors
    }

    /// Opens a flow to the backend of `route`.
    ///
    /// # Errors
    /// Those of [`Flow::open`].
    pub(super) fn open(&mut self, target: &Arc<Target>, now: Instant) -> io::Result<Flow> {
        self.ports.refresh(now);
        Flow::open(target, &mut self.ports, &self.room, now)
    }

    /// Flows that there may be at `now`, at least 1: what was asked for, or half of the ports; but what
    /// is there to be had.
    pub(super) fn most(&self, now: Instant) -> usize {
        let usual = self.descriptors.min(self.ports.count() / 2);
        let learnt = self.learnt.filter(|(_most, until)| now < *until).map_or(usize::MAX, |(most, _)| most);
        usual.max(self.asked).min(self.ports.room()).min(learnt).max(1)
    }

    /// No more than `flows` could be opened.
    pub(super) fn learn(&mut self, flows: usize, now: Instant) {
        self.learnt = Some((flows.max(1), now + LEARNT_FOR));
    }

    /// What bounds the flows of a mapping with these limits.
    pub(super) fn bounds(&self, mapping: MappingId, limits: &Limits, now: Instant) -> Bounds {
        let flows = limits.udp_max_flows.unwrap_or_else(|| self.most(now)).max(1);
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

/// Whether an error says that there are no descriptors left.
pub(super) fn has_run_out(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}
