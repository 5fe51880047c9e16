//! The return path to transparent sockets: replies of backends to the client's address reach the relay on the host.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use socket2::Type;
use tempfile::TempDir;
use testkit::backend::TcpBackend;
use testkit::netns::Namespace;
use testkit::process::Output;
use testkit::require;
use testkit::rproxy::{Standalone, netns_setup};
use testkit::suite::Case;
use testkit::topology::{
    self, BRIDGE, BRIDGE_V4, BRIDGE_V6, CLIENT_V4, CLIENT_V6, CONTAINER_V4, CONTAINER_V6, HOST_V4, HOST_V6,
};
use testkit::transparent::{TransparentRelay, bound};
use testkit::{PATIENCE, eventually, udp};

use super::stage::{
    Backend, SILENCE, Stage, assert_reaches, assert_reaches_udp, assert_same, case, for_each_firewall, serve,
};

/// The port of the relay.
const RELAYED: u16 = 8080;
/// The port of the backend.
const SERVED: u16 = 80;
/// A container of netns-setup's own network.
const WEB_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xd0c, 0, 0, 0, 0, 0, 2);

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    cases.extend(for_each_firewall("a backend answers the client's address", answers));
    cases.extend(for_each_firewall("rproxy is the client", rproxy_as_client));
    cases.extend(for_each_firewall("what belongs to no transparent socket is forwarded", forwarded));
    cases.extend(for_each_firewall("a transparent socket that closed first", closed_first));
    cases.extend(for_each_firewall("the bits of a mark that others set survive", other_marks));
    cases.extend(for_each_firewall("netns-setup's own bridge", own_bridge));
    cases.extend(for_each_firewall("what was there before is there afterwards", undone));
    cases.extend(for_each_firewall("parts that somebody removed", removed_parts));
    cases.extend(for_each_firewall("another interface is added", added));
    cases.extend([
        case("the usual interfaces", usual),
        case("an interface that vanishes", vanished),
        case("rules of others that prevail are named", prevailing),
        case("routes of others in the table are named", routes_of_others),
        case("bad input for transparent sockets", bad_input),
        case("a host without IPv6", without_ipv6),
        case("a firewall that cannot match transparent sockets", without_socket_match),
    ]);
    cases
}

/// A bridge of somebody else, with a container whose server names its clients.
struct Site<'a> {
    stage: &'a Stage,
    container: Namespace,
    _servers: (TcpBackend, udp::Backend),
    _relays: Vec<TransparentRelay>,
}

impl<'a> Site<'a> {
    fn new(stage: &'a Stage) -> Self {
        stage.host.ip(&format!("link add name {BRIDGE} type bridge stp_state 0"));
        stage.host.address(BRIDGE, &format!("{BRIDGE_V4}/16"));
        stage.host.address(BRIDGE, &format!("{BRIDGE_V6}/64"));
        stage.host.ip(&format!("link set dev {BRIDGE} up"));
        let container = topology::add_container(&stage.host, CONTAINER_V4, CONTAINER_V6);
        let servers = naming(&container);
        let relays = relays(stage, CONTAINER_V6);
        Self { stage, container, _servers: servers, _relays: relays }
    }

    /// Makes the host a router, and the client know it.
    fn forward(&self) {
        self.stage.host("sysctl -w net.ipv4.ip_forward=1");
        self.stage.host("sysctl -w net.ipv6.conf.all.forwarding=1");
        self.stage.client.ip(&format!("-6 route add fd00:172:17::/64 via {HOST_V6}"));
    }
}

/// A server that answers with the address of its client.
fn naming(container: &Namespace) -> (TcpBackend, udp::Backend) {
    let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), SERVED);
    container.run(|| {
        let name = |mut stream: &TcpStream| {
            stream.read_exact(&mut [0])?;
            write!(stream, "{}", stream.peer_addr()?.ip().to_canonical())
        };
        let datagrams = udp::Backend::serve(UdpSocket::bind(any).unwrap(), |socket, _, from| {
            socket.send_to(from.ip().to_canonical().to_string().as_bytes(), from).ok();
        });
        (TcpBackend::serve(TcpListener::bind(any).unwrap(), name), datagrams)
    })
}

