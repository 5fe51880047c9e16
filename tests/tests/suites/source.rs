//! Where connections and datagrams to backends come from: the client's own address, or one of the host.

mod links;

use std::io::{self, Read, Write};
use std::net::{
    IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket,
};
use std::ops::Deref;
use std::process::Command;
use std::time::Duration;

use nix::net::if_::if_nametoindex;
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use socket2::{Domain, SockRef, Socket, Type};

use tempfile::TempDir;

use testkit::backend::{TcpBackend, echo};
use testkit::client::{self, End};
use testkit::controlled::{Controlled, mapping};
use testkit::eventually;
use testkit::netns::Namespace;
use testkit::process::{self, Output, Stream};
use testkit::require::{self, Need};
use testkit::rproxy::{Standalone, netns_setup};
use testkit::suite::Case;
use testkit::topology::{
    self, BRIDGE, BRIDGE_V4, CLIENT_V4, CLIENT_V6, CONTAINER_V4, CONTAINER_V6, HOST_V4, HOST_V6, Topology,
};
use testkit::udp::{self, bind_in, flow_of};
use testkit::upgradable::{Program, upgrade};

use crate::attach::scene::{Plane, Port};

const PORT: u16 = 5300;

/// The addresses that clients ask, and those of the backends that they lead to.
const V4: (SocketAddr, SocketAddr) = (at(IpAddr::V4(HOST_V4)), at(IpAddr::V4(CONTAINER_V4)));
const V6: (SocketAddr, SocketAddr) = (at(IpAddr::V6(HOST_V6)), at(IpAddr::V6(CONTAINER_V6)));

const fn at(ip: IpAddr) -> SocketAddr {
    SocketAddr::new(ip, PORT)
}

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| {
        Case::new(name, body).needs(&[Need::Root, Need::Program("nft")]).deadline(Duration::from_secs(120))
    };
    let mut cases = vec![
        case("TCP comes from its client", tcp_as_client),
        case("UDP comes from its client", udp_as_client),
        case("bulk both ways, a half-close and resets, as the client", bulk_as_client),
        case("a client's port is used again at once", port_again),
        case("a client's port leads to several backends at once", port_to_several),
        case("a client's port below 1024", low_port),
        case("clients without a return path come from the host", fallback),
        case("clients without a return path are refused", refused),
        case("a client in another network of the backend's link", two_networks),
        case("a client behind a gateway on the backend's link", behind_a_gateway),
        case("a backend on a link without addresses", unnumbered),
        case("a backend with a link-local address", link_local_backend),
        case("two thousand clients at once", many_clients),
        case("an upgrade keeps connections and flows of clients", over_an_upgrade),
        case("changes while connections run", changes),
        case("the client that a proxy in front tells", behind_a_proxy),
        case("the client with a header, too", with_header),
        case("with connection tracking", tracked),
        case("the command that is missing is said", missing_command),
        case("the command that is missing is said after a change", missing_after_change),
        case(
            "the command that is missing is said for attached ports, and after a reload",
            missing_for_attached,
        ),
        case("a change with CAP_NET_RAW alone", raw_alone).needs(&[Need::Program("setpriv")]),
        case("an address of the host", own_address),
        case("an interface", device),
    ];
    cases.extend(testkit::modules![links]);
    cases
}

/// A network whose host routes what belongs to a transparent socket to itself.
struct Transparent {
    net: Topology,
    /// That of `netns-setup`.
    state: TempDir,
}

impl Deref for Transparent {
    type Target = Topology;

    fn deref(&self) -> &Topology {
        &self.net
    }
}

fn transparent() -> Transparent {
    let transparent = without_answers();
    let setup = ["transparent", "up", "--interface", BRIDGE];
    transparent.netns_setup(&setup).success();
    transparent
}

/// The same, before that is set up.
fn without_answers() -> Transparent {
    Transparent { net: Topology::new(), state: tempfile::tempdir().unwrap() }
}

impl Transparent {
    fn netns_setup(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(netns_setup());
        command.args(arguments).arg("--state-dir").arg(self.state.path());
        self.host.spawn(command).into_output()
    }
}

/// A backend that tells each client its address, and then echoes.
fn naming(namespace: &Namespace, address: SocketAddr) -> TcpBackend {
    let listener = namespace.run(|| {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind(&address.into()).unwrap();
        // For as many clients at once as there are in any case.
        socket.listen(4096).unwrap();
        socket.into()
    });
    TcpBackend::serve(listener, |mut stream| {
        writeln!(stream, "{}", stream.peer_addr()?)?;
        echo(stream)
    })
}

