//! Sending in batches, and what to do when the kernel says no.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arrayvec::ArrayVec;
use nix::libc;
use rproxy_sys::udp::{BATCH, GSO_BYTES, GSO_SEGMENTS, LocalAddr, Transmit, send_batch};

use super::tally::{Amount, Tally};

/// How often a message is tried again that met an error of an earlier one. Each try takes one error
/// off the socket, and an error is queued only while a message is under way.
const RETRIES: usize = 3;

/// What happened to a message, or to the one at an index, that did not simply leave.
#[derive(Debug)]
pub(super) enum SendOutcome<'m, 'a> {
    /// The path takes no GSO batches: the one at this index went as single datagrams, as others should.
    GsoRefused(usize),
    /// The socket is full: this message, and all that are reported after it, wait for room.
    Full(&'m Transmit<'a>),
    /// This message is lost: the network does not take it.
    Lost(&'m Transmit<'a>, io::Error),
    /// A datagram that left before is lost, as the network says now.
    Earlier(io::Error),
}

/// Sends `messages` in order, without waiting; GSO batches as single datagrams unless the path takes
/// `gso`, as far as is known. Returns `false` if the socket became full.
pub(super) fn send_all(
    socket: BorrowedFd<'_>,
    messages: &[Transmit<'_>],
    gso: bool,
    report: &mut dyn FnMut(SendOutcome<'_, '_>),
) -> bool {
    let mut next = 0;
    let mut errors: ArrayVec<io::Error, { RETRIES }> = ArrayVec::new();
    while let Some(message) = messages.get(next) {
        let is_gso = message.segment.is_some();
        let remedy = if is_gso && !gso {
            Remedy::Single
        } else {
            match send_batch(socket, up_to_gso(&messages[next..], gso)) {
                Ok(sent) => {
                    errors.drain(..).for_each(|error| report(SendOutcome::Earlier(error)));
                    next += sent;
                    continue;
                }
                Err(error) => remedy(error, is_gso),
            }
        };
        match remedy {
            Remedy::Again(error) if !errors.is_full() => {
                errors.push(error);
                continue;
            }
            Remedy::Wait => {
                messages[next..].iter().for_each(|message| report(SendOutcome::Full(message)));
                return false;
            }
            Remedy::Single => {
                if gso {
                    report(SendOutcome::GsoRefused(next));
                }
                if !send_singly(socket, message, report) {
                    messages[next + 1..].iter().for_each(|message| report(SendOutcome::Full(message)));
                    return false;
                }
            }
            Remedy::Again(error) => report(SendOutcome::Lost(message, error)),
        }
        errors.clear();
        next += 1;
    }
    true
}

/// What of `messages` can be sent as it is: all if the path takes GSO batches, else those before the first.
fn up_to_gso<'m, 'a>(messages: &'m [Transmit<'a>], gso: bool) -> &'m [Transmit<'a>] {
    let first = messages.iter().position(|message| !gso && message.segment.is_some());
    &messages[..first.unwrap_or(messages.len())]
}

/// Sends the datagrams of a GSO batch one by one.
fn send_singly(
    socket: BorrowedFd<'_>,
    batch_of: &Transmit<'_>,
    report: &mut dyn FnMut(SendOutcome<'_, '_>),
) -> bool {
    // The kernel may hand over longer GSO batches than it takes from us, hence in batches.
    let mut rest = datagrams(batch_of).peekable();
    while rest.peek().is_some() {
        let payloads: ArrayVec<[IoSlice<'_>; 1], BATCH> =
            rest.by_ref().take(BATCH).map(|bytes| [IoSlice::new(bytes)]).collect();
        let messages: ArrayVec<Transmit<'_>, BATCH> =
            payloads.iter().map(|payload| Transmit { payload, segment: None, ..*batch_of }).collect();
        if !send_all(socket, &messages, false, report) {
            for bytes in rest {
                report(SendOutcome::Full(&Transmit {
                    payload: &[IoSlice::new(bytes)],
                    segment: None,
                    ..*batch_of
                }));
            }
            return false;
        }
    }
    true
}

/// The datagrams that a message consists of. The pieces of a GSO batch are whole datagrams each.
fn datagrams<'a>(message: &Transmit<'a>) -> impl Iterator<Item = &'a [u8]> {
    let payload: &'a [IoSlice<'a>] = message.payload;
    let size = message.segment.map_or(usize::MAX, usize::from);
    let single = message.segment.is_none();
    payload.iter().flat_map(move |piece| {
        let piece: &'a [u8] = piece;
        // A datagram without bytes has no chunks, but is one.
        let whole = (single && piece.is_empty()).then_some(piece);
        whole.into_iter().chain(piece.chunks(size))
    })
}

