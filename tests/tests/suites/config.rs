//! Publishing: Docker's `-p` and `-P`, limits as flags, and the configuration file with its reload.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use command_fds::{CommandFdExt, FdMapping};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::Value;
use tempfile::TempDir;

use testkit::backend::TcpBackend;
use testkit::client::{self, End, own_address};
use testkit::controlled::Controlled;
use testkit::load;
use testkit::netns::Namespace;
use testkit::process::{self, Output, Process, Stream};
use testkit::require::Need;
use testkit::rproxy::{self, Ready};
use testkit::suite::Case;
use testkit::systemd::Systemd;
use testkit::udp;

/// The ports that Docker takes random ones from.
const EPHEMERAL: std::ops::RangeInclusive<u16> = 49_153..=65_535;

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body);
    let root = &[Need::Root, Need::Ipv6, Need::Program("ip")];
    vec![
        case("-p: every form serves", publish).needs(root),
        case("-p: the first free port of a range", first_free).needs(root),
        case("-P: exposed ports are published at random", publish_all).needs(root),
        case("limits as flags", limits),
        case("refused clients are logged", refusals_are_told).needs(&[Need::Ipv6]),
        case("a configuration is served, and reloaded", reload),
        case("a wrong configuration changes nothing", wrong_reload),
        case("a configuration that is not a file changes nothing", no_file),
        case("a configuration from a pipe is served once", from_a_pipe),
        case("a configuration through links that change", links),
        case("a configuration that only root may read", only_root_reads).needs(&[Need::Root]),
        case("a configuration without its directory", directory_gone),
        case("a reload knows the names of interfaces", interface_names),
        case("a reload under load loses no connection", reload_under_load),
        case("a start with a wrong configuration", wrong_start),
        case("check-config", check_config),
        case("a printed configuration is equivalent", printed),
        case("ctl applies a configuration", applied),
        case("ctl add accepts -p", added),
        case("the service manager is notified of a reload", notified),
        case("one of 10,000 mappings changes", many),
    ]
}

/// The text of a `[[mapping]]`.
fn table(host: impl ToString, to: SocketAddr, more: &str) -> String {
    format!("[[mapping]]\nhost = \"{}\"\nto = \"{to}\"\n{more}\n", host.to_string())
}

/// An `rproxy` that serves a configuration.
struct Configured {
    process: Process,
    file: PathBuf,
    _dir: TempDir,
}

impl Configured {
    #[track_caller]
    fn start(text: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("rproxy.toml");
        fs::write(&file, text).unwrap();
        let process = Process::spawn(rproxy::command(&["--config", file.to_str().unwrap()]));
        process.wait_for_line(Stream::Stdout, |line| line.contains(" -> "));
        Self { process, file, _dir: dir }
    }

    /// Puts another file in the place of the one that is read, as editors do, and asks for a reload.
    #[track_caller]
    fn reload(&self, text: &str) {
        let new = self.file.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, &self.file).unwrap();
        self.process.signal(Signal::SIGHUP);
    }

    /// Waits until so many reloads are over, and gives what the last one said.
    #[track_caller]
    fn reloaded(&self, count: usize) -> String {
        let over = |line: &str| line.contains("configuration reloaded");
        self.process.wait_for_lines(Stream::Stderr, count, over).pop().unwrap()
    }
}

/// An `rproxy` in a namespace of its own, where all ports are free, and the lines that it printed.
fn publish_in(namespace: &Namespace, arguments: &[&str], lines: usize) -> (Process, Vec<Ready>) {
    let process = namespace.spawn(rproxy::command(arguments));
    let lines = process.wait_for_lines(Stream::Stdout, lines, |_| true);
    let ready = lines.iter().map(|line| Ready::parse(line).unwrap_or_else(|| panic!("{line:?}"))).collect();
    (process, ready)
}

