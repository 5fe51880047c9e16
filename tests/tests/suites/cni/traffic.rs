//! Who reaches a published port, and how.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::sync::mpsc;
use std::time::Duration;

use serde_json::{Value, json};
use testkit::backend::TcpBackend;
use testkit::netns::Namespace;
use testkit::suite::Case;
use testkit::topology::{CLIENT_V4, CLIENT_V6, HOST_V4, HOST_V6};
use testkit::{PATIENCE, eventually, udp};

use super::node::{Node, Pod, case};
use crate::netns_setup::stage::{
    SILENCE, assert_reaches, assert_reaches_udp, reaches_tcp, reaches_udp, serve,
};

const POLICIES: [&str; 3] = ["relay", "dnat", "both"];

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for policy in POLICIES {
        for families in [1, 2] {
            let name = format!("from everywhere ({policy}, {families} families)");
            cases.push(case(name, move |node| everywhere(node, policy, families)));
        }
        cases.push(case(format!("whose address a container sees ({policy})"), move |node| {
            addresses(node, policy)
        }));
        cases.push(case(format!("on one address ({policy})"), move |node| one_address(node, policy)));
        cases.push(case(format!("a stream of datagrams is led anew ({policy})"), move |node| {
            stream(node, policy)
        }));
    }
    cases.push(case("the relay keeps the addresses of clients", kept_by_relay));
    cases.push(case("other hosts do not reach loopback addresses", loopback_is_closed));
    cases.push(case("what was allowed before stays allowed", localnet_of_others));
    for policy in POLICIES {
        cases.push(case(format!("from a container of another network ({policy})"), move |node| {
            other_network(node, policy)
        }));
    }
    cases
}

fn ports(port: u16) -> Value {
    let one = |protocol: &str| json!({ "hostPort": port, "containerPort": 80, "protocol": protocol });
    json!([one("tcp"), one("udp")])
}

/// All clients there are, each at all addresses of the host that it can have.
fn everywhere(node: &Node, policy: &str, families: usize) {
    let (pod, neighbour) = (node.pod("c1", families), node.pod("c2", 2));
    let _server = serve(&pod.netns, 80);
    node.add(&pod, &ports(8080), &json!({ "policy": policy }));
    let (v4, v6): (IpAddr, IpAddr) = (HOST_V4.into(), HOST_V6.into());
    let loopback: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    let from: [(&Namespace, Vec<IpAddr>); 4] = [
        (&node.client, vec![v4, v6]),
        (&node.host, [vec![v4, v6], loopback.to_vec()].concat()),
        (&neighbour.netns, vec![v4, v6]),
        // A container without an IPv6 address cannot send to one.
        (&pod.netns, if families == 2 { vec![v4, v6] } else { vec![v4] }),
    ];
    for (namespace, addresses) in from {
        for ip in addresses {
            assert_reaches(namespace, ip, 8080);
            assert_reaches_udp(namespace, ip, 8080);
        }
    }
    node.delete(&pod);
    node.assert_clean();
}

/// Serves connections with a server that reports its clients.
fn reporting(pod: &Pod) -> (TcpBackend, mpsc::Receiver<IpAddr>) {
    let listener = pod.netns.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, 80)).unwrap());
    let (clients, seen) = mpsc::channel();
    let backend = TcpBackend::serve(listener, move |stream| {
        clients.send(stream.peer_addr()?.ip().to_canonical()).unwrap();
        testkit::backend::echo(stream)
    });
    (backend, seen)
}

fn addresses(node: &Node, policy: &str) {
    let pod = node.pod("c1", 2);
    let (_server, seen) = reporting(&pod);
    node.add(&pod, &ports(8080), &json!({ "policy": policy }));
    for (host, client) in
        [(IpAddr::from(HOST_V4), IpAddr::from(CLIENT_V4)), (HOST_V6.into(), CLIENT_V6.into())]
    {
        assert_reaches(&node.client, host, 8080);
        let is_kept = seen.recv_timeout(PATIENCE).unwrap() == client;
        assert_eq!(is_kept, policy != "relay", "{host}");
    }
}

/// `"source": "client"`: the relay connects by the client's address, and has the answers come back.
fn kept_by_relay(node: &Node) {
    let before = node.host.command("ip rule").success();
    let pod = node.pod("c1", 2);
    let (_server, seen) = reporting(&pod);
    let _datagrams =
        udp::Backend::naming(pod.netns.run(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 80)).unwrap()));
    for _twice in 0..2 {
        node.add(&pod, &ports(8080), &json!({ "policy": "relay", "source": "client" }));
        for (host, client) in
            [(IpAddr::from(HOST_V4), IpAddr::from(CLIENT_V4)), (HOST_V6.into(), CLIENT_V6.into())]
        {
            assert_reaches(&node.client, host, 8080);
            assert_eq!(seen.recv_timeout(PATIENCE).unwrap(), client);
            let socket = udp::bind_in(&node.client, (client, 0));
            let flow = udp::flow_of(&socket, (host, 8080).into());
            assert_eq!(flow.ip().to_canonical(), client);
        }
        // A loopback address has no place in the container's network.
        assert_reaches(&node.host, Ipv4Addr::LOCALHOST, 8080);
        assert!(!seen.recv_timeout(PATIENCE).unwrap().is_loopback());
    }
    node.delete(&pod);
    node.assert_clean();
    assert_eq!(node.host.command("ip rule").success(), before);
    assert!(!node.host.command("nft list tables").success().contains("transparent"));
}

