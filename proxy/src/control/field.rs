//! The field of a request that has a value of the wrong type, which the error of its decoder does not name.

use rproxy_mapping::unix;
use rproxy_mapping::wire::{WireLimits, WireMapping};
use serde_json::{Map, Value, json};

/// Names the first field of a mapping in this request that cannot be read, and says why.
pub(super) fn wrong_field(line: &[u8]) -> Option<String> {
    let request: Value = serde_json::from_slice(line).ok()?;
    if let Some(problem) = wrong_shape(request.get("do")?) {
        return Some(problem);
    }
    let operation = request.get("do")?.as_object()?.values().next()?;
    let mappings = operation.get("mappings")?.as_array()?;
    mappings.iter().find_map(|mapping| {
        let mapping = mapping.as_object()?;
        let problem = mapping.iter().find_map(|(key, value)| wrong_in_mapping(key, value))?;
        let name = mapping.get("name").and_then(Value::as_str);
        Some(name.map_or(problem.clone(), |name| format!("mapping {}: {problem}", name.escape_debug())))
    })
}

/// Says how a request is written that lacks its object, or has one too many.
fn wrong_shape(request: &Value) -> Option<String> {
    const ALONE: [&str; 3] = ["list", "stats", "drain"];
    const CHOOSING: [&str; 2] = ["connections", "cut"];
    const CHANGING: [&str; 4] = ["add", "remove", "retarget", "apply"];

    match request {
        Value::String(name) if CHOOSING.contains(&name.as_str()) => {
            Some(format!("do: {name} has an object with what is chosen; write {{\"{name}\":{{}}}}"))
        }
        Value::String(name) if CHANGING.contains(&name.as_str()) => {
            Some(format!("do: {name} has an object; write {{\"{name}\":{{…}}}} with its fields"))
        }
        Value::Object(object) => {
            let (name, _value) = object.iter().next()?;
            let is_alone = object.len() == 1 && ALONE.contains(&name.as_str());
            is_alone.then(|| format!("do: {name} has no fields; write \"{name}\""))
        }
        _ => None,
    }
}

/// Says of each mapping in a file of JSON what cannot be read.
pub(crate) fn wrong_mappings(file: &Value) -> Vec<String> {
    let Some(mappings) = file.get("mappings") else {
        let keys = file.as_object().into_iter().flatten().map(|(key, _value)| key);
        let meant =
            keys.max_by(|one, other| likeness(one, "mappings").total_cmp(&likeness(other, "mappings")));
        return vec![match meant.filter(|key| likeness(key, "mappings") >= SIMILAR) {
            Some(key) => format!("unknown field `{}`; did you mean `mappings`?", key.escape_debug()),
            None => "mappings is missing; write {\"mappings\":[…]}".to_owned(),
        }];
    };
    let Some(mappings) = mappings.as_array() else {
        return vec!["mappings: it is a list; write {\"mappings\":[…]}".to_owned()];
    };
    mappings.iter().enumerate().flat_map(|(index, mapping)| wrong_in_nth(index, mapping)).collect()
}

/// Says what cannot be read in the mapping at `index`, which has that name if it has none of its own.
fn wrong_in_nth(index: usize, mapping: &Value) -> Vec<String> {
    let Some(fields) = mapping.as_object() else {
        return vec![format!("mapping number {}: it is no object that describes a mapping", index + 1)];
    };
    let name = match fields.get("name").and_then(Value::as_str) {
        Some(name) => format!("mapping {}", name.escape_debug()),
        None => format!("mapping number {}", index + 1),
    };
    let mut wrong: Vec<String> =
        fields.iter().flat_map(|(key, value)| all_wrong_in_field(key, value)).collect();
    // A misspelt field is not missing as well.
    if wrong.is_empty() {
        let to = fields.get("to").and_then(Value::as_str).unwrap_or_default();
        let needed = if to.starts_with(unix::PREFIX) { &["to"][..] } else { &["to", "to_ports"] };
        let missing = needed.iter().filter(|field| !fields.contains_key(**field));
        wrong.extend(
            missing.map(|field| format!("{field}: it is missing; write the backend's address and ports")),
        );
    }
    wrong.into_iter().map(|problem| format!("{name}: {problem}")).collect()
}

fn wrong_in_mapping(key: &str, value: &Value) -> Option<String> {
    all_wrong_in_field(key, value).into_iter().next()
}

/// Says what is wrong with a field of a mapping, or with each of its limits.
fn all_wrong_in_field(key: &str, value: &Value) -> Vec<String> {
    match (key, value) {
        ("limits", Value::Array(_)) => {
            vec!["limits: invalid type: sequence, expected an object with limits".to_owned()]
        }
        ("limits", Value::Object(limits)) => {
            let wrong = limits.iter().filter_map(|(key, value)| {
                let problem = problem_of(key, value, error_in_limit)?;
                Some(format!("limits.{}: {problem}", key.escape_debug()))
            });
            wrong.collect()
        }
        _ => {
            let Some(problem) = problem_of(key, value, error_in_mapping) else { return Vec::new() };
            let is_limit = error_in_limit(key, value).is_none_or(|error| !error.starts_with(UNKNOWN));
            let key = key.escape_debug();
            vec![match is_limit && problem.starts_with(UNKNOWN) {
                true => format!("{key}: it is one of limits; write \"limits\":{{\"{key}\":{value}}}"),
                false => format!("{key}: {problem}"),
            }]
        }
    }
}

/// The start of serde's message for a field that a structure does not have.
const UNKNOWN: &str = "unknown field";

/// The minimum Jaro-Winkler similarity for a word to be considered a misspelling of another.
const SIMILAR: f64 = 0.8;

