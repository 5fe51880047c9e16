//! What a mapping is doing, and what it has done.
//!
//! The data path adds to these counters once per wake-up or batch, without ordering: a reader sees
//! each of them as it was a moment ago, not all of them as they were at one moment.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that any thread may change.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `count`.
    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// Takes one off what was added before.
    pub(crate) fn sub_one(&self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Why something that a client wanted did not happen, or did not finish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// The backend refused a connection.
    Refused,
    /// The backend did not answer a connection attempt in time.
    ConnectTimeout,
    /// No connection to the backend for another reason: no route, no descriptor.
    ConnectFailed,
    /// A connection was reset by either side.
    Broken,
    /// A connection was cut because it was idle for too long.
    Idle,
    /// A client was not let in, or a datagram of one.
    Denied,
    /// A connection was reset because there were too many.
    OverLimit,
    /// A flow could not be opened, and a datagram was lost.
    FlowFailed,
    /// A flow ended before its time, for there was no room for all.
    FlowDisplaced,
    /// A datagram was lost because the network refused it, at once or later (ICMP).
    DatagramRefused,
    /// A datagram was lost because there was no room for it, here or in the receive buffer of a socket, or because its flow
    /// ended while it waited.
    NoBuffer,
    /// A datagram was lost because it was larger than the way takes.
    TooLarge,
    /// A datagram was dropped because of its source: no client can have sent it, as that is the backend, a listener here, or
    /// nobody; or it is an answer to a flow that takes them from any port, and comes from another address.
    Forged,
}

impl FailureKind {
    /// All of them, in the order in which they are shown.
    pub const ALL: [Self; 13] = [
        Self::Refused,
        Self::ConnectTimeout,
        Self::ConnectFailed,
        Self::Broken,
        Self::Idle,
        Self::Denied,
        Self::OverLimit,
        Self::FlowFailed,
        Self::FlowDisplaced,
        Self::DatagramRefused,
        Self::NoBuffer,
        Self::TooLarge,
        Self::Forged,
    ];

    /// Its name in the control protocol.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Refused => "connect_refused",
            Self::ConnectTimeout => "connect_timeout",
            Self::ConnectFailed => "connect_failed",
            Self::Broken => "reset",
            Self::Idle => "idle",
            Self::Denied => "denied",
            Self::OverLimit => "over_limit",
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
    /// TCP connections there are now.
    pub connections: Counter,
    /// TCP connections there have been.
    pub connections_total: Counter,
    /// UDP flows there are now.
    pub flows: Counter,
    /// UDP flows there have been.
    pub flows_total: Counter,
    /// Bytes that backends took, over TCP and UDP.
    pub bytes_in: Counter,
    /// Bytes that clients took, over TCP and UDP.
    pub bytes_out: Counter,
    /// Datagrams for backends.
    pub datagrams_in: Counter,
    /// Datagrams for clients.
    pub datagrams_out: Counter,
    troubles: [Counter; FailureKind::ALL.len()],
}

impl Stats {
    /// How often `trouble` occurred.
    pub fn failure_kind(&self, failure_kind: FailureKind) -> u64 {
        self.troubles[failure_kind as usize].get()
    }

    /// Counts an occurrence of `trouble`.
    pub(crate) fn count(&self, failure_kind: FailureKind) {
        self.count_many(failure_kind, 1);
    }

    /// Counts `count` occurrences of `trouble`.
    pub(crate) fn count_many(&self, failure_kind: FailureKind, count: u64) {
        self.troubles[failure_kind as usize].add(count);
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
            stats.count(failure_kind);
            assert_eq!(stats.failure_kind(failure_kind), 1);
            let same_name = FailureKind::ALL.iter().filter(|other| other.as_str() == failure_kind.as_str());
            assert_eq!(same_name.count(), 1);
        }
    }
}
