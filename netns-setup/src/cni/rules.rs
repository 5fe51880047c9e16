//! The nft table of this plugin: published ports are elements of maps, so that rules do not grow with them.
//!
//! Containers are on networks of other plugins, so what comes from where is told by addresses, not by a bridge.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write;

use ipnet::IpNet;

use super::attachment::AttachmentId;
use super::state::{Attachment, Node};
use crate::firewall::nft::{any_element, chain, on_element, write_set};
use crate::firewall::{Translation, tool, translated_host};
use crate::model::Via;

/// The table.
const TABLE: &str = "rproxy-portmap";

/// The elements of each set and map.
type Elements = BTreeMap<String, BTreeSet<String>>;

/// An address family.
#[derive(Clone, Copy)]
struct Family {
    /// `ip` or `ip6`, as in `ip daddr`.
    ip: &'static str,
    /// The suffix of names.
    digit: char,
    /// The data type of an address.
    address: &'static str,
    loopback: &'static str,
}

const FAMILIES: [Family; 2] = [
    Family { ip: "ip", digit: '4', address: "ipv4_addr", loopback: "127.0.0.0/8" },
    Family { ip: "ip6", digit: '6', address: "ipv6_addr", loopback: "::1" },
];

/// The interfaces by which loopback addresses are routed to containers.
const LOCALNET: &str = "localnet";

/// Makes the rules those of `after`. `before` is what they are now; `None` if that is not known.
///
/// # Errors
/// If `nft` is missing or fails.
pub(super) fn change(before: Option<&Node>, after: &Node) -> Result<(), tool::ToolError> {
    let after = after.effective();
    let is_empty = after.attachments.iter().all(has_no_elements);
    match before {
        Some(before) => {
            let (there, wanted) = differing(&before.effective(), &after);
            let script = difference(&there, &wanted);
            // If somebody has changed the table, elements are missing, or there already: then the whole is loaded.
            let is_done = if script.is_empty() {
                is_empty || is_there()?
            } else {
                !is_empty && succeeds(load(&script))?
            };
            if is_done {
                return Ok(());
            }
        }
        // Where nft is missing, or does not work, there is no table either.
        None if is_empty && !is_there()? => return Ok(()),
        None => {}
    }
    load(&replacement(&elements(&after)))
}

/// Whether the table is there.
fn is_there() -> Result<bool, tool::ToolError> {
    succeeds(tool::run("nft", &["list", "chain", "inet", TABLE, RAW], "").map(drop))
}

/// Whether a program has done what it was to. One that hangs is not tried once more by other means.
fn succeeds(result: Result<(), tool::ToolError>) -> Result<bool, tool::ToolError> {
    match result {
        Err(error @ tool::ToolError::Hung { .. }) => Err(error),
        other => Ok(other.is_ok()),
    }
}

fn load(script: &str) -> Result<(), tool::ToolError> {
    tool::run("nft", &["-f", "-"], script).map(drop)
}

/// What the rules lack of those for `node`, for people.
///
/// # Errors
/// If `nft` is missing or fails.
pub(super) fn missing(node: &Node, attachment: &Attachment) -> Result<Vec<String>, tool::ToolError> {
    let node = node.effective();
    let own = elements(&node.without(|other| other.id != attachment.id));
    if own.values().all(BTreeSet::is_empty) {
        return Ok(Vec::new());
    }
    let there = match tool::run("nft", &["-s", "list", "table", "inet", TABLE], "") {
        Ok(listing) => listed(&listing),
        Err(tool::ToolError::Failed { message, .. }) if message.contains("No such file or directory") => {
            return Ok(vec![format!("the nft table inet {TABLE} is missing")]);
        }
        Err(error) => return Err(error),
    };
    // The networks of several containers may be one interval.
    let intervals = elements(&node).into_iter().filter(|(name, _)| is_of_intervals(name));
    let singles = own.into_iter().filter(|(name, _)| !is_of_intervals(name));
    let mut missing = Vec::new();
    for (name, set) in intervals.chain(singles) {
        let lacks =
            set.iter().filter(|element| !there.get(&name).is_some_and(|there| there.contains(*element)));
        missing.extend(lacks.map(|element| format!("{name} of the nft table inet {TABLE} lacks {element}")));
    }
    let chains = chains();
    let differing =
        chains.iter().filter(|(name, _, rules)| there.get(*name).map_or(0, BTreeSet::len) != rules.len());
    missing.extend(
        differing.map(|(name, ..)| format!("the chain {name} of the nft table inet {TABLE} has other rules")),
    );
    Ok(missing)
}

