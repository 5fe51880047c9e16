//! The counters that `rproxy ctl stats` shows: of which mappings, in which order, and how fast they grow.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;

use super::{CtlError, result};
use crate::cli::ctl::{SortKey, StatsArgs};
use crate::control::answers::{MappingStats, StatsList};
use crate::control::chosen::NamePattern;

/// The counters of a mapping.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) stats: MappingStats,
    pub(super) is_draining: bool,
    /// How fast they grow; `None` if they were not seen before, or began anew.
    pub(super) rates: Option<Rates>,
    /// As the server sent them, with members that only a newer server has.
    raw: Value,
}

/// How much counters grow, per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Rates {
    pub(super) connections: f64,
    pub(super) flows: f64,
    pub(super) bytes_in: f64,
    pub(super) bytes_out: f64,
    pub(super) datagrams_in: f64,
    pub(super) datagrams_out: f64,
}

impl Rates {
    /// Those between two looks, unless a counter went backwards: then it is another mapping or process.
    fn between(old: &MappingStats, new: &MappingStats, elapsed: Duration) -> Option<Self> {
        let rate = |counter: fn(&MappingStats) -> u64| {
            let grown = counter(new).checked_sub(counter(old))?;
            (!elapsed.is_zero()).then(|| per_second(grown, elapsed))
        };
        Some(Self {
            connections: rate(|stats| stats.connections_total)?,
            flows: rate(|stats| stats.flows_total)?,
            bytes_in: rate(|stats| stats.bytes_in)?,
            bytes_out: rate(|stats| stats.bytes_out)?,
            datagrams_in: rate(|stats| stats.datagrams_in)?,
            datagrams_out: rate(|stats| stats.datagrams_out)?,
        })
    }
}

#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
fn per_second(count: u64, elapsed: Duration) -> f64 {
    count as f64 / elapsed.as_secs_f64()
}

/// The answer to a request for counters.
#[derive(Debug)]
pub(super) struct Look {
    /// When it had arrived. The server reads the counters last, so this is closer to them than when it was asked.
    pub(super) at: Instant,
    pub(super) answer: Value,
}

/// The counters of the last look, for the rates.
#[derive(Debug, Default)]
pub(super) struct History {
    last: Option<(Instant, HashMap<Identity, Option<MappingStats>>)>,
}

/// What identifies a mapping from look to look: its name, and whether it drains.
type Identity = (String, bool);

impl History {
    /// Forgets what was seen: the counters of another process follow.
    pub(super) fn clear(&mut self) {
        self.last = None;
    }

    /// Adds the rates to `rows`, and keeps their counters. Returns the time since the last look.
    fn extend(&mut self, at: Instant, rows: &mut [Row]) -> Option<Duration> {
        let mut seen = HashMap::with_capacity(rows.len());
        for row in &*rows {
            let identity = (row.stats.name.clone(), row.is_draining);
            // Several may drain that had the same name. Which is which is unknown.
            seen.entry(identity).and_modify(|entry| *entry = None).or_insert_with(|| Some(row.stats.clone()));
        }
        let elapsed = self.last.take().map(|(then, before)| {
            let elapsed = at.saturating_duration_since(then);
            for row in rows {
                let identity = (row.stats.name.clone(), row.is_draining);
                if let (Some(Some(old)), Some(Some(new))) = (before.get(&identity), seen.get(&identity)) {
                    row.rates = Rates::between(old, new, elapsed);
                }
            }
            elapsed
        });
        self.last = Some((at, seen));
        elapsed
    }
}

/// What is shown of a look.
#[derive(Debug)]
pub(super) struct View {
    pub(super) rows: Vec<Row>,
    /// The time since the last look.
    elapsed: Option<Duration>,
    /// The answer without its counters.
    rest: Value,
}

impl View {
    /// What `args` select of a look. `history` gets all of it.
    pub(super) fn of(look: Look, args: &StatsArgs, history: &mut History) -> Result<Self, CtlError> {
        let Look { at, answer: mut rest } = look;
        let StatsList { mappings, draining } = result(rest.clone())?;
        let mut rows = Vec::with_capacity(mappings.len() + draining.len());
        for (key, all) in [(MAPPINGS, mappings), (DRAINING, draining)] {
            let raw = rest[key].as_array_mut().map(std::mem::take).unwrap_or_default();
            let is_draining = key == DRAINING;
            rows.extend(all.into_iter().zip(raw).map(|(stats, raw)| Row {
                stats,
                is_draining,
                rates: None,
                raw,
            }));
        }
        let elapsed = history.extend(at, &mut rows);
        if !args.mapping.is_empty() {
            rows.retain(|row| args.mapping.iter().any(|pattern| pattern.matches(&row.stats.name)));
        }
        rows.sort_by(|a, b| order(args.sort, a, b));
        Ok(Self { rows, elapsed, rest })
    }

