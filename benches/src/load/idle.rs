//! Idle connections and flows.

use std::net::UdpSocket;

use super::rr::Connection;
use super::{GRACE, LoadError, Target, connect_one, in_threads, shares};
use crate::message::{self, service};

/// Bytes of the datagrams that open a flow.
const OPENING: usize = 64;

/// Connections that each thread opens before it waits for their first responses.
const AT_ONCE: usize = 50;

/// How often a datagram that opens a flow is sent.
const ATTEMPTS: u32 = 5;

/// Open connections, each of which has completed one request.
pub(crate) struct Idle(#[expect(dead_code, reason = "held open")] Vec<Vec<Connection>>);

impl Idle {
    /// Opens `count` connections.
    pub(crate) fn open(target: Target<'_>, count: usize) -> Result<Self, LoadError> {
        in_threads(shares(count, target.threads), |share| open_all(target, share.len())).map(Self)
    }
}

/// Opens connections in small groups, so that no accept queue overflows.
fn open_all(target: Target<'_>, count: usize) -> Result<Vec<Connection>, LoadError> {
    let mut open = Vec::with_capacity(count);
    while open.len() < count {
        let first = open.len();
        for _ in 0..AT_ONCE.min(count - first) {
            open.push(Connection::new(connect_one(target.address)?));
        }
        open[first..].iter_mut().try_for_each(Connection::exchange)?;
    }
    Ok(open)
}

/// Sockets, each of which has sent a datagram and received its reply.
pub(crate) struct IdleFlows(#[expect(dead_code, reason = "held open")] Vec<Vec<UdpSocket>>);

impl IdleFlows {
    /// Opens `count` flows.
    pub(crate) fn open(target: Target<'_>, count: usize) -> Result<Self, LoadError> {
        let open = |share: Vec<usize>| share.into_iter().map(|_| open_flow(target)).collect();
        in_threads(shares(count, target.threads), open).map(Self)
    }
}

fn open_flow(target: Target<'_>) -> Result<UdpSocket, LoadError> {
    let socket = super::udp_rr::socket(target.address)?;
    socket.set_read_timeout(Some(GRACE / ATTEMPTS)).map_err(LoadError::io("set a timeout"))?;
    let (mut datagram, mut reply) = ([0; OPENING], [0; OPENING + 1]);
    message::write(&mut datagram, service::ECHO, 0, 0);
    for _ in 0..ATTEMPTS {
        socket.send(&datagram).map_err(LoadError::io("send a datagram"))?;
        if let Ok(len) = socket.recv(&mut reply) {
            message::check(&reply[..len], service::ECHO, 0, 0)?;
            return Ok(socket);
        }
    }
    Err(LoadError::Stalled("a flow that was to be idle has no reply".into()))
}
