//! Interfaces as hosts: their addresses are listened at, as they come and go.

mod hindered;

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use testkit::backend::{self, TcpBackend};
use testkit::client;
use testkit::controlled::Controlled;
use testkit::process::{Process, Stream};
use testkit::require::Need;
use testkit::rproxy::{self, Standalone};
use testkit::suite::Case;
use testkit::topology::{CONTAINER_V4, HOST_V4, HOST_V6, Topology};
use testkit::upgradable::Successors;
use testkit::{PATIENCE, eventually, udp};

/// A second address of the host.
const SECOND_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 21);

/// The index of `eth0` in the namespaces of the client and the host, which only have `lo` before it.
const ETH0: u32 = 2;

pub(crate) fn cases() -> Vec<Case> {
    let needs = &[Need::Root, Need::Program("ip"), Need::Program("ss")];
    let case = |name: &str, body: fn()| Case::new(name, body).needs(needs);
    let mut cases = vec![
        case("an address comes and goes, and others are not touched", followed),
        case("an address is bound once it is known to be no duplicate", duplicates),
        case("link-local addresses", link_local),
        case("an interface appears, goes, comes back, and gets another name", appears),
        case("a port range, for all protocols", ranges),
        case("flows end with their address", flows),
        case("ctl adds, lists, retargets and removes an interface by its name", controlled),
        case("a confined process follows interfaces, also those of later requests", confined),
        case("a reload brings an interface", reloaded),
        case("an upgrade keeps connections and flows, and follows on", upgraded),
        case("an address that others have is served when they leave it", taken),
        case("an address that is the backend's is not served", looped),
        case("addresses are listed again if messages are lost", lost),
        case("an interface whose ports cannot be the same everywhere", refused),
    ];
    cases.extend(testkit::modules![hindered]);
    cases
}

/// The test network with an echo server in the container.
struct Stage {
    net: Topology,
    _echo: TcpBackend,
    _dns: udp::Backend,
}

const TO_ECHO: [&str; 4] = ["--host", "%eth0:80", "--to", "172.17.0.2:80"];

impl Stage {
    fn new() -> Self {
        let net = Topology::new();
        let listener = net.container.run(|| TcpListener::bind((CONTAINER_V4, 80)).unwrap());
        let echo = TcpBackend::serve(listener, backend::echo);
        let dns = udp::Backend::naming(udp::bind_in(&net.container, (CONTAINER_V4, 53)));
        Self { net, _echo: echo, _dns: dns }
    }

    fn start(&self, arguments: &[&str]) -> Standalone {
        Standalone::start_in(&self.net.host, arguments)
    }

    fn connect(&self, addr: impl Into<SocketAddr>) -> Option<TcpStream> {
        let addr = addr.into();
        let stream = self.net.client.run(|| TcpStream::connect_timeout(&addr, PATIENCE)).ok()?;
        Some(client::patient(stream))
    }

    fn serves(&self, addr: impl Into<SocketAddr>) {
        let addr = addr.into();
        client::ping(&self.connect(addr).unwrap_or_else(|| panic!("{addr} is not served")));
    }

    /// The listening sockets of the host, with their inodes: of TCP, or `u` for UDP.
    fn listeners(&self, kind: &str) -> BTreeMap<String, String> {
        let listed = self.net.host.command(&format!("ss -H{kind}lne")).success();
        let row = |line: &str| {
            let mut fields = line.split_ascii_whitespace();
            let place = fields.nth(3)?.to_owned();
            Some((place, fields.find(|field| field.starts_with("ino:"))?.to_owned()))
        };
        listed.lines().filter_map(row).collect()
    }

    fn listens(&self, place: &str) -> bool {
        self.listeners("t").contains_key(place)
    }

    fn until_listens(&self, place: &str) {
        eventually(&format!("{place} is listened at"), || self.listens(place));
    }

    fn until_left(&self, place: &str) {
        eventually(&format!("{place} is left"), || !self.listens(place));
    }
}

fn says(process: &Process, part: &str) -> String {
    process.wait_for_line(Stream::Stderr, |line| line.contains(part))
}

fn list(server: &Controlled) -> Value {
    serde_json::from_str(&server.ctl(&["list", "--json"]).success()).unwrap()
}

