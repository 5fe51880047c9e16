//! `rproxy` as a service of systemd: notifications and passed sockets.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::fcntl::OFlag;
use nix::sys::signal::Signal;

use testkit::backend::TcpBackend;
use testkit::client;
use testkit::docker_proxy::{self, DockerProxy, Status};
use testkit::process::{self, Process, Stream};
use testkit::rproxy::{self, rproxy};
use testkit::suite::Case;
use testkit::systemd::Systemd;
use testkit::{eventually, udp};

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("readiness and the end are notified", readiness),
        case("a start that fails is never ready", failed_start),
        case("the watchdog is notified", watchdog),
        case("a service manager that reads nothing", unread),
        case("an abstract socket", abstract_socket),
        case("passed sockets serve the mappings at their addresses", sockets_by_address),
        case("passed sockets serve the mapping that has their name", sockets_by_name),
        case("sockets for another process are ignored", sockets_of_others),
        case("sockets that do not fit are refused", wrong_sockets),
        case("an unused socket is named", unwanted_socket),
        case("docker-proxy's descriptors are not systemd's", docker_mode),
    ]
}

fn unread() {
    let (systemd, backend, dir) = (Systemd::new(), TcpBackend::echo(), tempfile::tempdir().unwrap());
    let (file, address) = (dir.path().join("rproxy.toml"), client::own_address());
    fs::write(&file, format!("[[mapping]]\nhost = \"{address}\"\nto = \"{}\"\n", backend.address())).unwrap();
    let count = systemd.fill();
    let mut command = systemd.command(&["--config", file.to_str().unwrap(), "--sandbox", "strict"]);
    command.env("WATCHDOG_USEC", "50000");
    let proxy = Process::spawn(command);
    proxy.wait_for_line(Stream::Stderr, |line| {
        line.contains("the service manager does not read notifications")
    });
    for _ in 0..3 {
        proxy.signal(Signal::SIGHUP);
        client::assert_echoes(address);
    }
    proxy.wait_for_line(Stream::Stderr, |line| line.contains("configuration reloaded"));
    assert_eq!(systemd.empty(count), Vec::<Vec<String>>::new());
    // What was lost, in its last state, and then what is new.
    let told: Vec<_> = std::iter::from_fn(|| Some(systemd.told()[0].clone())).take(3).collect();
    assert_eq!(told, ["RELOADING=1", "READY=1", "WATCHDOG=1"]);
    systemd.fill();
    proxy.signal(Signal::SIGTERM);
    assert_eq!(proxy.wait().code(), Some(0));
}

fn abstract_socket() {
    let (systemd, backend, dir) =
        (Systemd::abstract_socket(), TcpBackend::echo(), tempfile::tempdir().unwrap());
    let (file, address) = (dir.path().join("rproxy.toml"), client::own_address());
    fs::write(&file, format!("[[mapping]]\nhost = \"{address}\"\nto = \"{}\"\n", backend.address())).unwrap();
    let proxy = Process::spawn(systemd.command(&["--config", file.to_str().unwrap(), "--sandbox", "strict"]));
    assert_eq!(systemd.told(), ["READY=1"]);
    proxy.signal(Signal::SIGHUP);
    assert_eq!(systemd.told()[0], "RELOADING=1");
    assert_eq!(systemd.told(), ["READY=1"]);
    proxy.signal(Signal::SIGTERM);
    assert_eq!(systemd.told(), ["STOPPING=1"]);
    assert_eq!(proxy.wait().code(), Some(0));
}

fn readiness() {
    let (systemd, backend) = (Systemd::new(), TcpBackend::echo());
    let to = backend.address().to_string();
    let proxy = Process::spawn(systemd.command(&["--host", "127.0.0.1:0", "--to", &to]));
    assert_eq!(systemd.told(), ["READY=1"]);
    proxy.signal(Signal::SIGTERM);
    assert_eq!(systemd.told(), ["STOPPING=1"]);
    assert_eq!(proxy.wait().code(), Some(0));
    assert!(systemd.has_heard_all());
}

fn failed_start() {
    let (_taken, address) = client::own_listener();
    let systemd = Systemd::new();
    let output = process::run(systemd.command(&["--host", &address.to_string(), "--to", "192.0.2.1:80"]));
    assert_eq!(output.status.code(), Some(1));
    assert!(systemd.has_heard_all());
}

fn watchdog() {
    let systemd = Systemd::new();
    let mut command = systemd.command(&["--host", "127.0.0.1:0", "--to", "192.0.2.1:80"]);
    command.env("WATCHDOG_USEC", "50000");
    let proxy = Process::spawn(command);
    assert_eq!(systemd.told(), ["READY=1"]);
    for _ in 0..3 {
        assert_eq!(systemd.told(), ["WATCHDOG=1"]);
    }
    drop(proxy);
}

fn sockets_by_address() {
    let (tcp, dgram) = (TcpBackend::echo(), udp::Backend::echo(udp::client([127, 0, 0, 1])));
    let (listener, address) = client::own_listener();
    let socket = UdpSocket::bind(address).unwrap();
    let other = client::own_listener().1;
    let systemd = Systemd::new();
    // A client that was there before the service waits for it.
    let mut early = client::connect(address);
    let (host, other) = (address.to_string(), other.to_string());
    let (tcp_to, udp_to) = (tcp.address().to_string(), dgram.address().to_string());
    let arguments = [
        "--host", &host, "--to", &tcp_to, "--host", &host, "--to", &udp_to, "--host", &other, "--to", &tcp_to,
    ];
    let arguments = [&arguments[..], &["--proto", "tcp", "--proto", "udp", "--proto", "tcp"]].concat();
    // Both are named after the unit, as systemd does it by default, and in no particular order.
    let sockets = vec![("rproxy.socket", OwnedFd::from(socket)), ("rproxy.socket", listener.into())];
    let _proxy = Process::spawn(systemd.command_with_sockets(&arguments, sockets));
    assert_eq!(systemd.told(), ["READY=1"]);
    early.write_all(b"early").unwrap();
    let mut answer = [0; 5];
    early.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"early");
    client::assert_echoes(address);
    client::assert_echoes(other.parse().unwrap());
    udp::assert_all_echo(&udp::client(address.ip()), address, [0, 1400]);
}

