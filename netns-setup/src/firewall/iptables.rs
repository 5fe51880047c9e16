//! The iptables backend, with the same rules and chains as Docker.
//!
//! Rules have the form in which `iptables-save` prints them, so that the existing ones can be compared with
//! the wanted ones. A change is one `iptables-restore --noflush`, which the kernel applies atomically per
//! table.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;

use super::{Translation, loopback_ports, translations};
use crate::addr::Cidr;
use crate::family::{Family, Variant};
use crate::model::{Network, Topology};

const PUBLISHED: &str = "DOCKER";
const DIRECT: &str = "DOCKER-DIRECT";
const FORWARD: &str = "DOCKER-FORWARD";

/// The tables with rules, in the order in which a script changes them: a container is closed before anything
/// is translated to it.
const TABLES: [&str; 4] = ["mangle", "raw", "filter", "nat"];

/// A chain as `iptables-save` lists it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SavedChain {
    /// The policy of a built-in chain.
    pub policy: Option<String>,
    /// The rules, without the leading `-A CHAIN`.
    pub rules: Vec<String>,
}

/// The output of `iptables-save`: chains by table and name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SavedTables {
    /// The program that listed them.
    pub variant: Variant,
    chains: BTreeMap<String, BTreeMap<String, SavedChain>>,
}

impl SavedTables {
    /// Parses the output of `iptables-save`.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut tables = Self::default();
        let mut table = String::new();
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('*') {
                name.clone_into(&mut table);
            } else if let Some(chain) = line.strip_prefix(':') {
                let mut words = chain.split_whitespace();
                let (Some(name), Some(policy)) = (words.next(), words.next()) else {
                    continue;
                };
                let policy = (policy != "-").then(|| policy.to_owned());
                tables.chain_mut(&table, name).policy = policy;
            } else if let Some((chain, rule)) = line.strip_prefix("-A ").and_then(|rule| rule.split_once(' '))
            {
                tables.chain_mut(&table, chain).rules.push(rule.to_owned());
            }
        }
        tables
    }

    /// Whether any of these rules is there.
    #[must_use]
    pub fn have_any_of(&self, rules: &Ruleset) -> bool {
        transition(self, rules, &Ruleset::default()).is_some()
    }

    /// One chain, if it exists.
    #[must_use]
    pub fn chain(&self, table: &str, chain: &str) -> Option<&SavedChain> {
        self.chains.get(table)?.get(chain)
    }

    /// The chains of a table, if it exists.
    #[must_use]
    pub fn chains_of(&self, table: &str) -> Option<&BTreeMap<String, SavedChain>> {
        self.chains.get(table)
    }

    fn chain_mut(&mut self, table: &str, chain: &str) -> &mut SavedChain {
        self.chains.entry(table.to_owned()).or_default().entry(chain.to_owned()).or_default()
    }
}

/// A rule in a built-in chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BuiltinRule {
    pub(super) chain: &'static str,
    /// Whether it must precede all other rules.
    pub(super) first: bool,
    /// Whether nobody else would write it: one that is there already is this program's, from before a lost state.
    pub(super) is_unmistakable: bool,
    pub(super) rule: String,
}

impl BuiltinRule {
    fn key(&self) -> (&str, &str) {
        (self.chain, &self.rule)
    }

