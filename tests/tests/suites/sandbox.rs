//! What `rproxy` can still do while it serves, observed from outside and from inside a process that is confined in the
//! same way.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

use nix::libc;
use nix::sys::ptrace;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::utsname::uname;
use nix::unistd::Pid;
use rproxy::sandbox::{self, Changes, Mode, Needs};
use rproxy_mapping::PortMapping;
use rproxy_mapping::addr::{BackendAddr, HostSocketAddr, Protocol};
use serde_json::json;
use socket2::{Domain, Socket, TcpKeepalive, Type};

use testkit::backend::TcpBackend;
use testkit::client;
use testkit::controlled::{Controlled, mapping};
use testkit::docker_proxy::{self, DockerProxy, Status};
use testkit::process::{self, Stream};
use testkit::require::{self, Need};
use testkit::role;
use testkit::rproxy::{self as program, Standalone};
use testkit::suite::Case;
use testkit::udp;

const SECOND: Duration = Duration::from_secs(1);

/// The role of a process that confines itself and tries what it must not be able to do.
const CONFINED: &str = "confined";

/// Plays that role to its end, if it is the one.
pub(crate) fn play(role: &[&str]) -> Option<ExitCode> {
    let &[CONFINED, changes, port, dir] = role else { return None };
    Some(try_everything(changes == "changes", port.parse().unwrap(), Path::new(dir)))
}

pub(crate) fn cases() -> Vec<Case> {
    let root = &[Need::Root];
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("inside: nothing but serving is possible", inside),
        case("inside: what changes need is possible as well", inside_with_changes),
        case("a TCP relay has no capability, files or new calls", tcp_relay),
        case("a UDP relay keeps its buffers' capability", udp_relay).needs(root),
        case("with a control socket it keeps what changes need", controlled).needs(root),
        case("docker-proxy's flags confine, too", docker),
        case("another user", other_user).needs(root),
        case("another user with a control socket", other_user_controlled).needs(root),
        case("a user that cannot be switched to", impossible_user)
            .needs(&[Need::Root, Need::Program("setpriv")]),
        case("--sandbox off", off),
        case("what an old kernel cannot restrict is said in one line", strict_on_old_kernels),
        case("what strict confinement lacks is named", strict_fails).needs(&[Need::Program("strace")]),
        case("without Landlock it serves nevertheless", auto_goes_on).needs(&[Need::Program("strace")]),
    ]
}

/// What became of an attempt: an error by its name, or success.
fn outcome<T>(result: io::Result<T>) -> String {
    match result {
        Ok(_) => "possible".to_owned(),
        Err(error) => nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(0)).to_string(),
    }
}