fn relays(stage: &Stage, container_v6: Ipv6Addr) -> Vec<TransparentRelay> {
    let pairs: [(IpAddr, IpAddr); 2] =
        [(HOST_V4.into(), CONTAINER_V4.into()), (HOST_V6.into(), container_v6.into())];
    let start = |(host, container)| {
        let (listen, backend) = (SocketAddr::new(host, RELAYED), SocketAddr::new(container, SERVED));
        TransparentRelay::start(&stage.host, listen, backend)
    };
    pairs.into_iter().map(start).collect()
}

/// What the backend calls the client that reaches it through the relay; `None` if no reply comes back.
fn name_by_tcp(stage: &Stage, host: IpAddr, patience: Duration) -> Option<String> {
    stage.client.run(|| {
        let mut stream = TcpStream::connect_timeout(&(host, RELAYED).into(), PATIENCE).unwrap();
        stream.set_read_timeout(Some(patience)).unwrap();
        stream.write_all(b"?").unwrap();
        let mut name = String::new();
        stream.read_to_string(&mut name).ok().filter(|_| !name.is_empty())?;
        Some(name)
    })
}

fn name_by_udp(stage: &Stage, host: IpAddr, patience: Duration) -> Option<String> {
    stage.client.run(|| {
        let any: IpAddr =
            if host.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = UdpSocket::bind((any, 0)).unwrap();
        socket.set_read_timeout(Some(patience)).unwrap();
        socket.connect((host, RELAYED)).unwrap();
        socket.send(b"?").unwrap();
        let mut name = [0; 64];
        let len = socket.recv(&mut name).ok()?;
        Some(String::from_utf8_lossy(&name[..len]).into_owned())
    })
}

const PATHS: [(IpAddr, IpAddr); 2] =
    [(IpAddr::V4(HOST_V4), IpAddr::V4(CLIENT_V4)), (IpAddr::V6(HOST_V6), IpAddr::V6(CLIENT_V6))];

#[track_caller]
fn assert_answered(stage: &Stage, what: &str) {
    for (host, client) in PATHS {
        assert_eq!(name_by_tcp(stage, host, PATIENCE), Some(client.to_string()), "tcp, {what}");
        assert_eq!(name_by_udp(stage, host, PATIENCE), Some(client.to_string()), "udp, {what}");
    }
}

#[track_caller]
fn assert_unanswered(stage: &Stage, what: &str) {
    for (host, _) in PATHS {
        assert_eq!(name_by_tcp(stage, host, SILENCE), None, "tcp, {what}");
        assert_eq!(name_by_udp(stage, host, SILENCE), None, "udp, {what}");
    }
}

/// An error of the backend's host, which names the socket in the packet that it quotes, arrives as well.
fn assert_refused(stage: &Stage) {
    for (client, container) in
        [(IpAddr::V4(CLIENT_V4), IpAddr::V4(CONTAINER_V4)), (CLIENT_V6.into(), CONTAINER_V6.into())]
    {
        let socket = stage.host.run(|| bound((client, 5555).into(), Type::DGRAM).unwrap());
        let socket = UdpSocket::from(socket);
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.connect((container, 1)).unwrap();
        socket.send(b"?").unwrap();
        let refused = socket.recv(&mut [0]).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused, "{container}");
    }
}

/// `transparent up` with a firewall.
fn up(backend: Backend) -> String {
    format!("transparent up --interface {BRIDGE} {}", backend.option())
}

fn answers(stage: &Stage, backend: Backend) {
    let _site = Site::new(stage);
    assert_unanswered(stage, "before");
    let said = stage.ok(&up(backend));
    assert!(said.contains("from docker0 (IPv4 and IPv6"), "{said}");
    // With `src_valid_mark`, the kernel also applies the rules for the mark to the return path to the source, which
    // strict reverse path filtering compares. Loose filtering and none check that it is no local address.
    for (filter, valid_mark) in [(0, 0), (1, 0), (1, 1), (2, 1), (0, 1)] {
        for name in ["all", BRIDGE] {
            stage.host(&format!("sysctl -w net.ipv4.conf.{name}.rp_filter={filter}"));
            stage.host(&format!("sysctl -w net.ipv4.conf.{name}.src_valid_mark={valid_mark}"));
        }
        assert_answered(stage, &format!("rp_filter {filter}, src_valid_mark {valid_mark}"));
    }
    assert_eq!(stage.ok("transparent check"), "everything is as it should be\n");
    assert_refused(stage);
    // firewalld compares the return path, too, and looks at the mark.
    stage.host("nft add table inet others");
    stage.host("nft add chain inet others rpfilter { type filter hook prerouting priority 10 ; }");
    stage.host("nft add rule inet others rpfilter fib saddr . mark . iif oif missing drop");
    assert_answered(stage, "with a firewall that filters by the return path");
    stage.host("nft delete table inet others");
    stage.ok("transparent down");
    assert_unanswered(stage, "after");
}