fn followed() {
    let stage = Stage::new();
    let host = &stage.net.host;
    let proxy = stage.start(&TO_ECHO);
    let ready = proxy.process.captured(Stream::Stdout);
    assert!(ready.contains("80/tcp -> 10.0.0.11:80") && ready.contains("[fd00:10::11]:80"), "{ready}");
    let stays = stage.connect((HOST_V4, 80)).unwrap();
    stage.serves((HOST_V6, 80));
    assert!(!stage.listens("172.17.0.1:80"), "it is the address of another interface");
    let before = stage.listeners("t");
    host.address("eth0", "10.0.0.21/24");
    stage.until_listens("10.0.0.21:80");
    stage.serves((SECOND_V4, 80));
    // The same address with another prefix is one address.
    host.address("eth0", "10.0.0.21/25");
    host.ip("address del 10.0.0.21/24 dev eth0");
    host.address("eth0", "10.0.0.22/24");
    stage.until_listens("10.0.0.22:80");
    stage.serves((SECOND_V4, 80));
    host.ip("address del 10.0.0.21/25 dev eth0");
    stage.until_left("10.0.0.21:80");
    says(&proxy.process, "no longer serving at an address of the interface");
    for (place, inode) in before {
        assert_eq!(stage.listeners("t").get(&place), Some(&inode), "{place}");
    }
    client::ping(&stays);
    // An IPv6 address that is deprecated is one.
    host.ip("address add fd00:10::21/64 dev eth0 nodad preferred_lft 0");
    stage.until_listens("[fd00:10::21]:80");
}

fn duplicates() {
    let stage = Stage::new();
    let host = &stage.net.host;
    stage.net.client.address("eth0", "fd00:10::77/64");
    host.command("sysctl -qw net.ipv6.conf.eth0.accept_dad=1").success();
    let proxy = stage.start(&TO_ECHO);
    host.ip("address add fd00:10::77/64 dev eth0");
    host.ip("address add fd00:10::78/64 dev eth0");
    stage.until_listens("[fd00:10::78]:80");
    eventually("the duplicate is found", || {
        host.ip("-6 address show dev eth0 dadfailed").contains("fd00:10::77/64")
    });
    host.address("eth0", "10.0.0.21/24");
    stage.until_listens("10.0.0.21:80");
    assert!(!stage.listens("[fd00:10::77]:80"));
    let log = proxy.process.captured(Stream::Stderr);
    assert!(!log.contains("is not served"), "it is not tried before: {log}");
}

fn link_local() {
    let stage = Stage::new();
    let host = &stage.net.host;
    host.address("eth0", "fe80::aa/64");
    let server = Controlled::start_in(host, &["--sandbox", "strict"]);
    server.ctl(&["add", "--host", "eth0:80", "--to", "172.17.0.2:80"]).success();
    let link_local = |last: u16, port: u16| {
        SocketAddr::from(SocketAddrV6::new(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, last), port, 0, ETH0))
    };
    stage.serves(link_local(0xaa, 80));
    host.address("eth0", "fe80::bb/64");
    stage.until_listens("[fe80::bb]%eth0:80");
    stage.serves(link_local(0xbb, 80));
    // The confined process finds the interface of an address by its name, too.
    let request = json!({ "v": 1, "do": { "add": { "mappings": [
        { "host": "[fe80::aa%eth0]", "host_ports": "81", "to": "172.17.0.2", "to_ports": "80" },
    ] } } });
    let answer = server.connect().ask(&request);
    assert!(answer["ok"].is_object(), "{answer}");
    stage.serves(link_local(0xaa, 81));
    // A connection and a flow tell the interface.
    let stays = stage.connect(link_local(0xaa, 80)).unwrap();
    client::ping(&stays);
    server.ctl(&["add", "--proto", "udp", "--host", "%eth0:53", "--to", "172.17.0.2:53"]).success();
    let asking = stage.net.client.run(|| udp::client(Ipv6Addr::UNSPECIFIED));
    udp::ask(&asking, link_local(0xaa, 53), b"who");
    for mapping in ["%eth0:80/tcp", "%eth0:53/udp"] {
        let listed = server.json(&["connections", "--mapping", mapping]);
        let hosts: Vec<&Value> =
            listed["connections"].as_array().unwrap().iter().map(|one| &one["host"]).collect();
        let place = format!("[fe80::aa%{ETH0}]:{}", if mapping.ends_with("udp") { 53 } else { 80 });
        assert!(hosts.contains(&&json!(place)), "{place}: {listed}");
    }
}

