//! Small requests with large responses, repeated on the same connections, as a web server serves files.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::{GRACE, LoadError, MESSAGE, TICK, Target, connect, latencies, measure, quantiles, record};
use crate::backend::BUFFER;
use crate::message::{self, service};
use crate::metric::{Metric, Unit, Values};
use crate::pattern::{Checker, Wrong};
use crate::sock::{Events, Interest, Poll, receive, transmit_all};

/// Measures how many responses of `size` bytes `connections` connections get, each with one request in flight.
pub(crate) fn get(target: Target<'_>, size: u32, connections: usize) -> Result<Values, LoadError> {
    let shares = connect(target, connections)?;
    let shares = shares.into_iter().map(|share| share.into_iter().map(Connection::new).collect()).collect();
    let (tallies, span) = measure(target, shares, |share| drive(share, size, target.duration))?;
    let responses = tallies.iter().map(Histogram::len).sum();
    let mut values = vec![(Metric::Requests, span.rate(responses))];
    values.extend(span.costs(Unit::Request, responses as f64));
    values.extend(quantiles(tallies));
    Ok(values)
}

fn drive(mut share: Vec<Connection>, size: u32, duration: Duration) -> Result<Histogram<u64>, LoadError> {
    let poll = Poll::new().map_err(LoadError::io("create an epoll instance"))?;
    for (token, connection) in share.iter().enumerate() {
        poll.add(&connection.stream, Interest::EPOLLIN, token)
            .map_err(LoadError::io("watch a connection"))?;
    }
    let end = Instant::now() + duration;
    for connection in &mut share {
        connection.request(size, Instant::now())?;
    }
    let (mut events, mut buffer, mut tally) = (Events::new(), vec![0; BUFFER], latencies());
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
                true => connection.request(size, now)?,
                false => open -= 1,
            }
        }
        if Instant::now() >= end + GRACE {
            return Err(LoadError::Stalled(format!("{open} responses are incomplete")));
        }
    }
    Ok(tally)
}

/// A connection with at most one request in flight.
struct Connection {
    stream: TcpStream,
    number: u64,
    sent: Instant,
    checker: Checker,
    /// What is left of the response.
    left: usize,
}

impl Connection {
    fn new(stream: TcpStream) -> Self {
        Self { stream, number: 0, sent: Instant::now(), checker: Checker::default(), left: 0 }
    }

    fn request(&mut self, size: u32, now: Instant) -> Result<(), LoadError> {
        self.number += 1;
        self.sent = now;
        self.checker.restart(message::place(size, self.number));
        self.left = size as usize;
        let mut request = [0; MESSAGE];
        message::write(&mut request, service::GET, size, self.number);
        transmit_all(&self.stream, &request).map_err(LoadError::io("send a request"))
    }

    /// Reads; returns whether the response is complete.
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
