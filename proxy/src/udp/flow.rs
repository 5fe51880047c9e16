//! A flow: its socket towards the backend, and what is known of its path.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use rproxy_mapping::addr::wildcard_of;
use rproxy_mapping::dscp::Dscp;
use rproxy_sys::udp::{
    BATCH, RecvBatch, Transmit, discard, enable_gro, report_class_and_drops, set_buffers, source_towards,
};
use socket2::{Domain, SockRef, Socket, Type};

use super::client_socket::ClientSocket;
use super::local_ports::LocalPorts;
use super::payload::{Part, Payload};
use super::send::{Room, SendQueue};
use super::table::FlowId;
use super::tally::Tally;
use super::token::Wanted;
use crate::state::{FlowGuard, Target};

/// Ports that are tried for a flow until one is free.
const PORT_TRIES: usize = 32;

/// Bytes that it may queue towards the backend.
const SEND_BUFFER: usize = 1024 * 1024;

/// A flow's socket and what is known of its path.
#[derive(Debug)]
pub(super) struct Flow {
    /// Shared with whoever passes it on to another process.
    socket: Arc<OwnedFd>,
    /// Whether GSO batches may be tried towards the backend.
    gso_to_backend: bool,
    /// Whether GSO batches may be tried towards the client.
    pub(super) gso_to_client: bool,
    /// Whether answers are left where they are until it is this flow's turn to use the listener, or its client's
    /// socket has room.
    pub(super) is_waiting: bool,
    /// Whether another process has the socket open too, or is about to.
    pub(super) is_shared: bool,
    /// Its local port.
    pub(super) port: u16,
    /// Where its datagrams go, if its socket is not connected: answers come from any port of that address then.
    pub(super) peer: Option<SocketAddr>,
    /// How many answers the kernel has had no room for, as far as they are counted.
    pub(super) dropped: u32,
    /// How large answers were lately, in bytes: each of them, or each GSO batch.
    pub(super) usual_size: usize,
    /// The size that its receive buffer was set to.
    share: usize,
    /// Where answers go, if not by way of the listener.
    pub(super) client_socket: Option<Box<ClientSocket>>,
    /// Whether answers may wait on the queue of the listener, which those that follow must not overtake.
    pub(super) has_queued: bool,
    /// If its client has been what blocks.
    pub(super) blocked: Option<Blocked>,
    /// What waits for room on the socket.
    queue: SendQueue,
    guard: FlowGuard,
}

/// How long a flow does without a socket towards its client.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blocked {
    pub(super) until: Instant,
    pub(super) length: Duration,
}

impl Flow {
    /// Opens a socket on one of `ports` that is connected to the backend of `route`; or one that is not, if answers may
    /// come from any of the backend's ports. What waits for it shares `room`.
    ///
    /// # Errors
    /// Those of socket(2), bind(2) and connect(2); the last if there is no route.
    pub(super) fn open(
        target: &Arc<Target>,
        ports: &mut LocalPorts,
        room: &Arc<Room>,
        now: Instant,
    ) -> io::Result<Self> {
        let addr = target.port_mapping.backend.socket_addr();
        let socket = Socket::new(Domain::for_address(addr), Type::DGRAM.nonblocking(), None)?;
        let peer = target.policy.limits.udp_any_port.then_some(addr);
        // Else it is of any local address: connect(2) chooses that.
        let ip = if peer.is_some() { source_towards(addr)? } else { wildcard_of(addr.ip()) };
        let port = bind(&socket, ip, ports, now)?;
        if peer.is_none() {
            socket.connect(&addr.into())?;
        }
        ports.taken(port);
        // Neither is needed for a flow to work, only for it to work well.
        drop(enable_gro(socket.as_fd()));
        drop(report_class_and_drops(socket.as_fd(), addr.is_ipv6()));
        // What strangers sent before the socket was connected, and answers to whoever had the port before: nobody
        // has asked anything yet.
        discard(socket.as_fd());
        Ok(Self::adopt(Arc::new(socket.into()), peer, port, target, room))
    }

    /// Goes on with a flow whose socket is connected, or sends to `peer`, from this local port.
    pub(super) fn adopt(
        socket: Arc<OwnedFd>,
        peer: Option<SocketAddr>,
        port: u16,
        target: &Arc<Target>,
        room: &Arc<Room>,
    ) -> Self {
        Self {
            peer,
            dropped: 0,
            socket,
            gso_to_backend: true,
            gso_to_client: true,
            is_waiting: false,
            is_shared: false,
            port,
            usual_size: 0,
            share: 0,
            client_socket: None,
            has_queued: false,
            blocked: None,
            queue: SendQueue::new(room.clone()),
            guard: FlowGuard::take(target),
        }
    }

