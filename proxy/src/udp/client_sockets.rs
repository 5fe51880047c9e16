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
