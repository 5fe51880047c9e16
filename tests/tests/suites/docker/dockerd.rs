//! The real dockerd with `rproxy` as its userland proxy: published ports work as before.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use testkit::backend::TcpBackend;
use testkit::client;
use testkit::eventually;
use testkit::holdings::private_memory;
use testkit::load;
use testkit::process::{Stream, run};
use testkit::require::{self, Need};
use testkit::rproxy::{self, rproxy, rproxy_shim};
use testkit::shim::Shim;
use testkit::suite::Case;
use testkit::udp::{self, Backend, bind_in};

use super::daemon::{DAEMON, Docker, PAGE, SERVER};

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body).needs(DAEMON);
    vec![
        case("a port is published on every address", published_everywhere),
        case("a port is published on one address", published_on_one_address),
        case("a free port is chosen and reported", free_port_is_reported),
        case("rproxy is the process that serves", rproxy_serves).needs(&[Need::Program("ps")]),
        case("rproxy-shim attaches what is published", shim_attaches).needs(&[Need::Program("ps")]),
        case("rproxy-shim with nothing to attach to", shim_serves).needs(&[Need::Program("ps")]),
        case("a restart of dockerd with live-restore: connections and flows go on", live_restore),
        case("a range of 500 ports takes little memory", range).needs(&[Need::Program("ps")]),
        case("containers reach a port through the host", containers_reach_it),
        case("docker stop frees the port", stop_frees_port),
        case("a port in use fails docker run with rproxy's message", taken_port_is_explained),
        case("docker restart right after traffic", restart_after_traffic),
        case("a UDP port answers the host and other containers", udp_from_host_and_containers),
    ]
}

fn published_everywhere() {
    let docker = Docker::start();
    docker.run_server("--publish 8080:80");
    docker.assert_served(Ipv4Addr::LOCALHOST, 8080);
    docker.assert_served(Ipv4Addr::new(172, 17, 0, 1), 8080);
    // The container has no IPv6 address.
    docker.assert_served(Ipv6Addr::LOCALHOST, 8080);
}

fn published_on_one_address() {
    let docker = Docker::start();
    docker.run_server("--publish 127.0.0.1:8080:80");
    docker.assert_served(Ipv4Addr::LOCALHOST, 8080);
    assert!(docker.is_free(Ipv6Addr::LOCALHOST, 8080));
    assert!(docker.is_free(Ipv4Addr::new(172, 17, 0, 1), 8080));
}

fn free_port_is_reported() {
    let docker = Docker::start();
    docker.run_server("--publish-all");
    let ports = docker.docker("port web 80").success();
    let port = |line: &str| line.rsplit_once(':').unwrap().1.parse().unwrap();
    for line in ports.lines() {
        let host: IpAddr = match line.starts_with("0.0.0.0:") {
            true => Ipv4Addr::LOCALHOST.into(),
            false => Ipv6Addr::LOCALHOST.into(),
        };
        docker.assert_served(host, port(line));
    }
    assert_eq!(ports.lines().count(), 2, "{ports}");
}

/// Checks which program serves port 8080: as many processes as there are families.
#[track_caller]
fn assert_served_by(docker: &Docker, program: &Path) {
    let mut ps = require::command("ps");
    ps.args(["-o", "pid=", "--ppid", &docker.daemon_pid().unwrap().to_string()]);
    let children = run(ps).success();
    let command_line =
        |pid: &str| fs::read_to_string(format!("/proc/{}/cmdline", pid.trim())).unwrap_or_default();
    let proxies: Vec<_> =
        children.lines().filter(|pid| command_line(pid).contains("-host-port\08080\0")).collect();
    assert_eq!(proxies.len(), 2, "one for each family: {children}");
    for pid in proxies {
        assert_eq!(fs::read_link(format!("/proc/{}/exe", pid.trim())).unwrap(), program);
    }
}

fn rproxy_serves() {
    let docker = Docker::start();
    docker.run_server("--publish 8080:80");
    assert_served_by(&docker, rproxy());
}

