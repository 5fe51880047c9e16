//! Prints mappings as a configuration file.

use std::fmt::{Display, Write};

use crate::mapping::Mapping;
use crate::mapping::wire::{WireLimits, WireMapping};

/// The text of a file from which [`read`](super::read) returns `mappings`.
pub fn print<'a>(mappings: impl IntoIterator<Item = &'a Mapping>) -> String {
    let tables: Vec<String> = mappings.into_iter().map(table).collect();
    tables.join("\n")
}

fn table(mapping: &Mapping) -> String {
    let WireMapping { name, host, host_ports, to, to_ports, proto, v6only, limits, bound: _, bound_host: _ } =
        WireMapping::of(mapping);
    let WireLimits {
        connect_timeout,
        idle_timeout,
        max_connections,
        on_limit,
        udp_timeout,
        udp_max_flows,
        udp_max_flows_per_source,
        udp_any_port,
        dscp,
        allow,
        deny,
    } = limits;
    let host = format!("{}:{}", host.unwrap_or_default(), host_ports.as_deref().unwrap_or("0"));
    let mut table = "[[mapping]]\n".to_owned();
    // No value contains a character that must be escaped in a TOML string.
    let mut line = |key: &str, value: Option<&dyn Display>| {
        if let Some(value) = value {
            writeln!(table, "{key} = {value}").expect("a string takes everything");
        }
    };
    let quoted = |text: Option<String>| text.map(|text| format!("\"{text}\""));
    let is_on = |value: bool| value.then(|| "true".to_owned());
    let list = |texts: Vec<String>| (!texts.is_empty()).then(|| format!("{texts:?}"));
    let proto = proto.filter(|proto| proto != "tcp");
    for (key, value) in [
        ("name", quoted(name)),
        ("host", quoted(Some(host))),
        ("to", quoted(Some(format!("{to}:{to_ports}")))),
        ("proto", quoted(proto)),
        ("v6only", is_on(v6only)),
        ("connect_timeout", quoted(connect_timeout)),
        ("idle_timeout", quoted(idle_timeout)),
        ("max_connections", max_connections.map(|count| count.to_string())),
        ("on_limit", quoted(on_limit)),
        ("allow", list(allow)),
        ("deny", list(deny)),
        ("udp_timeout", quoted(udp_timeout)),
        ("udp_max_flows", udp_max_flows.map(|count| count.to_string())),
        ("udp_max_flows_per_source", udp_max_flows_per_source.map(|count| count.to_string())),
        ("udp_any_port", is_on(udp_any_port)),
        ("dscp", quoted(dscp)),
    ] {
        line(key, value.as_ref().map(|value| value as &dyn Display));
    }
    table
}
