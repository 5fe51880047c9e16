//! What is wanted: a network, its containers and their published ports.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::addr::{Cidr, Mac, Subnet4, Subnet6};
use crate::name::{Id, IfName, Name};
use crate::publish::{HostIp, PortRequest, Proto};

/// Where named network namespaces are found, by `ip netns` and by this program.
pub const NETNS_DIR: &str = "/run/netns";

/// Everything that this program is to keep in place.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// The network, once `up` has run.
    pub network: Option<Network>,
    /// The containers attached to it.
    #[serde(default)]
    pub endpoints: BTreeMap<Name, Endpoint>,
}

impl Topology {
    /// The addresses that containers have.
    #[must_use]
    pub fn addresses(&self) -> BTreeSet<Ipv4Addr> {
        self.endpoints.values().map(|endpoint| endpoint.ip).collect()
    }

    /// Every mapping with the container it leads to, containers in order of their names.
    pub fn mappings(&self) -> impl Iterator<Item = (&Name, &Endpoint, &Mapping)> {
        self.endpoints.iter().flat_map(|(name, endpoint)| {
            endpoint.mappings.iter().map(move |mapping| (name, endpoint, mapping))
        })
    }

    /// This topology with everything of `other` that it does not have: what belongs to either.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        let mut all = self.clone();
        all.network = all.network.or_else(|| other.network.clone());
        for (name, theirs) in &other.endpoints {
            let Some(ours) = all.endpoints.get_mut(name) else {
                all.endpoints.insert(name.clone(), theirs.clone());
                continue;
            };
            for mapping in &theirs.mappings {
                if !ours.mappings.iter().any(|known| known.key() == mapping.key()) {
                    ours.mappings.push(mapping.clone());
                }
            }
        }
        all
    }
}

/// Which program the rules are handed to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Firewall {
    /// One table of our own, through `nft`.
    Nft,
    /// Docker's chains, through `iptables-restore`.
    Iptables,
    /// No rules: somebody else writes them.
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

/// A kernel setting that `up` makes, with what it was before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SysctlChange {
    /// The setting, as `sysctl` names it.
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
    /// The largest packet on the wire, for the bridge and the veth pairs.
    pub mtu: u32,
    /// The largest packet inside the host (BIG TCP), 0 to leave the kernel's.
    pub gso_max_size: u32,
    /// Who filters and translates.
    pub firewall: Firewall,
    /// Kernel settings that had to change.
    pub sysctls: Vec<SysctlChange>,
    /// The file that makes them permanent.
    pub persist: Option<PathBuf>,
    /// The address handed out most recently.
    pub last_ip: Option<Ipv4Addr>,
}

impl Network {
    /// The bridge's MAC. Set by hand, because a bridge without one changes it with its ports.
    #[must_use]
    pub fn mac(&self) -> Mac {
        Mac::for_container(self.subnet.gateway())
    }

    /// The bridge's own addresses.
    #[must_use]
    pub fn addresses(&self) -> Vec<Cidr> {
        // The kernel asks for a neighbour from a link-local address, and the one it makes itself is not usable
        // until duplicate detection is over: for two seconds no container would be reached from outside.
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
    /// Where it is found.
    pub path: PathBuf,
    /// Device and inode of a namespace that was given to us. A PID can be recycled, and so can a path:
    /// another namespace at the same place must not be touched.
    pub identity: Option<(u64, u64)>,
}

impl Netns {
    /// The namespace that `attach` makes for a container.
    #[must_use]
    pub fn made(name: &Name) -> Self {
        Self { path: Path::new(NETNS_DIR).join(name.as_str()), identity: None }
    }

    /// Whether this program made it, and so removes it.
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
    /// Whether that address was asked for.
    pub ip_requested: bool,
    /// Its namespace.
    pub netns: Netns,
    /// The ports that `-P` publishes.
    pub exposed: Vec<(u16, Proto)>,
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

    /// Whether the kernel alone carries some mapping, so that a packet may have to leave by the port it came in.
    #[must_use]
    pub fn needs_hairpin(&self) -> bool {
        self.mappings.iter().any(|mapping| mapping.via == Via::Dnat)
    }
}

/// What carries the traffic of a published port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Via {
    /// `rproxy` alone.
    Proxy,
    /// The kernel alone.
    Dnat,
    /// As Docker does: the kernel for what comes from outside, `rproxy` for the rest.
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

    /// Whether packets are translated.
    #[must_use]
    pub fn has_dnat(self) -> bool {
        self != Self::Proxy
    }
}

/// The host's side of a mapping: no two mappings share one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MappingKey {
    /// The transport protocol.
    pub proto: Proto,
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
    pub proto: Proto,
    /// The addresses of the host.
    pub host: HostIp,
    /// The port of the host.
    pub host_port: u16,
    /// Whether any free port of the host would have done.
    pub random: bool,
    /// The port in the container.
    pub container_port: u16,
    /// What carries the traffic.
    pub via: Via,
    /// The `rproxy` that serves it.
    pub relay: Option<RelayProcess>,
}

impl Mapping {
    /// The host's side.
    #[must_use]
    pub fn key(&self) -> MappingKey {
        MappingKey { proto: self.proto, host: self.host, port: self.host_port }
    }

    /// Whether both mean the same, whichever process serves them.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        self.key() == other.key() && self.container_port == other.container_port && self.via == other.via
    }

    /// Whether this mapping is what `request` asks for.
    #[must_use]
    pub fn fulfils(&self, request: &PortRequest) -> bool {
        self.proto == request.proto
            && self.host == request.host
            && self.container_port == request.container_port
            && request.host_port.admits(self.host_port, self.random)
    }

    /// Whether both cannot be published at once.
    #[must_use]
    pub fn conflicts(&self, key: MappingKey) -> bool {
        self.proto == key.proto && self.host_port == key.port && self.host.overlaps(key.host)
    }
}

/// A process, told apart from a later one with the same PID by when it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RelayProcess {
    /// The process ID.
    pub pid: u32,
    /// The kernel's `starttime`, in clock ticks since boot (proc_pid_stat(5), field 22).
    pub started: u64,
}
