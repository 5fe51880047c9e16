//! Unix sockets as hosts: paths and abstract names that clients connect to.

use std::fs;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use testkit::backend::TcpBackend;
use testkit::client;
use testkit::controlled::Controlled;
use testkit::eventually;
use testkit::holdings::wait_until_idle;
use testkit::process::{self, Process, Stream};
use testkit::require::Need;
use testkit::rproxy;
use testkit::suite::Case;
use testkit::systemd::Systemd;
use testkit::unix::{Place, patient};
use testkit::upgradable::{self, Successors};

/// More than a socket holds, so that it is spliced.
const LARGE: usize = 64 << 20;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("a path, strictly confined", || relayed(&Place::path())),
        Case::new("an abstract name, strictly confined", || relayed(&Place::name())),
        Case::new("to a Unix socket", between_sockets),
        Case::new("each side ends its stream alone", half_closed),
        Case::new("a backend that refuses ends its clients", without_backend),
        Case::new("the file is the owner's, and goes with the process", file_of_its_own),
        Case::new("the file has the mode, the user and the group that are asked for", permitted)
            .needs(&[Need::Root]),
        Case::new("a socket that nobody listens on is replaced, and nothing else", replaced),
        Case::new("logs and lists name the process of a client", named),
        Case::new("a client without an address is announced as that", announced),
        Case::new("a proxy in front tells who a client is", told),
        Case::new("connections are limited for each user", limited).needs(&[Need::Root]),
        Case::new("confined changes bring sockets, and take them", changed),
        Case::new("a change gives other permissions, or none", changed_permissions),
        Case::new("what has taken the place of its file is not touched", overtaken),
        Case::new("descriptors and urgent bytes among those of a stream", ancillary),
        Case::new("a reload moves it, and its connections stay", reloaded),
        Case::new("an upgrade keeps it", upgraded),
        Case::new("a passed socket stays with whoever has bound it", passed),
        Case::new("what a Unix socket cannot have is refused", refused),
    ]
}

#[track_caller]
fn ping(mut stream: &UnixStream) {
    stream.write_all(b"ping").unwrap();
    let mut echoed = [0; 4];
    stream.read_exact(&mut echoed).unwrap();
    assert_eq!(&echoed, b"ping");
}

/// What comes until the end, and whether that is one in order.
fn read_to_end(mut stream: &UnixStream) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    let is_in_order = match stream.read_to_end(&mut bytes) {
        Ok(_) => true,
        Err(error) if matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => false,
        Err(error) => panic!("{error}"),
    };
    (bytes, is_in_order)
}

/// Sends so much and gets it back, at the same time.
fn exchange(stream: &UnixStream, size: usize) {
    let byte = |index: usize| u8::try_from(index % 251).unwrap();
    let sent: Vec<u8> = (0..size).map(byte).collect();
    let writer = stream.try_clone().unwrap();
    let writing = thread::spawn(move || (&writer).write_all(&sent).unwrap());
    let mut got = vec![0; size];
    (&*stream).read_exact(&mut got).unwrap();
    writing.join().unwrap();
    assert!(got.iter().enumerate().all(|(index, got)| *got == byte(index)), "other bytes");
}

fn relayed(front: &Place) {
    let backend = TcpBackend::echo();
    let process = front.relay_from(&backend.address().to_string(), &["--sandbox", "strict"]);
    let stream = front.connect();
    exchange(&stream, LARGE);
    ping(&stream);
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&stream), (Vec::new(), true));
    let log = process.captured(Stream::Stderr);
    assert!(!log.contains("WARN"), "{log}");
}

fn between_sockets() {
    let (front, back) = (Place::path(), Place::path());
    let listener = UnixListener::bind_addr(&back.address).unwrap();
    let echo = thread::spawn(move || {
        let stream = patient(listener.accept().unwrap().0);
        std::io::copy(&mut &stream, &mut &stream).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    });
    let _process = front.relay_from(&back.text, &["--sandbox", "strict"]);
    let stream = front.connect();
    exchange(&stream, LARGE);
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&stream), (Vec::new(), true));
    echo.join().unwrap();
}

