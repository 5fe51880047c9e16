//! The bridge, its addresses and kernel parameters.

use super::{
    Inputs, LinkWish, OffloadLimits, Plan, PlanError, Step, connected, set_parameters, untouched_offload,
};
use crate::action::{Action, LinkChange, NetnsRef};
use crate::firewall::needs_route_localnet;
use crate::model::{Network, Topology};
use crate::observed::{Link, Observed};
use crate::{parameters, persist, sysctl};

/// Checks that the bridge's name and the subnets are free, or belong to this program. Warns of the routes of others that
/// have come since.
pub(super) fn check(inputs: Inputs<'_>, plan: &mut Plan) -> Result<(), PlanError> {
    let Some(network) = &inputs.desired.network else {
        return Ok(());
    };
    if is_replaced(inputs, network) {
        let is_known = inputs.owned.network.as_ref().is_some_and(|owned| owned.bridge == network.bridge);
        match PlanError::BridgeReplaced(network.bridge) {
            _ if !is_known => return Err(PlanError::BridgeTaken(network.bridge)),
            replaced if inputs.is_repair => plan.problems.push(replaced.to_string()),
            replaced => return Err(replaced),
        }
    }
    check_file(inputs, network)?;
    plan.warnings.extend(check_routes(inputs, network)?);
    plan.warnings.extend(closed(inputs, network));
    Ok(())
}

/// Whether an interface of the bridge's name is not the one that this program made. Nothing is done to it, nor connected
/// to it.
pub(super) fn is_replaced(inputs: Inputs<'_>, network: &Network) -> bool {
    inputs.observed.host.link(network.bridge.as_str()).is_some_and(|link| !is_ours(link, inputs.owned))
}

/// The routes of others that take addresses of the network.
fn check_routes(inputs: Inputs<'_>, network: &Network) -> Result<Vec<String>, PlanError> {
    let host = &inputs.observed.host;
    let bridge = host.link(network.bridge.as_str()).map(|link| link.index);
    let mut warnings = Vec::new();
    let pools =
        [(Some(network.subnet.cidr()), "subnet"), (network.subnet6.map(|subnet| subnet.cidr()), "subnet6")];
    for (pool, option) in pools {
        let Some(pool) = pool else { continue };
        let taken = host.routes.iter().filter(|route| route.oif != bridge || bridge.is_none());
        for route in taken {
            let Some(to) = route.destination.filter(|to| to.overlaps(&pool)) else {
                continue;
            };
            let dev = host.links.iter().find(|link| Some(link.index) == route.oif);
            let dev = dev.map_or_else(|| "another table".to_owned(), |link| link.name.clone());
            if inputs.owned.network.is_none() {
                let (subnet, route) = (pool.to_string(), to.to_string());
                return Err(PlanError::Overlap { subnet, route, dev, option });
            }
            // The bridge's own route is preferred to a wider one.
            if to.prefix >= pool.prefix {
                warnings.push(format!(
                    "the route to {to} by {dev} takes addresses of the subnet {pool}: containers there are not reached"
                ));
            }
        }
    }
    Ok(warnings)
}

/// The interfaces that packets are not forwarded from, although the host is a router.
fn closed(inputs: Inputs<'_>, network: &Network) -> Vec<String> {
    let sysctls = &inputs.observed.sysctls;
    let is = |key: &str, value: &str| sysctls.get(key).is_some_and(|is| is == value);
    let mut warnings = Vec::new();
    for link in inputs.observed.host.outside(&network.bridge) {
        let of_link = parameters::interface_forwarding(network, &link.name);
        for (host, own) in parameters::forwarding(network).into_iter().zip(of_link) {
            // Setting that of the host sets that of each interface.
            if is(&host.key, host.value) && is(&own.key, "0") {
                let (name, key) = (&link.name, own.key);
                warnings.push(format!(
                    "packets that come in by {name} are not forwarded, as {key} is 0: published ports do not answer there \
                     by the kernel unless you set it to 1"
                ));
            }
        }
    }
    warnings
}

/// Checks that the file for the settings is free, or belongs to this program.
fn check_file(inputs: Inputs<'_>, network: &Network) -> Result<(), PlanError> {
    let is_known =
        |path| inputs.owned.network.as_ref().is_some_and(|owned| owned.persist.as_ref() == Some(path));
    let Some(path) = network.persist.as_ref().filter(|path| !is_known(path)) else { return Ok(()) };
    match inputs.observed.files.get(path).and_then(Option::as_ref) {
        Some(text) if !persist::is_ours(text, network.bridge.as_str()) => {
            Err(PlanError::FileTaken(path.clone()))
        }
        _ => Ok(()),
    }
}

