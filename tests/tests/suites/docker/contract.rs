//! The docker-proxy contract: the same cases against `rproxy`, `rproxy-shim` and, as the reference, the `docker-proxy` of
//! Debian's docker.io (20.10). A case in which the two differ says why.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::Command;
use std::thread;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use nix::unistd::{Pid, pipe2};
use socket2::{Domain, Socket, Type};

use testkit::backend::{self, TcpBackend};
use testkit::client::{self, End, own_address};
use testkit::docker_proxy::{LISTEN_FD, STATUS_FD, Status, mapping};
use testkit::mptcp;
use testkit::oracle::{self, Holds, Row, Subject, failure_of};
use testkit::process::{self, Output, Process};
use testkit::require::Need;
use testkit::suite::Case;

use Holds::{Differently, ForBoth, ForRproxy};
use Subject::{AttachedShim, Oracle};

const NO_FD_4: &str = "docker-proxy 20.10 takes no listener";

const CASES: &[Row] = &[
    // The TCP cases of moby's own suite.
    ("TestTCP4Proxy", ForRproxy(NO_FD_4), tcp4),
    ("TestTCP4ProxyNoListener", ForBoth, tcp4_no_listener),
    ("TestTCP4ProxyHalfClose", ForBoth, tcp4_half_close),
    ("TestTCP6Proxy", ForBoth, tcp6),
    ("TestTCPDualStackProxy", ForRproxy(NO_FD_4), dual_stack),
    // Where it listens and whom it serves.
    ("IPv6 host, IPv4 container", ForBoth, host_v6_container_v4),
    ("IPv4 host, IPv6 container", ForBoth, host_v4_container_v6),
    ("own IPv6 socket leaves IPv4 alone", ForBoth, own_bind_is_v6_only),
    (
        "host address defaults to IPv4 wildcard",
        ForRproxy("docker-proxy 20.10 takes the IPv6 one"),
        default_host_address,
    ),
    (
        "backend refuses",
        Differently("docker-proxy closes silently, a reset tells the client"),
        backend_refuses,
    ),
    // Descriptor 3.
    ("ready is one write", ForBoth, ready_is_one_write),
    ("port taken", ForBoth, port_taken),
    ("address not on this machine", ForBoth, foreign_address),
    ("host port missing", ForBoth, host_port_missing),
    (
        "unknown protocol",
        Differently("docker-proxy 20.10 leaves dockerd without a message"),
        unknown_protocol,
    ),
    (
        "serves without a status pipe",
        ForRproxy("Go's poller takes descriptor 3, which docker-proxy then closes"),
        no_status_pipe,
    ),
    ("descriptors close on exec", ForBoth, descriptors_close_on_exec),
    // Descriptor 4.
    ("blocking listener", ForRproxy(NO_FD_4), blocking_listener),
    ("listener closes on exec", ForRproxy(NO_FD_4), listener_closes_on_exec),
    ("listener is a file", ForRproxy(NO_FD_4), listener_is_file),
    ("listener is a pipe", ForRproxy(NO_FD_4), listener_is_pipe),
    ("listener is UDP", ForRproxy(NO_FD_4), listener_is_udp),
    ("listener is a Unix socket", ForRproxy(NO_FD_4), listener_is_unix),
    ("listener does not listen", ForRproxy(NO_FD_4), listener_is_only_bound),
    ("listener missing", ForRproxy(NO_FD_4), listener_missing),
    // Flags, as Go's `flag` package reads them.
    ("four spellings of a flag", ForBoth, flag_spellings),
    ("last of a repeated flag wins", ForBoth, repeated_flag),
    ("flags end at the first other argument", ForBoth, flags_end),
    ("flags end at --", ForBoth, flags_end_at_dashes),
    ("unknown flag", ForBoth, unknown_flag),
    ("flag without its value", ForBoth, flag_without_value),
    ("port is no number", ForBoth, port_is_no_number),
    (
        "address is no address",
        ForRproxy("docker-proxy 20.10 takes the wildcard instead"),
        address_is_no_address,
    ),
    ("boolean flags", ForRproxy("docker-proxy 20.10 has none"), boolean_flags),
    ("version", ForRproxy("docker-proxy 20.10 has no -v"), version),
    // Its end.
    ("SIGINT ends it", ForBoth, sigint_ends_it),
    ("SIGTERM ends it", ForBoth, sigterm_ends_it),
    ("port free after stop", ForBoth, port_free_after_stop),
    ("no client left hanging", ForBoth, no_client_left_hanging),
];

