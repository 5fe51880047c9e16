//! Plans the ordered steps from the observed to the wanted state, without touching the system.

mod connected;
mod endpoint;
mod network;
mod relays;
mod rules;
mod transparent;

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

pub(crate) use relays::relayed_ports;
pub(crate) use rules::backend;

use crate::action::{Action, LinkChange, NetnsRef, OffloadSizes};
use crate::family::Family;
use crate::model::Topology;
use crate::name::{IfName, Name};
use crate::observed::{Link, Observed};
use crate::parameters::{self, Parameter};
use crate::transparent::TABLE;

/// An action and its undo actions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The action.
    pub action: Action,
    /// What undoes it, in this order; empty if undoing an earlier step does.
    pub undo: Vec<Action>,
    /// Whether the others are of use without it.
    pub is_optional: bool,
}

impl Step {
    fn new(action: Action, undo: impl IntoIterator<Item = Action>) -> Self {
        Self { action, undo: undo.into_iter().collect(), is_optional: false }
    }

    /// Whether the relay serves more ports by it.
    pub(crate) fn serves(&self) -> bool {
        matches!(self.action, Action::ServePorts { .. })
    }

    /// Whether it is about the relay's processes.
    pub(crate) fn is_of_relay(&self) -> bool {
        use Action::{CeasePorts, EndProcess, ServePorts};
        matches!(self.action, ServePorts { .. } | CeasePorts { .. } | EndProcess { .. })
    }

    /// A step on something that an earlier step created, and that disappears with it.
    pub(crate) fn on_fresh(action: Action) -> Self {
        Self::new(action, [])
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.action.fmt(f)
    }
}

/// The steps to take, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The steps.
    pub steps: Vec<Step>,
    /// What no step can repair.
    pub problems: Vec<String>,
    /// What others do that the network works in spite of.
    pub warnings: Vec<String>,
}

/// Why planning failed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    /// The bridge's name is used by something else.
    #[error(
        "the interface {0} exists already and is not ours: choose another name with --bridge, or remove it"
    )]
    BridgeTaken(IfName),
    /// Somebody else made a bridge under the name of this program's.
    #[error(
        "the interface {0} is not the one that netns-setup made: remove it and run `netns-setup repair`, or run `netns-setup down`, which leaves it alone"
    )]
    BridgeReplaced(IfName),
    /// Somebody else's file is in the place of this program's.
    #[error("the file {} exists already and is not netns-setup's: remove it, or leave out --persist", .0.display())]
    FileTaken(PathBuf),
    /// The address pool is in use elsewhere.
    #[error("the subnet {subnet} overlaps the route to {route} by {dev}: choose another with --{option}")]
    Overlap {
        /// The pool.
        subnet: String,
        /// The route it overlaps.
        route: String,
        /// The interface of that route.
        dev: String,
        /// The option that names the pool.
        option: &'static str,
    },
    /// A chain's name is used by something else.
    #[error(
        "the chain {chain} of the iptables table {table} exists already, so Docker seems to run here: use --firewall nft"
    )]
    ChainTaken {
        /// The table.
        table: &'static str,
        /// The chain.
        chain: &'static str,
    },
    /// Another program uses the routing table.
    #[error(
        "the routing table {TABLE} has a route already, {route}: remove it with `{} route delete {route} table {TABLE}` if nothing needs it",
        family.ip()
    )]
    TableTaken {
        /// The address family of the route.
        family: Family,
        /// The route.
        route: String,
    },
    /// A namespace that is made here would not last.
    #[error(
        "the namespace of {0} would end with this process, which has mounts of its own, as under `ip netns exec`: use `nsenter --net=/run/netns/NAME` instead, or attach one that exists with --netns"
    )]
    Hidden(Name),
    /// A namespace of the container's name exists.
    #[error(
        "the network namespace {0} exists already: choose another name, or attach it with --netns /run/netns/{0}"
    )]
    NetnsTaken(Name),
    /// The namespace already has an interface of that name.
    #[error("the namespace of {0} has an interface eth0 already: remove it first")]
    InterfaceTaken(Name),
    /// The namespace cannot be opened.
    #[error("the namespace of {0} is gone")]
    NetnsGone(Name),
}

