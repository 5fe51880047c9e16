//! A standard stream that is written to without waiting for whoever reads it.
//!
//! A pipe whose reader has stopped, or a terminal that is held, would block the thread that writes, and with it
//! everything that it relays. The descriptor may be shared with the program that started us, so that its `O_NONBLOCK`
//! is not ours to set.

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
    /// A terminal, opened once more.
    Terminal(File),
    /// Standard output, if it is no terminal.
    Out,
    /// Standard error, if it is no terminal.
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

    /// Writes as much of `text` as is sure not to wait. Returns how many bytes that is.
    ///
    /// # Errors
    /// Those of write(2), if nothing was written for another reason than that there is no room.
    pub(crate) fn write_now(&self, text: &[u8]) -> io::Result<usize> {
        self.with_fd(|fd| write_now(fd, text))
    }

    /// The descriptor that is written to.
    pub(crate) fn with_fd<R>(&self, use_fd: impl FnOnce(BorrowedFd<'_>) -> R) -> R {
        match self {
            Self::Terminal(terminal) => use_fd(terminal.as_fd()),
            Self::Out => use_fd(io::stdout().as_fd()),
            Self::Err => use_fd(io::stderr().as_fd()),
        }
    }
}

/// A terminal that has room at all takes a byte without waiting, and how many more it does not tell. Opened anew it
/// can be written to without waiting, and nobody else notices. One that belongs to another user (su(1)) cannot be
/// opened: its last bit of room is waited for then.
pub(crate) fn open_anew(terminal: BorrowedFd<'_>) -> Option<File> {
    let flags = (OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits();
    let path = format!("/proc/self/fd/{}", terminal.as_raw_fd());
    File::options().write(true).custom_flags(flags).open(path).ok()
}

/// A pipe that has room at all takes [`PIPE_BUF`] bytes (pipe(7)).
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
