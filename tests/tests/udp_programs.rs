//! UDP programs that people use, through `rproxy` on a host between them, and the kernel's own memory of
//! what went on there before.

#![expect(clippy::unwrap_used, reason = "a failed step ends the test")]

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::process::ExitCode;

use serde_json::Value;

use rproxy_tests::process::{Process, Stream};
use rproxy_tests::require::{self, Need};
use rproxy_tests::rproxy::Standalone;
use rproxy_tests::suite::{self, Case};
use rproxy_tests::topology::{self, CLIENT_V4, CONTAINER_V4, CONTAINER_V6, HOST_V4, HOST_V6, Topology};
use rproxy_tests::udp::{self, bind_in, relay_in};

const WIRING: &[Need] = &[Need::Root, Need::Ipv6, Need::Program("ip")];

fn main() -> ExitCode {
    let case = |name: &str, body: fn()| Case::new(name, body).needs(WIRING);
    let dns = &[Need::Program("dnsmasq"), Need::Program("dig")];
    let conntrack = &[Need::Program("nft"), Need::Program("sysctl")];
    suite::run(vec![
        case("dig asks dnsmasq, over both families and both protocols", dig_asks_dnsmasq).needs(dns),
        case("a thousand questions are answered", thousand_questions).needs(dns),
        case("iperf3 sends datagrams", || iperf3("")).needs(&[Need::Program("iperf3")]),
        case("iperf3 receives datagrams", || iperf3("--reverse")).needs(&[Need::Program("iperf3")]),
        case("a flow that was pinned elsewhere before is ours", pinned_flow).needs(conntrack),
        case("--v6only leaves pinned IPv4 flows alone", pinned_flow_of_others).needs(conntrack),
    ])
}

/// A record that fits no datagram of the usual size.
const LONG: [&str; 12] = ["a 200-byte string, give or take, repeated until the answer is long enough, which is more than an \
    Ethernet frame holds, so that it comes in fragments, or over TCP where the client does not take so much at once";
    12];

/// dnsmasq in the container, and `rproxy` on the host, for UDP and TCP over IPv4 and IPv6.
struct Dns {
    topology: Topology,
    _dnsmasq: Process,
    _proxy: Standalone,
}

impl Dns {
    fn publish() -> Self {
        let topology = Topology::new();
        let mut dnsmasq = require::command("dnsmasq");
        dnsmasq.args([
            "--keep-in-foreground",
            "--no-resolv",
            "--no-hosts",
            "--no-poll",
            "--conf-file=/dev/null",
        ]);
        dnsmasq.args(["--pid-file=", "--log-facility=-", "--user=root", "--edns-packet-max=4096"]);
        dnsmasq.args(["--address=/web.test/172.17.0.2", "--address=/web.test/fd00::2"]);
        dnsmasq.arg(format!("--txt-record=long.test,{}", LONG.map(|text| text.replace(',', ";")).join(",")));
        let dnsmasq = topology.container.spawn(dnsmasq);
        dnsmasq.wait_for_line(Stream::Stderr, |line| line.contains("started"));
        let to = format!("{CONTAINER_V4}:53");
        let udp = ["--proto", "udp", "--host", "[::]:53", "--to", &to];
        let tcp = ["--proto", "tcp", "--host", "[::]:53", "--to", &to];
        let proxy = Standalone::start_in(&topology.host, &[udp, tcp].concat());
        Self { topology, _dnsmasq: dnsmasq, _proxy: proxy }
    }

    /// Runs dig with blank-separated arguments on the outside host.
    fn dig(&self, arguments: &str) -> String {
        self.topology.client.command(&format!("dig +tries=1 +time=10 {arguments}")).success()
    }
}

fn dig_asks_dnsmasq() {
    let dns = Dns::publish();
    for server in [format!("@{HOST_V4}"), format!("@{HOST_V6}")] {
        for protocol in ["+notcp", "+tcp"] {
            let ask = |question: &str| dns.dig(&format!("{server} {protocol} {question}"));
            assert_eq!(ask("+short web.test A"), "172.17.0.2\n");
            assert_eq!(ask("+short web.test AAAA"), "fd00::2\n");
            let long = ask("+bufsize=4096 +ignore long.test TXT");
            assert_eq!(long.matches("give or take").count(), LONG.len(), "{long}");
            assert!(!long.contains("flags: qr aa tc"), "{long}");
        }
        let cut = dns.dig(&format!("{server} +noedns +ignore long.test TXT"));
        assert!(cut.contains(" tc "), "{cut}");
    }
}

