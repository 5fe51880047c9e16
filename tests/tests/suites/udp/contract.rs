//! The docker-proxy contract for UDP: the same cases against `rproxy` and, as the reference, against the `docker-proxy`
//! of Debian's docker.io (20.10). A case in which the two differ says why.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Socket, Type};

use testkit::client::{self, own_address};
use testkit::docker_proxy::{DockerProxy, Status, mapping};
use testkit::oracle::{self, Holds, Row, Subject, failure_of};
use testkit::suite::Case;
use testkit::udp::{self, Backend, LARGEST_V4, LARGEST_V6, assert_echoes};

use Holds::{Differently, ForBoth, ForRproxy};
use Subject::Oracle;

const NO_FD_4: &str = "docker-proxy 20.10 takes no socket";

const CASES: &[Row] = &[
    // The UDP cases of moby's own suite. TestUDPOneSided needs its own timeout: see `udp::flows`.
    ("TestUDP4Proxy", ForRproxy(NO_FD_4), udp4),
    ("TestUDP4ProxyNoListener", ForBoth, udp4_no_listener),
    ("TestUDP6Proxy", ForRproxy(NO_FD_4), udp6),
    ("TestUDP6Proxy without a socket", ForBoth, udp6_no_listener),
    (
        "TestUDPWriteError",
        Differently("docker-proxy 20.10 may lose a datagram to the error of the one before"),
        write_error,
    ),
    // Where it listens and whom it serves.
    ("IPv6 host, IPv4 container", ForBoth, host_v6_container_v4),
    ("IPv4 host, IPv6 container", ForBoth, host_v4_container_v6),
    ("own IPv6 socket leaves IPv4 alone", ForBoth, own_bind_is_v6_only),
    ("a client keeps its flow", ForBoth, client_keeps_its_flow),
    ("clients have flows of their own", ForBoth, clients_have_own_flows),
    (
        "answers come from the address asked",
        Differently("docker-proxy 20.10 leaves the choice to the kernel"),
        answers_from_address_asked,
    ),
    // What passes.
    ("largest IPv4 datagram", ForBoth, largest_v4),
    ("largest IPv6 datagram", ForRproxy("docker-proxy's buffer ends at 65,507 bytes"), largest_v6),
    ("datagram without bytes", Differently("docker-proxy loses it"), without_bytes),
    // Descriptor 3.
    ("ready is one write", ForBoth, ready_is_one_write),
    ("port taken", ForBoth, port_taken),
    ("address not on this machine", ForBoth, foreign_address),
    // Descriptor 4.
    ("blocking socket", ForRproxy(NO_FD_4), blocking_socket),
    ("socket reports addresses already", ForRproxy(NO_FD_4), socket_with_pktinfo),
    ("socket does not report addresses", ForRproxy(NO_FD_4), socket_without_pktinfo),
    ("dual-stack socket", ForRproxy(NO_FD_4), dual_stack_socket),
    ("datagrams from before its start", ForRproxy(NO_FD_4), datagrams_from_before),
    ("socket is TCP", ForRproxy(NO_FD_4), socket_is_tcp),
    ("socket missing", ForRproxy(NO_FD_4), socket_missing),
    // Its end.
    ("SIGINT ends it", ForBoth, sigint_ends_it),
    ("SIGTERM ends it", ForBoth, sigterm_ends_it),
    ("port free after stop", ForBoth, port_free_after_stop),
];

pub(crate) fn cases() -> Vec<Case> {
    CASES.iter().flat_map(oracle::cases).collect()
}

/// moby's own.
const BUFFER: &[u8] = b"Buffer of moby's size";

fn serve(subject: Subject, host: SocketAddr, container: SocketAddr) -> DockerProxy {
    subject.serve("udp", host, container)
}

/// Starts a proxy on a copy of `socket`, and waits until it serves.
fn adopt(subject: Subject, socket: &UdpSocket, container: SocketAddr) -> DockerProxy {
    let mut proxy = subject.adopt("udp", socket.try_clone().unwrap(), container);
    assert_eq!(proxy.status(), Status::Ready);
    proxy
}

