//! Selects a firewall, and detects rules of others that interfere.

use super::iptables::SavedTables;
use super::tool::{self, ToolError};
use crate::family::Family;
use crate::model::{Firewall, Network};

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

/// The tables of one family.
///
/// # Errors
/// If they cannot be listed.
pub fn saved(family: Family) -> Result<SavedTables, ToolError> {
    tool::run(family.save(), &[], "").map(|text| SavedTables::parse(&text))
}

/// Describes rules of others that keep the network from working.
#[must_use]
pub fn interference(network: &Network) -> Vec<String> {
    match network.firewall {
        Firewall::Nft => from_iptables(network),
        Firewall::Iptables => from_nft(),
        Firewall::None => Vec::new(),
    }
}

fn from_iptables(network: &Network) -> Vec<String> {
    let families = [Some(Family::V4), network.subnet6.map(|_| Family::V6)];
    let mut found = Vec::new();
    for family in families.into_iter().flatten() {
        // Without iptables, no rules of iptables interfere.
        let Ok(saved) = saved(family) else { continue };
        let tool = family.save().trim_end_matches("-save");
        if forward_drops(&saved) {
            let bridge = &network.bridge;
            found.push(format!(
                "the FORWARD policy of {tool} is DROP, which also drops what nft accepts: use --firewall iptables, or \
                 accept -i {bridge} and -o {bridge} there"
            ));
        }
        if saved.chain("nat", "DOCKER").is_some() {
            found.push(format!(
                "{tool} holds Docker's chains: a port that Docker publishes too is answered by Docker"
            ));
        }
    }
    found
}

/// Chains of other nft tables with a policy of drop. The `filter` tables belong to iptables-nft itself.
fn from_nft() -> Vec<String> {
    let Ok(listing) = tool::run("nft", &["list", "chains"], "") else {
        return Vec::new();
    };
    dropping_tables(&listing)
        .into_iter()
        .map(|table| format!("the nft table {table} drops forwarded packets by policy, also what iptables accepts: accept the bridge there"))
        .collect()
}

fn dropping_tables(listing: &str) -> Vec<String> {
    let mut table = "";
    let mut found = Vec::new();
    for line in listing.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("table ") {
            table = name.trim_end_matches(" {");
        }
        let ours_too = matches!(table, "ip filter" | "ip6 filter");
        if !ours_too && line.contains("hook forward") && line.contains("policy drop") {
            found.push(table.to_owned());
        }
    }
    found
}

fn forward_drops(saved: &SavedTables) -> bool {
    saved.chain("filter", "FORWARD").is_some_and(|chain| chain.policy.as_deref() == Some("DROP"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_that_drops_is_found_and_iptables_own_is_not() {
        let listing = "table ip filter {\n\tchain FORWARD {\n\t\ttype filter hook forward priority filter; policy drop;\n\t}\n}\n\
                       table inet firewalld {\n\tchain f {\n\t\ttype filter hook forward priority filter + 10; policy drop;\n\t}\n}\n\
                       table inet open {\n\tchain f {\n\t\ttype filter hook forward priority filter; policy accept;\n\t}\n}\n";
        assert_eq!(dropping_tables(listing), ["inet firewalld"]);
    }
}
