//! A new process takes over while ports are attached: no shim and no client notices.

use std::net::Shutdown;
use std::thread;

use rproxy_shim::message::{Reason, TCP};

use testkit::backend::TcpBackend;
use testkit::client::{self, End, own_address};
use testkit::eventually;
use testkit::load;
use testkit::shim::Reply;
use testkit::suite::Case;
use testkit::udp::{self, flow_of};
use testkit::upgradable::wait_for_end;

use super::scene::{Plane, Port, assert_free_tcp, assert_free_udp, connect, listen};

/// Upgrades in a row.
const UPGRADES: usize = 3;

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("no client is refused or cut, and no shim notices", clients),
        case("ports can be detached afterwards", detached),
        case("connections of the old processes are reset with their port", old_connections),
        case("a new process that fails changes nothing", failing),
        case("a shim that connects meanwhile is served", meanwhile),
        case("shims without a port, and limits, are handed over", waiting),
    ]
}

fn clients() {
    let mut plane = Plane::start(&["--sandbox", "strict"]);
    let (echo, naming) = (TcpBackend::echo(), udp::Backend::naming(udp::local()));
    let (web, dns) = (Port::tcp(own_address(), echo.address()), Port::udp(own_address(), naming.address()));
    let (stream, socket) = (client::connect(web.address()), udp::client(dns.address().ip()));
    client::ping(&stream);
    let flow = flow_of(&socket, dns.address());
    let connect = |_| {
        let client = client::connect(web.address());
        client::ping(&client);
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client::read_to_end(&client), (vec![], End::Eof));
    };
    load::meanwhile(3, connect, |connections| {
        for _ in 0..UPGRADES {
            plane.upgrade();
            connections.wait_for(10);
            assert!(web.shim.is_silent() && dns.shim.is_silent());
            assert_eq!(flow_of(&socket, dns.address()), flow);
            client::ping(&stream);
        }
    });
    let list = plane.json(&["list"]);
    let names: Vec<&str> =
        list["mappings"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert_eq!(names, [web.name(), dns.name()]);
}

fn detached() {
    let mut plane = Plane::start(&["--sandbox", "strict"]);
    let (echo, naming) = (TcpBackend::echo(), udp::Backend::naming(udp::local()));
    for _ in 0..UPGRADES {
        let (web, dns) =
            (Port::tcp(own_address(), echo.address()), Port::udp(own_address(), naming.address()));
        let (web_address, dns_address) = (web.address(), dns.address());
        let socket = udp::client(dns_address.ip());
        let flow = flow_of(&socket, dns_address);
        let before = plane.pid;
        plane.upgrade();
        wait_for_end_of_old(&plane, before);
        dns.end(Reason::RuntimeEnded);
        assert_free_udp(dns_address);
        let dns = Port::udp(dns_address, naming.address());
        assert_eq!(flow_of(&socket, dns_address), flow);
        let stream = client::connect(web_address);
        client::ping(&stream);
        web.end(Reason::Unpublished);
        assert_free_tcp(web_address);
        assert_eq!(client::read_to_end(&stream), (vec![], End::Reset));
        dns.end(Reason::Unpublished);
        assert_free_udp(dns_address);
    }
}

/// The first process is a child of the suite that others wait for.
fn wait_for_end_of_old(plane: &Plane, old: nix::unistd::Pid) {
    if old == plane.first.pid() {
        plane.first.wait();
    } else {
        wait_for_end(old);
    }
}

fn old_connections() {
    let mut plane = Plane::start(&["--sandbox", "strict"]);
    let echo = TcpBackend::echo();
    let (web, steady) = (Port::tcp(own_address(), echo.address()), Port::tcp(own_address(), echo.address()));
    let address = web.address();
    let kept = client::connect(steady.address());
    client::ping(&kept);
    let mut clients = Vec::new();
    for upgrades in 0..UPGRADES {
        let client = client::connect(address);
        client::ping(&client);
        clients.push(client);
        if upgrades + 1 < UPGRADES {
            plane.upgrade();
        }
    }
    web.end(Reason::Unpublished);
    assert_free_tcp(address);
    for client in clients {
        assert_eq!(client::read_to_end(&client), (vec![], End::Reset));
    }
    client::ping(&kept);
}

