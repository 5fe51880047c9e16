//! Tests of the harness itself: it creates what it should, and everything ends with its owner.

use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, TcpListener, TcpStream};
use std::process::ExitCode;
use std::time::Duration;

use testkit::backend::{TcpBackend, answer_at_eof};
use testkit::netns::Namespace;
use testkit::process::{self, Process, Stream};
use testkit::require::{self, Need};
use testkit::role;
use testkit::suite::Case;
use testkit::topology::{self, Topology};
use testkit::udp;

/// The role of a case that hangs.
const HANGING: &str = "hanging";

/// Plays that role to its end, if it is the one.
pub(crate) fn play(role: &[&str]) -> Option<ExitCode> {
    // Time enough to start something.
    (role == [HANGING]).then(|| Case::new(HANGING, hang).deadline(Duration::from_secs(3)).play())
}

pub(crate) fn cases() -> Vec<Case> {
    let wiring = &[Need::Root, Need::Program("ip")];
    vec![
        Case::new("a dropped process is gone", dropped_process_is_gone),
        Case::new("all output is captured", all_output_is_captured),
        Case::new("a case that hangs is ended, and what it has started", hanging_case_is_ended),
        Case::new("backends answer", backends_answer),
        Case::new("a namespace is separate", namespace_is_separate).needs(wiring),
        Case::new("a namespace ends with its owner", namespace_ends_with_its_owner).needs(wiring),
        Case::new("neighbours in the topology answer", neighbours_answer).needs(wiring),
        Case::new("the container is out of the client's reach", container_is_out_of_reach).needs(wiring),
    ]
}

fn dropped_process_is_gone() {
    let mut command = require::command("sleep");
    command.arg("1000");
    let process = Process::spawn(command);
    let entry = format!("/proc/{}", process.pid());
    assert!(fs::exists(&entry).unwrap());
    drop(process);
    assert!(!fs::exists(&entry).unwrap());
}

fn all_output_is_captured() {
    let mut command = require::command("sh");
    command.args(["-c", "seq 100000; echo warning >&2; exit 3"]);
    let process = Process::spawn(command);
    assert_eq!(process.wait_for_line(Stream::Stderr, |line| line.starts_with("warn")), "warning");
    let output = process.into_output();
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(output.stdout.lines().count(), 100_000);
}

#[expect(clippy::print_stdout, reason = "the report")]
fn hang() {
    let mut command = require::command("sleep");
    command.arg("1000");
    let process = Process::spawn(command);
    println!("{}", process.pid());
    process.wait_within(Duration::from_secs(1000));
}

fn hanging_case_is_ended() {
    let output = process::run(role::command(&[HANGING]));
    assert_eq!(output.status.code(), Some(101), "{output:#?}");
    assert!(output.stderr.contains("ending all processes that it has started"), "{output:#?}");
    let pid: u32 = output.stdout.trim().parse().unwrap();
    assert!(!fs::exists(format!("/proc/{pid}")).unwrap());
}

fn backends_answer() {
    let backend = TcpBackend::local(answer_at_eof);
    let mut client = TcpStream::connect(backend.address()).unwrap();
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "question");

    let echo = udp::Backend::echo(udp::local());
    let client = udp::local();
    client.send_to(b"ping", echo.address()).unwrap();
    let mut buffer = [0; 16];
    assert_eq!(client.recv_from(&mut buffer).unwrap(), (4, echo.address()));
}

fn namespace_is_separate() {
    let namespace = Namespace::new();
    let listener = namespace.run(|| TcpListener::bind("127.0.0.1:0").unwrap());
    let address = listener.local_addr().unwrap();
    assert!(TcpListener::bind(address).is_ok(), "the port is taken outside, too");
    assert!(namespace.run(|| TcpStream::connect(address)).is_ok());
    assert!(namespace.run(|| TcpListener::bind(address)).is_err());
    assert_eq!(namespace.ip("-brief link").lines().count(), 1, "only lo exists");
}

fn namespace_ends_with_its_owner() {
    let namespace = Namespace::new();
    let identity = fs::read_link(namespace.path()).unwrap();
    let mut command = require::command("sleep");
    command.arg("1000");
    let process = namespace.spawn(command);
    let of_process = format!("/proc/{}/ns/net", process.pid());
    assert_eq!(fs::read_link(of_process).unwrap(), identity);

    let other = Namespace::new();
    other.veth("a", &namespace, "b");
    drop((process, namespace));
    // The far end of the pair goes when the kernel, some time later, takes the namespace down.
    while other.ip("-brief link").contains("a@") {}
}

fn neighbours_answer() {
    let net = Topology::new();
    let neighbours: [(_, _, IpAddr); 6] = [
        (&net.client, &net.host, topology::HOST_V4.into()),
        (&net.client, &net.host, topology::HOST_V6.into()),
        (&net.host, &net.container, topology::CONTAINER_V4.into()),
        (&net.host, &net.container, topology::CONTAINER_V6.into()),
        (&net.container, &net.host, topology::HOST_V4.into()),
        (&net.container, &net.host, topology::HOST_V6.into()),
    ];
    for (from, to, address) in neighbours {
        let listener = to.run(|| TcpListener::bind((address, 0)).unwrap());
        from.run(|| TcpStream::connect(listener.local_addr().unwrap()).unwrap());
    }
    let link = net.container.ip("link show eth0");
    assert!(link.contains("02:42:ac:11:00:02") && link.contains("mtu 1500"), "{link}");
}

fn container_is_out_of_reach() {
    let net = Topology::new();
    net.client.ip(&format!("route add 172.17.0.0/16 via {}", topology::HOST_V4));
    let listener = net.container.run(|| TcpListener::bind((topology::CONTAINER_V4, 0)).unwrap());
    let address = listener.local_addr().unwrap();
    net.client.run(|| TcpStream::connect_timeout(&address, Duration::from_millis(300))).unwrap_err();
}
