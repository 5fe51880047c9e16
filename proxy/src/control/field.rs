//! The field of a request that has a value of the wrong type, which the error of its decoder does not name.

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

fn wrong_in_mapping(key: &str, value: &Value) -> Option<String> {
    if key == "limits" && value.is_array() {
        return Some("limits: invalid type: sequence, expected an object with limits".to_owned());
    }
    if key == "limits"
        && let Value::Object(limits) = value
    {
        return limits.iter().find_map(|(key, value)| {
            let alone = Map::from_iter([(key.clone(), value.clone())]);
            let error = serde_json::from_value::<WireLimits>(alone.into()).err()?;
            Some(format!("limits.{key}: {error}"))
        });
    }
    let mut alone = json!({ "to": "", "to_ports": "" });
    alone[key] = value.clone();
    let error = serde_json::from_value::<WireMapping>(alone).err()?;
    Some(format!("{key}: {error}"))
}
