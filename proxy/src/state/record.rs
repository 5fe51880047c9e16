//! The record of a single connection or flow, for whoever asks for what is live, and for the access log.
//!
//! Its connection or flow writes it with relaxed ordering; any thread may read it meanwhile.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use rproxy_mapping::PortMapping;
use rproxy_mapping::addr::{BackendAddr, HostSocketAddr};
use rproxy_mapping::backend::HostName;
use rproxy_mapping::name::Name;

use crate::state::Target;
use crate::state::backend_text::BackendText;
use crate::state::client::ClientAddr;

/// How a connection or flow ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// In order, the client first.
    ClientClosed,
    /// In order, the backend first.
    BackendClosed,
    /// The client reset it, or was reported unreachable.
    ClientReset,
    /// The backend reset it, or was reported unreachable.
    BackendReset,
    /// The client acknowledged nothing any more (`ETIMEDOUT`, tcp(7)).
    ClientTimeout,
    /// The backend acknowledged nothing any more.
    BackendTimeout,
    /// It was idle for as long as its mapping permits.
    Idle,
    /// The backend refused the connection.
    ConnectRefused,
    /// The backend did not accept the connection in time.
    ConnectTimeout,
    /// There was no connection to the backend for another reason.
    ConnectFailed,
    /// It has to come from its client's address, and cannot.
    SourceUnavailable,
    /// The header of the PROXY protocol was missing, wrong or late.
    BadProxyHeader,
    /// `allow` or `deny` refuse the client.
    Denied,
    /// The mapping has reached `max_connections`.
    OverLimit,
    /// Its source has reached `max_connections_per_source`.
    OverSourceLimit,
    /// Its source exceeds `rate`.
    OverRate,
    /// A flow gave way to another one.
    Evicted,
    /// A user ended it.
    Cut,
    /// Its mapping is served no longer, or its backend is another one now.
    Removed,
    /// Another process serves it from here on.
    HandedOver,
    /// The process ended.
    Drain,
}

impl Ending {
    /// All, in the order of their numbers.
    pub(crate) const ALL: [Self; 21] = [
        Self::ClientClosed,
        Self::BackendClosed,
        Self::ClientReset,
        Self::BackendReset,
        Self::ClientTimeout,
        Self::BackendTimeout,
        Self::Idle,
        Self::ConnectRefused,
        Self::ConnectTimeout,
        Self::ConnectFailed,
        Self::SourceUnavailable,
        Self::BadProxyHeader,
        Self::Denied,
        Self::OverLimit,
        Self::OverSourceLimit,
        Self::OverRate,
        Self::Evicted,
        Self::Cut,
        Self::Removed,
        Self::HandedOver,
        Self::Drain,
    ];

    /// Its name in the access log.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::ClientClosed => "client_closed",
            Self::BackendClosed => "backend_closed",
            Self::ClientReset => "client_reset",
            Self::BackendReset => "backend_reset",
            Self::ClientTimeout => "client_timeout",
            Self::BackendTimeout => "backend_timeout",
            Self::Idle => "idle",
            Self::ConnectRefused => "connect_refused",
            Self::ConnectTimeout => "connect_timeout",
            Self::ConnectFailed => "connect_failed",
            Self::SourceUnavailable => "source_unavailable",
            Self::BadProxyHeader => "bad_proxy_header",
            Self::Denied => "denied",
            Self::OverLimit => "over_limit",
            Self::OverSourceLimit => "over_source_limit",
            Self::OverRate => "over_rate",
            Self::Evicted => "evicted",
            Self::Cut => "cut",
            Self::Removed => "removed",
            Self::HandedOver => "handed_over",
            Self::Drain => "drain",
        }
    }
}

