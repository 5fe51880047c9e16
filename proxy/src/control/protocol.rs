//! The control protocol: one JSON object per line, requests one way and as many answers the other.
//! It is described in `docs/control.md`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::engine::change::{ChangeError, Changed};
use crate::engine::registry::{Registry, Served};
use crate::mapping::name::Name;
use crate::mapping::wire::WireMapping;
use crate::state::stats::{FailureKind, Stats};

/// The version spoken here.
pub const VERSION: u32 = 1;

/// The longest request, in bytes: some ten thousand mappings in one `apply`.
pub const LONGEST_LINE: usize = 4 * 1024 * 1024;

/// A request, as one line holds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object with v and do")]
pub struct Envelope {
    /// The version of the protocol that it is written in.
    pub v: u32,
    /// Comes back in the answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// What is asked for.
    #[serde(rename = "do")]
    pub request: Request,
}

/// What can be asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// The mappings.
    List,
    /// Their counters.
    Stats,
    /// Serve more mappings, or none of them.
    Add {
        /// The mappings.
        mappings: Vec<WireMapping>,
    },
    /// Serve a mapping no more.
    Remove {
        /// Its name.
        name: String,
    },
    /// Let new clients of a mapping go elsewhere.
    Retarget {
        /// Its name.
        name: String,
        /// The address and ports of the new backend; for a range the first port will do.
        to: String,
    },
    /// Serve exactly these mappings.
    Apply {
        /// The mappings.
        mappings: Vec<WireMapping>,
    },
    /// Take no new clients, let those that are there finish, and end the process.
    Drain,
}

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What is wrong, for programs.
    pub kind: &'static str,
    /// What is wrong, for people.
    pub message: String,
}

impl Refusal {
    /// The request makes no sense.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self { kind: "bad_request", message: message.into() }
    }
}

impl From<ChangeError> for Refusal {
    fn from(error: ChangeError) -> Self {
        let kind = match error {
            ChangeError::Unknown(_) => "unknown_name",
            ChangeError::NameTaken(_) => "name_taken",
            ChangeError::Overlap(_) | ChangeError::StillBound { .. } => "overlap",
            ChangeError::Loop { .. } => "loop",
            ChangeError::Bind { .. } => "bind",
            ChangeError::Mapping { .. } => "bad_request",
            ChangeError::Watch { .. } => "failed",
        };
        Self { kind, message: error.to_string() }
    }
}

/// Reads a request; gives its number, which an answer to a wrong one has too.
///
/// # Errors
/// [`Refusal`]
pub fn decode(line: &[u8]) -> (Option<u64>, Result<Request, Refusal>) {
    /// What can be read of any version.
    #[derive(Deserialize)]
    #[serde(expecting = "an object with v and do")]
    struct Any {
        v: Option<u32>,
        id: Option<u64>,
    }
    let any: Any = match serde_json::from_slice(line) {
        Ok(any) => any,
        Err(error) => return (None, Err(Refusal::bad_request(format!("not a request: {error}")))),
    };
    let request = match any.v {
        Some(VERSION) => serde_json::from_slice::<Envelope>(line)
            .map(|envelope| envelope.request)
            .map_err(|error| Refusal::bad_request(format!("not a request: {error}"))),
        _ => Err(Refusal { kind: "version", message: format!("this rproxy speaks version {VERSION}") }),
    };
    (any.id, request)
}

/// Writes a request, as a line without its end.
pub fn encode(request: Request) -> String {
    let envelope = Envelope { v: VERSION, id: None, request };
    serde_json::to_string(&envelope).expect("a request has no keys but strings")
}

/// Writes an answer, as a line without its end.
pub fn answer(id: Option<u64>, result: Result<Value, Refusal>) -> String {
    let mut answer = Map::new();
    answer.insert("v".into(), VERSION.into());
    answer.extend(id.map(|id| ("id".into(), id.into())));
    match result {
        Ok(value) => answer.insert("ok".into(), value),
        Err(Refusal { kind, message }) => {
            answer.insert("error".into(), json!({ "kind": kind, "message": message }))
        }
    };
    Value::Object(answer).to_string()
}

/// The answer to a change.
pub fn changed(changed: Changed) -> Value {
    let Changed { added, changed, removed, unchanged } = changed;
    json!({ "added": added, "changed": changed, "removed": removed, "unchanged": unchanged })
}

/// Some of the mappings, as [`list`] shows them.
pub fn show(registry: &Registry, names: &[Name]) -> Value {
    names.iter().filter_map(|name| registry.get(name)).map(shown).collect()
}

fn shown(served: &Served) -> Value {
    let mut mapping = serde_json::to_value(WireMapping::of(served.mapping())).unwrap_or_default();
    mapping["name"] = served.mapping().name().to_string().into();
    mapping["bound"] = served.bound_ports().into();
    if let Some(host) = served.bound_host() {
        mapping["bound_host"] = host.into();
    }
    mapping
}

