//! Tests of the whole relay in this process. The test executes each turn, so that nothing depends on time, and a socket
//! that epoll would report forever is detected.

use std::net::{Ipv4Addr, Shutdown, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::EpollFlags;
use rproxy_mapping::PortMapping;
use rproxy_mapping::access::parse_network;
use rproxy_mapping::addr::Protocol;
use rproxy_mapping::limits::Limits;
use rproxy_sys::udp::enable_gro;
use socket2::SockRef;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::*;
use crate::runtime::new_runtime;
use crate::runtime::poll::{PollSet, WatchedListener};
use crate::runtime::worker::Workers;
use crate::state::record::Ending;
use crate::state::stats::{FailureKind, Stats};
use crate::state::task::{Command, Detached, FlowCommand, HeaderState, LiveFlow, LiveFlows};
use crate::state::{Binding, MappingPolicy, Target};
use crate::udp::table::{FlowId, Side};
use crate::udp::tally::Towards;
use crate::udp::token::{Wanted, event};

mod congestion;
mod handover;
mod losses;
mod proxy_header;

/// Without it, an event that does not happen would block the test.
const PATIENCE: Duration = Duration::from_secs(10);

/// Maximum number of socket events, many more than any test takes: an event that is not handled repeats forever.
const MOST_REPORTS: usize = 10_000;

/// A relay with one listener, and a backend controlled by the test.
struct Scene {
    set: PollSet,
    relay: UdpRelay,
    events: Events,
    port: Arc<WatchedListener>,
    target: Arc<Target>,
    /// The address to which clients send.
    front: SocketAddr,
    backend: UdpSocket,
    _commands: mpsc::UnboundedSender<Command>,
    runtime: Runtime,
}

fn socket() -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket
}

fn address(socket: &UdpSocket) -> SocketAddr {
    socket.local_addr().unwrap()
}

impl Scene {
    fn new(limits: Limits) -> Self {
        let runtime = new_runtime().unwrap();
        let entered = runtime.enter();
        let set = PollSet::new().unwrap();
        let (commands, receiver) = mpsc::unbounded_channel();
        let source = EventSource::new(set.clone()).unwrap();
        let workers = Arc::new(Workers::new(runtime.handle().clone()));
        let shared = Arc::new(Shared::of_this_host(false, false));
        let relay = UdpRelay::new(source, receiver, shared, workers);
        drop(entered);
        let (listener, backend) = (socket(), socket());
        // As real ones do.
        enable_gro(listener.as_fd()).unwrap();
        let front = address(&listener);
        let (host, to) = (front.to_string().parse().unwrap(), address(&backend).to_string().parse().unwrap());
        let port_mapping = PortMapping { protocol: Protocol::Udp, host, backend: to, v6only: false };
        let policy = Arc::new(MappingPolicy { limits: limits.into(), state: Arc::default() });
        let target = Arc::new(Target::new(port_mapping, policy));
        let port = Arc::new(set.add(listener).unwrap());
        let events = Events::new();
        let mut scene = Self {
            set,
            relay,
            events,
            port: port.clone(),
            target: target.clone(),
            front,
            backend,
            _commands: commands,
            runtime,
        };
        scene.serve_port(&port, &target);
        scene
    }

    /// Applies a binding to a listener.
    fn serve_port(&mut self, port: &Arc<WatchedListener>, target: &Arc<Target>) {
        let binding = Binding { port: port.clone(), target: target.clone() };
        self.relay.handle(Command::Serve(vec![binding]));
        port.watch(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP).unwrap();
    }

    fn stats(&self) -> &Stats {
        &self.target.policy.state.stats
    }

    fn failures(&self, kind: FailureKind) -> u64 {
        self.stats().failure_kind(kind)
    }

    /// A client that sends to the listener.
    fn client(&self) -> UdpSocket {
        let client = socket();
        client.connect(self.front).unwrap();
        client
    }

    /// The flow of `client`.
    fn flow(&self, client: &UdpSocket) -> Option<FlowId> {
        self.relay.table.find(&FlowKey::new(self.port.number(), address(client), None))
    }

