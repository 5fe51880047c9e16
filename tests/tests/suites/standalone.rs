//! `rproxy` in standalone use: command line, output, start and end.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use socket2::{Domain, Socket, Type};

use testkit::backend::TcpBackend;
use testkit::client::{self, End, own_address};
use testkit::controlled::Controlled;
use testkit::netns::Namespace;
use testkit::process::{self, Output, Process, Stream};
use testkit::require::{self, Need};
use testkit::rproxy::{self, Ready, Standalone};
use testkit::suite::Case;

/// Less than the default drain of ten seconds: "at once" has to be told from it.
const AT_ONCE: Duration = Duration::from_secs(5);

pub(crate) fn cases() -> Vec<Case> {
    let ipv6 = &[Need::Ipv6];
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("a ready line names the real port", ready_line),
        case("several mappings", several_mappings),
        case("[::] is dual stack", dual_stack).needs(ipv6),
        case("ss and netstat show one dual-stack socket", dual_stack_in_tools).needs(&[
            Need::Ipv6,
            Need::Program("ss"),
            Need::Program("netstat"),
        ]),
        case("netstat's spelling :::PORT", netstat_spelling).needs(ipv6),
        case("--v6only leaves IPv4 out", v6_only).needs(ipv6),
        case("host and container family differ", families_differ).needs(ipv6),
        case("usage errors", usage_errors),
        case("names stay on their line of a message", names_with_line_ends),
        case("names stay on their line also for dockerd", names_with_line_ends_for_docker),
        case("help and version", help_and_version),
        case("a taken port", taken_port),
        case("an address of no machine here", foreign_address),
        case("a privileged port", privileged_port).needs(&[
            Need::Root,
            Need::Program("ip"),
            Need::Program("setpriv"),
        ]),
        case("a failed start binds nothing", failed_start_binds_nothing),
        case("a refusing backend resets the client", refusing_backend),
        case("a silent backend resets the client", silent_backend),
        case("an unlimited connect timeout", unlimited_connect_timeout),
        case("keepalive on both sides", keepalive).needs(&[Need::Program("ss")]),
        case("SIGTERM lets connections finish", sigterm_drains),
        case("the drain ends in time", drain_ends_in_time),
        case("a second signal ends the drain", second_signal_ends_drain),
        case("--drain-timeout 0 ends at once", no_drain),
        case("idle, it ends at once", idle_ends_at_once),
        case("JSON log", json_log),
        case("log levels", log_levels),
        case("out of descriptors", out_of_descriptors).needs(&[Need::Program("prlimit")]),
        case("too few descriptors for the mappings", too_few_descriptors).needs(&[Need::Program("prlimit")]),
    ]
}

fn run(arguments: &[&str]) -> Output {
    process::run(rproxy::command(arguments))
}

/// Checks that a start failed with this exit code and one line that contains all of `words`.
#[track_caller]
fn assert_fails(output: &Output, code: i32, words: &[&str]) {
    assert_eq!(output.status.code(), Some(code), "{output:#?}");
    assert_eq!(output.stdout, "", "{output:#?}");
    assert_eq!(output.stderr.lines().count(), 1, "{output:#?}");
    for word in words {
        assert!(output.stderr.contains(word), "no {word:?} in {output:#?}");
    }
}

fn ready_line() {
    let backend = TcpBackend::echo();
    let proxy = Standalone::relay_to(backend.address(), &["--proto", "tcp"]);
    let address = proxy.address();
    assert_ne!(address.port(), 0);
    assert_eq!(
        proxy.process.captured(Stream::Stdout),
        format!("{}/tcp -> {address}\n", backend.address().port())
    );
    client::assert_echoes(address);
}

