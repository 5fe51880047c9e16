//! A port that is no longer attached: another program can have it at once, and its connections and flows end or go on,
//! as the reason wants.

use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use rproxy_shim::message::{Reason, Request};
use socket2::{Domain, Socket, Type};

use testkit::backend::TcpBackend;
use testkit::client::{self, End, own_address};
use testkit::load;
use testkit::require::{self, Need};
use testkit::shim::Reply;
use testkit::suite::Case;
use testkit::topology::{CLIENT_V4, CONTAINER_V4, HOST_V4, Topology};
use testkit::udp::{self, bind_in, flow_of, receive};
use testkit::{eventually, eventually_equal};

use super::scene::{Plane, Port, assert_free_tcp, assert_free_udp, bind_udp, listen};

/// Connections or flows at a time; more than are handled in one turn.
const MANY: usize = 200;

/// Datagrams in a socket's buffer; more than are received in one turn.
const WAITING: usize = 2_000;

/// Between two questions of absent clients: whoever floods does not keep a processor to itself.
const PAUSE: Duration = Duration::from_micros(100);

/// Descriptors that are kept for the next clients: pipes and workers.
const KEPT: usize = 40;

pub(crate) fn cases() -> Vec<Case> {
    let root = &[Need::Root];
    let tools = &[Need::Root, Need::Program("ip"), Need::Program("ss")];
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("unpublished: connections are reset, and the port is free", unpublished_tcp),
        case("unpublished: flows end, and the port is free", unpublished_udp),
        case("unpublished: clients with sockets of their own", || blocked_clients(Reason::Unpublished))
            .needs(tools),
        case("the runtime ends: clients with sockets of their own", || blocked_clients(Reason::RuntimeEnded))
            .needs(tools),
        case("the runtime ends: connections go on", continued_connections),
        case("the runtime ends: clients in the backlog are served", backlog),
        case("the runtime ends: flows wait for their port", waiting_flows),
        case("the runtime ends: flows do not wait for another backend", other_backend),
        case("the runtime ends: flows do not wait for long", forgotten_flows),
        case("the runtime ends: datagrams that were sent before are relayed", earlier_datagrams).needs(root),
        case("a shim that is gone without a word", gone),
        case("ports come and go under load", come_and_go),
    ]
}

/// A backend that sends as much as it can, and reads nothing.
fn flooding() -> TcpBackend {
    TcpBackend::local(|mut stream| std::io::copy(&mut std::io::repeat(7), &mut stream).map(drop))
}

fn unpublished_tcp() {
    let (_plane, echo, flood) = (Plane::start(&["--sandbox", "strict"]), TcpBackend::echo(), flooding());
    let [idle, busy] = [&echo, &flood].map(|backend| Port::tcp(own_address(), backend.address()));
    let clients: Vec<TcpStream> = (0..MANY).map(|_| client::connect(idle.address())).collect();
    clients.iter().for_each(client::ping);
    let receivers: Vec<TcpStream> = (0..MANY / 4).map(|_| client::connect(busy.address())).collect();
    // All have bytes under way.
    receivers.iter().for_each(|receiver| assert_eq!(receiver.peek(&mut [0]).unwrap(), 1));
    for (port, clients) in [(idle, clients), (busy, receivers)] {
        let address = port.address();
        port.end(Reason::Unpublished);
        assert_free_tcp(address);
        for client in clients {
            assert_eq!(client::read_to_end(&client).1, End::Reset);
        }
    }
}

fn unpublished_udp() {
    let (plane, backend) = (Plane::start(&["--sandbox", "strict"]), udp::Backend::naming(udp::local()));
    let port = Port::udp(own_address(), backend.address());
    let address = port.address();
    let before = plane.first.descriptors();
    let clients: Vec<UdpSocket> = (0..MANY).map(|_| udp::client(address.ip())).collect();
    clients.iter().for_each(|client| assert_ne!(flow_of(client, address), address));
    assert!(plane.first.descriptors() >= before + MANY);
    port.end(Reason::Unpublished);
    assert_free_udp(address);
    eventually("the sockets of the flows are closed", || plane.first.descriptors() < before);
    let port = Port::udp(address, backend.address());
    let flow = flow_of(&clients[0], address);
    assert_eq!(plane.stats(&port)["flows_total"], 1, "{flow}");
}

