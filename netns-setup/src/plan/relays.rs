//! The ports that the relay serves, and conntrack entries that would bypass a change of them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;

use rproxy_mapping::addr::Protocol;

use super::rules::guarded;
use super::{Inputs, Plan, Step, endpoint};
use crate::action::Action;
use crate::host_ip::HostIp;
use crate::model::{Endpoint, Mapping, MappingKey, Network, Topology};
use crate::name::Name;
use crate::relayed::{LOG, Launch, RelayedPort};
use crate::stale::Stale;

/// The ports of a topology that a relay serves.
pub(crate) fn relayed_ports(topology: &Topology) -> Vec<RelayedPort> {
    let Some(network) = &topology.network else { return Vec::new() };
    let relayed = topology.active().filter(|(_, _, mapping)| mapping.via.has_relay());
    relayed.map(|(name, endpoint, mapping)| relayed_port(network, name, endpoint, mapping)).collect()
}

fn relayed_port(network: &Network, name: &Name, endpoint: &Endpoint, mapping: &Mapping) -> RelayedPort {
    let ip = endpoint::relay_target(network, endpoint, mapping.host);
    let to = SocketAddr::new(ip, mapping.container_port);
    RelayedPort { key: mapping.key(), owner: name.clone(), to, keeps_source: false }
}

/// The ports in the plan's scope that are wanted.
fn wanted(inputs: Inputs<'_>) -> BTreeMap<MappingKey, RelayedPort> {
    let ports = relayed_ports(inputs.desired).into_iter();
    ports.filter(|port| inputs.scope.contains(&port.owner)).map(|port| (port.key, port)).collect()
}

/// The relay of the network that is or was.
fn launch(inputs: Inputs<'_>) -> Option<Launch> {
    let network = inputs.desired.network.as_ref().or(inputs.owned.network.as_ref())?;
    Some(Launch {
        state_dir: inputs.state_dir.to_owned(),
        network: network.id.clone(),
        program: inputs.rproxy.to_owned(),
    })
}

/// Stops serving what is no longer wanted, and ends what cannot serve the rest.
pub(super) fn stop(inputs: Inputs<'_>, plan: &mut Plan) {
    let Some(relay) = launch(inputs) else { return };
    let observed = &inputs.observed.relay;
    for process in &observed.strays {
        let what = format!("the relay's supervisor with pid {}", process.pid);
        plan.push(Step::on_fresh(Action::EndProcess { what, process: *process }));
    }
    let wanted = wanted(inputs);
    let is_unwanted =
        |port: &&RelayedPort| inputs.scope.contains(&port.owner) && wanted.get(&port.key) != Some(*port);
    let ports: Vec<_> = observed.served.values().filter(is_unwanted).cloned().collect();
    if !ports.is_empty() {
        let again = Action::ServePorts { relay: relay.clone(), ports: ports.clone() };
        plan.push(Step::new(Action::CeasePorts { relay: relay.clone(), ports }, [again]));
    }
    stop_singles(inputs, &relay, plan);
}

/// Ends the relays of an earlier version, which serve one port each.
fn stop_singles(inputs: Inputs<'_>, relay: &Launch, plan: &mut Plan) {
    for port in relayed_ports(inputs.owned).into_iter().filter(|port| inputs.scope.contains(&port.owner)) {
        if let Some(process) = inputs.observed.relay.singles.get(&port.key) {
            let what = format!("the relay of {} alone, of an earlier version,", port.key);
            let again = Action::ServePorts { relay: relay.clone(), ports: vec![port] };
            plan.push(Step::new(Action::EndProcess { what, process: *process }, [again]));
        }
    }
}

/// Serves what is wanted and not served yet.
pub(super) fn start(inputs: Inputs<'_>, plan: &mut Plan) {
    let Some(relay) = launch(inputs) else { return };
    let observed = &inputs.observed.relay;
    if let Some(trouble) = &observed.trouble {
        let log = inputs.state_dir.join(LOG);
        plan.problems.push(format!("the relay does not run: {trouble}; {} may tell why", log.display()));
    }
    let mut missing = Vec::new();
    for (key, port) in wanted(inputs) {
        if observed.served.get(&key) == Some(&port) {
            let refused = observed.unserved.get(&key);
            plan.problems
                .extend(refused.map(|why| format!("{key} of {} is not served now: {why}", port.owner)));
            continue;
        }
        match lacks_interface(inputs, &port) {
            Some(problem) => plan.problems.push(problem),
            None => missing.push(port),
        }
    }
    if !missing.is_empty() {
        let cease = Action::CeasePorts { relay: relay.clone(), ports: missing.clone() };
        plan.push(Step::new(Action::ServePorts { relay, ports: missing }, [cease]));
    }
}

/// Why a port on a link-local address cannot be bound.
fn lacks_interface(inputs: Inputs<'_>, port: &RelayedPort) -> Option<String> {
    let HostIp::Scoped(ip, interface) = port.key.host else { return None };
    let is_gone = inputs.observed.host.link(interface.as_str()).is_none();
    let RelayedPort { key, owner, to, .. } = port;
    is_gone.then(|| {
        format!(
            "{key} of {owner} is not served, as the interface {interface} of {ip} is gone: run `netns-setup unpublish {owner} -p {}:{}:{}/{}` if it does not come back",
            key.host, key.port, to.port(), key.proto
        )
    })
}

/// The mappings in the plan's scope that one topology has and the other does not.
fn only_in<'a>(
    inputs: Inputs<'a>,
    one: &'a Topology,
    other: &'a Topology,
) -> impl Iterator<Item = (&'a Name, &'a Endpoint, &'a Mapping)> {
    let theirs = other.mappings().map(|(name, _, mapping)| ((name, mapping.key()), mapping));
    let theirs: HashMap<_, _> = theirs.collect();
    one.mappings().filter(move |(name, _, mapping)| {
        let is_same = theirs.get(&(*name, mapping.key())).is_some_and(|theirs| theirs.is_same(mapping));
        inputs.scope.contains(name) && !is_same
    })
}

/// Deletes conntrack entries that were created under other rules: the kernel would keep using them while
/// packets arrive. Follows the change of the rules and precedes the relay: while its sockets receive nothing, nobody
/// sends from the ports, so that no entry begins there again.
pub(super) fn flush(inputs: Inputs<'_>, plan: &mut Plan) {
    let gone = only_in(inputs, inputs.owned, inputs.desired);
    let come = only_in(inputs, inputs.desired, inputs.owned);
    let changed = gone.chain(come).filter(|(_, _, mapping)| mapping.proto == Protocol::Udp);
    let port = |mapping: &Mapping| (mapping.host, mapping.host_port);
    let mut ports: BTreeSet<_> = changed.map(|(_, _, mapping)| port(mapping)).collect();
    let mut subnets = Vec::new();
    if inputs.owned == inputs.desired && plan.steps.iter().any(|step| is_rules(&step.action)) {
        // Rules that are restored were missing for a while, and entries began without them.
        subnets = guarded(inputs.desired);
        let udp = inputs.desired.active().filter(|(_, _, mapping)| mapping.proto == Protocol::Udp);
        ports.extend(udp.map(|(_, _, mapping)| port(mapping)));
    }
    if !(ports.is_empty() && subnets.is_empty()) {
        let ports = ports.into_iter().collect();
        plan.push(Step::on_fresh(Action::FlushConntrack(Stale { ports, subnets })));
    }
}

fn is_rules(action: &Action) -> bool {
    matches!(action, Action::Nft(_) | Action::Iptables { .. })
}