/// The address of a connection's client, as the backend has told it.
fn seen(stream: &TcpStream) -> SocketAddr {
    let mut line = String::new();
    let mut byte = [0];
    while byte != *b"\n" {
        (&mut &*stream).read_exact(&mut byte).unwrap();
        line.push(char::from(byte[0]));
    }
    line.trim().parse().unwrap()
}

fn connect_in(namespace: &Namespace, to: SocketAddr) -> TcpStream {
    namespace.run(|| client::connect(to))
}

/// Connects from this address and port.
fn connect_from(namespace: &Namespace, from: SocketAddr, to: SocketAddr) -> TcpStream {
    try_connect_from(namespace, from, to).unwrap()
}

fn try_connect_from(namespace: &Namespace, from: SocketAddr, to: SocketAddr) -> io::Result<TcpStream> {
    namespace.run(|| {
        let socket = Socket::new(Domain::for_address(from), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&from.into())?;
        socket.connect(&to.into())?;
        Ok(client::patient(socket.into()))
    })
}

fn relay(net: &Topology, protocol: &str, host: &str, to: SocketAddr, more: &[&str]) -> Standalone {
    let to = to.to_string();
    let words = ["--proto", protocol, "--host", host, "--to", &to, "--sandbox", "strict"];
    Standalone::start_in(&net.host, &[&words[..], more].concat())
}

const AS_CLIENT: &[&str] = &["--source", "client"];

fn tcp_as_client() {
    let net = transparent();
    let _backends = [naming(&net.container, V4.1), naming(&net.container, V6.1)];
    for (host, (front, to)) in [("0.0.0.0:5300", V4), ("[::]:5300", V6), ("[::]:5300", V4)] {
        let _proxy = relay(&net, "tcp", host, to, AS_CLIENT);
        let stream = connect_in(&net.client, front);
        assert_eq!(seen(&stream), stream.local_addr().unwrap(), "{host} {to}");
        client::ping(&stream);
    }
}

fn udp_as_client() {
    let net = transparent();
    let backends = [V4.1, V6.1].map(|to| udp::Backend::naming(bind_in(&net.container, to)));
    for (host, (front, to), ip) in [
        ("0.0.0.0:5300", V4, CLIENT_V4.into()),
        ("[::]:5300", V6, IpAddr::from(CLIENT_V6)),
        ("[::]:5300", V4, CLIENT_V4.into()),
    ] {
        for more in [&[][..], &["--udp-any-port"]] {
            let _proxy = relay(&net, "udp", host, to, &[AS_CLIENT, more].concat());
            let client = bind_in(&net.client, (ip, 0));
            assert_eq!(flow_of(&client, front), client.local_addr().unwrap(), "{host} {to} {more:?}");
            assert_eq!(flow_of(&client, front), client.local_addr().unwrap());
        }
    }
    drop(backends);
}

fn bulk_as_client() {
    let net = transparent();
    let _echo = TcpBackend::echo_in(&net.container, V4.1);
    let proxy = relay(&net, "tcp", "0.0.0.0:5300", V4.1, AS_CLIENT);
    let stream = connect_in(&net.client, V4.0);
    client::exchange(&stream, 1, 32 << 20);
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client::read_to_end(&stream), (vec![], End::Eof));
    let stream = connect_in(&net.client, V4.0);
    client::ping(&stream);
    client::reset(stream);
    drop(proxy);

    let resets = net.container.run(|| TcpListener::bind(at(CONTAINER_V6.into())).unwrap());
    let _backend = TcpBackend::serve(resets, |stream| {
        (&mut &*stream).read_exact(&mut [0])?;
        SockRef::from(stream).set_linger(Some(Duration::ZERO))
    });
    let _proxy = relay(&net, "tcp", "[::]:5300", V6.1, AS_CLIENT);
    let mut stream = connect_in(&net.client, V6.0);
    stream.write_all(b"x").unwrap();
    assert_eq!(client::read_to_end(&stream), (vec![], End::Reset));
}

/// The backend's side of the first connection is in TIME_WAIT at the proxy, which has closed it first.
fn port_again() {
    let net = transparent();
    let _backend = naming(&net.container, V4.1);
    let proxy = Controlled::start_in(&net.host, &[]);
    proxy.apply(&[with(mapping("front", "tcp", V4.0, V4.1), json!({ "source": "client" }))]).success();
    let from = SocketAddr::from((CLIENT_V4, 7000));
    for _ in 0..3 {
        let stream = connect_from(&net.client, from, V4.0);
        assert_eq!(seen(&stream).ip(), from.ip(), "with its port or another one");
        client::ping(&stream);
        // The client resets: it has no TIME_WAIT, and can use the port again.
        client::reset(stream);
        eventually("the connection has ended", || proxy.stats("front")["connections"] == 0);
    }
    assert_eq!(proxy.stats("front")["errors"]["source_unavailable"], Value::Null);
}

