//! What others can see of a server, without asking its tasks.

use std::sync::Arc;

use crate::engine::registry::Counted;
use crate::log::access::AccessLog;
use crate::runtime::worker::Workers;
use crate::udp::shared::Shared;

/// A view of a server. Counters are read when they are asked for; the list of mappings is that of its creation.
#[derive(Clone, Debug)]
pub(crate) struct Observation {
    /// What is counted under the names of mappings.
    pub(crate) counted: Vec<Counted>,
    /// The number of mappings that are served.
    pub(crate) mappings: usize,
    /// How many of them are attached ports.
    pub(crate) attached: usize,
    /// What serves them.
    pub(crate) resources: Resources,
}

/// What a server uses, whatever it serves.
#[derive(Clone, Debug)]
pub(crate) struct Resources {
    pub(super) workers: Arc<Workers>,
    pub(super) shared: Option<Arc<Shared>>,
    pub(super) access_log: Option<Arc<AccessLog>>,
}

impl Resources {
    /// The running workers.
    pub(crate) fn workers(&self) -> usize {
        self.workers.running()
    }

    /// The maximum number of workers.
    pub(crate) fn most_workers(&self) -> usize {
        self.workers.most()
    }

    /// The UDP flows of all mappings, and their maximum, once a UDP port was served.
    pub(crate) fn flows(&self) -> Option<(usize, usize)> {
        self.shared.as_ref().map(|shared| (shared.flows(), shared.most_flows()))
    }

    /// The lines that the access log has lost, if there is one.
    pub(crate) fn lost_access_lines(&self) -> Option<u64> {
        self.access_log.as_ref().map(|log| log.lost())
    }
}