/// The elements of the sets, and the rules of the chains, in a listing.
fn listed(listing: &str) -> Elements {
    let normalised = crate::firewall::nft::normalise(listing);
    let mut found = Elements::new();
    let (mut name, mut is_chain) = (String::new(), false);
    for line in normalised.lines().map(str::trim) {
        let block = line.strip_suffix(" {").and_then(|line| line.split_once(' '));
        let elements = line.strip_prefix("elements = { ").and_then(|rest| rest.strip_suffix(" }"));
        if let Some((kind, block)) = block {
            block.clone_into(&mut name);
            is_chain = kind == "chain";
        } else if let Some(elements) = elements {
            found.entry(name.clone()).or_default().extend(elements.split(", ").map(str::to_owned));
        } else if is_chain && !line.is_empty() && !line.starts_with("type ") && line != "}" {
            found.entry(name.clone()).or_default().insert(line.to_owned());
        }
    }
    found
}

/// Whether the kernel may list the elements of a set differently.
fn is_of_intervals(name: &str) -> bool {
    name.starts_with("local") && name != LOCALNET
}

/// The translations of an attachment, for both families.
fn translations(attachment: &Attachment) -> impl Iterator<Item = Translation> {
    let direct = attachment.via == Via::Dnat;
    let ports = attachment.ports.iter().filter(|_| attachment.via.has_dnat());
    ports.filter_map(move |port| {
        let host = translated_host(port.key.host, port.to.ip().is_ipv6(), direct)?;
        Some(Translation {
            proto: port.key.proto,
            host,
            host_port: port.key.port,
            container: port.to.ip(),
            container_port: port.to.port(),
            direct,
        })
    })
}

fn has_no_elements(attachment: &Attachment) -> bool {
    attachment.localnet.is_none() && translations(attachment).next().is_none()
}

/// The elements of all sets, also of empty ones.
fn elements(node: &Node) -> Elements {
    let mut elements = of_ports(&node.attachments.iter().collect::<Vec<_>>());
    elements.extend(of_networks(node));
    elements
}

/// The elements of two nodes in which they may differ: what attachments have that are in both is not written.
fn differing(one: &Node, other: &Node) -> (Elements, Elements) {
    fn by_id(node: &Node) -> HashMap<&AttachmentId, &Attachment> {
        node.attachments.iter().map(|attachment| (&attachment.id, attachment)).collect()
    }
    let (of_one, of_other) = (by_id(one), by_id(other));
    let is_common = |attachment: &&Attachment| of_one.get(&attachment.id) == of_other.get(&attachment.id);
    let all = || one.attachments.iter().chain(&other.attachments);
    let changed = all().filter(|attachment| !is_common(attachment));
    // Those with the same address may have the same elements.
    let addresses: BTreeSet<_> =
        changed.flat_map(|attachment| &attachment.ports).map(|port| port.to.ip()).collect();
    let is_written = |attachment: &&Attachment| {
        !is_common(attachment) || attachment.ports.iter().any(|port| addresses.contains(&port.to.ip()))
    };
    let written = |node: &Node| {
        let mut elements = of_ports(&node.attachments.iter().filter(is_written).collect::<Vec<_>>());
        elements.extend(of_networks(node));
        elements
    };
    (written(one), written(other))
}

/// The elements of ports; also empty sets.
fn of_ports(attachments: &[&Attachment]) -> Elements {
    let names = FAMILIES.iter().flat_map(|family| sets(*family)).map(|(_, name, _, _)| name);
    let mut elements: Elements = names.map(|name| (name, BTreeSet::new())).collect();
    let mut add = |name: String, element: String| elements.entry(name).or_default().extend([element]);
    for attachment in attachments {
        for to in translations(attachment) {
            let digit = if to.container.is_ipv4() { '4' } else { '6' };
            let map = if to.direct { "direct" } else { "published" };
            match to.host {
                None => add(format!("{map}{digit}"), any_element(&to)),
                Some(host) => add(format!("{map}{digit}-on"), on_element(host, &to)),
            }
            if to.direct {
                add(
                    format!("open{digit}"),
                    format!("{} . {} . {}", to.container, to.proto, to.container_port),
                );
                add(format!("own{digit}"), format!("{} . {} . {}", to.container, to.proto, to.host_port));
            }
        }
    }
    elements
}

