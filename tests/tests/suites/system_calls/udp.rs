//! Datagrams. The relay is stopped while they are sent, so that it receives all of them at once.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};

use nix::sys::socket::{setsockopt, sockopt};
use testkit::process::Stream;
use testkit::rproxy::Standalone;
use testkit::suite::Case;
use testkit::trace::{Calls, Trace};
use testkit::udp::{self, Backend};

use super::{UNRECORDED_AND_RECORDED, WAITS, case};

/// Datagrams in a burst: no more than one call receives.
const BURST: usize = 60;

/// Calls of a kind that a burst may take beside those that it has to.
const ROOM: usize = 4;

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("datagrams of one client", of_one_client),
        case("datagrams of one size", of_one_size),
        case("datagrams of many clients", of_many_clients),
        case("replies of one size", answers_of_one_size),
        case("replies to many clients", answers_to_many_clients),
        case("a request and its reply", question_and_answer),
        case("a new flow", new_flow),
    ]
}

/// A relay to a backend in the hands of the test.
struct Scene {
    proxy: Standalone,
    backend: UdpSocket,
}

impl Scene {
    fn new() -> Self {
        let backend = udp::local();
        let proxy = udp::relay(Ipv4Addr::LOCALHOST, backend.local_addr().unwrap(), &[]);
        Self { proxy, backend }
    }

    /// Clients, and where the backend sees each of them.
    fn clients(&self, count: usize) -> Vec<(UdpSocket, SocketAddr)> {
        let open = || {
            let client = udp::local();
            client.connect(self.proxy.address()).unwrap();
            client.send(b"hello").unwrap();
            (client, udp::receive(&self.backend).1)
        };
        (0..count).map(|_| open()).collect()
    }

    /// The calls that it takes to relay what `send` sends while the relay is stopped. `receive` waits for it.
    fn burst(&self, send: impl FnOnce(), receive: impl FnOnce()) -> Calls {
        self.proxy.process.pause();
        send();
        let trace = Trace::attach(&self.proxy.process);
        self.proxy.process.resume();
        receive();
        let calls = trace.finish();
        assert!(calls.sum(&["recvmmsg"]) > 0 && calls.sum(&["sendmmsg"]) > 0, "{:?}", calls.by_name());
        calls
    }
}

/// Checks what holds for any burst on flows that are there: no other call than those that move datagrams, and those that
/// say which sockets have some.
fn assert_nothing_else(calls: &Calls) {
    let moving = calls.count(&["recvmmsg", "sendmmsg"]) + calls.count(&WAITS);
    let others = calls.len() - moving;
    assert!(others <= 2 * ROOM, "{others} other calls: {:?}", calls.by_name());
}

fn of_one_client() {
    let scene = Scene::new();
    let (client, _flow) = scene.clients(1).remove(0);
    // Of those that get larger, no two make a GSO batch.
    let send = || (1..=BURST).for_each(|size| assert_eq!(client.send(&vec![7; size]).unwrap(), size));
    let receive = || (1..=BURST).for_each(|size| assert_eq!(udp::receive(&scene.backend).0.len(), size));
    let calls = scene.burst(send, receive);
    calls.assert_at_most(1 + ROOM, &["recvmmsg"]);
    calls.assert_at_most(1 + ROOM, &["sendmmsg"]);
    calls.assert_at_most(2 * ROOM, &WAITS);
    assert_nothing_else(&calls);
}

fn of_one_size() {
    let scene = Scene::new();
    let (client, _flow) = scene.clients(1).remove(0);
    let send = || (0..BURST).for_each(|_| assert_eq!(client.send(&[7; 500]).unwrap(), 500));
    let receive = || (0..BURST).for_each(|_| assert_eq!(udp::receive(&scene.backend).0.len(), 500));
    let calls = scene.burst(send, receive);
    assert_gso(&calls);
    assert_nothing_else(&calls);
}

/// Checks that a burst left as few messages, each of many datagrams.
#[track_caller]
fn assert_gso(calls: &Calls) {
    let messages = calls.sum(&["sendmmsg"]);
    assert!(messages <= ROOM, "{messages} messages for {BURST} datagrams: {:?}", calls.by_name());
}

fn of_many_clients() {
    let scene = Scene::new();
    let clients = scene.clients(BURST);
    let send = || {
        for (client, _flow) in &clients {
            client.send(b"question").unwrap();
        }
    };
    let receive = || (0..BURST).for_each(|_| assert_eq!(udp::receive(&scene.backend).0, b"question"));
    let calls = scene.burst(send, receive);
    // Each has a socket towards the backend.
    calls.assert_at_most(1 + ROOM, &["recvmmsg"]);
    calls.assert_at_most(BURST + ROOM, &["sendmmsg"]);
    calls.assert_at_most(2 * ROOM, &WAITS);
    assert_nothing_else(&calls);
}

