//! The result as JSON: every value of every round.

use serde_json::{Map, Value, json};

use super::{Report, Sample};
use crate::machine;
use crate::metric::{Metric, Values};

/// The values of one measurement.
pub(crate) fn json_of(values: &Values) -> Value {
    let entry = |(metric, value): &(Metric, f64)| (metric.key(), json!(value));
    Value::Object(values.iter().map(entry).collect::<Map<_, _>>())
}

/// The whole result.
pub(super) fn render(report: &Report) -> String {
    let sample = |sample: &Sample| {
        let mut entry = json!({
            "workload": sample.workload.to_string(),
            "peer": sample.peer,
            "round": sample.round,
        });
        match &sample.result {
            Ok(values) => entry["values"] = json_of(values),
            Err(failure) => entry["failure"] = json!(failure.to_string()),
        }
        entry
    };
    let result = json!({
        "machine": machine::profile(),
        "rounds": report.rounds,
        "seconds": report.duration.as_secs_f64(),
        "peers": report.peers,
        "samples": report.samples.iter().map(sample).collect::<Vec<_>>(),
    });
    format!("{result:#}\n")
}