    /// Serves the reported sockets until `done`.
    #[track_caller]
    fn serve_until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        for _ in 0..MOST_REPORTS {
            if done(self) {
                return;
            }
            let report = async { timeout(PATIENCE, self.relay.poll.wait(self.events.room())).await };
            let count = self.runtime.block_on(report);
            self.serve(count.unwrap_or_else(|_late| panic!("nothing is reported until {what}")).unwrap());
        }
        panic!("not after {MOST_REPORTS} reports: {what}");
    }

    /// Serves the reported sockets until there are no more events.
    #[track_caller]
    fn settle(&mut self) {
        for _ in 0..MOST_REPORTS {
            match self.relay.poll.look(self.events.room()) {
                Ok(count) => self.serve(count),
                Err(_nothing) => return,
            }
        }
        panic!("something is reported for ever");
    }

    fn serve(&mut self, count: usize) {
        self.events.refill(count);
        while !self.events.is_over() {
            self.relay.serve(&mut self.events);
        }
        self.relay.maintain();
    }

    /// Waits until the backend has received a datagram; returns it and its flow.
    #[track_caller]
    fn at_backend(&mut self) -> (Vec<u8>, SocketAddr) {
        let mut buffer = [0; 2000];
        let mut received = None;
        self.serve_until("a datagram is at the backend", |scene| {
            received = scene.backend.recv_from(&mut buffer).ok();
            received.is_some()
        });
        let (len, from) = received.unwrap();
        (buffer[..len].to_vec(), from)
    }

    /// Waits until a client has received a datagram.
    #[track_caller]
    fn at_client(&mut self, client: &UdpSocket) -> Vec<u8> {
        let mut buffer = [0; 2000];
        let mut len = None;
        self.serve_until("a datagram is at the client", |_scene| {
            len = client.recv(&mut buffer).ok();
            len.is_some()
        });
        buffer[..len.unwrap()].to_vec()
    }

    /// Opens a flow of `client` whose backend is the returned socket. Its buffers can fill up, unlike those of
    /// loopback.
    fn flow_to_reader(&mut self, client: &UdpSocket) -> (FlowId, UnixDatagram) {
        let (socket, backend) = UnixDatagram::pair().unwrap();
        SockRef::from(&socket).set_send_buffer_size(8 * 1024).unwrap();
        for end in [&socket, &backend] {
            end.set_nonblocking(true).unwrap();
        }
        let (relay, now) = (&mut self.relay, Instant::now());
        let flow =
            Flow::adopt(Arc::new(OwnedFd::from(socket)), None, 0, &self.target, &relay.capacity.budget);
        let mapping = crate::udp::flows::mapping_of(&self.target);
        let bounds = relay.capacity.bounds(mapping, &self.target.policy.limits, relay.table.len(), now);
        let id = relay.table.next_id();
        relay.poll.epoll().add(&flow, event(Token::Flow(id), Wanted::RECEIVE)).unwrap();
        let key = FlowKey::new(self.port.number(), address(client), None);
        relay.table.insert(key, (&bounds, address(client).ip()), flow, now);
        (id, backend)
    }

    fn unsent(&self, id: FlowId) -> usize {
        self.relay.table.get(id).unwrap().1.unsent()
    }

    /// The numbers of datagrams sent to the backend and of those queued for a flow.
    fn sent_and_unsent(&self, id: FlowId) -> usize {
        usize::try_from(self.stats().datagrams_in.get()).unwrap() + self.unsent(id)
    }
}

#[test]
fn datagrams_go_both_ways_and_are_counted() {
    let mut scene = Scene::new(Limits::default());
    let client = scene.client();
    client.send(b"question").unwrap();
    let (question, flow) = scene.at_backend();
    assert_eq!(question, b"question");
    scene.backend.send_to(b"an answer", flow).unwrap();
    assert_eq!(scene.at_client(&client), b"an answer");
    scene.settle();
    let stats = scene.stats();
    assert_eq!([stats.datagrams_in.get(), stats.bytes_in()], [1, 8]);
    assert_eq!([stats.datagrams_out.get(), stats.bytes_out()], [1, 9]);
    assert_eq!([stats.flows.get(), stats.flows_total.get()], [1, 1]);
    assert!(scene.relay.slot.is_some() && scene.relay.capacity.shared.flows() > 0);
    assert!(FailureKind::ALL.iter().all(|kind| scene.failures(*kind) == 0));
}

