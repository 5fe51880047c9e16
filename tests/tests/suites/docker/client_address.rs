//! Which client a container sees, through dockerd's firewall rules and through `rproxy`, with each of its options.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use tempfile::TempDir;

use testkit::backend::TcpBackend;
use testkit::client;
use testkit::controlled::Controlled;
use testkit::eventually;
use testkit::netns::Namespace;
use testkit::process::Stream;
use testkit::require::{self, Need};
use testkit::rproxy::{Standalone, netns_setup, rproxy_shim};
use testkit::suite::Case;
use testkit::topology::{BRIDGE, BRIDGE_V4, CLIENT_V4, CONTAINER_V4, HOST_V4, HOST_V6, client_and_host};
use testkit::udp::{self, Backend, bind_in};

use super::daemon::{DAEMON, Docker};
use crate::proxy_protocol::v2;

/// The port of the container, which is published as itself.
pub(super) const PORT: u16 = 5300;

/// The gateway of Docker's first network after the default one.
const OTHER_GATEWAY: Ipv4Addr = Ipv4Addr::new(172, 18, 0, 1);

/// The arguments of a dockerd that leaves the firewall alone.
const NO_RULES: &[&str] = &["--iptables=false", "--ip6tables=false"];

const QUESTION: &[u8] = b"who am I?";

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| {
        Case::new(name, body).needs(DAEMON).needs(&[Need::Program("nft")]).deadline(Duration::from_secs(180))
    };
    let dns = &[Need::Program("dnsmasq"), Need::Program("dig")];
    vec![
        case("the client a container sees, without Docker's firewall rules", without_rules),
        case("the client a container sees, with Docker's firewall rules", with_rules),
        case("the client a container sees past the rules against direct access", direct_access_denied),
        case("the log of dnsmasq in a container has the client", dnsmasq_logs_clients).needs(dns),
    ]
}

/// A host with dockerd, a plane, and a container that tells each client how it sees it.
struct Host {
    plane: Controlled,
    docker: Docker,
    /// An outside host.
    outside: Namespace,
    /// Another container of the same network, and one of another network.
    neighbour: Namespace,
    stranger: Namespace,
    /// The network of the container.
    web: Namespace,
    _servers: (TcpBackend, Backend),
    dir: TempDir,
}

impl Host {
    /// Starts dockerd with more arguments, and the plane with these keys of `[attach]`.
    fn start(dockerd: &[&str], attach: &str) -> Self {
        let (outside, host) = client_and_host();
        let docker = Docker::start_in(host, rproxy_shim(), r#"exec "$@""#, dockerd);
        let dir = tempfile::tempdir().unwrap();
        await_answers(&docker.namespace, &dir);
        let config = dir.path().join("rproxy.toml");
        std::fs::write(&config, format!("[attach]\n{attach}\n")).unwrap();
        let plane =
            Controlled::start_in(&docker.namespace, &["--attach", "--config", config.to_str().unwrap()]);
        docker.docker("network create other").success();
        docker.run_idle("web", &format!("--publish {PORT}:{PORT} --publish {PORT}:{PORT}/udp"));
        docker.run_idle("neighbour", "");
        docker.run_idle("stranger", "--network other");
        let [web, neighbour, stranger] = ["web", "neighbour", "stranger"].map(|name| docker.network_of(name));
        let servers = serve(&web);
        Self { plane, docker, outside, neighbour, stranger, web, _servers: servers, dir }
    }

    /// Gives attached ports these keys instead.
    fn change(&self, attach: &str, count: usize) {
        std::fs::write(self.dir.path().join("rproxy.toml"), format!("[attach]\n{attach}\n")).unwrap();
        self.plane.process.signal(Signal::SIGHUP);
        self.plane
            .process
            .wait_for_lines(Stream::Stderr, count, |line| line.contains("configuration reloaded"));
    }

    /// A counter of all attached ports.
    fn errors(&self, kind: &str) -> u64 {
        let stats = self.plane.json(&["stats"]);
        stats["mappings"].as_array().unwrap().iter().filter_map(|port| port["errors"][kind].as_u64()).sum()
    }
}

/// Sets up the return path for what the containers of the default network answer to clients.
fn await_answers(host: &Namespace, state: &TempDir) {
    let mut setup = Command::new(netns_setup());
    setup.args(["transparent", "up", "--interface", BRIDGE, "--state-dir"]).arg(state.path());
    host.spawn(setup).into_output().success();
}

/// Servers that answer with the address that they see, and with what came before the question.
pub(super) fn serve(container: &Namespace) -> (TcpBackend, Backend) {
    let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT));
    let tcp = TcpBackend::serve(container.run(|| TcpListener::bind(any).unwrap()), |mut stream| {
        let mut question = Vec::new();
        stream.read_to_end(&mut question)?;
        stream.write_all(&[stream.peer_addr()?.to_string().as_bytes(), b"\n", &question].concat())
    });
    let udp = Backend::serve(bind_in(container, any), |socket, question, from| {
        socket.send_to(&[from.to_string().as_bytes(), b"\n", question].concat(), from).ok();
    });
    (tcp, udp)
}

