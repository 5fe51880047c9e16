//! What a plane is handed, and what the runtime hears.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{getsockopt, sockopt};
use rproxy_shim::message::{Answer, Attach, TCP, UDP};
use socket2::SockRef;

use testkit::backend::TcpBackend;
use testkit::client;
use testkit::docker_proxy::{Status, mapping};
use testkit::fake_plane::FakePlane;
use testkit::netns::Namespace;
use testkit::plane::Plane;
use testkit::process::Process;
use testkit::require::Need;
use testkit::suite::Case;
use testkit::udp;

use super::*;

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body).needs(&[Need::Ipv6]);
    vec![
        case("a port of its own", own_port),
        case("the options of a TCP socket", tcp_options),
        case("the options of a UDP socket", udp_options),
        case("a socket that was passed", passed_socket),
        case("a host address that is IPv4 in IPv6", mapped_addresses),
        case("scoped addresses", scoped_addresses).needs(&[Need::Root]),
        case("the default name", default_name).needs(&[Need::Root]),
        case("clients wait for another plane", another_plane),
        case("a plane that comes back twice", plane_comes_back_twice),
        case("a plane that closes connections when it starts", plane_closes_at_start),
        case("the real plane", real_plane),
        case("the real plane, started again", real_plane_again),
    ]
}

fn number(protocol: &str) -> u8 {
    if protocol == "tcp" { TCP } else { UDP }
}

/// A client of the socket that a plane was handed reaches it.
#[track_caller]
fn assert_reaches(protocol: &str, socket: OwnedFd, host: SocketAddr) {
    if protocol == "tcp" {
        let mut client = client::connect(host);
        client.write_all(b"hello").unwrap();
        let (mut accepted, _) = accept(socket);
        let mut hello = [0; 5];
        accepted.read_exact(&mut hello).unwrap();
        assert_eq!(&hello, b"hello");
    } else {
        let client = udp::client(host.ip());
        client.send_to(b"hello", host).unwrap();
        let socket = udp::patient(UdpSocket::from(socket));
        socket.set_nonblocking(false).unwrap();
        assert_eq!(udp::receive(&socket), (b"hello".to_vec(), client.local_addr().unwrap()));
    }
}

fn accept(socket: OwnedFd) -> (std::net::TcpStream, SocketAddr) {
    let listener = TcpListener::from(socket);
    listener.set_nonblocking(false).unwrap();
    let (stream, peer) = listener.accept().unwrap();
    stream.set_nonblocking(false).unwrap();
    (client::patient(stream), peer)
}

fn own_port() {
    for protocol in PROTOCOLS {
        for (ip, container) in [
            ("127.0.0.1", "192.0.2.2:80"),
            ("[::1]", "[2001:db8::2]:80"),
            ("[::1]", "192.0.2.2:80"),
            ("127.0.0.1", "[2001:db8::2]:80"),
        ] {
            let plane = FakePlane::new();
            let (host, backend) = (free(protocol, ip), container.parse().unwrap());
            let mut proxy = start(plane.name(), &mapping(protocol, host, backend));
            let attachment = plane.accept();
            assert_eq!(attachment.attach, Attach { protocol: number(protocol), backend });
            let bound = SockRef::from(&attachment.socket).local_addr().unwrap().as_socket();
            assert_eq!(bound, Some(host));
            attachment.answer(Answer::Serving);
            assert_eq!(proxy.status(), Status::Ready);
            assert_eq!(proxy.read_status_packet(), None, "more than the status");
            assert_reaches(protocol, attachment.socket.try_clone().unwrap(), host);
            assert_not_replaced(&proxy);
        }
    }
}

fn tcp_options() {
    let plane = FakePlane::new();
    let host = free("tcp", "[::1]");
    let _proxy = start(plane.name(), &mapping("tcp", host, container()));
    let socket = plane.serve().socket;
    let socket = SockRef::from(&socket);
    assert!(socket.reuse_address().unwrap());
    assert!(socket.only_v6().unwrap());
    assert!(socket.is_listener().unwrap());
    assert!(
        socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap() && socket.out_of_band_inline().unwrap()
    );
    assert_eq!(socket.linger().unwrap(), Some(std::time::Duration::ZERO));
    assert_eq!(socket.tcp_keepalive_time().unwrap().as_secs(), 15);
    assert_eq!(socket.tcp_keepalive_interval().unwrap().as_secs(), 15);
    let flags = OFlag::from_bits_retain(fcntl(socket.as_fd(), FcntlArg::F_GETFL).unwrap());
    assert!(flags.contains(OFlag::O_NONBLOCK));
}

