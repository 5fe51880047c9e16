//! The environment of the process: threads that cannot be started, readers that do not read, signals and descriptors
//! meant for others, an empty root directory.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use command_fds::{CommandFdExt, FdMapping};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{OpenptyResult, openpty};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use testkit::backend::TcpBackend;
use testkit::client;
use testkit::docker_proxy::{self, DockerProxy, Status};
use testkit::eventually;
use testkit::process::{self, Process, Stream};
use testkit::require::{self, Need};
use testkit::rproxy::{self, Standalone, rproxy};
use testkit::suite::Case;
use testkit::systemd::Systemd;

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body).needs(&[Need::Root]);
    let threads = &[Need::Program("prlimit"), Need::Program("setpriv")];
    vec![
        case("no thread can be started", no_threads).needs(threads),
        case("no thread can be started, and mappings change", no_threads_to_manage).needs(threads),
        case("a proxy of dockerd can start no thread", no_threads_for_docker).needs(threads),
        case("standard output is read late", output_unread),
        case("a stopped terminal gets standard output", output_held),
        case("nobody reads standard output", output_never_read),
        case("the log is as long as a file may be", log_too_long).needs(&[Need::Program("prlimit")]),
        case("ignored signals", signals),
        case("descriptors that were not passed on purpose", descriptors),
        case("descriptors that dockerd did not pass", descriptors_of_docker),
        case("a root directory with nothing in it", empty_root).needs(&[Need::Program("chroot")]),
        case("the launcher in lists of processes", launcher_in_lists),
    ]
}

/// Waits for a proxy that has no other way to tell.
#[track_caller]
fn wait_until_served(address: SocketAddr) {
    eventually("somebody listens", || TcpStream::connect(address).is_ok());
    client::assert_echoes(address);
}

/// The words that run a program as a user that nobody else is, who may have so many tasks in all.
fn limited(tasks: usize) -> Vec<String> {
    static USERS: AtomicU32 = AtomicU32::new(0);
    // Other cases that run at the same time have other ids.
    let user = (1 << 20) + std::process::id() * 16 + USERS.fetch_add(1, Ordering::Relaxed);
    let words = [&format!("--nproc={tasks}:{tasks}"), "setpriv", "--clear-groups"].map(String::from);
    [&words[..], &[format!("--reuid={user}"), format!("--regid={user}")]].concat()
}

fn limit(command: &Command, tasks: usize) -> Command {
    let mut prlimit = require::command("prlimit");
    prlimit.args(limited(tasks));
    process::prefixed(prlimit, command)
}

/// Several clients at a time, each of whom would get a worker of its own.
#[track_caller]
fn assert_serves_many(address: SocketAddr) {
    let clients: Vec<_> = (0..8).map(|_| client::connect(address)).collect();
    clients.iter().for_each(|client| client::exchange(client, 1, 10_000));
}

#[track_caller]
fn assert_told_once(process: &Process, part: &str) {
    let log = process.captured(Stream::Stderr);
    assert_eq!(log.matches(part).count(), 1, "{part}: {log}");
    assert!(!log.contains("panicked"), "{log}");
}

fn no_threads() {
    let backend = TcpBackend::echo();
    let to = backend.address().to_string();
    // With room for the launcher, and without.
    for tasks in [2, 1] {
        let address = client::own_address();
        let arguments = ["--host", &address.to_string(), "--to", &to];
        let proxy = Process::spawn(limit(&rproxy::command(&arguments), tasks));
        let proxy = Standalone::ready(proxy, &arguments).process;
        assert_serves_many(address);
        assert_told_once(&proxy, "cannot start another worker");
        if tasks == 1 {
            proxy.signal(Signal::SIGUSR2);
            proxy.wait_for_line(Stream::Stderr, |line| line.contains("not upgraded"));
            assert_serves_many(address);
        }
        proxy.signal(Signal::SIGTERM);
        assert_eq!(proxy.wait().code(), Some(0));
    }
}