/// Those of the unit tests of docker-proxy that pass a listener on.
const ON_MPTCP: &[Row] = &[
    ("TestTCP4Proxy, a listener of Go's", ForRproxy(NO_FD_4), mptcp4),
    ("TestTCP4ProxyHalfClose, a listener of Go's", ForRproxy(NO_FD_4), mptcp4_half_close),
    ("TestTCP6Proxy, a listener of Go's", ForRproxy(NO_FD_4), mptcp6),
    ("TestTCPDualStackProxy, a listener of Go's", ForRproxy(NO_FD_4), mptcp_dual_stack),
];

pub(crate) fn cases() -> Vec<Case> {
    let on_mptcp = ON_MPTCP.iter().flat_map(oracle::cases).map(|case| case.needs(&[Need::Mptcp]));
    CASES.iter().flat_map(oracle::cases).chain(on_mptcp).collect()
}

/// Runs a proxy that rejects its flags; returns what it printed.
fn usage_error(subject: Subject, arguments: &[&str]) -> Output {
    let mut proxy = subject.start(&arguments.iter().map(ToString::to_string).collect::<Vec<_>>());
    assert_eq!(proxy.status(), Status::Other(String::new()), "a word on descriptor 3");
    let output = proxy.process.into_output();
    assert_eq!(output.status.code(), Some(2), "{output:#?}");
    assert!(output.stderr.contains("sage"), "no usage: {output:#?}");
    output
}

fn free_v6() -> SocketAddr {
    (Ipv6Addr::LOCALHOST, client::free_port(Ipv6Addr::LOCALHOST)).into()
}

fn tcp4(subject: Subject) {
    let backend = TcpBackend::echo();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut proxy = subject.adopt("tcp", listener, backend.address());
    assert_eq!(proxy.status(), Status::Ready);
    client::assert_echoes(address);
}

fn tcp4_no_listener(subject: Subject) {
    let (backend, host) = (TcpBackend::echo(), own_address());
    let _proxy = subject.serve("tcp", host, backend.address());
    client::assert_echoes(host);
}

fn tcp4_half_close(subject: Subject) {
    let backend = TcpBackend::local(backend::answer_at_eof);
    let host = own_address();
    let _proxy = subject.serve("tcp", host, backend.address());
    client::assert_echoes(host);
}

fn tcp6(subject: Subject) {
    let (backend, host) = (TcpBackend::echo_at((Ipv6Addr::LOCALHOST, 0)), free_v6());
    let _proxy = subject.serve("tcp", host, backend.address());
    client::assert_echoes(host);
}

fn dual_stack(subject: Subject) {
    let backend = TcpBackend::echo_at((Ipv6Addr::LOCALHOST, 0));
    let listener = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
    listener.set_only_v6(false).unwrap();
    listener.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)).into()).unwrap();
    listener.listen(128).unwrap();
    let port = listener.local_addr().unwrap().as_socket().unwrap().port();
    let mut proxy = subject.adopt("tcp", listener, backend.address());
    assert_eq!(proxy.status(), Status::Ready);
    client::assert_echoes((Ipv4Addr::LOCALHOST, port).into());
    client::assert_echoes((Ipv6Addr::LOCALHOST, port).into());
}

