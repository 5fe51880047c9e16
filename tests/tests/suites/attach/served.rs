//! Attached ports beside all else that a process serves: mappings, changes, reloads, confinement.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use nix::sys::signal::Signal;
use nix::unistd::{Uid, seteuid};
use rproxy_shim::message::{Reason, TCP, UDP};
use serde_json::{Value, json};
use tempfile::NamedTempFile;

use testkit::backend::TcpBackend;
use testkit::client::{self, own_address};
use testkit::controlled::mapping;
use testkit::process::{self, Stream};
use testkit::require::Need;
use testkit::shim::{Reply, Shim};
use testkit::suite::Case;
use testkit::udp::{self, flow_of};

use super::scene::{Plane, Port, bind_udp, connect, listen, name};

pub(crate) fn cases() -> Vec<Case> {
    let root = &[Need::Root];
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("both protocols, both families", families).needs(&[Need::Ipv6]),
        case("ctl shows attached ports, and changes do not touch them", changes),
        case("a configuration is reloaded beside attached ports", reload),
        case("another user, confined", || confined(&["--user", "nobody", "--sandbox", "strict"])).needs(root),
        case("a limit of attached ports", limited),
        case("clients of other users may not attach ports", other_users).needs(root),
        case("only one process serves under a name", one_process),
    ]
}

fn families() {
    let plane = Plane::start(&["--sandbox", "strict"]);
    for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
        let tcp = TcpBackend::echo_at((ip, 0));
        let datagrams = udp::Backend::echo(udp::client(ip));
        let (web, dns) =
            (Port::tcp((ip, 0).into(), tcp.address()), Port::udp((ip, 0).into(), datagrams.address()));
        client::assert_echoes(web.address());
        udp::assert_echoes(&udp::client(ip), dns.address(), b"hello");
        for port in [&web, &dns] {
            plane.wait_for_log(&format!("{}", port.address()));
        }
    }
}

/// What `ctl list` and `ctl stats` say of a port, which says whether it is the same.
fn seen(plane: &Plane, port: &Port) -> (Value, Value) {
    let list = plane.json(&["list"]);
    let listed = list["mappings"].as_array().unwrap().iter().find(|one| one["name"] == *port.name()).cloned();
    let stats = plane.stats(port);
    (
        listed.expect("it is listed"),
        json!([stats["connections"], stats["connections_total"], stats["flows_total"]]),
    )
}

fn changes() {
    let plane = Plane::start(&["--sandbox", "strict"]);
    let (tcp, datagrams) = (TcpBackend::echo(), udp::Backend::naming(udp::local()));
    let (web, dns) = (Port::tcp(own_address(), tcp.address()), Port::udp(own_address(), datagrams.address()));
    let (stream, socket) = (client::connect(web.address()), udp::client(dns.address().ip()));
    client::ping(&stream);
    let flow = flow_of(&socket, dns.address());
    let before = [&web, &dns].map(|port| seen(&plane, port));
    assert_eq!(before[0].1, json!([1, 1, 0]));
    assert_eq!(before[1].1, json!([0, 0, 1]));

    let (address, to) = (own_address().to_string(), tcp.address().to_string());
    let other = own_address();
    plane.ctl(&["add", "--name", "other", "--host", &address, "--to", &to]).success();
    let file = tempfile(&json!({ "mappings": [mapping("third", "tcp", other, tcp.address())] }).to_string());
    plane.ctl(&["apply", file.path().to_str().unwrap()]).success();
    client::assert_echoes(other);
    for port in [&web, &dns] {
        let (name, address) = (port.name(), port.address().to_string());
        for refused in [&["remove", &*name][..], &["retarget", &name, "--to", &to]] {
            let output = plane.ctl(refused);
            assert_eq!(output.status.code(), Some(1), "{output:?}");
            assert!(output.stderr.contains("was attached by process"), "{output:?}");
        }
        let protocol = &name.split('/').nth(1).unwrap();
        let taken = plane.ctl(&["add", "--proto", protocol, "--host", &address, "--to", &to]);
        assert_eq!(taken.status.code(), Some(1), "{taken:?}");
    }
    let empty = tempfile(r#"{ "mappings": [] }"#);
    plane.ctl(&["apply", empty.path().to_str().unwrap()]).success();
    assert_eq!([&web, &dns].map(|port| seen(&plane, port)), before);
    client::ping(&stream);
    assert_eq!(flow_of(&socket, dns.address()), flow);
    assert!(plane.ctl(&["list"]).success().contains(&web.name()));
    assert!(plane.ctl(&["stats"]).success().contains(&dns.name()));
}

fn tempfile(content: &str) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    std::fs::write(file.path(), content).unwrap();
    file
}

