//! The result as text.

use std::fmt::Write as _;

use super::Report;
use crate::metric::Metric;
use crate::peers::REFERENCE;
use crate::workload::Workload;

/// A table for each workload, and what failed.
pub(super) fn render(report: &Report) -> String {
    let mut text = format!(
        "medians of {} rounds of {:?}; × is the median of the ratios to {REFERENCE} in the same round \
         (in `scale-`: to the least of the curve); [min–max] of the rounds\n",
        report.rounds, report.duration
    );
    for workload in &report.workloads {
        text.push('\n');
        text.push_str(&of_workload(report, *workload));
    }
    let mut heading = "\nnot measured:\n";
    let mut said = Vec::new();
    for (sample, failure) in report.failures() {
        let line = format!("  {}: {}: {failure}\n", sample.workload, sample.peer);
        if !said.contains(&line) {
            text.push_str(heading);
            text.push_str(&line);
            heading = "";
            said.push(line);
        }
    }
    text
}

fn of_workload(report: &Report, workload: Workload) -> String {
    let metrics = report.metrics(workload);
    let mut heading = vec![workload.to_string()];
    heading.extend(metrics.iter().map(|metric| metric.heading()));
    let mut rows = vec![heading];
    for peer in &report.peers {
        let cells: Vec<_> = metrics.iter().map(|metric| cell(report, workload, peer, *metric)).collect();
        if cells.iter().any(|cell| !cell.is_empty()) {
            rows.push([vec![format!("  {peer}")], cells].concat());
        }
    }
    align(&rows)
}

fn cell(report: &Report, workload: Workload, peer: &str, metric: Metric) -> String {
    let Some(summary) = report.summary(workload, peer, metric) else { return String::new() };
    let mut text = metric.show(summary.median);
    if let Some(ratio) = summary.ratio.filter(|_| metric.has_ratio()) {
        write!(text, " {ratio:.2}×").ok();
    }
    if summary.min < summary.max {
        write!(text, " [{}–{}]", metric.show(summary.min), metric.show(summary.max)).ok();
    }
    text
}

fn align(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<_> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<_> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}
