//! Nothing is done while there is nothing to do.

use std::net::Ipv4Addr;
use std::thread;
use std::time::Duration;

use rproxy_tests::backend::{self, TcpBackend};
use rproxy_tests::controlled::{Controlled, mapping};
use rproxy_tests::docker_proxy::{self, DockerProxy, Status};
use rproxy_tests::process::Process;
use rproxy_tests::trace::Trace;
use rproxy_tests::{client, eventually, rproxy, udp};

/// How long nothing is asked of the process. Who looks for something more often than that is found.
const QUIET: Duration = Duration::from_secs(2);

/// Waits until a process makes no call for some time: what was done before may have left something to do.
#[track_caller]
fn assert_makes_none(process: &Process) {
    eventually("no system call is made", || {
        let trace = Trace::attach(process);
        thread::sleep(QUIET);
        trace.finish().is_empty()
    });
}

pub(crate) fn makes_none() {
    let backend = TcpBackend::local(backend::echo);
    let echo = udp::Backend::echo(udp::client(Ipv4Addr::LOCALHOST));
    let proxy = Controlled::start(&[]);
    let front = client::own_address();
    let web = mapping("web", "tcp", front, backend.address());
    proxy.apply(&[web, mapping("dns", "udp", front, echo.address())]).success();
    let clients: Vec<_> = (0..10).map(|_| client::connect(front)).collect();
    for client in &clients {
        super::tcp::exchange(client, b"hello");
    }
    let asking = udp::client(front.ip());
    udp::assert_echoes(&asking, front, b"question");
    assert_makes_none(&proxy.process);
    clients.iter().for_each(|client| super::tcp::exchange(client, b"still served"));
    udp::assert_echoes(&asking, front, b"still served");
}

pub(crate) fn of_dockerd_makes_none() {
    let backend = TcpBackend::local(backend::echo);
    let front = client::own_address();
    let arguments = docker_proxy::mapping("tcp", front, backend.address());
    let mut proxy = DockerProxy::start(rproxy::rproxy(), &arguments, None);
    assert_eq!(proxy.status(), Status::Ready);
    assert_makes_none(&proxy.process);
    assert_eq!(client::ask(front, b"hello").unwrap(), b"hello");
}
