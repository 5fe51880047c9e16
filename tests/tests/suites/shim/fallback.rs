//! When no plane serves the port, `rproxy` does, in place of the shim.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;

use nix::sys::socket::Backlog;
use nix::unistd::{Uid, seteuid};
use rproxy_shim::message::Answer;

use testkit::backend::TcpBackend;
use testkit::client;
use testkit::docker_proxy::{Status, mapping};
use testkit::fake_plane::{Attachment, FakePlane, free_name};
use testkit::process::{Process, Stream};
use testkit::require::Need;
use testkit::suite::Case;
use testkit::udp;

use super::*;

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body).needs(&[Need::Ipv6]);
    vec![
        case("no plane", absent),
        case("a plane of another user", stranger).needs(&[Need::Root]),
        case("a plane of the same user", same_user).needs(&[Need::Root]),
        case("a plane of another version", another_version),
        case("a plane that does not answer", silent),
        case("a plane that does not accept", full_queue),
        case("a plane that closes the connection", closes_at_once),
        case("a plane that cannot serve the port", unavailable),
        case("a plane that refuses the port", refused),
        case("a served port is given back", given_back),
        case("a plane that does not come back", never_comes_back),
        case("no rproxy", no_rproxy),
        case("rproxy cannot be executed", rproxy_not_executable),
        case("rproxy in PATH", rproxy_in_path),
        case("no rproxy for a served port", no_rproxy_for_served_port),
    ]
}

/// An address of nobody, as a user.
const NOBODY: u32 = 65534;

/// The shim becomes `rproxy`, which serves the port and has reported that.
#[track_caller]
fn falls_back(name: &str, protocol: &str, passed: bool, during: impl FnOnce()) {
    let (stream, datagrams) = (TcpBackend::echo(), udp::Backend::echo(udp::local()));
    let (backend, mut host) = match protocol {
        "tcp" => (stream.address(), free("tcp", "127.0.0.1")),
        _ => (datagrams.address(), free("udp", "127.0.0.1")),
    };
    let mut arguments = mapping(protocol, host, backend);
    let mut listener: Option<OwnedFd> = None;
    if passed {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        host = socket.local_addr().unwrap();
        listener = Some(socket.into());
        arguments.push("-use-listen-fd".into());
    }
    let mut proxy = start_by(name, &arguments, listener, Process::spawn);
    during();
    assert_eq!(proxy.status(), Status::Ready);
    assert_replaced(&proxy);
    if protocol == "tcp" {
        client::assert_echoes(host);
    } else {
        udp::assert_echoes(&udp::local(), host, b"hello");
    }
    assert_eq!(proxy.stop().code(), Some(0));
    if !passed {
        assert_free(protocol, host);
    }
}

/// In each way in which a shim can get its socket.
#[track_caller]
fn falls_back_always(plane: &FakePlane, during: impl Fn(Attachment)) {
    for (protocol, passed) in [("tcp", false), ("udp", false), ("tcp", true)] {
        falls_back(plane.name(), protocol, passed, || during(plane.accept()));
    }
}

fn absent() {
    for (protocol, passed) in [("tcp", false), ("udp", false), ("tcp", true)] {
        falls_back(&free_name(), protocol, passed, || {});
    }
}

/// A plane of the user `user`.
fn plane_of(user: u32) -> FakePlane {
    seteuid(Uid::from_raw(user)).unwrap();
    let plane = FakePlane::new();
    seteuid(Uid::from_raw(0)).unwrap();
    plane
}

fn stranger() {
    let plane = plane_of(NOBODY);
    falls_back(plane.name(), "tcp", false, || {
        drop(plane.connection());
    });
}

fn same_user() {
    let (_directory, shim) = shim_alone();
    for owner in [NOBODY, 0] {
        let plane = plane_of(owner);
        let host = free("tcp", "127.0.0.1");
        let mut proxy = DockerProxy::start_by(
            &shim,
            &mapping("tcp", host, container()),
            None,
            OFlag::empty(),
            |mut command| {
                command.env("RPROXY_ATTACH", plane.name()).uid(NOBODY);
                Process::spawn(command)
            },
        );
        let attachment = plane.serve();
        assert_eq!(proxy.status(), Status::Ready);
        unpublish(&proxy, attachment);
    }
}

fn another_version() {
    let plane = FakePlane::new();
    falls_back_always(&plane, |shim| {
        shim.send(b"RPXY\x02\x03");
        drop(shim.socket);
    });
    for no_answer in [&b"RPXY\x01\x63"[..], b"RPXY\x01\x01", b"hello", &[b'R'; 4096]] {
        falls_back(plane.name(), "tcp", false, || plane.accept().send(no_answer));
    }
}

fn silent() {
    let plane = FakePlane::new();
    for (protocol, passed) in [("tcp", false), ("udp", false), ("tcp", true)] {
        falls_back(plane.name(), protocol, passed, || {
            let shim = plane.accept();
            // It gives up, and hangs up.
            assert_eq!(shim.next(), None);
        });
    }
}

fn full_queue() {
    let plane = FakePlane::listen(&free_name(), Backlog::new(0).unwrap());
    // Its queue has room for one.
    let _first = testkit::shim::Shim::connect(plane.name()).unwrap();
    falls_back(plane.name(), "tcp", false, || {});
}

