//! The listeners of the relay, including released ones.
//!
//! A released listener accepts no new flows. It stays open until its flows are quiet, because their replies are sent
//! from its socket, or until another mapping needs the port.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::ops::{Index, IndexMut};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use rproxy_sys::udp::{BATCH, Transmit, dropped};

use super::send::{QueueBudget, SendQueue};
use super::shared::Shared;
use super::table::FlowId;
use super::tally::{Tally, Towards};
use super::token::Wanted;
use crate::runtime::poll::WatchedListener;
use crate::state::{Binding, Target};

/// A released listener is closed after this time, even if its clients continue to send.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// A socket to which clients send.
pub(super) struct Listener {
    port: Arc<WatchedListener>,
    /// The target of new flows.
    pub(super) target: Arc<Target>,
    /// When it is closed at the latest, if it was released.
    closing: Option<Instant>,
    /// Whether its datagrams stay in the kernel, for another process or until it is resumed.
    pub(super) is_paused: bool,
    /// The time of the last activity of its flows.
    pub(super) last_active: Instant,
    /// The recent size of datagrams, or of GSO batches, in bytes.
    pub(super) usual_size: usize,
    /// The number of datagrams dropped by the kernel, as far as they are counted.
    pub(super) dropped: u32,
    pub(super) queue: SendQueue,
    /// Until when its flows do not open client sockets, because that failed.
    pub(super) shared_until: Option<Instant>,
    /// When its socket was last full.
    pub(super) full_at: Option<Instant>,
    /// Flows whose replies wait for the socket, in the order of their turns; some may have ended.
    pub(super) waiting: VecDeque<FlowId>,
}

impl Listener {
    /// Whether it was released and accepts no new flows.
    pub(super) fn is_closing(&self) -> bool {
        self.closing.is_some()
    }

    /// Whether replies have to wait for others.
    pub(super) fn is_crowded(&self) -> bool {
        !self.queue.is_empty() || !self.waiting.is_empty()
    }

    /// Whether its time to close has expired.
    fn is_overdue(&self, now: Instant) -> bool {
        self.closing.is_none_or(|deadline| now >= deadline)
    }

    /// Counts its queued datagrams as lost, and those dropped by the kernel, unless another process continues with it.
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

    /// Sends replies, and queues those that do not fit the socket; see [`SendQueue::send`].
    pub(super) fn send(
        &mut self,
        messages: &[Transmit<'_>],
        gso: bool,
        flow_of: impl Fn(usize) -> Option<FlowId>,
        tally: &mut Tally,
    ) -> ArrayVec<usize, BATCH> {
        self.queue.send(self.port.as_fd(), messages, gso, flow_of, tally)
    }

    /// Sends queued replies, as far as the socket accepts them. Returns whether the queue is empty.
    pub(super) fn flush(&mut self, tally: &mut Tally) -> bool {
        self.queue.flush(self.port.as_fd(), tally)
    }

    /// The events to watch its socket for.
    pub(super) fn wanted(&self) -> Wanted {
        Wanted { receive: !self.is_paused, send: self.is_crowded() }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.port.as_fd()
    }
}

/// All listeners, indexed by the numbers of their ports.
pub(super) struct Listeners {
    slots: Vec<Option<Listener>>,
    /// The numbers of released listeners.
    closing: HashSet<usize>,
    /// The addresses of all listeners are recorded there.
    shared: Arc<Shared>,
    /// The numbers of flows that mappings request, each with the number of listeners that request it.
    asked: BTreeMap<usize, usize>,
    /// The budget for queued replies.
    pub(super) budget: Arc<QueueBudget>,
}

impl Listeners {
    /// No listeners.
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let budget = Arc::new(QueueBudget::of_task(shared.to_clients.clone()));
        Self { slots: Vec::new(), closing: HashSet::new(), shared, asked: BTreeMap::new(), budget }
    }

