//! Links of backends that fail or are replaced, and what passes them.

use super::*;

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| {
        Case::new(name, body).needs(&[Need::Root, Need::Program("nft")]).deadline(Duration::from_secs(120))
    };
    vec![
        case("large datagrams both ways", large_datagrams),
        case("flows outlast an outage of the link", outage),
        case("flows leave an interface that is replaced", replaced),
        case("the code point of a connection with another port than its client", code_point),
    ]
}

/// The replies come in fragments.
fn large_datagrams() {
    let net = transparent();
    let _echo = [V4.1, V6.1].map(|to| udp::Backend::echo(bind_in(&net.container, to)));
    for (front, to) in [V4, V6] {
        let _proxy = relay(&net, "udp", "[::]:5300", to, AS_CLIENT);
        let any = if front.is_ipv4() { CLIENT_V4.into() } else { IpAddr::from(CLIENT_V6) };
        let client = bind_in(&net.client, (any, 0));
        for size in [0, 1, 1_400, 1_473, 20_000, 65_000] {
            udp::assert_echoes(&client, front, &vec![7; size]);
        }
    }
}

/// Sends to `front` until there is a reply, and returns its text.
fn reached(client: &UdpSocket, front: SocketAddr) -> SocketAddr {
    client.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    let mut answer = [0; 64];
    let mut text = String::new();
    eventually("the backend answers", || {
        client.send_to(b"?", front).unwrap();
        let Ok(len) = client.recv(&mut answer) else { return false };
        text = String::from_utf8(answer[..len].to_vec()).unwrap();
        true
    });
    text.parse().unwrap()
}

/// The flow, which the backend knows by its port, is the same afterwards.
fn outage() {
    let net = transparent();
    let _naming = udp::Backend::naming(bind_in(&net.container, V4.1));
    let own = BRIDGE_V4.to_string();
    for source in ["auto", "client", &own] {
        let _proxy = relay(&net, "udp", "0.0.0.0:5300", V4.1, &["--source", source]);
        let client = bind_in(&net.client, (CLIENT_V4, 0));
        let before = reached(&client, V4.0);
        net.host.ip(&format!("link set {BRIDGE} down"));
        for _ in 0..3 {
            client.send_to(b"lost", V4.0).unwrap();
        }
        net.host.ip(&format!("link set {BRIDGE} up"));
        assert_eq!(reached(&client, V4.0), before, "source {source}");
    }
}

/// A flow is bound to an interface, of which there is another one of that name later.
fn replaced() {
    let net = transparent();
    let _naming = [V4.1, V6.1].map(|to| udp::Backend::naming(bind_in(&net.container, to)));
    for more in [&["--device", BRIDGE][..], &["--device", BRIDGE, "--source", "client"]] {
        for (front, to) in [V4, V6] {
            let _proxy = relay(&net, "tcp+udp", "[::]:5300", to, more);
            let any = if front.is_ipv4() { CLIENT_V4.into() } else { IpAddr::from(CLIENT_V6) };
            let client = bind_in(&net.client, (any, 0));
            let before = reached(&client, front);
            let ip = |line: &str| drop(net.host.ip(line));
            ip(&format!("link delete {BRIDGE}"));
            client.send_to(b"lost", front).unwrap();
            ip(&format!("link add name {BRIDGE} type bridge stp_state 0"));
            net.host.address(BRIDGE, &format!("{BRIDGE_V4}/16"));
            net.host.address(BRIDGE, &format!("{}/64", topology::BRIDGE_V6));
            ip(&format!("link set dev {BRIDGE} up"));
            ip(&format!("link set dev veth0002 master {BRIDGE}"));
            assert_eq!(reached(&client, front).ip(), before.ip(), "{more:?}");
        }
    }
}

/// Two connections cannot come from the same port to the same backend.
fn code_point() {
    let net = transparent();
    let to = SocketAddr::new(CONTAINER_V4.into(), PORT);
    let _echo = naming(&net.container, to);
    let nft = |line: &str| net.container.command(&format!("nft {line}")).success();
    nft("add table inet t");
    nft("add counter inet t others");
    nft("add chain inet t c { type filter hook input priority 0 ; }");
    nft("add rule inet t c meta l4proto tcp tcp flags & psh == psh ip dscp != ef counter name others");
    let proxy = Controlled::start_in(&net.host, &["--sandbox", "strict"]);
    let limits = json!({ "source": "client", "dscp": "EF" });
    let front = |name: &str, port| with(mapping(name, "tcp", (HOST_V4, port).into(), to), limits.clone());
    proxy.apply(&[front("one", 80), front("same", 81)]).success();
    let from = SocketAddr::from((CLIENT_V4, 7000));
    let streams = [80, 81].map(|port| connect_from(&net.client, from, (HOST_V4, port).into()));
    let [one, same] = streams.each_ref().map(|stream| {
        let seen = seen(stream);
        client::ping(stream);
        seen
    });
    assert_eq!((one, same.ip()), (from, from.ip()));
    assert_ne!(same.port(), from.port());
    assert!(
        nft("list counter inet t others").contains("packets 0 "),
        "{}",
        nft("list counter inet t others")
    );
}
