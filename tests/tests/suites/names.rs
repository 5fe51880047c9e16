//! Names as backends: looked up at the start, when their time to live is over, and when connections fail.

mod trouble;

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::backend::TcpBackend;
use testkit::client;
use testkit::controlled::Controlled;
use testkit::netns::Namespace;
use testkit::process::{self, Process, Stream};
use testkit::require::{self, Need};
use testkit::rproxy::{self, Standalone};
use testkit::suite::Case;
use testkit::topology::{CONTAINER_V4, CONTAINER_V6, HOST_V4, Topology, add_container};
use testkit::upgradable::Successors;
use testkit::{PATIENCE, eventually, udp};

/// A second container.
const SECOND_V4: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 3);
const SECOND_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x172, 0x17, 0, 0, 0, 0, 3);

/// An address of the containers' network where nobody is.
const NOBODY: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 99);

/// A domain whose name server is [`SILENT_SERVER`].
const SILENT_DOMAIN: &str = "silent";
const SILENT_SERVER: &str = "127.0.0.1:5300";

pub(crate) fn cases() -> Vec<Case> {
    let needs = &[
        Need::Root,
        Need::Program("ip"),
        Need::Program("unshare"),
        Need::Program("mount"),
        Need::Program("dnsmasq"),
    ];
    let case = |name: &str, body: fn()| Case::new(name, body).needs(needs);
    vec![
        case("a name is followed, and what is connected stays", followed),
        case("flows move with the name", flows),
        case("a name that does not resolve yet is served, and refuses", late),
        case("a name that has to resolve", required),
        case("a name is looked up again when connections fail", moved),
        case("the addresses of a name are tried in turn", in_turn),
        case("search domains, and both families", search),
        case("the hosts file, and it changes", hosts_file),
        case("names are looked up confined, also those of later requests", confined),
        case("a reload brings names", reloaded),
        case("an upgrade keeps names and flows", upgraded),
        case("a resolver that is killed is started again", resolver_killed),
        case("without its launcher a process keeps the addresses", launcher_killed),
        case("a name that leads back", looped),
        case("a name server that is silent", silent),
        case("cut and retarget know names", retargeted),
        case("a name is looked up again when somebody asks for that", renewed),
        case("a name of the other family than the source", other_family),
        case("what is not served is not complained about", complaints),
        case("names of silent servers do not delay others", trouble::among_silent),
        case("a name that has to resolve, and leads back", trouble::required_loop),
        case("a resolver that is stopped is replaced", trouble::resolver_stopped),
        case("a signal ends a process that waits for names", trouble::stopped_while_waiting),
        case("a name is looked up when a mapping is added", trouble::added_again),
        case("metrics and lists say which names do not resolve", trouble::measured),
    ]
}

/// The test network with a second container, and a name server on the host.
struct Stage {
    net: Topology,
    second: Namespace,
    dns: Process,
    dir: TempDir,
}

impl Stage {
    /// With these names, as lines of a hosts file, which are valid for `ttl` seconds.
    fn new(names: &str, ttl: u32) -> Self {
        let net = Topology::new();
        let second = add_container(&net.host, SECOND_V4, SECOND_V6);
        let dir = tempfile::tempdir().unwrap();
        let names_file = dir.path().join("names");
        fs::write(&names_file, names).unwrap();
        fs::write(dir.path().join("hosts"), "127.0.0.1 localhost\n").unwrap();
        fs::write(dir.path().join("resolv.conf"), "nameserver 127.0.0.1\nsearch internal\n").unwrap();
        let mut dnsmasq = require::command("dnsmasq");
        dnsmasq.args([
            "--keep-in-foreground",
            "--no-resolv",
            "--no-hosts",
            "--no-poll",
            "--conf-file=/dev/null",
        ]);
        dnsmasq.args([
            "--pid-file=",
            "--log-facility=-",
            "--user=root",
            "--log-queries",
            "--local=/internal/",
        ]);
        let silent = SILENT_SERVER.replace(':', "#");
        dnsmasq.args([&format!("--server=/{SILENT_DOMAIN}/{silent}"), "--dns-forward-max=10000"]);
        dnsmasq.args(["--listen-address=127.0.0.1", "--bind-interfaces"]);
        dnsmasq.arg(format!("--local-ttl={ttl}")).arg(format!("--addn-hosts={}", names_file.display()));
        let dns = net.host.spawn(dnsmasq);
        dns.wait_for_line(Stream::Stderr, |line| line.contains("read ") && line.contains("/names"));
        Self { net, second, dns, dir }
    }