fn rproxy_as_client(stage: &Stage, backend: Backend) {
    stage.ok(&format!("up --transparent --subnet6 fd00:d0c::/64 {}", backend.option()));
    let web = stage.attach("web");
    let _servers = naming(&web);
    let pairs: [(IpAddr, IpAddr); 2] =
        [(HOST_V4.into(), CONTAINER_V4.into()), (HOST_V6.into(), WEB_V6.into())];
    let relays = pairs.map(|(host, container)| {
        let (host, to) = (SocketAddr::new(host, RELAYED), SocketAddr::new(container, SERVED));
        let (host, to) = (host.to_string(), to.to_string());
        let words = ["--proto", "tcp+udp", "--host", &host, "--to", &to, "--source", "client-only"];
        Standalone::start_in(&stage.host, &words)
    });
    assert_answered(stage, "by rproxy");
    stage.ok("transparent down");
    assert_unanswered(stage, "by rproxy");
    drop(relays);
}

/// Even if a transparent program listens on every address.
fn forwarded(stage: &Stage, backend: Backend) {
    const ELSEWHERE: u16 = 9000;
    let site = Site::new(stage);
    site.forward();
    stage.ok(&up(backend));
    let _servers = [serve(&site.container, 81), serve(&stage.client, ELSEWHERE)];
    let _listeners = stage.host.run(|| {
        [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()].map(|ip: IpAddr| {
            let listener = bound((ip, ELSEWHERE).into(), Type::STREAM).unwrap();
            listener.listen(8).unwrap();
            [listener, bound((ip, ELSEWHERE).into(), Type::DGRAM).unwrap()]
        })
    });
    for container in [IpAddr::V4(CONTAINER_V4), IpAddr::V6(CONTAINER_V6)] {
        assert_reaches(&stage.client, container, 81);
        assert_reaches_udp(&stage.client, container, 81);
    }
    for client in [IpAddr::V4(CLIENT_V4), IpAddr::V6(CLIENT_V6)] {
        assert_reaches(&site.container, client, ELSEWHERE);
        assert_reaches_udp(&site.container, client, ELSEWHERE);
    }
    assert_answered(stage, "with a router");
}

/// The kernel keeps only a part of a socket that waits for the backend's end of stream, and nothing may reach the
/// client instead.
fn closed_first(stage: &Stage, backend: Backend) {
    let site = Site::new(stage);
    site.forward();
    stage.host("nft add table inet count");
    stage.host("nft add chain inet count forward { type filter hook forward priority 0 ; }");
    stage.host(&format!("nft add rule inet count forward iifname {BRIDGE} counter"));
    stage.ok(&up(backend));
    let (closing, close) = mpsc::channel::<()>();
    let (seen, sees) = mpsc::channel();
    let close = std::sync::Mutex::new(close);
    let listener = site.container.run(|| TcpListener::bind(("::", 82)).unwrap());
    let server = TcpBackend::serve(listener, move |mut stream| {
        stream.read_to_end(&mut Vec::new())?;
        seen.send(()).ok();
        close.lock().unwrap().recv().ok();
        Ok(())
    });
    for (host, container) in
        [(IpAddr::V4(HOST_V4), IpAddr::V4(CONTAINER_V4)), (HOST_V6.into(), CONTAINER_V6.into())]
    {
        let listen = SocketAddr::new(host, 8082);
        let _relay = TransparentRelay::start(&stage.host, listen, SocketAddr::new(container, 82));
        let client = stage.client.run(|| TcpStream::connect(listen).unwrap());
        client.shutdown(Shutdown::Write).unwrap();
        sees.recv_timeout(PATIENCE).unwrap();
        // The relay's socket is gone for the process, and the kernel waits for the backend.
        let state = if host.is_ipv4() { "-4" } else { "-6" };
        eventually("the relay has closed its socket", || {
            stage.host(&format!("ss {state} -Htan state fin-wait-2 dport = 82")).lines().count() == 1
                && stage
                    .host(&format!("ss {state} -Htanp state fin-wait-2 dport = 82"))
                    .find("users:")
                    .is_none()
        });
        closing.send(()).unwrap();
        let open = "state close-wait state last-ack state established sport = 82";
        eventually("the backend's end of stream is acknowledged", || {
            site.container.command(&format!("ss -Htan {open}")).success().is_empty()
        });
    }
    drop(server);
    let counted = stage.host("nft list chain inet count forward");
    assert!(counted.contains("packets 0 "), "{counted}");
    stage.host("nft delete table inet count");
}