fn half_closed() {
    let front = Place::path();
    let backend = TcpBackend::local(|mut stream| {
        let mut question = Vec::new();
        stream.read_to_end(&mut question)?;
        stream.write_all(&vec![7; question.len()])
    });
    let _process = front.relay_from(&backend.address().to_string(), &[]);
    let mut stream = front.connect();
    stream.write_all(&[1; 300_000]).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&stream), (vec![7; 300_000], true));
    // A client may stop to read, and go on to write.
    let backend = TcpBackend::local(|mut stream| {
        stream.write_all(b"unread")?;
        std::io::copy(&mut stream, &mut std::io::sink()).map(drop)
    });
    let other = Place::path();
    let process = other.relay_from(&backend.address().to_string(), &[]);
    let deaf = other.connect();
    deaf.shutdown(Shutdown::Read).unwrap();
    let next = other.connect();
    let mut unread = [0; 6];
    (&next).read_exact(&mut unread).unwrap();
    assert_eq!(&unread, b"unread", "others are served meanwhile: {}", process.captured(Stream::Stderr));
}

fn without_backend() {
    let front = Place::path();
    let process = front.relay_from("127.0.0.1:1", &[]);
    assert_eq!(read_to_end(&front.connect()).0, b"");
    let line = process.wait_for_line(Stream::Stderr, |line| line.contains("connect_refused"));
    assert!(line.contains(&format!("client=unix:pid={},uid=", std::process::id())), "{line}");
    assert!(line.contains(&format!("mapping={}", front.text)), "{line}");
}

fn file_of_its_own() {
    let (front, backend) = (Place::path(), TcpBackend::echo());
    let to = backend.address().to_string();
    let process = front.relay_from(&to, &[]);
    let metadata = fs::symlink_metadata(front.as_path()).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o600);
    let stays = front.connect();
    ping(&stays);
    process.signal(Signal::SIGTERM);
    eventually("its file is gone before its connections are", || !front.as_path().exists());
    ping(&stays);
    drop(stays);
    process.wait();

    // Somebody else's file stays.
    let process = front.relay_from(&to, &[]);
    fs::remove_file(front.as_path()).unwrap();
    let other = UnixListener::bind(front.as_path()).unwrap();
    process.signal(Signal::SIGTERM);
    process.wait();
    assert!(front.as_path().exists());
    drop(other);
}

fn permitted() {
    let (front, backend) = (Place::path(), TcpBackend::echo());
    fs::set_permissions(front.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let asked = ["--socket-mode", "0660", "--socket-user", "nobody", "--socket-group", "1"];
    let _process = front.relay_from(&backend.address().to_string(), &asked);
    let metadata = fs::metadata(front.as_path()).unwrap();
    let nobody = nix::unistd::User::from_name("nobody").unwrap().unwrap();
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o660);
    assert_eq!((metadata.uid(), metadata.gid()), (nobody.uid.as_raw(), 1));
    let connect = |uid: u32, gid: u32| {
        let mut probe = Command::new("python3");
        let script = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])";
        probe.args(["-c", script]).arg(front.as_path()).uid(uid).gid(gid);
        process::run(probe)
    };
    for (uid, gid) in [(nobody.uid.as_raw(), 65_533), (4711, 1)] {
        connect(uid, gid).success();
    }
    let other = connect(4711, 4711);
    assert!(other.stderr.contains("Permission"), "{other:#?}");
}

fn replaced() {
    let (front, backend) = (Place::path(), TcpBackend::echo());
    let to = backend.address().to_string();
    let refuse = |what: &str| {
        let output = process::run(rproxy::command(&["--host", &front.text, "--to", &to]));
        assert_eq!(output.status.code(), Some(1), "{output:#?}");
        assert!(output.stderr.contains(&format!("--host {}: {what}", front.text)), "{output:#?}");
    };
    let listener = UnixListener::bind(front.as_path()).unwrap();
    refuse("somebody listens there already");
    drop(listener);
    assert!(front.as_path().exists());
    let process = front.relay_from(&to, &[]);
    ping(&front.connect());
    process.signal(Signal::SIGTERM);
    process.wait();
    fs::write(front.as_path(), "precious").unwrap();
    refuse("there is a file which is not a socket");
    assert_eq!(fs::read_to_string(front.as_path()).unwrap(), "precious");
    // One that is there, and has no room for a client.
    fs::remove_file(front.as_path()).unwrap();
    let full = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    full.bind(&socket2::SockAddr::unix(front.as_path()).unwrap()).unwrap();
    full.listen(0).unwrap();
    let _waiting = UnixStream::connect(front.as_path()).unwrap();
    refuse("somebody listens there already");
    let nowhere = process::run(rproxy::command(&["--host", "unix:/nowhere/a.sock", "--to", &to]));
    assert!(nowhere.stderr.contains("create its directory first"), "{nowhere:#?}");
}

