//! Charts: for each workload, bars for its throughput and its cost.

use std::fmt::Write as _;

use super::Report;
use super::stats::Summary;
use crate::metric::Metric;
use crate::workload::Workload;

/// Sizes in pixels.
const WIDTH: f64 = 860.0;
const MARGIN: f64 = 16.0;
const LABELS: f64 = 130.0;
const PANEL: f64 = (WIDTH - 2.0 * MARGIN - LABELS) / 2.0;
/// Space in a panel to the right of the longest bar, for its value.
const VALUES: f64 = 110.0;
const ROW: f64 = 20.0;
const BAR: f64 = 12.0;
const TITLE: f64 = 44.0;
const GAP: f64 = 18.0;

/// The panels of a workload: its main metric, and its cost.
const PANELS: usize = 2;

/// The background is transparent, so the page may be light or dark.
const STYLE: &str = "text{font:12px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#1f2328}\
.title{font-weight:600;font-size:13px}.unit,.ratio{fill:#656d76}\
.bar{fill:#afb8c1}.ours{fill:#0969da}.spread{stroke:#1f2328;stroke-opacity:.55}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.unit,.ratio{fill:#8d96a0}\
.bar{fill:#6e7681}.ours{fill:#4493f8}.spread{stroke:#e6edf3}}";

/// All workloads of a run, one below the other.
pub(super) fn render(report: &Report) -> String {
    let (mut body, mut y) = (String::new(), MARGIN);
    for workload in &report.workloads {
        y += chart(report, *workload, y, &mut body);
    }
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {y}\" width=\"{WIDTH}\" \
         height=\"{y}\" role=\"img\">\n<style>{STYLE}</style>\n{body}</svg>\n"
    )
}

/// Draws a workload from `top` on; returns its height.
fn chart(report: &Report, workload: Workload, top: f64, body: &mut String) -> f64 {
    let metrics = report.metrics(workload);
    let has_values =
        |peer: &&String| metrics.iter().any(|metric| report.summary(workload, peer, *metric).is_some());
    let peers: Vec<_> = report.peers.iter().filter(has_values).collect();
    if peers.is_empty() {
        return 0.0;
    }
    text(body, "title", MARGIN, top + 12.0, &workload.to_string());
    for (index, peer) in peers.iter().enumerate() {
        text(body, "peer", MARGIN, baseline(top, index), peer);
    }
    for (column, metric) in metrics.iter().take(PANELS).enumerate() {
        let summaries: Vec<_> = peers.iter().map(|peer| report.summary(workload, peer, *metric)).collect();
        let left = MARGIN + LABELS + PANEL * column as f64;
        panel(body, left, top, *metric, &peers, &summaries);
    }
    TITLE + ROW * peers.len() as f64 + GAP
}

fn panel(
    body: &mut String,
    left: f64,
    top: f64,
    metric: Metric,
    peers: &[&String],
    summaries: &[Option<Summary>],
) {
    let better = if metric.more_is_better() { "more is better" } else { "less is better" };
    text(body, "unit", left, top + 30.0, &format!("{}, {better}", metric.heading()));
    let largest = summaries.iter().flatten().map(|summary| summary.max).fold(0.0, f64::max);
    let scale = if largest > 0.0 { (PANEL - VALUES) / largest } else { 0.0 };
    for (index, (peer, summary)) in peers.iter().zip(summaries).enumerate() {
        let Some(summary) = summary else { continue };
        let class = if peer.starts_with("rproxy") { "bar ours" } else { "bar" };
        bar(body, left, top + TITLE + ROW * index as f64, scale, class, summary);
        let end = left + summary.max * scale + 6.0;
        let value = metric.show(summary.median);
        let ratio = summary.ratio.filter(|_| metric.has_ratio());
        let ratio = ratio.map_or(String::new(), |ratio| format!(" · {ratio:.2}×"));
        text(body, "value", end, baseline(top, index), &format!("{value}{ratio}"));
    }
}

/// A bar for the median, and a line from the minimum to the maximum.
fn bar(body: &mut String, left: f64, top: f64, scale: f64, class: &str, summary: &Summary) {
    let (width, middle) = (summary.median * scale, top + BAR / 2.0);
    let (from, to) = (left + summary.min * scale, left + summary.max * scale);
    // Writing to a string does not fail.
    writeln!(
        body,
        "<rect class=\"{class}\" x=\"{left:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"{BAR}\" rx=\"2\"/>\
         <path class=\"spread\" d=\"M{from:.1} {middle:.1}H{to:.1}\"/>"
    )
    .ok();
}

fn text(body: &mut String, class: &str, x: f64, y: f64, content: &str) {
    let content = content.replace('&', "&amp;").replace('<', "&lt;");
    // As above.
    writeln!(body, "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{content}</text>").ok();
}

/// The position of the text of a row.
fn baseline(top: f64, row: usize) -> f64 {
    top + TITLE + ROW * row as f64 + 10.0
}
