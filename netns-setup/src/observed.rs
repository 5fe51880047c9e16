//! The observed state of the kernel, as plain data.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;

use crate::action::OffloadSizes;
use crate::addr::{Cidr, Mac};
use crate::block::Block;
use crate::family::Family;
use crate::firewall::iptables::SavedTables;
use crate::model::{MappingKey, RelayProcess};
use crate::name::{IfName, Name};
use crate::relayed::RelayedPort;
use crate::transparent::{MARK, PRIORITY, TABLE};

/// An interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// The kernel's index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its type, such as `bridge` or `veth`.
    pub kind: Option<String>,
    /// Its alias, a text that anybody may set.
    pub alias: Option<String>,
    /// Its hardware address.
    pub mac: Option<Mac>,
    /// The MTU.
    pub mtu: u32,
    /// Whether it is a bridge with a spanning tree protocol.
    pub stp: bool,
    /// Whether it is administratively up.
    pub up: bool,
    /// The index of the bridge that it is a port of.
    pub master: Option<u32>,
    /// Whether it has hairpin mode, in which a bridge port sends frames back.
    pub hairpin: bool,
    /// The packet sizes inside the host, as far as this kernel supports them.
    pub offload: OffloadSizes,
    /// The largest packet that the driver accepts.
    pub tso_max_size: Option<u32>,
}

/// A route of the main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// The destination; `None` for a default route.
    pub destination: Option<Cidr>,
    /// The router.
    pub gateway: Option<IpAddr>,
    /// The index of the interface.
    pub oif: Option<u32>,
}

/// Where a policy routing rule leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RuleTarget {
    /// To a routing table.
    Table(u32),
    /// To the next rule.
    Nothing,
    /// To a later rule.
    Goto(u32),
    /// To an error.
    Refusal(&'static str),
}

/// A policy routing rule, as far as this program has to understand it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyRule {
    /// Rules are tried in the order of their priorities, the smallest first.
    pub priority: u32,
    /// The interface that a packet must have come in by; `lo` stands for this host's own packets.
    pub iif: Option<String>,
    /// The required mark and the bits of it that count.
    pub fwmark: Option<(u32, u32)>,
    /// The required source address.
    pub source: Option<Cidr>,
    /// Where it leads.
    pub target: RuleTarget,
    /// Whether it has further conditions.
    pub is_partial: bool,
    /// Whether it is for packets that do not fulfil its conditions.
    pub is_negated: bool,
    /// Whether it is for packets that this host sends by a certain interface.
    pub for_output: bool,
}

impl PolicyRule {
    /// The rule of this program for an interface.
    #[must_use]
    pub fn ours(iif: &IfName) -> Self {
        Self {
            priority: PRIORITY,
            iif: Some(iif.to_string()),
            fwmark: Some((MARK, MARK)),
            source: None,
            target: RuleTarget::Table(TABLE),
            is_partial: false,
            is_negated: false,
            for_output: false,
        }
    }

    /// Whether this is the rule of this program for an interface.
    #[must_use]
    pub fn is_ours(&self, iif: &IfName) -> bool {
        *self == Self::ours(iif)
    }
}

impl fmt::Display for PolicyRule {
    /// As `ip rule` lists it, without conditions that this program does not read.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let not = if self.is_negated { "not " } else { "" };
        write!(f, "{}: {not}from ", self.priority)?;
        match &self.source {
            Some(source) => write!(f, "{source}")?,
            None => f.write_str("all")?,
        }
        if let Some((mark, mask)) = self.fwmark {
            write!(f, " fwmark {mark:#x}")?;
            if mask != u32::MAX {
                write!(f, "/{mask:#x}")?;
            }
        }
        if let Some(iif) = &self.iif {
            write!(f, " iif {iif}")?;
        }
        if self.is_partial || self.for_output {
            f.write_str(" …")?;
        }
        match self.target {
            // rt_tables(5) has these names.
            RuleTarget::Table(253) => f.write_str(" lookup default"),
            RuleTarget::Table(254) => f.write_str(" lookup main"),
            RuleTarget::Table(255) => f.write_str(" lookup local"),
            RuleTarget::Table(table) => write!(f, " lookup {table}"),
            RuleTarget::Nothing => f.write_str(" nop"),
            RuleTarget::Goto(priority) => write!(f, " goto {priority}"),
            RuleTarget::Refusal(name) => write!(f, " {name}"),
        }
    }
}

/// A route of this program's table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableRoute {
    /// The address family.
    pub family: Family,
    /// Whether it delivers to this host.
    pub is_local: bool,
    /// The destination; `None` for a default route.
    pub destination: Option<Cidr>,
    /// The index of the interface.
    pub oif: Option<u32>,
}