fn port_to_several() {
    let net = transparent();
    let to = [PORT, PORT + 1].map(|port| SocketAddr::from((CONTAINER_V4, port)));
    let _tcp = to.map(|to| naming(&net.container, to));
    let udp = to.map(|to| udp::Backend::naming(bind_in(&net.container, to)));
    let proxy = Controlled::start_in(&net.host, &[]);
    let front = |port: u16| SocketAddr::from((HOST_V4, port));
    let as_client =
        |name: &str, port, to| with(mapping(name, "tcp+udp", front(port), to), json!({ "source": "client" }));
    proxy
        .apply(&[as_client("one", 80, to[0]), as_client("other", 81, to[1]), as_client("same", 82, to[0])])
        .success();
    let from = SocketAddr::from((CLIENT_V4, 7000));
    let streams = [80, 81].map(|port| connect_from(&net.client, from, front(port)));
    for stream in &streams {
        assert_eq!(seen(stream), from);
        client::ping(stream);
    }
    // Of two connections from the same port to the same backend, one has another port.
    let third = connect_from(&net.client, from, front(82));
    let third_seen = seen(&third);
    assert_eq!(third_seen.ip(), from.ip());
    assert_ne!(third_seen.port(), from.port());
    let socket = bind_in(&net.client, from);
    for port in [80, 81] {
        assert_eq!(flow_of(&socket, front(port)), from);
    }
    drop(udp);
}

fn low_port() {
    let net = transparent();
    let _tcp = naming(&net.container, V4.1);
    let _udp = udp::Backend::naming(bind_in(&net.container, V4.1));
    let _proxy = relay(&net, "tcp+udp", "0.0.0.0:5300", V4.1, AS_CLIENT);
    let from = SocketAddr::from((CLIENT_V4, 123));
    assert_eq!(seen(&connect_from(&net.client, from, V4.0)), from);
    assert_eq!(flow_of(&bind_in(&net.client, from), V4.0), from);
}

/// Clients of whom the backend's answers would not come back: on the host, on the backend's link, of another family.
fn without_return_path(net: &Topology) -> Vec<(Namespace, SocketAddr, SocketAddr)> {
    let neighbour =
        topology::add_container(&net.host, Ipv4Addr::new(172, 17, 0, 3), "fd00:172:17::3".parse().unwrap());
    let of = |namespace: &Namespace| Namespace::open(namespace.path().to_str().unwrap());
    let front = |ip: Ipv4Addr| SocketAddr::from((ip, PORT));
    vec![
        (of(&net.host), (HOST_V4, 0).into(), V4.0),
        (of(&net.host), (Ipv4Addr::LOCALHOST, 0).into(), front(Ipv4Addr::LOCALHOST)),
        (of(&net.host), (BRIDGE_V4, 0).into(), front(BRIDGE_V4)),
        (neighbour, (Ipv4Addr::new(172, 17, 0, 3), 0).into(), front(BRIDGE_V4)),
        (of(&net.container), (CONTAINER_V4, 0).into(), front(BRIDGE_V4)),
        (of(&net.client), (CLIENT_V6, 0).into(), V6.0),
    ]
}

fn fallback() {
    let net = transparent();
    let _tcp = naming(&net.container, V4.1);
    let _udp = udp::Backend::naming(bind_in(&net.container, V4.1));
    let proxy = Controlled::start_in(&net.host, &[]);
    let host = SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT));
    proxy.apply(&[with(mapping("front", "tcp+udp", host, V4.1), json!({ "source": "client" }))]).success();
    for (count, (namespace, from, front)) in (1..).zip(without_return_path(&net)) {
        let stream = connect_from(&namespace, from, front);
        assert_eq!(seen(&stream).ip(), BRIDGE_V4, "{from}");
        client::ping(&stream);
        let flow = flow_of(&bind_in(&namespace, from), front);
        assert_eq!(flow.ip(), BRIDGE_V4, "{from}");
        assert_eq!(proxy.stats("front")["errors"]["source_unavailable"], json!(2 * count), "{from}");
    }
    proxy.process.wait_for_line(Stream::Stderr, |line| {
        line.contains("connection not from its client's address") && line.contains("is on this host")
    });
}

