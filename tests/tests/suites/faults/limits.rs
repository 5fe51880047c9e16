//! Behaviour at the limits of the kernel.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::Duration;

use serde_json::json;

use testkit::backend::TcpBackend;
use testkit::client::{self, End};
use testkit::controlled::{Controlled, mapping};
use testkit::eventually;
use testkit::holdings::{Holdings, private_memory};
use testkit::netns::Namespace;
use testkit::process::{self, Stream};
use testkit::require::{self, Need};
use testkit::role;
use testkit::rproxy::Standalone;
use testkit::suite::Case;
use testkit::topology::{CONTAINER_V4, HOST_V4, Topology};
use testkit::udp;

use super::case;
use super::roles;
use super::scene::{BACK, FRONT, Scene};

/// A backend at another port of the same container.
const SECOND_FRONT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(HOST_V4), 90);
const SECOND_BACK: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(CONTAINER_V4), 90);

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("all local ports are taken", ports_exhausted).needs(&[Need::Program("sysctl")]),
        case("the local port of a connection can be published", own_port_published),
        case("the process runs out of descriptors", no_descriptors).needs(&[Need::Program("prlimit")]),
        case("the machine runs out of descriptors", no_files).needs(&[Need::Program("strace")]),
        case("the kernel runs out of buffers for datagrams", no_buffers).needs(&[Need::Program("strace")]),
        case("the user runs out of pipes", no_pipes).needs(&[Need::Program("setpriv")]),
        case("10,000 silent clients", silent_clients),
    ]
}

fn echo_at(scene: &Scene, address: SocketAddr) -> TcpBackend {
    TcpBackend::echo_in(&scene.topology.container, address)
}

fn ports_exhausted() {
    const PORTS: usize = 32;

    let scene = Scene::new(json!({ "connect_timeout": "5s" }));
    let backends = [echo_at(&scene, BACK), echo_at(&scene, SECOND_BACK)];
    let [host, to] = [SECOND_FRONT, SECOND_BACK].map(|address| address.to_string());
    scene.proxy.json(&["add", "--name", "second", "--host", &host, "--to", &to]);
    // Not beside the other clients, each of which would want a port, too.
    scene.topology.host.run(|| fs::write("/proc/sys/net/ipv4/ip_local_port_range", "50000 50031").unwrap());
    {
        let connect = |front| scene.topology.client.run(|| client::connect(front));
        let mut taken: Vec<_> = (0..PORTS).map(|_| connect(FRONT)).collect();
        taken.iter().for_each(|client| client::exchange(client, 1, 100));
        // There are no more, and they wait.
        let waiting: Vec<_> = (0..PORTS).map(|_| connect(FRONT)).collect();
        let no_ports = |line: &str| line.contains("clients wait for a local port");
        scene.proxy.process.wait_for_line(Stream::Stderr, no_ports);
        // Towards another address they are all free: no port is taken before it is known where it leads to.
        let others: Vec<_> = (0..PORTS).map(|_| connect(SECOND_FRONT)).collect();
        others.iter().for_each(|client| client::exchange(client, 2, 100));
        // Each port that comes back is for one of them; the others are reset when their time is over.
        taken.drain(..PORTS / 2).for_each(client::reset);
        let answered = thread::scope(|scope| {
            let ask = |mut client: &TcpStream| {
                client
                    .write_all(b"x")
                    .and_then(|()| client.read_exact(&mut [0]))
                    .map_err(|error| error.kind())
            };
            let clients: Vec<_> = waiting.iter().map(|client| scope.spawn(move || ask(client))).collect();
            clients.into_iter().map(|client| client.join().unwrap()).collect::<Vec<_>>()
        });
        let served = answered.iter().filter(|answer| answer.is_ok()).count();
        let resets = [Err(ErrorKind::ConnectionReset), Err(ErrorKind::BrokenPipe)];
        let reset = answered.iter().filter(|answer| resets.contains(answer)).count();
        assert_eq!((served, reset), (PORTS / 2, PORTS / 2), "{answered:?}");
        taken.iter().for_each(|client| client::exchange(client, 3, 100));
        taken.into_iter().chain(waiting).chain(others).for_each(client::reset);
    }
    scene.proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("ip_local_port_range"));
    drop(backends);
    assert_eq!(scene.stats()["errors"]["connect_failed"], PORTS / 2);
    scene.proxy.ctl(&["remove", "second"]).success();
}