fn reload() {
    let backend = TcpBackend::echo();
    let (first, second) = (own_address(), own_address());
    let toml = |host: SocketAddr| {
        format!("[[mapping]]\nname = \"web\"\nhost = \"{host}\"\nto = \"{}\"\n", backend.address())
    };
    let file = tempfile(&toml(first));
    let plane = Plane::start(&["--config", file.path().to_str().unwrap()]);
    let port = Port::tcp(own_address(), backend.address());
    let stream = client::connect(port.address());
    client::ping(&stream);
    client::assert_echoes(first);
    std::fs::write(file.path(), toml(second)).unwrap();
    plane.signal(Signal::SIGHUP);
    plane.wait_for_log("configuration reloaded");
    client::assert_echoes(second);
    client::ping(&stream);
    client::assert_echoes(port.address());
    std::fs::write(file.path(), "[[mapping]]\n").unwrap();
    plane.signal(Signal::SIGHUP);
    plane.wait_for_log("not reloaded");
    client::ping(&stream);
    client::assert_echoes(port.address());
}

fn confined(arguments: &[&str]) {
    let plane = Plane::start(arguments);
    let (tcp, datagrams) = (TcpBackend::echo(), udp::Backend::naming(udp::local()));
    // Privileged ports, which the process itself could not bind.
    let (host, other) = (
        SocketAddr::new(client::own_loopback().into(), 80),
        SocketAddr::new(client::own_loopback().into(), 53),
    );
    let (web, dns) = (Port::tcp(host, tcp.address()), Port::udp(other, datagrams.address()));
    client::assert_echoes(web.address());
    let socket = udp::client(other.ip());
    let flow = flow_of(&socket, other);
    dns.end(Reason::RuntimeEnded);
    web.end(Reason::Unpublished);
    let _dns = Port::udp(other, datagrams.address());
    assert_eq!(flow_of(&socket, other), flow);
    assert!(plane.first.is_running());
}

fn limited() {
    let plane = Plane::start(&["--max-connections", "1"]);
    let backend = TcpBackend::echo();
    let [one, other] = [(); 2].map(|()| Port::tcp(own_address(), backend.address()));
    let first = client::connect(one.address());
    client::ping(&first);
    let second = client::connect(one.address());
    client::assert_echoes(other.address());
    plane.wait_for_log("the mapping is full");
    drop(first);
    client::ping(&second);
}

fn other_users() {
    const NOBODY: u32 = 65_534;

    let plane = Plane::start(&["--user", "daemon", "--sandbox", "strict"]);
    let (backend, host) = (TcpBackend::echo(), own_address());
    let socket = listen(host, true).unwrap();
    let as_user = |user: u32| {
        seteuid(Uid::from_raw(user)).unwrap();
        let shim = connect();
        seteuid(Uid::from_raw(0)).unwrap();
        shim
    };
    let shim = as_user(NOBODY);
    let Reply::Unavailable(text) = shim.reply() else { panic!("it is not refused") };
    assert!(text.contains("user 65534 may not attach ports"), "{text}");
    assert_eq!(shim.reply(), Reply::Gone);
    plane.wait_for_log("a user who may not attach ports");
    let daemon = nix::unistd::User::from_name("daemon").unwrap().unwrap().uid;
    let _port = Port::attach_by(as_user(daemon.as_raw()), socket, TCP, backend.address());
    client::assert_echoes(host);
    let socket = bind_udp(own_address()).unwrap();
    let _other = Port::attach_by(as_user(0), socket, UDP, udp::address(&udp::local()));
}

fn one_process() {
    let plane = Plane::start(&[]);
    let second = process::run(plane.program.command(&[&format!("--attach={}", name())]));
    assert_eq!(second.status.code(), Some(1), "{second:?}");
    let holder = format!("process {} of user 0 listens there already", plane.pid);
    assert!(second.stderr.contains(&holder), "{second:?}");
    let other = format!("{}/other", name());
    let third = process::Process::spawn(plane.program.command(&[&format!("--attach={other}")]));
    third.wait_for_line(Stream::Stderr, |line| line.contains("confined"));
    let (backend, host) = (TcpBackend::echo(), own_address());
    let socket = listen(host, true).unwrap();
    let shim = Shim::connect(&other).unwrap();
    let _port = Port::attach_by(shim, socket, TCP, backend.address());
    client::assert_echoes(host);
}
