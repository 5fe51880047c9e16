//! Finds chains and rules of others that drop what this program accepts: a packet has to pass all base chains of its
//! hook, whoever has made them.

use std::collections::{BTreeMap, BTreeSet};

use super::iptables::SavedTables;
use super::nft::normalise;
use crate::family::Family;

/// The jump by which rules of this program precede those of others in the same chain of iptables.
const OUR_JUMP: &str = "DOCKER-FORWARD";

/// What is looked for in the rules of others.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// The bridge.
    pub bridge: String,
    /// The subnets.
    pub subnets: Vec<String>,
    /// The address families.
    pub families: Vec<Family>,
    /// Whether packets to this host matter, because there are relays.
    pub has_relays: bool,
}

/// A table, or the two tables of iptables.
#[derive(Debug, Default)]
struct Table {
    /// As a user would name it.
    name: String,
    chains: BTreeMap<String, Chain>,
}

#[derive(Debug, Default)]
struct Chain {
    hook: Option<Hook>,
    drops: bool,
    rules: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Hook {
    Forward,
    Input,
}

/// Describes what drops packets according to `nft list ruleset`.
#[must_use]
pub fn in_nft(ruleset: &str, wanted: &Wanted) -> Vec<String> {
    let tables = nft_tables(&normalise(ruleset), wanted);
    tables.iter().flat_map(|table| table.findings(wanted)).collect()
}

/// Describes what drops packets according to `iptables-save`; `tool` is the name of its program.
#[must_use]
pub fn in_iptables(tool: &str, saved: &SavedTables, wanted: &Wanted) -> Vec<String> {
    let chain = |(name, saved): (&String, &super::iptables::SavedChain)| {
        let hook = match name.as_str() {
            "FORWARD" => Some(Hook::Forward),
            "INPUT" => Some(Hook::Input),
            _ => None,
        };
        let drops = saved.policy.as_deref() == Some("DROP");
        (name.clone(), Chain { hook, drops, rules: saved.rules.clone() })
    };
    let tables = ["filter", "mangle", "security"].into_iter().filter_map(|name| {
        let chains = saved.chains_of(name)?.iter().map(chain).collect();
        Some(Table { name: format!("{tool}'s table {name}"), chains })
    });
    tables.flat_map(|table| table.findings(wanted)).collect()
}

/// The tables of the families that the network has, without those of this program.
fn nft_tables(ruleset: &str, wanted: &Wanted) -> Vec<Table> {
    let (mut tables, mut chain) = (Vec::<Table>::new(), None);
    for line in ruleset.lines() {
        if let Some(name) = line.strip_prefix("table ").and_then(|line| line.strip_suffix(" {")) {
            tables.push(Table { name: format!("the nft table {name}"), ..Table::default() });
        }
        let Some(table) = tables.last_mut() else { continue };
        let line = line.trim();
        if let Some(name) = line.strip_prefix("chain ").and_then(|line| line.strip_suffix(" {")) {
            chain = Some(name.to_owned());
            table.chains.insert(name.to_owned(), Chain::default());
        } else if line == "}" {
            chain = None;
        } else if let Some(chain) = chain.as_ref().and_then(|name| table.chains.get_mut(name)) {
            chain.read_nft(line);
        }
    }
    let families = wanted.families.iter().map(|family| if *family == Family::V4 { "ip" } else { "ip6" });
    let families: Vec<_> = families.chain(["inet"]).collect();
    tables.retain(|table| {
        let mut words = table.name.split(' ').skip(3);
        let (family, name) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        families.contains(&family) && !name.starts_with("netns-setup")
    });
    tables
}

impl Chain {
    fn read_nft(&mut self, line: &str) {
        if line.starts_with("type ") {
            let has = |hook: &str| line.contains(&format!(" hook {hook} "));
            self.hook = match (has("forward"), has("input")) {
                (true, _) => Some(Hook::Forward),
                (_, true) => Some(Hook::Input),
                _ => None,
            };
            self.drops = line.contains("policy drop");
        } else {
            self.rules.push(line.to_owned());
        }
    }
}

impl Table {
    fn findings(&self, wanted: &Wanted) -> Vec<String> {
        let bases = self.chains.iter().filter(|(_, chain)| match chain.hook {
            Some(Hook::Forward) => true,
            Some(Hook::Input) => wanted.has_relays,
            None => false,
        });
        bases.filter_map(|(name, base)| self.finding(name, base, wanted)).collect()
    }