/// The port of a mapping that a connection or flow belongs to.
#[derive(Clone, Debug)]
pub(crate) struct RecordedPort {
    /// Its name.
    pub(crate) mapping: Name,
    /// Where the client comes in, and where it is relayed to.
    pub(crate) port_mapping: PortMapping,
    /// The name of the backend if it led nowhere.
    pub(crate) unresolved: Option<HostName>,
    /// Whether the access log has lines about it.
    pub(crate) is_logged: bool,
}

/// The connection of a client, or its flow.
#[derive(Debug)]
pub(crate) struct Record {
    /// Its number, unique in this process.
    pub(crate) id: u64,
    /// Where its recorder keeps it.
    pub(super) slot: usize,
    /// The address that the client has connected or sent to.
    pub(crate) host: HostSocketAddr,
    /// Its port of a mapping.
    pub(crate) port: RecordedPort,
    /// When it was accepted.
    pub(crate) opened: Time,
    pub(crate) to_backend: Traffic,
    pub(crate) to_client: Traffic,
    peer: ClientAddr,
    told: OnceLock<Box<Told>>,
    /// The address that was reached of a backend with several.
    reached: OnceLock<Box<BackendAddr>>,
    connected: Moment,
    /// The number of the ending behind 0.
    ending: AtomicU8,
}

/// What the header of a proxy in front has told, on the heap because few records have it.
#[derive(Debug)]
struct Told {
    client: ClientAddr,
    /// The backend by then.
    backend: BackendAddr,
    /// Its name if it led nowhere.
    unresolved: Option<HostName>,
}

impl Record {
    /// A record that begins now.
    pub(super) fn new(
        (id, slot): (u64, usize),
        peer: ClientAddr,
        host: HostSocketAddr,
        port: RecordedPort,
    ) -> Self {
        let opened = Time::now();
        Self {
            id,
            slot,
            host,
            port,
            opened,
            to_backend: Traffic::new(opened),
            to_client: Traffic::new(opened),
            peer,
            told: OnceLock::new(),
            reached: OnceLock::new(),
            connected: Moment::default(),
            ending: AtomicU8::new(0),
        }
    }

    /// Its client, whom a proxy in front may have told.
    pub(crate) fn client(&self) -> ClientAddr {
        self.told.get().map_or(self.peer, |told| told.client)
    }

    /// Where it is relayed to.
    pub(crate) fn backend(&self) -> &BackendAddr {
        let asked = || self.told.get().map_or(&self.port.port_mapping.backend, |told| &told.backend);
        self.reached.get().map_or_else(asked, Box::as_ref)
    }