fn several_mappings() {
    let backends: Vec<_> = [b"first", b"other", b"third"]
        .map(|name| TcpBackend::local(move |mut stream| stream.write_all(name)))
        .into();
    let targets: Vec<_> = backends.iter().map(|backend| backend.address().to_string()).collect();
    let proxy = Standalone::start(&[
        "--host",
        "127.0.0.1:0",
        "--to",
        &targets[0],
        "--host=0.0.0.0:0",
        "--to",
        &targets[1],
        "--to",
        &targets[2],
        "--host",
        "127.0.0.1:0",
    ]);
    let answers: Vec<_> =
        proxy.ready.iter().map(|ready| client::ask(ready.reachable(), b"").unwrap()).collect();
    assert_eq!(answers, [b"first", b"other", b"third"]);
    assert_eq!(proxy.ready[1].address.ip(), IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    let ports: Vec<_> = proxy.ready.iter().map(|ready| ready.container_port).collect();
    assert_eq!(ports, backends.iter().map(|backend| backend.address().port()).collect::<Vec<_>>());
}

fn both_families(proxy: &Standalone) -> [SocketAddr; 2] {
    let port = proxy.address().port();
    [(Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into()]
}

fn dual_stack() {
    let backend = TcpBackend::echo();
    let target = backend.address().to_string();
    let proxy = Standalone::start(&["--host", "[::]:0", "--to", &target]);
    assert_eq!(proxy.ready[0].address.ip(), IpAddr::V6(Ipv6Addr::UNSPECIFIED));
    both_families(&proxy).into_iter().for_each(client::assert_echoes);
}

fn dual_stack_in_tools() {
    let proxy = Standalone::start(&["--host", "[::]:0", "--to", "127.0.0.1:9"]);
    let port = proxy.address().port();
    let listeners = |tool: &str, arguments: &str| -> Vec<String> {
        let mut command = require::command(tool);
        command.args(arguments.split(' '));
        let table = process::run(command).success();
        let of_port = |line: &&str| {
            line.split_whitespace().nth(3).is_some_and(|local| local.ends_with(&format!(":{port}")))
        };
        table.lines().filter(of_port).map(String::from).collect()
    };
    let by_ss = listeners("ss", "-ltnH");
    assert_eq!(by_ss.len(), 1, "{by_ss:?}");
    assert!(by_ss[0].contains(&format!(" *:{port} ")), "{by_ss:?}");
    let by_netstat = listeners("netstat", "-lnt");
    assert_eq!(by_netstat.len(), 1, "{by_netstat:?}");
    assert!(by_netstat[0].starts_with("tcp6 "), "{by_netstat:?}");
    assert!(by_netstat[0].contains(&format!(" :::{port} ")), "{by_netstat:?}");
}

fn netstat_spelling() {
    let backend = TcpBackend::echo();
    let host = format!(":::{}", client::free_port(Ipv6Addr::UNSPECIFIED));
    let target = backend.address().to_string();
    let proxy = Standalone::start(&["--host", &host, "--to", &target]);
    both_families(&proxy).into_iter().for_each(client::assert_echoes);
}

fn v6_only() {
    let backend = TcpBackend::echo();
    let target = backend.address().to_string();
    // With the port taken over IPv4, a socket for both families could not be had.
    let taken = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let host = format!("[::]:{}", taken.local_addr().unwrap().port());
    let proxy = Standalone::start(&["--v6only", "--host", &host, "--to", &target]);
    let [_v4, v6] = both_families(&proxy);
    client::assert_echoes(v6);
}

fn families_differ() {
    let v6_backend = TcpBackend::echo_at("[::1]:0");
    let v4_backend = TcpBackend::echo();
    let (to_v6, to_v4) = (v6_backend.address().to_string(), v4_backend.address().to_string());
    let proxy =
        Standalone::start(&["--host", "127.0.0.1:0", "--to", &to_v6, "--host", "[::1]:0", "--to", &to_v4]);
    proxy.ready.iter().map(Ready::reachable).for_each(client::assert_echoes);
}

/// Arguments, and what the line about them must name: the argument, and as a rule what would work.
const USAGE_ERRORS: &[(&[&str], &[&str])] = &[
    (&[], &["--host", "--to"]),
    (&["--host", "127.0.0.1:0"], &["--host 127.0.0.1:0", "--to"]),
    (&["--to", "127.0.0.1:80"], &["--to 127.0.0.1:80", "--host"]),
    (&["--host", "127.0.0.1:0", "--to", "127.0.0.1:0"], &["--to 127.0.0.1:0", "port"]),
    (&["--host", "127.0.0.1:0", "--to", "127.0.0.1"], &["--to 127.0.0.1", "port"]),
    (&["--host", "127.0.0.1", "--to", "127.0.0.1:80"], &["--host 127.0.0.1", "port"]),
    (&["--host", "8080", "--to", "127.0.0.1:80"], &["--host 8080", "0.0.0.0:8080"]),
    (&["--host", "::1:x", "--to", "127.0.0.1:80"], &["--host ::1:x", "port"]),
    (&["--host", "127.0.0.1:65536", "--to", "127.0.0.1:80"], &["--host 127.0.0.1:65536", "65535"]),
    (&["--host", "localhost:80", "--to", "127.0.0.1:80"], &["--host localhost:80", "127.0.0.1"]),
    (&["--host", "127.0.0.1:0", "--to", "web!:80"], &["--to web!:80", "address"]),
    (&["--host", "127.0.0.1:0", "--to", "127.0.0.1:80", "--proto", "bogus"], &["--proto", "bogus", "tcp"]),
    (
        &["--host", "127.0.0.1:0", "--to", "127.0.0.1:80", "--connect-timeout", "soon"],
        &["--connect-timeout", "soon", "10s"],
    ),
    (
        &["--host", "127.0.0.1:0", "--to", "127.0.0.1:80", "--drain-timeout", "later"],
        &["--drain-timeout", "later"],
    ),
    (
        &["--host", "127.0.0.1:0", "--to", "127.0.0.1:80", "--log-format", "xml"],
        &["--log-format", "xml", "json"],
    ),
    (
        &["--host", "127.0.0.1:0", "--to", "127.0.0.1:80", "--log-level", "loud"],
        &["--log-level", "loud", "debug"],
    ),
    (&["--host", "127.0.0.1:0", "--to", "127.0.0.1:80", "--no-such-flag"], &["--no-such-flag"]),
    (&["--host"], &["--host"]),
];

fn usage_errors() {
    for (arguments, words) in USAGE_ERRORS {
        assert_fails(&run(arguments), 2, words);
    }
    let mut command = rproxy::command(&["--host", "127.0.0.1:0", "--to", "127.0.0.1:80"]);
    command.env("RPROXY_SANDBOX", "lots");
    let output = process::run(command);
    assert_fails(&output, 2, &["'lots' for RPROXY_SANDBOX", "auto, strict, off"]);
}

/// Whoever chooses a name must not be able to write lines of their own among ours.
fn names_with_line_ends() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (missing, wrong) = (path("a\nb"), path("wrong\nb"));
    let (in_missing, here) = (path("a\nb/c"), &["--host", "127.0.0.1:0", "--to", "127.0.0.1:80"][..]);
    fs::write(&wrong, "hots = 1").unwrap();
    let failed: &[&[&str]] = &[
        &["--config", &missing],
        &["--config", &missing, "--print-config"],
        &["--config", &wrong],
        &["check-config", &missing],
        &["check-config", &wrong],
        &[here, &["--control", &in_missing]].concat(),
        &[here, &["--control", &wrong]].concat(),
        &["ctl", "--control", &missing, "list"],
        &["ctl", "--control", &in_missing, "list"],
        &["ctl", "--control", &wrong, "list"],
        &["ctl", "apply", &missing],
        &["ctl", "apply", &wrong],
    ];
    let misused: &[&[&str]] = &[
        &["a\nb"],
        &["--a\nb"],
        &["--host", "a\nb:80", "--to", "127.0.0.1:80"],
        &["--host", "127.0.0.1:0", "--to", "a\nb"],
        &["--to", "127.0.0.1", "-p", "a\nb"],
        &[here, &["--proto", "a\nb"]].concat(),
        &[here, &["--name", "a\nb"]].concat(),
        &[here, &["--user", "a\nb"]].concat(),
        &[here, &["--allow", "a\nb"]].concat(),
        &[here, &["--sandbox", "a\nb"]].concat(),
        &[here, &["--drain-timeout", "a\nb"]].concat(),
        &[here, &["--log-level", "a\nb"]].concat(),
        &["ctl", "remove", "a\nb"],
        &["ctl", "a\nb"],
    ];
    for (code, all) in [(1, failed), (2, misused)] {
        for arguments in all {
            let output = run(arguments);
            assert_fails(&output, code, &["\\nb"]);
        }
    }
}

/// What is said in the place of docker-proxy ends with its usage, or is a line of the log.
fn names_with_line_ends_for_docker() {
    for arguments in [
        &["-host-port", "a\nb"][..],
        &["-host-ip=a\nb"],
        &["-use-listen-fd=a\nb"],
        &["-container-ip", "1.1.1.1", "-x\nb"],
    ] {
        let output = run(arguments);
        assert!(output.stderr.lines().next().unwrap().contains("\\nb"), "{output:#?}");
    }
    let output = run(&["-proto", "a\nb", "-host-port", "80", "-container-port", "80"]);
    assert!(output.stderr.contains("-proto a\\nb: ") && !output.stderr.contains("\nb"), "{output:#?}");
}

fn help_and_version() {
    assert!(run(&["--help"]).success().contains("--host"));
    assert!(run(&["--version"]).success().starts_with("rproxy "));
}

fn taken_port() {
    let taken = TcpListener::bind(own_address()).unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = run(&["--host", &address, "--to", "127.0.0.1:80"]);
    assert_fails(&output, 1, &[&format!("--host {address}"), "taken"]);
}

/// The address is reserved for documentation, so that no machine has it.
fn foreign_address() {
    let output = run(&["--host", "192.0.2.1:80", "--to", "127.0.0.1:80"]);
    let hint = "stands for all; --freebind binds it before it is there";
    assert_fails(&output, 1, &["--host 192.0.2.1:80", "no such address", hint]);
}

/// What a user lacks is a capability. Without it, root is refused as well, and the test need not
/// depend on which directories another user may enter.
fn privileged_port() {
    let namespace = Namespace::new();
    let mut command = require::command("setpriv");
    command.arg("--bounding-set=-net_bind_service").arg(rproxy::rproxy());
    command.args(["--host", "127.0.0.1:80", "--to", "127.0.0.1:8080"]);
    let output = namespace.spawn(command).into_output();
    assert_fails(&output, 1, &["--host 127.0.0.1:80", "privileged", "1024"]);
}

fn failed_start_binds_nothing() {
    let taken = TcpListener::bind(own_address()).unwrap();
    let (free, taken) = (own_address().to_string(), taken.local_addr().unwrap().to_string());
    let to = "127.0.0.1:80";
    let output = run(&["--host", &free, "--to", to, "--host", &taken, "--to", to]);
    assert_fails(&output, 1, &[&format!("--host {taken}")]);
    TcpListener::bind(free).unwrap();
}

fn refusing_backend() {
    let proxy = Standalone::relay_to(own_address(), &[]);
    assert_eq!(client::end_of(proxy.address()), (vec![], End::Reset));
}

/// A listener whose queue is full, so that the kernel drops what else comes: a backend that is silent.
fn full_listener() -> (Socket, SocketAddr, TcpStream) {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
    // A queue of length 0 holds one.
    listener.listen(0).unwrap();
    let address = listener.local_addr().unwrap().as_socket().unwrap();
    let first = client::connect(address);
    (listener, address, first)
}

fn silent_backend() {
    let (_listener, backend, _first) = full_listener();
    let proxy = Standalone::relay_to(backend, &["--connect-timeout", "300ms"]);
    assert_eq!(client::end_of(proxy.address()), (vec![], End::Reset));
}

/// Whether some socket has sent a SYN to this port of an IPv4 address, and waits.
fn is_dialled(port: u16) -> bool {
    let (remote_port, syn_sent) = (format!(":{port:04X}"), "02");
    fs::read_to_string("/proc/net/tcp").unwrap().lines().any(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        fields[2].ends_with(&remote_port) && fields[3] == syn_sent
    })
}

