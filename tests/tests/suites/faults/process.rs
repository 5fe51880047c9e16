//! Faults of the process itself, and of its log.

use std::fs::File;
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::thread;

use command_fds::{CommandFdExt, FdMapping};
use nix::fcntl::{FcntlArg, fcntl};
use nix::pty::{OpenptyResult, openpty};
use nix::sys::signal::Signal;
use serde_json::json;

use testkit::backend::TcpBackend;
use testkit::client::{self, End};
use testkit::controlled::Controlled;
use testkit::process;
use testkit::require::{self, Need};
use testkit::rproxy::Standalone;
use testkit::suite::Case;
use testkit::topology::Topology;

use super::case;
use super::scene::Scene;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("SIGSTOP and SIGCONT", stopped),
        case("SIGKILL resets both sides and frees the port", killed),
        case("what a drain cuts is reset", cut),
        case("a clock that starts elsewhere", other_clock).needs(&[Need::Program("unshare")]),
        case("nobody reads the log", log_unread),
        case("a stopped terminal gets the log", terminal_held),
        case("the log's disk is full", log_full),
        case("there is no standard error", log_closed),
    ]
}

fn stopped() {
    let scene = Scene::new(json!({}));
    let _backend = scene.echo();
    scene.under_load(|| {
        let client = scene.connect();
        for seed in 0..5 {
            scene.proxy.process.pause();
            (&client).write_all(b"while it does nothing").unwrap();
            scene.proxy.process.resume();
            let mut answer = [0; 21];
            io::Read::read_exact(&mut &client, &mut answer).unwrap();
            assert_eq!(&answer, b"while it does nothing");
            client::exchange(&client, seed, 100_000);
        }
    });
    scene.assert_nothing_left();
    assert_eq!(scene.stats()["errors"], json!({}));
}

/// Connections through a proxy, each with what it leads to.
fn pairs(arguments: &[&str], count: usize) -> (SocketAddr, Vec<(TcpStream, TcpStream)>, Standalone) {
    let backend = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let front: SocketAddr = (client::own_loopback(), 8080).into();
    let (host, to) = (front.to_string(), backend.local_addr().unwrap().to_string());
    let proxy = Standalone::start(&[&["--host", &host, "--to", &to], arguments].concat());
    let connect = || {
        let client = client::connect(front);
        (&client).write_all(b"hello").unwrap();
        let server = client::patient(backend.accept().unwrap().0);
        io::Read::read_exact(&mut &server, &mut [0; 5]).unwrap();
        (&server).write_all(b"hello").unwrap();
        io::Read::read_exact(&mut &client, &mut [0; 5]).unwrap();
        (client, server)
    };
    (front, (0..count).map(|_| connect()).collect(), proxy)
}

/// Some have something on its way, some have not: all are told that they were cut.
#[track_caller]
fn assert_all_reset(pairs: &[(TcpStream, TcpStream)]) {
    for (client, server) in pairs {
        assert_eq!(client::read_to_end(client), (vec![], End::Reset), "the client");
        assert_eq!(client::read_to_end(server), (vec![], End::Reset), "the server");
    }
}

fn killed() {
    let (front, pairs, proxy) = pairs(&[], 8);
    proxy.process.signal(Signal::SIGKILL);
    proxy.process.wait();
    assert_all_reset(&pairs);
    let backend = TcpBackend::echo();
    let again = ["--host", &front.to_string(), "--to", &backend.address().to_string()];
    let _proxy = Standalone::start(&again);
    client::assert_echoes(front);
}

fn cut() {
    for (arguments, signals) in [
        (["--drain-timeout", "100ms"], &[Signal::SIGTERM][..]),
        (["--drain-timeout", "0"], &[Signal::SIGINT]),
        (["--drain-timeout", "1h"], &[Signal::SIGTERM, Signal::SIGTERM]),
    ] {
        let (_front, pairs, proxy) = pairs(&arguments, 4);
        for signal in signals {
            proxy.process.signal(*signal);
        }
        // Signals that come before the first one is noticed are one: until it has ended.
        while proxy.process.is_running() && signals.len() > 1 {
            proxy.process.signal(signals[1]);
            thread::yield_now();
        }
        assert_eq!(proxy.process.wait().code(), Some(0));
        assert_all_reset(&pairs);
    }
}

/// Deadlines go by the time since boot, which alone a namespace can have another of. The time of day, which
/// can be set, is in the log only (clippy.toml).
fn other_clock() {
    let scene = Scene::with(json!({ "idle_timeout": "300ms" }), &[], |command| {
        let mut unshare = require::command("unshare");
        unshare.args(["--time", "--monotonic=3000000000", "--boottime=3000000000", "--fork", "--kill-child"]);
        process::prefixed(unshare, &command)
    });
    let _backend = scene.echo();
    let client = scene.connect();
    client::exchange(&client, 1, 1000);
    assert_eq!(client::read_to_end(&client), (vec![], End::Reset));
    scene.assert_serves();
    assert_eq!(scene.stats()["errors"], json!({ "idle": 1 }));
}

/// `rproxy` with something else as standard error, as a shell writes it.
fn with_stderr(redirection: &str) -> impl FnOnce(Command) -> Command {
    let script = format!("exec \"$0\" \"$@\" {redirection}");
    move |command| process::in_shell(&script, &command)
}

/// What `rproxy` has to log does not matter to those who are served.
fn serve_while_logging(scene: &Scene) {
    scene.under_load(|| {
        // Each is told of at this level, and nobody listens there.
        for _ in 0..300 {
            assert_eq!(scene.end(), (vec![], End::Reset));
        }
        let backend = scene.echo();
        scene.assert_serves();
        drop(backend);
    });
    scene.assert_nothing_left();
}

const VERBOSE: [&str; 2] = ["--log-level", "trace"];

fn log_unread() {
    let (reader, writer) = io::pipe().unwrap();
    // As small as it can be: a page.
    fcntl(&writer, FcntlArg::F_SETPIPE_SZ(1)).unwrap();
    log_to(reader.into(), writer.into());
}

fn terminal_held() {
    let OpenptyResult { master, slave } = openpty(None, None).unwrap();
    log_to(master, slave);
}

/// Serves while nobody reads what it logs to `writer`. Once `reader` is read again, it says what is missing.
fn log_to(reader: OwnedFd, writer: OwnedFd) {
    let topology = Topology::new();
    let proxy = Controlled::start_by(&VERBOSE, |command| {
        let mut command = with_stderr("2>&9")(command);
        command.fd_mappings(vec![FdMapping { parent_fd: writer, child_fd: 9 }]).unwrap();
        topology.host.spawn(command)
    });
    let scene = Scene::around(topology, proxy, json!({}));
    serve_while_logging(&scene);
    let mut reader = io::BufReader::new(File::from(reader));
    thread::scope(|scope| {
        let found = scope.spawn(|| {
            io::BufRead::lines(&mut reader).any(|line| line.unwrap().contains("log lines were lost"))
        });
        while !found.is_finished() {
            assert_eq!(scene.end(), (vec![], End::Reset));
        }
        assert!(found.join().unwrap());
    });
}

fn log_full() {
    serve_while_logging(&Scene::with(json!({}), &VERBOSE, with_stderr("2>/dev/full")));
}

fn log_closed() {
    serve_while_logging(&Scene::with(json!({}), &VERBOSE, with_stderr("2>&-")));
}
