//! The state that the sockets and connections of a mapping share.

mod access_line;
pub(crate) mod backend_text;
pub(crate) mod client;
pub(crate) mod record;
pub(crate) mod recorder;
mod refusals;
pub(crate) mod sources;
pub mod stats;
pub(crate) mod task;

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rproxy_mapping::addr::HostSocketAddr;
use rproxy_mapping::backend::{BackendHost, HostName, NamedHost};
use rproxy_mapping::limits::Limits;
use rproxy_mapping::name::Name;
use rproxy_mapping::{Mapping, PortMapping};
use tokio::sync::Notify;

use crate::names::suspects;
use crate::runtime::poll::WatchedListener;
use crate::state::backend_text::BackendText;
use crate::state::client::ClientAddr;
use crate::state::record::{Ending, Record, RecordedPort};
use crate::state::recorder::Recorder;
use crate::state::sources::Sources;
use crate::state::stats::Stats;

/// A listening socket and its target.
#[derive(Clone, Debug)]
pub(crate) struct Binding {
    /// The socket.
    pub(crate) port: Arc<WatchedListener>,
    /// Where its clients are relayed to, and how.
    pub(crate) target: Arc<Target>,
}

/// Where the clients of one port of a mapping are relayed to, and how they are served.
#[derive(Debug)]
pub(crate) struct Target {
    /// The port of the mapping and of the backend.
    pub(crate) port_mapping: PortMapping,
    /// The policy, shared with the other ports.
    pub(crate) policy: Arc<MappingPolicy>,
    /// The name of the backend and all its addresses, if it has a name. That of the port mapping is the first.
    pub(crate) named: Option<NamedHost>,
}

impl Target {
    /// The target of a port whose backend has an address.
    pub(crate) fn new(port_mapping: PortMapping, policy: Arc<MappingPolicy>) -> Self {
        Self { port_mapping, policy, named: None }
    }

    /// The target of a port of `mapping`.
    pub(crate) fn of(mapping: &Mapping, port_mapping: PortMapping, policy: Arc<MappingPolicy>) -> Self {
        let named = match mapping.backend() {
            BackendHost::Name(host) => Some(host.clone()),
            BackendHost::Ip(_) | BackendHost::Unix(_) => None,
        };
        Self { port_mapping, policy, named }
    }

    /// Refuses a backend whose name does not resolve, which may do so by now.
    ///
    /// # Errors
    /// One that names it.
    pub(crate) fn ensure_resolved(&self) -> io::Result<()> {
        match &self.named {
            Some(host) if self.port_mapping.backend.is_nowhere() => {
                suspects::report(host.name());
                Err(io::Error::other(self.unresolved().unwrap_or_default()))
            }
            _ => Ok(()),
        }
    }

    /// Why the name of the backend leads nowhere, if it does.
    pub(crate) fn unresolved(&self) -> Option<String> {
        let host = self.named.as_ref()?;
        host.no_address().map(|why| format!("the name {} {why}", host.name()))
    }

    /// The name of the backend while it leads nowhere.
    fn unresolved_name(&self) -> Option<&HostName> {
        self.named.as_ref().filter(|_host| self.port_mapping.backend.is_nowhere()).map(NamedHost::name)
    }

    /// The backend, as people are shown it.
    pub(crate) fn backend_text(&self) -> BackendText<'_> {
        BackendText::of(&self.port_mapping.backend, self.unresolved_name())
    }

    /// The same with another address of the backend.
    pub(crate) fn at(&self, ip: IpAddr) -> Self {
        let port_mapping = self.port_mapping.at(ip);
        Self { port_mapping, policy: self.policy.clone(), named: self.named.clone() }
    }

    /// The address that a datagram was sent to, of which the kernel tells the IP address if its socket has several.
    pub(crate) fn asked(&self, ip: Option<IpAddr>) -> SocketAddr {
        // Datagrams never come by a Unix socket.
        let nowhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let mut asked = self.port_mapping.host.inet_addr().unwrap_or(nowhere);
        ip.into_iter().for_each(|ip| asked.set_ip(ip));
        asked
    }

    /// The mapping, as recorded.
    fn recorded_port(&self) -> RecordedPort {
        let MappingPolicy { limits, state } = &*self.policy;
        let (mapping, port_mapping) = (state.name.clone(), self.port_mapping.clone());
        let unresolved = self.unresolved_name().cloned();
        RecordedPort { mapping, port_mapping, unresolved, is_logged: limits.access_log }
    }
}