fn unlimited_connect_timeout() {
    let (listener, backend, _first) = full_listener();
    let proxy = Standalone::relay_to(backend, &["--connect-timeout", "unlimited"]);
    let mut client = client::connect(proxy.address());
    client.write_all(b"early").unwrap();
    while !is_dialled(backend.port()) {
        assert!(proxy.process.is_running());
    }
    // Makes room, which the proxy's next try finds.
    listener.accept().unwrap();
    let (accepted, _) = listener.accept().unwrap();
    let mut received = [0; 5];
    client::patient(accepted.into()).read_exact(&mut received).unwrap();
    assert_eq!(&received, b"early");
}

fn keepalive() {
    let backend = TcpBackend::echo();
    let proxy = Standalone::relay_to(backend.address(), &[]);
    let client = client::connect(proxy.address());
    client::ping(&client);
    for side in
        [format!("sport = :{}", proxy.address().port()), format!("dport = :{}", backend.address().port())]
    {
        let mut command = require::command("ss");
        command.args(["-tnoH", "state", "established"]).arg(side);
        let table = process::run(command).success();
        assert!(table.contains("timer:(keepalive,1"), "no keepalive of 15 s: {table}");
    }
}

/// Waits until the proxy takes no new connections.
fn wait_until_closed(address: SocketAddr) {
    while TcpStream::connect(address).is_ok() {
        thread::yield_now();
    }
}