/// How much a message is.
fn amount_of(message: &Transmit<'_>) -> Amount {
    let bytes: usize = message.payload.iter().map(|piece| piece.len()).sum();
    Amount { datagrams: datagrams(message).count() as u64, bytes: bytes as u64 }
}

/// What helps against an error of sendmmsg(2).
#[derive(Debug)]
enum Remedy {
    /// Sending again: many an error was queued on the socket for an earlier datagram (ICMP says that
    /// it was refused or found no way), and is off it now. Which ones, their numbers do not tell.
    Again(io::Error),
    /// Sending later.
    Wait,
    /// Sending the datagrams of the GSO batch one by one.
    Single,
}

fn remedy(error: io::Error, is_gso: bool) -> Remedy {
    match error.raw_os_error() {
        Some(libc::EAGAIN) => Remedy::Wait,
        // No checksum offload on the device; segments over its MTU; over the path's.
        Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE) if is_gso => Remedy::Single,
        // Before Linux 4.18 there are none.
        Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP) if is_gso => Remedy::Single,
        _ => Remedy::Again(error),
    }
}

/// Bytes that wait for one socket at the most; what comes then is lost, as in any full queue. There is
/// room for a whole batch: a listener that is full gets no other answers until this one is gone.
const QUEUE_BYTES: usize = BATCH * (GSO_BYTES + GSO_SEGMENTS * OVERHEAD);

/// Bytes that wait for all sockets of a [`Room`] together.
const ROOM_BYTES: usize = 2 * QUEUE_BYTES;

/// Each waiting datagram counts for this much more, so that empty ones are bounded too: its place in a queue that
/// grows by doubling, and what the allocator adds.
const OVERHEAD: usize = 2 * size_of::<Waiting>() + 2 * size_of::<usize>();

/// Room that queues share. Each may be as large as what is left is (dynamic thresholds, Choudhury and Hahne 1998):
/// one alone gets all it may have, of many each gets the same, and there is always some for one more.
#[derive(Debug)]
pub(super) struct Room {
    /// One task uses it; which thread runs that may change.
    left: AtomicUsize,
}

impl Default for Room {
    fn default() -> Self {
        Self { left: AtomicUsize::new(ROOM_BYTES) }
    }
}

impl Room {
    /// Takes `cost` bytes for a queue of `bytes`, unless that is more than its share.
    fn take(&self, cost: usize, bytes: usize) -> bool {
        let left = self.left.load(Ordering::Relaxed).saturating_sub(cost);
        let has_room = bytes + cost <= left.min(QUEUE_BYTES);
        if has_room {
            self.left.store(left, Ordering::Relaxed);
        }
        has_room
    }

    /// Takes `cost` bytes that were given back a moment ago.
    fn take_again(&self, cost: usize) {
        self.left.fetch_sub(cost, Ordering::Relaxed);
    }

    fn give_back(&self, bytes: usize) {
        self.left.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Whether nothing waits anywhere.
    pub(super) fn is_unused(&self) -> bool {
        self.left.load(Ordering::Relaxed) == ROOM_BYTES
    }
}

/// Datagrams that wait until a socket has room again.
#[derive(Debug)]
pub(super) struct SendQueue {
    waiting: VecDeque<Waiting>,
    bytes: usize,
    room: Arc<Room>,
}

impl Drop for SendQueue {
    fn drop(&mut self) {
        self.room.give_back(self.bytes);
    }
}

/// A datagram that waits.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) to: Option<SocketAddr>,
    pub(super) source: Option<LocalAddr>,
    class: u8,
    bytes: Box<[u8]>,
}