fn appears() {
    let stage = Stage::new();
    let host = &stage.net.host;
    let process = &host.spawn(rproxy::command(&["--host", "%lan0:80", "--to", "172.17.0.2:80"]));
    process.wait_for_line(Stream::Stdout, |line| line == "80/tcp -> %lan0:80");
    let said = says(process, "there is no interface lan0");
    assert!(said.contains("eth0, docker0"), "{said}");
    let create = || {
        host.ip("link add name lan0 type bridge");
        host.address("lan0", "10.9.0.1/24");
    };
    let missing = |count: usize| {
        process.wait_for_lines(Stream::Stderr, count, |line| line.contains("there is no interface lan0"));
    };
    create();
    stage.until_listens("10.9.0.1:80");
    host.ip("link del lan0");
    stage.until_left("10.9.0.1:80");
    missing(2);
    create();
    stage.until_listens("10.9.0.1:80");
    host.ip("link set dev lan0 name lan1");
    stage.until_left("10.9.0.1:80");
    missing(3);
    let said = process.captured(Stream::Stderr);
    assert!(said.contains("did you mean lan1?"), "{said}");
    host.ip("link set dev lan1 name lan0");
    stage.until_listens("10.9.0.1:80");
    host.ip("address flush dev lan0");
    stage.until_left("10.9.0.1:80");
    says(process, "the interface lan0 has no address");
    // The loopback interface is one, too.
    let _loopback = stage.start(&["--host", "lo:80", "--to", "172.17.0.2:80"]);
    assert!(stage.listens("127.0.0.1:80") && stage.listens("[::1]:80"));
}

fn ranges() {
    let stage = Stage::new();
    let arguments = ["--proto", "tcp+udp", "--host", "%eth0:8000-8001", "--to", "172.17.0.2:80-81"];
    let server = Controlled::start_in(&stage.net.host, &arguments);
    stage.net.host.address("eth0", "10.0.0.21/24");
    stage.until_listens("10.0.0.21:8001");
    for ip in ["10.0.0.11", "10.0.0.21", "[fd00:10::11]"] {
        for (kind, port) in [("t", 8000), ("t", 8001), ("u", 8000), ("u", 8001)] {
            assert!(stage.listeners(kind).contains_key(&format!("{ip}:{port}")), "{ip}:{port} {kind}");
        }
    }
    stage.serves((SECOND_V4, 8000));
    let mapping = &list(&server)["mappings"][0];
    assert_eq!(
        (&mapping["name"], &mapping["bound"]),
        (&json!("%eth0:8000-8001/tcp+udp"), &json!("8000-8001"))
    );
}

fn flows() {
    let stage = Stage::new();
    let host = &stage.net.host;
    let arguments = ["--proto", "udp", "--host", "%eth0:53", "--to", "172.17.0.2:53"];
    let server = Controlled::start_in(host, &arguments);
    host.address("eth0", "10.0.0.21/24");
    eventually("it is listened at", || stage.listeners("u").contains_key("10.0.0.21:53"));
    let [stays, ends] = [(); 2].map(|()| stage.net.client.run(|| udp::client(Ipv4Addr::UNSPECIFIED)));
    let answer = |socket: &UdpSocket, ip: Ipv4Addr| udp::ask(socket, (ip, 53).into(), b"who").0;
    let (first, _other) = (answer(&stays, HOST_V4), answer(&ends, SECOND_V4));
    let flows = || server.stats("%eth0:53/udp")["flows"].clone();
    assert_eq!(flows(), 2);
    host.ip("address del 10.0.0.21/24 dev eth0");
    eventually("its flow has ended", || flows() == 1);
    assert!(!stage.listeners("u").contains_key("10.0.0.21:53"));
    assert_eq!(answer(&stays, HOST_V4), first, "the other one is not touched");
    host.address("eth0", "10.0.0.21/24");
    eventually("it is listened at", || stage.listeners("u").contains_key("10.0.0.21:53"));
    answer(&ends, SECOND_V4);
}

