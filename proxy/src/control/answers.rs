//! The contents of the responses of the control protocol, written by the server and read by `rproxy ctl`.
//!
//! Keys are defined only here. Readers ignore unknown keys, because a newer server may send more.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rproxy_mapping::addr::Protocol;
use rproxy_mapping::name::Name;
use rproxy_mapping::wire::WireMapping;
use serde::{Deserialize, Serialize};

use crate::engine::Server;
use crate::engine::change::Changed;
use crate::engine::registry::{Registry, Served};
use crate::names::Names;
use crate::state::record::{Record, RecordedPort, Traffic};
use crate::state::stats::{FailureKind, Stats};

/// The most warnings of a response, each of which may be long.
const MOST_WARNINGS: usize = 20;

/// The result of a request. The request determines the variant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Response {
    /// The result of `list`.
    List(List),
    /// The result of `stats`.
    Stats(StatsList),
    /// The result of `add`.
    Added(Added),
    /// The result of other changes.
    Changed(ChangeCounts),
    /// The result of `connections`.
    Connections(ConnectionList),
    /// The result of `cut`.
    Cut(CutCounts),
    /// The result of `drain`.
    Drain {},
}

/// The mappings. `M` is the part of each that a reader needs; the server writes all of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct List<M = WireMapping> {
    /// The served mappings, by name.
    pub mappings: Vec<BoundMapping<M>>,
    /// Removed mappings whose connections or flows continue.
    pub draining: Vec<Draining>,
}

/// A served mapping, and where it listens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoundMapping<M = WireMapping> {
    /// Where it is from, if it is an attached port. First, as a `WireMapping` would take these members.
    #[serde(flatten)]
    pub origin: Origin,
    /// The mapping as requested, with its name.
    #[serde(flatten)]
    pub mapping: M,
    /// The addresses that the name of the backend stands for, if it has a name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resolved: Option<Vec<String>>,
    /// Why that is nothing, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unresolved: Option<String>,
    /// Why the last look-up of that name has failed, if it has. It keeps the addresses of the last one that has not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lookup_error: Option<String>,
    /// The bound host ports: `49160,50001-50003`.
    pub bound: String,
    /// The bound addresses, if they differ from the requested one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bound_host: Option<String>,
}

/// The origin of what is served. Mappings that were requested have none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// [`DOCKER`] for a port that a container runtime's process has attached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<String>,
    /// The id of that process, unless it is in another process namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub process: Option<u32>,
}

/// The origin of attached ports.
pub const DOCKER: &str = "docker";

/// A mapping that drains.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Draining {
    /// Its former name.
    pub name: String,
    /// Its current TCP connections.
    pub connections: u64,
    /// Its current UDP flows.
    pub flows: u64,
}

/// The counters of all mappings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatsList {
    /// Those of the served mappings, by name.
    pub mappings: Vec<MappingStats>,
    /// Those of removed mappings whose connections or flows continue.
    pub draining: Vec<MappingStats>,
}

/// The counters of a mapping; see [`Stats`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "they are those of `Stats`")]
pub struct MappingStats {
    pub name: String,
    #[serde(flatten)]
    pub origin: Origin,
    pub connections: u64,
    pub connections_total: u64,
    pub flows: u64,
    pub flows_total: u64,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub datagrams_in: u64,
    pub datagrams_out: u64,
    /// The errors that are not 0, by [`FailureKind::as_str`].
    pub errors: BTreeMap<String, u64>,
}

/// The connections and flows that are live.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionList {
    /// The chosen ones, at most as many as asked for, the oldest first.
    pub connections: Vec<Connection>,
    /// How many were chosen.
    pub total: usize,
}

