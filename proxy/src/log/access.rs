//! The access log: lines in memory, and a thread that writes them to a file, a socket or standard output.
//!
//! Whoever appends a line never waits for the disk or a reader. Lines are written a moment later, many with one call. If
//! they are not written in time, further ones are lost, counted, and reported in the log.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, Write};
use std::mem;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{F_SETFL, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rproxy_mapping::escape::escaped;
use socket2::{Domain, SockAddr, Socket, Type};
use tracing::{info, warn};

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

/// The mode of a new file, which tells who connects (open(2)).
const MODE: u32 = 0o640;

/// Where the lines go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    /// A file, to whose end they are appended.
    File(PathBuf),
    /// Standard output.
    Output,
    /// A Unix socket where somebody listens, of datagrams or else a stream.
    Socket(PathBuf),
}

impl Destination {
    /// Parses `-`, `unix:PATH`, or the path of a file.
    ///
    /// # Errors
    /// The path is empty.
    pub fn parse(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("unix:")) {
            ("", _) | (_, Some("")) => {
                Err("the path is missing; write a file, unix:PATH or - for standard output".to_owned())
            }
            ("-", _) => Ok(Self::Output),
            (_, Some(path)) => Ok(Self::Socket(path.into())),
            (path, None) => Ok(Self::File(path.into())),
        }
    }

    /// Opens it.
    ///
    /// # Errors
    /// [`AccessLogError`]
    pub fn open(&self) -> Result<Sink, AccessLogError> {
        match self {
            Self::Output => Ok(Sink::Output),
            Self::File(path) => match open_file(path) {
                Ok(file) => Ok(Sink::File(file)),
                Err(source) => Err(AccessLogError { path: path.clone(), source }),
            },
            Self::Socket(path) => match Receiver::connect(path) {
                Ok(receiver) => Ok(Sink::Socket { path: path.clone(), receiver: Some(receiver) }),
                Err(source) => Err(AccessLogError { path: path.clone(), source }),
            },
        }
    }

    /// The file, if it is one that can be rotated.
    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Output | Self::Socket(_) => None,
        }
    }
}

/// Opens the file of an access log, and creates it if necessary.
///
/// # Errors
/// Those of open(2).
pub fn open_file(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;

    // A FIFO without a reader would block the start.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let mut file =
        File::options().append(true).create(true).mode(MODE).custom_flags(flags.bits()).open(path)?;
    // The thread that writes may wait for a reader.
    fcntl(&file, F_SETFL(OFlag::O_APPEND))?;
    if ends_within_line(path) {
        file.write_all(b"\n")?;
    }
    Ok(file)
}

/// Whether a file ends with part of a line: the disk was full when the last process ended.
fn ends_within_line(path: &Path) -> bool {
    let last = || {
        let file = File::open(path).ok().filter(|file| file.metadata().is_ok_and(|data| data.is_file()))?;
        let mut last = [0];
        file.read_exact_at(&mut last, file.metadata().ok()?.len().checked_sub(1)?).ok()?;
        Some(last)
    };
    // A FIFO would give its bytes to this.
    path.is_file() && last().is_some_and(|last| last != *b"\n")
}

/// Why the access log cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("--access-log {}: cannot open it: {source}", escaped(path))]
pub struct AccessLogError {
    path: PathBuf,
    source: io::Error,
}

/// An open destination.
#[derive(Debug)]
pub enum Sink {
    /// A file.
    File(File),
    /// Standard output.
    Output,
    /// A socket.
    Socket {
        /// Its path.
        path: PathBuf,
        /// The connection, unless it is lost.
        receiver: Option<Receiver>,
    },
}

/// A connected socket.
#[derive(Debug)]
pub enum Receiver {
    /// Each line is a datagram.
    Datagrams(UnixDatagram),
    /// Lines end with a newline.
    Stream(UnixStream),
}

impl Receiver {
    /// Connects without waiting for a daemon that does not accept.
    fn connect(path: &Path) -> io::Result<Self> {
        let connect = |kind: Type| {
            let socket = Socket::new(Domain::UNIX, kind.nonblocking(), None)?;
            socket.connect(&SockAddr::unix(path)?)?;
            // The thread that writes may wait.
            socket.set_nonblocking(false)?;
            Ok::<_, io::Error>(socket)
        };
        match connect(Type::DGRAM) {
            Ok(socket) => Ok(Self::Datagrams(socket.into())),
            Err(error) if error.raw_os_error() == Some(nix::libc::EPROTOTYPE) => {
                connect(Type::STREAM).map(|socket| Self::Stream(socket.into()))
            }
            Err(error) => Err(error),
        }
    }

    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        match self {
            Self::Stream(stream) => stream.write(text),
            Self::Datagrams(socket) => {
                let end = text.iter().position(|byte| *byte == b'\n').map_or(text.len(), |end| end + 1);
                let line = text[..end].strip_suffix(b"\n").unwrap_or(&text[..end]);
                socket.send(line).map(|_all| end)
            }
        }
    }
}

impl Sink {
    /// Waits until standard output has room, whose description somebody else has set not to block; at most [`DELAY`].
    fn wait_for_room() {
        let output = io::stdout();
        let mut fds = [PollFd::new(output.as_fd(), PollFlags::POLLOUT)];
        let delay = PollTimeout::try_from(DELAY).unwrap_or(PollTimeout::ZERO);
        // A failure is that of the next write.
        poll(&mut fds, delay).ok();
    }

