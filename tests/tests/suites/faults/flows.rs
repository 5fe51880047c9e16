//! UDP flows under abuse, and while their environment changes. The test controls backends and clients, so that each
//! datagram is accounted for.

use std::collections::HashSet;
use std::fs;
use std::net::{Ipv4Addr, Shutdown, SocketAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::{SysconfVar, sysconf};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use serde_json::{Value, json};
use socket2::SockRef;

use testkit::controlled::{Controlled, mapping};
use testkit::holdings::{private_memory, wait_until_idle};
use testkit::process::{Process, Stream};
use testkit::require::{self, Need};
use testkit::suite::Case;
use testkit::topology::{BRIDGE_V4, CLIENT_V4, CONTAINER_V4, HOST_V4, Topology};
use testkit::udp::{self, Backend, bind_in, flow_of};
use testkit::upgradable::Program;
use testkit::{eventually, eventually_equal};

use super::case;

const FRONT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(HOST_V4), 5300);
const BACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(CONTAINER_V4), 5300);

/// Datagrams of a burst that the default buffers hold, large as they are.
const LARGE: usize = 20;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("a flow's port was not used recently", ports_in_turn),
        case("a flow's port was not used recently, across an upgrade", ports_in_turn_over_an_upgrade),
        case("a flow's port is published", flows_give_way),
        case("a burst of clients beyond the cap", burst_at_the_cap),
        case("refused datagrams", refused_datagrams).needs(&[Need::Program("nft")]),
        case("a datagram from the backend", from_the_backend),
        case("a flow's socket is destroyed", destroyed).needs(&[Need::Program("ss")]),
        case("flows follow a change", changes_are_followed),
        case("replies from any port of a backend", any_port),
        case("a flow with any port survives an upgrade", any_port_upgraded),
        case("the host's address towards a backend changes", source_changes)
            .needs(&[Need::Program("sysctl")]),
        case("a flow's socket is shut down", shut_down),
        case("datagrams dropped by the kernel are counted", overflows_are_counted),
        case("datagrams dropped by the kernel are counted, across an upgrade", overflows_across_an_upgrade),
        case("ports are reserved while flows come and go", reserved_later),
        case("each mapping has its own limits of flows", limits_of_each_mapping),
        case("thousands of flows end at once", many_end_at_once),
        case("memory after a burst of large datagrams", burst_of_large_ones),
        case("the kernel's memory for many flows", shares_of_the_kernel).needs(&[Need::Program("ss")]),
        case("many flows to a slow backend", slow_backend).needs(&[Need::Program("tc")]),
    ]
}

/// A proxy on the host with mappings to the container.
struct Stage {
    net: Topology,
    proxy: Controlled,
}

impl Stage {
    fn new(limits: Value) -> Self {
        let net = Topology::new();
        let proxy = Controlled::start_in(&net.host, &[]);
        let stage = Self { net, proxy };
        stage.apply(limits, BACK);
        stage
    }

    /// Serves the front so from now on.
    fn apply(&self, limits: Value, back: SocketAddr) {
        let mut front = mapping("front", "udp", FRONT, back);
        front["limits"] = limits;
        self.proxy.apply(&[front]).success();
    }

    fn client(&self) -> UdpSocket {
        bind_in(&self.net.client, (CLIENT_V4, 0))
    }

    fn backend(&self, port: u16) -> UdpSocket {
        bind_in(&self.net.container, (CONTAINER_V4, port))
    }

    fn counter(&self, name: &str) -> u64 {
        self.proxy.stats("front")[name].as_u64().unwrap()
    }

    fn errors(&self) -> Value {
        self.proxy.stats("front")["errors"].clone()
    }

