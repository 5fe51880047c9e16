//! The host's own network: what containers and other programs must not change, and what is noticed if they do.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV6};

use socket2::{Domain, Protocol, Socket, Type};
use testkit::netns::Namespace;
use testkit::suite::Case;
use testkit::topology::{BRIDGE_V4, CLIENT_V6};

use super::stage::{Stage, assert_out_of_reach, assert_reaches, assert_reaches_udp, case, serve};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("a container does not become the host's router", |stage| router(stage, "up")),
        case("a container does not become the host's router with IPv6", |stage| {
            router(stage, "up --subnet6 fd00:d0c::/64");
        }),
        case("IPv6 that is off by default is on where it is needed", ipv6_off_by_default),
        case("forwarding that somebody switches off is noticed", forwarding),
        case("an interface that packets are not forwarded from is named", closed),
        case("containers do not reach the host's loopback addresses without rules", loopback),
        case("routes of others do not lock a network that is up", foreign_routes),
    ]
}

/// Sends a router advertisement (RFC 4861, 4.2) to all nodes: "I am a default router for half an hour".
fn advertise(from: &Namespace, interface: &str) {
    const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
    // Type 134, code 0, checksum (the kernel's), hop limit, flags, lifetime in seconds, two timers.
    let advertisement = [134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];
    from.run(|| {
        let index = nix::net::if_::if_nametoindex(interface).unwrap();
        let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6)).unwrap();
        socket.set_multicast_hops_v6(255).unwrap();
        socket.set_multicast_if_v6(index).unwrap();
        socket.send_to(&advertisement, &SocketAddrV6::new(ALL_NODES, 0, 0, index).into()).unwrap();
    });
}

fn default_routers(host: &Namespace) -> String {
    host.ip("-6 route show default")
}

fn router(stage: &Stage, up: &str) {
    // Even on a router, interfaces may accept advertisements.
    for interface in ["default", "eth0"] {
        stage.host(&format!("sysctl -qw net.ipv6.conf.{interface}.accept_ra=2"));
    }
    stage.ok(up);
    let web = stage.attach("web");
    web.address("eth0", "fe80::bad/64");
    stage.client.address("eth0", "fe80::600d/64");
    let _server = serve(&stage.host, 9000);
    let veth = veth(stage);
    let attempt = || {
        advertise(&web, "eth0");
        // Takes the same way, so that the advertisement has arrived when it is answered.
        assert_reaches_udp(&web, BRIDGE_V4, 9000);
        let routes = default_routers(&stage.host);
        assert!(!routes.contains("fe80::bad"), "{routes}");
    };
    attempt();
    for key in [
        "net.ipv6.conf.docker0.accept_ra",
        "net.ipv6.conf.docker0.accept_redirects",
        "net.ipv4.conf.docker0.accept_redirects",
        &format!("net.ipv6.conf.{veth}.accept_ra"),
    ] {
        stage.host(&format!("sysctl -qw {key}=1"));
        let output = stage.run("check");
        assert_eq!(output.status.code(), Some(1), "{output:#?}");
        assert!(output.stdout.contains(&format!("{key} is not 0")), "{output:#?}");
        stage.ok("repair");
        assert_eq!(stage.ok("check"), "everything is as it should be\n", "{key}");
    }
    attempt();
    // The host does accept such an advertisement where it should.
    advertise(&stage.client, "eth0");
    assert_reaches_udp(&stage.client, testkit::topology::HOST_V6, 9000);
    assert!(default_routers(&stage.host).contains("via fe80::600d dev eth0"));
}

/// The host's end of the only container's pair.
fn veth(stage: &Stage) -> String {
    let ports = stage.host("ip -o link show master docker0");
    ports.split(": ").nth(1).unwrap().split('@').next().unwrap().to_owned()
}

fn ipv6_off_by_default(stage: &Stage) {
    stage.host("sysctl -qw net.ipv6.conf.default.disable_ipv6=1");
    stage.ok("up --subnet6 fd00:d0c::/64");
    let web = stage.attach("web");
    let _outside = serve(&stage.client, 9000);
    assert_reaches(&web, CLIENT_V6, 9000);
}

