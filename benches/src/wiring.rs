//! The test network: the topology of the test suites, with tuning for load.

use std::fmt;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};

use testkit::netns::Namespace;
use testkit::topology::{CONTAINER_V4, HOST_V4, Topology};

use crate::backend::{Backend, BackendError};

/// The address of the backend, in the container.
const BACKEND_PORT: u16 = 7000;

/// Congestion controls that do not pace; the first that a namespace may use is selected: the kernel's
/// default, and its predecessor, which behaves the same without loss. The host may be set to BBR, which paces
/// every connection with a timer unless it has its queueing discipline. Bulk workloads would then measure
/// timers.
const CONGESTION_CONTROLS: [&str; 2] = ["cubic", "reno"];

/// Parameters of a namespace, under /proc/sys/net/ipv4. The side that closes a connection first keeps its
/// port for a minute, and the thousands of connections of a run would exhaust them. With this setting, such a
/// port can be reused after a second.
const CLIENT_SETTINGS: [(&str, &str); 2] = [("ip_local_port_range", "1024 65535"), ("tcp_tw_reuse", "1")];
/// The host connects to the backend from local ports that exclude those on which peers listen. It forwards for
/// peers without a proxy.
const HOST_SETTINGS: [(&str, &str); 3] =
    [("ip_local_port_range", "40000 65535"), ("tcp_tw_reuse", "1"), ("ip_forward", "1")];

/// A protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Tcp,
    Udp,
    /// Over UDP, to a port of the backend that nothing else uses.
    Quic,
}

impl Protocol {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Quic];

    /// The name of the transport, as peers know it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp | Self::Quic => "udp",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Client, host and container, with the backend running.
pub(crate) struct Wiring {
    net: Topology,
    backend: Backend,
}

/// The network could not be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WiringError {
    /// The kernel lacks the parameter, or refuses the value.
    #[error("cannot set net.ipv4.{name} to '{value}': {source}")]
    Setting {
        /// Its name.
        name: &'static str,
        /// The wanted value.
        value: &'static str,
        /// The error of the kernel.
        source: io::Error,
    },
    /// The backend.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl Wiring {
    /// Creates the namespaces and starts the backend.
    ///
    /// # Errors
    /// [`WiringError`]
    ///
    /// # Panics
    /// If a namespace or an interface cannot be created; the test library says why.
    pub(crate) fn new() -> Result<Self, WiringError> {
        let net = Topology::new();
        for namespace in [&net.client, &net.host, &net.container] {
            choose_congestion_control(namespace)?;
        }
        configure(&net.client, &CLIENT_SETTINGS)?;
        configure(&net.host, &HOST_SETTINGS)?;
        // For peers without a proxy or address translation.
        net.client.ip(&format!("route add {CONTAINER_V4} via {HOST_V4}"));
        let address = SocketAddrV4::new(CONTAINER_V4, BACKEND_PORT);
        let backend = net.container.run(|| Backend::start(address))?;
        Ok(Self { net, backend })
    }

    /// The namespace of the clients.
    pub(crate) fn client(&self) -> &Namespace {
        &self.net.client
    }

    /// The namespace of the peers.
    pub(crate) fn host(&self) -> &Namespace {
        &self.net.host
    }

    /// The address that peers forward TCP and UDP to.
    pub(crate) fn backend(&self) -> SocketAddrV4 {
        self.backend.address()
    }

    /// The address that peers forward `protocol` to.
    pub(crate) fn backend_for(&self, protocol: Protocol) -> SocketAddrV4 {
        match protocol {
            Protocol::Tcp | Protocol::Udp => self.backend.address(),
            Protocol::Quic => self.backend.quic(),
        }
    }

    /// The address of the peers, as seen by clients.
    pub(crate) fn host_address(&self) -> Ipv4Addr {
        HOST_V4
    }
}

fn choose_congestion_control(namespace: &Namespace) -> Result<(), WiringError> {
    let choose = |value| configure(namespace, &[("tcp_congestion_control", value)]);
    let [wanted, instead] = CONGESTION_CONTROLS;
    // A namespace may only use what the host has permitted.
    choose(wanted).or_else(|_not_allowed| choose(instead))
}

fn configure(namespace: &Namespace, settings: &[(&'static str, &'static str)]) -> Result<(), WiringError> {
    settings.iter().try_for_each(|(name, value)| {
        let write = || fs::write(format!("/proc/sys/net/ipv4/{name}"), value);
        namespace.run(write).map_err(|source| WiringError::Setting { name, value, source })
    })
}
