//! Machines without IPv6 sockets, and without IPv6 addresses.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;

use nix::sys::signal::Signal;
use serde_json::json;

use testkit::backend::TcpBackend;
use testkit::client;
use testkit::controlled::Controlled;
use testkit::netns::Namespace;
use testkit::process::{self, Process, Stream};
use testkit::require::Need;
use testkit::role;
use testkit::rproxy::{self, Ready};
use testkit::suite::Case;
use testkit::upgradable::Program;

use super::case;

const BACKEND: (Ipv4Addr, u16) = (Ipv4Addr::new(127, 0, 0, 2), 80);

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("a machine without IPv6", no_sockets),
        case("changes and an upgrade without IPv6", changes_without_sockets),
        case("a machine without IPv6 addresses", no_addresses).needs(&[Need::Program("sysctl")]),
    ]
}

/// A host, and a backend on it.
fn host() -> (Namespace, TcpBackend) {
    let host = Namespace::new();
    let backend = TcpBackend::echo_in(&host, BACKEND);
    (host, backend)
}

/// `command` on a kernel without IPv6.
fn without_ipv6(command: &Command) -> Command {
    process::prefixed(role::command(&["without-ipv6"]), command)
}

#[track_caller]
fn assert_serves(host: &Namespace, port: u16) {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    host.run(|| client::assert_echoes(address));
}

/// The ports that the lines about them say are ready, on every IPv4 address.
#[track_caller]
fn ready(process: &Process, count: usize) -> Vec<u16> {
    let lines = process.wait_for_lines(Stream::Stdout, count, |_| true);
    let ready = lines.iter().map(|line| Ready::parse(line).unwrap().address);
    ready
        .map(|address| {
            assert_eq!(address.ip(), Ipv4Addr::UNSPECIFIED);
            address.port()
        })
        .collect()
}

fn no_sockets() {
    let (host, _backend) = host();
    let arguments = ["--to", "127.0.0.2", "-p", "8080:80", "-p", "80", "-P", "--expose", "80-80/udp"];
    let process = host.spawn(without_ipv6(&rproxy::command(&arguments)));
    let ports = ready(&process, 3);
    process.wait_for_line(Stream::Stderr, |line| line.contains("this machine has no IPv6"));
    assert_eq!(ports[0], 8080);
    assert_serves(&host, 8080);
    assert_serves(&host, ports[1]);
    drop(process);

    // What asks for IPv6 is told what to write instead.
    let listens = ["--host", "[::]:8080", "--to", "127.0.0.2:80"];
    let docker = ["-proto", "tcp", "-host-ip", "::", "-host-port", "8080", "-container-ip", "127.0.0.2"];
    let docker = [&docker[..], &["-container-port", "80"]].concat();
    for arguments in [&listens[..], &["--to", "127.0.0.2", "-p", "[::]:8080:80"], &docker] {
        let output = host.spawn(without_ipv6(&rproxy::command(arguments))).into_output();
        assert_eq!((output.status.code(), output.stdout.as_str()), (Some(1), ""));
        let part = "this machine has no IPv6; write 0.0.0.0:8080 for all of its IPv4 addresses";
        assert!(output.stderr.contains(part), "{output:?}");
    }
    let demo = host.spawn(without_ipv6(&rproxy::command(&["demo", "--once"]))).into_output().success();
    assert!(demo.contains("-> 0.0.0.0:") && demo.contains("this machine has no IPv6"), "{demo}");
}

/// By the control socket, over an upgrade, and what is listed can be applied again.
fn changes_without_sockets() {
    let (host, _backend) = host();
    let start = |command: Command| host.spawn(without_ipv6(&command));
    let proxy = Controlled::start_by(&[], start);
    let web = json!({ "name": "web", "host_ports": "8080", "to": "127.0.0.2", "to_ports": "80" });
    let add = json!({ "v": 1, "do": { "add": { "mappings": [web] } } });
    let answer = proxy.connect().ask(&add);
    assert_eq!(answer["ok"]["mappings"][0]["host"], "0.0.0.0", "{answer}");
    proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("this machine has no IPv6"));
    assert_serves(&host, 8080);
    let mappings = proxy.json(&["list"])["mappings"].as_array().unwrap().clone();
    proxy.apply(&mappings).success();
    proxy.apply(&[web]).success();
    proxy.process.signal(Signal::SIGTERM);
    assert!(proxy.process.wait().success());
    let log = proxy.process.captured(Stream::Stderr);
    assert_eq!(log.matches("serving mapping=web ").count(), 1, "it was touched: {log}");

    let program = Program::new();
    let process = start(program.command(&["--to", "127.0.0.2", "-p", "8080:80"]));
    assert_eq!(ready(&process, 1), [8080]);
    process.signal(Signal::SIGUSR2);
    process.wait_for_line(Stream::Stderr, |line| line.contains("a new process has taken over"));
    assert!(process.wait().success());
    assert_serves(&host, 8080);
}

/// There are sockets, but the administrator allows no addresses for them.
fn no_addresses() {
    let (host, _backend) = host();
    host.command("sysctl -w net.ipv6.conf.all.disable_ipv6=1").success();
    host.command("sysctl -w net.ipv6.conf.lo.disable_ipv6=1").success();
    host.spawn(rproxy::command(&["demo", "--once"])).into_output().success();
    let process = host.spawn(rproxy::command(&["--to", "127.0.0.2", "-p", "8080:80"]));
    process.wait_for_line(Stream::Stdout, |line| line == "80/tcp -> [::]:8080");
    assert_serves(&host, 8080);
}