/// The elements of networks and interfaces, which many attachments share.
fn of_networks(node: &Node) -> Elements {
    let mut elements = Elements::new();
    let mut add = |name: String, element: String| elements.entry(name).or_default().extend([element]);
    let mut local: BTreeSet<IpNet> = BTreeSet::new();
    for attachment in &node.attachments {
        let families: BTreeSet<_> = translations(attachment).map(|to| to.container.is_ipv4()).collect();
        local.extend(attachment.subnets.iter().filter(|subnet| families.contains(&subnet.addr().is_ipv4())));
        if let Some(interface) = &attachment.localnet {
            add(LOCALNET.to_owned(), format!("\"{interface}\""));
        }
    }
    // Intervals must not overlap.
    for subnet in IpNet::aggregate(&local.into_iter().collect::<Vec<_>>()) {
        let digit = if subnet.addr().is_ipv4() { '4' } else { '6' };
        add(format!("local{digit}"), whole_network(subnet));
    }
    elements
}

/// As nft lists it: one address has no prefix.
fn whole_network(subnet: IpNet) -> String {
    let subnet = subnet.trunc();
    if subnet.prefix_len() == subnet.max_prefix_len() {
        subnet.addr().to_string()
    } else {
        subnet.to_string()
    }
}

/// The sets and maps of a family: the kind, the name, the type, and further properties.
fn sets(family: Family) -> Vec<(&'static str, String, String, &'static str)> {
    let Family { digit, address, .. } = family;
    let target = format!("inet_proto . inet_service : {address} . inet_service");
    let mut sets = Vec::new();
    for map in ["published", "direct"] {
        sets.push(("map", format!("{map}{digit}"), target.clone(), ""));
        sets.push(("map", format!("{map}{digit}-on"), format!("{address} . {target}"), ""));
    }
    for set in ["open", "own"] {
        sets.push(("set", format!("{set}{digit}"), format!("{address} . inet_proto . inet_service"), ""));
    }
    sets.push(("set", format!("local{digit}"), address.to_owned(), "flags interval"));
    if digit == '4' {
        sets.push(("set", LOCALNET.to_owned(), "ifname".to_owned(), ""));
    }
    sets
}

/// The script that changes elements; deleted ones go first, as others may have the same keys.
fn difference(before: &Elements, after: &Elements) -> String {
    let (mut deleted, mut added) = (String::new(), String::new());
    for (name, wanted) in after {
        let none = BTreeSet::new();
        let there = before.get(name).unwrap_or(&none);
        for (text, verb, differing) in [
            (&mut deleted, "delete", there.difference(wanted)),
            (&mut added, "add", wanted.difference(there)),
        ] {
            let differing: Vec<_> = differing.map(String::as_str).collect();
            if !differing.is_empty() {
                let differing = differing.join(", ");
                text.write_fmt(format_args!("{verb} element inet {TABLE} {name} {{ {differing} }}\n"))
                    .unwrap_or_default();
            }
        }
    }
    deleted + &added
}

/// The script that replaces the whole table, or deletes it if nothing is published.
fn replacement(wanted: &Elements) -> String {
    let body = if wanted.values().all(BTreeSet::is_empty) { String::new() } else { table(wanted) };
    crate::firewall::nft::replace(TABLE, Some(&body))
}

fn table(wanted: &Elements) -> String {
    let mut text = format!("table inet {TABLE} {{\n");
    for (kind, name, key, properties) in FAMILIES.iter().flat_map(|family| sets(*family)) {
        let elements = wanted.get(&name).into_iter().flatten().cloned().collect();
        let key = if properties.is_empty() { key } else { format!("{key}\n\t\t{properties}") };
        write_set(&mut text, kind, &name, &key, elements);
    }
    for (name, hook, rules) in chains() {
        text.push_str(&chain(name, hook, &rules));
    }
    text.push_str("}\n");
    text
}

const RAW: &str = "raw-prerouting";

