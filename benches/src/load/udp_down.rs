//! A download in datagrams, as QUIC has it: the backend sends in GSO batches, the client receives with GRO.
//!
//! The client grants what the backend may send: up to [`WINDOW`] datagrams beyond the last that has arrived, in steps of a
//! GSO batch, as a QUIC client acknowledges a few packets at a time. So a peer that is slower than the backend slows it down
//! instead of being flooded, as congestion control would, and what it loses is what it cannot hold of one window. The
//! window is fixed: one that adapts to loss would measure the adaptation, which the workloads of QUIC do. Nothing is sent
//! again. When nothing arrives, the rest of the window counts as lost, and the client grants another one.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use super::udp_bulk::name;
use super::udp_rr::socket;
use super::{GRACE, LoadError, Target, measure, shares};
use crate::batch::BATCH;
use crate::gro::{self, Receiver};
use crate::message::{self, HEADER, service};
use crate::metric::{Metric, Unit, Values};
use crate::pattern::Wrong;
use crate::sock::{Events, Interest, Poll};

/// Bytes of a datagram: a packet of QUIC on a path of 1,500 bytes, with room for a tunnel.
pub(crate) const SIZE: usize = 1400;

/// Datagrams that a flow may have in flight: four GSO batches of 45 kB, so that one is sent while others are under way.
pub(crate) const WINDOW: u64 = 4 * BATCH as u64;

/// A silence after which what is in flight counts as lost, as long as the probe timeout of QUIC on a short path with its
/// default delay of acknowledgements (RFC 9002, section 6.2.1).
const SILENCE: Duration = Duration::from_millis(30);

/// Batches that are received from one flow before others are serviced.
const TURN: usize = 16;

/// How often the backend is asked for its count.
const ASK: Duration = Duration::from_millis(300);

/// Measures how much arrives in `flows` flows, and how much of what was sent does not.
pub(crate) fn udp_down(target: Target<'_>, flows: usize) -> Result<Values, LoadError> {
    let drivers = shares(flows, target.threads).into_iter().map(|share| Driver::new(target, &share));
    let drivers = drivers.collect::<Result<Vec<_>, _>>()?;
    let (mut drivers, span) = measure(target, drivers, |driver| driver.run(target.duration))?;
    let mut flows: Vec<_> = drivers.iter_mut().flat_map(|driver| &mut driver.flows).collect();
    let arrived: u64 = flows.iter().map(|flow| flow.arrived).sum();
    let (mut sent, mut lost) = (0, 0);
    for flow in &mut flows {
        let sent_here = flow.finish()?;
        sent += sent_here;
        lost += sent_here - flow.arrived;
    }
    let bytes = arrived * SIZE as u64;
    let mut values = vec![(Metric::Throughput, span.rate(bytes) * 8.0 / 1e9)];
    values.extend(span.costs(Unit::Gb, bytes as f64 / 1e9));
    values.push((Metric::Loss, lost as f64 * 100.0 / sent.max(1) as f64));
    Ok(values)
}

/// A thread's share of the flows.
struct Driver {
    flows: Vec<Flow>,
    poll: Poll,
}

struct Flow {
    socket: UdpSocket,
    name: u32,
    /// The backend may send the datagrams below this number.
    limit: u64,
    seen: Seen,
    arrived: u64,
    /// When something was received or granted last.
    heard: Instant,
    /// How many the backend says that it has sent.
    sent: Option<u64>,
}

impl Driver {
    fn new(target: Target<'_>, share: &[usize]) -> Result<Self, LoadError> {
        let poll = Poll::new().map_err(LoadError::io("create an epoll instance"))?;
        let mut flows = Vec::new();
        for (token, index) in share.iter().enumerate() {
            let flow = Flow::new(socket(target.address)?, name(*index))?;
            poll.add(&flow.socket, Interest::EPOLLIN, token).map_err(LoadError::io("watch a flow"))?;
            flows.push(flow);
        }
        Ok(Self { flows, poll })
    }