/// Whom the kernel takes this process for.
fn own_name() -> String {
    let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
    format!("unix:pid={},uid={uid},gid={gid}", std::process::id())
}

fn named() {
    for format in ["text", "json"] {
        let (front, backend) = (Place::path(), TcpBackend::echo());
        let log = front.dir.path().join("access.log");
        let to = backend.address().to_string();
        let log_to = ["--access-log", log.to_str().unwrap(), "--access-log-format", format];
        let server = Controlled::start(&[&["--host", &front.text, "--to", &to], &log_to[..]].concat());
        let stream = front.connect();
        ping(&stream);
        let listed = server.json(&["connections"]);
        let connection = &listed["connections"][0];
        assert_eq!((&connection["client"], &connection["host"]), (&json!(own_name()), &json!(front.text)));
        assert!(server.ctl(&["connections"]).success().contains(&own_name()));
        let none = server.json(&["connections", "--client", "0.0.0.0/0"]);
        assert_eq!(none["connections"], json!([]), "it has no address");
        for chosen in ["unix", &own_name()] {
            let one = server.json(&["connections", "--client", chosen]);
            assert_eq!(one["connections"][0]["id"], connection["id"], "{one:#}");
        }
        let table = server.ctl(&["list"]).success();
        assert!(table.contains(&front.text) && !table.contains("waits"), "{table}");
        drop(stream);
        eventually("its line is written", || {
            fs::read_to_string(&log).unwrap_or_default().contains("client_closed")
        });
        let line = fs::read_to_string(&log).unwrap();
        if format == "text" {
            assert!(line.contains(&format!(" tcp {} {} {to} ", own_name(), front.text)), "{line}");
        } else {
            let line: Value = serde_json::from_str(&line).unwrap();
            let process = [&line["client_pid"], &line["client_uid"], &line["client_gid"]];
            let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
            assert_eq!(process, [&json!(std::process::id()), &json!(uid), &json!(gid)], "{line:#}");
            assert_eq!((&line["client"], &line["host"]), (&json!(own_name()), &json!(front.text)));
        }
    }
}

fn announced() {
    let v2 = b"\r\n\r\n\0\r\nQUIT\n\x21\0\0\0";
    for (version, header) in [("v1", &b"PROXY UNKNOWN\r\n"[..]), ("v2", v2)] {
        let (front, backend) = (Place::path(), TcpBackend::echo());
        let _process = front.relay_from(&backend.address().to_string(), &["--send-proxy", version]);
        let mut stream = front.connect();
        let mut echoed = vec![0; header.len()];
        stream.read_exact(&mut echoed).unwrap();
        assert_eq!(echoed, header);
        ping(&stream);
    }
}

fn told() {
    let (front, backend) = (Place::path(), TcpBackend::echo());
    let to = backend.address().to_string();
    let options = ["--accept-proxy", "unix", "--allow", "192.0.2.0/24", "--send-proxy", "v1"];
    let server = Controlled::start(&[&["--host", &front.text, "--to", &to], &options[..]].concat());
    let line = b"PROXY TCP4 192.0.2.7 192.0.2.1 5000 80\r\n";
    let mut stream = front.connect();
    // The first part has been looked at by the time of the second one.
    let (first, second) = line.split_at(10);
    stream.write_all(first).unwrap();
    wait_until_idle(server.process.pid());
    stream.write_all(second).unwrap();
    let mut echoed = vec![0; line.len()];
    stream.read_exact(&mut echoed).unwrap();
    assert_eq!(echoed, line);
    ping(&stream);
    let listed = server.json(&["connections", "--client", "192.0.2.7"]);
    assert_eq!(listed["connections"][0]["client"], json!("192.0.2.7:5000"), "{listed:#}");
    for (header, reason) in [
        (&b"PROXY TCP4 198.51.100.7 192.0.2.1 5000 80\r\n"[..], "allow does not have it"),
        (b"PROXY UNKNOWN\r\n", "client=unix:pid="),
        (b"GET / HTTP/1.1\r\n\r\n", "no header of its proxy"),
    ] {
        let mut stream = front.connect();
        stream.write_all(header).unwrap();
        assert_eq!(read_to_end(&stream).0, b"");
        server.process.wait_for_line(Stream::Stderr, |line| line.contains(reason));
    }
}

