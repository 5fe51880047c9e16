//! The conversation with the resolver: questions, and answers in any order.

use std::io;
use std::os::unix::net::UnixStream as StdUnixStream;

use rproxy_mapping::backend::HostName;
use tokio::io::AsyncReadExt;
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
    /// Those of write(2).
    pub(super) async fn ask(&mut self, name: &HostName) -> io::Result<()> {
        if let Self::Idle(socket) = self {
            socket.set_nonblocking(true)?;
            *self = Self::Open { stream: UnixStream::from_std(socket.try_clone()?)?, received: Vec::new() };
        }
        let Self::Open { stream, .. } = self else { return Err(io::ErrorKind::NotConnected.into()) };
        let mut line = serde_json::to_vec(&Question { name: name.to_string() })?;
        line.push(b'\n');
        stream.writable().await?;
        // A line of at most 300 bytes is written whole or not at all.
        let written = stream.try_write(&line)?;
        if written == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// Waits for the next answer.
    async fn hear(&mut self) -> io::Result<Answer> {
        let Self::Open { stream, received } = self else { return std::future::pending().await };
        loop {
            if let Some(end) = received.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = received.drain(..=end).collect();
                return Ok(serde_json::from_slice(&line)?);
            }
            if received.len() > LONGEST_LINE {
                return Err(io::ErrorKind::InvalidData.into());
            }
            if stream.read_buf(received).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

/// Waits for the next answer, if there is a resolver. Dropped at any point, nothing is lost.
///
/// # Errors
/// The resolver cannot be started any more, or does not speak this protocol.
pub(super) async fn heard(resolver: &mut Option<Conversation>) -> io::Result<Answer> {
    match resolver {
        Some(resolver) => resolver.hear().await,
        None => std::future::pending().await,
    }
}
