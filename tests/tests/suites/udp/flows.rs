//! The flows of the UDP relay: their lifetime and number, and that none is affected by another one, or by errors of its
//! own earlier datagrams.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;

use testkit::client;
use testkit::load;
use testkit::netns::Namespace;
use testkit::process::Stream;
use testkit::require::{self, Need};
use testkit::rproxy::{Standalone, rproxy};
use testkit::suite::Case;
use testkit::topology::{self, CLIENT_V4, CLIENT_V6, CONTAINER_V4, CONTAINER_V6, HOST_V4, HOST_V6, Topology};
use testkit::udp::{self, Backend, assert_echoes, bind_in, flow_of, relay_in};
use testkit::{eventually, eventually_within};

const PORT: u16 = 5300;

/// What one receive of the relay takes, and half of what it takes from a backend at once.
const BATCH: usize = 64;

pub(crate) fn cases() -> Vec<Case> {
    let wiring = &[Need::Root, Need::Program("ip")];
    let case = |name: &str, body: fn()| Case::new(name, body);
    let net = |name: &str, body: fn()| Case::new(name, body).needs(wiring);
    let prlimit = &[Need::Program("prlimit")];
    vec![
        case("an idle flow ends and its client gets another", idle_flow_ends),
        case("a flow that only sends stays (TestUDPOneSided)", one_sided_flow_stays),
        case("a flow that only receives stays", flow_that_receives_stays),
        case("SIGTERM lets flows finish", sigterm_lets_flows_finish),
        case("a second signal ends flows", second_signal_ends_flows),
        net("a backend that restarts finds its flows", backend_restarts),
        net("a backend that moves away and back finds its flows", backend_is_away),
        net("no later datagram pays for an error", errors_cost_no_other).needs(&[Need::Program("nft")]),
        net("10,000 flows at a time", ten_thousand_flows).needs(prlimit),
        net("a flood does not disturb a flow in use", flood_beside_a_flow).needs(&[Need::Program("sysctl")]),
        net("a source over its quota displaces its own flows", quota_over_v4)
            .needs(&[Need::Program("sysctl")]),
        net("a /64 over its quota displaces its own flows", quota_over_v6).needs(&[Need::Program("sysctl")]),
        net("out of descriptors, new flows displace old ones", out_of_descriptors).needs(prlimit),
        net("flows leave descriptors to connections", flows_beside_connections).needs(prlimit),
        case("a flow's backlog does not delay another's reply", backlog_of_answers),
        net("a slow backend does not hold up another's flows", slow_backend).needs(&[Need::Program("tc")]),
        net("a slow way out is shared by all flows", slow_way_out).needs(&[Need::Program("tc")]),
    ]
}

const ASKED: SocketAddr = SocketAddr::new(IpAddr::V4(HOST_V4), PORT);

fn naming_container(net: &Topology) -> Backend {
    Backend::naming(bind_in(&net.container, (CONTAINER_V4, PORT)))
}

/// The flows of some clients, in their order. As many are under way as a socket is sure to hold.
#[track_caller]
fn flows_of(clients: &[UdpSocket], asked: SocketAddr) -> Vec<SocketAddr> {
    let mut flows = Vec::new();
    for clients in clients.chunks(50) {
        for client in clients {
            client.send_to(b"who am I?", asked).unwrap();
        }
        for client in clients {
            let (answer, from) = udp::receive(client);
            assert_eq!(from, asked);
            flows.push(String::from_utf8(answer).unwrap().parse().unwrap());
        }
    }
    flows
}

fn idle_flow_ends() {
    let backend = Backend::naming(udp::local());
    let proxy = udp::relay(Ipv4Addr::LOCALHOST, backend.address(), &["--udp-timeout", "1s"]);
    let before = proxy.process.descriptors();
    let client = udp::local();
    let first = flow_of(&client, proxy.address());
    assert_eq!(proxy.process.descriptors(), before + 1);
    // Keeps the port from being the next flow's by chance.
    eventually("the flow ends", || proxy.process.descriptors() == before);
    let _taken = UdpSocket::bind(first).unwrap();
    assert_ne!(flow_of(&client, proxy.address()), first);
}

