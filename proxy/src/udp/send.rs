//! Sends in batches, and handles errors of sending.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::mem;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arrayvec::ArrayVec;
use nix::libc;
use rproxy_sys::udp::{BATCH, GSO_BYTES, GSO_SEGMENTS, LocalAddr, Transmit, send_batch};

use super::table::FlowId;
use super::tally::{Amount, Tally};

/// Number of retries for a message that failed with the error of an earlier one. Each attempt clears one error of the
/// socket, and errors are only queued while a message is in transit.
const RETRIES: usize = 3;

/// The progress of [`send_all`].
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// Number of completed messages, which were sent or lost. If there are more messages, the socket is full.
    pub(super) messages: usize,
    /// Number of completed datagrams of the next message, if it is a GSO batch that is sent as single datagrams.
    datagrams: usize,
    /// The indexes of the GSO batches that the path refused. They were sent as single datagrams, as later ones should
    /// be.
    pub(super) refused: ArrayVec<usize, BATCH>,
}

/// Sends `messages`, at most [`BATCH`], in order and without waiting. GSO batches are sent as single datagrams unless
/// the path is believed to accept them (`gso`). Lost datagrams are subtracted from those that `tally` counts as
/// relayed.
pub(super) fn send_all(
    socket: BorrowedFd<'_>,
    messages: &[Transmit<'_>],
    gso: bool,
    tally: &mut Tally,
) -> Progress {
    let mut progress = Progress::default();
    let mut earlier = EarlierErrors::new();
    while let Some(message) = messages.get(progress.messages) {
        match send_some(socket, &messages[progress.messages..], gso, earlier.is_full()) {
            SendOutcome::Sent(count) => {
                earlier.drain(..).for_each(|error| tally.lose(1, error));
                progress.messages += count;
                continue;
            }
            SendOutcome::Retry(error) => {
                earlier.push(error);
                continue;
            }
            SendOutcome::Full => return progress,
            SendOutcome::Singly => {
                if gso {
                    progress.refused.push(progress.messages);
                }
                if let Some(datagrams) = send_singly(socket, message, tally) {
                    progress.datagrams = datagrams;
                    return progress;
                }
            }
            SendOutcome::Lost(error) => lose(message, error, tally),
        }
        earlier.clear();
        progress.messages += 1;
    }
    progress
}

/// Errors that may be those of earlier datagrams. If the message still fails after the retries, they were its own.
type EarlierErrors = ArrayVec<io::Error, RETRIES>;

/// The outcome of one call.
#[derive(Debug)]
enum SendOutcome {
    /// This many messages were sent.
    Sent(usize),
    /// The first message is sent again: many an error was queued on the socket for an earlier datagram (ICMP reports
    /// that it was refused or had no route), and is now cleared. The error numbers do not tell which.
    Retry(io::Error),
    /// The socket is full: all messages have to wait.
    Full,
    /// The first message, a GSO batch, is sent as single datagrams.
    Singly,
    /// The first message is lost: the network does not accept it.
    Lost(io::Error),
}

/// Sends as many of `messages` as one sendmmsg(2) accepts. `is_last_try` means that the retries of the first one are
/// used up.
fn send_some(socket: BorrowedFd<'_>, messages: &[Transmit<'_>], gso: bool, is_last_try: bool) -> SendOutcome {
    let is_gso = messages.first().is_some_and(|message| message.segment.is_some());
    if is_gso && !gso {
        return SendOutcome::Singly;
    }
    match send_batch(socket, up_to_gso(messages, gso)) {
        Ok(count) => SendOutcome::Sent(count),
        Err(error) => outcome_of(error, is_gso, is_last_try),
    }
}

/// The meaning of a sendmmsg(2) error for the first message, which may be a GSO batch.
fn outcome_of(error: io::Error, is_gso: bool, is_last_try: bool) -> SendOutcome {
    match error.raw_os_error() {
        Some(libc::EAGAIN) => SendOutcome::Full,
        // The device has no checksum offload; segments exceed its MTU; or the path's.
        Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE) if is_gso => SendOutcome::Singly,
        // Linux before 4.18 has no GSO.
        Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP) if is_gso => SendOutcome::Singly,
        _ if is_last_try => SendOutcome::Lost(error),
        _ => SendOutcome::Retry(error),
    }
}