    fn run(mut self, duration: Duration) -> Result<Self, LoadError> {
        let (mut events, mut receiver) = (Events::new(), Receiver::new());
        let end = Instant::now() + duration;
        for flow in &mut self.flows {
            flow.grant(WINDOW)?;
        }
        while Instant::now() < end {
            let ready = self.poll.wait(&mut events, SILENCE).map_err(LoadError::io("wait for events"))?;
            for (token, _readiness) in ready {
                self.flows[token].receive(&mut receiver)?;
            }
            for flow in &mut self.flows {
                if flow.heard.elapsed() >= SILENCE {
                    flow.grant(flow.limit + WINDOW)?;
                }
            }
        }
        Ok(self)
    }
}

impl Flow {
    fn new(socket: UdpSocket, name: u32) -> Result<Self, LoadError> {
        socket.set_nonblocking(true).map_err(LoadError::io("set a UDP socket up"))?;
        gro::enable(&socket).map_err(LoadError::io("set UDP_GRO"))?;
        let heard = Instant::now();
        Ok(Self { socket, name, limit: 0, seen: Seen::default(), arrived: 0, heard, sent: None })
    }

    /// Lets the backend send the datagrams below `limit`.
    fn grant(&mut self, limit: u64) -> Result<(), LoadError> {
        (self.limit, self.heard) = (limit, Instant::now());
        self.send(service::PULL, limit)
    }

    fn send(&self, service: u8, number: u64) -> Result<(), LoadError> {
        let mut datagram = [0; HEADER];
        message::write(&mut datagram, service, self.name, number);
        self.socket.send(&datagram).map(drop).map_err(LoadError::io("send a datagram"))
    }

    /// Takes what has arrived, and grants as much if that is a GSO batch.
    fn receive(&mut self, receiver: &mut Receiver) -> Result<(), LoadError> {
        for _ in 0..TURN {
            if !self.take_batch(receiver)? {
                break;
            }
        }
        let limit = self.seen.next + WINDOW;
        if limit >= self.limit + BATCH as u64 { self.grant(limit) } else { Ok(()) }
    }

    /// Returns whether there was anything.
    fn take_batch(&mut self, receiver: &mut Receiver) -> Result<bool, LoadError> {
        let received = receiver.receive(&self.socket).map_err(LoadError::io("receive a datagram"))?;
        let Some(mut datagrams) = received else { return Ok(false) };
        self.heard = Instant::now();
        datagrams.try_for_each(|datagram| self.take(datagram))?;
        Ok(true)
    }

    fn take(&mut self, datagram: &[u8]) -> Result<(), Wrong> {
        if datagram.len() == HEADER {
            let count = message::number(datagram);
            message::check(datagram, service::COUNT, self.name, count)?;
            self.sent = Some(count);
            return Ok(());
        }
        if datagram.len() != SIZE {
            return Err(Wrong(format!("a datagram of {} bytes instead of {SIZE}", datagram.len())));
        }
        let number = message::number(datagram);
        message::check(datagram, service::PULL, self.name, number)?;
        if number >= self.limit {
            return Err(Wrong(format!("datagram {number} of flow {} was not asked for", self.name)));
        }
        if !self.seen.insert(number) {
            return Err(Wrong(format!("datagram {number} of flow {} came twice", self.name)));
        }
        self.arrived += 1;
        Ok(())
    }

    /// Asks the backend how many datagrams it has sent; its answer is queued behind them, which are received meanwhile.
    fn finish(&mut self) -> Result<u64, LoadError> {
        let set_up = LoadError::io("set a UDP socket up");
        self.socket.set_nonblocking(false).map_err(&set_up)?;
        self.socket.set_read_timeout(Some(ASK)).map_err(&set_up)?;
        let (mut receiver, deadline) = (Receiver::new(), Instant::now() + GRACE);
        let mut next_question = Instant::now();
        while Instant::now() < deadline {
            if Instant::now() >= next_question {
                next_question = Instant::now() + ASK;
                self.send(service::COUNT, 0)?;
            }
            self.take_batch(&mut receiver)?;
            match self.sent {
                Some(sent) if sent < self.arrived => {
                    let arrived = self.arrived;
                    return Err(Wrong(format!("{arrived} datagrams arrived of {sent} that were sent")).into());
                }
                Some(sent) => return Ok(sent),
                None => {}
            }
        }
        Err(LoadError::Stalled("the backend does not say what it has sent".into()))
    }
}