/// How new connections and flows of a mapping are served. A change of the limits creates a new policy;
/// existing connections keep the one they started with.
#[derive(Debug)]
pub(crate) struct MappingPolicy {
    /// The limits of connections and flows.
    pub(crate) limits: Arc<Limits>,
    /// The state of the mapping, which survives a change of the policy.
    pub(crate) state: Arc<MappingState>,
}

impl Target {
    /// The name of the mapping, which every line about it has.
    pub(crate) fn name(&self) -> &Name {
        &self.policy.state.name
    }
}

/// The minimum time between two log lines saying that a mapping is full.
const TOLD_FULL: Duration = Duration::from_secs(60);

/// The state of a mapping.
#[derive(Debug)]
#[cfg_attr(test, derive(Default))]
pub(crate) struct MappingState {
    /// The name of the mapping.
    pub(crate) name: Name,
    pub(crate) stats: Stats,
    /// Connections that count towards the limit.
    connections: AtomicUsize,
    /// Whether a client waits for a connection to end.
    is_full: AtomicBool,
    /// Set once a log line said that the mapping is full; cleared when it is half empty.
    told_full: AtomicBool,
    /// When that was logged last.
    told_full_at: Mutex<Option<Instant>>,
    /// What each source of clients has, if there are limits for it. On the heap, because few mappings have such.
    sources: OnceLock<Box<Sources>>,
    /// Notified when a connection has ended that a client waited for.
    capacity: Arc<Capacity>,
    /// Records its connections and flows, if anybody can ask for them.
    recorder: Option<Arc<Recorder>>,
}

/// A limited resource of the process, such as descriptors, that connections and flows release when they end.
#[derive(Debug, Default)]
pub(crate) struct Capacity {
    freed: Notify,
    is_awaited: AtomicBool,
}

impl Capacity {
    /// Requests a notification when the next connection or flow ends. Returns whether one was already
    /// requested. If not, one may have ended in between, so the caller has to recheck.
    pub(crate) fn request(&self) -> bool {
        self.is_awaited.swap(true, Ordering::SeqCst)
    }

    /// Waits for a notification.
    pub(crate) async fn freed(&self) {
        self.freed.notified().await;
    }

    /// Notifies that a connection or flow has ended and its descriptors are closed.
    fn free(&self) {
        if self.is_awaited.load(Ordering::SeqCst) && self.is_awaited.swap(false, Ordering::SeqCst) {
            self.freed.notify_one();
        }
    }
}

impl MappingState {
    /// The state of the mapping `name`, without connections. `capacity` is notified when a connection ends that a
    /// client waits for. The `recorder` records its connections and flows.
    pub(crate) fn new(name: Name, capacity: Arc<Capacity>, recorder: Option<Arc<Recorder>>) -> Self {
        Self {
            name,
            stats: Stats::default(),
            connections: AtomicUsize::default(),
            is_full: AtomicBool::default(),
            told_full: AtomicBool::default(),
            told_full_at: Mutex::default(),
            sources: OnceLock::new(),
            capacity,
            recorder,
        }
    }

    /// What each source of clients has.
    fn sources(&self) -> &Sources {
        self.sources.get_or_init(Box::default)
    }

    /// Whether to log that the mapping is full: not if it was already full and has not been half empty since,
    /// and not within [`TOLD_FULL`] of the last line. A small mapping becomes half empty whenever a
    /// connection ends.
    pub(crate) fn tell_full(&self) -> bool {
        self.tell_full_at(Instant::now())
    }

    fn tell_full_at(&self, now: Instant) -> bool {
        if self.told_full.swap(true, Ordering::Relaxed) {
            return false;
        }
        let mut last = self.told_full_at.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = last.is_none_or(|last| now.duration_since(last) >= TOLD_FULL);
        if is_due {
            *last = Some(now);
        }
        is_due
    }

    /// Whether a client waits for a connection to end, and none has ended yet.
    pub(crate) fn is_full(&self) -> bool {
        self.is_full.load(Ordering::SeqCst)
    }
}