/// As moby has it: a write each tenth of a second, for longer than the timeout.
fn one_sided_flow_stays() {
    let backend = udp::local();
    let proxy = udp::relay(Ipv4Addr::LOCALHOST, udp::address(&backend), &["--udp-timeout", "1s"]);
    let before = proxy.process.descriptors();
    let client = udp::local();
    let mut flows = BTreeSet::new();
    for number in 0..15_u8 {
        client.send_to(&[number], proxy.address()).unwrap();
        let (bytes, flow) = udp::receive(&backend);
        assert_eq!(bytes, [number]);
        flows.insert(flow);
        thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(flows.len(), 1, "{flows:?}");
    eventually("the flow ends", || proxy.process.descriptors() == before);
    let _taken = UdpSocket::bind(flows.first().unwrap()).unwrap();
    client.send_to(b"again", proxy.address()).unwrap();
    assert!(!flows.contains(&udp::receive(&backend).1));
}

fn flow_that_receives_stays() {
    let backend = udp::local();
    let proxy = udp::relay(Ipv4Addr::LOCALHOST, udp::address(&backend), &["--udp-timeout", "1s"]);
    let client = udp::local();
    client.send_to(b"subscribe", proxy.address()).unwrap();
    let (_, flow) = udp::receive(&backend);
    for number in 0..15_u8 {
        backend.send_to(&[number], flow).unwrap();
        assert_eq!(udp::receive(&client), (vec![number], proxy.address()));
        thread::sleep(Duration::from_millis(100));
    }
}

/// Flows that are in use go on; no new ones begin; once all are quiet, so is the proxy.
fn sigterm_lets_flows_finish() {
    let backend = Backend::naming(udp::local());
    let proxy = udp::relay(Ipv4Addr::LOCALHOST, backend.address(), &["--drain-timeout", "1h"]);
    let client = udp::local();
    let flow = flow_of(&client, proxy.address());
    proxy.process.signal(Signal::SIGTERM);
    proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("draining"));
    for _ in 0..20 {
        assert_eq!(flow_of(&client, proxy.address()), flow);
    }
    let late = udp::local();
    late.send_to(b"too late", proxy.address()).unwrap();
    assert_eq!(proxy.process.wait().code(), Some(0));
    assert!(udp::is_silent(&late));
}

fn second_signal_ends_flows() {
    let backend = Backend::naming(udp::local());
    let proxy = udp::relay(Ipv4Addr::LOCALHOST, backend.address(), &["--drain-timeout", "1h"]);
    flow_of(&udp::local(), proxy.address());
    for count in [1, 2] {
        proxy.process.signal(Signal::SIGTERM);
        proxy.process.wait_for_lines(Stream::Stderr, count, |line| line.contains("end"));
    }
    assert_eq!(proxy.process.wait().code(), Some(0));
}

/// How many datagrams arrived in a namespace for a port where nobody listens.
fn misses(namespace: &Namespace) -> usize {
    let table = namespace.run(|| fs::read_to_string("/proc/thread-self/net/snmp").unwrap());
    let mut lines = table.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let place = lines.next().unwrap().split(' ').position(|name| name == "NoPorts").unwrap();
    lines.next().unwrap().split(' ').nth(place).unwrap().parse().unwrap()
}

/// What is sent while nobody listens reaches the backend's host all the same, each datagram once; and the
/// first one after the start reaches the backend.
fn backend_restarts() {
    let net = Topology::new();
    let _proxy = relay_in(&net.host, "0.0.0.0:5300", (CONTAINER_V4, PORT), &[]);
    let client = bind_in(&net.client, (CLIENT_V4, 0));
    let mut flows = HashSet::new();
    for round in 1..=5 {
        // Each longer than the one before, for the misses are counted per GSO batch, and the datagrams of one are of a size.
        for size in 1..=20 {
            client.send_to(&vec![0; size], ASKED).unwrap();
        }
        eventually("each datagram reaches the container", || misses(&net.container) >= 20 * round);
        let backend = naming_container(&net);
        flows.insert(flow_of(&client, ASKED));
        flows.insert(flow_of(&client, ASKED));
        assert_eq!(backend.received(), 2);
        assert_eq!(misses(&net.container), 20 * round);
    }
    assert_eq!(flows.len(), 1, "the flow's port changes: {flows:?}");
}

