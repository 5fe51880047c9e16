//! Where and while metrics are served.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::backend::TcpBackend;
use testkit::client;
use testkit::eventually;
use testkit::holdings::Holdings;
use testkit::process::{self, Process, Stream};
use testkit::rproxy::{self, Standalone};
use testkit::upgradable::{Program, wait_for_end};

use super::http::{address, get, get_on, get_unix};
use super::scrape::Scrape;

pub(super) fn draining() {
    let backend = TcpBackend::echo();
    let proxy =
        Standalone::relay_to(backend.address(), &["--metrics", "127.0.0.1:0", "--drain-timeout", "1h"]);
    let metrics = address(&proxy.process);
    assert_eq!(get(metrics, "/readyz").code(), "200");
    let connection = client::connect(proxy.address());
    client::ping(&connection);
    let series = || {
        let scrape = Scrape::of(metrics);
        let found =
            scrape.series().find(|(series, _)| series.starts_with("rproxy_mapping_connections_active"));
        (found.map(|(_, value)| value), scrape.value("rproxy_draining"))
    };
    assert_eq!(series(), (Some(1.0), 0.0));
    proxy.process.signal(Signal::SIGTERM);
    eventually("it is not ready", || get(metrics, "/readyz").code() == "503");
    assert!(get(metrics, "/readyz").body.contains("draining"));
    assert_eq!(get(metrics, "/healthz").code(), "200", "its connections are served");
    client::ping(&connection);
    assert_eq!(series(), (Some(1.0), 1.0));
    drop(connection);
    assert!(proxy.process.wait().success());
}

pub(super) fn unix_socket() {
    let (backend, dir) = (TcpBackend::echo(), tempfile::tempdir().unwrap());
    let path = dir.path().join("metrics");
    let option = format!("unix:{}", path.display());
    let start = || Standalone::relay_to(backend.address(), &["--metrics", &option]);
    // One that nobody listens on is replaced.
    drop(UnixListener::bind(&path).unwrap());
    let proxy = start();
    proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("serving metrics"));
    assert_eq!(get_unix(&path, "/metrics").unwrap().code(), "200");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let refused = |expected: &str| {
        let backend = backend.address().to_string();
        let arguments = ["--host", "127.0.0.1:0", "--to", &backend, "--metrics", &option];
        let output = process::run(rproxy::command(&arguments));
        assert_eq!(output.status.code(), Some(1));
        let start = format!("rproxy: --metrics {option}: {expected}");
        assert!(output.stderr.contains(&start), "{output:#?}");
    };
    refused("somebody listens there already");
    proxy.process.signal(Signal::SIGTERM);
    assert!(proxy.process.wait().success());
    assert!(!path.exists(), "it is removed at the end");
    fs::write(&path, "precious").unwrap();
    refused("there is a file which is not a socket");
    assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
}

pub(super) fn bad_addresses() {
    let backend = client::own_address().to_string();
    let run = |metrics: &str| {
        let arguments = ["--host", "127.0.0.1:0", "--to", &backend, "--metrics", metrics];
        process::run(rproxy::command(&arguments))
    };
    for (metrics, part) in [
        ("9464", "--metrics 9464: the address is missing; write 127.0.0.1:9464"),
        ("127.0.0.1", "--metrics 127.0.0.1: the port is missing"),
        ("localhost:9464", "'localhost' is not an IP address"),
        ("unix:", "the path is missing"),
        ("http://127.0.0.1:9464/", "is not an address and port"),
        ("224.0.0.1:9464", "224.0.0.1 is a multicast or broadcast address"),
        ("unix:@metrics", "write unix:./@metrics"),
    ] {
        let output = run(metrics);
        assert_eq!(output.status.code(), Some(2), "{output:#?}");
        assert!(output.stderr.contains(part) && output.stderr.lines().count() == 1, "{output:#?}");
    }
    let (_taken, address) = client::own_listener();
    let output = run(&address.to_string());
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stderr.contains(&format!("--metrics {address}: the tcp port is taken")), "{output:#?}");
    // Its own port, and its own path.
    let own = client::own_address().to_string();
    let output = process::run(rproxy::command(&["--host", &own, "--to", &backend, "--metrics", &own]));
    assert_eq!(output.status.code(), Some(1));
    let message = format!("{own}: --metrics {own} takes this tcp port; give one of the two another port");
    assert!(output.stderr.contains(&message), "{output:#?}");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("socket").display().to_string();
    let metrics = format!("unix:{path}");
    let arguments = ["--host", "127.0.0.1:0", "--to", &backend, "--metrics", &metrics, "--control", &path];
    let output = process::run(rproxy::command(&arguments));
    assert_eq!(output.status.code(), Some(1));
    let message = format!("--metrics {metrics}: --control has the same path");
    assert!(output.stderr.contains(&message), "{output:#?}");
    let output = run("unix:/nowhere/socket");
    assert_eq!(output.status.code(), Some(1));
    assert!(
        output.stderr.contains("--metrics unix:/nowhere/socket: cannot listen there: No such"),
        "{output:#?}"
    );
    assert!(output.stderr.contains("create its directory first"), "{output:#?}");
}

