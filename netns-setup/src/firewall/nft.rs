//! The nftables backend: one separate table, loaded as one transaction.
//!
//! Published ports are map elements, so the number of rules that a packet traverses does not depend on the
//! number of ports. A change replaces only what differs (`nft_diff`), or else the whole table.

use std::fmt::Write;

use super::{Translation, loopback_ports, translations};
use crate::addr::Cidr;
use crate::model::{Network, Topology};

/// The table of a network, named after the bridge, so that networks have separate tables.
#[must_use]
pub fn table_name(network: &Network) -> String {
    format!("netns-setup-{}", network.bridge)
}

/// The script that replaces the table's content with `body`, or deletes the table if there is none.
#[must_use]
pub fn replace(table: &str, body: Option<&str>) -> String {
    // Adding it first makes the deletion succeed if there is no such table; it is all one transaction.
    let body = body.unwrap_or_default();
    format!("add table inet {table}\ndelete table inet {table}\n{body}")
}

/// The name of the table that a script changes.
#[must_use]
pub fn table_of(script: &str) -> &str {
    script.split_whitespace().skip_while(|word| *word != "inet").nth(1).unwrap_or_default()
}

/// The table that `topology` needs; `None` without a network.
#[must_use]
pub fn render(topology: &Topology) -> Option<String> {
    let network = topology.network.as_ref()?;
    let mut families = vec![Family::v4(network, topology)];
    families.extend(Family::v6(network, topology));
    let bridge = format!("\"{}\"", network.bridge);
    let mut text = format!("table inet {} {{\n", table_name(network));
    for family in &families {
        family.write_maps(&mut text);
    }
    for chain in [raw, forward, to_containers, nat_prerouting, nat_output] {
        text.push_str(&chain(&families, &bridge));
    }
    for (chain, map) in [("published", "published"), ("direct", "direct")] {
        text.push_str(&translate(&families, chain, map));
    }
    text.push_str(&postrouting(&families, &bridge));
    text.push_str("}\n");
    Some(text)
}

/// The differences between IPv4 and IPv6.
struct Family {
    /// `ip` or `ip6`, as in `ip daddr`.
    ip: &'static str,
    /// The suffix of map names.
    digit: char,
    /// The data type of an address.
    address: &'static str,
    loopback: &'static str,
    subnet: Cidr,
    gateway: std::net::IpAddr,
    translations: Vec<Translation>,
    /// Loopback addresses that a packet from outside could still have, which only IPv4 has.
    loopback_ports: Option<Vec<String>>,
}

impl Family {
    fn v4(network: &Network, topology: &Topology) -> Self {
        let loopback = loopback_ports(topology);
        let loopback = loopback.iter().map(|(ip, proto, port)| format!("{ip} . {proto} . {port}")).collect();
        Self {
            ip: "ip",
            digit: '4',
            address: "ipv4_addr",
            loopback: "127.0.0.0/8",
            subnet: network.subnet.cidr(),
            gateway: network.subnet.gateway().into(),
            translations: translations(network, topology, false),
            loopback_ports: Some(loopback),
        }
    }

    fn v6(network: &Network, topology: &Topology) -> Option<Self> {
        let subnet = network.subnet6?;
        Some(Self {
            ip: "ip6",
            digit: '6',
            address: "ipv6_addr",
            loopback: "::1",
            subnet: subnet.cidr(),
            gateway: subnet.gateway().into(),
            translations: translations(network, topology, true),
            loopback_ports: None,
        })
    }