/// A TCP connection, or a UDP flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// Its number, which no other one of the process gets.
    pub id: u64,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// The name of its mapping.
    pub mapping: String,
    /// The client: an address and a port, or the process that has connected to a Unix socket; with `accept_proxy` whom the
    /// proxy has told.
    pub client: String,
    /// The address that the client has connected or sent to, or the Unix socket.
    pub host: String,
    /// The backend: an address and a port, a Unix socket, or a name while that leads nowhere.
    pub backend: String,
    /// `dialling`, `open`, `closed_by_client` or `closed_by_backend` (half-closed), or `closing`.
    pub state: String,
    /// Whether bytes of a connection are spliced; missing for flows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spliced: Option<bool>,
    /// For how long it exists.
    pub age_ms: u64,
    /// How long nothing was relayed.
    pub idle_ms: u64,
    /// Bytes that the backend accepted.
    pub bytes_in: u64,
    /// Bytes to the client.
    pub bytes_out: u64,
    /// Datagrams to the backend of a flow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datagrams_in: Option<u64>,
    /// Datagrams to the client of a flow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datagrams_out: Option<u64>,
}

/// How many connections and flows were cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CutCounts {
    /// Their number.
    pub cut: usize,
}

/// The result of adding mappings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Added<M = WireMapping> {
    /// The number of mappings.
    #[serde(flatten)]
    pub counts: ChangeCounts,
    /// The added mappings, in the order of the request.
    pub mappings: Vec<BoundMapping<M>>,
}

/// The numbers of mappings that a change affected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeCounts {
    /// Mappings that were added.
    pub added: usize,
    /// Mappings with another backend or other limits.
    pub changed: usize,
    /// Mappings that were removed.
    pub removed: usize,
    /// Mappings that were not touched.
    pub unchanged: usize,
    /// Why clients of mappings that it was about are refused for now.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

impl List {
    /// The mappings of `registry`, and `names` of their backends.
    pub(crate) fn of(registry: &Registry, names: &Names) -> Self {
        Self {
            mappings: registry.iter().map(|(_name, served)| BoundMapping::of(served, names)).collect(),
            draining: registry.draining().map(|(name, stats)| Draining::of(name, stats)).collect(),
        }
    }
}

impl BoundMapping {
    fn of(served: &Served, names: &Names) -> Self {
        let mapping = served.mapping();
        Self {
            mapping: WireMapping { name: Some(mapping.name().to_string()), ..WireMapping::of(mapping) },
            resolved: served.resolved(),
            unresolved: served.unresolved().map(|why| why.to_string()),
            lookup_error: names.failure_of(mapping).map(str::to_owned),
            bound: served.bound_ports(),
            bound_host: served.bound_host(),
            origin: Origin::of(served),
        }
    }
}

impl Origin {
    fn of(served: &Served) -> Self {
        let process = served.process();
        Self {
            origin: process.map(|_attached| DOCKER.to_owned()),
            process: process.filter(|number| *number != 0),
        }
    }
}

impl Draining {
    fn of(name: &Name, stats: &Stats) -> Self {
        let (connections, flows) = (stats.connections.get(), stats.flows.get());
        Self { name: name.to_string(), connections, flows }
    }
}

impl StatsList {
    /// The counters of the mappings of `registry`.
    pub fn of(registry: &Registry) -> Self {
        let served =
            registry.iter().map(|(name, served)| MappingStats::of(name, served.stats(), Origin::of(served)));
        let draining = registry.draining();
        let draining = draining.map(|(name, stats)| MappingStats::of(name, stats, Origin::default()));
        Self { mappings: served.collect(), draining: draining.collect() }
    }
}

impl MappingStats {
    fn of(name: &Name, stats: &Stats, origin: Origin) -> Self {
        let errors = FailureKind::ALL.into_iter().map(|kind| (kind.as_str(), stats.failure_kind(kind)));
        let errors = errors.filter(|(_kind, count)| *count > 0);
        Self {
            name: name.to_string(),
            origin,
            connections: stats.connections.get(),
            connections_total: stats.connections_total.get(),
            flows: stats.flows.get(),
            flows_total: stats.flows_total.get(),
            bytes_in: stats.bytes_in(),
            bytes_out: stats.bytes_out(),
            datagrams_in: stats.datagrams_in.get(),
            datagrams_out: stats.datagrams_out.get(),
            errors: errors.map(|(kind, count)| (kind.to_owned(), count)).collect(),
        }
    }
}