pub(super) fn configuration() {
    let (backend, dir) = (TcpBackend::echo(), tempfile::tempdir().unwrap());
    let (config, metrics) = (dir.path().join("rproxy.toml"), client::own_address());
    let mapping =
        format!("[[mapping]]\nhost = \"{}\"\nto = \"{}\"\n", client::own_address(), backend.address());
    let write = |top: &str| fs::write(&config, format!("{top}\n{mapping}")).unwrap();
    write(&format!("metrics = \"{metrics}\""));
    let process = Process::spawn(rproxy::command(&["--config", config.to_str().unwrap()]));
    assert_eq!(address(&process), metrics);
    let reloads = || {
        let scrape = Scrape::of(metrics);
        let time = |which: &str| scrape.value(&format!("rproxy_config_last_reload_{which}_seconds"));
        (scrape.value("rproxy_config_last_reload_successful"), time("timestamp"), time("success_timestamp"))
    };
    let (succeeded, started, success) = reloads();
    assert_eq!((succeeded, started), (1.0, success));
    let reload = |line: &str| {
        process.signal(Signal::SIGHUP);
        process.wait_for_line(Stream::Stderr, |one| one.contains(line));
    };
    let elsewhere = client::own_address();
    write(&format!("metrics = \"{elsewhere}\""));
    reload(&format!("metrics: they are served at {metrics}"));
    eventually("a failed reload is seen", || reloads().0 == 0.0);
    let (_, failed, success) = reloads();
    assert!(failed > started && success == started);
    write("");
    reload("serve them nowhere");
    write(&format!("metrics = \"{metrics}\""));
    reload("configuration reloaded");
    eventually("a reload that succeeds is seen", || reloads().0 == 1.0);
    assert!(reloads().2 > failed);
    // The command line takes precedence.
    let other = client::own_address().to_string();
    let process = Process::spawn(rproxy::command(&[
        "--config",
        config.to_str().unwrap(),
        "--metrics",
        &other,
        "--print-config",
    ]));
    let printed = process.into_output().success();
    assert!(printed.starts_with(&format!("metrics = \"{other}\"\n")), "{printed}");
}

pub(super) fn upgrade() {
    let (program, backend, dir) = (Program::new(), TcpBackend::echo(), tempfile::tempdir().unwrap());
    let path = dir.path().join("metrics");
    let unix = format!("unix:{}", path.display());
    for metrics in ["127.0.0.1:0", &unix] {
        let (front, backend) = (client::own_address().to_string(), backend.address().to_string());
        let process = program.start(&["--host", &front, "--to", &backend, "--metrics", metrics]);
        process.wait_for_line(Stream::Stderr, |line| line.contains("serving metrics"));
        let at = (metrics != unix).then(|| address(&process));
        let started = || {
            let scrape = match at {
                Some(at) => Scrape::of(at),
                None => Scrape::parse(&get_unix(&path, "/metrics").unwrap().body),
            };
            scrape.value("rproxy_process_start_time_seconds")
        };
        let (mut last, mut pid) = (started(), process.pid());
        let kept_open = at.map(client::connect);
        kept_open.iter().for_each(|stream| assert!(get_on(stream, "/readyz").starts_with("HTTP/1.1 200")));
        for earlier in 0..2 {
            pid = testkit::upgradable::upgrade(&process, earlier, pid);
            let now = started();
            assert!(now > last, "the new process answers");
            last = now;
        }
        kept_open
            .iter()
            .for_each(|stream| assert_eq!(client::read_to_end(stream).0, b"", "the old one has closed it"));
        kill(pid, Signal::SIGTERM).unwrap();
        wait_for_end(pid);
        assert!(!path.exists());
    }
}

pub(super) fn confined() {
    let dir = tempfile::tempdir().unwrap();
    // Its files are for that user, too.
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let (backend, path) = (TcpBackend::echo(), dir.path().join("metrics"));
    let option = format!("unix:{}", path.display());
    for metrics in ["127.0.0.1:0", &option] {
        let confined = ["--metrics", metrics, "--user", "64123:64124", "--sandbox", "strict"];
        let proxy = Standalone::relay_to(backend.address(), &confined);
        client::assert_echoes(proxy.address());
        let scrape = if metrics == option {
            proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("serving metrics"));
            Scrape::parse(&get_unix(&path, "/metrics").unwrap().body)
        } else {
            Scrape::of(address(&proxy.process))
        };
        assert!(scrape.value("rproxy_process_open_fds") > 10.0);
        let connections =
            scrape.series().find(|(series, _)| series.starts_with("rproxy_mapping_connections_total"));
        assert_eq!(connections.map(|(_, value)| value), Some(1.0));
        proxy.process.signal(Signal::SIGTERM);
        assert!(proxy.process.wait().success());
        assert!(!path.exists(), "it is removed, although the process is confined");
    }
}

pub(super) fn exposed() {
    let backend = TcpBackend::echo();
    let proxy = Standalone::relay_to(backend.address(), &["--metrics", "0.0.0.0:0"]);
    let line = proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("serving metrics"));
    assert!(line.contains("WARN") && line.contains("anybody who reaches this address can read"), "{line}");
    let proxy = Standalone::relay_to(backend.address(), &["--metrics", "127.0.0.1:0"]);
    let line = proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("serving metrics"));
    assert!(line.contains("INFO") && !line.contains("anybody"), "{line}");
}

pub(super) fn off() {
    let backend = TcpBackend::echo();
    let holdings = |pid: Pid| {
        testkit::holdings::wait_until_idle(pid);
        let Holdings { sockets, pipes, others, threads, .. } = Holdings::of(pid);
        (sockets + pipes + others, threads)
    };
    let without = Standalone::relay_to(backend.address(), &[]);
    let with = Standalone::relay_to(backend.address(), &["--metrics", "127.0.0.1:0"]);
    address(&with.process);
    let (descriptors, threads) = holdings(without.process.pid());
    assert_eq!(threads, 1);
    let (more, threads) = holdings(with.process.pid());
    assert_eq!(threads, 2);
    assert!(more > descriptors);
}