fn publish() {
    let namespace = Namespace::new();
    let backend = TcpBackend::echo_in(&namespace, (Ipv4Addr::LOCALHOST, 80));
    let dns = udp::Backend::echo(udp::bind_in(&namespace, (Ipv4Addr::LOCALHOST, 80)));
    let specs = [
        "80",
        "8080:80",
        "127.0.0.11:8080:80/udp",
        "127.0.0.11::80",
        "[::1]:8081:80",
        "53:80:udp",
        "127.0.0.1::80/tcp+udp",
        "80",
    ];
    let arguments: Vec<&str> =
        ["--to", "127.0.0.1"].into_iter().chain(specs.into_iter().flat_map(|spec| ["-p", spec])).collect();
    let (_proxy, ready) = publish_in(&namespace, &arguments, 9);
    let shown: Vec<_> =
        ready.iter().map(|ready| (ready.protocol.as_str(), ready.address.to_string())).collect();
    let exact = [
        (1, "tcp", "[::]:8080"),
        (2, "udp", "127.0.0.11:8080"),
        (4, "tcp", "[::1]:8081"),
        (5, "udp", "[::]:53"),
    ];
    for (index, protocol, address) in exact {
        assert_eq!(shown[index], (protocol, address.to_owned()));
    }
    for index in [0, 3, 6, 7, 8] {
        assert!(EPHEMERAL.contains(&ready[index].address.port()), "{ready:?}");
    }
    assert_eq!(ready[6].address, ready[7].address, "TCP and UDP of one -p have one port");
    namespace.run(|| {
        for ready in &ready {
            match &*ready.protocol {
                "tcp" => client::assert_echoes(ready.reachable()),
                _ => udp::assert_echoes(&udp::client(ready.reachable().ip()), ready.reachable(), b"hello"),
            }
        }
        // All addresses are IPv4 ones, too.
        let v4 = (Ipv4Addr::LOCALHOST, 8080).into();
        client::assert_echoes(v4);
    });
    drop((backend, dns));
}

fn first_free() {
    let namespace = Namespace::new();
    let _taken = namespace.run(|| TcpListener::bind("0.0.0.0:8000").unwrap());
    let arguments =
        ["--to", "192.0.2.1", "-p", "8000-8002:80", "-p", "8000-8002:81", "-p", "9000-9002:90-92"];
    let (_proxy, ready) = publish_in(&namespace, &arguments, 2);
    let ports: Vec<_> = ready.iter().map(|ready| ready.address.port()).collect();
    assert_eq!(ports, [8001, 8002]);
    let more = [&arguments[..], &["-p", "8000-8002:82"]].concat();
    let output = namespace.spawn(rproxy::command(&more)).into_output();
    assert_eq!(output.status.code(), Some(1), "{output:#?}");
    assert!(output.stderr.starts_with("rproxy: -p "), "{output:#?}");
}

fn publish_all() {
    let namespace = Namespace::new();
    let arguments =
        ["--to", "192.0.2.1", "-p", "80:80", "-P", "--expose", "80", "--expose", "443", "--expose", "53/udp"];
    let (_proxy, ready) = publish_in(&namespace, &arguments, 3);
    let shown: Vec<_> = ready.iter().map(|ready| (ready.container_port, &*ready.protocol)).collect();
    assert_eq!(shown, [(80, "tcp"), (443, "tcp"), (53, "udp")], "what -p publishes is not published again");
    assert_eq!(ready[0].address.port(), 80);
    assert!(ready[1..].iter().all(|ready| EPHEMERAL.contains(&ready.address.port())), "{ready:?}");
}

fn limits() {
    let backend = TcpBackend::lettered(b'a');
    let relay = |limits: &[&str]| rproxy::Standalone::relay_to(backend.address(), limits);
    let one = relay(&["--max-connections", "1", "--on-limit", "reset"]);
    let (_served, _letter) = client::connect_lettered(one.address());
    assert_eq!(client::end_of(one.address()), (vec![], End::Reset));
    for (limits, served) in [
        (&["--deny", "127.0.0.0/8"][..], false),
        (&["--allow", "10.0.0.0/8,fd00::/8"], false),
        (&["--allow", "10.0.0.0/8", "--allow", "127.0.0.1"], true),
        (&["--deny", "::ffff:127.0.0.0/104"], false),
        (&["--allow", "::ffff:127.0.0.1"], true),
    ] {
        let proxy = relay(limits);
        if served {
            assert_eq!(client::connect_lettered(proxy.address()).1, b'a');
        } else {
            assert_eq!(client::end_of(proxy.address()), (vec![], End::Reset), "{limits:?}");
        }
    }
    let idle = relay(&["--idle-timeout", "300ms"]);
    assert_eq!(client::read_to_end(&client::connect_lettered(idle.address()).0), (vec![], End::Reset));
}