/// Confines this process as one that relays to port `port`, and prints what it can do. `dir` is for its files,
/// which it cannot remove any more.
#[expect(clippy::print_stdout, reason = "the report")]
fn try_everything(changes: bool, port: u16, dir: &Path) -> ExitCode {
    let localhost = IpAddr::from(Ipv4Addr::LOCALHOST);
    let host = HostSocketAddr::new(localhost, 0);
    let backend = BackendAddr::new(localhost, port).unwrap();
    let forward = PortMapping { protocol: Protocol::Tcp, host, backend, v6only: false };
    let own_dir = dir.join("own");
    fs::create_dir(&own_dir).unwrap();
    let (socket, own, others) = (own_dir.join("socket"), own_dir.join("configuration"), dir.join("others"));
    let _listener = UnixListener::bind(&socket).unwrap();
    [&own, &others].iter().for_each(|file| fs::write(file, "").unwrap());
    let unix_sockets = changes.then_some(&*socket).into_iter().collect();
    let changes = changes.then_some(Changes { configuration: Some(&own) });
    let other = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let executable = fs::File::open("/bin/true").unwrap();
    let (stream, datagrams) = (new_socket(Type::STREAM), new_socket(Type::DGRAM));
    sandbox::confine(Mode::Strict, &Needs { changes, unix_sockets, ..Needs::to_serve([&forward]) }).unwrap();

    let loopback = Ipv4Addr::LOCALHOST;
    let errno = |result: nix::Result<()>| result.map_err(io::Error::from);
    let mut tried = BTreeMap::from([
        ("open", outcome(fs::File::open("/etc/passwd"))),
        ("open its own", outcome(fs::File::open(&own))),
        ("create", outcome(fs::File::create(own_dir.join("new")))),
        ("remove another file", outcome(fs::remove_file(&others))),
        ("execute", outcome(Command::new("/bin/true").spawn())),
        (
            "execute what is open",
            outcome({
                use std::os::fd::AsRawFd;
                Command::new(format!("/proc/self/fd/{}", executable.as_raw_fd())).spawn()
            }),
        ),
        ("trace", outcome(errno(ptrace::attach(Pid::parent())))),
        ("signal", outcome(errno(nix::sys::signal::kill(Pid::parent(), None)))),
        ("listen", outcome(TcpListener::bind((loopback, 0)))),
        ("connect to the backend", outcome(TcpStream::connect((loopback, port)))),
        ("connect elsewhere", outcome(TcpStream::connect(other.local_addr().unwrap()))),
        (
            "a thread",
            outcome(thread::Builder::new().name("named".to_owned()).spawn(|| ()).map(|thread| thread.join())),
        ),
        ("a datagram socket's buffer", outcome(UdpSocket::bind((loopback, 0)))),
        ("a raw socket", outcome(Socket::new(Domain::IPV4, Type::RAW, None))),
        ("a local socket", outcome(UnixStream::connect(&socket))),
        ("a namespace", outcome(errno(nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER)))),
        ("mount", outcome(errno(nix::mount::umount("/proc")))),
    ]);
    tried.extend(options_in_use(&stream, &datagrams));
    tried.extend(options_of_sources(&stream, &datagrams));
    tried.extend(other_options(&stream, &datagrams));
    println!("{}", json!(tried));
    ExitCode::SUCCESS
}

/// A socket of this kind that knows options of both families.
fn new_socket(kind: Type) -> Socket {
    Socket::new(Domain::IPV6, kind, None).unwrap()
}

fn options_in_use(stream: &Socket, datagrams: &Socket) -> [(&'static str, String); 6] {
    [
        ("the options of a connection", outcome(set_options_of_a_connection(stream))),
        ("the timers of a connection", outcome(set_timers(stream))),
        ("an address that is not there (IPv4)", outcome(stream.set_freebind_v4(true))),
        ("an address that is not there (IPv6)", outcome(datagrams.set_freebind_v6(true))),
        ("the options of a flow", outcome(set_options_of_a_flow(datagrams))),
        ("the options of a listener", outcome(set_options_of_a_listener(datagrams))),
    ]
}

fn set_options_of_a_connection(socket: &Socket) -> io::Result<()> {
    socket.set_linger(Some(Duration::ZERO))?;
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_quickack(true)?;
    socket.set_out_of_band_inline(true)?;
    socket.set_recv_buffer_size(65_536)?;
    socket.set_send_buffer_size(65_536)?;
    rproxy_sys::socket::set_receive_low_watermark(socket.as_fd(), 2)?;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(SECOND).with_interval(SECOND))
}

fn set_timers(socket: &Socket) -> io::Result<()> {
    socket.set_tcp_user_timeout(Some(SECOND))?;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_retries(3))
}

fn set_options_of_a_flow(socket: &Socket) -> io::Result<()> {
    rproxy_sys::udp::set_buffers(socket.as_fd(), 65_536, 65_536)?;
    rproxy_sys::udp::enable_gro(socket.as_fd())
}

fn set_options_of_a_listener(socket: &Socket) -> io::Result<()> {
    socket.set_only_v6(false)?;
    rproxy_sys::udp::report_local_addr(socket.as_fd(), true)
}

/// Options of `source` and `device`, which a change may ask for.
fn options_of_sources(stream: &Socket, datagrams: &Socket) -> BTreeMap<&'static str, String> {
    let any_port = rproxy_sys::socket::choose_port_on_connect(stream.as_fd());
    BTreeMap::from([
        ("source IP_TRANSPARENT", outcome(stream.set_ip_transparent_v4(true))),
        ("source IPV6_TRANSPARENT", outcome(stream.set_ip_transparent_v6(true))),
        ("source IP_BIND_ADDRESS_NO_PORT", outcome(any_port)),
        ("source SO_BINDTODEVICE", outcome(datagrams.bind_device(Some(b"lo")))),
    ])
}

