//! A mapping: one host address and the backend that it stands for.

use std::fmt;
use std::time::Duration;

use crate::addr::{BackendAddr, HostAddr, Protocol};

/// What is published where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The transport protocol, the same on both sides.
    pub protocol: Protocol,
    /// Where clients connect.
    pub host: HostAddr,
    /// Where they end up.
    pub backend: BackendAddr,
    /// Whether an IPv6 wildcard leaves IPv4 clients out (`IPV6_V6ONLY`, ipv6(7)).
    pub v6only: bool,
}

impl Mapping {
    /// Refuses a mapping whose backend is its own host address: each connection would open another
    /// one, until descriptors run out.
    ///
    /// # Errors
    /// [`LoopError`] in that case.
    pub fn refuse_loop(self) -> Result<Self, LoopError> {
        if self.host.is_reached_by(self.backend) {
            return Err(LoopError(self));
        }
        Ok(self)
    }
}

impl fmt::Display for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} -> {}", self.host, self.protocol, self.backend)
    }
}

/// A mapping that forwards to itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} would forward to itself; choose another port or another backend", .0.host)]
pub struct LoopError(Mapping);

/// What bounds connections and flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How long the backend may take to answer a connection attempt; `None` leaves it to the kernel
    /// (`tcp_syn_retries`, about two minutes).
    pub connect_timeout: Option<Duration>,
    /// A UDP flow is over when neither side has sent anything for this long.
    pub udp_timeout: Duration,
    /// UDP flows at a time; `None` for as many as descriptors allow, one each.
    pub udp_max_flows: Option<usize>,
    /// UDP flows at a time from one source, an IPv4 address or the /64 of an IPv6 one; `None` for
    /// three quarters of all.
    pub udp_max_flows_per_source: Option<usize>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect_timeout: Some(Duration::from_secs(10)),
            // As docker-proxy (moby, cmd/docker-proxy/udp_proxy_linux.go).
            udp_timeout: Duration::from_secs(90),
            udp_max_flows: None,
            udp_max_flows_per_source: None,
        }
    }
}