/// The longest word that is considered a misspelling, in bytes.
const LONGEST: usize = 64;

fn likeness(written: &str, field: &str) -> f64 {
    if written.len() > LONGEST {
        0.0
    } else {
        strsim::jaro_winkler(&written.to_lowercase().replace('-', "_"), field)
    }
}

fn error_in_mapping(key: &str, value: &Value) -> Option<String> {
    let mut alone = json!({ "to": "", "to_ports": "" });
    alone[key] = value.clone();
    serde_json::from_value::<WireMapping>(alone).err().map(|error| error.to_string())
}

fn error_in_limit(key: &str, value: &Value) -> Option<String> {
    let alone = Map::from_iter([(key.to_owned(), value.clone())]);
    serde_json::from_value::<WireLimits>(alone.into()).err().map(|error| error.to_string())
}

/// Why a field with this value is refused, and what is probably meant. `error` is serde's message, if there is one.
fn problem_of(key: &str, value: &Value, error: fn(&str, &Value) -> Option<String>) -> Option<String> {
    let message = error(key, value)?;
    if let Some(rest) = message.strip_prefix(UNKNOWN) {
        // It lists them: unknown field `x`, expected one of `a`, `b`.
        let names = rest.rsplit_once("expected").map_or("", |(_unknown, names)| names);
        let names = names.split('`').skip(1).step_by(2);
        let meant = names.max_by(|one, other| likeness(key, one).total_cmp(&likeness(key, other)));
        return Some(match meant.filter(|name| likeness(key, name) >= SIMILAR) {
            Some(name) => format!("{UNKNOWN} `{}`; did you mean `{name}`?", key.escape_debug()),
            None => message,
        });
    }
    match meant_value(key, value).into_iter().find(|meant| error(key, meant).is_none()) {
        Some(meant) => Some(format!("{message}; write {meant}")),
        None => Some(message),
    }
}

/// What a value of the wrong type may stand for.
fn meant_value(key: &str, value: &Value) -> Vec<Value> {
    match value {
        Value::Number(number) if key == "rate" => vec![json!(format!("{number}/s"))],
        Value::Number(number) if key == "keepalive" || key.ends_with("timeout") => {
            vec![json!(format!("{number}s"))]
        }
        Value::Number(number) => vec![json!(number.to_string())],
        Value::String(text) => {
            let read = text
                .parse::<u64>()
                .map(|number| json!(number))
                .or_else(|_| text.parse::<bool>().map(Value::from));
            read.ok().into_iter().chain([json!([text])]).collect()
        }
        Value::Bool(false) if key == "keepalive" => vec![json!("off")],
        Value::Bool(false) if key.ends_with("timeout") => vec![json!("unlimited")],
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(mappings: &Value) -> Vec<String> {
        wrong_mappings(&json!({ "mappings": mappings }))
    }

    #[test]
    fn all_mistakes_are_found_and_each_has_a_way_out() {
        let mapping = |more: Value| {
            let mut mapping = json!({ "name": "web", "to": "172.17.0.2", "to_ports": "80" });
            mapping.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            mapping
        };
        for (more, expected) in [
            (json!({ "hostports": "81" }), "unknown field `hostports`; did you mean `host_ports`?"),
            (
                json!({ "max_connections": 5 }),
                "max_connections: it is one of limits; write \"limits\":{\"max_connections\":5}",
            ),
            (
                json!({ "to_ports": 80 }),
                "to_ports: invalid type: integer `80`, expected a string; write \"80\"",
            ),
            (json!({ "limits": { "max_conections": 5 } }), "did you mean `max_connections`?"),
            (json!({ "limits": { "connect_timeout": 5 } }), "expected a string; write \"5s\""),
            (json!({ "limits": { "idle_timeout": false } }), "expected a string; write \"unlimited\""),
            (json!({ "limits": { "keepalive": 60 } }), "expected a string; write \"60s\""),
            (json!({ "limits": { "rate": 10 } }), "expected a string; write \"10/s\""),
            (json!({ "limits": { "max_connections": "5" } }), "write 5"),
            (json!({ "limits": { "freebind": "true" } }), "write true"),
            (json!({ "limits": { "allow": "10.0.0.0/8" } }), "write [\"10.0.0.0/8\"]"),
            (json!({ "limits": [] }), "expected an object with limits"),
        ] {
            let found = wrong(&json!([mapping(more.clone())]));
            assert_eq!(found.len(), 1, "{more}: {found:?}");
            assert!(found[0].starts_with("mapping web: ") && found[0].contains(expected), "{found:?}");
        }
        let several =
            json!([{ "too": "1.2.3.4" }, 5, { "limits": { "rate": 1, "dscp": 8 } }, {}, mapping(json!({}))]);
        let found = wrong(&several);
        let places: Vec<_> =
            found.iter().map(|line| line.split(": ").take(2).collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(
            places,
            [
                "mapping number 1 too",
                "mapping number 2 it is no object that describes a mapping",
                "mapping number 3 limits.dscp",
                "mapping number 3 limits.rate",
                "mapping number 4 to",
                "mapping number 4 to_ports",
            ],
            "{found:?}"
        );
    }

    #[test]
    fn a_file_without_mappings_says_how_they_are_written() {
        for (file, expected) in [
            (json!({ "mapings": [] }), "unknown field `mapings`; did you mean `mappings`?"),
            (json!({}), "mappings is missing"),
            (json!({ "mappings": {} }), "it is a list"),
        ] {
            let found = wrong_mappings(&file);
            assert!(found.len() == 1 && found[0].contains(expected), "{file}: {found:?}");
        }
    }
}
