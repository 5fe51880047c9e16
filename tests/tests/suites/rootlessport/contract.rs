//! The interface by which Podman starts it, without Podman: JSON, descriptors and a socket.

use std::fs::{self, File};
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use command_fds::{CommandFdExt, FdMapping};
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, recv, send, socket};
use nix::sys::stat::Mode;
use nix::unistd::{mkfifo, pipe2};
use serde_json::{Value, json};
use tempfile::TempDir;

use rproxy_sys::sctp::Label;
use testkit::backend::{TcpBackend, echo};
use testkit::client;
use testkit::eventually;
use testkit::netns::Namespace;
use testkit::process::{self, Process, in_shell, own_name};
use testkit::require::Need;
use testkit::rproxy::rproxy;
use testkit::sctp;
use testkit::suite::Case;
use testkit::udp::{self, Backend};

/// The descriptors that Podman uses.
const EXIT_FD: i32 = 3;
const READY_FD: i32 = 4;

/// The published ports, and that of the backend, which has another number.
const PORT: u16 = 8080;
const BACKEND: u16 = 80;

/// The addresses of the container's loopback interface, beside [`Ipv4Addr::LOCALHOST`].
const OTHER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body).needs(&[Need::Root]);
    let mut cases = vec![
        case("TCP and UDP reach the container's namespace, and empty datagrams, too", both_protocols),
        case("ports of a range lead to theirs", ranges),
        case("another address moves clients, and a wrong one does not", another_address),
        case("it ends with the container", container_ends),
        case("a signal ends it", signal_ends),
        case("a taken port is told with its holder, and nothing is bound", taken_port),
        case("a namespace that is not there is told", no_namespace),
        Case::new("what is no contract is refused in one line", refusals),
    ];
    if testkit::vm::guest::is_here() || sctp::is_there() {
        cases.push(case("SCTP reaches the container's namespace", over_sctp));
    }
    cases
}

/// A directory with the program under its name for Podman.
fn directory() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("rootlessport");
    symlink(rproxy(), &program).unwrap();
    (dir, program)
}

/// A relay, as Podman starts it.
struct Relay {
    process: Process,
    ready: File,
    /// The container, as far as the relay knows.
    exit: Option<OwnedFd>,
    dir: TempDir,
}