/// Options that serving does not need, and that mark packets, lead them elsewhere, change how they are filtered, or
/// take a connection apart.
fn other_options(stream: &Socket, datagrams: &Socket) -> BTreeMap<&'static str, String> {
    let all = [libc::sock_filter { code: 6, jt: 0, jf: 0, k: u32::MAX }];
    let group = (Ipv4Addr::new(224, 0, 0, 251), Ipv4Addr::LOCALHOST);
    let nix = |result: nix::Result<()>| outcome(result.map_err(io::Error::from));
    BTreeMap::from([
        (
            "option SO_ATTACH_FILTER",
            outcome(stream.attach_filter(&[socket2::SockFilter::new(6, 0, 0, u32::MAX)])),
        ),
        ("option SO_DETACH_FILTER", outcome(stream.detach_filter())),
        ("option SO_ATTACH_REUSEPORT_CBPF", {
            let program = libc::sock_fprog { len: 1, filter: all.as_ptr().cast_mut() };
            nix(setsockopt(datagrams, sockopt::AttachReusePortCbpf, &program))
        }),
        ("option SO_MARK", outcome(stream.set_mark(1))),
        ("option SO_PRIORITY", outcome(stream.set_priority(1))),
        ("option SO_BROADCAST", outcome(datagrams.set_broadcast(true))),
        ("option SO_DONTROUTE", nix(setsockopt(datagrams, sockopt::DontRoute, &true))),
        ("option SO_BUSY_POLL", outcome(datagrams.set_busy_poll(1))),
        ("option SO_INCOMING_CPU", outcome(stream.set_cpu_affinity(0))),
        ("option TCP_REPAIR", nix(setsockopt(stream, sockopt::TcpRepair, &1))),
        ("option TCP_ULP", nix(setsockopt(stream, sockopt::TcpUlp::default(), b"tls"))),
        ("option TCP_CONGESTION", outcome(stream.set_tcp_congestion(b"reno"))),
        ("option TCP_CORK", outcome(stream.set_tcp_cork(true))),
        ("option TCP_MAXSEG", outcome(stream.set_tcp_mss(500))),
        ("option TCP_FASTOPEN_CONNECT", nix(setsockopt(stream, sockopt::TcpFastOpenConnect, &true))),
        ("option UDP_SEGMENT", nix(setsockopt(datagrams, sockopt::UdpGsoSegment, &1000))),
        ("option IP_TTL", outcome(stream.set_ttl_v4(1))),
        ("option IP_ADD_MEMBERSHIP", outcome(datagrams.join_multicast_v4(&group.0, &group.1))),
        ("option IPV6_UNICAST_HOPS", outcome(stream.set_unicast_hops_v6(1))),
    ])
}

/// What a process can do that is confined in this way.
fn possible(changes: &str) -> Vec<String> {
    let backend = TcpBackend::echo();
    let (port, dir) = (backend.address().port().to_string(), tempfile::tempdir().unwrap());
    let role = [CONFINED, changes, &port, dir.path().to_str().unwrap()];
    let report = process::run(role::command(&role)).success();
    let report: BTreeMap<String, String> = serde_json::from_str(&report).unwrap();
    assert!(report.len() > 10, "{report:?}");
    let refused = |outcome: &str| ["ENOSYS", "EACCES", "EPERM"].iter().any(|name| outcome.contains(name));
    for (what, outcome) in &report {
        // By the filter, and not for another reason.
        assert!(!what.starts_with("option ") || outcome.contains("ENOSYS"), "{what}: {outcome}");
        assert!(outcome == "possible" || refused(outcome), "{what}: {outcome}");
        // The kernel may refuse those without a privilege.
        let of_source = what.starts_with("source ");
        assert!(!of_source || outcome.contains("ENOSYS") == (changes == "none"), "{what}: {outcome}");
    }
    let others = report.into_iter().filter(|(what, _outcome)| !what.starts_with("source "));
    others.filter(|(_what, outcome)| outcome == "possible").map(|(what, _)| what).collect()
}

