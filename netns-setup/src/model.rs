//! The wanted state: a network, its containers and their published ports.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use rproxy_mapping::addr::Protocol;
use serde::{Deserialize, Serialize};

use crate::addr::{Cidr, Mac, Subnet4, Subnet6};
use crate::family::Family;
use crate::host_ip::HostIp;
use crate::name::{CONTAINER_INTERFACE, Id, IfName, Name};
use crate::publish::PortRequest;
use crate::sysctl;

/// The directory of named network namespaces, shared with `ip netns`.
pub const NETNS_DIR: &str = "/run/netns";

/// What the alias of a bridge begins with; the identifier of its network follows.
const TAG: &str = "netns-setup:";

/// Everything that this program maintains.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// The network, once `up` has run.
    pub network: Option<Network>,
    /// The containers attached to it.
    #[serde(default)]
    pub endpoints: BTreeMap<Name, Endpoint>,
    /// What replies to transparent sockets need, if it is set up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transparent: Option<Transparent>,
}

impl Topology {
    /// Forgets what the kernel's numbers stood for before a reboot: no process or namespace is the recorded one.
    pub fn forget_boot(&mut self) {
        /// The kernel counts from 1.
        const NONE: u64 = 0;
        for endpoint in self.endpoints.values_mut() {
            endpoint.netns.cookie = endpoint.netns.cookie.map(|_| NONE);
            endpoint.mappings.iter_mut().for_each(|mapping| mapping.relay = None);
        }
    }

    /// The addresses that containers have.
    #[must_use]
    pub fn addresses(&self) -> BTreeSet<Ipv4Addr> {
        self.endpoints.values().map(|endpoint| endpoint.ip).collect()
    }

    /// The mappings that are in place, with their containers.
    pub fn active(&self) -> impl Iterator<Item = (&Name, &Endpoint, &Mapping)> {
        self.mappings().filter(|(_, _, mapping)| !mapping.suspended)
    }

    /// All mappings with their containers, ordered by the containers' names.
    pub fn mappings(&self) -> impl Iterator<Item = (&Name, &Endpoint, &Mapping)> {
        self.endpoints.iter().flat_map(|(name, endpoint)| {
            endpoint.mappings.iter().map(move |mapping| (name, endpoint, mapping))
        })
    }

    /// This topology, with everything of `other` that it lacks.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let mut all = self.clone();
        all.network = all.network.or_else(|| other.network.clone());
        all.transparent = match (all.transparent.take(), &other.transparent) {
            (Some(ours), Some(theirs)) => Some(ours.union(theirs)),
            (ours, theirs) => ours.or_else(|| theirs.clone()),
        };
        for (name, theirs) in &other.endpoints {
            let Some(ours) = all.endpoints.get_mut(name) else {
                all.endpoints.insert(name.clone(), theirs.clone());
                continue;
            };
            let known: BTreeSet<_> = ours.mappings.iter().map(Mapping::key).collect();
            let more = theirs.mappings.iter().filter(|mapping| !known.contains(&mapping.key()));
            ours.mappings.extend(more.cloned());
        }
        all
    }
}

/// The network that the alias of a bridge names.
#[must_use]
pub fn tagged(alias: &str) -> Option<Id> {
    alias.strip_prefix(TAG)?.parse().ok()
}

/// The program that installs the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Firewall {
    /// One separate table, with `nft`.
    Nft,
    /// Docker's chains, with `iptables-restore`.
    Iptables,
    /// No rules: they are managed elsewhere.
    None,
}

impl std::fmt::Display for Firewall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Nft => "nft",
            Self::Iptables => "iptables",
            Self::None => "none",
        })
    }
}

/// What is set up for the replies to transparent sockets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transparent {
    /// The interfaces that replies come in by.
    pub interfaces: BTreeSet<IfName>,
    /// The firewall that marks them.
    pub firewall: Firewall,
    /// Whether IPv6 is set up, too.
    pub ipv6: bool,
}

impl Transparent {
    /// The address families.
    pub fn families(&self) -> impl Iterator<Item = Family> + use<> {
        [Some(Family::V4), self.ipv6.then_some(Family::V6)].into_iter().flatten()
    }

    /// The policy routing rules, each as its family and its interface.
    pub fn rules(&self) -> impl Iterator<Item = (Family, IfName)> + use<'_> {
        self.families().flat_map(|family| self.interfaces.iter().map(move |iif| (family, *iif)))
    }

    /// Both together. The firewall is that of `self`: it only changes by taking everything down.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        Self {
            interfaces: self.interfaces.union(&other.interfaces).copied().collect(),
            firewall: self.firewall,
            ipv6: self.ipv6 || other.ipv6,
        }
    }
}

