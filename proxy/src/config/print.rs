//! Prints mappings, and how ports are attached, as a configuration file.

use std::fmt::Write;

use rproxy_mapping::Mapping;
use rproxy_mapping::addr::ScopedIp;
use rproxy_mapping::backend::BackendHost;
use rproxy_mapping::escape::is_plain;
use rproxy_mapping::host::HostAddr;
use rproxy_mapping::wire::{WireLimits, WireMapping};
use rproxy_shim::message::DEFAULT_NAME;

use super::names::with_keys;
use crate::bind::interfaces::HostInterfaces;
use crate::metrics::addr::MetricsAddr;
use crate::plane::AttachOptions;

/// The text of a file from which [`read`](super::read) returns `mappings`, `attach` and `metrics`. `address` writes
/// addresses: those of this machine [with the names of interfaces](with_interface_name).
pub fn print<'a>(
    mappings: impl IntoIterator<Item = &'a Mapping>,
    attach: Option<&AttachOptions>,
    metrics: Option<&MetricsAddr>,
    address: fn(ScopedIp) -> String,
) -> String {
    let attach = attach.map(|options| table("[attach]", values_of_attach(options)));
    let mappings = mappings.into_iter().map(|mapping| table("[[mapping]]", values_of(mapping, address)));
    let mut tables: Vec<String> = attach.into_iter().chain(mappings).collect();
    if tables.is_empty() {
        // A file without any would be refused.
        tables.push("mapping = []\n".to_owned());
    }
    let metrics = metrics.map(|addr| format!("metrics = {}\n", toml_string(&addr.to_string())));
    metrics.into_iter().chain(tables).collect::<Vec<_>>().join("\n")
}

macro_rules! values {
    ($($key:ident),*) => {
        /// The values of the keys of a mapping in TOML, `None` where it is the default.
        struct Values { $($key: Option<String>),* }

        impl Values {
            /// The keys and values in the order of [`KEYS`](super::names::KEYS).
            fn lines(self) -> impl Iterator<Item = (&'static str, String)> {
                let lines = [$((stringify!($key), self.$key)),*];
                lines.into_iter().filter_map(|(key, value)| Some((key, value?)))
            }
        }
    };
}

with_keys!(values);

fn table(heading: &str, values: Values) -> String {
    let mut table = format!("{heading}\n");
    for (key, value) in values.lines() {
        writeln!(table, "{key} = {value}").expect("a string takes everything");
    }
    table
}

fn values_of(mapping: &Mapping, address: fn(ScopedIp) -> String) -> Values {
    let WireMapping {
        name,
        host: _,
        host_ports,
        to: _,
        to_ports,
        proto,
        v6only,
        limits,
        // What only a list has.
        ..
    } = WireMapping::of(mapping);
    // No value contains a character that must be escaped in a TOML string.
    let to = match mapping.backend() {
        BackendHost::Ip(ip) => format!("{}:{to_ports}", address(*ip)),
        _ => mapping.backend_spec().to_string(),
    };
    let host = match mapping.host() {
        HostAddr::Unix(addr) => addr.to_string(),
        host => {
            let host = host.ip().map_or_else(|| host.to_string(), address);
            format!("{host}:{}", host_ports.as_deref().unwrap_or("0"))
        }
    };
    Values {
        name: quoted(name),
        host: quoted(Some(host)),
        to: Some(toml_string(&to)),
        proto: quoted(proto.filter(|proto| proto != "tcp")),
        v6only: is_on(v6only),
        ..values_of_limits(limits)
    }
}

fn values_of_attach(AttachOptions { name, limits }: &AttachOptions) -> Values {
    let name = (name != DEFAULT_NAME).then(|| toml_string(name));
    Values { name, ..values_of_limits(WireLimits::of(limits)) }
}

fn values_of_limits(limits: WireLimits) -> Values {
    let number = |number: Option<usize>| number.map(|number| number.to_string());
    let list = |texts: Vec<String>| (!texts.is_empty()).then(|| format!("{texts:?}"));
    Values {
        name: None,
        host: None,
        to: None,
        proto: None,
        v6only: None,
        connect_timeout: quoted(limits.connect_timeout),
        idle_timeout: quoted(limits.idle_timeout),
        tcp_user_timeout: quoted(limits.tcp_user_timeout),
        keepalive: quoted(limits.keepalive),
        max_connections: number(limits.max_connections),
        on_limit: quoted(limits.on_limit),
        max_connections_per_source: number(limits.max_connections_per_source),
        rate: quoted(limits.rate),
        allow: list(limits.allow),
        deny: list(limits.deny),
        udp_timeout: quoted(limits.udp_timeout),
        udp_max_flows: number(limits.udp_max_flows),
        udp_max_flows_per_source: number(limits.udp_max_flows_per_source),
        udp_any_port: is_on(limits.udp_any_port),
        require_resolved: is_on(limits.require_resolved),
        dscp: quoted(limits.dscp),
        source: quoted(limits.source),
        device: quoted(limits.device),
        send_proxy: quoted(limits.send_proxy),
        send_proxy_udp: quoted(limits.send_proxy_udp),
        accept_proxy: list(limits.accept_proxy),
        proxy_timeout: quoted(limits.proxy_timeout),
        freebind: is_on(limits.freebind),
        socket_mode: quoted(limits.socket_mode),
        socket_user: quoted(limits.socket_user),
        socket_group: quoted(limits.socket_group),
        access_log: limits.access_log.map(|is_on| is_on.to_string()),
    }
}

fn quoted(text: Option<String>) -> Option<String> {
    text.map(|text| format!("\"{text}\""))
}

fn is_on(value: bool) -> Option<String> {
    value.then(|| "true".to_owned())
}

/// A basic string of TOML, with escapes for whatever a terminal might interpret.
fn toml_string(text: &str) -> String {
    let escape = |c: char| match c {
        '"' | '\\' => format!("\\{c}"),
        c if is_plain(c) => c.to_string(),
        c => format!("\\U{:08X}", u32::from(c)),
    };
    format!("\"{}\"", text.chars().map(escape).collect::<String>())
}

/// An address, with the name of its interface in this network namespace if there is one: after a restart of the machine,
/// the interface may have another index.
pub fn with_interface_name(ip: ScopedIp) -> String {
    // An interface can be called what a TOML string would have to escape, or what is read as a number.
    let named = HostInterfaces.name_of(ip.zone()).map(|name| format!("[{}%{name}]", ip.ip()));
    let needs_no_escapes = |text: &String| !text.contains(['"', '\\']) && text.chars().all(is_plain);
    let is_same = |text: &String| ScopedIp::parse(text, &HostInterfaces) == Ok(ip);
    named.filter(|text| needs_no_escapes(text) && is_same(text)).unwrap_or_else(|| ip.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_written_by_their_names() {
        for (address, printed) in [
            // The loopback interface is the first one of each network namespace.
            ("fe80::1%1", "[fe80::1%lo]"),
            ("fe80::1%lo", "[fe80::1%lo]"),
            ("fe80::1%4000000000", "[fe80::1%4000000000]"),
            ("fd00::1", "[fd00::1]"),
            ("10.0.0.11", "10.0.0.11"),
        ] {
            let ip = ScopedIp::parse(address, &HostInterfaces).unwrap();
            assert_eq!(with_interface_name(ip), printed);
            assert_eq!(ScopedIp::parse(printed, &HostInterfaces), Ok(ip));
        }
    }
}