/// Go listens for Multipath TCP since 1.24, and so do the tests of docker-proxy. Its clients speak TCP.
fn serves_on_mptcp(subject: Subject, listen: impl Into<IpAddr>, backend: &TcpBackend, clients: &[IpAddr]) {
    let listener = mptcp::listen((listen.into(), 0).into());
    let port = listener.local_addr().unwrap().port();
    let kept = listener.try_clone().unwrap();
    let mut proxy = subject.adopt("tcp", listener, backend.address());
    assert_eq!(proxy.status(), Status::Ready);
    for ip in clients {
        let address = (*ip, port).into();
        client::assert_echoes(address);
        let mut client = mptcp::connect(address);
        client.write_all(b"hello").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client::read_to_end(&client), (b"hello".to_vec(), End::Eof));
    }
    // Nobody is left in its backlog, though another process has it open.
    assert_eq!(proxy.stop().code(), Some(0));
    TcpStream::connect((clients[0], port)).unwrap_err();
    drop(kept);
}

fn mptcp4(subject: Subject) {
    serves_on_mptcp(subject, Ipv4Addr::LOCALHOST, &TcpBackend::echo(), &[Ipv4Addr::LOCALHOST.into()]);
}

fn mptcp4_half_close(subject: Subject) {
    let backend = TcpBackend::local(backend::answer_at_eof);
    serves_on_mptcp(subject, Ipv4Addr::LOCALHOST, &backend, &[Ipv4Addr::LOCALHOST.into()]);
}

fn mptcp6(subject: Subject) {
    let backend = TcpBackend::echo_at((Ipv6Addr::LOCALHOST, 0));
    serves_on_mptcp(subject, Ipv6Addr::LOCALHOST, &backend, &[Ipv6Addr::LOCALHOST.into()]);
}

fn mptcp_dual_stack(subject: Subject) {
    let clients = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    serves_on_mptcp(subject, Ipv6Addr::UNSPECIFIED, &TcpBackend::echo_at((Ipv6Addr::LOCALHOST, 0)), &clients);
}

fn host_v6_container_v4(subject: Subject) {
    let (backend, host) = (TcpBackend::echo(), free_v6());
    let _proxy = subject.serve("tcp", host, backend.address());
    client::assert_echoes(host);
}

fn host_v4_container_v6(subject: Subject) {
    let (backend, host) = (TcpBackend::echo_at((Ipv6Addr::LOCALHOST, 0)), own_address());
    let _proxy = subject.serve("tcp", host, backend.address());
    client::assert_echoes(host);
}

fn own_bind_is_v6_only(subject: Subject) {
    let backend = TcpBackend::echo();
    let port = client::free_port(Ipv6Addr::UNSPECIFIED);
    let _proxy = subject.serve("tcp", (Ipv6Addr::UNSPECIFIED, port).into(), backend.address());
    client::assert_echoes((Ipv6Addr::LOCALHOST, port).into());
    TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).expect("the IPv4 port is taken, too");
}

fn default_host_address(subject: Subject) {
    let backend = TcpBackend::echo();
    let port = client::free_port(Ipv4Addr::UNSPECIFIED);
    let mut arguments = mapping("tcp", (Ipv4Addr::UNSPECIFIED, port).into(), backend.address());
    arguments.retain(|argument| argument != "-host-ip" && argument != "0.0.0.0");
    let mut proxy = subject.start(&arguments);
    assert_eq!(proxy.status(), Status::Ready);
    client::assert_echoes((Ipv4Addr::LOCALHOST, port).into());
    TcpListener::bind((Ipv6Addr::LOCALHOST, port)).expect("the IPv6 port is taken, too");
}

fn backend_refuses(subject: Subject) {
    let host = own_address();
    // Nobody listens on an address of one's own.
    let _proxy = subject.serve("tcp", host, own_address());
    let (received, end) = client::end_of(host);
    assert_eq!(received, b"");
    match subject {
        Oracle => assert_eq!(end, End::Eof),
        _ => assert_eq!(end, End::Reset),
    }
}

fn ready_is_one_write(subject: Subject) {
    subject.assert_ready_is_one_write("tcp");
}

fn port_taken(subject: Subject) {
    let taken = TcpListener::bind(own_address()).unwrap();
    let message = subject.failure_at("tcp", taken.local_addr().unwrap());
    assert!(message.contains("in use") || message.contains("taken"), "{message:?}");
}

