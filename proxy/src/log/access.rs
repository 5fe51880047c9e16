//! The access log: lines in memory, and a thread that writes them to their destination.
//!
//! Whoever appends a line never waits for the disk or a reader. Lines are written a moment later, many with one call. If
//! they are not written in time, further ones are lost, counted, and reported in the log.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::destination::{LogFile, Sink};
use super::limit::LogLimit;
use super::writer::Format;

/// Lines that wait to be written, in bytes. More are lost.
const CAPACITY: usize = 4 * 1024 * 1024;

/// With as many, they are written without further delay.
const ENOUGH: usize = CAPACITY / 4;

/// How long a line may wait for others, to be written with them.
const DELAY: Duration = Duration::from_millis(100);

/// The delay before a failed write is tried again.
const RETRY: Duration = Duration::from_secs(1);

/// How long the end of the process waits for the last lines to be written.
const LAST_LINES: Duration = Duration::from_secs(1);

thread_local! {
    /// A line that is being formatted, before others wait for it.
    static LINE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The access log of a process.
#[derive(Debug)]
pub struct AccessLog {
    format: Format,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    /// Notified if the state has something for the thread.
    changed: Condvar,
    /// Notified when the thread has written everything.
    written: Condvar,
    lost: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    /// What comes before all lines.
    first: Option<Vec<u8>>,
    /// Whole lines that nobody writes yet.
    lines: Vec<u8>,
    /// How many they are.
    waiting: usize,
    /// The new file, after a rotation.
    reopened: Option<File>,
    /// A descriptor in reserve for that, as there may be no others when it is opened.
    reserve: Option<OwnedFd>,
    /// Whether the thread is writing lines.
    is_writing: bool,
    /// How many lines it has taken and not written yet.
    taken: usize,
    /// How many of the lost lines were reported, and when.
    told: u64,
    told_at: Option<Instant>,
    /// Whether lines do not wait for others any more, because the process ends.
    is_over: bool,
}

impl AccessLog {
    /// A log without lines. A thread of its own writes them.
    pub fn new(format: Format) -> Self {
        Self { format, shared: Arc::default() }
    }

    /// How its lines are written.
    pub(crate) fn format(&self) -> Format {
        self.format
    }

    /// What a thread of its own has to run: it writes the lines to `sink`, from [`Self::begin`] on.
    pub(crate) fn writer(&self, sink: Sink) -> impl FnOnce() + Send + use<> {
        let shared = self.shared.clone();
        if let Sink::File(_) = sink {
            shared.state().reserve = io::stderr().as_fd().try_clone_to_owned().ok();
        }
        move || shared.write_all_to(sink)
    }

    /// Begins to write: first `text`, which is no line of the log.
    pub(crate) fn begin(&self, text: Vec<u8>) {
        self.shared.state().first = Some(text);
        self.shared.changed.notify_one();
    }

    /// Appends the line that `format` writes, or loses it.
    pub(crate) fn write(&self, format: impl FnOnce(&mut Vec<u8>)) {
        LINE.with_borrow_mut(|line| {
            line.clear();
            format(line);
            self.append(line);
        });
    }

    fn append(&self, line: &[u8]) {
        let mut state = self.shared.state();
        let before = state.lines.len();
        if before + line.len() > CAPACITY {
            self.shared.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        state.lines.extend_from_slice(line);
        state.waiting += 1;
        // The thread looks by itself while it has something to do.
        let is_first = before == 0 && !state.is_writing;
        if is_first || (before < ENOUGH && state.lines.len() >= ENOUGH) {
            self.shared.changed.notify_one();
        }
    }

    /// Releases the descriptor that is in reserve for another file. Call it before that is opened.
    pub(crate) fn release_reserve(&self) {
        self.shared.state().reserve = None;
    }

    /// Continues in another file.
    pub(crate) fn reopen(&self, file: File) {
        self.shared.state().reopened = Some(file);
        self.shared.changed.notify_one();
    }

    /// The lines lost so far, because they were not written in time.
    pub fn lost(&self) -> u64 {
        self.shared.lost.load(Ordering::Relaxed)
    }

    /// Waits until all lines are written, for a moment.
    pub(crate) fn finish(&self) {
        let deadline = Instant::now() + LAST_LINES;
        let mut state = self.shared.state();
        state.is_over = true;
        self.shared.changed.notify_one();
        while (state.is_writing || !state.lines.is_empty())
            && let Some(left) = deadline.checked_duration_since(Instant::now())
        {
            let waited = self.shared.written.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let unwritten = u64::try_from(state.taken + state.waiting).unwrap_or(u64::MAX);
        let lost = self.shared.lost.fetch_add(unwritten, Ordering::Relaxed) + unwritten;
        let lines = lost - mem::replace(&mut state.told, lost);
        if lines > 0 {
            warn!(
                lines,
                "the last lines of the access log were lost, because they could not be written in time"
            );
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes lines to `sink` for as long as the process runs.
    fn write_all_to(&self, mut sink: Sink) {
        let mut lines = self.first();
        self.write_to(&mut sink, &lines);
        loop {
            self.next(&mut lines);
            self.write_to(&mut sink, &lines);
            self.follow(&mut sink);
            self.tell_lost();
            let mut state = self.state();
            (state.is_writing, state.taken) = (false, 0);
            if state.lines.is_empty() {
                self.written.notify_all();
            }
        }
    }

    /// Waits until writing begins, and returns what comes before all lines.
    fn first(&self) -> Vec<u8> {
        let mut state = self.state();
        loop {
            if let Some(first) = state.first.take() {
                return first;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for lines, and a moment longer for others, and replaces `lines`, which are written, by them. While lines
    /// come, the two buffers change places: fresh memory would cost whoever appends page faults.
    fn next(&self, lines: &mut Vec<u8>) {
        let mut state = self.state();
        let written = lines.len();
        lines.clear();
        // After a burst, its memory is released.
        lines.shrink_to(2 * written);
        if state.lines.is_empty() {
            (state.lines, *lines) = Default::default();
        }
        while state.lines.is_empty() && state.reopened.is_none() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.is_writing = true;
        let mut state = self.pause(state, DELAY, ENOUGH);
        mem::swap(&mut state.lines, lines);
        state.taken = mem::take(&mut state.waiting);
    }

    /// Waits for `time`, or until there is something else to do, or as much as `most` bytes of lines.
    fn pause<'a>(&self, state: MutexGuard<'a, State>, time: Duration, most: usize) -> MutexGuard<'a, State> {
        let may_wait =
            |state: &mut State| !state.is_over && state.reopened.is_none() && state.lines.len() < most;
        let waited = self.changed.wait_timeout_while(state, time, may_wait);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Writes lines. What meets an error, or a reader that has stopped, is written later, or to the file that was opened
    /// meanwhile. The end of the process does not wait for errors.
    fn write_to(&self, sink: &mut Sink, lines: &[u8]) {
        let mut done = 0;
        while done < lines.len() {
            let is_failed = match sink.write(&lines[done..]) {
                Ok(written) => {
                    self.settle(&lines[done..done + written], false);
                    done += written;
                    continue;
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => continue,
                    io::ErrorKind::WouldBlock => {
                        sink.wait_for_room(DELAY);
                        false
                    }
                    _ => {
                        warn_unwritten(&error);
                        drop(self.pause(self.state(), RETRY, usize::MAX));
                        true
                    }
                },
            };
            self.tell_lost();
            let is_elsewhere = self.follow(sink) || sink.is_elsewhere();
            if is_failed && self.state().is_over {
                return self.settle(&lines[done..], true);
            }
            if is_elsewhere {
                let next = lines.len() - from_next_line(lines, done).len();
                self.settle(&lines[done..next], true);
                done = next;
            }
        }
    }

    /// Writes to the new file from now on, if there is one. Returns whether there is.
    fn follow(&self, sink: &mut Sink) -> bool {
        let Some(file) = self.state().reopened.take() else { return false };
        match sink {
            Sink::File(current) => self.state().reserve = current.replace(file),
            other => *other = Sink::File(LogFile::new(file)),
        }
        info!("the access log was reopened");
        true
    }

    /// Records that these of the taken lines were written, or `are_lost`.
    fn settle(&self, lines: &[u8], are_lost: bool) {
        let count = count_lines(lines);
        let mut state = self.state();
        state.taken = state.taken.saturating_sub(count);
        if are_lost {
            self.lost.fetch_add(count as u64, Ordering::Relaxed);
        }
    }

    /// Reports lost lines that were not reported yet, not too often.
    fn tell_lost(&self) {
        let mut state = self.state();
        let lost = self.lost.load(Ordering::Relaxed);
        let is_recent = state.told_at.is_some_and(|at| at.elapsed() < RETRY);
        if lost > state.told && !is_recent {
            let lines = lost - mem::replace(&mut state.told, lost);
            state.told_at = Some(Instant::now());
            drop(state);
            warn!(lines, "lines of the access log were lost, because they could not be written in time");
        }
    }
}

fn count_lines(lines: &[u8]) -> usize {
    lines.iter().filter(|byte| **byte == b'\n').count()
}

/// What is left of `lines` after the line whose first part ends at `done`: nobody gets a second half.
fn from_next_line(lines: &[u8], done: usize) -> &[u8] {
    let is_between = done == 0 || lines[done - 1] == b'\n';
    let end = || lines[done..].iter().position(|byte| *byte == b'\n').map(|end| done + end + 1);
    let next = if is_between { done } else { end().unwrap_or(lines.len()) };
    &lines[next..]
}

fn warn_unwritten(error: &io::Error) {
    static FAILED: LogLimit = LogLimit::new();

    if let Some(suppressed) = FAILED.permit() {
        warn!(%error, suppressed, "cannot write to the access log");
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::fs::OpenOptionsExt;
    use std::os::unix::net::{UnixDatagram, UnixStream};
    use std::thread;

    use super::super::destination::{Destination, Receiver, open_file};
    use super::*;

    /// A log that a thread writes to the returned socket's other end.
    fn log() -> (AccessLog, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let log = AccessLog::new(Format::Text);
        let sink = Sink::Socket { path: "/nowhere".into(), receiver: Some(Receiver::Stream(near)) };
        thread::spawn(log.writer(sink));
        log.begin(Vec::new());
        (log, far)
    }

    fn line(log: &AccessLog, text: &str) {
        log.write(|line| line.extend_from_slice(format!("{text}\n").as_bytes()));
    }

    #[test]
    fn lines_arrive_whole_and_in_order_before_the_end() {
        let (log, reader) = log();
        (0..1000).for_each(|number| line(&log, &number.to_string()));
        log.finish();
        let lines = BufReader::new(reader).lines().take(1000).map(Result::unwrap);
        assert!(lines.enumerate().all(|(number, line)| line == number.to_string()));
        assert_eq!(log.lost(), 0);
    }

    #[test]
    fn what_nobody_reads_is_lost_and_counted() {
        let (log, reader) = log();
        let long = "x".repeat(CAPACITY / 64);
        let mut sent = 0;
        while log.lost() == 0 {
            line(&log, &long);
            sent += 1;
            assert!(sent < 1000, "a socket and the buffer hold less");
        }
        let written = sent - usize::try_from(log.lost()).unwrap();
        let mut lines = BufReader::new(reader).lines();
        for _ in 0..written {
            assert_eq!(lines.next().unwrap().unwrap().len(), long.len());
        }
        line(&log, "the next one");
        assert_eq!(lines.next().unwrap().unwrap(), "the next one");
    }

    /// Waits until the log has lost lines, and returns how many lines there were.
    fn overflow(log: &AccessLog) -> u64 {
        let long = "x".repeat(CAPACITY / 64);
        let mut sent = 0;
        while log.lost() == 0 {
            line(log, &long);
            sent += 1;
            assert!(sent < 1000, "a pipe and the buffer hold less");
        }
        sent
    }

    fn wait_until(holds: impl Fn() -> bool) {
        let start = Instant::now();
        while !holds() {
            assert!(start.elapsed() < Duration::from_secs(20));
            thread::yield_now();
        }
    }

    #[test]
    fn lost_lines_are_reported_while_the_reader_has_stopped_and_at_the_end_in_full() {
        let (log, _reader) = log();
        let mut sent = overflow(&log);
        wait_until(|| log.shared.state().told > 0);
        // What is lost later is reported later.
        let told = log.shared.state().told;
        while log.lost() == told {
            line(&log, &"x".repeat(CAPACITY / 64));
            sent += 1;
        }
        log.finish();
        let told = log.shared.state().told;
        assert_eq!(told, log.lost());
        let written = sent - told;
        assert!(written < 32, "{written}: those that the socket holds; the others are lost");
    }

    #[test]
    fn the_part_of_a_batch_that_was_written_is_not_lost() {
        let (near, far) = UnixDatagram::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let log = AccessLog::new(Format::Text);
        let sink = Sink::Socket { path: "/nowhere".into(), receiver: Some(Receiver::Datagrams(near)) };
        (0..10_000).for_each(|number| line(&log, &number.to_string()));
        thread::spawn(log.writer(sink));
        log.begin(Vec::new());
        log.finish();
        far.set_nonblocking(true).unwrap();
        let mut delivered = 0;
        while far.recv(&mut [0; 16]).is_ok() {
            delivered += 1;
        }
        // What is read makes room for others.
        assert!(log.lost() < 10_000 && delivered >= 10_000 - log.lost(), "{delivered}, {}", log.lost());
    }

    #[test]
    fn another_file_takes_over_from_a_fifo_whose_reader_has_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let flags = nix::libc::O_NONBLOCK;
        let _reader = File::options().read(true).custom_flags(flags).open(&path).unwrap();
        let log = AccessLog::new(Format::Text);
        let Sink::File(fifo) = Destination::File(path.clone()).open().unwrap() else { panic!() };
        thread::spawn(log.writer(Sink::File(fifo)));
        log.begin(Vec::new());
        // More than a pipe holds.
        (0..2).for_each(|_| line(&log, &"x".repeat(100_000)));
        wait_until(|| log.shared.state().taken > 0);
        std::fs::remove_file(&path).unwrap();
        log.release_reserve();
        log.reopen(open_file(&path).unwrap());
        wait_until(|| std::fs::read_to_string(&path).unwrap().len() > 100_000);
        log.finish();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.lines().all(|line| line.len() == 100_000), "lines are whole");
        assert!(log.shared.state().reserve.is_some(), "there is a descriptor for the next one");
    }

    #[test]
    fn a_file_that_is_emptied_is_written_from_its_start() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let log = AccessLog::new(Format::Text);
        thread::spawn(log.writer(Destination::File(path.clone()).open().unwrap()));
        log.begin(Vec::new());
        let content = || std::fs::read_to_string(&path).unwrap();
        line(&log, "before");
        wait_until(|| content() == "before\n");
        // As logrotate's copytruncate does.
        File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
        line(&log, "after");
        wait_until(|| content() == "after\n");
        log.finish();
    }

    #[test]
    fn nobody_gets_the_second_half_of_a_line() {
        let lines = b"one\ntwo\nthree\n";
        for (done, rest) in
            [(0, "one\ntwo\nthree\n"), (2, "two\nthree\n"), (4, "two\nthree\n"), (9, ""), (14, "")]
        {
            assert_eq!(from_next_line(lines, done), rest.as_bytes(), "{done}");
        }
    }
}
