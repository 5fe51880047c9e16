//! Accepting, with real sockets, and what is decided without them.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::time::Duration;

use rproxy_mapping::PortMapping;
use rproxy_mapping::addr::BackendAddr;
use rproxy_mapping::limits::Limits;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::*;
use crate::bind::BoundPort;
use crate::bind::listen::Listener;
use crate::runtime::new_runtime;
use crate::runtime::poll::PollSet;
use crate::state::MappingPolicy;
use crate::state::Target;
use crate::state::stats::FailureKind;

/// Without it, an event that does not happen would block a test.
const PATIENCE: Duration = Duration::from_secs(10);

#[test]
fn a_client_without_a_backend_socket_is_reset_and_counted() {
    let localhost = IpAddr::from(Ipv4Addr::LOCALHOST);
    let port_mapping = PortMapping {
        protocol: Protocol::Tcp,
        host: HostSocketAddr::new(localhost, 0),
        backend: BackendAddr::new(localhost, 80).unwrap(),
        v6only: false,
    };
    let bound = BoundPort::bind(port_mapping.clone()).unwrap();
    let Listener::Tcp(listener) = &bound.listener else { panic!("not a TCP listener") };
    let policy = Arc::new(MappingPolicy { limits: Arc::default(), state: Arc::default() });
    let guard = ConnectionGuard::take(&Arc::new(Target::new(port_mapping, policy)));
    let state = guard.state().clone();

    let mut stream = TcpStream::connect(bound.local_addr().unwrap()).unwrap();
    // It is not blocking, and the connection is there.
    let (client, peer) = listener.accept().unwrap();
    let refused = io::Error::from_raw_os_error(Errno::EAFNOSUPPORT as i32);
    reset_without_backend(client.into(), peer.into(), guard, refused);
    let error = stream.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(state.stats.failure_kind(FailureKind::ConnectFailed), 1);
    assert_eq!(state.stats.connections_total.get(), 1);
}

#[test]
fn a_pause_is_longer_each_time_until_no_client_waits_any_more() {
    let now = Instant::now();
    let mut pause = Pause { is_on: false, backoff: Backoff::default(), until: now, is_logged: true };
    let lasts = |pause: &mut Pause, millis| {
        let (before, most) = (Instant::now(), Duration::from_millis(millis));
        pause.begin();
        assert!(pause.is_on && pause.until >= before + most && pause.until <= Instant::now() + most);
    };
    for millis in [5, 10, 20, 40] {
        lasts(&mut pause, millis);
    }
    assert!(pause.is_logged);
    pause.end();
    assert!(!pause.is_logged, "the next shortage is told");
    lasts(&mut pause, 5);
}

#[test]
fn errors_of_a_client_are_told_from_a_shortage_and_from_those_of_the_listener() {
    for (errno, of_client, of_shortage) in [
        (Errno::ECONNABORTED, true, false),
        (Errno::EPERM, true, false),
        (Errno::EPROTO, true, false),
        (Errno::ENETDOWN, true, false),
        (Errno::EHOSTUNREACH, true, false),
        (Errno::EMFILE, false, true),
        (Errno::ENFILE, false, true),
        (Errno::ENOBUFS, false, true),
        (Errno::ENOMEM, false, true),
        (Errno::EINVAL, false, false),
        (Errno::EAFNOSUPPORT, false, false),
    ] {
        let error = io::Error::from(errno);
        assert_eq!((is_the_clients(&error), is_exhaustion(&error)), (of_client, of_shortage), "{errno}");
    }
    assert!(!is_the_clients(&io::ErrorKind::Other.into()), "it has no number");
}

#[test]
fn a_socket_that_no_client_needed_is_used_for_the_next_one_of_its_family() {
    let [v4, v6] = [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)].map(|ip| {
        let backend = BackendAddr::new(ip, 80).unwrap();
        PortMapping { protocol: Protocol::Tcp, host: HostSocketAddr::new(ip, 0), backend, v6only: false }
    });
    let mut sockets = BackendSockets::default();
    let first = sockets.take(&v4).unwrap().unwrap();
    let number = first.as_raw_fd();
    sockets.keep(&v4, Ok(first));
    // If there is IPv6 at all.
    if let Ok(other) = sockets.take(&v6).unwrap() {
        assert_ne!(other.as_raw_fd(), number);
    }
    assert_eq!(sockets.take(&v4).unwrap().unwrap().as_raw_fd(), number);
}

/// A task with one listener, and the backend of its mapping. The listener is served at once.
struct Scene {
    acceptor: Acceptor,
    target: Arc<Target>,
    /// Its socket, until it is closed.
    port: Option<Arc<WatchedListener>>,
    front: SocketAddr,
    backend: TcpListener,
}

