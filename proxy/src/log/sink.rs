//! Non-blocking writes to a standard stream.
//!
//! A pipe whose reader has stopped, or a terminal stopped with Ctrl-S, would block the thread that writes and
//! everything it relays. The open file description may be shared with the program that started us, so we must
//! not set its `O_NONBLOCK`.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::fcntl::OFlag;
use nix::libc::PIPE_BUF;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// A standard stream.
#[derive(Debug)]
pub(crate) enum Sink {
    /// A terminal, reopened.
    Terminal(File),
    /// Standard output, if it is not a terminal.
    Out,
    /// Standard error, if it is not a terminal.
    Err,
}

impl Sink {
    /// Standard output. Opens a file if it is a terminal.
    pub(crate) fn out() -> Self {
        Self::terminal(&io::stdout()).unwrap_or(Self::Out)
    }

    /// Standard error. Opens a file if it is a terminal.
    pub(crate) fn err() -> Self {
        Self::terminal(&io::stderr()).unwrap_or(Self::Err)
    }

    fn terminal(stream: &(impl AsFd + IsTerminal)) -> Option<Self> {
        let terminal = if stream.is_terminal() { open_anew(stream.as_fd()) } else { None };
        terminal.map(Self::Terminal)
    }

    /// Writes as much of `text` as is certain not to block, and returns the number of bytes written.
    ///
    /// # Errors
    /// Those of write(2), if nothing was written. A full stream is not an error.
    pub(crate) fn write_now(&self, text: &[u8]) -> io::Result<usize> {
        self.with_fd(|fd| write_now(fd, text))
    }

    /// Calls `use_fd` with the descriptor of the stream.
    pub(crate) fn with_fd<R>(&self, use_fd: impl FnOnce(BorrowedFd<'_>) -> R) -> R {
        match self {
            Self::Terminal(terminal) => use_fd(terminal.as_fd()),
            Self::Out => use_fd(io::stdout().as_fd()),
            Self::Err => use_fd(io::stderr().as_fd()),
        }
    }
}

/// Reopens a terminal with a non-blocking file description of its own. This is necessary because a writable
/// terminal only guarantees room for one byte. A terminal of another user (su(1)) cannot be reopened; a write
/// that does not fit then blocks.
pub(crate) fn open_anew(terminal: BorrowedFd<'_>) -> Option<File> {
    let flags = (OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits();
    let path = format!("/proc/self/fd/{}", terminal.as_raw_fd());
    File::options().write(true).custom_flags(flags).open(path).ok()
}

/// Writes in chunks of [`PIPE_BUF`] bytes, which a writable pipe always accepts (pipe(7)).
fn write_now(fd: BorrowedFd<'_>, text: &[u8]) -> io::Result<usize> {
    let mut written = 0;
    for chunk in text.chunks(PIPE_BUF) {
        let mut fds = [PollFd::new(fd, PollFlags::POLLOUT)];
        if !poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0) {
            break;
        }
        match nix::unistd::write(fd, chunk).map_err(io::Error::from) {
            Ok(bytes) => {
                written += bytes;
                if bytes < chunk.len() {
                    break;
                }
            }
            Err(error) if written > 0 || error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_pipe_refuses_a_line_and_takes_one_when_it_is_read() {
        let (reader, writer) = io::pipe().unwrap();
        let line = [b'x'; PIPE_BUF];
        while write_now(writer.as_fd(), &line).unwrap() > 0 {}
        nix::unistd::read(&reader, &mut [0; PIPE_BUF]).unwrap();
        assert_eq!(write_now(writer.as_fd(), &[b'y'; PIPE_BUF + 1]).unwrap(), PIPE_BUF);
        assert_eq!(write_now(writer.as_fd(), &line).unwrap(), 0);
        drop(reader);
        assert_eq!(write_now(writer.as_fd(), &line).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_full_disk_takes_nothing() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert_eq!(write_now(full.as_fd(), b"line\n").unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