fn sigterm_drains() {
    let backend = TcpBackend::echo();
    let proxy = Standalone::relay_to(backend.address(), &["--drain-timeout", "1h"]);
    let client = client::connect(proxy.address());
    client::ping(&client);
    proxy.process.signal(Signal::SIGTERM);
    wait_until_closed(proxy.address());
    client::ping(&client);
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client::read_to_end(&client), (vec![], End::Eof));
    assert_eq!(proxy.process.wait().code(), Some(0));
}

/// Sends a signal while a connection is open that never ends, and checks that the proxy ends both.
fn ends_with_open_connection(more_arguments: &[&str], signals: &[Signal]) {
    let backend = TcpBackend::echo();
    let proxy = Standalone::relay_to(backend.address(), more_arguments);
    let client = client::connect(proxy.address());
    client::ping(&client);
    for signal in signals {
        proxy.process.signal(*signal);
        wait_until_closed(proxy.address());
    }
    assert_eq!(proxy.process.wait_within(AT_ONCE).code(), Some(0));
    client::read_to_end(&client);
}

fn drain_ends_in_time() {
    ends_with_open_connection(&["--drain-timeout", "300ms"], &[Signal::SIGTERM]);
}

fn second_signal_ends_drain() {
    ends_with_open_connection(&[], &[Signal::SIGTERM, Signal::SIGTERM]);
    ends_with_open_connection(&[], &[Signal::SIGINT, Signal::SIGTERM]);
}