fn udp_options() {
    let plane = FakePlane::new();
    for ip in ["127.0.0.1", "[::1]"] {
        let host = free("udp", ip);
        let _proxy = start(plane.name(), &mapping("udp", host, container()));
        let socket = plane.serve().socket;
        assert!(!SockRef::from(&socket).reuse_address().unwrap());
        assert!(SockRef::from(&socket).recv_buffer_size().unwrap() >= 400_000);
        assert!(getsockopt(&socket, sockopt::Ipv4PacketInfo).unwrap());
        assert!(getsockopt(&socket, sockopt::RxqOvfl).unwrap() == 1);
        if host.is_ipv6() {
            assert!(SockRef::from(&socket).only_v6().unwrap());
            assert!(getsockopt(&socket, sockopt::Ipv6RecvPacketInfo).unwrap());
        }
    }
}

/// The runtime's socket is handed over as it is, wherever it listens.
fn passed_socket() {
    for protocol in PROTOCOLS {
        let plane = FakePlane::new();
        let (listener, host): (OwnedFd, SocketAddr) = if protocol == "tcp" {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let host = listener.local_addr().unwrap();
            (listener.into(), host)
        } else {
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
            let host = socket.local_addr().unwrap();
            (socket.into(), host)
        };
        let mut arguments = mapping(protocol, client::own_address(), container());
        arguments.push("-use-listen-fd".into());
        let copy = listener.try_clone().unwrap();
        let mut proxy = start_by(plane.name(), &arguments, Some(listener), Process::spawn);
        let attachment = plane.serve();
        assert_eq!(proxy.status(), Status::Ready);
        assert_eq!(attachment.attach, Attach { protocol: number(protocol), backend: container() });
        assert_reaches(protocol, attachment.socket.try_clone().unwrap(), host);
        drop(copy);
    }
}

fn mapped_addresses() {
    let plane = FakePlane::new();
    let host = free("tcp", "127.0.0.1");
    let mapped = |addr: SocketAddr| match addr.ip() {
        IpAddr::V4(ip) => SocketAddr::from((ip.to_ipv6_mapped(), addr.port())),
        IpAddr::V6(_) => addr,
    };
    let mut proxy = start(plane.name(), &mapping("tcp", mapped(host), mapped(container())));
    let attachment = plane.serve();
    assert_eq!(proxy.status(), Status::Ready);
    assert_eq!(attachment.attach.backend, container());
    assert_reaches("tcp", attachment.socket.try_clone().unwrap(), host);
}

fn scoped_addresses() {
    let namespace = Namespace::new();
    let container = Namespace::new();
    namespace.veth("bridge0", &container, "eth0");
    namespace.address("bridge0", "fe80::5/64");
    let index: u32 = {
        let links = namespace.ip("-oneline link show dev bridge0");
        links.split(':').next().unwrap().trim().parse().unwrap()
    };
    for protocol in PROTOCOLS {
        for zone in ["bridge0".to_owned(), index.to_string()] {
            let plane = namespace.run(FakePlane::new);
            let arguments = [
                "-proto",
                protocol,
                "-host-ip",
                &format!("fe80::5%{zone}"),
                "-host-port=8080",
                "-container-ip",
                &format!("fe80::9%{zone}"),
                "-container-port=80",
            ]
            .map(String::from);
            let mut proxy = start_by(plane.name(), &arguments, None, |command| namespace.spawn(command));
            let attachment = plane.serve();
            assert_eq!(proxy.status(), Status::Ready);
            assert_eq!(attachment.attach.backend, format!("[fe80::9%{index}]:80").parse().unwrap());
            let bound = SockRef::from(&attachment.socket).local_addr().unwrap().as_socket().unwrap();
            assert_eq!(bound, format!("[fe80::5%{index}]:8080").parse().unwrap());
            unpublish(&proxy, attachment);
        }
    }
}

