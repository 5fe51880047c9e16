//! The process that serves attached ports ends, and another one starts: clients wait in the sockets of the shims.

use std::net::{TcpStream, UdpSocket};

use nix::sys::signal::Signal;
use rproxy_shim::message::Reason;

use testkit::backend::TcpBackend;
use testkit::client::{self, own_address};
use testkit::require::Need;
use testkit::shim::Reply;
use testkit::suite::Case;
use testkit::udp::{self, receive};

use super::scene::{Plane, Port, assert_free_tcp, assert_free_udp};

/// Clients and datagrams that wait at a time.
const WAITING: usize = 100;

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("SIGTERM: connections drain, and clients wait for the next process", drained),
        case("SIGTERM: datagrams wait, also those that have arrived", datagrams).needs(&[Need::Root]),
        case("SIGTERM: with nothing to do it ends at once", idle),
        case("SIGKILL: clients wait for the next process", killed),
    ]
}

fn connect_all(port: &Port) -> Vec<TcpStream> {
    (0..WAITING).map(|_| client::connect(port.address())).collect()
}

/// Sends datagrams, each of which has to be answered later on.
fn send_all(port: &Port) -> Vec<UdpSocket> {
    let clients: Vec<UdpSocket> = (0..WAITING).map(|_| udp::client(port.address().ip())).collect();
    for (number, client) in clients.iter().enumerate() {
        client.send_to(&number.to_be_bytes(), port.address()).unwrap();
    }
    clients
}

#[track_caller]
fn assert_answered(port: &Port, clients: &[UdpSocket]) {
    for (number, client) in clients.iter().enumerate() {
        assert_eq!(receive(client), (number.to_be_bytes().to_vec(), port.address()));
    }
}

fn drained() {
    let mut plane = Plane::start(&["--drain-timeout", "60s"]);
    let (echo, answering) = (TcpBackend::echo(), udp::Backend::echo(udp::local()));
    let (web, dns) =
        (Port::tcp(own_address(), echo.address()), Port::udp(own_address(), answering.address()));
    let old = client::connect(web.address());
    client::ping(&old);
    let first = plane.first.pid();
    plane.signal(Signal::SIGTERM);
    assert_eq!([&web, &dns].map(|port| port.shim.reply()), [Reply::Gone, Reply::Gone]);
    plane.wait_for_log("draining");
    let (waiting, asking) = (connect_all(&web), send_all(&dns));
    client::exchange(&old, 1, 1_000_000);
    let draining = plane.restart(&[]);
    assert_eq!(draining.pid(), first);
    let (web, dns) = (web.again(), dns.again());
    waiting.iter().for_each(client::ping);
    assert_answered(&dns, &asking);
    client::ping(&old);
    drop(old);
    assert_eq!(draining.wait().code(), Some(0));
    let addresses = [web.address(), dns.address()];
    drop(waiting);
    web.end(Reason::Unpublished);
    dns.end(Reason::Unpublished);
    assert_free_udp(addresses[1]);
}

fn datagrams() {
    let mut plane = Plane::start(&["--sandbox", "strict"]);
    let answering = udp::Backend::echo(udp::local());
    let dns = Port::udp(own_address(), answering.address());
    plane.first.pause();
    let early = send_all(&dns);
    plane.signal(Signal::SIGTERM);
    plane.first.resume();
    assert_eq!(dns.shim.reply(), Reply::Gone);
    let late = send_all(&dns);
    assert_eq!(plane.first.wait().code(), Some(0));
    drop(plane.restart(&[]));
    let dns = dns.again();
    assert_answered(&dns, &early);
    assert_answered(&dns, &late);
    assert_eq!(answering.received(), 2 * WAITING);
}

fn idle() {
    let plane = Plane::start(&[]);
    let (echo, answering) = (TcpBackend::echo(), udp::Backend::echo(udp::local()));
    let (web, dns) =
        (Port::tcp(own_address(), echo.address()), Port::udp(own_address(), answering.address()));
    let addresses = [web.address(), dns.address()];
    client::assert_echoes(addresses[0]);
    plane.signal(Signal::SIGTERM);
    assert_eq!(plane.first.wait().code(), Some(0));
    assert_eq!([&web, &dns].map(|port| port.shim.reply()), [Reply::Gone, Reply::Gone]);
    drop((web, dns));
    assert_free_tcp(addresses[0]);
    assert_free_udp(addresses[1]);
}

fn killed() {
    let mut plane = Plane::start(&[]);
    let (echo, answering) = (TcpBackend::echo(), udp::Backend::echo(udp::local()));
    let (web, dns) =
        (Port::tcp(own_address(), echo.address()), Port::udp(own_address(), answering.address()));
    let old = client::connect(web.address());
    client::ping(&old);
    plane.first.pause();
    let (early, asking_early) = (connect_all(&web), send_all(&dns));
    plane.signal(Signal::SIGKILL);
    plane.first.wait();
    assert_eq!([&web, &dns].map(|port| port.shim.reply()), [Reply::Gone, Reply::Gone]);
    assert_eq!(client::read_to_end(&old), (vec![], client::End::Reset));
    let (late, asking_late) = (connect_all(&web), send_all(&dns));
    drop(plane.restart(&[]));
    let (_web, dns) = (web.again(), dns.again());
    early.iter().chain(&late).for_each(client::ping);
    assert_answered(&dns, &asking_early);
    assert_answered(&dns, &asking_late);
}