#[test]
fn what_waits_for_a_backend_leaves_once_that_reads() {
    let mut scene = Scene::new(Limits::default());
    let client = scene.client();
    let (id, backend) = scene.flow_to_reader(&client);
    let (mut sent, mut received) = (0, 0);
    for _round in 0..3 {
        while scene.unsent(id) < 3 {
            sent += 1;
            // Datagrams that increase in size are not grouped.
            client.send(&vec![7; 1000 + sent]).unwrap();
            scene.serve_until("it has left, or waits", |scene| scene.sent_and_unsent(id) == sent);
        }
        // Nothing is done while the backend does not read.
        scene.settle();
        assert!(scene.unsent(id) >= 3);
        scene.serve_until("all are at the backend", |_scene| {
            while let Ok(len) = backend.recv(&mut [0; 2000]) {
                received += 1;
                assert_eq!(len, 1000 + received, "they are in order");
            }
            received == sent
        });
        assert_eq!(scene.unsent(id), 0);
        // The socket is not watched for writability any more.
        scene.settle();
    }
    assert_eq!(scene.stats().datagrams_in.get(), sent as u64);
}

#[test]
fn answers_come_while_a_backend_does_not_read() {
    let mut scene = Scene::new(Limits::default());
    let client = scene.client();
    let (id, backend) = scene.flow_to_reader(&client);
    let mut size = 1000;
    while scene.unsent(id) == 0 {
        size += 1;
        client.send(&vec![7; size]).unwrap();
        scene.serve_until("it is taken", |scene| scene.sent_and_unsent(id) == size - 1000);
    }
    backend.send(b"an answer").unwrap();
    assert_eq!(scene.at_client(&client), b"an answer");
    assert!(scene.unsent(id) > 0);
}

#[test]
fn an_error_of_an_earlier_datagram_is_counted_and_costs_no_other() {
    let mut scene = Scene::new(Limits::default());
    let client = scene.client();
    let backend = address(&scene.backend);
    scene.backend = socket();
    client.send(b"to nobody").unwrap();
    scene.serve_until("that is known", |scene| scene.failures(FailureKind::DatagramRefused) == 1);
    scene.settle();
    assert_eq!(scene.failures(FailureKind::DatagramRefused), 1, "once");
    scene.backend = UdpSocket::bind(backend).unwrap();
    scene.backend.set_nonblocking(true).unwrap();
    client.send(b"again").unwrap();
    assert_eq!(scene.at_backend().0, b"again");
}

#[test]
fn an_error_is_counted_on_its_way_and_nothing_is_when_there_is_none() {
    let scene = Scene::new(Limits::default());
    let number = scene.port.number();
    scene.relay.note_error(number, io::ErrorKind::WouldBlock.into(), Towards::Clients);
    assert_eq!(scene.failures(FailureKind::DatagramRefused), 0);
    scene.relay.note_error(number, io::Error::from_raw_os_error(nix::libc::EHOSTUNREACH), Towards::Clients);
    assert_eq!(scene.failures(FailureKind::DatagramRefused), 1);
}

#[test]
fn flows_are_handed_over_as_they_are() {
    let mut scene = Scene::new(Limits::default());
    let [established, new] = [scene.client(), scene.client()];
    for client in [&established, &new] {
        client.send(b"hello").unwrap();
        scene.at_backend();
    }
    let id = scene.flow(&established).unwrap();
    scene.relay.table.establish(id, Instant::now());
    let LiveFlows { flows, .. } = scene.relay.pause();
    let of = |client: &UdpSocket| {
        let known: Vec<_> = flows.iter().filter(|flow| flow.client == address(client)).collect();
        assert_eq!(known.len(), 1);
        known[0].is_established
    };
    assert_eq!([of(&established), of(&new)], [true, false]);

    // While paused, datagrams stay in the kernel; afterwards everything is as before.
    established.send(b"meanwhile").unwrap();
    scene.settle();
    assert!(scene.backend.recv(&mut [0; 20]).is_err());
    scene.relay.resume();
    let (bytes, flow) = scene.at_backend();
    assert_eq!(bytes, b"meanwhile");
    scene.backend.send_to(b"an answer", flow).unwrap();
    assert_eq!(scene.at_client(&established), b"an answer");
}

