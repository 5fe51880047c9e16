//! What no shim sends, and sockets that nobody can serve: each gets one clear answer and one line in the log, nothing
//! changes, and others are served.

use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rproxy_shim::message::{Attach, Reason, Request, TCP, UDP};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use testkit::backend::TcpBackend;
use testkit::client::{self, own_address};
use testkit::eventually;
use testkit::process::Process;
use testkit::shim::Reply;
use testkit::suite::Case;
use testkit::systemd::Systemd;
use testkit::udp::{self, flow_of};
use testkit::upgradable::Program;

use super::scene::{Plane, Port, ask, bind_udp, connect, listen, name};

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("packets that are no requests", packets),
        case("sockets of another kind", sockets),
        case("no descriptor, and several", descriptors),
        case("containers that cannot be reached by one address", backends),
        case("a socket that is served already", served_already),
        case("a port that leads to itself", loops),
        case("requests in another order", order),
        case("a listener that is shut down from outside", shut_down),
        case("a socket that a mapping listens on", mapped),
    ]
}

/// A port that is served all the time, with a connection and a flow.
struct Steady {
    plane: Plane,
    echo: TcpBackend,
    naming: udp::Backend,
    web: Port,
    dns: Port,
    stream: TcpStream,
    socket: UdpSocket,
    flow: SocketAddr,
    descriptors: usize,
}

impl Steady {
    fn new() -> Self {
        let plane = Plane::start(&["--sandbox", "strict"]);
        let (echo, naming) = (TcpBackend::echo(), udp::Backend::naming(udp::local()));
        let (web, dns) =
            (Port::tcp(own_address(), echo.address()), Port::udp(own_address(), naming.address()));
        let (stream, socket) = (client::connect(web.address()), udp::client(dns.address().ip()));
        client::ping(&stream);
        let flow = flow_of(&socket, dns.address());
        let descriptors = plane.first.descriptors();
        Self { plane, echo, naming, web, dns, stream, socket, flow, descriptors }
    }

    /// Nothing has changed.
    #[track_caller]
    fn assert_unchanged(&self) {
        client::ping(&self.stream);
        client::assert_echoes(self.web.address());
        assert_eq!(flow_of(&self.socket, self.dns.address()), self.flow);
        assert!(self.web.shim.is_silent() && self.dns.shim.is_silent());
        assert_eq!(self.plane.json(&["list"])["mappings"].as_array().unwrap().len(), 2);
        // Pipes and a socket for the next connection may be kept.
        eventually("nothing is held", || self.plane.first.descriptors() <= self.descriptors + 12);
    }

    /// Checks an answer: a refusal that contains `part`, as the log does.
    #[track_caller]
    fn assert_refused(&self, answer: &Reply, part: &str) {
        let (Reply::Refused(text) | Reply::Unavailable(text)) = answer else { panic!("{part}: {answer:?}") };
        assert!(text.contains(part), "{part}: {text}");
        assert!(!text.contains('\n'), "{text}");
    }
}

fn packets() {
    let steady = Steady::new();
    let attach = Request::Attach(Attach { protocol: TCP, backend: steady.echo.address() });
    let attach = attach.encode().as_bytes().to_vec();
    let with = |index: usize, byte: u8| {
        let mut packet = attach.clone();
        packet[index] = byte;
        packet
    };
    let mut long = attach.clone();
    long.resize(100_000, 0);
    for (packet, part) in [
        (Vec::new(), "not a message of a shim"),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "not a message of a shim"),
        (b"RPXY".to_vec(), "length"),
        (attach[..20].to_vec(), "length"),
        (long, "length"),
        (with(4, 2), "version 2"),
        (with(5, 3), "kind 3"),
        (with(5, 99), "kind 99"),
        (with(7, 9), "value: 9"),
        (b"RPXY\x01\x02\x07".to_vec(), "value: 7"),
    ] {
        // A shim that has attached a port, and one that has not.
        for shim in [&connect(), &steady.web.shim] {
            let socket = bind_udp(own_address()).unwrap();
            for descriptors in [&[][..], &[socket.as_fd()]] {
                shim.send(&packet, descriptors).unwrap();
                steady.assert_refused(&shim.reply(), part);
            }
        }
    }
    steady.plane.wait_for_log("a port is not attached");
    steady.assert_unchanged();
}

