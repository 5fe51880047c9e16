//! Conntrack entries of UDP flows from before `rproxy` published their port: those to its own host addresses are
//! deleted, so that the flows reach it, and no others are.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use nix::fcntl::OFlag;

use testkit::controlled::Controlled;
use testkit::docker_proxy::{DockerProxy, Status, mapping};
use testkit::eventually;
use testkit::netns::Namespace;
use testkit::process::Stream;
use testkit::require::{self, Need};
use testkit::rproxy::{Standalone, rproxy};
use testkit::suite::Case;
use testkit::topology::{self, CLIENT_V4, CLIENT_V6, CONTAINER_V4, CONTAINER_V6, HOST_V4, HOST_V6, Topology};
use testkit::udp::{self, bind_in, relay_in};

const PORT: u16 = 5300;

/// The clients' ports of no flow at all.
const NOTHING: [u16; 0] = [];

pub(crate) fn cases() -> Vec<Case> {
    let wiring = &[Need::Root, Need::Ipv6, Need::Program("ip")];
    let pinned = &[Need::Program("nft"), Need::Program("sysctl")];
    let conntrack = &[Need::Program("conntrack")];
    let case = |name: &str, body: fn()| Case::new(name, body).needs(wiring);
    vec![
        case("a pinned IPv4 flow reaches rproxy", || pinned_v4().becomes_ours("0.0.0.0")).needs(pinned),
        case("a pinned IPv6 flow reaches rproxy", || pinned_v6().becomes_ours("[fd00:10::11]")).needs(pinned),
        case("a dual-stack mapping gets a pinned IPv4 flow", || pinned_v4().becomes_ours("[::]"))
            .needs(pinned),
        case("--v6only leaves a pinned IPv4 flow alone", pinned_flow_of_others).needs(pinned),
        case("flows to the host addresses are forgotten, and no others", forgets_its_own).needs(conntrack),
        case("a flow that began at the port is forgotten, if it began here", begun_at_the_port)
            .needs(conntrack),
        case("without the privilege it serves nevertheless", unprivileged)
            .needs(conntrack)
            .needs(&[Need::Program("setpriv")]),
        case("a port that is published live is reached too", published_live).needs(conntrack),
        case("docker-proxy's flags leave it to dockerd", docker_mode).needs(conntrack),
    ]
}

/// A client that the kernel keeps sending to another container, to which its port was published before.
struct Pinned {
    topology: Topology,
    client: UdpSocket,
    asked: SocketAddr,
    ours: UdpSocket,
    other: UdpSocket,
}

const OTHER_V4: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 3);
const OTHER_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x172, 0x17, 0, 0, 0, 0, 3);

fn pinned_v4() -> Pinned {
    Pinned::new("ip", [CLIENT_V4, HOST_V4, CONTAINER_V4, OTHER_V4].map(IpAddr::V4))
}

fn pinned_v6() -> Pinned {
    Pinned::new("ip6", [CLIENT_V6, HOST_V6, CONTAINER_V6, OTHER_V6].map(IpAddr::V6))
}

