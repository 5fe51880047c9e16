//! Small requests and responses, repeated on the same connections.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::{GRACE, LoadError, MESSAGE, TICK, Target, connect, latencies, measure, quantiles, record};
use crate::message::{self, service};
use crate::metric::{Metric, Unit, Values};
use crate::pattern::Wrong;
use crate::sock::{Events, Interest, Poll, receive, transmit_all};

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
    let (tallies, span) = measure(target, shares, |share| drive(share, target.duration))?;
    let responses = tallies.iter().map(Histogram::len).sum();
    let mut values = vec![(Metric::Requests, span.rate(responses))];
    values.extend(span.costs(Unit::Request, responses as f64));
    values.extend(quantiles(tallies));
    Ok(values)
}

fn drive(mut share: Vec<Connection>, duration: Duration) -> Result<Histogram<u64>, LoadError> {
    let poll = Poll::new().map_err(LoadError::io("create an epoll instance"))?;
    for (token, connection) in share.iter().enumerate() {
        poll.add(&connection.stream, Interest::EPOLLIN, token)
            .map_err(LoadError::io("watch a connection"))?;
    }
    let end = Instant::now() + duration;
    for connection in &mut share {
        connection.request(Instant::now())?;
    }
    let (mut events, mut buffer, mut tally) = (Events::new(), [0; 2 * MESSAGE], latencies());
    let mut open = share.len();
    while open > 0 {
        let ready = poll.wait(&mut events, TICK).map_err(LoadError::io("wait for events"))?;
        for (token, _readiness) in ready {
            let connection = &mut share[token];
            if !connection.response(&mut buffer)? {
                continue;
            }
            let now = Instant::now();
            record(&mut tally, now - connection.sent);
            match now < end {
                true => connection.request(now)?,
                false => open -= 1,
            }
        }
        if Instant::now() >= end + GRACE {
            return Err(LoadError::Stalled(format!("{open} requests have no response")));
        }
    }
    Ok(tally)
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

    fn request(&mut self, now: Instant) -> Result<(), LoadError> {
        self.number += 1;
        self.sent = now;
        let mut request = [0; MESSAGE];
        message::write(&mut request, service::ECHO, 0, self.number);
        transmit_all(&self.stream, &request).map_err(LoadError::io("send a request"))
    }

    /// Reads; returns whether the response is complete.
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
