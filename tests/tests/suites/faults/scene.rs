//! The environment of faults: an `rproxy` on the host of the usual topology, with a mapping to a container with a
//! fault, and mappings to another container, whose clients must not notice.

use std::io::Read;
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use testkit::backend::TcpBackend;
use testkit::client::{self, End};
use testkit::controlled::{Controlled, mapping};
use testkit::holdings::{Holdings, wait_until_idle};
use testkit::load::SetOnDrop;
use testkit::netns::Namespace;
use testkit::topology::{self, CONTAINER_V4, HOST_V4, Topology};
use testkit::{eventually, eventually_equal, udp};

/// What clients connect to that something happens to.
pub(crate) const FRONT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(HOST_V4), 80);
/// Where that leads.
pub(crate) const BACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(CONTAINER_V4), 80);

/// The same for those who must not notice, for TCP and UDP.
const STEADY_FRONT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(HOST_V4), 81);
const STEADY_BACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(OTHER_V4), 81);

const OTHER_V4: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 3);
const OTHER_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x172, 0x17, 0, 0, 0, 0, 3);

/// Pipes that workers may keep, two descriptors each: four for each of two processors or more.
const KEPT_PIPES: usize = 8;

/// Clients who must not notice.
const STEADY_CLIENTS: u64 = 3;

/// The proxy, and everything around it.
pub(crate) struct Scene {
    pub(crate) topology: Topology,
    pub(crate) proxy: Controlled,
    before: Holdings,
    _steady: (TcpBackend, udp::Backend),
}

impl Scene {
    /// Nothing has happened yet. `limits` are those of the mapping that something happens to.
    pub(crate) fn new(limits: Value) -> Self {
        Self::with(limits, &[], |command| command)
    }

    /// As [`Scene::new`], with more arguments for `rproxy`, whose command `wrap` may change.
    pub(crate) fn with(limits: Value, arguments: &[&str], wrap: impl FnOnce(Command) -> Command) -> Self {
        let topology = Topology::new();
        let proxy = Controlled::start_by(arguments, |command| topology.host.spawn(wrap(command)));
        Self::around(topology, proxy, limits)
    }

    /// The scene around a proxy that runs already.
    pub(crate) fn around(topology: Topology, proxy: Controlled, limits: Value) -> Self {
        let other = topology::add_container(&topology.host, OTHER_V4, OTHER_V6);
        let steady =
            (TcpBackend::echo_in(&other, STEADY_BACK), udp::Backend::echo(udp::bind_in(&other, STEADY_BACK)));
        let mut web = mapping("web", "tcp", FRONT, BACK);
        web["limits"] = limits;
        let mut datagrams = mapping("datagrams", "udp", STEADY_FRONT, STEADY_BACK);
        datagrams["limits"] = json!({ "udp_timeout": "1s" });
        proxy.apply(&[web, mapping("steady", "tcp", STEADY_FRONT, STEADY_BACK), datagrams]).success();
        let mut scene = Self { topology, proxy, before: Holdings::default(), _steady: steady };
        scene.start_all_workers();
        scene.under_load(|| ());
        scene.wait_until_over();
        // By then the client that asked is gone, too.
        wait_until_idle(scene.proxy.process.pid());
        scene.before = Holdings::of(scene.proxy.process.pid());
        scene
    }

    /// Connects so many at a time that each worker has some: they start when there is something for them.
    fn start_all_workers(&self) {
        let most = thread::available_parallelism().unwrap().get();
        let connect = || client::connect(STEADY_FRONT);
        let clients: Vec<_> = (0..2 * most).map(|_| self.topology.client.run(connect)).collect();
        clients.iter().for_each(|client| client::exchange(client, 1, 100));
    }

    /// Lets something happen while others are served, who must not notice.
    pub(crate) fn under_load<T>(&self, fault: impl FnOnce() -> T) -> T {
        let before = self.steady_counters();
        let (result, sent) = under_load(&self.topology.client, STEADY_FRONT, fault);
        let after = self.steady_counters();
        let counted = std::array::from_fn(|index| after[index] - before[index]);
        assert_eq!(counted, [sent.connections, sent.bytes, sent.bytes], "connections, bytes in, bytes out");
        result
    }

    /// What the proxy has counted for those who must not notice; no error among it.
    fn steady_counters(&self) -> [u64; 3] {
        let mut stats = Value::Null;
        eventually("no steady client is left", || {
            stats = self.proxy.stats("steady");
            stats["connections"] == 0
        });
        assert_eq!(stats["errors"], json!({}));
        ["connections_total", "bytes_in", "bytes_out"].map(|counter| stats[counter].as_u64().unwrap())
    }