    /// Has the proxy find datagrams of many clients at once; gives the clients.
    fn burst(&self, clients: usize) -> Vec<UdpSocket> {
        let clients: Vec<_> = (0..clients).map(|_| self.client()).collect();
        self.proxy.process.signal(Signal::SIGSTOP);
        for client in &clients {
            client.send_to(b"question", FRONT).unwrap();
        }
        self.proxy.process.signal(Signal::SIGCONT);
        clients
    }
}

/// An answer that comes late must not find another client's flow at the port where its question came from.
fn ports_in_turn() {
    let stage = Stage::new(json!({ "udp_max_flows": 1 }));
    stage.net.host.run(|| {
        // What is reserved is left out.
        fs::write("/proc/sys/net/ipv4/ip_local_reserved_ports", "50010-50029").unwrap();
        fs::write("/proc/sys/net/ipv4/ip_local_port_range", "50000 50119").unwrap();
    });
    // Those are of the range there was when it began.
    let proxy = Controlled::start_in(&stage.net.host, &[]);
    let front = SocketAddr::from((HOST_V4, 5301));
    let mut mapping = mapping("front", "udp", front, BACK);
    mapping["limits"] = json!({ "udp_max_flows": 1 });
    proxy.apply(&[mapping]).success();
    let backend = stage.backend(5300);
    let mut seen = HashSet::new();
    // All are kept, so that no two have the same port.
    let clients: Vec<_> = (0..101).map(|_| stage.client()).collect();
    for client in &clients[..100] {
        client.send_to(b"question", front).unwrap();
        let port = udp::receive(&backend).1.port();
        assert!((50_000..50_010).contains(&port) || (50_030..50_120).contains(&port), "{port} is reserved");
        assert!(seen.insert(port), "{port} is another client's already");
    }
    // All had their turn, and answers may come to each of them.
    clients[100].send_to(b"question", front).unwrap();
    eventually("the datagram is counted", || proxy.stats("front")["errors"]["flow_failed"] == 1);
    assert!(udp::is_silent(&backend));
}

fn ports_in_turn_over_an_upgrade() {
    let net = Topology::new();
    net.host.run(|| fs::write("/proc/sys/net/ipv4/ip_local_port_range", "50000 50059").unwrap());
    let backend = bind_in(&net.container, (CONTAINER_V4, 5300));
    let program = Program::new();
    let to = BACK.to_string();
    let arguments = ["--proto", "udp", "--host", "0.0.0.0:5300", "--to", &to, "--udp-max-flows", "1"];
    let old = net.host.spawn(program.command(&arguments));
    old.wait_for_line(Stream::Stderr, |line| line.contains("confined"));
    // All are kept, so that no two have the same port.
    let clients: Vec<_> = (0..60).map(|_| bind_in(&net.client, (CLIENT_V4, 0))).collect();
    let mut seen = HashSet::new();
    for (number, client) in clients.iter().enumerate() {
        if number == 30 {
            old.signal(Signal::SIGUSR2);
            assert!(old.wait().success());
        }
        client.send_to(b"question", FRONT).unwrap();
        let port = udp::receive(&backend).1.port();
        assert!(seen.insert(port), "{port} is another client's already");
    }
}

/// A port that a flow uses towards its backend can be published: the flow's client gets another one.
fn flows_give_way() {
    let stage = Stage::new(json!({}));
    let _backend = Backend::naming(stage.backend(5300));
    let client = stage.client();
    let flow = flow_of(&client, FRONT);
    let front = SocketAddr::from((HOST_V4, flow.port()));
    // By all addresses, among them the one that the flow comes from.
    let (host, to) = (format!("0.0.0.0:{}", flow.port()), BACK.to_string());
    stage.proxy.ctl(&["add", "--proto", "udp", "--host", &host, "--to", &to]).success();
    assert_ne!(flow_of(&client, FRONT), flow);
    flow_of(&client, front);
    // Another program does not.
    let taken = stage.net.host.run(|| UdpSocket::bind("0.0.0.0:5353").unwrap());
    let refused = stage.proxy.ctl(&["add", "--proto", "udp", "--host", "0.0.0.0:5353", "--to", &to]);
    assert!(!refused.status.success(), "{refused:?}");
    drop(taken);
}

