//! Formats responses as tables.

use rproxy_mapping::escape::escaped;
use serde::Deserialize;

use crate::control::answers::{BoundMapping, List, MappingStats, StatsList};

/// The parts of a mapping that are shown. Others, such as its limits, are not parsed, because a newer server
/// may have more.
#[derive(Debug, Deserialize)]
pub(super) struct Shown {
    name: String,
    host: String,
    to: String,
    to_ports: String,
    proto: String,
}

/// Formats columns as wide as necessary, separated by two spaces, without trailing spaces.
fn table(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let header: Vec<String> = header.iter().map(ToString::to_string).collect();
    let shown = |row: Vec<String>| row.iter().map(|cell| escaped(cell).to_string()).collect();
    let rows: Vec<Vec<String>> = rows.map(shown).collect();
    let lines = || std::iter::once(&header).chain(&rows);
    let width = |column: usize| lines().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let render = |line: &Vec<String>| {
        let cells = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    lines().map(render).collect::<Vec<_>>().join("\n")
}

/// Formats the response to `list`.
pub(super) fn list(List { mappings, draining }: &List<Shown>) -> String {
    let served = mappings.iter().map(|bound| {
        let Shown { name, to, to_ports, proto, .. } = &bound.mapping;
        let listens = format!("{}:{}/{proto}", bound_host(bound), bound.bound);
        vec![name.clone(), listens, format!("{to}:{to_ports}"), String::new()]
    });
    let draining = draining.iter().map(|mapping| {
        let state = format!("draining: {} connections, {} flows", mapping.connections, mapping.flows);
        vec![mapping.name.clone(), "-".to_owned(), "-".to_owned(), state]
    });
    table(&["NAME", "LISTENS", "BACKEND", ""], served.chain(draining))
}

/// Formats a mapping of the response to `add`: `web: 80/tcp -> [::]:8080`.
pub(super) fn ready_line(bound: &BoundMapping<Shown>) -> String {
    let Shown { name, to_ports, proto, .. } = &bound.mapping;
    let line = format!("{name}: {to_ports}/{proto} -> {}:{}", bound_host(bound), bound.bound);
    escaped(&line).to_string()
}

/// Formats the response to `stats`.
pub(super) fn stats(StatsList { mappings, draining }: &StatsList) -> String {
    let row = |stats: &MappingStats, state: &str| {
        let errors = stats.errors.iter().map(|(kind, count)| format!("{kind} {count}"));
        vec![
            format!("{}{state}", stats.name),
            format!("{}/{}", stats.connections, stats.connections_total),
            format!("{}/{}", stats.flows, stats.flows_total),
            human(stats.bytes_in),
            human(stats.bytes_out),
            stats.datagrams_in.to_string(),
            stats.datagrams_out.to_string(),
            errors.collect::<Vec<_>>().join(", "),
        ]
    };
    let served = mappings.iter().map(|stats| row(stats, ""));
    let draining = draining.iter().map(|stats| row(stats, " (draining)"));
    let header = ["NAME", "CONNS", "FLOWS", "BYTES IN", "OUT", "DATAGRAMS IN", "OUT", "ERRORS"];
    table(&header, served.chain(draining))
}

/// The address that a mapping actually listens on.
fn bound_host(bound: &BoundMapping<Shown>) -> &str {
    bound.bound_host.as_deref().unwrap_or(&bound.mapping.host)
}

/// `999`, `1.2k`, `34.5G`.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
fn human(count: u64) -> String {
    const UNITS: [&str; 6] = ["k", "M", "G", "T", "P", "E"];
    if count < 1000 {
        return count.to_string();
    }
    let mut scaled = count as f64 / 1000.0;
    let mut unit = 0;
    while scaled >= 999.95 && unit + 1 < UNITS.len() {
        scaled /= 1000.0;
        unit += 1;
    }
    format!("{scaled:.1}{}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_line_up() {
        let answer = json!({
            "mappings": [
                { "name": "web", "host": "[::]", "bound": "8080", "proto": "tcp", "to": "172.17.0.2", "to_ports": "80" },
                { "name": "own", "host": "[::]", "bound_host": "127.0.0.1", "bound": "8", "proto": "udp", "to": "[::1]", "to_ports": "9" },
            ],
            "draining": [{ "name": "old", "connections": 2, "flows": 0 }],
        });
        let expected = "\
NAME  LISTENS          BACKEND
web   [::]:8080/tcp    172.17.0.2:80
own   127.0.0.1:8/udp  [::1]:9
old   -                -              draining: 2 connections, 0 flows";
        assert_eq!(list(&serde_json::from_value(answer).unwrap()), expected);
    }

    #[test]
    fn counts_are_short() {
        for (count, text) in [(0, "0"), (999, "999"), (1000, "1.0k"), (999_960, "1.0M"), (u64::MAX, "18.4E")]
        {
            assert_eq!(human(count), text);
        }
    }
}