#[test]
fn flows_are_taken_over_as_they_are() {
    let mut scene = Scene::new(Limits::default());
    let number = scene.port.number();
    let clients = [scene.client(), scene.client()];
    let mut sockets = Vec::new();
    let flows = clients.iter().zip([true, false]).map(|(client, is_established)| {
        let socket = socket();
        socket.connect(address(&scene.backend)).unwrap();
        sockets.push(socket.local_addr().unwrap());
        let (client, socket) = (address(client), Arc::new(socket.into()));
        LiveFlow {
            listener: number,
            client,
            local: None,
            told: None,
            header: HeaderState::default(),
            is_established,
            peer: None,
            dropped: 3,
            socket,
        }
    });
    let flows = LiveFlows { flows: flows.collect(), dropped: vec![(number, 7)], ports: None };
    scene.relay.adopt(flows);
    for ((client, socket), is_established) in clients.iter().zip(sockets).zip([true, false]) {
        let id = scene.flow(client).unwrap();
        assert_eq!(scene.relay.table.is_established(id), is_established);
        let (_key, flow) = scene.relay.table.get(id).unwrap();
        assert_eq!((flow.dropped, flow.port), (3, socket.port()));
        client.send(b"goes on").unwrap();
        assert_eq!(scene.at_backend(), (b"goes on".to_vec(), socket));
        scene.backend.send_to(b"an answer", socket).unwrap();
        assert_eq!(scene.at_client(client), b"an answer");
    }
    assert_eq!(scene.relay.listeners[number].dropped, 7);
    assert_eq!(scene.stats().flows_total.get(), 2, "no other flow was opened");
}

#[test]
fn a_flow_that_leads_elsewhere_is_not_taken_over() {
    let mut scene = Scene::new(Limits::default());
    let (client, other) = (scene.client(), socket());
    let socket = socket();
    socket.connect(address(&other)).unwrap();
    let listener = scene.port.number();
    let (client_addr, socket) = (address(&client), Arc::new(socket.into()));
    let flow = LiveFlow {
        listener,
        client: client_addr,
        local: None,
        told: None,
        header: HeaderState::default(),
        is_established: true,
        peer: None,
        dropped: 0,
        socket,
    };
    scene.relay.adopt(LiveFlows { flows: vec![flow], ..LiveFlows::default() });
    assert!(scene.flow(&client).is_none());
    client.send(b"hello").unwrap();
    assert_eq!(scene.at_backend().0, b"hello");
}

#[test]
fn answers_of_any_port_are_those_of_the_backend() {
    let mut scene = Scene::new(Limits { udp_any_port: true, ..Limits::default() });
    let client = scene.client();
    client.send(b"read").unwrap();
    let (_question, flow) = scene.at_backend();
    let transfer = socket();
    transfer.send_to(b"first block", flow).unwrap();
    assert_eq!(scene.at_client(&client), b"first block");
    client.send(b"acknowledged").unwrap();
    let mut received = None;
    scene.serve_until("it goes on there", |_scene| {
        received = transfer.recv(&mut [0; 20]).ok();
        received.is_some()
    });
    let stranger = UdpSocket::bind("127.0.0.2:0").unwrap();
    stranger.send_to(b"forged", flow).unwrap();
    scene.serve_until("it is dropped", |scene| scene.failures(FailureKind::Forged) == 1);
    assert!(client.recv(&mut [0; 20]).is_err());
}