fn other_marks(stage: &Stage, backend: Backend) {
    let _site = Site::new(stage);
    stage.host("nft add table inet others");
    stage.host("nft add chain inet others first { type filter hook prerouting priority -300 ; }");
    stage.host(&format!("nft add rule inet others first iifname {BRIDGE} meta mark set 0xfff2e0ff"));
    stage.host("nft add chain inet others last { type filter hook input priority 0 ; }");
    stage.host(&format!(
        "nft add rule inet others last iifname {BRIDGE} meta l4proto {{ tcp, udp }} meta mark != 0xfff2f0ff counter drop"
    ));
    stage.ok(&up(backend));
    assert_answered(stage, "with marks of others");
    stage.host("nft delete table inet others");
}

fn own_bridge(stage: &Stage, backend: Backend) {
    let before = stage.dump();
    let command = format!("up --transparent --subnet6 fd00:d0c::/64 {}", backend.option());
    let plan = stage.ok(&format!("{command} --dry-run"));
    for part in [
        "ip rule add priority 50 iif docker0 fwmark 0x1000/0x1000 lookup 4096",
        "ip -6 route add local default",
    ] {
        assert!(plan.contains(part), "{plan}");
    }
    assert_same(&stage.dump(), &before, "a dry run");
    let report: serde_json::Value = serde_json::from_str(&stage.ok(&format!("{command} --json"))).unwrap();
    assert_eq!(report["result"]["transparent"]["interfaces"], serde_json::json!(["docker0"]));
    assert_eq!(report["warnings"], serde_json::json!([]));
    let web = stage.attach("web");
    let (_servers, _relays) = (naming(&web), relays(stage, WEB_V6));
    assert_answered(stage, "on a bridge of netns-setup");
    for check in ["check", "transparent check --interface docker0"] {
        assert_eq!(stage.ok(check), "everything is as it should be\n");
    }
    // Without the option, the second `up` leaves it as it is.
    let up = stage.dump();
    stage.ok("up --subnet6 fd00:d0c::/64");
    assert_same(&stage.dump(), &up, "the second time");

    stage.host("ip rule delete priority 50");
    stage.host("ip -6 route flush table 4096");
    let (code, _) = stage.fails("check");
    assert_eq!(code, 1);
    stage.ok("repair");
    assert_same(&stage.dump(), &up, "repaired");
    // It can be had without the network, and back.
    stage.ok("transparent down");
    assert_eq!(stage.ok("check"), "everything is as it should be\n");
    assert_unanswered(stage, "taken down");
    stage.ok("up --transparent --subnet6 fd00:d0c::/64");
    assert_answered(stage, "set up again");
    stage.ok("down");
    assert_same(&stage.dump(), &before, "after all");
}

/// Everything that a user would compare, in the tools' own words.
fn everything(stage: &Stage) -> String {
    let mut text = String::new();
    for line in [
        "nft -s list ruleset",
        "iptables-save",
        "ip6tables-save",
        "iptables-legacy-save",
        "ip6tables-legacy-save",
        "ip rule",
        "ip -6 rule",
        "ip route show table all",
        "ip -6 route show table all",
        "sysctl -a --pattern ^net[.]ipv[46][.](conf|ip_forward)",
    ] {
        let listed = stage.host(line);
        // Counters and times are those of the moment, and link-local addresses come with the kernel's timers.
        let lines = listed.lines().filter(|line| !line.starts_with('#') && !line.contains("fe80::"));
        let plain = |line: &str| line.split(" [").next().unwrap_or_default().to_owned();
        lines.for_each(|listed| text.push_str(&format!("{line}: {}\n", plain(listed))));
    }
    text
}

