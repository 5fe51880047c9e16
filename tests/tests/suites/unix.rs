//! Unix sockets as backends: paths and abstract names.

use std::fs::{self, Permissions};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::thread;

use nix::sys::signal::Signal;
use serde_json::json;
use testkit::client::{self, End};
use testkit::controlled::Controlled;
use testkit::process::{self, Process, Stream};
use testkit::require::Need;
use testkit::rproxy::{self, Standalone};
use testkit::suite::Case;
use testkit::unix::Place;
use testkit::upgradable::Successors;
use testkit::{PATIENCE, eventually};

/// More than a socket holds, so that it is spliced.
const LARGE: usize = 64 << 20;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        Case::new("a path, strictly confined", || relayed(&Place::path())),
        Case::new("an abstract name, strictly confined", || relayed(&Place::name())),
        Case::new("each side ends its stream alone", half_closed),
        Case::new("a backend that breaks off resets its client", broken_off),
        Case::new("nobody listens, and then somebody does", late),
        Case::new("clients wait while the backlog is full, up to connect_timeout", full_backlog),
        Case::new("clients that wait for the backlog come first", fair_backlog),
        Case::new("a backend that stops reading takes nothing from others", deaf),
        Case::new("the process's own sockets are no backends", own_sockets),
        Case::new("options in [defaults] that it cannot have are those of others", defaults),
        Case::new("a socket of another user", forbidden).needs(&[Need::Root]),
        Case::new("the backend gets the header of its proxy", announced),
        Case::new("a file is served, reloaded, and printed", configured),
        Case::new("confined changes bring sockets, and take them", changed),
        Case::new("an upgrade keeps it", upgraded),
        Case::new("the access log and the list of connections name it", logged),
        Case::new("what a Unix socket cannot have is refused", refused),
    ]
}

/// Sends back what comes. The client may be gone.
fn echo(stream: UnixStream) {
    io::copy(&mut &stream, &mut &stream).ok();
    stream.shutdown(Shutdown::Write).ok();
}

fn relayed(place: &Place) {
    place.serve(echo);
    let proxy = place.relay(&["--sandbox", "strict"]);
    client::assert_echoes(proxy.address());
    let stream = client::connect(proxy.address());
    client::exchange(&stream, 1, LARGE);
    client::ping(&stream);
    let log = proxy.process.captured(Stream::Stderr);
    assert!(!log.contains("WARN"), "{log}");
}

fn half_closed() {
    let place = Place::path();
    place.serve(|mut stream| {
        let mut question = Vec::new();
        stream.read_to_end(&mut question).unwrap();
        stream.write_all(&vec![7; question.len()]).unwrap();
    });
    let proxy = place.relay(&[]);
    let answer = client::ask(proxy.address(), &[1; 300_000]).unwrap();
    assert_eq!(answer, vec![7; 300_000]);
}

/// A Unix socket that is closed with unread data is reset (unix_release_sock in net/unix/af_unix.c).
fn broken_off() {
    let place = Place::path();
    place.serve(|mut stream| stream.read_exact(&mut [0]).unwrap());
    let proxy = place.relay(&[]);
    let mut stream = client::connect(proxy.address());
    stream.write_all(b"some bytes").unwrap();
    let (rest, end) = client::read_to_end(&stream);
    assert_eq!((rest.len(), end), (0, End::Reset));
    // There is no reset of a client that a Unix socket could pass on: it ends.
    let place = Place::path();
    let listener = place.listen();
    let proxy = place.relay(&[]);
    client::reset(client::connect(proxy.address()));
    let (mut accepted, _peer) = listener.accept().unwrap();
    accepted.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(accepted.read(&mut [0]).unwrap(), 0);
}

