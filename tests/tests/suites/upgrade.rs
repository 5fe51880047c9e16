//! A new process takes over while clients are served: no connection is refused or reset, and a new process that fails
//! changes nothing.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::thread;

use command_fds::{CommandFdExt, FdMapping};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use testkit::backend::TcpBackend;
use testkit::client::{self, End};
use testkit::docker_proxy::{self, DockerProxy, Status};
use testkit::load;
use testkit::process::{self, Process, Stream};
use testkit::require::{self, Need};
use testkit::rproxy::rproxy;
use testkit::suite::Case;
use testkit::systemd::Systemd;
use testkit::upgradable::{Program, children, launcher, upgrade, wait_for_end};
use testkit::{eventually, udp};

pub(crate) fn cases() -> Vec<Case> {
    let root = &[Need::Root];
    let case = |name: &str, body: fn()| Case::new(name, body);
    vec![
        case("connections: none is refused or cut, twice in a row", connections),
        case("a transfer continues to its last byte", transfer),
        case("flows keep their ports, and no datagram is lost", flows),
        case("the current mappings and the control socket are handed over", live_mappings),
        case("a configuration is read at the next reload, and not before", configuration),
        case("a range of ten thousand ports", range),
        case("notifications to systemd, and sockets that it passed", systemd),
        case("systemd reads nothing during the upgrade", systemd_unread),
        case("connections of the old process have their own limit", old_connections),
        case("the name of the program is looked up again", renamed),
        case("the parent ignores SIGCHLD", no_child_signals),
        case("another user, confined", other_user).needs(root),
        case("a new process that fails", broken),
        case("a new process that hangs", hanging),
        case("a new process that fails while flows are paused", failing_late),
        case("SIGTERM while a new process starts", stopped),
        case("the launcher ignores all but its server", launcher_signals),
        case("without its launcher a server continues", launcher_killed),
        case("the first process of a container cannot be replaced", first_process)
            .needs(&[Need::Root, Need::Program("unshare")]),
        case("an old process that offers an invalid handover", false_offers),
        case("docker-proxy's flags start no launcher", docker_mode),
    ]
}

/// The arguments for one mapping.
fn mapping(protocol: &str, host: SocketAddr, to: SocketAddr) -> Vec<String> {
    let words = ["--proto", protocol, "--host", &host.to_string(), "--to", &to.to_string()];
    [&words[..], &["--drain-timeout", "60s"]].concat().into_iter().map(String::from).collect()
}

fn start(program: &Program, arguments: &[String], more: &[&str]) -> Process {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(more.iter().copied()).collect();
    program.start(&arguments)
}

/// Connects again and again while `body` runs; every connection has to come to its end in order.
fn under_load(address: SocketAddr, body: impl FnOnce()) {
    let connect = |_| {
        let client = client::connect(address);
        client::ping(&client);
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client::read_to_end(&client), (vec![], End::Eof));
    };
    load::meanwhile(3, connect, |connections| {
        body();
        connections.wait_for(10);
    });
}

fn connections() {
    let (program, backend, address) = (Program::new(), TcpBackend::echo(), client::own_address());
    let first = start(&program, &mapping("tcp", address, backend.address()), &["--sandbox", "strict"]);
    let old = client::connect(address);
    client::ping(&old);
    under_load(address, || {
        let second = upgrade(&first, 0, first.pid());
        let newer = client::connect(address);
        client::ping(&newer);
        let third = upgrade(&first, 1, second);
        // Each is a connection of another process.
        client::ping(&old);
        client::ping(&newer);
        drop(newer);
        wait_for_end(second);
        assert!(first.is_running(), "it has a connection");
        drop(old);
        assert_eq!(first.wait().code(), Some(0));
        kill(third, None).unwrap();
    });
}