fn shim_attaches() {
    let docker = Docker::start_with(rproxy_shim());
    let _plane = docker.namespace.spawn(rproxy::command(&["--attach"]));
    eventually("shims can connect", || Shim::connect_in(&docker.namespace, "rproxy").is_ok());
    for _ in 0..2 {
        docker.run_server("--publish 8080:80");
        assert_served_by(&docker, rproxy_shim());
        docker.assert_served(Ipv4Addr::LOCALHOST, 8080);
        docker.assert_served(Ipv6Addr::LOCALHOST, 8080);
        docker.docker("rm --force web").success();
        assert!(docker.is_free(Ipv4Addr::UNSPECIFIED, 8080));
        assert!(docker.is_free(Ipv6Addr::UNSPECIFIED, 8080));
    }
}

fn shim_serves() {
    let docker = Docker::start_with(rproxy_shim());
    docker.run_server("--publish 8080:80");
    assert_served_by(&docker, rproxy());
    docker.assert_served(Ipv4Addr::LOCALHOST, 8080);
    docker.docker("rm --force web").success();
    assert!(docker.is_free(Ipv4Addr::UNSPECIFIED, 8080));
}

/// dockerd is killed under traffic, and publishes the ports again.
fn live_restore() {
    const DNS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 5300);
    const WEB: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);

    let docker = Docker::start_restoring(rproxy_shim());
    let plane = docker.namespace.spawn(rproxy::command(&["--attach"]));
    eventually("shims can connect", || Shim::connect_in(&docker.namespace, "rproxy").is_ok());
    docker.run_idle("web", "--publish 8080:80 --publish 5300:53/udp");
    let network = docker.network_of("web");
    let _echo = TcpBackend::echo_in(&network, (Ipv4Addr::UNSPECIFIED, 80));
    let _naming = Backend::naming(bind_in(&network, (Ipv4Addr::UNSPECIFIED, 53)));
    let stream = docker.namespace.run(|| client::connect(WEB));
    let socket = bind_in(&docker.namespace, (Ipv4Addr::UNSPECIFIED, 0));
    let flow = udp::flow_of(&socket, DNS);
    let transfer = |number: usize| client::exchange(&stream, number as u64, 100_000);
    load::meanwhile(1, transfer, |transfers| {
        transfers.wait_for(3);
        kill(docker.restored_daemon(), Signal::SIGKILL).unwrap();
        docker.process.wait_for_lines(Stream::Stderr, 2, |line| line.contains("API listen on"));
        transfers.wait_for(3);
    });
    assert_eq!(udp::flow_of(&socket, DNS), flow);
    docker.namespace.run(|| client::assert_echoes(WEB));
    docker.docker("stop --time 0 web").success();
    assert_eq!(client::read_to_end(&stream).1, client::End::Reset);
    for port in [8080, 5300] {
        assert!(docker.is_free(Ipv4Addr::UNSPECIFIED, port));
        assert!(docker.is_free(Ipv6Addr::UNSPECIFIED, port));
    }
    assert!(docker.namespace.run(|| std::net::UdpSocket::bind("0.0.0.0:5300")).is_ok());
    assert!(plane.is_running());
}