/// What a flow sent before it had to go was sent, and nothing is lost without a trace.
fn burst_at_the_cap() {
    let stage = Stage::new(json!({ "udp_max_flows": 8, "udp_max_flows_per_source": 8 }));
    let backend = Backend::echo(stage.backend(5300));
    let _clients = stage.burst(60);
    backend.wait_for(60);
    assert_eq!(stage.counter("datagrams_in"), 60);
    let mut errors = stage.errors();
    // Answers that had come for those that had to go.
    errors.as_object_mut().unwrap().remove("no_buffer");
    assert_eq!(errors, json!({ "flow_displaced": 52 }));
}

/// A datagram that the host's own rules refuse is not relayed.
fn refused_datagrams() {
    let stage = Stage::new(json!({}));
    let backend = stage.backend(5300);
    stage.net.host.command("nft add table inet t").success();
    stage.net.host.command("nft add chain inet t c { type filter hook output priority 0 ; }").success();
    let client = stage.client();
    client.send_to(b"1", FRONT).unwrap();
    assert_eq!(udp::receive(&backend).0, b"1");
    stage.net.host.command("nft add rule inet t c udp dport 5300 drop").success();
    for size in [100, 100, 3] {
        client.send_to(&vec![0; size], FRONT).unwrap();
    }
    eventually_equal("what was refused", &json!({ "datagram_refused": 3 }), || stage.errors());
    stage.net.host.command("nft flush chain inet t c").success();
    client.send_to(b"22", FRONT).unwrap();
    assert_eq!(udp::receive(&backend).0, b"22");
    eventually_equal("what was relayed", &2, || stage.counter("datagrams_in"));
    assert_eq!(stage.counter("bytes_in"), 3);
}

/// A datagram that comes from the backend would come back to it for ever.
/// `ss --kill` takes the peer away from a flow, which would then take datagrams of anybody.
fn destroyed() {
    let stage = Stage::new(json!({}));
    let backend = stage.backend(5300);
    let client = stage.client();
    for flows in 1..=3 {
        client.send_to(b"question", FRONT).unwrap();
        let (_question, flow) = udp::receive(&backend);
        backend.send_to(b"answer", flow).unwrap();
        assert_eq!(udp::receive(&client), (b"answer".to_vec(), FRONT));
        assert_eq!(stage.counter("flows_total"), flows);
        let mut ss = require::command("ss");
        ss.args(["--kill", "--udp", "--numeric", "src", &flow.to_string()]);
        let killed = stage.net.host.spawn(ss).into_output().success();
        assert!(killed.contains(&flow.to_string()), "this kernel cannot destroy sockets: {killed}");
        eventually("the flow is over", || stage.counter("flows") == 0);
    }
}

fn from_the_backend() {
    let stage = Stage::new(json!({}));
    let backend = stage.backend(5300);
    // Without the backend's address as its source, it is as good as any client's.
    let neighbour = stage.backend(5301);
    neighbour.send_to(b"question", FRONT).unwrap();
    assert_eq!(udp::receive(&backend).0, b"question");
    backend.send_to(b"goes round", FRONT).unwrap();
    eventually_equal("what was dropped", &json!({ "forged": 1 }), || stage.errors());
    assert!(udp::is_silent(&backend));
    assert_eq!(stage.counter("flows_total"), 1);
}