/// The backend's address is gone, so that nobody answers for it; later the host has no route to it. A flow
/// outlives both, and a client that comes meanwhile is served when they are over.
fn backend_is_away() {
    let net = Topology::new();
    let _backend = naming_container(&net);
    let proxy = relay_in(&net.host, "0.0.0.0:5300", (CONTAINER_V4, PORT), &[]);
    let client = bind_in(&net.client, (CLIENT_V4, 0));
    let flow = flow_of(&client, ASKED);
    let before = proxy.process.descriptors();
    let moves = [
        (&net.container, "address", "172.17.0.2/16 dev eth0"),
        (&net.host, "route", "172.17.0.0/16 dev docker0"),
    ];
    for (namespace, kind, what) in moves {
        namespace.ip(&format!("{kind} del {what}"));
        let late = bind_in(&net.client, (CLIENT_V4, 0));
        for number in 0..10_u8 {
            client.send_to(&[number], ASKED).unwrap();
            late.send_to(&[number], ASKED).unwrap();
        }
        assert!(udp::is_silent(&client));
        namespace.ip(&format!("{kind} add {what}"));
        for client in [&client, &late] {
            eventually("the backend answers again", || {
                client.send_to(b"who am I?", ASKED).unwrap();
                !udp::is_silent(client)
            });
            while !udp::is_silent(client) {}
        }
        assert_eq!(flow_of(&client, ASKED), flow);
    }
    assert_eq!(proxy.process.descriptors(), before + 2);
}

/// Ways to refuse a datagram (nft(8), `icmpx`), each of which leaves another error on the sender's socket.
const REFUSALS: [&str; 4] = ["port-unreachable", "admin-prohibited", "no-route", "host-unreachable"];

/// In the container, datagrams of 100 bytes are refused, and no others.
fn errors_cost_no_other() {
    let net = Topology::new();
    net.container.command("nft add table inet t").success();
    net.container.command("nft add chain inet t c { type filter hook input priority 0 ; }").success();
    let proxy_v4 = relay_in(&net.host, "0.0.0.0:5300", (CONTAINER_V4, PORT), &[]);
    let proxy_v6 = relay_in(&net.host, "[::]:5300", (CONTAINER_V6, PORT), &["--v6only"]);
    let mut lost = Vec::new();
    for refusal in REFUSALS {
        net.container.command("nft flush chain inet t c").success();
        let rule = format!("meta l4proto udp udp length 108 reject with icmpx type {refusal}");
        net.container.command(&format!("nft add rule inet t c {rule}")).success();
        let v4 = (&proxy_v4, CLIENT_V4.into(), HOST_V4.into(), CONTAINER_V4.into());
        let v6 = (&proxy_v6, CLIENT_V6.into(), HOST_V6.into(), CONTAINER_V6.into());
        for (proxy, client, host, container) in [v4, v6] {
            let client: UdpSocket = bind_in(&net.client, SocketAddr::new(client, 0));
            let backend = bind_in(&net.container, SocketAddr::new(container, PORT));
            if !all_but_refused_arrive(proxy, &client, SocketAddr::new(host, PORT), &backend) {
                lost.push((refusal, container));
            }
        }
    }
    assert!(lost.is_empty(), "later datagrams are lost after {lost:?}");
}