impl MappingPolicy {
    /// Whether the limits allow another connection. If not, the end of one will be notified.
    pub(crate) fn has_room(&self) -> bool {
        let Some(most) = self.limits.max_connections else {
            return true;
        };
        let MappingState { connections, is_full, .. } = &*self.state;
        let now = connections.load(Ordering::SeqCst);
        if now < most {
            if now <= most / 2 && self.state.told_full.load(Ordering::Relaxed) {
                self.state.told_full.store(false, Ordering::Relaxed);
            }
            return true;
        }
        // Set the flag, then recheck: a connection that ends in between is seen or notifies.
        is_full.store(true, Ordering::SeqCst);
        let has_room = connections.load(Ordering::SeqCst) < most;
        if has_room {
            is_full.store(false, Ordering::SeqCst);
        }
        has_room
    }

    /// Has sources get new connections and flows at the rate of this policy from now on.
    pub(crate) fn apply_rate(&self) {
        if self.limits.rate.is_some() || self.state.sources.get().is_some() {
            self.state.sources().set_rate(self.limits.rate, Instant::now());
        }
    }

    /// Whether a client at `ip` is served.
    pub(crate) fn would_admit(&self, ip: IpAddr) -> bool {
        self.limits.access.refusal(Some(ip)).is_none()
    }
}

/// Counts a connection of a mapping until dropped, which must be after its sockets are closed.
#[derive(Debug)]
pub(crate) struct ConnectionGuard(Recorded);

impl ConnectionGuard {
    /// Counts another connection.
    pub(crate) fn take(target: &Arc<Target>) -> Self {
        let state = &target.policy.state;
        state.connections.fetch_add(1, Ordering::SeqCst);
        state.stats.connections.add(1);
        state.stats.connections_total.add(1);
        Self(Recorded::new(target))
    }

    /// Records the connection of `peer`, who has connected to `host`, if anybody can ask for it.
    pub(crate) fn record_as<H: Into<HostSocketAddr>>(
        &mut self,
        peer: impl Into<ClientAddr>,
        host: impl FnOnce() -> H,
    ) {
        self.0.record_as(peer.into(), host);
    }

    /// The record, if there is one.
    pub(crate) fn record(&self) -> Option<&Arc<Record>> {
        self.0.record.as_ref()
    }

    /// Records how the connection ends.
    pub(crate) fn end(&self, ending: Ending) {
        self.0.record.iter().for_each(|record| record.end(ending));
    }

    /// Where the connection is relayed to, and how it is served.
    pub(crate) fn target(&self) -> &Arc<Target> {
        &self.0.target
    }

    /// Relays the connection, which has not been dialled yet, to another target of its mapping.
    pub(crate) fn set_target(&mut self, target: Arc<Target>) {
        debug_assert!(Arc::ptr_eq(&target.policy.state, self.state()), "it counts there");
        self.0.target = target;
    }

    /// The port that the connection belongs to.
    pub(crate) fn port_mapping(&self) -> &PortMapping {
        &self.0.target.port_mapping
    }

    /// The limits of the connection.
    pub(crate) fn limits(&self) -> &Limits {
        &self.0.target.policy.limits
    }

    /// The state of the connection's mapping.
    pub(crate) fn state(&self) -> &Arc<MappingState> {
        &self.0.target.policy.state
    }

    /// Whether `client` is served. If not, counts and logs that.
    pub(crate) fn admits(&self, client: ClientAddr) -> bool {
        self.0.target.admits(client)
    }

    /// The counters of the connection's mapping.
    pub(crate) fn stats(&self) -> &Stats {
        &self.0.target.policy.state.stats
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        let state = &self.0.target.policy.state;
        state.stats.connections.sub_one();
        state.connections.fetch_sub(1, Ordering::SeqCst);
        if state.is_full.swap(false, Ordering::SeqCst) {
            state.capacity.freed.notify_one();
        }
        state.capacity.free();
    }
}

/// Counts a flow of a mapping until dropped, which must be after its socket is closed.
#[derive(Debug)]
pub(crate) struct FlowGuard(Recorded);

impl FlowGuard {
    /// Counts another flow.
    pub(crate) fn take(target: &Arc<Target>) -> Self {
        let stats = &target.policy.state.stats;
        stats.flows.add(1);
        stats.flows_total.add(1);
        Self(Recorded::new(target))
    }