/// Replies to clients that do not resolve fill the send buffer of the listener, so that flows have client sockets.
fn blocked_clients(reason: Reason) {
    let net = Topology::new();
    let address = SocketAddr::from((HOST_V4, 5300));
    let _backend = udp::Backend::echo(bind_in(&net.container, (CONTAINER_V4, 5300)));
    let plane = Plane::start_by(&["--sandbox", "strict"], |command| net.host.spawn(command));
    let port = net.host.run(|| Port::udp(address, (CONTAINER_V4, 5300).into()));
    let absent: Vec<Socket> = (0..50).map(|number| absent(&net, number, address)).collect();
    let client = bind_in(&net.client, (CLIENT_V4, 0));
    let ask = |number: usize| {
        absent[number % 50].send(&[0; 1_200]).ok();
        thread::sleep(PAUSE);
    };
    load::meanwhile(1, ask, |_load| {
        eventually("some have sockets of their own", || client_sockets(&net) > 0);
        udp::assert_echoes(&client, address, b"hello");
        port.end(reason);
        net.host.run(|| assert_free_udp(address));
    });
    assert_eq!(client_sockets(&net), 0);
    let _port = net.host.run(|| Port::udp(address, (CONTAINER_V4, 5300).into()));
    udp::assert_echoes(&client, address, b"hello again");
    assert!(plane.first.is_running());
}

/// A socket that sends from an address of the client's network which is not there.
fn absent(net: &Topology, number: u8, to: SocketAddr) -> Socket {
    net.client.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
        socket.set_ip_transparent_v4(true).unwrap();
        socket.bind(&SocketAddr::from((Ipv4Addr::new(10, 0, 0, 100 + number), 7000)).into()).unwrap();
        socket.connect(&to.into()).unwrap();
        socket
    })
}

fn client_sockets(net: &Topology) -> usize {
    let mut ss = require::command("ss");
    ss.args(["--udp", "--numeric", "--no-header", "state", "established", "sport", "=", ":5300"]);
    net.host.spawn(ss).into_output().success().lines().count()
}

fn continued_connections() {
    const SIZE: usize = 3_000_000;

    let (plane, backend) = (Plane::start(&["--sandbox", "strict"]), TcpBackend::echo());
    let port = Port::tcp(own_address(), backend.address());
    let address = port.address();
    let clients: Vec<TcpStream> = (0..4).map(|_| client::connect(address)).collect();
    clients.iter().for_each(client::ping);
    let exchange = |client: &TcpStream, seed: u64| client::exchange(client, seed, SIZE);
    thread::scope(|scope| {
        let transfers: Vec<_> =
            (0..).zip(&clients).map(|(seed, client)| scope.spawn(move || exchange(client, seed))).collect();
        // Some bytes of the transfers are under way.
        eventually("bytes are relayed", || plane.stats(&port)["bytes_in"].as_u64() > Some(100_000));
        port.end(Reason::RuntimeEnded);
        // As the runtime does it: the connections have the port, too.
        drop(listen(address, true).unwrap());
        transfers.into_iter().for_each(|transfer| transfer.join().unwrap());
    });
    let port = Port::tcp(address, backend.address());
    client::assert_echoes(address);
    clients.iter().for_each(client::ping);
    assert_eq!(plane.stats(&port)["connections"], clients.len());
    port.end(Reason::Unpublished);
    assert_free_tcp(address);
    for client in clients {
        assert_eq!(client::read_to_end(&client), (vec![], End::Reset));
    }
}

fn backlog() {
    let (plane, backend) = (Plane::start(&[]), TcpBackend::echo());
    let port = Port::tcp(own_address(), backend.address());
    plane.first.pause();
    let clients: Vec<TcpStream> = (0..20).map(|_| client::connect(port.address())).collect();
    send_detach(&port, Reason::RuntimeEnded);
    plane.first.resume();
    assert_eq!(port.shim.reply(), Reply::Detached);
    drop(port);
    clients.iter().for_each(client::ping);
}

/// Asks for a port to be detached, without waiting for the answer.
fn send_detach(port: &Port, reason: Reason) {
    port.shim.send(Request::Detach(reason).encode().as_bytes(), &[]).unwrap();
}

/// A client of a port, and where its datagrams come from at the backend.
type Flow = (UdpSocket, SocketAddr);

fn flows(address: SocketAddr, backend: &UdpSocket, count: usize) -> Vec<Flow> {
    let open = |_| {
        let client = udp::client(address.ip());
        client.send_to(b"hello", address).unwrap();
        let (_, from) = receive(backend);
        (client, from)
    };
    (0..count).map(open).collect()
}

