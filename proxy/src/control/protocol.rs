//! The control protocol: one JSON object per line, and one response per request. See `docs/control.md`.

use rproxy_mapping::wire::WireMapping;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::answers::Response;
use super::field::wrong_field;
use super::strict::Strict;
use crate::engine::change_error::ChangeError;

/// The version of the protocol.
pub const VERSION: u32 = 1;

/// The maximum length of a request, in bytes: some ten thousand mappings in one `apply`.
pub const LONGEST_LINE: usize = 4 * 1024 * 1024;

/// The maximum length of a response that a client reads, in bytes, including the newline. The longest one
/// that a single configuration can cause is a `list` of the million networks that its `[defaults]` may add to
/// all mappings together, at most 46 bytes each; this limit is more than twice as much.
pub const LONGEST_ANSWER: u64 = 128 * 1024 * 1024;

/// A request, as one line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "an object with v and do")]
pub struct Envelope {
    /// The version of the protocol.
    pub v: u32,
    /// Repeated in the response.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// The request itself.
    #[serde(rename = "do")]
    pub request: Request,
}

/// The requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Return the mappings.
    List,
    /// Return their counters.
    Stats,
    /// Add all of these mappings, or none.
    Add {
        /// The mappings.
        mappings: Vec<WireMapping>,
    },
    /// Return connections and flows.
    Connections(Chosen),
    /// Reset connections and end flows: those chosen, or if nothing is chosen, none.
    Cut(Chosen),
    /// Remove a mapping.
    Remove {
        /// Its name.
        name: String,
        /// Whether to reset its connections and end its flows.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        cut: bool,
    },
    /// Send new clients of a mapping to another backend.
    Retarget {
        /// Its name.
        name: String,
        /// The address and ports of the new backend; for a range, the first port is enough.
        to: String,
        /// Whether to reset connections to the old backend.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        cut: bool,
    },
    /// Serve exactly these mappings.
    Apply {
        /// The mappings.
        mappings: Vec<WireMapping>,
        /// Whether to reset the connections and end the flows of mappings that are removed.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        cut: bool,
    },
    /// Accept no new clients, let existing ones finish, and end the process.
    Drain,
}

/// Some connections and flows: those that have all of what is given. Unknown keys are refused, because ignoring them
/// would choose more.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "an object with what is chosen")]
pub struct Chosen {
    /// Those of this mapping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mapping: Option<String>,
    /// Those of clients at this address, or in this network.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client: Option<String>,
    /// The one with this number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// At most so many, the oldest ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<usize>,
    /// All: `cut` needs that if nothing else is given.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub all: bool,
}

impl Chosen {
    /// Whether nothing says which ones.
    pub fn is_empty(&self) -> bool {
        let Self { mapping, client, id, limit: _, all } = self;
        mapping.is_none() && client.is_none() && id.is_none() && !all
    }
}

/// The mappings of a JSON file, or of a response to [`Request::List`], as requested. Unknown keys are
/// refused, because ignoring them would change the meaning of a mapping.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Mappings {
    /// The mappings.
    pub mappings: Vec<WireMapping>,
}

/// Why a request was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    /// The kind of error, for programs.
    pub kind: RefusalKind,
    /// The error message, for users.
    pub message: String,
    /// The name of the mapping that it is about, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mapping: Option<String>,
}

/// The kinds of errors, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefusalKind {
    /// The line, or something in it, is invalid.
    BadRequest,
    /// The server uses another version.
    Version,
    /// No mapping has the name.
    UnknownName,
    /// Another mapping has the name.
    NameTaken,
    /// The port was attached by another process.
    Attached,
    /// Two mappings want the same port.
    Overlap,
    /// A mapping would lead back to itself.
    Loop,
    /// A port cannot be bound.
    Bind,
    /// The name of a backend does not resolve, and has to.
    Unresolved,
    /// A socket that came with the request cannot be used.
    Socket,
    /// The client is neither the process's user nor root.
    Denied,
    /// Too many clients are connected.
    Busy,
    /// The kernel refused something else, or the process is ending.
    Failed,
    /// A kind that only a newer server knows.
    #[serde(other, skip_serializing)]
    Other,
}

