//! A task that serves UDP mappings: one in most processes, several if there are several listeners and processors.
//!
//! Each listener and its flows belong to one task. It begins on the first worker, and moves to an idle one if that is
//! busy when its first flow is opened. One epoll instance watches the listeners and the flows' sockets, and the runtime watches the epoll instance. Each
//! turn receives a bounded batch from each readable socket, so that no flow waits for another one's backlog. Datagrams
//! of clients are [forwarded to backends](super::requests), and replies of backends [to clients](super::answers).

use std::collections::VecDeque;
use std::hash::RandomState;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tracing::debug;

use super::batch::Buffers;
use super::capacity::Capacity;
use super::client_sockets::ClientSockets;
use super::flow::Flow;
use super::key::FlowKey;
use super::listeners::Listeners;
use super::shared::Shared;
use super::table::{Ended, FlowTable};
use super::token::Token;
use super::turn::{Events, Turn};
use crate::runtime::poll::EventSource;
use crate::runtime::worker::{RelaySlot, Workers};
use crate::state::task::Commands;

/// Number of turns before the task yields to others of the worker, even if there is more to do.
const TURNS_IN_A_ROW: u32 = 2;

/// When draining, flows end once none was active for this long.
pub(super) const QUIET: Duration = Duration::from_secs(1);

/// The listeners of a task, and their flows.
pub(crate) struct UdpRelay {
    pub(super) poll: EventSource,
    commands: Commands,
    pub(super) listeners: Listeners,
    pub(super) table: FlowTable<FlowKey, Flow>,
    /// For the keys of clients for whom a proxy speaks.
    pub(super) told_hasher: RandomState,
    pub(super) capacity: Capacity,
    pub(super) client_sockets: ClientSockets,
    /// Where to continue adjusting the receive buffers of flows, if that is not complete.
    pub(super) next_share: Option<usize>,
    /// Ended flows whose sockets are not closed yet.
    pub(super) ended: VecDeque<Ended<Flow>>,
    pub(super) buffers: Buffers,
    pub(super) turn: Turn,
    workers: Arc<Workers>,
    /// The number of the worker where it runs.
    worker: usize,
    /// Its slot on a worker, while there are flows: connections and other tasks choose other workers.
    slot: Option<RelaySlot>,
    /// The number of flows when it was last counted among those of all tasks.
    counted: usize,
    pub(super) draining: bool,
    /// Listeners that another process has shut down, to be closed.
    pub(super) shut_down: Vec<usize>,
    /// The reason why no listener is left, if so.
    pub(super) failed: Option<io::Error>,
}

impl UdpRelay {
    /// A task without listeners on the first of `workers`. It ends when all senders of `commands` are dropped.
    pub(crate) fn new(
        poll: EventSource,
        commands: Commands,
        shared: Arc<Shared>,
        workers: Arc<Workers>,
    ) -> Self {
        shared.add_task();
        let capacity = Capacity::of_task(shared.clone());
        Self {
            poll,
            commands,
            listeners: Listeners::new(shared.clone()),
            table: FlowTable::new(capacity.most(0, Instant::now())),
            told_hasher: RandomState::new(),
            client_sockets: ClientSockets::new(shared, capacity.descriptors()),
            capacity,
            next_share: None,
            ended: VecDeque::new(),
            buffers: Buffers::default(),
            turn: Turn::default(),
            workers,
            worker: 0,
            slot: None,
            counted: 0,
            draining: false,
            shut_down: Vec::new(),
            failed: None,
        }
    }

    /// Relays until all senders of commands are dropped, and then until the flows are quiet.
    ///
    /// # Errors
    /// The error of epoll_wait(2), or that of the last listener; nothing is served any more then.
    pub(crate) async fn run(self) -> io::Result<()> {
        let mut moved = self.relay().await?;
        while let Some(relay) = moved {
            let Some(runtime) = relay.slot.as_ref().map(|slot| slot.runtime().clone()) else { break };
            // A panic has been reported where it happened.
            moved = runtime.spawn(relay.relay()).await.unwrap_or(Ok(None))?;
        }
        Ok(())
    }

    /// Relays on the worker of the calling thread. Returns the task if it has to continue on that of its slot.
    async fn relay(mut self) -> io::Result<Option<Box<Self>>> {
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
            if self.is_moved() {
                return Ok(Some(Box::new(self)));
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
        self.end_all();
        Ok(None)
    }

    /// Whether its slot is on another worker, which watches its sockets from here on.
    fn is_moved(&mut self) -> bool {
        let Some(slot) = &self.slot else { return false };
        if slot.worker() == self.worker {
            return false;
        }
        let watch = || {
            let _entered = slot.runtime().enter();
            EventSource::new(self.poll.set().clone())
        };
        match watch() {
            Ok(poll) => {
                (self.poll, self.worker) = (poll, slot.worker());
                true
            }
            Err(error) => {
                debug!(%error, "this task stays where it is");
                self.slot = Some(self.workers.relay_slot(self.worker, false));
                false
            }
        }
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
        self.count_flows();
        self.share_out();
        self.buffers.give_back(now);
    }

    /// Counts its flows among those of all tasks, and takes a slot on a worker while there are any.
    fn count_flows(&mut self) {
        let flows = self.table.len();
        if flows == self.counted {
            return;
        }
        let shared = &self.capacity.shared;
        shared.count_flows(self.counted, flows);
        self.counted = flows;
        if flows == 0 {
            self.slot = None;
        } else if self.slot.is_none() {
            self.slot = Some(self.workers.relay_slot(self.worker, shared.tasks() > 1));
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

impl Drop for UdpRelay {
    fn drop(&mut self) {
        self.capacity.shared.count_flows(self.counted, 0);
    }
}

#[cfg(test)]
mod tests;