fn late() {
    let place = Place::path();
    let proxy = place.relay(&[]);
    let assert_refused = |reason: &str| {
        assert_eq!(client::end_of(proxy.address()), (Vec::new(), End::Reset));
        let said = proxy.process.wait_for_line(Stream::Stderr, |line| line.contains(reason));
        assert!(said.contains(&format!("backend={}", place.text)), "{said}");
    };
    assert_refused("No such file or directory");
    drop(place.listen());
    assert_refused("connect_refused");
    fs::remove_file(place.as_path()).unwrap();
    place.serve(echo);
    client::assert_echoes(proxy.address());
}

fn full_backlog() {
    let place = Place::path();
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    socket.bind(&socket2::SockAddr::unix(place.as_path()).unwrap()).unwrap();
    socket.listen(0).unwrap();
    let control = place.dir.path().join("control");
    let control = control.to_str().unwrap();
    let proxy = place.relay(&["--connect-timeout", "1s", "--control", control]);
    // Linux takes one connection more than the backlog (unix_recvq_full in net/unix/af_unix.c).
    let clients: Vec<TcpStream> = (0..3).map(|_| client::connect(proxy.address())).collect();
    proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("did not answer within 1s"));
    // Those that wait are served once there is room.
    let listener = UnixListener::from(std::os::fd::OwnedFd::from(socket));
    let waiting: Vec<TcpStream> = (0..3).map(|_| client::connect(proxy.address())).collect();
    thread::spawn(move || {
        listener.incoming().for_each(|stream| drop(thread::spawn(|| echo(stream.unwrap()))))
    });
    waiting.iter().for_each(client::ping);
    drop(clients);
}

/// While more clients are there than the backlog holds, the kernel wakes those that wait in turn, and so does the proxy.
fn fair_backlog() {
    let place = Place::path();
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None).unwrap();
    socket.bind(&socket2::SockAddr::unix(place.as_path()).unwrap()).unwrap();
    socket.listen(0).unwrap();
    // With one processor, it has one worker, which sees them in their order.
    let mut one = Command::new("taskset");
    one.args(["-c", "0"]);
    let arguments = ["--host", "127.0.0.1:0", "--to", &place.text];
    let process = Process::spawn(process::prefixed(one, &rproxy::command(&arguments)));
    let proxy = Standalone::ready(process, &arguments);
    // Each sends its number, so that the server sees the order.
    let clients: Vec<TcpStream> = (0..20_u8)
        .map(|number| {
            let mut client = client::connect(proxy.address());
            client.write_all(&[number]).unwrap();
            client
        })
        .collect();
    let listener = UnixListener::from(std::os::fd::OwnedFd::from(socket));
    let numbers: Vec<u8> = (0..clients.len())
        .map(|_| {
            let (mut stream, _peer) = listener.accept().unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut number = [0];
            stream.read_exact(&mut number).unwrap();
            number[0]
        })
        .collect();
    assert_eq!(numbers, (0..20).collect::<Vec<u8>>());
}

/// To a Unix socket that does not read any more, no write succeeds, and nothing says that it has failed.
fn deaf() {
    let place = Place::path();
    let listener = place.listen();
    let (host, echo) = (client::own_address(), testkit::backend::TcpBackend::echo());
    let other = client::own_address();
    let pairs = ["--host", &host.to_string(), "--to", &place.text, "--host", &other.to_string(), "--to"];
    let to = echo.address().to_string();
    let server = Controlled::start(&[&pairs[..], &[&to, "--idle-timeout", "2s"]].concat());
    let busy: Vec<TcpStream> = (0..8).map(|_| client::connect(other)).collect();
    busy.iter().for_each(client::ping);
    let deaf: Vec<(TcpStream, UnixStream)> = (0..8)
        .map(|_| {
            let mut client = client::connect(host);
            let (backend, _peer) = listener.accept().unwrap();
            backend.shutdown(Shutdown::Read).unwrap();
            client.write_all(b"unread").unwrap();
            (client, backend)
        })
        .collect();
    for (client, backend) in &deaf {
        // It may still write.
        (&*backend).write_all(b"heard").unwrap();
        let mut heard = [0; 5];
        (&*client).read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"heard");
    }
    busy.iter().for_each(client::ping);
    server.stats(&format!("{other}/tcp"));
    for (client, _backend) in &deaf {
        assert_eq!(client::read_to_end(client).1, End::Reset, "it was idle");
    }
}

