//! Single connections and flows: the access log, `rproxy ctl connections`, and `cut`.

use std::fs;
use std::io::{BufRead, BufReader, Lines, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use testkit::backend::{TcpBackend, answer_at_eof};
use testkit::client::{self, End, connect, own_address, own_loopback};
use testkit::controlled::{Controlled, mapping};
use testkit::process::{self, Process, Stream};
use testkit::require::Need;
use testkit::rproxy::{self, Standalone};
use testkit::suite::Case;
use testkit::udp;
use testkit::upgradable::{self, Program, upgrade};
use testkit::{PATIENCE, eventually};

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("a line says how a connection ended", endings),
        case("a line says why there was no connection", failures),
        case("refused clients get a line", refused),
        case("a flow gets a line when it is idle", idle_flow),
        case("lines are text by default", text_lines),
        case("a mapping can be without lines", without_lines),
        case("SIGHUP opens the file again", rotated),
        case("SIGHUP opens the file again as the first user, confined", rotated_confined)
            .needs(&[Need::Root]),
        case("SIGHUP opens the file again when descriptors have run out", rotated_exhausted),
        case("a file that cannot be opened again stays", rotated_without_launcher),
        case("lines go to standard output", standard_output),
        case("lines go to a log daemon, which may restart", log_daemon),
        case("a reader that stops holds no connection up", stopped_reader),
        case("a pipe that is read loses no line, also at the end", pipe),
        case("lines follow where the process listens, and are not mixed with it", behind_ready_lines),
        case("a line that a full disk has cut is not continued", cut_line),
        case("a log daemon that does not accept fails the start", full_daemon),
        case("what is open at the end gets its line", end_of_process),
        case("an upgrade loses no line", upgraded),
        case("a file that cannot be opened", mistakes),
        case("what is live is listed", listed),
        case("what is live is cut by mapping, client and number", cut),
        case("remove and retarget cut what they leave", cut_left),
        case("connections of a moment ago are cut, too", just_accepted).deadline(PATIENCE * 4),
        case("retarget cuts by port", cut_left_of_range),
        case("nothing chosen cuts nothing", nothing_chosen),
        case("thousands are listed while they are served", thousands).deadline(PATIENCE * 4),
    ]
}

/// A proxy in front of `backend`, and its access log.
struct Logged {
    proxy: Standalone,
    address: SocketAddr,
    dir: TempDir,
}

impl Logged {
    fn start(backend: SocketAddr, more: &[&str]) -> Self {
        let (dir, address) = (tempfile::tempdir().unwrap(), own_address());
        let log = dir.path().join("access.log");
        let (host, to) = (address.to_string(), backend.to_string());
        let arguments =
            ["--host", &host, "--to", &to, "--name", "web", "--access-log", log.to_str().unwrap()];
        let format: &[&str] =
            if more.contains(&"--log-format") { &[] } else { &["--access-log-format", "json"] };
        let proxy = Standalone::start(&[&arguments, format, more].concat());
        Self { proxy, address, dir }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("access.log")
    }

    /// Waits for the next lines behind `seen`.
    fn lines(&self, count: usize) -> Vec<Value> {
        lines_of(&self.path(), count)
    }

    fn process(&self) -> &Process {
        &self.proxy.process
    }
}