fn refused() {
    let net = transparent();
    let _tcp = naming(&net.container, V4.1);
    let udp = udp::Backend::naming(bind_in(&net.container, V4.1));
    let proxy = Controlled::start_in(&net.host, &[]);
    let host = SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT));
    proxy
        .apply(&[with(mapping("front", "tcp+udp", host, V4.1), json!({ "source": "client-only" }))])
        .success();
    for (count, (namespace, from, front)) in (1..).zip(without_return_path(&net)) {
        // If it is reset at once, connect(2) itself may fail.
        match try_connect_from(&namespace, from, front) {
            Ok(stream) => assert_eq!(client::read_to_end(&stream), (vec![], End::Reset), "{from}"),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{from}"),
        }
        bind_in(&namespace, from).send_to(b"who am I?", front).unwrap();
        eventually("both are counted", || {
            proxy.stats("front")["errors"]["source_unavailable"] == json!(2 * count)
        });
    }
    assert_eq!(udp.received(), 0);
    let stream = connect_in(&net.client, V4.0);
    assert_eq!(seen(&stream), stream.local_addr().unwrap());
}

/// A relay for [`PORT`] whose backend changes.
struct Relay(Controlled);

impl Relay {
    fn start(net: &Topology) -> Self {
        Self(Controlled::start_in(&net.host, &["--sandbox", "strict"]))
    }

    fn serve(&self, to: &str, limits: Value) {
        let mut front = mapping("front", "tcp", at(Ipv6Addr::UNSPECIFIED.into()), V4.1);
        front["to"] = to.into();
        self.0.apply(&[with(front, limits)]).success();
    }
}

/// The address that the backend sees of this client, which asks the host at `front`.
fn seen_of(namespace: &Namespace, client: &str, front: &str) -> String {
    let client = (client.parse::<IpAddr>().unwrap(), 0).into();
    let front = SocketAddr::new(front.parse().unwrap(), PORT);
    seen(&connect_from(namespace, client, front)).ip().to_string()
}

/// A second container on the bridge.
fn neighbour(net: &Topology) -> Namespace {
    topology::add_container(&net.host, Ipv4Addr::new(172, 17, 0, 3), "fd00:172:17::3".parse().unwrap())
}

/// The backend would answer its neighbour directly, also in the network that only they have in common.
fn two_networks() {
    let net = transparent();
    let (neighbour, relay) = (neighbour(&net), Relay::start(&net));
    net.host.address(BRIDGE, "192.168.77.1/24");
    net.container.address("eth0", "192.168.77.2/24");
    neighbour.address("eth0", "192.168.77.3/24");
    let _tcp = naming(&net.container, V4.1);
    for limits in [json!({ "source": "client" }), json!({ "source": "client", "device": BRIDGE })] {
        relay.serve("172.17.0.2", limits);
        assert_eq!(seen_of(&neighbour, "192.168.77.3", "192.168.77.1"), "172.17.0.1");
    }
}

/// The backend, whose gateway is the host, answers by way of it.
fn behind_a_gateway() {
    let net = transparent();
    let (neighbour, relay) = (neighbour(&net), Relay::start(&net));
    neighbour.ip("address add 10.9.0.2/32 dev lo");
    net.host.ip("route add 10.9.0.0/24 via 172.17.0.3");
    let _tcp = naming(&net.container, V4.1);
    relay.serve("172.17.0.2", json!({ "source": "client" }));
    assert_eq!(seen_of(&neighbour, "10.9.0.2", "172.17.0.1"), "10.9.0.2");
    // Routes that change are known a moment later.
    net.host.ip("route replace 10.9.0.0/24 dev docker0");
    neighbour.ip("address add 10.9.0.3/24 dev eth0");
    eventually("it is on the link now", || seen_of(&neighbour, "10.9.0.3", "172.17.0.1") == "172.17.0.1");
}

/// The host has no address on the backend's link, and uses that of the client's link towards both.
fn unnumbered() {
    const MAC: &str = "02:00:00:00:00:01";
    let net = transparent();
    let (backend, relay) = (Namespace::new(), Relay::start(&net));
    net.host.veth("un0", &backend, "eth0");
    net.host.ip(&format!("link set un0 address {MAC}"));
    net.host.ip("route add 172.30.0.2 dev un0");
    backend.address("eth0", "172.30.0.2/32");
    backend.ip("route add default dev eth0");
    for addr in [CLIENT_V4, HOST_V4, BRIDGE_V4] {
        backend.ip(&format!("neighbour add {addr} lladdr {MAC} dev eth0 nud permanent"));
    }
    net.netns_setup(&["transparent", "up", "--interface", BRIDGE, "--interface", "un0"]).success();
    let _tcp = naming(&backend, SocketAddr::new([172, 30, 0, 2].into(), PORT));
    relay.serve("172.30.0.2", json!({ "source": "client" }));
    assert_eq!(seen_of(&net.client, "10.0.0.12", "10.0.0.11"), "10.0.0.12");
}

