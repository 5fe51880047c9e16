//! The state of the mappings, as the manager knows it.

use std::time::{SystemTime, UNIX_EPOCH};

use rproxy_mapping::wire::WireLimits;
use serde::Serialize;

use super::descriptors::limit;
use super::snapshot::{Process, Reloads, UpgradeAttempt};
use crate::control::answers::StatsList;
use crate::engine::observation::Resources;
use crate::engine::registry::{Registry, Served};
use crate::log::lost_lines;

/// The mappings at one moment.
#[derive(Debug)]
pub(crate) struct Status {
    /// Their counters.
    pub(crate) stats: StatsList,
    /// What they are, in the order of their counters; `None` if nothing has changed since the known revision.
    pub(crate) descriptions: Option<Vec<Description>>,
    /// The revision of the registry.
    pub(crate) revision: u64,
    /// What the process uses, and its last reload.
    pub(crate) process: ProcessStatus,
}

/// The state of the process, apart from mappings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct ProcessStatus {
    /// The running workers.
    workers: usize,
    /// Its open descriptors, where proc(5) is mounted.
    #[serde(skip_serializing_if = "Option::is_none")]
    descriptors: Option<Usage>,
    /// The UDP flows of all mappings, once a UDP port was served.
    #[serde(skip_serializing_if = "Option::is_none")]
    flows: Option<Usage>,
    /// Lines of the log and of the access log that were lost because they could not be written in time.
    log_lines_dropped: u64,
    /// The last reload of its configuration, if there is one. Reading it at the start is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    reload: Option<Reload>,
    /// The last upgrade that it has attempted, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    upgrade: Option<Upgrade>,
}

/// How much of a limit is used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Usage {
    used: u64,
    limit: u64,
}

/// A reload of the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Reload {
    /// When, in milliseconds since 1970.
    time_ms: u64,
    succeeded: bool,
}

impl ProcessStatus {
    /// What the process knows of itself, and the resources that its server uses.
    pub(super) fn of(process: &Process, server: &Resources) -> Self {
        let usage = |(used, limit)| {
            Some(Usage { used: u64::try_from(used).ok()?, limit: u64::try_from(limit).ok()? })
        };
        Self {
            workers: server.workers(),
            descriptors: process.descriptors.zip(limit()).map(|(used, limit)| Usage { used, limit }),
            flows: server.flows().and_then(usage),
            log_lines_dropped: lost_lines() + server.lost_access_lines().unwrap_or(0),
            reload: process.reloads.map(Reload::of),
            upgrade: process.upgrade.map(Upgrade::of),
        }
    }
}

impl Reload {
    fn of(reloads: Reloads) -> Self {
        Self { time_ms: milliseconds(reloads.last), succeeded: reloads.has_succeeded() }
    }
}

/// An attempt to replace the process by another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Upgrade {
    /// When it began, or failed, in milliseconds since 1970.
    time_ms: u64,
    /// `under_way` or `failed`.
    state: &'static str,
}

impl Upgrade {
    fn of(attempt: UpgradeAttempt) -> Self {
        let state = if attempt.has_failed { "failed" } else { "under_way" };
        Self { time_ms: milliseconds(attempt.since), state }
    }
}

/// Milliseconds since 1970.
fn milliseconds(time: SystemTime) -> u64 {
    u64::try_from(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()).unwrap_or(u64::MAX)
}

/// What a mapping is. It changes only if somebody changes the mapping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Description {
    /// The address, or addresses, that it listens on.
    pub(super) host: String,
    /// The bound ports: `8080`, `8000-8010`.
    pub(super) ports: String,
    /// `tcp`, `udp`, `tcp+udp` or `sctp`.
    pub(super) protocol: String,
    /// The address and ports of the backend.
    pub(super) backend: String,
    /// The limits and options that differ from the default.
    pub(super) limits: WireLimits,
}

impl Status {
    /// The mappings of `registry`, for somebody who knows them as of the revision `known`.
    pub(crate) fn of(registry: &Registry, known: Option<u64>, process: ProcessStatus) -> Self {
        let revision = registry.revision();
        let is_known = known == Some(revision);
        let describe = || registry.iter().map(|(_name, served)| Description::of(served)).collect();
        let descriptions = (!is_known).then(describe);
        Self { stats: StatsList::of(registry), descriptions, revision, process }
    }
}

impl Description {
    fn of(served: &Served) -> Self {
        let mapping = served.mapping();
        // An interface without address has no bound ports.
        let asked = mapping.host_ports().range().map(|range| range.to_string());
        Self {
            host: served.bound_host().unwrap_or_else(|| mapping.host().to_string()),
            ports: if served.ports.is_empty() { asked.unwrap_or_default() } else { served.bound_ports() },
            protocol: mapping.protocols().to_string(),
            backend: served.backend_text(),
            limits: WireLimits::of(mapping.limits()),
        }
    }
}
