//! The task that serves all UDP mappings of a process.
//!
//! One epoll instance watches the listeners and the flows' sockets, and the runtime watches the epoll instance. Each
//! turn receives a bounded batch from each readable socket, so that no flow waits for another one's backlog. Datagrams
//! of clients are [forwarded to backends](super::requests), and replies of backends [to clients](super::answers).

use std::collections::VecDeque;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tracing::debug;

use super::batch::Buffers;
use super::capacity::Capacity;
use super::client_sockets::ClientSockets;
use super::flow::Flow;
use super::key::FlowKey;
use super::listeners::Listeners;
use super::table::{Ended, FlowTable};
use super::token::Token;
use super::turn::{Events, Turn};
use crate::runtime::poll::EventSource;
use crate::state::task::Commands;

/// Number of turns before the task yields to others of the worker, even if there is more to do.
const TURNS_IN_A_ROW: u32 = 2;

/// When draining, flows end once none was active for this long.
pub(super) const QUIET: Duration = Duration::from_secs(1);

/// All UDP mappings of a process.
pub(crate) struct UdpRelay {
    pub(super) poll: EventSource,
    commands: Commands,
    pub(super) listeners: Listeners,
    pub(super) table: FlowTable<FlowKey, Flow>,
    pub(super) capacity: Capacity,
    pub(super) client_sockets: ClientSockets,
    /// Where to continue adjusting the receive buffers of flows, if that is not complete.
    pub(super) next_share: Option<usize>,
    /// Ended flows whose sockets are not closed yet.
    pub(super) ended: VecDeque<Ended<Flow>>,
    pub(super) buffers: Buffers,
    pub(super) turn: Turn,
    /// Whether there are flows, so that connections are assigned to other workers.
    has_flows: Arc<AtomicBool>,
    pub(super) draining: bool,
    /// Listeners that another process has shut down, to be closed.
    pub(super) shut_down: Vec<usize>,
    /// The reason why no listener is left, if so.
    pub(super) failed: Option<io::Error>,
}

impl UdpRelay {
    /// A relay without mappings. `beside_tcp` says whether TCP connections need descriptors, too. `has_flows` is
    /// updated with whether there are flows. The relay ends when all senders of `commands` are dropped.
    pub(crate) fn new(
        poll: EventSource,
        commands: Commands,
        beside_tcp: bool,
        has_flows: Arc<AtomicBool>,
    ) -> Self {
        let capacity = Capacity::of_this_host(beside_tcp);
        Self {
            poll,
            commands,
            listeners: Listeners::default(),
            table: FlowTable::new(capacity.most(Instant::now())),
            client_sockets: ClientSockets::new(capacity.descriptors()),
            capacity,
            next_share: None,
            ended: VecDeque::new(),
            buffers: Buffers::default(),
            turn: Turn::default(),
            has_flows,
            draining: false,
            shut_down: Vec::new(),
            failed: None,
        }
    }

    /// Relays until all senders of commands are dropped, and then until the flows are quiet.
    ///
    /// # Errors
    /// The error of epoll_wait(2), or that of the last listener; nothing is served any more then.
    pub(crate) async fn run(mut self) -> io::Result<()> {
        let mut events = Events::new();
        let mut alarm = pin!(tokio::time::sleep(Duration::ZERO));
        let mut turns = 0_u32;
        while !(self.draining && self.is_quiet(Instant::now())) {
            tokio::select! {
                // Commands first: during a flood there is always another datagram.
                biased;
                command = self.commands.recv(), if !self.draining => match command {
                    Some(command) => self.handle(command),
                    None => self.draining = true,
                },
                count = self.poll.wait(events.room()), if events.is_over() => events.refill(count?),
                () = std::future::ready(()), if !events.is_over() || !self.ended.is_empty() => {}
                () = &mut alarm, if self.has_deadline() => {}
            }
            self.serve(&mut events);
            self.maintain();
            if let Some(error) = self.failed.take() {
                return Err(error);
            }
            if self.has_deadline() {
                let deadline = tokio::time::Instant::from_std(self.next_deadline());
                if alarm.is_elapsed() || deadline < alarm.deadline() {
                    alarm.as_mut().reset(deadline);
                }
            }
            turns = turns.wrapping_add(1);
            if turns.is_multiple_of(TURNS_IN_A_ROW) {
                tokio::task::yield_now().await;
            }
        }
        debug!("no UDP flow is active any more");
        Ok(())
    }

    /// Serves each reported socket once, until the turn is over.
    fn serve(&mut self, events: &mut Events) {
        if events.is_over() {
            return;
        }
        self.turn = Turn::default();
        let mut batch = self.buffers.take();
        while !self.turn.is_over()
            && let Some(event) = events.next()
        {
            match Token::from_u64(event.data()) {
                Token::Listener(index) => {
                    self.send_answers(&mut batch);
                    self.serve_listener(index, event.events(), &mut batch);
                }
                Token::Flow(id) => self.serve_flow(id, event.events(), &mut batch),
                Token::Client(id) => {
                    self.send_answers(&mut batch);
                    self.serve_client_socket(id, event.events(), &mut batch);
                }
            }
        }
        self.send_answers(&mut batch);
        self.buffers.put_back(batch, self.turn.taken());
    }

    /// Does what is due after each turn.
    fn maintain(&mut self) {
        let now = Instant::now();
        while let Some(index) = self.shut_down.pop() {
            self.give_up(index);
        }
        self.end_some(now);
        self.retire_unneeded(now);
        self.close_retired(Some(now));
        self.share_out();
        self.buffers.give_back(now);
        let has_flows = self.table.len() > 0;
        if has_flows != self.has_flows.load(Ordering::Relaxed) {
            self.has_flows.store(has_flows, Ordering::Relaxed);
        }
    }

    /// Whether no flow was active recently, and no datagrams are queued.
    fn is_quiet(&self, now: Instant) -> bool {
        !self.has_waiting()
            && self.table.last_active().is_none_or(|at| now.saturating_duration_since(at) >= QUIET)
    }

    /// Whether datagrams are queued until a socket is writable.
    fn has_waiting(&self) -> bool {
        !self.listeners.budget.is_unused() || !self.capacity.budget.is_unused()
    }

    /// Whether there is something to do at a certain time, even without traffic.
    fn has_deadline(&self) -> bool {
        self.table.len() > 0
            || self.listeners.are_closing()
            || self.buffers.next_look.is_some()
            || self.client_sockets.deadline().is_some()
    }

    /// The time of that. Activity only postpones it; a new flow may advance it.
    fn next_deadline(&self) -> Instant {
        // While datagrams are queued, epoll wakes the task when a socket is writable.
        let may_end = self.draining && !self.has_waiting();
        let quiet = self.table.last_active().filter(|_| may_end).map(|at| at + QUIET);
        let next = [
            self.table.next_expiry(),
            quiet,
            self.listeners.next_to_close(QUIET),
            self.buffers.next_look,
            self.client_sockets.deadline(),
        ];
        next.into_iter().flatten().min().unwrap_or_else(Instant::now)
    }
}

#[cfg(test)]
mod tests;
