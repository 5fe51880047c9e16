//! Listeners that another process shuts down, and processes that start with too few descriptors.

use std::net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, UdpSocket};
use std::thread;

use socket2::SockRef;

use testkit::backend::TcpBackend;
use testkit::client;
use testkit::docker_proxy::{self, DockerProxy, Status};
use testkit::holdings::wait_until_idle;
use testkit::process::{self, Process, Stream};
use testkit::require::{self, Need};
use testkit::rproxy::{Standalone, rproxy};
use testkit::suite::Case;
use testkit::systemd::Systemd;
use testkit::udp;

use super::case;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("a listener that is shut down ends a process without others", dead_ends_process),
        case("a listener that is shut down listens again", dead_listens_again),
        case("a listener that is destroyed listens again", destroyed_listens_again)
            .needs(&[Need::Program("ss")]),
        case("a listener for datagrams that is shut down", dead_udp),
        case("a listener that is shut down, beside others", dead_beside_others),
        case("few descriptors make clients wait", few_descriptors).needs(&[Need::Program("prlimit")]),
    ]
}

fn shut_down(listener: &TcpListener) {
    SockRef::from(listener).shutdown(Shutdown::Both).unwrap();
}

/// Checks that a process which was passed `listener` serves it, and shuts it down then.
fn serve_and_shut_down(listener: &TcpListener) {
    let address = listener.local_addr().unwrap();
    client::assert_echoes(address);
    shut_down(listener);
}

/// Without a right to listen a process can only say so and end; whoever started it may start another one.
fn dead_ends_process() {
    let backend = TcpBackend::echo();
    let (listener, address) = client::own_listener();
    let systemd = Systemd::new();
    let arguments = ["--host", &address.to_string(), "--to", &backend.address().to_string()];
    let sockets = vec![("web", listener.try_clone().unwrap().into())];
    let proxy = Process::spawn(systemd.command_with_sockets(&arguments, sockets));
    assert_eq!(systemd.told(), ["READY=1"]);
    serve_and_shut_down(&listener);
    let output = proxy.into_output();
    assert_eq!(output.status.code(), Some(1));
    let said = output.stderr.lines().filter(|line| line.contains("its clients are refused")).count();
    assert_eq!(said, 1, "{}", output.stderr);

    let (listener, address) = client::own_listener();
    let arguments = docker_proxy::mapping("tcp", address, backend.address());
    let arguments = [arguments, vec!["-use-listen-fd".to_owned()]].concat();
    let mut proxy = DockerProxy::start(rproxy(), &arguments, Some(listener.try_clone().unwrap().into()));
    assert_eq!(proxy.status(), Status::Ready);
    serve_and_shut_down(&listener);
    assert_eq!(proxy.process.wait().code(), Some(1));
}

/// For datagrams nothing can be done about it.
fn dead_udp() {
    let backend = udp::Backend::echo(udp::client([127, 0, 0, 1]));
    let to = backend.address().to_string();
    let sockets = [0; 2].map(|_| UdpSocket::bind((client::own_loopback(), 0)).unwrap());
    let hosts = sockets.each_ref().map(|socket| socket.local_addr().unwrap());
    let texts = hosts.map(|host| host.to_string());
    let arguments = ["--proto", "udp", "--host", &texts[0], "--to", &to, "--host", &texts[1], "--to", &to];
    let systemd = Systemd::new();
    let passed = sockets.each_ref().map(|socket| ("dns", socket.try_clone().unwrap().into()));
    let proxy = Process::spawn(systemd.command_with_sockets(&arguments, passed.into()));
    assert_eq!(systemd.told(), ["READY=1"]);
    let ends = [(&sockets[0], &hosts[..], Shutdown::Both), (&sockets[1], &hosts[1..], Shutdown::Write)];
    for (socket, served, end) in ends {
        served.iter().for_each(|host| udp::assert_all_echo(&udp::client(host.ip()), *host, [0, 1400]));
        // It says that it is not connected, and shuts down all the same (inet_shutdown in net/ipv4/af_inet.c).
        SockRef::from(socket).shutdown(end).unwrap_err();
        // That nothing can be sent any more, the next answer shows.
        udp::client(served[0].ip()).send_to(b"question", served[0]).unwrap();
        proxy.wait_for_line(Stream::Stderr, |line| line.contains("are not served any more"));
    }
    assert_eq!(proxy.wait().code(), Some(1));
}

/// A process that may listen does so again: nobody else has the address.
fn dead_listens_again() {
    // A port that was chosen by whoever bound it, and one that the kernel chose, which it forgets.
    for address in [client::own_address(), (client::own_loopback(), 0).into()] {
        shut_down_again_and_again(address);
    }
}

