//! Changes only what differs in an nft table.
//!
//! While a table is replaced, its base chains are registered anew, and a new connection may meet neither the old nor
//! the new ones. Elements of sets and rules of existing chains change with the generation of the ruleset, so every
//! packet meets either all of the old ones or all of the new ones.

use std::collections::{BTreeMap, BTreeSet};

use super::nft::normalise;

/// A table as `nft` lists it.
#[derive(Debug, Default)]
struct Table<'a> {
    sets: BTreeMap<&'a str, Set<'a>>,
    chains: BTreeMap<&'a str, Chain<'a>>,
    /// What is in it besides: flags, such as `dormant`, and parts of others.
    rest: Vec<&'a str>,
}

/// A set or map.
#[derive(Debug, Default)]
struct Set<'a> {
    declaration: Vec<&'a str>,
    elements: BTreeSet<&'a str>,
}

#[derive(Debug, Default)]
struct Chain<'a> {
    hook: Option<&'a str>,
    rules: Vec<&'a str>,
}

/// Whether two listings have the same content.
#[must_use]
pub fn is_same(one: &str, other: &str) -> bool {
    normalise(one) == normalise(other)
}

/// The script that changes the table from the listing `is` to the listing `wanted`, in one transaction; `None` if
/// they differ in more than elements and rules.
#[must_use]
pub fn change(table: &str, is: &str, wanted: &str) -> Option<String> {
    let (is, wanted) = (normalise(is), normalise(wanted));
    let (is, wanted) = (Table::parse(&is), Table::parse(&wanted));
    let has_same_sets = same_keys(&is.sets, &wanted.sets, |is, wanted| is.declaration == wanted.declaration);
    let has_same_chains = same_keys(&is.chains, &wanted.chains, |is, wanted| is.hook == wanted.hook);
    (has_same_sets && has_same_chains && is.rest == wanted.rest).then(|| {
        let rules = wanted.chains.iter().filter(|(name, chain)| is.chains[*name].rules != chain.rules);
        let rules: String = rules.map(|(name, chain)| chain.refill(table, name)).collect();
        elements(table, &is, &wanted) + &rules
    })
}

/// Like [`change`], for a table whose rules are known to be the wanted ones: `wanted` may be written differently.
#[must_use]
pub fn change_elements(table: &str, is: &str, wanted: &str) -> Option<String> {
    let (is, wanted) = (normalise(is), normalise(wanted));
    let (is, wanted) = (Table::parse(&is), Table::parse(&wanted));
    let is_same = is.rest == wanted.rest
        && same_keys(&is.sets, &wanted.sets, |_, _| true)
        && same_keys(&is.chains, &wanted.chains, |is, wanted| is.rules.len() == wanted.rules.len());
    is_same.then(|| elements(table, &is, &wanted))
}

fn same_keys<T>(
    one: &BTreeMap<&str, T>,
    other: &BTreeMap<&str, T>,
    is_same: impl Fn(&T, &T) -> bool,
) -> bool {
    one.len() == other.len()
        && one.iter().all(|(name, one)| other.get(name).is_some_and(|other| is_same(one, other)))
}

/// Deletes elements before it adds others, which may have the same keys.
fn elements(table: &str, is: &Table<'_>, wanted: &Table<'_>) -> String {
    let (mut deleted, mut added) = (String::new(), String::new());
    for (name, set) in &wanted.sets {
        let before = &is.sets[name].elements;
        for (text, verb, differing) in [
            (&mut deleted, "delete", before.difference(&set.elements)),
            (&mut added, "add", set.elements.difference(before)),
        ] {
            let differing: Vec<_> = differing.copied().collect();
            if !differing.is_empty() {
                let differing = differing.join(", ");
                text.push_str(&format!("{verb} element inet {table} {name} {{ {differing} }}\n"));
            }
        }
    }
    deleted + &added
}

impl Chain<'_> {
    fn refill(&self, table: &str, name: &str) -> String {
        let rules = self.rules.iter().map(|rule| format!("add rule inet {table} {name} {rule}\n"));
        format!("flush chain inet {table} {name}\n{}", rules.collect::<String>())
    }
}