impl ConnectionList {
    /// The first `limit` of the `chosen` records.
    pub(crate) fn of(chosen: &[Arc<Record>], limit: usize) -> Self {
        let connections = chosen.iter().take(limit).map(|record| Connection::of(record)).collect();
        Self { connections, total: chosen.len() }
    }
}

impl Connection {
    fn of(record: &Record) -> Self {
        let RecordedPort { mapping, port_mapping, .. } = &record.port;
        let is_tcp = port_mapping.protocol == Protocol::Tcp;
        let milliseconds = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let is_udp = port_mapping.protocol == Protocol::Udp;
        let datagrams = |traffic: &Traffic| is_udp.then(|| traffic.datagrams());
        let Record { to_backend, to_client, .. } = record;
        Self {
            id: record.id,
            protocol: port_mapping.protocol.to_string(),
            mapping: mapping.to_string(),
            client: record.client().to_string(),
            host: record.host.to_string(),
            backend: record.backend_text().to_string(),
            state: record.state().to_owned(),
            spliced: is_tcp.then(|| record.is_spliced()),
            age_ms: milliseconds(record.age()),
            idle_ms: milliseconds(record.idle_time()),
            bytes_in: to_backend.bytes(),
            bytes_out: to_client.bytes(),
            datagrams_in: datagrams(to_backend),
            datagrams_out: datagrams(to_client),
        }
    }
}

impl Added {
    /// The result of `changed`, which has added the mappings called `added` to `server`.
    pub(crate) fn of(changed: Changed, server: &Server, added: &[Name]) -> Self {
        let served = added.iter().filter_map(|name| server.registry().get(name));
        let counts = ChangeCounts::of(changed, server, added);
        Self { counts, mappings: served.map(|served| BoundMapping::of(served, &server.names)).collect() }
    }
}

impl ChangeCounts {
    /// The result of `changed`, which was about the mappings of `server` called `names`.
    pub fn of(changed: Changed, server: &Server, names: &[Name]) -> Self {
        let Changed { added, changed, removed, unchanged } = changed;
        let warning = |name: &Name| Some(format!("{name}: {}", server.problem_of(name)?));
        let mut all = names.iter().filter_map(warning);
        let mut warnings: Vec<String> = all.by_ref().take(MOST_WARNINGS).collect();
        if let more @ 1.. = all.count() {
            warnings.push(format!("{more} more mappings have such problems; the log has them"));
        }
        Self { added, changed, removed, unchanged, warnings }
    }
}

#[cfg(test)]
mod tests {
    use super::super::protocol::{Refusal, RefusalKind, answer};
    use super::*;
    use rproxy_mapping::addr::Protocol;