fn no_drain() {
    ends_with_open_connection(&["--drain-timeout", "0"], &[Signal::SIGTERM]);
    ends_with_open_connection(&["--drain-timeout=0"], &[Signal::SIGINT]);
}

fn idle_ends_at_once() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let proxy = Standalone::relay_to(own_address(), &[]);
        proxy.process.signal(signal);
        assert_eq!(proxy.process.wait_within(AT_ONCE).code(), Some(0));
    }
}

fn json_log() {
    let arguments = ["--log-format", "json", "--log-level", "debug"];
    let proxy = Standalone::relay_to(own_address(), &arguments);
    client::end_of(proxy.address());
    proxy.process.signal(Signal::SIGTERM);
    let output = proxy.process.into_output();
    assert!(!output.stderr.is_empty());
    for line in output.stderr.lines() {
        let record: serde_json::Value = serde_json::from_str(line).expect(line);
        assert!(record["level"].is_string() && record["timestamp"].is_string(), "{line}");
    }
}

/// What a proxy logs that serves one client whose backend refuses.
fn log_of(more_arguments: &[&str], rust_log: Option<&str>) -> String {
    let backend = own_address().to_string();
    let arguments = [&["--host", "127.0.0.1:0", "--to", &backend], more_arguments].concat();
    let mut command = rproxy::command(&arguments);
    command.env_remove("RUST_LOG").envs(rust_log.map(|level| ("RUST_LOG", level)));
    let proxy = Standalone::ready(Process::spawn(command), &arguments);
    client::end_of(proxy.address());
    proxy.process.signal(Signal::SIGTERM);
    proxy.process.into_output().stderr
}