impl Waiting {
    fn cost(&self) -> usize {
        self.bytes.len() + OVERHEAD
    }
}

impl SendQueue {
    /// An empty one that shares `room` with others.
    pub(super) fn new(room: Arc<Room>) -> Self {
        Self { waiting: VecDeque::new(), bytes: 0, room }
    }

    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Sends `messages` in order, behind what waits already, and keeps what there is no room for. Of what
    /// counts as relayed in `tally`, it takes out what is not. `gso` says whether the path takes them,
    /// as far as is known; `refused` gets the index of one that it does not take.
    pub(super) fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        messages: &[Transmit<'_>],
        gso: bool,
        tally: &mut Tally,
        refused: &mut dyn FnMut(usize),
    ) {
        if !self.waiting.is_empty() {
            return messages.iter().for_each(|message| self.keep(message, tally));
        }
        send_all(socket, messages, gso, &mut |outcome| match outcome {
            SendOutcome::GsoRefused(index) => refused(index),
            SendOutcome::Full(message) => self.keep(message, tally),
            SendOutcome::Lost(message, error) => lose(message, error, tally),
            SendOutcome::Earlier(error) => tally.lose(1, error),
        });
    }

    /// Keeps the datagrams of `message`, as far as there is room.
    fn keep(&mut self, message: &Transmit<'_>, tally: &mut Tally) {
        tally.relayed -= amount_of(message);
        for bytes in datagrams(message) {
            let cost = bytes.len() + OVERHEAD;
            if !self.room.take(cost, self.bytes) {
                tally.overflow(1);
                continue;
            }
            self.bytes += cost;
            let Transmit { to, source, class, .. } = *message;
            self.waiting.push_back(Waiting { to, source, class, bytes: bytes.into() });
        }
    }

    /// Takes the first one out, for another queue that shares the room.
    pub(super) fn pop(&mut self) -> Option<Waiting> {
        let waiting = self.waiting.pop_front()?;
        self.bytes -= waiting.cost();
        self.room.give_back(waiting.cost());
        Some(waiting)
    }

    /// Adds one that waited in another queue that shares the room.
    pub(super) fn push(&mut self, waiting: Waiting) {
        self.bytes += waiting.cost();
        self.room.take_again(waiting.cost());
        self.waiting.push_back(waiting);
    }

    /// How many datagrams wait.
    pub(super) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Sends what waits, as far as `socket` takes it. Returns `true` if nothing waits any more.
    pub(super) fn flush(&mut self, socket: BorrowedFd<'_>, tally: &mut Tally) -> bool {
        while !self.waiting.is_empty() {
            let (gone, all) = self.send_front(socket, tally);
            let gone: usize = self.waiting.drain(..gone).map(|waiting| waiting.cost()).sum();
            self.bytes -= gone;
            self.room.give_back(gone);
            if !all {
                return false;
            }
        }
        self.waiting.shrink_to_fit();
        true
    }

