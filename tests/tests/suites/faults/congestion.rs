//! Replies that cannot be sent, because a client's address does not resolve or its link is slow. Only that client
//! waits, and no change loses the queued replies.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::json;
use socket2::{Domain, Socket, Type};

use testkit::controlled::{Controlled, mapping};
use testkit::holdings::wait_until_idle;
use testkit::load;
use testkit::process::{Process, Stream};
use testkit::require::{self, Need};
use testkit::suite::Case;
use testkit::topology::{CLIENT_V4, CLIENT_V6, CONTAINER_V4, HOST_V4, HOST_V6, Topology};
use testkit::udp::{self, Backend, assert_echoes, bind_in, relay_in};
use testkit::upgradable::Program;
use testkit::{eventually, eventually_equal};

const PORT: u16 = 5300;
const FRONT: SocketAddr = SocketAddr::new(IpAddr::V4(HOST_V4), PORT);

/// Neighbours that ask and are not there: their questions come from addresses of the client's network.
const ABSENT: usize = 100;

/// Between two of their questions: whoever floods does not keep a processor to itself.
const PAUSE: Duration = Duration::from_micros(100);

/// Exchanges of a client beside them.
const ROUNDS: usize = 200;

/// Of their questions, no more than this many may come within one exchange, by far.
const MEANWHILE: usize = 500;

pub(crate) fn cases() -> Vec<Case> {
    let case =
        |name: &str, body: fn()| super::case(name, body).needs(&[Need::Program("ss"), Need::Program("tc")]);
    vec![
        case("unreachable clients delay no others", absent_neighbours),
        case("unreachable clients delay no others, IPv4 over dual stack", absent_neighbours_dual_stack),
        case("unreachable clients delay no others, IPv6", absent_neighbours_v6),
        case("unreachable clients delay no others, another user", absent_neighbours_of_a_user),
        case("unreachable clients delay no others, flows come and go", absent_neighbours_that_change),
        case("a client behind a slow link delays no others", slow_link),
        case("clients behind one slow link share it", shared_link),
        case("queued replies survive their mapping", removal),
        case("queued replies survive the signal to end", end_of_the_process),
        case("replies that are lost before the end", lost_at_the_end),
        case("queued replies survive the end of their socket", destroyed),
        case("queued replies survive an upgrade", upgrade),
        case("nothing is left after congestion", over),
        case("queued replies are accounted for when flows end", retarget),
    ]
}

/// A socket that sends from an address which is not there.
fn absent(net: &Topology, address: IpAddr, to: SocketAddr) -> UdpSocket {
    let address = SocketAddr::new(address, 7000);
    net.client.run(|| {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None).unwrap();
        if address.is_ipv4() {
            socket.set_ip_transparent_v4(true).unwrap();
        } else {
            socket.set_ip_transparent_v6(true).unwrap();
        }
        socket.bind(&address.into()).unwrap();
        socket.connect(&to.into()).unwrap();
        socket.into()
    })
}

/// Sockets towards single clients that the proxy has.
fn client_sockets(net: &Topology) -> usize {
    let mut ss = require::command("ss");
    // Those that are about to be closed are connected to themselves.
    ss.args(["--udp", "--numeric", "--no-header", "state", "established", "sport", "=", ":5300"]);
    ss.args(["and", "not", "dport", "=", ":5300"]);
    net.host.spawn(ss).into_output().success().lines().count()
}

fn assert_absent_ones_wait_alone(
    listening: &str,
    more: &[&str],
    asked: SocketAddr,
    addresses: impl Fn(u16) -> IpAddr,
) {
    let net = Topology::new();
    let _backend = Backend::echo(bind_in(&net.container, (CONTAINER_V4, PORT)));
    let proxy = relay_in(&net.host, listening, (CONTAINER_V4, PORT), more);
    let own: IpAddr = if asked.is_ipv4() { CLIENT_V4.into() } else { CLIENT_V6.into() };
    let client = bind_in(&net.client, (own, 0));
    let sockets: Vec<_> =
        (0..ABSENT).map(|number| absent(&net, addresses(u16::try_from(number).unwrap()), asked)).collect();
    let ask = |number: usize| {
        sockets[number % ABSENT].send(&[0; 1_200]).ok();
        thread::sleep(PAUSE);
    };
    load::meanwhile(1, ask, |asked_for| {
        eventually("some have sockets of their own", || client_sockets(&net) > 0);
        let before = asked_for.begun();
        for number in 0..ROUNDS {
            assert_echoes(&client, asked, &number.to_be_bytes());
        }
        let meanwhile = (asked_for.begun() - before) / ROUNDS;
        assert!(meanwhile < MEANWHILE, "{meanwhile} questions of others within each exchange");
    });
    assert!(proxy.process.is_running());
}

