//! Answers as tables, for people.

use serde_json::Value;

/// Columns as wide as they have to be, two spaces apart; no line ends in spaces.
fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let header: Vec<String> = header.iter().map(ToString::to_string).collect();
    let lines = || std::iter::once(&header).chain(rows);
    let width = |column: usize| lines().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let render = |line: &Vec<String>| {
        let cells = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    lines().map(render).collect::<Vec<_>>().join("\n")
}

/// The answer to `list`.
pub(super) fn list(answer: &Value) -> String {
    let served = each(answer, "mappings").map(|mapping| {
        let text = |key: &str| text(&mapping[key]);
        let listens = format!("{}:{}/{}", bound_host(mapping), text("bound"), text("proto"));
        vec![text("name"), listens, format!("{}:{}", text("to"), text("to_ports")), String::new()]
    });
    let draining = each(answer, "draining").map(|mapping| {
        let state = format!("draining: {} connections, {} flows", mapping["connections"], mapping["flows"]);
        vec![text(&mapping["name"]), "-".to_owned(), "-".to_owned(), state]
    });
    table(&["NAME", "LISTENS", "BACKEND", ""], &served.chain(draining).collect::<Vec<_>>())
}

/// The answer to `stats`.
pub(super) fn stats(answer: &Value) -> String {
    let row = |mapping: &Value, state: &str| {
        let of = |now: &str, total: &str| format!("{}/{}", mapping[now], mapping[total]);
        let bytes = |key: &str| human(mapping[key].as_u64().unwrap_or(0));
        let errors = mapping["errors"].as_object().into_iter().flatten();
        let errors: Vec<String> = errors.map(|(kind, count)| format!("{kind} {count}")).collect();
        vec![
            text(&mapping["name"]) + state,
            of("connections", "connections_total"),
            of("flows", "flows_total"),
            bytes("bytes_in"),
            bytes("bytes_out"),
            mapping["datagrams_in"].to_string(),
            mapping["datagrams_out"].to_string(),
            errors.join(", "),
        ]
    };
    let served = each(answer, "mappings").map(|mapping| row(mapping, ""));
    let draining = each(answer, "draining").map(|mapping| row(mapping, " (draining)"));
    let header = ["NAME", "CONNS", "FLOWS", "BYTES IN", "OUT", "DATAGRAMS IN", "OUT", "ERRORS"];
    table(&header, &served.chain(draining).collect::<Vec<_>>())
}

fn each<'a>(answer: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    answer[key].as_array().into_iter().flatten()
}

/// Where a mapping really listens.
pub(super) fn bound_host(mapping: &Value) -> String {
    text(mapping.get("bound_host").unwrap_or(&mapping["host"]))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
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
        assert_eq!(list(&answer), expected);
    }

    #[test]
    fn counts_are_short() {
        for (count, text) in [(0, "0"), (999, "999"), (1000, "1.0k"), (999_960, "1.0M"), (u64::MAX, "18.4E")]
        {
            assert_eq!(human(count), text);
        }
    }
}
