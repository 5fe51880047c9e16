//! A container's namespace, its veth pair, addresses and routes.

use std::net::IpAddr;

use super::{
    Inputs, LinkWish, OffloadLimits, Plan, PlanError, Step, connected, network, set_parameters,
    untouched_offload,
};
use crate::action::{Action, LinkChange, NetnsRef, VethPair};
use crate::host_ip::HostIp;
use crate::model::{Endpoint, Network};
use crate::name::CONTAINER_INTERFACE;
use crate::name::{IfName, Name};
use crate::observed::{Link, Side};
use crate::parameters;

/// The largest IPv6 packet, in bytes, without a jumbo payload option (GSO_LEGACY_MAX_SIZE of
/// linux/netdevice.h).
const LARGEST_FORWARDED_IPV6: u32 = 65_536;

/// Deletes the veth pairs of containers that are no longer wanted.
pub(super) fn remove(inputs: Inputs<'_>, plan: &mut Plan) {
    for (name, endpoint) in unwanted(inputs) {
        let host_end = endpoint.id.veth();
        if !inputs.observed.host.link(host_end.as_str()).is_some_and(is_veth) {
            continue;
        }
        let side = inputs.observed.containers.get(name).and_then(Option::as_ref);
        let again: Vec<Action> = match (&inputs.owned.network, side) {
            // If the namespace is gone, so is its end of the pair, and the deletion cannot be undone.
            (Some(network), Some(_)) => {
                let steps = connect(inputs, network, endpoint).steps.into_iter().map(|step| step.action);
                steps.chain(network::restored_offload(network, inputs.observed)).collect()
            }
            _ => Vec::new(),
        };
        plan.push(Step::new(Action::DeleteLink(host_end), again));
    }
}

/// Deletes the namespaces that were created for such containers.
pub(super) fn remove_namespaces(inputs: Inputs<'_>, plan: &mut Plan) {
    for (name, endpoint) in unwanted(inputs) {
        let is_there =
            inputs.observed.namespace_files.contains(name) && !inputs.observed.replaced.contains(name);
        if endpoint.netns.is_ours() && is_there {
            let again = [Action::AddNetns(name.clone()), loopback_up(place(endpoint))];
            plan.push(Step::new(Action::DeleteNetns(name.clone()), again));
        }
    }
}

/// Whether an interface can be the host's end of a pair; the name of another one is a coincidence, or a trap.
fn is_veth(link: &Link) -> bool {
    link.kind.as_deref() == Some("veth")
}

fn unwanted(inputs: Inputs<'_>) -> impl Iterator<Item = (&Name, &Endpoint)> {
    inputs
        .owned
        .endpoints
        .iter()
        .filter(move |(name, _)| inputs.scope.contains(name) && !inputs.desired.endpoints.contains_key(*name))
}

/// Creates or repairs the connections of the wanted containers.
pub(super) fn build(inputs: Inputs<'_>, plan: &mut Plan) -> Result<(), PlanError> {
    let Some(network) = &inputs.desired.network else {
        return Ok(());
    };
    for (name, endpoint) in &inputs.desired.endpoints {
        if inputs.scope.contains(name) {
            build_one(inputs, network, name, endpoint, plan)?;
        }
    }
    Ok(())
}

fn build_one(
    inputs: Inputs<'_>,
    network: &Network,
    name: &Name,
    endpoint: &Endpoint,
    plan: &mut Plan,
) -> Result<(), PlanError> {
    if inputs.observed.unseen.contains(name) {
        return Ok(());
    }
    let known = inputs.owned.endpoints.contains_key(name);
    let host_end = endpoint.id.veth();
    let host_link = inputs.observed.host.link(host_end.as_str());
    if host_link.is_some_and(|link| !is_veth(link)) {
        plan.problems
            .push(format!("the interface {host_end} has the name of {name}'s, and is not ours: remove it"));
        return Ok(());
    }
    let Some(side) = inputs.observed.containers.get(name).and_then(Option::as_ref) else {
        return start_over(inputs, network, name, endpoint, plan);
    };
    let container_link = side.link(CONTAINER_INTERFACE);
    if !known && endpoint.netns.is_ours() {
        return Err(PlanError::NetnsTaken(name.clone()));
    }
    if !known && container_link.is_some() {
        return Err(PlanError::InterfaceTaken(name.clone()));
    }
    let cookie = inputs.observed.cookies.get(name).copied();
    if let Some((from, cookie)) = inputs.observed.living.get(name).zip(cookie) {
        if inputs.observed.mounts_are_hidden {
            plan.problems.push(PlanError::Hidden(name.clone()).to_string());
            return Ok(());
        }
        let mount = Action::MountNetns { name: name.clone(), from: from.clone(), cookie };
        plan.push(Step::new(mount, [Action::DeleteNetns(name.clone())]));
    }
    mend_loopback(endpoint, side, plan);
    match (host_link, container_link) {
        (Some(_), Some(_)) => mend(inputs, network, endpoint, side, plan),
        (None, Some(_)) => {
            plan.problems
                .push(format!("the namespace of {name} has an interface eth0 that is not ours: remove it"));
        }
        // It waits for the bridge.
        (_, None) if network::is_replaced(inputs, network) => {}
        (host_link, None) => {
            if host_link.is_some() {
                plan.push(Step::on_fresh(Action::DeleteLink(host_end)));
            }
            plan.steps.extend(connect(inputs, network, endpoint).steps);
        }
    }
    Ok(())
}