impl Relay {
    /// Starts one on `host` with these fields, besides those of the descriptors.
    fn start(host: &Namespace, netns: &Path, mappings: &Value, more: &Value) -> Self {
        let (dir, program) = directory();
        let mut passed = json!({
            "Mappings": mappings, "NetNSPath": netns, "ExitFD": EXIT_FD, "ReadyFD": READY_FD,
            "TmpDir": dir.path(), "ChildIP": "", "ContainerID": "abc", "RootlessCNI": true,
        });
        passed.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let file = dir.path().join("stdin");
        fs::write(&file, passed.to_string()).unwrap();
        let (exit, containers_end) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let (ready, relays_end) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let mut command = in_shell(r#"exec "$0" "$@" <"$STDIN""#, &Command::new(program));
        command.env("STDIN", file).env("RPROXY_SANDBOX", "strict");
        let mappings = [(exit, EXIT_FD), (relays_end, READY_FD)];
        let mappings = mappings.map(|(parent_fd, child_fd)| FdMapping { parent_fd, child_fd });
        command.fd_mappings(mappings.into()).unwrap();
        Self { process: host.spawn(command), ready: ready.into(), exit: Some(containers_end), dir }
    }

    /// What it has reported, at the end of the pipe.
    fn readiness(&mut self) -> String {
        let mut text = String::new();
        self.ready.read_to_string(&mut text).unwrap();
        text
    }

    /// Starts one that serves.
    #[track_caller]
    fn serving(host: &Namespace, netns: &Path, mappings: &Value) -> Self {
        let mut relay = Self::start(host, netns, mappings, &json!({}));
        assert_eq!(relay.readiness(), "1");
        relay
    }

    /// The line with which it has failed.
    #[track_caller]
    fn failure(mut self, status: i32) -> String {
        assert_eq!(self.readiness(), "");
        let output = self.process.into_output();
        assert_eq!(output.status.code(), Some(status), "{}", output.stdout);
        assert_eq!(output.stdout.lines().count(), 1, "{}", output.stdout);
        output.stdout
    }

    /// Sends a packet to its socket, and returns the answer.
    fn tell(&self, packet: &str) -> String {
        let client = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        connect(client.as_raw_fd(), &UnixAddr::new(&self.socket()).unwrap()).unwrap();
        send(client.as_raw_fd(), packet.as_bytes(), nix::sys::socket::MsgFlags::empty()).unwrap();
        let mut answer = [0; 1024];
        let len = recv(client.as_raw_fd(), &mut answer, nix::sys::socket::MsgFlags::empty()).unwrap();
        String::from_utf8_lossy(&answer[..len]).into_owned()
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("rp/abc")
    }
}

fn mapping(protocol: &str) -> Value {
    json!([{ "host_ip": "", "host_port": PORT, "container_port": BACKEND, "range": 1, "protocol": protocol }])
}

/// The addresses of the host that lead to the container.
fn fronts() -> [SocketAddr; 2] {
    ["127.0.0.1", "::1"].map(|ip| SocketAddr::new(ip.parse().unwrap(), PORT))
}

fn both_protocols() {
    let [host, container] = [(); 2].map(|()| Namespace::new());
    let inside = (Ipv4Addr::LOCALHOST, BACKEND);
    let _tcp = TcpBackend::echo_in(&container, inside);
    let _udp = Backend::echo(udp::bind_in(&container, inside));
    let _relay = Relay::serving(&host, &container.path(), &mapping("tcp,udp"));
    for front in fronts() {
        host.run(|| {
            client::assert_echoes(front);
            let socket = udp::client(front.ip());
            for datagram in [b"one".as_slice(), b"", b"two", &[7; 1400]] {
                udp::assert_echoes(&socket, front, datagram);
            }
        });
    }
    // The backend of that port is not one of the host.
    host.run(|| TcpListener::bind(inside).unwrap());
}

fn ranges() {
    const COUNT: u16 = 3;

    let [host, container] = [(); 2].map(|()| Namespace::new());
    let numbered = |number: u16| {
        let socket = udp::bind_in(&container, (Ipv4Addr::LOCALHOST, BACKEND + number));
        Backend::serve(socket, move |socket, _asked, from| {
            socket.send_to(&number.to_be_bytes(), from).ok();
        })
    };
    let _backends: Vec<_> = (0..COUNT).map(numbered).collect();
    let mappings = json!([{ "host_ip": "127.0.0.1", "host_port": PORT, "container_port": BACKEND, "range": COUNT, "protocol": "udp" }]);
    let _relay = Relay::serving(&host, &container.path(), &mappings);
    for number in 0..COUNT {
        let front = (Ipv4Addr::LOCALHOST, PORT + number).into();
        assert_eq!(host.run(|| udp::ask(&udp::local(), front, b"who").0), number.to_be_bytes());
    }
    // Neither more than these, nor on other addresses.
    for free in [(Ipv4Addr::LOCALHOST, PORT + COUNT), (OTHER, PORT)] {
        host.run(|| udp::bind(free.into()));
    }
}

fn another_address() {
    let [host, container] = [(); 2].map(|()| Namespace::new());
    let lettered = |ip: Ipv4Addr, letter: u8| {
        let serve = move |mut stream: &std::net::TcpStream| {
            std::io::Write::write_all(&mut stream, &[letter])?;
            echo(stream)
        };
        container.run(|| TcpBackend::serve(TcpListener::bind((ip, BACKEND)).unwrap(), serve))
    };
    let _backends = [lettered(Ipv4Addr::LOCALHOST, b'A'), lettered(OTHER, b'B')];
    let relay = Relay::serving(&host, &container.path(), &mapping("tcp"));
    let [front, _v6] = fronts();
    let connected = || host.run(|| client::connect_lettered(front));
    let (before, letter) = connected();
    assert_eq!(letter, b'A');
    assert_eq!(relay.tell(&format!("\"{OTHER}\"\n")), "OK");
    assert_eq!(connected().1, b'B');
    client::ping(&before);
    for wrong in ["\"elsewhere\"", "\"0.0.0.0\"", "\"\u{1b}\"", "{", "", &"x".repeat(2000)] {
        let answer = relay.tell(wrong);
        assert!(answer.starts_with("rootlessport: the new address cannot be used: "), "{wrong}: {answer}");
        assert!(!answer.contains('\u{1b}'), "{answer}");
        assert_eq!(connected().1, b'B', "{wrong}");
    }
    assert_eq!(relay.tell("\"\""), "OK");
    assert_eq!(connected().1, b'A');
    client::ping(&before);
}

fn container_ends() {
    let [host, container] = [(); 2].map(|()| Namespace::new());
    let _backend = TcpBackend::echo_in(&container, (Ipv4Addr::LOCALHOST, BACKEND));
    let mut relay = Relay::serving(&host, &container.path(), &mapping("tcp"));
    let [front, _v6] = fronts();
    let connected = host.run(|| client::connect(front));
    client::ping(&connected);
    assert!(relay.socket().exists());
    drop(relay.exit.take());
    assert_eq!(relay.process.wait().code(), Some(0));
    assert!(!relay.socket().exists());
    host.run(|| TcpListener::bind(front).unwrap());
}

fn signal_ends() {
    let [host, container] = [(); 2].map(|()| Namespace::new());
    let relay = Relay::serving(&host, &container.path(), &mapping("tcp"));
    let pipes = || {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", relay.process.pid())).unwrap();
        let links = descriptors.filter_map(|descriptor| fs::read_link(descriptor.unwrap().path()).ok());
        links.filter(|link| link.to_str().unwrap().starts_with("pipe:")).count()
    };
    // That of ExitFD. Whoever has started it reads the end of its output.
    eventually("no other pipe is left", || pipes() == 1);
    relay.process.signal(Signal::SIGTERM);
    assert_eq!(relay.process.wait().code(), Some(0));
    assert!(!relay.socket().exists());
}

fn taken_port() {
    let [host, container] = [(); 2].map(|()| Namespace::new());
    let [front, _v6] = fronts();
    let _holder = host.run(|| TcpListener::bind(front).unwrap());
    let mappings = json!([
        { "host_ip": "127.0.0.1", "host_port": PORT + 1, "container_port": 1, "range": 1, "protocol": "tcp" },
        { "host_ip": "127.0.0.1", "host_port": PORT, "container_port": 1, "range": 1, "protocol": "tcp" },
    ]);
    let line = Relay::start(&host, &container.path(), &mappings, &json!({})).failure(1);
    let taken = format!("cannot listen on 127.0.0.1:8080/tcp: the tcp port is taken by {}; ", own_name());
    assert!(line.starts_with(&taken), "{line}");
    host.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, PORT + 1)).unwrap());
}