/// The first kernels on which Landlock restricts files, TCP ports, and signals (landlock(7), VERSIONS).
const LANDLOCK: [(u32, u32); 3] = [(5, 13), (6, 7), (6, 12)];

/// Whether this kernel is that one or newer.
fn is_since(first: (u32, u32)) -> bool {
    let name = uname().unwrap();
    let mut numbers =
        name.release().to_str().unwrap().split(['.', '-']).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap(), numbers.next().unwrap()) >= first
}

fn inside() {
    let mut expected = vec!["a thread", "connect to the backend", "the options of a connection"];
    if !is_since(LANDLOCK[1]) {
        expected.push("connect elsewhere");
    }
    expected.sort_unstable();
    assert_eq!(possible("none"), expected);
}

fn inside_with_changes() {
    let mut more = vec![
        "a datagram socket's buffer",
        "a thread",
        "an address that is not there (IPv4)",
        "an address that is not there (IPv6)",
        "connect elsewhere",
        "connect to the backend",
        "listen",
        "open its own",
        "the options of a connection",
        "the options of a flow",
        "the options of a listener",
        "the timers of a connection",
    ];
    if !is_since(LANDLOCK[0]) {
        more.extend(["create", "open", "remove another file"]);
    }
    more.sort_unstable();
    assert_eq!(possible("changes"), more);
}

/// What the kernel says of a process (proc(5), `status`).
struct Confinement {
    capabilities: u64,
    permitted: u64,
    seccomp: u64,
    no_new_privs: u64,
    uid: u64,
    gid: u64,
    groups: String,
}

fn confinement(pid: Pid) -> Confinement {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| -> &str {
        let line = status.lines().find(|line| line.starts_with(&format!("{name}:"))).unwrap();
        line.split_once(':').unwrap().1.trim()
    };
    let number = |name| field(name).split_whitespace().next().unwrap().parse().unwrap();
    Confinement {
        capabilities: u64::from_str_radix(field("CapEff"), 16).unwrap(),
        permitted: u64::from_str_radix(field("CapPrm"), 16).unwrap(),
        seccomp: number("Seccomp"),
        no_new_privs: number("NoNewPrivs"),
        uid: number("Uid"),
        gid: number("Gid"),
        groups: field("Groups").to_owned(),
    }
}

/// The bits of capabilities(7), as far as this process has them.
const NET_BIND_SERVICE: u64 = 1 << 10;
const NET_ADMIN: u64 = 1 << 12;
const SYS_RESOURCE: u64 = 1 << 24;

#[track_caller]
fn assert_confined(pid: Pid, most_capabilities: u64) -> Confinement {
    let confinement = confinement(pid);
    let own = self::confinement(Pid::this());
    assert_eq!(confinement.capabilities, most_capabilities & own.capabilities);
    assert_eq!(confinement.permitted, confinement.capabilities);
    // A filter, of which there is one more than here.
    assert_eq!((confinement.seccomp, confinement.no_new_privs), (2, 1));
    confinement
}

fn tcp_relay() {
    let backend = TcpBackend::echo();
    let proxy = Standalone::relay_to(backend.address(), &["--sandbox", "strict"]);
    assert_confined(proxy.process.pid(), SYS_RESOURCE);
    // Also in what starts later.
    let clients: Vec<_> = (0..8).map(|_| client::connect(proxy.address())).collect();
    for mut client in &clients {
        io::Write::write_all(&mut client, b"x").unwrap();
        io::Read::read_exact(&mut client, &mut [0]).unwrap();
    }
    for task in fs::read_dir(format!("/proc/{}/task", proxy.process.pid())).unwrap() {
        let task = task.unwrap().file_name().into_string().unwrap().parse().unwrap();
        assert_confined(Pid::from_raw(task), SYS_RESOURCE);
    }
    let state = if is_since(LANDLOCK[0]) { "enforced" } else { "unavailable" };
    proxy.process.wait_for_line(Stream::Stderr, |line| {
        line.contains("confined") && line.replace('"', "").contains(&format!("landlock={state}"))
    });
}

