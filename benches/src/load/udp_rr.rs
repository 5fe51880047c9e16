//! Datagrams that are echoed: a number of flows, each with a number of datagrams in flight.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::{LoadError, TICK, Target, latencies, measure, quantiles, record, shares};
use crate::batch::{BATCH, Batch};
use crate::message::{self, HEADER, service};
use crate::metric::{Metric, Unit, Values};
use crate::pattern::Wrong;
use crate::sock::{Events, Interest, Poll, enlarge_udp_buffers};

/// A datagram without a reply within this time is lost, and is replaced by another one.
const LOST: Duration = Duration::from_millis(250);

/// The datagrams in flight.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// The number of sockets.
    pub(crate) flows: usize,
    /// Datagrams in flight per socket.
    pub(crate) window: usize,
    /// Bytes per datagram.
    pub(crate) size: usize,
    /// Consecutive ports, from that of the target on, over which the flows are spread.
    pub(crate) ports: u16,
}

/// Measures how many datagrams are echoed, and that they equal those sent.
pub(crate) fn udp_rr(target: Target<'_>, shape: Shape) -> Result<Values, LoadError> {
    let mut drivers = Vec::new();
    for share in shares(shape.flows, target.threads) {
        drivers.push(Driver::new(target, share, shape)?);
    }
    let (tallies, span) = measure(target, drivers, |driver| driver.run(target.duration))?;
    let replies = tallies.iter().map(|tally| tally.latencies.len()).sum();
    let lost: u64 = tallies.iter().map(|tally| tally.lost).sum();
    let mut values = vec![(Metric::Replies, span.rate(replies))];
    values.extend(span.costs(Unit::Reply, replies as f64));
    values.push((Metric::Loss, lost as f64 * 100.0 / (lost + replies).max(1) as f64));
    values.extend(quantiles(tallies.into_iter().map(|tally| tally.latencies)));
    Ok(values)
}

/// A socket connected to `address`, with buffers for bursts.
pub(super) fn socket(address: SocketAddr) -> Result<UdpSocket, LoadError> {
    let socket = unconnected(address)?;
    socket.connect(address).map_err(LoadError::io("connect a UDP socket"))?;
    enlarge_udp_buffers(&socket);
    Ok(socket)
}

