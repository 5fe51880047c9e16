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
    /// CPU time for each unit: in s for [`Unit::Gb`], in µs for the others.
    Cpu(CpuOf, Unit),
    /// Median latency, in µs.
    P50,
    /// 99th percentile of the latency, in µs.
    P99,
    /// 99.9th percentile of the latency, in µs.
    P999,
    /// Datagrams, or packets of QUIC, that were lost, in %.
    Loss,
    /// How often QUIC has reduced a congestion window, per second.
    Congestion,
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

/// Whose CPU time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CpuOf {
    /// The peer's.
    Peer,
    /// That of the whole machine: also the client's, the backend's, and what the kernel does for the peer beside it.
    Machine,
}

/// What CPU time is spent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// 10⁹ bytes of payload.
    Gb,
    /// A request and its response.
    Request,
    /// A round trip of a datagram.
    Reply,
    /// A received datagram.
    Datagram,
}

impl Unit {
    /// How many of what [`Metric::Cpu`] is measured in make up a second.
    pub(crate) fn per_second(self) -> f64 {
        if self == Self::Gb { 1.0 } else { 1e6 }
    }

    fn heading(self) -> &'static str {
        match self {
            Self::Gb => "s/GB",
            Self::Request => "µs/request",
            Self::Reply => "µs/reply",
            Self::Datagram => "µs/datagram",
        }
    }

    fn key(self) -> &'static str {
        match self {
            Self::Gb => "s_per_gb",
            Self::Request => "us_per_request",
            Self::Reply => "us_per_reply",
            Self::Datagram => "us_per_datagram",
        }
    }
}

impl Metric {
    /// The column heading.
    pub(crate) fn heading(self) -> String {
        let heading = match self {
            Self::Cpu(CpuOf::Peer, unit) => return format!("CPU {}", unit.heading()),
            Self::Cpu(CpuOf::Machine, unit) => return format!("all CPU {}", unit.heading()),
            Self::Throughput => "Gbit/s",
            Self::Requests => "requests/s",
            Self::Replies => "replies/s",
            Self::Datagrams => "datagrams/s",
            Self::P50 => "p50 µs",
            Self::P99 => "p99 µs",
            Self::P999 => "p99.9 µs",
            Self::Loss => "lost %",
            Self::Congestion => "congestion/s",
            Self::Private => "private kB",
            Self::Pss => "PSS kB",
            Self::Threads => "threads",
            Self::PrivatePerConnection => "private kB/conn",
            Self::FdsPerConnection => "fds/conn",
            Self::Start => "ms to ready",
        };
        heading.into()
    }

    /// Its name in JSON, with its unit.
    pub(crate) fn key(self) -> String {
        let name = match self {
            Self::Throughput => "throughput_gbit_per_s",
            Self::Requests => "requests_per_s",
            Self::Replies => "replies_per_s",
            Self::Datagrams => "datagrams_per_s",
            Self::Cpu(CpuOf::Peer, unit) => return format!("cpu_{}", unit.key()),
            Self::Cpu(CpuOf::Machine, unit) => return format!("machine_cpu_{}", unit.key()),
            Self::P50 => "latency_p50_us",
            Self::P99 => "latency_p99_us",
            Self::P999 => "latency_p999_us",
            Self::Loss => "loss_percent",
            Self::Congestion => "congestion_events_per_s",
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
        !matches!(self, Self::Loss | Self::Congestion | Self::Threads | Self::FdsPerConnection)
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
