//! Clients that a mapping does not serve are counted and logged.

use std::time::Instant;

use rproxy_mapping::addr::Protocol;
use tracing::info;

use crate::log::limit::LogLimit;
use crate::state::Target;
use crate::state::client::ClientAddr;
use crate::state::record::Ending;
use crate::state::sources::{Place, Source, Token};
use crate::state::stats::FailureKind;

impl Target {
    /// Whether `client`, a peer of the mapping's socket, is served.
    pub(crate) fn admits(&self, client: impl Into<ClientAddr>) -> bool {
        static DENIED: LogLimit = LogLimit::new();

        let client = client.into();
        let Some(reason) = self.policy.limits.access.refusal(client.ip()) else { return true };
        self.policy.state.stats.count_of(self.port_mapping.protocol, FailureKind::Denied);
        if let Some(suppressed) = DENIED.permit() {
            let (mapping, client) = (&self.policy.state.name, client.canonical());
            info!(%mapping, %client, reason, suppressed, "client refused");
        }
        false
    }

    /// Counts and logs that `client` is reset because `max_connections` is reached.
    pub(crate) fn is_over_limit(&self, client: ClientAddr) {
        static OVER: LogLimit = LogLimit::new();

        self.policy.state.stats.count(FailureKind::OverLimit);
        if let Some(suppressed) = OVER.permit() {
            let (mapping, client) = (&self.policy.state.name, client.canonical());
            let limit = self.policy.limits.max_connections;
            info!(%mapping, %client, max_connections = limit, suppressed, "client reset: the mapping is full");
        }
    }

    /// Whether the source of `client` may have another connection, which counts until the place is dropped.
    ///
    /// # Errors
    /// How the connection ends; that is counted and logged.
    pub(crate) fn admit_source(&self, client: ClientAddr) -> Result<Option<Box<Place>>, Ending> {
        static OVER: LogLimit = LogLimit::new();

        let limits = &self.policy.limits;
        if limits.max_connections_per_source.is_none() && limits.rate.is_none() {
            return Ok(None);
        }
        let (state, source) = (&self.policy.state, Source::of(client));
        let place = limits.max_connections_per_source.map(|most| Place::take(state, source, most));
        if let (Some(None), Some(limit)) = (&place, limits.max_connections_per_source) {
            state.stats.count(FailureKind::OverSourceLimit);
            if let Some(suppressed) = OVER.permit() {
                let (mapping, client) = (&state.name, client.canonical());
                info!(%mapping, %client, %source, max_connections_per_source = limit, suppressed, "client reset: its source has as many connections as it may");
            }
            return Err(Ending::OverSourceLimit);
        }
        // A connection that is refused takes no token.
        if self.admits_at_rate(client) { Ok(place.flatten()) } else { Err(Ending::OverRate) }
    }

    /// Whether the source of `client` may open another connection or flow now.
    pub(crate) fn admits_at_rate(&self, client: impl Into<ClientAddr>) -> bool {
        static OVER: LogLimit = LogLimit::new();
        static MANY: LogLimit = LogLimit::new();

        let (client, Some(rate)) = (client.into(), self.policy.limits.rate) else { return true };
        let (state, protocol) = (&self.policy.state, self.port_mapping.protocol);
        let (mapping, source) = (&state.name, Source::of(client));
        match state.sources().take_token(source, rate, Instant::now()) {
            Token::Taken => true,
            Token::Free => {
                if let Some(suppressed) = MANY.permit() {
                    let client = client.canonical();
                    info!(%mapping, %client, %source, %rate, suppressed, "client of a source whose rate is not limited: too many sources are at once");
                }
                true
            }
            Token::None => {
                state.stats.count_of(protocol, FailureKind::OverRate);
                if let Some(suppressed) = OVER.permit() {
                    let client = client.canonical();
                    let what = if protocol == Protocol::Udp { "datagram dropped" } else { "client reset" };
                    info!(%mapping, %client, %source, %rate, suppressed, "{what}: its source exceeds the rate");
                }
                false
            }
        }
    }

    /// Writes the line of a `client` without a connection or flow to the access log.
    pub(crate) fn log_refusal(&self, client: impl Into<ClientAddr>, ending: Ending) {
        if let Some(recorder) = &self.policy.state.recorder {
            recorder.log_refusal(client.into(), &self.recorded_port(), ending);
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
