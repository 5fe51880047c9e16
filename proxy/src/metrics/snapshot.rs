//! What a scrape is written from.

use std::sync::Arc;
use std::time::SystemTime;

use crate::engine::observation::Observation;

/// The state of the process when a query was answered.
#[derive(Clone, Debug)]
pub(crate) struct Snapshot {
    /// The mappings, their counters, and what serves them.
    pub(crate) server: Arc<Observation>,
    /// Whether the process accepts no more clients.
    pub(crate) is_draining: bool,
    /// Whether ports can be attached.
    pub(crate) has_plane: bool,
    /// What the process knows of itself.
    pub(crate) process: Process,
}

/// The state of the process, apart from mappings.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Process {
    /// When it started.
    pub(crate) started: SystemTime,
    /// The reloads of its configuration, if there is one.
    pub(crate) reloads: Option<Reloads>,
    /// The last upgrade that it has attempted. One that succeeds ends it.
    pub(crate) upgrade: Option<UpgradeAttempt>,
    /// Its open descriptors, where proc(5) is mounted.
    pub(crate) descriptors: Option<u64>,
}

/// An attempt to replace the process by another one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UpgradeAttempt {
    /// When it began, or failed.
    pub(crate) since: SystemTime,
    /// Whether it has failed; else it is under way.
    pub(crate) has_failed: bool,
}

/// The last reloads of a configuration. Reading it at the start is one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reloads {
    /// When it was last read.
    pub(crate) last: SystemTime,
    /// When it was last applied.
    pub(crate) last_success: SystemTime,
}

impl Reloads {
    /// The configuration was applied at `time`.
    pub(crate) fn started(time: SystemTime) -> Self {
        Self { last: time, last_success: time }
    }

    /// Records a reload at `time`.
    pub(crate) fn record(&mut self, time: SystemTime, succeeded: bool) {
        self.last = time;
        if succeeded {
            self.last_success = time;
        }
    }

    /// Whether the last one has succeeded.
    pub(crate) fn has_succeeded(self) -> bool {
        self.last == self.last_success
    }
}