fn own_sockets() {
    let dir = tempfile::tempdir().unwrap();
    let metrics = dir.path().join("metrics");
    let linked = dir.path().join("linked");
    let server = Controlled::start(&[
        "--metrics",
        &format!("unix:{}", metrics.display()),
        "--host",
        &client::own_address().to_string(),
        "--to",
        "unix:/nowhere.sock",
    ]);
    std::os::unix::fs::symlink(server.socket(), &linked).unwrap();
    for own in [server.socket(), metrics, linked] {
        let refused =
            server.ctl(&["add", "--host", "127.0.0.1:0", "--to", &format!("unix:{}", own.display())]);
        assert!(refused.stderr.contains("is this process's own socket"), "{refused:#?}");
    }
    let control = dir.path().join("control");
    let output = process::run(rproxy::command(&[
        "--control",
        control.to_str().unwrap(),
        "--host",
        "127.0.0.1:0",
        "--to",
        &format!("unix:{}", control.display()),
    ]));
    assert_eq!(output.status.code(), Some(1), "{output:#?}");
    assert!(output.stderr.contains("is this process's own socket"), "{output:#?}");
}

fn defaults() {
    let place = Place::path();
    let text = format!(
        "[defaults]\nsource = \"client\"\ndevice = \"lo\"\nallow = [\"10.0.0.0/8\"]\n\
         [[mapping]]\nhost = \"unix:{0}/front.sock\"\nto = \"unix:/run/app.sock\"\n\
         [[mapping]]\nhost = \"127.0.0.1:81\"\nto = \"172.17.0.2:80\"\n",
        place.dir.path().display()
    );
    let file = place.file("rproxy.toml", &text);
    let printed =
        process::run(rproxy::command(&["--config", file.to_str().unwrap(), "--print-config"])).success();
    let (unix, other) = printed.split_once("127.0.0.1:81").unwrap();
    for option in ["source", "device", "allow"] {
        let line = format!("{option} = ");
        assert!(!unix.contains(&line) && other.contains(&line), "{option}: {printed}");
    }
    // What is meant for them applies.
    let of_proxies = text.replace("source = \"client\"", "accept_proxy = [\"10.0.0.1\", \"unix\"]");
    fs::write(&file, of_proxies).unwrap();
    let printed =
        process::run(rproxy::command(&["--config", file.to_str().unwrap(), "--print-config"])).success();
    let (unix, _other) = printed.split_once("127.0.0.1:81").unwrap();
    assert!(unix.contains("accept_proxy = [\"unix\"]") && unix.contains("allow = "), "{printed}");
    let own = text.replace("to = \"unix:", "device = \"lo\"\nto = \"unix:");
    fs::write(&file, own).unwrap();
    let output = process::run(rproxy::command(&["check-config", file.to_str().unwrap()]));
    assert!(
        output.stderr.contains(":7:10: device: a connection to a Unix socket has no device = lo"),
        "{output:#?}"
    );
}

fn forbidden() {
    let place = Place::path();
    place.serve(echo);
    fs::set_permissions(place.dir.path(), Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(place.as_path(), Permissions::from_mode(0o600)).unwrap();
    let proxy = place.relay(&["--user", "nobody"]);
    assert_eq!(client::end_of(proxy.address()), (Vec::new(), End::Reset));
    let said = proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("Permission denied"));
    assert!(said.contains("takes write permission for rproxy's user or group"), "{said}");
    fs::set_permissions(place.as_path(), Permissions::from_mode(0o666)).unwrap();
    client::assert_echoes(proxy.address());
}