/// A thousand shims and their plane.
fn range() {
    const MOST_KB: usize = 55 * 1024;

    // Its rules of the firewall take longer than all else.
    let docker = Docker::start_by(rproxy_shim(), r#"exec "$@""#, &["--iptables=false", "--ip6tables=false"]);
    let plane = docker.namespace.spawn(rproxy::command(&["--attach"]));
    eventually("shims can connect", || Shim::connect_in(&docker.namespace, "rproxy").is_ok());
    let ports = "127.0.0.1:20000-20499:20000-20499";
    docker.run_idle("web", &format!("--publish {ports} --publish {ports}/udp"));
    let daemon = docker.daemon_pid().unwrap();
    let mut ps = require::command("ps");
    ps.args(["-o", "pid=,comm=", "--ppid", &daemon.to_string()]);
    let children = run(ps).success();
    let shims = children.lines().filter_map(|line| line.trim().split_once(' '));
    let shims = shims.filter(|(_pid, name)| name.trim() == "rproxy-shim");
    let shims: Vec<Pid> = shims.map(|(pid, _name)| Pid::from_raw(pid.parse().unwrap())).collect();
    assert_eq!(shims.len(), 1_000, "{children}");
    let memory: usize = shims.iter().chain([&plane.pid()]).map(|pid| private_memory(*pid)).sum();
    assert!(memory <= MOST_KB, "{memory} kB");
    let echo = TcpBackend::echo_in(&docker.network_of("web"), (Ipv4Addr::UNSPECIFIED, 20_499));
    docker.namespace.run(|| client::assert_echoes((Ipv4Addr::LOCALHOST, 20_499).into()));
    drop(echo);
    docker.docker("rm --force web").success();
    assert!((20_000..20_500).all(|port| docker.is_free(Ipv4Addr::LOCALHOST, port)));
}

fn containers_reach_it() {
    let docker = Docker::start();
    docker.run_server("--publish 8080:80");
    let url = "http://172.17.0.1:8080/";
    assert_eq!(docker.wget(url).success(), PAGE);
    let itself = docker.docker(&format!("exec web busybox wget -q -O - {url}"));
    assert_eq!(itself.success(), PAGE);
}

fn stop_frees_port() {
    let docker = Docker::start();
    docker.run_server("--publish 8080:80");
    let open = docker.namespace.run(|| client::connect((Ipv4Addr::LOCALHOST, 8080).into()));
    // The server, as the first process of its container, ignores the signal that would stop it.
    docker.docker("stop --time 0 web").success();
    assert!(docker.is_free(Ipv4Addr::UNSPECIFIED, 8080));
    assert!(docker.is_free(Ipv6Addr::UNSPECIFIED, 8080));
    client::read_to_end(&open);
    docker.docker("start web").success();
    docker.await_server();
    docker.assert_served(Ipv4Addr::LOCALHOST, 8080);
}

fn taken_port_is_explained() {
    let docker = Docker::start();
    let _taken = docker.namespace.run(|| TcpListener::bind("0.0.0.0:8080").unwrap());
    let output = docker.docker(&format!("run --detach --publish 8080:80 {SERVER}"));
    assert!(!output.status.success(), "{output:#?}");
    let message = "starting userland proxy: cannot listen on 0.0.0.0:8080";
    assert!(output.stderr.contains(message), "{output:#?}");
}

/// The answer has to come from the address that was asked, also where the daemon's rules leave a container's
/// datagrams to the proxy (libnetwork#1729).
fn udp_from_host_and_containers() {
    let docker = Docker::start();
    docker.run_idle("server", "--publish 5300:53/udp");
    docker.run_idle("client", "");
    let backend = bind_in(&docker.network_of("server"), (Ipv4Addr::UNSPECIFIED, 53));
    let _backend = Backend::echo(backend);
    let on_host = bind_in(&docker.namespace, (Ipv4Addr::UNSPECIFIED, 0));
    let in_container = bind_in(&docker.network_of("client"), (Ipv4Addr::UNSPECIFIED, 0));
    for size in [0, 1, 1_400, 20_000] {
        udp::assert_echoes(&on_host, (Ipv4Addr::LOCALHOST, 5300).into(), &vec![7; size]);
        udp::assert_echoes(&on_host, (Ipv4Addr::new(172, 17, 0, 1), 5300).into(), &vec![7; size]);
        udp::assert_echoes(&in_container, (Ipv4Addr::new(172, 17, 0, 1), 5300).into(), &vec![7; size]);
    }
}

/// The connections that were just closed keep their addresses for a while, and must not keep the port.
fn restart_after_traffic() {
    let docker = Docker::start();
    docker.run_server("--publish 8080:80");
    for _ in 0..3 {
        docker.assert_served(Ipv4Addr::LOCALHOST, 8080);
        docker.assert_served(Ipv6Addr::LOCALHOST, 8080);
        docker.docker("restart --time 0 web").success();
        docker.await_server();
    }
    docker.assert_served(Ipv4Addr::LOCALHOST, 8080);
}