/// One line names what a kernel is too old for, with the first kernel that has it; a newer one gets no such line.
fn strict_on_old_kernels() {
    let backend = TcpBackend::echo();
    let parts = ["files (Linux 5.13)", "TCP ports (Linux 6.7)", "signals and abstract sockets (Linux 6.12)"];
    let lacking: Vec<_> = LANDLOCK
        .into_iter()
        .zip(parts)
        .filter(|(first, _part)| !is_since(*first))
        .map(|(_, part)| part)
        .collect();
    let expected = format!("this kernel is too old for Landlock to restrict {}", lacking.join(", "));
    for mode in ["strict", "auto"] {
        let proxy = Standalone::relay_to(backend.address(), &["--sandbox", mode]);
        client::assert_echoes(proxy.address());
        proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("confined"));
        proxy.process.signal(nix::sys::signal::Signal::SIGTERM);
        let output = proxy.process.into_output();
        let lines: Vec<_> =
            output.stderr.lines().filter(|line| line.contains("too old for Landlock")).collect();
        let count = usize::from(mode == "strict" && !lacking.is_empty());
        assert_eq!(lines.len(), count, "{output:#?}");
        assert!(lines.iter().all(|line| line.contains(&expected)), "{lines:?}: not {expected}");
    }
}

fn udp_relay() {
    let backend = udp::Backend::echo(udp::local());
    let proxy = udp::relay(Ipv4Addr::LOCALHOST, backend.address(), &["--sandbox", "strict"]);
    assert_confined(proxy.process.pid(), NET_ADMIN);
    udp::assert_echoes(&udp::local(), proxy.address(), b"question");
}

fn controlled() {
    let proxy = Controlled::start(&["--sandbox", "strict"]);
    assert_confined(proxy.process.pid(), NET_ADMIN | NET_BIND_SERVICE | SYS_RESOURCE);
    assert_serves_changes(&proxy);
    proxy.process.signal(nix::sys::signal::Signal::SIGTERM);
    assert!(proxy.process.wait().success());
    assert!(!proxy.socket().exists(), "its socket is left there");
}

/// Checks that TCP and UDP mappings on low ports can come and go.
#[track_caller]
fn assert_serves_changes(proxy: &Controlled) {
    let tcp = TcpBackend::echo();
    let dgram = udp::Backend::echo(udp::local());
    let front = (client::own_loopback(), 80).into();
    let mappings =
        [mapping("web", "tcp", front, tcp.address()), mapping("dns", "udp", front, dgram.address())];
    proxy.apply(&mappings).success();
    client::assert_echoes(front);
    udp::assert_echoes(&udp::client(front.ip()), front, b"question");
    proxy.apply(&[]).success();
}

fn docker() {
    let backend = TcpBackend::echo();
    let front = (client::own_loopback(), 8080).into();
    let arguments = docker_proxy::mapping("tcp", front, backend.address());
    for mode in ["auto", "strict", "lots"] {
        let mut proxy = DockerProxy::start_by(
            program::rproxy(),
            &arguments,
            None,
            nix::fcntl::OFlag::empty(),
            |mut command| {
                command.env("RPROXY_SANDBOX", mode);
                process::Process::spawn(command)
            },
        );
        assert_eq!(proxy.status(), Status::Ready);
        // By the time that it serves.
        client::assert_echoes(front);
        assert_confined(proxy.process.pid(), SYS_RESOURCE);
        if mode == "lots" {
            let is_it = |line: &str| line.contains("RPROXY_SANDBOX is ignored: 'lots' is not auto");
            proxy.process.wait_for_line(Stream::Stderr, is_it);
        }
        assert!(proxy.stop().success());
    }
}

