//! Mappings that lead back to themselves: every front end refuses them before anything changes.

use std::net::{SocketAddr, TcpListener};

use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use serde_json::Value;

use testkit::backend::TcpBackend;
use testkit::client;
use testkit::controlled::{Controlled, mapping};
use testkit::docker_proxy::{self, DockerProxy, Status};
use testkit::netns::Namespace;
use testkit::process::{Output, Stream};
use testkit::require::Need;
use testkit::rproxy::{self, Standalone};
use testkit::suite::Case;
use testkit::systemd::Systemd;
use testkit::upgradable::Program;

use super::case;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("a mapping that leads to itself does not start", at_the_start).needs(&[Need::Program("sysctl")]),
        case("a mapping of dockerd that leads to itself does not start", in_docker_mode),
        case("no change lets a mapping lead to itself", by_changes),
        case("no passed socket lets a mapping lead to itself", by_a_passed_socket),
        case("no upgrade lets a mapping lead to itself", by_an_upgrade),
        case("another program on this host is a backend", to_another_program),
    ]
}

/// A host with an address of each family beside loopback, and a prefix of which it has every address (AnyIP).
fn host() -> Namespace {
    let host = Namespace::new();
    host.ip("link add name net0 type bridge");
    host.ip("link set net0 up");
    host.ip("address add 10.0.0.1/24 broadcast 10.0.0.255 dev net0");
    host.address("net0", "fd00::1/64");
    // Another one of the same network; packets to it would come from the first.
    host.ip("address add 10.0.0.3/24 dev net0");
    host.ip("route add local 198.51.100.0/24 dev lo");
    host.ip("route add local 2001:db8::/64 dev lo");
    host
}

/// What leads to itself on that host, as `PROTOCOL HOST BACKEND` each.
const TO_ITSELF: [&str; 12] = [
    "tcp [::]:80 127.0.0.1:80",
    "udp 0.0.0.0:80 127.200.0.1:80",
    "tcp 127.0.0.1:80 127.0.0.1:80",
    "tcp [::]:80 10.0.0.1:80",
    "udp 0.0.0.0:80 10.0.0.1:80",
    "tcp 10.0.0.1:80 10.0.0.1:80",
    "udp [::]:80 [fd00::1]:80",
    "tcp 0.0.0.0:80 198.51.100.7:80",
    "tcp 0.0.0.0:80 [::ffff:10.0.0.1]:80",
    "tcp [::1]:80 [::1]:80",
    "tcp 0.0.0.0:80 10.0.0.3:80",
    "tcp [::]:80 [2001:db8::7]:80",
];

/// What does not, though it looks as if.
const ELSEWHERE: [&str; 7] = [
    "tcp 10.0.0.1:80 127.0.0.1:80",
    "tcp 127.0.0.1:80 10.0.0.1:80",
    "udp 0.0.0.0:80 [fd00::1]:80",
    "tcp 0.0.0.0:80 10.0.0.1:81",
    "tcp 0.0.0.0:80 10.0.0.2:80",
    "udp [fd00::1]:80 198.51.100.7:80",
    "tcp [::]:80 [fd00::2]:80",
];

fn parts(case: &str) -> [&str; 3] {
    case.split(' ').collect::<Vec<_>>().try_into().unwrap()
}

fn addresses(case: &str) -> (&str, SocketAddr, SocketAddr) {
    let [protocol, host, backend] = parts(case);
    (protocol, host.parse().unwrap(), backend.parse().unwrap())
}

fn wire(name: &str, case: &str) -> Value {
    let (protocol, host, backend) = addresses(case);
    mapping(name, protocol, host, backend)
}

#[track_caller]
fn assert_refused(output: &Output, status: i32, part: &str) {
    assert_eq!((output.status.code(), output.stdout.as_str()), (Some(status), ""), "{output:?}");
    let message = output.stderr.lines().last().unwrap();
    assert!(message.starts_with("rproxy: ") && message.contains(part), "no {part:?}: {output:?}");
}

