//! Observes the state of the system, without changing anything.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use netlink_sys::protocols::NETLINK_ROUTE;

use crate::block::Block;
use crate::family::Family;
use crate::firewall::tool::{self, ToolError};
use crate::firewall::{detect, iptables, nft, transparent as marking};
use crate::model::{Endpoint, Firewall, Netns, Topology};
use crate::name::{IfName, Name};
use crate::netlink::{Client, NetlinkError, address, link, route, rule, xfrm};
use crate::netns::{self, Handle, NetnsError};
use crate::observed::{Observed, ObservedRelay, Rules, Side, TransparentParts};
use crate::plan::{self, Scope};
use crate::relay::find::{self, Found};
use crate::relay::{RelayError, client};
use crate::{living, parameters, persist, sysctl};

/// Why the state could not be observed.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// The interfaces, addresses and routes of the host.
    #[error("cannot list the host's interfaces: {0}")]
    Host(#[source] NetlinkError),
    /// The policy routing rules and their table.
    #[error("cannot list the policy routing rules: {0}")]
    Policy(#[source] NetlinkError),
    /// The IPsec policies.
    #[error("cannot list the IPsec policies: {0}")]
    Policies(#[source] NetlinkError),
    /// Those of a container.
    #[error("cannot list the interfaces in {path}: {source}")]
    Container {
        /// Its namespace.
        path: String,
        /// Why.
        source: NetlinkError,
    },
    /// A namespace exists but cannot be entered.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// The rules.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// No temporary namespace for comparing the rules.
    #[error("cannot create a network namespace to compare the rules in: {0}")]
    Scratch(#[source] io::Error),
    /// A kernel parameter.
    #[error("cannot read {key}: {source}")]
    Sysctl {
        /// The parameter.
        key: String,
        /// The cause.
        source: io::Error,
    },
    /// The relay.
    #[error(transparent)]
    Relay(#[from] RelayError),
    /// A file.
    #[error("cannot read {path}: {source}")]
    File {
        /// Which.
        path: String,
        /// Why.
        source: io::Error,
    },
}

/// Observes everything that a plan from `owned` to `desired` depends on, of the network with this state directory.
///
/// Rules are only compared with [`Scope::All`]; otherwise they are assumed to be unchanged.
///
/// # Errors
/// If something that exists cannot be read.
pub fn observe(
    owned: &Topology,
    desired: &Topology,
    scope: &Scope,
    state_dir: &Path,
) -> Result<Observed, ObserveError> {
    let mut failures = Vec::new();
    let observed = look(owned, desired, scope, state_dir, &mut failures)?;
    failures.into_iter().next().map_or(Ok(observed), Err)
}

/// Like [`observe`], but what cannot be read keeps nothing else from being observed: it is assumed to be as it should be,
/// and [`Observed::failures`] says why.
///
/// # Errors
/// If nothing can be observed.
pub fn observe_rest(
    owned: &Topology,
    desired: &Topology,
    scope: &Scope,
    state_dir: &Path,
) -> Result<Observed, ObserveError> {
    let mut failures = Vec::new();
    let observed = look(owned, desired, scope, state_dir, &mut failures)?;
    Ok(Observed { failures: failures.iter().map(ToString::to_string).collect(), ..observed })
}

/// Observes what can be read. The first failure of each part is one of `failures`.
fn look(
    owned: &Topology,
    desired: &Topology,
    scope: &Scope,
    state_dir: &Path,
    failures: &mut Vec<ObserveError>,
) -> Result<Observed, ObserveError> {
    let both = desired.union(owned);
    let Containers { sides, replaced, unseen, living, cookies } = containers(&both, scope, failures);
    let host = side().map_err(ObserveError::Host)?;
    Ok(Observed {
        containers: sides,
        replaced,
        unseen,
        living,
        failures: Vec::new(),
        cookies,
        mounts_are_hidden: netns::mounts_are_hidden(),
        namespace_files: namespace_files(&both, scope),
        sysctls: sysctls(&both, scope, &host)?,
        host,
        needed_elsewhere: BTreeSet::new(),
        rules: part(rules(&both, owned, desired, scope), failures),
        blocked: part(blocked(&both, scope), failures),
        transparent: part(transparent(&both, owned, desired, scope), failures),
        relay: relay(&both, scope, state_dir)?,
        files: files(&both, failures),
    })
}

/// A part of the system, or nothing if it cannot be read.
fn part<T: Default>(read: Result<T, ObserveError>, failures: &mut Vec<ObserveError>) -> T {
    read.unwrap_or_else(|failure| {
        failures.push(failure);
        T::default()
    })
}

/// The interfaces, addresses and routes of the calling thread's namespace.
///
/// # Errors
/// If the kernel refuses.
pub fn side() -> Result<Side, NetlinkError> {
    let mut client = Client::open(NETLINK_ROUTE)?;
    Ok(Side {
        links: link::list(&mut client)?,
        addresses: address::list(&mut client)?,
        routes: route::list(&mut client)?,
        sysctls: BTreeMap::new(),
    })
}

/// What was found at the paths of the containers' namespaces.
#[derive(Default)]
struct Containers {
    sides: BTreeMap<Name, Option<Side>>,
    replaced: BTreeSet<Name>,
    unseen: BTreeSet<Name>,
    living: BTreeMap<Name, PathBuf>,
    cookies: BTreeMap<Name, u64>,
}

fn containers(topology: &Topology, scope: &Scope, failures: &mut Vec<ObserveError>) -> Containers {
    let mut found = Containers::default();
    for (name, endpoint) in topology.endpoints.iter().filter(|(name, _)| scope.contains(name)) {
        let side = match Handle::open(&endpoint.netns) {
            // It is gone, or nothing is mounted on the file.
            Err(NetnsError::Open { .. } | NetnsError::NotOne(_)) => Ok(None),
            // It is another one by now, which must not be inspected.
            Err(NetnsError::Replaced(_)) => {
                found.replaced.insert(name.clone());
                Ok(None)
            }
            Err(error) => Err(error.into()),
            Ok(handle) => container(name, endpoint, &handle, &mut found).map(Some),
        };
        found.note(name, side, failures);
    }
    nameless(topology, &mut found, failures);
    found
}

/// Looks for the namespaces of this program that have lost their names, and live on.
fn nameless(topology: &Topology, found: &mut Containers, failures: &mut Vec<ObserveError>) {
    let is_missing = |name: &Name| found.sides.get(name) == Some(&None) && !found.replaced.contains(name);
    let missing =
        topology.endpoints.iter().filter(|(name, endpoint)| endpoint.netns.is_ours() && is_missing(name));
    let missing: Vec<_> =
        missing.filter_map(|(name, endpoint)| Some((name, endpoint, endpoint.netns.cookie?))).collect();
    let living = living::find(&missing.iter().map(|(_, _, cookie)| *cookie).collect());
    for (name, endpoint, cookie) in missing {
        let Some(path) = living.get(&cookie) else { continue };
        // It may have ended meanwhile, with its last process.
        let Ok(handle) = Handle::open(&Netns { path: path.clone(), ..endpoint.netns.clone() }) else {
            continue;
        };
        let side = container(name, endpoint, &handle, found).map(Some);
        found.note(name, side, failures);
        found.living.insert(name.clone(), path.clone());
    }
}

impl Containers {
    fn note(
        &mut self,
        name: &Name,
        side: Result<Option<Side>, ObserveError>,
        failures: &mut Vec<ObserveError>,
    ) {
        match side {
            Ok(side) => drop(self.sides.insert(name.clone(), side)),
            Err(failure) => {
                self.unseen.insert(name.clone());
                failures.push(failure);
            }
        }
    }
}

fn container(
    name: &Name,
    endpoint: &Endpoint,
    handle: &Handle,
    found: &mut Containers,
) -> Result<Side, ObserveError> {
    let netns = &endpoint.netns;
    if let Some(cookie) = handle.cookie()? {
        found.cookies.insert(name.clone(), cookie);
    }
    let path = || netns.path.display().to_string();
    let side = handle.run(side)?.map_err(|source| ObserveError::Container { path: path(), source })?;
    let key = endpoint.disable_ipv6();
    let value = handle.run(|| sysctl::read(&key))?;
    let value = value.map_err(|source| ObserveError::Sysctl { key: key.clone(), source })?;
    Ok(Side { sysctls: value.into_iter().map(|value| (key.clone(), value)).collect(), ..side })
}

fn namespace_files(topology: &Topology, scope: &Scope) -> BTreeSet<Name> {
    let there = topology.endpoints.iter().filter(|(name, endpoint)| {
        scope.contains(name) && std::fs::symlink_metadata(&endpoint.netns.path).is_ok()
    });
    there.map(|(name, _)| name.clone()).collect()
}

fn sysctls(
    topology: &Topology,
    scope: &Scope,
    host: &Side,
) -> Result<BTreeMap<String, String>, ObserveError> {
    let Some(network) = &topology.network else {
        return Ok(BTreeMap::new());
    };
    let bridge = sysctl::of_interface("ipv4", network.bridge.as_str(), "route_localnet");
    let changed = network.sysctls.iter().map(|change| change.key.clone());
    let ports = topology.endpoints.iter().filter(|(name, _)| scope.contains(name));
    let ports = ports.flat_map(|(_, endpoint)| parameters::port(&endpoint.id.veth()));
    let needed = [parameters::forwarding, parameters::bridge, parameters::bridge_forwarding];
    let outside = host.outside(&network.bridge);
    let outside = outside.flat_map(|link| parameters::interface_forwarding(network, &link.name));
    let needed = needed.into_iter().flat_map(|of| of(network)).chain(ports).chain(outside);
    let needed = needed.map(|needed| needed.key);
    let mut values = BTreeMap::new();
    for key in changed.chain(needed).chain([bridge, parameters::HAS_IPV6.to_owned()]) {
        match sysctl::read(&key) {
            Ok(Some(value)) => drop(values.insert(key, value)),
            Ok(None) => {}
            Err(source) => return Err(ObserveError::Sysctl { key, source }),
        }
    }
    Ok(values)
}

fn rules(
    both: &Topology,
    owned: &Topology,
    desired: &Topology,
    scope: &Scope,
) -> Result<Rules, ObserveError> {
    let Some(network) = both.network.as_ref().filter(|_| *scope != Scope::Transparent) else {
        return Ok(Rules::None);
    };
    match plan::backend(both) {
        Firewall::None => Ok(Rules::None),
        Firewall::Iptables => {
            let families = [Some(Family::V4), network.subnet6.map(|_| Family::V6)];
            let saved = families
                .into_iter()
                .flatten()
                .map(|family| Ok((family, detect::saved_with(family, &iptables::render(owned, family))?)));
            Ok(Rules::Iptables(saved.collect::<Result<_, ToolError>>()?))
        }
        // Rules that are assumed to be unchanged, and stay so, need not be listed.
        Firewall::Nft if *scope != Scope::All && nft::render(owned) == nft::render(desired) => {
            Ok(Rules::None)
        }
        Firewall::Nft => {
            let table = nft::table_name(network);
            let listing = list_table(&table)?;
            let body = nft::render(desired).filter(|_| *scope == Scope::All && listing.is_some());
            let wanted = body.map(|body| reference(&table, &body)).transpose()?;
            Ok(Rules::Nft { listing, wanted })
        }
    }
}

fn blocked(topology: &Topology, scope: &Scope) -> Result<Option<Vec<Block>>, ObserveError> {
    if topology.network.is_none() || *scope == Scope::Transparent {
        return Ok(None);
    }
    xfrm::blocked().map_err(ObserveError::Policies)
}

fn transparent(
    both: &Topology,
    owned: &Topology,
    desired: &Topology,
    scope: &Scope,
) -> Result<Option<TransparentParts>, ObserveError> {
    let Some(parts) = both.transparent.as_ref().filter(|_| scope.has_transparent()) else {
        return Ok(None);
    };
    let mut client = Client::open(NETLINK_ROUTE).map_err(ObserveError::Policy)?;
    let mut policy = BTreeMap::new();
    for family in parts.families() {
        policy.insert(family, rule::list(&mut client, family).map_err(ObserveError::Policy)?);
    }
    let routes = route::list_local(&mut client).map_err(ObserveError::Policy)?;
    let rules = match parts.firewall {
        Firewall::None => Rules::None,
        Firewall::Iptables => {
            let saved = parts
                .families()
                .map(|family| Ok((family, detect::saved_with(family, &marking::iptables(owned, family))?)));
            Rules::Iptables(saved.collect::<Result<_, ToolError>>()?)
        }
        Firewall::Nft => {
            let table = marking::TABLE_NAME;
            let listing = list_table(table)?;
            let body = marking::nft(desired).filter(|_| listing.is_some());
            let wanted = body.map(|body| reference(table, &body)).transpose()?;
            Rules::Nft { listing, wanted }
        }
    };
    Ok(Some(TransparentParts { policy, routes, rules, has_ipv6: lacks_ipv6()?.is_none() }))
}

/// Why this namespace cannot route IPv6 to itself; `None` if it can.
///
/// # Errors
/// If the kernel refuses to say.
pub fn lacks_ipv6() -> Result<Option<String>, ObserveError> {
    let key = sysctl::of_interface("ipv6", IfName::loopback().as_str(), "disable_ipv6");
    match sysctl::read(&key) {
        Ok(Some(value)) if value != "0" => return Ok(Some(format!("{key} is {value}"))),
        Ok(Some(_)) => {}
        Ok(None) => return Ok(Some("this kernel has no IPv6".to_owned())),
        Err(source) => return Err(ObserveError::Sysctl { key, source }),
    }
    let mut client = Client::open(NETLINK_ROUTE).map_err(ObserveError::Policy)?;
    match rule::list(&mut client, Family::V6) {
        Ok(_) => Ok(None),
        Err(error @ NetlinkError::NoPolicyRouting(_)) => Ok(Some(error.to_string())),
        Err(error) => Err(ObserveError::Policy(error)),
    }
}

/// The current table of this program, without counters and other state; `None` if it does not exist.
fn list_table(table: &str) -> Result<Option<String>, ToolError> {
    match tool::run("nft", &["-s", "list", "table", "inet", table], "") {
        Ok(listing) => Ok(Some(listing)),
        Err(ToolError::Failed { message, .. }) if message.contains("No such file or directory") => Ok(None),
        Err(error) => Err(error),
    }
}

/// How the installed version of `nft` lists the wanted table. Versions differ in their output, so the rules
/// are loaded into a temporary namespace and listed there.
fn reference(table: &str, body: &str) -> Result<String, ObserveError> {
    let listing = netns::scratch(|| {
        tool::run("nft", &["-f", "-"], body)?;
        list_table(table)
    });
    Ok(listing.map_err(ObserveError::Scratch)??.unwrap_or_default())
}

/// The relay of a network. Its processes are only searched for if it does not answer, or everything is looked at.
///
/// # Errors
/// If its supervisor does not answer.
pub fn relay(topology: &Topology, scope: &Scope, state_dir: &Path) -> Result<ObservedRelay, ObserveError> {
    let Some(network) = topology.network.as_ref().filter(|_| *scope != Scope::Transparent) else {
        return Ok(ObservedRelay::default());
    };
    let ports = plan::relayed_ports(topology);
    let status = match client::status(state_dir) {
        // One that does not answer is found among the processes, and ended.
        Err(_silent) if *scope == Scope::All => None,
        status => status?,
    };
    let is_known = status.is_some() || ports.is_empty();
    let is_old = topology.mappings().any(|(_, _, mapping)| mapping.relay.is_some());
    let found = match is_known && !is_old && *scope != Scope::All {
        true => Found::default(),
        false => find::find(&network.id, &ports),
    };
    // The one that answers is one of those that are found.
    let strays = if status.is_some() { Vec::new() } else { found.supervisors };
    let status = status.unwrap_or_default();
    let served = status.ports.into_iter().map(|port| (port.key, port)).collect();
    let unserved = status.unserved.into_iter().map(|unserved| (unserved.key, unserved.why)).collect();
    Ok(ObservedRelay { served, unserved, trouble: status.trouble, strays, singles: found.singles })
}

fn files(topology: &Topology, failures: &mut Vec<ObserveError>) -> BTreeMap<PathBuf, Option<String>> {
    let paths = topology.network.iter().filter_map(|network| network.persist.clone());
    let read = paths.filter_map(|path| match persist::read(&path) {
        Ok(text) => Some((path, text)),
        Err(source) => {
            failures.push(ObserveError::File { path: path.display().to_string(), source });
            None
        }
    });
    read.collect()
}