/// Whether an interface is the bridge of `owned`, and not one that somebody else made under its name.
fn is_ours(link: &Link, owned: &Topology) -> bool {
    owned.network.as_ref().is_some_and(|network| {
        link.name == network.bridge.as_str()
            && link.kind.as_deref() == Some("bridge")
            && network.is_bridge(link.alias.as_deref(), link.mac)
    })
}

/// Removes the bridge and restores the parameters when they are no longer wanted.
pub(super) fn remove(inputs: Inputs<'_>, plan: &mut Plan) {
    let (Some(network), None) = (&inputs.owned.network, &inputs.desired.network) else {
        return;
    };
    let link = inputs.observed.host.link(network.bridge.as_str());
    if let Some(link) = link.filter(|link| is_ours(link, inputs.owned)) {
        let mut again = Plan::default();
        create(network, inputs, &mut again);
        if link.up {
            bring_up(network, None, &mut again);
        }
        set_parameters(inputs, &mut again, parameters::bridge_forwarding(network), true);
        let again = again.steps.into_iter().map(|step| step.action);
        let again = again.chain(restored_offload(network, inputs.observed));
        plan.push(Step::new(Action::DeleteLink(network.bridge), again));
    }
    // In reverse order, because switching forwarding off changes other parameters.
    for change in network.sysctls.iter().rev() {
        let is = inputs.observed.sysctls.get(&change.key);
        // If it was changed since, that value is kept; another network that needs it has recorded it, too.
        if is == Some(&change.after) && !inputs.observed.needed_elsewhere.contains(&change.key) {
            let set = |value: &String| Action::SetSysctl { key: change.key.clone(), value: value.clone() };
            plan.push(Step::new(set(&change.before), [set(&change.after)]));
        }
    }
    if let Some(path) = &network.persist {
        match inputs.observed.files.get(path).cloned().flatten() {
            Some(text) if persist::is_ours(&text, network.bridge.as_str()) => {
                let again = Action::WriteFile { path: path.clone(), text };
                plan.push(Step::new(Action::RemoveFile(path.clone()), [again]));
            }
            Some(_) => {
                plan.problems.push(format!("{} was changed by somebody else: it is left", path.display()))
            }
            None => {}
        }
    }
}

/// Creates or repairs the bridge.
pub(super) fn build(inputs: Inputs<'_>, plan: &mut Plan) {
    let Some(network) = &inputs.desired.network else {
        return;
    };
    let link = inputs.observed.host.link(network.bridge.as_str());
    let is_replaced = is_replaced(inputs, network);
    if !is_replaced {
        match link {
            None => create(network, inputs, plan),
            Some(link) => mend(network, link, inputs, plan),
        }
        bring_up(network, link, plan);
    }
    let fresh = inputs.owned.network.is_none();
    for change in &network.sysctls {
        let is = inputs.observed.sysctls.get(&change.key);
        // At first, each is set even if it already has the value, because setting another one may change it.
        if fresh || is.is_some_and(|is| *is != change.after) {
            let set = |value: &String| Action::SetSysctl { key: change.key.clone(), value: value.clone() };
            let is_ours = fresh && !inputs.observed.needed_elsewhere.contains(&change.key);
            let before = if is_ours { Some(&change.before) } else { is };
            plan.push(Step::new(set(&change.after), before.map(set)));
        }
    }
    // What was on before `up` may have been switched off since.
    let mut needed = parameters::forwarding(network);
    needed.retain(|needed| network.sysctls.iter().all(|change| change.key != needed.key));
    set_parameters(inputs, plan, needed, false);
    if !is_replaced {
        // Follows the host's, which sets that of each interface.
        set_parameters(inputs, plan, parameters::bridge_forwarding(network), link.is_none());
    }
    if let Some(path) = &network.persist {
        let text = persist::text(network);
        match inputs.observed.files.get(path).cloned().unwrap_or_else(|| Some(text.clone())) {
            Some(is) if is == text => {}
            Some(is) if !persist::is_ours(&is, network.bridge.as_str()) => plan.problems.push(format!(
                "{} was changed by somebody else: remove it, and run `netns-setup repair`",
                path.display()
            )),
            is => {
                let back = match is {
                    Some(text) => Action::WriteFile { path: path.clone(), text },
                    None => Action::RemoveFile(path.clone()),
                };
                plan.push(Step::new(Action::WriteFile { path: path.clone(), text }, [back]));
            }
        }
    }
}