fn controlled() {
    let stage = Stage::new();
    let server = Controlled::start_in(&stage.net.host, &[]);
    let added = server.ctl(&[&["add"], &TO_ECHO[..]].concat()).success();
    assert!(added.contains("%eth0:80/tcp: 80/tcp -> 10.0.0.11,"), "{added}");
    let mapping = list(&server)["mappings"][0].clone();
    assert_eq!((&mapping["host"], &mapping["name"]), (&json!("%eth0"), &json!("%eth0:80/tcp")));
    assert!(mapping["bound_host"].as_str().unwrap().starts_with("10.0.0.11,[fd00:10::11]"), "{mapping}");
    let file = server.file("list.json", &server.ctl(&["list", "--json"]).success());
    let apply = || server.ctl(&["apply", file.to_str().unwrap()]).success().trim().to_owned();
    assert_eq!(apply(), "0 added, 0 changed, 0 removed, 1 not touched");
    let before = stage.listeners("t");
    let stays = stage.connect((HOST_V4, 80)).unwrap();
    client::ping(&stays);
    server.ctl(&["retarget", "%eth0:80/tcp", "--to", "172.17.0.2:81"]).success();
    assert_eq!(apply(), "0 added, 1 changed, 0 removed, 0 not touched");
    assert_eq!(stage.listeners("t"), before);
    client::ping(&stays);
    stage.serves((HOST_V4, 80));
    // One address of the interface is taken, and all of the host are.
    for (host, part) in [
        ("10.0.0.11:80", "port 80 is taken by the mapping %eth0:80/tcp"),
        ("0.0.0.0:80", "port 80 is taken by the mapping %eth0:80/tcp"),
        ("eth0:80", "port 80 is taken by the mapping %eth0:80/tcp"),
    ] {
        let refused = server.ctl(&["add", "--host", host, "--to", "172.17.0.2:80"]);
        assert!(refused.status.code() == Some(1) && refused.stderr.contains(part), "{host}: {refused:#?}");
        assert_eq!(refused.stderr.lines().count(), 1, "{refused:#?}");
    }
    server.ctl(&["remove", "%eth0:80/tcp"]).success();
    assert!(stage.listeners("t").is_empty());
    client::ping(&stays);
    server.ctl(&["add", "--host", "%eth1:80", "--to", "172.17.0.2:80"]).success();
    let text = server.ctl(&["list"]).success();
    assert!(text.contains("%eth1:80/tcp") && text.contains("waits for an address"), "{text}");
    assert!(says(&server.process, "there is no interface eth1").contains("did you mean eth0?"));
}

fn confined() {
    let stage = Stage::new();
    let host = &stage.net.host;
    let fixed = stage.start(&[&TO_ECHO[..], &["--sandbox", "strict", "--user", "nobody"]].concat());
    host.address("eth0", "10.0.0.21/24");
    stage.until_listens("10.0.0.21:80");
    stage.serves((SECOND_V4, 80));
    drop(fixed);
    host.ip("address del 10.0.0.21/24 dev eth0");
    let server = Controlled::start_in(host, &["--sandbox", "strict", "--user", "nobody"]);
    server.ctl(&[&["add"], &TO_ECHO[..]].concat()).success();
    stage.serves((HOST_V4, 80));
    host.address("eth0", "10.0.0.21/24");
    stage.until_listens("10.0.0.21:80");
    stage.serves((SECOND_V4, 80));
}

fn reloaded() {
    let stage = Stage::new();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rproxy.toml");
    let write = |host: &str| {
        fs::write(&file, format!("[[mapping]]\nname = \"web\"\nhost = \"{host}\"\nto = \"172.17.0.2:80\"\n"))
            .unwrap();
    };
    write("127.0.0.1:80");
    let arguments = ["--config", file.to_str().unwrap(), "--sandbox", "strict"];
    let proxy = stage.net.host.spawn(rproxy::command(&arguments));
    proxy.wait_for_line(Stream::Stdout, |_| true);
    write("%eth0:80");
    proxy.signal(Signal::SIGHUP);
    stage.until_listens("10.0.0.11:80");
    stage.net.host.address("eth0", "10.0.0.21/24");
    stage.until_listens("10.0.0.21:80");
    let stays = stage.connect((SECOND_V4, 80)).unwrap();
    proxy.signal(Signal::SIGHUP);
    says(&proxy, "unchanged=1");
    client::ping(&stays);
    let printed = stage.net.host.spawn(rproxy::command(&["--config", arguments[1], "--print-config"]));
    let printed = printed.into_output().success();
    assert!(printed.contains("host = \"%eth0:80\""), "{printed}");
}

fn upgraded() {
    let stage = Stage::new();
    let host = &stage.net.host;
    host.address("eth0", "10.0.0.21/24");
    let server = Controlled::start_in(host, &TO_ECHO);
    server.ctl(&["add", "--proto", "udp", "--host", "%eth0:53", "--to", "172.17.0.2:53"]).success();
    server.ctl(&["add", "--host", "%eth1:80", "--to", "172.17.0.2:80"]).success();
    let socket = stage.net.client.run(|| udp::client(Ipv4Addr::UNSPECIFIED));
    let answer = || udp::ask(&socket, (SECOND_V4, 53).into(), b"who").0;
    let (first, before) = (answer(), stage.listeners("t"));
    let stays = stage.connect((SECOND_V4, 80)).unwrap();
    let _successors = Successors::of(&server.process);
    server.process.signal(Signal::SIGUSR2);
    says(&server.process, "a new process has taken over");
    assert_eq!(answer(), first, "the flow stays");
    client::ping(&stays);
    assert_eq!(stage.listeners("t"), before);
    assert_eq!(list(&server)["mappings"].as_array().unwrap().len(), 3);
    host.address("eth0", "10.0.0.22/24");
    stage.until_listens("10.0.0.22:80");
    host.ip("address del 10.0.0.22/24 dev eth0");
    stage.until_left("10.0.0.22:80");
}