#[test]
fn a_flow_ends_when_its_time_is_over() {
    let mut scene = Scene::new(Limits { udp_timeout: Duration::from_secs(60), ..Limits::default() });
    let client = scene.client();
    client.send(b"hello").unwrap();
    scene.at_backend();
    let id = scene.flow(&client).unwrap();
    let start = Instant::now();
    assert!(scene.relay.has_deadline());
    assert!(scene.relay.next_deadline() > start + Duration::from_secs(50));
    scene.relay.end_some(start + Duration::from_secs(59));
    assert!(scene.relay.table.get(id).is_some());
    // The replies of a waiting flow have not been read.
    scene.relay.table.get_mut(id).unwrap().1.is_waiting = true;
    scene.relay.end_some(start + Duration::from_secs(61));
    assert!(scene.relay.table.get(id).is_some());
    scene.relay.table.get_mut(id).unwrap().1.is_waiting = false;
    scene.relay.end_some(start + Duration::from_secs(120));
    assert!(scene.relay.table.get(id).is_some(), "its time began again");
    scene.relay.end_some(start + Duration::from_secs(122));
    assert!(scene.relay.table.get(id).is_none());
    assert_eq!(scene.stats().flows.get(), 0, "its socket is closed");
    scene.relay.maintain();
    assert!(scene.relay.slot.is_none() && scene.relay.capacity.shared.flows() == 0);
}

#[test]
fn a_flow_is_not_over_while_there_is_traffic() {
    let mut scene = Scene::new(Limits::default());
    let client = scene.client();
    client.send(b"hello").unwrap();
    let (_bytes, flow) = scene.at_backend();
    let id = scene.flow(&client).unwrap();
    assert!(!scene.relay.table.is_established(id));
    scene.backend.send_to(b"an answer", flow).unwrap();
    scene.at_client(&client);
    scene.relay.table.touch(id, Side::Client, Instant::now());
    assert!(scene.relay.table.is_established(id), "the answer was noted");
}

#[test]
fn an_error_is_taken_off_a_flow_that_waits() {
    let mut scene = Scene::new(Limits::default());
    let client = scene.client();
    client.send(b"hello").unwrap();
    scene.at_backend();
    let id = scene.flow(&client).unwrap();
    scene.relay.pause();
    scene.backend = socket();
    let flow = scene.relay.table.get(id).unwrap().1.socket();
    SockRef::from(&flow).send(b"to nobody").unwrap();
    scene.serve_until("that is known", |scene| scene.failures(FailureKind::DatagramRefused) == 1);
    scene.settle();
    assert!(scene.relay.table.get(id).unwrap().1.is_waiting);
}

#[test]
fn answers_of_several_listeners_each_leave_by_their_own() {
    let mut scene = Scene::new(Limits::default());
    let other = socket();
    let front = address(&other);
    let port = Arc::new(scene.set.add(other).unwrap());
    scene.serve_port(&port, &scene.target.clone());
    let clients: Vec<_> = (0..6)
        .map(|number| {
            let client = socket();
            client.connect(if number % 2 == 0 { scene.front } else { front }).unwrap();
            client.send(b"question").unwrap();
            (client, scene.at_backend().1)
        })
        .collect();
    // All are received at once.
    for (_client, flow) in &clients {
        scene.backend.send_to(b"an answer", flow).unwrap();
    }
    // A client ignores replies from another address than the one that it sent to.
    for (client, _flow) in &clients {
        assert_eq!(scene.at_client(client), b"an answer");
    }
}

#[test]
fn answers_that_are_found_at_once_reach_each_their_own_client() {
    let mut scene = Scene::new(Limits::default());
    let clients: Vec<_> = (0..9_u8)
        .map(|number| {
            let client = scene.client();
            client.send(b"question").unwrap();
            (number, client, scene.at_backend().1)
        })
        .collect();
    // Each gets a GSO batch and another datagram.
    let answers = |number: u8| [vec![number; 10], vec![number; 10], vec![number; 100 + usize::from(number)]];
    for (number, _client, flow) in &clients {
        for answer in answers(*number) {
            scene.backend.send_to(&answer, flow).unwrap();
        }
    }
    for (number, client, _flow) in &clients {
        for answer in answers(*number) {
            assert_eq!(scene.at_client(client), answer);
        }
    }
}