fn absent_v4(number: u16) -> IpAddr {
    Ipv4Addr::from_bits(Ipv4Addr::new(10, 0, 0, 100).to_bits() + u32::from(number)).into()
}

/// Their answers wait for ARP in the kernel.
fn absent_neighbours() {
    assert_absent_ones_wait_alone("0.0.0.0:5300", &["--sandbox", "strict"], FRONT, absent_v4);
}

/// There are fewer flows than of them, so that each displaces another one, whatever is known of that.
fn absent_neighbours_that_change() {
    let caps = ["--udp-max-flows", "60", "--udp-max-flows-per-source", "60"];
    assert_absent_ones_wait_alone("0.0.0.0:5300", &caps, FRONT, absent_v4);
}

/// The process goes on as another user than the one who opened the listener.
fn absent_neighbours_of_a_user() {
    assert_absent_ones_wait_alone("0.0.0.0:5300", &["--user", "nobody"], FRONT, absent_v4);
}

/// As the listener sees them, they are of its family.
fn absent_neighbours_dual_stack() {
    assert_absent_ones_wait_alone("[::]:5300", &[], FRONT, absent_v4);
}

/// Their answers wait for neighbour discovery.
fn absent_neighbours_v6() {
    let address = |number| Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 1, number).into();
    assert_absent_ones_wait_alone("[::]:5300", &[], (HOST_V6, PORT).into(), address);
}

/// Whether the proxy's way out is full: its sockets for clients have sent more than a few datagrams that are still here.
fn is_full(net: &Topology) -> bool {
    let mut ss = require::command("ss");
    ss.args(["--udp", "--all", "--numeric", "--no-header", "sport", "=", ":5300"]);
    let listed = net.host.spawn(ss).into_output().success();
    let sent = listed.lines().filter_map(|line| line.split_whitespace().nth(2)?.parse::<usize>().ok());
    sent.sum::<usize>() > 500_000
}

/// What leaves for this address of the client's leaves slowly, by a queue of its own.
const SLOW: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 13);

fn slow_client(net: &Topology, rate: &str) -> UdpSocket {
    net.client.address("eth0", &format!("{SLOW}/24"));
    let tc = |arguments: &str| net.host.command(&format!("tc {arguments}")).success();
    tc("qdisc add dev eth0 root handle 1: htb default 2");
    tc(&format!("class add dev eth0 parent 1: classid 1:1 htb rate {rate}"));
    tc("class add dev eth0 parent 1: classid 1:2 htb rate 10gbit");
    tc("qdisc add dev eth0 parent 1:1 handle 10: bfifo limit 100mb");
    tc(&format!("filter add dev eth0 parent 1: protocol ip u32 match ip dst {SLOW} flowid 1:1"));
    bind_in(&net.client, (SLOW, 0))
}

/// One client's link is slow, and its answers are many; another's comes to its answers, and the slow one's questions
/// arrive.
fn slow_link() {
    let net = Topology::new();
    let slow = slow_client(&net, "1mbit");
    let backend = bind_in(&net.container, (CONTAINER_V4, PORT));
    let proxy = relay_in(&net.host, "0.0.0.0:5300", (CONTAINER_V4, PORT), &[]);
    let client = bind_in(&net.client, (CLIENT_V4, 0));
    let [to_slow, to_client] = [&slow, &client].map(|client| {
        client.send_to(b"hello", FRONT).unwrap();
        udp::receive(&backend).1
    });
    let flood = backend.try_clone().unwrap();
    let answer = |_number| {
        flood.send_to(&[0; 1_200], to_slow).ok();
        thread::sleep(PAUSE);
    };
    load::meanwhile(1, answer, |sent| {
        eventually("the way out is full", || is_full(&net));
        let before = sent.begun();
        for number in 0..ROUNDS {
            for (asking, flow) in [(&client, to_client), (&slow, to_slow)] {
                asking.send_to(&number.to_be_bytes(), FRONT).unwrap();
                assert_eq!(udp::receive(&backend), (number.to_be_bytes().to_vec(), flow));
            }
            backend.send_to(&number.to_be_bytes(), to_client).unwrap();
            assert_eq!(udp::receive(&client).0, number.to_be_bytes());
        }
        let meanwhile = (sent.begun() - before) / ROUNDS;
        assert!(meanwhile < MEANWHILE, "{meanwhile} answers to the slow one within each exchange");
    });
    assert!(proxy.process.is_running());
}