    /// Which of equal rules at these positions this program has added.
    fn ours(&self, positions: &[usize]) -> Option<usize> {
        if self.first { positions.first() } else { positions.last() }.copied()
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct TableRules {
    chains: BTreeMap<&'static str, Vec<String>>,
    builtin: Vec<BuiltinRule>,
}

impl TableRules {
    fn append(&mut self, chain: &'static str, rule: String) {
        if !self.builtin.iter().any(|known| known.chain == chain && known.rule == rule) {
            self.builtin.push(BuiltinRule { chain, first: false, is_unmistakable: false, rule });
        }
    }
}

/// The rules of one address family.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ruleset(BTreeMap<&'static str, TableRules>);

impl Ruleset {
    /// Rules in the built-in chains of one table.
    pub(super) fn of_builtin(table: &'static str, builtin: Vec<BuiltinRule>) -> Self {
        Self(BTreeMap::from([(table, TableRules { builtin, ..TableRules::default() })]))
    }

    /// This program's chains, with their tables.
    pub fn chains(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        self.0.iter().flat_map(|(table, rules)| rules.chains.keys().map(move |chain| (*table, *chain)))
    }
}

/// The rules that `topology` needs; none without a network, or for IPv6 without an IPv6 subnet.
#[must_use]
pub fn render(topology: &Topology, family: Family) -> Ruleset {
    let Some(network) = &topology.network else {
        return Ruleset::default();
    };
    let (subnet, loopback) = match (family, network.subnet6) {
        (Family::V4, _) => (network.subnet.cidr(), "127.0.0.0/8"),
        (Family::V6, Some(subnet)) => (subnet.cidr(), "::1/128"),
        (Family::V6, None) => return Ruleset::default(),
    };
    let ports = translations(network, topology, family == Family::V6);
    Ruleset(BTreeMap::from([
        ("raw", raw(network, topology, family, &ports)),
        ("filter", filter(network, &ports)),
        ("nat", nat(network, subnet, loopback, &ports)),
    ]))
}

/// Precedes connection tracking: no packet may reach a container or a loopback port by direct routing.
fn raw(network: &Network, topology: &Topology, family: Family, ports: &[Translation]) -> TableRules {
    let bridge = &network.bridge;
    let mut table = TableRules::default();
    for endpoint in topology.endpoints.values() {
        let ip = match family {
            Family::V4 => Some(IpAddr::V4(endpoint.ip)),
            Family::V6 => endpoint.ip6(network).map(IpAddr::V6),
        };
        if let Some(ip) = ip {
            table.append("PREROUTING", format!("-d {} ! -i {bridge} -j DROP", host(ip)));
        }
    }
    if family == Family::V4 {
        for (ip, proto, port) in loopback_ports(topology) {
            let rule = format!("-d {} ! -i lo -p {proto} -m {proto} --dport {port} -j DROP", host(ip));
            table.append("PREROUTING", rule);
        }
        if ports.iter().any(|port| port.direct) {
            table.append("PREROUTING", format!("-d 127.0.0.0/8 -i {bridge} -j DROP"));
        }
    }
    table
}

fn filter(network: &Network, ports: &[Translation]) -> TableRules {
    let bridge = &network.bridge;
    let open: BTreeSet<_> =
        ports.iter().map(|port| (port.container, port.proto, port.container_port)).collect();
    let accept = open.into_iter().map(|(ip, proto, port)| {
        format!("-d {} ! -i {bridge} -o {bridge} -p {proto} -m {proto} --dport {port} -j ACCEPT", host(ip))
    });
    let drop = format!("! -i {bridge} -o {bridge} -j DROP");
    let forward = vec![
        format!("-o {bridge} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"),
        format!("-o {bridge} -j {PUBLISHED}"),
        format!("-i {bridge} -j ACCEPT"),
    ];
    TableRules {
        chains: BTreeMap::from([(PUBLISHED, accept.chain([drop]).collect()), (FORWARD, forward)]),
        // Precedes a firewall's own final DROP or REJECT, which would block published ports.
        builtin: vec![BuiltinRule {
            chain: "FORWARD",
            first: true,
            is_unmistakable: true,
            rule: format!("-j {FORWARD}"),
        }],
    }
}

fn nat(network: &Network, subnet: Cidr, loopback: &str, ports: &[Translation]) -> TableRules {
    let bridge = &network.bridge;
    let mut table = TableRules::default();
    let local = "-m addrtype --dst-type LOCAL -j";
    table.append("PREROUTING", format!("{local} {PUBLISHED}"));
    table.append("OUTPUT", format!("! -d {loopback} {local} {PUBLISHED}"));
    table.append("POSTROUTING", format!("-s {subnet} ! -o {bridge} -j MASQUERADE"));
    let (direct, published): (Vec<_>, Vec<_>) = ports.iter().partition(|port| port.direct);
    let returns = std::iter::once(format!("-i {bridge} -j RETURN"));
    let outside = format!("! -i {bridge} ");
    let published = returns.chain(published.into_iter().map(|port| dnat(port, &outside))).collect();
    table.chains.insert(PUBLISHED, published);
    if !direct.is_empty() {
        nat_direct(&mut table, network, subnet, loopback);
        table.chains.insert(DIRECT, direct.into_iter().map(|port| dnat(port, "")).collect());
    }
    // For a container that reaches itself through a host port.
    let mut seen = BTreeSet::new();
    for Translation { container, proto, container_port, .. } in ports {
        if seen.insert((container, proto, container_port)) {
            let ip = host(*container);
            let rule =
                format!("-s {ip} -d {ip} -p {proto} -m {proto} --dport {container_port} -j MASQUERADE");
            table.builtin.push(BuiltinRule {
                chain: "POSTROUTING",
                first: false,
                is_unmistakable: false,
                rule,
            });
        }
    }
    table
}

/// The rules for serving loopback and containers without a relay.
fn nat_direct(table: &mut TableRules, network: &Network, subnet: Cidr, loopback: &str) {
    let bridge = &network.bridge;
    let local = format!("-m addrtype --dst-type LOCAL -j {DIRECT}");
    table.append("PREROUTING", local.clone());
    if subnet.ip.is_ipv4() {
        table.append("OUTPUT", local);
        table.append("POSTROUTING", format!("-s {loopback} -o {bridge} -j MASQUERADE"));
    } else {
        table.append("OUTPUT", format!("! -d {loopback} {local}"));
    }
    table.append("POSTROUTING", format!("-s {subnet} -o {bridge} -m conntrack --ctstate DNAT -j MASQUERADE"));
}

fn dnat(port: &Translation, from: &str) -> String {
    let Translation { proto, host_port, container_port, .. } = port;
    let on = port.host.map_or_else(String::new, |ip| format!("-d {} ", host(ip)));
    let to = match port.container {
        IpAddr::V4(ip) => format!("{ip}:{container_port}"),
        IpAddr::V6(ip) => format!("[{ip}]:{container_port}"),
    };
    format!("{on}{from}-p {proto} -m {proto} --dport {host_port} -j DNAT --to-destination {to}")
}

fn host(ip: IpAddr) -> Cidr {
    Cidr { ip, prefix: if ip.is_ipv4() { 32 } else { 128 } }
}

/// The script that changes the existing rules to the wanted ones, and the script that reverts it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transition {
    /// The change.
    pub script: String,
    /// The reversal.
    pub undo: String,
}

/// Compares `saved` with `wanted`; returns the change, or `None` if nothing differs.
///
/// Only rules of `owned` and `wanted` are considered, and only this program's chains are emptied.
#[must_use]
pub fn transition(saved: &SavedTables, owned: &Ruleset, wanted: &Ruleset) -> Option<Transition> {
    let (mut script, mut undo) = (String::new(), String::new());
    for table in TABLES {
        let none = TableRules::default();
        let owned = owned.0.get(table).unwrap_or(&none);
        let wanted = wanted.0.get(table).unwrap_or(&none);
        let (there, back) = table_lines(table, saved, owned, wanted);
        for (text, lines) in [(&mut script, there), (&mut undo, back)] {
            if !lines.0.is_empty() {
                text.push_str(&format!("*{table}\n{}COMMIT\n", lines.render()));
            }
        }
    }
    (!script.is_empty()).then_some(Transition { script, undo })
}

/// The lines of one table, in the required order.
#[derive(Default)]
struct Lines(Vec<(Rank, String)>);

/// A chain is declared before the first rule that jumps to it, and deleted after the last one is removed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Declare,
    Delete,
    Restore,
    Fill,
    Flush,
    Remove,
}