    fn write_maps(&self, text: &mut String) {
        let Self { digit, address, .. } = self;
        for (name, direct) in [("published", false), ("direct", true)] {
            let of_kind = || self.translations.iter().filter(move |translation| translation.direct == direct);
            let everywhere = of_kind().filter(|translation| translation.host.is_none()).map(any_element);
            let on_one =
                of_kind().filter_map(|translation| translation.host.map(|ip| on_element(ip, translation)));
            let target = format!("{address} . inet_service");
            let key = "inet_proto . inet_service".to_owned();
            write_set(
                text,
                "map",
                &format!("{name}{digit}"),
                &format!("{key} : {target}"),
                everywhere.collect(),
            );
            let key = format!("{address} . {key} : {target}");
            write_set(text, "map", &format!("{name}{digit}-on"), &key, on_one.collect());
        }
        let open = self.translations.iter();
        let open =
            open.map(|to| format!("{} . {} . {}", to.container, to.proto, to.container_port)).collect();
        let key = format!("{address} . inet_proto . inet_service");
        write_set(text, "set", &format!("open{digit}"), &key, open);
        if let Some(ports) = &self.loopback_ports {
            write_set(text, "set", &format!("loopback{digit}"), &key, ports.clone());
        }
    }
}

pub(crate) fn any_element(to: &Translation) -> String {
    format!("{} . {} : {} . {}", to.proto, to.host_port, to.container, to.container_port)
}

pub(crate) fn on_element(host: std::net::IpAddr, to: &Translation) -> String {
    format!("{host} . {}", any_element(to))
}

pub(crate) fn write_set(text: &mut String, kind: &str, name: &str, key: &str, mut elements: Vec<String>) {
    elements.sort_unstable();
    elements.dedup();
    text.push_str(&format!("\t{kind} {name} {{\n\t\ttype {key}\n"));
    if !elements.is_empty() {
        text.push_str(&format!("\t\telements = {{ {} }}\n", elements.join(", ")));
    }
    text.push_str("\t}\n");
}

/// Precedes connection tracking: no packet may reach a container or a loopback port by direct routing.
fn raw(families: &[Family], bridge: &str) -> String {
    let mut rules = Vec::new();
    for Family { ip, subnet, gateway, digit, loopback, loopback_ports, .. } in families {
        rules.push(format!("iifname != {bridge} {ip} daddr {subnet} {ip} daddr != {gateway} drop"));
        if loopback_ports.is_some() {
            rules.push(format!(
                "iifname != \"lo\" {ip} daddr . meta l4proto . th dport @loopback{digit} drop"
            ));
            rules.push(format!("iifname {bridge} {ip} daddr {loopback} drop"));
        }
    }
    chain("raw-prerouting", Some("type filter hook prerouting priority raw; policy accept;"), &rules)
}

fn forward(_families: &[Family], bridge: &str) -> String {
    let rules = [format!("oifname {bridge} jump to-containers")];
    chain("forward", Some("type filter hook forward priority filter; policy accept;"), &rules)
}

fn to_containers(families: &[Family], bridge: &str) -> String {
    let mut rules =
        vec!["ct state established,related accept".to_owned(), format!("iifname {bridge} accept")];
    rules.extend(
        families.iter().map(|Family { ip, digit, .. }| {
            format!("{ip} daddr . meta l4proto . th dport @open{digit} accept")
        }),
    );
    rules.push("drop".to_owned());
    chain("to-containers", None, &rules)
}

/// From a container to a published port: served by the relay, if the mapping has one.
fn nat_prerouting(_families: &[Family], bridge: &str) -> String {
    let rules = [
        "fib daddr type local jump direct".to_owned(),
        format!("iifname != {bridge} fib daddr type local jump published"),
    ];
    chain("nat-prerouting", Some("type nat hook prerouting priority dstnat; policy accept;"), &rules)
}

/// From the host itself: loopback is served by the relay, if the mapping has one.
fn nat_output(families: &[Family], _bridge: &str) -> String {
    let mut rules = Vec::new();
    for Family { ip, digit, loopback, .. } in families {
        // In IPv6, packets for ::1 cannot leave the loopback interface.
        let direct = if *digit == '6' {
            format!("{ip} daddr != {loopback}")
        } else {
            format!("meta nfproto ipv{digit}")
        };
        rules.push(format!("{direct} fib daddr type local jump direct"));
        rules.push(format!("{ip} daddr != {loopback} fib daddr type local jump published"));
    }
    // nft 1.0.6 accepts the name `dstnat` in prerouting only; -100 is its value.
    chain("nat-output", Some("type nat hook output priority -100; policy accept;"), &rules)
}

