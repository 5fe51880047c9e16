//! `rproxy-shim`: what it hands to a plane, what it does without one, and its end. Its docker-proxy interface is tested by
//! the suites `docker::contract` and `udp::contract`.

mod attached;
mod ends;
mod fallback;
mod process;

use std::fs;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use rproxy_shim::message::{Reason, Request};
use socket2::{Domain, Protocol, Socket, Type};

use testkit::docker_proxy::{DockerProxy, Status, mapping};
use testkit::eventually;
use testkit::fake_plane::{Attachment, FakePlane};
use testkit::process::Process;
use testkit::rproxy::rproxy_shim;
use testkit::suite::Case;

pub(crate) fn cases() -> Vec<Case> {
    testkit::modules![attached, fallback, ends, process]
}

/// Both protocols.
const PROTOCOLS: [&str; 2] = ["tcp", "udp"];

/// Starts the shim with these arguments, which looks for a plane at `name`.
#[track_caller]
fn start(name: &str, arguments: &[String]) -> DockerProxy {
    start_by(name, arguments, None, Process::spawn)
}

#[track_caller]
fn start_by(
    name: &str,
    arguments: &[String],
    listener: Option<OwnedFd>,
    spawn: impl FnOnce(Command) -> Process,
) -> DockerProxy {
    DockerProxy::start_by(rproxy_shim(), arguments, listener, OFlag::empty(), |mut command| {
        command.env("RPROXY_ATTACH", name);
        spawn(command)
    })
}

/// The program that a process executes.
fn program(pid: Pid) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default()
}

/// Waits until the shim has become `rproxy`.
#[track_caller]
fn assert_replaced(proxy: &DockerProxy) {
    eventually("rproxy replaces the shim", || program(proxy.process.pid()).ends_with("rproxy"));
}

#[track_caller]
fn assert_not_replaced(proxy: &DockerProxy) {
    assert_eq!(program(proxy.process.pid()), rproxy_shim());
}

/// Binds an address as a program without any option does; it must be free.
#[track_caller]
fn assert_free(protocol: &str, address: SocketAddr) {
    let domain = Domain::for_address(address);
    let socket = match protocol {
        "tcp" => Socket::new(domain, Type::STREAM, Some(Protocol::TCP)),
        _ => Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)),
    };
    let socket = socket.unwrap();
    if let Err(error) = socket.bind(&address.into()) {
        panic!("{address}/{protocol} is not free: {error}");
    }
    if protocol == "tcp" {
        socket.listen(1).unwrap();
    }
}

/// A free address of the loopback of a family.
fn free(protocol: &str, ip: &str) -> SocketAddr {
    let address: SocketAddr = format!("{ip}:0").parse().unwrap();
    match protocol {
        "tcp" => TcpListener::bind(address).unwrap().local_addr().unwrap(),
        _ => UdpSocket::bind(address).unwrap().local_addr().unwrap(),
    }
}

/// Where the container would be.
fn container() -> SocketAddr {
    "192.0.2.2:80".parse().unwrap()
}

/// Starts a shim for a free port that a plane serves.
#[track_caller]
fn start_attached(plane: &FakePlane, protocol: &str) -> (DockerProxy, SocketAddr, Attachment) {
    let host = free(protocol, "127.0.0.1");
    let mut proxy = start(plane.name(), &mapping(protocol, host, container()));
    let attachment = plane.serve();
    assert_eq!(proxy.status(), Status::Ready);
    assert_eq!(proxy.read_status_packet(), None, "more than the status");
    (proxy, host, attachment)
}

/// Unpublishes the port of a shim.
#[track_caller]
fn unpublish(proxy: &DockerProxy, attachment: Attachment) {
    proxy.process.signal(Signal::SIGINT);
    assert_eq!(attachment.next(), Some(Request::Detach(Reason::Unpublished)));
    attachment.detached();
    assert_eq!(proxy.process.wait().code(), Some(0));
}

/// A directory that anybody can enter, with a copy of the shim and nothing else.
fn shim_alone() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let shim = directory.path().join("rproxy-shim");
    fs::copy(rproxy_shim(), &shim).unwrap();
    (directory, shim)
}

/// The directory of the release binaries.
fn release() -> &'static Path {
    rproxy_shim().parent().unwrap()
}