fn answers_of_one_size() {
    let scene = Scene::new();
    let (client, flow) = scene.clients(1).remove(0);
    // Some backends send GSO batches themselves (QUIC), which loopback hands over as they are.
    setsockopt(&scene.backend, sockopt::UdpGsoSegment, &500).unwrap();
    let send = || assert_eq!(scene.backend.send_to(&[7; 500 * BURST], flow).unwrap(), 500 * BURST);
    let receive = || (0..BURST).for_each(|_| assert_eq!(udp::receive(&client).0.len(), 500));
    let calls = scene.burst(send, receive);
    let received = calls.sum(&["recvmmsg"]);
    assert!(received <= ROOM, "{received} messages were received: {:?}", calls.by_name());
    assert_gso(&calls);
    assert_nothing_else(&calls);
}

fn answers_to_many_clients() {
    let scene = Scene::new();
    let clients = scene.clients(BURST);
    let answer = |number: usize| format!("answer {number}").into_bytes();
    let send = || {
        for (number, (_client, flow)) in clients.iter().enumerate() {
            scene.backend.send_to(&answer(number), *flow).unwrap();
        }
    };
    let receive = || {
        for (number, (client, _flow)) in clients.iter().enumerate() {
            assert_eq!(udp::receive(client).0, answer(number));
        }
    };
    let calls = scene.burst(send, receive);
    // They come from a socket each, and leave by one.
    calls.assert_at_most(BURST + ROOM, &["recvmmsg"]);
    calls.assert_at_most(1 + ROOM, &["sendmmsg"]);
    calls.assert_at_most(2 * ROOM, &WAITS);
    assert_nothing_else(&calls);
}

fn question_and_answer() {
    UNRECORDED_AND_RECORDED.into_iter().for_each(question_and_answer_with);
}

fn question_and_answer_with(options: &[&str]) {
    const COUNT: usize = 200;
    let backend = Backend::echo(udp::local());
    let proxy = udp::relay(Ipv4Addr::LOCALHOST, backend.address(), options);
    let client = udp::local();
    udp::assert_echoes(&client, proxy.address(), b"hello");
    let trace = Trace::attach(&proxy.process);
    for _ in 0..COUNT {
        udp::assert_echoes(&client, proxy.address(), b"question");
    }
    let calls = trace.finish();
    calls.assert_at_most(2 * COUNT + COUNT / 2, &["recvmmsg"]);
    calls.assert_at_most(2 * COUNT + COUNT / 2, &["sendmmsg"]);
    calls.assert_at_most(8 * COUNT, &WAITS);
    calls.assert_at_most(
        COUNT / 10,
        &["epoll_ctl", "setsockopt", "getsockopt", "madvise", "mmap", "munmap", "clock_gettime"],
    );
    calls.assert_in_all_at_most(13 * COUNT);
    // Nothing was lost, and the log does not say so.
    let log = proxy.process.captured(Stream::Stderr);
    assert!(!log.contains("lost"), "{log}");
}

fn new_flow() {
    UNRECORDED_AND_RECORDED.into_iter().for_each(new_flow_with);
}

fn new_flow_with(options: &[&str]) {
    const COUNT: usize = 100;
    let backend = Backend::echo(udp::local());
    let proxy = udp::relay(Ipv4Addr::LOCALHOST, backend.address(), options);
    let clients: Vec<_> = (0..COUNT).map(|_| udp::local()).collect();
    udp::assert_echoes(&udp::local(), proxy.address(), b"the first one");
    let trace = Trace::attach(&proxy.process);
    clients.iter().for_each(|client| udp::assert_echoes(client, proxy.address(), b"hello"));
    let calls = trace.finish();
    let room = COUNT / 4;
    calls.assert_at_most(COUNT + room, &["socket"]);
    calls.assert_at_most(COUNT + room, &["bind"]);
    calls.assert_at_most(COUNT + room, &["connect"]);
    calls.assert_at_most(COUNT + room, &["epoll_ctl"]);
    // The kernel's settings are read again after some time only.
    calls.assert_at_most(room, &["pread64", "clock_gettime"]);
    calls.assert_in_all_at_most(ALL_OF_A_FLOW * COUNT);
}

/// Calls of any kind for a flow with a question and an answer.
const ALL_OF_A_FLOW: usize = 25;