    /// Applies `binding` to a listener. Returns its previous target, if any.
    pub(super) fn assign(&mut self, binding: Binding, now: Instant) -> Option<Arc<Target>> {
        let Binding { port, target } = binding;
        let number = port.number();
        if self.slots.len() <= number {
            self.slots.resize_with(number + 1, || None);
        }
        self.closing.remove(&number);
        self.shared.own_ports().add(&target.port_mapping);
        *self.asked.entry(asked_by(&target)).or_default() += 1;
        match &mut self.slots[number] {
            Some(listener) => {
                if listener.closing.take().is_some() {
                    self.shared.add_listener();
                }
                let old = std::mem::replace(&mut listener.target, target);
                self.forget_asked(&old);
                Some(old)
            }
            none => {
                self.shared.add_listener();
                *none = Some(Listener {
                    dropped: 0,
                    port,
                    target,
                    closing: None,
                    is_paused: false,
                    last_active: now,
                    usual_size: 0,
                    queue: SendQueue::new(self.budget.clone()),
                    shared_until: None,
                    full_at: None,
                    waiting: VecDeque::new(),
                });
                None
            }
        }
    }

    /// The largest number of flows that a mapping requests; 0 if none does.
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

    /// Releases a listener, to be closed as soon as its flows are quiet.
    pub(super) fn release(&mut self, number: usize, now: Instant) {
        if let Some(listener) = self.get_mut(number)
            && listener.closing.is_none()
        {
            listener.closing = Some(now + CLOSE_TIMEOUT);
            self.shared.remove_listener();
            self.closing.insert(number);
        }
    }

    /// Whether any listener is released.
    pub(super) fn are_closing(&self) -> bool {
        !self.closing.is_empty()
    }

    /// When the next released listener can be closed, if its flows stay quiet until then and its queue does not drain.
    pub(super) fn next_to_close(&self, quiet: Duration) -> Option<Instant> {
        let goes = |listener: &Listener| {
            let when_quiet = listener.queue.is_empty().then(|| listener.last_active + quiet);
            when_quiet.into_iter().chain(listener.closing).min()
        };
        self.closing.iter().filter_map(|number| goes(self.slots[*number].as_ref()?)).min()
    }

    /// The released listeners whose flows have been quiet for `quiet`, or whose time to close has expired.
    pub(super) fn quiet(&self, now: Instant, quiet: Duration) -> HashSet<usize> {
        let is_quiet = |number: &usize| {
            let Some(listener) = &self.slots[*number] else { return true };
            let idle = now.saturating_duration_since(listener.last_active);
            idle >= quiet || listener.is_overdue(now)
        };
        self.closing.iter().copied().filter(is_quiet).collect()
    }

    /// Closes those of `numbers` with an empty queue, or whose time to close has expired.
    pub(super) fn close(&mut self, numbers: &HashSet<usize>, now: Instant) {
        for number in numbers {
            let waits = |listener: &Listener| !listener.queue.is_empty() && !listener.is_overdue(now);
            if !self.slots[*number].as_ref().is_some_and(waits) {
                self.close_one(*number);
            }
        }
    }

    /// All listeners that are served and not released, with their numbers.
    pub(super) fn iter_served(&mut self) -> impl Iterator<Item = (usize, &mut Listener)> {
        let listeners = self.slots.iter_mut().enumerate();
        let served = listeners.filter_map(|(number, slot)| Some((number, slot.as_mut()?)));
        served.filter(|(_number, listener)| !listener.is_closing())
    }

    /// Closes a listener, after its flows were removed.
    pub(super) fn close_one(&mut self, number: usize) {
        self.closing.remove(&number);
        if let Some(listener) = self.slots[number].take() {
            self.shared.own_ports().remove(&listener.target.port_mapping);
            self.forget_asked(&listener.target);
            if !listener.is_closing() {
                self.shared.remove_listener();
            }
            listener.count_lost();
        }
    }

    /// Closes all listeners after their flows were removed. Those with queued replies only send them.
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

    /// The listener at `number`, unless it was closed or is not known yet.
    pub(super) fn get_mut(&mut self, number: usize) -> Option<&mut Listener> {
        self.slots.get_mut(number)?.as_mut()
    }
}

fn asked_by(target: &Target) -> usize {
    target.policy.limits.udp_max_flows.unwrap_or(0)
}