/// How a container sees a client.
pub(super) struct Seen {
    /// The client as it is, and the address that it asked.
    pub(super) own: SocketAddr,
    asked: SocketAddr,
    /// The client as it is to the container.
    pub(super) peer: SocketAddr,
    /// What came before its first byte.
    pub(super) header: Vec<u8>,
    is_udp: bool,
}

impl Seen {
    fn new(own: SocketAddr, asked: SocketAddr, answer: &[u8], is_udp: bool) -> Self {
        let line = answer.iter().position(|byte| *byte == b'\n').expect("an answer");
        let peer = std::str::from_utf8(&answer[..line]).unwrap().parse().unwrap();
        let header = answer[line + 1..].strip_suffix(QUESTION).expect("the question").to_vec();
        Self { own, asked, peer, header, is_udp }
    }

    /// Over TCP and UDP.
    #[track_caller]
    pub(super) fn by(client: &Namespace, asked: SocketAddr) -> [Self; 2] {
        let stream = client.run(|| client::connect(asked));
        (&stream).write_all(QUESTION).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let (answer, _end) = client::read_to_end(&stream);
        let tcp = Self::new(stream.local_addr().unwrap(), asked, &answer, false);
        let socket = client.run(|| {
            let any = if asked.is_ipv4() {
                IpAddr::from(Ipv4Addr::UNSPECIFIED)
            } else {
                Ipv6Addr::UNSPECIFIED.into()
            };
            let socket = udp::client(any);
            socket.connect(asked).unwrap();
            socket
        });
        socket.send(QUESTION).unwrap();
        let (answer, _from) = udp::receive(&socket);
        [tcp, Self::new(socket.local_addr().unwrap(), asked, &answer, true)]
    }
}

/// How a client reaches the container.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// dockerd's rules lead it there, without a proxy.
    Direct,
    /// The container's answers to its address come by the host.
    Relayed,
    /// The same, but dockerd's rules replace the source address of what leaves its network.
    Masqueraded,
    /// Answers to its address would take another way.
    NotAsClient,
}

/// Options of the relay.
#[derive(Clone, Copy)]
struct Options {
    source: bool,
    header: bool,
}

impl Options {
    const ALL: [Self; 4] = [
        Self { source: false, header: false },
        Self { source: false, header: true },
        Self { source: true, header: false },
        Self { source: true, header: true },
    ];

    /// As keys of `[attach]`.
    fn keys(self) -> String {
        let source = if self.source { "source = 'client'\n" } else { "" };
        format!("{source}{}", if self.header { "send_proxy = 'v2'\n" } else { "" })
    }
}

impl Seen {
    #[track_caller]
    fn check(&self, way: Way, options: Options) {
        let Self { own, asked, peer, is_udp, .. } = *self;
        let context = format!("{own} asks {asked}, UDP: {is_udp}\n{}", options.keys());
        match way {
            Way::Direct => assert_eq!(peer, own, "{context}"),
            Way::Relayed if options.source => assert_eq!(peer, own, "{context}"),
            Way::Masqueraded if options.source => {
                assert_eq!(peer, (BRIDGE_V4, own.port()).into(), "{context}")
            }
            _ => assert_eq!(peer.ip(), BRIDGE_V4, "{context}"),
        }
        let header = if options.header && way != Way::Direct { self.told() } else { Vec::new() };
        assert_eq!(self.header, header, "{context}");
    }

    /// The header that tells the client.
    pub(super) fn told(&self) -> Vec<u8> {
        const PROTOCOL: usize = 13;
        let mut header = v2([self.own, self.asked]);
        // Stream and datagram are 1 and 2, in the lower half.
        header[PROTOCOL] += u8::from(self.is_udp);
        header
    }
}

