//! SCTP, as docker-proxy relays it: by docker-proxy's flags, by the flags of users, by configurations and by changes.
//!
//! The cases are listed where the kernel has SCTP, which is the case in the machines of the suite `vm`.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::mpsc;

use nix::sys::signal::Signal;
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};

use testkit::client::{self, own_address};
use testkit::controlled::{Controlled, mapping};
use testkit::docker_proxy::Status;
use testkit::oracle::{self, Holds, Row, Subject};
use testkit::process::{self, Stream};
use testkit::rproxy::{self, Standalone};
use testkit::sctp::{self, Peer, Server};
use testkit::suite::Case;
use testkit::upgradable::{self, Program};
use testkit::vm::guest;
use testkit::{PATIENCE, eventually_within};

use rproxy_sys::sctp::Label;

use Holds::{ForBoth, ForRproxy};

const ROWS: &[Row] = &[
    ("TestSCTP4ProxyNoListener", ForBoth, echo_v4),
    ("TestSCTP6ProxyNoListener", ForBoth, echo_v6),
    ("TestSCTP4Proxy", ForRproxy("docker-proxy 20.10 takes no listener"), adopted_v4),
    ("TestSCTP6Proxy", ForRproxy("docker-proxy 20.10 takes no listener"), adopted_v6),
    ("IPv6 host, IPv4 container", ForBoth, host_v6_container_v4),
    ("streams, identifiers and boundaries are kept", ForBoth, labels_are_kept),
    ("a message of 64 kB is one message", ForRproxy("docker-proxy cuts it at 32 kB"), long_message),
    ("what is sent before a shutdown arrives", ForBoth, shutdown_after_data),
    ("SIGINT ends it", ForBoth, sigint_ends_it),
];

pub(crate) fn cases() -> Vec<Case> {
    if !guest::is_here() && !sctp::is_there() {
        return Vec::new();
    }
    let case = |name: &str, body: fn()| Case::new(name, body);
    let own = vec![
        case("an echo without a proxy", || {
            let server = Server::echo(v4());
            Peer::connect(server.address).unwrap().assert_echoes(b"message", Label::default());
        }),
        case("a backend's shutdown ends its client", backend_shuts_down),
        case("an abort is propagated as an abort", abort_is_passed_on),
        case("clients that abort at once", aborting_clients),
        case("a backend that refuses", refusing_backend),
        case("a slow reader gets everything", slow_reader),
        case("messages both ways at once", both_ways),
        case("flags, strictly confined", flags),
        case("an address of the host", source_address),
        case("a configuration is served, reloaded and handed over", configuration),
        case("add, list, count and remove", controlled),
        case("a socket that comes with a request is served", passed),
        case("options that SCTP cannot have are refused", refused_options),
    ];
    // Only a machine of its own can do without the module.
    let without = guest::is_here().then(|| case("without the module, a line names it", without_module));
    ROWS.iter().flat_map(oracle::cases).chain(own).chain(without).collect()
}

fn v4() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

fn v6() -> SocketAddr {
    (Ipv6Addr::LOCALHOST, 0).into()
}

fn free_v6() -> SocketAddr {
    (Ipv6Addr::LOCALHOST, client::free_port(Ipv6Addr::LOCALHOST)).into()
}

/// The label of a message of this stream.
fn label(stream: u16, ppid: u32) -> Label {
    Label { stream, is_unordered: false, ppid: ppid.to_be_bytes() }
}

#[track_caller]
fn assert_echoes(address: SocketAddr) {
    Peer::connect(address).unwrap().assert_echoes(b"message", label(1, 46));
}

fn echo_v4(subject: Subject) {
    let (backend, host) = (Server::echo(v4()), own_address());
    let _proxy = subject.serve("sctp", host, backend.address);
    assert_echoes(host);
}

fn echo_v6(subject: Subject) {
    let (backend, host) = (Server::echo(v6()), free_v6());
    let _proxy = subject.serve("sctp", host, backend.address);
    assert_echoes(host);
}

fn host_v6_container_v4(subject: Subject) {
    let (backend, host) = (Server::echo(v4()), free_v6());
    let _proxy = subject.serve("sctp", host, backend.address);
    assert_echoes(host);
}