fn log_levels() {
    assert_eq!(log_of(&["--log-level", "off"], None), "");
    assert_eq!(log_of(&[], Some("off")), "");
    assert!(log_of(&[], None).contains("INFO"));
    assert!(log_of(&["--log-level", "debug"], Some("off")).contains("DEBUG"), "the flag wins");
    let told = log_of(&[], Some("loud"));
    assert!(told.contains("RUST_LOG is ignored: 'loud' names no level"), "{told}");
    assert!(told.contains("INFO"), "{told}");
}

/// The processor time that a process has used, in clock ticks, of which there are 100 a second.
fn cpu_ticks(pid: Pid) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // After the name, which is in parentheses, utime and stime are the 12th and 13th field.
    let fields = stat.rsplit_once(')').unwrap().1.split_whitespace();
    fields.skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum()
}

/// `rproxy` with a limit of descriptors.
fn limited(most: usize, arguments: &[&str]) -> Command {
    let mut command = require::command("prlimit");
    command.arg(format!("--nofile={most}:{most}")).arg(rproxy::rproxy()).args(arguments);
    command
}

/// The limit that a message suggests.
#[track_caller]
fn suggested_limit(message: &str) -> usize {
    assert!(message.contains("descriptors are needed, and the limit is 64; set LimitNOFILE="), "{message}");
    assert!(message.contains("--ulimit nofile="), "{message}");
    let number = message.split("`ulimit -n ").nth(1).and_then(|rest| rest.split('`').next());
    number.unwrap().parse().unwrap()
}

fn too_few_descriptors() {
    let host = format!("{}:8000-8099", client::own_loopback());
    let arguments = ["--host", &host, "--to", "192.0.2.1:8000-8099"];
    let output = process::run(limited(64, &arguments));
    assert_fails(&output, 1, &["--host", "too many open files: 164 descriptors are needed"]);
    let enough = suggested_limit(&output.stderr);
    Process::spawn(limited(enough, &arguments)).wait_for_line(Stream::Stdout, |line| line.contains(" -> "));
    // The same for one that is told later.
    let proxy = Controlled::start_by(&[], |command| {
        let arguments: Vec<_> = command.get_args().map(|argument| argument.to_str().unwrap()).collect();
        Process::spawn(limited(64, &arguments))
    });
    let refused = proxy.ctl(&[&["add", "--name", "many"], &arguments[..]].concat());
    assert_fails(&refused, 1, &["many: cannot listen on "]);
    suggested_limit(&refused.stderr);
    assert_eq!(proxy.json(&["list"])["mappings"], serde_json::json!([]));
}

fn out_of_descriptors() {
    let backend = TcpBackend::echo();
    let proxy = Standalone::relay_to(backend.address(), &[]);
    let pid = proxy.process.pid();
    client::assert_echoes(proxy.address());
    // Below what is open already, so that every accept fails.
    proxy.process.limit_descriptors(3);

    let mut waiting = client::connect(proxy.address());
    waiting.write_all(b"ping").unwrap();
    proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("accept"));
    let before = cpu_ticks(pid);
    waiting.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let error = waiting.read(&mut [0; 4]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
    let spent = cpu_ticks(pid) - before;
    assert!(spent < 40, "{spent} ticks in 2 s: it spins");
    let lines = proxy.process.captured(Stream::Stderr).lines().count();
    assert!(lines < 10, "{lines} lines of log");

    proxy.process.limit_descriptors(1024);
    let mut answer = [0; 4];
    client::patient(waiting).read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"ping");
    client::assert_echoes(proxy.address());
}