fn foreign_address(subject: Subject) {
    subject.failure_at("tcp", (client::FOREIGN, 8080).into());
}

fn host_port_missing(subject: Subject) {
    let mut arguments = mapping("tcp", own_address(), own_address());
    arguments.drain(4..6);
    let message = subject.failure(&arguments);
    match subject {
        Oracle => assert_ne!(message, ""),
        _ => assert!(message.contains("-host-port is missing"), "{message:?}"),
    }
}

fn unknown_protocol(subject: Subject) {
    let mut proxy = subject.start(&mapping("bogus", own_address(), own_address()));
    match (subject, proxy.status()) {
        (Oracle, Status::Other(nothing)) => assert_eq!(nothing, ""),
        (Oracle, status) => panic!("{status:?}"),
        (_, Status::Failed(message)) => assert!(message.contains("bogus"), "{message:?}"),
        (_, status) => panic!("{status:?}"),
    }
    assert_eq!(proxy.process.wait().code(), Some(1));
}

fn no_status_pipe(subject: Subject) {
    let (backend, host) = (TcpBackend::echo(), own_address());
    let mut command = Command::new(subject.program());
    subject.prepare(&mut command);
    command.args(mapping("tcp", host, backend.address()));
    let proxy = Process::spawn(command);
    // Without the pipe, its port is the only sign that it is ready.
    while TcpStream::connect(host).is_err() {
        assert!(proxy.is_running());
        thread::yield_now();
    }
    client::assert_echoes(host);
}

/// The flags that the kernel shows for each descriptor of a process above its standard streams.
fn descriptor_flags(pid: Pid) -> Vec<(i32, OFlag)> {
    let directory = format!("/proc/{pid}/fdinfo");
    let describe = |entry: fs::DirEntry| {
        let fd = entry.file_name().to_str()?.parse().ok()?;
        let info = fs::read_to_string(entry.path()).ok()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
        let flags = i32::from_str_radix(flags.trim(), 8).ok()?;
        Some((fd, OFlag::from_bits_retain(flags)))
    };
    let entries = fs::read_dir(directory).unwrap();
    let mut flags: Vec<_> = entries.filter_map(|entry| describe(entry.unwrap())).collect();
    flags.retain(|(fd, _)| *fd > 2);
    flags
}

/// Checks each descriptor but those that whoever started this suite let it, and so the proxy, inherit.
#[track_caller]
fn assert_close_on_exec(process: &Process) {
    let leaks = |pid| -> Vec<i32> {
        let flags = descriptor_flags(pid).into_iter();
        flags.filter(|(_, flags)| !flags.contains(OFlag::O_CLOEXEC)).map(|(fd, _)| fd).collect()
    };
    let inherited = leaks(Pid::this());
    let mut leaked = leaks(process.pid());
    leaked.retain(|fd| [STATUS_FD, LISTEN_FD].contains(fd) || !inherited.contains(fd));
    assert!(leaked.is_empty(), "{leaked:?} would leak into children");
}

fn descriptors_close_on_exec(subject: Subject) {
    let (backend, host) = (TcpBackend::echo(), own_address());
    let proxy = subject.serve("tcp", host, backend.address());
    client::assert_echoes(host);
    assert_close_on_exec(&proxy.process);
}

fn listener_closes_on_exec(subject: Subject) {
    let mut proxy = subject.adopt("tcp", TcpListener::bind("127.0.0.1:0").unwrap(), own_address());
    assert_eq!(proxy.status(), Status::Ready);
    assert_close_on_exec(&proxy.process);
}

fn blocking_listener(subject: Subject) {
    let backend = TcpBackend::echo();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let flags = |fd: &TcpListener| OFlag::from_bits_retain(fcntl(fd.as_fd(), FcntlArg::F_GETFL).unwrap());
    assert!(!flags(&listener).contains(OFlag::O_NONBLOCK));
    let mut proxy = subject.adopt("tcp", listener.try_clone().unwrap(), backend.address());
    assert_eq!(proxy.status(), Status::Ready);
    assert!(flags(&listener).contains(OFlag::O_NONBLOCK), "accept would block the proxy");
    client::assert_echoes(address);
}

