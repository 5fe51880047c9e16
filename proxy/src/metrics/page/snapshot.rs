//! What viewers know, and what has changed since.

use std::collections::HashMap;
use std::process;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde::Serialize;

use crate::control::answers::{MappingStats, StatsList};
use crate::metrics::status::{Description, ProcessStatus, Status};

/// The mappings and the process at one moment, as viewers know them.
#[derive(Debug)]
pub(super) struct Snapshot {
    time_ms: u64,
    process: Arc<Process>,
    status: ProcessStatus,
    stats: StatsList,
    /// In the order of the mappings in `stats`.
    descriptions: Arc<[Description]>,
    revision: u64,
}

/// The process, which does not change.
#[derive(Debug, Serialize)]
pub(super) struct Process {
    /// The version of the program.
    version: &'static str,
    /// The process id.
    pid: u32,
    /// When it started to serve, in milliseconds since 1970.
    started_ms: u64,
}

/// The contents of an event.
#[derive(Serialize)]
struct Event<'a> {
    /// When this was so, in milliseconds since 1970.
    time_ms: u64,
    process: ProcessRow<'a>,
    /// Mappings that are new or different.
    mappings: Vec<Row<'a>>,
    /// All mappings that drain.
    draining: &'a [MappingStats],
    /// The names of mappings that are gone.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    removed: Vec<&'a str>,
}

/// The process in an event.
#[derive(Serialize)]
struct ProcessRow<'a> {
    #[serde(flatten)]
    process: &'a Process,
    #[serde(flatten)]
    status: &'a ProcessStatus,
}

/// A mapping in an event.
#[derive(Serialize)]
struct Row<'a> {
    #[serde(flatten)]
    stats: &'a MappingStats,
    /// Missing if it has not changed.
    #[serde(flatten)]
    description: Option<&'a Description>,
}

impl Process {
    /// This process, which starts to serve now.
    pub(super) fn starting() -> Self {
        Self { version: env!("CARGO_PKG_VERSION"), pid: process::id(), started_ms: now_ms() }
    }
}

impl Snapshot {
    /// What `status` says about the mappings of `process`.
    pub(super) fn first(process: Arc<Process>, status: Status) -> Self {
        Self::new(process, status, Arc::default())
    }

    /// What `status` says, which may leave out descriptions that are known already.
    pub(super) fn next(&self, status: Status) -> Self {
        Self::new(self.process.clone(), status, self.descriptions.clone())
    }

    fn new(process: Arc<Process>, status: Status, known: Arc<[Description]>) -> Self {
        let Status { stats, descriptions, revision, process: status } = status;
        let descriptions = descriptions.map_or(known, Into::into);
        Self { time_ms: now_ms(), process, status, stats, descriptions, revision }
    }

    /// The revision of the registry whose descriptions are known.
    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    /// An event with everything.
    pub(super) fn state(&self) -> Bytes {
        let rows = self.mappings().map(|(stats, description)| Row { stats, description: Some(description) });
        encode("state", &self.event(rows.collect(), Vec::new()))
    }

    /// An event with what has changed since `before`.
    pub(super) fn changes_since(&self, before: &Self) -> Bytes {
        let mut known: HashMap<&str, (&MappingStats, &Description)> = before
            .mappings()
            .map(|(stats, description)| (stats.name.as_str(), (stats, description)))
            .collect();
        let mut changed = Vec::new();
        for (stats, description) in self.mappings() {
            let known = known.remove(stats.name.as_str());
            if known != Some((stats, description)) {
                let is_known = known.is_some_and(|(_stats, known)| known == description);
                changed.push(Row { stats, description: (!is_known).then_some(description) });
            }
        }
        encode("changes", &self.event(changed, known.into_keys().collect()))
    }

    fn mappings(&self) -> impl Iterator<Item = (&MappingStats, &Description)> {
        self.stats.mappings.iter().zip(self.descriptions.iter())
    }

    fn event<'a>(&'a self, mappings: Vec<Row<'a>>, removed: Vec<&'a str>) -> Event<'a> {
        let Self { time_ms, process, status, stats, .. } = self;
        let process = ProcessRow { process, status };
        Event { time_ms: *time_ms, process, mappings, draining: &stats.draining, removed }
    }
}

/// The last event of a stream.
pub(super) fn end(reason: &'static str) -> Bytes {
    #[derive(Serialize)]
    struct End {
        reason: &'static str,
    }

    encode("end", &End { reason })
}

