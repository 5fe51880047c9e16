//! Answers requests with as much data as they ask for.

use std::io;
use std::net::TcpStream;

use super::next::Next;
use crate::load::MESSAGE;
use crate::message::{self, service};
use crate::pattern;
use crate::sock::{Interest, transmit};

/// A connection with at most one request at a time.
#[derive(Default)]
pub(super) struct Responder {
    /// The part of a request that has arrived.
    request: Vec<u8>,
    /// Where in the pattern the response continues.
    place: u64,
    /// What is left of it.
    left: usize,
}

impl Responder {
    /// Takes what was read, and begins to answer once the request is complete.
    pub(super) fn take(&mut self, stream: &TcpStream, data: &[u8]) -> io::Result<Next> {
        self.request.extend_from_slice(data);
        if self.request.len() < MESSAGE {
            return Ok(Next::Stay);
        }
        let (size, number) = (message::argument(&self.request), message::number(&self.request));
        message::check(&self.request, service::GET, size, number).map_err(io::Error::other)?;
        self.request.clear();
        (self.place, self.left) = (message::place(size, number), size as usize);
        Ok(if self.write(stream)? { Next::Stay } else { Next::Wait(Interest::EPOLLOUT) })
    }

    /// Continues the response when there is room for it.
    pub(super) fn resume(&mut self, stream: &TcpStream) -> io::Result<Next> {
        Ok(if self.write(stream)? { Next::Wait(Interest::EPOLLIN) } else { Next::Stay })
    }

    /// Writes until there is no room; returns whether the response is complete.
    fn write(&mut self, stream: &TcpStream) -> io::Result<bool> {
        while self.left > 0 {
            let Some(sent) = transmit(stream, pattern::from(self.place, self.left))? else {
                return Ok(false);
            };
            self.place += sent as u64;
            self.left -= sent;
        }
        Ok(true)
    }
}