fn failing() {
    let plane = Plane::start(&["--sandbox", "strict"]);
    let (echo, naming) = (TcpBackend::echo(), udp::Backend::naming(udp::local()));
    let (web, dns) = (Port::tcp(own_address(), echo.address()), Port::udp(own_address(), naming.address()));
    let (web_address, dns_address) = (web.address(), dns.address());
    let (stream, socket) = (client::connect(web_address), udp::client(dns_address.ip()));
    client::ping(&stream);
    let flow = flow_of(&socket, dns_address);
    for (number, script) in (1..).zip(["exit 7", "exec sleep 100"]) {
        plane.program.replace(script);
        plane.signal(nix::sys::signal::Signal::SIGUSR2);
        let failed = |line: &str| line.contains("not upgraded; this process continues to serve");
        plane.first.wait_for_lines(testkit::process::Stream::Stderr, number, failed);
        assert!(web.shim.is_silent() && dns.shim.is_silent());
        client::ping(&stream);
        client::assert_echoes(web_address);
        assert_eq!(flow_of(&socket, dns_address), flow);
    }
    let third = Port::tcp(own_address(), echo.address());
    client::assert_echoes(third.address());
    drop(third);
    dns.end(Reason::RuntimeEnded);
    let dns = Port::udp(dns_address, naming.address());
    assert_eq!(flow_of(&socket, dns_address), flow);
    for (port, free) in [(web, assert_free_tcp as fn(_)), (dns, assert_free_udp)] {
        let address = port.address();
        port.end(Reason::Unpublished);
        free(address);
    }
}

fn meanwhile() {
    let plane = Plane::start(&[]);
    let echo = TcpBackend::echo();
    let old = Port::tcp(own_address(), echo.address());
    let (gate, started) =
        (plane.program.control().with_extension("gate"), plane.program.control().with_extension("started"));
    let real = plane.program.path().with_extension("real");
    std::fs::hard_link(testkit::rproxy::rproxy(), &real).unwrap();
    plane.program.replace(&format!(
        ": >'{}'; while ! [ -e '{}' ]; do sleep 0.02; done; exec '{}' \"$@\"",
        started.display(),
        gate.display(),
        real.display()
    ));
    plane.signal(nix::sys::signal::Signal::SIGUSR2);
    eventually("the new process has started", || started.exists());
    let host = own_address();
    let new = thread::scope(|scope| {
        let attaching = scope.spawn(|| Port::tcp(host, echo.address()));
        let address = old.address();
        // Nobody reads that before the other process serves.
        let detaching = scope.spawn(move || {
            old.end(Reason::Unpublished);
            assert_free_tcp(address);
        });
        client::assert_echoes(address);
        std::fs::write(&gate, "").unwrap();
        detaching.join().unwrap();
        attaching.join().unwrap()
    });
    client::assert_echoes(new.address());
    plane.wait_for_log("a new process has taken over");
}

fn waiting() {
    let mut plane = Plane::start(&["--max-connections", "1"]);
    let (idle, detached) = (connect(), Port::udp(own_address(), udp::address(&udp::local())));
    assert_eq!(detached.shim.detach(Reason::Unpublished), Reply::Detached);
    plane.upgrade();
    let echo = TcpBackend::echo();
    let port = Port::attach_by(idle, listen(own_address(), true).unwrap(), TCP, echo.address());
    let first = client::connect(port.address());
    client::ping(&first);
    let second = client::connect(port.address());
    plane.wait_for_log("the mapping is full");
    drop(first);
    client::ping(&second);
    assert!(detached.shim.is_silent());
}
