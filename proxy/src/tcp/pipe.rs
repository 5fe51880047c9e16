//! Pipes for splicing, pooled per worker.
//!
//! A pipe is taken for one step, as the copy buffer is: it is only kept while the sink is full. A worker therefore needs
//! one pipe, and one for each sink that is slower than its source.
//!
//! The kernel accounts pipe buffers per user (`fs.pipe-user-pages-soft`, pipe(7)): an unprivileged process
//! gets a few dozen full-sized pipes, then tiny ones. If no pipe of a useful size can be opened, the transfer
//! is copied.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::{pipe2, read};

use super::stream::{Stream, is_refusal};

/// With a smaller pipe, splicing moves less per call than copying does.
const USEFUL_SIZE: usize = 64 * 1024;

/// The number of pipes of each capacity that a worker keeps for reuse. Empty pipes use descriptors, but no memory for
/// data.
const KEPT_BY_WORKER: usize = 8;

/// The maximum number of pipes in the process, which bounds the kernel memory that stalled transfers hold.
const MOST: usize = 256;

/// How long a worker copies after it could not splice: a failed attempt to open a pipe costs five system calls.
const RETRY: Duration = Duration::from_secs(1);

/// The number of pipes, in use or pooled.
static OPEN: AtomicUsize = AtomicUsize::new(0);

/// The most that one call moves. A pipe holds less: as many bytes as its capacity, in as many slots as that has pages, and a
/// slot holds a fragment of a packet (`splice_file_to_pipe` in fs/splice.c, `__splice_segment` in net/core/skbuff.c).
const MOST_BYTES: usize = 1024 * 1024;

/// The capacity of a pipe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Capacity {
    /// The kernel's default, for bursts of single pages: 16 slots, as many as splice(2) passes to the socket at a time
    /// (`splice_to_socket` in fs/splice.c).
    Default,
    /// For many bulk transfers, and for bursts whose [fragments](super::fragments) are large.
    Medium,
    /// For long bursts and few bulk transfers, and the maximum for an unprivileged process (`fs.pipe-max-size`).
    Full,
}

impl Capacity {
    /// In bytes.
    pub(super) const fn bytes(self) -> u32 {
        match self {
            Self::Default => 64 * 1024,
            Self::Medium => 256 * 1024,
            Self::Full => 1024 * 1024,
        }
    }
}

/// The pipes that a worker keeps.
#[derive(Default)]
struct Pool {
    /// Indexed by capacity.
    kept: [Vec<Pipe>; 3],
    /// When it last failed to open a pipe, or splice(2) was refused.
    failed: Option<Instant>,
}

impl Pool {
    fn of(&mut self, capacity: Capacity) -> &mut Vec<Pipe> {
        &mut self.kept[capacity as usize]
    }

    fn take(&mut self, capacity: Capacity) -> Option<Pipe> {
        if self.failed.is_some_and(|at| at.elapsed() < RETRY) {
            return None;
        }
        if let Some(pipe) = self.of(capacity).pop() {
            return Some(pipe);
        }
        let opened = Pipe::open(capacity);
        self.failed = opened.is_none().then(Instant::now);
        opened
    }
}

thread_local! {
    static POOL: RefCell<Pool> = const { RefCell::new(Pool { kept: [const { Vec::new() }; 3], failed: None }) };
}

/// Takes an empty pipe from this worker's pool, or opens one. Returns `None` if that fails, or has failed lately.
pub(super) fn take(capacity: Capacity) -> Option<Pipe> {
    POOL.with_borrow_mut(|pool| pool.take(capacity))
}

/// Returns a pipe to this worker's pool if it is empty and the pool has room; otherwise closes it.
pub(super) fn give_back(pipe: Pipe) {
    POOL.with_borrow_mut(|pool| {
        let kept = pool.of(pipe.capacity);
        if pipe.is_empty() && kept.len() < KEPT_BY_WORKER {
            kept.push(pipe);
        }
    });
}

/// Closes the pipes that this worker keeps.
pub(super) fn close_kept() {
    // When a thread ends, the pool may already be gone.
    drop(POOL.try_with(RefCell::take));
}

/// A pipe and the number of bytes in it.
pub(super) struct Pipe {
    read_end: OwnedFd,
    write_end: OwnedFd,
    /// What was asked for.
    capacity: Capacity,
    /// Bytes in the pipe. Counted here, because `EAGAIN` from splice(2) does not say whether the pipe or the
    /// socket caused it.
    held: usize,
    _permit: Permit,
}

