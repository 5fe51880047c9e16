//! The families of metrics. `docs/metrics.md` explains each; the suite `metrics` compares the two.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;
use rproxy_mapping::addr::Protocol;

use super::descriptors;
use super::snapshot::Snapshot;
use crate::engine::registry::Counted;
use crate::log::lost_lines;
use crate::state::stats::{ConnectTimes, Counter, FailureKind, Stats};

/// How families are written.
#[derive(Clone, Copy, Debug)]
pub(super) enum Write {
    /// Some families, at once.
    Process(fn(&Snapshot, DescriptorEncoder<'_>) -> fmt::Result),
    /// One family, which may have thousands of lines: those of some of the mappings.
    Mappings(fn(&[Counted], DescriptorEncoder<'_>) -> fmt::Result),
}

/// All families, in the order of writing.
pub(super) const ALL: &[Write] = &[
    Write::Process(process),
    Write::Process(configuration),
    Write::Process(logs),
    Write::Process(server),
    Write::Mappings(connections),
    Write::Mappings(connections_total),
    Write::Mappings(flows),
    Write::Mappings(flows_total),
    Write::Mappings(bytes),
    Write::Mappings(datagrams),
    Write::Mappings(errors),
    Write::Mappings(connect_durations),
    Write::Mappings(names),
];

/// Labels, and their values.
type Labels<'a, const N: usize> = [(&'static str, &'a str); N];

/// Selects a counter of a mapping.
type Select = fn(&Stats) -> &Counter;

fn process(snapshot: &Snapshot, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
    let build = [("version", env!("CARGO_PKG_VERSION")), ("commit", env!("RPROXY_COMMIT"))];
    let help = "The version of rproxy, and the commit it was built from";
    encoder.encode_descriptor("rproxy_build", help, None, MetricType::Info)?.encode_info(&build)?;
    let process = snapshot.process;
    let started = seconds(process.started);
    seconds_gauge(
        &mut encoder,
        "rproxy_process_start_time",
        "When the process began to serve metrics, in Unix time",
        started,
    )?;
    if let Some(open) = process.descriptors {
        gauge(&mut encoder, "rproxy_process_open_fds", "Open file descriptors", open)?;
    }
    if let Some(limit) = descriptors::limit() {
        gauge(&mut encoder, "rproxy_process_max_fds", "The limit of open file descriptors", limit)?;
    }
    Ok(())
}

fn configuration(snapshot: &Snapshot, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
    let Some(reloads) = snapshot.process.reloads else { return Ok(()) };
    let help = "Whether the configuration was applied when it was last read";
    gauge(&mut encoder, "rproxy_config_last_reload_successful", help, u64::from(reloads.has_succeeded()))?;
    let (last, success) = (seconds(reloads.last), seconds(reloads.last_success));
    let help = "When the configuration was last read, in Unix time";
    seconds_gauge(&mut encoder, "rproxy_config_last_reload_timestamp", help, last)?;
    let help = "When the configuration was last applied, in Unix time";
    seconds_gauge(&mut encoder, "rproxy_config_last_reload_success_timestamp", help, success)
}

fn logs(snapshot: &Snapshot, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
    let access = snapshot.server.resources.lost_access_lines().map(|lost| ([("log", "access")], lost));
    let rows = std::iter::once(([("log", "stderr")], lost_lines())).chain(access);
    let help = "Log lines that were lost because they could not be written in time";
    counters(&mut encoder, "rproxy_log_lines_dropped", help, None, rows)
}

fn server(snapshot: &Snapshot, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
    let server = &snapshot.server;
    let (workers, most) = (size(server.resources.workers()), size(server.resources.most_workers()));
    gauge(&mut encoder, "rproxy_workers", "Running workers, each a thread that relays", workers)?;
    gauge(&mut encoder, "rproxy_workers_limit", "The maximum number of workers", most)?;
    let draining = u64::from(snapshot.is_draining);
    gauge(&mut encoder, "rproxy_draining", "Whether the process accepts no more clients", draining)?;
    let help = "Mappings that are served, with attached ports";
    gauge(&mut encoder, "rproxy_mappings", help, size(server.mappings))?;
    if snapshot.has_plane {
        let help = "Ports that processes of a container runtime have attached";
        gauge(&mut encoder, "rproxy_attached_ports", help, size(server.attached))?;
    }
    if let Some((flows, limit)) = server.resources.flows() {
        gauge(&mut encoder, "rproxy_udp_flows", "UDP flows of all mappings", size(flows))?;
        let help = "The maximum number of UDP flows, unless a mapping asks for more";
        gauge(&mut encoder, "rproxy_udp_flows_limit", help, size(limit))?;
    }
    Ok(())
}

fn connections(counted: &[Counted], mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
    let rows = by_name(counted, has_connections, |stats| &stats.connections);
    gauges(&mut encoder, "rproxy_mapping_connections_active", "Current TCP and SCTP connections", rows)
}

fn connections_total(counted: &[Counted], mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
    let rows = by_name(counted, has_connections, |stats| &stats.connections_total);
    let help = "TCP and SCTP connections that were accepted";
    counters(&mut encoder, "rproxy_mapping_connections", help, None, rows)
}

fn flows(counted: &[Counted], mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
    let rows = by_name(counted, has_flows, |stats| &stats.flows);
    gauges(&mut encoder, "rproxy_mapping_flows_active", "Current UDP flows", rows)
}

fn flows_total(counted: &[Counted], mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
    let rows = by_name(counted, has_flows, |stats| &stats.flows_total);
    counters(&mut encoder, "rproxy_mapping_flows", "UDP flows that were opened", None, rows)
}

fn bytes(counted: &[Counted], mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
    const OF_CONNECTIONS: [(&str, Select); 2] =
        [("in", |stats| &stats.tcp_bytes_in), ("out", |stats| &stats.tcp_bytes_out)];
    const OF_FLOWS: [(&str, Select); 2] =
        [("in", |stats| &stats.udp_bytes_in), ("out", |stats| &stats.udp_bytes_out)];
    let rows = counted.iter().flat_map(|counted| {
        let ways = protocols(counted).flat_map(|protocol| {
            let ways = if protocol.has_connections() { OF_CONNECTIONS } else { OF_FLOWS };
            ways.map(|(direction, counter)| (protocol, direction, counter))
        });
        ways.map(|(protocol, direction, counter)| {
            let labels = [
                ("mapping", counted.name.as_str()),
                ("protocol", protocol.as_str()),
                ("direction", direction),
            ];
            (labels, counted.sum(|stats| counter(stats).get()))
        })
    });
    let help = "Bytes that were relayed: in to backends, out to clients";
    counters(&mut encoder, "rproxy_mapping_relayed", help, Some(&Unit::Bytes), rows)
}

fn datagrams(counted: &[Counted], mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
    const WAYS: [(&str, Select); 2] =
        [("in", |stats| &stats.datagrams_in), ("out", |stats| &stats.datagrams_out)];
    let with_udp = counted.iter().filter(|counted| counted.has_udp);
    let rows = with_udp.flat_map(|counted| {
        WAYS.map(|(direction, counter)| {
            let labels = [("mapping", counted.name.as_str()), ("direction", direction)];
            (labels, counted.sum(|stats| counter(stats).get()))
        })
    });
    let help = "Datagrams that were relayed: in to backends, out to clients";
    counters(&mut encoder, "rproxy_mapping_relayed_datagrams", help, None, rows)
}

/// Errors that have not occurred are written, too: without a 0 first, the first one would be no increase.
fn errors(counted: &[Counted], mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
    let rows = counted.iter().flat_map(|counted| {
        let kinds = |protocol| FailureKind::ALL.into_iter().filter(move |kind| kind.is_of(protocol));
        let kinds =
            protocols(counted).flat_map(move |protocol| kinds(protocol).map(move |kind| (protocol, kind)));
        kinds.map(|(protocol, kind)| {
            let labels = [
                ("mapping", counted.name.as_str()),
                ("protocol", protocol.as_str()),
                ("reason", kind.as_str()),
            ];
            (labels, counted.sum(|stats| stats.failures_of(protocol, kind)))
        })
    });
    let help = "Connections, flows and datagrams that failed, by reason";
    counters(&mut encoder, "rproxy_mapping_errors", help, None, rows)
}

/// The time is missing for mappings without a connection, as it has thirteen lines.
fn connect_durations(counted: &[Counted], mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
    let name = "rproxy_mapping_connect_duration";
    let help = "How long backends took to accept connections";
    let mut metric = encoder.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Histogram)?;
    for counted in counted.iter().filter(|counted| has_connections(counted)) {
        let bounds = ConnectTimes::BOUNDS.iter().map(|bound| bound.as_secs_f64()).chain([f64::INFINITY]);
        let mut buckets: Vec<(f64, u64)> = bounds.map(|bound| (bound, 0)).collect();
        let mut sum = 0.0;
        for stats in counted.all() {
            let counts = stats.connect_times.counts();
            buckets.iter_mut().zip(counts).for_each(|((_bound, count), more)| *count += more);
            sum += stats.connect_times.sum().as_secs_f64();
        }
        let count = buckets.iter().map(|(_bound, count)| count).sum();
        if count > 0 {
            let labels = [("mapping", counted.name.as_str())];
            metric.encode_family(&labels)?.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
    }
    Ok(())
}

fn names(counted: &[Counted], mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
    let rows = counted
        .iter()
        .filter_map(|counted| Some(([("mapping", counted.name.as_str())], u64::from(counted.is_resolved?))));
    let help =
        "Whether the name of the backend resolved when it was last looked up, to an address that can be used";
    gauges(&mut encoder, "rproxy_mapping_name_resolved", help, rows)
}

/// The sums of a counter by mapping, of those that have it.
fn by_name<'a>(
    counted: &'a [Counted],
    has: fn(&Counted) -> bool,
    counter: Select,
) -> impl Iterator<Item = (Labels<'a, 1>, u64)> {
    let counted = counted.iter().filter(move |counted| has(counted));
    counted
        .map(move |counted| ([("mapping", counted.name.as_str())], counted.sum(|stats| counter(stats).get())))
}

fn has_connections(counted: &Counted) -> bool {
    counted.connections.is_some()
}

fn has_flows(counted: &Counted) -> bool {
    counted.has_udp
}

/// The protocols that something is counted of.
fn protocols(counted: &Counted) -> impl Iterator<Item = Protocol> + use<> {
    counted.connections.into_iter().chain(counted.has_udp.then_some(Protocol::Udp))
}

fn size(count: usize) -> u64 {
    u64::try_from(count).unwrap_or(u64::MAX)
}

/// Seconds since the epoch.
fn seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

fn gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: u64) -> fmt::Result {
    encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&value)
}

/// A gauge of seconds, which its name ends with.
fn seconds_gauge(encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str, value: f64) -> fmt::Result {
    encoder.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Gauge)?.encode_gauge(&value)
}

fn gauges<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    rows: impl Iterator<Item = (L, u64)>,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (labels, value) in rows {
        metric.encode_family(&labels)?.encode_gauge(&value)?;
    }
    Ok(())
}

/// Counters, to whose name the unit and `_total` are added.
fn counters<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    rows: impl Iterator<Item = (L, u64)>,
) -> fmt::Result {
    let mut metric = encoder.encode_descriptor(name, help, unit, MetricType::Counter)?;
    for (labels, value) in rows {
        metric.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
    }
    Ok(())
}
