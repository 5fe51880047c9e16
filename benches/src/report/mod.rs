//! The result of a comparison.

mod json;
mod stats;
mod svg;
mod table;

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cli::Compare;
use crate::load::LoadError;
use crate::metric::{Metric, Values};
use crate::peers::{Peer, PeerError, REFERENCE};
use crate::workload::Workload;
pub(crate) use json::json_of;
use stats::Summary;

/// One measurement.
#[derive(Debug)]
pub(crate) struct Sample {
    pub(crate) workload: Workload,
    pub(crate) peer: String,
    pub(crate) round: u32,
    pub(crate) result: Result<Values, Failure>,
}

/// Why there is no measurement.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    message: String,
    /// Whether this fails the run.
    fatal: bool,
}

impl Failure {
    /// A load failed. This fails the run if data was wrong, with any peer, or if the peer is `rproxy`.
    pub(crate) fn of_load(error: &LoadError, peer: &Peer) -> Self {
        Self { message: error.to_string(), fatal: error.is_wrong() || peer.is_ours() }
    }

    /// A peer did not start, or does not support this.
    pub(crate) fn of_peer(error: &PeerError) -> Self {
        Self { message: error.to_string(), fatal: !matches!(error, PeerError::Refused { .. }) }
    }

    /// The harness itself failed.
    pub(crate) fn failed(reason: &impl fmt::Display) -> Self {
        Self { message: reason.to_string(), fatal: true }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// A file could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {}: {source}", path.display())]
pub(crate) struct WriteError {
    path: PathBuf,
    source: io::Error,
}

/// All measurements of a run.
pub(crate) struct Report {
    workloads: Vec<Workload>,
    peers: Vec<String>,
    rounds: u32,
    duration: Duration,
    samples: Vec<Sample>,
}

impl Report {
    pub(crate) fn new(
        workloads: &[Workload],
        peers: &[Peer],
        options: &Compare,
        samples: Vec<Sample>,
    ) -> Self {
        Self {
            workloads: workloads.into(),
            peers: peers.iter().map(|peer| peer.name.clone()).collect(),
            rounds: options.rounds,
            duration: options.duration,
            samples,
        }
    }

    /// Whether nothing has failed the run.
    pub(crate) fn is_good(&self) -> bool {
        !self.failures().any(|(_, failure)| failure.fatal)
    }

    /// Prints the tables, and what failed.
    pub(crate) fn print(&self) {
        print!("{}", table::render(self));
    }

    /// Writes the requested files.
    ///
    /// # Errors
    /// [`WriteError`]
    pub(crate) fn write(&self, json: Option<&Path>, svg: Option<&Path>) -> Result<(), WriteError> {
        let write = |path: &Path, text: String| {
            fs::write(path, text).map_err(|source| WriteError { path: path.into(), source })
        };
        json.map(|path| write(path, json::render(self))).transpose()?;
        svg.map(|path| write(path, svg::render(self))).transpose()?;
        Ok(())
    }

    fn failures(&self) -> impl Iterator<Item = (&Sample, &Failure)> {
        self.samples.iter().filter_map(|sample| Some((sample, sample.result.as_ref().err()?)))
    }

    /// The metrics of a workload, in display order.
    fn metrics(&self, workload: Workload) -> Vec<Metric> {
        let of_workload = self.samples.iter().filter(|sample| sample.workload == workload);
        let longest =
            of_workload.filter_map(|sample| sample.result.as_ref().ok()).max_by_key(|values| values.len());
        longest.into_iter().flatten().map(|(metric, _)| *metric).collect()
    }

    /// The values of all rounds, if there is one.
    fn summary(&self, workload: Workload, peer: &str, metric: Metric) -> Option<Summary> {
        let (base, base_peer) = match workload.base() {
            Some(base) => (base, peer),
            None => (workload, REFERENCE),
        };
        let rounds = 0..self.rounds;
        let values =
            |workload, peer| rounds.clone().map(move |round| self.value(workload, peer, round, metric));
        Summary::new(values(workload, peer), values(base, base_peer))
    }

    fn value(&self, workload: Workload, peer: &str, round: u32, metric: Metric) -> Option<f64> {
        let sample = self
            .samples
            .iter()
            .find(|sample| sample.workload == workload && sample.peer == peer && sample.round == round)?;
        let values = sample.result.as_ref().ok()?;
        values.iter().find(|(each, _)| *each == metric).map(|(_, value)| *value)
    }
}