impl<'a> Table<'a> {
    /// Parses a normalised listing.
    fn parse(text: &'a str) -> Self {
        let mut table = Self::default();
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        while let Some(line) = lines.next() {
            let block = line.strip_suffix(" {").and_then(|line| line.split_once(' '));
            let Some((kind, name)) = block.filter(|(kind, _)| ["chain", "set", "map"].contains(kind)) else {
                // Neither the head of the table, whose end is one of these, too.
                table.rest.extend(Some(line).filter(|line| *line != "}" && !line.starts_with("table ")));
                continue;
            };
            let inside = lines.by_ref().take_while(|line| *line != "}");
            if kind == "chain" {
                table.chains.insert(name, Chain::parse(inside));
            } else {
                table.sets.insert(name, Set::parse(kind, inside));
            }
        }
        table
    }
}

impl<'a> Chain<'a> {
    fn parse(lines: impl Iterator<Item = &'a str>) -> Self {
        let mut chain = Self::default();
        for line in lines {
            if line.starts_with("type ") {
                chain.hook = Some(line);
            } else {
                chain.rules.push(line);
            }
        }
        chain
    }
}

impl<'a> Set<'a> {
    fn parse(kind: &'a str, lines: impl Iterator<Item = &'a str>) -> Self {
        let mut set = Self { declaration: vec![kind], elements: BTreeSet::new() };
        for line in lines {
            match line.strip_prefix("elements = { ").and_then(|line| line.strip_suffix(" }")) {
                Some(elements) => set.elements.extend(elements.split(", ")),
                None => set.declaration.push(line),
            }
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall::nft::render;
    use crate::testdata;

    const TABLE: &str = "table inet t {\n\tmap m {\n\t\ttype inet_service : ipv4_addr\n\t\telements = { 1 : 10.0.0.1,\n\
                         \t\t\t     2 : 10.0.0.2 }\n\t}\n\n\tchain c {\n\t\ttype filter hook input priority 0;\n\t\tiif lo \
                         accept\n\t}\n}\n";

    #[test]
    fn only_elements_that_differ_change_and_old_ones_go_first() {
        let wanted = TABLE.replace("2 : 10.0.0.2", "2 : 10.0.0.3, 4 : 10.0.0.4");
        assert_eq!(
            change("t", TABLE, &wanted).unwrap(),
            "delete element inet t m { 2 : 10.0.0.2 }\nadd element inet t m { 2 : 10.0.0.3, 4 : 10.0.0.4 }\n"
        );
        assert_eq!(change_elements("t", TABLE, &wanted), change("t", TABLE, &wanted));
        assert_eq!(change("t", TABLE, TABLE).unwrap(), "");
    }

    #[test]
    fn a_chain_is_filled_again_in_the_same_script() {
        let wanted = TABLE.replace("iif lo accept", "iif lo drop\n\t\taccept");
        assert_eq!(
            change("t", TABLE, &wanted).unwrap(),
            "flush chain inet t c\nadd rule inet t c iif lo drop\nadd rule inet t c accept\n"
        );
        assert_eq!(change_elements("t", TABLE, &wanted), None, "there is another rule");
    }

    #[test]
    fn a_table_with_something_else_in_it_is_not_changed() {
        for more in ["flags dormant", "comment \"x\"", "flowtable f {\n\t\thook ingress priority filter\n\t}"]
        {
            let other = TABLE.replacen("{\n", &format!("{{\n\t{more}\n\n"), 1);
            assert_eq!(change("t", &other, TABLE), None, "{more}");
            assert_eq!(change_elements("t", &other, TABLE), None, "{more}");
            assert!(!is_same(&other, TABLE), "{more}");
        }
    }

    #[test]
    fn what_is_more_than_elements_and_rules_is_not_changed() {
        for (part, other) in [
            ("hook input", "hook output"),
            ("type inet_service", "type mark"),
            ("map m", "map n"),
            ("map m", "set m"),
        ] {
            assert_eq!(change("t", TABLE, &TABLE.replace(part, other)), None, "{other}");
        }
        assert_eq!(change("t", "", TABLE), None);
    }

    #[test]
    fn a_port_is_an_element_in_each_map_and_nothing_else() {
        let (few, many) = (testdata::with_ports(1), testdata::with_ports(3));
        let (few, many) = (render(&few).unwrap(), render(&many).unwrap());
        let script = change("t", &few, &many).unwrap();
        assert_eq!(
            script,
            "add element inet t direct4 { tcp . 1001 : 172.17.0.2 . 80, tcp . 1002 : 172.17.0.2 . 80 }\n"
        );
        assert_eq!(change("t", &many, &few).unwrap(), script.replace("add", "delete"));
    }
}