    /// Has the name server know these names instead.
    fn rename(&self, names: &str) {
        fs::write(self.dir.path().join("names"), names).unwrap();
        let reads = |line: &str| line.contains("read ") && line.contains("/names");
        let before = self.dns.captured(Stream::Stderr).lines().filter(|line| reads(line)).count();
        self.dns.signal(Signal::SIGHUP);
        self.dns.wait_for_lines(Stream::Stderr, before + 1, reads);
    }

    /// `command` with the files of this stage in `/etc`.
    fn command(&self, command: &Command) -> Command {
        let mut unshare = require::command("unshare");
        let bind =
            |name: &str| format!("mount --bind '{}' /etc/{name}", self.dir.path().join(name).display());
        let script = format!("{} && {} && exec \"$@\"", bind("resolv.conf"), bind("hosts"));
        unshare.args(["--mount", "sh", "-c", &script, "sh"]);
        unshare.arg(command.get_program()).args(command.get_args());
        unshare
    }

    fn start(&self, arguments: &[&str]) -> Standalone {
        let process = self.net.host.spawn(self.command(&rproxy::command(arguments)));
        Standalone::ready(process, arguments)
    }

    fn control(&self, arguments: &[&str]) -> Controlled {
        Controlled::start_by(arguments, |command| self.net.host.spawn(self.command(&command)))
    }

    /// Serves a letter on port 80 of both containers, and of their IPv6 addresses: a, b, A and B.
    fn letters(&self) -> Vec<TcpBackend> {
        let lettered = |namespace: &Namespace, ip: IpAddr, letter: u8| {
            let serve = move |mut stream: &TcpStream| {
                stream.write_all(&[letter])?;
                testkit::backend::echo(stream)
            };
            TcpBackend::serve(namespace.run(|| TcpListener::bind((ip, 80)).unwrap()), serve)
        };
        vec![
            lettered(&self.net.container, CONTAINER_V4.into(), b'a'),
            lettered(&self.second, SECOND_V4.into(), b'b'),
            lettered(&self.net.container, CONTAINER_V6.into(), b'A'),
            lettered(&self.second, SECOND_V6.into(), b'B'),
        ]
    }

    /// Connects as a client, and returns the letter of the backend; `None` if the connection is reset.
    fn letter(&self) -> Option<u8> {
        self.connect().map(|(_stream, letter)| letter)
    }

    fn connect(&self) -> Option<(TcpStream, u8)> {
        // A reset may come before connect(2) returns.
        let stream = self.net.client.run(|| TcpStream::connect_timeout(&(HOST_V4, 80).into(), PATIENCE));
        let mut stream = client::patient(stream.ok()?);
        let mut letter = [0];
        stream.read_exact(&mut letter).ok()?;
        Some((stream, letter[0]))
    }

    fn leads_to(&self, letter: u8) {
        eventually(&format!("it leads to {}", char::from(letter)), || self.letter() == Some(letter));
    }
}

fn names_of(ips: &[IpAddr]) -> String {
    ips.iter().map(|ip| format!("{ip} web.internal\n")).collect()
}

fn at(ip: impl Into<IpAddr>) -> String {
    names_of(&[ip.into()])
}

fn list(server: &Controlled) -> Value {
    serde_json::from_str(&server.ctl(&["list", "--json"]).success()).unwrap()
}

const TO_NAME: [&str; 4] = ["--host", "0.0.0.0:80", "--to", "web.internal:80"];