/// A client that goes on, from the same port, is served as the mapping is now.
fn changes_are_followed() {
    let stage = Stage::new(json!({}));
    let [_first, _second] = [5300, 5301].map(|port| {
        Backend::serve(stage.backend(port), move |socket, _bytes, from| {
            socket.send_to(&port.to_be_bytes(), from).unwrap();
        })
    });
    let client = stage.client();
    let ask = || {
        let (answer, from) = udp::ask(&client, FRONT, b"who are you?");
        assert_eq!(from, FRONT);
        u16::from_be_bytes(answer.try_into().unwrap())
    };
    assert_eq!(ask(), 5300);
    let elsewhere = SocketAddr::from((CONTAINER_V4, 5301));
    stage.proxy.ctl(&["retarget", "front", "--to", &elsewhere.to_string()]).success();
    assert_eq!(ask(), 5301);
    stage.apply(json!({}), BACK);
    assert_eq!(ask(), 5300);
    stage.apply(json!({ "deny": [CLIENT_V4.to_string()] }), BACK);
    client.send_to(b"denied", FRONT).unwrap();
    eventually("the client is denied", || stage.errors()["denied"] == 1);
    assert_eq!(stage.counter("flows"), 0);
    stage.apply(json!({ "allow": [CLIENT_V4.to_string()] }), BACK);
    assert_eq!(ask(), 5300);
    assert_eq!(stage.counter("flows_total"), 4);
    // It is still let in: its flow stays.
    stage.apply(json!({ "deny": ["192.0.2.0/24"] }), BACK);
    assert_eq!(ask(), 5300);
    assert_eq!(stage.counter("flows_total"), 4);
}

/// Each mapping has its own, whichever came first, and flows that there are follow a change.
fn limits_of_each_mapping() {
    let stage = Stage::new(json!({ "udp_timeout": "1s" }));
    let _backend = Backend::naming(stage.backend(5300));
    let long_front = SocketAddr::from((HOST_V4, 5301));
    let mut long = mapping("long", "udp", long_front, BACK);
    long["limits"] = json!({ "udp_timeout": "1h", "udp_max_flows": 2 });
    let mut short = mapping("front", "udp", FRONT, BACK);
    short["limits"] = json!({ "udp_timeout": "1s" });
    stage.proxy.apply(&[short.clone(), long.clone()]).success();
    let flows = |name: &str| stage.proxy.stats(name)["flows"].as_u64().unwrap();
    let clients: Vec<_> = (0..4).map(|_| stage.client()).collect();
    for client in &clients {
        flow_of(client, long_front);
        flow_of(client, FRONT);
    }
    eventually_equal("flows at the cap", &2, || flows("long"));
    assert_eq!(flow_of(&clients[3], long_front), flow_of(&clients[3], long_front));
    eventually_equal("flows that were idle", &0, || flows("front"));
    assert_eq!(flows("long"), 2);
    long["limits"] = json!({ "udp_timeout": "1h", "udp_max_flows": 1 });
    stage.proxy.apply(&[short.clone(), long.clone()]).success();
    eventually_equal("flows at the lower cap", &1, || flows("long"));
    long["limits"] = json!({ "udp_timeout": "1s", "udp_max_flows": 1 });
    stage.proxy.apply(&[short, long]).success();
    eventually_equal("flows at the shorter timeout", &0, || flows("long"));
}

/// Many flows end at once; the sockets are all closed in the end, and others were served meanwhile.
fn many_end_at_once() {
    const FLOWS: usize = 3_000;
    let stage = Stage::new(json!({ "udp_max_flows": FLOWS, "udp_max_flows_per_source": FLOWS }));
    let _backends = [5300, 5301].map(|port| Backend::echo(stage.backend(port)));
    let steady = SocketAddr::from((HOST_V4, 5301));
    let mappings = |to: Ipv4Addr, port| {
        let mut front = mapping("front", "udp", FRONT, SocketAddr::from((to, port)));
        front["limits"] = json!({ "udp_max_flows": FLOWS, "udp_max_flows_per_source": FLOWS });
        [front, mapping("steady", "udp", steady, BACK)]
    };
    stage.proxy.apply(&mappings(CONTAINER_V4, 5300)).success();
    let before = stage.proxy.process.descriptors();
    let client = stage.client();
    udp::assert_echoes(&client, steady, b"before");
    for _ in 0..FLOWS {
        udp::assert_echoes(&stage.client(), FRONT, b"question");
    }
    stage.proxy.apply(&mappings(CONTAINER_V4, 5301)).success();
    udp::assert_echoes(&client, steady, b"meanwhile");
    udp::assert_echoes(&stage.client(), FRONT, b"after");
    eventually_equal("flows of the mapping", &1, || stage.counter("flows"));
    // Those of the control socket come and go.
    eventually("their sockets are closed", || stage.proxy.process.descriptors() < before + 10);
    assert_eq!(stage.proxy.stats("steady")["flows_total"], 1);
}