/// The current time, in milliseconds since 1970.
fn now_ms() -> u64 {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// An event, as the stream has it. JSON has no line breaks.
fn encode(kind: &str, contents: &impl Serialize) -> Bytes {
    let mut event = format!("event: {kind}\ndata: ").into_bytes();
    serde_json::to_writer(&mut event, contents).expect("an event has no keys but strings");
    event.extend_from_slice(b"\n\n");
    event.into()
}

#[cfg(test)]
mod tests {
    use rproxy_mapping::wire::WireMapping;
    use serde_json::{Value, json};

    use super::*;

    fn stats(name: &str, connections: u64) -> MappingStats {
        let stats = json!({
            "name": name, "connections": connections, "connections_total": 1, "flows": 0, "flows_total": 0,
            "bytes_in": 1, "bytes_out": 2, "datagrams_in": 0, "datagrams_out": 0, "errors": {},
        });
        serde_json::from_value(stats).unwrap()
    }

    fn description(backend: &str) -> Description {
        let limits = WireMapping::default().limits;
        let text = |text: &str| text.to_owned();
        Description {
            host: text("[::]"),
            ports: text("80"),
            protocol: text("tcp"),
            backend: text(backend),
            limits,
        }
    }

    /// Mappings of these names, connections and, unless they are known, backends.
    fn status(revision: u64, mappings: &[(&str, u64)], backends: Option<&[&str]>) -> Status {
        let mappings = mappings.iter().map(|(name, connections)| stats(name, *connections)).collect();
        let descriptions =
            backends.map(|backends| backends.iter().map(|backend| description(backend)).collect());
        Status {
            stats: StatsList { mappings, draining: vec![stats("old", 3)] },
            descriptions,
            revision,
            process: ProcessStatus::default(),
        }
    }

    /// The kind and the contents of an event.
    fn read(event: &Bytes) -> (String, Value) {
        let text = std::str::from_utf8(event).unwrap().strip_suffix("\n\n").unwrap();
        let (kind, data) = text.split_once('\n').unwrap();
        assert!(!data.contains('\n'));
        let data = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
        (kind.strip_prefix("event: ").unwrap().to_owned(), data)
    }

    #[test]
    fn the_first_event_has_everything() {
        let process = Arc::new(Process::starting());
        let snapshot = Snapshot::first(process, status(1, &[("a", 0), ("b", 1)], Some(&["x:1", "y:1"])));
        let (kind, event) = read(&snapshot.state());
        assert_eq!(kind, "state");
        assert_eq!(event["process"]["pid"], process::id());
        let mappings = event["mappings"].as_array().unwrap();
        let of = |key: &str| mappings.iter().map(|mapping| mapping[key].clone()).collect::<Vec<_>>();
        assert_eq!(of("name"), ["a", "b"]);
        assert_eq!(of("connections"), [0, 1]);
        assert_eq!(of("backend"), ["x:1", "y:1"]);
        assert_eq!(of("limits"), [json!({}), json!({})], "limits that are gone have to be forgotten");
        assert_eq!(event["draining"][0]["name"], "old");
        assert_eq!(event.get("removed"), None);
    }

    #[test]
    fn later_events_have_what_has_changed() {
        let first = Snapshot::first(
            Arc::new(Process::starting()),
            status(1, &[("a", 0), ("b", 0), ("c", 0), ("d", 0)], Some(&["w:1", "x:1", "y:1", "z:1"])),
        );
        let second = first.next(status(1, &[("a", 0), ("b", 7), ("c", 0), ("d", 0)], None));
        let (kind, event) = read(&second.changes_since(&first));
        assert_eq!((kind.as_str(), event["mappings"].as_array().unwrap().len()), ("changes", 1));
        assert_eq!(event["mappings"][0]["connections"], 7);
        assert_eq!(event["mappings"][0].get("backend"), None, "it is known");
        let third = second.next(status(
            2,
            &[("a", 0), ("b", 7), ("c", 0), ("e", 0)],
            Some(&["w:1", "x:2", "y:1", "z:1"]),
        ));
        let (_kind, event) = read(&third.changes_since(&second));
        let changed = event["mappings"].as_array().unwrap().iter();
        let changed: Vec<_> = changed.map(|row| (row["name"].clone(), row["backend"].clone())).collect();
        assert_eq!(changed, [(json!("b"), json!("x:2")), (json!("e"), json!("z:1"))]);
        assert_eq!(event["removed"], json!(["d"]));
        assert_eq!(third.revision(), 2);
    }
}
