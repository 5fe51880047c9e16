//! A new connection for each request. The backend closes first, like an HTTP server that was asked to, so
//! that the client's ports are free again at once.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use hdrhistogram::Histogram;
use nix::errno::Errno;
use socket2::{Domain, Protocol, Socket, Type};

use super::{GRACE, LoadError, MESSAGE, TICK, Target, latencies, measure, quantiles, record, shares};
use crate::message::{self, service};
use crate::metric::{Metric, Unit, Values};
use crate::pattern::Wrong;
use crate::sock::{Events, Interest, Poll, receive, transmit_all};

/// Measures connect, request, response and end of stream, with `connections` connections at a time.
pub(crate) fn crr(target: Target<'_>, connections: usize) -> Result<Values, LoadError> {
    let shares = shares(connections, target.threads);
    let (tallies, span) = measure(target, shares, |share| drive(target, share.len()))?;
    let responses = tallies.iter().map(Histogram::len).sum();
    let mut values = vec![(Metric::Requests, span.rate(responses))];
    values.extend(span.costs(Unit::Request, responses as f64));
    values.extend(quantiles(tallies));
    Ok(values)
}

fn drive(target: Target<'_>, count: usize) -> Result<Histogram<u64>, LoadError> {
    let poll = Poll::new().map_err(LoadError::io("create an epoll instance"))?;
    let end = Instant::now() + target.duration;
    let mut number = 0;
    let mut open = |token| {
        number += 1;
        Attempt::start(target.address, number, &poll, token)
    };
    let mut attempts: Vec<_> = (0..count).map(|token| open(token).map(Some)).collect::<Result<_, _>>()?;
    let (mut events, mut tally, mut left) = (Events::new(), latencies(), count);
    while left > 0 {
        let ready = poll.wait(&mut events, TICK).map_err(LoadError::io("wait for events"))?;
        for (token, readiness) in ready {
            let Some(attempt) = &mut attempts[token] else { continue };
            if !attempt.step(readiness)? {
                continue;
            }
            let now = Instant::now();
            record(&mut tally, now - attempt.started);
            // Replacing the old connection closes it.
            attempts[token] = (now < end).then(|| open(token)).transpose()?;
            left -= usize::from(attempts[token].is_none());
        }
        if Instant::now() >= end + GRACE {
            return Err(LoadError::Stalled(format!("{left} connections have not ended")));
        }
    }
    Ok(tally)
}

/// A connection for one request.
struct Attempt {
    stream: TcpStream,
    number: u64,
    started: Instant,
    requested: bool,
    response: [u8; MESSAGE],
    received: usize,
}

impl Attempt {
    fn start(address: SocketAddr, number: u64, poll: &Poll, token: usize) -> Result<Self, LoadError> {
        let started = Instant::now();
        let stream = dial(address).map_err(LoadError::io("connect"))?;
        // Edge-triggered, because all expected events are registered with one call.
        let interest = Interest::EPOLLIN | Interest::EPOLLOUT | Interest::EPOLLRDHUP | Interest::EPOLLET;
        poll.add(&stream, interest, token).map_err(LoadError::io("watch a connection"))?;
        Ok(Self { stream, number, started, requested: false, response: [0; MESSAGE], received: 0 })
    }

    /// Handles an event; returns whether the response is complete and the connection has ended.
    fn step(&mut self, readiness: Interest) -> Result<bool, LoadError> {
        if !self.requested && readiness.contains(Interest::EPOLLOUT) {
            self.request()?;
        }
        if !readiness.intersects(Interest::EPOLLIN | Interest::EPOLLERR | Interest::EPOLLHUP) {
            return Ok(false);
        }
        // One byte more than expected, so that surplus data is detected and a short read means that the
        // socket is empty.
        let mut buffer = [0; MESSAGE + 1];
        loop {
            match receive(&self.stream, &mut buffer).map_err(LoadError::io("receive a response"))? {
                None => return Ok(false),
                Some(0) => return self.check().map(|()| true),
                Some(count) => self.take(&buffer[..count])?,
            }
            // The stream has ended if the event says so and everything has been read.
            if self.received == MESSAGE && readiness.contains(Interest::EPOLLRDHUP) {
                return Ok(true);
            }
        }
    }

    /// Appends to the response, and checks it when it is complete.
    fn take(&mut self, data: &[u8]) -> Result<(), LoadError> {
        let room = self.response.get_mut(self.received..self.received + data.len());
        room.ok_or_else(|| Wrong("more came than the response".into()))?.copy_from_slice(data);
        self.received += data.len();
        if self.received == MESSAGE { self.check() } else { Ok(()) }
    }

    fn check(&self) -> Result<(), LoadError> {
        let response = &self.response[..self.received];
        Ok(message::check(response, service::ONCE, MESSAGE_LEN, self.number)?)
    }

    fn request(&mut self) -> Result<(), LoadError> {
        let mut request = [0; MESSAGE];
        message::write(&mut request, service::ONCE, MESSAGE_LEN, self.number);
        transmit_all(&self.stream, &request).map_err(LoadError::io("send a request"))?;
        self.requested = true;
        Ok(())
    }
}

/// The length that the backend has to wait for.
#[expect(clippy::cast_possible_truncation, reason = "a small constant")]
const MESSAGE_LEN: u32 = MESSAGE as u32;

fn dial(address: SocketAddr) -> io::Result<TcpStream> {
    let domain = Domain::for_address(address);
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    match socket.connect(&address.into()) {
        Err(error) if error.raw_os_error() == Some(Errno::EINPROGRESS as i32) => {}
        result => result?,
    }
    Ok(socket.into())
}
