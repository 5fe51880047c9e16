//! Formats counters as a table, also one that fits a terminal.

use rproxy_mapping::escape::escaped;

use super::stats::{Rates, Row, View};
use super::table::{ORIGIN, human, human_rate, lined_up, origin};
use crate::cli::ctl::SortKey;

/// A column of the table.
struct Column {
    header: &'static str,
    cell: fn(&Row) -> String,
    /// What a table sorted by this column is sorted by.
    keys: &'static [SortKey],
    /// The columns with the highest number are left out first if the terminal is narrow. Those with 0 stay.
    rank: u8,
}

const fn column(
    header: &'static str,
    cell: fn(&Row) -> String,
    keys: &'static [SortKey],
    rank: u8,
) -> Column {
    Column { header, cell, keys, rank }
}

const NAME: Column = column("NAME", name, &[SortKey::Name], 0);
const FROM: Column = column(ORIGIN, |row| origin(&row.stats.origin), &[], 9);
const CONNECTIONS: Column = column(
    "CONNS",
    |row| format!("{}/{}", row.stats.connections, row.stats.connections_total),
    &[SortKey::Connections, SortKey::ConnectionsTotal],
    2,
);
const FLOWS: Column = column(
    "FLOWS",
    |row| format!("{}/{}", row.stats.flows, row.stats.flows_total),
    &[SortKey::Flows, SortKey::FlowsTotal],
    3,
);
const ERRORS: Column = column("ERRORS", errors, &[SortKey::Errors], 0);

/// The columns of counters alone.
const COUNTERS: &[Column] = &[
    NAME,
    FROM,
    CONNECTIONS,
    FLOWS,
    column("BYTES IN", |row| human(row.stats.bytes_in), &[SortKey::BytesIn], 0),
    column("OUT", |row| human(row.stats.bytes_out), &[SortKey::BytesOut], 0),
    column("DATAGRAMS IN", |row| row.stats.datagrams_in.to_string(), &[SortKey::DatagramsIn], 0),
    column("OUT", |row| row.stats.datagrams_out.to_string(), &[SortKey::DatagramsOut], 0),
    ERRORS,
];

/// The columns of counters that are looked at repeatedly.
const WITH_RATES: &[Column] = &[
    NAME,
    FROM,
    CONNECTIONS,
    column("CONNS/S", |row| rate(row, |it| it.connections), &[SortKey::RateConnections], 4),
    FLOWS,
    column("FLOWS/S", |row| rate(row, |it| it.flows), &[SortKey::RateFlows], 5),
    column("BYTES/S IN", |row| rate(row, |it| it.bytes_in), &[SortKey::RateIn], 1),
    column("BYTES/S OUT", |row| rate(row, |it| it.bytes_out), &[SortKey::RateOut], 1),
    column("DATAGRAMS/S IN", |row| rate(row, |it| it.datagrams_in), &[SortKey::RateDatagramsIn], 6),
    column("DATAGRAMS/S OUT", |row| rate(row, |it| it.datagrams_out), &[SortKey::RateDatagramsOut], 6),
    column("BYTES IN", |row| human(row.stats.bytes_in), &[SortKey::BytesIn], 7),
    column("BYTES OUT", |row| human(row.stats.bytes_out), &[SortKey::BytesOut], 7),
    column("DATAGRAMS IN", |row| human(row.stats.datagrams_in), &[SortKey::DatagramsIn], 8),
    column("DATAGRAMS OUT", |row| human(row.stats.datagrams_out), &[SortKey::DatagramsOut], 8),
    ERRORS,
];

/// What a table has to fit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fit {
    /// Characters per line.
    pub(super) width: usize,
    /// Lines, including the header.
    pub(super) height: usize,
    /// The column that stays in any case.
    pub(super) sort: SortKey,
}

/// Formats counters; with their rates if they are looked at repeatedly.
pub(super) fn whole(view: &View, has_rates: bool) -> String {
    let rows: Vec<&Row> = view.rows.iter().collect();
    let columns = columns(&rows, has_rates);
    lined_up(cells(&columns, &rows)).join("\n")
}