/// What a burst needed is given back while its flow is still there, and each later one's.
fn burst_of_large_ones() {
    let stage = Stage::new(json!({}));
    let backend = Backend::echo(stage.backend(5300));
    let client = stage.client();
    udp::assert_echoes(&client, FRONT, b"before");
    let pid = stage.proxy.process.pid();
    wait_until_idle(pid);
    let before = private_memory(pid);
    for burst in 1..=2 {
        stage.proxy.process.signal(Signal::SIGSTOP);
        for _ in 0..LARGE {
            client.send_to(&[7; 60_000], FRONT).unwrap();
        }
        stage.proxy.process.signal(Signal::SIGCONT);
        backend.wait_for(1 + burst * LARGE);
        eventually("the memory is given back", || private_memory(pid) < before + 200);
    }
    assert_eq!((stage.counter("flows"), stage.counter("flows_total")), (1, 1));
}

/// What waits for a slow backend has one sum, of which each flow gets some.
fn slow_backend() {
    const MOST: usize = 18 * 1024;
    let stage = Stage::new(json!({}));
    let _backend = stage.backend(5300);
    stage.net.host.command("tc qdisc add dev veth0002 root tbf rate 1mbit burst 10kb limit 100mb").success();
    let clients: Vec<_> = (0..40).map(|_| stage.client()).collect();
    let pid = stage.proxy.process.pid();
    let before = private_memory(pid);
    let lost = || stage.errors()["no_buffer"].as_u64().unwrap_or(0);
    eventually("no flow has room", || {
        for client in clients.iter().cycle().take(10 * clients.len()) {
            client.send_to(&[7; 8_000], FRONT).unwrap();
        }
        let taken = private_memory(pid) - before;
        assert!(taken < MOST, "{taken} kB");
        lost() > 4_000
    });
    assert_eq!(stage.counter("flows"), 40);
}

/// What the kernel may queue for all flows has one sum, and those that are left get more again.
fn shares_of_the_kernel() {
    const FLOWS: usize = 2_000;
    let limits = json!({ "udp_max_flows": FLOWS, "udp_max_flows_per_source": FLOWS, "udp_timeout": "1h" });
    let stage = Stage::new(limits.clone());
    let _backend = Backend::echo(stage.backend(5300));
    let room = || {
        let mut ss = require::command("ss");
        ss.args(["--udp", "--numeric", "--memory", "--no-header", "dst", &BACK.to_string()]);
        let sockets = stage.net.host.spawn(ss).into_output().success();
        let of = |line: &str| {
            line.split(",rb").nth(1).map(|rest| rest.split(',').next().unwrap().parse().unwrap())
        };
        sockets.lines().filter_map(of).collect::<Vec<usize>>()
    };
    let first = stage.client();
    udp::assert_echoes(&first, FRONT, b"question");
    let alone = room();
    assert_eq!(alone.len(), 1);
    for _ in 1..FLOWS {
        udp::assert_echoes(&stage.client(), FRONT, b"question");
    }
    // Some clients got the port of one before. An eighth of what the kernel has for all, which is at most a fifth of the memory; or 16 kB each.
    let memory =
        sysconf(SysconfVar::_PHYS_PAGES).unwrap().unwrap() * sysconf(SysconfVar::PAGE_SIZE).unwrap().unwrap();
    let most = (usize::try_from(memory).unwrap() / 40).max(FLOWS * 16 * 1024);
    eventually("all have their share", || {
        udp::assert_echoes(&first, FRONT, b"question");
        let room = room();
        room.len() > FLOWS / 2 && room.iter().sum::<usize>() <= most
    });
    let mut fewer = mapping("front", "udp", FRONT, BACK);
    fewer["limits"] = limits;
    fewer["limits"]["udp_max_flows"] = 1.into();
    stage.proxy.apply(&[fewer]).success();
    eventually("the last one has more", || {
        udp::assert_echoes(&first, FRONT, b"question");
        room() == alone
    });
}