fn refusals_are_told() {
    let backend = TcpBackend::lettered(b'a');
    let to = backend.address().to_string();
    // IPv4 clients of a dual-stack socket have their own addresses.
    let denying =
        rproxy::Standalone::start(&["--host", "[::]:0", "--to", &to, "--deny", "::ffff:127.0.0.0/104"]);
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, denying.address().port()));
    let (from, _client) = attempt(address);
    let line = denying.process.wait_for_line(Stream::Stderr, |line| line.contains("client refused"));
    let port = backend.address().port();
    let words = format!("mapping=random:{port}/tcp client={from} reason=\"deny has it\"");
    assert!(line.contains(&words), "{line}");

    let denying =
        udp::relay(Ipv6Addr::UNSPECIFIED, "127.0.0.1:9".parse().unwrap(), &["--allow", "10.0.0.0/8"]);
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, denying.address().port()));
    let client = udp::local();
    for _ in 0..1000 {
        client.send_to(b"hello", address).unwrap();
    }
    let is_told = |line: &str| line.contains("client refused");
    let line = denying.process.wait_for_line(Stream::Stderr, is_told);
    let words = format!("client={} reason=\"allow does not have it\"", client.local_addr().unwrap());
    assert!(line.contains(&words), "{line}");
    denying.process.signal(Signal::SIGTERM);
    denying.process.wait();
    let lines = denying.process.captured(Stream::Stderr).lines().filter(|line| is_told(line)).count();
    assert!(lines < 500, "{lines} lines for 1,000 datagrams");

    for (on_limit, words) in
        [("reset", "client reset: the mapping is full"), ("wait", "clients wait in its backlog")]
    {
        let full = rproxy::Standalone::relay_to(
            backend.address(),
            &["--max-connections", "1", "--on-limit", on_limit],
        );
        let (served, _letter) = client::connect_lettered(full.address());
        let more: Vec<_> = (0..3).map(|_| attempt(full.address())).collect();
        let line = full.process.wait_for_line(Stream::Stderr, |line| line.contains(words));
        assert!(line.contains(&format!("mapping=127.0.0.1:random:{port}/tcp ")), "{line}");
        assert!(line.contains("max_connections=1"), "{line}");
        let is_first = line.contains(&format!("client={}", more[0].0));
        assert_eq!(is_first, on_limit == "reset", "one that waits was not accepted: {line}");
        let told = full.process.captured(Stream::Stderr).matches(words).count();
        assert!(on_limit == "reset" || told == 1, "it is full once, and told so {told} times");
        drop((served, more));
    }
}

/// Connects from an address that is known by then, and may be reset before it notices that it is connected.
fn attempt(to: SocketAddr) -> (SocketAddr, socket2::Socket) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
    let from = socket.local_addr().unwrap().as_socket().unwrap();
    socket.connect(&to.into()).ok();
    (from, socket)
}

fn reload() {
    let (a, b) = (TcpBackend::lettered(b'a'), TcpBackend::lettered(b'b'));
    let (stays, goes, comes) = (own_address(), own_address(), own_address());
    let stay = table(stays, a.address(), "");
    let proxy = Configured::start(&[&*stay, &table(goes, a.address(), "")].concat());
    let (old, _) = client::connect_lettered(stays);
    let (draining, _) = client::connect_lettered(goes);

    proxy.reload(&[&*stay, &table(comes, b.address(), "name = \"new\"")].concat());
    assert!(proxy.reloaded(1).ends_with("added=1 changed=0 removed=1 unchanged=1"));
    assert_eq!(client::connect_lettered(comes).1, b'b');
    assert_eq!(client::connect_lettered(stays).1, b'a');
    assert!(TcpStream::connect(goes).is_err(), "it takes no new clients");

    proxy.reload(&table(stays, b.address(), ""));
    assert!(proxy.reloaded(2).ends_with("added=0 changed=1 removed=1 unchanged=0"));
    assert_eq!(client::connect_lettered(stays).1, b'b');
    for mut client in [&old, &draining] {
        let mut answer = [0; 4];
        client.write_all(b"ping").unwrap();
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"ping", "connections go on");
    }
}

