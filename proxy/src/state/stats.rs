//! Counters of a mapping.
//!
//! The data path updates them once per wake-up or batch, with relaxed ordering. A reader sees a recent value
//! of each counter, but not a consistent snapshot of all.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rproxy_mapping::addr::Protocol;

/// A number that any thread may change.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `count`.
    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// Subtracts one.
    pub(crate) fn sub_one(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Why a client's request failed or was cut short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// The backend refused a connection.
    Refused,
    /// The backend did not accept a connection in time.
    ConnectTimeout,
    /// No connection to the backend for another reason: no route, no descriptor.
    ConnectFailed,
    /// A connection was reset by either side.
    Broken,
    /// A connection was reset because it was idle for too long.
    Idle,
    /// A client, or a datagram of one, was refused by `allow` or `deny`.
    Denied,
    /// The header of the PROXY protocol that a connection or datagram has to begin with was missing, wrong or late.
    BadProxyHeader,
    /// A connection or flow could not come from its client's address. It came from another one, or was refused with
    /// `source = "client-only"`.
    SourceUnavailable,
    /// A connection was reset because `max_connections` was reached.
    OverLimit,
    /// A connection was reset because its source had reached `max_connections_per_source`.
    OverSourceLimit,
    /// A connection was reset, or a datagram that begins a flow dropped, because its source exceeded `rate`.
    OverRate,
    /// A flow could not be opened, and a datagram was lost.
    FlowFailed,
    /// A flow was evicted to make room for another one.
    FlowDisplaced,
    /// A datagram was lost because the network refused it, at once or later (ICMP).
    DatagramRefused,
    /// A datagram was lost because a queue here or a socket's receive buffer was full, or because its flow
    /// ended while it was queued.
    NoBuffer,
    /// A datagram was lost because it is larger than the path allows.
    TooLarge,
    /// A datagram was dropped because of its source. Either no client can have sent it (the source is the
    /// backend, a listener of this process, or not a valid address), or it is a reply to a flow that accepts
    /// any port, but from another address.
    Forged,
}

impl FailureKind {
    /// All kinds, in display order.
    pub const ALL: [Self; 17] = [
        Self::Refused,
        Self::ConnectTimeout,
        Self::ConnectFailed,
        Self::Broken,
        Self::Idle,
        Self::Denied,
        Self::BadProxyHeader,
        Self::SourceUnavailable,
        Self::OverLimit,
        Self::OverSourceLimit,
        Self::OverRate,
        Self::FlowFailed,
        Self::FlowDisplaced,
        Self::DatagramRefused,
        Self::NoBuffer,
        Self::TooLarge,
        Self::Forged,
    ];

    /// The kinds that connections and flows have.
    pub const OF_BOTH: [Self; 4] =
        [Self::Denied, Self::BadProxyHeader, Self::SourceUnavailable, Self::OverRate];

    fn index_among_both(self) -> Option<usize> {
        Self::OF_BOTH.iter().position(|kind| *kind == self)
    }

    /// Whether clients of `protocol` can have it.
    pub fn is_of(self, protocol: Protocol) -> bool {
        let of_connections = match self {
            Self::Refused | Self::ConnectTimeout | Self::ConnectFailed => true,
            Self::Broken | Self::Idle | Self::OverLimit | Self::OverSourceLimit => true,
            Self::FlowFailed | Self::FlowDisplaced | Self::DatagramRefused => false,
            Self::NoBuffer | Self::TooLarge | Self::Forged => false,
            Self::Denied | Self::BadProxyHeader | Self::SourceUnavailable | Self::OverRate => return true,
        };
        of_connections == protocol.has_connections()
    }

    /// Its name in the control protocol.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Refused => "connect_refused",
            Self::ConnectTimeout => "connect_timeout",
            Self::ConnectFailed => "connect_failed",
            Self::Broken => "reset",
            Self::Idle => "idle",
            Self::Denied => "denied",
            Self::BadProxyHeader => "bad_proxy_header",
            Self::SourceUnavailable => "source_unavailable",
            Self::OverLimit => "over_limit",
            Self::OverSourceLimit => "over_source_limit",
            Self::OverRate => "over_rate",
            Self::FlowFailed => "flow_failed",
            Self::FlowDisplaced => "flow_displaced",
            Self::DatagramRefused => "datagram_refused",
            Self::NoBuffer => "no_buffer",
            Self::TooLarge => "too_large",
            Self::Forged => "forged",
        }
    }
}

