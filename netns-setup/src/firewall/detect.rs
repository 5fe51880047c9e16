//! Selects a firewall, and detects rules of others that interfere.

use super::iptables::{Ruleset, SavedTables};
use super::others::{self, Wanted};
use super::tool::{self, ToolError};
use crate::family::{Family, Variant};
use crate::model::{Firewall, Network, Topology};

/// The value of `--firewall`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Choice {
    /// Whichever fits the host.
    Auto,
    /// One separate table.
    Nft,
    /// Docker's chains.
    Iptables,
    /// No rules.
    None,
}

/// Why no firewall is available.
#[derive(Debug, thiserror::Error)]
pub enum DetectError {
    /// Neither program is installed.
    #[error(
        "neither nft nor iptables is installed: install one, or use --firewall none and close the containers yourself"
    )]
    Nothing,
    /// The requested program is missing or does not work.
    #[error(transparent)]
    Tool(#[from] ToolError),
}

/// Selects a backend that works on this host.
///
/// # Errors
/// If the requested program, or each of them, is missing.
pub fn choose(choice: Choice) -> Result<Firewall, DetectError> {
    match choice {
        Choice::None => Ok(Firewall::None),
        Choice::Nft => tool::run("nft", &["--version"], "").map(|_| Firewall::Nft).map_err(Into::into),
        Choice::Iptables => saved(Family::V4).map(|_| Firewall::Iptables).map_err(Into::into),
        Choice::Auto => automatic(),
    }
}

/// A FORWARD policy of DROP in iptables overrides other tables, so the accepting rules must be in iptables,
/// unless Docker is running, which owns the chains. Everywhere else, nft is preferred.
fn automatic() -> Result<Firewall, DetectError> {
    let iptables = saved(Family::V4).ok();
    let closed =
        iptables.as_ref().is_some_and(|saved| forward_drops(saved) && saved.chain("nat", "DOCKER").is_none());
    if closed {
        return Ok(Firewall::Iptables);
    }
    if tool::find("nft").is_some() {
        return Ok(Firewall::Nft);
    }
    iptables.map(|_| Firewall::Iptables).ok_or(DetectError::Nothing)
}

/// The tables of one family that the chosen programs of iptables list.
///
/// # Errors
/// If they cannot be listed.
pub fn saved(family: Family) -> Result<SavedTables, ToolError> {
    saved_by(family, Variant::Chosen)
}

/// The tables that have `ours`: if somebody has chosen the other programs since, these are not the ones that they list.
///
/// # Errors
/// If the tables of the chosen programs cannot be listed.
pub fn saved_with(family: Family, ours: &Ruleset) -> Result<SavedTables, ToolError> {
    let chosen = saved(family)?;
    if *ours == Ruleset::default() || chosen.have_any_of(ours) {
        return Ok(chosen);
    }
    let others = [Some(Variant::Nft), has_legacy(family).then_some(Variant::Legacy)];
    // What is not installed lists nothing.
    let others = others.into_iter().flatten().filter_map(|variant| saved_by(family, variant).ok());
    Ok(others.into_iter().find(|tables| tables.have_any_of(ours)).unwrap_or(chosen))
}

fn saved_by(family: Family, variant: Variant) -> Result<SavedTables, ToolError> {
    let text = tool::run(family.save(variant), &[], "")?;
    let mut tables = SavedTables::parse(&text);
    tables.variant = variant;
    Ok(tables)
}

/// Whether iptables-legacy has tables. Listing would create them.
fn has_legacy(family: Family) -> bool {
    std::fs::read_to_string(family.legacy_tables()).is_ok_and(|names| !names.trim().is_empty())
}

/// Describes rules of others that keep the network from working. They are those of nft, which include those of
/// iptables-nft, and those of iptables-legacy.
#[must_use]
pub fn interference(network: &Network, topology: &Topology) -> Vec<String> {
    if network.firewall == Firewall::None {
        return Vec::new();
    }
    let subnet6 = network.subnet6.map(|subnet| subnet.cidr().to_string());
    let families = [Some(Family::V4), network.subnet6.map(|_| Family::V6)];
    let wanted = Wanted {
        bridge: network.bridge.to_string(),
        subnets: std::iter::once(network.subnet.cidr().to_string()).chain(subnet6).collect(),
        families: families.into_iter().flatten().collect(),
        has_relays: topology.active().any(|(_, _, mapping)| mapping.via.has_relay()),
    };
    let mut found = tool::run("nft", &["-s", "list", "ruleset"], "")
        .map(|ruleset| others::in_nft(&ruleset, &wanted))
        .unwrap_or_default();
    for family in &wanted.families {
        found.extend(from_iptables(*family, network.firewall, &wanted));
    }
    found
}

fn from_iptables(family: Family, firewall: Firewall, wanted: &Wanted) -> Vec<String> {
    let tool = family.save(Variant::Chosen).trim_end_matches("-save");
    let mut found = Vec::new();
    // Without iptables, no rules of iptables interfere.
    let saved = saved(family).ok();
    if firewall == Firewall::Nft && saved.as_ref().is_some_and(|saved| saved.chain("nat", "DOCKER").is_some())
    {
        found.push(format!(
            "{tool} holds Docker's chains: a port that Docker publishes too is answered by Docker"
        ));
    }
    let has_legacy = has_legacy(family);
    let legacy = has_legacy.then(|| saved_by(family, Variant::Legacy).ok()).flatten();
    match (legacy, saved) {
        (Some(tables), _) => {
            let tool = family.save(Variant::Legacy).trim_end_matches("-save");
            found.extend(others::in_iptables(tool, &tables, wanted));
        }
        (None, Some(saved)) if has_legacy || tool::find("nft").is_none() => {
            found.extend(others::in_iptables(tool, &saved, wanted));
        }
        _ => {}
    }
    found
}

fn forward_drops(saved: &SavedTables) -> bool {
    saved.chain("filter", "FORWARD").is_some_and(|chain| chain.policy.as_deref() == Some("DROP"))
}