fn free_v6() -> SocketAddr {
    UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

fn echo_on(ip: impl Into<IpAddr>) -> Backend {
    Backend::echo(udp::client(ip))
}

fn echo() -> Backend {
    echo_on(Ipv4Addr::LOCALHOST)
}

/// A client in the family of `host`.
fn client_of(host: SocketAddr) -> UdpSocket {
    match host {
        SocketAddr::V4(_) => udp::local(),
        SocketAddr::V6(_) => udp::client(Ipv6Addr::LOCALHOST),
    }
}

/// Serves a mapping on a socket of its own and checks that datagrams come back.
fn relays(subject: Subject, host: SocketAddr, backend: &Backend) {
    let _proxy = serve(subject, host, backend.address());
    let client = client_of(host);
    for _ in 0..3 {
        assert_echoes(&client, host, BUFFER);
    }
}

fn relays_from_socket(subject: Subject, ip: IpAddr) {
    let (backend, socket) = (echo_on(ip), udp::client(ip));
    let _proxy = adopt(subject, &socket, backend.address());
    assert_echoes(&udp::client(ip), udp::address(&socket), BUFFER);
}

fn udp4(subject: Subject) {
    relays_from_socket(subject, Ipv4Addr::LOCALHOST.into());
}

fn udp6(subject: Subject) {
    relays_from_socket(subject, Ipv6Addr::LOCALHOST.into());
}

fn udp4_no_listener(subject: Subject) {
    relays(subject, own_address(), &echo());
}

fn udp6_no_listener(subject: Subject) {
    relays(subject, free_v6(), &echo_on(Ipv6Addr::LOCALHOST));
}

fn host_v6_container_v4(subject: Subject) {
    relays(subject, free_v6(), &echo());
}

fn host_v4_container_v6(subject: Subject) {
    relays(subject, own_address(), &echo_on(Ipv6Addr::LOCALHOST));
}

/// What is written while the backend is down must end neither the proxy nor the flow.
fn write_error(subject: Subject) {
    let (host, container) = (own_address(), own_address());
    let proxy = serve(subject, host, container);
    let client = client_of(host);
    client.send_to(b"nobody hears this", host).unwrap();
    client.send_to(b"nor this", host).unwrap();
    // The two may yet reach it, if the proxy is slow, and are not to be mistaken for the third.
    let _backend = Backend::serve(udp::bind(container), |socket, bytes, from| {
        if bytes == BUFFER {
            socket.send_to(bytes, from).ok();
        }
    });
    if subject == Oracle {
        client.send_to(BUFFER, host).unwrap();
    }
    assert_echoes(&client, host, BUFFER);
    assert!(proxy.process.is_running());
}

fn own_bind_is_v6_only(subject: Subject) {
    let backend = echo();
    let port = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap().local_addr().unwrap().port();
    let _proxy = serve(subject, (Ipv6Addr::UNSPECIFIED, port).into(), backend.address());
    let host = (Ipv6Addr::LOCALHOST, port).into();
    assert_echoes(&client_of(host), host, BUFFER);
    UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).expect("the IPv4 port is taken, too");
}

/// The flow of a client that gets no answers stays, too.
fn client_keeps_its_flow(subject: Subject) {
    let (backend, host) = (udp::local(), own_address());
    let _proxy = serve(subject, host, udp::address(&backend));
    let client = client_of(host);
    client.send_to(BUFFER, host).unwrap();
    let (_, flow) = udp::receive(&backend);
    for number in 0..15_u8 {
        client.send_to(&[number], host).unwrap();
        assert_eq!(udp::receive(&backend), (vec![number], flow));
    }
    backend.send_to(b"at last", flow).unwrap();
    assert_eq!(udp::receive(&client), (b"at last".to_vec(), host));
}

