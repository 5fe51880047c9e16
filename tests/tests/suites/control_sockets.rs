//! Sockets that come with requests to the control socket, and what is cut by an `apply`.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde_json::{Value, json};
use socket2::{Domain, Socket, Type};
use testkit::backend::TcpBackend;
use testkit::client::{self, own_address};
use testkit::controlled::{Controlled, mapping};
use testkit::require::Need;
use testkit::suite::Case;
use testkit::udp;
use testkit::{PATIENCE, eventually};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("sockets that come with a request are served", served),
        Case::new("clients that came before are served first", queued),
        Case::new("sockets that do not fit are refused and closed", refused),
        Case::new("a socket serves the families of its mapping", families).needs(&[Need::Ipv6]),
        Case::new("two thousand ports come at once", many),
        Case::new("an apply with cut ends what is removed", cut),
        Case::new("the port of a removed mapping is free at once with cut", free_at_once),
    ]
}

fn listener(address: SocketAddr) -> (OwnedFd, SocketAddr) {
    let listener = TcpListener::bind(address).unwrap();
    let address = listener.local_addr().unwrap();
    (listener.into(), address)
}

fn any() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

/// Sends a request with these sockets, and returns the answer.
#[track_caller]
fn ask(proxy: &Controlled, request: &Value, sockets: &[BorrowedFd<'_>]) -> Value {
    proxy.connect().ask_with(request, sockets)
}

fn add(mappings: &[Value]) -> Value {
    json!({ "v": 1, "do": { "add": { "mappings": mappings } } })
}

fn apply(mappings: &[Value], cut: bool) -> Value {
    json!({ "v": 1, "do": { "apply": { "mappings": mappings, "cut": cut } } })
}

fn served() {
    let (backend, datagrams) = (TcpBackend::echo(), udp::Backend::echo(udp::local()));
    let proxy = Controlled::start(&[]);
    let (tcp, tcp_at) = listener(any());
    let socket = UdpSocket::bind(any()).unwrap();
    let udp_at = socket.local_addr().unwrap();
    let mappings = [
        mapping("dns", "udp", udp_at, datagrams.address()),
        mapping("web", "tcp", tcp_at, backend.address()),
    ];
    // In another order than the mappings.
    let answer = ask(&proxy, &add(&mappings), &[tcp.as_fd(), socket.as_fd()]);
    assert_eq!(answer["ok"]["added"], 2, "{answer}");
    drop((tcp, socket));
    client::assert_echoes(tcp_at);
    udp::assert_echoes(&udp::local(), udp_at, b"datagram");
    // What is served stays, and needs no socket again.
    let (more, more_at) = listener(any());
    let all = [&mappings[..], &[mapping("more", "tcp", more_at, backend.address())]].concat();
    let answer = ask(&proxy, &apply(&all, false), &[more.as_fd()]);
    assert_eq!((&answer["ok"]["added"], &answer["ok"]["unchanged"]), (&json!(1), &json!(2)), "{answer}");
    client::assert_echoes(more_at);
    // The client's own descriptor keeps the port bound, and nobody serves it.
    proxy.ctl(&["remove", "more"]).success();
    TcpListener::bind(more_at).unwrap_err();
    drop(more);
    TcpListener::bind(more_at).unwrap();
}

fn queued() {
    let backend = TcpBackend::echo();
    let proxy = Controlled::start(&[]);
    let (tcp, at) = listener(any());
    let mut early = TcpStream::connect(at).unwrap();
    early.set_read_timeout(Some(PATIENCE)).unwrap();
    early.write_all(b"early").unwrap();
    let answer = ask(&proxy, &add(&[mapping("web", "tcp", at, backend.address())]), &[tcp.as_fd()]);
    assert_eq!(answer["ok"]["added"], 1, "{answer}");
    let mut echoed = [0; 5];
    early.read_exact(&mut echoed).unwrap();
    assert_eq!(&echoed, b"early");
}

fn refused() {
    let backend = TcpBackend::echo();
    let proxy = Controlled::start(&[]);
    let descriptors = || std::fs::read_dir(format!("/proc/{}/fd", proxy.process.pid())).unwrap().count();
    let (tcp, at) = listener(any());
    let (other, other_at) = listener(any());
    let web = [mapping("web", "tcp", at, backend.address())];
    let unbound: OwnedFd = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap().into();
    let file: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    let (mut as_udp, mut elsewhere) = (web[0].clone(), web[0].clone());
    as_udp["proto"] = "udp".into();
    elsewhere["host"] = "127.0.0.2".into();
    let list = json!({ "v": 1, "do": "list" });
    let of_other = format!("the socket {other_at}/tcp that came with the request is for none");
    let of_web = format!("the socket {at}/tcp that came with the request is for none");
    let cases: [(&Value, &[BorrowedFd<'_>], &str); 8] = [
        (&add(&web), &[tcp.as_fd(), other.as_fd()], &of_other),
        (&add(&web), &[tcp.as_fd(), tcp.as_fd()], &of_web),
        (&add(&[as_udp]), &[tcp.as_fd()], &of_web),
        (&add(&[elsewhere]), &[tcp.as_fd()], &of_web),
        (&apply(&web, false), &[file.as_fd()], "socket 1 of the request: "),
        (&add(&web), &[unbound.as_fd()], "socket 1 of the request: "),
        (&list, &[tcp.as_fd()], "only add and apply take sockets"),
        (&apply(&[], true), &[tcp.as_fd()], &of_web),
    ];
    let refuse_all = || {
        for (request, sockets, message) in &cases {
            let answer = ask(&proxy, request, sockets);
            assert_eq!(answer["error"]["kind"], "socket", "{request}: {answer}");
            let said = answer["error"]["message"].as_str().unwrap();
            assert!(said.starts_with(*message), "{request}: {answer}");
            assert_eq!(proxy.json(&["list"])["mappings"], json!([]));
        }
    };
    // Some descriptors are kept from the first mapping on.
    refuse_all();
    let before = descriptors();
    refuse_all();
    eventually("all are closed", || descriptors() <= before);
    let answer = ask(&proxy, &add(&web), &[tcp.as_fd()]);
    assert_eq!(answer["ok"]["added"], 1, "{answer}");
}

fn families() {
    let backend = TcpBackend::echo();
    let proxy = Controlled::start(&[]);
    let socket = |address: &str, v6only| -> (OwnedFd, SocketAddr) {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
        socket.set_only_v6(v6only).unwrap();
        socket.bind(&address.parse::<SocketAddr>().unwrap().into()).unwrap();
        socket.listen(1).unwrap();
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        (socket.into(), address)
    };
    for (address, v6only, wants_v6only, fits) in [
        ("[::]:0", false, false, true),
        ("[::]:0", true, true, true),
        ("[::]:0", true, false, false),
        ("[::]:0", false, true, false),
        ("[::1]:0", true, false, true),
        ("[::1]:0", false, false, true),
    ] {
        let (socket, at) = socket(address, v6only);
        let mut mapping = mapping("web", "tcp", at, backend.address());
        mapping["v6only"] = wants_v6only.into();
        let answer = ask(&proxy, &add(&[mapping.clone()]), &[socket.as_fd()]);
        let what = format!("{address} {v6only} {wants_v6only}: {answer}");
        if fits {
            client::assert_echoes(SocketAddr::new(std::net::Ipv6Addr::LOCALHOST.into(), at.port()));
            // Under another name, it stays on the same socket.
            mapping["name"] = "other".into();
            let answer = ask(&proxy, &apply(&[mapping], true), &[]);
            assert_eq!(answer["ok"]["added"], 1, "{what}, {answer}");
            proxy.ctl(&["remove", "other"]).success();
        } else {
            assert!(answer["error"]["message"].as_str().unwrap().contains("IPv4 clients, unlike"), "{what}");
        }
    }
}

fn many() {
    const PORTS: usize = 2000;
    crate::faults::roles::raise_descriptor_limit();
    let (backend, datagrams) = (TcpBackend::echo(), udp::Backend::echo(udp::local()));
    let proxy = Controlled::start(&["--log-level", "warn"]);
    let (mut sockets, mut mappings) = (Vec::new(), Vec::new());
    for index in 0..PORTS {
        let (tcp, tcp_at) = listener(any());
        let udp = UdpSocket::bind(any()).unwrap();
        let udp_at = udp.local_addr().unwrap();
        sockets.extend([tcp, udp.into()]);
        mappings.push(mapping(&format!("tcp{index}"), "tcp", tcp_at, backend.address()));
        mappings.push(mapping(&format!("udp{index}"), "udp", udp_at, datagrams.address()));
    }
    let passed: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
    let answer = ask(&proxy, &apply(&mappings, true), &passed);
    assert_eq!(answer["ok"]["added"], 2 * PORTS, "{answer}");
    let at = |mapping: &Value| -> SocketAddr {
        format!("127.0.0.1:{}", mapping["host_ports"].as_str().unwrap()).parse().unwrap()
    };
    client::assert_echoes(at(&mappings[2 * PORTS - 2]));
    udp::assert_echoes(&udp::local(), at(&mappings[2 * PORTS - 1]), b"datagram");
    let answer = ask(&proxy, &apply(&[], true), &[]);
    assert_eq!(answer["ok"]["removed"], 2 * PORTS, "{answer}");
}

fn cut() {
    let backend = TcpBackend::echo();
    let proxy = Controlled::start(&[]);
    let (gone, kept) = (own_address(), SocketAddr::new(own_address().ip(), 8081));
    let mappings =
        [mapping("gone", "tcp", gone, backend.address()), mapping("kept", "tcp", kept, backend.address())];
    proxy.apply(&mappings).success();
    let open = |address| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
        stream
    };
    let (mut ended, mut lasting) = (open(gone), open(kept));
    let file = proxy.file("kept.json", &json!({ "mappings": [mappings[1]] }).to_string());
    proxy.ctl(&["apply", "--cut", file.to_str().unwrap()]).success();
    let error = ended.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    lasting.write_all(b"y").unwrap();
    lasting.read_exact(&mut [0]).unwrap();
    assert_eq!(proxy.json(&["list"])["draining"], json!([]));
}

fn free_at_once() {
    let backend = udp::Backend::echo(udp::local());
    let proxy = Controlled::start(&[]);
    for request in ["apply", "remove"] {
        let address = own_address();
        proxy.apply(&[mapping("dns", "udp", address, backend.address())]).success();
        // Without cut, the socket stays open for the replies to this flow.
        udp::assert_echoes(&udp::local(), address, b"datagram");
        match request {
            "apply" => {
                let answer = ask(&proxy, &apply(&[], true), &[]);
                assert_eq!(answer["ok"]["removed"], 1, "{answer}");
            }
            _ => drop(proxy.ctl(&["remove", "--cut", "dns"]).success()),
        }
        UdpSocket::bind(address).unwrap();
    }
}