fn closes_at_once() {
    falls_back_always(&FakePlane::new(), drop);
}

fn unavailable() {
    falls_back_always(&FakePlane::new(), |shim| {
        shim.answer(Answer::Unavailable("no more descriptors"));
    });
}

fn refused() {
    let plane = FakePlane::new();
    for protocol in PROTOCOLS {
        let host = free(protocol, "127.0.0.1");
        let mut proxy = start(plane.name(), &mapping(protocol, host, container()));
        let shim = plane.accept();
        shim.answer(Answer::Refused("the port leads back to itself"));
        drop(shim);
        assert_eq!(proxy.status(), Status::Failed("the port leads back to itself".into()));
        let output = proxy.process.into_output();
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(output.stderr, "rproxy-shim: the port leads back to itself\n");
        assert_free(protocol, host);
    }
}

/// After readiness, `rproxy` serves what a plane no longer does. The runtime does not hear of it.
fn given_back() {
    for answer in [Answer::Unavailable("too much to do"), Answer::Refused("unknown"), Answer::Detached] {
        let plane = FakePlane::new();
        let backend = TcpBackend::echo();
        let host = free("tcp", "127.0.0.1");
        let mut proxy = start(plane.name(), &mapping("tcp", host, backend.address()));
        let shim = plane.serve();
        assert_eq!(proxy.status(), Status::Ready);
        let mut waiting = client::connect(host);
        waiting.write_all(b"hello").unwrap();
        shim.answer(answer);
        drop(shim);
        assert_replaced(&proxy);
        let mut hello = [0; 5];
        waiting.read_exact(&mut hello).unwrap();
        assert_eq!(proxy.read_status_packet(), None, "more than the status");
        assert_eq!(proxy.stop().code(), Some(0));
        assert_free("tcp", host);
    }
}

fn never_comes_back() {
    let plane = FakePlane::new();
    let backend = TcpBackend::echo();
    let host = free("tcp", "127.0.0.1");
    let mut proxy = start(plane.name(), &mapping("tcp", host, backend.address()));
    let shim = plane.serve();
    assert_eq!(proxy.status(), Status::Ready);
    drop((shim, plane));
    let mut waiting = client::connect(host);
    waiting.write_all(b"hello").unwrap();
    let mut hello = [0; 5];
    waiting.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");
    assert_replaced(&proxy);
    assert_eq!(proxy.stop().code(), Some(0));
    assert_free("tcp", host);
}

/// Starts a copy of the shim that is alone in its directory.
fn start_alone(shim: &Path, plane: &str, path: &Path, host: SocketAddr) -> DockerProxy {
    let arguments = mapping("tcp", host, container());
    DockerProxy::start_by(shim, &arguments, None, OFlag::empty(), |mut command| {
        command.env("RPROXY_ATTACH", plane).env("PATH", path);
        Process::spawn(command)
    })
}

fn no_rproxy() {
    let (directory, shim) = shim_alone();
    let host = free("tcp", "127.0.0.1");
    let mut proxy = start_alone(&shim, &free_name(), directory.path(), host);
    let message = format!(
        "cannot execute {}: there is no such file, and no rproxy in PATH; install it beside rproxy-shim",
        directory.path().join("rproxy").display()
    );
    assert_eq!(proxy.status(), Status::Failed(message.clone()));
    let output = proxy.process.into_output();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(output.stderr, format!("rproxy-shim: {message}\n"));
    assert_free("tcp", host);
}

fn rproxy_not_executable() {
    let (directory, shim) = shim_alone();
    fs::write(directory.path().join("rproxy"), "not a program").unwrap();
    let mut proxy = start_alone(&shim, &free_name(), Path::new("/nowhere"), free("tcp", "127.0.0.1"));
    let Status::Failed(message) = proxy.status() else { panic!("it has not failed") };
    assert!(message.ends_with("/rproxy: permission denied; make it executable"), "{message}");
}

fn rproxy_in_path() {
    let (directory, shim) = shim_alone();
    let path = std::env::join_paths([directory.path(), release()]).unwrap();
    let host = free("tcp", "127.0.0.1");
    let mut proxy = start_alone(&shim, &free_name(), Path::new(&path), host);
    assert_eq!(proxy.status(), Status::Ready);
    assert_replaced(&proxy);
}

/// It stays open, and the next plane serves it.
fn no_rproxy_for_served_port() {
    let (_directory, shim) = shim_alone();
    let plane = FakePlane::new();
    let host = free("tcp", "127.0.0.1");
    let mut proxy = start_alone(&shim, plane.name(), Path::new("/nowhere"), host);
    let attachment = plane.serve();
    assert_eq!(proxy.status(), Status::Ready);
    attachment.answer(Answer::Unavailable("too much to do"));
    drop(attachment);
    proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("cannot execute"));
    let waiting = client::connect(host);
    let attachment = plane.serve();
    let (_accepted, peer) = TcpListener::from(attachment.socket).accept().unwrap();
    assert_eq!(peer, waiting.local_addr().unwrap());
}