fn default_name() {
    let namespace = Namespace::new();
    let plane = namespace.run(|| FakePlane::at("rproxy"));
    let arguments = mapping("tcp", "127.0.0.1:8080".parse().unwrap(), container());
    let start = |name: Option<&str>| {
        let name = name.map(String::from);
        DockerProxy::start_by(rproxy_shim(), &arguments, None, OFlag::empty(), |mut command| {
            command.env_remove("RPROXY_ATTACH");
            if let Some(name) = name {
                command.env("RPROXY_ATTACH", name);
            }
            namespace.spawn(command)
        })
    };
    let mut proxy = start(None);
    let attachment = plane.serve();
    assert_eq!(proxy.status(), Status::Ready);
    unpublish(&proxy, attachment);
    // An empty name means none, and one that is too long cannot be listened at.
    for none in ["", &"x".repeat(108)] {
        let mut proxy = start(Some(none));
        assert_eq!(proxy.status(), Status::Ready);
        assert_replaced(&proxy);
        proxy.stop();
    }
}

/// Clients that come while there is no plane are served by the next one.
fn another_plane() {
    for protocol in PROTOCOLS {
        let plane = FakePlane::new();
        let name = plane.name().to_owned();
        let (proxy, host, attachment) = start_attached(&plane, protocol);
        drop((plane, attachment));
        let (stream, datagrams) = if protocol == "tcp" {
            (Some(client::connect(host)), None)
        } else {
            let client = udp::client(host.ip());
            client.send_to(b"hello", host).unwrap();
            (None, Some(client))
        };
        let plane = FakePlane::at(&name);
        let attachment = plane.serve();
        assert_eq!(attachment.attach, Attach { protocol: number(protocol), backend: container() });
        if let Some(stream) = stream {
            assert_eq!(accept(attachment.socket).1, stream.local_addr().unwrap());
        } else if let Some(client) = datagrams {
            let socket = udp::patient(UdpSocket::from(attachment.socket));
            socket.set_nonblocking(false).unwrap();
            assert_eq!(udp::receive(&socket), (b"hello".to_vec(), client.local_addr().unwrap()));
        }
        assert_not_replaced(&proxy);
    }
}

fn plane_comes_back_twice() {
    let plane = FakePlane::new();
    let (proxy, host, mut attachment) = start_attached(&plane, "tcp");
    for _ in 0..2 {
        drop(attachment);
        attachment = plane.serve();
        assert_reaches("tcp", attachment.socket.try_clone().unwrap(), host);
    }
    assert_not_replaced(&proxy);
}

/// Before the first answer, that means that the plane cannot serve; afterwards, that it is not ready yet.
fn plane_closes_at_start() {
    let plane = FakePlane::new();
    let (proxy, host, attachment) = start_attached(&plane, "tcp");
    drop(attachment);
    for _ in 0..5 {
        drop(plane.accept());
    }
    let attachment = plane.serve();
    assert_reaches("tcp", attachment.socket.try_clone().unwrap(), host);
    assert_not_replaced(&proxy);
}

fn real_plane() {
    let plane = Plane::start(&testkit::fake_plane::free_name());
    let backend = TcpBackend::echo();
    let host = free("tcp", "127.0.0.1");
    let mut tcp = start(&plane.name, &mapping("tcp", host, backend.address()));
    assert_eq!(tcp.status(), Status::Ready);
    client::assert_echoes(host);
    let datagrams = udp::Backend::echo(udp::client(Ipv6Addr::LOCALHOST));
    let asked = free("udp", "[::1]");
    let mut udp = start(&plane.name, &mapping("udp", asked, datagrams.address()));
    assert_eq!(udp.status(), Status::Ready);
    udp::assert_echoes(&udp::client(asked.ip()), asked, b"hello");
    for (proxy, protocol, address) in [(&tcp, "tcp", host), (&udp, "udp", asked)] {
        assert_not_replaced(proxy);
        assert_eq!(proxy.stop().code(), Some(0));
        assert_free(protocol, address);
    }
}

fn real_plane_again() {
    let name = testkit::fake_plane::free_name();
    let plane = Plane::start(&name);
    let backend = TcpBackend::echo();
    let host = free("tcp", "127.0.0.1");
    let mut proxy = start(&name, &mapping("tcp", host, backend.address()));
    assert_eq!(proxy.status(), Status::Ready);
    client::assert_echoes(host);
    drop(plane);
    let mut waiting = client::connect(host);
    waiting.write_all(b"hello").unwrap();
    let _plane = Plane::start(&name);
    let mut hello = [0; 5];
    waiting.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");
    assert_not_replaced(&proxy);
}