fn one_address(node: &Node, policy: &str) {
    let pod = node.pod("c1", 2);
    let _server = serve(&pod.netns, 80);
    let port = |host: &str, port: u16| json!({ "hostPort": port, "containerPort": 80, "hostIP": host });
    let mapped = json!([
        port("127.0.0.1", 8081),
        port("::1", 8082),
        port(&HOST_V4.to_string(), 8083),
        port(&HOST_V6.to_string(), 8084),
        port("0.0.0.0", 8085),
        port("::", 8086),
    ]);
    node.add(&pod, &mapped, &json!({ "policy": policy }));
    let everyone: [IpAddr; 4] =
        [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into(), HOST_V4.into(), HOST_V6.into()];
    for (port, reached) in [
        (8081, vec![0]),
        (8082, vec![1]),
        (8083, vec![2]),
        (8084, vec![3]),
        (8085, vec![0, 2]),
        (8086, vec![1, 3]),
    ] {
        for (index, ip) in everyone.into_iter().enumerate() {
            let address = SocketAddr::new(ip, port);
            let is_reached = reaches_tcp(&node.host, address, PATIENCE);
            assert_eq!(is_reached, reached.contains(&index), "{address}");
        }
    }
}

/// A client that never pauses: its flow has an entry of connection tracking, which must not outlive a change.
fn stream(node: &Node, policy: &str) {
    let pods = [node.pod("c1", 1), node.pod("c2", 1)];
    let _servers = [0, 1].map(|name: usize| {
        let socket = pods[name].netns.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 80)).unwrap());
        udp::Backend::serve(socket, move |socket, _bytes, from| {
            socket.send_to(&[u8::try_from(name).unwrap()], from).ok();
        })
    });
    let socket = udp::bind_in(&node.client, (CLIENT_V4, 40_000));
    socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    let ask = || {
        // Nobody may serve the port now.
        socket.send_to(b"x", (HOST_V4, 8053)).ok();
        let mut answer = [0; 1];
        socket.recv(&mut answer).ok().map(|_length| usize::from(answer[0]))
    };
    let port = json!([{ "hostPort": 8053, "containerPort": 80, "protocol": "udp" }]);
    for name in [0, 1, 0] {
        // The entry of a client that is there before the port.
        ask();
        node.add(&pods[name], &port, &json!({ "policy": policy }));
        eventually(&format!("an answer by container {name}"), || ask() == Some(name));
        node.delete(&pods[name]);
    }
}

/// Where the kernel routes loopback addresses to containers, a neighbour must not use that (CVE-2020-8558).
fn loopback_is_closed(node: &Node) {
    let pod = node.pod("c1", 1);
    let _server = serve(&pod.netns, 80);
    let mapped = json!([{ "hostPort": 8080, "containerPort": 80, "hostIP": "127.0.0.1", "protocol": "udp" }]);
    node.add(&pod, &mapped, &json!({ "policy": "dnat" }));
    assert_reaches_udp(&node.host, Ipv4Addr::LOCALHOST, 8080);
    let allowed = || node.host.command("sysctl -n net.ipv4.conf.cni0.route_localnet").success();
    assert_eq!(allowed().trim(), "1");
    // A container sends to a loopback address by way of the host.
    let host_service = udp::Backend::echo(udp::bind_in(&node.host, (Ipv4Addr::LOCALHOST, 7000)));
    pod.netns.ip("address delete 127.0.0.1/8 dev lo");
    pod.netns.command("sysctl -q -w net.ipv4.conf.all.route_localnet=1").success();
    pod.netns.ip("route add 127.0.0.1/32 via 10.88.0.1");
    assert!(!reaches_udp(&pod.netns, (Ipv4Addr::LOCALHOST, 7000), SILENCE));
    assert_eq!(host_service.received(), 0);
    node.delete(&pod);
    assert_eq!(allowed().trim(), "0");
}

/// `route_localnet` that somebody else has switched on is not switched off with the last port.
fn localnet_of_others(node: &Node) {
    let pod = node.pod("c1", 1);
    let allowed = || node.host.command("sysctl -n net.ipv4.conf.cni0.route_localnet").success();
    for before in ["1", "0"] {
        node.host.command(&format!("sysctl -q -w net.ipv4.conf.cni0.route_localnet={before}")).success();
        for _repeated in 0..2 {
            node.add(&pod, &ports(8080), &json!({ "policy": "dnat" }));
            assert_eq!(allowed().trim(), "1");
        }
        node.delete(&pod);
        assert_eq!(allowed().trim(), before);
        node.assert_clean();
    }
}

/// A container on another bridge, which the host routes to the first.
fn other_network(node: &Node, policy: &str) {
    let pod = node.pod("c1", 1);
    let _server = serve(&pod.netns, 80);
    node.add(&pod, &ports(8080), &json!({ "policy": policy }));
    let other = Namespace::new();
    node.host.ip("link add other0 type bridge");
    node.host.ip("address add 10.99.0.1/24 dev other0");
    node.host.ip(&format!(
        "link add veth9 master other0 type veth peer name eth0 netns {}",
        other.path().display()
    ));
    node.host.ip("link set veth9 up");
    node.host.ip("link set other0 up");
    other.ip("address add 10.99.0.2/24 dev eth0");
    other.ip("link set eth0 up");
    other.ip("route add default via 10.99.0.1");
    // The published port, at each address of the host, and the address of the container.
    for ip in [HOST_V4, Ipv4Addr::new(10, 99, 0, 1), Ipv4Addr::new(10, 88, 0, 1)] {
        assert_reaches(&other, ip, 8080);
        assert_reaches_udp(&other, ip, 8080);
    }
    assert_reaches(&other, pod.v4, 80);
    node.delete(&pod);
    assert!(!reaches_tcp(&other, (HOST_V4, 8080), PATIENCE));
}