fn wrong_reload() {
    let backend = TcpBackend::lettered(b'a');
    let (address, taken) = (own_address(), own_address());
    let _taken = TcpListener::bind(taken).unwrap();
    let text = table(address, backend.address(), "");
    let proxy = Configured::start(&text);
    for (wrong, says) in [
        (String::new(), "rproxy.toml:1:1: there is no [[mapping]] in it".to_owned()),
        (
            format!("{text}[[mapping]]\nhost = \"x!\""),
            "rproxy.toml:6:8: host: 'x!' is not an IP address".to_owned(),
        ),
        (text.repeat(2), "rproxy.toml:6:8: host: port 8080 is taken by the mapping".to_owned()),
        (table(taken, backend.address(), ""), "the tcp port is taken; `ss -antp".to_owned()),
    ] {
        proxy.reload(&wrong);
        let line = proxy.process.wait_for_line(Stream::Stderr, |line| line.contains(&*says));
        assert!(line.contains("not reloaded; nothing has changed"), "{line}");
        assert_eq!(client::connect_lettered(address).1, b'a');
    }
    fs::remove_file(&proxy.file).unwrap();
    proxy.process.signal(Signal::SIGHUP);
    proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("rproxy.toml: No such file"));
    proxy.reload(&text);
    assert!(proxy.reloaded(1).ends_with("added=0 changed=0 removed=0 unchanged=1"));
}

fn no_file() {
    let (backend, address) = (TcpBackend::lettered(b'a'), own_address());
    let text = table(address, backend.address(), "");
    let proxy = Configured::start(&text);
    let file = &proxy.file;
    let kinds: [(&dyn Fn(), &str); 5] = [
        (&|| mkfifo(file, Mode::S_IRWXU).unwrap(), "it is a pipe"),
        (&|| fs::create_dir(file).unwrap(), "it is a directory"),
        (&|| symlink("/dev/zero", file).unwrap(), "it is a device"),
        (&|| fs::File::create(file).unwrap().set_len(200 << 20).unwrap(), "longer than 2 MiB"),
        (&|| fs::write(file, b"\xff\xfe").unwrap(), "not UTF-8 text"),
    ];
    for (make, reason) in kinds {
        fs::remove_dir(file).or_else(|_file| fs::remove_file(file)).unwrap();
        make();
        proxy.process.signal(Signal::SIGHUP);
        let line = proxy.process.wait_for_line(Stream::Stderr, |line| line.contains(reason));
        assert!(line.contains("not reloaded; nothing has changed"), "{line}");
        assert_eq!(client::connect_lettered(address).1, b'a');
        if reason != "it is a pipe" {
            // It is the same for all who read it.
            for command in [&["check-config"][..], &["--config"]] {
                let output = process::run(rproxy::command(&[command, &[file.to_str().unwrap()]].concat()));
                assert!(output.status.code() == Some(1) && output.stderr.contains(reason), "{output:#?}");
            }
        }
    }
    fs::remove_file(file).unwrap();
    proxy.reload(&text);
    assert!(proxy.reloaded(1).ends_with("added=0 changed=0 removed=0 unchanged=1"));
}

/// A command that reads a pipe with `text`, as shells make it of `<(…)`.
fn with_pipe(arguments: &[&str], text: &str) -> Process {
    let (reader, mut writer) = std::io::pipe().unwrap();
    let mut command = rproxy::command(&[arguments, &["/dev/fd/63"]].concat());
    command.fd_mappings(vec![FdMapping { parent_fd: reader.into(), child_fd: 63 }]).unwrap();
    let process = Process::spawn(command);
    // It may have enough before all of it is written.
    writer.write_all(text.as_bytes()).ok();
    process
}

