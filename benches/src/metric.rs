//! Metrics and their formatting.

/// The values of one measurement, the most important first.
pub(crate) type Values = Vec<(Metric, f64)>;

/// A metric with its unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Metric {
    /// Payload, in Gbit/s.
    Throughput,
    /// Responses per second.
    Requests,
    /// Replies per second.
    Replies,
    /// Received datagrams per second.
    Datagrams,
    /// CPU seconds of the peer for each GB (10⁹ bytes) of payload.
    CpuPerGb,
    /// CPU time of the peer for each request, in µs.
    CpuPerRequest,
    /// CPU time of the peer for each round trip of a datagram, in µs.
    CpuPerReply,
    /// CPU time of the peer for each received datagram, in µs.
    CpuPerDatagram,
    /// Median latency, in µs.
    P50,
    /// 99th percentile of the latency, in µs.
    P99,
    /// 99.9th percentile of the latency, in µs.
    P999,
    /// Datagrams lost, in %.
    Loss,
    /// Private memory (`Private_Clean` and `Private_Dirty`), in kB.
    Private,
    /// Memory with shared pages counted in proportion (`Pss`), in kB.
    Pss,
    /// Threads.
    Threads,
    /// Private memory for each idle connection, in kB.
    PrivatePerConnection,
    /// Descriptors for each idle connection.
    FdsPerConnection,
    /// From the start of a process until it is ready, in ms.
    Start,
}

impl Metric {
    /// The column heading.
    pub(crate) fn heading(self) -> &'static str {
        match self {
            Self::Throughput => "Gbit/s",
            Self::Requests => "requests/s",
            Self::Replies => "replies/s",
            Self::Datagrams => "datagrams/s",
            Self::CpuPerGb => "CPU s/GB",
            Self::CpuPerRequest => "CPU µs/request",
            Self::CpuPerReply => "CPU µs/reply",
            Self::CpuPerDatagram => "CPU µs/datagram",
            Self::P50 => "p50 µs",
            Self::P99 => "p99 µs",
            Self::P999 => "p99.9 µs",
            Self::Loss => "lost %",
            Self::Private => "private kB",
            Self::Pss => "PSS kB",
            Self::Threads => "threads",
            Self::PrivatePerConnection => "private kB/conn",
            Self::FdsPerConnection => "fds/conn",
            Self::Start => "ms to ready",
        }
    }

    /// Its name in JSON, with its unit.
    pub(crate) fn key(self) -> String {
        let name = match self {
            Self::Throughput => "throughput_gbit_per_s",
            Self::Requests => "requests_per_s",
            Self::Replies => "replies_per_s",
            Self::Datagrams => "datagrams_per_s",
            Self::CpuPerGb => "cpu_s_per_gb",
            Self::CpuPerRequest => "cpu_us_per_request",
            Self::CpuPerReply => "cpu_us_per_reply",
            Self::CpuPerDatagram => "cpu_us_per_datagram",
            Self::P50 => "latency_p50_us",
            Self::P99 => "latency_p99_us",
            Self::P999 => "latency_p999_us",
            Self::Loss => "loss_percent",
            Self::Private => "private_kb",
            Self::Pss => "pss_kb",
            Self::Threads => "threads",
            Self::PrivatePerConnection => "private_kb_per_connection",
            Self::FdsPerConnection => "fds_per_connection",
            Self::Start => "start_ms",
        };
        name.into()
    }

    /// Whether higher is better.
    pub(crate) fn more_is_better(self) -> bool {
        matches!(self, Self::Throughput | Self::Requests | Self::Replies | Self::Datagrams)
    }

    /// Whether a ratio is meaningful; shares of datagrams and counts are not shown as ratios.
    pub(crate) fn has_ratio(self) -> bool {
        !matches!(self, Self::Loss | Self::Threads | Self::FdsPerConnection)
    }

    /// Formats a value with a suitable number of digits.
    pub(crate) fn show(self, value: f64) -> String {
        match value.abs() {
            0.0 => "0".into(),
            magnitude if magnitude >= 9_999.5 => format!("{:.1}k", value / 1e3),
            magnitude if magnitude >= 99.95 => format!("{value:.0}"),
            magnitude if magnitude >= 9.995 => format!("{value:.1}"),
            magnitude if magnitude >= 0.9995 => format!("{value:.2}"),
            _ => format!("{value:.3}"),
        }
    }
}
