//! Common UDP programs, through `rproxy` on a host between them.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::sys::signal::Signal;
use serde_json::Value;

use testkit::netns::Namespace;
use testkit::process::{Process, Stream};
use testkit::require::{self, Need};
use testkit::rproxy::Standalone;
use testkit::suite::Case;
use testkit::topology::{CLIENT_V4, CONTAINER_V4, HOST_V4, HOST_V6, Topology};
use testkit::udp;

const WIRING: &[Need] = &[Need::Root, Need::Ipv6, Need::Program("ip")];

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body).needs(WIRING);
    let dns = &[Need::Program("dnsmasq"), Need::Program("dig")];
    let iperf = &[Need::Program("iperf3")];
    vec![
        case("dig asks dnsmasq, over both families and both protocols", dig_asks_dnsmasq).needs(dns),
        case("a thousand questions are answered", thousand_questions).needs(dns),
        case("a client that keeps its port finds dnsmasq restarted", dnsmasq_restarts).needs(dns),
        case("curl reads a file from dnsmasq over TFTP", tftp)
            .needs(&[Need::Program("dnsmasq"), Need::Program("curl")]),
        case("iperf3 sends datagrams", || iperf3_loses_nothing("")).needs(iperf),
        case("iperf3 receives datagrams", || iperf3_loses_nothing("--reverse")).needs(iperf),
        case("iperf3 at full speed, both ways at once", iperf3_at_full_speed).needs(iperf),
    ]
}

/// A record that fits no datagram of the usual size.
const LONG: [&str; 12] = ["a 200-byte string, give or take, repeated until the answer is long enough, which is more than an \
    Ethernet frame holds, so that it comes in fragments, or over TCP where the client does not take so much at once";
    12];

/// dnsmasq in the container, and `rproxy` on the host, for UDP and TCP over IPv4 and IPv6.
struct Dns {
    topology: Topology,
    dnsmasq: Process,
    _proxy: Standalone,
}

/// Starts dnsmasq, which knows `web.test` and everything below, and a [`LONG`] record.
fn start_dnsmasq(container: &Namespace) -> Process {
    let mut dnsmasq = require::command("dnsmasq");
    dnsmasq.args(["--keep-in-foreground", "--no-resolv", "--no-hosts", "--no-poll", "--conf-file=/dev/null"]);
    dnsmasq.args(["--pid-file=", "--log-facility=-", "--user=root", "--edns-packet-max=4096"]);
    dnsmasq.args(["--address=/web.test/172.17.0.2", "--address=/web.test/fd00::2"]);
    dnsmasq.arg(format!("--txt-record=long.test,{}", LONG.map(|text| text.replace(',', ";")).join(",")));
    let dnsmasq = container.spawn(dnsmasq);
    dnsmasq.wait_for_line(Stream::Stderr, |line| line.contains("started"));
    dnsmasq
}