fn followed() {
    let stage = Stage::new(&at(CONTAINER_V4), 1);
    let _letters = stage.letters();
    let _proxy = stage.start(&TO_NAME);
    let (stays, letter) = stage.connect().unwrap();
    assert_eq!(letter, b'a');
    stage.rename(&at(SECOND_V4));
    stage.leads_to(b'b');
    client::ping(&stays);
    // Back, by the family that it did not have yet.
    stage.rename(&at(CONTAINER_V6));
    stage.leads_to(b'A');
    client::ping(&stays);
}

fn flows() {
    let stage = Stage::new(&at(CONTAINER_V4), 1);
    let _backends = [(&stage.net.container, CONTAINER_V4), (&stage.second, SECOND_V4)]
        .map(|(namespace, ip)| udp::Backend::naming(udp::bind_in(namespace, (ip, 53))));
    let server = stage.control(&["--proto", "udp", "--host", "0.0.0.0:5300", "--to", "web.internal:53"]);
    let socket = stage.net.client.run(|| udp::client(Ipv4Addr::UNSPECIFIED));
    let answer = |socket: &UdpSocket| udp::ask(socket, (HOST_V4, 5300).into(), b"who").0;
    let first = answer(&socket);
    assert_eq!(list(&server)["mappings"][0]["resolved"][0], CONTAINER_V4.to_string());
    stage.rename(&at(SECOND_V4));
    eventually("the name is followed", || {
        list(&server)["mappings"][0]["resolved"][0] == SECOND_V4.to_string()
    });
    assert_ne!(answer(&socket), first, "the same client is answered by the other container");
    let text = server.ctl(&["list"]).success();
    assert!(text.contains("web.internal:53 (172.17.0.3)"), "{text}");
    // What `list` prints can be applied, and changes nothing.
    let file = server.file("list.json", &server.ctl(&["list", "--json"]).success());
    let applied = server.ctl(&["apply", file.to_str().unwrap()]).success();
    assert_eq!(applied.trim(), "0 added, 0 changed, 0 removed, 1 not touched");
}

fn late() {
    let stage = Stage::new("", 1);
    let _letters = stage.letters();
    let proxy = stage.start(&TO_NAME);
    let said =
        proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("the name does not resolve;"));
    assert!(said.contains("name=web.internal") && said.contains("there is no such name"), "{said}");
    assert_eq!(stage.letter(), None);
    let refused =
        proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("connection reset: no backend"));
    assert!(refused.contains("the name web.internal does not resolve"), "{refused}");
    assert!(refused.contains("backend=web.internal:80"), "{refused}");
    stage.rename(&at(CONTAINER_V4));
    stage.leads_to(b'a');
    // When it is gone again, its last address stays.
    stage.rename("");
    proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("does not resolve any more"));
    assert_eq!(stage.letter(), Some(b'a'));
}

fn required() {
    let stage = Stage::new("", 1);
    let arguments = [&TO_NAME[..], &["--require-resolved"]].concat();
    let output = stage.net.host.spawn(stage.command(&rproxy::command(&arguments))).into_output();
    assert_eq!(output.status.code(), Some(1), "{output:#?}");
    let lines: Vec<&str> = output.stderr.lines().filter(|line| line.starts_with("rproxy: ")).collect();
    assert_eq!(lines.len(), 1, "{output:#?}");
    assert!(
        lines[0].contains("80/tcp: the name web.internal does not resolve: there is no such name"),
        "{output:#?}"
    );
    let server = stage.control(&[]);
    let add = ["add", "--host", "0.0.0.0:80", "--to", "web.internal:80", "--require-resolved"];
    let output = server.ctl(&add);
    assert_eq!(output.status.code(), Some(1), "{output:#?}");
    assert!(output.stderr.contains("the name web.internal does not resolve"), "{output:#?}");
    assert_eq!(list(&server)["mappings"].as_array().unwrap().len(), 0);
    stage.rename(&at(CONTAINER_V4));
    let _letters = stage.letters();
    server.ctl(&add).success();
    assert_eq!(stage.letter(), Some(b'a'));
}