fn limited() {
    let (front, backend) = (Place::path(), TcpBackend::echo());
    fs::set_permissions(front.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let options = ["--max-connections-per-source", "2", "--socket-mode", "0666"];
    let process = front.relay_from(&backend.address().to_string(), &options);
    let own = [front.connect(), front.connect()];
    own.iter().for_each(ping);
    assert_eq!(read_to_end(&front.connect()).0, b"");
    let line = process.wait_for_line(Stream::Stderr, |line| line.contains("as many connections as it may"));
    assert!(line.contains("source=uid=0 "), "{line}");
    let script = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); \
                  s.sendall(b'ping'); print(s.recv(4))";
    let mut other = Command::new("python3");
    other.args(["-c", script]).arg(front.as_path()).uid(4711).gid(4711);
    assert_eq!(process::run(other).success().trim_end(), "b'ping'");
}

fn changed() {
    let (front, backend) = (Place::path(), TcpBackend::echo());
    let to = backend.address().to_string();
    let server =
        Controlled::start(&["--sandbox", "strict", "--host", &front.text, "--to", &to, "--name", "first"]);
    let second = front.dir.path().join("second.sock");
    let added = server.ctl(&[
        "add",
        "--name",
        "second",
        "--host",
        &format!("unix:{}", second.display()),
        "--to",
        &to,
    ]);
    assert_eq!(
        added.success().trim_end(),
        format!("second: 80/tcp -> unix:{}", second.display())
            .replace("80/", &format!("{}/", backend.address().port()))
    );
    let stream = patient(UnixStream::connect(&second).unwrap());
    ping(&stream);
    let taken = server.ctl(&["add", "--name", "third", "--host", &front.text, "--to", &to]);
    assert!(taken.stderr.contains("its socket is that of the mapping first"), "{taken:#?}");
    let host = SocketAddr::from((client::own_loopback(), 8080)).to_string();
    server.ctl(&["add", "--name", "back", "--host", &host, "--to", &front.text]).success();
    let ring = server.ctl(&["retarget", "first", "--to", &host]);
    assert!(ring.stderr.contains("would form a loop"), "{ring:#?}");
    server.ctl(&["remove", "back"]).success();
    // What was listed can be applied, also as a file.
    let listed = server.json(&["list"]);
    let again = server.apply(listed["mappings"].as_array().unwrap()).success();
    assert!(again.contains("2 not touched"), "{again}");
    let toml = server.file("list.toml", &server.ctl(&["list", "--toml"]).success());
    let again = server.ctl(&["apply", toml.to_str().unwrap()]).success();
    assert!(again.contains("2 not touched"), "{again}");
    // A confined process binds where it has listened from its start on.
    let elsewhere = tempfile::tempdir().unwrap();
    let host = format!("unix:{}/a.sock", elsewhere.path().display());
    let refused = server.ctl(&["add", "--host", &host, "--to", &to]);
    assert!(refused.stderr.contains("where it has listened from its start on"), "{refused:#?}");

    server.ctl(&["remove", "second"]).success();
    assert!(!second.exists());
    ping(&stream);
    server.ctl(&["remove", "first"]).success();
    assert!(!front.as_path().exists());

    // One without a Unix socket has given them up.
    let server = Controlled::start(&[]);
    let refused = server.ctl(&["add", "--host", &front.text, "--to", &to]);
    assert!(refused.stderr.contains("has given up Unix sockets when it was confined"), "{refused:#?}");
}

