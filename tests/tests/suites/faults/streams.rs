//! Interruptions and ends of a byte stream, which must not lose any byte.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;
use std::thread;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, send, setsockopt, sockopt};
use serde_json::json;

use testkit::backend::TcpBackend;
use testkit::client::{self, End};
use testkit::eventually;
use testkit::netns::Namespace;
use testkit::pattern::Pattern;
use testkit::process::{self, Process, Stream};
use testkit::require::{self, Need};
use testkit::rproxy::{self, Standalone};
use testkit::suite::Case;
use testkit::topology::{CONTAINER_V4, HOST_V4};

use super::case;
use super::scene::{FRONT, Scene};

/// A receive buffer that fills at once, in bytes.
const SMALL: usize = 32 * 1024;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("urgent bytes stay in their place", urgent_bytes),
        case("urgent bytes stay in their place in bulk", urgent_bytes_in_bulk),
        case("a reset behind what a slow reader still takes", reset_behind_slow_reader),
        case("a reset between peers that do not read", reset_between_stalled_peers),
        case("a slow reader is not idle", slow_reader_is_not_idle),
        case("a reply before a reset", answer_before_reset).needs(&[Need::Program("strace")]),
        case("splice(2) is refused", splice_refused).needs(&[Need::Program("strace")]),
        case("a client that resets ends its dial", reset_ends_dial),
    ]
}

/// A relay to a backend that is in the hands of the test.
struct Relay {
    proxy: Standalone,
    backend: TcpListener,
}

impl Relay {
    fn start(arguments: &[&str]) -> Self {
        Self::start_by(arguments, |command| command)
    }

    fn start_by(arguments: &[&str], wrap: impl FnOnce(Command) -> Command) -> Self {
        let backend = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = backend.local_addr().unwrap().to_string();
        let arguments = [&["--host", "127.0.0.1:0", "--to", &to], arguments].concat();
        let proxy = Standalone::ready(Process::spawn(wrap(rproxy::command(&arguments))), &arguments);
        Self { proxy, backend }
    }

    /// The client's end of a connection and the backend's, the one that acts first.
    fn connect(&self, client_acts: bool) -> (TcpStream, TcpStream) {
        let client = client::connect(self.proxy.address());
        let server = client::patient(self.backend.accept().unwrap().0);
        if client_acts { (client, server) } else { (server, client) }
    }

    /// As [`Self::connect`], with an end that reads little at a time.
    fn connect_to_slow_reader(&self, client_acts: bool) -> (TcpStream, TcpStream) {
        setsockopt(&self.backend, sockopt::RcvBuf, &SMALL).unwrap();
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.set_recv_buffer_size(SMALL).unwrap();
        socket.connect(&self.proxy.address().into()).unwrap();
        let client = client::patient(socket.into());
        let server = client::patient(self.backend.accept().unwrap().0);
        if client_acts { (client, server) } else { (server, client) }
    }
}

/// Sends bytes of which the last is urgent.
fn send_urgent(stream: &TcpStream, bytes: &[u8]) {
    use std::os::fd::AsRawFd;
    let sent = send(stream.as_raw_fd(), bytes, MsgFlags::MSG_OOB | MsgFlags::MSG_NOSIGNAL).unwrap();
    assert_eq!(sent, bytes.len());
}

fn urgent_bytes() {
    let relay = Relay::start(&[]);
    for client_acts in [true, false] {
        for round in 0..50 {
            let (mut from, mut to) = relay.connect(client_acts);
            send_urgent(&from, b"ABOR");
            let mut all = [0; 4];
            // Nothing follows that could push it along.
            to.read_exact(&mut all).unwrap_or_else(|error| panic!("round {round}: {error}"));
            assert_eq!(&all, b"ABOR");
            from.write_all(b"abc").unwrap();
            send_urgent(&from, b"X");
            from.write_all(b"def").unwrap();
            from.shutdown(Shutdown::Write).unwrap();
            assert_eq!(client::read_to_end(&to), (b"abcXdef".to_vec(), End::Eof), "round {round}");
        }
    }
}

