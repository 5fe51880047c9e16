//! Small requests and responses, repeated on the same connections.

use std::net::TcpStream;
use std::time::Instant;

use super::exchange::{Exchange, exchange};
use super::{GRACE, LoadError, MESSAGE, Target, connect};
use crate::message::{self, service};
use crate::metric::Values;
use crate::pattern::Wrong;
use crate::sock::{receive, transmit_all};

/// Measures how many requests `connections` connections complete, each with one in flight.
pub(crate) fn rr(target: Target<'_>, connections: usize) -> Result<Values, LoadError> {
    let mut shares = Vec::new();
    for share in connect(target, connections)? {
        let mut share: Vec<_> = share.into_iter().map(Connection::new).collect();
        // The first exchange ensures that the relay's connection to the backend is open, too.
        for connection in &mut share {
            connection.exchange()?;
        }
        shares.push(share);
    }
    exchange(target, shares, 2 * MESSAGE)
}

/// A connection with at most one request in flight.
pub(super) struct Connection {
    stream: TcpStream,
    number: u64,
    sent: Instant,
    /// The part of a fragmented response that has arrived.
    partial: Vec<u8>,
}

impl Connection {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream, number: 0, sent: Instant::now(), partial: Vec::new() }
    }

    /// Sends a request and waits for its response.
    pub(super) fn exchange(&mut self) -> Result<(), LoadError> {
        self.stream.set_read_timeout(Some(GRACE)).map_err(LoadError::io("set a timeout"))?;
        self.request(Instant::now())?;
        let mut response = [0; MESSAGE];
        let read = std::io::Read::read_exact(&mut self.stream, &mut response);
        read.map_err(LoadError::io("receive a first response"))?;
        Ok(message::check(&response, service::ECHO, 0, self.number)?)
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
        let mut request = [0; MESSAGE];
        message::write(&mut request, service::ECHO, 0, self.number);
        transmit_all(&self.stream, &request).map_err(LoadError::io("send a request"))
    }

    fn response(&mut self, buffer: &mut [u8]) -> Result<bool, LoadError> {
        let count = match receive(&self.stream, buffer).map_err(LoadError::io("receive a response"))? {
            None => return Ok(false),
            Some(0) => return Err(Wrong("the connection ended instead of a response".into()).into()),
            Some(count) => count,
        };
        let data = &buffer[..count];
        if self.partial.is_empty() && count >= MESSAGE {
            message::check(data, service::ECHO, 0, self.number)?;
            return Ok(true);
        }
        self.partial.extend_from_slice(data);
        if self.partial.len() < MESSAGE {
            return Ok(false);
        }
        message::check(&self.partial, service::ECHO, 0, self.number)?;
        self.partial.clear();
        Ok(true)
    }
}
