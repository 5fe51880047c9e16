//! The conversation with the resolver: questions, and answers in any order.

use std::io;
use std::os::unix::net::UnixStream as StdUnixStream;

use rproxy_mapping::backend::HostName;
use tokio::io::Interest;
use tokio::net::UnixStream;

use super::message::{Answer, LONGEST_LINE, Question};

/// The conversation with the resolver.
#[derive(Debug)]
pub(super) enum Conversation {
    /// Nothing was asked yet.
    Idle(StdUnixStream),
    /// The socket is watched by the runtime where it was asked first, which the process has until its end.
    Open { stream: UnixStream, received: Vec<u8> },
}

impl Conversation {
    /// Asks what a name stands for.
    ///
    /// # Errors
    /// Those of write(2): `EAGAIN` while the resolver takes no more questions.
    pub(super) fn ask(&mut self, name: &HostName) -> io::Result<()> {
        if let Self::Idle(socket) = self {
            socket.set_nonblocking(true)?;
            *self = Self::Open { stream: UnixStream::from_std(socket.try_clone()?)?, received: Vec::new() };
        }
        let Self::Open { stream, .. } = self else { return Err(io::ErrorKind::NotConnected.into()) };
        let mut line = serde_json::to_vec(&Question { name: name.to_string() })?;
        line.push(b'\n');
        // A line of at most 300 bytes is written whole or not at all.
        let written = stream.try_write(&line)?;
        if written == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Waits for the next answer; or, if it `is_full`, until it takes another question, and returns `None` then.
    async fn hear(&mut self, is_full: bool) -> io::Result<Option<Answer>> {
        let Self::Open { stream, received } = self else { return std::future::pending().await };
        let interest = if is_full { Interest::READABLE.add(Interest::WRITABLE) } else { Interest::READABLE };
        loop {
            if let Some(end) = received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = received.drain(..=end).collect();
                return Ok(Some(serde_json::from_slice(&line)?));
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

/// Waits for the next answer, if there is a resolver; or, if it `is_full`, until it takes another question, and returns `None`
/// then. Dropped at any point, nothing is lost.
///
/// # Errors
/// The resolver cannot be started any more, or does not speak this protocol.
pub(super) async fn heard(resolver: &mut Option<Conversation>, is_full: bool) -> io::Result<Option<Answer>> {
    match resolver {
        Some(resolver) => resolver.hear(is_full).await,
        None => std::future::pending().await,
    }
}
