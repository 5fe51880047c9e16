//! A flow: its socket towards the backend, and the properties of its path.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use rproxy_mapping::dscp::Dscp;
use rproxy_sys::udp::{BATCH, RecvBatch, Transmit, discard, enable_gro, report_class_and_drops, set_buffers};
use socket2::SockRef;

use super::client_socket::ClientSocket;
use super::key::FlowKey;
use super::local_ports::LocalPorts;
use super::payload::{Part, Payload};
use super::proxy_header::{FlowHeader, HeadedBatch, HeaderIn};
use super::routed::Routed;
use super::send::{QueueBudget, SendQueue};
use super::source::{self, AddrsInUse, TakenAddrs};
use super::table::FlowId;
use super::tally::{Amount, Tally, Towards};
use super::token::Wanted;
use crate::proxy_protocol::Endpoints;
use crate::state::record::{Ending, Traffic};
use crate::state::task::HeaderState;
use crate::state::{FlowGuard, Target};

/// The port of a flow that uses none of the local ports.
const NO_PORT: u16 = 0;

/// Send buffer size towards the backend, in bytes.
const SEND_BUFFER: usize = 1024 * 1024;

/// A flow's socket and the properties of its path.
#[derive(Debug)]
pub(super) struct Flow {
    /// Shared with the task that passes it to another process.
    socket: Arc<OwnedFd>,
    /// Whether to try GSO batches towards the backend.
    gso_to_backend: bool,
    /// Whether to try GSO batches towards the client.
    pub(super) gso_to_client: bool,
    /// Whether replies stay in the socket until it is this flow's turn to use the listener, or until the client socket
    /// is writable.
    pub(super) is_waiting: bool,
    /// Whether another process has the socket open, or is about to.
    pub(super) is_shared: bool,
    /// Its local port, if it is one of those that flows use in rotation; otherwise 0.
    pub(super) port: u16,
    /// The destination, if the socket is not connected; replies from any port of that address are accepted then.
    pub(super) peer: Option<SocketAddr>,
    /// The number of replies dropped by the kernel, as far as they are counted.
    pub(super) dropped: u32,
    /// The recent size of replies, or of GSO batches of replies, in bytes.
    pub(super) usual_size: usize,
    /// The size set for its receive buffer.
    share: usize,
    /// The client socket that replies are sent through, instead of the listener.
    pub(super) client_socket: Option<Box<ClientSocket>>,
    /// Whether replies may be in the listener's queue; later ones must not overtake them.
    pub(super) has_queued: bool,
    /// Set if the client has blocked.
    pub(super) blocked: Option<Blocked>,
    /// Whom a proxy in front has told its client is.
    pub(super) told: Option<Box<Endpoints>>,
    /// The header in datagrams to the backend, if it gets one.
    pub(super) header: Option<Box<FlowHeader>>,
    /// The client's address, if the socket has it.
    pub(super) client_addrs: Option<Box<TakenAddrs>>,
    /// Datagrams that wait until the socket is writable.
    queue: SendQueue,
    guard: FlowGuard,
}

/// Until when a flow gets no client socket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blocked {
    pub(super) until: Instant,
    pub(super) length: Duration,
}

impl Flow {
    /// Opens a socket for `client` that is connected to the backend of `target`; or unconnected, if replies from any
    /// port of the backend are accepted. It comes from where `target` says: the client's address, or that of the host and
    /// one of `ports`. Its queue uses the `budget`.
    ///
    /// # Errors
    /// The errors of socket(2), bind(2) and connect(2); the last without a route.
    pub(super) fn open(
        target: &Arc<Target>,
        client: SocketAddr,
        (ports, client_addrs): (&mut LocalPorts, &Arc<AddrsInUse>),
        budget: &Arc<QueueBudget>,
        now: Instant,
    ) -> io::Result<Self> {
        let addr = target.port_mapping.backend.socket_addr();
        let peer = target.policy.limits.udp_any_port.then_some(addr);
        let (socket, port, taken) = match source::open_as_client(target, client, client_addrs)? {
            // The port is one of the client's.
            Some((socket, taken)) => (socket, NO_PORT, taken),
            None => {
                let (socket, port) = source::open_as_asked(target, ports, now)?;
                (socket, port, None)
            }
        };
        // Both are optional and only improve performance.
        drop(enable_gro(socket.as_fd()));
        drop(report_class_and_drops(socket.as_fd(), addr.is_ipv6()));
        // Discards datagrams that others sent before the socket was connected, and replies to the previous user of the
        // port: this flow has sent nothing yet.
        discard(socket.as_fd());
        let flow = Self::adopt(Arc::new(socket.into()), peer, port, target, budget);
        Ok(Self { client_addrs: taken.map(Box::new), ..flow })
    }