/// The counters of a mapping.
#[derive(Debug, Default)]
pub struct Stats {
    /// Current connections, of TCP or SCTP.
    pub connections: Counter,
    /// Connections since the mapping was added.
    pub connections_total: Counter,
    /// Current UDP flows.
    pub flows: Counter,
    /// UDP flows since the mapping was added.
    pub flows_total: Counter,
    /// Bytes that backends accepted over connections.
    pub tcp_bytes_in: Counter,
    /// Bytes that clients accepted over connections.
    pub tcp_bytes_out: Counter,
    /// Bytes of datagrams to backends.
    pub udp_bytes_in: Counter,
    /// Bytes of datagrams to clients.
    pub udp_bytes_out: Counter,
    /// Datagrams to backends.
    pub datagrams_in: Counter,
    /// Datagrams to clients.
    pub datagrams_out: Counter,
    /// How long backends took to accept connections, if connections are recorded.
    pub connect_times: ConnectTimes,
    troubles: [Counter; FailureKind::ALL.len()],
    /// Those of UDP among [`FailureKind::OF_BOTH`].
    troubles_of_udp: [Counter; FailureKind::OF_BOTH.len()],
}

impl Stats {
    /// Bytes that backends accepted, over TCP and UDP.
    pub fn bytes_in(&self) -> u64 {
        self.tcp_bytes_in.get() + self.udp_bytes_in.get()
    }

    /// Bytes that clients accepted, over TCP and UDP.
    pub fn bytes_out(&self) -> u64 {
        self.tcp_bytes_out.get() + self.udp_bytes_out.get()
    }

    /// How often `failure_kind` occurred.
    pub fn failure_kind(&self, failure_kind: FailureKind) -> u64 {
        let of_udp = failure_kind.index_among_both().map_or(0, |index| self.troubles_of_udp[index].get());
        self.troubles[failure_kind as usize].get() + of_udp
    }

    /// How often `failure_kind` occurred to clients of a `protocol` that has it.
    pub fn failures_of(&self, protocol: Protocol, failure_kind: FailureKind) -> u64 {
        self.counter_of(protocol, failure_kind).get()
    }

    /// Counts an occurrence of `failure_kind`, which only one of the protocols has.
    pub(crate) fn count(&self, failure_kind: FailureKind) {
        debug_assert!(failure_kind.index_among_both().is_none(), "{failure_kind:?}: of which protocol?");
        self.count_many(failure_kind, 1);
    }

    /// Counts an occurrence of `failure_kind` to a client of this protocol.
    pub(crate) fn count_of(&self, protocol: Protocol, failure_kind: FailureKind) {
        self.counter_of(protocol, failure_kind).add(1);
    }

    fn counter_of(&self, protocol: Protocol, failure_kind: FailureKind) -> &Counter {
        match (protocol, failure_kind.index_among_both()) {
            (Protocol::Udp, Some(index)) => &self.troubles_of_udp[index],
            _ => &self.troubles[failure_kind as usize],
        }
    }

    /// Adds the totals of `other`, whose connections and flows have ended.
    pub(crate) fn absorb(&self, other: &Self) {
        for (counter, of_other) in [
            (&self.connections_total, &other.connections_total),
            (&self.flows_total, &other.flows_total),
            (&self.tcp_bytes_in, &other.tcp_bytes_in),
            (&self.tcp_bytes_out, &other.tcp_bytes_out),
            (&self.udp_bytes_in, &other.udp_bytes_in),
            (&self.udp_bytes_out, &other.udp_bytes_out),
            (&self.datagrams_in, &other.datagrams_in),
            (&self.datagrams_out, &other.datagrams_out),
        ] {
            counter.add(of_other.get());
        }
        let troubles = self.troubles.iter().zip(&other.troubles);
        let troubles = troubles.chain(self.troubles_of_udp.iter().zip(&other.troubles_of_udp));
        troubles.for_each(|(counter, of_other)| counter.add(of_other.get()));
        self.connect_times.absorb(&other.connect_times);
    }

    /// Counts `count` occurrences of `failure_kind`.
    pub(crate) fn count_many(&self, failure_kind: FailureKind, count: u64) {
        self.troubles[failure_kind as usize].add(count);
    }
}

/// How many backends have accepted a connection within which time.
#[derive(Debug, Default)]
pub struct ConnectTimes(OnceLock<Box<ConnectHistogram>>);