impl Refusal {
    /// The request is invalid.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(RefusalKind::BadRequest, message)
    }

    /// A request is refused, but not because of a mapping.
    pub fn new(kind: RefusalKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), mapping: None }
    }

    /// The same, because of this mapping.
    #[must_use]
    pub fn about(self, mapping: &str) -> Self {
        Self { mapping: Some(mapping.to_owned()), ..self }
    }
}

impl From<ChangeError> for Refusal {
    fn from(error: ChangeError) -> Self {
        let kind = match &error {
            ChangeError::Unknown(_) => RefusalKind::UnknownName,
            ChangeError::NameTaken(_) => RefusalKind::NameTaken,
            ChangeError::Attached { .. } => RefusalKind::Attached,
            ChangeError::Overlap(_) | ChangeError::StillBound { .. } => RefusalKind::Overlap,
            ChangeError::Loop { .. } => RefusalKind::Loop,
            ChangeError::Bind { .. } => RefusalKind::Bind,
            ChangeError::UnusedSocket { .. } | ChangeError::OtherFamilies { .. } => RefusalKind::Socket,
            ChangeError::Mapping { .. } | ChangeError::Private { .. } => RefusalKind::BadRequest,
            ChangeError::Name { .. } => RefusalKind::Unresolved,
            ChangeError::Watch { .. }
            | ChangeError::Interfaces(_)
            | ChangeError::UnixSocket { .. }
            | ChangeError::Permissions { .. } => RefusalKind::Failed,
        };
        let mapping = error.mapping().map(|name| name.to_string());
        Self { kind, message: error.with_hint("freebind (--freebind)"), mapping }
    }
}

/// Reads a value that is all of a line. Its objects are objects.
fn read<'de, T: Deserialize<'de>>(line: &'de [u8]) -> serde_json::Result<T> {
    let mut deserializer = serde_json::Deserializer::from_slice(line);
    let value = T::deserialize(Strict(&mut deserializer))?;
    deserializer.end().map(|()| value)
}

/// Decodes a request. Also returns its id, which is repeated in the response even if the request is invalid.
///
/// # Errors
/// [`Refusal`]
pub fn decode(line: &[u8]) -> (Option<u64>, Result<Request, Refusal>) {
    /// The part that can be decoded in any version.
    #[derive(Deserialize)]
    #[serde(expecting = "an object with v and do")]
    struct Any {
        v: Option<u32>,
        id: Option<u64>,
    }
    let any: Any = match read(line) {
        Ok(any) => any,
        Err(error) => return (None, Err(Refusal::bad_request(format!("not a request: {error}")))),
    };
    let request = match any.v {
        Some(VERSION) => read::<Envelope>(line).map(|envelope| envelope.request).map_err(|error| {
            let error = wrong_field(line).unwrap_or_else(|| format!("not a request: {error}"));
            Refusal::bad_request(error)
        }),
        _ => Err(Refusal::new(RefusalKind::Version, format!("this rproxy speaks version {VERSION}"))),
    };
    (any.id, request)
}

/// Encodes a request as a line, without the newline.
pub fn encode(request: Request) -> String {
    let envelope = Envelope { v: VERSION, id: None, request };
    serde_json::to_string(&envelope).expect("a request has no keys but strings")
}

/// A response, as one line: `ok` or `error`.
#[derive(Serialize, Deserialize)]
struct Answer<T> {
    /// The version of the protocol.
    v: u32,
    /// The id of the request.
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ok: Option<T>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Refusal>,
}

/// Encodes a response as a line, without the newline. Keys are sorted on each level.
///
/// # Panics
/// Never: all keys are strings.
pub fn answer(id: Option<u64>, result: Result<Response, Refusal>) -> String {
    let (ok, error) = match result {
        Ok(response) => (Some(response), None),
        Err(refusal) => (None, Some(refusal)),
    };
    // A map is sorted, whereas direct serialisation would keep the order of the struct's fields.
    let answer = serde_json::to_value(Answer { v: VERSION, id, ok, error });
    answer.expect("an answer has no keys but strings").to_string()
}