/// For the listener of a flow, which exists as long as the flow.
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

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use rproxy_mapping::PortMapping;
    use rproxy_mapping::addr::Protocol;

    use super::*;
    use crate::runtime::poll::PollSet;
    use crate::state::MappingPolicy;
    use crate::state::stats::FailureKind;
    use crate::udp::send::Waiting;

    const QUIET: Duration = Duration::from_secs(1);

    /// A listener that is released at `now`, and its number.
    fn released(now: Instant) -> (Listeners, usize) {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let host = socket.local_addr().unwrap().to_string().parse().unwrap();
        let backend = "192.0.2.1:53".parse().unwrap();
        let port_mapping = PortMapping { protocol: Protocol::Udp, host, backend, v6only: false };
        let policy = Arc::new(MappingPolicy { limits: Arc::default(), state: Arc::default() });
        let port = Arc::new(PollSet::new().unwrap().add(socket).unwrap());
        let number = port.number();
        let mut listeners = Listeners::new(Arc::new(Shared::of_this_host(false, false)));
        listeners.assign(Binding { port, target: Arc::new(Target::new(port_mapping, policy)) }, now);
        assert!(!listeners[number].is_closing() && !listeners.are_closing());
        assert_eq!(listeners.next_to_close(QUIET), None);
        listeners.release(number, now);
        assert!(listeners[number].is_closing() && listeners.are_closing());
        (listeners, number)
    }

    #[test]
    fn a_released_listener_is_closed_once_it_is_quiet() {
        let now = Instant::now();
        let (mut listeners, number) = released(now);
        assert_eq!(listeners.next_to_close(QUIET), Some(now + QUIET));
        assert_eq!(listeners.quiet(now + QUIET / 2, QUIET), HashSet::new());
        let quiet = listeners.quiet(now + QUIET, QUIET);
        assert_eq!(quiet, HashSet::from([number]));
        listeners.close(&quiet, now + QUIET);
        assert!(listeners.get_mut(number).is_none() && !listeners.are_closing());
        assert_eq!(listeners.next_to_close(QUIET), None);
    }

    #[test]
    fn a_released_listener_that_is_used_is_closed_in_the_end() {
        let now = Instant::now();
        let (mut listeners, number) = released(now);
        let end = now + CLOSE_TIMEOUT;
        listeners[number].last_active = end - QUIET / 2;
        // Not later, if it is released again.
        listeners.release(number, now + QUIET);
        assert_eq!(listeners.next_to_close(QUIET), Some(end));
        assert_eq!(listeners.quiet(end - QUIET / 4, QUIET), HashSet::new());
        assert_eq!(listeners.quiet(end, QUIET), HashSet::from([number]));
    }

    #[test]
    fn a_released_listener_that_is_served_again_stays() {
        let now = Instant::now();
        let (mut listeners, number) = released(now);
        let Listener { port, target, .. } = &listeners[number];
        let again = Binding { port: port.clone(), target: target.clone() };
        listeners.assign(again, now);
        assert!(!listeners[number].is_closing() && !listeners.are_closing());
        assert_eq!(listeners.iter_served().count(), 1);
    }

    #[test]
    fn a_listener_with_queued_replies_is_closed_when_they_are_late() {
        let now = Instant::now();
        let (mut listeners, number) = released(now);
        let target = listeners[number].target.clone();
        listeners[number].queue.push(Waiting::of(b"reply", None));
        let end = now + CLOSE_TIMEOUT;
        assert_eq!(listeners.next_to_close(QUIET), Some(end));
        let quiet = listeners.quiet(now + QUIET, QUIET);
        listeners.close(&quiet, now + QUIET);
        assert!(listeners.get_mut(number).is_some() && listeners.are_closing());
        listeners.close(&quiet, end);
        assert!(listeners.get_mut(number).is_none() && !listeners.are_closing());
        assert_eq!(target.policy.state.stats.failure_kind(FailureKind::NoBuffer), 1);
    }

    #[test]
    fn a_listener_with_queued_replies_still_sends_them_when_all_are_closed() {
        let now = Instant::now();
        let (mut listeners, number) = released(now);
        let Listener { port, target, .. } = &listeners[number];
        let again = Binding { port: port.clone(), target: target.clone() };
        listeners.assign(again, now);
        listeners[number].queue.push(Waiting::of(b"reply", None));
        listeners.close_all(now);
        assert!(listeners[number].is_paused && listeners[number].is_closing());
        assert_eq!(listeners.next_to_close(QUIET), Some(now + CLOSE_TIMEOUT));
    }

    #[test]
    fn all_listeners_without_queued_replies_can_be_closed_at_once() {
        let now = Instant::now();
        let (mut listeners, number) = released(now);
        listeners.close_all(now);
        assert!(listeners.get_mut(number).is_none() && !listeners.are_closing());
    }
}