    /// The same, as people are shown it.
    pub(crate) fn backend_text(&self) -> BackendText<'_> {
        let unresolved = self.told.get().map_or(&self.port.unresolved, |told| &told.unresolved);
        let backend = self.backend();
        BackendText::of(backend, unresolved.as_ref().filter(|_name| backend.is_nowhere()))
    }

    /// Records the header of a proxy in front: for whom it speaks, and where the connection is relayed to from then on.
    pub(crate) fn set_told(&self, client: ClientAddr, target: &Target) {
        let told = || Told {
            client,
            backend: target.port_mapping.backend.clone(),
            unresolved: target.unresolved_name().cloned(),
        };
        self.told.get_or_init(|| Box::new(told()));
    }

    /// Records which address of the backend was reached, if it is not the first.
    pub(crate) fn set_reached(&self, backend: &BackendAddr) {
        if backend != self.backend() {
            self.reached.get_or_init(|| Box::new(backend.clone()));
        }
    }

    /// Records that the backend has accepted the connection. Returns how long that took since it was dialled.
    pub(crate) fn set_connected(&self, dialled: Time) -> Duration {
        let now = Time::now();
        self.connected.set(now);
        now.since(dialled)
    }

    /// How long the backend took to accept the connection, if it has.
    pub(crate) fn connect_time(&self) -> Option<Duration> {
        self.connected.get().map(|at| at.since(self.opened))
    }

    /// How long the first byte to the client took, if there was one.
    pub(crate) fn first_byte_time(&self) -> Option<Duration> {
        self.to_client.first.get().map(|at| at.since(self.opened))
    }

    /// For how long it exists.
    pub(crate) fn age(&self) -> Duration {
        Time::now().since(self.opened)
    }

    /// How long nothing was relayed, with the resolution of the kernel's tick.
    pub(crate) fn idle_time(&self) -> Duration {
        let last = self.to_backend.last.get().max(self.to_client.last.get());
        Time::coarse().since(last.unwrap_or(self.opened))
    }

    /// Records how it ends. The first reason counts: the others follow from it.
    pub(crate) fn end(&self, ending: Ending) {
        let number = ending as u8 + 1;
        // Fails if there is one.
        self.ending.compare_exchange(0, number, Ordering::Relaxed, Ordering::Relaxed).ok();
    }

    /// How it ended, if that is known.
    pub(crate) fn ending(&self) -> Option<Ending> {
        let number = usize::from(self.ending.load(Ordering::Relaxed));
        number.checked_sub(1).map(|index| Ending::ALL[index])
    }

    /// Its state, as people are shown it.
    pub(crate) fn state(&self) -> &'static str {
        let is_connection = self.port.port_mapping.protocol.has_connections();
        match (self.to_backend.has_ended(), self.to_client.has_ended()) {
            _ if is_connection && self.connected.get().is_none() => "dialling",
            (false, false) => "open",
            (true, false) => "closed_by_client",
            (false, true) => "closed_by_backend",
            (true, true) => "closing",
        }
    }

    /// Whether its bytes are spliced, or were.
    pub(crate) fn is_spliced(&self) -> bool {
        [&self.to_backend, &self.to_client].iter().any(|traffic| traffic.is_spliced.load(Ordering::Relaxed))
    }
}

/// What one direction of a connection or flow has relayed. Only its task writes it.
#[derive(Debug)]
pub(crate) struct Traffic {
    bytes: AtomicU64,
    datagrams: AtomicU64,
    first: Moment,
    last: Moment,
    is_spliced: AtomicBool,
    has_ended: AtomicBool,
}

impl Traffic {
    fn new(opened: Time) -> Self {
        let last = Moment::default();
        last.set(opened);
        Self {
            bytes: AtomicU64::new(0),
            datagrams: AtomicU64::new(0),
            first: Moment::default(),
            last,
            is_spliced: AtomicBool::new(false),
            has_ended: AtomicBool::new(false),
        }
    }

    /// Counts bytes of a stream.
    pub(crate) fn add(&self, bytes: u64) {
        if self.first.get().is_none() && bytes > 0 {
            self.first.set(Time::now());
        }
        self.bytes.store(self.bytes() + bytes, Ordering::Relaxed);
        self.last.set(Time::coarse());
    }

    /// Counts datagrams.
    pub(crate) fn add_datagrams(&self, datagrams: u64, bytes: u64) {
        self.datagrams.store(self.datagrams() + datagrams, Ordering::Relaxed);
        self.add(bytes);
    }

    /// Records that bytes are spliced.
    pub(crate) fn note_spliced(&self) {
        self.is_spliced.store(true, Ordering::Relaxed);
    }

    /// Records that its sender has ended it.
    pub(crate) fn note_end(&self) {
        self.has_ended.store(true, Ordering::Relaxed);
    }

    fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::Relaxed)
    }

    /// The bytes so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The datagrams so far.
    pub(crate) fn datagrams(&self) -> u64 {
        self.datagrams.load(Ordering::Relaxed)
    }
}

/// A time in microseconds of `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Time(u64);

impl Time {
    /// Now.
    pub(crate) fn now() -> Self {
        Self::of(ClockId::CLOCK_MONOTONIC)
    }

    /// Now or a few milliseconds ago. It takes a fraction of the time, so that the data path can afford it
    /// (clock_gettime(2)).
    fn coarse() -> Self {
        Self::of(ClockId::CLOCK_MONOTONIC_COARSE)
    }

