//! Formats responses as tables.

use rproxy_mapping::escape::escaped;
use serde::Deserialize;

use crate::control::answers::{BoundMapping, List, MappingStats, Origin, StatsList};

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
pub(super) fn table(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
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
        vec![name.clone(), listens, format!("{to}:{to_ports}"), origin(&bound.origin), String::new()]
    });
    let draining = draining.iter().map(|mapping| {
        let state = format!("draining: {} connections, {} flows", mapping.connections, mapping.flows);
        vec![mapping.name.clone(), "-".to_owned(), "-".to_owned(), "-".to_owned(), state]
    });
    let origins = mappings.iter().map(|bound| &bound.origin);
    table_with_origins(&["NAME", "LISTENS", "BACKEND", ORIGIN, ""], served.chain(draining), origins)
}

const ORIGIN: &str = "ORIGIN";

/// Formats columns, without that of the origins unless there are some.
fn table_with_origins<'a>(
    header: &[&str],
    rows: impl Iterator<Item = Vec<String>>,
    mut origins: impl Iterator<Item = &'a Origin>,
) -> String {
    if origins.any(|origin| origin.origin.is_some()) {
        return table(header, rows);
    }
    let Some(column) = header.iter().position(|name| *name == ORIGIN) else { return table(header, rows) };
    let header: Vec<&str> = header.iter().copied().filter(|name| *name != ORIGIN).collect();
    let without = |mut row: Vec<String>| {
        row.remove(column);
        row
    };
    table(&header, rows.map(without))
}

/// `docker, process 4711`, or `-` for a mapping that was requested.
fn origin(origin: &Origin) -> String {
    match origin {
        Origin { origin: Some(origin), process: Some(process) } => format!("{origin}, process {process}"),
        Origin { origin: Some(origin), process: None } => origin.clone(),
        Origin { origin: None, .. } => "-".to_owned(),
    }
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
            origin(&stats.origin),
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
    let header = ["NAME", ORIGIN, "CONNS", "FLOWS", "BYTES IN", "OUT", "DATAGRAMS IN", "OUT", "ERRORS"];
    let origins = mappings.iter().map(|stats| &stats.origin);
    table_with_origins(&header, served.chain(draining), origins)
}

/// The address that a mapping actually listens on.
fn bound_host(bound: &BoundMapping<Shown>) -> &str {
    bound.bound_host.as_deref().unwrap_or(&bound.mapping.host)
}

/// `999`, `1.2k`, `34.5G`.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub(super) fn human(count: u64) -> String {
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
        assert_eq!(list(&serde_json::from_value(answer.clone()).unwrap()), expected);
        let mut answer = answer;
        let mappings = answer["mappings"].as_array_mut().unwrap();
        mappings.truncate(1);
        for (process, port) in [(Some(4711), "81"), (None, "82")] {
            mappings.push(json!({
                "name": format!("docker/tcp/0.0.0.0:{port}"), "host": "0.0.0.0", "bound": port, "proto": "tcp",
                "to": "172.17.0.3", "to_ports": "80", "origin": "docker", "process": process,
            }));
        }
        let expected = "\
NAME                   LISTENS         BACKEND        ORIGIN
web                    [::]:8080/tcp   172.17.0.2:80  -
docker/tcp/0.0.0.0:81  0.0.0.0:81/tcp  172.17.0.3:80  docker, process 4711
docker/tcp/0.0.0.0:82  0.0.0.0:82/tcp  172.17.0.3:80  docker
old                    -               -              -                     draining: 2 connections, 0 flows";
        assert_eq!(list(&serde_json::from_value(answer).unwrap()), expected);
    }

    #[test]
    fn counters_of_attached_ports_have_an_origin() {
        let counters = |name: &str| {
            let zero = json!(0);
            json!({
                "name": name, "connections": zero, "connections_total": zero, "flows": zero, "flows_total": zero,
                "bytes_in": zero, "bytes_out": zero, "datagrams_in": zero, "datagrams_out": zero, "errors": {},
            })
        };
        let mut attached = counters("docker/udp/[::]:53");
        attached["origin"] = "docker".into();
        attached["process"] = 7.into();
        let answer = json!({ "mappings": [attached, counters("web")], "draining": [] });
        let expected = "\
NAME                ORIGIN             CONNS  FLOWS  BYTES IN  OUT  DATAGRAMS IN  OUT  ERRORS
docker/udp/[::]:53  docker, process 7  0/0    0/0    0         0    0             0
web                 -                  0/0    0/0    0         0    0             0";
        assert_eq!(stats(&serde_json::from_value(answer).unwrap()), expected);
    }

    #[test]
    fn counts_are_short() {
        for (count, text) in [(0, "0"), (999, "999"), (1000, "1.0k"), (999_960, "1.0M"), (u64::MAX, "18.4E")]
        {
            assert_eq!(human(count), text);
        }
    }
}