/// Answers of one flow come from other ports of the backend's address, and what follows goes where the last one came
/// from. Nobody else can answer, nor can the backend itself if it is not asked for.
fn any_port() {
    let stage = Stage::new(json!({ "udp_any_port": true }));
    let [backend, other] = [5300, 6300].map(|port| stage.backend(port));
    let stranger = bind_in(&stage.net.host, (BRIDGE_V4, 5300));
    let client = stage.client();
    client.send_to(b"question", FRONT).unwrap();
    let flow = udp::receive(&backend).1;
    stranger.send_to(b"forged", flow).unwrap();
    eventually_equal("what was dropped", &json!({ "forged": 1 }), || stage.errors());
    other.send_to(b"answer", flow).unwrap();
    assert_eq!(udp::receive(&client), (b"answer".to_vec(), FRONT));
    client.send_to(b"go on", FRONT).unwrap();
    assert_eq!(udp::receive(&other), (b"go on".to_vec(), flow));
    backend.send_to(b"end", flow).unwrap();
    assert_eq!(udp::receive(&client), (b"end".to_vec(), FRONT));
    client.send_to(b"thanks", FRONT).unwrap();
    assert_eq!(udp::receive(&backend), (b"thanks".to_vec(), flow));
    // Without it, the client gets a new flow, and that takes answers from where it asked alone.
    stage.apply(json!({}), BACK);
    client.send_to(b"question", FRONT).unwrap();
    let connected = udp::receive(&backend).1;
    assert_ne!(connected, flow);
    other.send_to(b"refused", connected).unwrap();
    backend.send_to(b"answer", connected).unwrap();
    assert_eq!(udp::receive(&client), (b"answer".to_vec(), FRONT));
}

fn any_port_upgraded() {
    let net = Topology::new();
    let program = Program::new();
    let to = BACK.to_string();
    let arguments = ["--proto", "udp", "--host", "0.0.0.0:5300", "--to", &to, "--udp-any-port"];
    let old = net.host.spawn(program.command(&arguments));
    old.wait_for_line(Stream::Stderr, |line| line.contains("confined"));
    let [backend, other] = [5300, 6300].map(|port| bind_in(&net.container, (CONTAINER_V4, port)));
    let client = bind_in(&net.client, (CLIENT_V4, 0));
    client.send_to(b"question", FRONT).unwrap();
    let flow = udp::receive(&backend).1;
    other.send_to(b"answer", flow).unwrap();
    assert_eq!(udp::receive(&client), (b"answer".to_vec(), FRONT));
    old.signal(Signal::SIGUSR2);
    assert!(old.wait().success());
    client.send_to(b"go on", FRONT).unwrap();
    assert_eq!(udp::receive(&other), (b"go on".to_vec(), flow));
    backend.send_to(b"end", flow).unwrap();
    assert_eq!(udp::receive(&client), (b"end".to_vec(), FRONT));
}

