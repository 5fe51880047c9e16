//! Datagrams in one direction, as fast as the client can send them.

use std::net::UdpSocket;
use std::time::{Duration, Instant, SystemTime};

use super::udp_rr::socket;
use super::{LoadError, Target, measure, shares};
use crate::backend::WRONG;
use crate::batch::{BATCH, Batch};
use crate::message::{self, HEADER, service};
use crate::metric::{Metric, Unit, Values};
use crate::pattern::Wrong;

/// How long the backend may take to report its count, and how often it is asked.
const ANSWER: Duration = Duration::from_millis(300);
const QUESTIONS: u32 = 20;

/// Measures how many datagrams arrive, with one flow per thread, sent one by one or in GSO batches.
pub(crate) fn udp_bulk(target: Target<'_>, size: usize, gso: bool) -> Result<Values, LoadError> {
    let mut flows = Vec::new();
    for share in shares(target.threads, target.threads) {
        for index in share {
            flows.push(Flow { socket: socket(target.address)?, name: name(index), sent: 0, size, gso });
        }
    }
    let (flows, span) = measure(target, flows, |flow| flow.flood(target.duration))?;
    let sent: u64 = flows.iter().map(|flow| flow.sent).sum();
    let arrived: u64 = flows.iter().map(Flow::ask).sum::<Result<_, _>>()?;
    if arrived > sent {
        return Err(Wrong(format!("{arrived} datagrams arrived of {sent} that were sent")).into());
    }
    let mut values = vec![(Metric::Datagrams, span.rate(arrived))];
    values.extend(span.costs(Unit::Datagram, arrived as f64));
    values.push((Metric::Loss, (sent - arrived) as f64 * 100.0 / sent.max(1) as f64));
    Ok(values)
}

/// A flow number that has not been used before, so that the backend counts from zero.
pub(super) fn name(index: usize) -> u32 {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    // The low bits are those that change.
    let low = u32::try_from(now.as_micros() & 0x00ff_ffff).unwrap_or_default();
    (low << 8) | u32::try_from(index & 0xff).unwrap_or_default()
}

struct Flow {
    socket: UdpSocket,
    name: u32,
    sent: u64,
    size: usize,
    gso: bool,
}

impl Flow {
    fn flood(mut self, duration: Duration) -> Result<Self, LoadError> {
        let (end, mut batch) = (Instant::now() + duration, Batch::new());
        while Instant::now() < end {
            batch.clear();
            for number in (self.sent..).take(BATCH) {
                message::write(batch.push(self.size), service::SINK, self.name, number);
            }
            let sent = match self.gso {
                true => batch.send_as_one(&self.socket),
                false => batch.send(&self.socket),
            };
            self.sent += sent.map_err(LoadError::io("send a datagram"))? as u64;
        }
        Ok(self)
    }

    /// Asks the backend how many datagrams of this flow it has received. The request is queued behind them.
    fn ask(&self) -> Result<u64, LoadError> {
        self.socket.set_read_timeout(Some(ANSWER)).map_err(LoadError::io("set a timeout"))?;
        let (mut question, mut answer) = ([0; HEADER], [0; HEADER + 1]);
        message::write(&mut question, service::COUNT, self.name, 0);
        for _ in 0..QUESTIONS {
            self.socket.send(&question).map_err(LoadError::io("ask for a count"))?;
            let Ok(HEADER) = self.socket.recv(&mut answer) else { continue };
            if message::argument(&answer) != self.name {
                return Err(Wrong("a count of another flow".into()).into());
            }
            return match message::number(&answer) {
                WRONG => Err(Wrong("a datagram arrived that was not sent".into()).into()),
                count => Ok(count),
            };
        }
        Err(LoadError::Stalled("the backend does not say what it got".into()))
    }
}
