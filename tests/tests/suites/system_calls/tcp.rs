//! Connections.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::Duration;

use nix::sys::sendfile::sendfile;
use testkit::backend::TcpBackend;
use testkit::client;
use testkit::eventually;
use testkit::netns::Namespace;
use testkit::process;
use testkit::require::{self, Need};
use testkit::role;
use testkit::rproxy::Standalone;
use testkit::suite::Case;
use testkit::trace::{Calls, Trace};

use super::{UNRECORDED_AND_RECORDED, WAITS, case};
use crate::faults::roles;

const MIB: usize = 1024 * 1024;

pub(crate) fn cases() -> Vec<Case> {
    let net = |name: &str, body: fn()| case(name, body).needs(&[Need::Root, Need::Program("ip")]);
    vec![
        case("connections", connections),
        case("the handshake with the backend waits for the client's bytes", late_handshake),
        case("requests on a connection", requests),
        net("a transfer to the backend is spliced", transfer_to_backend),
        net("a transfer to the client is spliced", transfer_to_client),
        net("a steady transfer is woken up rarely", few_wake_ups),
        net("responses are spliced through one pipe", responses),
        net("short responses are spliced, too", short_responses),
        net("what is written passes in more at a time than a file", written_and_file),
        net("responses are copied while there are no pipes", responses_without_pipes)
            .needs(&[Need::Program("setpriv")]),
    ]
}

/// A relay to `backend`, all of whose workers have started.
fn relay(backend: SocketAddr, options: &[&str]) -> Standalone {
    let proxy = Standalone::relay_to(backend, options);
    let most = thread::available_parallelism().unwrap().get();
    let clients: Vec<_> = (0..2 * most).map(|_| client::connect(proxy.address())).collect();
    // Their ends are over as well when this returns.
    for client in &clients {
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client::read_to_end(client).0, b"");
    }
    proxy
}

fn connections() {
    UNRECORDED_AND_RECORDED.into_iter().for_each(connections_with);
}

fn connections_with(options: &[&str]) {
    const COUNT: usize = 100;
    let backend = TcpBackend::echo();
    let proxy = relay(backend.address(), options);
    let trace = Trace::attach(&proxy.process);
    for _ in 0..COUNT {
        assert_eq!(client::ask(proxy.address(), b"request").unwrap(), b"request");
    }
    let calls = trace.finish();
    let room = COUNT / 2;
    // One more finds that there is no other client.
    calls.assert_at_most(2 * COUNT + room, &["accept4"]);
    calls.assert_at_most(COUNT + room, &["socket"]);
    calls.assert_at_most(COUNT + room, &["connect"]);
    // Both sockets are watched until they are closed.
    calls.assert_at_most(4 * COUNT + room, &["epoll_ctl"]);
    // The request, the answer, and an end of each: the second one may be known from an event.
    calls.assert_at_most(4 * COUNT + room, &["recvfrom"]);
    calls.assert_at_most(2 * COUNT + room, &["sendto"]);
    // accept4(2) says who it is, and makes a socket that does not block.
    calls.assert_at_most(room, &["getpeername", "fcntl", "ioctl", "splice", "pipe2"]);
    calls.assert_at_most(COUNT + room, &["getsockname"]);
    calls.assert_at_most(12 * COUNT + room, &["setsockopt"]);
    // The vDSO tells the time (vdso(7)).
    calls.assert_at_most(room, &["clock_gettime"]);
    calls.assert_in_all_at_most(ALL_OF_A_CONNECTION * COUNT);
}

/// Calls of any kind for a connection with a request and an answer.
const ALL_OF_A_CONNECTION: usize = 40;

/// The last segment of the handshake with the backend goes with the client's first bytes if they are there (tcp(7),
/// `TCP_QUICKACK`), and at once if not.
fn late_handshake() {
    let backend = TcpBackend::echo();
    let proxy = relay(backend.address(), &[]);
    let of_silent = Trace::attach(&proxy.process);
    let silent = client::connect(proxy.address());
    // The relay waits for it by then.
    let calls = of_silent.finish_after("connect");
    assert_eq!(quick_acknowledgements(&calls), 1, "{:?}", calls.by_name());
    drop(silent);

    proxy.process.pause();
    let eager = client::connect(proxy.address());
    (&eager).write_all(b"hello").unwrap();
    let of_eager = Trace::attach(&proxy.process);
    proxy.process.resume();
    (&eager).read_exact(&mut [0; 5]).unwrap();
    assert_eq!(quick_acknowledgements(&of_eager.finish()), 0);
}

fn quick_acknowledgements(calls: &Calls) -> usize {
    let set = calls.named(&["setsockopt"]);
    set.filter(|call| call.arguments.contains("TCP_QUICKACK, [1]")).count()
}