/// More answers than the listener's buffer and that of a socket towards the client hold, but not more than the buffer of
/// the flow does: the relay may not get to run while they are sent.
const ANSWERS: usize = 3_000;

/// Has answers wait, calls `change`, and checks that all of them come.
fn assert_all_come(net: &Topology, change: impl FnOnce()) {
    let slow = slow_client(net, "20mbit");
    let backend = bind_in(&net.container, (CONTAINER_V4, PORT));
    slow.send_to(b"hello", FRONT).unwrap();
    let flow = udp::receive(&backend).1;
    for number in 0..ANSWERS {
        backend.send_to(&udp::pattern(number, 1_200), flow).unwrap();
    }
    eventually("the way out is full", || is_full(net));
    change();
    for number in 0..ANSWERS {
        let (answer, from) = udp::receive(&slow);
        assert_eq!((answer.len(), from), (1_200, FRONT), "answer {number}");
    }
}

/// Changes what a mapping is served by while answers wait.
fn assert_survive(change: impl FnOnce(&Controlled)) {
    let net = Topology::new();
    let proxy = Controlled::start_in(&net.host, &[]);
    proxy.apply(&[mapping("front", "udp", FRONT, (CONTAINER_V4, PORT).into())]).success();
    assert_all_come(&net, || change(&proxy));
}

/// Of a mapping that is removed.
fn removal() {
    assert_survive(|proxy| drop(proxy.ctl(&["remove", "front"]).success()));
}

/// Of a process that is told to end.
fn end_of_the_process() {
    assert_survive(|proxy| proxy.process.signal(Signal::SIGTERM));
}

/// More replies come while the process does not run than the buffer of the flow holds, and none behind them: the loss is
/// reported before the process ends.
fn lost_at_the_end() {
    let backend = udp::local();
    let proxy = udp::relay(Ipv4Addr::LOCALHOST, udp::address(&backend), &[]);
    let client = udp::local();
    client.send_to(b"hello", proxy.address()).unwrap();
    let flow = udp::receive(&backend).1;
    proxy.process.pause();
    for _ in 0..2 * ANSWERS {
        backend.send_to(&[0; 1_200], flow).unwrap();
    }
    proxy.process.signal(Signal::SIGTERM);
    proxy.process.resume();
    let lost = |line: &str| line.contains("datagrams lost") && line.contains("no_buffer=");
    proxy.process.wait_for_line(Stream::Stderr, lost);
    assert!(proxy.process.wait().success());
}