    /// Creates a flow from a socket that is connected, or that sends to `peer`, with this local port.
    pub(super) fn adopt(
        socket: Arc<OwnedFd>,
        peer: Option<SocketAddr>,
        port: u16,
        target: &Arc<Target>,
        budget: &Arc<QueueBudget>,
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
            told: None,
            header: None,
            client_addrs: None,
            queue: SendQueue::new(budget.clone()),
            guard: FlowGuard::take(target),
        }
    }

    /// Sets the receive buffer to this many bytes.
    pub(super) fn set_share(&mut self, share: usize) {
        if share != self.share {
            self.share = share;
            // This is optional and only improves performance.
            drop(set_buffers(self.socket.as_fd(), share, SEND_BUFFER.min(share)));
        }
    }

    /// The target for which it was opened.
    pub(super) fn target(&self) -> &Arc<Target> {
        self.guard.target()
    }

    /// Behaves as after the path has refused a GSO batch.
    #[cfg(test)]
    pub(super) fn refuse_gso(&mut self) {
        self.gso_to_backend = false;
    }

    /// Whether its socket cannot send any more, while another one could; see [`source::is_stale`].
    pub(super) fn is_stale(&self) -> bool {
        source::is_stale(self.as_fd(), self.target(), self.port == NO_PORT)
    }

    /// The number of queued datagrams.
    pub(super) fn unsent(&self) -> usize {
        self.queue.len()
    }

    /// Its socket, to be passed to another process.
    pub(super) fn socket(&self) -> Arc<OwnedFd> {
        self.socket.clone()
    }

    /// Sends `datagrams` of `batch` to the backend, with a header if it gets one, and adds the results to `tally`. Returns
    /// `true` if it started to queue datagrams, which changes [`Self::wanted`].
    pub(super) fn send(
        &mut self,
        batch: &RecvBatch,
        datagrams: &[Routed],
        headed: &mut HeadedBatch,
        dscp: Option<Dscp>,
        tally: &mut Tally,
    ) -> bool {
        let before = tally.relayed;
        if self.header.as_deref().is_some_and(FlowHeader::is_awaited) {
            // An error that a send would meet, and retry, would come too late for what is sent.
            self.take_error(tally);
        }
        let queues = match self.header.as_deref().map_or(HeaderIn::None, FlowHeader::is_in) {
            HeaderIn::None => self.send_plain(batch, datagrams, dscp, tally),
            HeaderIn::All => self.send_headed(batch, datagrams, headed, dscp, tally),
            HeaderIn::First => self.send_first_headed(batch, datagrams, headed, dscp, tally),
        };
        self.record_relayed(Towards::Backend, before, tally);
        queues
    }

    /// Adds what `tally` counts as relayed since `before` to the record, if there is one.
    pub(super) fn record_relayed(&self, to: Towards, before: Amount, tally: &Tally) {
        let Some(record) = self.guard.record() else { return };
        let traffic = match to {
            Towards::Backend => &record.to_backend,
            Towards::Clients => &record.to_client,
        };
        add_relayed(traffic, before, tally);
    }

    /// Records how it ends.
    pub(super) fn record_end(&self, ending: Ending) {
        self.guard.record().iter().for_each(|record| record.end(ending));
    }

    /// The number of its record, if there is one.
    pub(super) fn record_id(&self) -> Option<u64> {
        self.guard.record().map(|record| record.id)
    }

    /// Sends each of `datagrams` with the header until the kernel takes one, and the others without.
    fn send_first_headed(
        &mut self,
        batch: &RecvBatch,
        datagrams: &[Routed],
        headed: &mut HeadedBatch,
        dscp: Option<Dscp>,
        tally: &mut Tally,
    ) -> bool {
        let (mut rest, mut queues) = (datagrams.iter().copied().collect::<ArrayVec<_, BATCH>>(), false);
        while let Some(first) = rest.first_mut() {
            let (one, others) = first.split_first(batch);
            match others {
                Some(others) => *first = others,
                None => drop(rest.remove(0)),
            }
            let before = (tally.relayed.datagrams, self.queue.len());
            queues |= self.send_headed(batch, &[one], headed, dscp, tally);
            if tally.relayed.datagrams > before.0 || self.queue.len() > before.1 {
                self.header.iter_mut().for_each(|header| header.set_state(HeaderState::Sent));
                // On this host, a refusal is there at once.
                self.take_error(tally);
            }
            if self.header.as_deref().is_none_or(|header| header.is_in() == HeaderIn::None) {
                break;
            }
        }
        self.send_plain(batch, &rest, dscp, tally) || queues
    }

    fn send_plain(
        &mut self,
        batch: &RecvBatch,
        datagrams: &[Routed],
        dscp: Option<Dscp>,
        tally: &mut Tally,
    ) -> bool {
        let Self { socket, queue, gso_to_backend, peer, .. } = self;
        let mut payload = Payload::new(dscp);
        let parts = payload.add(batch, datagrams, *gso_to_backend, tally);
        send(socket.as_fd(), (None, *peer), queue, gso_to_backend, (&payload, &parts), tally)
    }

    fn send_headed(
        &mut self,
        batch: &RecvBatch,
        datagrams: &[Routed],
        headed: &mut HeadedBatch,
        dscp: Option<Dscp>,
        tally: &mut Tally,
    ) -> bool {
        let Self { socket, queue, gso_to_backend, peer, header, .. } = self;
        let Some(header) = header else { return false };
        let (mut rest, mut queues) = (datagrams, false);
        while !rest.is_empty() {
            let count = headed.fill(batch, rest, header.bytes(), tally);
            rest = &rest[count..];
            let mut payload = Payload::new(dscp);
            let (parts, _chunks) = payload.add_chunks(headed.chunks(), *gso_to_backend, tally);
            queues |= send(socket.as_fd(), (None, *peer), queue, gso_to_backend, (&payload, &parts), tally);
        }
        queues
    }

    /// Sets the header for the backend, and whom a proxy in front has `told` the client of `key` is. The record is of that
    /// client.
    pub(super) fn speak_for(&mut self, key: &FlowKey, told: Option<&Endpoints>) {
        let mut asked = self.target().asked(key.local.map(|local| local.ip));
        if let (SocketAddr::V6(asked), Some(local)) = (&mut asked, key.local) {
            asked.set_scope_id(local.interface);
        }
        let asked = || asked;
        self.guard.record_as(told.map_or(key.client, Endpoints::source), asked);
        self.header = FlowHeader::of(key, told, self.target());
        self.told = told.map(|told| Box::new(*told));
    }

    /// Records that the backend has replied.
    pub(super) fn note_answer(&mut self) {
        if let Some(header) = &mut self.header {
            header.note_answer();
        }
    }

    /// Records that a datagram was lost with `error`.
    pub(super) fn note_lost(&mut self, error: &io::Error) {
        if let Some(header) = &mut self.header {
            header.note_lost(error);
        }
    }

    /// Sends replies of `batch` through the client socket, if there is one.
    pub(super) fn answer(
        &mut self,
        batch: &RecvBatch,
        datagrams: &[Routed],
        dscp: Option<Dscp>,
        tally: &mut Tally,
    ) {
        let before = tally.relayed;
        let Self { client_socket, gso_to_client, .. } = self;
        let Some(client) = client_socket else { return };
        client.was_used = true;
        let (socket, queue) = client.parts();
        let mut payload = Payload::new(dscp);
        let parts = payload.add(batch, datagrams, *gso_to_client, tally);
        self.guard.record().iter().for_each(|record| add_relayed(&record.to_client, before, tally));
        let flow = datagrams.first().map(|datagram| datagram.id);
        send(socket, (flow, None), queue, gso_to_client, (&payload, &parts), tally);
    }

    /// Sends queued datagrams, as far as the socket accepts them.
    pub(super) fn flush(&mut self, tally: &mut Tally) {
        let before = tally.relayed;
        self.queue.flush(self.socket.as_fd(), tally);
        self.record_relayed(Towards::Backend, before, tally);
    }

    /// The events to watch its socket for.
    pub(super) fn wanted(&self) -> Wanted {
        Wanted { receive: !self.is_waiting, send: !self.queue.is_empty() }
    }

    /// Clears the pending error of the socket, which is that of an earlier datagram, and counts it. A further error
    /// would give the same information.
    pub(super) fn take_error(&mut self, tally: &mut Tally) {
        if let Ok(Some(error)) = SockRef::from(&self.socket).take_error() {
            self.note_lost(&error);
            tally.lose(1, error);
        }
    }
}