/// Waits until a file has `count` lines, and reads them.
#[track_caller]
fn lines_of(path: &Path, count: usize) -> Vec<Value> {
    let read = || fs::read_to_string(path).unwrap_or_default();
    eventually("the lines are there", || read().lines().count() >= count);
    read().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn reasons(lines: &[Value]) -> Vec<&str> {
    lines.iter().map(|line| line["reason"].as_str().unwrap()).collect()
}

fn endings() {
    let backend = TcpBackend::local(|stream| {
        let mut command = [0];
        let mut stream = stream;
        stream.read_exact(&mut command)?;
        match &command {
            // Ends first.
            b"e" => Ok(()),
            b"r" => {
                client::reset(stream.try_clone()?);
                Ok(())
            }
            _ => answer_at_eof(stream),
        }
    });
    let logged = Logged::start(backend.address(), &["--idle-timeout", "400ms"]);
    let talk = |command: &[u8]| {
        let mut stream = connect(logged.address);
        stream.write_all(command).unwrap();
        stream
    };
    let orderly = talk(b"an upload");
    orderly.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client::read_to_end(&orderly).1, End::Eof);
    logged.lines(1);
    let mut ended = talk(b"e");
    assert_eq!(ended.read(&mut [0]).unwrap(), 0);
    drop(ended);
    logged.lines(2);
    assert_eq!(client::read_to_end(&talk(b"r")).1, End::Reset);
    logged.lines(3);
    let stream = talk(b"x");
    client::reset(stream);
    logged.lines(4);
    assert_eq!(client::read_to_end(&talk(b"idle")).1, End::Reset);
    let lines = logged.lines(5);
    assert_eq!(reasons(&lines), ["client_closed", "backend_closed", "backend_reset", "client_reset", "idle"]);
    let first = &lines[0];
    assert_eq!(
        (&first["mapping"], &first["protocol"], &first["spliced"]),
        (&json!("web"), &json!("tcp"), &json!(false))
    );
    assert_eq!(first["bytes_in"], 9);
    assert_eq!(first["host"], logged.address.to_string());
    assert_eq!(first["backend"], backend.address().to_string());
    assert_eq!(first["client"], orderly.local_addr().unwrap().to_string());
    for time in ["connect_ms", "first_byte_ms", "duration_ms"] {
        assert!(first[time].as_f64().unwrap() > 0.0, "{first}");
    }
    assert!(first["connect_ms"].as_f64() <= first["duration_ms"].as_f64());
    assert!(lines[4]["first_byte_ms"].is_null(), "nothing was sent to the client: {}", lines[4]);
}

fn failures() {
    let nobody = own_address();
    let logged = Logged::start(nobody, &[]);
    assert_eq!(client::end_of(logged.address).1, End::Reset);
    let lines = logged.lines(1);
    assert_eq!(reasons(&lines), ["connect_refused"]);
    assert!(lines[0]["connect_ms"].is_null());
    let listener = std::net::TcpListener::bind(own_address()).unwrap();
    let full = fill_backlog(&listener);
    let late = Logged::start(listener.local_addr().unwrap(), &["--connect-timeout", "200ms"]);
    assert_eq!(client::end_of(late.address).1, End::Reset);
    assert_eq!(reasons(&late.lines(1)), ["connect_timeout"]);
    drop(full);
}

/// Fills the backlog of a listener that nobody accepts from, so that further connections wait.
fn fill_backlog(listener: &std::net::TcpListener) -> Vec<socket2::Socket> {
    nix::sys::socket::listen(listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let open = |_| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket.connect(&address.into()).ok();
        socket
    };
    (0..4).map(open).collect()
}

fn refused() {
    let backend = TcpBackend::echo();
    let denied = own_loopback();
    let more = ["--deny", &denied.to_string(), "--max-connections", "1", "--on-limit", "reset"];
    let logged = Logged::start(backend.address(), &more);
    let from = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    from.bind(&SocketAddr::from((denied, 0)).into()).unwrap();
    from.connect(&logged.address.into()).unwrap();
    let lines = logged.lines(1);
    assert_eq!((reasons(&lines), &lines[0]["bytes_in"]), (vec!["denied"], &json!(0)));
    let address = from.local_addr().unwrap().as_socket().unwrap();
    assert_eq!(lines[0]["client"], address.to_string());
    let first = connect(logged.address);
    client::ping(&first);
    assert_eq!(client::end_of(logged.address).1, End::Reset);
    assert_eq!(reasons(&logged.lines(2))[1], "over_limit");
}

fn idle_flow() {
    let backend = udp::Backend::echo(udp::local());
    let logged = Logged::start(backend.address(), &["--proto", "udp", "--udp-timeout", "200ms"]);
    let client = udp::client(Ipv4Addr::LOCALHOST);
    udp::assert_echoes(&client, logged.address, b"one");
    udp::assert_echoes(&client, logged.address, b"three");
    let lines = logged.lines(1);
    let line = &lines[0];
    assert_eq!((reasons(&lines), &line["protocol"]), (vec!["idle"], &json!("udp")));
    for (key, value) in [("bytes_in", 8), ("bytes_out", 8), ("datagrams_in", 2), ("datagrams_out", 2)] {
        assert_eq!(line[key], value, "{key}: {line}");
    }
    assert!(line["spliced"].is_null() && line["connect_ms"].is_null());
}

