//! Signals, and the port after the end.

use std::net::TcpStream;

use nix::sys::signal::Signal;
use rproxy_shim::message::{Reason, Request};

use testkit::client;
use testkit::docker_proxy::{Status, mapping};
use testkit::fake_plane::{FakePlane, free_name};
use testkit::require::{self, Need};
use testkit::suite::Case;

use super::*;

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("the plane closes the port", plane_closes_port),
        case("the plane does not answer", plane_is_silent),
        case("the plane ends meanwhile", plane_ends),
        case("there is no plane", no_plane),
        case("before the first answer", before_the_answer),
        case("signals without a meaning", meaningless_signals),
        case("signals that were blocked", blocked_signals).needs(&[Need::Program("env")]),
        case("signals reach rproxy", blocked_signals_of_rproxy).needs(&[Need::Program("env")]),
        case("killed", killed),
    ]
}

const ENDS: [(Signal, Reason); 3] = [
    (Signal::SIGINT, Reason::Unpublished),
    (Signal::SIGTERM, Reason::RuntimeEnded),
    (Signal::SIGQUIT, Reason::RuntimeEnded),
];

fn plane_closes_port() {
    let plane = FakePlane::new();
    for protocol in PROTOCOLS {
        for (signal, reason) in ENDS {
            let (proxy, host, attachment) = start_attached(&plane, protocol);
            proxy.process.signal(signal);
            assert_eq!(attachment.next(), Some(Request::Detach(reason)));
            assert!(proxy.process.is_running(), "the port is not closed yet");
            attachment.detached();
            assert_eq!(proxy.process.wait().code(), Some(0));
            assert_free(protocol, host);
        }
    }
}

/// The plane still has the socket, which nobody can take away; but clients are refused.
fn plane_is_silent() {
    let plane = FakePlane::new();
    for protocol in PROTOCOLS {
        let (proxy, host, attachment) = start_attached(&plane, protocol);
        assert_eq!(proxy.stop().code(), Some(0));
        assert_eq!(attachment.next(), Some(Request::Detach(Reason::Unpublished)));
        assert_eq!(attachment.next(), None);
        if protocol == "tcp" {
            TcpStream::connect(host).unwrap_err();
        }
        drop(attachment);
        assert_free(protocol, host);
    }
}

fn plane_ends() {
    let plane = FakePlane::new();
    for protocol in PROTOCOLS {
        let (proxy, host, attachment) = start_attached(&plane, protocol);
        proxy.process.signal(Signal::SIGINT);
        attachment.next();
        drop(attachment);
        assert_eq!(proxy.process.wait().code(), Some(0));
        assert_free(protocol, host);
    }
}

fn no_plane() {
    for protocol in PROTOCOLS {
        for (signal, _reason) in ENDS {
            let plane = FakePlane::new();
            let (proxy, host, attachment) = start_attached(&plane, protocol);
            drop((attachment, plane));
            proxy.process.signal(signal);
            assert_eq!(proxy.process.wait().code(), Some(0));
            assert_free(protocol, host);
        }
    }
}

fn before_the_answer() {
    let plane = FakePlane::new();
    let host = free("tcp", "127.0.0.1");
    let mut proxy = start(plane.name(), &mapping("tcp", host, container()));
    let attachment = plane.accept();
    proxy.process.signal(Signal::SIGINT);
    assert_eq!(attachment.next(), Some(Request::Detach(Reason::Unpublished)));
    attachment.detached();
    assert_eq!(proxy.process.wait().code(), Some(0));
    assert_eq!(proxy.status(), Status::Other(String::new()));
    assert_free("tcp", host);
}

fn meaningless_signals() {
    let plane = FakePlane::new();
    let (proxy, host, attachment) = start_attached(&plane, "tcp");
    for signal in [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGALRM, Signal::SIGPIPE] {
        proxy.process.signal(signal);
    }
    proxy.process.signal(Signal::SIGTERM);
    assert_eq!(attachment.next(), Some(Request::Detach(Reason::RuntimeEnded)));
    attachment.detached();
    assert_eq!(proxy.process.wait().code(), Some(0));
    assert_free("tcp", host);
}

/// Starts a shim with all signals blocked.
fn start_blocked(name: &str, host: SocketAddr) -> DockerProxy {
    let shim = rproxy_shim().to_str().unwrap();
    let mut arguments = vec!["--block-signal".to_owned(), format!("RPROXY_ATTACH={name}"), shim.to_owned()];
    arguments.extend(mapping("tcp", host, container()));
    DockerProxy::start(&require::find("env").unwrap(), &arguments, None)
}

fn blocked_signals() {
    let plane = FakePlane::new();
    for (signal, reason) in ENDS {
        let host = free("tcp", "127.0.0.1");
        let mut proxy = start_blocked(plane.name(), host);
        let attachment = plane.serve();
        assert_eq!(proxy.status(), Status::Ready);
        proxy.process.signal(signal);
        assert_eq!(attachment.next(), Some(Request::Detach(reason)));
        attachment.detached();
        assert_eq!(proxy.process.wait().code(), Some(0));
        assert_free("tcp", host);
    }
}

/// The shim blocks them, too, and `rproxy` inherits that.
fn blocked_signals_of_rproxy() {
    let plain: fn(&str, SocketAddr) -> DockerProxy =
        |name, host| start(name, &mapping("tcp", host, container()));
    for start in [start_blocked, plain] {
        for (signal, _reason) in ENDS {
            let host = free("tcp", "127.0.0.1");
            let mut proxy = start(&free_name(), host);
            assert_eq!(proxy.status(), Status::Ready);
            assert_replaced(&proxy);
            proxy.process.signal(signal);
            assert_eq!(proxy.process.wait().code(), Some(0));
            assert_free("tcp", host);
        }
    }
}

/// The plane hears of it, and still has the socket.
fn killed() {
    let plane = FakePlane::new();
    let (proxy, host, attachment) = start_attached(&plane, "tcp");
    proxy.process.signal(Signal::SIGKILL);
    proxy.process.wait();
    assert_eq!(attachment.next(), None);
    let _client = client::connect(host);
    drop(attachment);
    assert_free("tcp", host);
}