fn forwarding(stage: &Stage) {
    let all = ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"];
    // On before `up`, which has nothing to change.
    all.iter().for_each(|key| drop(stage.host(&format!("sysctl -qw {key}=1"))));
    let up = "up --subnet6 fd00:d0c::/64";
    stage.ok(up);
    let intact = stage.dump();
    let bridge = ["net.ipv4.conf.docker0.forwarding", "net.ipv6.conf.docker0.forwarding"];
    for key in all.into_iter().chain(bridge) {
        for mend in ["repair", up] {
            stage.host(&format!("sysctl -qw {key}=0"));
            let output = stage.run("check");
            assert_eq!(output.status.code(), Some(1), "{key}: {output:#?}");
            assert!(output.stdout.contains(&format!("{key} is not 1")), "{key}: {output:#?}");
            stage.ok(mend);
            assert_eq!(stage.ok("check"), "everything is as it should be\n", "{key}");
        }
    }
    super::stage::assert_same(&stage.dump(), &intact, "after all");
    stage.ok("down");
    for key in all {
        assert_eq!(stage.host(&format!("sysctl -n {key}")), "1\n", "it was on before `up`");
    }
}

fn closed(stage: &Stage) {
    stage.ok("up --subnet6 fd00:d0c::/64");
    let warned = || stage.run("check").stderr;
    assert_eq!(warned(), "");
    for key in ["net.ipv4.conf.eth0.forwarding", "net.ipv6.conf.eth0.forwarding"] {
        stage.host(&format!("sysctl -q -w {key}=0"));
        let said = warned();
        assert!(said.contains(&format!("by eth0 are not forwarded, as {key} is 0")), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        stage.host(&format!("sysctl -q -w {key}=1"));
    }
}

fn foreign_routes(stage: &Stage) {
    let wide = "128.0.0.0/1 via 10.0.0.12";
    stage.host(&format!("ip route add {wide}"));
    let (code, message) = stage.fails("up");
    assert!(code == 1 && message.contains("overlaps the route to 128.0.0.0/1 by eth0"), "{message}");
    stage.host(&format!("ip route delete {wide}"));
    stage.ok("up --subnet6 fd00:d0c::/64");
    for route in [wide, "172.17.5.0/24 via 10.0.0.12", "fd00:d0c:0:0:5::/80 via fd00:10::12"] {
        stage.host(&format!("ip route add {route}"));
    }
    let web = stage.attach("web");
    let _server = serve(&web, 80);
    stage.ok("publish web -p 80:80");
    assert_reaches(&stage.client, testkit::topology::HOST_V4, 80);
    for command in ["check", "repair", "up --subnet6 fd00:d0c::/64"] {
        let output = stage.run(command);
        assert!(output.status.success(), "{command}: {output:#?}");
        let warnings: Vec<&str> = output.stderr.lines().collect();
        assert_eq!(warnings.len(), 2, "not for the wide one, which takes nothing: {output:#?}");
        assert!(warnings[0].contains("the route to 172.17.5.0/24 by eth0"), "{output:#?}");
        assert!(warnings[1].contains("the route to fd00:d0c:0:0:5::/80 by eth0"), "{output:#?}");
    }
    stage.ok("unpublish web");
    stage.ok("detach web");
}

/// Published by the kernel alone, a port on loopback takes `route_localnet` on the bridge.
fn loopback(stage: &Stage) {
    stage.ok("up");
    let web = stage.attach("web");
    let _server = serve(&web, 80);
    stage.ok("publish web -p 127.0.0.1:80:80 --via dnat");
    let _secret = serve(&stage.host, 9000);
    // The container sends what is for 127.0.0.1 to the host.
    web.ip("route add 127.0.0.1/32 via 172.17.0.1 table 100");
    web.ip("rule add pref 50 to 127.0.0.1 lookup 100");
    web.ip("rule add pref 100 lookup local");
    web.ip("rule delete pref 0 lookup local");
    web.command("sysctl -qw net.ipv4.conf.all.route_localnet=1").success();
    assert_out_of_reach(&web, Ipv4Addr::LOCALHOST, 9000);
    stage.host("nft flush ruleset");
    assert_out_of_reach(&web, Ipv4Addr::LOCALHOST, 9000);
    assert_reaches(&web, BRIDGE_V4, 9000);
    stage.host("ip xfrm policy flush");
    assert_reaches(&web, Ipv4Addr::LOCALHOST, 9000);
    stage.ok("repair");
    assert_out_of_reach(&web, Ipv4Addr::LOCALHOST, 9000);
    assert_reaches(&stage.host, Ipv4Addr::LOCALHOST, 80);
    stage.ok("unpublish web");
    assert!(!stage.host("ip xfrm policy").contains("127.0.0.0/8"), "nothing opens them any more");
}