fn requests() {
    UNRECORDED_AND_RECORDED.into_iter().for_each(requests_with);
}

fn requests_with(options: &[&str]) {
    const COUNT: usize = 200;
    let backend = TcpBackend::echo();
    let proxy = relay(backend.address(), options);
    let client = client::connect(proxy.address());
    client::ping(&client);
    let trace = Trace::attach(&proxy.process);
    for _ in 0..COUNT {
        client::ping(&client);
    }
    let calls = trace.finish();
    // No call finds that there is nothing more.
    calls.assert_at_most(2 * COUNT + COUNT / 2, &["recvfrom"]);
    calls.assert_at_most(2 * COUNT + COUNT / 2, &["sendto"]);
    // The event loop's, and that of the sockets.
    calls.assert_at_most(6 * COUNT, &WAITS);
    calls.assert_at_most(
        COUNT / 10,
        &["epoll_ctl", "setsockopt", "getsockopt", "ioctl", "fcntl", "clock_gettime"],
    );
    calls.assert_in_all_at_most(11 * COUNT);
}

/// A relay in a namespace of its own, whose sockets have room for a lot from the start: that they are slow to get it
/// would hide whether a lot is moved at a time.
struct Bulk {
    namespace: Namespace,
    proxy: Standalone,
    _backend: TcpBackend,
}

impl Bulk {
    fn to(handler: impl Fn(&TcpStream) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self::started(handler, Standalone::start_in)
    }

    /// With a relay that `start` starts with these arguments.
    fn started(
        handler: impl Fn(&TcpStream) -> io::Result<()> + Send + Sync + 'static,
        start: impl FnOnce(&Namespace, &[&str]) -> Standalone,
    ) -> Self {
        let namespace = Namespace::new();
        let sizes = format!("4096 {MIB} {}", 8 * MIB);
        namespace.run(|| fs::write("/proc/sys/net/ipv4/tcp_rmem", sizes)).unwrap();
        let listener = namespace.run(|| TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let backend = TcpBackend::serve(listener, handler);
        let to = backend.address().to_string();
        let proxy = start(&namespace, &["--host", "127.0.0.1:0", "--to", &to]);
        Self { namespace, proxy, _backend: backend }
    }

    /// The calls that it takes to relay what a client does.
    fn calls(&self, transfer: impl FnOnce(&TcpStream)) -> Calls {
        let client = self.namespace.run(|| client::connect(self.proxy.address()));
        let trace = Trace::attach(&self.proxy.process);
        transfer(&client);
        trace.finish()
    }

    /// Checks that there are transfers most of whose bytes never come into the process: not each, as whether a lot is
    /// there at a time depends on the machine.
    #[track_caller]
    fn assert_spliced(&self, transfer: impl Fn(&TcpStream)) {
        eventually("most of a transfer is spliced", || {
            let calls = self.calls(&transfer);
            // Each byte goes into a pipe and out of it.
            let is_spliced = calls.sum(&["splice"]) / 2 > TRANSFER / 2;
            if is_spliced {
                calls.assert_in_all_at_most(CALLS_PER_MIB * TRANSFER / MIB);
            }
            is_spliced
        });
    }
}

const TRANSFER: usize = 64 * MIB;

/// Calls of any kind for a mebibyte; copying takes a multiple of that.
const CALLS_PER_MIB: usize = 20;

/// Takes all that a client says, and says how much that was.
fn count_all(mut stream: &TcpStream) -> io::Result<()> {
    let received = io::copy(&mut stream, &mut io::sink())?;
    stream.write_all(received.to_string().as_bytes())
}

fn transfer_to_backend() {
    Bulk::to(count_all).assert_spliced(|mut client| {
        client.write_all(&vec![7; TRANSFER]).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client::read_to_end(client).0, TRANSFER.to_string().as_bytes());
    });
}

fn transfer_to_client() {
    let answer = |mut stream: &TcpStream| {
        stream.read_exact(&mut [0])?;
        stream.write_all(&vec![7; TRANSFER])
    };
    Bulk::to(answer).assert_spliced(|mut client| {
        client.write_all(b"!").unwrap();
        assert_eq!(client::read_to_end(client).0.len(), TRANSFER);
    });
}

/// A transfer that lasts raises the low watermark of its source (`SO_RCVLOWAT`), and lowers it again at its end.
fn few_wake_ups() {
    let bulk = Bulk::to(count_all);
    // When the relay finds nothing there depends on the machine.
    eventually("the source's watermark is raised", || {
        let calls = bulk.calls(|mut client| {
            for _ in 0..TRANSFER / CHUNK {
                client.write_all(&[7; CHUNK]).unwrap();
                // The relay catches up.
                thread::sleep(Duration::from_micros(100));
            }
            client.shutdown(Shutdown::Write).unwrap();
            assert_eq!(client::read_to_end(client).0, TRANSFER.to_string().as_bytes());
        });
        let set = calls.named(&["setsockopt"]).filter(|call| call.arguments.contains("SO_RCVLOWAT"));
        let set: Vec<_> = set.map(|call| &*call.arguments).collect();
        assert!(set.last().is_none_or(|last| last.contains("[1]")), "it is not lowered: {set:?}");
        !set.is_empty()
    });
}