impl Scene {
    fn new(limits: Limits) -> Self {
        let set = PollSet::new().unwrap();
        let (_commands, receiver) = mpsc::unbounded_channel();
        let workers = Arc::new(Workers::new(Handle::current()));
        let source = EventSource::new(set.clone()).unwrap();
        let mut acceptor = Acceptor::new(source, receiver, Arc::default(), workers, true);
        let [listener, backend] = [(); 2].map(|()| {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        });
        set_stream_options(&SockRef::from(&listener)).unwrap();
        let front = listener.local_addr().unwrap();
        let to = backend.local_addr().unwrap().to_string().parse().unwrap();
        let host = front.to_string().parse().unwrap();
        let port_mapping = PortMapping { protocol: Protocol::Tcp, host, backend: to, v6only: false };
        let policy = Arc::new(MappingPolicy { limits: limits.into(), state: Arc::default() });
        let target = Arc::new(Target::new(port_mapping, policy));
        let port = Arc::new(set.add(listener).unwrap());
        port.watch(EpollFlags::EPOLLIN).unwrap();
        let binding = Binding { port: port.clone(), target: target.clone() };
        acceptor.handle(Command::Serve(vec![binding]));
        Self { acceptor, target, port: Some(port), front, backend }
    }

    fn connect(&self) -> TcpStream {
        let client = TcpStream::connect(self.front).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client
    }

    /// Serves the listener once.
    async fn turn(&mut self) {
        let mut events = [EpollEvent::empty(); EVENTS];
        let count = self.acceptor.poll.wait(&mut events).await.unwrap();
        self.acceptor.turn(&events[..count]).unwrap();
    }

    /// Waits for a connection to the backend.
    async fn at_backend(&self) -> TcpStream {
        let accepted = async {
            loop {
                match self.backend.accept() {
                    Ok((stream, _peer)) => return stream,
                    Err(_none) => tokio::task::yield_now().await,
                }
            }
        };
        let stream = timeout(PATIENCE, accepted).await.unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    /// Closes the listener, and waits until that is told.
    async fn close(&mut self, reason: Detached) {
        let (closed, is_closed) = oneshot::channel();
        self.acceptor.handle(Command::Close(self.port.take().into_iter().collect(), reason, closed));
        assert!(is_closed.await.unwrap().flows.is_empty());
    }
}

/// Waits until `stream` has received something.
async fn receive(stream: &mut TcpStream) -> io::Result<usize> {
    let received = async {
        loop {
            match stream.read(&mut [0; 9]) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => tokio::task::yield_now().await,
                result => return result,
            }
        }
    };
    timeout(PATIENCE, received).await.unwrap()
}

#[test]
fn all_connections_that_are_accepted_at_once_are_relayed() {
    new_runtime().unwrap().block_on(async {
        let mut scene = Scene::new(Limits::default());
        let mut clients = [(); 6].map(|()| scene.connect());
        scene.turn().await;
        // Each worker connects its own, in any order.
        clients.iter_mut().for_each(|client| client.write_all(b"question").unwrap());
        for _client in &clients {
            let mut backend = scene.at_backend().await;
            assert_eq!(receive(&mut backend).await.unwrap(), 8);
        }
        assert_eq!(scene.target.policy.state.stats.connections.get(), 6);
    });
}

#[test]
fn a_port_that_is_reset_leaves_no_connection() {
    new_runtime().unwrap().block_on(async {
        let mut scene = Scene::new(Limits::default());
        let mut accepted = scene.connect();
        scene.turn().await;
        let mut backend = scene.at_backend().await;
        let mut pending = scene.connect();
        scene.acceptor.full.extend(scene.port.iter().map(|port| port.number()));
        scene.close(Detached::Unpublished).await;
        connections::reset_all(&scene.acceptor.workers, &scene.target.policy.state).await;
        assert_eq!(scene.target.policy.state.stats.connections.get(), 0);
        assert!(scene.acceptor.full.is_empty());
        for client in [&mut accepted, &mut pending, &mut backend] {
            assert_eq!(receive(client).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        }
        scene.backend.accept().unwrap_err();
    });
}

#[test]
fn connections_of_a_port_that_is_closed_continue_also_those_that_wait() {
    for reason in [Detached::Orphaned, Detached::Left] {
        new_runtime().unwrap().block_on(async {
            let mut scene = Scene::new(Limits::default());
            let mut accepted = scene.connect();
            scene.turn().await;
            let first = scene.at_backend().await;
            let mut pending = scene.connect();
            scene.close(reason).await;
            let second = scene.at_backend().await;
            for (client, mut backend) in [(&mut accepted, first), (&mut pending, second)] {
                client.write_all(b"goes on").unwrap();
                assert_eq!(receive(&mut backend).await.unwrap(), 7, "{reason:?}");
            }
            assert_eq!(scene.target.policy.state.stats.connections.get(), 2);
        });
    }
}

#[test]
fn a_listener_whose_mapping_is_full_is_not_watched_until_there_is_room() {
    new_runtime().unwrap().block_on(async {
        let limits = Limits { max_connections: Some(1), on_limit: OnLimit::Wait, ..Limits::default() };
        let mut scene = Scene::new(limits);
        let connection = ConnectionGuard::take(&scene.target);
        let _client = scene.connect();
        scene.turn().await;
        let acceptor = &mut scene.acceptor;
        let is_reported = |acceptor: &Acceptor| {
            acceptor.poll.look(&mut [EpollEvent::empty(); EVENTS]).is_ok_and(|count| count > 0)
        };
        assert!(!is_reported(acceptor), "it would be reported for ever");
        acceptor.resume_full();
        assert!(!is_reported(acceptor), "it is still full");
        drop(connection);
        acceptor.resume_full();
        assert!(is_reported(acceptor) && acceptor.full.is_empty());
    });
}