fn announced() {
    let place = Place::path();
    place.serve(echo);
    let proxy = place.relay(&["--send-proxy", "v1"]);
    let mut stream = client::connect(proxy.address());
    let (own, front) = (stream.local_addr().unwrap(), proxy.address());
    let header = format!("PROXY TCP4 127.0.0.1 127.0.0.1 {} {}\r\n", own.port(), front.port());
    let mut echoed = vec![0; header.len()];
    stream.read_exact(&mut echoed).unwrap();
    assert_eq!(String::from_utf8(echoed).unwrap(), header);
    client::ping(&stream);
}

fn configured() {
    let place = Place::path();
    place.serve(echo);
    let host = client::own_address();
    let text = |to: &str| format!("[[mapping]]\nname = \"app\"\nhost = \"{host}\"\nto = \"{to}\"\n");
    let file = place.file("rproxy.toml", &text(&place.text));
    let arguments = ["--config", file.to_str().unwrap(), "--sandbox", "strict"];
    let process = Process::spawn(rproxy::command(&arguments));
    process.wait_for_line(Stream::Stdout, |line| line == format!("{} -> {host}", place.text));
    client::assert_echoes(host);
    let stays = client::connect(host);
    client::ping(&stays);

    let other = Place::name();
    other.serve(|mut stream| stream.write_all(b"other").unwrap());
    fs::write(&file, text(&other.text)).unwrap();
    process.signal(Signal::SIGHUP);
    process.wait_for_line(Stream::Stderr, |line| line.contains("configuration reloaded"));
    assert_eq!(client::end_of(host).0, b"other");
    client::ping(&stays);

    let printed =
        process::run(rproxy::command(&["--config", file.to_str().unwrap(), "--print-config"])).success();
    assert!(printed.contains(&format!("to = \"{}\"", other.text)), "{printed}");
    fs::write(&file, text("unix:app.sock")).unwrap();
    let output = process::run(rproxy::command(&["check-config", file.to_str().unwrap()]));
    assert_eq!(output.status.code(), Some(1), "{output:#?}");
    assert!(
        output.stderr.contains(":4:6: to: 'unix:app.sock' is not the address of a Unix socket"),
        "{output:#?}"
    );
}

fn changed() {
    let (place, other) = (Place::path(), Place::name());
    place.serve(echo);
    other.serve(|mut stream| stream.write_all(b"other").unwrap());
    let (host, first) = (client::own_address(), client::own_address().to_string());
    let server = Controlled::start(&["--sandbox", "strict", "--host", &first, "--to", "unix:/nowhere.sock"]);
    let added =
        server.ctl(&["add", "--name", "app", "--host", &host.to_string(), "--to", &place.text]).success();
    assert_eq!(added.trim_end(), format!("app: {} -> {host}", place.text));
    client::assert_echoes(host);
    server.ctl(&["remove", &format!("{first}/tcp")]).success();
    let listed = server.json(&["list"]);
    let app = &listed["mappings"][0];
    assert_eq!((&app["to"], app.get("to_ports")), (&json!(place.text), None), "{listed:#}");
    // What was listed can be applied.
    let again = server.apply(std::slice::from_ref(app)).success();
    assert!(again.contains("1 not touched"), "{again}");
    let toml = server.ctl(&["list", "--toml"]).success();
    assert!(toml.contains(&format!("to = \"{}\"", place.text)), "{toml}");

    let stays = client::connect(host);
    client::ping(&stays);
    server.ctl(&["retarget", "app", "--to", &other.text]).success();
    assert_eq!(client::end_of(host).0, b"other");
    client::ping(&stays);
    server.ctl(&["retarget", "app", "--to", &other.text, "--cut"]).success();
    assert_eq!(client::read_to_end(&stays).1, End::Reset);
    let backend = testkit::backend::TcpBackend::echo();
    server.ctl(&["retarget", "app", "--to", &backend.address().to_string()]).success();
    client::assert_echoes(host);
    server.ctl(&["remove", "app"]).success();
}