fn undone(stage: &Stage, backend: Backend) {
    let _site = Site::new(stage);
    // The tools leave empty tables behind the first time.
    stage.ok(&up(backend));
    stage.ok("transparent down");
    for line in [
        "ip rule add priority 49 fwmark 0x2000/0x2000 lookup 77",
        "ip rule add priority 50 fwmark 0x4000/0x4000 lookup 77",
        "ip -6 rule add priority 51 iif docker0 lookup 77",
        "ip route add local default dev lo table 77",
        "ip -6 route add local default dev lo table 4097",
        "iptables -t mangle -A PREROUTING -i docker0 -m socket --transparent -j MARK --set-xmark 0x1/0x1",
        "iptables -t mangle -A PREROUTING -j ACCEPT",
        "ip6tables -t mangle -A PREROUTING -i eth0 -j RETURN",
        "sysctl -w net.ipv4.conf.docker0.rp_filter=1",
        "nft add table inet netns-setup-transparent",
    ] {
        stage.host(line);
    }
    let before = everything(stage);
    stage.ok(&up(backend));
    assert_answered(stage, "beside rules of others");
    let there = everything(stage);
    assert_ne!(there, before);
    stage.ok(&up(backend));
    assert_same(&everything(stage), &there, "the second time");
    stage.ok("transparent down");
    assert_same(&everything(stage), &before, "after all");
    assert_eq!(stage.ok("transparent down"), "nothing was set up\n");
    assert_same(&everything(stage), &before, "after all, again");
    // What a lost state has left is taken over, also without a copy.
    stage.ok(&up(backend));
    std::fs::remove_file(stage.state_dir().join("state.json")).unwrap();
    std::fs::remove_dir_all("/run/netns-setup-registry").unwrap();
    stage.ok(&up(backend));
    assert_same(&everything(stage), &there, "with a new state");
    stage.ok("transparent down");
    assert_same(&everything(stage), &before, "after a lost state");
}

fn removed_parts(stage: &Stage, backend: Backend) {
    let _site = Site::new(stage);
    let marks: &[&str] = match backend {
        Backend::Nft => &["nft delete table inet netns-setup_transparent"],
        _ => &["iptables -t mangle -F PREROUTING", "ip6tables -t mangle -F PREROUTING"],
    };
    let parts = [
        "ip rule delete priority 50",
        "ip -6 rule delete priority 50",
        "ip route flush table 4096",
        "ip -6 route flush table 4096",
    ];
    let parts: Vec<&str> = parts.iter().chain(marks).copied().collect();
    let before = stage.dump();
    stage.ok(&up(backend));
    let there = stage.dump();
    for part in &parts {
        stage.host(part);
        for check in ["check", "transparent check"] {
            let output = stage.run(check);
            assert_eq!(output.status.code(), Some(1), "{part}: {output:#?}");
            assert_eq!(output.stdout.lines().count(), 1, "{part}: {output:#?}");
            assert!(
                output.stderr.contains("1 difference found: run `netns-setup repair --state-dir "),
                "{part}: {output:#?}"
            );
        }
        stage.ok("repair");
        assert_same(&stage.dump(), &there, part);
        stage.host(part);
        stage.ok(&up(backend));
        assert_same(&stage.dump(), &there, part);
        stage.host(part);
        stage.ok("transparent down");
        assert_same(&stage.dump(), &before, part);
        stage.ok(&up(backend));
    }
    // Somebody has put the routes back in another way.
    for family in ["-4", "-6"] {
        stage.host(&format!("ip {family} route flush table 4096"));
        stage.host(&format!("ip {family} route add local default dev lo table 4096 proto static metric 7"));
    }
    stage.ok("transparent check");
    stage.ok("transparent down");
    assert_same(&stage.dump(), &before, "other routes");
    stage.ok(&up(backend));
    parts.iter().for_each(|part| drop(stage.host(part)));
    let output = stage.run("transparent check");
    assert_eq!(output.stdout.lines().count(), parts.len(), "{output:#?}");
    stage.ok("transparent down");
    assert_same(&stage.dump(), &before, "all parts");
}