#[test]
fn a_change_ends_those_flows_that_it_concerns() {
    let change = |change: &dyn Fn(&mut PortMapping, &mut Limits)| {
        let mut scene = Scene::new(Limits::default());
        let client = scene.client();
        client.send(b"hello").unwrap();
        scene.at_backend();
        let mut port_mapping = scene.target.port_mapping.clone();
        let mut limits = (*scene.target.policy.limits).clone();
        change(&mut port_mapping, &mut limits);
        let policy =
            Arc::new(MappingPolicy { limits: limits.into(), state: scene.target.policy.state.clone() });
        let port = scene.port.clone();
        scene.serve_port(&port, &Arc::new(Target::new(port_mapping, policy)));
        scene.flow(&client).is_some()
    };
    assert!(change(&|_, _| ()), "nothing has changed for it");
    assert!(change(&|_, limits| limits.udp_timeout *= 2));
    assert!(change(&|_, limits| limits.access.deny = vec![parse_network("192.0.2.7").unwrap()]));
    assert!(!change(&|_, limits| limits.access.deny = vec![parse_network("127.0.0.0/8").unwrap()]));
    assert!(!change(&|_, limits| limits.udp_any_port = true));
    assert!(!change(&|port_mapping, _| port_mapping.backend = "127.0.0.1:9".parse().unwrap()));
}

#[test]
fn another_mapping_at_the_same_port_has_its_own_flows() {
    let mut scene = Scene::new(Limits::default());
    let client = scene.client();
    client.send(b"hello").unwrap();
    scene.at_backend();
    let policy = Arc::new(MappingPolicy { limits: Arc::default(), state: Arc::default() });
    let target = Arc::new(Target::new(scene.target.port_mapping.clone(), policy));
    let port = scene.port.clone();
    scene.serve_port(&port, &target);
    assert!(scene.flow(&client).is_none());
    client.send(b"hello").unwrap();
    scene.at_backend();
    assert_eq!([scene.stats().flows_total.get(), target.policy.state.stats.flows_total.get()], [1, 1]);
}

#[test]
fn the_most_flows_that_a_mapping_asks_for_count_while_it_is_served() {
    let mut scene = Scene::new(Limits { udp_max_flows: Some(700), ..Limits::default() });
    assert_eq!(scene.relay.capacity.asked, 700);
    let port = Arc::new(scene.set.add(socket()).unwrap());
    let of = |udp_max_flows| {
        let limits = Limits { udp_max_flows, ..Limits::default() };
        let policy = Arc::new(MappingPolicy { limits: limits.into(), state: Arc::default() });
        Arc::new(Target::new(scene.target.port_mapping.clone(), policy))
    };
    let [more, less, none] = [Some(900), Some(800), None].map(of);
    for (target, asked) in [(&more, 900), (&less, 800), (&none, 700), (&less, 800)] {
        scene.serve_port(&port, target);
        assert_eq!(scene.relay.capacity.asked, asked);
    }
    scene.relay.listeners.close_one(port.number());
    assert_eq!(scene.relay.listeners.most_asked(), 700);
}

#[test]
fn a_relay_that_drains_ends_when_its_flows_are_quiet() {
    let mut scene = Scene::new(Limits::default());
    let now = Instant::now();
    assert!(scene.relay.is_quiet(now) && !scene.relay.has_deadline(), "there is none");
    let client = scene.client();
    client.send(b"hello").unwrap();
    scene.at_backend();
    let now = Instant::now();
    assert!(!scene.relay.is_quiet(now));
    assert!(scene.relay.is_quiet(now + QUIET));
    assert!(scene.relay.next_deadline() > now + 2 * QUIET, "it is not asked to");
    scene.relay.draining = true;
    assert_eq!(scene.relay.next_deadline(), scene.relay.table.last_active().unwrap() + QUIET);
    // No other flow is opened, and this one continues.
    let other = scene.client();
    other.send(b"too late").unwrap();
    scene.serve_until("it is refused", |scene| scene.failures(FailureKind::FlowFailed) == 1);
    client.send(b"goes on").unwrap();
    assert_eq!(scene.at_backend().0, b"goes on");
}

#[test]
fn a_drain_waits_for_what_waits_for_a_backend() {
    let mut scene = Scene::new(Limits::default());
    let client = scene.client();
    let (id, backend) = scene.flow_to_reader(&client);
    let mut size = 1000;
    while scene.unsent(id) == 0 {
        size += 1;
        client.send(&vec![7; size]).unwrap();
        scene.serve_until("it is taken", |scene| scene.sent_and_unsent(id) == size - 1000);
    }
    let long_after = Instant::now() + 10 * QUIET;
    assert!(!scene.relay.is_quiet(long_after));
    scene.serve_until("all is at the backend", |scene| {
        while backend.recv(&mut [0; 2000]).is_ok() {}
        scene.unsent(id) == 0
    });
    assert!(scene.relay.is_quiet(long_after));
}