fn text_lines() {
    let backend = TcpBackend::echo();
    let logged = Logged::start(backend.address(), &["--log-format", "text"]);
    client::assert_echoes(logged.address);
    let read = || fs::read_to_string(logged.path()).unwrap_or_default();
    eventually("the line is there", || read().ends_with('\n'));
    let line = read();
    let mode = fs::metadata(logged.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o007, 0, "it tells who connects");
    let words: Vec<&str> = line.split_whitespace().collect();
    let (host, to) = (logged.address.to_string(), backend.address().to_string());
    assert_eq!([words[1], words[2], words[4], words[5]], ["web", "tcp", &host, &to]);
    assert!(words[0].ends_with('Z') && words.contains(&"reason=client_closed"), "{line}");
    assert_eq!(line.lines().count(), 1);
}

fn without_lines() {
    let backend = TcpBackend::echo();
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("access.log");
    let proxy = Controlled::start(&["--access-log", log.to_str().unwrap(), "--access-log-format", "json"]);
    let (loud, quiet) = (own_address(), own_address());
    let mut silent = mapping("quiet", "tcp", quiet, backend.address());
    silent["limits"] = json!({ "access_log": false });
    proxy.apply(&[silent, mapping("loud", "tcp", loud, backend.address())]).success();
    let held = connect(quiet);
    client::ping(&held);
    // Without lines, but it is listed.
    assert_eq!(proxy.json(&["connections"])["total"], 1);
    assert_eq!(proxy.json(&["list"])["mappings"][1]["limits"], json!({ "access_log": false }));
    drop(held);
    client::assert_echoes(quiet);
    client::assert_echoes(loud);
    let lines = lines_of(&log, 1);
    assert_eq!(lines.iter().map(|line| line["mapping"].as_str().unwrap()).collect::<Vec<_>>(), ["loud"]);
    let to = backend.address().to_string();
    let added = ["add", "--host", "127.0.0.1:0", "--to", &to, "--name", "third", "--no-access-log"];
    proxy.ctl(&added).success();
    assert_eq!(proxy.json(&["list"])["mappings"][2]["limits"], json!({ "access_log": false }));
}

fn rotated() {
    let backend = TcpBackend::echo();
    let logged = Logged::start(backend.address(), &[]);
    rotate(&logged);
}

fn rotated_confined() {
    let backend = TcpBackend::echo();
    // A directory that only root may write to.
    let logged = Logged::start(backend.address(), &["--sandbox", "strict", "--user", "nobody"]);
    rotate(&logged);
}

fn rotated_exhausted() {
    let backend = TcpBackend::echo();
    let logged = Logged::start(backend.address(), &[]);
    client::assert_echoes(logged.address);
    logged.lines(1);
    logged.process().limit_descriptors(logged.process().descriptors());
    // Twice, because there has to be a reserve again.
    for turn in 1..=2 {
        fs::rename(logged.path(), logged.dir.path().join(format!("access.log.{turn}"))).unwrap();
        logged.process().signal(Signal::SIGHUP);
        let reopened = |line: &str| line.contains("the access log was reopened");
        logged.process().wait_for_lines(Stream::Stderr, turn, reopened);
    }
    logged.process().limit_descriptors(1000);
    client::assert_echoes(logged.address);
    logged.lines(1);
}

fn rotated_without_launcher() {
    let backend = TcpBackend::echo();
    let logged = Logged::start(backend.address(), &["--sandbox", "strict"]);
    kill(upgradable::launcher(logged.process().pid()), Signal::SIGKILL).unwrap();
    logged.process().signal(Signal::SIGHUP);
    let line = logged.process().wait_for_line(Stream::Stderr, |line| line.contains("stays as it is"));
    assert!(line.contains("the launcher, which opens files for this confined process, is gone"), "{line}");
    client::assert_echoes(logged.address);
    logged.lines(1);
}

/// Renames the file as logrotate does, and asks for another one. Both have the lines of their time.
fn rotate(logged: &Logged) {
    client::assert_echoes(logged.address);
    logged.lines(1);
    let old = logged.dir.path().join("access.log.1");
    fs::rename(logged.path(), &old).unwrap();
    client::assert_echoes(logged.address);
    lines_of(&old, 2);
    logged.process().signal(Signal::SIGHUP);
    logged.process().wait_for_line(Stream::Stderr, |line| line.contains("the access log was reopened"));
    client::assert_echoes(logged.address);
    assert_eq!(logged.lines(1).len(), 1);
    assert_eq!(lines_of(&old, 2).len(), 2);
}

