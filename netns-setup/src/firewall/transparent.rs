//! The rules that mark replies to transparent sockets.

use std::io;

use super::iptables::{BuiltinRule, Ruleset};
use super::tool::{self, ToolError};
use super::{iptables, nft};
use crate::family::{Family, Variant};
use crate::model::{Firewall, Topology, Transparent};
use crate::netns;
use crate::transparent::MARK;

/// The table of the nft backend. Those of networks start with `netns-setup-`.
pub const TABLE_NAME: &str = "netns-setup_transparent";

/// A rule in a chain that no packet enters. Its presence has the kernel reassemble what arrives in fragments before
/// prerouting (`nft_tproxy_init`, net/netfilter/nft_tproxy.c), as iptables' `-m socket` does and `socket` of nft does not: only
/// the first fragment of a datagram has the ports by which its socket is found.
const DEFRAGMENT: [&str; 1] = ["meta l4proto udp tproxy to :1"];

/// The nft table that `topology` needs.
#[must_use]
pub fn nft(topology: &Topology) -> Option<String> {
    topology.transparent.as_ref().filter(|parts| parts.firewall == Firewall::Nft).map(table)
}

fn table(parts: &Transparent) -> String {
    let mut rules = Vec::new();
    for iif in &parts.interfaces {
        // A listener bound to every address would otherwise take connections that this host only forwards. A
        // socket in TIME-WAIT has no such property: the first rule does not apply to it, the second one does.
        rules.push(format!("iifname \"{iif}\" socket wildcard 1 return"));
        rules.push(format!("iifname \"{iif}\" socket transparent 1 meta mark set meta mark or {MARK:#x}"));
    }
    let hook = "type filter hook prerouting priority mangle; policy accept;";
    let prerouting = nft::chain("prerouting", Some(hook), &rules);
    format!(
        "table inet {TABLE_NAME} {{\n{prerouting}{}}}\n",
        nft::chain("defragment", None, &DEFRAGMENT.map(str::to_owned))
    )
}

/// The rules of iptables that `topology` needs, for one address family.
#[must_use]
pub fn iptables(topology: &Topology, family: Family) -> Ruleset {
    let parts = topology.transparent.as_ref();
    let parts = parts.filter(|parts| parts.firewall == Firewall::Iptables);
    let rules = parts.into_iter().flat_map(Transparent::rules).filter(|(of, _)| *of == family);
    // Without --nowildcard, listeners bound to every address do not match (iptables-extensions(8)).
    let rules = rules.map(|(_, iif)| BuiltinRule {
        chain: "PREROUTING",
        // A rule that accepts would hide those after it.
        first: true,
        is_unmistakable: true,
        rule: format!("-i {iif} -m socket --transparent -j MARK --set-xmark {MARK:#x}/{MARK:#x}"),
    });
    Ruleset::of_builtin("mangle", rules.collect())
}

/// Why the rules cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// No temporary namespace.
    #[error("cannot create a network namespace to try the rules in: {0}")]
    Scratch(#[source] io::Error),
    /// The tool or the kernel lacks something.
    #[error("{0}: transparent sockets need {1}")]
    Lacking(#[source] ToolError, &'static str),
    /// The tool is missing.
    #[error(transparent)]
    Tool(#[from] ToolError),
}

/// Loads the rules into a temporary namespace, to find out whether this host can.
///
/// # Errors
/// If it cannot; the error names what is missing.
pub fn probe(parts: &Transparent) -> Result<(), ProbeError> {
    let topology = Topology { transparent: Some(parts.clone()), ..Topology::default() };
    netns::scratch(|| load(&topology, parts)).map_err(ProbeError::Scratch)?
}

fn load(topology: &Topology, parts: &Transparent) -> Result<(), ProbeError> {
    if let Some(table) = nft(topology) {
        const NEEDED: &str = "nft 0.9.7 and Linux 5.10 or later, and its options CONFIG_NFT_SOCKET and CONFIG_NFT_TPROXY (modules nft_socket and nft_tproxy)";
        attempt(tool::run("nft", &["-f", "-"], &table), NEEDED)?;
    }
    if parts.firewall == Firewall::Iptables {
        for family in parts.families() {
            const NEEDED: &str = "CONFIG_NETFILTER_XT_MATCH_SOCKET of the kernel (module xt_socket)";
            let none = (iptables::SavedTables::default(), Ruleset::default());
            let rules = iptables(topology, family);
            let script = iptables::transition(&none.0, &none.1, &rules).map(|change| change.script);
            let script = script.unwrap_or_default();
            attempt(tool::run(family.restore(Variant::Chosen), &["--noflush", "-w", "5"], &script), NEEDED)?;
        }
    }
    Ok(())
}

fn attempt(result: Result<String, ToolError>, needed: &'static str) -> Result<(), ProbeError> {
    match result {
        Ok(_) => Ok(()),
        Err(error @ ToolError::Failed { .. }) => Err(ProbeError::Lacking(error, needed)),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testdata;

    #[test]
    fn the_rules_are_the_golden_ones() {
        testdata::golden("transparent.nft", &nft(&testdata::transparent(Firewall::Nft)).unwrap());
        let topology = testdata::transparent(Firewall::Iptables);
        assert_eq!(nft(&topology), None);
        for (family, file) in [(Family::V4, "transparent.iptables"), (Family::V6, "transparent.ip6tables")] {
            let rules = iptables(&topology, family);
            let none = iptables::SavedTables::default();
            let change = iptables::transition(&none, &Ruleset::default(), &rules).unwrap();
            testdata::golden(file, &change.script);
        }
    }

    #[test]
    fn only_ipv4_gets_rules_without_ipv6() {
        let mut topology = testdata::transparent(Firewall::Iptables);
        topology.transparent.as_mut().unwrap().ipv6 = false;
        assert_eq!(iptables(&topology, Family::V6), Ruleset::of_builtin("mangle", vec![]));
        assert_ne!(iptables(&topology, Family::V4), Ruleset::of_builtin("mangle", vec![]));
    }
}
