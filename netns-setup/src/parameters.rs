//! Kernel parameters that a network needs while it exists, in addition to those that `up` switches on.

use crate::model::Network;
use crate::name::IfName;
use crate::sysctl::of_interface;

/// It exists if this kernel has IPv6.
pub const HAS_IPV6: &str = "net.ipv6.conf.default.accept_ra";

/// A parameter and its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// The name, as in `sysctl`.
    pub key: String,
    /// The value.
    pub value: &'static str,
}

impl Parameter {
    fn of(interface: &IfName, (family, name, value): (&str, &str, &'static str)) -> Self {
        Self { key: of_interface(family, interface.as_str(), name), value }
    }

    /// Whether a kernel without IPv6 lacks it.
    #[must_use]
    pub fn is_ipv6(&self) -> bool {
        self.key.starts_with("net.ipv6.")
    }
}

/// What makes the host a router. The kernel sets that of each interface with it.
#[must_use]
pub fn forwarding(network: &Network) -> Vec<Parameter> {
    let keys = [Some("net.ipv4.ip_forward"), network.subnet6.map(|_| "net.ipv6.conf.all.forwarding")];
    keys.into_iter().flatten().map(|key| Parameter { key: key.to_owned(), value: "1" }).collect()
}

/// What keeps containers from changing the host's routes: without `accept_ra=0`, any container can send a router
/// advertisement and become the host's default router (CVE-2020-13401; `setupDefaultSysctl` of moby's
/// `setup_device_linux.go`). The bridge has IPv6 if the network has (`setupBridgeIPv6` of `setup_ipv6_linux.go`).
#[must_use]
pub fn bridge(network: &Network) -> Vec<Parameter> {
    let disable_ipv6 = if network.subnet6.is_some() { "0" } else { "1" };
    let parameters = [
        ("ipv6", "accept_ra", "0"),
        ("ipv6", "accept_redirects", "0"),
        ("ipv4", "accept_redirects", "0"),
        ("ipv6", "disable_ipv6", disable_ipv6),
    ];
    parameters.map(|parameter| Parameter::of(&network.bridge, parameter)).into()
}

/// Whether packets that come in by the bridge are forwarded.
#[must_use]
pub fn bridge_forwarding(network: &Network) -> Vec<Parameter> {
    interface_forwarding(network, network.bridge.as_str())
}

/// Whether packets that come in by any interface are.
#[must_use]
pub fn interface_forwarding(network: &Network, interface: &str) -> Vec<Parameter> {
    let families = [Some("ipv4"), network.subnet6.map(|_| "ipv6")];
    let of = |family| Parameter { key: of_interface(family, interface, "forwarding"), value: "1" };
    families.into_iter().flatten().map(of).collect()
}

/// A port of the bridge has no addresses: what containers send belongs to the bridge.
#[must_use]
pub fn port(name: &IfName) -> Vec<Parameter> {
    [("ipv6", "accept_ra", "0"), ("ipv6", "disable_ipv6", "1")]
        .map(|parameter| Parameter::of(name, parameter))
        .into()
}