/// Flags, a file, and what is named in a file.
fn at_the_start() {
    let host = host();
    let run = |arguments: &[&str]| host.spawn(rproxy::command(arguments)).into_output();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rproxy.toml");
    for case in TO_ITSELF {
        let [protocol, listens, to] = parts(case);
        let output = run(&["--host", listens, "--to", to, "--proto", protocol]);
        assert_refused(&output, 2, "would forward to itself");
        let table = format!("[[mapping]]\nhost = \"{listens}\"\nto = \"{to}\"\nproto = \"{protocol}\"\n");
        std::fs::write(&file, table).unwrap();
        for arguments in [&["--config"][..], &["check-config"]] {
            let output = run(&[arguments, &[file.to_str().unwrap()]].concat());
            assert_refused(&output, 1, "3:6: to: ");
            assert_refused(&output, 1, "would forward to itself");
        }
    }
    for case in ELSEWHERE {
        let [protocol, listens, to] = parts(case);
        Standalone::start_in(&host, &["--host", listens, "--to", to, "--proto", protocol]);
    }
    // Where any address can be bound, not every one is this machine's.
    let nonlocal = |value| host.command(&format!("sysctl -w net.ipv4.ip_nonlocal_bind={value}")).success();
    nonlocal("1");
    Standalone::start_in(&host, &["--host", "0.0.0.0:80", "--to", "10.0.0.2:80"]);
    let output = run(&["--host", "0.0.0.0:80", "--to", "10.0.0.3:80"]);
    assert_refused(&output, 2, "would forward to itself");
    let output = run(&["--host", "10.0.0.2:80", "--to", "10.0.0.2:80"]);
    assert_refused(&output, 2, "would forward to itself");
    nonlocal("0");
    Standalone::start_in(&host, &["--host", "[::]:80", "--to", "127.0.0.1:80", "--v6only"]);
    let output = run(&["--host", "[::]:80", "--to", "10.0.0.255:80", "--proto", "udp"]);
    assert_refused(&output, 2, "10.0.0.255 is a broadcast address");
    let ring = ["--host", "0.0.0.0:70", "--to", "10.0.0.1:71", "--host", "[::]:71", "--to", "127.0.0.1:70"];
    assert_refused(&run(&ring), 2, "70/tcp -> 71/tcp -> 70/tcp would form a loop");
}

/// By dockerd's flags, where the listener may come from it.
fn in_docker_mode() {
    let host = host();
    let start = |arguments: &[String], listener: Option<TcpListener>| {
        let spawn = |command| host.spawn(command);
        let listener = listener.map(Into::into);
        DockerProxy::start_by(rproxy::rproxy(), arguments, listener, OFlag::empty(), spawn).status()
    };
    for case in TO_ITSELF {
        let (protocol, listens, to) = addresses(case);
        // An IPv6 wildcard leaves IPv4 clients out there.
        if listens.ip().is_unspecified() && listens.is_ipv6() != to.is_ipv6() {
            continue;
        }
        let status = start(&docker_proxy::mapping(protocol, listens, to), None);
        assert!(matches!(&status, Status::Failed(why) if why.contains("to itself")), "{case}: {status:?}");
    }
    for case in ELSEWHERE {
        let (protocol, listens, to) = addresses(case);
        assert_eq!(start(&docker_proxy::mapping(protocol, listens, to), None), Status::Ready, "{case}");
    }
    for container in ["255.255.255.255:81", "10.0.0.255:81", "224.0.0.251:81", "[ff02::1]:81"] {
        let flags = docker_proxy::mapping("udp", "10.0.0.1:80".parse().unwrap(), container.parse().unwrap());
        assert!(matches!(start(&flags, None), Status::Failed(_)), "{container}");
    }
    // Where it listens counts, and not where the flags say that it does: this one takes IPv4 clients, too.
    let listener = host.run(|| TcpListener::bind("[::]:80").unwrap());
    let flags = docker_proxy::mapping("tcp", "[::]:80".parse().unwrap(), "10.0.0.1:80".parse().unwrap());
    let status = start(&[flags, vec!["-use-listen-fd".to_owned()]].concat(), Some(listener));
    assert!(matches!(&status, Status::Failed(why) if why.contains("to itself")), "{status:?}");
}