fn urgent_bytes_in_bulk() {
    const CHUNKS: usize = 40;
    const CHUNK: usize = 700_001;

    let relay = Relay::start(&[]);
    for client_acts in [true, false] {
        let (mut from, to) = relay.connect(client_acts);
        let mut bytes = vec![0; CHUNKS * CHUNK];
        Pattern::new(3).fill(&mut bytes);
        thread::scope(|scope| {
            let bytes = &bytes;
            scope.spawn(move || {
                for chunk in bytes.chunks(CHUNK) {
                    let (plain, urgent) = chunk.split_at(CHUNK - 1);
                    from.write_all(plain).unwrap();
                    send_urgent(&from, urgent);
                }
                from.shutdown(Shutdown::Write).unwrap();
            });
            let (received, end) = client::read_to_end(&to);
            assert_eq!((received.len(), end), (bytes.len(), End::Eof));
            assert!(received == *bytes, "other bytes");
        });
    }
}

/// Reads to the end, so slowly that the socket on the other side rarely counts as writable.
fn read_slowly(mut stream: &TcpStream) -> (usize, End) {
    let mut buffer = vec![0; 40_000];
    let mut received = 0;
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return (received, End::Eof),
            Ok(len) => received += len,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                return (received, End::Reset);
            }
            Err(error) => panic!("after {received} bytes: {error}"),
        }
        // The pace is the input under test: it waits for nothing.
        thread::sleep(Duration::from_millis(50));
    }
}

fn reset_behind_slow_reader() {
    const SENT: usize = 3_000_000;

    let relay = Relay::start(&[]);
    for client_acts in [true, false] {
        let (mut from, to) = relay.connect_to_slow_reader(client_acts);
        thread::scope(|scope| {
            let reader = scope.spawn(|| read_slowly(&to));
            from.write_all(&vec![7; SENT]).unwrap();
            eventually("the relay has taken everything", || {
                rproxy_sys::socket::unacknowledged(from.as_fd()).unwrap() == 0
            });
            client::reset(from);
            assert_eq!(reader.join().unwrap(), (SENT, End::Reset));
        });
    }
}

fn slow_reader_is_not_idle() {
    const SENT: usize = 1_500_000;

    let relay = Relay::start(&["--idle-timeout", "400ms"]);
    for client_acts in [true, false] {
        let (mut from, to) = relay.connect_to_slow_reader(client_acts);
        // By the time that it is read, there has been nothing to move for long.
        from.write_all(&vec![7; SENT]).unwrap();
        from.shutdown(Shutdown::Write).unwrap();
        assert_eq!(read_slowly(&to), (SENT, End::Eof));
    }
}

/// A peer that writes until nobody takes anything, as one that does not read either.
fn write_until_stuck(mut stream: &TcpStream) {
    stream.set_nonblocking(true).unwrap();
    let bytes = vec![7; 256 * 1024];
    let mut stuck = 0;
    // The relay may still be about to take some.
    while stuck < 50 {
        match stream.write(&bytes) {
            Ok(_) => stuck = 0,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                stuck += 1;
                thread::sleep(Duration::from_millis(2));
            }
            Err(error) => panic!("{error}"),
        }
    }
    stream.set_nonblocking(false).unwrap();
}

/// Whichever call meets the reset, a read, a write or none, the other side hears of it.
fn reset_between_stalled_peers() {
    const CONNECTIONS: usize = 20;

    let relay = Relay::start(&[]);
    for client_acts in [true, false] {
        let pairs: Vec<_> = (0..CONNECTIONS).map(|_| relay.connect(client_acts)).collect();
        thread::scope(|scope| {
            for (one, other) in &pairs {
                scope.spawn(|| write_until_stuck(one));
                scope.spawn(|| write_until_stuck(other));
            }
        });
        let (resetting, stalled): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
        resetting.into_iter().for_each(client::reset);
        for stalled in stalled {
            let failure = || stalled.take_error().unwrap();
            eventually("the reset reaches the other side", || failure().is_some());
        }
    }
}