fn translate(families: &[Family], name: &str, map: &str) -> String {
    let mut rules = Vec::new();
    for Family { ip, digit, .. } in families {
        rules.push(format!("dnat {ip} to {ip} daddr . meta l4proto . th dport map @{map}{digit}-on"));
        rules.push(format!("dnat {ip} to meta l4proto . th dport map @{map}{digit}"));
    }
    chain(name, None, &rules)
}

/// A container that reaches another one through a host port must get the replies from the host.
fn postrouting(families: &[Family], bridge: &str) -> String {
    let mut rules = Vec::new();
    for Family { ip, subnet, digit, loopback, .. } in families {
        rules.push(format!("{ip} saddr {subnet} oifname != {bridge} masquerade"));
        rules.push(format!("{ip} saddr {subnet} oifname {bridge} ct status dnat masquerade"));
        if *digit == '4' {
            rules.push(format!("{ip} saddr {loopback} oifname {bridge} masquerade"));
        }
    }
    chain("nat-postrouting", Some("type nat hook postrouting priority srcnat; policy accept;"), &rules)
}

pub(crate) fn chain(name: &str, hook: Option<&str>, rules: &[String]) -> String {
    let mut text = format!("\tchain {name} {{\n");
    for line in hook.into_iter().chain(rules.iter().map(String::as_str)) {
        text.write_fmt(format_args!("\t\t{line}\n")).unwrap_or_default();
    }
    text.push_str("\t}\n");
    text
}

/// Normalises a listing, because the kernel does not keep elements in order.
#[must_use]
pub fn normalise(listing: &str) -> String {
    let mut text = String::new();
    let mut rest = listing;
    while let Some((before, elements)) = rest.split_once("elements = {") {
        let (inside, after) = elements.split_once('}').unwrap_or((elements, ""));
        let mut elements: Vec<String> = inside
            .split(',')
            .map(|element| element.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect();
        elements.sort_unstable();
        text.push_str(&format!("{before}elements = {{ {} }}", elements.join(", ")));
        rest = after;
    }
    text.push_str(rest);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testdata;

    #[test]
    fn the_table_is_the_golden_one() {
        testdata::golden("story.nft", &render(&testdata::story()).unwrap());
        testdata::golden("everything.nft", &render(&testdata::everything()).unwrap());
    }

    #[test]
    fn rules_do_not_grow_with_ports() {
        let count = |ports| {
            let text = render(&testdata::with_ports(ports)).unwrap();
            (text.lines().count(), text.matches(" : 172.17.0.2 . ").count())
        };
        let (lines, elements) = count(1);
        assert_eq!(elements, 1);
        assert_eq!(count(2000), (lines, 2000));
    }

    #[test]
    fn replacing_deletes_what_was_there_in_the_same_script() {
        assert_eq!(replace("t", Some("BODY")), "add table inet t\ndelete table inet t\nBODY");
        assert!(!replace("t", None).contains("BODY"));
        assert_eq!(table_of(&replace("t", None)), "t");
        assert_eq!(table_of("add element inet t m { 1 }"), "t");
    }

    #[test]
    fn the_order_of_elements_does_not_matter() {
        let a = "x { elements = { tcp . 80 : a,\n\t\t\t     udp . 53 : b } }\ny";
        let b = "x { elements = { udp . 53 : b, tcp . 80 : a } }\ny";
        assert_eq!(normalise(a), normalise(b));
        assert_ne!(normalise(a), normalise("x { elements = { udp . 53 : b } }\ny"));
    }
}
