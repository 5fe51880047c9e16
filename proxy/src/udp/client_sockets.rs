//! Which flows have sockets towards their clients, which of these is closed for another one, and which are no longer
//! needed.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::client_socket::ClientSocket;
use super::flow::Flow;
use super::key::FlowKey;
use super::table::{FlowId, FlowTable};

/// Sockets towards clients at the most: what they and a listener have on their way fits the queue of a device
/// (`txqueuelen`, 1,000 packets by default). Those whose clients block are closed for others.
const MOST: usize = 128;

/// One in so many descriptors may be one of them.
const SHARE_OF_DESCRIPTORS: usize = 8;

/// How many of them are looked at to find one that can be closed, or several that are not used.
const LOOKED_AT: usize = 64;

/// How often unused ones are looked for. The kernel looks at all of them for each datagram of any other client.
const INTERVAL: Duration = Duration::from_millis(100);

/// A listener that was full within this time may be so again.
const LISTENER_QUIET: Duration = Duration::from_secs(1);

/// A socket towards a client that is full for longer than this is of no use: the client's way out is what blocks, be it
/// its own or one that all share, and waiting for the listener in turn is fair to others.
const BLOCKED: Duration = Duration::from_millis(50);

/// A processor may be about to queue a datagram on a socket that it found while that was still connected. By this time
/// it has.
pub(super) const GRACE: Duration = Duration::from_millis(20);

/// Flows whose sockets towards their clients are not needed.
#[derive(Debug, Default)]
pub(super) struct Unneeded {
    /// They would not use them, or the listener has room again.
    pub(super) idle: Vec<FlowId>,
    /// Their clients are what blocks.
    pub(super) blocked: Vec<FlowId>,
}

/// Which flows have sockets towards their clients.
#[derive(Debug)]
pub(super) struct ClientSockets {
    most: usize,
    open: usize,
    /// In the order in which they are looked at (the clock algorithm); some may be over.
    clock: VecDeque<FlowId>,
    /// When the clock goes on by itself, if there are any.
    next_look: Option<Instant>,
    /// Those that are yet to be drained and closed, and since when, the oldest first.
    pub(super) retired: VecDeque<(Instant, ClientSocket)>,
}

impl ClientSockets {
    /// None, where a process may have as many descriptors.
    pub(super) fn new(descriptors: usize) -> Self {
        let most = MOST.min(descriptors / SHARE_OF_DESCRIPTORS);
        Self { most, open: 0, clock: VecDeque::new(), next_look: None, retired: VecDeque::new() }
    }

    /// A flow of `table` is about to get one.
    pub(super) fn opened(&mut self, id: FlowId, table: &FlowTable<FlowKey, Flow>, now: Instant) {
        if self.clock.len() > 2 * self.open + LOOKED_AT {
            let has_one =
                |id: &FlowId| table.get(*id).is_some_and(|(_key, flow)| flow.client_socket.is_some());
            self.clock.retain(has_one);
        }
        self.open += 1;
        self.clock.push_back(id);
        self.next_look.get_or_insert(now + INTERVAL);
    }

    /// A flow has one no more: it was connected to itself at `now`.
    pub(super) fn retire(&mut self, socket: ClientSocket, now: Instant) {
        self.open -= 1;
        self.retired.push_back((now, socket));
    }

    /// When there is something to do for them.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let closing = self.retired.front().map(|(since, _socket)| *since + GRACE);
        [closing, self.next_look].into_iter().flatten().min()
    }

    /// Finds a flow whose socket has to go before there may be one more, if one has to, and whether its client blocks.
    ///
    /// # Errors
    /// [`Full`]
    pub(super) fn make_room(
        &mut self,
        table: &mut FlowTable<FlowKey, Flow>,
        now: Instant,
    ) -> Result<Option<(FlowId, bool)>, Full> {
        if self.open < self.most {
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

    /// Flows that do not need their sockets any more. `was_full` says whether a listener is full, or was after some
    /// time.
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

    /// Looks at the next one. If it is not needed, returns its flow, and whether it is full; then it is forgotten.
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

    /// All flows that have one, or had one.
    pub(super) fn take_all(&mut self) -> VecDeque<FlowId> {
        std::mem::take(&mut self.clock)
    }
}

/// There are as many sockets as there may be, and all are in use.
pub(super) struct Full;