fn owned(socket: impl Into<OwnedFd>) -> OwnedFd {
    socket.into()
}

fn sockets() {
    let steady = Steady::new();
    let idle = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    idle.bind(&own_address().into()).unwrap();
    let unbound = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let local = UnixListener::bind(dir.path().join("socket")).unwrap();
    let (pair, _other) = UnixStream::pair().unwrap();
    let (tcp, datagrams) = (listen(own_address(), true).unwrap(), bind_udp(own_address()).unwrap());
    let mut wrong = vec![
        (TCP, owned(std::fs::File::open("/etc/passwd").unwrap()), "not a socket"),
        (UDP, owned(std::fs::File::open("/dev/null").unwrap()), "not a socket"),
        (TCP, owned(datagrams.try_clone().unwrap()), "not a tcp socket"),
        (UDP, owned(tcp.try_clone().unwrap()), "not a udp socket"),
        (TCP, owned(local), "not a tcp socket"),
        (UDP, owned(pair), "not a udp socket"),
        (TCP, owned(idle), "does not listen"),
        (TCP, owned(steady.stream.try_clone().unwrap()), "does not listen"),
        (UDP, owned(unbound), "port"),
        (132, owned(tcp), "number 132"),
        (0, owned(datagrams), "number 0"),
    ];
    // Not every machine permits it (net.ipv4.ping_group_range).
    if let Ok(icmp) = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::ICMPV4)) {
        icmp.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 7)).into()).unwrap();
        wrong.push((UDP, owned(icmp), "not a udp socket"));
    }
    for (protocol, socket, part) in wrong {
        let answer = ask(&connect(), protocol, steady.echo.address(), &[socket.as_fd()]);
        steady.assert_refused(&answer, part);
    }
    steady.assert_unchanged();
}

fn descriptors() {
    let steady = Steady::new();
    let sockets: Vec<TcpListener> =
        (0..200).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()).collect();
    for count in [0, 2, 3, 200] {
        let some: Vec<BorrowedFd<'_>> = sockets[..count].iter().map(AsFd::as_fd).collect();
        let answer = ask(&connect(), TCP, steady.echo.address(), &some);
        steady.assert_refused(&answer, &format!("{count} descriptors came"));
    }
    // The same connection may do better.
    let shim = connect();
    steady.assert_refused(&ask(&shim, TCP, steady.echo.address(), &[]), "0 descriptors came");
    let port = Port::attach_by(shim, listen(own_address(), true).unwrap(), TCP, steady.echo.address());
    client::assert_echoes(port.address());
    port.end(Reason::Unpublished);
    steady.assert_unchanged();
}

fn backends() {
    let steady = Steady::new();
    for (backend, part) in [
        ("172.17.0.2:0", "port"),
        ("0.0.0.0:80", "0.0.0.0"),
        ("[::]:80", "[::]"),
        ("224.0.0.1:80", "224.0.0.1"),
        ("[ff02::1]:80", "ff02::1"),
        ("255.255.255.255:80", "255.255.255.255"),
        ("127.255.255.255:80", "127.255.255.255"),
    ] {
        let backend: SocketAddr = backend.parse().unwrap();
        let tcp = listen(own_address(), true).unwrap();
        steady.assert_refused(&ask(&connect(), TCP, backend, &[tcp.as_fd()]), part);
        let datagrams = bind_udp(own_address()).unwrap();
        steady.assert_refused(&ask(&connect(), UDP, backend, &[datagrams.as_fd()]), part);
    }
    steady.assert_unchanged();
}

fn served_already() {
    let steady = Steady::new();
    let (tcp, datagrams) = (steady.echo.address(), steady.naming.address());
    for (port, protocol, backend) in [(&steady.web, TCP, tcp), (&steady.dns, UDP, datagrams)] {
        let answer = ask(&connect(), protocol, backend, &[port.socket.as_fd()]);
        steady.assert_refused(&answer, &format!("{} is served already", port.name()));
        let again = ask(&port.shim, protocol, backend, &[port.socket.as_fd()]);
        steady.assert_refused(&again, &format!("{} already", port.name()));
    }
    steady.assert_unchanged();
}