    /// Writes the beginning of `text`, and returns how much. May block while there is no room.
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => file.write(text),
            // Not by its lock, which others would wait for.
            Self::Output => Ok(nix::unistd::write(io::stdout(), text)?),
            Self::Socket { path, receiver } => {
                let connected = match receiver {
                    Some(receiver) => receiver,
                    None => receiver.insert(Receiver::connect(path)?),
                };
                let written = connected.write(text);
                if written.is_err() {
                    *receiver = None;
                }
                written
            }
        }
    }
}

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
    /// The new file, after a rotation.
    reopened: Option<File>,
    /// Whether the thread is writing lines.
    is_writing: bool,
    /// How many lines it has taken and not written yet.
    taken: usize,
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
        // The thread looks by itself while it has something to do.
        let is_first = before == 0 && !state.is_writing;
        if is_first || (before < ENOUGH && state.lines.len() >= ENOUGH) {
            self.shared.changed.notify_one();
        }
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
        let lines = state.taken + count_lines(&state.lines);
        if lines > 0 {
            warn!(lines, "the last lines of the access log were not written in time");
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes lines to `sink` for as long as the process runs.
    fn write_all_to(&self, mut sink: Sink) {
        let mut told = 0;
        let first = self.first();
        self.write_to(&mut sink, &first);
        loop {
            let lines = self.next(&mut sink);
            self.write_to(&mut sink, &lines);
            self.tell_lost(&mut told);
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

    /// Waits for lines, and a moment longer for others, and returns them.
    fn next(&self, sink: &mut Sink) -> Vec<u8> {
        let mut state = self.state();
        while state.lines.is_empty() && state.reopened.is_none() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.is_writing = true;
        let mut state = self.pause(state, DELAY, ENOUGH);
        let lines = mem::take(&mut state.lines);
        state.taken = count_lines(&lines);
        let reopened = state.reopened.take();
        drop(state);
        if let Some(file) = reopened {
            // What came before is in the old file, as far as that takes it.
            let written = sink.write(&lines).unwrap_or(0);
            *sink = Sink::File(file);
            info!("the access log was reopened");
            return from_next_line(&lines, written).to_vec();
        }
        lines
    }

    /// Waits for `time`, or until there is something else to do, or as much as `most` bytes of lines.
    fn pause<'a>(&self, state: MutexGuard<'a, State>, time: Duration, most: usize) -> MutexGuard<'a, State> {
        let may_wait =
            |state: &mut State| !state.is_over && state.reopened.is_none() && state.lines.len() < most;
        let waited = self.changed.wait_timeout_while(state, time, may_wait);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Writes lines. What meets an error is written later, or to the file that was opened meanwhile. The end of the
    /// process does not wait for that.
    fn write_to(&self, sink: &mut Sink, lines: &[u8]) {
        let mut done = 0;
        while done < lines.len() {
            let error = match sink.write(&lines[done..]) {
                Ok(written) => {
                    done += written;
                    continue;
                }
                Err(error) => error,
            };
            match error.kind() {
                io::ErrorKind::Interrupted => continue,
                io::ErrorKind::WouldBlock => {
                    Sink::wait_for_room();
                    continue;
                }
                _ => warn_unwritten(&error),
            }
            let mut state = self.pause(self.state(), RETRY, usize::MAX);
            let is_elsewhere = match state.reopened.take() {
                Some(file) => {
                    *sink = Sink::File(file);
                    true
                }
                None => matches!(sink, Sink::Socket { .. }),
            };
            if state.is_over {
                return self.lose(&lines[done..]);
            }
            if is_elsewhere {
                let rest = from_next_line(lines, done);
                self.lose(&lines[done..lines.len() - rest.len()]);
                done = lines.len() - rest.len();
            }
        }
    }

    /// Counts lines as lost.
    fn lose(&self, lines: &[u8]) {
        self.lost.fetch_add(count_lines(lines) as u64, Ordering::Relaxed);
    }

    /// Reports lost lines, if there are more than were `told`.
    fn tell_lost(&self, told: &mut u64) {
        let lost = self.lost.load(Ordering::Relaxed);
        if lost > *told {
            let lines = lost - mem::replace(told, lost);
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
    use std::thread;

    use super::*;

    /// A log that a thread writes to the returned socket's other end.
    fn log() -> (AccessLog, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
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

    #[test]
    fn nobody_gets_the_second_half_of_a_line() {
        let lines = b"one\ntwo\nthree\n";
        for (done, rest) in
            [(0, "one\ntwo\nthree\n"), (2, "two\nthree\n"), (4, "two\nthree\n"), (9, ""), (14, "")]
        {
            assert_eq!(from_next_line(lines, done), rest.as_bytes(), "{done}");
        }
    }

    #[test]
    fn a_destination_is_a_file_a_socket_or_standard_output() {
        for (text, destination) in [
            ("-", Destination::Output),
            ("/var/log/a", Destination::File("/var/log/a".into())),
            ("unix:/dev/log", Destination::Socket("/dev/log".into())),
            ("./-", Destination::File("./-".into())),
        ] {
            assert_eq!(Destination::parse(text), Ok(destination));
        }
        for text in ["", "unix:"] {
            Destination::parse(text).unwrap_err();
        }
    }
}