fn no_threads_to_manage() {
    let (dir, backend, address) = (open_dir(), TcpBackend::echo(), client::own_address());
    let (control, file) = (dir.path().join("control"), dir.path().join("rproxy.toml"));
    let to = backend.address();
    let write = |proto: &str| {
        let text = format!("[[mapping]]\nhost = \"{address}\"\nto = \"{to}\"\nproto = \"{proto}\"\n");
        fs::write(&file, text).unwrap();
    };
    write("tcp");
    let arguments = ["--config", file.to_str().unwrap(), "--control", control.to_str().unwrap()];
    let proxy = Process::spawn(limit(&rproxy::command(&arguments), 2));
    proxy.wait_for_line(Stream::Stderr, |line| line.contains("cannot start the control thread"));
    assert_serves_many(address);
    // Stale flows of a UDP port are looked for aside, if that can be.
    write("tcp+udp");
    proxy.signal(Signal::SIGHUP);
    proxy.wait_for_line(Stream::Stderr, |line| line.contains("configuration reloaded"));
    let ctl = ["ctl", "--control", control.to_str().unwrap(), "list"];
    assert!(process::run(rproxy::command(&ctl)).success().contains("tcp+udp"));
    assert_serves_many(address);
    assert_told_once(&proxy, "cannot start another worker");
    proxy.signal(Signal::SIGTERM);
    assert_eq!(proxy.wait().code(), Some(0));
}

fn no_threads_for_docker() {
    let (backend, address) = (TcpBackend::echo(), client::own_address());
    let flags = docker_proxy::mapping("tcp", address, backend.address());
    let words = [limited(1), vec![rproxy().display().to_string()], flags].concat();
    let prlimit = require::command("prlimit");
    let prlimit = Path::new(prlimit.get_program());
    let mut proxy = DockerProxy::start_by(prlimit, &words, None, OFlag::empty(), Process::spawn);
    assert_eq!(proxy.status(), Status::Ready);
    assert_serves_many(address);
    assert_told_once(&proxy.process, "cannot start another worker");
    assert_eq!(proxy.stop().code(), Some(0));
}

/// A directory that another user may write to.
fn open_dir() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    dir
}

/// The command, as a shell runs it with descriptors beside the standard ones.
fn with_shell(command: &Command, redirection: &str, descriptors: Vec<(OwnedFd, i32)>) -> Command {
    let mut shell = process::in_shell(&format!("exec \"$0\" \"$@\" {redirection}"), command);
    let mapping = |(parent_fd, child_fd)| FdMapping { parent_fd, child_fd };
    shell.fd_mappings(descriptors.into_iter().map(mapping).collect()).unwrap();
    shell
}

fn output_unread() {
    let (reader, writer) = io::pipe().unwrap();
    // As small as it can be: a page.
    fcntl(&writer, FcntlArg::F_SETPIPE_SZ(1)).unwrap();
    output_to(reader.into(), writer.into());
}

fn output_held() {
    let OpenptyResult { master, slave } = openpty(None, None).unwrap();
    output_to(master, slave);
}

/// Serves while nobody reads standard output. All lines are there once somebody does.
fn output_to(reader: OwnedFd, writer: OwnedFd) {
    const PORTS: u16 = 1000;

    let (backend, host) = (TcpBackend::echo(), client::own_loopback());
    let pair = |port: u16| {
        let host = SocketAddr::from((host, port)).to_string();
        ["--host".to_owned(), host, "--to".to_owned(), backend.address().to_string()]
    };
    let arguments: Vec<String> = (8000..8000 + PORTS).flat_map(pair).collect();
    let mut command = Command::new(rproxy());
    command.args(arguments);
    let proxy = Process::spawn(with_shell(&command, ">&9", vec![(writer, 9)]));
    let last = SocketAddr::from((host, 7999 + PORTS));
    wait_until_served(last);
    let mut lines = BufReader::new(File::from(reader)).lines().map(Result::unwrap);
    let text = format!("-> {last}");
    let read = lines.position(|line| line.contains(&text)).unwrap() + 1;
    assert_eq!(read, usize::from(PORTS));
    proxy.signal(Signal::SIGTERM);
    assert_eq!(proxy.wait().code(), Some(0));
}

