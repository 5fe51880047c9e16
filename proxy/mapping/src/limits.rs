//! What bounds the connections and flows of a mapping, and how they are served.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::access::AccessList;
use crate::dscp::Dscp;

/// What bounds the connections and flows of a mapping, who may have some, and what else holds for them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How long the backend may take to answer a connection attempt; `None` leaves it to the kernel
    /// (`tcp_syn_retries`, about two minutes).
    pub connect_timeout: Option<Duration>,
    /// A TCP connection is cut when neither side has sent anything for this long; `None` for never.
    pub idle_timeout: Option<Duration>,
    /// TCP connections at a time; `None` for as many as descriptors allow, two each.
    pub max_connections: Option<usize>,
    /// What happens to a connection beyond `max_connections`.
    pub on_limit: OnLimit,
    /// A UDP flow is over when neither side has sent anything for this long.
    pub udp_timeout: Duration,
    /// UDP flows at a time; `None` for as many as descriptors allow: one each, and one more while the listener is full.
    pub udp_max_flows: Option<usize>,
    /// UDP flows at a time from one source, an IPv4 address or the /64 of an IPv6 one; `None` for
    /// three quarters of all.
    pub udp_max_flows_per_source: Option<usize>,
    /// Whether answers come from any port of the backend's address, as those of TFTP servers do (RFC 1350, section 4).
    /// What follows goes to the port that answered last.
    pub udp_any_port: bool,
    /// The code point of what is sent, both ways; `None` passes on that of datagrams, and leaves connections the
    /// default one.
    pub dscp: Option<Dscp>,
    /// The clients that are served. Others are reset, and their datagrams dropped.
    pub access: AccessList,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect_timeout: Some(Duration::from_secs(10)),
            idle_timeout: None,
            max_connections: None,
            on_limit: OnLimit::Wait,
            // As docker-proxy (moby, cmd/docker-proxy/udp_proxy_linux.go).
            udp_timeout: Duration::from_secs(90),
            udp_max_flows: None,
            udp_max_flows_per_source: None,
            udp_any_port: false,
            dscp: None,
            access: AccessList::default(),
        }
    }
}

/// What happens to a connection beyond the most that a mapping may have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnLimit {
    /// It waits in the backlog of the listener until another one ends.
    #[default]
    Wait,
    /// It is accepted and reset, so that its client can go elsewhere.
    Reset,
}

impl fmt::Display for OnLimit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Wait => "wait",
            Self::Reset => "reset",
        })
    }
}

impl FromStr for OnLimit {
    type Err = OnLimitError;

    fn from_str(text: &str) -> Result<Self, OnLimitError> {
        [Self::Wait, Self::Reset].into_iter().find(|known| known.to_string() == text).ok_or(OnLimitError)
    }
}

/// A text that says nothing about connections beyond the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write \"wait\" or \"reset\"")]
pub struct OnLimitError;
