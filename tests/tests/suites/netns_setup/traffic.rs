//! Which traffic passes and which is blocked: each way to publish, each backend, both protocols and families.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV6, TcpStream, UdpSocket};
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use testkit::suite::Case;
use testkit::topology::{BRIDGE_V4, CLIENT_V4, CLIENT_V6, CONTAINER_V4, HOST_V4, HOST_V6};

use super::stage::{
    Backend, SILENCE, Stage, assert_out_of_reach, assert_reaches, assert_reaches_udp, for_each_firewall,
    reaches_tcp, reaches_udp, serve,
};

const WEB_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xd0c, 0, 0, 0, 0, 0, 2);

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (via, play) in [
        ("both", (|stage, backend| published(stage, backend, "both")) as fn(&Stage, Backend)),
        ("proxy", |stage, backend| published(stage, backend, "proxy")),
        ("dnat", |stage, backend| published(stage, backend, "dnat")),
    ] {
        cases.extend(for_each_firewall(&format!("a port published via {via}"), play));
    }
    cases.extend(for_each_firewall("a port published via dnat, without br_netfilter", routed));
    cases.extend(for_each_firewall("one address of the host", one_address));
    cases.extend(for_each_firewall("a link-local address of the host", link_local));
    cases.extend(for_each_firewall("stale UDP flows are forgotten", stale_flows));
    cases.extend(for_each_firewall("a stream of datagrams follows each change of its port", stream));
    cases.extend(for_each_firewall("containers stay closed while all rules are gone", flushed));
    cases.extend(for_each_firewall("new connections are served while other ports change", undisturbed));
    cases
}

fn published(stage: &Stage, backend: Backend, via: &str) {
    stage.ok(&format!("up --subnet6 fd00:d0c::/64 {}", backend.option()));
    let (web, db) = (stage.attach("web"), stage.attach("db"));
    let _servers = [serve(&web, 80), serve(&web, 81)];
    stage.ok(&format!("publish web -p 80:80 -p 80:80/udp --via {via}"));

    // From outside: what is published, nothing else, and not by the container's own address.
    for host in [IpAddr::V4(HOST_V4), IpAddr::V6(HOST_V6)] {
        assert_reaches(&stage.client, host, 80);
        assert_reaches_udp(&stage.client, host, 80);
        assert_out_of_reach(&stage.client, host, 81);
    }
    for container in [IpAddr::V4(CONTAINER_V4), IpAddr::V6(WEB_V6)] {
        assert_out_of_reach(&stage.client, container, 80);
        assert_reaches(&stage.host, container, 81);
        assert_reaches(&db, container, 81);
        assert_reaches_udp(&db, container, 81);
    }
    // From the host itself.
    assert_reaches(&stage.host, Ipv4Addr::LOCALHOST, 80);
    assert_reaches_udp(&stage.host, Ipv4Addr::LOCALHOST, 80);
    assert_reaches(&stage.host, HOST_V4, 80);
    assert_reaches(&stage.host, HOST_V6, 80);
    if via != "dnat" {
        // The kernel alone cannot lead ::1 anywhere.
        assert_reaches(&stage.host, Ipv6Addr::LOCALHOST, 80);
    }
    // From containers, the published one included, and from all of them out.
    for container in [&web, &db] {
        for host in [IpAddr::V4(HOST_V4), IpAddr::V4(BRIDGE_V4), IpAddr::V6(HOST_V6)] {
            assert_reaches(container, host, 80);
            assert_reaches_udp(container, host, 80);
        }
    }
    let _outside = serve(&stage.client, 9000);
    for outside in [IpAddr::V4(CLIENT_V4), IpAddr::V6(CLIENT_V6)] {
        assert_reaches(&web, outside, 9000);
        assert_reaches_udp(&web, outside, 9000);
    }
    stage.ok("unpublish web");
    assert_out_of_reach(&stage.client, HOST_V4, 80);
}