    /// A pattern of which there is no mapping. One with a `*` may be awaited by looking again and again.
    pub(super) fn missing<'a>(&self, args: &'a StatsArgs) -> Option<&'a NamePattern> {
        let mut awaited =
            args.mapping.iter().filter(|pattern| args.watch.is_none() || pattern.exact().is_some());
        awaited.find(|pattern| !self.rows.iter().any(|row| pattern.matches(&row.stats.name)))
    }

    /// As the server answers. If it is looked at repeatedly, with the rates of each mapping and the time that they
    /// are from.
    pub(super) fn into_json(self, is_repeated: bool) -> Value {
        let mut answer = self.rest;
        if is_repeated {
            let elapsed = self.elapsed.map(|elapsed| u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX));
            answer["elapsed_ms"] = elapsed.into();
        }
        for Row { is_draining, rates, mut raw, .. } in self.rows {
            if is_repeated {
                raw["rates"] = serde_json::to_value(rates).unwrap_or_default();
            }
            if let Some(all) = answer[if is_draining { DRAINING } else { MAPPINGS }].as_array_mut() {
                all.push(raw);
            }
        }
        answer
    }
}

const MAPPINGS: &str = "mappings";
const DRAINING: &str = "draining";

/// Largest numbers first, those without a rate last; equal ones by name. By name, those that drain come last.
fn order(key: SortKey, a: &Row, b: &Row) -> Ordering {
    let by_name = a.stats.name.cmp(&b.stats.name);
    let by_state = a.is_draining.cmp(&b.is_draining);
    match key {
        SortKey::Name => by_state.then(by_name),
        _ => number(key, b).total_cmp(&number(key, a)).then(by_name).then(by_state),
    }
}

