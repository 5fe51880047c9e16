//! Traffic classes: code points and congestion marks are kept for each datagram in both directions, or set.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;

use nix::cmsg_space;
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt, sockopt,
};

use testkit::backend::{self, TcpBackend};
use testkit::client;
use testkit::netns::Namespace;
use testkit::require::Need;
use testkit::rproxy::Standalone;
use testkit::suite::Case;
use testkit::topology::{CLIENT_V4, CLIENT_V6, CONTAINER_V4, CONTAINER_V6, HOST_V4, HOST_V6, Topology};
use testkit::udp::{self, bind_in, relay_in};

const PORT: u16 = 5300;

/// Expedited forwarding, without a mark; ECT(0); CE beside AF41; nothing; all bits.
const CLASSES: [u8; 5] = [46 << 2, 0b10, 34 << 2 | 0b11, 0, 0xff];

pub(crate) fn cases() -> Vec<Case> {
    let wiring = &[Need::Root, Need::Program("ip")];
    let case = |name: &str, body: fn()| Case::new(name, body).needs(wiring);
    vec![
        case("classes pass over IPv4", || {
            assert_pass("0.0.0.0:5300", (CLIENT_V4, HOST_V4), (CONTAINER_V4, CONTAINER_V4));
        }),
        case("classes pass over IPv6", || {
            assert_pass("[::]:5300", (CLIENT_V6, HOST_V6), (CONTAINER_V6, CONTAINER_V6));
        }),
        case("classes pass from IPv4 by way of a dual-stack socket", || {
            assert_pass("[::]:5300", (CLIENT_V4, HOST_V4), (CONTAINER_V4, CONTAINER_V4));
        }),
        case("classes pass from IPv6 to IPv4", || {
            assert_pass("[::]:5300", (CLIENT_V6, HOST_V6), (CONTAINER_V4, CONTAINER_V4));
        }),
        case("classes pass from IPv4 to IPv6", || {
            assert_pass("[::]:5300", (CLIENT_V4, HOST_V4), (CONTAINER_V6, CONTAINER_V6));
        }),
        case("each datagram of a burst keeps its class", bursts),
        case("a code point is set, and congestion marks are kept", set),
        case("a code point is set for connections", set_for_connections).needs(&[Need::Program("nft")]),
    ]
}

/// A socket that tells the class of what it receives.
fn bind_telling(namespace: &Namespace, ip: impl Into<IpAddr>, port: u16) -> UdpSocket {
    let socket = bind_in(namespace, SocketAddr::new(ip.into(), port));
    if socket.local_addr().unwrap().is_ipv4() {
        setsockopt(&socket, sockopt::IpRecvTos, &true).unwrap();
    } else {
        setsockopt(&socket, sockopt::Ipv6RecvTClass, &true).unwrap();
    }
    socket
}

/// Sends `bytes`, in datagrams of `segment` bytes if that is less, with a class.
fn send(socket: &UdpSocket, bytes: &[u8], to: SocketAddr, class: u8, segment: u16) {
    let (v6, to) = (i32::from(class), SockaddrStorage::from(to));
    let class = match to.as_sockaddr_in6() {
        Some(_) => ControlMessage::Ipv6TClass(&v6),
        None => ControlMessage::Ipv4Tos(&class),
    };
    let control = [class, ControlMessage::UdpGsoSegments(&segment)];
    let count = if bytes.len() > usize::from(segment) { 2 } else { 1 };
    let payload = [IoSlice::new(bytes)];
    sendmsg(socket.as_raw_fd(), &payload, &control[..count], MsgFlags::empty(), Some(&to)).unwrap();
}

/// A datagram, who sent it, and its class.
fn receive(socket: &UdpSocket) -> (Vec<u8>, SocketAddr, u8) {
    let mut bytes = vec![0; 65_536];
    let mut space = cmsg_space!(u8, i32);
    let mut pieces = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::empty();
    let received =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut pieces, Some(&mut space), flags).unwrap();
    let class = received.cmsgs().unwrap().find_map(|message| match message {
        ControlMessageOwned::Ipv4Tos(class) => Some(class),
        ControlMessageOwned::Ipv6TClass(class) => u8::try_from(class).ok(),
        _ => None,
    });
    let address = received.address.unwrap();
    let v4 = address.as_sockaddr_in().map(|addr| SocketAddr::V4((*addr).into()));
    let from = v4.unwrap_or_else(|| SocketAddr::V6((*address.as_sockaddr_in6().unwrap()).into()));
    let len = received.bytes;
    bytes.truncate(len);
    (bytes, from, class.unwrap())
}