#[track_caller]
fn assert_not_adopted(subject: Subject, listener: impl Into<OwnedFd>) {
    let message = failure_of(subject.adopt("tcp", listener, own_address()));
    assert!(message.contains('4'), "does not name the descriptor: {message:?}");
}

fn listener_is_file(subject: Subject) {
    assert_not_adopted(subject, File::open("/dev/null").unwrap());
}

fn listener_is_pipe(subject: Subject) {
    assert_not_adopted(subject, pipe2(OFlag::O_CLOEXEC).unwrap().0);
}

fn listener_is_udp(subject: Subject) {
    assert_not_adopted(subject, UdpSocket::bind("127.0.0.1:0").unwrap());
}

fn listener_is_unix(subject: Subject) {
    let directory = tempfile::tempdir().unwrap();
    assert_not_adopted(subject, UnixListener::bind(directory.path().join("socket")).unwrap());
}

fn listener_is_only_bound(subject: Subject) {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&own_address().into()).unwrap();
    assert_not_adopted(subject, socket);
}

fn listener_missing(subject: Subject) {
    let mut arguments = mapping("tcp", own_address(), own_address());
    arguments.push("-use-listen-fd".into());
    let message = subject.failure(&arguments);
    assert!(message.contains('4'), "does not name the descriptor: {message:?}");
}

fn flag_spellings(subject: Subject) {
    let (backend, host) = (TcpBackend::echo(), own_address());
    let arguments = [
        "--proto".to_owned(),
        "tcp".to_owned(),
        format!("-host-ip={}", host.ip()),
        format!("--host-port={}", host.port()),
        "-container-ip".to_owned(),
        backend.address().ip().to_string(),
        format!("--container-port={}", backend.address().port()),
    ];
    let mut proxy = subject.start(&arguments);
    assert_eq!(proxy.status(), Status::Ready);
    client::assert_echoes(host);
}

/// Starts a proxy with arguments before and after those of a working mapping; it must work.
fn serves_with(subject: Subject, before: &[&str], after: &[&str]) {
    let (backend, host) = (TcpBackend::echo(), own_address());
    let owned = |arguments: &[&str]| -> Vec<String> { arguments.iter().map(ToString::to_string).collect() };
    let arguments = [owned(before), mapping("tcp", host, backend.address()), owned(after)].concat();
    let mut proxy = subject.start(&arguments);
    assert_eq!(proxy.status(), Status::Ready);
    client::assert_echoes(host);
}

fn repeated_flag(subject: Subject) {
    serves_with(subject, &["-host-port", "1", "-proto=udp"], &[]);
}

fn flags_end(subject: Subject) {
    serves_with(subject, &[], &["stray", "-no-such-flag", "-host-port=x"]);
    serves_with(subject, &[], &["-", "-no-such-flag"]);
}

fn flags_end_at_dashes(subject: Subject) {
    serves_with(subject, &[], &["--", "-no-such-flag"]);
}

fn unknown_flag(subject: Subject) {
    let output = usage_error(subject, &["-proto", "tcp", "-host-ip", "127.0.0.1", "-no-such-flag"]);
    assert!(output.stderr.contains("no-such-flag"), "{output:#?}");
}

fn flag_without_value(subject: Subject) {
    let output = usage_error(subject, &["-proto", "tcp", "-host-ip"]);
    assert!(output.stderr.contains("host-ip"), "{output:#?}");
}

fn port_is_no_number(subject: Subject) {
    let output = usage_error(subject, &["-proto", "tcp", "-host-port", "http"]);
    assert!(output.stderr.contains("http"), "{output:#?}");
    assert!(output.stderr.contains("host-port"), "{output:#?}");
}