#[test]
fn a_flow_gets_another_port_if_somebody_has_its_own() {
    let mut scene = Scene::new(Limits::default());
    let now = Instant::now();
    // The next flow in the queue.
    let mut ports = scene.relay.capacity.shared.ports();
    ports.refresh(now);
    ports.candidate(now);
    let turn = ports.turn().unwrap();
    let taken = (0..100).find_map(|_| UdpSocket::bind(("0.0.0.0", ports.candidate(now)?)).ok()).unwrap();
    ports.go_on(turn);
    drop(ports);
    let client = scene.client();
    client.send(b"hello").unwrap();
    let (bytes, flow) = scene.at_backend();
    assert_eq!(bytes, b"hello");
    assert_ne!(flow.port(), address(&taken).port());
    assert_eq!(scene.failures(FailureKind::FlowFailed), 0);
}

#[test]
fn the_port_of_a_flow_is_used_again_some_time_after_its_end() {
    let mut scene = Scene::new(Limits::default());
    let client = scene.client();
    client.send(b"hello").unwrap();
    let (_hello, flow) = scene.at_backend();
    let is_used_again = |scene: &mut Scene, at: Instant| {
        let mut ports = scene.relay.capacity.shared.ports();
        (0..ports.count()).any(|_| ports.candidate(at) == Some(flow.port()))
    };
    let now = Instant::now();
    assert!(!is_used_again(&mut scene, now + Duration::from_secs(60)), "it is in use");
    scene.relay.end_flows(Ending::Removed, |_listeners, _key| true);
    scene.relay.close_ended(1);
    assert!(!is_used_again(&mut scene, now), "answers may be on their way");
    assert!(is_used_again(&mut scene, now + Duration::from_secs(60)));
}

#[test]
fn a_listener_that_is_shut_down_is_closed_without_any_traffic() {
    for end in [Shutdown::Read, Shutdown::Both] {
        let mut scene = Scene::new(Limits::default());
        let port = Arc::new(scene.set.add(socket()).unwrap());
        scene.serve_port(&port, &scene.target.clone());
        // An unconnected socket is shut down nevertheless (inet_shutdown in net/ipv4/af_inet.c).
        SockRef::from(&port.as_fd()).shutdown(end).unwrap_err();
        scene.settle();
        assert!(scene.relay.listeners.get_mut(port.number()).is_none());
        assert!(scene.relay.failed.is_none(), "there is another one");
        SockRef::from(&scene.port.as_fd()).shutdown(end).unwrap_err();
        scene.settle();
        assert!(scene.relay.failed.is_some());
    }
}

#[test]
fn a_flow_whose_sockets_are_shut_down_ends_or_does_without() {
    let mut scene = Scene::new(Limits::default());
    let client = scene.client();
    client.send(b"hello").unwrap();
    let (_hello, flow) = scene.at_backend();
    let id = scene.flow(&client).unwrap();
    assert!(scene.relay.give_client_socket(id));
    let socket_of = |scene: &mut Scene| {
        let (_key, flow) = scene.relay.table.get_mut(id).unwrap();
        flow.client_socket.as_ref().map(|socket| socket.as_fd().try_clone_to_owned().unwrap())
    };
    let towards_client = socket_of(&mut scene).unwrap();
    SockRef::from(&towards_client).shutdown(Shutdown::Read).unwrap();
    scene.settle();
    assert!(socket_of(&mut scene).is_none());
    client.send(b"question").unwrap();
    assert_eq!(scene.at_backend(), (b"question".to_vec(), flow));

    let towards_backend = scene.relay.table.get(id).unwrap().1.socket();
    SockRef::from(&towards_backend).shutdown(Shutdown::Read).unwrap();
    scene.settle();
    assert!(scene.relay.table.get(id).is_none());
    client.send(b"again").unwrap();
    let (bytes, next) = scene.at_backend();
    assert!(bytes == b"again" && next != flow, "the next datagram opens another flow");
}