fn adopted(subject: Subject, at: SocketAddr) {
    let (backend, listener) = (Server::echo(at), sctp::listen(at));
    let address = sctp::address_of(&listener);
    let mut proxy = subject.adopt("sctp", listener, backend.address);
    assert_eq!(proxy.status(), Status::Ready);
    assert_echoes(address);
}

fn adopted_v4(subject: Subject) {
    adopted(subject, v4());
}

fn adopted_v6(subject: Subject) {
    adopted(subject, v6());
}

fn labels_are_kept(subject: Subject) {
    let (backend, host) = (Server::echo(v4()), own_address());
    let _proxy = subject.serve("sctp", host, backend.address);
    let peer = Peer::connect(host).unwrap();
    for (stream, ppid, len) in [(0, 0, 1), (3, 46, 1400), (9, 0xdead_beef, 30_000)] {
        peer.assert_echoes(&vec![7; len], label(stream, ppid));
    }
    peer.assert_echoes(b"unordered", Label { is_unordered: true, ..label(2, 5) });
    // Two messages remain two.
    for message in [b"first".as_slice(), b"second"] {
        peer.send(message, label(1, 1)).unwrap();
    }
    for message in [b"first".as_slice(), b"second"] {
        assert_eq!(peer.receive().unwrap(), Some((message.to_vec(), label(1, 1))));
    }
}

fn long_message(subject: Subject) {
    let (backend, host) = (Server::echo(v4()), own_address());
    let _proxy = subject.serve("sctp", host, backend.address);
    let message: Vec<u8> = (0..64 * 1024_u32).map(|at| at.to_le_bytes()[0] ^ at.to_le_bytes()[1]).collect();
    Peer::connect(host).unwrap().assert_echoes(&message, label(4, 2));
}

/// A server that passes on all messages of each connection, at its end.
fn collector() -> (Server, mpsc::Receiver<Vec<Vec<u8>>>) {
    let (sender, collected) = mpsc::channel();
    let server = Server::serve(v4(), move |peer| {
        let messages = std::iter::from_fn(|| peer.receive().unwrap()).map(|(message, _label)| message);
        sender.send(messages.collect()).ok();
    });
    (server, collected)
}

fn shutdown_after_data(subject: Subject) {
    let ((backend, collected), host) = (collector(), own_address());
    let _proxy = subject.serve("sctp", host, backend.address);
    let peer = Peer::connect(host).unwrap();
    let messages: Vec<Vec<u8>> = (0..100_u8).map(|number| vec![number; 1000]).collect();
    messages.iter().for_each(|message| peer.send(message, label(0, 0)).unwrap());
    peer.shut_down();
    assert_eq!(collected.recv_timeout(PATIENCE).unwrap(), messages);
}

fn sigint_ends_it(subject: Subject) {
    let (backend, host) = (Server::echo(v4()), own_address());
    let proxy = subject.serve("sctp", host, backend.address);
    assert_echoes(host);
    subject.assert_ended(subject.stop(&proxy, Signal::SIGINT));
    Peer::connect(host).map(drop).unwrap_err();
}

/// A relay to `backend`, by `--host` and `--to`.
fn relay_to(backend: SocketAddr, more: &[&str]) -> Standalone {
    Standalone::relay_to(backend, &[&["--proto", "sctp"], more].concat())
}

fn backend_shuts_down() {
    let backend = Server::serve(v4(), |peer| {
        (0..100_u8).for_each(|number| peer.send(&vec![number; 1000], label(0, 0)).unwrap());
        peer.shut_down();
        assert!(peer.receive().unwrap().is_none());
    });
    let proxy = relay_to(backend.address, &[]);
    let peer = Peer::connect(proxy.address()).unwrap();
    for number in 0..100_u8 {
        assert_eq!(peer.receive().unwrap().unwrap().0, vec![number; 1000]);
    }
    assert_eq!(peer.receive().unwrap(), None);
}

fn abort_is_passed_on() {
    let (sender, ends) = mpsc::channel();
    let backend = Server::serve(v4(), move |peer| {
        assert_eq!(peer.receive().unwrap().unwrap().0, b"only");
        peer.send(b"received", label(0, 0)).unwrap();
        sender.send(peer.receive().map(|_end| ())).ok();
    });
    let proxy = relay_to(backend.address, &[]);
    let peer = Peer::connect(proxy.address()).unwrap();
    peer.send(b"only", label(0, 0)).unwrap();
    // An association that is aborted before it is accepted looks as if it had ended in order (sctp_sock_migrate in
    // net/sctp/socket.c).
    assert_eq!(peer.receive().unwrap().unwrap().0, b"received");
    peer.abort();
    let end = ends.recv_timeout(PATIENCE).unwrap();
    assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}