fn shut_down_again_and_again(address: SocketAddr) {
    let backend = TcpBackend::echo();
    let listener = TcpListener::bind(address).unwrap();
    let address = listener.local_addr().unwrap();
    let systemd = Systemd::new();
    let directory = tempfile::tempdir().unwrap();
    let control = directory.path().join("control");
    let arguments = [
        "--control",
        control.to_str().unwrap(),
        "--host",
        &address.to_string(),
        "--to",
        &backend.address().to_string(),
    ];
    let sockets = vec![("web", listener.try_clone().unwrap().into())];
    let proxy = Process::spawn(systemd.command_with_sockets(&arguments, sockets));
    assert_eq!(systemd.told(), ["READY=1"]);
    for round in 1..=3 {
        serve_and_shut_down(&listener);
        proxy.wait_for_lines(Stream::Stderr, round, |line| line.contains("listens again"));
    }
    client::assert_echoes(address);
    wait_until_idle(proxy.pid());
}

/// One that is destroyed (`SOCK_DESTROY`, sock_diag(7)) would pass an end of stream on to all that it accepts.
fn destroyed_listens_again() {
    let backend = TcpBackend::echo();
    let to = backend.address().to_string();
    let directory = tempfile::tempdir().unwrap();
    let control = directory.path().join("control");
    let (ipv4, ipv6) = (client::own_address(), format!("[::1]:{}", client::free_port(Ipv6Addr::LOCALHOST)));
    let hosts = [ipv4.to_string(), ipv6];
    let control = control.to_str().unwrap();
    let proxy = Standalone::start(&[
        "--control",
        control,
        "--host",
        &hosts[0],
        "--to",
        &to,
        "--host",
        &hosts[1],
        "--to",
        &to,
    ]);
    for (index, host) in hosts.iter().enumerate() {
        let mut ss = require::command("ss");
        ss.args(["--kill", "--listening", "--tcp", "--numeric", "src", host]);
        let killed = process::run(ss).success();
        assert!(killed.contains(host.as_str()), "this kernel cannot destroy sockets: {killed}");
        proxy.process.wait_for_lines(Stream::Stderr, index + 1, |line| line.contains("listens again"));
        for _ in 0..3 {
            client::assert_echoes(host.parse().unwrap());
        }
    }
    wait_until_idle(proxy.process.pid());
}

/// Other mappings of the process are served on.
fn dead_beside_others() {
    let backend = TcpBackend::echo();
    let ((dead, dead_address), (alive, alive_address)) = (client::own_listener(), client::own_listener());
    let systemd = Systemd::new();
    let to = backend.address().to_string();
    let hosts = [dead_address.to_string(), alive_address.to_string()];
    let arguments = ["--host", &hosts[0], "--to", &to, "--host", &hosts[1], "--to", &to];
    let sockets = vec![("one", dead.try_clone().unwrap().into()), ("other", alive.into())];
    let proxy = Process::spawn(systemd.command_with_sockets(&arguments, sockets));
    assert_eq!(systemd.told(), ["READY=1"]);
    serve_and_shut_down(&dead);
    proxy.wait_for_line(Stream::Stderr, |line| line.contains("its clients are refused"));
    for _ in 0..3 {
        client::assert_echoes(alive_address);
    }
    wait_until_idle(proxy.pid());
}

/// How many descriptors an idle process of one mapping has open.
fn descriptors_of_idle(to: &str) -> usize {
    let proxy = Standalone::start(&["--host", "127.0.0.1:0", "--to", to]);
    wait_until_idle(proxy.process.pid());
    proxy.process.descriptors()
}

fn few_descriptors() {
    const CLIENTS: usize = 6;

    let backend = TcpBackend::echo();
    let to = backend.address().to_string();
    let idle = descriptors_of_idle(&to);
    // One connection takes two, and the first one of a worker a third. The last is for all of the clients at once.
    for more in 3..=4 * CLIENTS {
        let proxy = Standalone::start(&["--host", "127.0.0.1:0", "--to", &to]);
        wait_until_idle(proxy.process.pid());
        proxy.process.limit_descriptors(idle + more);
        let address = proxy.address();
        thread::scope(|scope| {
            let ask = || client::ask(address, b"hello");
            let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(ask)).collect();
            for client in clients {
                let answer = client.join().unwrap();
                assert_eq!(answer.expect("nobody is reset"), b"hello", "{more} more descriptors");
            }
        });
        wait_until_idle(proxy.process.pid());
    }
}