/// The messages that can be sent unchanged: all if the path accepts GSO batches, otherwise those before the first
/// batch.
fn up_to_gso<'m, 'a>(messages: &'m [Transmit<'a>], gso: bool) -> &'m [Transmit<'a>] {
    let first = messages.iter().position(|message| !gso && message.segment.is_some());
    &messages[..first.unwrap_or(messages.len())]
}

/// Sends the datagrams of a GSO batch one by one. If the socket is full, returns the number of completed ones.
fn send_singly(socket: BorrowedFd<'_>, gso_batch: &Transmit<'_>, tally: &mut Tally) -> Option<usize> {
    // The kernel may deliver longer GSO batches than it accepts, so they are sent in parts.
    let mut rest = datagrams(gso_batch).peekable();
    let mut through = 0;
    while rest.peek().is_some() {
        let payloads: ArrayVec<[IoSlice<'_>; 1], BATCH> =
            rest.by_ref().take(BATCH).map(|bytes| [IoSlice::new(bytes)]).collect();
        let messages: ArrayVec<Transmit<'_>, BATCH> =
            payloads.iter().map(|payload| Transmit { payload, segment: None, ..*gso_batch }).collect();
        let progress = send_all(socket, &messages, false, tally);
        through += progress.messages;
        if progress.messages < messages.len() {
            return Some(through);
        }
    }
    None
}

/// The datagrams of a message. The pieces of a GSO batch are whole datagrams each.
fn datagrams<'a>(message: &Transmit<'a>) -> impl Iterator<Item = &'a [u8]> {
    let payload: &'a [IoSlice<'a>] = message.payload;
    let size = message.segment.map_or(usize::MAX, usize::from);
    let single = message.segment.is_none();
    payload.iter().flat_map(move |piece| {
        let piece: &'a [u8] = piece;
        // An empty datagram has no chunks.
        let whole = (single && piece.is_empty()).then_some(piece);
        whole.into_iter().chain(piece.chunks(size))
    })
}

/// The size of a message.
fn amount_of(message: &Transmit<'_>) -> Amount {
    let bytes: usize = message.payload.iter().map(|piece| piece.len()).sum();
    Amount { datagrams: datagrams(message).count() as u64, bytes: bytes as u64 }
}

/// Maximum size of one socket's queue in bytes; datagrams beyond that are lost, as in any full queue. A whole batch
/// fits: a listener that is full gets no other replies until its queue is sent.
const QUEUE_BYTES: usize = BATCH * (GSO_BYTES + GSO_SEGMENTS * OVERHEAD);

/// Maximum size of all queues together that share a [`QueueBudget`].
const BUDGET_BYTES: usize = 2 * QUEUE_BYTES;

/// Additional cost of each queued datagram, so that empty ones are limited, too: its place in a queue that grows by
/// doubling, and the allocator's overhead.
const OVERHEAD: usize = 2 * size_of::<Waiting>() + 2 * size_of::<usize>();

/// The bytes that the queues of several tasks use of their budget.
#[derive(Debug, Default)]
pub(super) struct BudgetUse(AtomicUsize);

/// A memory budget that the queues of a task share, and with those of other tasks. Each queue may grow to the size of
/// what is left (dynamic thresholds, Choudhury and Hahne 1998): a single one gets its maximum, many get equal shares,
/// and there is always some left for another one.
#[derive(Debug, Default)]
pub(super) struct QueueBudget {
    /// What the queues of all tasks use.
    all: Arc<BudgetUse>,
    /// What the queues of this task use.
    own: AtomicUsize,
}

impl QueueBudget {
    /// The budget of one of the tasks that share `all`.
    pub(super) fn of_task(all: Arc<BudgetUse>) -> Self {
        Self { all, own: AtomicUsize::new(0) }
    }