/// The answer to [`Request::List`].
pub fn list(registry: &Registry) -> Value {
    let mappings: Vec<Value> = registry.iter().map(|(_name, served)| shown(served)).collect();
    let draining = |(name, stats): (&Name, &Stats)| json!({ "name": name.as_str(), "connections": stats.connections.get(), "flows": stats.flows.get() });
    let draining: Vec<Value> = registry.draining().map(draining).collect();
    json!({ "mappings": mappings, "draining": draining })
}

/// The answer to [`Request::Stats`].
pub fn stats(registry: &Registry) -> Value {
    let served = registry.iter().map(|(name, served)| counters(name.as_str(), served.stats()));
    let mappings: Vec<Value> = served.collect();
    let draining = registry.draining().map(|(name, stats)| counters(name.as_str(), stats));
    let draining: Vec<Value> = draining.collect();
    json!({ "mappings": mappings, "draining": draining })
}

fn counters(name: &str, stats: &Stats) -> Value {
    let errors = FailureKind::ALL
        .into_iter()
        .map(|failure_kind| (failure_kind.as_str(), stats.failure_kind(failure_kind)));
    let errors: Map<String, Value> =
        errors.filter(|(_, count)| *count > 0).map(|(kind, count)| (kind.into(), count.into())).collect();
    json!({
        "name": name,
        "connections": stats.connections.get(),
        "connections_total": stats.connections_total.get(),
        "flows": stats.flows.get(),
        "flows_total": stats.flows_total.get(),
        "bytes_in": stats.bytes_in.get(),
        "bytes_out": stats.bytes_out.get(),
        "datagrams_in": stats.datagrams_in.get(),
        "datagrams_out": stats.datagrams_out.get(),
        "errors": errors,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn requests_are_read() {
        let (id, request) = decode(br#"{"v":1,"id":7,"do":"list"}"#);
        assert_eq!((id, request), (Some(7), Ok(Request::List)));
        let (_, request) = decode(br#"{"v":1,"do":{"remove":{"name":"web"}}}"#);
        assert_eq!(request, Ok(Request::Remove { name: "web".into() }));
    }

    #[test]
    fn wrong_requests_are_refused_with_their_number() {
        for (line, kind, part) in [
            ("", "bad_request", "EOF"),
            ("[]", "bad_request", "not a request: invalid length 0, expected an object with v and do"),
            (
                r#"{"v":1,"do":{"add":{"mappings":[5]}}}"#,
                "bad_request",
                "expected an object that describes a mapping",
            ),
            (r#"{"id":7}"#, "version", "speaks version 1"),
            (r#"{"v":2,"id":7,"do":{"fly":{}}}"#, "version", "speaks version 1"),
            (r#"{"v":1,"id":7,"do":"fly"}"#, "bad_request", "unknown variant `fly`"),
            (r#"{"v":1,"id":7,"do":"list","more":1}"#, "bad_request", "unknown field `more`"),
            (
                r#"{"v":1,"id":7,"do":{"remove":{"name":"web","now":true}}}"#,
                "bad_request",
                "unknown field `now`",
            ),
        ] {
            let (id, request) = decode(line.as_bytes());
            let refusal = request.expect_err(line);
            assert_eq!(refusal.kind, kind, "{line}");
            assert!(refusal.message.contains(part), "{line}: {}", refusal.message);
            assert_eq!(id, line.contains('7').then_some(7), "{line}");
        }
    }

    fn any_request() -> impl Strategy<Value = Request> {
        let mapping = (proptest::option::of(".*"), ".*", ".*", any::<bool>()).prop_map(
            |(name, to, to_ports, v6only)| WireMapping {
                name,
                to,
                to_ports,
                v6only,
                ..WireMapping::default()
            },
        );
        let mappings = proptest::collection::vec(mapping, 0..4);
        prop_oneof![
            Just(Request::List),
            Just(Request::Drain),
            mappings.clone().prop_map(|mappings| Request::Add { mappings }),
            mappings.prop_map(|mappings| Request::Apply { mappings }),
            (".*", ".*").prop_map(|(name, to)| Request::Retarget { name, to }),
        ]
    }

    proptest! {
        #[test]
        fn a_request_survives_the_line(request in any_request()) {
            let line = encode(request.clone());
            prop_assert!(!line.contains('\n'));
            prop_assert_eq!(decode(line.as_bytes()).1, Ok(request));
        }

        #[test]
        fn no_line_does_harm(line in proptest::collection::vec(any::<u8>(), 0..200)) {
            let (_id, request) = decode(&line);
            prop_assert!(request.is_err());
        }

        #[test]
        fn no_damage_to_a_request_does_harm(
            request in any_request(), at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<bool>(),
        ) {
            let mut line = encode(request).into_bytes();
            let at = at.index(line.len());
            if cut { line.truncate(at) } else { line[at] = byte }
            if let (_id, Ok(Request::Add { mappings } | Request::Apply { mappings })) = decode(&line) {
                mappings.iter().for_each(|mapping| drop(mapping.read()));
            }
        }
    }
}