fn from_a_pipe() {
    let (backend, address) = (TcpBackend::lettered(b'a'), own_address());
    // More than a pipe holds at a time.
    let text = format!("# {}\n{}", "x".repeat(200_000), table(address, backend.address(), ""));
    assert_eq!(with_pipe(&["check-config"], &text).into_output().success(), "ok\n");
    let wrong = with_pipe(&["check-config"], &text.replace("host", "hots")).into_output();
    assert!(wrong.stderr.contains("/dev/fd/63:3:1"), "{wrong:#?}");
    let endless = with_pipe(&["check-config"], &"x".repeat(17 << 20)).into_output();
    assert!(endless.stderr.contains("longer than 2 MiB"), "{}", endless.stderr);
    let proxy = with_pipe(&["--config"], &text);
    proxy.wait_for_line(Stream::Stdout, |line| line.contains(" -> "));
    assert_eq!(client::connect_lettered(address).1, b'a');
    proxy.signal(Signal::SIGHUP);
    let line = proxy.wait_for_line(Stream::Stderr, |line| line.contains("can only be read once"));
    assert!(line.contains("not reloaded; nothing has changed"), "{line}");
    assert_eq!(client::connect_lettered(address).1, b'a');
    let applied = Controlled::start(&[]);
    let socket = applied.socket();
    let apply = ["ctl", "--control", socket.to_str().unwrap(), "apply"];
    let other = text.replace(&address.to_string(), &own_address().to_string());
    assert!(with_pipe(&apply, &other).into_output().success().starts_with("1 added"));
}

/// Starts one whose configuration is at `path`, seen from `dir`.
fn configured_by(path: &str, dir: &Path, more: &[&str]) -> Process {
    let mut command = rproxy::command(&[&["--config", path], more].concat());
    command.current_dir(dir);
    let process = Process::spawn(command);
    process.wait_for_line(Stream::Stdout, |line| line.contains(" -> "));
    process
}

#[track_caller]
fn assert_reloads(process: &Process, count: usize) {
    process.signal(Signal::SIGHUP);
    process.wait_for_lines(Stream::Stderr, count, |line| line.contains("configuration reloaded"));
}

fn links() {
    let (a, b) = (TcpBackend::lettered(b'a'), TcpBackend::lettered(b'b'));
    let address = own_address();
    // As Kubernetes mounts a ConfigMap: the file is a link by way of one that moves.
    let (volume, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let inside = |name: &str| volume.path().join(name);
    for (version, backend) in [("v1", &a), ("v2", &b)] {
        let dir = elsewhere.path().join(version);
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("rproxy.toml"), table(address, backend.address(), "")).unwrap();
    }
    symlink(elsewhere.path().join("v1"), inside("..data")).unwrap();
    symlink("..data/rproxy.toml", inside("rproxy.toml")).unwrap();
    let process = configured_by("rproxy.toml", volume.path(), &["--sandbox", "strict"]);
    assert_eq!(client::connect_lettered(address).1, b'a');
    symlink(elsewhere.path().join("v2"), inside("new")).unwrap();
    fs::rename(inside("new"), inside("..data")).unwrap();
    assert_reloads(&process, 1);
    assert_eq!(client::connect_lettered(address).1, b'b');
}

fn only_root_reads() {
    let (backend, address, dir) = (TcpBackend::lettered(b'a'), own_address(), tempfile::tempdir().unwrap());
    let file = dir.path().join("rproxy.toml");
    fs::write(&file, table(address, backend.address(), "")).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let user = ["--user", "64123:64124", "--sandbox", "strict"];
    let process = configured_by(file.to_str().unwrap(), Path::new("/"), &user);
    assert_reloads(&process, 1);
}

fn directory_gone() {
    let (backend, address, dir) = (TcpBackend::lettered(b'a'), own_address(), tempfile::tempdir().unwrap());
    let home = dir.path().join("home");
    let text = table(address, backend.address(), "");
    let make = || {
        fs::create_dir(&home).unwrap();
        fs::write(home.join("rproxy.toml"), &text).unwrap();
    };
    make();
    let process = configured_by("rproxy.toml", &home, &[]);
    fs::remove_dir_all(&home).unwrap();
    process.signal(Signal::SIGHUP);
    process.wait_for_line(Stream::Stderr, |line| line.contains("rproxy.toml: No such file"));
    make();
    assert_reloads(&process, 1);
}