impl Lines {
    fn push(&mut self, rank: Rank, line: String) {
        self.0.push((rank, line));
    }

    /// Replaces the content of one of this program's chains with `rules`, or deletes the chain.
    fn chain(&mut self, name: &str, rules: Option<&[String]>) {
        let Some(rules) = rules else {
            self.push(Rank::Flush, format!("-F {name}"));
            return self.push(Rank::Remove, format!("-X {name}"));
        };
        // With --noflush, declaring an existing chain empties it.
        self.push(Rank::Declare, format!(":{name} - [0:0]"));
        for rule in rules {
            self.push(Rank::Fill, format!("-A {name} {rule}"));
        }
    }

    fn add(&mut self, BuiltinRule { chain, first, rule, .. }: &BuiltinRule) {
        let verb = if *first { "-I" } else { "-A" };
        self.push(Rank::Fill, format!("{verb} {chain} {rule}"));
    }

    /// Deletes this program's copy of a rule, of which the user's own copies are at the positions `others` afterwards.
    /// The first one is deleted (iptables(8)), so those before this program's are deleted, too, and inserted again.
    fn retract(&mut self, BuiltinRule { chain, rule, first, .. }: &BuiltinRule, others: &[usize]) {
        let others = if *first { &[] } else { others };
        for _ in 0..=others.len() {
            self.push(Rank::Delete, format!("-D {chain} {rule}"));
        }
        for position in others {
            self.push(Rank::Restore, format!("-I {chain} {position} {rule}"));
        }
    }

