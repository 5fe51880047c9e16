//! The life of the packages on a whole Debian with systemd and Docker, from its first start to after its second.
//!
//! Each case continues where the one before it has left the machine.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use testkit::backend::TcpBackend;
use testkit::machine::Booted;
use testkit::netns::Namespace;
use testkit::process::Output;
use testkit::require::Need;
use testkit::suite::Case;
use testkit::udp;
use testkit::vm::Bootable;
use testkit::vm::debian::Debian;
use testkit::vm::guest::{self, Here, RESTART};
use testkit::{client, eventually, eventually_within, image};

use super::check;
use crate::packages::{DEBHELPER, life};

/// Its name, and what it does; without a body, it is the restart of the machine.
type Step = (&'static str, Option<fn()>);

/// What happens to the machine, in this order.
const STEPS: &[Step] = &[
    ("installed, and nothing runs by itself", Some(installed)),
    ("the service and the plane start, and serve", Some(started)),
    ("a reload keeps connections, and a mistake changes nothing", Some(reloaded)),
    ("an upgrade refuses no client", Some(upgraded)),
    ("the watchdog replaces a process that hangs", Some(watched)),
    ("systemd keeps the ports while no process serves", Some(activated)),
    ("Docker publishes ports through the plane", Some(published)),
    (RESTART, None),
    ("after a restart, everything is served again", Some(restarted)),
    ("a purge leaves nothing", Some(purged)),
];

const DEBIAN: Debian = Debian { stage };

/// How long a step may take on the machine.
const STEP: Duration = Duration::from_secs(400);

/// What `[[mapping]]` of the service leads to.
const BACKEND: SocketAddr = loopback(7);

/// The ports of a container on the host, TCP and UDP.
const PUBLISHED: u16 = 8080;
const PUBLISHED_UDP: u16 = 5300;

/// What the container serves.
const PAGE: &str = "published by rproxy\n";

pub(crate) fn cases() -> Vec<Case> {
    let names: Arc<[String]> = STEPS.iter().map(|(name, body)| listed(name, *body)).collect();
    let needs = &[
        Need::Root,
        Need::Program("qemu-system-x86_64"),
        Need::Program("busybox"),
        Need::Program("mke2fs"),
        Need::Debian,
    ];
    let case = |(name, body): &'static Step| {
        let (names, step, name) = (Arc::clone(&names), (*body)?, *name);
        let deadline = if guest::is_here() { STEP } else { Debian::PATIENCE * 2 };
        let body = move || {
            if guest::is_here() { play(step) } else { check(&DEBIAN, &names, &listed(name, Some(step))) }
        };
        Some(Case::new(name, body).needs(needs).needs(DEBHELPER).deadline(deadline).on_request())
    };
    STEPS.iter().filter_map(case).collect()
}

/// How a step is called in the list of the machine.
fn listed(name: &str, body: Option<fn()>) -> String {
    if body.is_some() { format!("vm::debian::{name}") } else { name.to_owned() }
}

/// The packages, and the image of a container.
fn stage(files: &Path) {
    life::two_versions(files);
    image::busybox(files);
}

/// Plays a step on the machine. If it fails, the end of the journal tells more.
fn play(step: fn()) {
    struct Journal;
    impl Drop for Journal {
        fn drop(&mut self) {
            if thread::panicking() {
                // It prints what it runs then.
                Here.sh("journalctl --boot --no-pager --lines 60");
            }
        }
    }
    let _journal = Journal;
    step();
}

const fn loopback(port: u16) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)
}

/// Runs a script on the machine that has to succeed.
#[track_caller]
fn sh(script: &str) -> String {
    Here.sh(script).success()
}

/// The paths on the disk.
fn files() -> BTreeSet<String> {
    sh("find / -xdev").lines().map(String::from).collect()
}

fn installed() {
    sh("find / -xdev >/run/before && mv /run/before /var/tmp/before");
    life::installed(&Here);
}

fn started() {
    let backend = TcpBackend::echo_at(BACKEND);
    life::started(&Here, backend.address());
    for address in [life::MAPPED, life::ATTACHED] {
        client::assert_echoes(address);
    }
}

fn reloaded() {
    const ADDED: SocketAddr = loopback(82);
    let _backend = TcpBackend::echo_at(BACKEND);
    let kept = client::connect(life::MAPPED);
    client::ping(&kept);
    let old = life::main_process(&Here, "rproxy");
    sh(&format!(
        "cp /etc/rproxy/rproxy.toml /var/tmp && printf '[[mapping]]\\nhost = \"{ADDED}\"\\nto = \"{BACKEND}\"\\n' >>/etc/rproxy/rproxy.toml
        systemctl reload rproxy"
    ));
    eventually("the mapping is added", || sh("rproxy ctl list").contains(&ADDED.to_string()));
    client::assert_echoes(ADDED);
    let refused = Here.sh("echo 'host = 1' >>/etc/rproxy/rproxy.toml && systemctl reload rproxy");
    assert!(!refused.status.success(), "{refused:#?}");
    client::assert_echoes(ADDED);
    sh("mv /var/tmp/rproxy.toml /etc/rproxy/rproxy.toml && systemctl reload rproxy");
    eventually("the mapping is removed", || !sh("rproxy ctl list").contains(&ADDED.to_string()));
    client::ping(&kept);
    assert_eq!(life::main_process(&Here, "rproxy"), old);
}

fn upgraded() {
    let _backend = TcpBackend::echo_at(BACKEND);
    life::upgraded(&Here);
}