/// Formats counters and rates as lines that fit. Says how many mappings did not.
pub(super) fn fitted(view: &View, fit: Fit) -> Vec<String> {
    let room = fit.height.saturating_sub(1);
    let shown = match view.rows.len() > room {
        true => room.saturating_sub(1),
        false => room,
    };
    let rows: Vec<&Row> = view.rows.iter().take(shown).collect();
    let mut lines = narrowed(columns(&rows, true), &rows, fit);
    if let Some(more @ 1..) = view.rows.len().checked_sub(shown) {
        lines.push(format!("and {more} more; --mapping and --sort choose which are shown"));
    }
    lines.iter_mut().for_each(|line| *line = cut(line, fit.width));
    lines.truncate(fit.height);
    lines
}

/// Leaves out columns until the others fit, and shortens names if none may be left out.
fn narrowed(mut columns: Vec<&Column>, rows: &[&Row], fit: Fit) -> Vec<String> {
    /// The characters of errors for which other columns are left out.
    const ERRORS_SHOWN: usize = 24;
    /// The characters of names at least.
    const NAMES_SHOWN: usize = 12;

    let mut cells = cells(&columns, rows);
    loop {
        let width = |column: usize| cells.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths = (0..columns.len()).map(|column| match columns[column].header {
            header if header == ERRORS.header => width(column).min(ERRORS_SHOWN) + 2,
            _ => width(column) + 2,
        });
        let excess = (widths.sum::<usize>() - 2).saturating_sub(fit.width);
        let rank = |column: &Column| if column.keys.contains(&fit.sort) { 0 } else { column.rank };
        let last = columns.iter().enumerate().max_by_key(|(index, column)| (rank(column), *index));
        match last {
            Some((index, column)) if excess > 0 && rank(column) > 0 => {
                columns.remove(index);
                cells.iter_mut().for_each(|row| drop(row.remove(index)));
            }
            _ => {
                let names = width(0).saturating_sub(excess).max(NAMES_SHOWN);
                cells.iter_mut().for_each(|row| row[0] = cut(&row[0], names));
                return lined_up(cells);
            }
        }
    }
}

/// The columns of a table; that of the origins only if there are some.
fn columns(rows: &[&Row], has_rates: bool) -> Vec<&'static Column> {
    let has_origins = rows.iter().any(|row| row.stats.origin.origin.is_some());
    let all = if has_rates { WITH_RATES } else { COUNTERS };
    all.iter().filter(|column| has_origins || column.header != ORIGIN).collect()
}

/// The header and the cells of rows.
fn cells(columns: &[&Column], rows: &[&Row]) -> Vec<Vec<String>> {
    let header = columns.iter().map(|column| column.header.to_owned()).collect();
    let cells = |row: &&Row| {
        columns.iter().map(|column| escaped(&(column.cell)(row)).to_string()).collect::<Vec<_>>()
    };
    std::iter::once(header).chain(rows.iter().map(cells)).collect()
}

/// The start of a text that is too long, and a sign that it is cut.
pub(super) fn cut(text: &str, width: usize) -> String {
    match text.chars().count() > width {
        true => text.chars().take(width.saturating_sub(1)).chain("~".chars()).take(width).collect(),
        false => text.to_owned(),
    }
}

fn name(row: &Row) -> String {
    format!("{}{}", row.stats.name, if row.is_draining { " (draining)" } else { "" })
}

fn errors(row: &Row) -> String {
    let errors = row.stats.errors.iter().map(|(kind, count)| format!("{kind} {count}"));
    errors.collect::<Vec<_>>().join(", ")
}

