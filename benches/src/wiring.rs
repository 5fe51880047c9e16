//! The network that everything runs in: the topology of the test suites, with what load needs.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};

use rproxy_tests::netns::Namespace;
use rproxy_tests::topology::{CONTAINER_V4, HOST_V4, Topology};

use crate::backend::{Backend, BackendError};

/// Where the backend listens, in the container.
const BACKEND_PORT: u16 = 7000;

/// Congestion controls that do not pace, the first that a namespace may use being taken: the kernel's own
/// default, and its forerunner, which behaves the same where nothing is lost. What this host has set may
/// be BBR; without its queueing discipline, that paces every connection by a timer, and bulk workloads
/// would measure timers.
const CONGESTION_CONTROLS: [&str; 2] = ["cubic", "reno"];

/// Settings of a namespace, under /proc/sys/net/ipv4. Whoever closes a connection first keeps its port for
/// a minute, and the thousands of connections of a run would use all of them up: here, such a port can be
/// used again after a second.
const CLIENT_SETTINGS: [(&str, &str); 2] = [("ip_local_port_range", "1024 65535"), ("tcp_tw_reuse", "1")];
/// The host dials the backend from its own ports, and forwards for those who use no proxy. The ports
/// that peers listen on stay out of the way.
const HOST_SETTINGS: [(&str, &str); 3] =
    [("ip_local_port_range", "40000 65535"), ("tcp_tw_reuse", "1"), ("ip_forward", "1")];

/// Client, host and container, with the backend running.
pub(crate) struct Wiring {
    net: Topology,
    backend: Backend,
}

/// The network could not be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WiringError {
    /// The kernel has no such setting, or not this value for it.
    #[error("cannot set net.ipv4.{name} to '{value}': {source}")]
    Setting {
        /// Its name.
        name: &'static str,
        /// The value wanted.
        value: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The backend.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

impl Wiring {
    /// Builds the namespaces and starts the backend.
    ///
    /// # Errors
    /// [`WiringError`]
    ///
    /// # Panics
    /// When a namespace or an interface cannot be made; the test suites' library says why.
    pub(crate) fn new() -> Result<Self, WiringError> {
        let net = Topology::new();
        for namespace in [&net.client, &net.host, &net.container] {
            choose_congestion_control(namespace)?;
        }
        configure(&net.client, &CLIENT_SETTINGS)?;
        configure(&net.host, &HOST_SETTINGS)?;
        // For those who use no proxy, and no address translation either.
        net.client.ip(&format!("route add {CONTAINER_V4} via {HOST_V4}"));
        let address = SocketAddrV4::new(CONTAINER_V4, BACKEND_PORT);
        let backend = net.container.run(|| Backend::start(address))?;
        Ok(Self { net, backend })
    }

    /// Where clients are.
    pub(crate) fn client(&self) -> &Namespace {
        &self.net.client
    }

    /// Where peers run.
    pub(crate) fn host(&self) -> &Namespace {
        &self.net.host
    }

    /// Where peers forward to.
    pub(crate) fn backend(&self) -> SocketAddrV4 {
        self.backend.address()
    }

    /// Where peers listen, as clients see it.
    pub(crate) fn host_address(&self) -> Ipv4Addr {
        HOST_V4
    }
}

fn choose_congestion_control(namespace: &Namespace) -> Result<(), WiringError> {
    let choose = |value| configure(namespace, &[("tcp_congestion_control", value)]);
    let [wanted, instead] = CONGESTION_CONTROLS;
    // A namespace may only use what its host has put on a list.
    choose(wanted).or_else(|_not_allowed| choose(instead))
}

fn configure(namespace: &Namespace, settings: &[(&'static str, &'static str)]) -> Result<(), WiringError> {
    settings.iter().try_for_each(|(name, value)| {
        let write = || fs::write(format!("/proc/sys/net/ipv4/{name}"), value);
        namespace.run(write).map_err(|source| WiringError::Setting { name, value, source })
    })
}