    /// What `clock` shows. libc reads both clocks without a system call (vdso(7)), which a filter would make slower still.
    fn of(clock: ClockId) -> Self {
        let now = clock_gettime(clock).map(Duration::from).expect("Linux has had both clocks since 2.6.32");
        Self(now.as_secs() * 1_000_000 + u64::from(now.subsec_micros()))
    }

    /// The time from `earlier` until this one.
    pub(crate) fn since(self, earlier: Self) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

/// A time that is recorded later.
#[derive(Debug, Default)]
struct Moment(AtomicU64);

impl Moment {
    fn set(&self, time: Time) {
        self.0.store(time.0, Ordering::Relaxed);
    }

    fn get(&self) -> Option<Time> {
        let time = self.0.load(Ordering::Relaxed);
        (time != 0).then_some(Time(time))
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;

    use rproxy_mapping::addr::Protocol;

    use super::*;
    use crate::state::MappingPolicy;

    fn record(protocol: Protocol) -> Record {
        let [peer, host]: [SocketAddr; 2] =
            ["192.0.2.7:5000", "203.0.113.1:80"].map(|text| text.parse().unwrap());
        let backend = "172.17.0.2:80".parse().unwrap();
        let port_mapping = PortMapping { protocol, host: "[::]:80".parse().unwrap(), backend, v6only: false };
        Record::new(
            (1, 0),
            peer.into(),
            host.into(),
            RecordedPort { mapping: Name::default(), port_mapping, unresolved: None, is_logged: true },
        )
    }

    #[test]
    fn each_ending_has_a_number_and_a_name_of_its_own() {
        for (index, ending) in Ending::ALL.into_iter().enumerate() {
            assert_eq!(ending as usize, index);
            let same_name = Ending::ALL.iter().filter(|other| other.as_str() == ending.as_str());
            assert_eq!(same_name.count(), 1);
        }
    }

    #[test]
    fn the_first_reason_to_end_is_kept() {
        let record = record(Protocol::Tcp);
        assert_eq!(record.ending(), None);
        record.end(Ending::Cut);
        record.end(Ending::Drain);
        assert_eq!(record.ending(), Some(Ending::Cut));
    }

    #[test]
    fn a_connection_is_dialling_open_half_closed_and_closing() {
        let record = record(Protocol::Tcp);
        assert_eq!(record.state(), "dialling");
        assert_eq!((record.connect_time(), record.first_byte_time()), (None, None));
        let dialled = Time(record.opened.0 - 1_000_000);
        let took = record.set_connected(dialled);
        assert_eq!(took, record.connect_time().unwrap() + Duration::from_secs(1), "only the dial counts");
        assert_eq!(record.state(), "open");
        record.to_client.add(7);
        assert!(record.first_byte_time() >= record.connect_time());
        record.to_client.note_end();
        assert_eq!(record.state(), "closed_by_backend");
        record.to_backend.note_end();
        assert_eq!(record.state(), "closing");
    }

    #[test]
    fn a_flow_is_open_and_has_the_client_that_its_proxy_tells() {
        let record = record(Protocol::Udp);
        assert_eq!((record.state(), record.client().inet_addr().unwrap().port()), ("open", 5000));
        let [told, backend] = ["198.51.100.9:7", "172.17.0.3:80"];
        let policy = MappingPolicy { limits: Arc::default(), state: Arc::default() };
        let port_mapping =
            PortMapping { backend: backend.parse().unwrap(), ..record.port.port_mapping.clone() };
        record
            .set_told(ClientAddr::Inet(told.parse().unwrap()), &Target::new(port_mapping, Arc::new(policy)));
        assert_eq!(
            (record.client().to_string(), record.backend().to_string()),
            (told.into(), backend.into())
        );
        record.to_backend.add_datagrams(2, 30);
        assert_eq!((record.to_backend.datagrams(), record.to_backend.bytes()), (2, 30));
        assert!(record.first_byte_time().is_none());
    }
}