fn clients_have_own_flows(subject: Subject) {
    let (backend, host) = (Backend::naming(udp::local()), own_address());
    let _proxy = serve(subject, host, backend.address());
    let clients: Vec<_> = (0..20).map(|_| client_of(host)).collect();
    let flows = || clients.iter().map(|client| udp::flow_of(client, host)).collect::<Vec<_>>();
    let first = flows();
    assert_eq!(flows(), first);
    let mut distinct = first;
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), clients.len());
}

fn answers_from_address_asked(subject: Subject) {
    let backend = echo();
    let port = udp::local_port(&udp::client(Ipv4Addr::UNSPECIFIED));
    let _proxy = serve(subject, (Ipv4Addr::UNSPECIFIED, port).into(), backend.address());
    let asked = SocketAddr::new(own_address().ip(), port);
    let (answer, from) = udp::ask(&client_of(asked), asked, BUFFER);
    assert_eq!(answer, BUFFER);
    match subject {
        Oracle => assert_ne!(from, asked),
        _ => assert_eq!(from, asked),
    }
}

fn largest_v4(subject: Subject) {
    let (backend, host) = (echo(), own_address());
    let _proxy = serve(subject, host, backend.address());
    assert_echoes(&client_of(host), host, &udp::pattern(1, LARGEST_V4));
}

fn largest_v6(subject: Subject) {
    let (backend, host) = (echo_on(Ipv6Addr::LOCALHOST), free_v6());
    let _proxy = serve(subject, host, backend.address());
    assert_echoes(&client_of(host), host, &udp::pattern(2, LARGEST_V6));
}

fn without_bytes(subject: Subject) {
    let (backend, host) = (udp::local(), own_address());
    let _proxy = serve(subject, host, udp::address(&backend));
    let client = client_of(host);
    client.send_to(b"", host).unwrap();
    client.send_to(b"next", host).unwrap();
    let (first, flow) = udp::receive(&backend);
    match subject {
        Oracle => assert_eq!(first, b"next"),
        _ => {
            assert_eq!(first, b"");
            assert_eq!(udp::receive(&backend), (b"next".to_vec(), flow));
        }
    }
    backend.send_to(b"", flow).unwrap();
    backend.send_to(b"last", flow).unwrap();
    if subject != Oracle {
        assert_eq!(udp::receive(&client), (vec![], host));
    }
    assert_eq!(udp::receive(&client), (b"last".to_vec(), host));
}

fn ready_is_one_write(subject: Subject) {
    subject.assert_ready_is_one_write("udp");
}

fn port_taken(subject: Subject) {
    let taken = udp::bind(own_address());
    let message = subject.failure_at("udp", udp::address(&taken));
    assert!(message.contains("in use") || message.contains("taken"), "{message:?}");
}

fn foreign_address(subject: Subject) {
    subject.failure_at("udp", (client::FOREIGN, 8080).into());
}

fn blocking_socket(subject: Subject) {
    let (backend, socket) = (echo(), udp::local());
    let flags = || OFlag::from_bits_retain(fcntl(socket.as_fd(), FcntlArg::F_GETFL).unwrap());
    assert!(!flags().contains(OFlag::O_NONBLOCK));
    let _proxy = adopt(subject, &socket, backend.address());
    assert!(flags().contains(OFlag::O_NONBLOCK), "a receive would block the proxy");
    assert_echoes(&udp::local(), udp::address(&socket), BUFFER);
}

/// A wildcard socket, so that the reports make a difference, and the addresses to ask it at.
fn wildcard(ip: impl Into<IpAddr>) -> (UdpSocket, [SocketAddr; 2]) {
    let socket = udp::client(ip);
    let port = udp::local_port(&socket);
    let ips: [IpAddr; 2] = match udp::address(&socket) {
        SocketAddr::V4(_) => [own_address().ip(), own_address().ip()],
        SocketAddr::V6(_) => [Ipv6Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()],
    };
    (socket, ips.map(|ip| SocketAddr::new(ip, port)))
}

fn assert_answers_from(asked: [SocketAddr; 2]) {
    let client = client_of(asked[0]);
    for address in asked {
        assert_echoes(&client, address, BUFFER);
    }
}