/// The address that a flow sends from is taken away from the host, which has got another one.
fn source_changes() {
    for limits in [json!({}), json!({ "udp_any_port": true })] {
        let stage = Stage::new(limits);
        let _backend = Backend::naming(stage.backend(5300));
        let client = stage.client();
        let before = flow_of(&client, FRONT);
        assert_eq!(before.ip(), BRIDGE_V4);
        stage.net.host.ip("address add 172.17.0.9/16 dev docker0");
        stage.net.host.ip(&format!("address delete {BRIDGE_V4}/16 dev docker0"));
        stage.net.host.ip("address replace 172.17.0.9/16 dev docker0");
        // The first one finds out.
        client.send_to(b"lost", FRONT).unwrap();
        eventually("the flow is over", || stage.counter("flows") == 0 || stage.counter("flows_total") == 2);
        let after = flow_of(&client, FRONT);
        assert_eq!(after.ip().to_string(), "172.17.0.9");
    }
}

/// Shuts down the socket of a process that is at a local port, as another process could that has it open.
fn shut_down_at(process: &Process, port: u16, how: Shutdown) {
    let pid = rustix::process::Pid::from_raw(process.pid().as_raw()).unwrap();
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    for entry in fs::read_dir(format!("/proc/{}/fd", process.pid())).unwrap() {
        let number = entry.unwrap().file_name().into_string().unwrap().parse().unwrap();
        let Ok(socket) = pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()) else { continue };
        let address = SockRef::from(&socket).local_addr().ok().and_then(|address| address.as_socket());
        if address.is_some_and(|address| address.port() == port) {
            return SockRef::from(&socket).shutdown(how).unwrap();
        }
    }
    panic!("no socket is at port {port}");
}

fn shut_down() {
    let stage = Stage::new(json!({}));
    let _backend = Backend::naming(stage.backend(5300));
    let client = stage.client();
    for (flows, how) in (1..).zip([Shutdown::Read, Shutdown::Write, Shutdown::Both]) {
        let flow = flow_of(&client, FRONT);
        assert_eq!(stage.counter("flows_total"), flows);
        shut_down_at(&stage.proxy.process, flow.port(), how);
        if how == Shutdown::Write {
            // The next datagram finds out.
            client.send_to(b"lost", FRONT).unwrap();
        }
        eventually("the flow is over", || stage.counter("flows") == 0);
    }
    flow_of(&client, FRONT);
    wait_until_idle(stage.proxy.process.pid());
}

/// More datagrams than the kernel queues for a process that is not there to take them, both ways.
fn overflows_are_counted() {
    const BURST: u64 = 20_000;
    let stage = Stage::new(json!({}));
    let (backend, client) = (stage.backend(5300), stage.client());
    client.send_to(b"hello", FRONT).unwrap();
    let flow = udp::receive(&backend).1;
    stage.proxy.process.pause();
    for _ in 0..BURST {
        client.send_to(&[0; 1_200], FRONT).unwrap();
        backend.send_to(&[0; 1_200], flow).unwrap();
    }
    stage.proxy.process.resume();
    eventually("some arrive", || stage.counter("datagrams_in") > 1 && stage.counter("datagrams_out") > 0);
    // How many there was no room for, the next ones say.
    assert_in_use(&client, &backend, flow);
    let lost = || stage.errors()["no_buffer"].as_u64().unwrap_or(0);
    let sum = || stage.counter("datagrams_in") + stage.counter("datagrams_out") + lost();
    eventually_equal("each is relayed or counted, once", &(1 + 2 * BURST + 2 * 3), sum);
    assert!(lost() > BURST / 2, "{}", stage.errors());
}

/// Takes what has arrived at both sides of a flow, and checks that it still passes datagrams both ways.
fn assert_in_use(client: &UdpSocket, backend: &UdpSocket, flow: SocketAddr) {
    udp::receive_all(backend);
    udp::receive_all(client);
    for number in 0..3 {
        client.send_to(&[number], FRONT).unwrap();
        assert_eq!(udp::receive(backend).0, [number]);
        backend.send_to(&[number], flow).unwrap();
        assert_eq!(udp::receive(client).0, [number]);
    }
}