/// The proxy finds all at once: a full batch, whose last datagram is refused, and then some.
fn all_but_refused_arrive(proxy: &Standalone, client: &UdpSocket, asked: SocketAddr, at: &UdpSocket) -> bool {
    client.send_to(b"hello", asked).unwrap();
    udp::receive(at);
    let sizes = || (1..BATCH).chain([100]).chain(1..10);
    proxy.process.pause();
    for size in sizes() {
        client.send_to(&vec![0; size], asked).unwrap();
    }
    proxy.process.resume();
    // What comes after all others tells when to stop.
    let last = udp::pattern(1, 300);
    let mut received = Vec::new();
    eventually("a datagram sent later arrives", || {
        client.send_to(&last, asked).unwrap();
        at.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let mut buffer = [0; 400];
        while let Ok(len) = at.recv(&mut buffer) {
            received.push(len);
        }
        received.contains(&last.len())
    });
    received.retain(|len| *len != last.len());
    received == sizes().filter(|size| *size != 100).collect::<Vec<_>>()
}

/// Starts the proxy on the host with a limit of descriptors.
fn relay_with_descriptors(net: &Topology, limit: usize, more_arguments: &[&str]) -> Standalone {
    let backend = SocketAddr::from((CONTAINER_V4, PORT)).to_string();
    let mapping = ["--proto", "udp", "--host", "0.0.0.0:5300", "--to", &backend];
    let arguments = [&mapping, more_arguments].concat();
    let mut command = require::command("prlimit");
    command.arg(format!("--nofile={limit}")).arg(rproxy()).args(&arguments);
    Standalone::ready(net.host.spawn(command), &arguments)
}

fn ten_thousand_flows() {
    const FLOWS: usize = 10_000;
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let wanted = FLOWS as u64 + 2_000;
    setrlimit(Resource::RLIMIT_NOFILE, soft.max(wanted), hard.max(wanted)).unwrap();

    let net = Topology::new();
    let backend = naming_container(&net);
    let proxy = relay_with_descriptors(&net, 16_384, &["--udp-timeout", "8s"]);
    let before = proxy.process.descriptors();
    let clients: Vec<_> = net.client.run(|| (0..FLOWS).map(|_| udp::client(CLIENT_V4)).collect());
    let first = flows_of(&clients, ASKED);
    assert_eq!(proxy.process.descriptors(), before + FLOWS);
    assert_eq!(first.iter().collect::<HashSet<_>>().len(), FLOWS);
    assert_eq!(flows_of(&clients, ASKED), first, "each has kept its port");
    assert_eq!(backend.received(), 2 * FLOWS);
    eventually_within(Duration::from_secs(40), "all flows end", || proxy.process.descriptors() == before);
    assert_eq!(flows_of(&clients[..100], ASKED).len(), 100);
}

/// Lets the client's namespace send from every address of a network, as if it were many clients.
fn add_sources(net: &Topology, network: &str, gateway: impl Into<IpAddr>) {
    net.client.ip(&format!("route add local {network} dev lo"));
    // To IPv4, such a route is enough to make an address one's own.
    net.client.command("sysctl -qw net.ipv6.ip_nonlocal_bind=1").success();
    net.host.ip(&format!("route add {network} via {}", gateway.into()));
}

/// An address of the network 10.1.0.0/16.
fn source(number: usize) -> Ipv4Addr {
    let [.., high, low] = number.to_be_bytes();
    Ipv4Addr::new(10, 1, high, low)
}

/// Answers only every other one, for a flood may or may not be answered.
fn serve_flood(socket: UdpSocket, flood: &Arc<AtomicUsize>) -> Backend {
    let flood = Arc::clone(flood);
    Backend::serve(socket, move |socket, bytes, from| {
        if bytes != b"flood" || flood.fetch_add(1, Ordering::Release).is_multiple_of(2) {
            socket.send_to(from.to_string().as_bytes(), from).ok();
        }
    })
}