/// The port that a connection of `rproxy` has towards a backend can be published.
fn own_port_published() {
    // Elsewhere, connections of other programs may have the same port.
    let host = Namespace::new();
    let (proxy, address) = (Controlled::start_in(&host, &[]), client::own_address());
    let backend = host.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    let to = backend.local_addr().unwrap();
    proxy.apply(&[mapping("web", "tcp", address, to)]).success();
    let client = host.run(|| client::connect(address));
    let (server, ours) = backend.accept().unwrap();
    for published in [ours.to_string(), format!("[::]:{}", ours.port())] {
        proxy.ctl(&["add", "--name", "own", "--host", &published, "--to", &to.to_string()]).success();
        let _published = host.run(|| client::connect(ours));
        proxy.ctl(&["remove", "own"]).success();
    }
    drop((client, server));
}

fn no_descriptors() {
    let scene = Scene::new(json!({}));
    let _backend = echo_at(&scene, BACK);
    let pid = scene.proxy.process.pid();
    let clients: Vec<_> = (0..20).map(|_| scene.connect()).collect();
    clients.iter().for_each(|client| client::exchange(client, 1, 100));
    let Holdings { sockets, pipes, others, .. } = Holdings::of(pid);
    // For four more connections, and not quite for a fifth.
    scene.proxy.process.limit_descriptors(sockets + pipes + others + 9);
    let waiting: Vec<_> = (0..20).map(|_| scene.connect()).collect();
    for mut client in &waiting {
        client.write_all(b"ping").unwrap();
    }
    scene.proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("ulimit"));
    // Above all now the process has to be looked at.
    for _ in 0..3 {
        assert!(scene.stats()["connections"].as_u64().unwrap() >= 24);
    }
    // Those that have a place keep it, and each that leaves makes room for another.
    clients.iter().for_each(|client| client::exchange(client, 2, 100));
    drop(clients);
    for mut client in waiting {
        let mut answer = [0; 4];
        client.read_exact(&mut answer).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client::read_to_end(&client), (vec![], End::Eof));
    }
    scene.proxy.process.limit_descriptors(1024);
    scene.under_load(|| scene.assert_serves());
    scene.assert_nothing_left();
    let stats = scene.stats();
    assert_eq!((&stats["connections_total"], &stats["errors"]), (&json!(41), &json!({})));
}

/// `rproxy` under strace(1), which makes some calls fail. Its pid is that of strace.
fn with_failing(call: &str, errno: &str, when: &str) -> impl FnOnce(Command) -> Command {
    let inject = format!("inject={call}:error={errno}:when={when}");
    move |command| {
        let mut strace = require::command("strace");
        strace.args(["-D", "-qq", "-f", "-o", "/dev/null", "-e", &format!("trace={call}"), "-e", &inject]);
        process::prefixed(strace, &command)
    }
}

fn no_files() {
    // The limit of the machine cannot be reached in a namespace.
    let scene = Scene::with(json!({}), &[], with_failing("accept4", "ENFILE", "3..40+3"));
    let _backend = echo_at(&scene, BACK);
    scene.under_load(|| (0..20).for_each(|_| scene.assert_serves()));
    scene.proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("fs.file-max"));
    scene.assert_nothing_left();
    let stats = scene.stats();
    assert_eq!((&stats["connections_total"], &stats["errors"]), (&json!(20), &json!({})));
}

