//! Headers of the PROXY protocol in datagrams.

use rproxy_mapping::access::AccessList;
use rproxy_mapping::proxy_protocol::{ProxyDatagrams, ProxyProtocol, ProxyVersion};
use rproxy_sys::udp::{BATCH, Transmit, send};

use super::*;
use crate::proxy_protocol::{Endpoints, decode_datagram};
use crate::udp::send::Waiting;

fn sends(send_udp: ProxyDatagrams) -> Limits {
    let proxy_protocol = ProxyProtocol { send: Some(ProxyVersion::V2), send_udp, ..ProxyProtocol::default() };
    Limits { proxy_protocol, ..Limits::default() }
}

fn accepts() -> Limits {
    let accept = vec!["127.0.0.0/8".parse().unwrap()];
    Limits { proxy_protocol: ProxyProtocol { accept, ..ProxyProtocol::default() }, ..Limits::default() }
}

fn told(source: &str) -> Endpoints {
    Endpoints::new(source.parse().unwrap(), "198.51.100.9:53".parse().unwrap())
}

/// A datagram of a proxy that speaks for a client at `source`.
fn behind_header(source: &str, payload: &[u8]) -> Vec<u8> {
    [&told(source).header(ProxyVersion::V2, Protocol::Udp), payload].concat()
}

/// Sends datagrams of `size` bytes as one GSO batch.
fn send_as_one(socket: &UdpSocket, datagrams: &[u8], size: usize) {
    let (payload, segment) = ([io::IoSlice::new(datagrams)], u16::try_from(size).ok());
    let batch = Transmit { payload: &payload, to: None, source: None, segment, class: 0 };
    send(socket.as_fd(), &batch).unwrap();
}

/// What the backend has received, without the header, and whom that speaks for.
fn without_header(datagram: &[u8]) -> (Option<Endpoints>, &[u8]) {
    let header = decode_datagram(datagram).unwrap();
    (header.endpoints, &datagram[header.len..])
}

#[test]
fn each_datagram_tells_its_client() {
    let mut scene = Scene::new(sends(ProxyDatagrams::Each));
    for client in [scene.client(), scene.client()] {
        let ends = Endpoints::new(address(&client), scene.front);
        for payload in [&b"one"[..], b"", b"three"] {
            client.send(payload).unwrap();
            let (datagram, flow) = scene.at_backend();
            assert_eq!(without_header(&datagram), (Some(ends), payload));
            scene.backend.send_to(payload, flow).unwrap();
            assert_eq!(scene.at_client(&client), payload, "replies have none");
        }
    }
    assert_eq!(scene.stats().datagrams_in.get(), 6);
    assert_eq!(scene.stats().bytes_in(), 2 * (8 + 3 * 28), "with headers");
}

#[test]
fn the_first_datagram_tells_the_client_and_again_once_nobody_listened() {
    let mut scene = Scene::new(sends(ProxyDatagrams::First));
    let client = scene.client();
    let ends = Endpoints::new(address(&client), scene.front);
    client.send(b"one").unwrap();
    client.send(b"two").unwrap();
    assert_eq!(without_header(&scene.at_backend().0), (Some(ends), &b"one"[..]));
    assert_eq!(scene.at_backend().0, b"two");
    client.send(b"three").unwrap();
    assert_eq!(scene.at_backend().0, b"three");

    let place = address(&scene.backend);
    scene.backend = socket();
    client.send(b"to nobody").unwrap();
    scene.serve_until("it is refused", |scene| scene.failures(FailureKind::DatagramRefused) > 0);
    scene.backend = UdpSocket::bind(place).unwrap();
    scene.backend.set_nonblocking(true).unwrap();
    client.send(b"four").unwrap();
    assert_eq!(without_header(&scene.at_backend().0), (Some(ends), &b"four"[..]));
    client.send(b"five").unwrap();
    assert_eq!(scene.at_backend().0, b"five");
}

#[test]
fn a_gso_batch_has_a_header_in_each_datagram() {
    for send_udp in [ProxyDatagrams::Each, ProxyDatagrams::First] {
        let mut scene = Scene::new(sends(send_udp));
        SockRef::from(&scene.backend).set_recv_buffer_size(4 << 20).unwrap();
        let client = scene.client();
        let datagrams: Vec<Vec<u8>> = (0..50).map(|byte| vec![byte; 1300]).collect();
        let whole = datagrams.concat();
        send_as_one(&client, &whole, 1300);
        for (index, datagram) in datagrams.iter().enumerate() {
            let (received, _flow) = scene.at_backend();
            if index == 0 || send_udp == ProxyDatagrams::Each {
                assert_eq!(without_header(&received).1, datagram, "{index}");
            } else {
                assert_eq!(received, *datagram, "{index}");
            }
        }
        assert_eq!(scene.stats().datagrams_in.get(), 50);
    }
}