fn no_namespace() {
    let host = Namespace::new();
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    mkfifo(&fifo, Mode::S_IRUSR).unwrap();
    for (path, reason) in [
        (Path::new("/nonesuch"), "No such file"),
        (Path::new("/dev/null"), "Invalid argument"),
        (&fifo, "Invalid argument"),
    ] {
        let line = Relay::start(&host, path, &mapping("tcp"), &json!({})).failure(1);
        assert!(
            line.starts_with(&format!("NetNSPath {}: ", path.display())) && line.contains(reason),
            "{line}"
        );
    }
    host.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, PORT)).unwrap());
}

fn refusals() {
    let (dir, program) = directory();
    let file = dir.path().join("stdin");
    for (text, part) in [
        ("", "standard input is not the JSON that Podman passes"),
        ("{}", "NetNSPath is missing"),
        (r#"{"NetNSPath":"/n","ExitFD":77,"ReadyFD":78}"#, "ExitFD 77"),
        (r#"{"NetNSPath":"/n","ChildIP":"\u001b[31m\n\u202ex"}"#, r"ChildIP: '\u{1b}[31m\n\u{202e}x' is not"),
    ] {
        fs::write(&file, text).unwrap();
        let mut command = in_shell(r#"exec "$0" "$@" <"$STDIN""#, &Command::new(&program));
        command.env("STDIN", &file);
        let output = process::run(command);
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(output.stdout.contains(part) && output.stdout.lines().count() == 1, "{}", output.stdout);
    }
    let mut command = Command::new(&program);
    command.arg("--help");
    let output = process::run(command);
    assert_eq!((output.status.code(), output.stdout.as_str()), (Some(2), ""));
    assert!(output.stderr.starts_with("rootlessport: '--help': "), "{}", output.stderr);
}

fn over_sctp() {
    let [host, container] = [(); 2].map(|()| Namespace::new());
    let _backend = container.run(|| sctp::Server::echo((Ipv4Addr::LOCALHOST, BACKEND).into()));
    let mappings = json!([{ "host_ip": "127.0.0.1", "host_port": PORT, "container_port": BACKEND, "range": 1, "protocol": "sctp" }]);
    let _relay = Relay::serving(&host, &container.path(), &mappings);
    let front = SocketAddr::new(IpAddr::from(Ipv4Addr::LOCALHOST), PORT);
    let label = Label { stream: 1, is_unordered: false, ppid: [0, 0, 0, 46] };
    host.run(|| sctp::Peer::connect(front).unwrap().assert_echoes(b"message", label));
}