/// Most of them while the backend is dialled, and some before they are accepted. The backend is left with none.
fn aborting_clients() {
    let backend = Server::echo(v4());
    let proxy = relay_to(backend.address, &[]);
    for _ in 0..200 {
        // Linux 5.10 sometimes loses one of so many, also without a proxy.
        Peer::connect(proxy.address()).map(Peer::abort).ok();
    }
    // Before a heartbeat of 30 s finds out who is gone, or the backend loses its patience.
    let (port, soon) = (backend.address.port(), PATIENCE / 2);
    let is_left = || sctp::association_ports().any(|ports| ports.contains(&port));
    eventually_within(soon, "no association is left", || !is_left());
    assert_echoes(proxy.address());
}

fn refusing_backend() {
    let nobody = sctp::address_of(&sctp::listen(v4()));
    let proxy = relay_to(nobody, &[]);
    let end = Peer::connect(proxy.address()).and_then(|peer| peer.receive());
    assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("connect_refused"));
    // The next client is served none the worse.
    Peer::connect(proxy.address()).and_then(|peer| peer.receive()).unwrap_err();
}

/// Its window closes, and the messages wait in the proxy.
fn slow_reader() {
    const COUNT: u32 = 200;

    let (start, is_started) = mpsc::channel::<()>();
    let (sender, received) = mpsc::channel();
    let backend = Server::serve(v4(), move |peer| {
        is_started.recv().unwrap();
        let messages = std::iter::from_fn(|| peer.receive().unwrap()).map(|(message, _label)| message);
        sender.send(messages.collect::<Vec<_>>()).ok();
    });
    let proxy = relay_to(backend.address, &[]);
    let peer = Peer::connect(proxy.address()).unwrap();
    let sent = std::thread::spawn(move || {
        let message = |number: u32| [number.to_be_bytes().as_slice(), &[9; 10_000]].concat();
        (0..COUNT).for_each(|number| peer.send(&message(number), label(0, 0)).unwrap());
        peer.shut_down();
        peer
    });
    start.send(()).unwrap();
    let messages = received.recv_timeout(PATIENCE).unwrap();
    sent.join().unwrap();
    let numbers: Vec<u32> =
        messages.iter().map(|message| u32::from_be_bytes(message[..4].try_into().unwrap())).collect();
    assert_eq!(numbers, (0..COUNT).collect::<Vec<_>>());
}

fn both_ways() {
    let backend = Server::echo(v4());
    let proxy = relay_to(backend.address, &[]);
    std::thread::scope(|scope| {
        for stream in 0..4 {
            let address = proxy.address();
            scope.spawn(move || {
                let peer = Peer::connect(address).unwrap();
                (0..50).for_each(|number| peer.assert_echoes(&vec![1; 1 + number * 100], label(stream, 7)));
            });
        }
    });
}

fn flags() {
    let backend = Server::echo(v4());
    let to = backend.address.port().to_string();
    let proxy = relay_to(backend.address, &["--sandbox", "strict"]);
    assert_eq!(proxy.ready[0].protocol, "sctp");
    assert_echoes(proxy.address());
    assert_echoes(proxy.address());
    let publish = format!("127.0.0.1:0:{to}/sctp");
    let process = process::Process::spawn(rproxy::command(&["--to", "127.0.0.1", "-p", &publish]));
    let line = process.wait_for_line(Stream::Stdout, |line| line.contains("/sctp -> "));
    let address: SocketAddr = line.rsplit_once(' ').unwrap().1.parse().unwrap();
    assert_echoes(address);
}

fn source_address() {
    let backend = Server::echo(v4());
    let proxy = relay_to(backend.address, &["--source", "127.0.0.9", "--sandbox", "strict"]);
    assert_echoes(proxy.address());
}

