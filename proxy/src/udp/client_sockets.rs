//! Tracks which flows have client sockets, and selects those to close: for reuse by another flow, or because they are
//! no longer needed.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::client_socket::ClientSocket;
use super::flow::Flow;
use super::key::FlowKey;
use super::shared::Shared;
use super::table::{FlowId, FlowTable};

/// Maximum number of client sockets: their datagrams and a listener's fit the queue of a device (`txqueuelen`, 1,000
/// packets by default). At the limit, sockets of blocking clients are closed for other flows.
const MOST: usize = 128;

/// At most one in this many descriptors is used for client sockets.
const SHARE_OF_DESCRIPTORS: usize = 8;

/// How many are checked at a time, to find one that can be closed or several unused ones.
const LOOKED_AT: usize = 64;

/// Interval of the search for unused ones. For each datagram of any other client, the kernel compares all of these
/// sockets.
const INTERVAL: Duration = Duration::from_millis(100);

/// A listener that was full within this time may be full again soon.
const LISTENER_QUIET: Duration = Duration::from_secs(1);

/// A client socket that is full for longer than this does not help: the bottleneck is the client's own link, or one
/// that all share, and taking turns with the listener is fair.
const BLOCKED: Duration = Duration::from_millis(50);

/// The kernel may still be queueing a datagram on a socket that it looked up while the socket was connected. It has
/// finished after this time.
pub(super) const GRACE: Duration = Duration::from_millis(20);

/// Flows that do not need their client sockets.
#[derive(Debug, Default)]
pub(super) struct Unneeded {
    /// They do not use them, or the listener is not full any more.
    pub(super) idle: Vec<FlowId>,
    /// Their clients block.
    pub(super) blocked: Vec<FlowId>,
}

/// A client socket to be closed, and since when.
pub(super) type Retired = (Instant, ClientSocket);

/// The flows with client sockets.
#[derive(Debug)]
pub(super) struct ClientSockets {
    most: usize,
    open: usize,
    /// Counts those of all tasks, whose datagrams share the queues of devices.
    shared: Arc<Shared>,
    /// In the order of checks (clock algorithm). Some flows may have ended.
    clock: VecDeque<FlowId>,
    /// The time of the next periodic check, if there are any.
    next_look: Option<Instant>,
    /// Sockets to be drained and closed, oldest first.
    pub(super) retired: VecDeque<Retired>,
}

impl ClientSockets {
    /// An empty set, for a process with this many descriptors.
    pub(super) fn new(shared: Arc<Shared>, descriptors: usize) -> Self {
        let most = MOST.min(descriptors / SHARE_OF_DESCRIPTORS);
        Self { most, open: 0, shared, clock: VecDeque::new(), next_look: None, retired: VecDeque::new() }
    }

    /// Records that a flow of `table` is about to get a client socket.
    pub(super) fn opened(&mut self, id: FlowId, table: &FlowTable<FlowKey, Flow>, now: Instant) {
        if self.clock.len() > 2 * self.open + LOOKED_AT {
            let has_one =
                |id: &FlowId| table.get(*id).is_some_and(|(_key, flow)| flow.client_socket.is_some());
            self.clock.retain(has_one);
        }
        self.open += 1;
        self.shared.client_sockets.fetch_add(1, Ordering::Relaxed);
        self.clock.push_back(id);
        self.next_look.get_or_insert(now + INTERVAL);
    }

    /// Records that a flow's socket was connected to itself at `now`.
    pub(super) fn retire(&mut self, socket: ClientSocket, now: Instant) {
        self.open -= 1;
        self.shared.client_sockets.fetch_sub(1, Ordering::Relaxed);
        self.retired.push_back((now, socket));
    }