/// The chains: the name, the hook, and the rules, of which no two are alike.
fn chains() -> [(&'static str, Option<&'static str>, Vec<String>); 6] {
    [
        ("published", None, translate("published")),
        ("direct", None, translate("direct")),
        (RAW, Some("type filter hook prerouting priority raw; policy accept;"), raw()),
        ("nat-prerouting", Some("type nat hook prerouting priority dstnat; policy accept;"), prerouting()),
        // nft 1.0.6 accepts the name `dstnat` in prerouting only; -100 is its value.
        ("nat-output", Some("type nat hook output priority -100; policy accept;"), output()),
        ("nat-postrouting", Some("type nat hook postrouting priority srcnat; policy accept;"), postrouting()),
    ]
}

/// Translates by the maps of that name.
fn translate(map: &str) -> Vec<String> {
    let rules = FAMILIES.iter().flat_map(|Family { ip, digit, .. }| {
        [
            format!("dnat {ip} to {ip} daddr . meta l4proto . th dport map @{map}{digit}-on"),
            format!("dnat {ip} to meta l4proto . th dport map @{map}{digit}"),
        ]
    });
    rules.collect()
}

/// Where loopback addresses are routed, other hosts must not reach those of this one (CVE-2020-8558).
fn raw() -> Vec<String> {
    vec![format!("iifname @{LOCALNET} ip daddr 127.0.0.0/8 drop")]
}

/// What containers send to a port that the relay serves is left to it. So is what one sends to its own port: a bridge does
/// not send a packet back to where it came from.
fn prerouting() -> Vec<String> {
    let own = |Family { ip, digit, .. }: &Family| {
        format!("{ip} saddr . meta l4proto . th dport @own{digit} return")
    };
    let mut rules: Vec<_> = FAMILIES.iter().map(own).collect();
    rules.push("fib daddr type local jump direct".to_owned());
    rules.extend(FAMILIES.iter().map(|Family { ip, digit, .. }| {
        format!("{ip} saddr != @local{digit} fib daddr type local jump published")
    }));
    rules
}

/// From the host itself: loopback is served by the relay, unless the kernel has to.
fn output() -> Vec<String> {
    let rules = FAMILIES.iter().flat_map(|Family { ip, digit, loopback, .. }| {
        // In IPv6, packets for ::1 cannot leave the loopback interface.
        let direct =
            if *digit == '6' { format!("{ip} daddr != {loopback}") } else { "meta nfproto ipv4".to_owned() };
        [
            format!("{direct} fib daddr type local jump direct"),
            format!("{ip} daddr != {loopback} fib daddr type local jump published"),
        ]
    });
    rules.collect()
}