/// As dockerd passes it from 28.0 on.
fn socket_with_pktinfo(subject: Subject) {
    let (v4, asked_v4) = wildcard(Ipv4Addr::UNSPECIFIED);
    setsockopt(&v4, sockopt::Ipv4PacketInfo, &true).unwrap();
    let (v6, asked_v6) = wildcard(Ipv6Addr::UNSPECIFIED);
    setsockopt(&v6, sockopt::Ipv6RecvPacketInfo, &true).unwrap();
    let backend = echo();
    let _proxies = [adopt(subject, &v4, backend.address()), adopt(subject, &v6, backend.address())];
    assert_answers_from(asked_v4);
    assert_answers_from(asked_v6);
}

/// As an older dockerd would pass it, in the middle of an upgrade.
fn socket_without_pktinfo(subject: Subject) {
    let (v4, asked_v4) = wildcard(Ipv4Addr::UNSPECIFIED);
    let (v6, asked_v6) = wildcard(Ipv6Addr::UNSPECIFIED);
    let backend = echo();
    let _proxies = [adopt(subject, &v4, backend.address()), adopt(subject, &v6, backend.address())];
    assert_answers_from(asked_v4);
    assert_answers_from(asked_v6);
}

fn dual_stack_socket(subject: Subject) {
    let backend = echo_on(Ipv6Addr::LOCALHOST);
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, None).unwrap();
    socket.set_only_v6(false).unwrap();
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)).into()).unwrap();
    let socket = UdpSocket::from(socket);
    let port = udp::local_port(&socket);
    let _proxy = adopt(subject, &socket, backend.address());
    for ip in [own_address().ip(), own_address().ip(), Ipv6Addr::LOCALHOST.into()] {
        let asked = SocketAddr::new(ip, port);
        assert_echoes(&client_of(asked), asked, BUFFER);
    }
}

/// The daemon binds first, so that clients may be early.
fn datagrams_from_before(subject: Subject) {
    let backend = echo();
    let (socket, [asked, _]) = wildcard(Ipv4Addr::UNSPECIFIED);
    let client = client_of(asked);
    for number in 0..10_u8 {
        client.send_to(&[number], asked).unwrap();
    }
    let _proxy = adopt(subject, &socket, backend.address());
    for number in 0..10_u8 {
        // Before the socket was asked to report addresses, the kernel did not keep them.
        assert_eq!(udp::receive(&client).0, [number]);
    }
    assert_echoes(&client, asked, BUFFER);
}

fn socket_is_tcp(subject: Subject) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let message = failure_of(subject.adopt("udp", listener, own_address()));
    assert!(message.contains('4'), "does not name the descriptor: {message:?}");
    let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
    let message = failure_of(subject.adopt("udp", socket, own_address()));
    assert!(message.contains('4'), "does not name the descriptor: {message:?}");
}

fn socket_missing(subject: Subject) {
    let mut arguments = mapping("udp", own_address(), own_address());
    arguments.push("-use-listen-fd".into());
    let message = subject.failure(&arguments);
    assert!(message.contains('4'), "does not name the descriptor: {message:?}");
}

/// A signal ends the proxy although a flow is active.
fn ends_at_once_on(subject: Subject, signal: Signal) {
    let (backend, host) = (echo(), own_address());
    let proxy = serve(subject, host, backend.address());
    assert_echoes(&client_of(host), host, BUFFER);
    subject.assert_ended(subject.stop(&proxy, signal));
}

fn sigint_ends_it(subject: Subject) {
    ends_at_once_on(subject, Signal::SIGINT);
}

fn sigterm_ends_it(subject: Subject) {
    ends_at_once_on(subject, Signal::SIGTERM);
}

fn port_free_after_stop(subject: Subject) {
    let (backend, host) = (echo(), own_address());
    let client = client_of(host);
    for _ in 0..3 {
        let proxy = serve(subject, host, backend.address());
        assert_echoes(&client, host, BUFFER);
        subject.assert_ended(subject.stop(&proxy, Signal::SIGINT));
    }
}