fn loops() {
    let steady = Steady::new();
    for (protocol, bind) in [(TCP, (|host| listen(host, true)) as fn(SocketAddr) -> _), (UDP, bind_udp)] {
        let host = own_address();
        let socket = bind(host).unwrap();
        steady.assert_refused(&ask(&connect(), protocol, host, &[socket.as_fd()]), "forward to itself");
        let other = own_address();
        let second = bind(other).unwrap();
        let shim = connect();
        assert_eq!(ask(&shim, protocol, other, &[socket.as_fd()]), Reply::Serving);
        steady.assert_refused(&ask(&connect(), protocol, host, &[second.as_fd()]), "form a loop");
        assert_eq!(shim.detach(Reason::Unpublished), Reply::Detached);
    }
    steady.assert_unchanged();
}

fn order() {
    let steady = Steady::new();
    let shim = connect();
    assert_eq!(shim.detach(Reason::Unpublished), Reply::Detached);
    let socket = listen(own_address(), true).unwrap();
    let port = Port::attach_by(shim, socket, TCP, steady.echo.address());
    let second = listen(own_address(), true).unwrap();
    let answer = ask(&port.shim, TCP, steady.echo.address(), &[second.as_fd()]);
    steady.assert_refused(&answer, "each port needs a connection of its own");
    client::assert_echoes(port.address());
    for reason in [Reason::Unpublished, Reason::RuntimeEnded, Reason::Unpublished] {
        assert_eq!(port.shim.detach(reason), Reply::Detached);
    }
    // It may attach the next one.
    let host = own_address();
    let next = listen(host, true).unwrap();
    assert_eq!(ask(&port.shim, TCP, steady.echo.address(), &[next.as_fd()]), Reply::Serving);
    client::assert_echoes(host);
    drop(port);
    drop(next);
    eventually("its port is free", || listen(host, true).is_ok());
    steady.assert_unchanged();
}

/// The shims keep their sockets, and may do anything with them.
fn shut_down() {
    let plane = Plane::start(&["--sandbox", "strict"]);
    let (echo, naming) = (TcpBackend::echo(), udp::Backend::naming(udp::local()));
    for _ in 0..2 {
        // They are the only ones.
        let (web, dns) =
            (Port::tcp(own_address(), echo.address()), Port::udp(own_address(), naming.address()));
        client::assert_echoes(web.address());
        flow_of(&udp::client(dns.address().ip()), dns.address());
        SockRef::from(&web.socket).shutdown(Shutdown::Both).unwrap();
        // A socket that is not connected is shut down all the same (udp(7)).
        SockRef::from(&dns.socket).shutdown(Shutdown::Both).unwrap_err();
        plane.wait_for_log("shut down from outside");
        eventually("it listens again", || TcpStream::connect(web.address()).is_ok());
        client::assert_echoes(web.address());
        assert!(plane.first.is_running());
        assert!(web.shim.is_silent());
        let addresses = [web.address(), dns.address()];
        web.end(Reason::Unpublished);
        dns.end(Reason::Unpublished);
        super::scene::assert_free_tcp(addresses[0]);
        super::scene::assert_free_udp(addresses[1]);
    }
    let dns = Port::udp(own_address(), naming.address());
    flow_of(&udp::client(dns.address().ip()), dns.address());
}

/// A service manager has passed it to this process, and a shim to which it was passed, too, attaches it.
fn mapped() {
    let (program, systemd, echo) = (Program::new(), Systemd::new(), TcpBackend::echo());
    let listener = listen(own_address(), true).unwrap();
    let address = listener.local_addr().unwrap().as_socket().unwrap();
    let (attach, to) = (format!("--attach={}", name()), echo.address().to_string());
    let arguments = [&*attach, "--host", "0.0.0.0:8080", "--to", &to];
    let passed = OwnedFd::from(listener.try_clone().unwrap());
    let command = systemd.command_of(&program.path(), "$$", &arguments, vec![("8080/tcp", passed)]);
    let process = Process::spawn(command);
    assert_eq!(systemd.told(), ["READY=1"]);
    let answer = ask(&connect(), TCP, echo.address(), &[listener.as_fd()]);
    let Reply::Refused(text) = answer else { panic!("{answer:?}") };
    assert!(text.contains("listens there already"), "{text}");
    client::assert_echoes(address);
    assert!(process.is_running());
}