fn interface_names() {
    let (backend, address) = (TcpBackend::lettered(b'a'), own_address());
    let text = table(address, backend.address(), "");
    let proxy = Configured::start(&text);
    let more = table(own_address(), "[fe80::1%1]:80".parse().unwrap(), "").replace("%1", "%lo");
    proxy.reload(&[text, more].concat());
    assert!(proxy.reloaded(1).ends_with("added=1 changed=0 removed=0 unchanged=1"));
    let missing = table(own_address(), "[fe80::1%1]:80".parse().unwrap(), "").replace("%1", "%no-such");
    proxy.reload(&missing);
    proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("'no-such' is not a network interface"));
}

fn reload_under_load() {
    let (a, b) = (TcpBackend::lettered(b'a'), TcpBackend::lettered(b'b'));
    let (address, other) = (own_address(), own_address());
    let texts = [
        table(address, a.address(), ""),
        // The port goes over to a mapping of another name, and back.
        [table(address, b.address(), "name = \"web\""), table(other, a.address(), "")].concat(),
        table(address, b.address(), "max_connections = 1000"),
    ];
    let proxy = Configured::start(&texts[0]);
    let connect = |_| assert!(matches!(client::connect_lettered(address).1, b'a' | b'b'));
    let connections = load::meanwhile(1, connect, |_connections| {
        for round in 1..40 {
            proxy.reload(&texts[round % texts.len()]);
            proxy.reloaded(round);
        }
    });
    assert!(connections > 0);
}

/// Runs `rproxy` with a file, whose name stands for `FILE` among the arguments.
#[track_caller]
fn run_with(text: &str, arguments: &[&str]) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rproxy.toml");
    fs::write(&file, text).unwrap();
    let file = file.to_str().unwrap();
    let arguments: Vec<_> =
        arguments.iter().map(|argument| if *argument == "FILE" { file } else { argument }).collect();
    process::run(rproxy::command(&arguments))
}

fn wrong_start() {
    let to = "127.0.0.1:9".parse().unwrap();
    let taken = TcpListener::bind((client::own_loopback(), 8080)).unwrap();
    let taken = taken.local_addr().unwrap();
    for (text, code, says) in [
        (
            "[[mapping]]\nhots = 1\nto = \"127.0.0.1:9\"\n",
            1,
            "rproxy.toml:2:1: unknown key `hots`; did you mean `host`?",
        ),
        (
            &table(taken, to, ""),
            1,
            &format!("rproxy.toml: {taken}: the tcp port is taken by {}", process::own_name()),
        ),
    ] {
        let output = run_with(text, &["--config", "FILE"]);
        assert_eq!(output.status.code(), Some(code), "{output:#?}");
        assert_eq!((&*output.stdout, output.stderr.lines().count()), ("", 1), "{output:#?}");
        assert!(output.stderr.contains(says), "{output:#?}");
    }
    let both = run_with("", &["--config", "FILE", "--to", "127.0.0.1", "-p", "80"]);
    assert_eq!(both.status.code(), Some(2), "{both:#?}");
}

fn check_config() {
    let good = table("[::]:80", "172.17.0.2:80".parse().unwrap(), "");
    assert_eq!(run_with(&good, &["check-config", "FILE"]).success(), "ok\n");
    let output =
        run_with("[[mapping]]\nhost = \"a\"\n[[mapping]]\nhost = \"b\"\n", &["check-config", "FILE"]);
    assert_eq!(output.status.code(), Some(1));
    let lines: Vec<_> = output.stderr.lines().collect();
    assert_eq!(lines.len(), 4, "one for each mistake: {lines:#?}");
    assert!(lines.iter().all(|line| line.starts_with("rproxy: ")), "{lines:#?}");
    let places = [":1:1: to: it is missing", ":2:8: host: ", ":3:1: to: it is missing", ":4:8: host: "];
    assert!(lines.iter().zip(places).all(|(line, place)| line.contains(place)), "{lines:#?}");
}