fn waiting_flows() {
    let (plane, backend) = (Plane::start(&["--sandbox", "strict"]), udp::local());
    let port = Port::udp(own_address(), udp::address(&backend));
    let address = port.address();
    let flows = flows(address, &backend, MANY);
    // Twice, as for a runtime that is restarted again.
    let mut port = port;
    for round in [1, 2] {
        port.end(Reason::RuntimeEnded);
        assert_free_udp(address);
        for (_client, from) in &flows {
            backend.send_to(b"meanwhile", *from).unwrap();
        }
        port = Port::udp(address, udp::address(&backend));
        for (client, from) in &flows {
            assert_eq!(receive(client), (b"meanwhile".to_vec(), address), "round {round}");
            client.send_to(b"again", address).unwrap();
            assert_eq!(receive(&backend), (b"again".to_vec(), *from), "round {round}");
            backend.send_to(b"answer", *from).unwrap();
            assert_eq!(receive(client), (b"answer".to_vec(), address), "round {round}");
        }
    }
    assert_eq!(plane.stats(&port)["flows"], MANY);
}

fn other_backend() {
    let (_plane, backend, other) = (Plane::start(&[]), udp::local(), udp::local());
    let port = Port::udp(own_address(), udp::address(&backend));
    let address = port.address();
    let flows = flows(address, &backend, 3);
    port.end(Reason::RuntimeEnded);
    let _port = Port::udp(address, udp::address(&other));
    for (client, from) in flows {
        backend.send_to(b"too late", from).ok();
        client.send_to(b"again", address).unwrap();
        let (_, from) = receive(&other);
        other.send_to(b"answer", from).unwrap();
        assert_eq!(receive(&client), (b"answer".to_vec(), address));
    }
}

fn forgotten_flows() {
    let (plane, backend) = (Plane::start(&[]), udp::local());
    let port = Port::udp(own_address(), udp::address(&backend));
    let address = port.address();
    let before = plane.first.descriptors();
    let flows = flows(address, &backend, 20);
    port.end(Reason::RuntimeEnded);
    // Those of the listener and the connection, and those of the flows.
    eventually_equal("descriptors", &(before - 2), || plane.first.descriptors());
    let port = Port::udp(address, udp::address(&backend));
    flows[0].0.send_to(b"again", address).unwrap();
    assert_eq!(receive(&backend).0, b"again");
    assert_eq!(plane.stats(&port)["flows"], 1);
}

fn earlier_datagrams() {
    let (plane, backend) = (Plane::start(&["--sandbox", "strict"]), udp::Backend::echo(udp::local()));
    let port = Port::udp(own_address(), backend.address());
    let clients: Vec<UdpSocket> = (0..10).map(|_| udp::client(port.address().ip())).collect();
    plane.first.pause();
    for number in 0..WAITING {
        clients[number % 10].send_to(&number.to_be_bytes(), port.address()).unwrap();
    }
    send_detach(&port, Reason::RuntimeEnded);
    plane.first.resume();
    assert_eq!(port.shim.reply(), Reply::Detached);
    drop(port);
    backend.wait_for(WAITING);
}

fn gone() {
    let (plane, tcp, udp) = (Plane::start(&[]), TcpBackend::echo(), udp::Backend::naming(udp::local()));
    let (web, dns) = (Port::tcp(own_address(), tcp.address()), Port::udp(own_address(), udp.address()));
    let (web_address, dns_address) = (web.address(), dns.address());
    let (stream, socket) = (client::connect(web_address), udp::client(dns_address.ip()));
    client::ping(&stream);
    let flow = flow_of(&socket, dns_address);
    drop((web, dns));
    eventually("the ports are free", || listen(web_address, true).is_ok() && bind_udp(dns_address).is_ok());
    let _dns = Port::udp(dns_address, udp.address());
    assert_eq!(flow_of(&socket, dns_address), flow);
    client::ping(&stream);
    assert_eq!(plane.json(&["list"])["mappings"].as_array().unwrap().len(), 1);
}

/// Others are served meanwhile, and nothing is left in the end.
fn come_and_go() {
    let plane = Plane::start(&[]);
    let (echo, naming) = (TcpBackend::echo(), udp::Backend::naming(udp::local()));
    let steady = Port::tcp(own_address(), echo.address());
    let before = plane.first.descriptors();
    let ask = |_| client::assert_echoes(steady.address());
    load::meanwhile(2, ask, |load| {
        for round in 0..60 {
            let (web, dns) =
                (Port::tcp(own_address(), echo.address()), Port::udp(own_address(), naming.address()));
            let (web_address, dns_address) = (web.address(), dns.address());
            let (stream, socket) = (client::connect(web_address), udp::client(dns_address.ip()));
            client::ping(&stream);
            flow_of(&socket, dns_address);
            if round % 2 == 0 {
                web.end(Reason::Unpublished);
                dns.end(Reason::Unpublished);
                assert_free_tcp(web_address);
                assert_free_udp(dns_address);
            }
        }
        load.wait_for(10);
    });
    // Flows of shims that are gone wait for ten seconds.
    eventually("nothing is left", || plane.first.descriptors() <= before + KEPT);
}
