//! Where an access log is written: a file, a socket or standard output.

use std::fs::File;
use std::io::{self, Write};
use std::mem;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::dup3;
use rproxy_mapping::escape::escaped;
use rustix::fs::{FileType, fstat};
use socket2::{Domain, SockAddr, Socket, Type};

use super::sink;

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
            (_, Some(path)) if path.starts_with('@') => {
                Err(format!("abstract sockets cannot be used; for a file of this name write unix:./{path}"))
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
    pub(crate) fn open(&self) -> Result<Sink, AccessLogError> {
        match self {
            Self::Output => Ok(Sink::Output(sink::Sink::out())),
            Self::File(path) => match open_file(path) {
                Ok(file) => Ok(Sink::File(LogFile::new(file))),
                Err(source) => Err(AccessLogError { prefix: "", path: path.clone(), source }),
            },
            Self::Socket(path) => match Receiver::connect(path) {
                Ok(receiver) => Ok(Sink::Socket { path: path.clone(), receiver: Some(receiver) }),
                Err(source) => Err(AccessLogError { prefix: "unix:", path: path.clone(), source }),
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

/// Opens the file of an access log, and creates it if necessary. Writing never blocks: a FIFO, or a device, may have a reader
/// that has stopped.
///
/// # Errors
/// Those of open(2).
pub fn open_file(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let open = |is_read: bool| {
        let mut options = File::options();
        options.append(true).create(true).read(is_read).mode(MODE).custom_flags(flags.bits()).open(path)
    };
    // A FIFO that is open for reading seems to have a reader.
    let may_be_read = !path.metadata().is_ok_and(|metadata| !metadata.is_file());
    match open(may_be_read) {
        // It may be a file that this process can only write.
        Err(error) if may_be_read && error.kind() == io::ErrorKind::PermissionDenied => open(false),
        opened => opened,
    }
}

/// An open file, or what is used like one.
#[derive(Debug)]
pub(crate) struct LogFile {
    file: File,
    /// Whether it ends with part of a line, which has to end before the next one: the disk was full when the last process
    /// ended.
    is_within_line: bool,
    /// Its length after a failed write, if it has one.
    length: Option<u64>,
}

impl LogFile {
    /// A file from [`open_file`].
    pub(super) fn new(file: File) -> Self {
        let is_within_line = ends_within_line(&file).unwrap_or(false);
        Self { file, is_within_line, length: None }
    }

    /// Writes the beginning of `text`, and returns how much.
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        let written = self.try_write(text);
        self.length = if written.is_err() { length_of(&self.file) } else { None };
        written
    }

    fn try_write(&mut self, text: &[u8]) -> io::Result<usize> {
        if self.is_within_line {
            self.file.write_all(b"\n")?;
            self.is_within_line = false;
        }
        self.file.write(text)
    }

    /// Whether somebody has truncated the file, or written to it, since the last write failed: a line cannot be continued.
    fn is_changed(&self) -> bool {
        self.length.is_some_and(|length| length_of(&self.file).is_some_and(|now| now != length))
    }

    /// Continues in `next`, and returns another descriptor of that. It replaces the descriptor of this file, so that there
    /// are never fewer, even if all are used.
    pub(super) fn replace(&mut self, next: File) -> Option<OwnedFd> {
        let before = mem::replace(self, Self::new(next));
        let mut another = OwnedFd::from(before.file);
        dup3(&self.file, &mut another, OFlag::O_CLOEXEC).is_ok().then_some(another)
    }
}

/// The length of a file, which pipes and devices do not have.
fn length_of(file: &File) -> Option<u64> {
    // The call that is allowed under confinement, which `File::metadata` does not make.
    let stat = fstat(file).ok()?;
    if FileType::from_raw_mode(stat.st_mode).is_file() { u64::try_from(stat.st_size).ok() } else { None }
}

/// Whether a file ends with part of a line, if it can be read.
fn ends_within_line(file: &File) -> Option<bool> {
    let mut last = [0];
    file.read_exact_at(&mut last, length_of(file)?.checked_sub(1)?).ok()?;
    Some(last != *b"\n")
}

/// Why the access log cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("--access-log {prefix}{}: cannot open it: {source}{}", escaped(path), way_out(source, !prefix.is_empty()))]
pub struct AccessLogError {
    /// What the path follows.
    prefix: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// What would help against an error of open(2) or connect(2).
fn way_out(error: &io::Error, is_socket: bool) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound if is_socket => "; start the program that listens there first",
        io::ErrorKind::ConnectionRefused => "; no program listens there, start it first",
        io::ErrorKind::WouldBlock => "; the program that listens there does not accept, restart it",
        io::ErrorKind::NotFound => "; create its directory first",
        io::ErrorKind::PermissionDenied => "; give a path that this user may write to",
        io::ErrorKind::IsADirectory => "; give the path of a file in it",
        io::ErrorKind::InvalidInput if is_socket => "; give a path of less than 108 bytes",
        _ if error.raw_os_error() == Some(nix::libc::ENXIO) => {
            "; a FIFO needs a reader first, and a socket unix: before its path"
        }
        _ => "",
    }
}

/// An open destination.
#[derive(Debug)]
pub(crate) enum Sink {
    /// A file.
    File(LogFile),
    /// Standard output.
    Output(sink::Sink),
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
pub(crate) enum Receiver {
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
    /// Waits until there is room, at most `time`.
    pub(super) fn wait_for_room(&self, time: Duration) {
        let wait = |fd: BorrowedFd<'_>| {
            let mut fds = [PollFd::new(fd, PollFlags::POLLOUT)];
            let time = PollTimeout::try_from(time).unwrap_or(PollTimeout::ZERO);
            // A failure is that of the next write.
            poll(&mut fds, time).ok();
        };
        match self {
            Self::File(file) => wait(file.file.as_fd()),
            Self::Output(output) => output.with_fd(wait),
            Self::Socket { receiver: Some(Receiver::Datagrams(socket)), .. } => wait(socket.as_fd()),
            Self::Socket { receiver: Some(Receiver::Stream(stream)), .. } => wait(stream.as_fd()),
            Self::Socket { receiver: None, .. } => {}
        }
    }

    /// Writes the beginning of `text` without waiting, and returns how much. Without room for any, the error is
    /// [`io::ErrorKind::WouldBlock`].
    pub(super) fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => file.write(text),
            Self::Output(output) => match output.write_now(text)? {
                0 => Err(io::ErrorKind::WouldBlock.into()),
                written => Ok(written),
            },
            Self::Socket { path, receiver } => {
                let connected = match receiver {
                    Some(receiver) => receiver,
                    None => receiver.insert(Receiver::connect(path)?),
                };
                let written = connected.write(text);
                if written.as_ref().is_err_and(|error| !is_temporary(error)) {
                    *receiver = None;
                }
                written
            }
        }
    }

    /// Whether the next write is the first one somewhere else, where a line cannot be continued.
    pub(super) fn is_elsewhere(&self) -> bool {
        match self {
            Self::File(file) => file.is_changed(),
            Self::Output(_) => false,
            Self::Socket { receiver, .. } => receiver.is_none(),
        }
    }
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use super::*;

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
        for text in ["", "unix:", "unix:@log"] {
            Destination::parse(text).unwrap_err();
        }
    }

    /// A file with these contents, and its path.
    fn file(contents: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, contents).unwrap();
        (dir, path)
    }

    #[test]
    fn a_line_that_was_cut_ends_before_the_next_one() {
        for (before, after) in [("", "new\n"), ("whole\n", "whole\nnew\n"), ("half", "half\nnew\n")] {
            let (_dir, path) = file(before.as_bytes());
            let file = open_file(&path).unwrap();
            assert_eq!(
                std::fs::read_to_string(&path).unwrap(),
                before,
                "a full disk has to be no error here"
            );
            assert_eq!(LogFile::new(file).write(b"new\n").unwrap(), 4);
            assert_eq!(std::fs::read_to_string(&path).unwrap(), after);
        }
    }

    #[test]
    fn a_line_is_not_continued_in_a_file_that_was_changed_meanwhile() {
        let (_dir, path) = file(b"half");
        let mut log = LogFile::new(open_file(&path).unwrap());
        assert!(!log.is_changed());
        log.length = length_of(&log.file);
        assert!(!log.is_changed());
        std::fs::write(&path, b"").unwrap();
        assert!(log.is_changed(), "truncated");
        log.write(b"next\n").unwrap();
        assert!(!log.is_changed());
    }

    #[test]
    fn a_file_follows_another_without_another_descriptor() {
        let ((_dir, path), (_other_dir, next)) = (file(b""), file(b""));
        let mut log = LogFile::new(open_file(&path).unwrap());
        let another = log.replace(open_file(&next).unwrap()).unwrap();
        File::from(another).write_all(b"one\n").unwrap();
        log.write(b"two\n").unwrap();
        assert_eq!(std::fs::read_to_string(&next).unwrap(), "one\ntwo\n");
        assert_eq!(std::fs::read(&path).unwrap(), b"");
    }
}