const CHUNK: usize = MIB / 8;

/// Responses on a connection, each to a request: far too short to last.
const RESPONSE: usize = MIB / 4;
const RESPONSES: usize = 100;

fn respond(mut stream: &TcpStream) -> io::Result<()> {
    let mut request = [0];
    while stream.read(&mut request)? > 0 {
        stream.write_all(&[7; RESPONSE])?;
    }
    Ok(())
}

fn fetch(mut client: &TcpStream) {
    let mut response = vec![0; RESPONSE];
    for _ in 0..RESPONSES {
        client.write_all(b"?").unwrap();
        client.read_exact(&mut response).unwrap();
    }
}

fn responses() {
    let bulk = Bulk::to(respond);
    eventually("most bytes of the responses are spliced", || {
        let calls = bulk.calls(fetch);
        // A second one for a client that was full.
        calls.assert_at_most(4, &["pipe2"]);
        // Neither a watermark nor a timer is for what is over soon.
        let raised = calls.named(&["setsockopt"]).filter(|call| call.arguments.contains("SO_RCVLOWAT"));
        assert_eq!(raised.count(), 0);
        // Each byte goes into a pipe and out of it.
        calls.sum(&["splice"]) / 2 > RESPONSES * RESPONSE * 3 / 4
    });
}

fn short_responses() {
    const RESPONSE: usize = 24 * 1024;

    let answer = |mut stream: &TcpStream| {
        let mut request = [0];
        while stream.read(&mut request)? > 0 {
            stream.write_all(&[7; RESPONSE])?;
        }
        Ok(())
    };
    let bulk = Bulk::to(answer);
    let fetch = |mut client: &TcpStream| {
        for _ in 0..RESPONSES {
            client.write_all(b"?").unwrap();
            client.read_exact(&mut [0; RESPONSE]).unwrap();
        }
    };
    // A machine that pauses within a response makes it two short ones.
    eventually("most bytes of the responses are spliced", || {
        bulk.calls(fetch).sum(&["splice"]) / 2 > RESPONSES * RESPONSE * 3 / 4
    });
}

/// The fragments of a file are pages, of which a pipe that is larger than what goes to the socket at a time would make more
/// packets.
fn written_and_file() {
    let passed_at_once = |backend: Bulk| {
        let calls = backend.calls(fetch);
        let taken = calls.named(&["splice"]).filter_map(|call| usize::try_from(call.result).ok());
        taken.filter(|&taken| taken > 64 * 1024).sum::<usize>() / 2
    };
    let all = RESPONSES * RESPONSE;
    eventually("more is taken at a time of what is written", || passed_at_once(Bulk::to(respond)) > all / 4);
    eventually("no more is taken at a time of a file", || {
        passed_at_once(Bulk::to(respond_with_file)) < all / 16
    });
}

fn respond_with_file(mut stream: &TcpStream) -> io::Result<()> {
    let file = tempfile::tempfile()?;
    (&file).write_all(&[7; RESPONSE])?;
    let mut request = [0];
    while stream.read(&mut request)? > 0 {
        let mut sent = 0;
        while sent < RESPONSE {
            let mut offset = sent.try_into().expect("a small file");
            sent += sendfile(stream, &file, Some(&mut offset), RESPONSE - sent)?;
        }
    }
    Ok(())
}

fn responses_without_pipes() {
    // A user that nobody else is, whose pipes are all taken.
    let as_user = |command: &Command| {
        let mut setpriv = require::command("setpriv");
        setpriv.args(["--reuid=64124", "--regid=64124", "--clear-groups"]);
        process::prefixed(setpriv, command)
    };
    let bulk = Bulk::started(respond, |namespace, arguments| {
        let command = as_user(&testkit::rproxy::command(arguments));
        Standalone::ready(namespace.spawn(command), arguments)
    });
    let _hog = roles::ready(bulk.namespace.spawn(as_user(&role::command(&["pipes"]))));
    let calls = bulk.calls(fetch);
    assert_eq!(calls.sum(&["splice"]), 0);
    assert!(calls.sum(&["sendto"]) >= RESPONSES * RESPONSE);
    // An attempt costs several calls.
    calls.assert_at_most(RESPONSES / 5, &["pipe2"]);
}
