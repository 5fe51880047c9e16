//! Changes of the rules: one step per backend and address family.

use super::{Inputs, Plan, PlanError, Step};
use crate::action::Action;
use crate::addr::Cidr;
use crate::block::Block;
use crate::family::Family;
use crate::firewall::iptables::{self, Ruleset, SavedTables};
use crate::firewall::{needs_route_localnet, nft, nft_diff};
use crate::model::{Firewall, Network, Topology};
use crate::observed::Rules;

/// Checks that the chains are free, or belong to this program.
pub(super) fn check(inputs: Inputs<'_>) -> Result<(), PlanError> {
    let Rules::Iptables(saved) = &inputs.observed.rules else {
        return Ok(());
    };
    for (family, saved) in saved {
        // `DOCKER-DIRECT` is created for the first mapping that needs it, when `DOCKER` already belongs to this
        // program.
        if iptables::render(inputs.owned, *family).chains().next().is_some() {
            continue;
        }
        for (table, chain) in iptables::render(inputs.desired, *family).chains() {
            if saved.chain(table, chain).is_some() {
                return Err(PlanError::ChainTaken { table, chain });
            }
        }
    }
    Ok(())
}

/// The steps that change the rules to the wanted ones.
pub(super) fn change(inputs: Inputs<'_>, plan: &mut Plan) {
    match &inputs.observed.rules {
        Rules::None => {}
        Rules::Nft { listing, wanted } => change_nft(inputs, listing.as_deref(), wanted.as_deref(), plan),
        Rules::Iptables(saved) => {
            for (family, saved) in saved {
                let rules = |topology: &Topology| iptables::render(topology, *family);
                change_iptables(*family, saved, &rules(inputs.owned), &rules(inputs.desired), plan);
            }
        }
    }
}

/// Blocks what other hosts route to the containers, and what these send to the host's loopback addresses. The rules do so,
/// too, and refuse the former earlier; this also holds after somebody has flushed them.
pub(super) fn block(inputs: Inputs<'_>, plan: &mut Plan) {
    let Some(blocked) = &inputs.observed.blocked else {
        return;
    };
    let (owned, wanted) = (blocks(inputs.owned), blocks(inputs.desired));
    for block in wanted.iter().filter(|block| !blocked.contains(block)) {
        plan.push(Step::new(Action::Block(*block), [Action::Unblock(*block)]));
    }
    for block in owned.iter().filter(|block| !wanted.contains(block) && blocked.contains(block)) {
        plan.push(Step::new(Action::Unblock(*block), [Action::Block(*block)]));
    }
}

/// What has to be blocked, unless the user guards it. What only matters where the kernel serves ports alone is only there if
/// it can be of use: a policy for loopback addresses costs a look-up for each packet to the host.
fn blocks(topology: &Topology) -> Vec<Block> {
    let subnets = guarded(topology);
    let network = topology.network.as_ref().filter(|_| !subnets.is_empty() && needs_route_localnet(topology));
    let to_loopback = network.map(|network| Block::ToLoopback(network.subnet.cidr()));
    let replies = network.into_iter().flat_map(Network::gateways).map(Block::Reply);
    subnets.iter().map(|subnet| Block::Routed(*subnet)).chain(to_loopback).chain(replies).collect()
}

/// The subnets of a network, unless the user guards them.
pub(super) fn guarded(topology: &Topology) -> Vec<Cidr> {
    let network = topology.network.as_ref().filter(|network| network.firewall != Firewall::None);
    let subnets =
        network.map(|network| [Some(network.subnet.cidr()), network.subnet6.map(|subnet| subnet.cidr())]);
    subnets.into_iter().flatten().flatten().collect()
}

fn change_nft(inputs: Inputs<'_>, listing: Option<&str>, wanted: Option<&str>, plan: &mut Plan) {
    let Some(network) = inputs.desired.network.as_ref().or(inputs.owned.network.as_ref()) else {
        return;
    };
    let table = nft::table_name(network);
    let body = nft::render(inputs.desired);
    if wanted.is_none() && listing.is_some() && nft::render(inputs.owned) == body {
        return;
    }
    change_nft_table(&table, listing, body.as_deref(), wanted, plan);
}

/// Changes what differs between a table and the one that `body` declares; `wanted` is how `nft` lists that. Replaces
/// the table if they differ in more than elements and rules.
pub(super) fn change_nft_table(
    table: &str,
    listing: Option<&str>,
    body: Option<&str>,
    wanted: Option<&str>,
    plan: &mut Plan,
) {
    let scripts = match (listing, body, wanted) {
        (None, None, _) => return,
        (Some(listing), Some(_), Some(wanted)) if nft_diff::is_same(listing, wanted) => return,
        (Some(listing), Some(_), Some(wanted)) => {
            nft_diff::change(table, listing, wanted).zip(nft_diff::change(table, wanted, listing))
        }
        (Some(listing), Some(body), None) => nft_diff::change_elements(table, listing, body)
            .zip(nft_diff::change_elements(table, body, listing)),
        _ => None,
    };
    let (script, undo) = scripts.unwrap_or_else(|| (nft::replace(table, body), nft::replace(table, listing)));
    if !script.is_empty() {
        plan.push(Step::new(Action::Nft(script), [Action::Nft(undo)]));
    }
}

/// Changes the rules of one family.
pub(super) fn change_iptables(
    family: Family,
    saved: &SavedTables,
    owned: &Ruleset,
    wanted: &Ruleset,
    plan: &mut Plan,
) {
    if let Some(change) = iptables::transition(saved, owned, wanted) {
        let variant = saved.variant;
        let action = |script| Action::Iptables { family, variant, script };
        plan.push(Step::new(action(change.script), [action(change.undo)]));
    }
}

/// The backend of a topology.
#[must_use]
pub(crate) fn backend(topology: &Topology) -> Firewall {
    topology.network.as_ref().map_or(Firewall::None, |network| network.firewall)
}
