//! The README's limits of memory and descriptors, for each mapping, port, connection and flow.

use std::net::{IpAddr, SocketAddr};

use nix::unistd::Pid;
use serde_json::{Value, json};

use testkit::backend::TcpBackend;
use testkit::client::{self, FOREIGN};
use testkit::controlled::{Controlled, mapping};
use testkit::docker_proxy::{self, DockerProxy, Status};
use testkit::holdings::{Holdings, private_memory, wait_until_idle};
use testkit::rproxy;
use testkit::shim::{Reply, Shim};
use testkit::suite::Case;
use testkit::{eventually, udp};

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("a mapping in a process of its own", process),
        case("a mapping in a process with others", mapping_with_others),
        case("a port of a range", port_of_a_range),
        case("an attached port", attached_port),
        case("an idle connection", connection),
        case("a flow", flow),
    ]
}

/// What a process has, in bytes and descriptors.
#[derive(Clone, Copy, Debug)]
struct Taken {
    bytes: usize,
    descriptors: usize,
}

fn taken(pid: Pid) -> Taken {
    wait_until_idle(pid);
    let Holdings { sockets, pipes, others, .. } = Holdings::of(pid);
    Taken { bytes: private_memory(pid) * 1024, descriptors: sockets + pipes + others }
}

/// Checks what each of `count` takes, up to a page or two of the whole. What was needed for a moment may
/// still be given back.
#[track_caller]
fn assert_each(pid: Pid, before: Taken, count: usize, most_bytes: usize, descriptors: usize) {
    let bytes = |after: Taken| after.bytes.saturating_sub(before.bytes) / count;
    eventually(&format!("each takes at most {most_bytes} bytes"), || bytes(taken(pid)) <= most_bytes);
    // One that the process had for a moment does not count.
    let after = taken(pid);
    let more = after.descriptors.saturating_sub(before.descriptors);
    assert_eq!((more + count / 2) / count, descriptors, "{before:?}, {after:?}");
}

fn process() {
    let backend = TcpBackend::echo();
    let start = || {
        let front = (client::own_loopback(), 8080).into();
        let arguments = docker_proxy::mapping("tcp", front, backend.address());
        let mut proxy = DockerProxy::start(rproxy::rproxy(), &arguments, None);
        assert_eq!(proxy.status(), Status::Ready);
        proxy
    };
    // What of the program is in memory is private to a process that is the only one.
    let _another = start();
    let proxy = start();
    let pid = proxy.process.pid();
    // What was needed for a moment may still be given back.
    eventually("it takes at most 150 kB", || taken(pid).bytes <= 150 * 1024);
    let Taken { descriptors, .. } = taken(pid);
    assert!(descriptors <= 16, "{descriptors} descriptors");
    assert_eq!(Holdings::of(proxy.process.pid()).threads, 1);
}

/// Mappings at one port of many addresses.
fn mappings(count: usize, ports: &str) -> Vec<Value> {
    let at = |number: usize| {
        let address = IpAddr::from(client::own_loopback());
        json!({ "name": format!("m{number}"), "host": address, "host_ports": ports,
                "to": "192.0.2.1", "to_ports": ports })
    };
    (0..count).map(at).collect()
}

fn mapping_with_others() {
    let proxy = Controlled::start(&[]);
    // What reading requests leaves in the allocator is there afterwards, and used again.
    proxy.apply(&mappings(500, "8080")).success();
    proxy.apply(&[]).success();
    let before = taken(proxy.process.pid());
    proxy.apply(&mappings(500, "8080")).success();
    assert_each(proxy.process.pid(), before, 500, 3 * 1024, 1);
}

fn port_of_a_range() {
    let proxy = Controlled::start(&[]);
    let before = taken(proxy.process.pid());
    proxy.apply(&mappings(1, "20000-21999")).success();
    assert_each(proxy.process.pid(), before, 2000, 1024, 1);
}

/// Its listener and the connection of its shim.
fn attached_port() {
    let name = format!("rproxy-tests/promises/{}", std::process::id());
    let proxy = Controlled::start(&[&format!("--attach={name}")]);
    let attach = |_| {
        let (shim, backend) = (Shim::connect(&name).unwrap(), (FOREIGN, 80).into());
        let (listener, _) = client::own_listener();
        assert_eq!(shim.attach_tcp(&listener, backend), Reply::Serving);
        let other = Shim::connect(&name).unwrap();
        let socket = udp::client(client::own_loopback());
        assert_eq!(other.attach_udp(&socket, backend), Reply::Serving);
        (shim, other)
    };
    let _first = attach(0);
    let before = taken(proxy.process.pid());
    let count = 1000;
    let _shims: Vec<_> = (0..count / 2).map(attach).collect();
    assert_each(proxy.process.pid(), before, count, 2560, 2);
    assert_eq!(proxy.json(&["stats"])["mappings"].as_array().unwrap().len(), count + 2);
}

fn connection() {
    let backend = TcpBackend::echo();
    let proxy = Controlled::start(&[]);
    let front = SocketAddr::from((client::own_loopback(), 8080));
    proxy.apply(&[mapping("web", "tcp", front, backend.address())]).success();
    client::ask(front, b"hello").unwrap();
    let before = taken(proxy.process.pid());
    let count = 2000;
    let clients: Vec<_> = (0..count).map(|_| client::connect(front)).collect();
    eventually("all are served", || proxy.stats("web")["connections"] == count);
    assert_each(proxy.process.pid(), before, count, 4 * 1024, 2);
    drop(clients);
}

fn flow() {
    let proxy = Controlled::start(&[]);
    let (front, backend) =
        (SocketAddr::from((client::own_loopback(), 53)), udp::client(client::own_loopback()));
    let address = backend.local_addr().unwrap();
    let _backend = udp::Backend::echo(backend);
    proxy.apply(&[mapping("dns", "udp", front, address)]).success();
    udp::assert_echoes(&udp::client(front.ip()), front, b"question");
    let before = taken(proxy.process.pid());
    let count = 2000;
    let clients: Vec<_> = (0..count).map(|_| udp::client(front.ip())).collect();
    clients.iter().for_each(|client| udp::assert_echoes(client, front, b"question"));
    assert_each(proxy.process.pid(), before, count, 2560, 1);
}