fn changed_permissions() {
    let (front, backend) = (Place::path(), TcpBackend::echo());
    let to = backend.address();
    let server = Controlled::start(&["--host", &front.text, "--to", &to.to_string(), "--name", "front"]);
    let mode = || fs::metadata(front.as_path()).unwrap().permissions().mode() & 0o7777;
    let apply = |name: &str, limits: Value| {
        server.apply(&[json!({ "name": name, "host": front.text, "to": to.ip().to_string(),
            "to_ports": to.port().to_string(), "limits": limits })])
    };
    let stays = front.connect();
    ping(&stays);
    apply("front", json!({ "socket_mode": "0666" })).success();
    assert_eq!(mode(), 0o666);
    // The same socket under another name.
    apply("renamed", json!({ "socket_mode": "0640" })).success();
    assert_eq!(mode(), 0o640);
    let refused = apply("renamed", json!({ "socket_mode": "0666", "socket_user": "4711" }));
    assert_eq!(refused.status.code(), Some(1), "{refused:#?}");
    assert!(
        refused.stderr.contains("renamed: socket_user = \"4711\": Operation not permitted"),
        "{refused:#?}"
    );
    assert_eq!(mode(), 0o640, "nothing has changed");
    apply("renamed", json!({})).success();
    assert_eq!(mode(), 0o600);
    ping(&stays);
    ping(&front.connect());
}

fn overtaken() {
    let (front, backend) = (Place::path(), TcpBackend::echo());
    let to = backend.address();
    let server = Controlled::start(&["--host", &front.text, "--to", &to.to_string(), "--name", "front"]);
    let apply = |mode: &str| {
        server.apply(&[json!({ "name": "front", "host": front.text, "to": to.ip().to_string(),
            "to_ports": to.port().to_string(), "limits": { "socket_mode": mode } })])
    };
    // A link in its place.
    let victim = front.file("victim", "");
    fs::set_permissions(&victim, fs::Permissions::from_mode(0o600)).unwrap();
    fs::remove_file(front.as_path()).unwrap();
    std::os::unix::fs::symlink(&victim, front.as_path()).unwrap();
    let refused = apply("0666");
    assert!(refused.stderr.contains("its file was replaced or removed by somebody else"), "{refused:#?}");
    assert_eq!(fs::metadata(&victim).unwrap().permissions().mode() & 0o7777, 0o600);
    // Another process's socket.
    fs::remove_file(front.as_path()).unwrap();
    let other = UnixListener::bind(front.as_path()).unwrap();
    let before = fs::metadata(front.as_path()).unwrap().permissions();
    assert_eq!(apply("0666").status.code(), Some(1));
    assert_eq!(fs::metadata(front.as_path()).unwrap().permissions(), before);
    // It stays, also after an upgrade.
    let _successors = Successors::of(&server.process);
    let new = upgradable::upgrade(&server.process, 0, server.process.pid());
    kill(new, Signal::SIGTERM).unwrap();
    upgradable::wait_for_end(new);
    assert!(front.as_path().exists());
    drop(other);
}

/// Reads end behind passed descriptors, and before urgent bytes, although more is there.
fn ancillary() {
    let (front, backend) = (Place::path(), TcpBackend::echo());
    let process = front.relay_from(&backend.address().to_string(), &["--log-level", "debug"]);
    let stream = front.connect();
    ping(&stream);
    process.pause();
    let null = fs::File::open("/dev/null").unwrap();
    let descriptors = [null.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&descriptors)];
    let send = |bytes: &[u8], rights: &[ControlMessage<'_>], flags| {
        let sent = sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(bytes)], rights, flags, None);
        assert_eq!(sent.unwrap(), bytes.len());
    };
    for _ in 0..3 {
        send(b"with a descriptor", &rights, MsgFlags::empty());
    }
    send(b"urgent", &[], MsgFlags::MSG_OOB);
    send(b"behind it", &[], MsgFlags::empty());
    process.resume();
    let expected = b"with a descriptorwith a descriptorwith a descriptorurgentbehind it";
    let mut echoed = vec![0; expected.len()];
    (&stream).read_exact(&mut echoed).unwrap();
    assert_eq!(String::from_utf8(echoed).unwrap(), String::from_utf8_lossy(expected));
    ping(&stream);
}

fn reloaded() {
    let (front, backend) = (Place::path(), TcpBackend::echo());
    let moved = front.dir.path().join("moved.sock");
    let text = |host: &str| {
        format!(
            "[[mapping]]\nname = \"front\"\nhost = \"{host}\"\nto = \"{}\"\nsocket_mode = \"0660\"\n",
            backend.address()
        )
    };
    let file = front.file("rproxy.toml", &text(&front.text));
    let arguments = ["--config", file.to_str().unwrap(), "--sandbox", "strict"];
    let process = Process::spawn(rproxy::command(&arguments));
    process.wait_for_line(Stream::Stdout, |line| line.ends_with(&front.text));
    let stays = front.connect();
    ping(&stays);
    fs::write(&file, text(&format!("unix:{}", moved.display()))).unwrap();
    process.signal(Signal::SIGHUP);
    process.wait_for_line(Stream::Stderr, |line| line.contains("configuration reloaded"));
    assert!(!front.as_path().exists());
    assert_eq!(fs::metadata(&moved).unwrap().permissions().mode() & 0o7777, 0o660);
    ping(&patient(UnixStream::connect(&moved).unwrap()));
    ping(&stays);
    let printed =
        process::run(rproxy::command(&["--config", file.to_str().unwrap(), "--print-config"])).success();
    for line in [format!("host = \"unix:{}\"", moved.display()), "socket_mode = \"0660\"".to_owned()] {
        assert!(printed.contains(&line), "{printed}");
    }
}