fn transfer() {
    let (program, backend, address) = (Program::new(), TcpBackend::echo(), client::own_address());
    let first = start(&program, &mapping("tcp", address, backend.address()), &[]);
    let mut client = client::connect(address);
    let mut sender = client.try_clone().unwrap();
    let mut received = 0;
    thread::scope(|scope| {
        let (half, upgraded) = std::sync::mpsc::channel();
        scope.spawn(move || {
            sender.write_all(&vec![7; 10_000_000]).unwrap();
            upgraded.recv().unwrap();
            sender.write_all(&vec![7; 10_000_000]).unwrap();
            sender.shutdown(Shutdown::Write).unwrap();
        });
        client.read_exact(&mut [0]).unwrap();
        upgrade(&first, 0, first.pid());
        half.send(()).unwrap();
        let mut rest = Vec::new();
        client.read_to_end(&mut rest).unwrap();
        received += rest.len() + 1;
    });
    assert_eq!(received, 20_000_000);
    assert_eq!(first.wait().code(), Some(0));
}

fn flows() {
    let naming = udp::Backend::naming(udp::local());
    let echoing = udp::Backend::echo(udp::local());
    let (program, named, echoed) = (Program::new(), client::own_address(), client::own_address());
    let arguments =
        [mapping("udp", named, naming.address()), mapping("udp", echoed, echoing.address())[2..6].to_vec()]
            .concat();
    let first = start(&program, &arguments, &[]);
    let clients: Vec<_> = (0..300).map(|_| udp::client(named.ip())).collect();
    let ports: Vec<_> = clients.iter().map(|client| udp::flow_of(client, named)).collect();
    let client = udp::client(echoed.ip());
    let ask = |_| udp::assert_all_echo(&client, echoed, [0, 1, 1400, 9000]);
    load::meanwhile(1, ask, |_questions| {
        let second = upgrade(&first, 0, first.pid());
        // It has neither connections nor flows any more.
        assert_eq!(first.wait().code(), Some(0));
        let after: Vec<_> = clients.iter().map(|client| udp::flow_of(client, named)).collect();
        assert_eq!(after, ports);
        upgrade(&first, 1, second);
        wait_for_end(second);
        assert_eq!(udp::flow_of(&clients[0], named), ports[0]);
    });
}

fn controlled(program: &Program, more: &[&str]) -> Process {
    let control = program.control();
    let process = program.start(&[&["--control", control.to_str().unwrap()], more].concat());
    program.ctl(&["list"]).success();
    process
}

fn json_of(program: &Program, arguments: &[&str]) -> Value {
    serde_json::from_str(&program.ctl(&[arguments, &["--json"]].concat()).success()).unwrap()
}

fn live_mappings() {
    let (program, backend, address) = (Program::new(), TcpBackend::echo(), client::own_address());
    let first = controlled(&program, &["--host", "127.0.0.1:0", "--to", "192.0.2.1:80"]);
    // A mapping of the command line goes, others come, one of them at a random port.
    let initial = json_of(&program, &["list"])["mappings"][0]["name"].as_str().unwrap().to_owned();
    program.ctl(&["remove", &initial]).success();
    let (host, to) = (address.to_string(), backend.address().to_string());
    program.ctl(&["add", "--name", "web", "--host", &host, "--to", "192.0.2.1:80"]).success();
    program.ctl(&["retarget", "web", "--to", &to]).success();
    program.ctl(&["add", "--name", "random", "--host", "127.0.0.1:0", "--to", &to]).success();
    program
        .ctl(&["add", "--proto", "udp", "--udp-timeout", "7s", "--host", &host, "--to", "192.0.2.1:53"])
        .success();
    let before = json_of(&program, &["list"]);
    assert_eq!(before["mappings"].as_array().unwrap().len(), 3);

    let second = upgrade(&first, 0, first.pid());
    assert_eq!(first.wait().code(), Some(0));
    assert_eq!(json_of(&program, &["list"]), before);
    client::assert_echoes(address);
    program.ctl(&["remove", "web"]).success();
    TcpStream::connect(address).expect_err("nobody listens any more");
    program.ctl(&["drain"]).success();
    wait_for_end(second);
    assert!(!program.control().exists(), "its socket is left there");
}