fn assert_pass(
    listening: &str,
    (client, asked): (impl Into<IpAddr>, impl Into<IpAddr>),
    (backend, at): (impl Into<IpAddr>, impl Into<IpAddr>),
) {
    let net = Topology::new();
    let backend = bind_telling(&net.container, backend, PORT);
    let _proxy = relay_in(&net.host, listening, SocketAddr::new(at.into(), PORT), &[]);
    let client = bind_telling(&net.client, client, 0);
    let asked = SocketAddr::new(asked.into(), PORT);
    for (asking, answering) in CLASSES.into_iter().zip(CLASSES.into_iter().rev()) {
        send(&client, b"question", asked, asking, 1_000);
        let (question, flow, class) = receive(&backend);
        assert_eq!((&question[..], class), (&b"question"[..], asking));
        send(&backend, b"answer", flow, answering, 1_000);
        let (answer, from, class) = receive(&client);
        assert_eq!((&answer[..], from, class), (&b"answer"[..], asked, answering));
    }
}

/// Of the same size, so that they could go as one; in runs that arrive as one, and singly.
fn bursts() {
    const SIZE: usize = 200;
    let net = Topology::new();
    let backend = bind_telling(&net.container, CONTAINER_V4, PORT);
    let proxy = relay_in(&net.host, "0.0.0.0:5300", (CONTAINER_V4, PORT), &[]);
    let client = bind_telling(&net.client, CLIENT_V4, 0);
    let asked = SocketAddr::from((HOST_V4, PORT));
    send(&client, b"hello", asked, 0, 1_000);
    let flow = receive(&backend).1;
    for (sender, to, receiver) in [(&client, asked, &backend), (&backend, flow, &client)] {
        proxy.process.pause();
        let mut sent: Vec<(Vec<u8>, u8)> = Vec::new();
        for (number, run) in [1, 1, 2, 10, 1, 20, 3, 1, 30, 5].into_iter().enumerate() {
            let class = CLASSES[number % CLASSES.len()];
            let bytes: Vec<u8> = (0..run).flat_map(|place| udp::pattern(sent.len() + place, SIZE)).collect();
            send(sender, &bytes, to, class, u16::try_from(SIZE).unwrap());
            sent.extend(bytes.chunks(SIZE).map(|bytes| (bytes.to_vec(), class)));
        }
        proxy.process.resume();
        for (number, (bytes, class)) in sent.into_iter().enumerate() {
            let (received, _from, with) = receive(receiver);
            assert!(received == bytes, "datagram {number} is another one");
            assert_eq!(with, class, "datagram {number}");
        }
    }
}

fn set() {
    let net = Topology::new();
    let backend = bind_telling(&net.container, CONTAINER_V4, PORT);
    let _proxy = relay_in(&net.host, "0.0.0.0:5300", (CONTAINER_V4, PORT), &["--dscp", "AF41"]);
    let client = bind_telling(&net.client, CLIENT_V4, 0);
    let asked = SocketAddr::from((HOST_V4, PORT));
    for class in CLASSES {
        let wanted = 34 << 2 | class & 0b11;
        send(&client, b"question", asked, class, 1_000);
        let (_question, flow, asking) = receive(&backend);
        send(&backend, b"answer", flow, class, 1_000);
        assert_eq!((asking, receive(&client).2), (wanted, wanted));
    }
}

/// All that carries bytes of a connection is marked, on both sides.
fn set_for_connections() {
    assert_marked("0.0.0.0:5300", HOST_V4, CONTAINER_V4);
    assert_marked("[::]:5300", HOST_V6, CONTAINER_V6);
    assert_marked("[::]:5300", HOST_V4, CONTAINER_V6);
}

fn assert_marked(listening: &str, asked: impl Into<IpAddr>, at: impl Into<IpAddr>) {
    let net = Topology::new();
    let backend = SocketAddr::new(at.into(), PORT);
    let listener = net.container.run(|| TcpListener::bind(backend).unwrap());
    let _backend = TcpBackend::serve(listener, backend::echo);
    let to = backend.to_string();
    let arguments = ["--host", listening, "--to", &to, "--sandbox", "strict", "--dscp", "EF"];
    let _proxy = Standalone::start_in(&net.host, &arguments);
    for namespace in [&net.client, &net.container] {
        let nft = |rule: &str| namespace.command(&format!("nft {rule}")).success();
        nft("add table inet t");
        nft("add chain inet t c { type filter hook input priority 0 ; }");
        for (name, condition) in [("marked", "=="), ("others", "!=")] {
            nft(&format!("add counter inet t {name}"));
            for family in ["ip", "ip6"] {
                nft(&format!(
                    "add rule inet t c meta l4proto tcp tcp flags & psh == psh {family} dscp {condition} ef \
                     counter name {name}"
                ));
            }
        }
    }
    let asked = SocketAddr::new(asked.into(), PORT);
    let mut stream = net.client.run(|| client::connect(asked));
    stream.write_all(b"bytes").unwrap();
    stream.read_exact(&mut [0; 5]).unwrap();
    for namespace in [&net.client, &net.container] {
        let packets = |name: &str| {
            let counter = namespace.command(&format!("nft list counter inet t {name}")).success();
            counter.split_once("packets ").unwrap().1.split_whitespace().next().unwrap().to_owned()
        };
        assert_eq!((packets("marked"), packets("others")), ("1".to_owned(), "0".to_owned()), "{listening}");
    }
}