/// A kernel parameter that `up` changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SysctlChange {
    /// The name of the parameter, as in `sysctl`.
    pub key: String,
    /// Its value before `up`.
    pub before: String,
    /// Its value while the network is up.
    pub after: String,
}

/// The bridge and what belongs to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Docker's `NetworkID`.
    pub id: Id,
    /// The bridge.
    pub bridge: IfName,
    /// The pool of addresses.
    pub subnet: Subnet4,
    /// The pool of IPv6 addresses.
    pub subnet6: Option<Subnet6>,
    /// The MTU of the bridge and the veth pairs.
    pub mtu: u32,
    /// The largest packet inside the host (BIG TCP); 0 keeps the kernel's value.
    pub gso_max_size: u32,
    /// The firewall in use.
    pub firewall: Firewall,
    /// Whether IPv6 is switched off in the containers.
    #[serde(default)]
    pub disable_ipv6: bool,
    /// Kernel parameters that were changed.
    pub sysctls: Vec<SysctlChange>,
    /// The file that makes them persistent.
    pub persist: Option<PathBuf>,
    /// The most recently allocated address.
    pub last_ip: Option<Ipv4Addr>,
}

impl Network {
    /// The bridge's MAC address. It is set explicitly, because otherwise it changes with the bridge's ports.
    #[must_use]
    pub fn mac(&self) -> Mac {
        Mac::for_container(self.subnet.gateway())
    }

    /// The alias of the bridge, by which it is told from one that somebody else made.
    #[must_use]
    pub fn tag(&self) -> String {
        format!("{TAG}{}", self.id)
    }

    /// Whether a bridge of the right name is the one of this network. One that is not tagged is recognised by its
    /// hardware address: an earlier version, or a command that was interrupted, made it.
    #[must_use]
    pub fn is_bridge(&self, alias: Option<&str>, mac: Option<Mac>) -> bool {
        match alias {
            Some(alias) if alias.starts_with(TAG) => alias == self.tag(),
            _ => mac == Some(self.mac()),
        }
    }

    /// The bridge's own addresses.
    #[must_use]
    pub fn addresses(&self) -> Vec<Cidr> {
        // The kernel sends neighbour solicitations from a link-local address. The one it generates is
        // unusable until duplicate address detection has finished: for two seconds, no container would be
        // reachable from outside.
        const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
        let v4 = Cidr { ip: self.subnet.gateway().into(), prefix: self.subnet.prefix() };
        let v6 = self.subnet6.map(|subnet| {
            let global = Cidr { ip: subnet.gateway().into(), prefix: subnet.prefix() };
            [global, Cidr { ip: LINK_LOCAL.into(), prefix: 64 }]
        });
        std::iter::once(v4).chain(v6.into_iter().flatten()).collect()
    }

    /// The routers of a container.
    #[must_use]
    pub fn gateways(&self) -> Vec<IpAddr> {
        let v6 = self.subnet6.map(|subnet| IpAddr::V6(subnet.gateway()));
        std::iter::once(IpAddr::V4(self.subnet.gateway())).chain(v6).collect()
    }
}

/// A container's network namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Netns {
    /// The path of the namespace.
    pub path: PathBuf,
    /// Device and inode of a namespace that the user passed. PIDs and paths can be reused, and another
    /// namespace at the same path must not be changed.
    pub identity: Option<(u64, u64)>,
    /// The kernel's number of the namespace (`SO_NETNS_COOKIE`), which is not reused, unlike inodes. It is unknown
    /// before the namespace exists, and before Linux 5.14.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cookie: Option<u64>,
}

impl Netns {
    /// The namespace that `attach` creates for a container.
    #[must_use]
    pub fn made(name: &Name) -> Self {
        Self { path: Path::new(NETNS_DIR).join(name.as_str()), identity: None, cookie: None }
    }

    /// Whether this program created it, and therefore deletes it.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        self.identity.is_none()
    }
}

/// A container on the network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Docker's `EndpointID`.
    pub id: Id,
    /// Its address.
    pub ip: Ipv4Addr,
    /// Whether the user requested that address.
    pub ip_requested: bool,
    /// Its namespace.
    pub netns: Netns,
    /// The ports that `-P` publishes.
    pub exposed: Vec<(u16, Protocol)>,
    /// The ports that are published.
    pub mappings: Vec<Mapping>,
}

