//! An idle process makes no system calls.

use std::thread;
use std::time::Duration;

use serde_json::json;
use testkit::backend::TcpBackend;
use testkit::controlled::{Controlled, mapping};
use testkit::docker_proxy::{self, DockerProxy, Status};
use testkit::process::Process;
use testkit::suite::Case;
use testkit::trace::Trace;
use testkit::{client, eventually, rproxy, udp};

use super::{UNRECORDED_AND_RECORDED, case};

/// How long nothing is asked of the process. Who looks for something more often than that is found.
const QUIET: Duration = Duration::from_secs(2);

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("an idle process makes no call", makes_none),
        case("a proxy of dockerd that is idle makes no call", of_dockerd_makes_none),
        case("a mapping that is full makes no call", full_makes_none),
    ]
}

/// Waits until a process makes no call for some time: what was done before may have left something to do.
#[track_caller]
fn assert_makes_none(process: &Process) {
    eventually("no system call is made", || {
        let trace = Trace::attach(process);
        thread::sleep(QUIET);
        trace.finish().is_empty()
    });
}

fn makes_none() {
    UNRECORDED_AND_RECORDED.into_iter().for_each(makes_none_with);
}

fn makes_none_with(options: &[&str]) {
    let backend = TcpBackend::echo();
    let echo = udp::Backend::echo(udp::local());
    let proxy = Controlled::start(options);
    let front = client::own_address();
    let web = mapping("web", "tcp", front, backend.address());
    proxy.apply(&[web, mapping("dns", "udp", front, echo.address())]).success();
    let clients: Vec<_> = (0..10).map(|_| client::connect(front)).collect();
    for client in &clients {
        client::ping(client);
    }
    let asking = udp::client(front.ip());
    udp::assert_echoes(&asking, front, b"question");
    assert_makes_none(&proxy.process);
    clients.iter().for_each(|client| client::ping(client));
    udp::assert_echoes(&asking, front, b"still served");
}

fn of_dockerd_makes_none() {
    let (backend, echo) = (TcpBackend::echo(), udp::Backend::echo(udp::local()));
    let front = client::own_address();
    let start = |proto, backend| {
        let mut proxy =
            DockerProxy::start(rproxy::rproxy(), &docker_proxy::mapping(proto, front, backend), None);
        assert_eq!(proxy.status(), Status::Ready);
        proxy
    };
    let proxies = [start("tcp", backend.address()), start("udp", echo.address())];
    proxies.iter().for_each(|proxy| assert_makes_none(&proxy.process));
    assert_eq!(client::ask(front, b"hello").unwrap(), b"hello");
    udp::assert_echoes(&udp::client(front.ip()), front, b"question");
}

fn full_makes_none() {
    let backend = TcpBackend::echo();
    let proxy = Controlled::start(&[]);
    let front = client::own_address();
    let mut web = mapping("web", "tcp", front, backend.address());
    web["limits"] = json!({ "max_connections": 1 });
    proxy.apply(&[web]).success();
    let served = client::connect(front);
    client::ping(&served);
    let waiting = client::connect(front);
    assert_makes_none(&proxy.process);
    drop(served);
    client::ping(&waiting);
}
