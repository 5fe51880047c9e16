//! `transparent up`, `down` and `check`: replies of backends reach transparent sockets of this host.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::json;

use super::check::differences;
use super::locked::LockedState;
use super::{Options, Report};
use crate::error::{Error, finding};
use crate::executor::Executor;
use crate::firewall::detect::{self, Choice};
use crate::firewall::transparent::probe;
use crate::model::{Firewall, Topology, Transparent as Parts};
use crate::name::IfName;
use crate::observe::{self, observe};
use crate::observed::{Link, Side};
use crate::plan::{self, Inputs, Scope};
use crate::transparent::{MARK, PRIORITY, TABLE};

/// A command on the return path to transparent sockets, with the interfaces that replies come in by.
#[derive(Debug, Clone)]
pub enum Transparent {
    /// Sets it up for these interfaces; for the usual ones if there are none.
    Up(Vec<IfName>),
    /// Takes it down for these interfaces; for all if there are none.
    Down(Vec<IfName>),
    /// Compares it with the state, which must have these interfaces.
    Check(Vec<IfName>),
}

impl Transparent {
    pub(super) fn run(&self, options: &Options, executor: &mut dyn Executor) -> Result<Report, Error> {
        match self {
            Self::Up(interfaces) => up(interfaces, options, executor),
            Self::Down(interfaces) => down(interfaces, options, executor),
            Self::Check(interfaces) => check(interfaces, options),
        }
    }
}

fn up(named: &[IfName], options: &Options, executor: &mut dyn Executor) -> Result<Report, Error> {
    let mut locked = LockedState::open_for_transparent(options)?;
    let mut desired = locked.state.current.clone();
    let side = observe::side().map_err(observe::ObserveError::Host)?;
    let interfaces = if named.is_empty() { usual(&desired, &side)? } else { existing(named, &side)? };
    let network = desired.network.as_ref().map(|network| network.firewall);
    let wanted = with(&desired, &interfaces, network, options)?;
    let mut warnings = warnings(&wanted)?;
    let (lines, result) = (vec![describe(&wanted)], json!({ "transparent": wanted }));
    desired.transparent = Some(wanted);
    let plan = locked.change(desired, &Scope::Transparent, options, executor)?;
    warnings.extend(plan.problems.iter().cloned());
    Ok(Report::of(&plan, lines, result).warning(warnings))
}

fn down(named: &[IfName], options: &Options, executor: &mut dyn Executor) -> Result<Report, Error> {
    let mut locked = LockedState::open_for_transparent(options)?;
    let mut desired = locked.state.current.clone();
    let left = desired.transparent.take().map(|mut parts| {
        parts.interfaces.retain(|iif| !named.is_empty() && !named.contains(iif));
        parts
    });
    desired.transparent = left.filter(|parts| !parts.interfaces.is_empty());
    let line = match &desired.transparent {
        _ if locked.state.owned().transparent == desired.transparent => {
            let names: Vec<_> = named.iter().map(|iif| format!(" for {iif}")).collect();
            format!("nothing was set up{}", names.join(" or"))
        }
        Some(parts) => describe(parts),
        None => "transparent sockets get no replies any more".to_owned(),
    };
    let result = json!({ "transparent": desired.transparent });
    let plan = locked.change(desired, &Scope::Transparent, options, executor)?;
    Ok(Report::of(&plan, vec![line], result))
}

fn check(named: &[IfName], options: &Options) -> Result<Report, Error> {
    let dry = Options { dry_run: true, ..options.clone() };
    let locked = LockedState::open(&dry)?;
    let owned = locked.state.owned();
    let desired = locked.state.pending.as_ref().unwrap_or(&locked.state.current);
    let observed = observe(&owned, desired, &Scope::Transparent, &options.state_dir)?;
    let (rproxy, state_dir) = (Path::new("rproxy"), options.state_dir.as_path());
    let scope = &Scope::Transparent;
    let (owned, is_repair) = (&owned, false);
    let inputs = Inputs { owned, desired, observed: &observed, scope, rproxy, state_dir, is_repair };
    let plan = plan::plan(inputs)?;
    let interrupted = locked.state.pending.iter().map(|_| "an earlier command was interrupted".to_owned());
    let found = interrupted.chain(plan.steps.iter().map(|step| finding(&step.action)));
    let found: Vec<_> = found.collect();
    if let Some((missing, options)) = missing(named, desired.transparent.as_ref()) {
        let unmendable = plan.problems.len();
        let found = missing.into_iter().chain(found).chain(plan.problems).collect();
        return Err(Error::NotTransparent { found, unmendable, options });
    }
    differences(found.into_iter(), plan.problems)?;
    let lines = vec!["everything is as it should be".to_owned()];
    Ok(Report { lines, result: json!({ "differences": [] }), ..Report::default() })
}

/// The interfaces that are not set up, or, without names, that none is; and the options that set them up.
fn missing(named: &[IfName], parts: Option<&Parts>) -> Option<(Vec<String>, String)> {
    if named.is_empty() && parts.is_none() {
        return Some((vec!["nothing is set up for transparent sockets".to_owned()], String::new()));
    }
    let is_there = |iif: &IfName| parts.is_some_and(|parts| parts.interfaces.contains(iif));
    let missing: BTreeSet<_> = named.iter().filter(|iif| !is_there(iif)).collect();
    let found = missing.iter().map(|iif| format!("{iif} is not set up")).collect();
    let options = missing.iter().map(|iif| format!(" --interface {iif}")).collect();
    (!missing.is_empty()).then_some((found, options))
}