/// Which containers a plan covers: inspecting two hundred to change one would be wasteful.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scope {
    /// Everything.
    All,
    /// The network, the rules and these containers.
    Only(BTreeSet<Name>),
    /// Only what replies to transparent sockets need.
    Transparent,
}

impl Scope {
    /// Only the container `name`.
    #[must_use]
    pub fn one(name: &Name) -> Self {
        Self::Only(BTreeSet::from([name.clone()]))
    }

    /// Whether the plan covers what replies to transparent sockets need, which no container changes.
    #[must_use]
    pub fn has_transparent(&self) -> bool {
        !matches!(self, Self::Only(_))
    }

    /// Whether the plan covers the container.
    #[must_use]
    pub fn contains(&self, name: &Name) -> bool {
        match self {
            Self::All => true,
            Self::Only(names) => names.contains(name),
            Self::Transparent => false,
        }
    }
}

/// The input of a plan.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// What may exist and belongs to this program.
    pub owned: &'a Topology,
    /// The wanted state.
    pub desired: &'a Topology,
    /// The observed state.
    pub observed: &'a Observed,
    /// Which containers it covers.
    pub scope: &'a Scope,
    /// The path of `rproxy`.
    pub rproxy: &'a Path,
    /// The state directory.
    pub state_dir: &'a Path,
    /// Whether it repairs: what somebody else is in the way of keeps nothing else from it.
    pub is_repair: bool,
}

/// Orders the steps so that nothing is temporarily open that should be closed: the relay ceases and links are
/// removed before the rules that guard them change; links are added and forwarding is enabled afterwards.
///
/// # Errors
/// If something that does not belong to this program is in the way; nothing has changed then.
pub fn plan(inputs: Inputs<'_>) -> Result<Plan, PlanError> {
    transparent::check(inputs)?;
    let mut plan = Plan { problems: inputs.observed.failures.clone(), ..Plan::default() };
    if *inputs.scope == Scope::Transparent {
        transparent::change(inputs, &mut plan);
        return Ok(plan);
    }
    network::check(inputs, &mut plan)?;
    rules::check(inputs)?;
    relays::stop(inputs, &mut plan);
    endpoint::remove(inputs, &mut plan);
    network::remove(inputs, &mut plan);
    rules::change(inputs, &mut plan);
    rules::block(inputs, &mut plan);
    network::build(inputs, &mut plan);
    endpoint::build(inputs, &mut plan)?;
    network::tune(inputs, &mut plan);
    transparent::change(inputs, &mut plan);
    relays::flush(inputs, &mut plan);
    relays::start(inputs, &mut plan);
    // Last, because undoing it cannot restore the processes that ran in the namespace.
    endpoint::remove_namespaces(inputs, &mut plan);
    Ok(plan)
}

/// Sets kernel parameters that differ, or all of them on an interface that an earlier step creates.
fn set_parameters(inputs: Inputs<'_>, plan: &mut Plan, needed: Vec<Parameter>, is_fresh: bool) {
    let sysctls = &inputs.observed.sysctls;
    let has_ipv6 = sysctls.contains_key(parameters::HAS_IPV6);
    let set = |key: &str, value: &str| Action::SetSysctl { key: key.to_owned(), value: value.to_owned() };
    for Parameter { key, value } in needed.into_iter().filter(|needed| has_ipv6 || !needed.is_ipv6()) {
        match sysctls.get(&key) {
            _ if is_fresh => plan.push(Step::on_fresh(set(&key, value))),
            Some(is) if is != value => plan.push(Step::new(set(&key, value), [set(&key, is)])),
            _ => {}
        }
    }
}

impl Plan {
    /// Whether the relay has to serve more ports.
    #[must_use]
    pub fn serves(&self) -> bool {
        self.steps.iter().any(Step::serves)
    }

    /// Whether no namespace is made.
    pub(crate) fn keeps_namespaces(&self) -> bool {
        !self.steps.iter().any(|step| matches!(step.action, Action::AddNetns(_)))
    }

