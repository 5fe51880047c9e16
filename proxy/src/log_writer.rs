//! Standard error as the log sees it: no line ever waits for whoever reads it.
//!
//! A pipe whose reader has stopped, or a terminal that is held, would block the thread that writes, and
//! with it everything that it relays. Such a line is lost instead, and counted. The descriptor may be
//! shared with the program that started us, so that its `O_NONBLOCK` is not ours to set.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::time::SystemTime;

use nix::fcntl::OFlag;
use nix::libc::PIPE_BUF;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::json;

use crate::telemetry::Format;

/// Writes each buffer as a line of its own, or loses it.
#[derive(Debug)]
pub(crate) struct LogWriter {
    format: Format,
    /// Standard error opened once more, if it is a terminal.
    terminal: Option<File>,
    /// The end of a line that there was no room for: it is next.
    rest: Vec<u8>,
    /// Lines lost since the last that was not.
    lost: u64,
}

impl LogWriter {
    /// Opens a file if standard error is a terminal.
    pub(crate) fn new(format: Format) -> Self {
        let stderr = io::stderr();
        let terminal = if stderr.is_terminal() { open_anew(stderr.as_fd()) } else { None };
        Self { format, terminal, rest: Vec::new(), lost: 0 }
    }

    /// Writes `text` if there is room for its beginning, and keeps what there is no room for.
    fn put(&mut self, text: &[u8]) -> bool {
        let written = match &self.terminal {
            Some(terminal) => write_now(terminal.as_fd(), text),
            None => write_now(io::stderr().as_fd(), text),
        };
        if written > 0 {
            self.rest = text[written..].to_vec();
        }
        written > 0
    }

    /// Writes the end of a line that was begun. Gives whether there is nothing left of it.
    fn finish(&mut self) -> bool {
        let rest = std::mem::take(&mut self.rest);
        if !rest.is_empty() && !self.put(&rest) {
            self.rest = rest;
        }
        self.rest.is_empty()
    }

    /// What stands in the place of lines that were lost.
    fn note(&self) -> String {
        const MESSAGE: &str = "lines of the log are lost: nobody took them";
        let now = humantime::format_rfc3339_micros(SystemTime::now());
        let lost = self.lost;
        match self.format {
            Format::Text => format!("{now}  WARN {MESSAGE} lines={lost}\n"),
            Format::Json => {
                let fields = json!({ "message": MESSAGE, "lines": lost });
                let note = json!({ "timestamp": now.to_string(), "level": "WARN", "fields": fields });
                format!("{note}\n")
            }
        }
    }
}

impl Write for LogWriter {
    /// Never fails: there is nobody to tell.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let is_written = self.finish()
            && match self.lost {
                0 => self.put(line),
                // Together, as there may be room for one write.
                _ => self.put(&[self.note().as_bytes(), line].concat()),
            };
        self.lost = if is_written { 0 } else { self.lost + 1 };
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A terminal that has room at all takes a byte without waiting, and how many more it does not tell. Opened anew it
/// can be written to without waiting, and nobody else notices. One that belongs to another user (su(1)) cannot be
/// opened: its last bit of room is waited for then.
fn open_anew(terminal: BorrowedFd<'_>) -> Option<File> {
    let flags = (OFlag::O_NONBLOCK | OFlag::O_NOCTTY).bits();
    let path = format!("/proc/self/fd/{}", terminal.as_raw_fd());
    File::options().write(true).custom_flags(flags).open(path).ok()
}

/// Writes as much of `text` as is sure not to wait, in bytes: a pipe that has room at all takes [`PIPE_BUF`] bytes
/// (pipe(7)).
fn write_now(fd: BorrowedFd<'_>, text: &[u8]) -> usize {
    let mut written = 0;
    for chunk in text.chunks(PIPE_BUF) {
        let mut fds = [PollFd::new(fd, PollFlags::POLLOUT)];
        let has_room = poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0);
        let moved = if has_room { nix::unistd::write(fd, chunk).unwrap_or(0) } else { 0 };
        written += moved;
        if moved < chunk.len() {
            break;
        }
    }
    written
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::thread;

    use nix::pty::{OpenptyResult, openpty};

    use super::*;

    #[test]
    fn a_full_pipe_refuses_a_line_and_takes_one_when_it_is_read() {
        let (reader, writer) = io::pipe().unwrap();
        let line = [b'x'; PIPE_BUF];
        while write_now(writer.as_fd(), &line) > 0 {}
        nix::unistd::read(&reader, &mut [0; PIPE_BUF]).unwrap();
        assert_eq!(write_now(writer.as_fd(), &[b'y'; PIPE_BUF + 1]), PIPE_BUF);
        assert_eq!(write_now(writer.as_fd(), &line), 0);
    }

    #[test]
    fn a_full_disk_takes_nothing() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        assert_eq!(write_now(full.as_fd(), b"line\n"), 0);
    }

    #[test]
    fn lines_are_whole_or_missing_and_what_is_missing_is_told() {
        let OpenptyResult { master, slave } = openpty(None, None).unwrap();
        let terminal = open_anew(slave.as_fd());
        assert!(terminal.is_some());
        let mut log = LogWriter { format: Format::Text, terminal, rest: Vec::new(), lost: 0 };
        let line = format!("{}\n", "x".repeat(149));
        let mut lines = 0;
        while log.lost < 5 {
            log.write_all(line.as_bytes()).unwrap();
            lines += 1;
        }
        assert!(!log.rest.is_empty(), "a terminal takes part of a line");
        let reader = thread::spawn(move || {
            let lines = BufReader::new(File::from(master)).lines().map(Result::unwrap);
            lines.take_while(|line| line != "end").collect::<Vec<_>>()
        });
        while log.lost > 0 {
            log.write_all(line.as_bytes()).unwrap();
            lines += 1;
        }
        while !log.finish() {}
        log.write_all(b"end\n").unwrap();
        while !log.finish() {}
        let (whole, others): (Vec<_>, Vec<_>) =
            reader.join().unwrap().into_iter().partition(|read| *read == line.trim_end());
        let [note] = &others[..] else { panic!("one note, not {others:?}") };
        assert!(note.ends_with(&format!(
            "lines of the log are lost: nobody took them lines={}",
            lines - whole.len()
        )));
    }
}