#[test]
fn a_datagram_that_its_header_makes_too_long_is_counted() {
    let mut scene = Scene::new(sends(ProxyDatagrams::Each));
    let client = scene.client();
    client.send(&[0; 65_507 - 27]).unwrap();
    scene.serve_until("it is counted", |scene| scene.failures(FailureKind::TooLarge) == 1);
    client.send(b"goes on").unwrap();
    assert_eq!(without_header(&scene.at_backend().0).1, b"goes on");
    assert_eq!(scene.stats().datagrams_in.get(), 1);
}

#[test]
fn a_proxy_speaks_for_several_clients() {
    let mut scene = Scene::new(accepts());
    let proxy = scene.client();
    let clients = ["192.0.2.1:7", "192.0.2.1:8", "[2001:db8::1]:7"];
    let flows = clients.map(|client| {
        proxy.send(&behind_header(client, client.as_bytes())).unwrap();
        let (datagram, flow) = scene.at_backend();
        assert_eq!(datagram, client.as_bytes());
        flow
    });
    assert!(flows[0] != flows[1] && flows[1] != flows[2]);
    assert_eq!(scene.relay.table.len(), 3);
    for (client, flow) in clients.iter().zip(flows) {
        proxy.send(&behind_header(client, b"again")).unwrap();
        assert_eq!(scene.at_backend(), (b"again".to_vec(), flow));
        scene.backend.send_to(client.as_bytes(), flow).unwrap();
        assert_eq!(scene.at_client(&proxy), client.as_bytes());
    }
    // It speaks for itself.
    let local = [&b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"[..], b"check"].concat();
    proxy.send(&local).unwrap();
    assert_eq!(scene.at_backend().0, b"check");
    assert!(scene.flow(&proxy).is_some());
}

#[test]
fn datagrams_for_several_clients_in_one_gso_batch_are_taken_apart() {
    let mut scene = Scene::new(accepts());
    let proxy = scene.client();
    let clients: Vec<String> = (0..40).map(|number| format!("192.0.2.{}:7", 10 + number % 4)).collect();
    let whole: Vec<u8> = clients.iter().flat_map(|client| behind_header(client, client.as_bytes())).collect();
    send_as_one(&proxy, &whole, whole.len() / clients.len());
    let mut received: Vec<_> = clients.iter().map(|_client| scene.at_backend().0).collect();
    received.sort();
    let mut wanted: Vec<_> = clients.iter().map(|client| client.as_bytes().to_vec()).collect();
    wanted.sort();
    assert_eq!(received, wanted);
    assert_eq!(scene.relay.table.len(), 4);
}

#[test]
fn access_lists_and_quotas_are_about_the_client_that_a_proxy_tells() {
    let limits = accepts();
    let access = AccessList { deny: vec![parse_network("192.0.2.9").unwrap()], ..AccessList::default() };
    let mut scene = Scene::new(Limits { access, udp_max_flows_per_source: Some(1), ..limits });
    let proxy = scene.client();
    proxy.send(&behind_header("192.0.2.9:7", b"denied")).unwrap();
    proxy.send(&behind_header("192.0.2.1:7", b"one")).unwrap();
    assert_eq!(scene.at_backend().0, b"one");
    assert_eq!(scene.failures(FailureKind::Denied), 1);
    proxy.send(&behind_header("192.0.2.2:7", b"other")).unwrap();
    assert_eq!(scene.at_backend().0, b"other");
    assert_eq!(scene.failures(FailureKind::FlowDisplaced), 0);
    proxy.send(&behind_header("192.0.2.1:8", b"second of one")).unwrap();
    assert_eq!(scene.at_backend().0, b"second of one");
    assert_eq!(scene.failures(FailureKind::FlowDisplaced), 1);

    let access = AccessList { deny: vec![parse_network("192.0.2.2").unwrap()], ..AccessList::default() };
    let limits = Limits { access, ..(*scene.target.policy.limits).clone() };
    let policy = Arc::new(MappingPolicy { limits: limits.into(), state: scene.target.policy.state.clone() });
    let target = Arc::new(Target::new(scene.target.port_mapping.clone(), policy));
    let port = scene.port.clone();
    scene.serve_port(&port, &target);
    assert_eq!(scene.relay.table.len(), 1, "the flow of 192.0.2.2 has ended");
}

#[test]
fn a_datagram_of_a_proxy_without_a_header_is_counted_and_dropped() {
    let mut scene = Scene::new(accepts());
    let proxy = scene.client();
    for wrong in [&b""[..], b"plain", b"PROXY UNKNOWN\r\n", &behind_header("192.0.2.1:7", b"")[..20]] {
        proxy.send(wrong).unwrap();
    }
    proxy.send(&behind_header("192.0.2.1:7", b"")).unwrap();
    assert_eq!(scene.at_backend().0, b"");
    assert_eq!(scene.failures(FailureKind::BadProxyHeader), 4);
}

#[test]
fn whom_a_proxy_speaks_for_is_told_to_the_backend() {
    let mut limits = accepts();
    limits.proxy_protocol.send = Some(ProxyVersion::V2);
    let mut scene = Scene::new(limits);
    let proxy = scene.client();
    for client in ["192.0.2.1:7", "[2001:db8::1]:7"] {
        proxy.send(&behind_header(client, b"hello")).unwrap();
        assert_eq!(without_header(&scene.at_backend().0), (Some(told(client)), &b"hello"[..]));
    }
}

#[test]
fn a_flow_that_is_taken_over_is_that_of_the_client_that_the_proxy_told() {
    let mut limits = accepts();
    limits.proxy_protocol.send = Some(ProxyVersion::V2);
    limits.proxy_protocol.send_udp = ProxyDatagrams::First;
    let mut scene = Scene::new(limits);
    let proxy = scene.client();
    let flows = ["192.0.2.1:7", "192.0.2.2:7"].map(|client| {
        proxy.send(&behind_header(client, b"hello")).unwrap();
        scene.at_backend().1
    });
    let live = scene.relay.pause();
    assert_eq!(live.flows.len(), 2);
    scene.relay.end_flows(Ending::Removed, |_listeners, _key| true);
    // As in another process, nothing but their sockets is left.
    scene.relay.resume();
    scene.relay.ended.iter_mut().for_each(|ended| ended.flow.is_shared = true);
    scene.settle();
    scene.relay.adopt(live);
    for (client, flow) in ["192.0.2.1:7", "192.0.2.2:7"].iter().zip(flows) {
        proxy.send(&behind_header(client, b"goes on")).unwrap();
        assert_eq!(scene.at_backend(), (b"goes on".to_vec(), flow), "its backend has the header");
    }
}

#[test]
fn flows_end_when_headers_are_sent_or_expected_from_now_on() {
    let mut scene = Scene::new(Limits::default());
    let client = scene.client();
    client.send(b"plain").unwrap();
    assert_eq!(scene.at_backend().0, b"plain");
    let policy = MappingPolicy {
        limits: sends(ProxyDatagrams::First).into(),
        state: scene.target.policy.state.clone(),
    };
    let target = Arc::new(Target::new(scene.target.port_mapping.clone(), Arc::new(policy)));
    let port = scene.port.clone();
    scene.serve_port(&port, &target);
    client.send(b"with a header").unwrap();
    let ends = Endpoints::new(address(&client), scene.front);
    assert_eq!(without_header(&scene.at_backend().0), (Some(ends), &b"with a header"[..]));
}

#[test]
fn datagrams_of_proxies_and_others_come_in_any_mix() {
    let accept = vec!["127.0.0.1".parse().unwrap()];
    let proxy_protocol = ProxyProtocol { accept, ..ProxyProtocol::default() };
    let mut scene = Scene::new(Limits { proxy_protocol, ..Limits::default() });
    SockRef::from(&scene.backend).set_recv_buffer_size(4 << 20).unwrap();
    let direct = UdpSocket::bind("127.0.0.2:0").unwrap();
    direct.connect(scene.front).unwrap();
    let proxy = scene.client();
    let one = behind_header("192.0.2.1:7", b"proxied");
    // Each of the direct client's comes when a batch is full.
    for _ in 0..3 {
        (0..4).for_each(|_| send_as_one(&proxy, &one.repeat(BATCH / 4), one.len()));
        direct.send(b"direct").unwrap();
    }
    let received: Vec<_> = (0..3 * (BATCH + 1)).map(|_| scene.at_backend().0).collect();
    let count = |of: &[u8]| received.iter().filter(|bytes| **bytes == of).count();
    assert_eq!((count(b"proxied"), count(b"direct")), (3 * BATCH, 3));
}

#[test]
fn empty_datagrams_behind_headers_arrive_where_gso_does_not_work() {
    let mut scene = Scene::new(accepts());
    let proxy = scene.client();
    let one = behind_header("192.0.2.1:7", b"");
    proxy.send(&one).unwrap();
    assert_eq!(scene.at_backend().0, b"");
    let id = scene.relay.table.iter().next().unwrap().0;
    scene.relay.table.get_mut(id).unwrap().1.refuse_gso();
    send_as_one(&proxy, &one.repeat(5), one.len());
    for _ in 0..5 {
        assert_eq!(scene.at_backend().0, b"");
    }
    assert_eq!(scene.stats().datagrams_in.get(), 6);
}

#[test]
fn the_header_is_in_the_first_datagram_that_the_kernel_takes() {
    let mut scene = Scene::new(sends(ProxyDatagrams::First));
    let client = scene.client();
    client.send(&[0; 65_507 - 27]).unwrap();
    scene.serve_until("it is counted", |scene| scene.failures(FailureKind::TooLarge) == 1);
    let forged = behind_header("192.0.2.9:7", b"forged");
    client.send(&forged).unwrap();
    let ends = Endpoints::new(address(&client), scene.front);
    assert_eq!(without_header(&scene.at_backend().0), (Some(ends), &forged[..]));
}

#[test]
fn flows_stay_when_other_proxies_are_accepted() {
    let mut scene = Scene::new(accepts());
    let proxy = scene.client();
    proxy.send(&behind_header("192.0.2.1:7", b"hello")).unwrap();
    let flow = scene.at_backend().1;
    let mut limits = accepts();
    limits.proxy_protocol.accept.push("10.0.0.0/8".parse().unwrap());
    limits.proxy_protocol.timeout = Duration::from_secs(1);
    let policy = Arc::new(MappingPolicy { limits: limits.into(), state: scene.target.policy.state.clone() });
    let target = Arc::new(Target::new(scene.target.port_mapping.clone(), policy));
    let port = scene.port.clone();
    scene.serve_port(&port, &target);
    proxy.send(&behind_header("192.0.2.1:7", b"goes on")).unwrap();
    assert_eq!(scene.at_backend(), (b"goes on".to_vec(), flow));

    let policy = Arc::new(MappingPolicy { limits: Arc::default(), state: scene.target.policy.state.clone() });
    let target = Arc::new(Target::new(scene.target.port_mapping.clone(), policy));
    scene.serve_port(&port, &target);
    assert_eq!(scene.relay.table.len(), 0, "nobody speaks for others any more");
}

#[test]
fn replies_to_clients_of_one_proxy_leave_by_the_sockets_of_their_flows() {
    let mut scene = Scene::new(accepts());
    let proxy = scene.client();
    let flows = ["192.0.2.1:7", "192.0.2.2:7"].map(|client| {
        proxy.send(&behind_header(client, b"hello")).unwrap();
        scene.at_backend().1
    });
    let ids: Vec<_> = scene.relay.table.iter().map(|(id, _key, _at)| id).collect();
    let number = scene.port.number();
    for (id, reply) in ids.iter().zip([b"one", b"two"]) {
        let waiting = Waiting::of(reply, Some(address(&proxy))).of_flow(Some(*id));
        scene.relay.listeners[number].queue.push(waiting);
    }
    scene.relay.use_client_sockets(number);
    let mut received = [scene.at_client(&proxy), scene.at_client(&proxy)];
    // Only the replies of a flow are in order.
    received.sort();
    assert_eq!(received, [b"one", b"two"]);
    for id in ids {
        assert!(scene.relay.table.get(id).unwrap().1.client_socket.is_some());
    }
    // Whichever of them gets what the proxy sends, it goes to the flow of its client.
    for (client, flow) in ["192.0.2.1:7", "192.0.2.2:7"].iter().zip(flows) {
        proxy.send(&behind_header(client, b"again")).unwrap();
        assert_eq!(scene.at_backend(), (b"again".to_vec(), flow));
    }
}