/// What replies to transparent sockets depend on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TransparentParts {
    /// The policy routing rules in the kernel's order.
    pub policy: BTreeMap<Family, Vec<PolicyRule>>,
    /// The routes of this program's table.
    pub routes: Vec<TableRoute>,
    /// The rules that mark.
    pub rules: Rules,
    /// Whether this host has IPv6.
    pub has_ipv6: bool,
}

/// One network namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Side {
    /// Its interfaces.
    pub links: Vec<Link>,
    /// Its addresses, with the index of the interface.
    pub addresses: Vec<(u32, Cidr)>,
    /// Its routes.
    pub routes: Vec<Route>,
    /// Its kernel parameters, as far as they were looked at and exist.
    pub sysctls: BTreeMap<String, String>,
}

impl Side {
    /// The interface of that name.
    #[must_use]
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }

    /// Whether the interface has the address.
    #[must_use]
    pub fn has_address(&self, link: &Link, address: Cidr) -> bool {
        self.addresses.contains(&(link.index, address))
    }

    /// The interfaces by which packets for containers may come in from other hosts: they are up, and no ports of a bridge.
    pub fn outside<'a>(&'a self, bridge: &'a IfName) -> impl Iterator<Item = &'a Link> {
        let inside = [IfName::loopback(), *bridge];
        self.links.iter().filter(move |link| {
            link.up && link.master.is_none() && inside.iter().all(|name| link.name != name.as_str())
        })
    }

    /// Whether the addresses of `network` are reached by the interface itself.
    #[must_use]
    pub fn is_connected(&self, link: &Link, network: Cidr) -> bool {
        self.routes.iter().any(|route| {
            (route.destination, route.oif, route.gateway) == (Some(network), Some(link.index), None)
        })
    }

    /// Whether there is a default route through `gateway`.
    #[must_use]
    pub fn has_default_route(&self, gateway: IpAddr) -> bool {
        self.routes.iter().any(|route| route.destination.is_none() && route.gateway == Some(gateway))
    }
}

/// The rules of the backend in use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Rules {
    /// There is no backend.
    #[default]
    None,
    /// The table of this program, as `nft` lists it.
    Nft {
        /// The listing; `None` if there is no such table.
        listing: Option<String>,
        /// How `nft` lists the wanted table; `None` if there is none, or the rules are assumed to be unchanged.
        wanted: Option<String>,
    },
    /// The tables of both families, as `iptables-save` lists them.
    Iptables(BTreeMap<Family, SavedTables>),
}

/// The relay of a network, and what others have left of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ObservedRelay {
    /// The ports that it serves, or is to serve.
    pub served: BTreeMap<MappingKey, RelayedPort>,
    /// Those of them that it refuses now, and why.
    pub unserved: BTreeMap<MappingKey, String>,
    /// Why it does not run, although its supervisor does.
    pub trouble: Option<String>,
    /// The supervisors of the network that cannot be reached by the state directory.
    pub strays: Vec<RelayProcess>,
    /// The relays that an earlier version has started, each for one port.
    pub singles: BTreeMap<MappingKey, RelayProcess>,
}

/// Everything that was observed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// The namespace that this program runs in.
    pub host: Side,
    /// The containers' namespaces; `None` for one that is gone.
    pub containers: BTreeMap<Name, Option<Side>>,
    /// The containers for whose namespace a file exists, whether or not it is one.
    pub namespace_files: BTreeSet<Name>,
    /// The containers whose namespace's path leads to another one than theirs.
    pub replaced: BTreeSet<Name>,
    /// Where the containers' namespaces are that have lost their names.
    pub living: BTreeMap<Name, PathBuf>,
    /// The containers that could not be looked at.
    pub unseen: BTreeSet<Name>,
    /// What could not be looked at, and why.
    pub failures: Vec<String>,
    /// Whether namespaces that are made here end with this process, because nobody else sees where they are mounted.
    pub mounts_are_hidden: bool,
    /// The cookies of the containers' namespaces.
    pub cookies: BTreeMap<Name, u64>,
    /// The relevant kernel parameters, without those that the kernel lacks.
    pub sysctls: BTreeMap<String, String>,
    /// Those that a network of another state directory needs, too.
    pub needed_elsewhere: BTreeSet<String>,
    /// The rules.
    pub rules: Rules,
    /// What IPsec policies of this program block; `None` if not looked at, or if this kernel has none.
    pub blocked: Option<Vec<Block>>,
    /// What replies to transparent sockets depend on; `None` if not looked at.
    pub transparent: Option<TransparentParts>,
    /// The relay.
    pub relay: ObservedRelay,
    /// The content of this program's files; `None` for one that does not exist. One that could not be read is left out.
    pub files: BTreeMap<PathBuf, Option<String>>,
}