    /// Sends a batch of what waits: how many are through with, and whether those are all of it.
    fn send_front(&self, socket: BorrowedFd<'_>, tally: &mut Tally) -> (usize, bool) {
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
        let mut left = 0;
        let all = send_all(socket, &messages, false, &mut |outcome| match outcome {
            SendOutcome::Full(message) => {
                tally.relayed -= amount_of(message);
                left += 1;
            }
            SendOutcome::Lost(message, error) => lose(message, error, tally),
            SendOutcome::Earlier(error) => tally.lose(1, error),
            SendOutcome::GsoRefused(_) => {}
        });
        (messages.len() - left, all)
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
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    /// Long enough for loopback on any machine; without it a lost datagram would hang the test.
    const PATIENCE: Duration = Duration::from_secs(10);

    fn pair() -> (UdpSocket, UdpSocket) {
        let a = UdpSocket::bind("127.0.0.1:0").unwrap();
        let b = UdpSocket::bind("127.0.0.1:0").unwrap();
        a.connect(b.local_addr().unwrap()).unwrap();
        b.set_read_timeout(Some(PATIENCE)).unwrap();
        (a, b)
    }

    fn no_outcome(outcome: SendOutcome<'_, '_>) {
        panic!("{outcome:?}");
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
        assert!(send_all(a.as_fd(), &[transmit(&payload, None)], true, &mut no_outcome));
        let b = UdpSocket::bind(addr).unwrap();
        b.set_read_timeout(Some(PATIENCE)).unwrap();
        let payload = [IoSlice::new(b"second")];
        let mut earlier = 0;
        assert!(send_all(a.as_fd(), &[transmit(&payload, None)], true, &mut |outcome| match outcome {
            SendOutcome::Earlier(_) => earlier += 1,
            other => panic!("{other:?}"),
        }));
        assert_eq!(earlier, 1);
        let mut buf = [0; 9];
        assert_eq!(b.recv(&mut buf).unwrap(), 6);
        assert_eq!(&buf[..6], b"second");
    }

    #[test]
    fn a_train_that_the_path_refuses_goes_as_single_datagrams() {
        let (a, b) = pair();
        // Segments over the MTU of the loopback device: the kernel refuses to cut there.
        let (long, short) = (vec![1; 66_000 / 2], vec![2; 7]);
        let payload = [IoSlice::new(&long[..30_000]), IoSlice::new(&long[..30_000]), IoSlice::new(&short)];
        let mut refused = None;
        let too_long = Transmit { segment: Some(0xFFFF), ..transmit(&payload, None) };
        assert!(send_all(
            a.as_fd(),
            &[Transmit { segment: Some(30_000), ..too_long }],
            true,
            &mut |outcome| {
                match outcome {
                    SendOutcome::GsoRefused(index) => refused = Some(index),
                    other => panic!("{other:?}"),
                }
            }
        ));
        let mut buf = vec![0; 66_000];
        for wanted in [30_000, 30_000, 7] {
            assert_eq!(b.recv(&mut buf).unwrap(), wanted);
        }
        // Whether the device took the GSO batch is its business; what arrives is the same.
        assert!(matches!(refused, None | Some(0)));
    }

    #[test]
    fn a_train_longer_than_a_batch_is_sent_singly_too() {
        let (a, b) = pair();
        let bytes = vec![5; 10 * (BATCH + 36)];
        let payload = [IoSlice::new(&bytes)];
        assert!(send_singly(a.as_fd(), &transmit(&payload, Some(10)), &mut no_outcome));
        for _ in 0..BATCH + 36 {
            assert_eq!(b.recv(&mut [0; 20]).unwrap(), 10);
        }
    }

    #[test]
    fn a_path_that_refused_a_train_is_not_asked_again() {
        let (a, b) = pair();
        let batch_of = [IoSlice::new(&[1; 10]), IoSlice::new(&[2; 10])];
        let single = [IoSlice::new(b"behind")];
        let messages = [transmit(&single, None), transmit(&batch_of, Some(10)), transmit(&single, None)];
        assert!(send_all(a.as_fd(), &messages, false, &mut no_outcome));
        for wanted in [6, 10, 10, 6] {
            assert_eq!(b.recv(&mut [0; 30]).unwrap(), wanted);
        }
    }

    #[test]
    fn an_error_that_lasts_costs_the_message_that_meets_it_and_no_other() {
        let (a, b) = pair();
        // No datagram of IPv4 is as large, however often it is tried.
        let too_large = vec![1; GSO_BYTES + 1];
        let [large, small] = [[IoSlice::new(&too_large)], [IoSlice::new(b"small")]];
        let messages = [&small, &large, &small].map(|payload| transmit(payload, None));
        let mut lost = Vec::new();
        assert!(send_all(a.as_fd(), &messages, true, &mut |outcome| match outcome {
            SendOutcome::Lost(message, error) => lost.push((amount_of(message).bytes, error.raw_os_error())),
            other => panic!("{other:?}"),
        }));
        assert_eq!(lost, [(GSO_BYTES as u64 + 1, Some(libc::EMSGSIZE))]);
        for _ in 0..2 {
            assert_eq!(b.recv(&mut [0; 9]).unwrap(), 5);
        }
        b.set_nonblocking(true).unwrap();
        b.recv(&mut [0; 9]).unwrap_err();
    }

    #[test]
    fn errors_have_their_remedies() {
        let of = |errno, is_gso| remedy(io::Error::from_raw_os_error(errno), is_gso);
        assert!(matches!(of(libc::ECONNREFUSED, false), Remedy::Again(_)));
        assert!(matches!(of(libc::EAGAIN, true), Remedy::Wait));
        for errno in [libc::EIO, libc::EINVAL, libc::EMSGSIZE] {
            assert!(matches!(of(errno, true), Remedy::Single));
            assert!(matches!(of(errno, false), Remedy::Again(_)));
        }
        assert!(matches!(of(libc::EHOSTUNREACH, true), Remedy::Again(_)));
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
            queue.keep(&transmit(&payload, None), &mut tally);
        }
        assert_eq!(queue.len(), kept);
        let mut wanted = Tally::default();
        wanted.overflow(1);
        assert_eq!(format!("{tally:?}"), format!("{wanted:?}"));
    }