fn standard_output() {
    let backend = TcpBackend::echo();
    let (address, to) = (own_address().to_string(), backend.address().to_string());
    let proxy = Standalone::start(&["--host", &address, "--to", &to, "--access-log", "-"]);
    client::assert_echoes(proxy.address());
    proxy.process.wait_for_line(Stream::Stdout, |line| line.contains("reason=client_closed"));
}

fn log_daemon() {
    let backend = TcpBackend::echo();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let destination = format!("unix:{}", path.display());
    let (address, to) = (own_address(), backend.address().to_string());
    let daemon = UnixDatagram::bind(&path).unwrap();
    daemon.set_read_timeout(Some(PATIENCE)).unwrap();
    let arguments =
        ["--host", &address.to_string(), "--to", &to, "--access-log", &destination, "--sandbox", "strict"];
    let _proxy = Standalone::start(&arguments);
    let receive = |daemon: &UnixDatagram| {
        let mut line = [0; 1024];
        let length = daemon.recv(&mut line).unwrap();
        String::from_utf8(line[..length].to_vec()).unwrap()
    };
    client::assert_echoes(address);
    let line = receive(&daemon);
    assert!(line.ends_with("spliced=false"), "one datagram for each line, without a newline: {line:?}");
    drop(daemon);
    fs::remove_file(&path).unwrap();
    client::assert_echoes(address);
    let daemon = UnixDatagram::bind(&path).unwrap();
    daemon.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(receive(&daemon).contains("reason=client_closed"), "it waits for the daemon");
    stream_daemon();
}

/// A proxy that logs to a daemon which accepts streams, and what the daemon gets.
struct Streamed {
    proxy: Standalone,
    address: SocketAddr,
    lines: Lines<BufReader<UnixStream>>,
    _backend: TcpBackend,
    _dir: TempDir,
}

impl Streamed {
    fn start() -> Self {
        let backend = TcpBackend::echo();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let daemon = UnixListener::bind(&path).unwrap();
        let (address, to) = (own_address(), backend.address().to_string());
        let destination = format!("unix:{}", path.display());
        let proxy =
            Standalone::start(&["--host", &address.to_string(), "--to", &to, "--access-log", &destination]);
        let (stream, _client) = daemon.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { proxy, address, lines: BufReader::new(stream).lines(), _backend: backend, _dir: dir }
    }
}

fn stream_daemon() {
    let Streamed { address, mut lines, proxy: _proxy, _backend, _dir } = Streamed::start();
    for _ in 0..2 {
        client::assert_echoes(address);
        assert!(lines.next().unwrap().unwrap().contains("reason=client_closed"));
    }
}

fn stopped_reader() {
    let Streamed { proxy, address, lines, _backend, _dir } = Streamed::start();
    // Nobody reads their lines meanwhile.
    for _ in 0..200 {
        client::assert_echoes(address);
    }
    let read: usize = lines.take(200).map(|line| usize::from(line.unwrap().contains("reason="))).sum();
    assert_eq!(read, 200);
    proxy.process.signal(Signal::SIGTERM);
    assert!(proxy.process.wait().success());
}

fn pipe() {
    const CONNECTIONS: usize = 1000;

    let backend = TcpBackend::echo();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // Opens for both, so that it waits for nobody.
    let reader = fs::File::options().read(true).write(true).open(&path).unwrap();
    let (address, to) = (own_address(), backend.address().to_string());
    let log = path.to_str().unwrap();
    let arguments =
        ["--host", &address.to_string(), "--to", &to, "--access-log", log, "--drain-timeout", "0"];
    let proxy = Standalone::start(&arguments);
    let held: Vec<TcpStream> = (0..CONNECTIONS).map(|_| connect(address)).collect();
    held.iter().for_each(client::ping);
    proxy.process.signal(Signal::SIGTERM);
    let lines = BufReader::new(reader).lines().take(CONNECTIONS);
    assert!(lines.map(Result::unwrap).all(|line| line.contains("reason=drain")));
    assert!(proxy.process.wait().success());
}