impl Pipe {
    fn open(capacity: Capacity) -> Option<Self> {
        let permit = Permit::take()?;
        let (read_end, write_end) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).ok()?;
        // Over budget, the pipe keeps its size, which may be a page or two.
        let size = fcntl(&write_end, FcntlArg::F_SETPIPE_SZ(capacity.bytes().cast_signed()))
            .or_else(|_errno| fcntl(&write_end, FcntlArg::F_GETPIPE_SZ))
            .ok()?;
        let size = usize::try_from(size).ok()?;
        let pipe = Self { read_end, write_end, capacity, held: 0, _permit: permit };
        (size >= USEFUL_SIZE).then_some(pipe)
    }

    /// Whether the pipe is empty.
    pub(super) fn is_empty(&self) -> bool {
        self.held == 0
    }

    /// Splices queued data from `source` into the pipe, which must be empty. Returns 0 at the end of the
    /// stream, or before an urgent byte that is followed by the end of the stream.
    ///
    /// # Errors
    /// `EAGAIN` if no data is queued; the error of `source`.
    pub(super) fn fill(&mut self, source: &Stream) -> io::Result<usize> {
        debug_assert!(self.is_empty(), "only then EAGAIN speaks of the source");
        let filled = source.read_by(|source| splice_some(source, &self.write_end, MOST_BYTES))?;
        self.held = filled;
        Ok(filled)
    }

    /// Splices data from the pipe, which must not be empty, into `sink`.
    ///
    /// # Errors
    /// `EAGAIN` if `sink` is not writable; the error of `sink`.
    pub(super) fn drain(&mut self, sink: &Stream) -> io::Result<usize> {
        debug_assert!(!self.is_empty(), "only then EAGAIN speaks of the sink");
        let drained = sink.write_by(|sink| splice_some(&self.read_end, sink, self.held))?;
        self.held -= drained;
        Ok(drained)
    }

    /// Reads everything in the pipe.
    ///
    /// # Errors
    /// Those of read(2).
    pub(super) fn read_all(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.held];
        while self.held > 0 {
            let start = bytes.len() - self.held;
            match read(&self.read_end, &mut bytes[start..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.held -= count,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(bytes)
    }
}

/// Whether splice(2) itself was refused, which is logged once. This worker copies for a while then.
pub(super) fn is_refused(error: &io::Error) -> bool {
    static REFUSED: Once = Once::new();

    let is_refused = is_refusal(error);
    if is_refused {
        POOL.with_borrow_mut(|pool| pool.failed = Some(Instant::now()));
        REFUSED
            .call_once(|| tracing::warn!(%error, "splice(2) is refused; bulk transfers are copied instead"));
    }
    is_refused
}

/// Permission for one of [`MOST`] pipes.
struct Permit;

impl Permit {
    fn take() -> Option<Self> {
        let taken = OPEN.fetch_add(1, Ordering::Relaxed);
        // Created even if the limit is exceeded: its drop corrects the count.
        let permit = Self;
        (taken < MOST).then_some(permit)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        OPEN.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Calls splice(2) without blocking, and repeats it if a signal interrupts it.
fn splice_some(from: impl AsFd, to: impl AsFd, len: usize) -> nix::Result<usize> {
    loop {
        match splice(&from, None, &to, None, len, SpliceFFlags::SPLICE_F_NONBLOCK) {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::fcntl::FdFlag;
    use nix::unistd::write;

    use super::*;

    /// A pipe with `bytes` in it.
    fn holding(bytes: &[u8]) -> Pipe {
        let mut pipe = Pipe::open(Capacity::Default).unwrap();
        pipe.held = write(&pipe.write_end, bytes).unwrap();
        pipe
    }

    #[test]
    fn what_a_pipe_holds_is_read_whole() {
        let mut pipe = holding(b"held");
        assert_eq!(pipe.read_all().unwrap(), b"held");
        assert!(pipe.is_empty());
        assert_eq!(pipe.read_all().unwrap(), b"");
    }

    #[test]
    fn a_worker_keeps_a_few_pipes_that_are_empty() {
        let kept = || POOL.with_borrow(|pool| pool.kept[0].len());
        // The pool is this thread's.
        assert_eq!(kept(), 0);
        give_back(holding(b"left"));
        assert_eq!(kept(), 0, "nobody else may get these bytes");
        let pipes: Vec<Pipe> = (0..2 * KEPT_BY_WORKER).map(|_| take(Capacity::Default).unwrap()).collect();
        pipes.into_iter().for_each(give_back);
        assert_eq!(kept(), KEPT_BY_WORKER);
        let again = take(Capacity::Default).unwrap();
        assert_eq!(kept(), KEPT_BY_WORKER - 1);
        assert!(again.is_empty());
        give_back(take(Capacity::Full).unwrap());
        assert_eq!(kept(), KEPT_BY_WORKER - 1, "a bulk transfer has pipes of its own");
        close_kept();
        assert_eq!(kept(), 0);
    }

    #[test]
    fn a_closed_pipe_makes_room_for_another() {
        for number in 0..2 * MOST {
            assert!(Pipe::open(Capacity::Default).is_some(), "after {number} others");
        }
    }

    #[test]
    fn a_pipe_does_not_block_and_is_not_inherited() {
        let Pipe { read_end, write_end, .. } = &holding(b"");
        for end in [read_end, write_end] {
            let status = OFlag::from_bits_retain(fcntl(end, FcntlArg::F_GETFL).unwrap());
            let inheritance = FdFlag::from_bits_retain(fcntl(end, FcntlArg::F_GETFD).unwrap());
            assert!(status.contains(OFlag::O_NONBLOCK) && inheritance.contains(FdFlag::FD_CLOEXEC));
        }
    }
}