    /// What the proxy has counted for the mapping that something happens to.
    pub(crate) fn stats(&self) -> Value {
        self.proxy.stats("web")
    }

    /// Starts an echo behind the mapping that something happens to.
    #[track_caller]
    pub(crate) fn echo(&self) -> TcpBackend {
        TcpBackend::echo_in(&self.topology.container, BACK)
    }

    /// Connects as a client.
    #[track_caller]
    pub(crate) fn connect(&self) -> TcpStream {
        self.topology.client.run(|| client::connect(FRONT))
    }

    /// Checks that a new client is served by an echo.
    #[track_caller]
    pub(crate) fn assert_serves(&self) {
        self.topology.client.run(|| client::assert_echoes(FRONT));
    }

    /// How a new connection ends of which nothing is expected but that.
    pub(crate) fn end(&self) -> (Vec<u8>, End) {
        self.topology.client.run(|| client::end_of(FRONT))
    }

    fn wait_until_over(&self) {
        let over = |name, counter| self.proxy.stats(name)[counter] == 0;
        eventually("no connection is left", || over("web", "connections") && over("steady", "connections"));
        eventually("no flow is left", || over("datagrams", "flows"));
    }

    /// Checks that all is as it was before: nothing goes on, nothing is held, nothing is spent.
    pub(crate) fn assert_nothing_left(&self) {
        self.wait_until_over();
        let pid = self.proxy.process.pid();
        let most_pipes = self.before.pipes + 2 * KEPT_PIPES;
        eventually_equal("what is held", &Holdings { pipes: 0, ..self.before }, || {
            let now = Holdings::of(pid);
            assert!(now.pipes <= most_pipes, "{now:?}, and before {:?}", self.before);
            // One that looked after the start, as for flows that were pinned elsewhere, may have ended.
            Holdings { pipes: 0, threads: now.threads.max(self.before.threads), ..now }
        });
        wait_until_idle(pid);
    }
}

/// What steady clients have sent, and received again.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sent {
    pub(crate) connections: u64,
    pub(crate) bytes: u64,
}

/// Lets something happen while clients exchange bytes and datagrams with echoes at `address`.
pub(crate) fn under_load<T>(client: &Namespace, address: SocketAddr, fault: impl FnOnce() -> T) -> (T, Sent) {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let over = &over;
        let streams: Vec<_> = (1..=STEADY_CLIENTS)
            .map(|seed| scope.spawn(move || client.run(|| exchange_streams(address, seed, over))))
            .collect();
        let datagrams = scope.spawn(move || client.run(|| exchange_datagrams(address, over)));
        // Also when it panics, which would wait for the clients otherwise.
        let end = SetOnDrop(over);
        let result = fault();
        drop(end);
        datagrams.join().unwrap();
        let sent = streams.into_iter().map(|client| client.join().unwrap());
        let sum =
            |a: Sent, b: Sent| Sent { connections: a.connections + b.connections, bytes: a.bytes + b.bytes };
        (result, sent.fold(Sent::default(), sum))
    })
}

/// Connections one after the other, each with some requests of various sizes and an orderly end.
fn exchange_streams(address: SocketAddr, seed: u64, over: &AtomicBool) -> Sent {
    let mut sent = Sent::default();
    while sent.connections < 2 || !over.load(Ordering::Relaxed) {
        let mut stream = client::connect(address);
        sent.connections += 1;
        for size in [1, 100, 1_447, 20_000, 7] {
            client::exchange(&stream, seed, size);
            sent.bytes += size as u64;
        }
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
    sent
}

fn exchange_datagrams(address: SocketAddr, over: &AtomicBool) {
    let socket: UdpSocket = udp::client(Ipv4Addr::UNSPECIFIED);
    socket.set_read_timeout(Some(RESEND)).unwrap();
    let mut number: u64 = 0;
    while number == 0 || !over.load(Ordering::Relaxed) {
        number += 1;
        let question = number.to_ne_bytes();
        // The network may be so full that a datagram is lost in it.
        eventually("a datagram comes back", || {
            socket.send_to(&question, address).unwrap();
            let mut answer = [0; 8];
            // One that was sent again may come twice.
            while let Ok((len, from)) = socket.recv_from(&mut answer) {
                assert_eq!((len, from), (8, address));
                if answer == question {
                    return true;
                }
            }
            false
        });
    }
}

/// After which a datagram is taken for lost.
const RESEND: Duration = Duration::from_millis(500);