/// Those of both units, whose shims keep the ports meanwhile.
fn watched() {
    let _backend = TcpBackend::echo_at(BACKEND);
    for unit in life::UNITS {
        let old = life::main_process(&Here, unit);
        // The whole time: systemd has passed it to the process that was started at first, and it is known to those after it.
        let time = sh(&format!("systemctl show --property WatchdogUSec --value {unit}"));
        assert_eq!(time, "30s\n", "{unit}");
        sh(&format!("kill -STOP {old}"));
        eventually_within(STEP / 4, "another process serves", || {
            ![0, old].contains(&life::main_process(&Here, unit)) && state(unit) == "active\n"
        });
        let journal = sh(&format!("journalctl --boot --no-pager --unit {unit}"));
        assert!(journal.contains("Watchdog timeout"), "{journal}");
    }
    for address in [life::MAPPED, life::ATTACHED] {
        client::assert_echoes(address);
    }
}

fn state(unit: &str) -> String {
    Here.sh(&format!("systemctl is-active {unit}")).stdout
}

/// The example of a socket of systemd, for the mapping that is there.
fn activated() {
    const EXAMPLE: &str = "/usr/share/doc/rproxy/examples/rproxy.socket";
    let _backend = TcpBackend::echo_at(BACKEND);
    let listen = format!("s/^ListenStream=.*/ListenStream={}/", life::MAPPED);
    sh(&format!(
        "sed '{listen}; /^ListenDatagram=/d' {EXAMPLE} >/etc/systemd/system/rproxy.socket
        systemctl daemon-reload && systemctl stop rproxy && systemctl start rproxy.socket"
    ));
    assert_eq!((state("rproxy.service"), state("rproxy.socket")), ("inactive\n".into(), "active\n".into()));
    client::assert_echoes(life::MAPPED);
    assert_eq!(state("rproxy.service"), "active\n");
    // A client who comes while it is down waits, and is not refused.
    sh("systemctl kill --kill-whom=main --signal=KILL rproxy");
    client::assert_echoes(life::MAPPED);
    sh("systemctl stop rproxy.socket rproxy && rm /etc/systemd/system/rproxy.socket
        systemctl daemon-reload && systemctl start rproxy");
    client::assert_echoes(life::MAPPED);
}

fn published() {
    sh(
        r#"echo '{ "userland-proxy-path": "/usr/bin/rproxy-shim" }' >/etc/docker/daemon.json && systemctl restart docker"#,
    );
    let busybox = "/bin/busybox";
    sh(&format!(
        "docker import /run/host/image.tar small
        docker run --detach --name web --restart always --publish {PUBLISHED}:80 --publish {PUBLISHED_UDP}:53/udp small \
            {busybox} sh -c '{busybox} mkdir /www; {busybox} printf \"{}\" >/www/index.html; exec {busybox} httpd -f -p 80 -h /www'",
        PAGE.escape_default()
    ));
    assert_published();
}

/// Over TCP and UDP, on both families, by the plane.
fn assert_published() {
    eventually_within(STEP / 4, "the container serves", || {
        fetched(Ipv4Addr::LOCALHOST.into()).status.success()
    });
    for ip in [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
        assert_eq!(fetched(ip).success(), PAGE);
    }
    let container = sh("docker inspect --format '{{.State.Pid}}' web");
    let network = Namespace::open(&format!("/proc/{}/ns/net", container.trim()));
    let _echo = udp::Backend::echo(udp::bind_in(&network, (Ipv4Addr::UNSPECIFIED, 53)));
    for ip in [IpAddr::V4(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
        udp::assert_all_echo(&udp::client(ip), (ip, PUBLISHED_UDP).into(), [0, 1, 1_400, 20_000]);
    }
    let list = sh("rproxy ctl --control /run/rproxy-attach.sock list");
    for port in [format!("docker/tcp/0.0.0.0:{PUBLISHED}"), format!("docker/udp/[::]:{PUBLISHED_UDP}")] {
        assert!(list.contains(&port), "no {port}: {list}");
    }
    // A shim for each protocol and family.
    let processes = sh("ps -o comm= --ppid \"$(pgrep --exact dockerd)\"");
    assert_eq!(processes, "rproxy-shim\n".repeat(4));
}

fn fetched(ip: IpAddr) -> Output {
    Here.sh(&format!("curl --silent --show-error --max-time 20 http://{}/", SocketAddr::new(ip, PUBLISHED)))
}

/// What was enabled is started, and Docker starts its containers. A second restart of Docker publishes their ports again.
fn restarted() {
    let _backend = TcpBackend::echo_at(BACKEND);
    for unit in life::UNITS {
        assert_eq!(state(unit), "active\n", "{unit}");
    }
    client::assert_echoes(life::MAPPED);
    assert_published();
    sh("systemctl reload rproxy-attach");
    assert_published();
    assert_eq!(sh("systemctl --failed --no-legend"), "");
}

fn purged() {
    // dockerd would not start without the program.
    sh("docker rm --force web && rm /etc/docker/daemon.json && systemctl restart docker");
    life::removed(&Here);
    sh("dpkg --purge rproxy rproxy-netns");
    let before = fs::read_to_string("/var/tmp/before").unwrap().lines().map(String::from).collect();
    assert_eq!(life::left(&before, &files()), BTreeSet::new());
    assert!(
        !Here.sh("getent passwd rproxy || getent group rproxy").status.success(),
        "the user is still there"
    );
    assert_eq!(state("docker"), "active\n");
}
