//! Changes of the rules: one step per backend and address family.

use super::{Inputs, Plan, PlanError, Step};
use crate::action::Action;
use crate::family::Family;
use crate::firewall::iptables::{self, Ruleset, SavedTables};
use crate::firewall::nft;
use crate::model::{Firewall, Topology};
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
        Rules::Nft { listing, as_wanted } => change_nft(inputs, listing.as_deref(), *as_wanted, plan),
        Rules::Iptables(saved) => {
            for (family, saved) in saved {
                let rules = |topology: &Topology| iptables::render(topology, *family);
                change_iptables(*family, saved, &rules(inputs.owned), &rules(inputs.desired), plan);
            }
        }
    }
}

fn change_nft(inputs: Inputs<'_>, listing: Option<&str>, as_wanted: Option<bool>, plan: &mut Plan) {
    let Some(network) = inputs.desired.network.as_ref().or(inputs.owned.network.as_ref()) else {
        return;
    };
    let table = nft::table_name(network);
    let wanted = nft::render(inputs.desired);
    let is_same = as_wanted.unwrap_or_else(|| nft::render(inputs.owned) == wanted);
    change_nft_table(&table, listing, wanted.as_deref(), is_same, plan);
}

/// Replaces a table, unless it is the wanted one already.
pub(super) fn change_nft_table(
    table: &str,
    listing: Option<&str>,
    wanted: Option<&str>,
    is_same: bool,
    plan: &mut Plan,
) {
    let differs = match (wanted, listing) {
        (None, listing) => listing.is_some(),
        (Some(_), None) => true,
        (Some(_), Some(_)) => !is_same,
    };
    if differs {
        let script = nft::replace(table, wanted);
        plan.push(Step::new(Action::Nft(script), [Action::Nft(nft::replace(table, listing))]));
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
        let action = |script| Action::Iptables { family, script };
        plan.push(Step::new(action(change.script), [action(change.undo)]));
    }
}

/// The backend of a topology.
#[must_use]
pub(crate) fn backend(topology: &Topology) -> Firewall {
    topology.network.as_ref().map_or(Firewall::None, |network| network.firewall)
}