fn upgraded() {
    let (front, backend) = (Place::path(), TcpBackend::echo());
    let server = Controlled::start(&["--host", &front.text, "--to", &backend.address().to_string()]);
    let stays = front.connect();
    ping(&stays);
    let before = fs::metadata(front.as_path()).unwrap().ino();
    let _successors = Successors::of(&server.process);
    let new = upgradable::upgrade(&server.process, 0, server.process.pid());
    assert_eq!(fs::metadata(front.as_path()).unwrap().ino(), before, "it is the same");
    ping(&front.connect());
    ping(&stays);
    drop(stays);
    server.process.wait();
    assert!(front.as_path().exists(), "the old process has left it");
    ping(&front.connect());
    kill(new, Signal::SIGTERM).unwrap();
    upgradable::wait_for_end(new);
    assert!(!front.as_path().exists(), "the new one has removed it");
}

fn passed() {
    let (front, backend) = (Place::path(), TcpBackend::echo());
    let listener = UnixListener::bind(front.as_path()).unwrap();
    let to = backend.address().to_string();
    let systemd = Systemd::new();
    let sockets = vec![("front.socket", listener.into())];
    let process =
        Process::spawn(systemd.command_with_sockets(&["--host", &front.text, "--to", &to], sockets));
    ping(&front.connect());
    process.signal(Signal::SIGTERM);
    process.wait();
    assert!(front.as_path().exists(), "it is not the process's own");
}

fn refused() {
    let wrong = |line: &str, message: &str| {
        let arguments: Vec<&str> = line.split_whitespace().collect();
        let output = process::run(rproxy::command(&arguments));
        assert_eq!(output.status.code(), Some(2), "{line}: {output:#?}");
        assert!(output.stderr.contains(message), "{line}: {output:#?}");
    };
    let host = "--host unix:/run/rproxy-test.sock --to 127.0.0.1:9";
    wrong(&format!("{host} --proto udp"), "only tcp can be relayed to or from a Unix socket, and not udp");
    wrong(
        &format!("{host} --source client"),
        "a mapping that listens on a Unix socket has no source = client",
    );
    wrong(
        &format!("{host} --allow 10.0.0.0/8"),
        "a mapping that listens on a Unix socket has no allow and deny",
    );
    wrong(&format!("{host} --freebind"), "a mapping that listens on a Unix socket has no freebind");
    wrong(&format!("{host} --accept-proxy 10.0.0.1"), "where \"unix\" stands for all");
    wrong(&format!("{host} --v6only"), "v6only is for [::]");
    wrong(&format!("{host} --socket-mode 999"), "'999' is not the mode of a file");
    wrong("--host unix:front.sock --to 127.0.0.1:9", "write unix:/run/app.sock, or unix:@app");
    wrong("--host /run/front.sock --to 127.0.0.1:9", "if it is a Unix socket, write unix:/run/front.sock");
    wrong("--host unix:/run/a.sock --to 127.0.0.1:9-10", "stands for one port of the backend");
    wrong(
        "--host 127.0.0.1:0 --to 127.0.0.1:9 --socket-mode 0660",
        "--socket-mode: no --host is a Unix socket",
    );
    wrong("--host unix:/run/a.sock --to unix:/run/a.sock", "unix:/run/a.sock would forward to itself");
    wrong(&format!("{host} {host}"), "its socket is that of the mapping unix:/run/rproxy-test.sock");
    wrong("--to 127.0.0.1 -p unix:/run/a.sock", "write it behind the Unix socket, as in unix:/run/a.sock:80");
    assert!(!Path::new("/run/rproxy-test.sock").exists());
}