/// The buffers overflow, once before an upgrade, and again while neither process reads.
fn overflows_across_an_upgrade() {
    const BURST: usize = 12_000;
    let net = Topology::new();
    let program = Program::new();
    let (to, control) = (BACK.to_string(), program.control());
    let mapping = ["--name", "front", "--proto", "udp", "--host", "0.0.0.0:5300", "--to", &to];
    let old =
        net.host.spawn(program.command(&[&mapping[..], &["--control", control.to_str().unwrap()]].concat()));
    old.wait_for_line(Stream::Stderr, |line| line.contains("confined"));
    let (backend, client) =
        (bind_in(&net.container, (CONTAINER_V4, 5300)), bind_in(&net.client, (CLIENT_V4, 0)));
    client.send_to(b"hello", FRONT).unwrap();
    let flow = udp::receive(&backend).1;
    let errors = || {
        let stats: Value = serde_json::from_str(&program.ctl(&["stats", "--json"]).success()).unwrap();
        stats["mappings"][0].clone()
    };
    let overflow = |process: &Process| {
        process.pause();
        for _ in 0..BURST {
            client.send_to(&[0; 1_200], FRONT).unwrap();
            backend.send_to(&[0; 1_200], flow).unwrap();
        }
    };
    overflow(&old);
    old.resume();
    let mut before = 1 + 2 * BURST as u64;
    eventually("each datagram of the burst is counted as relayed or lost", || {
        client.send_to(b"", FRONT).unwrap();
        backend.send_to(b"", flow).unwrap();
        let stats = errors();
        let count = |value: &Value| value.as_u64().unwrap_or(0);
        let relayed = count(&stats["datagrams_in"]) + count(&stats["datagrams_out"]);
        let are_counted = relayed + count(&stats["errors"]["no_buffer"]) >= before;
        // The next look has to find these, too.
        before += 2;
        are_counted
    });
    overflow(&old);
    old.signal(Signal::SIGUSR2);
    old.resume();
    assert!(old.wait().success());
    assert_in_use(&client, &backend, flow);
    let lost = errors()["errors"]["no_buffer"].as_u64().unwrap_or(0);
    assert!(lost <= 2 * BURST as u64, "{lost} are more than there were");
}

/// Whoever reserves ports need not restart the proxy.
fn reserved_later() {
    let set = |name: &str, value: &str| fs::write(format!("/proc/sys/net/ipv4/{name}"), value).unwrap();
    let net = Topology::new();
    net.host.run(|| set("ip_local_port_range", "50000 50999"));
    let _backend = Backend::naming(bind_in(&net.container, (CONTAINER_V4, 5300)));
    let proxy = Controlled::start_in(&net.host, &["--sandbox", "strict"]);
    proxy.apply(&[mapping("front", "udp", FRONT, BACK)]).success();
    let mut clients = Vec::new();
    let mut port = || {
        // All are kept, so that no two have the same port.
        clients.push(bind_in(&net.client, (CLIENT_V4, 0)));
        flow_of(&clients[clients.len() - 1], FRONT).port()
    };
    assert!((50_000..51_000).contains(&port()));
    net.host.run(|| set("ip_local_reserved_ports", "50100-50999"));
    // It looks now and then. Each flow keeps its port, so that there are not many to try.
    eventually("reserved ports are left alone", || {
        thread::sleep(Duration::from_millis(250));
        let ports: Vec<u16> = (0..10).map(|_| port()).collect();
        ports.iter().all(|port| (50_000..50_100).contains(port))
    });
    for _ in 0..10 {
        let port = port();
        assert!((50_000..50_100).contains(&port), "{port} is reserved");
    }
    net.host.run(|| set("ip_local_port_range", "51000 51999"));
    eventually("the new range is used", || {
        thread::sleep(Duration::from_millis(250));
        (51_000..52_000).contains(&port())
    });
}