    /// Reserves `cost` bytes for a queue of `bytes`, unless that exceeds its share.
    fn take(&self, cost: usize, bytes: usize) -> bool {
        let take = |used: usize| {
            let left = BUDGET_BYTES.saturating_sub(used + cost);
            (bytes + cost <= left.min(QUEUE_BYTES)).then_some(used + cost)
        };
        let has_room = self.all.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok();
        if has_room {
            self.own.fetch_add(cost, Ordering::Relaxed);
        }
        has_room
    }

    /// Reserves `cost` bytes that were just freed.
    fn take_again(&self, cost: usize) {
        self.all.0.fetch_add(cost, Ordering::Relaxed);
        self.own.fetch_add(cost, Ordering::Relaxed);
    }

    fn give_back(&self, bytes: usize) {
        self.all.0.fetch_sub(bytes, Ordering::Relaxed);
        self.own.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Whether all queues of this task are empty.
    pub(super) fn is_unused(&self) -> bool {
        self.own.load(Ordering::Relaxed) == 0
    }
}

/// Datagrams that wait until a socket is writable.
#[derive(Debug)]
pub(super) struct SendQueue {
    waiting: VecDeque<Waiting>,
    bytes: usize,
    budget: Arc<QueueBudget>,
}

impl Drop for SendQueue {
    fn drop(&mut self) {
        self.budget.give_back(self.bytes);
    }
}

/// A queued datagram.
#[derive(Debug)]
pub(super) struct Waiting {
    /// The flow of a reply. Several may have the same client, for whom a proxy speaks.
    pub(super) flow: Option<FlowId>,
    pub(super) to: Option<SocketAddr>,
    pub(super) source: Option<LocalAddr>,
    class: u8,
    bytes: Box<[u8]>,
}

impl Waiting {
    /// A datagram for a client, as a test queues it.
    #[cfg(test)]
    pub(super) fn of(bytes: &[u8], to: Option<SocketAddr>) -> Self {
        Self { flow: None, to, source: None, class: 0, bytes: bytes.into() }
    }

    /// The same, of a flow.
    #[cfg(test)]
    pub(super) fn of_flow(self, flow: Option<FlowId>) -> Self {
        Self { flow, ..self }
    }

    fn cost(&self) -> usize {
        self.bytes.len() + OVERHEAD
    }
}

impl SendQueue {
    /// An empty queue that shares `budget` with others.
    pub(super) fn new(budget: Arc<QueueBudget>) -> Self {
        Self { waiting: VecDeque::new(), bytes: 0, budget }
    }

    /// Whether the queue is empty.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Sends `messages` in order, after those already queued, and queues those that do not fit the socket, as datagrams of
    /// the flow that `flow_of` returns for the index of a message. Subtracts those that are not sent from what `tally`
    /// counts as relayed. `gso` says whether the path is believed to accept GSO batches. Returns the indexes of those that
    /// it refused.
    pub(super) fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        messages: &[Transmit<'_>],
        gso: bool,
        flow_of: impl Fn(usize) -> Option<FlowId>,
        tally: &mut Tally,
    ) -> ArrayVec<usize, BATCH> {
        let Progress { messages: through, datagrams, refused } = if self.waiting.is_empty() {
            send_all(socket, messages, gso, tally)
        } else {
            Progress::default()
        };
        let mut through_of_first = datagrams;
        for (index, message) in messages.iter().enumerate().skip(through) {
            self.keep((flow_of(index), message), mem::take(&mut through_of_first), tally);
        }
        refused
    }