fn behind_ready_lines() {
    const MAPPINGS: usize = 3000;

    let backend = TcpBackend::echo();
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("rproxy.toml");
    let (to, address) = (backend.address(), own_address());
    let table = |host: &str| format!("[[mapping]]\nhost = \"{host}\"\nto = \"{to}\"\n");
    let others = (0..MAPPINGS).map(|index| {
        let host = format!("{}:{}", own_loopback(), 10_000 + index);
        table(&host) + &format!("name = \"m{index}\"\n")
    });
    fs::write(&config, table(&address.to_string()) + &others.collect::<String>()).unwrap();
    let mut command = rproxy::command(&["--config", config.to_str().unwrap(), "--access-log", "-"]);
    let mut child = Ended(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap());
    eventually("it serves", || TcpStream::connect(address).is_ok());
    client::assert_echoes(address);
    kill(Pid::from_raw(child.0.id().cast_signed()), Signal::SIGTERM).unwrap();
    // More than the pipe holds, which nobody has read so far.
    let text = std::io::read_to_string(child.0.stdout.take().unwrap()).unwrap();
    assert!(text.len() > 65_536, "{} bytes", text.len());
    let is_ready_line = |line: &str| line.contains("/tcp -> ") && line.split_whitespace().count() == 3;
    assert!(text.lines().take(MAPPINGS + 1).all(is_ready_line), "ready lines come first, each whole");
    let rest: Vec<&str> = text.lines().skip(MAPPINGS + 1).collect();
    assert!(!rest.is_empty() && rest.iter().all(|line| line.contains(" reason=")), "{rest:?}");
}

/// Ends a process whose output the case reads itself.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