/// Where bridges do not ask the rules, replies from container to container are routed.
fn routed(stage: &Stage, backend: Backend) {
    for family in ["iptables", "ip6tables"] {
        let key = format!("net/bridge/bridge-nf-call-{family}");
        if Path::new("/proc/sys").join(&key).exists() {
            stage.host(&format!("sysctl -q -w {key}=0"));
        }
    }
    published(stage, backend, "dnat");
}

fn one_address(stage: &Stage, backend: Backend) {
    stage.ok(&format!("up {}", backend.option()));
    let web = stage.attach("web");
    let _server = serve(&web, 80);
    stage.ok("publish web -p 127.0.0.1:80:80");
    stage.ok("publish web -p 127.0.0.1:81:80 --via dnat");
    stage.ok("publish web -p 10.0.0.11:82:80");
    for port in [80, 81] {
        assert_reaches(&stage.host, Ipv4Addr::LOCALHOST, port);
        assert_out_of_reach(&stage.client, HOST_V4, port);
    }
    assert_reaches(&stage.client, HOST_V4, 82);
    assert_out_of_reach(&stage.host, Ipv4Addr::LOCALHOST, 82);
    // A neighbour that routes the host's loopback addresses to the host gets nowhere.
    stage.client.ip("route add 127.0.0.1/32 via 10.0.0.11 table 100");
    stage.client.ip("rule add pref 0 to 127.0.0.1 lookup 100");
    stage.client.command("sysctl -w net.ipv4.conf.all.route_localnet=1").success();
    stage.host("sysctl -w net.ipv4.conf.all.route_localnet=1");
    for port in [80, 81] {
        assert_out_of_reach(&stage.client, Ipv4Addr::LOCALHOST, port);
    }
    stage.host("sysctl -w net.ipv4.conf.all.route_localnet=0");
}

/// The kernel forwards nothing that link-local addresses send, so the relay has to serve them alone.
fn link_local(stage: &Stage, backend: Backend) {
    const HOST: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x11);

    stage.host.address("eth0", &format!("{HOST}/64"));
    stage.client.address("eth0", "fe80::12/64");
    stage.ok(&format!("up {}", backend.option()));
    let web = stage.attach("web");
    let _server = serve(&web, 80);
    let spec = format!("[{HOST}%eth0]:80:80/TCP+udp");
    let (code, message) = stage.fails(&format!("publish web -p {spec} --via dnat"));
    assert!(code == 2 && message.contains("use --via both"), "{message}");
    let (code, message) = stage.fails(&format!("publish web -p [{HOST}]:80:80"));
    assert!(code == 2 && message.contains(&format!("write [{HOST}%")), "{message}");

    let printed = stage.ok(&format!("publish web -p {spec}"));
    assert!(printed.contains(&format!("[{HOST}%eth0]:80/tcp -> ")), "{printed}");
    let index: u32 = stage.client.run(|| nix::net::if_::if_nametoindex("eth0").unwrap());
    let host = SocketAddrV6::new(HOST, 80, 0, index);
    let reaches = || {
        reaches_tcp(&stage.client, host, testkit::PATIENCE)
            && reaches_udp(&stage.client, host, testkit::PATIENCE)
    };
    assert!(reaches());
    assert_eq!(stage.ok(&format!("publish web -p {spec}")), printed, "the second time changes nothing");
    stage.ok("check");
    // The same address on another interface is another one, with a relay of its own.
    stage.host("ip link add eth7 up type veth peer name eth8");
    stage.host("ip link set eth8 up");
    stage.host.address("eth7", &format!("{HOST}/64"));
    let other = format!("[{HOST}%eth7]:80:80");
    stage.ok(&format!("publish web -p {other}"));
    let listening = stage.host("ss -Hltn sport = 80");
    assert!(listening.contains("%eth0:80") && listening.contains("%eth7:80"), "{listening}");
    stage.host("ip link delete eth7");
    stage.ok(&format!("unpublish web -p {other}"));
    assert!(reaches(), "only the other one is gone");
    let (code, message) = stage.fails(&format!("publish web -p {other}"));
    assert!(code == 2 && message.contains("'eth7' is not a network interface"), "{message}");
    stage.ok("check");
    stage.ok(&format!("unpublish web -p {spec}"));
    assert!(!reaches_tcp(&stage.client, host, SILENCE));
}