fn configuration() {
    let (program, backend, before, after) =
        (Program::new(), TcpBackend::echo(), client::own_address(), client::own_address());
    let file = program.path().with_extension("toml");
    let to = backend.address();
    let write = |host: SocketAddr| {
        fs::write(&file, format!("[[mapping]]\nname = \"web\"\nhost = \"{host}\"\nto = \"{to}\"\n")).unwrap();
    };
    write(before);
    let first = program.start(&["--config", file.to_str().unwrap()]);
    write(after);
    let second = upgrade(&first, 0, first.pid());
    client::assert_echoes(before);
    kill(second, Signal::SIGHUP).unwrap();
    first.wait_for_line(Stream::Stderr, |line| line.contains("configuration reloaded"));
    client::assert_echoes(after);
    TcpStream::connect(before).expect_err("nobody listens any more");
}

fn range() {
    let (program, backend, host) = (Program::new(), TcpBackend::echo(), client::own_loopback());
    let first = controlled(&program, &["--sandbox", "strict"]);
    let to = backend.address();
    // One of them is the backend's; nobody listens on the others.
    let last = to.port().max(11_999);
    let ports = format!("{}-{last}", last - 9_999);
    let mappings = json!({ "mappings": [{
        "name": "range", "host": host.to_string(), "host_ports": ports,
        "to": to.ip().to_string(), "to_ports": ports,
    }] });
    let file = program.path().with_extension("json");
    fs::write(&file, mappings.to_string()).unwrap();
    program.ctl(&["apply", file.to_str().unwrap()]).success();
    let second = upgrade(&first, 0, first.pid());
    assert_eq!(first.wait().code(), Some(0));
    let held = |pid: Pid| fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    assert!(held(second) > 10_000, "{}", held(second));
    client::assert_echoes((host, to.port()).into());
    for port in (last - 9_999..=last).filter(|port| *port != to.port()).step_by(1000) {
        assert_eq!(client::end_of((host, port).into()), (vec![], End::Reset), "it is served, if by nobody");
    }
}