/// An `rproxy` with a configuration of one mapping.
fn configuration() {
    let (one, other) = (Server::echo(v4()), Server::echo(v4()));
    let host = own_address();
    let text = |to: SocketAddr| {
        format!("[[mapping]]\nname = \"signals\"\nproto = \"sctp\"\nhost = \"{host}\"\nto = \"{to}\"\n")
    };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rproxy.toml");
    std::fs::write(&file, text(one.address)).unwrap();
    let program = Program::new();
    let first = program.start(&["--config", file.to_str().unwrap()]);
    first.wait_for_line(Stream::Stdout, |line| line.contains("/sctp -> "));
    let before = Peer::connect(host).unwrap();
    before.assert_echoes(b"before", label(0, 1));
    std::fs::write(&file, text(other.address)).unwrap();
    first.signal(Signal::SIGHUP);
    first.wait_for_line(Stream::Stderr, |line| line.contains("configuration reloaded"));
    before.assert_echoes(b"after the reload", label(0, 1));
    assert_echoes(host);
    upgradable::upgrade(&first, 0, first.pid());
    before.assert_echoes(b"after the upgrade", label(0, 1));
    assert_echoes(host);
}

fn controlled() {
    let backend = Server::echo(v4());
    let host = own_address();
    let proxy = Controlled::start(&["--sandbox", "strict"]);
    proxy.apply(&[mapping("signals", "sctp", host, backend.address)]).success();
    let peer = Peer::connect(host).unwrap();
    peer.assert_echoes(b"message", label(1, 46));
    let listed = proxy.json(&["list"]);
    assert_eq!(listed["mappings"][0]["proto"], "sctp", "{listed}");
    let table = proxy.ctl(&["connections"]).success();
    assert!(table.contains("sctp"), "{table}");
    let stats = proxy.stats("signals");
    assert_eq!((&stats["connections"], &stats["bytes_in"]), (&json!(1), &json!(7)), "{stats}");
    proxy.ctl(&["remove", "signals"]).success();
    peer.assert_echoes(b"still served", label(0, 0));
    Peer::connect(host).map(drop).unwrap_err();
}

/// With a client that came before, and beside a socket that does not listen.
fn passed() {
    let backend = Server::echo(v4());
    let proxy = Controlled::start(&["--sandbox", "strict"]);
    let listener = sctp::listen(v4());
    let host = sctp::address_of(&listener);
    let mapping = mapping("signals", "sctp", host, backend.address);
    let add = json!({ "v": 1, "do": { "add": { "mappings": [mapping] } } });
    let unbound = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::SCTP)).unwrap();
    let answer = proxy.connect().ask_with(&add, &[unbound.as_fd()]);
    let said = answer["error"]["message"].as_str().unwrap();
    assert_eq!(said, "socket 1 of the request: it is a SCTP socket that does not listen");
    let early = Peer::connect(host).unwrap();
    early.send(b"early", label(1, 46)).unwrap();
    let answer = proxy.connect().ask_with(&add, &[listener.as_fd()]);
    assert_eq!(answer["ok"]["added"], 1, "{answer}");
    assert_eq!(early.receive().unwrap(), Some((b"early".to_vec(), label(1, 46))));
    // The backend serves one connection after the other.
    drop((listener, early));
    assert_echoes(host);
    proxy.ctl(&["remove", "signals"]).success();
    Peer::connect(host).map(drop).unwrap_err();
}

#[track_caller]
fn refused(mut command: Command, status: i32, part: &str) {
    command.stdin(std::process::Stdio::null());
    let output = process::run(command);
    assert_eq!((output.status.code(), output.stderr.lines().count()), (Some(status), 1), "{output:#?}");
    assert!(output.stderr.contains(part), "{output:#?}");
}

fn refused_options() {
    let pair = ["--proto", "sctp", "--host", "127.0.0.1:0", "--to", "127.0.0.1:9"];
    for (option, value, name) in [
        ("--source", "client", "sctp has no source = client"),
        ("--send-proxy", "v2", "sctp has no send_proxy"),
        ("--accept-proxy", "10.0.0.0/8", "sctp has no accept_proxy"),
    ] {
        refused(rproxy::command(&[&pair[..], &[option, value]].concat()), 2, name);
    }
}

fn without_module() {
    sctp::unload();
    let part = "this kernel has no sctp; `modprobe sctp` loads its module";
    let pair = ["--proto", "sctp", "--host", "127.0.0.1:80", "--to", "127.0.0.1:9"];
    refused(rproxy::command(&pair), 1, part);
    let message =
        Subject::Rproxy.failure(&testkit::docker_proxy::mapping("sctp", own_address(), own_address()));
    assert!(message.contains(part), "{message}");
    sctp::load();
    assert!(sctp::is_there());
}