    /// Queues the datagrams of `message` after the first `through`, as far as the budget allows.
    fn keep(&mut self, (flow, message): (Option<FlowId>, &Transmit<'_>), through: usize, tally: &mut Tally) {
        for bytes in datagrams(message).skip(through) {
            tally.relayed -= Amount { datagrams: 1, bytes: bytes.len() as u64 };
            let cost = bytes.len() + OVERHEAD;
            if !self.budget.take(cost, self.bytes) {
                tally.overflow(1);
                continue;
            }
            self.bytes += cost;
            let Transmit { to, source, class, .. } = *message;
            self.waiting.push_back(Waiting { flow, to, source, class, bytes: bytes.into() });
        }
    }

    /// Takes the first datagram, for another queue with the same budget.
    pub(super) fn pop(&mut self) -> Option<Waiting> {
        let waiting = self.waiting.pop_front()?;
        self.bytes -= waiting.cost();
        self.budget.give_back(waiting.cost());
        Some(waiting)
    }

    /// Appends a datagram of another queue with the same budget.
    pub(super) fn push(&mut self, waiting: Waiting) {
        self.bytes += waiting.cost();
        self.budget.take_again(waiting.cost());
        self.waiting.push_back(waiting);
    }

    /// The number of queued datagrams.
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Sends queued datagrams, as far as `socket` accepts them. Returns whether the queue is empty.
    pub(super) fn flush(&mut self, socket: BorrowedFd<'_>, tally: &mut Tally) -> bool {
        while !self.waiting.is_empty() {
            let (through, count) = self.send_front(socket, tally);
            let cost: usize = self.waiting.drain(..through).map(|waiting| waiting.cost()).sum();
            self.bytes -= cost;
            self.budget.give_back(cost);
            if through < count {
                return false;
            }
        }
        self.waiting.shrink_to_fit();
        true
    }

    /// Sends a batch of queued datagrams. Returns the numbers of completed ones and of those in the batch.
    fn send_front(&self, socket: BorrowedFd<'_>, tally: &mut Tally) -> (usize, usize) {
        let front = || self.waiting.iter().take(BATCH);
        let payloads: ArrayVec<[IoSlice<'_>; 1], BATCH> =
            front().map(|waiting| [IoSlice::new(&waiting.bytes)]).collect();
        let messages: ArrayVec<Transmit<'_>, BATCH> = payloads
            .iter()
            .zip(front())
            .map(|(payload, Waiting { to, source, class, .. })| Transmit {
                payload,
                to: *to,
                source: *source,
                segment: None,
                class: *class,
            })
            .collect();
        messages.iter().for_each(|message| tally.relayed += amount_of(message));
        let through = send_all(socket, &messages, false, tally).messages;
        messages[through..].iter().for_each(|message| tally.relayed -= amount_of(message));
        (through, messages.len())
    }
}

fn lose(message: &Transmit<'_>, error: io::Error, tally: &mut Tally) {
    let amount = amount_of(message);
    tally.relayed -= amount;
    tally.lose(amount.datagrams, error);
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;
    use std::time::Duration;

    use proptest::prelude::*;
    use socket2::SockRef;

    use super::*;

    /// Long enough for loopback on any machine. Without it a lost datagram would block the test.
    const PATIENCE: Duration = Duration::from_secs(10);

    fn pair() -> (UdpSocket, UdpSocket) {
        let a = UdpSocket::bind("127.0.0.1:0").unwrap();
        let b = UdpSocket::bind("127.0.0.1:0").unwrap();
        a.connect(b.local_addr().unwrap()).unwrap();
        b.set_read_timeout(Some(PATIENCE)).unwrap();
        (a, b)
    }

    /// Sends all of `messages`, none of which may be lost. Returns the GSO batches that the path refused.
    fn send_whole(socket: &UdpSocket, messages: &[Transmit<'_>], gso: bool) -> Vec<usize> {
        let mut tally = Tally::default();
        let progress = send_all(socket.as_fd(), messages, gso, &mut tally);
        assert_eq!(progress.messages, messages.len());
        assert_eq!(format!("{tally:?}"), format!("{:?}", Tally::default()), "nothing is lost");
        progress.refused.to_vec()
    }

    /// A tally that counts all messages as relayed.
    fn relayed(messages: &[Transmit<'_>]) -> Tally {
        let mut tally = Tally::default();
        messages.iter().for_each(|message| tally.relayed += amount_of(message));
        tally
    }

    fn transmit<'a>(payload: &'a [IoSlice<'a>], segment: Option<u16>) -> Transmit<'a> {
        Transmit { payload, to: None, source: None, segment, class: 0 }
    }

    #[test]
    fn the_datagram_that_meets_an_earlier_ones_error_is_sent_again() {
        let (a, b) = pair();
        let addr = b.local_addr().unwrap();
        drop(b);
        let payload = [IoSlice::new(b"first")];
        assert!(send_whole(&a, &[transmit(&payload, None)], true).is_empty());
        let b = UdpSocket::bind(addr).unwrap();
        b.set_read_timeout(Some(PATIENCE)).unwrap();
        let payload = [IoSlice::new(b"second")];
        let mut tally = Tally::default();
        assert_eq!(send_all(a.as_fd(), &[transmit(&payload, None)], true, &mut tally).messages, 1);
        let mut wanted = Tally::default();
        wanted.lose(1, io::Error::from_raw_os_error(libc::ECONNREFUSED));
        assert_eq!(format!("{tally:?}"), format!("{wanted:?}"), "the first one is lost");
        let mut buf = [0; 9];
        assert_eq!(b.recv(&mut buf).unwrap(), 6);
        assert_eq!(&buf[..6], b"second");
    }

    #[test]
    fn a_gso_batch_that_the_path_refuses_goes_as_single_datagrams() {
        let (a, b) = pair();
        // Segments exceed the MTU of the loopback device, so the kernel refuses them.
        let (long, short) = (vec![1; 66_000 / 2], vec![2; 7]);
        let payload = [IoSlice::new(&long[..30_000]), IoSlice::new(&long[..30_000]), IoSlice::new(&short)];
        let refused = send_whole(&a, &[transmit(&payload, Some(30_000))], true);
        let mut buf = vec![0; 66_000];
        for wanted in [30_000, 30_000, 7] {
            assert_eq!(b.recv(&mut buf).unwrap(), wanted);
        }
        // Whether the device accepted the GSO batch depends on the device; the receiver sees no difference.
        assert!(matches!(refused[..], [] | [0]));
    }

    #[test]
    fn a_gso_batch_longer_than_a_batch_is_sent_singly_too() {
        let (a, b) = pair();
        let bytes = vec![5; 10 * (BATCH + 36)];
        let payload = [IoSlice::new(&bytes)];
        assert_eq!(send_singly(a.as_fd(), &transmit(&payload, Some(10)), &mut Tally::default()), None);
        for _ in 0..BATCH + 36 {
            assert_eq!(b.recv(&mut [0; 20]).unwrap(), 10);
        }
    }

    #[test]
    fn a_path_that_refused_a_gso_batch_is_not_asked_again() {
        let (a, b) = pair();
        let batch_of = [IoSlice::new(&[1; 10]), IoSlice::new(&[2; 10])];
        let single = [IoSlice::new(b"behind")];
        let messages = [transmit(&single, None), transmit(&batch_of, Some(10)), transmit(&single, None)];
        assert!(send_whole(&a, &messages, false).is_empty());
        for wanted in [6, 10, 10, 6] {
            assert_eq!(b.recv(&mut [0; 30]).unwrap(), wanted);
        }
    }

    #[test]
    fn errors_have_their_remedies() {
        let of = |errno, is_gso| outcome_of(io::Error::from_raw_os_error(errno), is_gso, false);
        assert!(matches!(of(libc::ECONNREFUSED, false), SendOutcome::Retry(_)));
        assert!(matches!(of(libc::EAGAIN, true), SendOutcome::Full));
        for errno in [libc::EIO, libc::EINVAL, libc::EMSGSIZE, libc::ENOPROTOOPT, libc::EOPNOTSUPP] {
            assert!(matches!(of(errno, true), SendOutcome::Singly));
            assert!(matches!(of(errno, false), SendOutcome::Retry(_)));
        }
        assert!(matches!(of(libc::EHOSTUNREACH, true), SendOutcome::Retry(_)));
        let last = outcome_of(io::Error::from_raw_os_error(libc::EHOSTUNREACH), true, true);
        assert!(matches!(last, SendOutcome::Lost(_)));
    }

    /// Each attempt fails with the same error, which is the message's own: it is lost once, and the following ones are
    /// sent.
    #[test]
    fn a_message_that_can_never_be_sent_is_lost_and_does_not_stop_the_others() {
        let (a, b) = pair();
        let (too_long, short) = (vec![0; 65_508], [IoSlice::new(b"next")]);
        let too_long = [IoSlice::new(&too_long)];
        let messages = [transmit(&too_long, None), transmit(&short, None)];
        let mut tally = relayed(&messages);
        assert_eq!(send_all(a.as_fd(), &messages, true, &mut tally).messages, 2);
        assert_eq!(tally.relayed, amount_of(&messages[1]));
        let mut wanted = relayed(&messages[1..]);
        wanted.lose(1, io::Error::from_raw_os_error(libc::EMSGSIZE));
        assert_eq!(format!("{tally:?}"), format!("{wanted:?}"));
        let mut buf = [0; 9];
        assert_eq!(b.recv(&mut buf).unwrap(), 4);
    }

    /// A socket accepts some datagrams of a GSO batch, and the others are queued: each arrives once, in order.
    #[test]
    fn what_a_full_socket_takes_of_a_batch_is_not_sent_again() {
        const DATAGRAMS: u8 = 50;

        // On a Unix socket, unread datagrams fill the sender's buffer, as unsent ones do on a slow link.
        let (a, b) = UnixDatagram::pair().unwrap();
        SockRef::from(&a).set_send_buffer_size(1).unwrap();
        a.set_nonblocking(true).unwrap();
        let bytes: Vec<u8> = (0..DATAGRAMS).collect();
        let payload = [IoSlice::new(&bytes)];
        let gso_batch = transmit(&payload, Some(1));
        let mut queue = SendQueue::new(Arc::default());
        let mut tally = relayed(&[gso_batch]);
        let refused = queue.send(a.as_fd(), &[gso_batch], false, |_index| None, &mut tally);
        assert!(refused.is_empty(), "nobody tried");
        assert!((1..usize::from(DATAGRAMS)).contains(&queue.len()), "{} wait", queue.len());
        assert_eq!(tally.relayed.datagrams, u64::from(DATAGRAMS) - queue.len() as u64);
        let mut received = Vec::new();
        while received.len() < bytes.len() {
            let mut buf = [0; 2];
            assert_eq!(b.recv(&mut buf).unwrap(), 1);
            received.push(buf[0]);
            queue.flush(a.as_fd(), &mut tally);
        }
        assert_eq!(received, bytes);
        assert_eq!(tally.relayed, amount_of(&gso_batch));
        assert!(queue.is_empty());
    }

    #[test]
    fn a_full_queue_says_what_it_lost() {
        let mut queue = SendQueue::new(Arc::default());
        let big = vec![0; 60_000];
        let payload = [IoSlice::new(&big)];
        let kept = QUEUE_BYTES / (big.len() + OVERHEAD);
        let mut tally = Tally::default();
        for _ in 0..=kept {
            tally.relayed += amount_of(&transmit(&payload, None));
            queue.keep((None, &transmit(&payload, None)), 0, &mut tally);
        }
        assert_eq!(queue.len(), kept);
        let mut wanted = Tally::default();
        wanted.overflow(1);
        assert_eq!(format!("{tally:?}"), format!("{wanted:?}"));
    }

    #[test]
    fn many_queues_share_the_budget_equally() {
        let budget = Arc::<QueueBudget>::default();
        let left = || BUDGET_BYTES - budget.all.0.load(Ordering::Relaxed);
        let mut queues: Vec<_> = (0..200).map(|_| SendQueue::new(budget.clone())).collect();
        let payload = [IoSlice::new(&[0; 1200])];
        let mut tally = Tally::default();
        for _ in 0..100 {
            for queue in &mut queues {
                tally.relayed += amount_of(&transmit(&payload, None));
                queue.keep((None, &transmit(&payload, None)), 0, &mut tally);
            }
        }
        let kept: Vec<usize> = queues.iter().map(SendQueue::len).collect();
        let (least, most) = (kept.iter().min().unwrap(), kept.iter().max().unwrap());
        assert!(*least > 0 && most - least <= 1, "{kept:?}");
        assert_eq!(left() + queues.iter().map(|queue| queue.bytes).sum::<usize>(), BUDGET_BYTES);
        let (a, _b) = pair();
        assert!(queues[0].flush(a.as_fd(), &mut tally));
        queues.truncate(1);
        assert_eq!(left(), BUDGET_BYTES);
    }

    #[test]
    fn what_waits_moves_to_another_queue_with_its_part_of_the_budget() {
        let budget = Arc::<QueueBudget>::default();
        let mut queues = [(); 2].map(|()| SendQueue::new(budget.clone()));
        let mut tally = Tally::default();
        let bytes = [7; 3];
        for size in 1..=3 {
            let payload = [IoSlice::new(&bytes[..size])];
            tally.relayed += amount_of(&transmit(&payload, None));
            queues[0].keep((None, &transmit(&payload, None)), 0, &mut tally);
        }
        let taken = budget.all.0.load(Ordering::Relaxed);
        assert!(!budget.is_unused());
        let [from, to] = &mut queues;
        while let Some(waiting) = from.pop() {
            assert_eq!(from.bytes, taken - to.bytes - waiting.cost());
            to.push(waiting);
        }
        assert_eq!((from.len(), from.bytes, to.len(), to.bytes), (0, 0, 3, taken));
        assert_eq!(budget.all.0.load(Ordering::Relaxed), taken);
        let (a, b) = pair();
        assert!(to.flush(a.as_fd(), &mut tally));
        for size in 1..=3 {
            assert_eq!(b.recv(&mut [0; 9]).unwrap(), size);
        }
        assert!(budget.is_unused());
    }

    proptest! {
        #[test]
        fn what_waits_leaves_in_order_and_whole(sizes in prop::collection::vec(0..1000_usize, 1..80)) {
            let (a, b) = pair();
            let mut queue = SendQueue::new(Arc::default());
            let bytes: Vec<u8> = (0..1000).map(|i| (i % 251) as u8).collect();
            let mut tally = Tally::default();
            for size in &sizes {
                let payload = [IoSlice::new(&bytes[..*size])];
                tally.relayed += amount_of(&transmit(&payload, None));
                queue.keep((None, &transmit(&payload, None)), 0, &mut tally);
            }
            prop_assert_eq!(tally.relayed, Amount::default());
            prop_assert!(queue.flush(a.as_fd(), &mut tally));
            prop_assert_eq!(tally.relayed.datagrams, sizes.len() as u64);
            prop_assert_eq!(queue.bytes, 0);
            let mut buf = [0; 1001];
            for size in sizes {
                prop_assert_eq!(b.recv(&mut buf).unwrap(), size);
                prop_assert_eq!(&buf[..size], &bytes[..size]);
            }
        }

        #[test]
        fn a_gso_batch_is_the_datagrams_it_was_made_of(count in 1..20_usize, size in 1..500_u16, last in 1..500_usize) {
            let whole = vec![9; usize::from(size)];
            let tail = vec![8; last.min(usize::from(size))];
            let mut pieces: Vec<_> = (0..count).map(|_| IoSlice::new(&whole)).collect();
            pieces.push(IoSlice::new(&tail));
            let batch_of = transmit(&pieces, Some(size));
            let lens: Vec<_> = datagrams(&batch_of).map(<[u8]>::len).collect();
            let mut wanted = vec![usize::from(size); count];
            wanted.push(tail.len());
            prop_assert_eq!(lens, wanted);
        }
    }
}