fn cut_line() {
    let backend = TcpBackend::echo();
    let logged = Logged::start(backend.address(), &[]);
    logged.process().signal(Signal::SIGTERM);
    logged.process().wait();
    fs::write(logged.path(), r#"{"time":"2026"#).unwrap();
    let (host, to, path) =
        (logged.address.to_string(), backend.address().to_string(), logged.path().display().to_string());
    let arguments = ["--host", &host, "--to", &to, "--access-log", &path, "--access-log-format", "json"];
    let _proxy = Standalone::start(&arguments);
    client::assert_echoes(logged.address);
    let read = || fs::read_to_string(logged.path()).unwrap();
    eventually("the line is there", || read().lines().count() == 2);
    serde_json::from_str::<Value>(read().lines().nth(1).unwrap()).unwrap();
}

fn full_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let daemon = UnixListener::bind(&path).unwrap();
    nix::sys::socket::listen(&daemon, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
    let _first = UnixStream::connect(&path).unwrap();
    let destination = format!("unix:{}", path.display());
    let arguments = ["--host", "127.0.0.1:0", "--to", "127.0.0.1:9", "--access-log", &destination];
    let output = process::run(rproxy::command(&arguments));
    assert_eq!(output.status.code(), Some(1), "{output:#?}");
    assert!(output.stderr.contains("cannot open it"), "{output:#?}");
}

fn end_of_process() {
    let backend = TcpBackend::echo();
    let logged = Logged::start(backend.address(), &["--drain-timeout", "100ms"]);
    let held = connect(logged.address);
    client::ping(&held);
    logged.process().signal(Signal::SIGTERM);
    assert!(logged.process().wait().success());
    let lines = logged.lines(1);
    assert_eq!((reasons(&lines), lines.len()), (vec!["drain"], 1));
    assert!(lines[0]["bytes_in"].as_u64() > Some(0));
}

fn upgraded() {
    let backend = TcpBackend::echo();
    let udp_backend = udp::Backend::echo(udp::local());
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("access.log");
    let program = Program::new();
    let address = own_address();
    let (host, to) = (address.to_string(), backend.address().to_string());
    let udp_address = own_address();
    let udp_to = udp_backend.address().to_string();
    let config = dir.path().join("rproxy.toml");
    let tables = [("web", &host, &to, "tcp"), ("dns", &udp_address.to_string(), &udp_to, "udp")].map(
        |(name, host, to, proto)| {
            format!("[[mapping]]\nname = \"{name}\"\nhost = \"{host}\"\nto = \"{to}\"\nproto = \"{proto}\"\n")
        },
    );
    fs::write(&config, tables.concat()).unwrap();
    let process = program.start(&[
        "--config",
        config.to_str().unwrap(),
        "--access-log",
        log.to_str().unwrap(),
        "--access-log-format",
        "json",
    ]);
    let held = connect(address);
    client::ping(&held);
    let client = udp::client(Ipv4Addr::LOCALHOST);
    udp::assert_echoes(&client, udp_address, b"before");
    let new = upgrade(&process, 0, process.pid());
    // The old process continues with it, and says how much of the flow it has relayed.
    assert_eq!(reasons(&lines_of(&log, 1)), ["handed_over"]);
    client::ping(&held);
    drop(held);
    client::assert_echoes(address);
    udp::assert_echoes(&client, udp_address, b"after");
    let lines = lines_of(&log, 3);
    let of_web: Vec<_> = lines.iter().filter(|line| line["mapping"] == "web").collect();
    assert_eq!(of_web.len(), 2, "one of each process: {lines:?}");
    kill(new, Signal::SIGTERM).unwrap();
    upgradable::wait_for_end(new);
    let lines = lines_of(&log, 4);
    assert_eq!(reasons(&lines)[3], "drain", "the flow of the new process");
}

fn mistakes() {
    let to = own_address().to_string();
    let refused = |destination: &str, status: i32, part: &str| {
        let arguments = ["--host", "127.0.0.1:0", "--to", &to, "--access-log", destination];
        let output = process::run(rproxy::command(&arguments));
        assert_eq!(output.status.code(), Some(status), "{output:#?}");
        assert!(output.stderr.lines().any(|line| line.contains(part)), "{part}: {output:#?}");
    };
    refused("", 2, "--access-log");
    refused("unix:", 2, "the path is missing");
    refused(
        "/nowhere/access.log",
        1,
        "--access-log /nowhere/access.log: cannot open it: No such file or directory",
    );
    refused("/tmp", 1, "--access-log /tmp: cannot open it: Is a directory");
    refused("unix:/nowhere", 1, "--access-log unix:/nowhere: cannot open it: No such file or directory");
    refused("unix:/nowhere", 1, "; start the program that listens there first");
    refused("unix:@log", 2, "write unix:./@log");
    let output =
        process::run(rproxy::command(&["--host", "127.0.0.1:0", "--to", &to, "--access-log-format", "json"]));
    assert_eq!(output.status.code(), Some(2), "{output:#?}");
}

fn listed() {
    let backend = TcpBackend::local(answer_at_eof);
    let (proxy, tcp, udp_host) = (Controlled::start(&[]), own_address(), own_address());
    let udp_backend = udp::Backend::echo(udp::local());
    let mappings = [
        mapping("web", "tcp", tcp, backend.address()),
        mapping("dns", "udp", udp_host, udp_backend.address()),
    ];
    proxy.apply(&mappings).success();
    assert_eq!(proxy.json(&["connections"]), json!({ "connections": [], "total": 0 }));
    let (mut one, other) = (connect(tcp), connect(tcp));
    one.write_all(b"request").unwrap();
    let asker = udp::client(Ipv4Addr::LOCALHOST);
    udp::assert_echoes(&asker, udp_host, b"query");
    let all = || proxy.json(&["connections"]);
    eventually("all are there", || {
        let all = all();
        let has_request = |connection: &Value| connection["bytes_in"] == 7;
        all["total"] == 3 && all["connections"].as_array().unwrap().iter().any(has_request)
    });
    let list = all();
    let of = |client: SocketAddr| {
        let connections = list["connections"].as_array().unwrap();
        connections.iter().find(|it| it["client"] == client.to_string()).unwrap().clone()
    };
    let first = of(one.local_addr().unwrap());
    assert_eq!(
        (&first["state"], &first["mapping"], &first["spliced"]),
        (&json!("open"), &json!("web"), &json!(false))
    );
    assert_eq!(
        (&first["host"], &first["backend"]),
        (&json!(tcp.to_string()), &json!(backend.address().to_string()))
    );
    let flow = of(udp::address(&asker));
    assert_eq!(
        (&flow["protocol"], &flow["datagrams_in"], &flow["bytes_out"]),
        (&json!("udp"), &json!(1), &json!(5))
    );
    assert!(flow["spliced"].is_null());
    assert_eq!(proxy.json(&["connections", "--mapping", "dns"])["total"], 1);
    assert_eq!(proxy.json(&["connections", "--client", "127.0.0.0/8"])["total"], 3);
    assert_eq!(proxy.json(&["connections", "--client", "192.0.2.7"])["total"], 0);
    assert_eq!(proxy.json(&["connections", "--limit", "1"])["connections"].as_array().unwrap().len(), 1);
    // The half-closed one is shown as such, and is gone when it has ended.
    one.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client::read_to_end(&one).1, End::Eof);
    eventually("it is gone", || proxy.json(&["connections", "--mapping", "web"])["total"] == 1);
    let table = proxy.ctl(&["connections"]).success();
    let address = other.local_addr().unwrap().to_string();
    assert!(table.lines().count() == 3 && table.contains(&address), "{table}");
}