/// The namespace is missing: one of ours is created; one that the user passed cannot be.
fn start_over(
    inputs: Inputs<'_>,
    network: &Network,
    name: &Name,
    endpoint: &Endpoint,
    plan: &mut Plan,
) -> Result<(), PlanError> {
    let known = inputs.owned.endpoints.contains_key(name);
    match (endpoint.netns.is_ours(), known) {
        (false, false) => return Err(PlanError::NetnsGone(name.clone())),
        (false, true) => plan.problems.push(format!("the namespace of {name} is gone: detach {name}")),
        (true, _) if inputs.observed.replaced.contains(name) => plan.problems.push(format!(
            "the network namespace {name} is not the one that netns-setup made: run `netns-setup detach {name}`, which leaves it alone"
        )),
        (true, false) if inputs.observed.mounts_are_hidden => return Err(PlanError::Hidden(name.clone())),
        (true, true) if inputs.observed.mounts_are_hidden => {
            plan.problems.push(PlanError::Hidden(name.clone()).to_string());
        }
        (true, _) if network::is_replaced(inputs, network) => {}
        (true, _) => {
            plan.push(Step::new(Action::AddNetns(name.clone()), [Action::DeleteNetns(name.clone())]));
            let host_end = endpoint.id.veth();
            if inputs.observed.host.link(host_end.as_str()).is_some() {
                plan.push(Step::on_fresh(Action::DeleteLink(host_end)));
            }
            plan.push(Step::on_fresh(loopback_up(place(endpoint))));
            plan.steps.extend(connect(inputs, network, endpoint).steps);
        }
    }
    Ok(())
}

fn place(endpoint: &Endpoint) -> NetnsRef {
    NetnsRef::Container(endpoint.netns.path.clone())
}

fn loopback_up(place: NetnsRef) -> Action {
    let name = IfName::loopback();
    Action::SetLink { place, name, change: LinkChange::Up(true) }
}

fn mend_loopback(endpoint: &Endpoint, side: &Side, plan: &mut Plan) {
    if side.link("lo").is_some_and(|link| !link.up) {
        let up = loopback_up(place(endpoint));
        let Action::SetLink { place, name, .. } = up.clone() else {
            return;
        };
        plan.push(Step::new(up, [Action::SetLink { place, name, change: LinkChange::Up(false) }]));
    }
}

/// The steps from nothing to a connected container, in an existing namespace.
fn connect(inputs: Inputs<'_>, network: &Network, endpoint: &Endpoint) -> Plan {
    let mut plan = Plan::default();
    let (host_end, inside, eth0) = (endpoint.id.veth(), place(endpoint), IfName::container());
    let pair = VethPair {
        host: host_end,
        host_mac: endpoint.id.veth_mac(),
        container_mac: endpoint.mac(),
        mtu: network.mtu,
        netns: endpoint.netns.path.clone(),
    };
    plan.push(Step::new(Action::AddVeth(pair), [Action::DeleteLink(host_end)]));
    set_parameters(inputs, &mut plan, parameters::port(&host_end), true);
    let host = LinkWish { place: NetnsRef::Host, name: &host_end, is: None };
    let container = LinkWish { place: inside, name: &eth0, is: None };
    host.change(&mut plan, |_| None, LinkChange::Master(Some(network.bridge)));
    if endpoint.needs_hairpin() {
        host.change(&mut plan, |_| None, LinkChange::Hairpin(true));
    }
    enlarge_packets(inputs, network, &host, &container, &mut plan);
    if network.disable_ipv6 {
        plan.push(Step::on_fresh(disable_ipv6(endpoint, "1")));
    }
    host.up(&mut plan);
    connect_inside(network, endpoint, &container, &mut plan);
    plan
}

