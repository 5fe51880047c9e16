//! The conversation with a resolver: questions, and answers in any order.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;

use tokio::io::Interest;
use tokio::net::UnixStream;

use super::message::{Answer, LONGEST_LINE, Question};

/// The conversation with a resolver.
#[derive(Debug)]
pub(super) struct Conversation {
    stream: UnixStream,
    received: Vec<u8>,
}

/// What the resolver writes.
#[derive(Debug)]
pub(super) enum Heard {
    /// An answer.
    Answer(Answer),
    /// That it is there.
    StillThere,
}

impl Conversation {
    /// Over this socket, which the runtime of the calling thread watches from now on.
    ///
    /// # Errors
    /// Those of fcntl(2) and epoll_ctl(2).
    pub(super) fn over(socket: OwnedFd) -> io::Result<Self> {
        let socket = StdUnixStream::from(socket);
        socket.set_nonblocking(true)?;
        Ok(Self { stream: UnixStream::from_std(socket)?, received: Vec::new() })
    }

    /// Asks what a name stands for.
    ///
    /// # Errors
    /// Those of write(2): `EAGAIN` while the resolver takes no more questions.
    pub(super) fn ask(&self, question: &Question) -> io::Result<()> {
        let mut line = serde_json::to_vec(question)?;
        line.push(b'\n');
        // A line of at most 300 bytes is written whole or not at all.
        let written = self.stream.try_write(&line)?;
        if written == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Waits for what the resolver writes next; or, if it `is_full`, until it takes another question, and returns `None` then.
    /// Dropped at any point, nothing is lost.
    ///
    /// # Errors
    /// The resolver has ended, or does not speak this protocol.
    pub(super) async fn hear(&mut self, is_full: bool) -> io::Result<Option<Heard>> {
        let Self { stream, received } = self;
        let interest = if is_full { Interest::READABLE.add(Interest::WRITABLE) } else { Interest::READABLE };
        loop {
            if let Some(end) = received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = received.drain(..=end).collect();
                return Ok(Some(match &line[..] {
                    b"\n" => Heard::StillThere,
                    line => Heard::Answer(serde_json::from_slice(line)?),
                }));
            }
            if received.len() > LONGEST_LINE {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let ready = stream.ready(interest).await?;
            if ready.is_readable() {
                // The other end reads no questions while it cannot write answers.
                match stream.try_read_buf(received) {
                    Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                    Ok(_more) => continue,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
            if is_full && ready.is_writable() {
                return Ok(None);
            }
        }
    }
}
