//! TCP streams at full speed.

use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use super::{GRACE, LoadError, TICK, Target, connect, measure};
use crate::backend::BUFFER;
use crate::message::{hello, service};
use crate::metric::{Metric, Unit, Values};
use crate::pattern::{Incoming, Outgoing, Pulled, Wrong};
use crate::sock::{Events, Interest, Poll, receive, transmit, transmit_all};
use crate::workload::Direction;

/// Chunks written before other streams are serviced.
const TURN: usize = 4;

/// Measures the throughput of `streams` connections: all bytes sent, divided by the time until the receiver
/// has confirmed all of them.
pub(crate) fn bulk(target: Target<'_>, streams: usize, direction: Direction) -> Result<Values, LoadError> {
    let connections = connect(target, streams)?;
    let drive = |share| Driver::new(share, direction, target.duration)?.run();
    let (totals, span) = measure(target, connections, drive)?;
    let bytes: u64 = totals.iter().sum();
    let gigabytes = bytes as f64 / 1e9;
    let mut values = vec![(Metric::Throughput, span.rate(bytes) * 8.0 / 1e9)];
    values.extend(span.costs(Unit::Gb, gigabytes));
    Ok(values)
}

/// A thread's share of the streams.
struct Driver {
    streams: Vec<Stream>,
    poll: Poll,
    end: Instant,
}

struct Stream {
    socket: TcpStream,
    role: Role,
}

enum Role {
    Send(Outgoing),
    /// Everything is sent. The backend's verdict is outstanding, and must report this count.
    Await(u64, Vec<u8>),
    Receive(Incoming),
}

impl Driver {
    fn new(share: Vec<TcpStream>, direction: Direction, duration: Duration) -> Result<Self, LoadError> {
        let poll = Poll::new().map_err(LoadError::io("create an epoll instance"))?;
        let milliseconds = u32::try_from(duration.as_millis()).unwrap_or(u32::MAX);
        let mut streams = Vec::new();
        for (token, socket) in share.into_iter().enumerate() {
            let (hello, interest, role) = match direction {
                Direction::Up => {
                    (hello(service::SINK, 0), Interest::EPOLLOUT, Role::Send(Outgoing::default()))
                }
                Direction::Down => (
                    hello(service::SOURCE, milliseconds),
                    Interest::EPOLLIN,
                    Role::Receive(Incoming::default()),
                ),
            };
            transmit_all(&socket, &hello).map_err(LoadError::io("ask for a stream"))?;
            poll.add(&socket, interest, token).map_err(LoadError::io("watch a stream"))?;
            streams.push(Stream { socket, role });
        }
        Ok(Self { streams, poll, end: Instant::now() + duration })
    }

    /// Drives the streams to their end; returns the number of bytes transferred.
    fn run(mut self) -> Result<u64, LoadError> {
        let (mut events, mut buffer) = (Events::new(), vec![0; BUFFER]);
        let (mut open, mut total) = (self.streams.len(), 0);
        while open > 0 {
            let ready = self.poll.wait(&mut events, TICK).map_err(LoadError::io("wait for events"))?;
            let now = Instant::now();
            for (token, _readiness) in ready {
                let stream = &mut self.streams[token];
                if let Some(bytes) = stream.step(now >= self.end, &mut buffer, &self.poll, token)? {
                    total += bytes;
                    open -= 1;
                }
            }
            if now >= self.end + GRACE {
                return Err(LoadError::Stalled(format!("{open} streams have not ended")));
            }
        }
        Ok(total)
    }
}

impl Stream {
    /// Transfers what it can; returns the number of bytes once the stream has ended.
    fn step(
        &mut self,
        over: bool,
        buffer: &mut [u8],
        poll: &Poll,
        token: usize,
    ) -> Result<Option<u64>, LoadError> {
        match &mut self.role {
            Role::Send(outgoing) => {
                if over {
                    outgoing.finish();
                }
                send(&self.socket, outgoing)?;
                if outgoing.is_done() {
                    self.role = Role::Await(outgoing.sent(), Vec::new());
                    self.socket.shutdown(Shutdown::Write).map_err(LoadError::io("end a stream"))?;
                    let watched = poll.modify(&self.socket, Interest::EPOLLIN, token);
                    watched.map_err(LoadError::io("watch a stream"))?;
                }
                Ok(None)
            }
            Role::Await(sent, verdict) => {
                let done = hear(&self.socket, verdict, buffer, *sent)?.then_some(*sent);
                done.map(|_| poll.remove(&self.socket))
                    .transpose()
                    .map_err(LoadError::io("forget a stream"))?;
                Ok(done)
            }
            Role::Receive(incoming) => {
                let pulled = incoming.pull(buffer, |room| receive(&self.socket, room));
                match pulled.map_err(LoadError::io("receive"))?? {
                    Pulled::Nothing | Pulled::Data => Ok(None),
                    Pulled::End(total) => {
                        poll.remove(&self.socket).map_err(LoadError::io("forget a stream"))?;
                        Ok(Some(total))
                    }
                }
            }
        }
    }
}

fn send(socket: &TcpStream, outgoing: &mut Outgoing) -> Result<(), LoadError> {
    for _ in 0..TURN {
        let chunk = outgoing.chunk();
        let sent = transmit(socket, chunk).map_err(LoadError::io("send"))?.unwrap_or(0);
        let whole = sent == chunk.len();
        outgoing.advance(sent);
        if !whole || outgoing.is_done() {
            break;
        }
    }
    Ok(())
}

/// Reads the verdict; returns whether it is complete and positive.
fn hear(socket: &TcpStream, verdict: &mut Vec<u8>, buffer: &mut [u8], sent: u64) -> Result<bool, LoadError> {
    match receive(socket, buffer).map_err(LoadError::io("receive a verdict"))? {
        Some(0) => return Err(Wrong("the connection ended before the backend's verdict".into()).into()),
        Some(count) => verdict.extend_from_slice(&buffer[..count]),
        None => return Ok(false),
    }
    if verdict.len() < 9 {
        return Ok(false);
    }
    match verdict[0] == 1 && verdict[1..] == sent.to_le_bytes() {
        true => Ok(true),
        false => Err(Wrong(format!("the backend did not get the {sent} bytes that were sent")).into()),
    }
}