/// A socket of the family of `address`.
pub(super) fn unconnected(address: SocketAddr) -> Result<UdpSocket, LoadError> {
    let any: SocketAddr = match address {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    UdpSocket::bind(any).map_err(LoadError::io("bind a UDP socket"))
}

/// A thread's share of the flows.
struct Driver {
    flows: Vec<Flow>,
    poll: Poll,
    size: usize,
    tally: Tally,
}

struct Tally {
    latencies: Histogram<u64>,
    lost: u64,
}

struct Flow {
    socket: UdpSocket,
    /// The number of the flow, which detects a reply to another flow.
    name: u32,
    slots: Vec<Slot>,
}

/// A datagram in flight. Those of slot `i` have the numbers `i`, `i + window`, `i + 2 × window`…
struct Slot {
    number: u64,
    sent: Instant,
    /// Neither answered nor timed out.
    under_way: bool,
}

impl Driver {
    fn new(target: Target<'_>, share: Vec<usize>, shape: Shape) -> Result<Self, LoadError> {
        let poll = Poll::new().map_err(LoadError::io("create an epoll instance"))?;
        let mut flows = Vec::new();
        for (token, name) in share.into_iter().enumerate() {
            let mut address = target.address;
            let offset = u16::try_from(name % usize::from(shape.ports)).unwrap_or(0);
            address.set_port(address.port() + offset);
            let socket = socket(address)?;
            socket.set_nonblocking(true).map_err(LoadError::io("set a UDP socket up"))?;
            poll.add(&socket, Interest::EPOLLIN, token).map_err(LoadError::io("watch a flow"))?;
            let slot = |number| Slot { number, sent: Instant::now(), under_way: false };
            let slots = (0..shape.window as u64).map(slot).collect();
            flows.push(Flow { socket, name: u32::try_from(name).unwrap_or(u32::MAX), slots });
        }
        Ok(Self { flows, poll, size: shape.size, tally: Tally { latencies: latencies(), lost: 0 } })
    }

    fn run(mut self, duration: Duration) -> Result<Tally, LoadError> {
        let end = Instant::now() + duration;
        let (mut events, mut batch) = (Events::new(), Batch::new());
        for flow in &mut self.flows {
            flow.start(&mut batch, self.size)?;
        }
        let mut next_sweep = Instant::now() + TICK;
        loop {
            let ready = self.poll.wait(&mut events, TICK).map_err(LoadError::io("wait for events"))?;
            for (token, _readiness) in ready {
                self.flows[token].answer(&mut batch, self.size, &mut self.tally, end)?;
            }
            let now = Instant::now();
            if now >= next_sweep {
                next_sweep = now + TICK;
                let sweep = |flow: &mut Flow| flow.sweep(&mut batch, self.size, &mut self.tally, now < end);
                let under_way: usize = self.flows.iter_mut().map(sweep).sum::<Result<_, _>>()?;
                if now >= end && under_way == 0 {
                    return Ok(self.tally);
                }
            }
        }
    }
}

impl Flow {
    /// Sends the first datagrams.
    fn start(&mut self, batch: &mut Batch, size: usize) -> Result<(), LoadError> {
        let now = Instant::now();
        for range in (0..self.slots.len()).collect::<Vec<_>>().chunks(BATCH) {
            batch.clear();
            for slot in range {
                let slot = &mut self.slots[*slot];
                (slot.sent, slot.under_way) = (now, true);
                message::write(batch.push(size), service::ECHO, self.name, slot.number);
            }
            send(batch, &self.socket)?;
        }
        Ok(())
    }

    /// Receives replies, and sends as many datagrams if there is time left.
    fn answer(
        &mut self,
        batch: &mut Batch,
        size: usize,
        tally: &mut Tally,
        end: Instant,
    ) -> Result<(), LoadError> {
        let limit = self.slots.len().min(BATCH);
        batch.receive(&self.socket, limit).map_err(LoadError::io("receive a reply"))?;
        let now = Instant::now();
        let mut wrong = None;
        batch.retain(|reply| match self.take(reply, size, now, tally) {
            Ok(Some(slot)) => self.reuse(slot, reply, now, now < end),
            Ok(None) => false,
            Err(error) => {
                wrong = Some(error);
                false
            }
        });
        match wrong {
            Some(wrong) => Err(wrong.into()),
            None => send(batch, &self.socket),
        }
    }

    /// Checks a reply; returns its slot, unless it has timed out.
    fn take(
        &mut self,
        reply: &[u8],
        size: usize,
        now: Instant,
        tally: &mut Tally,
    ) -> Result<Option<usize>, Wrong> {
        if reply.len() != size || size < HEADER {
            return Err(Wrong(format!("a reply of {} bytes to a datagram of {size}", reply.len())));
        }
        let number = message::number(reply);
        message::check(reply, service::ECHO, self.name, number)?;
        let window = self.slots.len() as u64;
        let index = usize::try_from(number % window).unwrap_or_default();
        let slot = &mut self.slots[index];
        if number == slot.number && slot.under_way {
            record(&mut tally.latencies, now - slot.sent);
            return Ok(Some(index));
        }
        // A datagram that has timed out counts as lost even if it still arrives. But one that has already
        // been answered is a duplicate.
        let given_up = number < slot.number || !slot.under_way;
        match given_up && tally.lost > 0 {
            true => Ok(None),
            false => Err(Wrong(format!("datagram {number} of flow {} came back twice", self.name))),
        }
    }

    /// Assigns the next datagram of a slot; returns whether to send it.
    fn reuse(&mut self, slot: usize, datagram: &mut [u8], now: Instant, more: bool) -> bool {
        let window = self.slots.len() as u64;
        let slot = &mut self.slots[slot];
        slot.under_way = more;
        if more {
            (slot.number, slot.sent) = (slot.number + window, now);
            message::write(datagram, service::ECHO, self.name, slot.number);
        }
        more
    }

    /// Times out datagrams, and sends new ones if `more` are to be sent. Returns the number of datagrams in
    /// flight.
    fn sweep(
        &mut self,
        batch: &mut Batch,
        size: usize,
        tally: &mut Tally,
        more: bool,
    ) -> Result<usize, LoadError> {
        let (now, window) = (Instant::now(), self.slots.len() as u64);
        let mut under_way = 0;
        batch.clear();
        for slot in self.slots.iter_mut().filter(|slot| slot.under_way) {
            if now - slot.sent >= LOST {
                tally.lost += 1;
                slot.number += window;
                (slot.sent, slot.under_way) = (now, more);
                if more {
                    message::write(batch.push(size), service::ECHO, self.name, slot.number);
                }
                if batch.iter().count() == BATCH {
                    send(batch, &self.socket)?;
                    batch.clear();
                }
            }
            under_way += usize::from(slot.under_way);
        }
        send(batch, &self.socket)?;
        Ok(under_way)
    }
}

fn send(batch: &mut Batch, socket: &UdpSocket) -> Result<(), LoadError> {
    // If sending fails, the datagram times out.
    batch.send(socket).map(drop).map_err(LoadError::io("send a datagram"))
}
