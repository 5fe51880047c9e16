//! Standard error as the log sees it: no line ever waits for whoever reads it.
//!
//! A pipe whose reader has stopped, or a terminal that is held, would block the thread that writes, and
//! with it everything that it relays. Such a line is lost instead, and counted. The descriptor may be
//! shared with the program that started us, so that its `O_NONBLOCK` is not ours to set.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use nix::errno::Errno;
use nix::libc::PIPE_BUF;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;

use crate::telemetry::Format;

/// Lines lost since the last that was not. Locked while a line is written, so that no other thread takes the room that was
/// just seen.
static LOST: Mutex<u64> = Mutex::new(0);

/// Writes each buffer as a line of its own, or loses it.
#[derive(Debug)]
pub(crate) struct LogWriter(pub(crate) Format);

impl Write for LogWriter {
    /// Never fails: there is nobody to tell.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let stderr = io::stderr();
        let mut lost = LOST.lock().unwrap_or_else(PoisonError::into_inner);
        let written = if *lost == 0 {
            write_now(stderr.as_fd(), line)
        } else {
            // Together, as there may be room for one write.
            write_now(stderr.as_fd(), &[self.note(*lost).as_bytes(), line].concat())
        };
        *lost = if written.is_ok() { 0 } else { *lost + 1 };
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl LogWriter {
    /// What stands in the place of lines that were lost.
    fn note(&self, lost: u64) -> String {
        const MESSAGE: &str = "lines of the log are lost: nobody took them";
        let now = humantime::format_rfc3339_micros(SystemTime::now());
        match self.0 {
            Format::Text => format!("{now}  WARN {MESSAGE} lines={lost}\n"),
            Format::Json => {
                let fields = json!({ "message": MESSAGE, "lines": lost });
                let note = json!({ "timestamp": now.to_string(), "level": "WARN", "fields": fields });
                format!("{note}\n")
            }
        }
    }
}

/// Writes as much of `line` as is sure not to wait: a pipe that has room at all takes [`PIPE_BUF`] bytes
/// (pipe(7)), which is longer than lines are.
fn write_now(fd: BorrowedFd<'_>, line: &[u8]) -> Result<(), Errno> {
    let mut fds = [PollFd::new(fd, PollFlags::POLLOUT)];
    let has_room = poll(&mut fds, PollTimeout::ZERO)? > 0;
    if !has_room {
        return Err(Errno::EAGAIN);
    }
    nix::unistd::write(fd, &line[..line.len().min(PIPE_BUF)]).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_pipe_refuses_a_line_and_takes_one_when_it_is_read() {
        let (reader, writer) = io::pipe().unwrap();
        let line = [b'x'; PIPE_BUF];
        let mut written = 0;
        while write_now(writer.as_fd(), &line).is_ok() {
            written += 1;
        }
        assert!(written > 0);
        nix::unistd::read(&reader, &mut [0; PIPE_BUF]).unwrap();
        assert_eq!(write_now(writer.as_fd(), &line), Ok(()));
        assert_eq!(write_now(writer.as_fd(), &line), Err(Errno::EAGAIN));
    }

    #[test]
    fn a_full_disk_is_an_error() {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        assert_eq!(write_now(full.as_fd(), b"line\n"), Err(Errno::ENOSPC));
    }
}
