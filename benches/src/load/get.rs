//! Small requests with large responses, repeated on the same connections, as a web server serves files.

use std::net::TcpStream;
use std::time::Instant;

use super::exchange::{Exchange, exchange};
use super::{LoadError, MESSAGE, Target, connect};
use crate::backend::BUFFER;
use crate::message::{self, service};
use crate::metric::Values;
use crate::pattern::{Checker, Wrong};
use crate::sock::{receive, transmit_all};

/// Measures how many responses of `size` bytes `connections` connections get, each with one request in flight.
pub(crate) fn get(target: Target<'_>, size: u32, connections: usize) -> Result<Values, LoadError> {
    let open =
        |share: Vec<TcpStream>| share.into_iter().map(|stream| Connection::new(stream, size)).collect();
    let shares = connect(target, connections)?.into_iter().map(open).collect();
    exchange(target, shares, BUFFER)
}

/// A connection with at most one request in flight.
struct Connection {
    stream: TcpStream,
    /// Bytes of a response.
    size: u32,
    number: u64,
    sent: Instant,
    checker: Checker,
    /// What is left of the response.
    left: usize,
}

impl Connection {
    fn new(stream: TcpStream, size: u32) -> Self {
        Self { stream, size, number: 0, sent: Instant::now(), checker: Checker::default(), left: 0 }
    }
}

impl Exchange for Connection {
    fn stream(&self) -> &TcpStream {
        &self.stream
    }

    fn sent(&self) -> Instant {
        self.sent
    }

    fn request(&mut self, now: Instant) -> Result<(), LoadError> {
        self.number += 1;
        self.sent = now;
        self.checker.restart(message::place(self.size, self.number));
        self.left = self.size as usize;
        let mut request = [0; MESSAGE];
        message::write(&mut request, service::GET, self.size, self.number);
        transmit_all(&self.stream, &request).map_err(LoadError::io("send a request"))
    }

    fn response(&mut self, buffer: &mut [u8]) -> Result<bool, LoadError> {
        let count = match receive(&self.stream, buffer).map_err(LoadError::io("receive a response"))? {
            None => return Ok(false),
            Some(0) => return Err(Wrong("the connection ended within a response".into()).into()),
            Some(count) => count,
        };
        self.checker.check(&buffer[..count])?;
        let left = self.left.checked_sub(count);
        self.left = left.ok_or_else(|| Wrong("a response is longer than was asked for".into()))?;
        Ok(self.left == 0)
    }
}
