//! The lines that a client sends, and the descriptors that come with them (`SCM_RIGHTS`, unix(7)).

use std::io;
use std::mem;
use std::os::fd::{AsFd, OwnedFd};

use rproxy_sys::pass::{Received, receive};
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::protocol::LONGEST_LINE;

/// The size of a read, in bytes.
const CHUNK: usize = 16 * 1024;

/// What a client has sent and nobody has taken yet.
#[derive(Debug, Default)]
pub(super) struct Lines {
    bytes: Vec<u8>,
    passed: Vec<Passed>,
}

/// Descriptors that came with some bytes.
#[derive(Debug)]
struct Passed {
    /// The index of the last of these bytes. It tells which line they belong to: a read ends with the bytes that
    /// descriptors came with, but may begin with those of earlier lines.
    last: usize,
    descriptors: Vec<OwnedFd>,
    is_incomplete: bool,
}

/// A line without its newline.
#[derive(Debug, Default)]
pub(super) struct Line {
    pub(super) text: Vec<u8>,
    /// The descriptors that came with it, in order.
    pub(super) descriptors: Vec<OwnedFd>,
    /// Whether there were more, which could not be received.
    pub(super) is_incomplete: bool,
}

impl Lines {
    /// Waits for the next line; `None` at the end of the stream.
    ///
    /// # Errors
    /// Those of recvmsg(2); `InvalidData` if it is too long; `UnexpectedEof` if it ends without a newline.
    pub(super) async fn next(&mut self, stream: &UnixStream) -> io::Result<Option<Line>> {
        let mut searched = 0;
        loop {
            let end = self.bytes[searched..].iter().position(|byte| *byte == b'\n').map(|at| searched + at);
            if end.unwrap_or(self.bytes.len()) > LONGEST_LINE {
                let message = format!("a request has at most {LONGEST_LINE} bytes");
                return Err(io::Error::new(io::ErrorKind::InvalidData, message));
            }
            if let Some(end) = end {
                return Ok(Some(self.take(end)));
            }
            searched = self.bytes.len();
            if !self.receive(stream).await? {
                let is_whole = self.bytes.is_empty();
                return if is_whole { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            }
        }
    }

    /// Receives more; returns whether there was anything.
    async fn receive(&mut self, stream: &UnixStream) -> io::Result<bool> {
        let before = self.bytes.len();
        self.bytes.resize(before + CHUNK, 0);
        let received = stream
            .async_io(Interest::READABLE, || receive(stream.as_fd(), &mut self.bytes[before..]))
            .await
            .inspect_err(|_error| self.bytes.truncate(before))?;
        let Received { length, descriptors, is_incomplete } = received;
        self.bytes.truncate(before + length);
        if is_incomplete || !descriptors.is_empty() {
            let last = (before + length).saturating_sub(1);
            self.passed.push(Passed { last, descriptors, is_incomplete });
        }
        Ok(length > 0)
    }

    /// Removes and returns the line whose newline is at the index `end`.
    fn take(&mut self, end: usize) -> Line {
        let rest = self.bytes.split_off(end + 1);
        let mut line = Line { text: mem::replace(&mut self.bytes, rest), ..Line::default() };
        line.text.pop();
        let all = mem::take(&mut self.passed).into_iter();
        let (own, later): (Vec<_>, Vec<_>) = all.partition(|passed| passed.last <= end);
        self.passed = later;
        self.passed.iter_mut().for_each(|passed| passed.last -= end + 1);
        for Passed { descriptors, is_incomplete, .. } in own {
            line.descriptors.extend(descriptors);
            line.is_incomplete |= is_incomplete;
        }
        line
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::BorrowedFd;
    use std::os::unix::net::UnixStream as StdStream;

    use rproxy_sys::pass::{MOST, send_before_json};

    use super::*;
    use crate::runtime::new_runtime;

    /// The lines that arrive when `send` has sent them, each as its text and the number of descriptors.
    fn lines_of(send: impl FnOnce(&mut StdStream)) -> Vec<Result<(String, usize), io::ErrorKind>> {
        let (mut one, other) = StdStream::pair().unwrap();
        other.set_nonblocking(true).unwrap();
        new_runtime().unwrap().block_on(async {
            let other = UnixStream::from_std(other).unwrap();
            send(&mut one);
            drop(one);
            let (mut lines, mut found) = (Lines::default(), Vec::new());
            loop {
                match lines.next(&other).await {
                    Ok(None) => return found,
                    Ok(Some(Line { text, descriptors, is_incomplete })) => {
                        assert!(!is_incomplete);
                        let text = String::from_utf8(text).unwrap();
                        found.push(Ok((text.trim().to_owned(), descriptors.len())));
                    }
                    Err(error) => {
                        found.push(Err(error.kind()));
                        return found;
                    }
                }
            }
        })
    }

    fn send_files(stream: &StdStream, count: usize) {
        let files: Vec<File> = (0..count).map(|_| File::open("/dev/null").unwrap()).collect();
        let files: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
        send_before_json(stream.as_fd(), &files).unwrap();
    }

    fn line(text: &str, descriptors: usize) -> Result<(String, usize), io::ErrorKind> {
        Ok((text.to_owned(), descriptors))
    }

    #[test]
    fn descriptors_belong_to_the_line_that_they_come_with() {
        let lines = lines_of(|stream| {
            stream.write_all(b"one\ntwo\nthr").unwrap();
            stream.write_all(b"ee\n").unwrap();
            send_files(stream, 2 * MOST + 1);
            stream.write_all(b"four\n").unwrap();
            send_files(stream, 1);
            stream.write_all(b"five\nsix\n").unwrap();
        });
        let expected = [
            line("one", 0),
            line("two", 0),
            line("three", 0),
            line("four", 507),
            line("five", 1),
            line("six", 0),
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn a_line_that_is_too_long_or_has_no_end_is_an_error() {
        let unfinished = lines_of(|stream| stream.write_all(b"one\ntwo").unwrap());
        assert_eq!(unfinished, [line("one", 0), Err(io::ErrorKind::UnexpectedEof)]);
        let mut lines = Lines { bytes: vec![b'x'; LONGEST_LINE + 1], ..Lines::default() };
        let (_one, other) = StdStream::pair().unwrap();
        other.set_nonblocking(true).unwrap();
        new_runtime().unwrap().block_on(async {
            let other = UnixStream::from_std(other).unwrap();
            let error = lines.next(&other).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        });
    }
}