fn link_local_backend() {
    let net = transparent();
    let (neighbour, relay) = (neighbour(&net), Relay::start(&net));
    net.container.address("eth0", "fe80::2/64");
    let scope = net.container.run(|| if_nametoindex("eth0").unwrap());
    let addr = SocketAddrV6::new("fe80::2".parse().unwrap(), PORT, 0, scope);
    let _tcp = naming(&net.container, addr.into());
    relay.serve("fe80::2%docker0", json!({ "source": "client" }));
    assert_ne!(seen_of(&neighbour, "fd00:172:17::3", "fd00:172:17::1"), "fd00:172:17::3");
    assert_eq!(seen_of(&net.client, "fd00:10::12", "fd00:10::11"), "fd00:10::12");
}

/// Has the client's namespace own 10.1.0.0/16, which the host reaches by way of it.
fn many_addresses(net: &Topology) -> impl Fn(u16) -> SocketAddr + use<> {
    net.client.ip("route add local 10.1.0.0/16 dev lo");
    net.host.ip(&format!("route add 10.1.0.0/16 via {CLIENT_V4}"));
    |number| {
        let [high, low] = number.to_be_bytes();
        (Ipv4Addr::new(10, 1, high, low), 7000).into()
    }
}

fn many_clients() {
    const CLIENTS: u16 = 2_000;
    let net = transparent();
    let address_of = many_addresses(&net);
    let _tcp = naming(&net.container, V4.1);
    let _udp = udp::Backend::naming(bind_in(&net.container, V4.1));
    let _proxy = relay(&net, "tcp+udp", "0.0.0.0:5300", V4.1, AS_CLIENT);
    let clients: Vec<_> = net.client.run(|| {
        (1..=CLIENTS)
            .map(|number| {
                let from = address_of(number);
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
                socket.bind(&from.into()).unwrap();
                socket.connect(&V4.0.into()).unwrap();
                (from, client::patient(socket.into()), udp::bind(from))
            })
            .collect()
    });
    for (from, stream, socket) in &clients {
        assert_eq!(seen(stream), *from);
        client::ping(stream);
        assert_eq!(flow_of(socket, V4.0), *from);
    }
    for (from, stream, socket) in &clients {
        client::ping(stream);
        assert_eq!(flow_of(socket, V4.0), *from);
    }
}

fn over_an_upgrade() {
    let net = transparent();
    let _tcp = naming(&net.container, V4.1);
    let _udp = udp::Backend::naming(bind_in(&net.container, V4.1));
    let program = Program::new();
    let to = V4.1.to_string();
    let arguments = [
        "--proto",
        "tcp+udp",
        "--host",
        "0.0.0.0:5300",
        "--to",
        &to,
        "--source",
        "client",
        "--sandbox",
        "strict",
    ];
    let first = net.host.spawn(program.command(&arguments));
    first.wait_for_line(Stream::Stderr, |line| line.contains("confined"));
    let stream = connect_in(&net.client, V4.0);
    assert_eq!(seen(&stream), stream.local_addr().unwrap());
    let socket = bind_in(&net.client, (CLIENT_V4, 0));
    let address = socket.local_addr().unwrap();
    assert_eq!(flow_of(&socket, V4.0), address);
    let second = upgrade(&first, 0, first.pid());
    client::ping(&stream);
    assert_eq!(flow_of(&socket, V4.0), address);
    let newer = connect_in(&net.client, V4.0);
    assert_eq!(seen(&newer), newer.local_addr().unwrap());
    let another = bind_in(&net.client, (CLIENT_V4, 0));
    assert_eq!(flow_of(&another, V4.0), another.local_addr().unwrap());
    kill(second, Signal::SIGTERM).unwrap();
}

fn with(mut mapping: Value, limits: Value) -> Value {
    mapping["limits"] = limits;
    mapping
}

fn changes() {
    let net = transparent();
    let _tcp = naming(&net.container, V4.1);
    let _udp = udp::Backend::naming(bind_in(&net.container, V4.1));
    let proxy = Controlled::start_in(&net.host, &["--sandbox", "strict"]);
    let front = || mapping("front", "tcp+udp", V4.0, V4.1);
    let socket = bind_in(&net.client, (CLIENT_V4, 0));
    proxy.apply(&[front()]).success();
    let plain = connect_in(&net.client, V4.0);
    assert_eq!(seen(&plain).ip(), BRIDGE_V4);
    assert_eq!(flow_of(&socket, V4.0).ip(), BRIDGE_V4);

    proxy.apply(&[with(front(), json!({ "source": "client" }))]).success();
    let as_client = connect_in(&net.client, V4.0);
    assert_eq!(seen(&as_client), as_client.local_addr().unwrap());
    assert_eq!(flow_of(&socket, V4.0), socket.local_addr().unwrap());
    client::ping(&plain);

    proxy.apply(&[front()]).success();
    assert_eq!(seen(&connect_in(&net.client, V4.0)).ip(), BRIDGE_V4);
    assert_eq!(flow_of(&socket, V4.0).ip(), BRIDGE_V4);
    client::ping(&plain);
    client::ping(&as_client);
    let listed: Value = serde_json::from_str(&proxy.ctl(&["--json", "list"]).success()).unwrap();
    assert!(!listed.to_string().contains("source"), "{listed}");
}