    /// Records the flow of `peer`, who has sent to `host`, if anybody can ask for it.
    pub(crate) fn record_as<H: Into<HostSocketAddr>>(
        &mut self,
        peer: impl Into<ClientAddr>,
        host: impl FnOnce() -> H,
    ) {
        self.0.record_as(peer.into(), host);
    }

    /// The record, if there is one.
    pub(crate) fn record(&self) -> Option<&Arc<Record>> {
        self.0.record.as_ref()
    }

    /// Where the flow is relayed to, and how it is served.
    pub(crate) fn target(&self) -> &Arc<Target> {
        &self.0.target
    }
}

impl Drop for FlowGuard {
    fn drop(&mut self) {
        let state = &self.0.target.policy.state;
        state.stats.flows.sub_one();
        state.capacity.free();
    }
}

/// The target of a connection or flow, and its record, which ends when this is dropped.
#[derive(Debug)]
struct Recorded {
    target: Arc<Target>,
    record: Option<Arc<Record>>,
}

impl Recorded {
    fn new(target: &Arc<Target>) -> Self {
        Self { target: target.clone(), record: None }
    }

    fn record_as<H: Into<HostSocketAddr>>(&mut self, peer: ClientAddr, host: impl FnOnce() -> H) {
        let recorder = self.target.policy.state.recorder.as_ref();
        self.record = recorder.and_then(|recorder| recorder.open(self.target.recorded_port(), peer, host));
    }
}

impl Drop for Recorded {
    fn drop(&mut self) {
        if let (Some(recorder), Some(record)) = (&self.target.policy.state.recorder, &self.record) {
            recorder.close(record);
        }
    }
}

#[cfg(test)]
mod tests {
    use rproxy_mapping::addr::Protocol;

    use super::*;

    fn target(max_connections: usize, capacity: Arc<Capacity>) -> Arc<Target> {
        let backend = "192.0.2.1:80".parse().unwrap();
        let host = "127.0.0.1:80".parse().unwrap();
        let port_mapping = PortMapping { protocol: Protocol::Tcp, host, backend, v6only: false };
        let limits = Limits { max_connections: Some(max_connections), ..Limits::default() };
        let policy = Arc::new(MappingPolicy {
            limits: limits.into(),
            state: Arc::new(MappingState::new(Name::default(), capacity, None)),
        });
        Arc::new(Target::new(port_mapping, policy))
    }

    fn block_on(future: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future);
    }

    #[test]
    fn a_full_mapping_tells_when_there_is_room_again() {
        let capacity = Arc::new(Capacity::default());
        let target = target(2, capacity.clone());
        let MappingPolicy { state, .. } = &*target.policy;

        let places = [ConnectionGuard::take(&target), ConnectionGuard::take(&target)];
        assert!(!target.policy.has_room() && state.is_full());
        drop(places);
        assert!(!state.is_full() && target.policy.has_room());
        block_on(capacity.freed());
        assert_eq!([state.stats.connections.get(), state.stats.connections_total.get()], [0, 2]);
    }

    #[test]
    fn that_a_small_mapping_is_full_is_told_once_a_minute() {
        let target = target(2, Arc::default());
        let MappingPolicy { state, .. } = &*target.policy;
        let start = Instant::now();
        let told = [0, 1, 59, 60, 61].map(|seconds| {
            let places = [ConnectionGuard::take(&target), ConnectionGuard::take(&target)];
            assert!(!target.policy.has_room());
            let told = state.tell_full_at(start + Duration::from_secs(seconds));
            drop(places);
            assert!(target.policy.has_room(), "and it is half empty");
            told
        });
        assert_eq!(told, [true, false, false, true, false]);
    }

    #[test]
    fn the_end_of_a_connection_or_flow_is_notified_to_whoever_lacks_what_it_held() {
        let capacity = Arc::new(Capacity::default());
        let target = target(2, capacity.clone());
        for take in [
            |target| drop(ConnectionGuard::take(target)),
            |target: &Arc<Target>| drop(FlowGuard::take(target)),
        ] {
            assert!(!capacity.request(), "nobody has asked since the last notification");
            assert!(capacity.request());
            take(&target);
            block_on(capacity.freed());
        }
    }
}