fn thousand_questions() {
    const QUESTIONS: usize = 1_000;
    let dns = Dns::publish();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    for number in 0..QUESTIONS {
        writeln!(file, "host-{number}.web.test A").unwrap();
    }
    let answers = dns.dig(&format!("@{HOST_V4} +short -f {}", file.path().display()));
    assert_eq!(answers, "172.17.0.2\n".repeat(QUESTIONS));
}

/// Slowly: what is lost must not be lost by iperf3's own sockets, which are of the usual size.
fn iperf3(direction: &str) {
    let topology = Topology::new();
    let mut server = require::command("iperf3");
    server.args(["--server", "--one-off", "--forceflush"]);
    let server = topology.container.spawn(server);
    server.wait_for_line(Stream::Stdout, |line| line.contains("Server listening"));
    let to = format!("{CONTAINER_V4}:5201");
    let udp = ["--proto", "udp", "--host", "0.0.0.0:5201", "--to", &to];
    let tcp = ["--proto", "tcp", "--host", "0.0.0.0:5201", "--to", &to];
    let _proxy = Standalone::start_in(&topology.host, &[udp, tcp].concat());
    let arguments =
        format!("--client {HOST_V4} --udp --bitrate 10M --length 1400 --bytes 2M --json {direction}");
    let report = topology.client.command(&format!("iperf3 {arguments}")).success();
    let report: Value = serde_json::from_str(&report).unwrap();
    let sum = &report["end"]["sum"];
    assert!(sum["packets"].as_u64().unwrap() >= 2_000_000 / 1_400, "{sum}");
    assert_eq!(sum["lost_packets"].as_u64(), Some(0), "{sum}");
    assert_eq!(report["end"]["streams"][0]["udp"]["out_of_order"].as_u64().unwrap_or(0), 0, "{sum}");
}

const PORT: u16 = 5300;
const ASKED: (Ipv4Addr, u16) = (HOST_V4, PORT);

/// A client that the kernel keeps sending to another container, to which its port was published before.
struct Pinned {
    topology: Topology,
    client: UdpSocket,
    ours: UdpSocket,
    other: UdpSocket,
}

impl Pinned {
    fn new() -> Self {
        const OTHER: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 3);
        let topology = Topology::new();
        let other = topology::add_container(&topology.host, OTHER, CONTAINER_V6);
        let host = |line: &str| topology.host.command(line).success();
        host("sysctl -qw net.ipv4.ip_forward=1");
        host("nft add table ip t");
        // A rule that asks for it keeps connection tracking at work when the other one is gone.
        host("nft add chain ip t tracked { type filter hook input priority filter ; }");
        host("nft add rule ip t tracked ct state established accept");
        host("nft add chain ip t c { type nat hook prerouting priority dstnat ; }");
        host(&format!("nft add rule ip t c udp dport {PORT} dnat to {OTHER}:{PORT}"));
        let pinned = Self {
            client: bind_in(&topology.client, (CLIENT_V4, 0)),
            ours: bind_in(&topology.container, (CONTAINER_V4, PORT)),
            other: bind_in(&other, (OTHER, PORT)),
            topology,
        };
        pinned.assert_reaches(&pinned.other);
        pinned.topology.host.command("nft flush chain ip t c").success();
        pinned.assert_reaches(&pinned.other);
        pinned
    }

    #[track_caller]
    fn assert_reaches(&self, backend: &UdpSocket) {
        self.client.send_to(b"question", ASKED).unwrap();
        let (question, from) = udp::receive(backend);
        assert_eq!(question, b"question");
        backend.send_to(b"answer", from).unwrap();
        assert_eq!(udp::receive(&self.client), (b"answer".to_vec(), SocketAddr::from(ASKED)));
    }
}

fn pinned_flow() {
    let pinned = Pinned::new();
    let _proxy = relay_in(&pinned.topology.host, "0.0.0.0:5300", (CONTAINER_V4, PORT), &[]);
    pinned.assert_reaches(&pinned.ours);
}

fn pinned_flow_of_others() {
    let pinned = Pinned::new();
    let _proxy = relay_in(&pinned.topology.host, "[::]:5300", (CONTAINER_V4, PORT), &["--v6only"]);
    pinned.assert_reaches(&pinned.other);
}
