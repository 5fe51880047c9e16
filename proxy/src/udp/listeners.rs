//! The listeners of the relay: which there are, and which are on their way out.
//!
//! A listener that is released takes no new flows. It stays until those that it has are quiet, since
//! their answers leave through its socket, or until another mapping wants that.

use std::collections::{HashSet, VecDeque};
use std::ops::{Index, IndexMut};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rproxy_sys::udp::Transmit;

use super::flow::Wanted;
use super::origin::OwnPorts;
use super::send::{Backlog, Room};
use super::table::FlowId;
use super::tally::Tally;
use crate::poll::Port;
use crate::service::{Assignment, Route};

/// A released listener is closed after this long, however much its clients go on to send.
const LONGEST_FAREWELL: Duration = Duration::from_secs(10);

/// A socket that clients send to.
pub(super) struct Listener {
    port: Arc<Port>,
    /// Where new flows lead to.
    pub(super) route: Arc<Route>,
    /// When it is closed, if it was released.
    closing: Option<Instant>,
    /// Whether its datagrams are left to another process, or to later.
    pub(super) is_paused: bool,
    /// When a flow of it had traffic last.
    pub(super) last_active: Instant,
    /// How large datagrams were lately, in bytes: each of them, or each train.
    pub(super) usual_size: usize,
    backlog: Backlog,
    /// Flows whose answers wait until there is room, next in turn first; some may be over.
    pub(super) waiting: VecDeque<FlowId>,
}

impl Listener {
    /// Whether it takes no new flows.
    pub(super) fn is_closing(&self) -> bool {
        self.closing.is_some()
    }

    /// Whether answers have to wait for others.
    pub(super) fn is_crowded(&self) -> bool {
        !self.backlog.is_empty() || !self.waiting.is_empty()
    }

    /// Sends answers, or keeps those that there is no room for; see [`Backlog::send`].
    pub(super) fn send(
        &mut self,
        messages: &[Transmit<'_>],
        trains: bool,
        tally: &mut Tally,
        refused: &mut dyn FnMut(usize),
    ) {
        self.backlog.send(self.port.as_fd(), messages, trains, tally, refused);
    }

    /// Sends what was kept, as far as there is room. Gives whether that is all.
    pub(super) fn flush(&mut self, tally: &mut Tally) -> bool {
        self.backlog.flush(self.port.as_fd(), tally)
    }

    /// What its socket has to be watched for now.
    pub(super) fn wanted(&self) -> Wanted {
        Wanted { receive: !self.is_paused, send: self.is_crowded() }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.port.as_fd()
    }
}

/// All listeners, by the numbers of their ports.
#[derive(Default)]
pub(super) struct Listeners {
    slots: Vec<Option<Listener>>,
    /// The numbers of those that are on their way out.
    closing: HashSet<usize>,
    /// Where they are.
    pub(super) own_ports: OwnPorts,
    /// For answers that wait.
    room: Arc<Room>,
}

impl Listeners {
    /// Serves a listener as `assignment` says. Gives how it was served before, if it was.
    pub(super) fn assign(&mut self, assignment: Assignment, now: Instant) -> Option<Arc<Route>> {
        let Assignment { port, route } = assignment;
        let number = port.number();
        if self.slots.len() <= number {
            self.slots.resize_with(number + 1, || None);
        }
        self.closing.remove(&number);
        self.own_ports.add(&route.forward);
        match &mut self.slots[number] {
            Some(listener) => {
                listener.closing = None;
                Some(std::mem::replace(&mut listener.route, route))
            }
            none => {
                *none = Some(Listener {
                    port,
                    route,
                    closing: None,
                    is_paused: false,
                    last_active: now,
                    usual_size: 0,
                    backlog: Backlog::new(self.room.clone()),
                    waiting: VecDeque::new(),
                });
                None
            }
        }
    }

    /// Lets a listener go as soon as its flows are quiet.
    pub(super) fn release(&mut self, number: usize, now: Instant) {
        if let Some(listener) = self.get_mut(number)
            && listener.closing.is_none()
        {
            listener.closing = Some(now + LONGEST_FAREWELL);
            self.closing.insert(number);
        }
    }

    /// Whether any is on its way out.
    pub(super) fn are_closing(&self) -> bool {
        !self.closing.is_empty()
    }

    /// Closes those on their way out whose flows have been quiet for as long as `quiet`, or that have
    /// been for too long; gives their numbers.
    pub(super) fn close(&mut self, now: Instant, quiet: Duration) -> Vec<usize> {
        let Self { slots, closing, own_ports, .. } = self;
        let is_over = |number: &usize| {
            let Some(listener) = &slots[*number] else { return true };
            let is_quiet = now.saturating_duration_since(listener.last_active) >= quiet;
            is_quiet || listener.closing.is_none_or(|deadline| now >= deadline)
        };
        let over: Vec<usize> = closing.extract_if(is_over).collect();
        for number in &over {
            if let Some(listener) = slots[*number].take() {
                own_ports.remove(&listener.route.forward);
            }
        }
        over
    }

    /// All that are served, with their numbers: not those on their way out.
    pub(super) fn iter_served(&mut self) -> impl Iterator<Item = (usize, &mut Listener)> {
        let listeners = self.slots.iter_mut().enumerate();
        let served = listeners.filter_map(|(number, slot)| Some((number, slot.as_mut()?)));
        served.filter(|(_number, listener)| !listener.is_closing())
    }

    /// Closes one. Its flows have to be gone.
    pub(super) fn close_one(&mut self, number: usize) {
        self.closing.remove(&number);
        if let Some(listener) = self.slots[number].take() {
            self.own_ports.remove(&listener.route.forward);
        }
    }

    /// Closes those that are served. Their flows have to be gone.
    pub(super) fn close_served(&mut self) {
        let Self { slots, own_ports, .. } = self;
        for slot in slots {
            if let Some(listener) = slot.take_if(|listener| !listener.is_closing()) {
                own_ports.remove(&listener.route.forward);
            }
        }
    }

    /// The listener at `number`, unless it is gone or not known yet.
    pub(super) fn get_mut(&mut self, number: usize) -> Option<&mut Listener> {
        self.slots.get_mut(number)?.as_mut()
    }
}

/// For the listener of a flow: it is there for as long as the flow is.
impl Index<usize> for Listeners {
    type Output = Listener;

    fn index(&self, number: usize) -> &Listener {
        self.slots[number].as_ref().expect("flows end before their listener")
    }
}

impl IndexMut<usize> for Listeners {
    fn index_mut(&mut self, number: usize) -> &mut Listener {
        self.slots[number].as_mut().expect("flows end before their listener")
    }
}