    /// Lets the kernel queue this many bytes for it.
    pub(super) fn set_share(&mut self, share: usize) {
        if share != self.share {
            self.share = share;
            // It is not needed for a flow to work, only for it to work well.
            drop(set_buffers(self.socket.as_fd(), share, SEND_BUFFER.min(share)));
        }
    }

    /// What it was opened for.
    pub(super) fn target(&self) -> &Arc<Target> {
        self.guard.target()
    }

    /// How many datagrams wait for room.
    pub(super) fn unsent(&self) -> usize {
        self.queue.len()
    }

    /// Its socket, to be passed on.
    pub(super) fn socket(&self) -> Arc<OwnedFd> {
        self.socket.clone()
    }

    /// Sends the datagrams in some slots of `batch` to the backend. Returns `true` if from now on
    /// some wait for room, which [`Self::wanted`] says too; adds to `tally` what becomes of them.
    pub(super) fn send(
        &mut self,
        batch: &RecvBatch,
        datagrams: &[(FlowId, usize)],
        dscp: Option<Dscp>,
        tally: &mut Tally,
    ) -> bool {
        let Self { socket, queue, gso_to_backend, peer, .. } = self;
        let mut payload = Payload::new(dscp);
        let parts = payload.add(batch, datagrams, *gso_to_backend, tally);
        send(socket.as_fd(), *peer, queue, gso_to_backend, (&payload, &parts), tally)
    }

    /// Sends the answers in some slots of `batch` by the socket towards the client, if there is one.
    pub(super) fn answer(
        &mut self,
        batch: &RecvBatch,
        datagrams: &[(FlowId, usize)],
        dscp: Option<Dscp>,
        tally: &mut Tally,
    ) {
        let Self { client_socket, gso_to_client, .. } = self;
        let Some(client) = client_socket else { return };
        client.was_used = true;
        let (socket, queue) = client.parts();
        let mut payload = Payload::new(dscp);
        let parts = payload.add(batch, datagrams, *gso_to_client, tally);
        send(socket, None, queue, gso_to_client, (&payload, &parts), tally);
    }

    /// Sends what waits, as far as there is room.
    pub(super) fn flush(&mut self, tally: &mut Tally) {
        self.queue.flush(self.socket.as_fd(), tally);
    }

    /// What its socket has to be watched for now.
    pub(super) fn wanted(&self) -> Wanted {
        Wanted { receive: !self.is_waiting, send: !self.queue.is_empty() }
    }

    /// Takes the error of an earlier datagram off the socket. It tells nothing that the next one
    /// would not.
    pub(super) fn take_error(&self, tally: &mut Tally) {
        if let Ok(Some(error)) = SockRef::from(&self.socket).take_error() {
            tally.lose(1, error);
        }
    }
}

/// Sends messages by a socket, behind what waits in `queue`; in GSO batches unless the path has refused one, which is
/// noted in `gso`. Returns `true` if from now on some wait for room.
fn send(
    socket: BorrowedFd<'_>,
    to: Option<SocketAddr>,
    queue: &mut SendQueue,
    gso: &mut bool,
    (payload, parts): (&Payload<'_>, &[Part]),
    tally: &mut Tally,
) -> bool {
    let messages: ArrayVec<Transmit<'_>, BATCH> =
        parts.iter().map(|part| part.message(payload, to)).collect();
    let (waited, joined) = (!queue.is_empty(), *gso);
    *gso &= queue.send(socket, &messages, joined, tally).is_empty();
    !waited && !queue.is_empty()
}

/// Binds `socket` to one of `ports` of `ip`.
fn bind(socket: &Socket, ip: IpAddr, ports: &mut LocalPorts, now: Instant) -> io::Result<u16> {
    let mut tried = 0;
    while tried < PORT_TRIES
        && let Some(port) = ports.candidate(now)
    {
        tried += 1;
        match socket.bind(&SocketAddr::new(ip, port).into()) {
            Ok(()) => return Ok(port),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => ports.others_have(),
            // Below `ip_unprivileged_port_start`.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => ports.forbidden(port),
            Err(error) => return Err(error),
        }
    }
    if tried == PORT_TRIES {
        ports.exhausted(now);
    }
    Err(io::Error::new(
        io::ErrorKind::AddrNotAvailable,
        "local ports are in use or were a moment ago (net.ipv4.ip_local_port_range; `ss -anp` shows by whom)",
    ))
}

impl AsFd for Flow {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