    /// Whether the namespace of that name is made.
    pub(crate) fn makes(&self, name: &Name) -> bool {
        self.steps.iter().any(|step| matches!(&step.action, Action::AddNetns(made) if made == name))
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    fn push(&mut self, step: Step) {
        self.steps.push(step);
    }
}

/// The steps that set the properties of an interface.
struct LinkWish<'a> {
    place: NetnsRef,
    name: &'a IfName,
    /// The current properties; `None` for one that an earlier step creates.
    is: Option<&'a Link>,
}

impl LinkWish<'_> {
    fn change(&self, plan: &mut Plan, differs: impl Fn(&Link) -> Option<LinkChange>, wanted: LinkChange) {
        let set = |change| Action::SetLink { place: self.place.clone(), name: *self.name, change };
        match self.is.map(differs) {
            None => plan.push(Step::on_fresh(set(wanted))),
            Some(Some(before)) => plan.push(Step::new(set(wanted), [set(before)])),
            Some(None) => {}
        }
    }

    fn up(&self, plan: &mut Plan) {
        self.change(plan, |link| (!link.up).then_some(LinkChange::Up(false)), LinkChange::Up(true));
    }

    fn mtu(&self, plan: &mut Plan, mtu: u32) {
        if self.is.is_some_and(|link| link.mtu != mtu) {
            self.change(plan, |link| Some(LinkChange::Mtu(link.mtu)), LinkChange::Mtu(mtu));
        }
    }

    fn mac(&self, plan: &mut Plan, mac: crate::addr::Mac) {
        if let Some(before) = self.is.and_then(|link| link.mac).filter(|before| *before != mac) {
            self.change(plan, |_| Some(LinkChange::Address(before)), LinkChange::Address(mac));
        }
    }

    /// Raises the packet sizes inside the host, within the limits of this kernel and `limits`; never lowers
    /// one. `known` are the sizes of an interface that an earlier step creates.
    fn offload(&self, plan: &mut Plan, wanted: u32, limits: OffloadLimits, known: OffloadSizes) {
        let is = self.is.map_or(known, |link| link.offload);
        let raise = |current: Option<u32>, limit: u32| {
            current.filter(|current| *current < wanted.min(limit)).map(|_| wanted.min(limit))
        };
        // Before Linux 5.19, there is no size of received packets, and none of sent ones above this.
        let of_kernel = if is.gro.is_some() { u32::MAX } else { LARGEST_BEFORE_BIG_TCP };
        let sizes = OffloadSizes {
            gso: raise(is.gso, limits.gso.min(of_kernel)),
            gro: raise(is.gro, limits.gro),
            gso_ipv4: raise(is.gso_ipv4, limits.gso_ipv4),
            gro_ipv4: raise(is.gro_ipv4, u32::MAX),
        };
        if sizes == OffloadSizes::default() {
            return;
        }
        let before = OffloadSizes {
            gso: sizes.gso.and(is.gso),
            gro: sizes.gro.and(is.gro),
            gso_ipv4: sizes.gso_ipv4.and(is.gso_ipv4),
            gro_ipv4: sizes.gro_ipv4.and(is.gro_ipv4),
        };
        self.change(plan, |_| Some(LinkChange::Offload(before)), LinkChange::Offload(sizes));
    }
}

/// What older kernels allow (`GSO_MAX_SIZE` in include/linux/netdevice.h of Linux 5.18).
const LARGEST_BEFORE_BIG_TCP: u32 = 65_536;

/// Limits for packet sizes, in bytes. Received IPv4 packets need none.
#[derive(Debug, Clone, Copy)]
struct OffloadLimits {
    /// Sent, IPv6.
    gso: u32,
    /// Received, IPv6.
    gro: u32,
    /// Sent, IPv4.
    gso_ipv4: u32,
}

impl OffloadLimits {
    /// The limits of an interface that can send packets of `size`.
    fn sending(size: u32) -> Self {
        Self { gso: size, gro: u32::MAX, gso_ipv4: size }
    }

    /// The limits of an interface's driver.
    fn of_driver(link: Option<&Link>) -> Self {
        Self::sending(link.and_then(|link| link.tso_max_size).unwrap_or(u32::MAX))
    }
}

/// The default packet sizes of a device, taken from the loopback interface, which always exists.
fn untouched_offload(observed: &Observed) -> OffloadSizes {
    observed.host.link("lo").map(|link| link.offload).unwrap_or_default()
}

#[cfg(test)]
mod tests;