fn moved() {
    // Valid for an hour.
    let stage = Stage::new(&at(CONTAINER_V4), 3600);
    let mut letters = stage.letters();
    let _proxy = stage.start(&TO_NAME);
    assert_eq!(stage.letter(), Some(b'a'));
    stage.rename(&at(SECOND_V4));
    assert_eq!(stage.letter(), Some(b'a'), "it is still valid");
    drop(letters.remove(0));
    stage.leads_to(b'b');
}

fn in_turn() {
    // One that swallows what is sent to it, and one that refuses.
    for (first, silent) in [(NOBODY, true), (CONTAINER_V4, false)] {
        let stage = Stage::new(&names_of(&[first.into(), SECOND_V4.into()]), 3600);
        let mut letters = stage.letters();
        if silent {
            stage.net.container.ip(&format!("address add {NOBODY}/32 dev lo"));
            stage.net.container.command("ip route add blackhole 172.17.0.1").success();
        } else {
            drop(letters.remove(0));
        }
        let server = stage.control(&TO_NAME);
        for _ in 0..3 {
            assert_eq!(stage.letter(), Some(b'b'), "behind {first}");
        }
        let (_stream, _letter) = stage.connect().unwrap();
        let connections = server.ctl(&["connections", "--json"]).success();
        assert!(connections.contains("172.17.0.3:80"), "the address that was reached: {connections}");
    }
}

fn search() {
    let stage = Stage::new(&names_of(&[CONTAINER_V4.into(), CONTAINER_V6.into()]), 1);
    let _letters = stage.letters();
    let server = stage.control(&["--host", "0.0.0.0:80", "--to", "web:80"]);
    assert_eq!(stage.letter(), Some(b'A'), "IPv6 is tried first");
    let resolved = &list(&server)["mappings"][0]["resolved"];
    assert_eq!(*resolved, json!([format!("[{CONTAINER_V6}]"), CONTAINER_V4.to_string()]));
}

fn hosts_file() {
    let stage = Stage::new("", 1);
    let _letters = stage.letters();
    let hosts =
        |ip: Ipv4Addr| fs::write(stage.dir.path().join("hosts"), format!("{ip} box Web.Internal\n")).unwrap();
    hosts(CONTAINER_V4);
    let _proxy = stage.start(&TO_NAME);
    assert_eq!(stage.letter(), Some(b'a'));
    hosts(SECOND_V4);
    stage.leads_to(b'b');
    let asked = stage.dns.captured(Stream::Stderr);
    assert!(!asked.contains("web.internal"), "it is no matter of DNS: {asked}");
}

fn confined() {
    let stage = Stage::new(&at(CONTAINER_V4), 1);
    let _letters = stage.letters();
    let fixed = stage.start(&[&TO_NAME[..], &["--sandbox", "strict"]].concat());
    assert_eq!(stage.letter(), Some(b'a'));
    stage.rename(&at(SECOND_V4));
    stage.leads_to(b'b');
    drop(fixed);
    let server = stage.control(&["--sandbox", "strict", "--user", "nobody"]);
    server.ctl(&["add", "--host", "0.0.0.0:80", "--to", "web.internal:80"]).success();
    assert_eq!(stage.letter(), Some(b'b'));
    let resolver = resolver_of(&server.process);
    let status = fs::read_to_string(format!("/proc/{resolver}/status")).unwrap();
    for line in ["CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"] {
        assert!(status.contains(line), "no {line}: {status}");
    }
}

fn reloaded() {
    let stage = Stage::new(&at(CONTAINER_V4), 1);
    let _letters = stage.letters();
    let file = stage.dir.path().join("rproxy.toml");
    let write =
        |to: &str| fs::write(&file, format!("[[mapping]]\nhost = \"0.0.0.0:80\"\nto = \"{to}\"\n")).unwrap();
    write("172.17.0.3:80");
    let arguments = ["--config", file.to_str().unwrap()];
    let proxy = stage.net.host.spawn(stage.command(&rproxy::command(&arguments)));
    proxy.wait_for_line(Stream::Stdout, |_| true);
    assert_eq!(stage.letter(), Some(b'b'));
    write("web.internal:80");
    proxy.signal(Signal::SIGHUP);
    stage.leads_to(b'a');
    let printed =
        process::run(rproxy::command(&["--config", file.to_str().unwrap(), "--print-config"])).success();
    assert!(printed.contains("to = \"web.internal:80\""), "{printed}");
}