/// What `topology` has for transparent sockets, and these interfaces. The firewall is the requested one, or
/// that of `network`.
pub(super) fn with(
    topology: &Topology,
    interfaces: &[IfName],
    network: Option<Firewall>,
    options: &Options,
) -> Result<Parts, Error> {
    let before = topology.transparent.as_ref();
    let choice = options.firewall.filter(|choice| *choice != Choice::Auto);
    let firewall = match (choice, before.map(|parts| parts.firewall).or(network)) {
        (Some(choice), _) => detect::choose(choice)?,
        (None, Some(firewall)) => firewall,
        (None, None) => detect::choose(Choice::Auto)?,
    };
    if let Some(parts) = before.filter(|parts| parts.firewall != firewall) {
        return Err(Error::OtherMarking(parts.firewall));
    }
    let known = before.map(|parts| parts.interfaces.clone()).unwrap_or_default();
    let interfaces = known.into_iter().chain(interfaces.iter().copied()).collect();
    let mut wanted = Parts { interfaces, firewall, ipv6: observe::lacks_ipv6()?.is_none() };
    if before != Some(&wanted) {
        wanted.firewall = usable(&wanted, before.is_none() && choice.is_none())?;
    }
    Ok(wanted)
}

/// The firewall of `wanted` if it can match transparent sockets, or else the other one if the choice is free.
fn usable(wanted: &Parts, is_free: bool) -> Result<Firewall, Error> {
    let Err(error) = probe(wanted) else { return Ok(wanted.firewall) };
    let other = match wanted.firewall {
        Firewall::Nft if is_free => Firewall::Iptables,
        Firewall::Iptables if is_free => Firewall::Nft,
        _ => return Err(error.into()),
    };
    match probe(&Parts { firewall: other, ..wanted.clone() }) {
        Ok(()) => Ok(other),
        Err(_) => Err(error.into()),
    }
}

/// The interfaces without `--interface`: those that are set up, docker0, the bridges of Docker's other
/// networks, and this program's own.
fn usual(topology: &Topology, side: &Side) -> Result<Vec<IfName>, Error> {
    let known: BTreeSet<_> = topology.transparent.iter().flat_map(|parts| parts.interfaces.clone()).collect();
    let own = topology.network.as_ref().map(|network| network.bridge);
    let is_usual = |link: &&Link| {
        link.name == "docker0" || is_docker_bridge(link) || own.is_some_and(|own| own.as_str() == link.name)
    };
    let there: BTreeSet<_> =
        side.links.iter().filter(is_usual).filter_map(|link| link.name.parse().ok()).collect();
    if there.is_empty() && known.is_empty() {
        return Err(Error::Usage(format!(
            "there is neither docker0 nor a bridge of netns-setup: name the backends' interface with --interface ({})",
            names(side)
        )));
    }
    Ok(there.into_iter().collect())
}

/// Docker names the bridges of networks `br-` and the first twelve digits of their identifiers.
fn is_docker_bridge(link: &Link) -> bool {
    let id = link.name.strip_prefix("br-").filter(|id| id.len() == 12);
    link.kind.as_deref() == Some("bridge")
        && id.is_some_and(|id| id.bytes().all(|digit| digit.is_ascii_hexdigit()))
}

/// The named interfaces, if packets can come in by them.
fn existing(named: &[IfName], side: &Side) -> Result<Vec<IfName>, Error> {
    for iif in named {
        let Some(link) = side.link(iif.as_str()) else {
            return Err(Error::Usage(format!(
                "--interface {iif}: there is no such interface; choose from {}",
                names(side)
            )));
        };
        if *iif == IfName::loopback() {
            return Err(Error::Usage(format!(
                "--interface {iif}: replies of this host's own programs need nothing; name the interface of other hosts or containers"
            )));
        }
        let master = side.links.iter().find(|other| link.master == Some(other.index));
        if let Some(master) = master {
            let master = &master.name;
            return Err(Error::Usage(format!(
                "--interface {iif}: {iif} is a port of {master}, by which its packets come in: name {master}"
            )));
        }
    }
    Ok(named.to_vec())
}

fn names(side: &Side) -> String {
    let lo = IfName::loopback();
    let others = side.links.iter().filter(|link| link.master.is_none() && link.name != lo.as_str());
    let names: Vec<_> = others.map(|link| link.name.as_str()).collect();
    if names.is_empty() { "there is only lo".to_owned() } else { names.join(", ") }
}

/// What is set up, in one line.
pub(super) fn describe(parts: &Parts) -> String {
    let interfaces: Vec<_> = parts.interfaces.iter().map(IfName::as_str).collect();
    let families = if parts.ipv6 { "IPv4 and IPv6" } else { "IPv4" };
    format!(
        "transparent sockets get their replies from {} ({families}, mark {MARK:#x}/{MARK:#x} by {}, rule {PRIORITY}, table {TABLE})",
        interfaces.join(", "),
        parts.firewall
    )
}

/// What is left to the user.
pub(super) fn warnings(parts: &Parts) -> Result<Vec<String>, Error> {
    let mut warnings = Vec::new();
    if let Some(why) = observe::lacks_ipv6()? {
        warnings.push(format!("{why}: transparent sockets get replies over IPv4 only"));
    }
    if parts.firewall == Firewall::None {
        warnings.push(format!(
            "with --firewall none, mark packets of transparent sockets with {MARK:#x}/{MARK:#x} yourself, in prerouting"
        ));
    }
    Ok(warnings)
}