/// A container that reaches another one of its network through a host port must get the replies from the host.
fn postrouting() -> Vec<String> {
    let masquerade = |ip: &str, digit, source: &str| {
        format!(
            "{ip} saddr {source} ct status dnat {ip} daddr . meta l4proto . th dport @open{digit} masquerade"
        )
    };
    let mut rules: Vec<_> = FAMILIES
        .iter()
        .map(|Family { ip, digit, .. }| masquerade(ip, *digit, &format!("@local{digit}")))
        .collect();
    rules.push(masquerade("ip", '4', "127.0.0.0/8"));
    rules
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A node with one container, whose port of the host is `port`.
    fn node(via: &str, host: &str, port: u16) -> Node {
        let port = json!({ "proto": "tcp", "host": host, "port": port, "owner": "c1", "to": "10.1.0.2:80" });
        let attachment = json!({
            "network": "pods", "container": "c1", "interface": "eth0", "via": via, "ports": [port],
            "subnets": ["10.1.0.0/24", "fd00::/64"], "localnet": "cni0"
        });
        let id = "ab".repeat(32);
        let node =
            json!({ "version": 1, "netns": null, "id": id, "attachments": [attachment], "localnet": [] });
        serde_json::from_value(node).unwrap()
    }

    fn none(node: &Node) -> Node {
        node.without(|_| true)
    }

    #[test]
    fn a_port_is_an_element_of_a_few_sets() {
        let script = |via, host| {
            let node = node(via, host, 8080);
            difference(&elements(&none(&node)), &elements(&node))
                .replace("add element inet rproxy-portmap ", "")
        };
        assert_eq!(
            script("both", "*"),
            "local4 { 10.1.0.0/24 }\nlocalnet { \"cni0\" }\npublished4 { tcp . 8080 : 10.1.0.2 . 80 }\n"
        );
        assert_eq!(
            script("dnat", "10.9.0.1"),
            "direct4-on { 10.9.0.1 . tcp . 8080 : 10.1.0.2 . 80 }\nlocal4 { 10.1.0.0/24 }\nlocalnet { \"cni0\" }\n\
             open4 { 10.1.0.2 . tcp . 80 }\nown4 { 10.1.0.2 . tcp . 8080 }\n"
        );
        // The relay leads IPv6 clients to IPv4 containers, and those of loopback addresses.
        for host in ["[::]", "127.0.0.1", "[fe80::1%eth0]"] {
            assert_eq!(script("both", host), "localnet { \"cni0\" }\n", "{host}");
        }
        assert!(!script("proxy", "*").contains("published"));
    }

    #[test]
    fn only_what_may_differ_is_written() {
        let one = node("dnat", "*", 8080);
        let with = |container: &str, ports: &[(u16, &str)]| {
            let mut node = one.clone();
            let mut other = node.attachments[0].clone();
            other.id.container = container.to_owned();
            let template = other.ports.remove(0);
            for (port, to) in ports {
                let mut port_of_other = template.clone();
                (port_of_other.key.port, port_of_other.to) = (*port, to.parse().unwrap());
                other.ports.push(port_of_other);
            }
            node.attachments.push(other);
            node
        };
        let elsewhere = with("c2", &[(9000, "10.1.0.3:80"), (9001, "10.1.0.3:80")]);
        let (there, wanted) = differing(&one, &elsewhere);
        assert!(there["published4"].is_empty() && there["direct4"].is_empty(), "{there:?}");
        assert_eq!((wanted["direct4"].len(), wanted["open4"].len()), (2, 1));
        // It has an element in common with the one that stays.
        let same = with("c2", &[(9000, "10.1.0.2:80")]);
        for (before, after) in
            [(&one, &elsewhere), (&elsewhere, &one), (&same, &one), (&one, &same), (&elsewhere, &same)]
        {
            let (there, wanted) = differing(before, after);
            assert_eq!(difference(&there, &wanted), difference(&elements(before), &elements(after)));
        }
        assert!(!difference(&differing(&same, &one).0, &differing(&same, &one).1).contains("open4"));
    }

    #[test]
    fn rules_do_not_grow_with_ports() {
        let rules = |port| table(&elements(&node("dnat", "*", port))).lines().count();
        assert_eq!(rules(80), rules(81));
        let gone = node("both", "*", 80);
        assert_eq!(replacement(&elements(&none(&gone))), crate::firewall::nft::replace(TABLE, Some("")));
    }

    #[test]
    fn networks_that_overlap_are_one_interval() {
        let mut node = node("both", "*", 80);
        let mut wider = node.attachments[0].clone();
        wider.id.container = "c2".to_owned();
        wider.subnets = vec!["10.1.0.0/16".parse().unwrap()];
        node.attachments.push(wider);
        let local: Vec<_> = elements(&node)["local4"].iter().cloned().collect();
        assert_eq!(local, ["10.1.0.0/16"]);
        assert_eq!(whole_network("10.1.0.2/32".parse().unwrap()), "10.1.0.2");
    }

    #[test]
    fn what_a_listing_lacks_is_seen() {
        let listing = "table inet rproxy-portmap {\n\tmap published4 {\n\t\ttype inet_proto . inet_service : ipv4_addr . \
                       inet_service\n\t\telements = { tcp . 80 : 10.1.0.2 . 80,\n\t\t\t     udp . 53 : 10.1.0.2 . 53 }\n\t}\n\
                       \tchain nat-output {\n\t\ttype nat hook output priority -100; policy accept;\n\t}\n\
                       \tchain nat-prerouting {\n\t\ttype nat hook prerouting priority dstnat; policy accept;\n\
                       \t\tfib daddr type local jump direct\n\t}\n}\n";
        let listed = listed(listing);
        assert!(listed["published4"].contains("udp . 53 : 10.1.0.2 . 53"));
        assert_eq!(listed["nat-prerouting"].len(), 1);
        assert!(!listed.contains_key("nat-output"));
    }
}
