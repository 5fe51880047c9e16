//! Metrics as text.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use super::http::get;

/// The series as both formats may write it: with its labels in order, and bounds of buckets without a needless fraction.
fn in_order(series: &str) -> String {
    let Some((name, labels)) = series.trim_end_matches('}').split_once('{') else { return series.to_owned() };
    // Bounds of buckets are numbers: `le="1"`, `le="1.0"`.
    let labels = labels.replace(".0\"", "\"");
    let mut labels: Vec<&str> = labels.split(',').collect();
    labels.sort_unstable();
    format!("{name}{{{}}}", labels.join(","))
}

/// The lines of metrics: names with labels, and values.
#[derive(Debug)]
pub(super) struct Scrape(BTreeMap<String, f64>);

impl Scrape {
    #[track_caller]
    pub(super) fn of(address: SocketAddr) -> Self {
        let response = get(address, "/metrics");
        assert_eq!(response.code(), "200", "{response:?}");
        Self::parse(&response.body)
    }

    #[track_caller]
    pub(super) fn parse(text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let values = lines.map(|line| {
            let (series, value) = line.rsplit_once(' ').expect(line);
            (in_order(series), value.parse().expect(line))
        });
        let count = values.clone().count();
        let all: BTreeMap<String, f64> = values.collect();
        assert_eq!(all.len(), count, "no series is written twice");
        Self(all)
    }

    /// The value of a series.
    pub(super) fn get(&self, series: &str) -> Option<f64> {
        self.0.get(&in_order(series)).copied()
    }

    /// The value of a series that has to be there.
    #[track_caller]
    pub(super) fn value(&self, series: &str) -> f64 {
        self.get(series).unwrap_or_else(|| panic!("no {series} in {:#?}", self.0))
    }

    /// All series.
    pub(super) fn series(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().map(|(series, value)| (series.as_str(), *value))
    }

    /// The names of all series, without labels.
    pub(super) fn names(&self) -> BTreeSet<&str> {
        self.0.keys().map(|series| series.split('{').next().unwrap_or_default()).collect()
    }
}