    #[test]
    fn many_queues_share_the_room_alike() {
        let room = Arc::<Room>::default();
        let left = || room.left.load(Ordering::Relaxed);
        let mut queues: Vec<_> = (0..200).map(|_| SendQueue::new(room.clone())).collect();
        let payload = [IoSlice::new(&[0; 1200])];
        let mut tally = Tally::default();
        for _ in 0..100 {
            for queue in &mut queues {
                tally.relayed += amount_of(&transmit(&payload, None));
                queue.keep(&transmit(&payload, None), &mut tally);
            }
        }
        let kept: Vec<usize> = queues.iter().map(SendQueue::len).collect();
        let (least, most) = (kept.iter().min().unwrap(), kept.iter().max().unwrap());
        assert!(*least > 0 && most - least <= 1, "{kept:?}");
        assert_eq!(left() + queues.iter().map(|queue| queue.bytes).sum::<usize>(), ROOM_BYTES);
        let (a, _b) = pair();
        assert!(queues[0].flush(a.as_fd(), &mut tally));
        queues.truncate(1);
        assert_eq!(left(), ROOM_BYTES);
    }

    #[test]
    fn what_waits_moves_to_another_queue_with_the_room_that_it_takes() {
        let room = Arc::<Room>::default();
        let mut queues = [(); 2].map(|()| SendQueue::new(room.clone()));
        let mut tally = Tally::default();
        let bytes = [7; 3];
        for size in 1..=3 {
            let payload = [IoSlice::new(&bytes[..size])];
            tally.relayed += amount_of(&transmit(&payload, None));
            queues[0].keep(&transmit(&payload, None), &mut tally);
        }
        let taken = ROOM_BYTES - room.left.load(Ordering::Relaxed);
        assert!(!room.is_unused());
        let [from, to] = &mut queues;
        while let Some(waiting) = from.pop() {
            to.push(waiting);
        }
        assert_eq!((from.len(), from.bytes, to.len(), to.bytes), (0, 0, 3, taken));
        assert_eq!(ROOM_BYTES - room.left.load(Ordering::Relaxed), taken);
        let (a, b) = pair();
        assert!(to.flush(a.as_fd(), &mut tally));
        for size in 1..=3 {
            assert_eq!(b.recv(&mut [0; 9]).unwrap(), size);
        }
        assert!(room.is_unused());
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
                queue.keep(&transmit(&payload, None), &mut tally);
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
        fn a_train_is_the_datagrams_it_was_made_of(count in 1..20_usize, size in 1..500_u16, last in 1..500_usize) {
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