fn create(network: &Network, inputs: Inputs<'_>, plan: &mut Plan) {
    let name = network.bridge;
    let add = Action::AddBridge { name, mac: network.mac(), mtu: network.mtu };
    plan.push(Step::new(add, [Action::DeleteLink(name)]));
    let change = LinkChange::Alias(network.tag());
    plan.push(Step::on_fresh(Action::SetLink { place: NetnsRef::Host, name, change }));
    // Precede the first packet, and IPv6 addresses, which need IPv6.
    set_parameters(inputs, plan, parameters::bridge(network), true);
    for address in network.addresses() {
        plan.push(Step::on_fresh(Action::AddAddress { place: NetnsRef::Host, name, address }));
    }
}

fn bring_up(network: &Network, is: Option<&Link>, plan: &mut Plan) {
    LinkWish { place: NetnsRef::Host, name: &network.bridge, is }.up(plan);
}

fn mend(network: &Network, link: &Link, inputs: Inputs<'_>, plan: &mut Plan) {
    let wish = LinkWish { place: NetnsRef::Host, name: &network.bridge, is: Some(link) };
    let alias = link.alias.clone().unwrap_or_default();
    let other = (alias != network.tag()).then_some(LinkChange::Alias(alias));
    wish.change(plan, |_| other.clone(), LinkChange::Alias(network.tag()));
    wish.change(plan, |link| link.stp.then_some(LinkChange::Stp(true)), LinkChange::Stp(false));
    wish.mac(plan, network.mac());
    wish.mtu(plan, network.mtu);
    set_parameters(inputs, plan, parameters::bridge(network), false);
    for address in network.addresses() {
        if !inputs.observed.host.has_address(link, address) {
            let (place, name) = (NetnsRef::Host, network.bridge);
            let add = Action::AddAddress { place: place.clone(), name, address };
            plan.push(Step::new(add, [Action::DeleteAddress { place, name, address }]));
        }
    }
    let place = (&NetnsRef::Host, network.bridge);
    connected::mend(place, &inputs.observed.host, link, network.addresses(), plan);
}

/// The current packet sizes of the bridge. It loses them with its last port, and adopts the first port's.
pub(super) fn restored_offload(network: &Network, observed: &Observed) -> Option<Action> {
    let link = observed.host.link(network.bridge.as_str()).filter(|_| network.gso_max_size > 0)?;
    let change = LinkChange::Offload(link.offload);
    Some(Action::SetLink { place: NetnsRef::Host, name: network.bridge, change })
}

fn adds_port(action: &Action) -> bool {
    matches!(action, Action::AddVeth(_) | Action::SetLink { change: LinkChange::Master(Some(_)), .. })
}

/// What depends on the containers: the bridge's packet sizes, which it adopts from its ports, and loopback
/// routing.
pub(super) fn tune(inputs: Inputs<'_>, plan: &mut Plan) {
    let Some(network) = inputs.desired.network.as_ref().filter(|network| !is_replaced(inputs, network))
    else {
        return;
    };
    let link = inputs.observed.host.link(network.bridge.as_str());
    if network.gso_max_size > 0 {
        let limit = match link.and_then(|link| link.tso_max_size) {
            // A bridge sends what its ports can send. Without ports, the kernel's limit depends on whether it
            // ever had one.
            _ if inputs.desired.endpoints.is_empty() => 0,
            Some(limit) if !plan.steps.iter().any(|step| adds_port(&step.action)) => limit,
            _ => u32::MAX,
        };
        let wish = LinkWish { place: NetnsRef::Host, name: &network.bridge, is: link };
        let limits = OffloadLimits::sending(limit);
        wish.offload(plan, network.gso_max_size, limits, untouched_offload(inputs.observed));
    }
    let key = sysctl::of_interface("ipv4", network.bridge.as_str(), "route_localnet");
    let wanted = if needs_route_localnet(inputs.desired) { "1" } else { "0" };
    let is = inputs.observed.sysctls.get(&key).map_or("0", String::as_str);
    if is != wanted {
        let set = |value: &str| Action::SetSysctl { key: key.clone(), value: value.to_owned() };
        let undo = link.map(|_| set(is));
        plan.push(Step::new(set(wanted), undo));
    }
}