fn cut() {
    let backend = TcpBackend::echo();
    let (proxy, tcp, udp_host) = (Controlled::start(&[]), own_address(), own_address());
    let udp_backend = udp::Backend::naming(udp::local());
    let mappings = [
        mapping("web", "tcp", tcp, backend.address()),
        mapping("dns", "udp", udp_host, udp_backend.address()),
    ];
    proxy.apply(&mappings).success();
    let open = || {
        let stream = connect(tcp);
        client::ping(&stream);
        stream
    };
    let is_reset = |stream: &TcpStream| client::read_to_end(stream).1 == End::Reset;
    let [first, second] = [open(), open()];
    let list = proxy.json(&["connections"]);
    let id = list["connections"].as_array().unwrap().iter().find_map(|it| {
        (it["client"] == first.local_addr().unwrap().to_string()).then(|| it["id"].to_string())
    });
    assert_eq!(proxy.ctl(&["cut", "--id", &id.unwrap()]).success(), "1 cut\n");
    assert!(is_reset(&first));
    client::ping(&second);
    let asker = udp::client(Ipv4Addr::LOCALHOST);
    let flow = udp::flow_of(&asker, udp_host);
    assert_eq!(proxy.json(&["cut", "--mapping", "dns"]), json!({ "cut": 1 }));
    assert_eq!(proxy.json(&["connections", "--mapping", "dns"])["total"], 0);
    assert_ne!(udp::flow_of(&asker, udp_host), flow, "the next datagram opens another one");
    assert_eq!(proxy.json(&["cut", "--client", "192.0.2.0/24"]), json!({ "cut": 0 }));
    client::ping(&second);
    assert_eq!(proxy.json(&["cut", "--client", "127.0.0.1", "--mapping", "web"]), json!({ "cut": 1 }));
    assert!(is_reset(&second));
    // As lists show them.
    let [one, other] = [open(), open()];
    let shown = one.local_addr().unwrap().to_string();
    assert_eq!(proxy.json(&["connections", "--client", &shown])["total"], 1);
    assert_eq!(proxy.json(&["cut", "--client", &shown, "--mapping", "w*"]), json!({ "cut": 1 }));
    assert!(is_reset(&one));
    client::ping(&other);
    assert_eq!(proxy.json(&["cut", "--mapping", "x*"]), json!({ "cut": 0 }));
    assert_eq!(proxy.json(&["cut", "--mapping", "w*"]), json!({ "cut": 1 }));
    assert!(is_reset(&other));
    let third = open();
    proxy.ctl(&["cut", "--all"]).success();
    assert!(is_reset(&third));
    client::assert_echoes(tcp);
}

fn cut_left() {
    let [old, new] = [b'a', b'b'].map(TcpBackend::lettered);
    let (proxy, tcp) = (Controlled::start(&[]), own_address());
    proxy.apply(&[mapping("web", "tcp", tcp, old.address())]).success();
    let (left, letter) = client::connect_lettered(tcp);
    assert_eq!(letter, b'a');
    let to = new.address().to_string();
    proxy.ctl(&["retarget", "web", "--to", &to, "--cut"]).success();
    assert_eq!(client::read_to_end(&left).1, End::Reset);
    let (kept, letter) = client::connect_lettered(tcp);
    assert_eq!(letter, b'b');
    proxy.ctl(&["retarget", "web", "--to", &to, "--cut"]).success();
    client::ping(&kept);
    proxy.ctl(&["remove", "web", "--cut"]).success();
    assert_eq!(client::read_to_end(&kept).1, End::Reset);
    assert_eq!(proxy.json(&["connections"])["total"], 0);
    // Once removed, its connections can still be ended.
    proxy.apply(&[mapping("web", "tcp", tcp, new.address())]).success();
    let (left, _letter) = client::connect_lettered(tcp);
    proxy.ctl(&["remove", "web"]).success();
    client::ping(&left);
    proxy.ctl(&["remove", "web", "--cut"]).success();
    assert_eq!(client::read_to_end(&left).1, End::Reset);
    assert!(!proxy.ctl(&["remove", "web", "--cut"]).status.success(), "nothing is left");
}