/// Somebody flushes all rules, as the start of a firewall does: only what the relay serves is reached.
fn flushed(stage: &Stage, backend: Backend) {
    stage.ok(&format!("up --subnet6 fd00:d0c::/64 {}", backend.option()));
    let web = stage.attach("web");
    let _server = serve(&web, 80);
    stage.ok("publish web -p 80:80 -p 80:80/udp");
    let intact = stage.dump();
    match backend {
        Backend::Nft | Backend::IptablesNft => drop(stage.host("nft flush ruleset")),
        Backend::Legacy => {
            for (tool, table) in ["iptables", "ip6tables"]
                .into_iter()
                .flat_map(|tool| ["raw", "filter", "nat"].map(|table| (tool, table)))
            {
                stage.host(&format!("{tool} -t {table} -F"));
            }
        }
    }
    for container in [IpAddr::V4(CONTAINER_V4), IpAddr::V6(WEB_V6)] {
        assert_out_of_reach(&stage.client, container, 80);
        assert_reaches(&stage.host, container, 80);
    }
    for host in [IpAddr::V4(HOST_V4), IpAddr::V6(HOST_V6)] {
        assert_reaches(&stage.client, host, 80);
        assert_reaches_udp(&stage.client, host, 80);
    }
    stage.host("ip xfrm policy flush");
    assert_reaches(&stage.client, CONTAINER_V4, 80);
    let output = stage.run("check");
    for subnet in ["172.17.0.0/16", "fd00:d0c::/64"] {
        let finding = format!("the IPsec policy that blocks packets routed to {subnet} is missing");
        assert!(output.stdout.contains(&finding), "{output:#?}");
    }
    stage.ok("repair");
    assert_eq!(stage.ok("check"), "everything is as it should be\n");
    super::stage::assert_same(&stage.dump(), &intact, "after all");
    assert_out_of_reach(&stage.client, CONTAINER_V4, 80);
}

/// New connections to a published port, as many as go, while others are published and unpublished.
fn undisturbed(stage: &Stage, backend: Backend) {
    const CHANGES: usize = 30;
    stage.ok(&format!("up --subnet6 fd00:d0c::/64 {}", backend.option()));
    let web = stage.attach("web");
    let _server = serve(&web, 80);
    // Many rules or elements, so that a change of all of them takes its time.
    stage.ok("publish web -p 80:80 -p 20000-20999:80 --via dnat");
    let is_over = AtomicBool::new(false);
    let connect = |host: IpAddr| {
        let mut results = [0_usize; 2];
        while !is_over.load(Ordering::Relaxed) {
            let stream = TcpStream::connect_timeout(&(host, 80).into(), testkit::PATIENCE);
            results[usize::from(stream.is_ok())] += 1;
            if let Ok(stream) = stream {
                // Leaves no TIME_WAIT, which would use up the ports.
                socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
            }
        }
        results
    };
    thread::scope(|scope| {
        let hosts = [HOST_V4.into(), HOST_V6.into()];
        let connect = |host| stage.client.run(|| connect(host));
        let clients: Vec<_> = hosts.into_iter().map(|host| scope.spawn(move || connect(host))).collect();
        // Also if a command fails, the clients have to end.
        let changes = panic::catch_unwind(AssertUnwindSafe(|| {
            for _ in 0..CHANGES {
                stage.ok("publish web -p 90-94:80 --via dnat");
                stage.ok("unpublish web -p 90-94:80");
            }
        }));
        is_over.store(true, Ordering::Relaxed);
        let results: Vec<_> = clients.into_iter().map(|client| client.join().unwrap()).collect();
        changes.unwrap_or_else(|panic| panic::resume_unwind(panic));
        for [failed, served] in results {
            assert!(served > 0 && failed == 0, "{failed} connections failed, {served} were served");
        }
    });
}