fn added(stage: &Stage, backend: Backend) {
    let _site = Site::new(stage);
    stage.host("ip link add name br7 address 02:00:00:00:00:07 type bridge");
    let before = stage.dump();
    stage.ok(&up(backend));
    let one = stage.dump();
    let said = stage.ok("transparent up --interface br7");
    assert!(said.contains("from br7, docker0 ("), "{said}");
    assert_answered(stage, "with another interface");
    stage.ok("transparent check --interface docker0 br7");
    stage.ok("transparent down --interface br7");
    assert_same(&stage.dump(), &one, "without the other");
    assert_answered(stage, "without the other");
    let said = stage.ok("transparent down --interface br7");
    assert_eq!(said, "nothing was set up for br7\n");
    let (code, message) = stage.fails("transparent check --interface br7 --interface docker0");
    assert_eq!(code, 1, "{message}");
    assert!(message.contains("run `netns-setup transparent up --interface br7 --state-dir "), "{message}");
    // What else differs is listed, too.
    stage.host("ip rule delete priority 50");
    let output = stage.run("transparent check --interface br7");
    assert_eq!(output.stdout.lines().count(), 2, "{output:#?}");
    stage.ok("repair");
    stage.ok("transparent down --interface docker0");
    assert_same(&stage.dump(), &before, "after all");
}

fn usual(stage: &Stage) {
    for name in [BRIDGE, "br-0123456789ab", "br-lan", "br-0123456789xy"] {
        stage.host(&format!("ip link add name {name} type bridge"));
    }
    let said = stage.ok("transparent up");
    assert!(said.contains("from br-0123456789ab, docker0 ("), "{said}");
    stage.ok("transparent down");
    stage.host("ip link delete docker0");
    stage.ok("up --bridge own0");
    let said = stage.ok("transparent up");
    assert!(said.contains("from br-0123456789ab, own0 ("), "{said}");
}

fn vanished(stage: &Stage) {
    stage.host("ip link add name br7 address 02:00:00:00:00:07 type bridge");
    stage.host("ip link add name br8 type bridge");
    stage.host("ip link set br8 up");
    let before = stage.dump();
    stage.ok("transparent up --interface br7 br8");
    let both = stage.dump();
    stage.host("ip link delete br7");
    let output = stage.run("transparent check");
    assert_eq!(output.status.code(), Some(1), "{output:#?}");
    let command =
        format!("netns-setup transparent down --interface br7 --state-dir {}", stage.state_dir().display());
    let found = format!("the interface br7 is gone: run `{command}` if it does not come back\n");
    assert_eq!(output.stdout, found);
    assert!(output.stderr.contains("1 difference found that netns-setup cannot repair"), "{output:#?}");
    stage.ok("transparent down --interface br7");
    assert_eq!(stage.ok("transparent check"), "everything is as it should be\n");
    stage.host("ip link add name br7 address 02:00:00:00:00:07 type bridge");
    stage.ok("transparent up --interface br7");
    assert_same(&stage.dump(), &both, "an interface that comes back");
    stage.host("ip link delete br7");
    stage.ok("transparent down");
    stage.host("ip link add name br7 address 02:00:00:00:00:07 type bridge");
    assert_same(&stage.dump(), &before, "after all");
}

fn prevailing(stage: &Stage) {
    let _site = Site::new(stage);
    // The kernel keeps the order of rules of one priority.
    stage.host("ip rule add priority 50 from all lookup main");
    let output = stage.run(&up(Backend::Nft));
    let expected = "the IPv4 rule `50: from all lookup main` takes replies first";
    assert!(output.stderr.contains(expected), "{output:#?}");
    assert_eq!(name_by_udp(stage, HOST_V4.into(), SILENCE), None, "the warning is true");
    assert!(name_by_udp(stage, HOST_V6.into(), PATIENCE).is_some(), "IPv6 is not concerned");
    stage.host("ip rule delete priority 50 from all lookup main");
    assert_answered(stage, "without the rule of others");
    named_rules(stage);
}