    fn finding(&self, name: &str, base: &Chain, wanted: &Wanted) -> Option<String> {
        let rules = self.reachable(base);
        let mentions = |rule: &&&String| {
            has_word(rule, &wanted.bridge) || wanted.subnets.iter().any(|subnet| has_word(rule, subnet))
        };
        let refusing = rules.iter().filter(mentions).find(|rule| refuses(rule));
        let accepts = rules.iter().any(|rule| !refuses(rule) && has_word(rule, &wanted.bridge));
        let ours = base.hook == Some(Hook::Forward) && rules.iter().any(|rule| rule.contains(OUR_JUMP));
        if ours {
            return None;
        }
        let what = match (refusing, base.rules.iter().find(|rule| is_for_all(rule))) {
            (Some(rule), _) => format!("rule `{rule}`"),
            _ if accepts => return None,
            (None, Some(rule)) if refuses(rule) => format!("rule `{rule}`"),
            (None, None) if base.drops => "policy".to_owned(),
            _ => return None,
        };
        let bridge = &wanted.bridge;
        Some(match base.hook {
            Some(Hook::Input) => format!(
                "the chain {name} of {} drops packets to this host by its {what}, also those to published ports: accept these ports there",
                self.name
            ),
            _ => format!(
                "the chain {name} of {} drops forwarded packets by its {what}, also what netns-setup accepts: accept packets from and to {bridge} there",
                self.name
            ),
        })
    }

