//! Clients that a mapping does not serve are counted and logged.

use std::net::SocketAddr;

use rproxy_mapping::addr::canonical;
use tracing::info;

use crate::log::limit::LogLimit;
use crate::state::Target;
use crate::state::record::Ending;
use crate::state::stats::FailureKind;

impl Target {
    /// Whether `client`, a peer of the mapping's socket, is served.
    pub(crate) fn admits(&self, client: SocketAddr) -> bool {
        static DENIED: LogLimit = LogLimit::new();

        let Some(reason) = self.policy.limits.access.refusal(client.ip()) else { return true };
        self.policy.state.stats.count_of(self.port_mapping.protocol, FailureKind::Denied);
        if let Some(suppressed) = DENIED.permit() {
            let (mapping, client) = (&self.policy.state.name, canonical(client));
            info!(%mapping, %client, reason, suppressed, "client refused");
        }
        false
    }

    /// Counts and logs that `client` is reset because `max_connections` is reached.
    pub(crate) fn is_over_limit(&self, client: SocketAddr) {
        static OVER: LogLimit = LogLimit::new();

        self.policy.state.stats.count(FailureKind::OverLimit);
        if let Some(suppressed) = OVER.permit() {
            let (mapping, client) = (&self.policy.state.name, canonical(client));
            let limit = self.policy.limits.max_connections;
            info!(%mapping, %client, max_connections = limit, suppressed, "client reset: the mapping is full");
        }
    }

    /// Writes the line of a `client` without a connection or flow to the access log.
    pub(crate) fn log_refusal(&self, client: SocketAddr, ending: Ending) {
        if let Some(recorder) = &self.policy.state.recorder {
            recorder.log_refusal(client, &self.recorded_port(), ending);
        }
    }

    /// Logs that clients wait because `max_connections` is reached.
    pub(crate) fn is_full(&self) {
        static FULL: LogLimit = LogLimit::new();

        if self.policy.state.tell_full()
            && let Some(suppressed) = FULL.permit()
        {
            let (mapping, limit) = (&self.policy.state.name, self.policy.limits.max_connections);
            info!(%mapping, max_connections = limit, suppressed, "the mapping is full: more clients wait in its backlog");
        }
    }
}