/// Many sources send a datagram each, one after the other. All arrive; and a flow in use, which goes on
/// meanwhile, loses nothing. The flood is as fast as the backend sees it, so that no socket overflows.
fn flood_beside_a_flow() {
    const CAP: usize = 300;
    const SOURCES: usize = 6_000;
    let net = Topology::new();
    add_sources(&net, "10.1.0.0/16", CLIENT_V4);
    let arrived = Arc::new(AtomicUsize::new(0));
    let _backend = serve_flood(bind_in(&net.container, (CONTAINER_V4, PORT)), &arrived);
    let proxy = relay_in(&net.host, "0.0.0.0:5300", (CONTAINER_V4, PORT), &["--udp-max-flows", "300"]);
    let before = proxy.process.descriptors();

    let client = bind_in(&net.client, (CLIENT_V4, 0));
    let flow = flow_of(&client, ASKED);
    assert_eq!(flow_of(&client, ASKED), flow);
    let (is_over, most) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            net.client.run(|| flood(SOURCES, &arrived));
            is_over.store(true, Ordering::Release);
        });
        while !is_over.load(Ordering::Acquire) {
            assert_eq!(flow_of(&client, ASKED), flow, "the flow in use was displaced");
            most.fetch_max(proxy.process.descriptors(), Ordering::Relaxed);
        }
    });
    assert_eq!(arrived.load(Ordering::Acquire), SOURCES);
    let most = most.into_inner();
    // A flow is opened before it takes the place of another.
    assert!(most <= before + CAP + 1, "{most} descriptors, {before} of them before");
    assert_eq!(proxy.process.descriptors(), before + CAP);
}

fn flood(sources: usize, arrived: &AtomicUsize) {
    for number in 0..sources {
        udp::client(source(number)).send_to(b"flood", ASKED).unwrap();
        if number % 100 == 99 {
            eventually("the flood arrives", || arrived.load(Ordering::Acquire) > number);
        }
    }
}

/// Others have a flow each, none of which is more than new, when one source opens a thousand.
#[track_caller]
fn assert_displaces_its_own(
    net: &Topology,
    asked: SocketAddr,
    proxy: &Standalone,
    others: Vec<IpAddr>,
    greedy: impl Fn(usize) -> IpAddr,
) {
    let before = proxy.process.descriptors();
    let others: Vec<_> = others.into_iter().map(|ip| bind_in(&net.client, (ip, 0))).collect();
    let flows = flows_of(&others, asked);
    // Each with a port of its own: what comes from one that was used before is more than new.
    let greedy = |number: usize| (greedy(number), 20_000 + u16::try_from(number).unwrap());
    for number in 0..20 {
        let clients: Vec<_> = (0..50).map(|i| bind_in(&net.client, greedy(number * 50 + i))).collect();
        flows_of(&clients, asked);
        assert!(proxy.process.descriptors() <= before + others.len() + 50 + 1);
    }
    assert_eq!(flows_of(&others, asked), flows, "another source was displaced");
}

const QUOTA: [&str; 4] = ["--udp-max-flows", "200", "--udp-max-flows-per-source", "50"];

fn quota_over_v4() {
    let net = Topology::new();
    add_sources(&net, "10.1.0.0/16", CLIENT_V4);
    let _backend = naming_container(&net);
    let proxy = relay_in(&net.host, "0.0.0.0:5300", (CONTAINER_V4, PORT), &QUOTA);
    let others = (1..=100).map(|number| source(number).into()).collect();
    assert_displaces_its_own(&net, ASKED, &proxy, others, |_| CLIENT_V4.into());
}

fn quota_over_v6() {
    let net = Topology::new();
    add_sources(&net, "fd00:1::/32", CLIENT_V6);
    let _backend = Backend::naming(bind_in(&net.container, (CONTAINER_V6, PORT)));
    let proxy = relay_in(&net.host, "[::]:5300", (CONTAINER_V6, PORT), &QUOTA);
    let address = |network, host| IpAddr::from(Ipv6Addr::new(0xfd00, 1, 0, network, 0, 0, 0, host));
    let others = (1..=100).map(|network| address(network, 1)).collect();
    let greedy = |number| address(0, u16::try_from(number).unwrap());
    assert_displaces_its_own(&net, (HOST_V6, PORT).into(), &proxy, others, greedy);
}