/// The numbers that have arrived: the last 128 exactly, like the anti-replay window of IPsec (RFC 4303, section 3.4.3).
#[derive(Debug, Default)]
struct Seen {
    /// One more than the highest.
    next: u64,
    /// Bit `i` is set if `next - 1 - i` has arrived.
    last: u128,
}

impl Seen {
    /// Returns false if it is known to have arrived before.
    fn insert(&mut self, number: u64) -> bool {
        let Some(age) = self.next.checked_sub(number + 1) else {
            let ahead = u32::try_from(number + 1 - self.next).unwrap_or(u32::MAX);
            (self.next, self.last) = (number + 1, self.last.checked_shl(ahead).unwrap_or(0) | 1);
            return true;
        };
        let bit = u32::try_from(age).ok().and_then(|age| 1_u128.checked_shl(age)).unwrap_or(0);
        let new = self.last & bit == 0;
        self.last |= bit;
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_new_once() {
        let mut seen = Seen::default();
        for number in [0, 1, 5, 3, 132] {
            assert!(seen.insert(number), "{number}");
        }
        for number in [132, 5] {
            assert!(!seen.insert(number), "{number}");
        }
        assert!(seen.insert(131));
        assert!(seen.insert(4), "too old to be known");
        assert!(seen.insert(1000));
        assert!(!seen.insert(1000));
        assert_eq!(seen.next, 1001);
    }

    /// A flow that has been granted a window by nobody who answers, and its other end.
    fn flow() -> (Flow, UdpSocket) {
        let other = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut flow = Flow::new(socket(other.local_addr().unwrap()).unwrap(), 7).unwrap();
        flow.grant(WINDOW).unwrap();
        (flow, other)
    }

    fn datagram(service: u8, name: u32, number: u64, len: usize) -> Vec<u8> {
        let mut datagram = vec![0; len];
        message::write(&mut datagram, service, name, number);
        datagram
    }

    #[test]
    fn only_what_was_asked_for_passes() {
        let (mut flow, _other) = flow();
        flow.take(&datagram(service::PULL, 7, 0, SIZE)).unwrap();
        for (wrong, why) in [
            (datagram(service::PULL, 7, 0, SIZE), "came twice"),
            (datagram(service::PULL, 7, WINDOW, SIZE), "was not asked for"),
            (datagram(service::PULL, 8, 1, SIZE), "is not number 1 of flow 7"),
            (datagram(service::PULL, 7, 1, SIZE - 1), "of 1399 bytes"),
            (datagram(service::PULL, 7, 1, HEADER), "is not number 1 of flow 7"),
            (Vec::new(), "of 0 bytes"),
        ] {
            let error = flow.take(&wrong).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        assert_eq!(flow.arrived, 1);
    }

    #[test]
    fn more_is_granted_for_each_batch() {
        let (mut flow, other) = flow();
        let (mut receiver, address) = (Receiver::new(), flow.socket.local_addr().unwrap());
        other.connect(("127.0.0.1", address.port())).unwrap();
        for number in 0..BATCH as u64 {
            assert_eq!(flow.limit, WINDOW);
            other.send(&datagram(service::PULL, 7, number, SIZE)).unwrap();
            flow.receive(&mut receiver).unwrap();
        }
        assert_eq!((flow.limit, flow.arrived), (WINDOW + BATCH as u64, BATCH as u64));
    }

    #[test]
    fn a_count_below_what_arrived_is_wrong() {
        let (mut flow, other) = flow();
        other.connect(("127.0.0.1", flow.socket.local_addr().unwrap().port())).unwrap();
        other.send(&datagram(service::PULL, 7, 0, SIZE)).unwrap();
        other.send(&datagram(service::COUNT, 7, 0, HEADER)).unwrap();
        let error = flow.finish().unwrap_err();
        assert!(error.is_wrong(), "{error}");
    }
}