fn output_never_read() {
    let (_reader, writer) = io::pipe().unwrap();
    fcntl(&writer, FcntlArg::F_SETPIPE_SZ(1)).unwrap();
    assert_eq!(nix::unistd::write(&writer, &[b'x'; 4096]).unwrap(), 4096);
    let (backend, address) = (TcpBackend::echo(), client::own_address());
    let command = rproxy::command(&["--host", &address.to_string(), "--to", &backend.address().to_string()]);
    let proxy = Process::spawn(with_shell(&command, ">&9", vec![(writer.into(), 9)]));
    wait_until_served(address);
    proxy.signal(Signal::SIGTERM);
    assert_eq!(proxy.wait().code(), Some(0));
}

fn log_too_long() {
    let (dir, backend, address) = (open_dir(), TcpBackend::echo(), client::own_address());
    let (log, to) = (dir.path().join("log"), backend.address().to_string());
    let command = rproxy::command(&["--host", &address.to_string(), "--to", &to, "--log-level", "trace"]);
    let command = with_shell(&command, &format!("2>{}", log.display()), vec![]);
    let mut limited = require::command("prlimit");
    limited.arg("--fsize=4096:4096");
    let proxy = Process::spawn(process::prefixed(limited, &command));
    proxy.wait_for_line(Stream::Stdout, |line| line.contains(" -> "));
    eventually("the log is as long as it may be", || {
        client::assert_echoes(address);
        fs::metadata(&log).unwrap().len() == 4096
    });
    client::assert_echoes(address);
    proxy.signal(Signal::SIGTERM);
    assert_eq!(proxy.wait().code(), Some(0));
}

fn signals() {
    let (backend, address) = (TcpBackend::echo(), client::own_address());
    let proxy =
        Standalone::start(&["--host", &address.to_string(), "--to", &backend.address().to_string()]).process;
    for signal in [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGALRM] {
        proxy.signal(signal);
        proxy.wait_for_line(Stream::Stderr, |line| line.contains(&format!("{signal} is ignored")));
    }
    proxy.signal(Signal::SIGPIPE);
    let client = client::connect(address);
    client::exchange(&client, 1, 1000);
    // As SIGTERM, it lets connections come to their end.
    proxy.signal(Signal::SIGQUIT);
    proxy.wait_for_line(Stream::Stderr, |line| line.contains("draining"));
    proxy.signal(Signal::SIGUSR2);
    proxy.wait_for_line(Stream::Stderr, |line| line.contains("SIGUSR2 is ignored: this process is draining"));
    client::exchange(&client, 2, 1000);
    drop(client);
    assert_eq!(proxy.wait().code(), Some(0));

    let (dir, address) = (open_dir(), client::own_address());
    let (file, to) = (dir.path().join("rproxy.toml"), backend.address());
    fs::write(&file, format!("[[mapping]]\nhost = \"{address}\"\nto = \"{to}\"\n")).unwrap();
    let proxy = Process::spawn(rproxy::command(&["--config", file.to_str().unwrap()]));
    proxy.wait_for_line(Stream::Stdout, |line| line.contains(" -> "));
    let client = client::connect(address);
    client::exchange(&client, 1, 1000);
    proxy.signal(Signal::SIGTERM);
    proxy.wait_for_line(Stream::Stderr, |line| line.contains("draining"));
    for signal in [Signal::SIGHUP, Signal::SIGUSR2, Signal::SIGHUP] {
        proxy.signal(signal);
        let ignored = format!("{signal} is ignored: this process is draining");
        proxy.wait_for_line(Stream::Stderr, |line| line.contains(&ignored));
    }
    client::exchange(&client, 2, 1000);
    drop(client);
    assert_eq!(proxy.wait().code(), Some(0));

    let mut proxy =
        DockerProxy::start(rproxy(), &docker_proxy::mapping("tcp", address, backend.address()), None);
    assert_eq!(proxy.status(), Status::Ready);
    for signal in [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGALRM] {
        proxy.process.signal(signal);
        proxy.process.wait_for_line(Stream::Stderr, |line| line.contains(&format!("{signal} is ignored")));
    }
    client::assert_echoes(address);
    assert_eq!(proxy.stop().code(), Some(0));
}