fn systemd() {
    let (program, backend, systemd) = (Program::new(), TcpBackend::echo(), Systemd::new());
    let listener = std::net::TcpListener::bind((client::own_loopback(), 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let to = backend.address().to_string();
    let arguments = ["--host", "0.0.0.0:8080", "--to", &to, "--drain-timeout", "60s"];
    let mut command = systemd.command_of(
        &program.path(),
        "$$ WATCHDOG_PID=$$",
        &arguments,
        vec![("8080/tcp", OwnedFd::from(listener))],
    );
    command.env("WATCHDOG_USEC", "200000");
    let first = Process::spawn(command);
    assert_eq!(systemd.told(), ["READY=1"]);
    let old = client::connect(address);
    client::ping(&old);
    let second = upgrade(&first, 0, first.pid());
    let told = |skipped: &str| loop {
        let told = systemd.told();
        if told != [skipped] {
            return told;
        }
    };
    assert_eq!(told("WATCHDOG=1"), [format!("MAINPID={second}")]);
    assert_eq!(systemd.told(), ["READY=1"], "by the new process, which is the service now");
    for _ in 0..3 {
        assert_eq!(systemd.told(), ["WATCHDOG=1"]);
    }
    client::ping(&old);
    drop(old);
    assert_eq!(first.wait().code(), Some(0));
    client::assert_echoes(address);
    kill(second, Signal::SIGTERM).unwrap();
    assert_eq!(told("WATCHDOG=1"), ["STOPPING=1"], "the old process did not say so");
    wait_for_end(second);
}

fn systemd_unread() {
    let (program, backend, systemd, address) =
        (Program::new(), TcpBackend::echo(), Systemd::new(), client::own_address());
    let arguments = mapping("tcp", address, backend.address());
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let first = Process::spawn(systemd.command_of(&program.path(), "$$", &arguments, vec![]));
    assert_eq!(systemd.told(), ["READY=1"]);
    let count = systemd.fill();
    let second = upgrade(&first, 0, first.pid());
    // Nobody has heard of the new process yet, and would take the end of the old one for that of the service.
    first.wait_for_line(Stream::Stderr, |line| line.contains("draining"));
    client::assert_echoes(address);
    assert!(first.is_running());
    assert_eq!(systemd.empty(count), Vec::<Vec<String>>::new());
    let mut told = [systemd.told(), systemd.told()];
    told.sort();
    assert_eq!(told, [vec![format!("MAINPID={second}")], vec!["READY=1".to_owned()]]);
    assert_eq!(first.wait().code(), Some(0));
    client::assert_echoes(address);
    // It does not wait for what would be told of its own end.
    systemd.fill();
    kill(second, Signal::SIGTERM).unwrap();
    wait_for_end(second);
}

fn old_connections() {
    for (limit, lasts) in [("unlimited", true), ("0", false)] {
        let (program, backend, address) = (Program::new(), TcpBackend::echo(), client::own_address());
        let words = mapping("tcp", address, backend.address())[..6].to_vec();
        let first = start(&program, &words, &["--drain-timeout", "0", "--upgrade-drain-timeout", limit]);
        let old = client::connect(address);
        client::ping(&old);
        upgrade(&first, 0, first.pid());
        if lasts {
            first.wait_for_line(Stream::Stderr, |line| line.contains("draining"));
            client::ping(&old);
            // Its own limit.
            first.signal(Signal::SIGTERM);
        }
        assert_eq!(client::read_to_end(&old), (vec![], End::Reset));
        assert_eq!(first.wait().code(), Some(0));
        client::assert_echoes(address);
    }
}

/// A program in place of `rproxy`, which says that it is the one that was started.
fn put_script(path: &Path, status: u8) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    // By another process: see `Program`.
    let mut shell = Command::new("/bin/sh");
    let write = r#"printf '#!/bin/sh\nexit %s\n' "$1" >"$0.new" && chmod 755 "$0.new" && mv "$0.new" "$0""#;
    shell.args(["-c", write]).arg(path).arg(status.to_string());
    process::run(shell).success();
}

fn renamed() {
    let (program, backend) = (Program::new(), TcpBackend::echo());
    let path = program.path();
    let dir = path.parent().unwrap();
    let (link, newer, earlier) = (dir.join("current"), dir.join("v2/rproxy"), dir.join("earlier/rproxy"));
    symlink(".", &link).unwrap();
    put_script(&newer, 5);
    let arguments = |address| mapping("tcp", address, backend.address());
    let spawn = |mut command: Command, address| {
        let process = Process::spawn({
            command.args(arguments(address));
            command
        });
        process.wait_for_line(Stream::Stderr, |line| line.contains("confined"));
        process
    };
    // By a link that leads elsewhere later.
    let by_link = spawn(Command::new(link.join("rproxy")), client::own_address());
    // By a name that a shell looks up, which finds another file first later.
    let mut by_name = Command::new("/bin/sh");
    let directories = format!("{}:{}:/bin", dir.join("earlier").display(), dir.display());
    by_name.args(["-c", "exec rproxy \"$@\"", "sh"]).env("PATH", directories);
    let by_name = spawn(by_name, client::own_address());
    // By a name that is none of its file.
    let mut misnamed = Command::new(&path);
    misnamed.arg0("true");
    let misnamed = spawn(misnamed, client::own_address());

    fs::remove_file(&link).unwrap();
    symlink("v2", &link).unwrap();
    put_script(&earlier, 6);
    program.replace("exit 7");
    for (process, status) in [(&by_link, 5), (&by_name, 6), (&misnamed, 7)] {
        process.signal(Signal::SIGUSR2);
        let line = failure(process, 0);
        assert!(line.contains(&format!("exit status: {status}")), "{line}");
    }
    // Without what the name meant, it is the file that was there.
    fs::remove_file(&link).unwrap();
    by_link.signal(Signal::SIGUSR2);
    assert!(failure(&by_link, 1).contains("exit status: 7"));
}

fn no_child_signals() {
    let (program, backend, address) = (Program::new(), TcpBackend::echo(), client::own_address());
    let mut command = Command::new("/bin/sh");
    command.args(["-c", r#"trap "" CHLD; exec "$0" "$@""#]).arg(program.path());
    command.args(mapping("tcp", address, backend.address()));
    let first = Process::spawn(command);
    first.wait_for_line(Stream::Stderr, |line| line.contains("confined"));
    program.replace("exit 3");
    first.signal(Signal::SIGUSR2);
    let line = failure(&first, 0);
    assert!(line.contains("the new process ended (exit status: 3)"), "{line}");
    program.repair();
    upgrade(&first, 0, first.pid());
    client::assert_echoes(address);
}

fn uid_of(pid: Pid) -> u32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let uid = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap();
    uid.split_whitespace().next().unwrap().parse().unwrap()
}

fn other_user() {
    let program = Program::new();
    let (backend, host) = (TcpBackend::echo(), SocketAddr::from((client::own_loopback(), 80)));
    let (host_text, to) = (host.to_string(), backend.address().to_string());
    let first = controlled(
        &program,
        &["--user", "64123:64124", "--sandbox", "strict", "--host", &host_text, "--to", &to],
    );
    let mut server = first.pid();
    under_load(host, || {
        for earlier in 0..2 {
            assert_eq!(uid_of(launcher(server)), 0, "it keeps what a new process needs");
            server = upgrade(&first, earlier, server);
            assert_eq!(uid_of(server), 64_123);
        }
    });
    // A port below 1024 that comes later.
    let host = SocketAddr::from((client::own_loopback(), 80)).to_string();
    program.ctl(&["add", "--host", &host, "--to", &to]).success();
}

/// What the server says about an attempt, after `earlier` failed ones.
#[track_caller]
fn failure(first: &Process, earlier: usize) -> String {
    first.wait_for_lines(Stream::Stderr, earlier + 1, |line| line.contains("not upgraded")).pop().unwrap()
}

fn broken() {
    let (program, backend, address) = (Program::new(), TcpBackend::echo(), client::own_address());
    let first = start(&program, &mapping("tcp", address, backend.address()), &[]);
    let attempts: [(&dyn Fn(), &str); 4] = [
        (&|| fs::remove_file(program.path()).unwrap(), "No such file"),
        (&|| program.replace("echo going >&2; exit 3"), "the new process ended (exit status: 3)"),
        (&|| program.replace("kill -SEGV $$"), "the new process ended (signal: 11"),
        (&|| fs::set_permissions(program.path(), PermissionsExt::from_mode(0o644)).unwrap(), "denied"),
    ];
    under_load(address, || {
        for (number, (break_it, part)) in attempts.iter().enumerate() {
            break_it();
            first.signal(Signal::SIGUSR2);
            let line = failure(&first, number);
            assert!(line.contains(part) && line.contains("this process continues to serve"), "{line}");
        }
        program.repair();
        upgrade(&first, 0, first.pid());
        assert_eq!(first.wait().code(), Some(0));
    });
}

fn hanging() {
    let (program, backend, address) = (Program::new(), TcpBackend::echo(), client::own_address());
    let first = start(&program, &mapping("tcp", address, backend.address()), &[]);
    program.replace("echo hanging >&2; exec sleep 600");
    under_load(address, || {
        first.signal(Signal::SIGUSR2);
        first.wait_for_line(Stream::Stderr, |line| line == "hanging");
        first.signal(Signal::SIGUSR2);
        first.wait_for_line(Stream::Stderr, |line| line.contains("an upgrade is under way"));
        let line = failure(&first, 0);
        assert!(line.contains("did not prepare itself within 10 seconds"), "{line}");
        assert_eq!(children(launcher(first.pid())), [], "it still hangs");
        program.repair();
        upgrade(&first, 0, first.pid());
    });
}

fn failing_late() {
    let naming = udp::Backend::naming(udp::local());
    let (program, address) = (Program::new(), client::own_address());
    let first = start(&program, &mapping("udp", address, naming.address()), &[]);
    let (client, late) = (udp::client(address.ip()), udp::client(address.ip()));
    let port = udp::flow_of(&client, address);
    // Says what it has to, so that flows are given to it, which it does not serve then.
    let prepared = r#"eval "printf '\000\000\000\012\"Prepared\"' >&${RPROXY_TAKE_OVER#*:}""#;
    for (earlier, (then, part)) in
        [("exec sleep 600", "did not serve within 2 seconds"), ("exit 4", "exit status: 4")]
            .iter()
            .enumerate()
    {
        program.replace(&format!("{prepared}; echo prepared >&2; {then}"));
        first.signal(Signal::SIGUSR2);
        first.wait_for_lines(Stream::Stderr, earlier + 1, |line| line == "prepared");
        // It waits, or is answered before the pause.
        client.send_to(b"who am I?", address).unwrap();
        let line = failure(&first, earlier);
        assert!(line.contains(part), "{line}");
        let (answer, _from) = udp::receive(&client);
        assert_eq!(answer, port.to_string().as_bytes());
        udp::flow_of(&late, address);
    }
    program.repair();
    upgrade(&first, 0, first.pid());
    assert_eq!(udp::flow_of(&client, address), port);
}

fn stopped() {
    let program = Program::new();
    let first = controlled(&program, &[]);
    program.replace("echo $$ hangs >&2; exec sleep 600");
    first.signal(Signal::SIGUSR2);
    let line = first.wait_for_line(Stream::Stderr, |line| line.ends_with(" hangs"));
    let hanging: i32 = line.split_once(' ').unwrap().0.parse().unwrap();
    first.signal(Signal::SIGTERM);
    assert_eq!(first.wait().code(), Some(0));
    assert!(!program.control().exists(), "its socket is left there");
    wait_for_end(Pid::from_raw(hanging));
}

fn launcher_signals() {
    let (program, backend, address) = (Program::new(), TcpBackend::echo(), client::own_address());
    let first = start(&program, &mapping("tcp", address, backend.address()), &[]);
    let launcher_pid = launcher(first.pid());
    let name = || fs::read_to_string(format!("/proc/{launcher_pid}/comm")).unwrap();
    eventually("the launcher has its name", || name().trim() == "rproxy-launcher");
    // What a terminal or a service manager sends to all processes.
    for signal in [Signal::SIGINT, Signal::SIGHUP, Signal::SIGTERM, Signal::SIGUSR2, Signal::SIGTSTP] {
        kill(launcher_pid, signal).unwrap();
    }
    let second = upgrade(&first, 0, first.pid());
    assert_eq!(first.wait().code(), Some(0));
    wait_for_end(launcher_pid);
    let launcher_pid = launcher(second);
    // The new process takes them as any other.
    kill(second, Signal::SIGKILL).unwrap();
    wait_for_end(second);
    wait_for_end(launcher_pid);
}

fn launcher_killed() {
    let (program, backend, address) = (Program::new(), TcpBackend::echo(), client::own_address());
    let first = start(&program, &mapping("tcp", address, backend.address()), &[]);
    kill(launcher(first.pid()), Signal::SIGKILL).unwrap();
    for earlier in 0..2 {
        first.signal(Signal::SIGUSR2);
        let line = failure(&first, earlier);
        assert!(line.contains("the launcher is not running"), "{line}");
    }
    client::assert_echoes(address);
    first.signal(Signal::SIGTERM);
    assert_eq!(first.wait().code(), Some(0));
}

fn first_process() {
    let (program, backend, address) = (Program::new(), TcpBackend::echo(), client::own_address());
    let mut unshare = require::command("unshare");
    unshare.args(["--pid", "--fork", "--mount-proc", "--kill-child"]).arg(program.path());
    unshare.args(mapping("tcp", address, backend.address()));
    let outer = Process::spawn(unshare);
    outer.wait_for_line(Stream::Stderr, |line| line.contains("confined"));
    kill(launcher(outer.pid()), Signal::SIGUSR2).unwrap();
    let line = failure(&outer, 0);
    assert!(line.contains("first process of a container"), "{line}");
    client::assert_echoes(address);
}

/// A value as it is sent.
fn frame(text: &str) -> Vec<u8> {
    let length = u32::try_from(text.len()).unwrap();
    [&length.to_be_bytes()[..], text.as_bytes()].concat()
}

/// Starts a process that is to take over from this one, which says `bytes`. Returns what it came to.
fn offered(parent: Pid, bytes: &[u8]) -> process::Output {
    let (mut own, its) = UnixStream::pair().unwrap();
    let mut command = testkit::rproxy::command(&["--host", "127.0.0.1:0", "--to", "192.0.2.1:80"]);
    command.env("RPROXY_TAKE_OVER", format!("{parent}:7"));
    command.fd_mappings(vec![FdMapping { parent_fd: its.into(), child_fd: 7 }]).unwrap();
    let process = Process::spawn(command);
    own.write_all(bytes).unwrap();
    drop(own);
    process.into_output()
}

fn false_offers() {
    let hello = frame(r#"{"version":3}"#);
    let offer = |text: &str| [hello.clone(), frame(text)].concat();
    let own = r#"{"mapping":{"host":"127.0.0.1","to":"192.0.2.1","to_ports":"80"}}"#;
    let attached =
        r#"{"mapping":{"host":"127.0.0.1","host_ports":"9","to":"192.0.2.1","to_ports":"80"},"process":7}"#;
    for (bytes, part) in [
        (vec![], "unexpected end of file"),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "cannot talk to the old process: file too large"),
        (frame(r#"{"version":1}"#), "it uses version 1 of the handover, and this program version 3"),
        (offer(r#"{"control":false,"mappings":[],"more":1}"#), "unknown field `more`"),
        (offer(r#"{"control":false,"mappings":[]}"#), "does not serve all mappings of the command line"),
        (offer(r#"{"control":true,"mappings":[]}"#), "does not serve all mappings of the command line"),
        (offer(&format!(r#"{{"control":true,"mappings":[{own}]}}"#)), "has a control socket"),
        (
            offer(
                r#"{"control":false,"mappings":[{"mapping":{"host":"127.0.0.1","to":"192.0.2.1","to_ports":"81"}}]}"#,
            ),
            "is not on the command line",
        ),
        (
            offer(r#"{"control":false,"mappings":[{"mapping":{"to":"192.0.2.1","to_ports":"0"}}]}"#),
            "'0' is not a port",
        ),
        (
            [offer(&format!(r#"{{"control":false,"mappings":[{own},{attached}]}}"#)), b"d".to_vec()].concat(),
            "not the descriptors announced",
        ),
        (
            [offer(&format!(r#"{{"control":false,"mappings":[{own}]}}"#)), b"d".to_vec()].concat(),
            "not the descriptors announced",
        ),
    ] {
        let output = offered(Pid::this(), &bytes);
        assert_eq!((output.status.code(), output.stdout.as_str()), (Some(1), ""), "{output:#?}");
        assert!(output.stderr.lines().last().unwrap().contains(part), "no {part:?}: {output:#?}");
    }
}

fn docker_mode() {
    let (backend, address) = (TcpBackend::echo(), client::own_address());
    let arguments = docker_proxy::mapping("tcp", address, backend.address());
    let mut proxy = DockerProxy::start(rproxy(), &arguments, None);
    assert_eq!(proxy.status(), Status::Ready);
    assert_eq!(children(proxy.process.pid()), []);
}