fn just_accepted() {
    const ROUNDS: usize = 20;
    const CONNECTIONS: usize = 200;

    let backend = TcpBackend::echo();
    let (proxy, tcp) = (Controlled::start(&[]), own_address());
    proxy.apply(&[mapping("web", "tcp", tcp, backend.address())]).success();
    let mut conversation = proxy.connect();
    for _ in 0..ROUNDS {
        // Some are reset at once.
        let open = move || (0..CONNECTIONS).map(|_| TcpStream::connect(tcp).ok()).collect::<Vec<_>>();
        let clients = std::thread::spawn(open);
        eventually("some are there", || proxy.stats("web")["connections"] != 0);
        let list = conversation.ask(&json!({ "v": 1, "do": { "connections": {} } }));
        conversation.ask(&json!({ "v": 1, "do": { "cut": { "all": true } } }));
        let left = conversation.ask(&json!({ "v": 1, "do": { "connections": {} } }));
        let ids = |answer: &Value| -> Vec<u64> {
            let connections = answer["ok"]["connections"].as_array().unwrap();
            connections.iter().map(|connection| connection["id"].as_u64().unwrap()).collect()
        };
        let (before, after) = (ids(&list), ids(&left));
        assert!(before.iter().all(|id| !after.contains(id)), "cut, and still there");
        drop(clients.join().unwrap());
    }
}

fn cut_left_of_range() {
    let (proxy, ip, backend) = (Controlled::start(&[]), own_loopback(), own_loopback());
    let backends = [9000, 9001, 9002].map(|port| TcpBackend::echo_at((backend, port)));
    let [host, to] = [format!("{ip}:8000-8001"), format!("{backend}:9000-9001")];
    proxy.ctl(&["add", "--host", &host, "--to", &to, "--name", "range"]).success();
    let held = [8000, 8001].map(|port| {
        let stream = connect(SocketAddr::from((ip, port)));
        client::ping(&stream);
        stream
    });
    let to = format!("{backend}:9001");
    proxy.ctl(&["retarget", "range", "--to", &to, "--cut"]).success();
    for stream in &held {
        assert_eq!(client::read_to_end(stream).1, End::Reset, "each port leads elsewhere now");
    }
    drop(backends);
}

fn unknown_mapping(proxy: &Controlled) {
    let refused = proxy.ctl(&["connections", "--mapping", "wbe"]);
    assert!(refused.stderr.contains("there is no mapping wbe"), "{refused:#?}");
}

fn nothing_chosen() {
    let backend = TcpBackend::echo();
    let (proxy, tcp) = (Controlled::start(&[]), own_address());
    proxy.apply(&[mapping("web", "tcp", tcp, backend.address())]).success();
    let held = connect(tcp);
    client::ping(&held);
    unknown_mapping(&proxy);
    let mut conversation = proxy.connect();
    for chosen in [json!({}), json!({ "clinet": "127.0.0.1" }), json!({ "limit": 1 })] {
        let answer = conversation.ask(&json!({ "v": 1, "do": { "cut": chosen } }));
        assert_eq!(answer["error"]["kind"], "bad_request", "{answer}");
    }
    assert_eq!(proxy.ctl(&["cut"]).status.code(), Some(2));
    assert_eq!(proxy.ctl(&["cut", "--all", "--mapping", "web"]).status.code(), Some(2));
    client::ping(&held);
}

fn thousands() {
    const CONNECTIONS: usize = 2000;

    let backend = TcpBackend::echo();
    let (proxy, tcp) = (Controlled::start(&[]), own_address());
    proxy.apply(&[mapping("web", "tcp", tcp, backend.address())]).success();
    let held: Vec<TcpStream> = (0..CONNECTIONS).map(|_| connect(tcp)).collect();
    held.iter().for_each(|stream| client::ping(stream));
    let list = proxy.json(&["connections"]);
    assert_eq!(
        (&list["total"], list["connections"].as_array().unwrap().len()),
        (&json!(CONNECTIONS), CONNECTIONS)
    );
    assert_eq!(proxy.json(&["cut", "--client", "127.0.0.0/8"]), json!({ "cut": CONNECTIONS }));
    assert!(held.iter().all(|stream| client::read_to_end(stream).1 == End::Reset));
    eventually("none is left", || proxy.stats("web")["connections"] == 0);
}