/// Waits until nobody has the other end of a pipe.
#[track_caller]
fn assert_ends(reader: &io::PipeReader) {
    eventually("nobody has the other end of the pipe", || {
        // Nothing is ever written to it.
        poll(&mut [PollFd::new(reader.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO).unwrap() == 1
    });
}

fn descriptors() {
    let backend = TcpBackend::echo();
    let to = backend.address().to_string();
    let (one, passed) = io::pipe().unwrap();
    let (other, passed_too) = io::pipe().unwrap();
    let passed = vec![(OwnedFd::from(passed), 5), (passed_too.into(), 100)];
    let command = rproxy::command(&["--host", "127.0.0.1:0", "--to", &to]);
    let proxy = Process::spawn(with_shell(&command, "", passed));
    // The launcher has them no more either.
    assert_ends(&one);
    assert_ends(&other);
    drop(proxy);

    // A socket that was passed stays, and another one beside it does not.
    let systemd = Systemd::new();
    let listener = TcpListener::bind(client::own_address()).unwrap();
    let address = listener.local_addr().unwrap();
    let arguments = ["--host", &address.to_string(), "--to", &to];
    let (reader, passed) = io::pipe().unwrap();
    let sockets = vec![("web", OwnedFd::from(listener)), ("other", passed.into())];
    let mut command = systemd.command_with_sockets(&arguments, sockets);
    command.env("LISTEN_FDS", "1").env("LISTEN_FDNAMES", "web");
    let _proxy = Process::spawn(command);
    assert_eq!(systemd.told(), ["READY=1"]);
    assert_ends(&reader);
    client::assert_echoes(address);
}

fn descriptors_of_docker() {
    let (backend, address, dir) = (TcpBackend::echo(), client::own_address(), open_dir());
    let flags = docker_proxy::mapping("tcp", address, backend.address());
    let mut command = Command::new(rproxy());
    command.args(flags);
    let (reader, passed) = io::pipe().unwrap();
    // A lock, as scripts hold it, and what would be the listener if the flags said so.
    let file = dir.path().join("lock");
    let lock = File::create(&file).unwrap();
    let passed = vec![(OwnedFd::from(lock), 3), (passed.into(), 4)];
    let proxy = Process::spawn(with_shell(&command, "", passed));
    assert_ends(&reader);
    wait_until_served(address);
    assert_eq!(fs::read(&file).unwrap(), b"", "it is no status pipe");
    drop(proxy);
}

fn empty_root() {
    let (dir, backend, address) = (open_dir(), TcpBackend::echo(), client::own_address());
    // A static program needs nothing else.
    fs::copy(rproxy(), dir.path().join("rproxy")).unwrap();
    let mut chroot = require::command("chroot");
    chroot.arg(dir.path()).args(["/rproxy", "--host", &address.to_string()]);
    chroot.args(["--to", &backend.address().to_string()]);
    for streams in ["", "<&- >&- 2>&-", "<&-"] {
        let proxy = Process::spawn(with_shell(&chroot, streams, vec![]));
        wait_until_served(address);
        proxy.signal(Signal::SIGTERM);
        assert_eq!(proxy.wait().code(), Some(0), "{streams}");
    }
}

fn launcher_in_lists() {
    let proxy = Standalone::start(&["--host", "127.0.0.1:0", "--to", "192.0.2.1:80"]).process;
    let launcher = testkit::upgradable::launcher(proxy.pid());
    eventually("the launcher says what it is", || {
        fs::read(format!("/proc/{launcher}/cmdline")).unwrap() == b"rproxy: launcher\0"
    });
    let own = fs::read_to_string(format!("/proc/{}/cmdline", proxy.pid())).unwrap();
    assert!(own.ends_with("\x00192.0.2.1:80\0"), "{own:?}");
}