    fn web() -> BoundMapping {
        let text = r#"{"name":"web","host":"[::]","host_ports":"8000-8010","to":"172.17.0.2","to_ports":"80",
            "proto":"tcp","v6only":true,"limits":{"max_connections":7,"deny":["10.0.0.0/8"]}}"#;
        let mapping = serde_json::from_str(text).unwrap();
        BoundMapping {
            mapping,
            bound: "8003".to_owned(),
            resolved: None,
            unresolved: None,
            lookup_error: None,
            bound_host: None,
            origin: Origin::default(),
        }
    }

    fn counters(name: &str) -> MappingStats {
        let stats = Stats::default();
        for (counter, value) in [
            (&stats.connections, 1),
            (&stats.connections_total, 2),
            (&stats.flows, 3),
            (&stats.flows_total, 4),
            (&stats.tcp_bytes_in, 5),
            (&stats.udp_bytes_out, 6),
            (&stats.datagrams_in, 7),
            (&stats.datagrams_out, 8),
        ] {
            counter.add(value);
        }
        stats.count(FailureKind::Refused);
        stats.count_of(Protocol::Tcp, FailureKind::Denied);
        stats.count_of(Protocol::Udp, FailureKind::Denied);
        MappingStats::of(&name.parse().unwrap(), &stats, Origin::default())
    }

    const COUNTS: ChangeCounts =
        ChangeCounts { added: 1, changed: 2, removed: 3, unchanged: 4, warnings: Vec::new() };

    const WEB: &str = r#"{"bound":"8003","host":"[::]","host_ports":"8000-8010","limits":{"deny":["10.0.0.0/8"],"max_connections":7},"name":"web","proto":"tcp","to":"172.17.0.2","to_ports":"80","v6only":true}"#;

    const COUNTERS: &str = r#""bytes_in":5,"bytes_out":6,"connections":1,"connections_total":2,"datagrams_in":7,"datagrams_out":8,"errors":{"connect_refused":1,"denied":2},"flows":3,"flows_total":4,"name""#;

    #[track_caller]
    fn assert_written(response: impl Into<Option<Response>>, expected: &str) {
        let refusal = Refusal::new(RefusalKind::UnknownName, "no \"web\"");
        assert_eq!(answer(Some(7), response.into().ok_or(refusal)), expected);
    }

    #[test]
    fn answers_are_written_as_the_protocol_has_them() {
        let draining = Draining { name: "old".to_owned(), connections: 2, flows: 1 };
        let elsewhere = BoundMapping { bound_host: Some("127.0.0.1".to_owned()), ..web() };
        let attached = |process| Origin { origin: Some(DOCKER.to_owned()), process };
        let one_attached = BoundMapping { origin: attached(Some(4711)), ..web() };
        let list = List { mappings: vec![web(), elsewhere, one_attached], draining: vec![draining] };
        let elsewhere = WEB.replace(r#""host":"#, r#""bound_host":"127.0.0.1","host":"#);
        let attached_web = WEB.replace(r#","proto""#, r#","origin":"docker","process":4711,"proto""#);
        let draining = r#"[{"connections":2,"flows":1,"name":"old"}]"#;
        assert_written(
            Response::List(list),
            &format!(
                r#"{{"id":7,"ok":{{"draining":{draining},"mappings":[{WEB},{elsewhere},{attached_web}]}},"v":1}}"#
            ),
        );
        let of_another_namespace = MappingStats { origin: attached(None), ..counters("p") };
        let mappings = vec![counters("web"), of_another_namespace];
        let stats = StatsList { mappings, draining: vec![counters("old")] };
        assert_written(
            Response::Stats(stats),
            &format!(
                r#"{{"id":7,"ok":{{"draining":[{{{COUNTERS}:"old"}}],"mappings":[{{{COUNTERS}:"web"}},{{{COUNTERS}:"p","origin":"docker"}}]}},"v":1}}"#
            ),
        );
        assert_written(
            Response::Added(Added { counts: COUNTS, mappings: vec![web()] }),
            &format!(
                r#"{{"id":7,"ok":{{"added":1,"changed":2,"mappings":[{WEB}],"removed":3,"unchanged":4}},"v":1}}"#
            ),
        );
        assert_written(
            Response::Changed(COUNTS),
            r#"{"id":7,"ok":{"added":1,"changed":2,"removed":3,"unchanged":4},"v":1}"#,
        );
        assert_written(Response::Drain {}, r#"{"id":7,"ok":{},"v":1}"#);
        assert_written(None, r#"{"error":{"kind":"unknown_name","message":"no \"web\""},"id":7,"v":1}"#);
        assert_eq!(answer(None, Ok(Response::Drain {})), r#"{"ok":{},"v":1}"#);
    }

    #[test]
    fn kinds_of_refusals_are_those_of_the_documentation() {
        for (kind, text) in [
            (RefusalKind::BadRequest, "bad_request"),
            (RefusalKind::Version, "version"),
            (RefusalKind::UnknownName, "unknown_name"),
            (RefusalKind::NameTaken, "name_taken"),
            (RefusalKind::Attached, "attached"),
            (RefusalKind::Overlap, "overlap"),
            (RefusalKind::Loop, "loop"),
            (RefusalKind::Bind, "bind"),
            (RefusalKind::Denied, "denied"),
            (RefusalKind::Busy, "busy"),
            (RefusalKind::Failed, "failed"),
        ] {
            assert_eq!(serde_json::to_value(kind).unwrap(), text);
            assert_eq!(serde_json::from_value::<RefusalKind>(text.into()).unwrap(), kind);
        }
        assert_eq!(serde_json::from_str::<RefusalKind>("\"tired\"").unwrap(), RefusalKind::Other);
    }
}