fn printed() {
    let address = client::own_loopback();
    let host = format!("{address}:8080");
    let (web, range) = (format!("{address}:8081:80"), format!("{address}:8000-8009:90-99/tcp+udp"));
    let asked = [
        "--host",
        &host,
        "--to",
        "127.0.0.1:9",
        "--to",
        "192.0.2.1",
        "-p",
        &web,
        "-p",
        &range,
        "--idle-timeout",
        "90s",
        "--allow",
        "10.0.0.0/8",
        "--max-connections",
        "7",
        "--on-limit",
        "reset",
        "--connect-timeout",
        "unlimited",
        "--dscp",
        "46",
        "--udp-any-port",
    ];
    let text = process::run(rproxy::command(&[&["--print-config"], &asked[..]].concat())).success();
    assert_eq!(run_with(&text, &["--config", "FILE", "--print-config"]).success(), text);

    let list = |arguments: &[&str]| -> Value { Controlled::start(arguments).json(&["list"]) };
    let flags = list(&asked);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rproxy.toml");
    fs::write(&file, text).unwrap();
    assert_eq!(list(&["--config", file.to_str().unwrap()]), flags);
}

fn applied() {
    let backend = TcpBackend::lettered(b'a');
    let (proxy, address) = (Controlled::start(&[]), own_address());
    let file = proxy.file("rproxy.toml", &table(address, backend.address(), "name = \"web\""));
    proxy.ctl(&["apply", file.to_str().unwrap()]).success();
    assert_eq!(client::connect_lettered(address).1, b'a');
    let wrong = proxy.file("wrong.toml", "[[mapping]]\nhost = \"x\"");
    let output = proxy.ctl(&["apply", wrong.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stderr.contains("wrong.toml:2:8: host: "), "{output:#?}");
    assert_eq!(proxy.json(&["list"])["mappings"][0]["name"], "web");
}

fn added() {
    let backend = TcpBackend::echo();
    let (proxy, address) = (Controlled::start(&[]), client::own_loopback());
    let ports = format!("{address}:8000-8002:{}/tcp", backend.address().port());
    let printed = proxy.ctl(&["add", "--to", "127.0.0.1", "-p", &ports, "--max-connections", "5"]).success();
    assert!(printed.ends_with(&format!("-> {address}:8000\n")), "{printed}");
    client::assert_echoes((address, 8000).into());
    assert_eq!(proxy.json(&["list"])["mappings"][0]["limits"]["max_connections"], 5);
}

fn notified() {
    let backend = TcpBackend::lettered(b'a');
    let systemd = Systemd::new();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rproxy.toml");
    fs::write(&file, table(own_address(), backend.address(), "")).unwrap();
    let proxy = Process::spawn(systemd.command(&["--config", file.to_str().unwrap()]));
    assert_eq!(systemd.told(), ["READY=1"]);
    proxy.signal(Signal::SIGHUP);
    // With the time at which it began, which Type=notify-reload wants (sd_notify(3)).
    let told = systemd.told();
    assert_eq!(told[0], "RELOADING=1");
    assert!(told[1].starts_with("MONOTONIC_USEC="), "{told:?}");
    assert_eq!(systemd.told(), ["READY=1"]);
}

fn many() {
    let (a, b) = (TcpBackend::lettered(b'a'), TcpBackend::lettered(b'b'));
    let to = |index: usize| if index == 0 { b.address() } else { a.address() };
    // A hundred ports of a hundred addresses.
    let addresses: Vec<_> = (0..100).map(|_| IpAddr::from(client::own_loopback())).collect();
    let places: Vec<_> = addresses
        .iter()
        .flat_map(|address| (0..100).map(|port| SocketAddr::new(*address, 20_000 + port)))
        .collect();
    let text = |changed: bool| -> String {
        let backend = |index: usize| to(if changed { index } else { usize::MAX });
        places.iter().enumerate().map(|(index, place)| table(place, backend(index), "")).collect()
    };
    let proxy = Configured::start(&text(false));
    let (old, _) = client::connect_lettered(places[9_999]);
    assert_eq!(client::connect_lettered(places[0]).1, b'a');
    proxy.reload(&text(true));
    assert!(proxy.reloaded(1).ends_with("added=0 changed=1 removed=0 unchanged=9999"));
    assert_eq!(client::connect_lettered(places[0]).1, b'b');
    assert_eq!(client::connect_lettered(places[1]).1, b'a');
    drop(old);
}