fn named_rules(stage: &Stage) {
    const FIRST: &str = "takes replies first";
    const BIT: &str = "is for marks with the bit 0x1000";
    for (priority, rule, named) in [
        (9, "fwmark 1 lookup 7", None),
        (9, "fwmark 0x1001/0x1001 lookup 7", Some(FIRST)),
        (9, "fwmark 0x2000/0x2000 lookup 7", Some(FIRST)),
        (9, "fwmark 0x2000/0x3000 lookup 7", None),
        (9, "not fwmark 1 lookup 7", Some(FIRST)),
        (9, "iif eth0 lookup main", None),
        (9, "iif docker0 lookup main", Some(FIRST)),
        (9, "oif docker0 lookup main", None),
        (9, "from 10.0.0.0/8 lookup 7", None),
        (9, "from 172.17.0.0/24 lookup 7", Some(FIRST)),
        (9, "to 10.0.0.0/8 lookup main", Some(FIRST)),
        (9, "lookup local", None),
        (9, "lookup main suppress_prefixlength 0", Some(FIRST)),
        (9, "blackhole", Some(FIRST)),
        (9, "goto 32766", Some(FIRST)),
        (9, "goto 20", None),
        (900, "fwmark 0x1001 lookup 7", Some(BIT)),
        (900, "fwmark 0x3000/0x3000 lookup 7", Some(BIT)),
        (900, "fwmark 0x2000/0x3000 lookup 7", None),
        (900, "iif eth0 fwmark 0x1000/0x1000 lookup 7", None),
        (900, "fwmark 51820 lookup 7", None),
    ] {
        stage.host(&format!("ip rule add priority {priority} {rule}"));
        let output = stage.run("transparent check");
        let line = named.map(|part| (format!("the IPv4 rule `{priority}: "), part));
        let is_said = line.is_none_or(|(rule, part)| {
            output.stdout.lines().any(|line| line.starts_with(&rule) && line.contains(part))
        });
        assert!(is_said, "{rule}: {output:#?}");
        assert_eq!(output.stdout.lines().count(), 1, "{rule}: {output:#?}");
        assert_eq!(output.status.code(), Some(i32::from(named.is_some())), "{rule}: {output:#?}");
        stage.host(&format!("ip rule delete priority {priority}"));
    }
}

fn routes_of_others(stage: &Stage) {
    let _site = Site::new(stage);
    stage.ok(&up(Backend::Nft));
    stage.host("ip -6 route add fd00:10::/64 dev eth0 table 4096");
    let output = stage.run("transparent check");
    let way_out = "ip -6 route delete fd00:10::/64 dev eth0 table 4096";
    assert!(output.stdout.contains(&format!("remove it with `{way_out}`")), "{output:#?}");
    stage.ok("transparent down");
    let before = stage.dump();
    let (code, message) = stage.fails(&up(Backend::Nft));
    assert_eq!(code, 1);
    assert!(message.contains(&format!("remove it with `{way_out}`")), "{message}");
    assert_same(&stage.dump(), &before, "refused");
    stage.host(way_out);
    stage.ok(&up(Backend::Nft));
}

fn bad_input(stage: &Stage) {
    let _site = Site::new(stage);
    let before = stage.dump();
    let refused = |arguments: &str, expected: i32, part: &str| {
        let (code, message) = stage.fails(arguments);
        assert_eq!(code, expected, "{arguments}: {message}");
        assert!(message.contains(part), "{arguments}: {message}");
        assert_eq!(message.lines().count(), 1, "{arguments}: {message}");
        assert_same(&stage.dump(), &before, arguments);
    };
    refused("transparent", 2, "a command is missing");
    refused("transparent up --interface", 2, "--interface <NAME>");
    refused("transparent up --interface docker9", 2, "there is no such interface; choose from ");
    refused("transparent up --interface docker0 docker9", 2, "--interface docker9: ");
    refused("transparent up --interface lo", 2, "name the interface of other hosts or containers");
    refused("transparent up --interface veth0002", 2, "veth0002 is a port of docker0");
    refused("transparent up --interface a/b", 2, "not an interface name");
    refused("transparent up --interface all", 2, "not an interface name");
    refused("transparent check", 1, "run `netns-setup transparent up --state-dir ");
    assert_eq!(stage.ok("transparent down --interface docker9"), "nothing was set up for docker9\n");
    stage.ok("transparent up --firewall nft");
    let before = stage.dump();
    let (code, message) = stage.fails("transparent up --firewall iptables");
    assert!(code == 1 && message.contains("run `netns-setup transparent down --state-dir "), "{message}");
    assert_same(&stage.dump(), &before, "another firewall");
    stage.ok("transparent down");
    stage.host("ip link delete docker0");
    let (code, message) = stage.fails("transparent up");
    assert!(code == 2 && message.contains("name the backends' interface with --interface"), "{message}");
    let output = stage.run("transparent up --interface eth0 --firewall none");
    assert!(output.status.success(), "{output:#?}");
    assert!(
        output.stderr.contains("mark packets of transparent sockets with 0x1000/0x1000 yourself"),
        "{output:#?}"
    );
}