/// Decodes a response. The type of the result depends on the request. Returns `None` if it is not a response.
pub fn read_answer(line: &str) -> Option<Result<Value, Refusal>> {
    match serde_json::from_str(line).ok()? {
        Answer { error: Some(refusal), .. } => Some(Err(refusal)),
        Answer { ok, error: None, .. } => ok.map(Ok),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rproxy_mapping::addr::ScopedIp;
    use rproxy_mapping::interfaces::NoInterfaces;

    use super::*;

    #[test]
    fn requests_are_read() {
        let (id, request) = decode(br#"{"v":1,"id":7,"do":"list"}"#);
        assert_eq!((id, request), (Some(7), Ok(Request::List)));
        let (_, request) = decode(br#"{"v":1,"do":{"remove":{"name":"web"}}}"#);
        assert_eq!(request, Ok(Request::Remove { name: "web".into(), cut: false }));
    }

    #[test]
    fn wrong_requests_are_refused_with_their_number() {
        for (line, kind, part) in [
            ("", "bad_request", "EOF"),
            ("[]", "bad_request", "not a request: invalid type: sequence, expected an object with v and do"),
            (
                r#"{"v":1,"do":{"add":{"mappings":[5]}}}"#,
                "bad_request",
                "expected an object that describes a mapping",
            ),
            (
                r#"{"v":1,"do":{"apply":{"mappings":[{"name":"a","to":"x","to_ports":"80","limits":{"dscp":"8","source":5}}]}}}"#,
                "bad_request",
                "mapping a: limits.source: invalid type: integer `5`, expected a string",
            ),
            (
                r#"{"v":1,"do":{"add":{"mappings":[{"to":"x","to_ports":80}]}}}"#,
                "bad_request",
                "to_ports: invalid type: integer `80`",
            ),
            (
                r#"{"v":1,"do":{"add":{"mappings":[{"to":"x","to_ports":"80","limits":{"sauce":"auto"}}]}}}"#,
                "bad_request",
                "limits.sauce: unknown field `sauce`",
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
            assert_eq!(serde_json::to_value(refusal.kind).unwrap(), kind, "{line}");
            assert!(refusal.message.contains(part), "{line}: {}", refusal.message);
            assert_eq!(id, line.contains('7').then_some(7), "{line}");
        }
    }

    #[test]
    fn an_array_is_no_object_and_a_request_without_its_object_is_told_how_it_is_written() {
        for (line, part) in [
            (
                r#"{"v":1,"do":{"remove":["web"]}}"#,
                "invalid type: sequence, expected an object with name, cut",
            ),
            (r#"{"v":1,"do":{"connections":["web"]}}"#, "expected an object with what is chosen"),
            (r#"{"v":1,"do":{"cut":[null,null,null,1,true]}}"#, "an object with what is chosen"),
            (r#"{"v":1,"do":{"retarget":["web","1.1.1.1:1",true]}}"#, "an object with name, to, cut"),
            (r#"{"v":1,"do":{"add":[[{"to":"x","to_ports":"80"}]]}}"#, "expected an object with mappings"),
            (r#"{"v":1,"do":{"add":{"mappings":[["web"]]}}}"#, "expected an object that describes a mapping"),
            (
                r#"{"v":1,"do":{"add":{"mappings":[{"to":"x","to_ports":"80","limits":[]}]}}}"#,
                "expected an object with limits",
            ),
            (r#"{"v":1,"do":"connections"}"#, r#"write {"connections":{}}"#),
            (r#"{"v":1,"do":"remove"}"#, r#"write {"remove":{…}} with its fields"#),
            (r#"{"v":1,"do":{"stats":{}}}"#, r#"write "stats""#),
        ] {
            let refusal = decode(line.as_bytes()).1.expect_err(line);
            assert_eq!(refusal.kind, RefusalKind::BadRequest);
            assert!(refusal.message.contains(part), "{line}: {}", refusal.message);
        }
    }

    #[test]
    fn requests_are_written_as_the_protocol_has_them() {
        let mappings = || {
            vec![WireMapping {
                to: "172.17.0.2".to_owned(),
                to_ports: "80".to_owned(),
                ..WireMapping::default()
            }]
        };
        let name = || "web".to_owned();
        let list = r#"{"mappings":[{"to":"172.17.0.2","to_ports":"80"}]}"#;
        for (request, text) in [
            (Request::List, r#""list""#),
            (Request::Stats, r#""stats""#),
            (Request::Drain, r#""drain""#),
            (Request::Add { mappings: mappings() }, &format!(r#"{{"add":{list}}}"#)),
            (Request::Apply { mappings: mappings(), cut: false }, &format!(r#"{{"apply":{list}}}"#)),
            (Request::Apply { mappings: vec![], cut: true }, r#"{"apply":{"mappings":[],"cut":true}}"#),
            (Request::Remove { name: name(), cut: false }, r#"{"remove":{"name":"web"}}"#),
            (Request::Remove { name: name(), cut: true }, r#"{"remove":{"name":"web","cut":true}}"#),
            (
                Request::Retarget { name: name(), to: "172.17.0.3:80".to_owned(), cut: false },
                r#"{"retarget":{"name":"web","to":"172.17.0.3:80"}}"#,
            ),
            (Request::Connections(Chosen::default()), r#"{"connections":{}}"#),
            (
                Request::Cut(Chosen { client: Some("192.0.2.0/24".to_owned()), ..Chosen::default() }),
                r#"{"cut":{"client":"192.0.2.0/24"}}"#,
            ),
        ] {
            assert_eq!(encode(request), format!(r#"{{"v":1,"do":{text}}}"#));
        }
    }

    #[test]
    fn answers_are_read_and_nothing_else_is() {
        assert_eq!(read_answer(r#"{"v":1,"ok":{"added":1}}"#), Some(Ok(serde_json::json!({ "added": 1 }))));
        let refused =
            read_answer(r#"{"v":1,"id":7,"error":{"kind":"tired","message":"no","more":1},"more":2}"#);
        let refusal = Refusal::new(RefusalKind::Other, "no");
        assert_eq!(refused, Some(Err(refusal)));
        for line in [
            "",
            "HTTP/1.1 400 Bad Request",
            "{}",
            r#"{"ok":{}}"#,
            r#"{"v":1}"#,
            r#"{"v":"x","ok":{}}"#,
            "[1]",
        ] {
            assert_eq!(read_answer(line), None, "{line}");
        }
    }

    fn any_chosen() -> impl Strategy<Value = Chosen> {
        let text = || proptest::option::of(".*");
        let number = || proptest::option::of(any::<u64>());
        (text(), text(), number(), proptest::option::of(any::<usize>()), any::<bool>())
            .prop_map(|(mapping, client, id, limit, all)| Chosen { mapping, client, id, limit, all })
    }

    #[test]
    fn a_misspelt_choice_is_refused() {
        for line in
            [r#"{"v":1,"do":{"cut":{"clinet":"192.0.2.7"}}}"#, r#"{"v":1,"do":{"connections":{"max":1}}}"#]
        {
            let refused = decode(line.as_bytes()).1.unwrap_err();
            assert!(refused.message.contains("unknown field"), "{}", refused.message);
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
            (mappings, any::<bool>()).prop_map(|(mappings, cut)| Request::Apply { mappings, cut }),
            (".*", ".*", any::<bool>()).prop_map(|(name, to, cut)| Request::Retarget { name, to, cut }),
            any_chosen().prop_map(Request::Connections),
            any_chosen().prop_map(Request::Cut),
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
            if let (_id, Ok(Request::Add { mappings } | Request::Apply { mappings, .. })) = decode(&line) {
                mappings.iter().for_each(|mapping| drop(mapping.read(&NoInterfaces, ScopedIp::ANY)));
            }
        }
    }
}