#[derive(Debug, Default)]
struct ConnectHistogram {
    /// The connections within each bound, but not within the one before; the last ones are within none.
    counts: [Counter; ConnectTimes::BOUNDS.len() + 1],
    /// In microseconds.
    sum: Counter,
}

impl ConnectTimes {
    /// The upper bounds of the buckets: those of containers on this host are below a millisecond, a lost SYN takes a second.
    pub const BOUNDS: [Duration; 10] = [
        Duration::from_micros(250),
        Duration::from_micros(500),
        Duration::from_millis(1),
        Duration::from_micros(2500),
        Duration::from_millis(10),
        Duration::from_millis(50),
        Duration::from_millis(250),
        Duration::from_secs(1),
        Duration::from_millis(2500),
        Duration::from_secs(10),
    ];

    /// Adds the connections of `other`.
    fn absorb(&self, other: &Self) {
        if let Some(other) = other.0.get() {
            let histogram = self.0.get_or_init(Box::default);
            let counts = histogram.counts.iter().zip(&other.counts);
            counts.for_each(|(counter, of_other)| counter.add(of_other.get()));
            histogram.sum.add(other.sum.get());
        }
    }

    /// Counts a connection.
    pub(crate) fn record(&self, time: Duration) {
        let histogram = self.0.get_or_init(Box::default);
        histogram.counts[Self::BOUNDS.partition_point(|bound| *bound < time)].add(1);
        histogram.sum.add(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    /// The connections within each of [`Self::BOUNDS`], but not within the one before, and those beyond. All are 0 if
    /// nothing was recorded.
    pub fn counts(&self) -> [u64; Self::BOUNDS.len() + 1] {
        let counts = self.0.get().map(|histogram| histogram.counts.each_ref().map(Counter::get));
        counts.unwrap_or_default()
    }

    /// The sum of all times.
    pub fn sum(&self) -> Duration {
        Duration::from_micros(self.0.get().map_or(0, |histogram| histogram.sum.get()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_trouble_has_a_place_and_a_name_of_its_own() {
        let stats = Stats::default();
        for (index, failure_kind) in FailureKind::ALL.into_iter().enumerate() {
            assert_eq!(failure_kind as usize, index);
            let protocols = [Protocol::Tcp, Protocol::Udp];
            let of = protocols.into_iter().filter(|protocol| failure_kind.is_of(*protocol));
            let of = of.inspect(|protocol| stats.count_of(*protocol, failure_kind)).collect::<Vec<_>>();
            assert_eq!(of.len() == 2, FailureKind::OF_BOTH.contains(&failure_kind));
            assert!(of.iter().all(|protocol| stats.failures_of(*protocol, failure_kind) == 1));
            assert_eq!(stats.failure_kind(failure_kind), of.len() as u64);
            let same_name = FailureKind::ALL.iter().filter(|other| other.as_str() == failure_kind.as_str());
            assert_eq!(same_name.count(), 1);
        }
    }

    #[test]
    fn what_has_ended_is_added_to_what_goes_on() {
        let (stats, ended) = (Stats::default(), Stats::default());
        for (place, counter) in [
            &ended.connections_total,
            &ended.flows_total,
            &ended.tcp_bytes_in,
            &ended.tcp_bytes_out,
            &ended.udp_bytes_in,
            &ended.udp_bytes_out,
            &ended.datagrams_in,
            &ended.datagrams_out,
        ]
        .into_iter()
        .enumerate()
        {
            counter.add(1 << place);
        }
        ended.count_of(Protocol::Udp, FailureKind::Denied);
        ended.count(FailureKind::Idle);
        ended.connect_times.record(Duration::from_millis(3));
        ended.connections.add(1);
        (0..2).for_each(|_| stats.absorb(&ended));
        assert_eq!((stats.connections_total.get(), stats.flows_total.get()), (2, 4));
        assert_eq!((stats.bytes_in(), stats.bytes_out()), (8 + 32, 16 + 64));
        assert_eq!((stats.datagrams_in.get(), stats.datagrams_out.get()), (128, 256));
        assert_eq!(stats.failures_of(Protocol::Udp, FailureKind::Denied), 2);
        assert_eq!(stats.failures_of(Protocol::Tcp, FailureKind::Denied), 0);
        assert_eq!(stats.failure_kind(FailureKind::Idle), 2);
        assert_eq!(
            (stats.connect_times.counts()[4], stats.connect_times.sum()),
            (2, Duration::from_millis(6))
        );
        assert_eq!(stats.connections.get(), 0, "what is current is not a total");
    }
}