    /// The rules of a chain, and of those that they lead to.
    fn reachable<'a>(&'a self, base: &'a Chain) -> Vec<&'a String> {
        let (mut seen, mut rules, mut next) = (BTreeSet::new(), Vec::new(), vec![base]);
        while let Some(chain) = next.pop() {
            rules.extend(&chain.rules);
            for rule in &chain.rules {
                let targets = words(rule).filter_map(|word| self.chains.get_key_value(word));
                next.extend(targets.filter(|(name, _)| seen.insert(*name)).map(|(_, chain)| chain));
            }
        }
        rules
    }
}

fn words(rule: &str) -> impl Iterator<Item = &str> {
    rule.split([' ', ',']).map(|word| word.trim_matches('"')).filter(|word| !word.is_empty())
}

fn has_word(rule: &str, wanted: &str) -> bool {
    words(rule).any(|word| word == wanted)
}

/// Whether a rule ends in a verdict to drop.
fn refuses(rule: &str) -> bool {
    has_word(rule, "drop") || has_word(rule, "reject") || has_word(rule, "DROP") || has_word(rule, "REJECT")
}

/// Whether a rule has a final verdict and no condition.
fn is_for_all(rule: &str) -> bool {
    let mut rest = words(rule).skip_while(|word| {
        ["counter", "packets", "bytes", "-j", "xt", "target"].contains(word)
            || word.bytes().all(|byte| byte.is_ascii_digit())
    });
    let verdict = rest.next().unwrap_or_default();
    ["accept", "drop", "reject", "ACCEPT", "DROP", "REJECT"].contains(&verdict)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted() -> Wanted {
        Wanted {
            bridge: "docker0".to_owned(),
            subnets: vec!["172.17.0.0/16".to_owned()],
            families: vec![Family::V4],
            has_relays: true,
        }
    }

    fn table(family: &str, chains: &[(&str, &str, &[&str])]) -> String {
        let chains = chains.iter().map(|(name, hook, rules)| {
            let lines: String = rules.iter().map(|rule| format!("\t\t{rule}\n")).collect();
            format!("\tchain {name} {{\n{hook}{lines}\t}}\n")
        });
        format!("table {family} fw {{\n{}}}\n", chains.collect::<String>())
    }

    const FORWARD: &str = "\t\ttype filter hook forward priority filter; policy accept;\n";
    const CLOSED: &str = "\t\ttype filter hook forward priority filter; policy drop;\n";
    const INPUT: &str = "\t\ttype filter hook input priority filter; policy drop;\n";

    #[track_caller]
    fn found(ruleset: &str, part: &str) {
        let found = in_nft(ruleset, &wanted());
        assert!(found.len() == 1 && found[0].contains(part), "{found:?}");
    }

    #[test]
    fn what_drops_in_a_table_of_nft_is_named() {
        found(
            &table("inet", &[("f", CLOSED, &[])]),
            "the chain f of the nft table inet fw drops forwarded packets by its policy",
        );
        found(&table("ip", &[("f", CLOSED, &["ct state established accept"])]), "by its policy");
        found(
            &table("ip", &[("f", FORWARD, &["counter packets 1 bytes 2 reject with icmp port-unreachable"])]),
            "by its rule `counter",
        );
        found(
            &table("inet", &[("f", FORWARD, &["iifname \"docker0\" drop"])]),
            "rule `iifname \"docker0\" drop`",
        );
        found(
            &table("inet", &[("f", FORWARD, &["jump g"]), ("g", "", &["ip daddr 172.17.0.0/16 drop"])]),
            "rule `ip daddr",
        );
        found(
            &table("inet", &[("i", INPUT, &[])]),
            "the chain i of the nft table inet fw drops packets to this host",
        );
    }

    #[test]
    fn what_lets_the_network_pass_is_not() {
        for ruleset in [
            table("inet", &[("f", FORWARD, &["ip saddr 192.0.2.0/24 drop"])]),
            table("inet", &[("f", FORWARD, &["accept", "drop"])]),
            table("inet", &[("f", CLOSED, &["jump g"]), ("g", "", &["iifname \"docker0\" accept"])]),
            table("ip6", &[("f", CLOSED, &[])]),
            table("bridge", &[("f", CLOSED, &[])]),
            table("ip", &[("FORWARD", CLOSED, &["counter packets 0 bytes 0 jump DOCKER-FORWARD"])]),
            table("inet", &[("f", CLOSED, &[])]).replace("inet fw", "inet netns-setup-docker0"),
        ] {
            assert_eq!(in_nft(&ruleset, &wanted()), Vec::<String>::new(), "{ruleset}");
        }
        let without_relays = Wanted { has_relays: false, ..wanted() };
        assert!(in_nft(&table("inet", &[("i", INPUT, &[])]), &without_relays).is_empty());
    }

    #[test]
    fn what_drops_in_iptables_is_named() {
        let find = |text: &str| in_iptables("iptables-legacy", &SavedTables::parse(text), &wanted());
        let policy = find("*filter\n:INPUT ACCEPT [0:0]\n:FORWARD DROP [0:0]\nCOMMIT\n");
        assert!(
            policy[0].contains(
                "the chain FORWARD of iptables-legacy's table filter drops forwarded packets by its policy"
            ),
            "{policy:?}"
        );
        let rule = find(
            "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -j REJECT --reject-with icmp-host-prohibited\nCOMMIT\n",
        );
        assert!(rule[0].contains("rule `-j REJECT"), "{rule:?}");
        for passes in ["-A FORWARD -i docker0 -j ACCEPT\n", "-A FORWARD -j DOCKER-FORWARD\n"] {
            assert!(find(&format!("*filter\n:FORWARD DROP [0:0]\n{passes}COMMIT\n")).is_empty(), "{passes}");
        }
    }
}