/// `command` under strace(1), which does something with some system calls: see "Tampering" there.
fn tampered(tampering: &str) -> impl FnOnce(Command) -> Command {
    let (call, _) = tampering.split_once(':').unwrap();
    let [trace, inject] = [format!("trace={call}"), format!("inject={tampering}")];
    move |command| {
        let mut strace = require::command("strace");
        // All other calls go on as fast as ever: what is transferred slowly is no bulk.
        strace.args(["-D", "-qq", "-f", "--seccomp-bpf", "-o", "/dev/null", "-e", &trace, "-e", &inject]);
        process::prefixed(strace, &command)
    }
}

fn answer_before_reset() {
    // As on a worker that has much else to do: the reset is there when it comes to look.
    let relay = Relay::start_by(&["--sandbox", "off"], tampered("epoll_pwait:delay_enter=50000"));
    for _ in 0..4 {
        thread::scope(|scope| {
            let backend = scope.spawn(|| {
                let (mut server, _) = relay.backend.accept().unwrap();
                server.write_all(b"421 too many\r\n").unwrap();
                client::reset(server);
            });
            let client = client::connect(relay.proxy.address());
            assert_eq!(client::read_to_end(&client), (b"421 too many\r\n".to_vec(), End::Reset));
            backend.join().unwrap();
        });
    }
}

fn splice_refused() {
    // From the start on, when a pipe is filled, and when one is emptied.
    for when in ["1+", "7+", "8+"] {
        for errno in ["EPERM", "EACCES", "ENOSYS", "EINVAL", "ENOMEM"] {
            let backend = TcpBackend::echo();
            let to = backend.address().to_string();
            let arguments = ["--sandbox", "off", "--host", "127.0.0.1:0", "--to", &to];
            let command = tampered(&format!("splice:error={errno}:when={when}"))(rproxy::command(&arguments));
            let proxy = Standalone::ready(Process::spawn(command), &arguments);
            client::exchange(&client::connect(proxy.address()), 1, 16 * 1024 * 1024);
            proxy.process.wait_for_line(Stream::Stderr, |line| line.contains("splice(2) is refused"));
        }
    }
}

/// Makes an address of the container's network swallow what is sent to it.
fn silence(host: &Namespace, address: std::net::Ipv4Addr) {
    let mut ip = require::command("ip");
    let address = address.to_string();
    ip.args(["neighbour", "replace", &address, "lladdr", "02:00:00:00:00:63", "dev", "docker0"]);
    host.spawn(ip).into_output().success();
}

fn reset_ends_dial() {
    const CLIENTS: usize = 30;

    let scene = Scene::new(json!({ "connect_timeout": "unlimited" }));
    let silent = std::net::Ipv4Addr::from(u32::from(CONTAINER_V4) + 97);
    silence(&scene.topology.host, silent);
    scene.proxy.json(&["retarget", "web", "--to", &format!("{silent}:80")]);
    scene.under_load(|| {
        let clients: Vec<_> = (0..CLIENTS).map(|_| scene.connect()).collect();
        eventually("all of them are being connected", || scene.stats()["connections"] == CLIENTS);
        clients.into_iter().for_each(client::reset);
    });
    scene.assert_nothing_left();
    assert_eq!(scene.stats()["errors"], json!({ "reset": CLIENTS }));
    // One that has only said its last word waits on.
    let client = scene.topology.client.run(|| client::connect((HOST_V4, FRONT.port()).into()));
    client.shutdown(Shutdown::Write).unwrap();
    eventually("it is being connected", || scene.stats()["connections"] == 1);
    client::reset(client);
}