fn taken() {
    let stage = Stage::new();
    let host = &stage.net.host;
    host.command("sysctl -qw net.ipv4.ip_nonlocal_bind=1").success();
    let theirs = host.run(|| TcpListener::bind((SECOND_V4, 80)).unwrap());
    let server = Controlled::start_in(host, &TO_ECHO);
    let explicit = ["add", "--name", "own", "--host", "10.0.0.22:80", "--to", "172.17.0.2:81"];
    server.ctl(&[&explicit[..], &["--freebind"]].concat()).success();
    host.address("eth0", "10.0.0.21/24");
    host.address("eth0", "10.0.0.22/24");
    let refusal = |ip: &str| {
        let place = format!("address={ip}");
        server
            .process
            .wait_for_line(Stream::Stderr, |line| line.contains("is not served") && line.contains(&place))
    };
    assert!(refusal("10.0.0.21").contains("the tcp port is taken"));
    assert!(refusal("10.0.0.22").contains("port 80 is taken by the mapping own"));
    stage.serves((HOST_V4, 80));
    server.ctl(&["remove", "own"]).success();
    stage.until_listens("10.0.0.22:80");
    stage.serves((Ipv4Addr::new(10, 0, 0, 22), 80));
    // Nothing tells that it is free.
    drop(theirs);
    stage.until_listens("10.0.0.21:80");
    let log = server.process.captured(Stream::Stderr);
    let told = log.lines().filter(|line| line.contains("is not served")).count();
    assert_eq!(told, 2, "each is told once: {log}");
}

fn looped() {
    let stage = Stage::new();
    let host = &stage.net.host;
    let proxy = stage.start(&["--host", "%eth0:80", "--to", "10.0.0.21:80"]);
    host.address("eth0", "10.0.0.21/24");
    let said = says(&proxy.process, "is not served");
    assert!(said.contains("10.0.0.21:80/tcp would forward to itself"), "{said}");
    assert!(!stage.listens("10.0.0.21:80") && stage.listens("10.0.0.11:80"));
}

fn lost() {
    let stage = Stage::new();
    let host = &stage.net.host;
    let proxy = stage.start(&[&TO_ECHO[..], &["--log-level", "debug"]].concat());
    let before = stage.listeners("t");
    proxy.process.pause();
    hindered::do_all(&stage, &(hindered::flood() + "address add 10.0.0.21/24 dev eth0\n"));
    proxy.process.resume();
    stage.until_listens("10.0.0.21:80");
    for (place, inode) in before {
        assert_eq!(stage.listeners("t").get(&place), Some(&inode), "{place}");
    }
    says(&proxy.process, "some changes of interfaces were lost");
    host.ip("address del 10.0.0.21/24 dev eth0");
    stage.until_left("10.0.0.21:80");
}

fn refused() {
    for (arguments, part) in [
        (
            &["--host", "%eth0:0", "--to", "192.0.2.1:80"][..],
            "--host %eth0:0: the addresses of the interface eth0 come and go",
        ),
        (&["--host", "%eth0:80-90", "--to", "192.0.2.1:80"], "as in %eth0:80"),
        (&["-p", "%eth0::80", "--to", "192.0.2.1"], "as in %eth0:80"),
        (&["--host", "localhost:80", "--to", "192.0.2.1:80"], "'localhost' is not an IP address"),
        (&["--host", "%a/b:80", "--to", "192.0.2.1:80"], "'a/b' is not the name of an interface"),
        (
            &["--host", "%eth0:80", "--host", "0.0.0.0:80", "--to", "192.0.2.1:80", "--to", "192.0.2.1:80"],
            "0.0.0.0 stands for all addresses",
        ),
    ] {
        let output = Process::spawn(rproxy::command(arguments)).into_output();
        assert!(
            output.status.code() == Some(2) && output.stderr.contains(part),
            "{arguments:?}: {output:#?}"
        );
    }
}