fn out_of_descriptors() {
    let net = Topology::new();
    let _backend = naming_container(&net);
    let proxy = relay_with_descriptors(&net, 60, &["--udp-max-flows", "1000"]);
    let clients: Vec<_> = (0..300).map(|_| bind_in(&net.client, (CLIENT_V4, 0))).collect();
    for clients in clients.chunks(20) {
        flows_of(clients, ASKED);
    }
    assert!(proxy.process.is_running());
}

/// In a process with mappings of both kinds, by default flows take half of the descriptors.
fn flows_beside_connections() {
    const LIMIT: usize = 100;
    let net = Topology::new();
    let _backend = naming_container(&net);
    let listener = net.container.run(|| TcpListener::bind((CONTAINER_V4, PORT)).unwrap());
    let backend = SocketAddr::from((CONTAINER_V4, PORT)).to_string();
    let pair = |protocol| ["--proto", protocol, "--host", "0.0.0.0:5300", "--to", &backend];
    let quota = ["--udp-max-flows-per-source", "1000"];
    let arguments = [&pair("udp")[..], &pair("tcp")[..], &quota[..]].concat();
    let mut command = require::command("prlimit");
    command.arg(format!("--nofile={LIMIT}")).arg(rproxy()).args(&arguments);
    let proxy = Standalone::ready(net.host.spawn(command), &arguments);
    let before = proxy.process.descriptors();
    let clients: Vec<_> = (0..3 * LIMIT).map(|_| bind_in(&net.client, (CLIENT_V4, 0))).collect();
    for clients in clients.chunks(20) {
        flows_of(clients, ASKED);
    }
    assert_eq!(proxy.process.descriptors(), before + LIMIT / 2);
    let connections: Vec<_> = (0..10).map(|_| net.client.run(|| client::connect(ASKED))).collect();
    // All before the first is read: they need not arrive in the order in which the clients connected.
    for _ in &connections {
        drop(listener.accept().unwrap());
    }
    for connection in &connections {
        assert_eq!(client::read_to_end(connection), (vec![], client::End::Eof));
    }
}

/// Two flows of one client, which sees in one queue in which order the relay answers.
fn backlog_of_answers() {
    const BACKLOG: usize = 150;
    let backend = udp::local();
    let proxy = udp::relay(Ipv4Addr::UNSPECIFIED, udp::address(&backend), &[]);
    let client = udp::local();
    let port = proxy.address().port();
    let [busy, other] = [(); 2].map(|()| {
        let asked = SocketAddr::from((client::own_loopback(), port));
        client.send_to(b"hello", asked).unwrap();
        (asked, udp::receive(&backend).1)
    });
    proxy.process.pause();
    for number in 0..BACKLOG {
        // Of different sizes, lest they come as one GSO batch.
        backend.send_to(&udp::pattern(number, number), busy.1).unwrap();
    }
    backend.send_to(b"the other", other.1).unwrap();
    proxy.process.resume();
    let answers: Vec<_> = (0..=BACKLOG).map(|_| udp::receive(&client)).collect();
    let place = answers.iter().position(|(_, from)| *from == other.0).unwrap();
    assert!(place <= 2 * BATCH, "answer {place} of {BACKLOG}");
    let of_busy = answers.iter().filter(|(_, from)| *from == busy.0);
    for (number, (bytes, _)) in of_busy.enumerate() {
        assert!(*bytes == udp::pattern(number, number), "answer {number} is another one");
    }
}