impl Endpoint {
    /// The address of its interface.
    #[must_use]
    pub fn mac(&self) -> Mac {
        Mac::for_container(self.ip)
    }

    /// Its IPv6 address, at the same offset as its IPv4 address.
    #[must_use]
    pub fn ip6(&self, network: &Network) -> Option<Ipv6Addr> {
        network.subnet6.map(|subnet| subnet.nth(network.subnet.offset(self.ip)))
    }

    /// The addresses of its interface.
    #[must_use]
    pub fn addresses(&self, network: &Network) -> Vec<Cidr> {
        let v4 = Cidr { ip: self.ip.into(), prefix: network.subnet.prefix() };
        let v6 = network.subnet6.zip(self.ip6(network));
        let v6 = v6.map(|(subnet, ip)| Cidr { ip: ip.into(), prefix: subnet.prefix() });
        std::iter::once(v4).chain(v6).collect()
    }

    /// The kernel parameter that switches IPv6 off in its namespace. In one that the user passed, other interfaces keep
    /// it.
    #[must_use]
    pub fn disable_ipv6(&self) -> String {
        let interface = if self.netns.is_ours() { "all" } else { CONTAINER_INTERFACE };
        sysctl::of_interface("ipv6", interface, "disable_ipv6")
    }

    /// Whether the kernel alone relays a mapping, so that the bridge may have to send a packet back to the
    /// port it came from.
    #[must_use]
    pub fn needs_hairpin(&self) -> bool {
        self.mappings.iter().any(|mapping| mapping.via == Via::Dnat && !mapping.suspended)
    }
}

/// What relays the traffic of a published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Via {
    /// `rproxy` alone.
    Proxy,
    /// The kernel alone.
    Dnat,
    /// As Docker does: the kernel for traffic from outside, `rproxy` for the rest.
    Both,
}

impl std::fmt::Display for Via {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Proxy => "proxy",
            Self::Dnat => "dnat",
            Self::Both => "both",
        })
    }
}

impl Via {
    /// Whether an `rproxy` serves it.
    #[must_use]
    pub fn has_relay(self) -> bool {
        self != Self::Dnat
    }

    /// Whether the kernel translates packets.
    #[must_use]
    pub fn has_dnat(self) -> bool {
        self != Self::Proxy
    }
}

/// The host side of a mapping, unique among mappings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MappingKey {
    /// The transport protocol.
    pub proto: Protocol,
    /// The addresses.
    pub host: HostIp,
    /// The port.
    pub port: u16,
}

impl std::fmt::Display for MappingKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}/{}", self.host, self.port, self.proto)
    }
}

/// One published port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// The transport protocol.
    pub proto: Protocol,
    /// The addresses of the host.
    pub host: HostIp,
    /// The port of the host.
    pub host_port: u16,
    /// Whether the port was chosen at random.
    pub random: bool,
    /// The port in the container.
    pub container_port: u16,
    /// What relays the traffic.
    pub via: Via,
    /// The `rproxy` that an earlier version has started for this port alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relay: Option<RelayProcess>,
    /// Whether it is not in place because another program had its port when it was to be restored. `repair` tries again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub suspended: bool,
}

impl Mapping {
    /// The host's side.
    #[must_use]
    pub fn key(&self) -> MappingKey {
        MappingKey { proto: self.proto, host: self.host, port: self.host_port }
    }

    /// Whether both are equal, ignoring the relay process.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        self.key() == other.key()
            && self.container_port == other.container_port
            && self.via == other.via
            && self.suspended == other.suspended
    }

    /// Whether this mapping satisfies `request`.
    #[must_use]
    pub fn fulfils(&self, request: &PortRequest) -> bool {
        self.proto == request.proto
            && self.host == request.host
            && self.container_port == request.container_port
            && request.host_port.admits(self.host_port, self.random)
    }

    /// Whether this mapping and `key` exclude each other.
    #[must_use]
    pub fn conflicts(&self, key: MappingKey) -> bool {
        self.proto == key.proto && self.host_port == key.port && self.host.overlaps(key.host)
    }
}

/// A process, distinguished by its start time from a later one with the same PID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayProcess {
    /// The process ID.
    pub pid: u32,
    /// The kernel's `starttime`, in clock ticks since boot (proc_pid_stat(5), field 22).
    pub started: u64,
}