fn upgraded() {
    let place = Place::path();
    place.serve(echo);
    let host = client::own_address();
    let server = Controlled::start(&["--host", &host.to_string(), "--to", &place.text]);
    let stays = client::connect(host);
    client::ping(&stays);
    let _successors = Successors::of(&server.process);
    server.process.signal(Signal::SIGUSR2);
    server.process.wait_for_line(Stream::Stderr, |line| line.contains("a new process has taken over"));
    client::assert_echoes(host);
    client::ping(&stays);
}

fn logged() {
    let place = Place::path();
    place.serve(echo);
    let log = place.dir.path().join("access.log");
    let host = client::own_address();
    let mapping = ["--host", &host.to_string(), "--to", &place.text];
    let log_to = ["--access-log", log.to_str().unwrap(), "--access-log-format", "json"];
    let server = Controlled::start(&[mapping, log_to].concat());
    let stream = client::connect(host);
    client::ping(&stream);
    let connections = server.json(&["connections"]);
    assert_eq!(connections["connections"][0]["backend"], json!(place.text), "{connections:#}");
    let table = server.ctl(&["connections"]).success();
    assert!(table.contains(&place.text), "{table}");
    drop(stream);
    eventually("its line is written", || {
        let text = fs::read_to_string(&log).unwrap_or_default();
        text.contains(&format!("\"backend\":\"{}\"", place.text)) && text.contains("client_closed")
    });
}

fn refused() {
    let wrong = |line: &str, message: &str| {
        let arguments: Vec<&str> = line.split_whitespace().collect();
        let output = process::run(rproxy::command(&arguments));
        assert_eq!(output.status.code(), Some(2), "{line}: {output:#?}");
        assert!(output.stderr.contains(message), "{line}: {output:#?}");
    };
    let to = "--host 127.0.0.1:0 --to unix:/run/app.sock";
    wrong("--host 127.0.0.1:0 --to unix:app.sock", "write unix:/run/app.sock, or unix:@app");
    wrong("--host 127.0.0.1:0 --to unix:@", "write unix:/run/app.sock, or unix:@app");
    wrong(
        &format!("--host 127.0.0.1:0 --to unix:/{}", "a".repeat(107)),
        "has 108 bytes, and 107 are the most",
    );
    wrong(&format!("{to} --proto udp"), "only tcp can be relayed to or from a Unix socket, and not udp");
    wrong(
        &format!("{to} --proto tcp+udp"),
        "only tcp can be relayed to or from a Unix socket, and not tcp+udp",
    );
    wrong(&format!("{to} --proto sctp"), "only tcp can be relayed to or from a Unix socket, and not sctp");
    wrong(&format!("{to} --source client"), "a connection to a Unix socket has no source = client");
    wrong(&format!("{to} --device lo"), "a connection to a Unix socket has no device = lo");
    wrong(
        "-p 80:80 --to unix:/run/app.sock",
        "-p has a port of the backend, and a Unix socket none; write --host",
    );

    let server = Controlled::start(&[]);
    let wrong = server.apply(&[json!({ "host": "127.0.0.1", "to": "unix:/run/app.sock", "to_ports": "80" })]);
    assert!(wrong.stderr.contains("to_ports: a Unix socket has no ports"), "{wrong:#?}");
    // Whoever can change mappings is not to have the sockets of other services, unless that was asked for at the start.
    let late = server.apply(&[json!({ "host": "127.0.0.1", "to": "unix:/run/app.sock" })]);
    assert_eq!(late.status.code(), Some(1), "{late:#?}");
    assert!(late.stderr.contains("none was a backend when it was confined; restart it"), "{late:#?}");
    let missing = server.apply(&[json!({ "host": "127.0.0.1", "to": "192.0.2.1" })]);
    assert!(missing.stderr.contains("to_ports: it is missing"), "{missing:#?}");
}