fn sockets_by_name() {
    let (backend, systemd) = (TcpBackend::echo(), Systemd::new());
    let (listener, address) = client::own_listener();
    let to = backend.address().to_string();
    let dir = tempfile::tempdir().unwrap();
    let control = dir.path().join("control").to_str().unwrap().to_owned();
    let arguments = ["--host", "0.0.0.0:8080", "--to", &to, "--control", &control];
    let command = systemd.command_with_sockets(&arguments, vec![("8080/tcp", listener.into())]);
    let proxy = Process::spawn(command);
    assert_eq!(systemd.told(), ["READY=1"]);
    client::assert_echoes(address);
    let ready = proxy.wait_for_line(Stream::Stdout, |_| true);
    assert_eq!(ready, format!("{}/tcp -> {address}", backend.address().port()), "where it really listens");
    let serving =
        format!("serving mapping=8080/tcp host={address} backend={} protocol=tcp", backend.address());
    proxy.wait_for_line(Stream::Stderr, |line| line.contains(&serving));
    let ctl = |arguments: &[&str]| {
        let words = ["ctl", "--control", &control];
        process::run(rproxy::command(&[&words[..], arguments].concat())).success()
    };
    let list = ctl(&["list"]);
    assert!(list.contains(&format!("{address}/tcp")), "{list}");
    let json = ctl(&["list", "--json"]);
    assert!(json.contains(&format!("\"bound_host\":\"{}\"", address.ip())), "{json}");
    let file = dir.path().join("list.json");
    fs::write(&file, json).unwrap();
    assert_eq!(
        ctl(&["apply", file.to_str().unwrap()]).trim(),
        "0 added, 0 changed, 0 removed, 1 not touched"
    );
}

fn sockets_of_others() {
    let (backend, systemd) = (TcpBackend::echo(), Systemd::new());
    let ((listener, passed), address) = (client::own_listener(), client::own_address());
    let (host, to) = (address.to_string(), backend.address().to_string());
    let command = systemd.command_for("1", &["--host", &host, "--to", &to], vec![("x", listener.into())]);
    let _proxy = Process::spawn(command);
    assert_eq!(systemd.told(), ["READY=1"]);
    client::assert_echoes(address);
    eventually("it is closed", || TcpStream::connect(passed).is_err());
}

fn wrong_sockets() {
    let systemd = Systemd::new();
    let udp_socket = || OwnedFd::from(udp::client([127, 0, 0, 1]));
    let file = || OwnedFd::from(File::open("/dev/null").unwrap());
    let idle =
        || OwnedFd::from(socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap());
    for (sockets, part) in [
        (vec![("8080/tcp", udp_socket())], "0 tcp sockets named 8080/tcp were passed"),
        (vec![("x", file())], "the socket x at descriptor 3 cannot be used: it is not a socket"),
        (
            vec![("y", idle())],
            "the socket y at descriptor 3 cannot be used: it is a TCP socket that does not listen",
        ),
    ] {
        let arguments = ["--host", "0.0.0.0:8080", "--to", "192.0.2.1:80"];
        let output = process::run(systemd.command_with_sockets(&arguments, sockets));
        assert_eq!(output.status.code(), Some(1), "{output:#?}");
        assert!(output.stderr.contains(part), "no {part:?}: {output:#?}");
        assert_eq!(output.stderr.lines().count(), 1, "{output:#?}");
    }
    assert!(systemd.has_heard_all());
}

fn unwanted_socket() {
    let (listener, address) = client::own_listener();
    let systemd = Systemd::new();
    let arguments = ["--host", "127.0.0.1:0", "--to", "192.0.2.1:80"];
    let proxy = Process::spawn(systemd.command_with_sockets(&arguments, vec![("web", listener.into())]));
    let line = proxy.wait_for_line(Stream::Stderr, |line| line.contains("that no mapping uses"));
    assert!(line.contains(&address.to_string()) && line.contains("web"), "{line}");
}

fn docker_mode() {
    let backend = TcpBackend::echo();
    let (listener, address) = client::own_listener();
    let flags = docker_proxy::mapping("tcp", address, backend.address());
    // The whole environment of socket activation, with descriptors 3 and 4 open: they are dockerd's.
    let script = r#"LISTEN_PID=$$ LISTEN_FDS=2 NOTIFY_SOCKET=/nowhere exec "$0" "$@""#;
    let mut arguments = vec!["-c".to_owned(), script.to_owned(), rproxy().display().to_string()];
    arguments.extend(flags.into_iter().chain(["-use-listen-fd".to_owned()]));
    let mut proxy = DockerProxy::start_by(
        Path::new("/bin/sh"),
        &arguments,
        Some(listener.into()),
        OFlag::empty(),
        Process::spawn,
    );
    assert_eq!(proxy.status(), Status::Ready);
    client::assert_echoes(address);
    assert_eq!(proxy.stop().code(), Some(0));
}
