//! Formats responses as tables.

use rproxy_mapping::escape::escaped;
use rproxy_mapping::unix;
use serde::Deserialize;

use crate::control::answers::{BoundMapping, List, Origin};
use crate::engine::listening::with_addresses;

/// The parts of a mapping that are shown. Others, such as its limits, are not parsed, because a newer server
/// may have more.
#[derive(Debug, Deserialize)]
pub(super) struct Shown {
    name: String,
    host: String,
    host_ports: Option<String>,
    to: String,
    /// Empty for a Unix socket.
    #[serde(default)]
    to_ports: String,
    proto: String,
}

impl Shown {
    /// The backend and its ports.
    fn backend(&self) -> String {
        let Self { to, to_ports, .. } = self;
        if to_ports.is_empty() { to.clone() } else { format!("{to}:{to_ports}") }
    }

    /// What is published, as `docker port` has it: the ports of the backend, or its Unix socket.
    fn published(&self) -> String {
        let Self { to, to_ports, proto, .. } = self;
        if to_ports.is_empty() { to.clone() } else { format!("{to_ports}/{proto}") }
    }
}

/// Formats columns as wide as necessary, separated by two spaces, without trailing spaces.
pub(super) fn table(header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let shown = |row: Vec<String>| row.iter().map(|cell| escaped(cell).to_string()).collect();
    let header = header.iter().map(ToString::to_string).collect();
    lined_up(std::iter::once(header).chain(rows.map(shown)).collect()).join("\n")
}

/// Pads the cells of rows, so that they line up in columns, separated by two spaces, without trailing spaces.
pub(super) fn lined_up(rows: Vec<Vec<String>>) -> Vec<String> {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let render = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(render).collect()
}

/// Formats the response to `list`.
pub(super) fn list(List { mappings, draining }: &List<Shown>) -> String {
    let served = mappings.iter().map(|bound| {
        let listens = listens(bound);
        let (resolved, unresolved) = (bound.resolved.as_deref(), bound.unresolved.as_deref());
        let backend = with_addresses(bound.mapping.backend(), resolved, unresolved);
        let waits = bound.bound.is_empty() && !bound.mapping.host.starts_with(unix::PREFIX);
        let state = if waits { "waits for an address" } else { "" };
        vec![bound.mapping.name.clone(), listens, backend, origin(&bound.origin), state.to_owned()]
    });
    let draining = draining.iter().map(|mapping| {
        let state = format!("draining: {} connections, {} flows", mapping.connections, mapping.flows);
        vec![mapping.name.clone(), "-".to_owned(), "-".to_owned(), "-".to_owned(), state]
    });
    let origins = mappings.iter().map(|bound| &bound.origin);
    table_with_origins(&["NAME", "LISTENS", "BACKEND", ORIGIN, ""], served.chain(draining), origins)
}

pub(super) const ORIGIN: &str = "ORIGIN";

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
pub(super) fn origin(origin: &Origin) -> String {
    match origin {
        Origin { origin: Some(origin), process: Some(process) } => format!("{origin}, process {process}"),
        Origin { origin: Some(origin), process: None } => origin.clone(),
        Origin { origin: None, .. } => "-".to_owned(),
    }
}

/// Formats a mapping of the response to `add`: `web: 80/tcp -> [::]:8080`.
pub(super) fn ready_line(bound: &BoundMapping<Shown>) -> String {
    let (name, published) = (&bound.mapping.name, bound.mapping.published());
    let line = format!("{name}: {published} -> {}", place(bound));
    escaped(&line).to_string()
}

fn listens(bound: &BoundMapping<Shown>) -> String {
    let (place, proto) = (place(bound), &bound.mapping.proto);
    if place.starts_with(unix::PREFIX) { place } else { format!("{place}/{proto}") }
}

/// The addresses and ports that a mapping actually listens on; if its interface has no address, those asked for.
fn place(bound: &BoundMapping<Shown>) -> String {
    let Shown { host, host_ports, .. } = &bound.mapping;
    let host = bound.bound_host.as_deref().unwrap_or(host);
    match host_ports {
        _ if host.starts_with(unix::PREFIX) => host.to_owned(),
        Some(asked) if bound.bound.is_empty() => format!("{host}:{asked}"),
        _ => format!("{host}:{}", bound.bound),
    }
}

/// `0`, `0.4`, `12`, `1.2k`.
pub(super) fn human_rate(rate: f64) -> String {
    match rate {
        _ if rate <= 0.0 => "0".to_owned(),
        _ if rate < 9.95 => format!("{:.1}", rate.max(0.1)),
        _ => scaled(rate.round()),
    }
}

/// `999`, `1.2k`, `34.5G`.
#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
pub(super) fn human(count: u64) -> String {
    scaled(count as f64)
}

fn scaled(count: f64) -> String {
    const UNITS: [&str; 6] = ["k", "M", "G", "T", "P", "E"];
    if count < 1000.0 {
        return format!("{count:.0}");
    }
    let mut scaled = count / 1000.0;
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
    fn an_interface_without_address_is_told() {
        let answer = json!({
            "mappings": [
                { "name": "web", "host": "%eth0", "host_ports": "80", "bound": "", "proto": "tcp", "to": "172.17.0.2", "to_ports": "80" },
                { "name": "dns", "host": "%lo", "host_ports": "53", "bound_host": "127.0.0.1,[::1]", "bound": "53", "proto": "udp",
                  "to": "172.17.0.2", "to_ports": "53" },
                { "name": "front", "host": "unix:/run/front.sock", "bound": "", "proto": "tcp", "to": "unix:@app" },
            ],
            "draining": [],
        });
        let expected = "\
NAME   LISTENS                 BACKEND
web    %eth0:80/tcp            172.17.0.2:80  waits for an address
dns    127.0.0.1,[::1]:53/udp  172.17.0.2:53
front  unix:/run/front.sock    unix:@app";
        assert_eq!(list(&serde_json::from_value(answer).unwrap()), expected);
    }

    #[test]
    fn counts_are_short() {
        for (count, text) in [(0, "0"), (999, "999"), (1000, "1.0k"), (999_960, "1.0M"), (u64::MAX, "18.4E")]
        {
            assert_eq!(human(count), text);
        }
        for (rate, text) in
            [(0.0, "0"), (0.01, "0.1"), (2.0, "2.0"), (9.96, "10"), (999.7, "1.0k"), (12.4, "12")]
        {
            assert_eq!(human_rate(rate), text);
        }
    }
}
