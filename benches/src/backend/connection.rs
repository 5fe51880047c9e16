//! The backend's side of one connection.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use super::get::Responder;
use super::next::Next;
use crate::message::{self, HEADER, proxy_header, service};
use crate::pattern::{Incoming, Outgoing, Pulled};
use crate::sock::{Interest, receive, transmit, transmit_all};

/// Bytes per read. With larger reads, data drops out of the second-level cache before it is checked.
pub(crate) const BUFFER: usize = 256 * 1024;

/// Chunks written before other connections are serviced.
const TURN: usize = 4;

/// A connection and its role.
pub(super) struct Connection {
    stream: TcpStream,
    role: Role,
}

enum Role {
    /// The role is not known yet; these bytes have been received.
    New(Vec<u8>),
    /// Echoes everything; this many bytes are pending.
    Echo(Vec<u8>),
    Sink(Incoming),
    Source(Outgoing, Instant),
    Get(Responder),
}

impl Connection {
    pub(super) fn new(stream: TcpStream) -> Self {
        Self { stream, role: Role::New(Vec::new()) }
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Handles an event, with `buffer` for reading.
    pub(super) fn step(&mut self, readiness: Interest, buffer: &mut [u8]) -> io::Result<Next> {
        let Self { stream, role } = self;
        match role {
            Role::New(_) => self.open(buffer),
            Role::Echo(waiting) if readiness.contains(Interest::EPOLLOUT) => flush(stream, waiting),
            Role::Echo(waiting) => match receive(stream, buffer)? {
                Some(0) => Ok(Next::Close),
                Some(count) => echo(stream, &buffer[..count], waiting),
                None => Ok(Next::Stay),
            },
            Role::Sink(incoming) => sink(stream, incoming, buffer),
            Role::Source(outgoing, until) => source(stream, outgoing, *until),
            Role::Get(responder) if readiness.contains(Interest::EPOLLOUT) => responder.resume(stream),
            Role::Get(responder) => match receive(stream, buffer)? {
                Some(0) => Ok(Next::Close),
                Some(count) => responder.take(stream, &buffer[..count]),
                None => Ok(Next::Stay),
            },
        }
    }

    /// Reads until the role is known.
    fn open(&mut self, buffer: &mut [u8]) -> io::Result<Next> {
        let Self { stream, role: Role::New(head) } = self else { return Ok(Next::Close) };
        let count = match receive(stream, buffer)? {
            Some(0) => return Ok(Next::Close),
            Some(count) => count,
            None => return Ok(Next::Stay),
        };
        head.extend_from_slice(&buffer[..count]);
        head.drain(..proxy_header(head));
        if head.is_empty() {
            return Ok(Next::Stay);
        }
        match head[0] {
            service::ECHO => {
                let mut waiting = Vec::new();
                let next = echo(stream, head, &mut waiting);
                self.role = Role::Echo(waiting);
                next
            }
            _ if head.len() < HEADER / 2 => Ok(Next::Stay),
            service::ONCE if head.len() < message::argument(head) as usize => Ok(Next::Stay),
            // The following close sends the FIN that the client waits for.
            service::ONCE => transmit_all(stream, head).map(|()| Next::Close),
            service::SINK => {
                let mut incoming = Incoming::default();
                let mut rest = Some(&head[HEADER / 2..]).filter(|rest| !rest.is_empty());
                let read = |room: &mut [u8]| {
                    Ok(rest.take().map(|rest| {
                        room[..rest.len()].copy_from_slice(rest);
                        rest.len()
                    }))
                };
                let pulled = incoming.pull(buffer, read)?;
                self.role = Role::Sink(incoming);
                pulled.map_err(io::Error::other).map(|_data| Next::Stay)
            }
            service::GET => {
                let mut responder = Responder::default();
                let next = responder.take(stream, head);
                self.role = Role::Get(responder);
                next
            }
            service::SOURCE => {
                let until = Instant::now() + Duration::from_millis(message::argument(head).into());
                self.role = Role::Source(Outgoing::default(), until);
                Ok(Next::Wait(Interest::EPOLLOUT))
            }
            _ => Ok(Next::Close),
        }
    }
}

fn echo(stream: &TcpStream, data: &[u8], waiting: &mut Vec<u8>) -> io::Result<Next> {
    let sent = transmit(stream, data)?.unwrap_or(0);
    if sent == data.len() {
        return Ok(Next::Stay);
    }
    waiting.extend_from_slice(&data[sent..]);
    Ok(Next::Wait(Interest::EPOLLOUT))
}

fn flush(stream: &TcpStream, waiting: &mut Vec<u8>) -> io::Result<Next> {
    let sent = transmit(stream, waiting)?.unwrap_or(0);
    waiting.drain(..sent);
    Ok(if waiting.is_empty() { Next::Wait(Interest::EPOLLIN) } else { Next::Stay })
}

/// Receives a stream; at its end, sends the verdict (one byte) and its length.
fn sink(stream: &TcpStream, incoming: &mut Incoming, buffer: &mut [u8]) -> io::Result<Next> {
    let (right, total) = match incoming.pull(buffer, |room| receive(stream, room))? {
        Ok(Pulled::Nothing | Pulled::Data) => return Ok(Next::Stay),
        Ok(Pulled::End(total)) => (1, total),
        Err(_wrong) => (0, 0),
    };
    let mut verdict = [right; 9];
    verdict[1..].copy_from_slice(&u64::to_le_bytes(total));
    transmit_all(stream, &verdict)?;
    // After wrong data there may be unread data, with which a close would send a reset and discard the
    // verdict.
    stream.shutdown(Shutdown::Write)?;
    Ok(if right == 1 { Next::Close } else { Next::Wait(Interest::empty()) })
}

fn source(stream: &TcpStream, outgoing: &mut Outgoing, until: Instant) -> io::Result<Next> {
    for _ in 0..TURN {
        if Instant::now() >= until {
            outgoing.finish();
        }
        let chunk = outgoing.chunk();
        let sent = transmit(stream, chunk)?.unwrap_or(0);
        let whole = sent == chunk.len();
        outgoing.advance(sent);
        if outgoing.is_done() {
            return Ok(Next::Close);
        }
        if !whole {
            break;
        }
    }
    Ok(Next::Stay)
}