/// By the control socket and by a reload, confined and as another user, and nothing changes by it.
fn by_changes() {
    let host = host();
    for arguments in [&["--sandbox", "strict"][..], &["--user", "64123:64124"], &["--sandbox", "off"]] {
        let proxy = Controlled::start_in(&host, arguments);
        let refused = |output: Output, part: &str| {
            assert_eq!(output.status.code(), Some(1), "{output:?}");
            assert!(output.stderr.contains(part), "no {part:?}: {output:?}");
        };
        for case in TO_ITSELF {
            refused(proxy.apply(&[wire("web", case)]), "would forward to itself");
        }
        proxy.apply(&[wire("a", "tcp 0.0.0.0:70 10.0.0.1:71")]).success();
        let before = proxy.json(&["list"]);
        let add = |host: &str, to: &str| proxy.ctl(&["add", "--host", host, "--to", to]);
        refused(add("0.0.0.0:71", "127.0.0.1:70"), "71/tcp -> 70/tcp (a) -> 71/tcp would form a loop");
        refused(proxy.ctl(&["retarget", "a", "--to", "10.0.0.1:70"]), "70/tcp (a) would forward to itself");
        add("[::1]:71", "127.0.0.1:70").success();
        proxy.ctl(&["remove", "[::1]:71/tcp"]).success();
        // One that chooses its port, which closes a ring.
        refused(proxy.ctl(&["add", "-p", "71-72:70", "--to", "127.0.0.1"]), "71/tcp -> 70/tcp (a) -> 71/tcp");
        refused(proxy.ctl(&["retarget", "a", "--to", "10.0.0.255:71"]), "broadcast");
        assert_eq!(proxy.json(&["list"]), before);
        // Who goes is in nobody's way.
        let web = [wire("b", "tcp 0.0.0.0:71 127.0.0.1:70")];
        proxy.apply(&web).success();
        // An address that comes later.
        host.ip("address add 10.0.0.9/32 dev net0");
        refused(proxy.apply(&[wire("b", "tcp 0.0.0.0:71 10.0.0.9:71")]), "would forward to itself");
        host.ip("address delete 10.0.0.9/32 dev net0");
        proxy.apply(&[wire("b", "tcp 0.0.0.0:71 10.0.0.9:71")]).success();
    }
}

/// By a socket that listens elsewhere than the mapping asks for.
fn by_a_passed_socket() {
    let (host, systemd) = (host(), Systemd::new());
    let listener = || host.run(|| TcpListener::bind("0.0.0.0:80").unwrap());
    for (name, to, refused) in [("web", "10.0.0.1:80", true), ("web", "10.0.0.1:81", false)] {
        let arguments = ["--host", "127.0.0.1:8080", "--to", to, "--name", "web"];
        let process = host.spawn(systemd.command_with_sockets(&arguments, vec![(name, listener().into())]));
        if refused {
            assert_refused(&process.into_output(), 1, "80/tcp (web) would forward to itself");
        } else {
            process.wait_for_line(Stream::Stdout, |line| line == "81/tcp -> 0.0.0.0:80");
        }
    }
}

/// What was no ring when the old process started is one for the new one, which leaves the old one to serve.
fn by_an_upgrade() {
    let (host, program) = (host(), Program::new());
    let front: SocketAddr = "127.0.0.1:80".parse().unwrap();
    let (steady, control) = ("127.0.0.1:81", program.control());
    let backend = TcpBackend::echo_in(&host, steady);
    let mappings = ["--host", "127.0.0.1:80", "--to", steady, "--host", "0.0.0.0:90", "--to", "10.0.0.9:90"];
    for more in [&[][..], &["--control", control.to_str().unwrap()]] {
        let process = host.spawn(program.command(&[&mappings, more].concat()));
        process.wait_for_line(Stream::Stderr, |line| line.contains("confined"));
        host.ip("address add 10.0.0.9/32 dev net0");
        process.signal(Signal::SIGUSR2);
        process.wait_for_line(Stream::Stderr, |line| line.contains("90/tcp would forward to itself"));
        process.wait_for_line(Stream::Stderr, |line| {
            line.contains("not upgraded; this process continues to serve")
        });
        host.run(|| client::assert_echoes(front));
        host.ip("address delete 10.0.0.9/32 dev net0");
        process.signal(Signal::SIGUSR2);
        process.wait_for_line(Stream::Stderr, |line| line.contains("a new process has taken over"));
        assert!(process.wait().success());
        host.run(|| client::assert_echoes(front));
        program.end();
    }
    drop(backend);
}

/// A program of others at another address of this host is a backend like any other.
fn to_another_program() {
    let host = host();
    let backend = TcpBackend::echo_in(&host, "127.0.0.1:80");
    let proxy = Standalone::start_in(&host, &["--host", "10.0.0.1:80", "--to", "127.0.0.1:80"]);
    host.run(|| client::assert_echoes(proxy.address()));
    drop(backend);
}