    fn render(mut self) -> String {
        self.0.sort_by_key(|(rank, _)| *rank);
        self.0.into_iter().map(|(_, line)| line + "\n").collect()
    }
}

fn table_lines(table: &str, saved: &SavedTables, owned: &TableRules, wanted: &TableRules) -> (Lines, Lines) {
    let (mut there, mut back) = (Lines::default(), Lines::default());
    let names: BTreeSet<_> = owned.chains.keys().chain(wanted.chains.keys()).collect();
    for name in names {
        let is = saved.chain(table, name).map(|chain| chain.rules.as_slice());
        let shall_be = wanted.chains.get(name).map(Vec::as_slice);
        if is != shall_be {
            there.chain(name, shall_be);
            back.chain(name, is);
        }
    }
    builtin_lines(table, saved, owned, wanted, &mut there, &mut back);
    (there, back)
}

/// Where the rules of the built-in chains of a table are, counted from 1.
struct Positions<'a>(HashMap<&'static str, HashMap<&'a str, Vec<usize>>>);

impl<'a> Positions<'a> {
    fn of(table: &str, saved: &'a SavedTables) -> Self {
        let chains = ["PREROUTING", "FORWARD", "OUTPUT", "POSTROUTING"].map(|chain| {
            let mut positions: HashMap<&str, Vec<usize>> = HashMap::new();
            let rules = saved.chain(table, chain).into_iter().flat_map(|chain| &chain.rules);
            for (rule, position) in rules.zip(1..) {
                positions.entry(rule).or_default().push(position);
            }
            (chain, positions)
        });
        Self(chains.into())
    }

    fn at(&self, rule: &BuiltinRule) -> &[usize] {
        let positions = self.0.get(rule.chain).and_then(|chain| chain.get(rule.rule.as_str()));
        positions.map(Vec::as_slice).unwrap_or_default()
    }
}