    /// The time of the next task.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let closing = self.retired.front().map(|(since, _socket)| *since + GRACE);
        [closing, self.next_look].into_iter().flatten().min()
    }

    /// Finds a flow whose socket must be closed before another one is opened, if necessary. Also returns whether its
    /// client blocks.
    ///
    /// # Errors
    /// [`Full`]
    pub(super) fn make_room(
        &mut self,
        table: &mut FlowTable<FlowKey, Flow>,
        now: Instant,
    ) -> Result<Option<(FlowId, bool)>, Full> {
        if self.shared.client_sockets.load(Ordering::Relaxed) < self.most {
            return Ok(None);
        }
        let is_needed = |socket: &ClientSocket| match socket.full_at {
            Some(at) => now.saturating_duration_since(at) < BLOCKED,
            None => socket.was_used,
        };
        let looks = self.clock.len().min(LOOKED_AT);
        let unneeded = (0..looks).find_map(|_| self.tick(table, is_needed));
        unneeded.map(Some).ok_or(Full)
    }

    /// Returns flows that do not need their sockets any more. `was_full` says whether a listener is full or was full
    /// after the given time.
    pub(super) fn unneeded(
        &mut self,
        table: &mut FlowTable<FlowKey, Flow>,
        was_full: impl Fn(usize, Instant) -> bool,
        now: Instant,
    ) -> Unneeded {
        let mut unneeded = Unneeded::default();
        if self.next_look.is_none_or(|at| now < at) {
            return unneeded;
        }
        let lately = now.checked_sub(LISTENER_QUIET).unwrap_or(now);
        for _ in 0..self.clock.len().min(LOOKED_AT) {
            let is_needed = |socket: &ClientSocket| match socket.full_at {
                Some(at) => now.saturating_duration_since(at) < BLOCKED,
                None => socket.was_used && was_full(socket.key.listener as usize, lately),
            };
            let Some((id, is_blocked)) = self.tick(table, is_needed) else { continue };
            if is_blocked { &mut unneeded.blocked } else { &mut unneeded.idle }.push(id);
        }
        self.next_look = (!self.clock.is_empty()).then_some(now + INTERVAL);
        unneeded
    }

    /// Checks the next one. If it is not needed, removes it and returns its flow, and whether its socket is full.
    fn tick(
        &mut self,
        table: &mut FlowTable<FlowKey, Flow>,
        is_needed: impl Fn(&ClientSocket) -> bool,
    ) -> Option<(FlowId, bool)> {
        let id = self.clock.pop_front()?;
        let socket = table.get_mut(id)?.1.client_socket.as_mut()?;
        if !is_needed(socket) {
            return Some((id, socket.full_at.is_some()));
        }
        socket.was_used = false;
        self.clock.push_back(id);
        None
    }

    /// All flows that have or had a client socket.
    pub(super) fn take_all(&mut self) -> VecDeque<FlowId> {
        std::mem::take(&mut self.clock)
    }
}