impl Pinned {
    /// `family` is nft's word for that of the addresses.
    fn new(family: &str, [client, host, container, other]: [IpAddr; 4]) -> Self {
        let topology = Topology::new();
        let second = topology::add_container(&topology.host, OTHER_V4, OTHER_V6);
        let on_host = |line: &str| topology.host.command(line).success();
        on_host("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        on_host(&format!("nft add table {family} t"));
        // A rule that asks for it keeps connection tracking at work when the other one is gone.
        on_host(&format!("nft add chain {family} t tracked {{ type filter hook input priority filter ; }}"));
        on_host(&format!("nft add rule {family} t tracked ct state established accept"));
        on_host(&format!("nft add chain {family} t c {{ type nat hook prerouting priority dstnat ; }}"));
        on_host(&format!("nft add rule {family} t c udp dport {PORT} dnat to {other}"));
        let pinned = Self {
            client: bind_in(&topology.client, (client, 0)),
            asked: (host, PORT).into(),
            ours: bind_in(&topology.container, (container, PORT)),
            other: bind_in(&second, (other, PORT)),
            topology,
        };
        pinned.assert_reaches(&pinned.other);
        pinned.topology.host.command(&format!("nft flush chain {family} t c")).success();
        pinned.assert_reaches(&pinned.other);
        pinned
    }

    /// Publishes the port by `rproxy`.
    fn publish(&self, host: &str, more_arguments: &[&str]) -> Standalone {
        let backend = self.ours.local_addr().unwrap();
        relay_in(&self.topology.host, &format!("{host}:{PORT}"), backend, more_arguments)
    }

    #[track_caller]
    fn becomes_ours(&self, host: &str) {
        let _proxy = self.publish(host, &[]);
        self.assert_reaches(&self.ours);
    }

    #[track_caller]
    fn assert_reaches(&self, backend: &UdpSocket) {
        self.client.send_to(b"question", self.asked).unwrap();
        let (question, from) = udp::receive(backend);
        assert_eq!(question, b"question");
        backend.send_to(b"answer", from).unwrap();
        assert_eq!(udp::receive(&self.client), (b"answer".to_vec(), self.asked));
    }
}

fn pinned_flow_of_others() {
    let pinned = pinned_v4();
    let _proxy = pinned.publish("[::]", &["--v6only"]);
    pinned.assert_reaches(&pinned.other);
}

/// Options of conntrack(8) for flows that the kernel is to remember. Each has a client's port of its own.
const FLOWS: [(u16, &str); 6] = [
    (1, "-p udp -s 10.0.0.12 -d 10.0.0.11 --dport 5300"),
    (2, "-p udp -s 10.0.0.12 -d 10.0.0.21 --dport 5300"),
    (3, "-p udp -s fd00:10::12 -d fd00:10::11 --dport 5300"),
    (4, "-p udp -s fd00:10::12 -d fd00:10::21 --dport 5300"),
    // The port asked is another; 5300 is that of the container (moby#53384).
    (
        5,
        "-p udp -s 10.0.0.12 -d 10.0.0.11 --dport 80 --reply-src 172.17.0.3 --reply-dst 10.0.0.12 \
         --reply-port-src 5300 --reply-port-dst 5",
    ),
    (6, "-p tcp -s 10.0.0.12 -d 10.0.0.11 --dport 5300 --state ESTABLISHED"),
];

/// A host with several addresses that remembers [`FLOWS`].
fn host_with_flows() -> Namespace {
    let host = Namespace::new();
    for ip in ["10.0.0.11/32", "10.0.0.21/32", "fd00:10::11/128", "fd00:10::21/128"] {
        host.address("lo", ip);
    }
    for (client_port, flow) in FLOWS {
        host.command(&format!("conntrack -I {flow} --sport {client_port} --timeout 600")).success();
    }
    assert_eq!(forgotten(&host), NOTHING);
    host
}

/// Those of [`FLOWS`] that are not remembered any more, by their client's port.
fn forgotten(host: &Namespace) -> Vec<u16> {
    let listed = ["ipv4", "ipv6"].map(|family| host.command(&format!("conntrack -L -f {family}")).success());
    let ports = listed.iter().flat_map(|table| table.lines()).map(|line| {
        let (_, port) = line.split_once("sport=").unwrap();
        port.split(' ').next().unwrap().parse().unwrap()
    });
    let remembered: BTreeSet<u16> = ports.collect();
    FLOWS.iter().map(|(port, _)| *port).filter(|port| !remembered.contains(port)).collect()
}

fn forgets_its_own() {
    let hosts: [(&str, &[&str], &[u16]); 6] = [
        ("0.0.0.0:5300", &[], &[1, 2]),
        ("10.0.0.11:5300", &[], &[1]),
        ("[fd00:10::21]:5300", &[], &[4]),
        ("[::]:5300", &[], &[1, 2, 3, 4]),
        ("[::]:5300", &["--v6only"], &[3, 4]),
        ("[::]:5301", &["--host", "10.0.0.21:5300", "--to", "172.17.0.2:53"], &[2]),
    ];
    for (host, more_arguments, expected) in hosts {
        let namespace = host_with_flows();
        let _proxy = relay_in(&namespace, host, (CONTAINER_V4, PORT), more_arguments);
        assert_eq!(forgotten(&namespace), expected, "{host} {more_arguments:?}");
    }
    let namespace = host_with_flows();
    let _proxy = Standalone::start_in(&namespace, &["--host", "0.0.0.0:5300", "--to", "172.17.0.2:53"]);
    assert_eq!(forgotten(&namespace), NOTHING, "a mapping for TCP");
}

/// A late answer of whoever had the port makes an entry that begins there. One that begins at the same port of
/// another host is none of ours.
fn begun_at_the_port() {
    let namespace = host_with_flows();
    for source in ["10.0.0.11", "192.0.2.9"] {
        let entry = format!("-s {source} -d 192.0.2.1 -p udp --sport {PORT} --dport 4444 --timeout 600");
        namespace.command(&format!("conntrack -I {entry}")).success();
    }
    let remembered = || {
        let list = namespace.command("conntrack -L -p udp --orig-port-src 5300").success();
        ["src=10.0.0.11 dst=192.0.2.1", "src=192.0.2.9 dst=192.0.2.1"].map(|entry| list.contains(entry))
    };
    assert_eq!(remembered(), [true, true]);
    let _proxy = relay_in(&namespace, "0.0.0.0:5300", (CONTAINER_V4, PORT), &[]);
    assert_eq!(remembered(), [false, true]);
}

fn published_live() {
    let namespace = host_with_flows();
    let proxy = Controlled::start_in(&namespace, &[]);
    for (host, expected) in [("10.0.0.11:5300", &[1][..]), ("10.0.0.21:5300", &[1, 2])] {
        proxy.ctl(&["add", "--proto", "udp", "--host", host, "--to", "172.17.0.2:53"]).success();
        eventually("its flows are forgotten", || forgotten(&namespace) == expected);
    }
}

fn unprivileged() {
    let host = host_with_flows();
    let backend = bind_in(&host, (Ipv4Addr::LOCALHOST, 0));
    let to = backend.local_addr().unwrap().to_string();
    let arguments = ["--proto", "udp", "--host", "0.0.0.0:5300", "--to", &to, "--log-level", "rproxy=debug"];
    let mut command = require::command("setpriv");
    command.arg("--bounding-set=-net_admin").arg(rproxy()).args(arguments);
    let proxy = Standalone::ready(host.spawn(command), &arguments);
    proxy.process.wait_for_line(Stream::Stderr, |line| {
        line.contains("DEBUG") && line.contains("stale UDP flows not forgotten")
    });
    let client = bind_in(&host, (Ipv4Addr::LOCALHOST, 0));
    client.send_to(b"question", proxy.address()).unwrap();
    assert_eq!(udp::receive(&backend).0, b"question");
    assert_eq!(forgotten(&host), NOTHING);
}

fn docker_mode() {
    let host = host_with_flows();
    let arguments = mapping("udp", (Ipv4Addr::UNSPECIFIED, PORT).into(), (CONTAINER_V4, PORT).into());
    let mut proxy =
        DockerProxy::start_by(rproxy(), &arguments, None, OFlag::empty(), |command| host.spawn(command));
    assert_eq!(proxy.status(), Status::Ready);
    assert_eq!(forgotten(&host), NOTHING);
}