/// What a mapping is sorted by.
#[expect(clippy::cast_precision_loss, reason = "it is compared with others, not shown")]
fn number(key: SortKey, Row { stats, rates, .. }: &Row) -> f64 {
    let rate = |rate: fn(&Rates) -> f64| rates.as_ref().map_or(-1.0, rate);
    let count = match key {
        SortKey::Name => 0,
        SortKey::Connections => stats.connections,
        SortKey::ConnectionsTotal => stats.connections_total,
        SortKey::Flows => stats.flows,
        SortKey::FlowsTotal => stats.flows_total,
        SortKey::BytesIn => stats.bytes_in,
        SortKey::BytesOut => stats.bytes_out,
        SortKey::DatagramsIn => stats.datagrams_in,
        SortKey::DatagramsOut => stats.datagrams_out,
        SortKey::Errors => stats.errors.values().fold(0, |sum: u64, count| sum.saturating_add(*count)),
        SortKey::RateConnections => return rate(|rates| rates.connections),
        SortKey::RateFlows => return rate(|rates| rates.flows),
        SortKey::RateIn => return rate(|rates| rates.bytes_in),
        SortKey::RateOut => return rate(|rates| rates.bytes_out),
        SortKey::RateDatagramsIn => return rate(|rates| rates.datagrams_in),
        SortKey::RateDatagramsOut => return rate(|rates| rates.datagrams_out),
    };
    count as f64
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn counters(name: &str, count: u64) -> Value {
        json!({
            "name": name, "connections": 1, "connections_total": count, "flows": 2, "flows_total": count,
            "bytes_in": count * 1000, "bytes_out": 5, "datagrams_in": count, "datagrams_out": 0,
            "errors": { "denied": count % 7 }, "packets": "unknown",
        })
    }

    /// A look at `second`, at mappings with these counts.
    fn look(start: Instant, second: u64, mappings: &[(&str, u64)], draining: &[(&str, u64)]) -> Look {
        let of = |all: &[(&str, u64)]| -> Vec<Value> {
            all.iter().map(|(name, count)| counters(name, *count)).collect()
        };
        let answer = json!({ "mappings": of(mappings), "draining": of(draining), "weather": "fine" });
        Look { at: start + Duration::from_secs(second), answer }
    }

    fn sorted_by(sort: SortKey, mapping: &[&str]) -> StatsArgs {
        let mapping = mapping.iter().map(|pattern| pattern.parse().unwrap()).collect();
        StatsArgs { watch: None, mapping, sort }
    }

    fn names(view: &View) -> Vec<&str> {
        view.rows.iter().map(|row| row.stats.name.as_str()).collect()
    }

    #[test]
    fn rates_are_those_of_the_time_between_the_looks() {
        let (start, args) = (Instant::now(), sorted_by(SortKey::RateIn, &[]));
        let mut history = History::default();
        let mut see = |look| View::of(look, &args, &mut history).unwrap();
        let first = see(look(start, 0, &[("a", 10), ("b", 100), ("c", 7)], &[]));
        assert!(first.elapsed.is_none() && first.rows.iter().all(|row| row.rates.is_none()));
        // A look that was late. One mapping is new, one is gone, and one began anew.
        let second = see(look(start, 4, &[("a", 18), ("b", 102), ("c", 0), ("new", 50)], &[]));
        assert_eq!(names(&second), ["a", "b", "c", "new"]);
        let rates: Vec<_> = second.rows.iter().map(|row| row.rates.map(|rates| rates.bytes_in)).collect();
        assert_eq!(rates, [Some(2000.0), Some(500.0), None, None]);
        assert_eq!(second.rows[0].rates.unwrap().connections, 2.0);
        let third = see(look(start, 5, &[("a", 18), ("b", 103)], &[]));
        assert_eq!(names(&third), ["b", "a"]);
        assert_eq!(third.rows[0].rates.unwrap().datagrams_in, 1.0);
    }

    #[test]
    fn two_that_drain_under_one_name_are_not_mixed_up() {
        let (start, args) = (Instant::now(), sorted_by(SortKey::Name, &[]));
        let mut history = History::default();
        let mut see = |look| View::of(look, &args, &mut history).unwrap();
        see(look(start, 0, &[("a", 1)], &[("a", 3), ("a", 5), ("b", 1)]));
        let view = see(look(start, 1, &[("a", 2)], &[("a", 5), ("a", 9), ("b", 3)]));
        let rates: Vec<_> = view.rows.iter().map(|row| row.rates.map(|rates| rates.flows)).collect();
        assert_eq!(rates, [Some(1.0), None, None, Some(2.0)]);
    }

    #[test]
    fn a_view_is_sorted_and_has_only_what_was_asked_for() {
        let see = |sort, mapping: &[&str]| {
            let look = look(Instant::now(), 0, &[("a", 8), ("web-1", 9), ("web-2", 20)], &[("a", 9)]);
            let args = sorted_by(sort, mapping);
            let view = View::of(look, &args, &mut History::default()).unwrap();
            let missing = view.missing(&args).map(ToString::to_string);
            (names(&view).join(" "), missing)
        };
        let shown = |sort, mapping: &[&str]| see(sort, mapping).0;
        assert_eq!(shown(SortKey::Name, &[]), "a web-1 web-2 a");
        assert_eq!(shown(SortKey::BytesIn, &[]), "web-2 a web-1 a");
        assert_eq!(shown(SortKey::Errors, &[]), "web-2 a web-1 a");
        assert_eq!(
            shown(SortKey::Connections, &[]),
            "a a web-1 web-2",
            "equal ones are in order of their names"
        );
        assert_eq!(shown(SortKey::Name, &["web*"]), "web-1 web-2");
        assert_eq!(shown(SortKey::FlowsTotal, &["web-1", "a"]), "a web-1 a");
        assert_eq!(see(SortKey::Name, &["a", "nobody"]), ("a a".to_owned(), Some("nobody".to_owned())));
        assert_eq!(see(SortKey::Name, &["a", "x*"]), ("a a".to_owned(), Some("x*".to_owned())));
        assert_eq!(see(SortKey::Name, &["*-1", "web*"]), ("web-1 web-2".to_owned(), None));
    }

    #[test]
    fn what_a_pattern_means_may_come_while_it_is_looked_at_again_and_again() {
        let missing = |pattern: &str| {
            let args = StatsArgs { watch: Some(1), ..sorted_by(SortKey::Name, &[pattern]) };
            let view = View::of(look(Instant::now(), 0, &[("a", 8)], &[]), &args, &mut History::default());
            view.unwrap().missing(&args).is_some()
        };
        assert_eq!(["a", "b", "b*"].map(missing), [false, true, false]);
    }

    #[test]
    fn json_has_what_the_server_sent_and_the_rates() {
        let (start, args) = (Instant::now(), sorted_by(SortKey::BytesIn, &["a", "b"]));
        let mut history = History::default();
        let mut see = |look| View::of(look, &args, &mut history).unwrap().into_json(true);
        let first = see(look(start, 0, &[("a", 1), ("b", 2), ("c", 3)], &[]));
        assert_eq!((&first["elapsed_ms"], &first["mappings"][0]["rates"]), (&Value::Null, &Value::Null));
        let second = see(look(start, 2, &[("a", 1), ("b", 3), ("c", 3)], &[("b", 1)]));
        let mappings = second["mappings"].as_array().unwrap();
        assert_eq!(
            (mappings.len(), &mappings[0]["name"], &second["weather"]),
            (2, &json!("b"), &json!("fine"))
        );
        assert_eq!((&mappings[0]["packets"], &second["elapsed_ms"]), (&json!("unknown"), &json!(2000)));
        assert_eq!(
            (&mappings[0]["rates"]["bytes_in"], &mappings[1]["rates"]["flows"]),
            (&json!(500.0), &json!(0.0))
        );
        assert_eq!(second["draining"][0]["name"], "b");
        // Without --watch, as the server answers.
        let look = look(start, 0, &[("a", 1)], &[]);
        let answer = look.answer.clone();
        assert_eq!(View::of(look, &args, &mut History::default()).unwrap().into_json(false), answer);
    }
}