/// Whoever the proxy in front speaks for is reached by way of the client's namespace.
fn behind_a_proxy() {
    let net = transparent();
    net.host.ip(&format!("route add default via {CLIENT_V4}"));
    let _tcp = naming(&net.container, V4.1);
    let _udp = udp::Backend::naming(bind_in(&net.container, V4.1));
    let more = ["--source", "client", "--accept-proxy", "10.0.0.0/24"];
    let proxy = relay(&net, "tcp+udp", "0.0.0.0:5300", V4.1, &more);
    // No host has the broadcast address of a network.
    let mut stream = connect_in(&net.client, V4.0);
    stream.write_all(b"PROXY TCP4 10.0.0.255 192.0.2.8 4000 80\r\n").unwrap();
    assert_eq!(seen(&stream).ip(), BRIDGE_V4);
    proxy
        .process
        .wait_for_line(Stream::Stderr, |line| line.contains("reason=it is not the address of a host"));
    let mut stream = connect_in(&net.client, V4.0);
    stream.write_all(b"PROXY TCP4 192.0.2.7 192.0.2.8 4000 80\r\n").unwrap();
    assert_eq!(seen(&stream), "192.0.2.7:4000".parse().unwrap());
    client::ping(&stream);
    let socket = bind_in(&net.client, (CLIENT_V4, 0));
    let header = b"\r\n\r\n\0\r\nQUIT\n\x21\x12\0\x0c\xc0\0\x02\x07\xc0\0\x02\x08\x0f\xa0\0\x50";
    socket.send_to(&[&header[..], b"who am I?"].concat(), V4.0).unwrap();
    assert_eq!(udp::receive(&socket).0, b"192.0.2.7:4000");
}

fn with_header() {
    let net = transparent();
    let listener = net.container.run(|| TcpListener::bind(V4.1).unwrap());
    let _proxy = relay(&net, "tcp", "0.0.0.0:5300", V4.1, &["--source", "client", "--send-proxy", "v1"]);
    let stream = connect_in(&net.client, V4.0);
    let (mut backend, from) = listener.accept().unwrap();
    let client = stream.local_addr().unwrap();
    assert_eq!(from, client);
    let header = format!("PROXY TCP4 {} {} {} {PORT}\r\n", client.ip(), HOST_V4, client.port());
    let mut received = vec![0; header.len()];
    backend.read_exact(&mut received).unwrap();
    assert_eq!(String::from_utf8(received).unwrap(), header);
}

fn tracked() {
    let net = transparent();
    // A rule that asks for the state of connections has all of them tracked.
    let nft = |line: &str| drop(net.host.command(&format!("nft {line}")).success());
    nft("add table inet tracked");
    nft("add chain inet tracked input { type filter hook input priority 0 ; }");
    nft("add rule inet tracked input ct state invalid drop");
    let _tcp = naming(&net.container, V4.1);
    let _udp = udp::Backend::naming(bind_in(&net.container, V4.1));
    let _proxy = relay(&net, "tcp+udp", "0.0.0.0:5300", V4.1, AS_CLIENT);
    let stream = connect_in(&net.client, V4.0);
    assert_eq!(seen(&stream), stream.local_addr().unwrap());
    client::exchange(&stream, 1, 1 << 20);
    let socket = bind_in(&net.client, (CLIENT_V4, 0));
    for _ in 0..2 {
        assert_eq!(flow_of(&socket, V4.0), socket.local_addr().unwrap());
    }
}

fn missing_command() {
    let net = without_answers();
    let _tcp = [V4.1, V6.1].map(|to| naming(&net.container, to));
    for (host, to) in [("0.0.0.0:5300", V4.1), ("[::]:5300", V6.1)] {
        let proxy = relay(&net, "tcp", host, to, AS_CLIENT);
        let missing = |line: &str| line.contains("answers to clients will not come back; run ");
        let line = proxy.process.wait_for_line(Stream::Stderr, missing);
        drop(proxy);
        let (_, command) = line.split_once("run netns-setup ").unwrap();
        let command: Vec<&str> = command.split_whitespace().take_while(|word| !word.contains('=')).collect();
        assert_eq!(command, ["transparent", "up", "--interface", BRIDGE]);
        net.netns_setup(&command).success();
        let proxy = relay(&net, "tcp", host, to, AS_CLIENT);
        let front = if to.is_ipv4() { V4.0 } else { V6.0 };
        let stream = connect_in(&net.client, front);
        assert_eq!(seen(&stream), stream.local_addr().unwrap());
        drop(stream);
        proxy.process.signal(Signal::SIGTERM);
        let output = proxy.process.into_output();
        assert!(!output.stderr.lines().any(missing), "{output:#?}");
        net.netns_setup(&["transparent", "down"]).success();
    }
}

