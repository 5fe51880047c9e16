//! Floods and exhausted descriptors: one port, or one shim, does not keep another one from being served.

use std::net::TcpStream;
use std::os::fd::AsFd;

use rproxy_shim::message::{Reason, TCP, UDP};

use testkit::backend::TcpBackend;
use testkit::client::{self, own_address};
use testkit::holdings::wait_until_idle;
use testkit::process::{Process, in_shell};
use testkit::shim::{Reply, Shim};
use testkit::suite::Case;
use testkit::udp::{self, flow_of};
use testkit::{eventually, eventually_equal, load};

use super::scene::{Plane, Port, ask, bind_udp, connect, listen, name};

/// Clients of a port that is flooded; twice as many descriptors would be needed.
const FLOOD: usize = 400;

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("a flooded port leaves descriptors for others", flooded),
        case("without descriptors a port is not attached, and later it is", exhausted),
        case("without descriptors a shim waits", exhausted_at_accept),
        case("shims that say nothing are limited in number", silent),
        case("shims that do not read their answers", unread),
        case("shims that close at once", closing),
    ]
}

fn start_with_descriptors(most: usize) -> Plane {
    let script = format!("ulimit -n {most}; exec \"$0\" \"$@\"");
    Plane::start_by(&["--sandbox", "strict"], |command| Process::spawn(in_shell(&script, &command)))
}

fn flooded() {
    let plane = start_with_descriptors(256);
    let (echo, naming) = (TcpBackend::echo(), udp::Backend::naming(udp::local()));
    let [web, other] = [(); 2].map(|()| Port::tcp(own_address(), echo.address()));
    let dns = Port::udp(own_address(), naming.address());
    let flood: Vec<TcpStream> = (0..FLOOD).map(|_| client::connect(web.address())).collect();
    eventually("the port is full", || plane.stats(&web)["connections"].as_u64() >= Some(256 / 8));
    client::assert_echoes(other.address());
    flow_of(&udp::client(dns.address().ip()), dns.address());
    let new = Port::tcp(own_address(), echo.address());
    client::assert_echoes(new.address());
    // Those that wait are served when others end.
    flood.iter().take(10).for_each(client::ping);
    let last = flood.into_iter().next_back().unwrap();
    client::ping(&last);
    let address = web.address();
    web.end(Reason::Unpublished);
    super::scene::assert_free_tcp(address);
}

fn exhausted() {
    let plane = Plane::start(&[]);
    let echo = TcpBackend::echo();
    let port = Port::tcp(own_address(), echo.address());
    client::assert_echoes(port.address());
    let served = client::connect(port.address());
    client::ping(&served);
    wait_until_idle(plane.pid);
    let before = plane.first.descriptors();
    let (shim, host) = (connect(), own_address());
    let socket = listen(host, true).unwrap();
    eventually_equal("the shim is accepted", &(before + 1), || plane.first.descriptors());
    plane.first.limit_descriptors(before + 1);
    let answer = ask(&shim, TCP, echo.address(), &[socket.as_fd()]);
    let Reply::Unavailable(text) = answer else { panic!("{answer:?}") };
    assert!(text.contains("too many files are open"), "{text}");
    plane.wait_for_log("a port is not attached");
    client::ping(&served);
    plane.first.limit_descriptors(1_000);
    let _port = Port::attach_by(shim, socket, TCP, echo.address());
    client::assert_echoes(host);
    client::assert_echoes(port.address());
}

fn exhausted_at_accept() {
    let plane = Plane::start(&[]);
    let echo = TcpBackend::echo();
    let port = Port::tcp(own_address(), echo.address());
    let served = client::connect(port.address());
    client::ping(&served);
    let before = plane.first.descriptors();
    plane.first.limit_descriptors(before.min(5));
    let shim = connect();
    plane.wait_for_log("cannot accept a shim");
    client::ping(&served);
    plane.first.limit_descriptors(1_000);
    let _other = Port::attach_by(shim, listen(own_address(), true).unwrap(), TCP, echo.address());
    client::assert_echoes(port.address());
}

fn silent() {
    let plane = Plane::start(&[]);
    let before = plane.first.descriptors();
    let shims: Vec<Shim> = (0..500).map(|_| connect()).collect();
    assert_eq!(shims[0].reply(), Reply::Gone);
    let echo = TcpBackend::echo();
    let port = Port::tcp(own_address(), echo.address());
    client::assert_echoes(port.address());
    assert!(plane.first.descriptors() < before + 120, "{} and {before}", plane.first.descriptors());
    // The last one may still attach.
    let last = shims.into_iter().next_back().unwrap();
    let _other = Port::attach_by(last, listen(own_address(), true).unwrap(), TCP, echo.address());
}

fn unread() {
    let plane = Plane::start(&[]);
    let echo = TcpBackend::echo();
    let port = Port::tcp(own_address(), echo.address());
    let shim = connect();
    // More than the sockets hold.
    for _ in 0..2_000 {
        shim.send(b"no request", &[]).unwrap();
    }
    client::assert_echoes(port.address());
    let host = own_address();
    let unread = listen(host, true).unwrap();
    let packet = rproxy_shim::message::Request::Attach(rproxy_shim::message::Attach {
        protocol: TCP,
        backend: echo.address(),
    });
    shim.send(packet.encode().as_bytes(), &[unread.as_fd()]).unwrap();
    client::assert_echoes(host);
    drop(shim);
    eventually("the port is free", || plane.json(&["list"])["mappings"].as_array().unwrap().len() == 1);
    client::assert_echoes(port.address());
}

fn closing() {
    let plane = Plane::start(&[]);
    let echo = TcpBackend::echo();
    let port = Port::tcp(own_address(), echo.address());
    let before = plane.first.descriptors();
    let knock = |number: usize| {
        // The backlog may be full.
        let Ok(shim) = Shim::connect(&name()) else { return };
        if number.is_multiple_of(2) {
            shim.send(b"RPXY", &[]).ok();
        }
    };
    load::meanwhile(3, knock, |load| {
        load.wait_for(3_000);
        for _ in 0..5 {
            let socket = bind_udp(own_address()).unwrap();
            drop(Port::attach(socket, UDP, udp::address(&udp::local())));
        }
        client::assert_echoes(port.address());
    });
    eventually("nothing is left", || plane.first.descriptors() <= before + 10);
    client::assert_echoes(port.address());
}