impl Dns {
    fn publish() -> Self {
        let topology = Topology::new();
        let dnsmasq = start_dnsmasq(&topology.container);
        let proxy = publish_both(&topology, "[::]:53", 53);
        Self { topology, dnsmasq, _proxy: proxy }
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

/// A TFTP server answers from a port of its own for each transfer (RFC 1350), to which the client's acknowledgements go.
/// dnsmasq does, as all do; several transfers go on at a time.
fn tftp() {
    let net = Topology::new();
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let file: Vec<u8> = (0..300_000_u32).flat_map(u32::to_ne_bytes).collect();
    fs::write(dir.path().join("image"), &file).unwrap();
    let mut dnsmasq = require::command("dnsmasq");
    dnsmasq.args(["--keep-in-foreground", "--port=0", "--conf-file=/dev/null", "--pid-file="]);
    dnsmasq.args(["--log-facility=-", "--user=root", "--enable-tftp", "--tftp-root"]).arg(dir.path());
    let dnsmasq = net.container.spawn(dnsmasq);
    dnsmasq.wait_for_line(Stream::Stderr, |line| line.contains("TFTP root"));
    let _proxy = udp::relay_in(&net.host, "[::]:69", (CONTAINER_V4, 69), &["--udp-any-port"]);
    let curl = |host: &str, to: &Path| {
        let mut curl = require::command("curl");
        curl.args([
            "--silent",
            "--show-error",
            "--max-time",
            "60",
            &format!("tftp://{host}/image"),
            "--output",
        ]);
        curl.arg(to);
        net.client.spawn(curl)
    };
    let transfers: Vec<_> = (0..6)
        .map(|number| {
            let host = if number % 2 == 0 { HOST_V4.to_string() } else { format!("[{HOST_V6}]") };
            let to = dir.path().join(format!("copy-{number}"));
            (curl(&host, &to), to)
        })
        .collect();
    for (curl, to) in transfers {
        curl.into_output().success();
        assert!(fs::read(to).unwrap() == file, "another file");
    }
}

/// dig keeps to one port, and so to one flow, which the end of the first server leaves with an error.
fn dnsmasq_restarts() {
    let mut dns = Dns::publish();
    let question = format!("@{HOST_V4} -b {CLIENT_V4}#4000 +short web.test A");
    for _ in 0..3 {
        assert_eq!(dns.dig(&question), "172.17.0.2\n");
        dns.dnsmasq.signal(Signal::SIGTERM);
        dns.dnsmasq.wait();
        let unanswered = format!("dig +tries=2 +time=1 {question}");
        assert!(!dns.topology.client.command(&unanswered).status.success(), "nobody could have answered");
        dns.dnsmasq = start_dnsmasq(&dns.topology.container);
    }
    assert_eq!(dns.dig(&question), "172.17.0.2\n");
}

/// Publishes a port of the container, for UDP and TCP.
fn publish_both(topology: &Topology, host: &str, port: u16) -> Standalone {
    let to = format!("{CONTAINER_V4}:{port}");
    let mapping = |protocol| ["--proto", protocol, "--host", host, "--to", &to];
    Standalone::start_in(&topology.host, &[mapping("udp"), mapping("tcp")].concat())
}

/// Runs iperf3 on the outside host with blank-separated options; returns its report.
fn iperf3(options: &str) -> Value {
    let topology = Topology::new();
    let mut server = require::command("iperf3");
    server.args(["--server", "--one-off", "--forceflush"]);
    let server = topology.container.spawn(server);
    server.wait_for_line(Stream::Stdout, |line| line.contains("Server listening"));
    let _proxy = publish_both(&topology, "0.0.0.0:5201", 5201);
    let report =
        topology.client.command(&format!("iperf3 --client {HOST_V4} --udp --json {options}")).success();
    serde_json::from_str(&report).unwrap()
}

/// Slowly: what is lost must not be lost by iperf3's own sockets, which are of the usual size.
fn iperf3_loses_nothing(direction: &str) {
    let report = iperf3(&format!("--bitrate 10M --length 1400 --bytes 2M {direction}"));
    let sum = &report["end"]["sum"];
    assert!(sum["packets"].as_u64().unwrap() >= 2_000_000 / 1_400, "{sum}");
    assert_eq!(sum["lost_packets"].as_u64(), Some(0), "{sum}");
    assert_eq!(report["end"]["streams"][0]["udp"]["out_of_order"].as_u64().unwrap_or(0), 0, "{sum}");
}

/// As fast as it goes, four flows each way at once: datagrams may be lost, but none overtakes another of its
/// flow, and every flow gets some through.
fn iperf3_at_full_speed() {
    let report = iperf3("--bidir --parallel 4 --bitrate 0 --length 1400 --time 2");
    let streams = report["end"]["streams"].as_array().unwrap();
    assert_eq!(streams.len(), 8, "{report}");
    for stream in streams.iter().map(|stream| &stream["udp"]) {
        let count = |name: &str| stream[name].as_u64().unwrap();
        assert!(count("packets") > count("lost_packets"), "{stream}");
        assert_eq!(count("out_of_order"), 0, "{stream}");
    }
}