/// The maximum number of sockets exists, and all are in use.
pub(super) struct Full;

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, UdpSocket};
    use std::os::fd::{AsFd, OwnedFd};

    use rproxy_mapping::PortMapping;
    use rproxy_mapping::addr::Protocol;

    use super::*;
    use crate::state::{MappingPolicy, Target};
    use crate::udp::flows::mapping_of;
    use crate::udp::table::Bounds;

    /// Enough descriptors for two client sockets.
    const DESCRIPTORS: usize = 2 * SHARE_OF_DESCRIPTORS;

    /// The number of the listener of all flows.
    const NUMBER: usize = 3;

    const MOMENT: Duration = Duration::from_millis(1);

    /// A listener, flows, and which of them have client sockets.
    struct Scene {
        listener: UdpSocket,
        target: Arc<Target>,
        table: FlowTable<FlowKey, Flow>,
        sockets: ClientSockets,
    }

    impl Scene {
        fn new() -> Self {
            let listener = UdpSocket::bind("127.0.0.1:0").unwrap();
            let host = listener.local_addr().unwrap().to_string().parse().unwrap();
            let backend = "192.0.2.1:53".parse().unwrap();
            let port_mapping = PortMapping { protocol: Protocol::Udp, host, backend, v6only: false };
            let policy = Arc::new(MappingPolicy { limits: Arc::default(), state: Arc::default() });
            let target = Arc::new(Target::new(port_mapping, policy));
            let shared = Arc::new(Shared::of_this_host(false, false));
            let sockets = ClientSockets::new(shared, DESCRIPTORS);
            Self { listener, target, table: FlowTable::new(1000), sockets }
        }

        fn key(port: u16) -> FlowKey {
            FlowKey::new(NUMBER, SocketAddr::from(([127, 0, 0, 1], port)), None)
        }

        /// A flow of the client at `port`, without a client socket.
        fn flow(&mut self, port: u16, now: Instant) -> FlowId {
            let bounds = Bounds {
                mapping: mapping_of(&self.target),
                flows: 1000,
                flows_per_source: 1000,
                shares_sources: false,
                idle: Duration::from_secs(90),
            };
            let socket = Arc::new(OwnedFd::from(UdpSocket::bind("127.0.0.1:0").unwrap()));
            let flow = Flow::adopt(socket, None, 0, &self.target, &Arc::default());
            let key = Self::key(port);
            self.table.insert(key, (&bounds, key.client.ip()), flow, now)
        }

        fn client_socket(&self, port: u16) -> ClientSocket {
            ClientSocket::bind(Self::key(port), self.listener.as_fd(), 1000, &Arc::default()).unwrap()
        }

        /// A flow that got a client socket at `now`.
        fn opened(&mut self, port: u16, now: Instant) -> FlowId {
            let id = self.flow(port, now);
            let socket = self.client_socket(port);
            self.sockets.opened(id, &self.table, now);
            self.table.get_mut(id).unwrap().1.client_socket = Some(Box::new(socket));
            id
        }

        fn socket(&mut self, id: FlowId) -> &mut ClientSocket {
            self.table.get_mut(id).unwrap().1.client_socket.as_mut().unwrap()
        }

        fn make_room(&mut self, now: Instant) -> Result<Option<(FlowId, bool)>, ()> {
            self.sockets.make_room(&mut self.table, now).map_err(|Full| ())
        }

        /// The unneeded ones while the listener was last full at `full_at`: the idle ones, and those that block.
        fn unneeded(&mut self, full_at: Option<Instant>, now: Instant) -> [Vec<FlowId>; 2] {
            let was_full = |number: usize, lately: Instant| {
                assert_eq!(number, NUMBER);
                full_at.is_some_and(|at| at >= lately)
            };
            let Unneeded { idle, blocked } = self.sockets.unneeded(&mut self.table, was_full, now);
            [idle, blocked]
        }
    }

    #[test]
    fn they_use_a_share_of_the_descriptors() {
        let most = |descriptors| ClientSockets::new(Scene::new().sockets.shared, descriptors).most;
        assert_eq!([most(0), most(80), most(1 << 20)], [0, 10, MOST]);
    }

    #[test]
    fn below_the_limit_there_is_room_and_at_it_that_of_an_unused_one() {
        let (mut scene, now) = (Scene::new(), Instant::now());
        let first = scene.opened(1, now);
        assert_eq!(scene.make_room(now), Ok(None));
        let second = scene.opened(2, now);
        // Each was used since the last check, but not since this one.
        assert_eq!(scene.make_room(now), Err(()));
        scene.socket(first).was_used = true;
        assert_eq!(scene.make_room(now), Ok(Some((second, false))));
        // The other one follows once the first is closed.
        let socket = scene.table.get_mut(second).unwrap().1.client_socket.take().unwrap();
        scene.sockets.retire(*socket, now);
        assert_eq!(scene.make_room(now), Ok(None));
        assert_eq!(scene.sockets.open, 1);
        assert_eq!(scene.sockets.shared.client_sockets.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn the_sockets_of_other_tasks_count_as_well() {
        let (mut scene, now) = (Scene::new(), Instant::now());
        scene.sockets.shared.client_sockets.store(2, Ordering::Relaxed);
        assert_eq!(scene.make_room(now), Err(()), "none of these is this task's");
        scene.sockets.shared.client_sockets.store(1, Ordering::Relaxed);
        assert_eq!(scene.make_room(now), Ok(None));
    }

    #[test]
    fn a_socket_that_is_full_for_too_long_makes_room() {
        let (mut scene, now) = (Scene::new(), Instant::now());
        let [first, second] = [1, 2].map(|port| scene.opened(port, now));
        for id in [first, second] {
            scene.socket(id).full_at = Some(now);
        }
        assert_eq!(scene.make_room(now), Err(()));
        assert_eq!(scene.make_room(now + BLOCKED - MOMENT), Err(()));
        assert_eq!(scene.make_room(now + BLOCKED), Ok(Some((first, true))));
        assert_eq!(scene.make_room(now + 2 * BLOCKED), Ok(Some((second, true))));
        assert_eq!(scene.make_room(now + 2 * BLOCKED), Err(()), "these are about to close");
    }

    #[test]
    fn those_that_are_not_used_or_whose_listener_was_not_full_are_found_from_time_to_time() {
        let (mut scene, now) = (Scene::new(), Instant::now());
        assert_eq!(scene.unneeded(None, now), [vec![], vec![]]);
        let [used, unused] = [1, 2].map(|port| scene.opened(port, now));
        scene.socket(unused).was_used = false;
        let look = now + INTERVAL;
        assert_eq!(scene.sockets.deadline(), Some(look));
        assert_eq!(scene.unneeded(Some(now), look - MOMENT), [vec![], vec![]], "it is too early");
        assert_eq!(scene.unneeded(Some(now), look), [vec![unused], vec![]]);
        assert_eq!(scene.sockets.deadline(), Some(look + INTERVAL));
        scene.socket(used).was_used = true;
        // The listener was full just within the time.
        assert_eq!(scene.unneeded(Some(now), now + LISTENER_QUIET), [vec![], vec![]]);
        scene.socket(used).was_used = true;
        assert_eq!(scene.unneeded(Some(now), now + 2 * LISTENER_QUIET), [vec![used], vec![]]);
        assert_eq!(scene.sockets.deadline(), None, "there are none");
    }

    #[test]
    fn those_whose_clients_block_are_told_from_idle_ones() {
        let (mut scene, now) = (Scene::new(), Instant::now());
        let look = now + INTERVAL;
        let ids = [1, 2, 3].map(|port| scene.opened(port, now));
        let [long, short, just] = ids;
        for (id, full_at) in [(long, look - BLOCKED), (short, look - BLOCKED + MOMENT), (just, look)] {
            let socket = scene.socket(id);
            (socket.full_at, socket.was_used) = (Some(full_at), false);
        }
        assert_eq!(scene.unneeded(None, look), [vec![], vec![long]]);
        assert_eq!(scene.unneeded(None, look + INTERVAL), [vec![], vec![short, just]]);
    }

    #[test]
    fn a_retired_socket_is_due_when_the_kernel_has_finished() {
        let (mut scene, now) = (Scene::new(), Instant::now());
        assert_eq!(scene.sockets.deadline(), None);
        let id = scene.opened(1, now);
        let socket = scene.table.get_mut(id).unwrap().1.client_socket.take().unwrap();
        scene.sockets.retire(*socket, now);
        assert_eq!(scene.sockets.deadline(), Some(now + GRACE));
        assert_eq!(scene.sockets.take_all(), [id]);
        assert_eq!(scene.sockets.take_all(), []);
    }

    #[test]
    fn flows_that_have_ended_are_forgotten_when_they_are_many() {
        let (mut scene, now) = (Scene::new(), Instant::now());
        let kept = scene.opened(1, now);
        let gone = scene.flow(2, now);
        drop(scene.table.remove(gone));
        let most = 2 * 3 + LOOKED_AT;
        scene.sockets.open = 3;
        scene.sockets.clock.resize(most, gone);
        scene.sockets.opened(kept, &scene.table, now);
        assert_eq!(scene.sockets.clock.len(), most + 1, "they are not so many yet");
        scene.sockets.open = 3;
        scene.sockets.opened(kept, &scene.table, now);
        assert_eq!(scene.sockets.clock, [kept; 3], "the first, that of the call before, and this one");
    }
}