/// A rate, or `-` if it is not known yet.
fn rate(row: &Row, rate: fn(&Rates) -> f64) -> String {
    row.rates.as_ref().map_or_else(|| "-".to_owned(), |rates| human_rate(rate(rates)))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use serde_json::{Value, json};

    use super::super::stats::{History, Look};
    use super::*;
    use crate::cli::ctl::StatsArgs;

    fn counters(name: &str, count: u64) -> Value {
        json!({
            "name": name, "connections": 0, "connections_total": count, "flows": 0, "flows_total": 0,
            "bytes_in": count * 1000, "bytes_out": 0, "datagrams_in": 0, "datagrams_out": 0, "errors": {},
        })
    }

    /// What is seen of the second of two answers, two seconds after the first.
    fn seen(first: &Value, second: &Value, sort: SortKey) -> View {
        let (at, args) = (Instant::now(), StatsArgs { watch: Some(1), mapping: Vec::new(), sort });
        let mut history = History::default();
        let mut see = |at, answer: &Value| View::of(Look { at, answer: answer.clone() }, &args, &mut history);
        see(at, first).unwrap();
        see(at + Duration::from_secs(2), second).unwrap()
    }

    #[test]
    fn counters_of_attached_ports_have_an_origin() {
        let mut attached = counters("docker/udp/[::]:53", 0);
        attached["origin"] = "docker".into();
        attached["process"] = 7.into();
        let answer = json!({ "mappings": [attached, counters("web", 0)], "draining": [] });
        let expected = "\
NAME                ORIGIN             CONNS  FLOWS  BYTES IN  OUT  DATAGRAMS IN  OUT  ERRORS
docker/udp/[::]:53  docker, process 7  0/0    0/0    0         0    0             0
web                 -                  0/0    0/0    0         0    0             0";
        assert_eq!(whole(&seen(&answer, &answer, SortKey::Name), false), expected);
    }

    #[test]
    fn a_table_that_is_repeated_has_rates() {
        let answer = |web: u64| {
            let mut old = counters("old", 3);
            old["errors"] = json!({ "reset": 2, "denied": web });
            json!({ "mappings": [counters("web", web)], "draining": [old] })
        };
        let expected = "\
NAME            CONNS  CONNS/S  FLOWS  FLOWS/S  BYTES/S IN  BYTES/S OUT  DATAGRAMS/S IN  DATAGRAMS/S OUT  BYTES IN  BYTES OUT  DATAGRAMS IN  DATAGRAMS OUT  ERRORS
web             0/5    2.0      0/0    0        2.0k        0            0               0                5.0k      0          0             0
old (draining)  0/3    0        0/0    0        0           0            0               0                3.0k      0          0             0              denied 5, reset 2";
        assert_eq!(whole(&seen(&answer(1), &answer(5), SortKey::Name), true), expected);
        let unknown =
            whole(&seen(&json!({ "mappings": [], "draining": [] }), &answer(1), SortKey::Name), true);
        assert!(unknown.lines().nth(1).unwrap().contains("  0/1    -        0/0    -        -"), "{unknown}");
    }

    #[test]
    fn a_table_fits_the_terminal() {
        let mut mappings: Vec<Value> =
            (0..100).map(|index| counters(&format!("mapping-{index:03}"), index)).collect();
        mappings[99]["errors"] = json!({ "connect_refused": 12, "connect_timeout": 345, "reset": 6 });
        let answer = json!({ "mappings": mappings, "draining": [] });
        let at = |width, height, sort| fitted(&seen(&answer, &answer, sort), Fit { width, height, sort });
        for (width, height) in [(80, 24), (40, 10), (20, 3), (5, 2), (300, 101), (300, 200), (1, 1), (0, 0)] {
            let lines = at(width, height, SortKey::Errors);
            assert!(
                lines.len() <= height && lines.iter().all(|line| line.chars().count() <= width),
                "{lines:#?}"
            );
        }
        let lines = at(80, 24, SortKey::Errors);
        assert_eq!(
            (lines.len(), &*lines[23]),
            (24, "and 78 more; --mapping and --sort choose which are shown")
        );
        let expected = "mapping-099  0/99   0/0    0           0            connect_refused 12, connect~";
        assert_eq!(lines[1], expected, "{lines:#?}");
        assert_eq!(at(300, 101, SortKey::Name).len(), 101);
        // What is sorted by stays.
        let narrow = at(40, 10, SortKey::DatagramsOut);
        assert!(narrow[0].contains("DATAGRAMS OUT") && !narrow[0].contains("CONNS"), "{narrow:#?}");
    }

    #[test]
    fn long_names_are_shortened_before_numbers() {
        let answer = json!({ "mappings": [counters(&"x".repeat(128), 1)], "draining": [] });
        let view = seen(&answer, &answer, SortKey::RateIn);
        let lines = fitted(&view, Fit { width: 60, height: 5, sort: SortKey::RateIn });
        assert!(lines[0].ends_with("BYTES/S IN  ERRORS") && lines[1].contains("x~  0"), "{lines:#?}");
    }
}