/// Closes the listener of a scene at once, and returns the flows that continue.
fn close(scene: &mut Scene, reason: Detached) -> LiveFlows {
    let (closed, mut live) = oneshot::channel();
    scene.relay.handle(Command::Close(vec![scene.port.clone()], reason, closed));
    live.try_recv().unwrap()
}

/// Listens at the address of a closed listener again.
fn listen_again(scene: &mut Scene) {
    // The one before is closed with its last owner.
    scene.port = Arc::new(scene.set.add(socket()).unwrap());
    let listener = UdpSocket::bind(scene.front).unwrap();
    listener.set_nonblocking(true).unwrap();
    scene.port = Arc::new(scene.set.add(listener).unwrap());
    let (port, target) = (scene.port.clone(), scene.target.clone());
    scene.serve_port(&port, &target);
}

#[test]
fn flows_of_a_closed_listener_continue_with_the_next_one() {
    // More than end in one turn.
    const MANY: usize = 2 * crate::udp::flows::ENDS_PER_TURN;

    let mut scene = Scene::new(Limits::default());
    let clients: Vec<UdpSocket> = (0..MANY).map(|_| scene.client()).collect();
    let mut flows = Vec::new();
    for client in &clients {
        client.send(b"hello").unwrap();
        flows.push(scene.at_backend().1);
    }
    let id = scene.flow(&clients[0]).unwrap();
    assert!(scene.relay.give_client_socket(id));
    clients.iter().for_each(|client| assert_eq!(client.send(b"before").unwrap(), 6));
    let LiveFlows { flows: mut live, .. } = close(&mut scene, Detached::Orphaned);
    assert_eq!((live.len(), scene.stats().flows.get()), (MANY, 0));
    for _ in 0..MANY {
        assert_eq!(scene.backend.recv(&mut [0; 9]).unwrap(), 6, "what was sent before is forwarded");
    }
    flows.iter().for_each(|flow| assert_eq!(scene.backend.send_to(b"meanwhile", *flow).unwrap(), 9));

    listen_again(&mut scene);
    let number = scene.port.number();
    live.iter_mut().for_each(|flow| flow.listener = number);
    scene.relay.handle(Command::Flows(FlowCommand::Adopt(LiveFlows { flows: live, ..LiveFlows::default() })));
    assert_eq!(scene.stats().flows.get(), MANY as u64);
    for (client, flow) in clients.iter().zip(flows) {
        assert_eq!(scene.at_client(client), b"meanwhile");
        client.send(b"again").unwrap();
        assert_eq!(scene.at_backend(), (b"again".to_vec(), flow));
    }
}

#[test]
fn a_listener_that_is_left_still_sends_replies() {
    let mut scene = Scene::new(Limits::default());
    let client = scene.client();
    client.send(b"hello").unwrap();
    let (_hello, flow) = scene.at_backend();
    let id = scene.flow(&client).unwrap();
    assert!(scene.relay.give_client_socket(id));
    let elsewhere = UdpSocket::from(scene.port.as_fd().try_clone_to_owned().unwrap());
    assert!(close(&mut scene, Detached::Left).flows.is_empty());
    client.send(b"for the next").unwrap();
    scene.settle();
    assert!(scene.backend.recv(&mut [0; 20]).is_err());
    scene.backend.send_to(b"an answer", flow).unwrap();
    assert_eq!(scene.at_client(&client), b"an answer");
    assert_eq!(elsewhere.recv(&mut [0; 20]).unwrap(), 12);
}

#[test]
fn flows_of_a_port_that_is_reset_end() {
    let mut scene = Scene::new(Limits::default());
    let client = scene.client();
    client.send(b"hello").unwrap();
    let (_hello, flow) = scene.at_backend();
    let id = scene.flow(&client).unwrap();
    assert!(scene.relay.give_client_socket(id));
    assert!(close(&mut scene, Detached::Unpublished).flows.is_empty());
    listen_again(&mut scene);
    client.send(b"again").unwrap();
    let (bytes, next) = scene.at_backend();
    assert!(bytes == b"again" && next != flow);
}