fn no_buffers() {
    let topology = Topology::new();
    let backend = udp::Backend::echo(udp::bind_in(&topology.container, (CONTAINER_V4, 53)));
    let arguments = ["--proto", "udp", "--host", "0.0.0.0:53", "--to", "172.17.0.2:53"];
    let command = with_failing("sendmmsg", "ENOBUFS", "1..30+2")(testkit::rproxy::command(&arguments));
    let proxy = Standalone::ready(topology.host.spawn(command), &arguments);
    let client = topology.client.run(|| udp::client(Ipv4Addr::UNSPECIFIED));
    client.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    // Datagrams may be lost; the flow is not, nor the listener.
    let mut echoed = 0;
    eventually("datagrams pass again", || {
        client.send_to(b"question", (HOST_V4, 53)).unwrap();
        echoed += usize::from(client.recv(&mut [0; 9]).is_ok());
        echoed == 20
    });
    assert!(backend.received() >= 20);
    drop(proxy);
}

fn no_pipes() {
    // A user that nobody else is.
    let user = ["--reuid=64123", "--regid=64123", "--clear-groups"];
    let as_user = |command: &Command| {
        let mut setpriv = require::command("setpriv");
        setpriv.args(user);
        process::prefixed(setpriv, command)
    };
    let topology = Topology::new();
    let _hog = roles::ready(topology.host.spawn(as_user(&role::command(&["pipes"]))));
    let arguments = ["--host", "0.0.0.0:8080", "--to", &BACK.to_string()];
    let command = as_user(&testkit::rproxy::command(&arguments));
    let proxy = Standalone::ready(topology.host.spawn(command), &arguments);
    let backend = TcpBackend::echo_in(&topology.container, BACK);
    let pipes = || Holdings::of(proxy.process.pid()).pipes;
    let standard_streams = pipes();
    let client = topology.client.run(|| client::connect((HOST_V4, 8080).into()));
    client::exchange(&client, 1, 32 * 1024 * 1024);
    assert_eq!(pipes(), standard_streams, "none to splice through");
    drop(backend);
}

/// How many descriptors this process may have.
fn descriptor_limit() -> usize {
    roles::raise_descriptor_limit();
    let (soft, _hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    usize::try_from(soft).unwrap()
}

fn silent_clients() {
    const CLIENTS: usize = 10_000;
    // As much as an idle connection takes with the allocator's overhead, in kB for all of them.
    const MOST_KB: usize = CLIENTS * 3;

    let descriptors = descriptor_limit();
    assert!(descriptors > CLIENTS + 1000, "too few descriptors for the clients (`ulimit -Hn`)");
    // The others have to get some of them, too.
    let most = CLIENTS.min((descriptors - 1000) / 2);
    let scene = Scene::new(json!({ "max_connections": most }));
    let _backend = roles::start_in(&scene.topology.container, &["silent", &BACK.to_string()]);
    let pid = scene.proxy.process.pid();
    let before = private_memory(pid);
    scene.under_load(|| {
        let clients: Vec<TcpStream> = thread::scope(|scope| {
            let connect =
                || scene.topology.client.run(|| (0..CLIENTS / 4).map(|_| client::connect(FRONT)).collect());
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(connect)).collect();
            threads.into_iter().flat_map(|thread| -> Vec<TcpStream> { thread.join().unwrap() }).collect()
        });
        // Those that are left wait in the backlog.
        eventually("all of them are served that may be", || scene.stats()["connections"] == most);
        let now = private_memory(pid);
        assert!(now - before < MOST_KB, "{now} kB, {before} kB before");
        clients.into_iter().for_each(client::reset);
    });
    scene.assert_nothing_left();
    let stats = scene.stats();
    assert_eq!(
        (&stats["connections_total"], &stats["errors"]),
        (&json!(CLIENTS), &json!({ "reset": CLIENTS }))
    );
}