fn upgraded() {
    let stage = Stage::new(&names_of(&[CONTAINER_V4.into(), SECOND_V4.into()]), 1);
    let _backends = [(&stage.net.container, CONTAINER_V4), (&stage.second, SECOND_V4)]
        .map(|(namespace, ip)| udp::Backend::naming(udp::bind_in(namespace, (ip, 53))));
    let _letters = stage.letters();
    let server = stage.control(&["--host", "0.0.0.0:80", "--to", "web.internal:80"]);
    server.ctl(&["add", "--proto", "udp", "--host", "0.0.0.0:5300", "--to", "web.internal:53"]).success();
    let socket = stage.net.client.run(|| udp::client(Ipv4Addr::UNSPECIFIED));
    let answer = || udp::ask(&socket, (HOST_V4, 5300).into(), b"who").0;
    let first = answer();
    let _successors = Successors::of(&server.process);
    server.process.signal(Signal::SIGUSR2);
    server.process.wait_for_line(Stream::Stderr, |line| line.contains("a new process has taken over"));
    assert_eq!(answer(), first, "the flow stays");
    assert!(stage.letter().is_some());
    stage.rename(&at(SECOND_V4));
    stage.leads_to(b'b');
}

/// The resolver that the launcher of a process has started.
fn resolver_of(process: &Process) -> Pid {
    let named = |name: &str, parent: Option<Pid>| {
        let children = fs::read_dir("/proc").unwrap().filter_map(|entry| {
            let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
            let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let is_child = parent.is_none_or(|parent| status.contains(&format!("\nPPid:\t{parent}\n")));
            (status.starts_with(&format!("Name:\t{name}\n")) && is_child).then_some(Pid::from_raw(pid))
        });
        children.collect::<Vec<_>>()
    };
    let launcher = named("rproxy-launcher", Some(process.pid()));
    let [launcher] = launcher[..] else { panic!("{launcher:?}") };
    let resolver = named("rproxy-resolver", Some(launcher));
    let [resolver] = resolver[..] else { panic!("{resolver:?}") };
    resolver
}

fn resolver_killed() {
    let stage = Stage::new(&at(CONTAINER_V4), 1);
    let _letters = stage.letters();
    let proxy = stage.start(&TO_NAME);
    let before = resolver_of(&proxy.process);
    for (ip, letter) in [(SECOND_V4, b'b'), (CONTAINER_V4, b'a')] {
        nix::sys::signal::kill(resolver_of(&proxy.process), Signal::SIGKILL).unwrap();
        stage.rename(&at(ip));
        stage.leads_to(letter);
    }
    assert_ne!(resolver_of(&proxy.process), before);
}

fn launcher_killed() {
    let stage = Stage::new(&at(CONTAINER_V4), 1);
    let _letters = stage.letters();
    let proxy = stage.start(&TO_NAME);
    let resolver = resolver_of(&proxy.process);
    let launcher = proxy.process.only_child();
    for pid in [launcher, resolver] {
        nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
    }
    let said =
        proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("names are not looked up any more"));
    assert!(said.contains("they keep their addresses"), "{said}");
    assert_eq!(stage.letter(), Some(b'a'));
}