/// Adds what `tally` counts as relayed since `before`.
fn add_relayed(traffic: &Traffic, before: Amount, tally: &Tally) {
    let mut relayed = tally.relayed;
    relayed -= before;
    if relayed.datagrams > 0 {
        traffic.add_datagrams(relayed.datagrams, relayed.bytes);
    }
}

/// Sends messages through a socket, after those in `queue`. Uses GSO batches until the path refuses one, which is
/// recorded in `gso`. Returns `true` if it started to queue datagrams.
fn send(
    socket: BorrowedFd<'_>,
    (flow, to): (Option<FlowId>, Option<SocketAddr>),
    queue: &mut SendQueue,
    gso: &mut bool,
    (payload, parts): (&Payload<'_>, &[Part]),
    tally: &mut Tally,
) -> bool {
    let messages: ArrayVec<Transmit<'_>, BATCH> =
        parts.iter().map(|part| part.message(payload, to)).collect();
    let (waited, joined) = (!queue.is_empty(), *gso);
    *gso &= queue.send(socket, &messages, joined, |_index| flow, tally).is_empty();
    !waited && !queue.is_empty()
}

impl AsFd for Flow {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use rproxy_mapping::PortMapping;
    use rproxy_mapping::addr::Protocol;

    use super::*;
    use crate::state::MappingPolicy;

    /// A flow whose backend is the returned socket.
    fn flow() -> (Flow, UdpSocket) {
        let [socket, backend] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        let addr = backend.local_addr().unwrap();
        socket.connect(addr).unwrap();
        let backend_addr = addr.to_string().parse().unwrap();
        let host = "127.0.0.1:53".parse().unwrap();
        let port_mapping =
            PortMapping { protocol: Protocol::Udp, host, backend: backend_addr, v6only: false };
        let policy = Arc::new(MappingPolicy { limits: Arc::default(), state: Arc::default() });
        let target = Arc::new(Target::new(port_mapping, policy));
        (Flow::adopt(Arc::new(socket.into()), None, 0, &target, &Arc::default()), backend)
    }

    #[test]
    fn the_buffers_of_a_flow_follow_its_share() {
        let (mut flow, _backend) = flow();
        let size = |flow: &Flow| SockRef::from(flow).recv_buffer_size().unwrap();
        for share in [64 * 1024, 32 * 1024] {
            flow.set_share(share);
            // The kernel doubles it (socket(7)).
            assert_eq!(size(&flow), 2 * share);
        }
        SockRef::from(&flow).set_recv_buffer_size(8 * 1024).unwrap();
        flow.set_share(32 * 1024);
        assert_eq!(size(&flow), 16 * 1024, "the share is the same");
    }
}
