//! Where an access log is written: a file, a socket or standard output.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{F_SETFL, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rproxy_mapping::escape::escaped;
use socket2::{Domain, SockAddr, Socket, Type};

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
    // A FIFO without a reader would block the start.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let mut file =
        File::options().append(true).create(true).mode(MODE).custom_flags(flags.bits()).open(path)?;
    // The thread that writes may wait for a reader.
    fcntl(&file, F_SETFL(OFlag::O_APPEND))?;
    let metadata = file.metadata()?;
    if metadata.is_file() && ends_within_line(path, metadata.len()) {
        file.write_all(b"\n")?;
    }
    Ok(file)
}

/// Whether a file of this length ends with part of a line: the disk was full when the last process ended.
fn ends_within_line(path: &Path, length: u64) -> bool {
    let last = || {
        let mut last = [0];
        File::open(path).ok()?.read_exact_at(&mut last, length.checked_sub(1)?).ok()?;
        Some(last)
    };
    last().is_some_and(|last| last != *b"\n")
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
    /// Waits until standard output has room, whose description somebody else has set not to block; at most `time`.
    pub(super) fn wait_for_room(time: Duration) {
        let output = io::stdout();
        let mut fds = [PollFd::new(output.as_fd(), PollFlags::POLLOUT)];
        let time = PollTimeout::try_from(time).unwrap_or(PollTimeout::ZERO);
        // A failure is that of the next write.
        poll(&mut fds, time).ok();
    }

    /// Writes the beginning of `text`, and returns how much. May block while there is no room.
    pub(super) fn write(&mut self, text: &[u8]) -> io::Result<usize> {
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
        for text in ["", "unix:"] {
            Destination::parse(text).unwrap_err();
        }
    }
}