fn builtin_lines(
    table: &str,
    saved: &SavedTables,
    owned: &TableRules,
    wanted: &TableRules,
    there: &mut Lines,
    back: &mut Lines,
) {
    let positions = Positions::of(table, saved);
    // Before this program's chains are there, so are none of its rules: equal ones are the user's.
    let has_ours =
        owned.chains.is_empty() || owned.chains.keys().any(|name| saved.chain(table, name).is_some());
    let known: HashSet<_> = owned.builtin.iter().filter(|_| has_ours).map(BuiltinRule::key).collect();
    let is_owned = |rule: &BuiltinRule| rule.is_unmistakable || known.contains(&rule.key());
    let kept: HashSet<_> = wanted.builtin.iter().map(BuiltinRule::key).collect();
    let gone: Vec<_> = owned.builtin.iter().filter(|rule| !kept.contains(&rule.key())).collect();
    let gone: Vec<_> = gone.into_iter().filter(|rule| has_ours && !positions.at(rule).is_empty()).collect();
    for rule in wanted.builtin.iter().filter(|rule| !is_owned(rule) || positions.at(rule).is_empty()) {
        there.add(rule);
        back.retract(rule, positions.at(rule));
    }
    let removed: BTreeMap<_, _> =
        gone.iter().filter_map(|rule| Some(((rule.chain, rule.ours(positions.at(rule))?), *rule))).collect();
    for rule in gone {
        let others =
            positions.at(rule).iter().filter(|position| Some(**position) != rule.ours(positions.at(rule)));
        let moved =
            |position: usize| position - removed.range((rule.chain, 0)..(rule.chain, position)).count();
        there.retract(rule, &others.map(|position| moved(*position)).collect::<Vec<_>>());
    }
    // In the order of their positions, so that each one is inserted after those before it.
    for ((chain, position), rule) in removed {
        back.push(Rank::Fill, format!("-I {chain} {position} {}", rule.rule));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testdata;

    fn fresh(topology: &Topology, family: Family) -> Transition {
        transition(&SavedTables::default(), &Ruleset::default(), &render(topology, family)).unwrap()
    }

    /// The output of `iptables-save` after a script that only adds rules.
    fn saved_after(script: &str) -> SavedTables {
        SavedTables::parse(&script.replace("-I FORWARD", "-A FORWARD"))
    }

    #[test]
    fn the_scripts_are_the_golden_ones() {
        testdata::golden("story.iptables", &fresh(&testdata::story(), Family::V4).script);
        testdata::golden("everything.iptables", &fresh(&testdata::everything(), Family::V4).script);
        testdata::golden("everything.ip6tables", &fresh(&testdata::everything(), Family::V6).script);
    }

    #[test]
    fn what_is_there_already_is_not_written_again() {
        for family in [Family::V4, Family::V6] {
            let wanted = render(&testdata::everything(), family);
            let saved = saved_after(&fresh(&testdata::everything(), family).script);
            assert_eq!(transition(&saved, &wanted, &wanted), None);
        }
    }

    #[test]
    fn taking_away_is_the_undoing_of_adding() {
        let wanted = render(&testdata::story(), Family::V4);
        let added = fresh(&testdata::story(), Family::V4);
        let saved = saved_after(&added.script);
        let removed = transition(&saved, &wanted, &Ruleset::default()).unwrap();
        assert_eq!(removed.script, added.undo);
        assert!(removed.script.contains("-D OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER"));
        assert!(removed.script.contains("-F DOCKER\n-X DOCKER") || removed.script.contains("-X DOCKER\n"));
    }

    #[test]
    fn rules_of_others_are_left_alone() {
        let theirs =
            "*filter\n:FORWARD DROP [0:0]\n:ufw - [0:0]\n-A FORWARD -j ufw\n-A ufw -j RETURN\nCOMMIT\n";
        let saved = SavedTables::parse(theirs);
        assert_eq!(saved.chain("filter", "FORWARD").unwrap().policy.as_deref(), Some("DROP"));
        let change =
            transition(&saved, &Ruleset::default(), &render(&testdata::story(), Family::V4)).unwrap();
        assert!(!change.script.contains("ufw") && !change.undo.contains("ufw"));
    }

    #[test]
    fn undoing_a_removal_restores_the_order() {
        let wanted = render(&testdata::story(), Family::V4);
        let theirs = "-A POSTROUTING -s 192.0.2.0/24 -j MASQUERADE\n";
        let script = fresh(&testdata::story(), Family::V4).script;
        let saved =
            saved_after(&script.replace(
                "-A POSTROUTING -s 172.17.0.2/32",
                &format!("{theirs}-A POSTROUTING -s 172.17.0.2/32"),
            ));
        let removed = transition(&saved, &wanted, &Ruleset::default()).unwrap();
        assert!(removed.undo.contains("-I POSTROUTING 1 -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE\n-I POSTROUTING 3 -s 172.17.0.2/32"), "{}", removed.undo);
    }

    #[test]
    fn an_equal_rule_of_the_user_stays_where_it_is() {
        let wanted = render(&testdata::story(), Family::V4);
        let masquerade = "POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE";
        let theirs = format!("*nat\n-A {masquerade}\n-A POSTROUTING -s 192.0.2.0/24 -j ACCEPT\nCOMMIT\n");
        let added = transition(&SavedTables::parse(&theirs), &Ruleset::default(), &wanted).unwrap();
        assert_eq!(added.script.matches(masquerade).count(), 1, "{}", added.script);
        let both = format!("-D {masquerade}\n-D {masquerade}\n");
        assert!(
            added.undo.contains(&both)
                && added.undo.contains(&format!("-I {}", masquerade.replace("-s", "1 -s")))
        );

        let saved = saved_after(&added.script.replace("*nat\n", &theirs.replace("COMMIT\n", "")));
        assert_eq!(transition(&saved, &wanted, &wanted), None);
        let removed = transition(&saved, &wanted, &Ruleset::default()).unwrap();
        let script = removed.script;
        assert!(script.contains(&both), "{script}");
        assert!(script.contains("-I POSTROUTING 1 -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE"), "{script}");
        assert!(removed.undo.contains("-I POSTROUTING 3 -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE"));
        // A change that was interrupted before it had come to this table.
        let before = transition(&SavedTables::parse(&theirs), &wanted, &Ruleset::default());
        assert!(!before.is_some_and(|change| change.script.contains("MASQUERADE")));
    }

    #[test]
    fn a_rule_that_somebody_removed_comes_back_alone() {
        let wanted = render(&testdata::story(), Family::V4);
        let script = fresh(&testdata::story(), Family::V4).script;
        let masquerade = "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE\n";
        let saved = saved_after(&script.replace(masquerade, ""));
        let change = transition(&saved, &wanted, &wanted).unwrap();
        assert_eq!(change.script, format!("*nat\n{masquerade}COMMIT\n"));
    }
}
