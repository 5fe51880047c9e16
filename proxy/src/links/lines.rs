//! The log lines about single addresses: some of each second, and how many more there were.

use std::time::Duration;

use rproxy_mapping::addr::ScopedIp;
use rproxy_mapping::name::Name;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::log::limit::LogLimit;

/// After what time the lines that were left out are summed up.
const SUM: Duration = Duration::from_secs(1);

/// A line about an address of an interface and a mapping.
#[derive(Clone, Copy, Debug)]
pub(super) enum Line<'a> {
    /// It is served.
    Served,
    /// It is not served any more.
    Left,
    /// It cannot be served, for a reason.
    Refused(&'a str),
}

/// Lines that were left out.
#[derive(Debug, Default)]
pub(super) struct Lines {
    served: u64,
    left: u64,
    refused: u64,
    due: Option<Instant>,
}

impl Lines {
    /// Logs a line, or counts it.
    pub(super) fn log(&mut self, line: Line<'_>, mapping: &Name, address: ScopedIp) {
        static LIMITS: [LogLimit; 3] = [const { LogLimit::new() }; 3];

        let (limit, count) = match line {
            Line::Served => (&LIMITS[0], &mut self.served),
            Line::Left => (&LIMITS[1], &mut self.left),
            Line::Refused(_) => (&LIMITS[2], &mut self.refused),
        };
        if limit.permit().is_none() {
            *count += 1;
            self.due.get_or_insert_with(|| Instant::now() + SUM);
            return;
        }
        match line {
            Line::Served => info!(%mapping, %address, "serving at an address of the interface"),
            Line::Left => info!(%mapping, %address, "no longer serving at an address of the interface"),
            Line::Refused(reason) => {
                warn!(%mapping, %address, reason, "an address of the interface is not served; trying again");
            }
        }
    }

    /// When [`Self::sum_up`] is due.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Logs how many lines were left out.
    pub(super) fn sum_up(&mut self) {
        let Self { served, left, refused, .. } = std::mem::take(self);
        if served + left > 0 {
            info!(served, left, "more addresses of interfaces have come or gone; rproxy ctl list has all");
        }
        if refused > 0 {
            warn!(addresses = refused, "more addresses of interfaces are not served; trying again");
        }
    }
}