fn looped() {
    let stage = Stage::new(&at(HOST_V4), 1);
    let _letters = stage.letters();
    let proxy = stage.start(&[&TO_NAME[..], &["--host", "0.0.0.0:81", "--to", "172.17.0.2:80"]].concat());
    let said = proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("is not used"));
    assert!(said.contains("80/tcp would forward to itself"), "{said}");
    assert_eq!(stage.letter(), None);
    let (_stream, letter) = stage.net.client.run(|| client::connect_lettered((HOST_V4, 81).into()));
    assert_eq!(letter, b'a', "others are served");
    // A new process does not use it, either.
    let _successors = Successors::of(&proxy.process);
    proxy.process.signal(Signal::SIGUSR2);
    proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("a new process has taken over"));
    assert_eq!(stage.letter(), None);
    stage.rename(&at(CONTAINER_V4));
    stage.leads_to(b'a');
    stage.rename(&names_of(&[HOST_V4.into(), SECOND_V4.into()]));
    stage.leads_to(b'b');
    for _ in 0..5 {
        assert_eq!(stage.letter(), Some(b'b'));
    }
    let said = proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("is not used"));
    assert!(
        said.contains(&format!("address={HOST_V4}")) && said.contains("would forward to itself"),
        "{said}"
    );
}

fn silent() {
    let stage = Stage::new("", 1);
    let _letters = stage.letters();
    stage.dns.pause();
    // It is ready nevertheless, and other mappings are served.
    let both = [&TO_NAME[..], &["--host", "0.0.0.0:81", "--to", "172.17.0.2:80"]].concat();
    let _proxy = stage.start(&both);
    let (_stream, letter) = stage.net.client.run(|| client::connect_lettered((HOST_V4, 81).into()));
    assert_eq!(letter, b'a');
    assert_eq!(stage.letter(), None);
    stage.dns.resume();
    stage.rename(&at(SECOND_V4));
    stage.leads_to(b'b');
}

fn retargeted() {
    let stage = Stage::new(&names_of(&[CONTAINER_V4.into(), SECOND_V4.into()]), 3600);
    let _letters = stage.letters();
    let server = stage.control(&["--host", "0.0.0.0:80", "--to", "web.internal:80", "--name", "web"]);
    let (mut stays, _letter) = stage.connect().unwrap();
    // Its address is still one of those of the name.
    server.ctl(&["retarget", "web", "--to", "web.internal:80", "--cut"]).success();
    client::ping(&stays);
    server.ctl(&["retarget", "web", "--to", "172.17.0.99:80", "--cut"]).success();
    let mut rest = Vec::new();
    stays.read_to_end(&mut rest).expect_err("it was reset");
    server.ctl(&["retarget", "web", "--to", "web:80"]).success();
    assert!(stage.letter().is_some());
    let output = server.apply(&[json!({ "to": "we b", "to_ports": "80" })]);
    assert_eq!(output.status.code(), Some(1), "{output:#?}");
    assert!(
        output.stderr.contains("to: 'we b' is neither an IP address nor the name of a host"),
        "{output:#?}"
    );
}

fn renewed() {
    // Valid for an hour.
    let stage = Stage::new(&at(CONTAINER_V4), 3600);
    let _letters = stage.letters();
    let file = stage.dir.path().join("rproxy.toml");
    let both = "[[mapping]]\nname = \"web\"\nhost = \"0.0.0.0:80\"\nto = \"web.internal:80\"\n\
        [[mapping]]\nname = \"same\"\nhost = \"0.0.0.0:81\"\nto = \"web.internal:80\"\n";
    fs::write(&file, both).unwrap();
    let path = file.to_str().unwrap();
    let server = stage.control(&["--config", path]);
    assert_eq!(stage.letter(), Some(b'a'));
    let resolved = |index: usize| list(&server)["mappings"][index]["resolved"][0].clone();
    let both_lead_to = |ip: IpAddr| {
        let ip = rproxy_text(ip);
        eventually(&format!("both lead to {ip}"), || (resolved(0), resolved(1)) == (json!(ip), json!(ip)));
    };
    stage.rename(&at(SECOND_V4));
    server.process.signal(Signal::SIGHUP);
    both_lead_to(SECOND_V4.into());
    stage.rename(&at(CONTAINER_V6));
    server.ctl(&["apply", path]).success();
    both_lead_to(CONTAINER_V6.into());
    stage.rename(&at(CONTAINER_V4));
    server.ctl(&["retarget", "web", "--to", "web.internal:80"]).success();
    assert_eq!(stage.letter(), Some(b'a'), "it is looked up before the answer");
    both_lead_to(CONTAINER_V4.into());
}