impl Host {
    /// Clients everywhere, the addresses that they ask, and how they reach the container.
    fn clients(&self, rules: bool) -> [(&Namespace, IpAddr, Way); 11] {
        let host = &self.docker.namespace;
        let where_rules = |with: Way, without: Way| if rules { with } else { without };
        [
            (&self.outside, HOST_V4.into(), where_rules(Way::Direct, Way::Relayed)),
            (&self.outside, HOST_V6.into(), Way::NotAsClient),
            (host, Ipv4Addr::LOCALHOST.into(), Way::NotAsClient),
            (host, Ipv6Addr::LOCALHOST.into(), Way::NotAsClient),
            (host, BRIDGE_V4.into(), where_rules(Way::Direct, Way::NotAsClient)),
            (host, HOST_V4.into(), where_rules(Way::Direct, Way::NotAsClient)),
            (&self.web, BRIDGE_V4.into(), Way::NotAsClient),
            (&self.neighbour, BRIDGE_V4.into(), Way::NotAsClient),
            (&self.neighbour, HOST_V4.into(), Way::NotAsClient),
            (&self.stranger, OTHER_GATEWAY.into(), where_rules(Way::Masqueraded, Way::Relayed)),
            (&self.stranger, HOST_V4.into(), where_rules(Way::Masqueraded, Way::Relayed)),
        ]
    }

    #[track_caller]
    fn check(&self, options: Options, rules: bool) {
        for (client, ip, way) in self.clients(rules) {
            let before = self.errors("source_unavailable");
            for seen in Seen::by(client, (ip, PORT).into()) {
                seen.check(way, options);
            }
            let counted = self.errors("source_unavailable") - before;
            let expected = if options.source && way == Way::NotAsClient { 2 } else { 0 };
            assert_eq!(counted, expected, "{ip}\n{}", options.keys());
        }
    }
}

fn without_rules() {
    let host = Host::start(NO_RULES, "source = 'client'");
    for (count, options) in (1..).zip(Options::ALL) {
        host.change(&options.keys(), count);
        host.check(options, false);
    }
}

fn with_rules() {
    let host = Host::start(&[], "source = 'client'");
    for (count, options) in (1..).zip(Options::ALL) {
        host.change(&options.keys(), count);
        host.check(options, true);
    }
}

/// Docker 28 drops what comes to a container from elsewhere than its network (libnetwork/drivers/bridge in moby), before
/// any other rule. Older versions leave that to the test.
fn direct_access_denied() {
    let host = Host::start(&[], "source = 'client'");
    let namespace = &host.docker.namespace;
    let iptables = |line: &str| namespace.command(&format!("iptables -t raw {line}")).success();
    let denied = format!("{CONTAINER_V4}/32 ! -i {BRIDGE} -j DROP");
    if !iptables("-S PREROUTING").contains(&denied) {
        iptables(&format!("-A PREROUTING -d {denied}"));
    }
    let to = format!("{CONTAINER_V4}:{PORT}");
    let _relay = Standalone::start_in(
        namespace,
        &[
            "--proto",
            "tcp+udp",
            "--host",
            "[::]:9090",
            "--to",
            &to,
            "--source",
            "client",
            "--sandbox",
            "strict",
        ],
    );
    let options = Options { source: true, header: false };
    for seen in Seen::by(&host.outside, (HOST_V4, 9090).into()) {
        seen.check(Way::Relayed, options);
    }
    host.check(options, true);
    // The rule is in force.
    host.outside.ip(&format!("route add {CONTAINER_V4} via {HOST_V4}"));
    bind_in(&host.outside, (Ipv4Addr::UNSPECIFIED, 0)).send_to(QUESTION, (CONTAINER_V4, PORT)).unwrap();
    eventually("the datagram is dropped", || {
        let rules = iptables("-nvxL PREROUTING");
        rules.lines().any(|line| line.contains("DROP") && !line.trim_start().starts_with("0 "))
    });
}

fn dnsmasq_logs_clients() {
    let host = Host::start(NO_RULES, "");
    host.docker.run_idle("dns", "--publish 53:53 --publish 53:53/udp");
    let mut dnsmasq = require::command("dnsmasq");
    dnsmasq.args(["--keep-in-foreground", "--no-resolv", "--no-hosts", "--no-poll", "--conf-file=/dev/null"]);
    dnsmasq.args(["--pid-file=", "--log-facility=-", "--user=root", "--log-queries"]);
    dnsmasq.arg("--address=/test/192.0.2.80");
    let dnsmasq = host.docker.network_of("dns").spawn(dnsmasq);
    dnsmasq.wait_for_line(Stream::Stderr, |line| line.contains("started"));
    for (count, keys, client) in
        [(1, "", IpAddr::from(BRIDGE_V4)), (2, "source = 'client'", CLIENT_V4.into())]
    {
        host.change(keys, count);
        for protocol in ["notcp", "tcp"] {
            let name = format!("{protocol}-{count}.test");
            let answer =
                host.outside.command(&format!("dig +tries=1 +short +{protocol} @{HOST_V4} {name} A"));
            assert_eq!(answer.success(), "192.0.2.80\n");
            let asked = format!("query[A] {name} from {client}");
            dnsmasq.wait_for_line(Stream::Stderr, |line| line.ends_with(&asked));
        }
    }
}
