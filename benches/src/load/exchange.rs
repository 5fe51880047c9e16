//! Connections that each have one request in flight until the end of the measurement.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::{GRACE, LoadError, TICK, Target, latencies, measure, quantiles, record};
use crate::metric::{Metric, Unit, Values};
use crate::sock::{Events, Interest, Poll};

/// A connection with at most one request in flight.
pub(super) trait Exchange: Send {
    /// Its socket.
    fn stream(&self) -> &TcpStream;

    /// When the last request was sent.
    fn sent(&self) -> Instant;

    /// Sends a request.
    fn request(&mut self, now: Instant) -> Result<(), LoadError>;

    /// Reads; returns whether the response is complete.
    fn response(&mut self, buffer: &mut [u8]) -> Result<bool, LoadError>;
}

/// Measures how many requests these connections complete, in shares for each thread, with reads of at most `buffer` bytes.
pub(super) fn exchange(
    target: Target<'_>,
    shares: Vec<Vec<impl Exchange>>,
    buffer: usize,
) -> Result<Values, LoadError> {
    let (tallies, span) = measure(target, shares, |share| drive(share, target.duration, buffer))?;
    let responses: u64 = tallies.iter().map(Histogram::len).sum();
    let mut values = vec![(Metric::Requests, span.rate(responses))];
    values.extend(span.costs(Unit::Request, responses as f64));
    values.extend(quantiles(tallies));
    Ok(values)
}

fn drive(
    mut share: Vec<impl Exchange>,
    duration: Duration,
    buffer: usize,
) -> Result<Histogram<u64>, LoadError> {
    let poll = Poll::new().map_err(LoadError::io("create an epoll instance"))?;
    for (token, connection) in share.iter().enumerate() {
        poll.add(connection.stream(), Interest::EPOLLIN, token)
            .map_err(LoadError::io("watch a connection"))?;
    }
    let end = Instant::now() + duration;
    for connection in &mut share {
        connection.request(Instant::now())?;
    }
    let (mut events, mut buffer, mut tally) = (Events::new(), vec![0; buffer], latencies());
    let mut open = share.len();
    while open > 0 {
        let ready = poll.wait(&mut events, TICK).map_err(LoadError::io("wait for events"))?;
        for (token, _readiness) in ready {
            let connection = &mut share[token];
            if !connection.response(&mut buffer)? {
                continue;
            }
            let now = Instant::now();
            record(&mut tally, now - connection.sent());
            match now < end {
                true => connection.request(now)?,
                false => open -= 1,
            }
        }
        if Instant::now() >= end + GRACE {
            return Err(LoadError::Stalled(format!("{open} requests have no complete response")));
        }
    }
    Ok(tally)
}
