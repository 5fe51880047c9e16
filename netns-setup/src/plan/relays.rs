//! Relay processes, and conntrack entries that would bypass a change of them.

use std::collections::BTreeSet;

use rproxy_mapping::addr::Protocol;

use super::{Inputs, Plan, Step, endpoint};
use crate::action::{Action, RelayCommand};
use crate::host_ip::HostIp;
use crate::model::{Endpoint, Mapping, Topology};
use crate::name::Name;

/// The command line of a mapping's relay.
fn command(
    inputs: Inputs<'_>,
    topology: &Topology,
    endpoint: &Endpoint,
    mapping: &Mapping,
) -> Option<RelayCommand> {
    let network = topology.network.as_ref()?;
    mapping.via.has_relay().then(|| RelayCommand {
        program: inputs.rproxy.to_owned(),
        key: mapping.key(),
        container_ip: endpoint::relay_target(network, endpoint, mapping.host),
        container_port: mapping.container_port,
    })
}

/// The mappings in the plan's scope that one topology has and the other does not.
fn only_in<'a>(
    inputs: Inputs<'a>,
    one: &'a Topology,
    other: &'a Topology,
) -> impl Iterator<Item = (&'a Name, &'a Endpoint, &'a Mapping)> {
    one.mappings().filter(move |(name, _, mapping)| {
        let same = |theirs: &Endpoint| theirs.mappings.iter().any(|theirs| theirs.is_same(mapping));
        inputs.scope.contains(name) && !other.endpoints.get(*name).is_some_and(same)
    })
}

/// Stops the relays of mappings that are no longer wanted.
pub(super) fn stop(inputs: Inputs<'_>, plan: &mut Plan) {
    for (_, endpoint, mapping) in only_in(inputs, inputs.owned, inputs.desired) {
        let process = inputs.observed.relays.get(&mapping.key()).copied();
        let command = command(inputs, inputs.owned, endpoint, mapping);
        if let (Some(relay), Some(process)) = (command, process) {
            let stop = Action::StopRelay { relay: relay.clone(), process: Some(process) };
            plan.push(Step::new(stop, [Action::StartRelay(relay)]));
        }
    }
}

/// Starts the wanted relays that are not running.
pub(super) fn start(inputs: Inputs<'_>, plan: &mut Plan) {
    for (name, endpoint, mapping) in inputs.desired.mappings() {
        let runs = inputs.observed.relays.contains_key(&mapping.key());
        if !inputs.scope.contains(name) || runs {
            continue;
        }
        if let HostIp::Scoped(ip, interface) = mapping.host
            && inputs.observed.host.link(interface.as_str()).is_none()
        {
            let key = mapping.key();
            plan.problems.push(format!(
                "{key} of {name} is not served, as the interface {interface} of {ip} is gone: run `netns-setup unpublish {name} -p {}:{}:{}/{}` if it does not come back",
                key.host, key.port, mapping.container_port, key.proto
            ));
            continue;
        }
        if let Some(relay) = command(inputs, inputs.desired, endpoint, mapping) {
            let start = Action::StartRelay(relay.clone());
            plan.push(Step::new(start, [Action::StopRelay { relay, process: None }]));
        }
    }
}

/// Deletes conntrack entries that were created under other rules: the kernel would keep using them while
/// packets arrive. Follows the change of the rules and precedes the relays: while their sockets receive nothing, nobody
/// sends from the ports, so that no entry begins there again.
pub(super) fn flush(inputs: Inputs<'_>, plan: &mut Plan) {
    let gone = only_in(inputs, inputs.owned, inputs.desired);
    let come = only_in(inputs, inputs.desired, inputs.owned);
    let changed = gone.chain(come).filter(|(_, _, mapping)| mapping.proto == Protocol::Udp);
    let ports: BTreeSet<_> = changed.map(|(_, _, mapping)| (mapping.host, mapping.host_port)).collect();
    if !ports.is_empty() {
        plan.push(Step::on_fresh(Action::FlushConntrack(ports.into_iter().collect())));
    }
}
