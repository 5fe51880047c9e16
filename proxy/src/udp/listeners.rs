//! The listeners of the relay: which there are, and which are on their way out.
//!
//! A listener that is released takes no new flows. It stays until those that it has are quiet, since
//! their answers leave through its socket, or until another mapping wants that.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::ops::{Index, IndexMut};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use rproxy_sys::udp::{BATCH, Transmit, dropped};

use super::origin::OwnPorts;
use super::send::{Room, SendQueue};
use super::table::FlowId;
use super::tally::{Tally, Towards};
use super::token::Wanted;
use crate::runtime::poll::WatchedListener;
use crate::state::{Binding, Target};

/// A released listener is closed after this long, however much its clients go on to send.
const LONGEST_FAREWELL: Duration = Duration::from_secs(10);

/// A socket that clients send to.
pub(super) struct Listener {
    port: Arc<WatchedListener>,
    /// Where new flows lead to.
    pub(super) target: Arc<Target>,
    /// When it is closed, if it was released.
    closing: Option<Instant>,
    /// Whether its datagrams are left to another process, or to later.
    pub(super) is_paused: bool,
    /// When a flow of it had traffic last.
    pub(super) last_active: Instant,
    /// How large datagrams were lately, in bytes: each of them, or each GSO batch.
    pub(super) usual_size: usize,
    /// How many the kernel has had no room for, as far as they are counted.
    pub(super) dropped: u32,
    pub(super) queue: SendQueue,
    /// Until when its flows do without sockets towards their clients, because one could not be opened.
    pub(super) shared_until: Option<Instant>,
    /// When there was no room for an answer last.
    pub(super) full_at: Option<Instant>,
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
        !self.queue.is_empty() || !self.waiting.is_empty()
    }

    /// Whether it has been on its way out for too long.
    fn has_to_go(&self, now: Instant) -> bool {
        self.closing.is_none_or(|deadline| now >= deadline)
    }

    /// What waits is lost with it. What it had no room for is counted, unless another process goes on with it.
    fn count_lost(mut self) {
        if !self.is_paused {
            let mut tally = Tally::default();
            tally.dropped(dropped(self.as_fd()).unwrap_or_default(), &mut self.dropped);
            tally.settle(&self.target, Towards::Backend);
        }
        let mut tally = Tally::default();
        tally.overflow(self.queue.len() as u64);
        tally.settle(&self.target, Towards::Clients);
    }

    /// Sends answers, or keeps those that there is no room for; see [`SendQueue::send`].
    pub(super) fn send(
        &mut self,
        messages: &[Transmit<'_>],
        gso: bool,
        tally: &mut Tally,
    ) -> ArrayVec<usize, BATCH> {
        self.queue.send(self.port.as_fd(), messages, gso, tally)
    }

    /// Sends what was kept, as far as there is room. Returns whether that is all.
    pub(super) fn flush(&mut self, tally: &mut Tally) -> bool {
        self.queue.flush(self.port.as_fd(), tally)
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
    /// How many flows their mappings ask for, and how many listeners do so.
    asked: BTreeMap<usize, usize>,
    /// For answers that wait.
    pub(super) room: Arc<Room>,
}

impl Listeners {
    /// Serves a listener as `assignment` says. Returns how it was served before, if it was.
    pub(super) fn assign(&mut self, binding: Binding, now: Instant) -> Option<Arc<Target>> {
        let Binding { port, target } = binding;
        let number = port.number();
        if self.slots.len() <= number {
            self.slots.resize_with(number + 1, || None);
        }
        self.closing.remove(&number);
        self.own_ports.add(&target.port_mapping);
        *self.asked.entry(asked_by(&target)).or_default() += 1;
        match &mut self.slots[number] {
            Some(listener) => {
                listener.closing = None;
                let old = std::mem::replace(&mut listener.target, target);
                self.forget_asked(&old);
                Some(old)
            }
            none => {
                *none = Some(Listener {
                    dropped: 0,
                    port,
                    target,
                    closing: None,
                    is_paused: false,
                    last_active: now,
                    usual_size: 0,
                    queue: SendQueue::new(self.room.clone()),
                    shared_until: None,
                    full_at: None,
                    waiting: VecDeque::new(),
                });
                None
            }
        }
    }

    /// The most flows that a mapping asks for; 0 if none does.
    pub(super) fn most_asked(&self) -> usize {
        self.asked.last_key_value().map_or(0, |(asked, _listeners)| *asked)
    }

    fn forget_asked(&mut self, target: &Target) {
        if let Entry::Occupied(mut listeners) = self.asked.entry(asked_by(target)) {
            *listeners.get_mut() -= 1;
            if *listeners.get() == 0 {
                listeners.remove();
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

    /// When the next one on its way out goes, if its flows are quiet until then and nothing makes room for what waits.
    pub(super) fn next_to_close(&self, quiet: Duration) -> Option<Instant> {
        let goes = |listener: &Listener| {
            let when_quiet = listener.queue.is_empty().then(|| listener.last_active + quiet);
            when_quiet.into_iter().chain(listener.closing).min()
        };
        self.closing.iter().filter_map(|number| goes(self.slots[*number].as_ref()?)).min()
    }

    /// Those on their way out whose flows have been quiet for as long as `quiet`, or that have been for too
    /// long.
    pub(super) fn quiet(&self, now: Instant, quiet: Duration) -> HashSet<usize> {
        let is_quiet = |number: &usize| {
            let Some(listener) = &self.slots[*number] else { return true };
            let idle = now.saturating_duration_since(listener.last_active);
            idle >= quiet || listener.has_to_go(now)
        };
        self.closing.iter().copied().filter(is_quiet).collect()
    }

    /// Closes those of `numbers` for which nothing waits, or that have been on their way out for too long.
    pub(super) fn close(&mut self, numbers: &HashSet<usize>, now: Instant) {
        for number in numbers {
            let waits = |listener: &Listener| !listener.queue.is_empty() && !listener.has_to_go(now);
            if !self.slots[*number].as_ref().is_some_and(waits) {
                self.close_one(*number);
            }
        }
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
            self.own_ports.remove(&listener.target.port_mapping);
            self.forget_asked(&listener.target);
            listener.count_lost();
        }
    }

    /// Closes all. Their flows have to be gone. Those for which something waits do nothing but send that.
    pub(super) fn close_all(&mut self, now: Instant) {
        for number in 0..self.slots.len() {
            match &mut self.slots[number] {
                Some(listener) if !listener.queue.is_empty() => {
                    listener.is_paused = true;
                    listener.waiting.clear();
                    self.release(number, now);
                }
                _ => self.close_one(number),
            }
        }
    }

    /// The listener at `number`, unless it is gone or not known yet.
    pub(super) fn get_mut(&mut self, number: usize) -> Option<&mut Listener> {
        self.slots.get_mut(number)?.as_mut()
    }
}

fn asked_by(target: &Target) -> usize {
    target.policy.limits.udp_max_flows.unwrap_or(0)
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