/// Raises the packet sizes of both ends of a pair, except for IPv6 out of the container.
///
/// An IPv6 packet of more than 64 KiB has a jumbo payload option (RFC 2675). The host does not forward one
/// that has to be segmented to the MTU, but counts it in `Ip6FragFails`, and TCP recovers only by
/// retransmission. Packets from a container may have to be forwarded. IPv4 has no such option and is not
/// affected.
fn enlarge_packets(
    inputs: Inputs<'_>,
    network: &Network,
    host: &LinkWish<'_>,
    container: &LinkWish<'_>,
    plan: &mut Plan,
) {
    if network.gso_max_size == 0 {
        return;
    }
    let known = untouched_offload(inputs.observed);
    let host_limits = OffloadLimits { gro: LARGEST_FORWARDED_IPV6, ..OffloadLimits::of_driver(host.is) };
    host.offload(plan, network.gso_max_size, host_limits, known);
    let driver = OffloadLimits::of_driver(container.is);
    let container_limits = OffloadLimits { gso: driver.gso.min(LARGEST_FORWARDED_IPV6), ..driver };
    container.offload(plan, network.gso_max_size, container_limits, known);
}

/// Before the interface is up, so that it never gets a link-local address.
fn disable_ipv6(endpoint: &Endpoint, value: &str) -> Action {
    let (key, value) = (endpoint.disable_ipv6(), value.to_owned());
    Action::SetContainerSysctl { netns: endpoint.netns.path.clone(), key, value }
}

fn connect_inside(network: &Network, endpoint: &Endpoint, container: &LinkWish<'_>, plan: &mut Plan) {
    let LinkWish { place, name, .. } = container;
    for address in endpoint.addresses(network) {
        plan.push(Step::on_fresh(Action::AddAddress { place: place.clone(), name: *(*name), address }));
    }
    container.up(plan);
    for gateway in network.gateways() {
        plan.push(Step::on_fresh(Action::AddDefaultRoute { place: place.clone(), gateway }));
    }
}

fn mend(inputs: Inputs<'_>, network: &Network, endpoint: &Endpoint, side: &Side, plan: &mut Plan) {
    let (host_end, inside, eth0) = (endpoint.id.veth(), place(endpoint), IfName::container());
    let host = &inputs.observed.host;
    let (host_link, link) = (host.link(host_end.as_str()), side.link(CONTAINER_INTERFACE));
    let outer = LinkWish { place: NetnsRef::Host, name: &host_end, is: host_link };
    let inner = LinkWish { place: inside.clone(), name: &eth0, is: link };
    let bridge = host.link(network.bridge.as_str()).map(|link| link.index);
    set_parameters(inputs, plan, parameters::port(&host_end), false);
    if !network::is_replaced(inputs, network) {
        // A port of a bridge that is created again has to join it, too.
        let joined = |master: Option<u32>| bridge.is_some() && master == bridge;
        let left = |link: &Link| (!joined(link.master)).then_some(LinkChange::Master(None));
        outer.change(plan, left, LinkChange::Master(Some(network.bridge)));
        let hairpin = endpoint.needs_hairpin();
        let before = |link: &Link| (link.hairpin != hairpin).then_some(LinkChange::Hairpin(!hairpin));
        outer.change(plan, before, LinkChange::Hairpin(hairpin));
    }
    outer.mtu(plan, network.mtu);
    inner.mtu(plan, network.mtu);
    outer.mac(plan, endpoint.id.veth_mac());
    inner.mac(plan, endpoint.mac());
    enlarge_packets(inputs, network, &outer, &inner, plan);
    let is_on = side.sysctls.get(&endpoint.disable_ipv6()).filter(|value| *value != "1");
    if let Some(before) = is_on.filter(|_| network.disable_ipv6) {
        plan.push(Step::new(disable_ipv6(endpoint, "1"), [disable_ipv6(endpoint, before)]));
    }
    outer.up(plan);
    mend_inside(network, endpoint, side, &inner, plan);
}

fn mend_inside(network: &Network, endpoint: &Endpoint, side: &Side, inner: &LinkWish<'_>, plan: &mut Plan) {
    let (place, name) = (inner.place.clone(), *inner.name);
    inner.up(plan);
    for address in endpoint.addresses(network) {
        if !inner.is.is_some_and(|link| side.has_address(link, address)) {
            let add = Action::AddAddress { place: place.clone(), name, address };
            let delete = Action::DeleteAddress { place: place.clone(), name, address };
            plan.push(Step::new(add, [delete]));
        }
    }
    if let Some(link) = inner.is {
        connected::mend((&place, name), side, link, endpoint.addresses(network), plan);
    }
    // Setting an interface down removes its routes, so they have to be added again.
    for gateway in network.gateways() {
        if !side.has_default_route(gateway) {
            let back = inner.is.filter(|link| link.up || gateway.is_ipv4());
            let back = back.map(|_| Action::DeleteDefaultRoute { place: place.clone(), gateway });
            plan.push(Step::new(Action::AddDefaultRoute { place: place.clone(), gateway }, back));
        }
    }
}

/// The container's address that a relay on a host socket connects to.
pub(super) fn relay_target(network: &Network, endpoint: &Endpoint, host: HostIp) -> IpAddr {
    match endpoint.ip6(network) {
        Some(ip) if host.is_ipv6() => ip.into(),
        _ => endpoint.ip.into(),
    }
}