/// A client sends all the time from one port, so that no conntrack entry of its flow expires, while its port is
/// published in another way. A late reply of whoever had the port before has even turned the entry around.
fn stream(stage: &Stage, backend: Backend) {
    stage.ok(&format!("up {}", backend.option()));
    let web = stage.attach("web");
    let _server = serve(&web, 5000);
    let before = stage.host.run(|| UdpSocket::bind((HOST_V4, 7000)).unwrap());
    let client = stage.client.run(|| UdpSocket::bind((CLIENT_V4, 4444)).unwrap());
    client.set_read_timeout(Some(Duration::from_millis(2))).unwrap();
    before.send_to(b"late", (CLIENT_V4, 4444)).unwrap();
    drop(before);
    // Until an answer has come that was asked for after the change.
    let answered = |what: &str| {
        let start = Instant::now();
        loop {
            client.send_to(what.as_bytes(), (HOST_V4, 7000)).unwrap();
            let mut buffer = [0; 64];
            match client.recv_from(&mut buffer) {
                Ok((len, from)) if &buffer[..len] == what.as_bytes() => {
                    return assert_eq!(from, (IpAddr::V4(HOST_V4), 7000).into(), "{what}");
                }
                _ => assert!(start.elapsed() < testkit::PATIENCE, "{what}: no answer"),
            }
        }
    };
    let is_over = AtomicBool::new(false);
    let other = client.try_clone().unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                // Refused while the port is not published.
                let _unsent = other.send_to(b"stream", (HOST_V4, 7000));
                thread::yield_now();
            }
        });
        let all = panic::catch_unwind(AssertUnwindSafe(|| {
            for via in ["dnat", "proxy", "both", "dnat", "both", "proxy", "both"] {
                stage.ok(&format!("publish web -p 7000:5000/udp --via {via}"));
                answered(via);
                let entries = stage.host("conntrack -L -p udp");
                let mut to_port = entries.lines().filter(|line| line.contains("sport=4444 dport=7000 "));
                let flow = to_port.next().unwrap_or_default();
                // The client has begun it, and not a late reply.
                let is_client_s = flow.find("src=10.0.0.12") < flow.find("sport=7000").or(Some(usize::MAX));
                let is_translated = flow.contains("src=172.17.0.2 ");
                assert!(is_client_s && is_translated == (via != "proxy"), "{via}: {entries}");
                stage.ok("unpublish web");
            }
        }));
        is_over.store(true, Ordering::Relaxed);
        all.unwrap_or_else(|panic| panic::resume_unwind(panic));
    });
}

/// A client that keeps its source port keeps its flow: after a change of rules it has to reach the new target.
fn stale_flows(stage: &Stage, backend: Backend) {
    stage.ok(&format!("up {}", backend.option()));
    let (old, new) = (stage.attach("old"), stage.attach("new"));
    let answering = |namespace: &testkit::netns::Namespace, text: &'static [u8]| {
        let socket = namespace.run(|| UdpSocket::bind("0.0.0.0:53").unwrap());
        thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, client)) = socket.recv_from(&mut buffer) {
                if &buffer[..4] == b"stop" {
                    return;
                }
                socket.send_to(text, client).unwrap();
            }
        })
    };
    let servers = [answering(&old, b"old"), answering(&new, b"new")];
    let client = stage.client.run(|| UdpSocket::bind("0.0.0.0:5000").unwrap());
    client.set_read_timeout(Some(testkit::PATIENCE)).unwrap();
    let ask = || {
        let mut buffer = [0; 8];
        client.send_to(b"question", (HOST_V4, 53)).unwrap();
        let (len, _) = client.recv_from(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..len]).into_owned()
    };
    stage.ok("publish old -p 53:53/udp --via dnat");
    assert_eq!(ask(), "old");
    stage.ok("unpublish old");
    stage.ok("publish new -p 53:53/udp --via dnat");
    assert_eq!(ask(), "new");
    for (ip, server) in [2_u8, 3].into_iter().zip(servers) {
        stage.host.run(|| {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.send_to(b"stop", (Ipv4Addr::new(172, 17, 0, ip), 53)).unwrap();
        });
        server.join().unwrap();
    }
}