fn without_ipv6(stage: &Stage) {
    let _site = Site::new(stage);
    stage.host("sysctl -w net.ipv6.conf.lo.disable_ipv6=1");
    let before = stage.dump();
    let output = stage.run(&up(Backend::IptablesNft));
    assert!(output.status.success(), "{output:#?}");
    assert!(output.stderr.contains("net.ipv6.conf.lo.disable_ipv6 is 1: "), "{output:#?}");
    assert!(output.stdout.contains("from docker0 (IPv4,"), "{output:#?}");
    assert!(name_by_tcp(stage, HOST_V4.into(), PATIENCE).is_some());
    assert_eq!(stage.ok("transparent check"), "everything is as it should be\n");
    stage.host("sysctl -w net.ipv6.conf.lo.disable_ipv6=0");
    let found = stage.run("transparent check").stdout;
    assert!(found.contains("run `netns-setup transparent up --state-dir "), "{found}");
    stage.ok("transparent up");
    assert_answered(stage, "with IPv6");
    // The kernel removes the route with the addresses of the interface.
    stage.host("sysctl -w net.ipv6.conf.lo.disable_ipv6=1");
    let output = stage.run("repair");
    assert!(output.stdout.contains("IPv6 is off since"), "{output:#?}");
    stage.ok("transparent up");
    assert_eq!(stage.ok("transparent check"), "everything is as it should be\n");
    stage.ok("transparent down");
    assert_same(&stage.dump(), &before, "after all");
}

/// Stands for an older tool or kernel: it refuses what has to do with sockets.
fn deaf(name: &str, refusal: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let real = require::find(name).unwrap();
    let script = format!(
        "#!/bin/sh\ninput=$(cat)\ncase $input in *socket*) echo '{refusal}' >&2; exit 1;; esac\nprintf '%s\\n' \"$input\" | {} \"$@\"\n",
        real.display()
    );
    let file = dir.path().join(name);
    std::fs::write(&file, script).unwrap();
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o755)).unwrap();
    dir
}

fn run_with(stage: &Stage, tools: &[&TempDir], arguments: &str) -> Output {
    let mut command = Command::new(netns_setup());
    command.arg("--state-dir").arg(stage.state_dir()).args(arguments.split_whitespace());
    let path = std::env::var("PATH").unwrap_or_default();
    let tools: Vec<_> = tools.iter().map(|dir| dir.path().display().to_string()).collect();
    command.env("PATH", format!("{}:{path}", tools.join(":")));
    stage.host.spawn(command).into_output()
}

fn without_socket_match(stage: &Stage) {
    let _site = Site::new(stage);
    let nft = deaf("nft", "Error: Could not process rule: No such file or directory");
    let iptables =
        deaf("iptables-restore", "Extension socket revision 0 not supported, missing kernel module?");
    let before = stage.dump();
    for (firewall, module) in [
        ("nft", "CONFIG_NFT_SOCKET and CONFIG_NFT_TPROXY"),
        ("iptables", "CONFIG_NETFILTER_XT_MATCH_SOCKET of the kernel (module xt_socket)"),
        ("auto", "CONFIG_NFT_SOCKET and CONFIG_NFT_TPROXY"),
    ] {
        for command in [
            format!("transparent up --firewall {firewall}"),
            format!("up --bridge own0 --subnet 172.30.0.0/16 --transparent --firewall {firewall}"),
        ] {
            let output = run_with(stage, &[&nft, &iptables], &command);
            assert_eq!(output.status.code(), Some(1), "{command}: {output:#?}");
            assert!(output.stderr.contains(module), "{command}: {output:#?}");
            assert_eq!(output.stderr.lines().count(), 1, "{command}: {output:#?}");
            assert_same(&stage.dump(), &before, &command);
        }
    }
    // The other one is good enough if the choice is free.
    let output = run_with(stage, &[&nft], "transparent up");
    assert!(output.stdout.contains("by iptables"), "{output:#?}");
    assert_answered(stage, "with the other firewall");
}
