//! Lines of JSON with sockets, over a Unix socket. Both the supervisor and `rproxy --control` take them.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rproxy_sys::pass::{receive_waiting, send_before_json};
use socket2::{Domain, SockAddr, Socket, Type};

/// The size of a read, in bytes.
const CHUNK: usize = 16 * 1024;

/// One side of a conversation.
#[derive(Debug)]
pub struct Channel(UnixStream);

/// The path of a file in an open directory, which is short enough for the address of a socket.
#[must_use]
pub fn within(dir: &File, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()))
}

/// A line without its newline, and the sockets that came before it.
#[derive(Debug, Default)]
pub struct Line {
    /// The text.
    pub text: Vec<u8>,
    /// The sockets, in order.
    pub sockets: Vec<OwnedFd>,
    /// Whether there were more sockets, which could not be received.
    pub is_incomplete: bool,
}

impl Channel {
    /// Connects to the socket at `path`. The other side may take so long for an answer.
    ///
    /// # Errors
    /// Those of connect(2); `WouldBlock` if more wait there than it has room for, as it does not accept.
    pub fn connect(path: &Path, patience: Duration) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        // It also bounds the wait for room.
        socket.set_write_timeout(Some(patience))?;
        socket.connect(&SockAddr::unix(path)?)?;
        Self::new(OwnedFd::from(socket).into(), patience)
    }

    /// Talks to the other side of `stream`.
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub fn new(stream: UnixStream, patience: Duration) -> io::Result<Self> {
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Ok(Self(stream))
    }

    /// Sends a line and sockets.
    ///
    /// # Errors
    /// Those of sendmsg(2).
    pub fn send(&mut self, mut line: String, sockets: &[BorrowedFd<'_>]) -> io::Result<()> {
        send_before_json(self.0.as_fd(), sockets)?;
        line.push('\n');
        self.0.write_all(line.as_bytes())
    }

    /// Waits for a line.
    ///
    /// # Errors
    /// Those of recvmsg(2); `UnexpectedEof` if the other side ends first.
    pub fn receive(&mut self) -> io::Result<Line> {
        let mut line = Line::default();
        loop {
            let before = line.text.len();
            line.text.resize(before + CHUNK, 0);
            let received = receive_waiting(self.0.as_fd(), &mut line.text[before..])?;
            line.text.truncate(before + received.length);
            line.sockets.extend(received.descriptors);
            line.is_incomplete |= received.is_incomplete;
            // The other side waits for an answer after a line.
            if line.text.pop_if(|byte| *byte == b'\n').is_some() {
                return Ok(line);
            }
            if received.length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn a_long_line_arrives_whole_with_all_its_sockets() {
        let (one, other) = UnixStream::pair().unwrap();
        let text = "x".repeat(300_000);
        let sent = text.clone();
        let sender = thread::spawn(move || {
            let socket = TcpListener::bind("127.0.0.1:0").unwrap();
            let sockets = vec![socket.as_fd(); 600];
            Channel::new(one, PATIENCE).unwrap().send(sent, &sockets).unwrap();
        });
        let mut other = Channel::new(other, PATIENCE).unwrap();
        let line = other.receive().unwrap();
        sender.join().unwrap();
        assert_eq!((line.sockets.len(), line.is_incomplete), (600, false));
        assert_eq!(String::from_utf8(line.text).unwrap().trim_start(), text);
        assert_eq!(other.receive().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