const MISSING: &str =
    "answers to clients will not come back; run netns-setup transparent up --interface docker0 ";

fn missing_after_change() {
    let net = without_answers();
    let proxy = Controlled::start_in(&net.host, &["--sandbox", "strict"]);
    let add = |port: u16, name: &str, to: &str, limits: Value| {
        let mut front = mapping(name, "tcp+udp", SocketAddr::from((HOST_V4, port)), V4.1);
        front["to"] = to.into();
        let added =
            proxy.connect().ask(&json!({ "v": 1, "do": { "add": { "mappings": [with(front, limits)] } } }));
        assert!(added["ok"].is_object(), "{added}");
    };
    let said = |name: &str| {
        let by_name = format!("mapping={name} ");
        proxy.process.wait_for_line(Stream::Stderr, |line| line.contains(MISSING) && line.contains(&by_name));
    };
    add(1, "plain", "172.17.0.2", json!({}));
    add(2, "link-local", "fe80::2%docker0", json!({ "source": "client" }));
    said("link-local");
    // No route leads there, but the interface does.
    add(3, "by-device", "192.0.2.2", json!({ "source": "client-only", "device": BRIDGE }));
    said("by-device");
    // A mapping that leads elsewhere: the link of the clients.
    net.netns_setup(&["transparent", "up", "--interface", "eth0"]).success();
    add(4, "retargeted", "10.0.0.12", json!({ "source": "client" }));
    proxy.ctl(&["retarget", "retargeted", "--to", "172.17.0.3:5300"]).success();
    said("retargeted");
    // Once for each.
    proxy.ctl(&["retarget", "retargeted", "--to", "172.17.0.2:5300"]).success();
    net.netns_setup(&["transparent", "up", "--interface", BRIDGE]).success();
    add(5, "fine", "172.17.0.2", json!({ "source": "client" }));
    proxy.process.signal(Signal::SIGTERM);
    let log = proxy.process.into_output().stderr;
    let missing: Vec<&str> = log.lines().filter(|line| line.contains("will not come back")).collect();
    assert_eq!(missing.len(), 3, "{log}");
}

fn missing_for_attached() {
    let net = without_answers();
    let file = net.state.path().join("rproxy.toml");
    let text = "[attach]\nsource = 'client'\n[[mapping]]\nname = 'web'\nhost = '10.0.0.11:80'\nto = '172.17.0.2:80'\n";
    std::fs::write(&file, text).unwrap();
    let more = ["--config", file.to_str().unwrap(), "--sandbox", "strict"];
    let plane = Plane::start_by(&more, |command| net.host.spawn(command));
    let ports = [V4, V6].map(|(front, to)| net.host.run(|| Port::tcp(front, to)));
    for port in &ports {
        let by_name = format!("mapping={} ", port.name());
        plane.first.wait_for_line(Stream::Stderr, |line| line.contains(MISSING) && line.contains(&by_name));
    }
    // A mapping from now on, and one that was there: the rules are lost meanwhile.
    let text = text.replace("[[mapping]]", "[defaults]\nsource = 'client'\n[[mapping]]");
    net.netns_setup(&["transparent", "up", "--interface", BRIDGE]).success();
    std::fs::write(&file, &text).unwrap();
    plane.signal(Signal::SIGHUP);
    plane.wait_for_log("configuration reloaded");
    net.netns_setup(&["transparent", "down"]).success();
    plane.signal(Signal::SIGHUP);
    let line = plane
        .first
        .wait_for_line(Stream::Stderr, |line| line.contains(MISSING) && line.contains("mapping=web "));
    drop((line, ports));
}

