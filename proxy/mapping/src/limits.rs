//! The limits of a mapping's connections and flows, and other options of serving them.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use crate::access::AccessList;
use crate::dscp::Dscp;
use crate::keepalive::Keepalive;
use crate::permissions::SocketPermissions;
use crate::proxy_protocol::{ProxyPeers, ProxyProtocol};
use crate::rate::Rate;
use crate::source::{Device, Source};

/// The limits of a mapping's connections and flows, the clients that it serves, and other options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The maximum time for the backend to accept a connection; `None` leaves it to the kernel (`tcp_syn_retries`,
    /// about two minutes).
    pub connect_timeout: Option<Duration>,
    /// A TCP connection is reset after this long without data in either direction; `None` for never.
    pub idle_timeout: Option<Duration>,
    /// A TCP connection is reset when what was sent is not acknowledged for this long (`TCP_USER_TIMEOUT`, tcp(7)); `None`
    /// leaves it to the kernel (`tcp_retries2`, about a quarter of an hour).
    pub tcp_user_timeout: Option<Duration>,
    /// How TCP connections without data are probed, on both sides.
    pub keepalive: Keepalive,
    /// The maximum number of concurrent TCP connections; `None` for as many as descriptors allow, two each.
    pub max_connections: Option<usize>,
    /// How to treat a connection beyond `max_connections`.
    pub on_limit: OnLimit,
    /// The maximum number of concurrent connections from one source, an IPv4 address or an IPv6 /64. Those beyond are reset.
    pub max_connections_per_source: Option<usize>,
    /// How fast one source may open connections and UDP flows. Connections beyond are reset, and datagrams dropped.
    pub rate: Option<Rate>,
    /// A UDP flow expires after this long without a datagram in either direction.
    pub udp_timeout: Duration,
    /// The maximum number of UDP flows; `None` for as many as descriptors allow: one each, and one more while the
    /// listener is congested.
    pub udp_max_flows: Option<usize>,
    /// The maximum number of UDP flows from one source, an IPv4 address or an IPv6 /64; `None` for three quarters of
    /// all.
    pub udp_max_flows_per_source: Option<usize>,
    /// Whether to accept replies from any port of the backend's address, as TFTP servers need (RFC 1350, section 4).
    /// The client's next datagrams then go to the port that replied last.
    pub udp_any_port: bool,
    /// The code point to send with in both directions. `None` keeps that of each datagram, and the default for
    /// connections.
    pub dscp: Option<Dscp>,
    /// Where connections and datagrams to the backend come from.
    pub source: Source,
    /// The interface that they have to leave by (`SO_BINDTODEVICE`, socket(7)); `None` leaves that to the routing table.
    pub device: Option<Device>,
    /// How the backend is told who a client is, and how a proxy in front tells it.
    pub proxy_protocol: ProxyProtocol,
    /// Whether the name of the backend has to resolve before the mapping is served.
    pub require_resolved: bool,
    /// Whether the process's access log has lines for its connections and flows.
    pub access_log: bool,
    /// Whether the host address is bound even if this machine does not have it yet (`IP_FREEBIND`, ip(7)).
    pub freebind: bool,
    /// Who may connect to the Unix socket that the mapping listens on; `None` for its owner. On the heap, because few
    /// mappings have one.
    pub socket: Option<Arc<SocketPermissions>>,
    /// The clients to serve. Connections of others are reset, and their datagrams are dropped.
    pub access: AccessList,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect_timeout: Some(Duration::from_secs(10)),
            idle_timeout: None,
            tcp_user_timeout: None,
            keepalive: Keepalive::default(),
            max_connections: None,
            on_limit: OnLimit::Wait,
            max_connections_per_source: None,
            rate: None,
            // The default of docker-proxy (moby, cmd/docker-proxy/udp_proxy_linux.go).
            udp_timeout: Duration::from_secs(90),
            udp_max_flows: None,
            udp_max_flows_per_source: None,
            udp_any_port: false,
            dscp: None,
            source: Source::Auto,
            device: None,
            proxy_protocol: ProxyProtocol::default(),
            require_resolved: false,
            access_log: true,
            freebind: false,
            socket: None,
            access: AccessList::default(),
        }
    }
}

impl Limits {
    /// An option in use that a mapping of SCTP cannot have: what a firewall matches as transparent is TCP or UDP, the
    /// PROXY protocol has headers of byte streams and datagrams, and these timers are those of TCP.
    pub fn not_of_sctp(&self) -> Option<&'static str> {
        let asked = [
            (self.source.is_client(), "source = client"),
            (self.proxy_protocol.send.is_some(), "send_proxy"),
            (!self.proxy_protocol.accept.is_empty(), "accept_proxy"),
            (self.tcp_user_timeout.is_some(), "tcp_user_timeout"),
            (self.keepalive != Keepalive::default(), "keepalive"),
        ];
        asked.into_iter().find_map(|(is_asked, option)| is_asked.then_some(option))
    }

    /// The first of the options that a connection to a Unix socket cannot have: those of its source.
    pub(crate) fn not_of_unix(&self) -> Option<String> {
        let source = (self.source != Source::Auto).then(|| format!("source = {}", self.source));
        source.or_else(|| self.device.as_ref().map(|device| format!("device = {device}")))
    }

    /// The first of the options that a mapping cannot have which listens on a Unix socket: its clients have no addresses,
    /// unless a proxy tells them.
    pub(crate) fn not_at_unix(&self) -> Option<&'static str> {
        let (proxy, tells_clients) = (&self.proxy_protocol, self.proxy_protocol.expects_header(None));
        let is_network = |peers: &ProxyPeers| *peers != ProxyPeers::Unix;
        let asked = [
            (self.freebind, "freebind"),
            (self.source.is_client() && !tells_clients, "source = client without accept_proxy = [\"unix\"]"),
            (!self.access.is_open() && !tells_clients, "allow and deny without accept_proxy = [\"unix\"]"),
            (proxy.accept.iter().any(is_network), "networks in accept_proxy, where \"unix\" stands for all"),
        ];
        asked.into_iter().find_map(|(is_asked, option)| is_asked.then_some(option))
    }

    /// The same without what a mapping of SCTP cannot have.
    #[must_use]
    pub fn of_sctp(self) -> Self {
        let Self { keepalive, proxy_protocol, .. } = Self::default();
        let source = if self.source.is_client() { Source::Auto } else { self.source };
        Self { source, proxy_protocol, tcp_user_timeout: None, keepalive, ..self }
    }

    /// Whether TCP sockets have other timers than by default.
    pub fn has_timers(&self) -> bool {
        self.tcp_user_timeout.is_some() || self.keepalive != Keepalive::default()
    }
}

/// How to treat a connection beyond the maximum of a mapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnLimit {
    /// It waits in the listener's backlog until another one ends.
    #[default]
    Wait,
    /// It is accepted and reset, so that its client can use another server.
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

/// Why a text is not a value of [`OnLimit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write \"wait\" or \"reset\"")]
pub struct OnLimitError;