fn address_is_no_address(subject: Subject) {
    for flag in ["-host-ip", "-container-ip"] {
        let output = usage_error(subject, &["-proto", "tcp", flag, "localhost"]);
        assert!(output.stderr.contains("localhost"), "{output:#?}");
        assert!(output.stderr.contains(flag), "{output:#?}");
    }
}

fn boolean_flags(subject: Subject) {
    serves_with(subject, &["-use-listen-fd=false"], &[]);
    serves_with(subject, &["--use-listen-fd=0"], &[]);
    // A boolean's value is no separate argument, so `false` ends the flags, and the listener is missing.
    let mut arguments = vec!["-use-listen-fd".to_owned(), "false".to_owned()];
    arguments.extend(mapping("tcp", own_address(), own_address()));
    subject.failure(&arguments);
    usage_error(subject, &["-use-listen-fd=perhaps"]);
}

fn version(subject: Subject) {
    for flag in ["-v", "--v", "-version", "-v=true"] {
        let mut command = Command::new(subject.program());
        command.arg(flag);
        let line = process::run(command).success();
        let rest = line.strip_prefix("docker-proxy (commit ").unwrap_or_else(|| panic!("{line:?}"));
        let (commit, version) = rest.split_once(") version ").unwrap();
        assert!(!commit.is_empty() && version.trim_end().contains('.'), "{line:?}");
    }
}

/// A signal ends the proxy although a connection is open, whose client is told.
fn ends_at_once_on(subject: Subject, signal: Signal) {
    let (backend, host) = (TcpBackend::echo(), own_address());
    let proxy = subject.serve("tcp", host, backend.address());
    let mut open = client::connect(host);
    open.write_all(b"x").unwrap();
    open.peek(&mut [0]).unwrap();
    subject.assert_ended(subject.stop(&proxy, signal));
    if (subject, signal) == (AttachedShim, Signal::SIGTERM) {
        // The runtime has ended, and the container has not.
        assert_eq!(open.read(&mut [0]).unwrap(), 1);
        client::ping(&open);
    } else {
        assert_eq!(client::read_to_end(&open).0, b"x");
    }
    TcpStream::connect(host).unwrap_err();
}

fn sigint_ends_it(subject: Subject) {
    ends_at_once_on(subject, Signal::SIGINT);
}

fn sigterm_ends_it(subject: Subject) {
    ends_at_once_on(subject, Signal::SIGTERM);
}

/// The backend closes first, so that the proxy's side of the client's connection stays in TIME_WAIT.
fn port_free_after_stop(subject: Subject) {
    let backend = TcpBackend::local(|mut stream| stream.write_all(b"bye"));
    let host = own_address();
    for _ in 0..3 {
        let proxy = subject.serve("tcp", host, backend.address());
        let client = client::connect(host);
        assert_eq!(client::read_to_end(&client), (b"bye".to_vec(), End::Eof));
        drop(client);
        subject.assert_ended(subject.stop(&proxy, Signal::SIGINT));
    }
}

/// Clients that connect one after the other while the proxy stops are each answered, reset or refused.
fn no_client_left_hanging(subject: Subject) {
    let (backend, host) = (TcpBackend::echo(), own_address());
    let proxy = subject.serve("tcp", host, backend.address());
    let hammer = move || -> u32 {
        for answered in 0.. {
            let Ok(stream) = TcpStream::connect(host) else {
                return answered;
            };
            let mut stream = client::patient(stream);
            if let Err(error) = stream.write_all(b"x") {
                assert_ne!(error.kind(), ErrorKind::WouldBlock);
            }
            let mut byte = [0];
            match stream.read(&mut byte) {
                Err(error) => assert_ne!(error.kind(), ErrorKind::WouldBlock, "left hanging"),
                Ok(len) => assert_eq!(byte[..len], b"x"[..len]),
            }
        }
        unreachable!("the proxy stops")
    };
    let clients: Vec<_> = (0..4).map(|_| thread::spawn(hammer)).collect();
    client::assert_echoes(host);
    subject.assert_ended(subject.stop(&proxy, Signal::SIGINT));
    for client in clients {
        client.join().unwrap();
    }
}
