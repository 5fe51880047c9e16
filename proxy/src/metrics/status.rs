//! The state of the mappings, as the manager knows it.

use rproxy_mapping::wire::WireLimits;
use serde::Serialize;

use crate::control::answers::StatsList;
use crate::engine::registry::{Registry, Served};

/// The mappings at one moment.
#[derive(Debug)]
pub(crate) struct Status {
    /// Their counters.
    pub(crate) stats: StatsList,
    /// What they are, in the order of their counters; `None` if nothing has changed since the known revision.
    pub(crate) descriptions: Option<Vec<Description>>,
    /// The revision of the registry.
    pub(crate) revision: u64,
}

/// What a mapping is. It changes only if somebody changes the mapping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Description {
    /// The address, or addresses, that it listens on.
    pub(super) host: String,
    /// The bound ports: `8080`, `8000-8010`.
    pub(super) ports: String,
    /// `tcp`, `udp` or `tcp+udp`.
    pub(super) protocol: String,
    /// The address and ports of the backend.
    pub(super) backend: String,
    /// The limits and options that differ from the default.
    pub(super) limits: WireLimits,
}

impl Status {
    /// The mappings of `registry`, for somebody who knows them as of the revision `known`.
    pub(crate) fn of(registry: &Registry, known: Option<u64>) -> Self {
        let revision = registry.revision();
        let is_known = known == Some(revision);
        let describe = || registry.iter().map(|(_name, served)| Description::of(served)).collect();
        let descriptions = (!is_known).then(describe);
        Self { stats: StatsList::of(registry), descriptions, revision }
    }
}

impl Description {
    fn of(served: &Served) -> Self {
        let mapping = served.mapping();
        Self {
            host: served.bound_host().unwrap_or_else(|| mapping.host().to_string()),
            ports: served.bound_ports(),
            protocol: mapping.protocols().to_string(),
            backend: format!("{}:{}", mapping.backend(), mapping.backend_ports()),
            limits: WireLimits::of(mapping.limits()),
        }
    }
}