/// All clients share the link that is full, and ask for as much as each other: they get as much.
fn shared_link() {
    const CLIENTS: usize = 30;
    const EACH: usize = 200;
    let net = Topology::new();
    net.host.command("tc qdisc add dev eth0 root handle 1: htb default 1").success();
    net.host.command("tc class add dev eth0 parent 1: classid 1:1 htb rate 20mbit").success();
    // As many packets as the queue of a device has by default.
    net.host.command("tc qdisc add dev eth0 parent 1:1 handle 10: pfifo limit 1000").success();
    let backend = bind_in(&net.container, (CONTAINER_V4, PORT));
    let _proxy = relay_in(&net.host, "0.0.0.0:5300", (CONTAINER_V4, PORT), &[]);
    let clients: Vec<_> = (0..CLIENTS).map(|_| bind_in(&net.client, (CLIENT_V4, 0))).collect();
    let flows: Vec<_> = clients
        .iter()
        .map(|client| {
            client.send_to(b"hello", FRONT).unwrap();
            udp::receive(&backend).1
        })
        .collect();
    for _ in 0..EACH {
        for flow in &flows {
            backend.send_to(&[0; 1_400], flow).unwrap();
        }
    }
    let got = |client: &UdpSocket| {
        client.set_nonblocking(true).unwrap();
        std::iter::from_fn(|| client.recv(&mut [0]).ok()).count()
    };
    let mut sums = vec![0; CLIENTS];
    let mut total = || {
        sums.iter_mut().zip(&clients).for_each(|(sum, client)| *sum += got(client));
        (sums.iter().sum::<usize>(), sums.iter().min().copied(), sums.iter().max().copied())
    };
    // Half of it: from then on, some have all.
    let mut shares = (0, None, None);
    eventually("half of the answers arrive", || {
        shares = total();
        shares.0 >= CLIENTS * EACH / 2
    });
    let (_sum, least, most) = shares;
    assert!(least.unwrap() * 2 >= most.unwrap(), "one has {least:?} answers, and another one {most:?}");
    eventually("nearly all arrive: what is sent fits the queue", || total().0 >= CLIENTS * EACH * 9 / 10);
}

/// A socket towards a client is destroyed while answers wait for it: they go by way of the listener.
fn destroyed() {
    let net = Topology::new();
    let proxy = relay_in(&net.host, "0.0.0.0:5300", (CONTAINER_V4, PORT), &[]);
    let destroy = || {
        let mut ss = require::command("ss");
        ss.args([
            "--kill",
            "--udp",
            "--numeric",
            "--no-header",
            "state",
            "established",
            "sport",
            "=",
            ":5300",
        ]);
        net.host.spawn(ss).into_output().success();
    };
    assert_all_come(&net, || (0..20).for_each(|_| destroy()));
    assert!(proxy.process.is_running());
}

/// Once the way out is free, there is nothing but the listener again, and an idle process is idle.
fn over() {
    let net = Topology::new();
    let proxy = relay_in(&net.host, "0.0.0.0:5300", (CONTAINER_V4, PORT), &[]);
    let before = proxy.process.descriptors();
    assert_all_come(&net, || ());
    eventually("there are no sockets towards clients", || client_sockets(&net) == 0);
    eventually_equal("its descriptors, with one for the flow", &(before + 1), || proxy.process.descriptors());
    wait_until_idle(proxy.process.pid());
}

/// Of a process that another one takes over from.
fn upgrade() {
    let net = Topology::new();
    let program = Program::new();
    let backend = SocketAddr::from((CONTAINER_V4, PORT)).to_string();
    let arguments = ["--proto", "udp", "--host", "0.0.0.0:5300", "--to", &backend];
    let old: Process = net.host.spawn(program.command(&arguments));
    old.wait_for_line(Stream::Stderr, |line| line.contains("confined"));
    assert_all_come(&net, || old.signal(Signal::SIGUSR2));
}

/// Of a flow that leads to another backend from now on: what the old one answered is there for those to come.
fn retarget() {
    let net = Topology::new();
    let proxy = Controlled::start_in(&net.host, &[]);
    proxy.apply(&[mapping("front", "udp", FRONT, (CONTAINER_V4, PORT).into())]).success();
    let slow = slow_client(&net, "5mbit");
    let backend = bind_in(&net.container, (CONTAINER_V4, PORT));
    slow.send_to(b"hello", FRONT).unwrap();
    let flow = udp::receive(&backend).1;
    for _ in 0..ANSWERS {
        backend.send_to(&[0; 1_200], flow).unwrap();
    }
    eventually("the way out is full", || is_full(&net));
    proxy.apply(&[mapping("front", "udp", FRONT, (CONTAINER_V4, PORT + 1).into())]).success();
    let all = || {
        let stats = proxy.stats("front");
        let count = |value: &serde_json::Value| value.as_u64().unwrap_or(0);
        count(&stats["datagrams_out"]) + count(&stats["errors"]["no_buffer"])
    };
    eventually("each answer is relayed or counted", || all() == ANSWERS as u64);
    assert_eq!(
        proxy.stats("front")["errors"].as_object().unwrap().len(),
        1,
        "{}",
        json!(proxy.stats("front"))
    );
}
