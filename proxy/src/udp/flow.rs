//! A flow: who it belongs to, and its socket towards the backend.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use arrayvec::ArrayVec;
use rproxy_sys::udp::{BATCH, LocalAddr, RecvBatch, Transmit, receive_trains, set_buffers};
use socket2::{Domain, SockRef, Socket, Type};

use super::payload::{Amount, Part, Payload};
use super::send::Backlog;
use super::table::FlowId;
use crate::service::{FlowPlace, Route};

/// Bytes that the kernel may queue for a flow: a burst of answers to one client, all the more while
/// that client's side is slower.
const RECEIVE_BUFFER: usize = 4 * 1024 * 1024;

/// Bytes that it may queue towards the backend.
const SEND_BUFFER: usize = 1024 * 1024;

/// What tells flows apart. docker-proxy looks at the client alone; but answers have to come from the
/// address that was asked, and a client may ask several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FlowKey {
    /// Which listener received it.
    pub(super) listener: u32,
    /// Who sent it, in the family of the listener's socket.
    pub(super) client: SocketAddr,
    /// Which of our addresses it was sent to, if the socket reports it.
    pub(super) local: Option<LocalAddr>,
}

impl FlowKey {
    pub(super) fn new(listener: u32, client: SocketAddr, local: Option<LocalAddr>) -> Self {
        Self { listener, client, local: local.map(forget_interface) }
    }
}

/// Answers take the route that the table gives, which need not be the way that the question came.
/// Only a link-local address means nothing without its interface.
fn forget_interface(local: LocalAddr) -> LocalAddr {
    match local.ip {
        IpAddr::V6(ip) if ip.is_unicast_link_local() => local,
        _ => LocalAddr { interface: 0, ..local },
    }
}

/// A flow's socket and what is known of its path.
#[derive(Debug)]
pub(super) struct Flow {
    /// Shared with whoever passes it on to another process.
    socket: Arc<OwnedFd>,
    /// Whether trains may be tried towards the backend.
    trains_in: bool,
    /// Whether trains may be tried towards the client.
    pub(super) trains_out: bool,
    /// Whether answers are left where they are until it is this flow's turn to use the listener.
    pub(super) is_waiting: bool,
    /// What waits for room on the socket.
    backlog: Backlog,
    _place: FlowPlace,
}

/// A flow on its way from one process to another, which is served by neither at the moment.
#[derive(Debug)]
pub(crate) struct LiveFlow {
    /// The number of its listener.
    pub(crate) listener: usize,
    /// Who sends to it.
    pub(crate) client: SocketAddr,
    /// Which of our addresses it sends to, if that is known.
    pub(crate) local: Option<LocalAddr>,
    /// Whether the client has gone on after an answer.
    pub(crate) is_established: bool,
    /// Connected to the backend.
    pub(crate) socket: Arc<OwnedFd>,
}

/// What a socket is watched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    /// Datagrams.
    pub(super) receive: bool,
    /// Room, because something waits.
    pub(super) send: bool,
}

impl Wanted {
    /// What a socket without a backlog is watched for.
    pub(super) const RECEIVE: Self = Self { receive: true, send: false };
}

impl Flow {
    /// Opens a socket that is connected to the backend of `route`.
    ///
    /// # Errors
    /// Those of socket(2) and connect(2); the latter if there is no route.
    pub(super) fn open(route: &Arc<Route>) -> io::Result<Self> {
        let addr = route.forward.backend.socket_addr();
        let socket = Socket::new(Domain::for_address(addr), Type::DGRAM.nonblocking(), None)?;
        // Neither is needed for a flow to work, only for it to work well.
        drop(set_buffers(socket.as_fd(), RECEIVE_BUFFER, SEND_BUFFER));
        drop(receive_trains(socket.as_fd()));
        socket.connect(&addr.into())?;
        Ok(Self::adopt(Arc::new(socket.into()), route))
    }

    /// Goes on with a flow whose socket is connected, to whatever backend.
    pub(super) fn adopt(socket: Arc<OwnedFd>, route: &Arc<Route>) -> Self {
        Self {
            socket,
            trains_in: true,
            trains_out: true,
            is_waiting: false,
            backlog: Backlog::default(),
            _place: FlowPlace::take(route),
        }
    }

    /// Its socket, to be passed on.
    pub(super) fn socket(&self) -> Arc<OwnedFd> {
        self.socket.clone()
    }

    /// Sends the datagrams in some slots of `batch` to the backend. Gives `true` if from now on
    /// some wait for room, which [`Self::wanted`] says too; adds to `amount` what they come to.
    pub(super) fn send(
        &mut self,
        batch: &RecvBatch,
        datagrams: &[(FlowId, usize)],
        amount: &mut Amount,
    ) -> bool {
        let mut payload = Payload::new();
        let mut parts: ArrayVec<Part, BATCH> = ArrayVec::new();
        *amount += payload.add(batch, datagrams, self.trains_in, &mut |part| parts.push(part));
        let messages: ArrayVec<Transmit<'_>, BATCH> =
            parts.iter().map(|part| part.message(&payload)).collect();
        let (waited, trains) = (!self.backlog.is_empty(), self.trains_in);
        let trains_in = &mut self.trains_in;
        self.backlog.send(self.socket.as_fd(), &messages, trains, &mut |_refused| *trains_in = false);
        !waited && !self.backlog.is_empty()
    }

    /// Sends what waits, as far as there is room.
    pub(super) fn flush(&mut self) {
        self.backlog.flush(self.socket.as_fd());
    }

    /// What its socket has to be watched for now.
    pub(super) fn wanted(&self) -> Wanted {
        Wanted { receive: !self.is_waiting, send: !self.backlog.is_empty() }
    }

    /// Takes the error of an earlier datagram off the socket. It tells nothing that the next one
    /// would not.
    pub(super) fn take_error(&self) {
        drop(SockRef::from(&self.socket).take_error());
    }
}

impl AsFd for Flow {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interface_matters_only_to_link_local_addresses() {
        let client = "[fe80::2]:1".parse().unwrap();
        let key = |ip: &str, interface| {
            FlowKey::new(0, client, Some(LocalAddr { ip: ip.parse().unwrap(), interface }))
        };
        assert_eq!(key("10.0.0.1", 1), key("10.0.0.1", 2));
        assert_eq!(key("2001:db8::1", 1), key("2001:db8::1", 2));
        assert_ne!(key("fe80::1", 1), key("fe80::1", 2));
    }
}