/// An address as `rproxy` writes it.
fn rproxy_text(ip: IpAddr) -> String {
    if ip.is_ipv6() { format!("[{ip}]") } else { ip.to_string() }
}

fn other_family() {
    let stage = Stage::new(&at(CONTAINER_V6), 1);
    let log = stage.dir.path().join("access.log");
    let server = stage.control(&["--access-log", log.to_str().unwrap()]);
    let add = ["add", "--name", "web", "--host", "0.0.0.0:80", "--to", "web.internal:80", "--source"];
    let source = HOST_V4.to_string();
    let output = server.ctl(&[&add[..], &[&source]].concat());
    let why = format!("has only IPv6 addresses, and source is {source}");
    let warning = format!("rproxy: warning: web: the name web.internal {why}; clients are refused");
    assert!(output.status.success() && output.stderr.starts_with(&warning), "{output:#?}");
    let text = server.ctl(&["list"]).success();
    assert!(text.contains(&format!("web.internal:80 ({why})")), "{text}");
    assert_eq!(list(&server)["mappings"][0]["unresolved"], why);
    assert_eq!(stage.letter(), None);
    let refused =
        server.process.wait_for_line(Stream::Stderr, |line| line.contains("connection reset: no backend"));
    assert!(refused.contains(&format!("the name web.internal {why}")), "{refused}");
    eventually("the access log has the name", || {
        fs::read_to_string(&log).is_ok_and(|lines| lines.contains(" web.internal:80 "))
    });
    // What `list` prints can be applied.
    let file = server.file("list.json", &server.ctl(&["list", "--json"]).success());
    let output = server.ctl(&["apply", file.to_str().unwrap()]);
    assert!(output.status.success() && output.stderr.starts_with(&warning), "{output:#?}");
    server.ctl(&["remove", "web"]).success();
    let output = server.ctl(&[&add[..], &[&source, "--require-resolved"]].concat());
    assert!(output.stderr.contains(&format!("the name web.internal {why}")), "{output:#?}");
    // Datagrams have the same reason.
    server.ctl(&[&add[..], &[&source, "--proto", "udp"]].concat()).success();
    let socket = stage.net.client.run(|| udp::client(Ipv4Addr::UNSPECIFIED));
    socket.send_to(b"who", (HOST_V4, 80)).unwrap();
    let refused = server.process.wait_for_line(Stream::Stderr, |line| line.contains("cannot open a flow"));
    assert!(refused.contains(&format!("the name web.internal {why}")), "{refused}");
}

fn complaints() {
    let stage = Stage::new("", 1);
    let complains = |line: &str| line.contains("does not resolve") && line.contains("WARN");
    let arguments = [&TO_NAME[..], &["--require-resolved"]].concat();
    let output = stage.net.host.spawn(stage.command(&rproxy::command(&arguments))).into_output();
    assert_eq!(output.status.code(), Some(1), "{output:#?}");
    assert!(!output.stderr.lines().any(complains), "{output:#?}");
    let server = stage.control(&["--host", "0.0.0.0:80", "--to", "web.internal:80", "--name", "web"]);
    server.process.wait_for_line(Stream::Stderr, complains);
    let refused = ["add", "--name", "other", "--host", "0.0.0.0:81", "--to", "other.internal:80"];
    assert_eq!(server.ctl(&[&refused[..], &["--require-resolved"]].concat()).status.code(), Some(1));
    // Names are looked up again and again, which this outlasts: when the first one resolves, it has failed several times.
    eventually("it was asked for again", || {
        let asked = stage.dns.captured(Stream::Stderr);
        asked.lines().filter(|line| line.contains("query[A] web.internal ")).count() >= 3
    });
    stage.rename(&at(CONTAINER_V4));
    server.process.wait_for_line(Stream::Stderr, |line| line.contains("the name resolves"));
    let log = server.process.captured(Stream::Stderr);
    let complaints: Vec<&str> = log.lines().filter(|line| complains(line)).collect();
    assert!(complaints.len() == 1 && complaints[0].contains("web.internal"), "{complaints:#?}");
}