fn other_user() {
    let backend = TcpBackend::echo();
    let host = format!("{}:80", client::own_loopback());
    let to = backend.address().to_string();
    for (user, uid, gid) in [("64123:64124", 64_123, 64_124), ("nobody", 65_534, 65_534)] {
        let proxy = Standalone::start(&["--host", &host, "--to", &to, "--user", user, "--sandbox", "strict"]);
        let Confinement { uid: is_uid, gid: is_gid, groups, .. } =
            assert_confined(proxy.process.pid(), SYS_RESOURCE);
        assert_eq!((is_uid, is_gid, groups), (uid, gid, gid.to_string()));
        client::assert_echoes(proxy.address());
    }
}

fn other_user_controlled() {
    let proxy = Controlled::start(&["--user", "64123:64124"]);
    let confinement = assert_confined(proxy.process.pid(), NET_ADMIN | NET_BIND_SERVICE | SYS_RESOURCE);
    assert_eq!(confinement.uid, 64_123);
    let metadata = fs::metadata(proxy.socket()).unwrap();
    assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o777), (64_123, 64_124, 0o600));
    assert_serves_changes(&proxy);
}

fn impossible_user() {
    let mut setpriv = require::command("setpriv");
    setpriv.args(["--reuid=64123", "--regid=64123", "--clear-groups"]).arg(program::rproxy());
    setpriv.args(["--host", "127.0.0.1:0", "--to", "127.0.0.1:9", "--user", "nobody"]);
    let output = process::run(setpriv);
    assert!(!output.stderr.contains("serving"), "nobody was served: {output:#?}");
    assert_eq!((output.status.code(), output.stdout.as_str()), (Some(1), ""));
    assert!(output.stderr.lines().last().unwrap().starts_with("rproxy: --user nobody: "), "{output:?}");
    let output = process::run(program::command(&[
        "--user",
        "no-such-user",
        "--host",
        "[::]:0",
        "--to",
        "127.0.0.1:9",
    ]));
    assert_eq!((output.status.code(), output.stderr.lines().count()), (Some(2), 1));
    assert!(output.stderr.contains("no-such-user"), "{output:?}");
}

fn off() {
    let proxy = Standalone::relay_to("127.0.0.1:9".parse().unwrap(), &["--sandbox", "off"]);
    let own = confinement(Pid::this());
    let confinement = confinement(proxy.process.pid());
    assert_eq!((confinement.seccomp, confinement.capabilities), (own.seccomp, own.capabilities));
    proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("not confined"));
}

/// `rproxy` on a kernel that lacks a call.
fn without(call: &str, mode: &str) -> Command {
    let mut strace = require::command("strace");
    let inject = format!("inject={call}:error=ENOSYS");
    strace.args(["-D", "-qq", "-o", "/dev/null", "-e", &format!("trace={call}"), "-e", &inject]);
    strace.arg(program::rproxy()).args(arguments(mode));
    strace
}

fn arguments(mode: &str) -> [&str; 6] {
    ["--sandbox", mode, "--host", "127.0.0.1:0", "--to", "127.0.0.1:9"]
}

fn strict_fails() {
    for (call, name) in
        [("landlock_create_ruleset", "landlock"), ("seccomp", "seccomp"), ("capset", "capabilities")]
    {
        if name == "landlock" && !is_since(LANDLOCK[0]) {
            continue;
        }
        let output = process::run(without(call, "strict"));
        assert_eq!((output.status.code(), output.stdout.as_str()), (Some(1), ""), "{output:?}");
        let message = output.stderr.lines().last().unwrap();
        assert!(message.starts_with(&format!("rproxy: --sandbox strict: {name} unavailable: ")), "{message}");
    }
}

fn auto_goes_on() {
    for (call, name) in [("landlock_create_ruleset", "landlock"), ("seccomp", "seccomp")] {
        let backend = TcpBackend::echo();
        let to = backend.address().to_string();
        let mut command = without(call, "auto");
        command.args(["--host", "127.0.0.1:0", "--to", &to]);
        let proxy = Standalone::ready(process::Process::spawn(command), &["--host", "--host"]);
        proxy.process.wait_for_line(Stream::Stderr, |line| line.contains(&format!("{name}=unavailable")));
        client::assert_echoes(proxy.ready[1].reachable());
    }
}