/// One backend's link is so slow that the proxy's socket towards it fills up, and stays full.
fn slow_backend() {
    let net = Topology::new();
    let other = topology::add_container(&net.host, Ipv4Addr::new(172, 17, 0, 3), CONTAINER_V6);
    net.host.command("tc qdisc add dev veth0002 root tbf rate 1mbit burst 10kb limit 100mb").success();
    let fast = Backend::echo(bind_in(&other, (Ipv4Addr::new(172, 17, 0, 3), PORT)));
    let (slow_to, fast_to) = (SocketAddr::from((CONTAINER_V4, PORT)).to_string(), fast.address().to_string());
    let slow_mapping = ["--proto", "udp", "--host", "0.0.0.0:5300", "--to", &slow_to];
    let fast_mapping = ["--host", "0.0.0.0:5301", "--to", &fast_to];
    let proxy = Standalone::start_in(&net.host, &[&slow_mapping[..], &fast_mapping[..]].concat());
    let [flooder, client] = [(); 2].map(|()| bind_in(&net.client, (CLIENT_V4, 0)));
    let flood = |_| {
        flooder.send_to(&[0; 1_400], ASKED).unwrap();
    };
    load::meanwhile(1, flood, |_flood| {
        let full = |line: &str| line.contains("wait for a socket");
        proxy.process.wait_for_line(Stream::Stderr, full);
        for number in 0..500_usize {
            assert_echoes(&client, (HOST_V4, 5301).into(), &number.to_be_bytes());
        }
    });
    // What waits goes on when there is room, and so does what comes behind it.
    let slow = bind_in(&net.container, (CONTAINER_V4, PORT));
    slow.set_nonblocking(true).unwrap();
    net.host.command("tc qdisc del dev veth0002 root").success();
    eventually("a datagram comes behind those that waited", || {
        flooder.send_to(b"behind", ASKED).unwrap();
        let mut buffer = [0; 2000];
        std::iter::from_fn(|| slow.recv(&mut buffer).ok().map(|len| buffer[..len] == *b"behind"))
            .any(|is_it| is_it)
    });
}

/// The clients' link is so slow that the proxy's socket towards them fills up, by answers to one of them.
/// No more of these are ahead of another's answer than that socket holds.
fn slow_way_out() {
    const FLOOD: usize = 20_000;
    const ROUNDS: usize = 20;
    const AHEAD: usize = 2_000;
    let net = Topology::new();
    net.host.command("tc qdisc add dev eth0 root tbf rate 50mbit burst 10kb limit 100mb").success();
    let proxy = relay_in(&net.host, "0.0.0.0:5300", (CONTAINER_V4, PORT), &[]);
    let backend = bind_in(&net.container, (CONTAINER_V4, PORT));
    let [busy, client] = [(); 2].map(|()| bind_in(&net.client, (CLIENT_V4, 0)));
    let [to_busy, to_client] = [&busy, &client].map(|client| {
        client.send_to(b"hello", ASKED).unwrap();
        udp::receive(&backend).1
    });
    let answer = |_| {
        backend.send_to(&[0; 1_400], to_busy).unwrap();
    };
    load::meanwhile(1, answer, |flood| {
        eventually("the flood is there", || flood.begun() > FLOOD);
        let before = packets_out(&net.host);
        for number in 0..ROUNDS {
            backend.send_to(&number.to_be_bytes(), to_client).unwrap();
            assert_eq!(udp::receive(&client).0, number.to_be_bytes());
        }
        let ahead = (packets_out(&net.host) - before) / ROUNDS;
        assert!(ahead < AHEAD, "{ahead} answers to another are ahead of one");
    });
    assert_eq!(flow_of_next(&client, &backend), to_client, "the flow has a new port");
    assert!(proxy.process.is_running());
}

/// Packets that left a namespace by `eth0` (proc(5), `/proc/net/dev`).
fn packets_out(namespace: &Namespace) -> usize {
    let table = namespace.run(|| fs::read_to_string("/proc/thread-self/net/dev").unwrap());
    let counters = table.lines().find_map(|line| line.trim_start().strip_prefix("eth0:")).unwrap();
    counters.split_whitespace().nth(9).unwrap().parse().unwrap()
}

fn flow_of_next(client: &UdpSocket, backend: &UdpSocket) -> SocketAddr {
    client.send_to(b"next", ASKED).unwrap();
    udp::receive(backend).1
}