/// Either capability is enough, whether a mapping that is there at the start needs it or a later one.
fn raw_alone() {
    let net = transparent();
    let _tcp = naming(&net.container, V4.1);
    let udp = udp::Backend::naming(bind_in(&net.container, V4.1));
    let proxy = Controlled::start_by(&[], |command| {
        let mut setpriv = require::command("setpriv");
        setpriv.args(["--bounding-set", "-all,+net_raw"]);
        net.host.spawn(process::prefixed(setpriv, &command))
    });
    let front = mapping("front", "tcp+udp", V4.0, V4.1);
    proxy.apply(&[with(front, json!({ "source": "client-only" }))]).success();
    let stream = connect_in(&net.client, V4.0);
    assert_eq!(seen(&stream), stream.local_addr().unwrap());
    let socket = bind_in(&net.client, (CLIENT_V4, 0));
    assert_eq!(flow_of(&socket, V4.0), socket.local_addr().unwrap());
    // A port below 1024 takes another capability: the address with another port is the next best.
    let low = SocketAddr::from((CLIENT_V4, 123));
    let others = [seen(&connect_from(&net.client, low, V4.0)), flow_of(&bind_in(&net.client, low), V4.0)];
    assert!(others.iter().all(|other| other.ip() == low.ip() && other.port() >= 1024), "{others:?}");
    assert_eq!(proxy.stats("front")["errors"], json!({}));
    drop(udp);
}

fn own_address() {
    let net = Topology::new();
    net.host.address(BRIDGE, "172.17.0.9/16");
    net.host.address(BRIDGE, "fd00:172:17::9/64");
    let _tcp = [naming(&net.container, V4.1), naming(&net.container, V6.1)];
    let udp = [V4.1, V6.1].map(|to| udp::Backend::naming(bind_in(&net.container, to)));
    for (front, to, own) in [(V4.0, V4.1, "172.17.0.9"), (V6.0, V6.1, "fd00:172:17::9")] {
        for more in [&[][..], &["--udp-any-port"]] {
            let own: IpAddr = own.parse().unwrap();
            let text = own.to_string();
            let _proxy =
                relay(&net, "tcp+udp", &front.to_string(), to, &[&["--source", &text], more].concat());
            assert_eq!(seen(&connect_in(&net.client, front)).ip(), own);
            let socket = net.client.run(|| {
                udp::client(if front.is_ipv4() { IpAddr::from(CLIENT_V4) } else { CLIENT_V6.into() })
            });
            assert_eq!(flow_of(&socket, front).ip(), own);
        }
    }
    drop(udp);
    let proxy = relay(&net, "tcp+udp", "0.0.0.0:5300", V4.1, &["--source", "127.0.0.1"]);
    let why = "cannot send from 127.0.0.1: it is of this host alone, and 172.17.0.2 is elsewhere";
    proxy
        .process
        .wait_for_line(Stream::Stderr, |line| line.contains("cannot be reached") && line.contains(why));
    drop(proxy);
    let changed = Controlled::start_in(&net.host, &["--sandbox", "strict"]);
    changed.apply(&[with(mapping("front", "tcp", V4.0, V4.1), json!({ "source": "127.0.0.1" }))]).success();
    changed
        .process
        .wait_for_line(Stream::Stderr, |line| line.contains("mapping=front") && line.contains(why));
    drop(changed);
    let proxy = relay(&net, "tcp+udp", "0.0.0.0:5300", V4.1, &["--source", "192.0.2.1"]);
    assert_eq!(net.client.run(|| client::end_of(V4.0)), (vec![], End::Reset));
    let why = "cannot send from 192.0.2.1: it is not an address of this host";
    proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("no backend") && line.contains(why));
    bind_in(&net.client, (CLIENT_V4, 0)).send_to(b"x", V4.0).unwrap();
    proxy
        .process
        .wait_for_line(Stream::Stderr, |line| line.contains("cannot open a flow") && line.contains(why));
}

fn device() {
    let net = transparent();
    let _tcp = naming(&net.container, V4.1);
    let _udp = udp::Backend::naming(bind_in(&net.container, V4.1));
    for more in [&[][..], AS_CLIENT] {
        let _proxy = relay(&net, "tcp+udp", "0.0.0.0:5300", V4.1, &[&["--device", BRIDGE], more].concat());
        let stream = connect_in(&net.client, V4.0);
        client::ping(&{
            seen(&stream);
            stream
        });
        flow_of(&bind_in(&net.client, (CLIENT_V4, 0)), V4.0);
    }
    let proxy =
        relay(&net, "tcp+udp", "0.0.0.0:5300", V4.1, &["--device", "eth0", "--connect-timeout", "1s"]);
    assert_eq!(net.client.run(|| client::end_of(V4.0)), (vec![], End::Reset));
    drop(proxy);
    let proxy = relay(&net, "tcp+udp", "0.0.0.0:5300", V4.1, &["--device", "nonesuch"]);
    assert_eq!(net.client.run(|| client::end_of(V4.0)), (vec![], End::Reset));
    let why = "cannot send by the interface nonesuch";
    proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("no backend") && line.contains(why));
    bind_in(&net.client, (CLIENT_V4, 0)).send_to(b"x", V4.0).unwrap();
    proxy
        .process
        .wait_for_line(Stream::Stderr, |line| line.contains("cannot open a flow") && line.contains(why));
}
