//! Properties of the TCP relay, through a real `rproxy` on loopback: whatever the sizes, the pauses and the end of a
//! connection, the bytes sent are the bytes received.

use std::cell::Cell;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use socket2::SockRef;

use testkit::PATIENCE;
use testkit::client::{self, End};
use testkit::mptcp;
use testkit::pattern::Pattern;
use testkit::process::Process;
use testkit::require::Need;
use testkit::rproxy::Standalone;
use testkit::suite::Case;
use testkit::systemd::Systemd;

use crate::proxy_protocol::{receives, told, v1, v2};

const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &'static str, body: fn()| (name, body);
    let cases = [
        case("both directions carry any sizes at any pace", any_sizes_at_any_pace),
        case("64 MiB each way at once", large_both_ways),
        case("64 MiB to a slow reader", large_to_slow_reader),
        case("64 MiB of small writes", large_in_small_writes),
        case("no byte is held back for the next", no_byte_waits),
        case("what is sent just before a close arrives", sent_before_close_arrives),
        case("an end that comes with the last bytes", end_with_last_bytes),
        case("a half-closed connection continues", half_closed_goes_on),
        case("an urgent byte keeps its place", urgent_byte_keeps_its_place),
        case("a reset is propagated as a reset", reset_is_passed_on),
        case("a reset reaches a reader that stalls", reset_reaches_stalled_reader),
        case("a reset during a stall is still a reset", reset_during_stall),
        case("a reset reaches a peer that has seen the end", reset_reaches_peer_after_eof),
        case("a reset of one connection leaves the others alone", reset_leaves_others_alone),
        case("a hundred connections at once", hundred_connections),
    ];
    let deadline = Duration::from_secs(180);
    let over = |transport: Transport| {
        cases.into_iter().map(move |(name, body)| {
            let body = move || {
                TRANSPORT.set(transport);
                body();
            };
            let name = match transport {
                Transport::Tcp => name.to_owned(),
                other => format!("{name}, over {other:?}"),
            };
            let needs = if transport.is_mptcp() { &[Need::Mptcp][..] } else { &[] };
            Case::new(name, body).deadline(deadline).needs(needs)
        })
    };
    TRANSPORTS.into_iter().flat_map(over).collect()
}

/// How clients reach the proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    /// It listens for TCP.
    Tcp,
    /// It got a listener for Multipath TCP, and clients speak that.
    Mptcp,
    /// The same, but clients speak TCP.
    Fallback,
    /// TCP, behind a header of the PROXY protocol on both sides.
    Proxied,
    /// Multipath TCP, behind such headers.
    MptcpProxied,
}

const TRANSPORTS: [Transport; 5] =
    [Transport::Tcp, Transport::Mptcp, Transport::Fallback, Transport::Proxied, Transport::MptcpProxied];

impl Transport {
    /// Whether the listener is for Multipath TCP.
    fn is_mptcp(self) -> bool {
        matches!(self, Self::Mptcp | Self::Fallback | Self::MptcpProxied)
    }

    /// Whether clients speak Multipath TCP.
    fn has_mptcp_clients(self) -> bool {
        matches!(self, Self::Mptcp | Self::MptcpProxied)
    }

    fn is_proxied(self) -> bool {
        matches!(self, Self::Proxied | Self::MptcpProxied)
    }
}

thread_local! {
    /// That of the case that this thread runs.
    static TRANSPORT: Cell<Transport> = const { Cell::new(Transport::Tcp) };
}

/// A proxy, and the backend that it relays to, in the hands of the test.
struct Relay {
    proxy: Standalone,
    backend: TcpListener,
}

/// The two ends of a relayed connection.
struct Pair {
    client: TcpStream,
    server: TcpStream,
}

impl Relay {
    fn start() -> Self {
        let backend = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let to = backend.local_addr().unwrap();
        let transport = TRANSPORT.get();
        let options: &[&str] = match transport.is_proxied() {
            true => &["--accept-proxy", "127.0.0.0/8", "--send-proxy", "v2"],
            false => &[],
        };
        let proxy = match transport.is_mptcp() {
            true => on_mptcp_listener(to, options),
            false => Standalone::relay_to(to, options),
        };
        Self { proxy, backend }
    }

    fn connect(&self) -> Pair {
        self.discard_strays();
        let mut client = match TRANSPORT.get().has_mptcp_clients() {
            true => mptcp::connect(self.proxy.address()),
            false => client::connect(self.proxy.address()),
        };
        if TRANSPORT.get().is_proxied() {
            client.write_all(&v1(told())).unwrap();
        }
        let server = client::patient(self.backend.accept().unwrap().0);
        if TRANSPORT.get().is_proxied() {
            receives(&server, &v2(told()));
        }
        Pair { client, server }
    }

    /// What a failed attempt left in the queue would be mistaken for the next connection.
    fn discard_strays(&self) {
        self.backend.set_nonblocking(true).unwrap();
        while self.backend.accept().is_ok() {}
        self.backend.set_nonblocking(false).unwrap();
    }
}

/// A proxy that is passed its listener, as by systemd.
fn on_mptcp_listener(to: SocketAddr, options: &[&str]) -> Standalone {
    let listener = mptcp::listen((Ipv4Addr::LOCALHOST, 0).into());
    let (host, to) = (listener.local_addr().unwrap().to_string(), to.to_string());
    let arguments = [&["--host", &*host, "--to", &to], options].concat();
    let systemd = Systemd::new();
    let command = systemd.command_with_sockets(&arguments, vec![("mptcp", listener.into())]);
    Standalone::ready(Process::spawn(command), &arguments)
}

impl Pair {
    /// The end that acts in a test, and the one that is to notice.
    fn by_actor(self, actor: Side) -> (TcpStream, TcpStream) {
        match actor {
            Side::Client => (self.client, self.server),
            Side::Server => (self.server, self.client),
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Side {
    Client,
    Server,
}

const SIDES: [Side; 2] = [Side::Client, Side::Server];

fn any_side() -> impl Strategy<Value = Side> {
    prop::sample::select(SIDES.to_vec())
}

/// The sizes of successive reads or writes, over and over, with a pause after each of the first rounds.
/// The pauses are the input under test: they wait for nothing.
#[derive(Clone, Debug)]
struct Pace {
    sizes: Vec<usize>,
    pause: Duration,
}

/// How many pauses there are at most, so that small sizes do not make a long test.
const PAUSES: usize = 8;

impl Pace {
    fn steady(size: usize) -> Self {
        Self { sizes: vec![size], pause: Duration::ZERO }
    }

    /// The size of each step. Pauses as it goes.
    fn steps(&self) -> impl Iterator<Item = usize> {
        self.sizes
            .iter()
            .copied()
            .cycle()
            .enumerate()
            .inspect(|(step, _)| {
                let (round, place) = (step / self.sizes.len(), step % self.sizes.len());
                if place == 0 && (1..=PAUSES).contains(&round) {
                    thread::sleep(self.pause);
                }
            })
            .map(|(_, size)| size)
    }
}

fn any_pace() -> impl Strategy<Value = Pace> {
    let size = prop_oneof![3 => 1..100_usize, 3 => 100..9_000_usize, 2 => 9_000..300_000_usize];
    (vec(size, 1..8), 0..3_u64).prop_map(|(sizes, pause)| Pace { sizes, pause: Duration::from_millis(pause) })
}

/// One direction of a connection.
#[derive(Clone, Debug)]
struct Flow {
    seed: u64,
    len: usize,
    writes: Pace,
    reads: Pace,
}

impl Flow {
    fn steady(seed: u64, len: usize) -> Self {
        Self { seed, len, writes: Pace::steady(64 * KIB), reads: Pace::steady(64 * KIB) }
    }

    /// Writes until all is written, or until the connection ends.
    fn write(&self, mut stream: &TcpStream) -> std::io::Result<()> {
        let mut pattern = Pattern::new(self.seed);
        let mut buffer = vec![0; self.writes.sizes.iter().copied().max().unwrap()];
        let mut left = self.len;
        let mut steps = self.writes.steps();
        while left > 0 {
            let len = steps.next().unwrap().min(left);
            pattern.fill(&mut buffer[..len]);
            stream.write_all(&buffer[..len])?;
            left -= len;
        }
        Ok(())
    }

    /// Reads to the end, comparing; returns how much came and how it ended.
    #[track_caller]
    fn read(&self, mut stream: &TcpStream) -> (usize, End) {
        let mut pattern = Pattern::new(self.seed);
        let mut buffer = vec![0; self.reads.sizes.iter().copied().max().unwrap()];
        let mut expected = buffer.clone();
        let mut received = 0;
        for size in self.reads.steps() {
            match stream.read(&mut buffer[..size]) {
                Ok(0) => return (received, End::Eof),
                Ok(len) => {
                    pattern.fill(&mut expected[..len]);
                    assert!(buffer[..len] == expected[..len], "other bytes from {received} on");
                    received += len;
                }
                Err(error) if is_reset(error.kind()) => return (received, End::Reset),
                Err(error) => panic!("after {received} of {} bytes: {error}", self.len),
            }
        }
        unreachable!("the steps have no end")
    }

    /// Sends all from one end to the other, half-closes, and checks that all arrives.
    fn carry<'scope>(
        &'scope self,
        scope: &'scope thread::Scope<'scope, '_>,
        from: &'scope TcpStream,
        to: &'scope TcpStream,
    ) {
        scope.spawn(move || {
            self.write(from).unwrap();
            from.shutdown(Shutdown::Write).unwrap();
        });
        scope.spawn(move || assert_eq!(self.read(to), (self.len, End::Eof)));
    }
}

fn any_flow() -> impl Strategy<Value = Flow> {
    let len = prop_oneof![2 => 0..2_usize, 4 => 1..9_000_usize, 3 => 9_000..MIB, 1 => MIB..8 * MIB];
    (any::<u64>(), len, any_pace(), any_pace()).prop_map(|(seed, len, mut writes, mut reads)| {
        // A few thousand steps are enough for any length.
        for size in writes.sizes.iter_mut().chain(&mut reads.sizes) {
            *size = (*size).max(len / 2_000);
        }
        Flow { seed, len, writes, reads }
    })
}

/// Checks a property for a number of random inputs.
fn check<S: Strategy>(cases: u32, inputs: S, property: impl Fn(S::Value)) {
    // Each failure may cost a timeout, so shrinking is kept short.
    let config = Config { cases, max_shrink_iters: 16, failure_persistence: None, ..Config::default() };
    let result = TestRunner::new(config).run(&inputs, |input| {
        property(input);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

/// Runs connections side by side, both directions of each at once.
fn transfer(relay: &Relay, connections: &[[Flow; 2]]) {
    let pairs: Vec<_> = connections.iter().map(|_| relay.connect()).collect();
    thread::scope(|scope| {
        for ([up, down], pair) in connections.iter().zip(&pairs) {
            up.carry(scope, &pair.client, &pair.server);
            down.carry(scope, &pair.server, &pair.client);
        }
    });
}

fn any_sizes_at_any_pace() {
    let relay = Relay::start();
    check(64, vec([any_flow(), any_flow()], 1..4), |connections| transfer(&relay, &connections));
}

fn large_both_ways() {
    transfer(&Relay::start(), &[[Flow::steady(1, 64 * MIB), Flow::steady(2, 64 * MIB)]]);
}

fn large_to_slow_reader() {
    let reads = Pace { sizes: vec![1, 100 * KIB, 3 * KIB], pause: Duration::from_millis(20) };
    let slow = Flow { reads, ..Flow::steady(3, 64 * MIB) };
    transfer(&Relay::start(), &[[slow.clone(), Flow::steady(4, 1)], [Flow::steady(5, 1), slow]]);
}

fn large_in_small_writes() {
    let small = Flow { writes: Pace::steady(1_447), ..Flow::steady(6, 64 * MIB) };
    transfer(&Relay::start(), &[[small, Flow::steady(7, 0)]]);
}

/// Bursts in turn: each is sent only when the one before has arrived as a whole, so that a byte that the
/// relay holds back stops everything.
fn no_byte_waits() {
    let burst = prop_oneof![4 => 1..20_usize, 2 => 1_000..70_000_usize, 2 => 100_000..3 * MIB];
    let relay = Relay::start();
    check(24, vec((any_side(), burst), 1..24), |bursts| take_turns(relay.connect(), &bursts));
}

fn take_turns(pair: Pair, bursts: &[(Side, usize)]) {
    for (seed, (sender, len)) in (1..).zip(bursts) {
        let flow = Flow::steady(seed, *len);
        let (from, mut to) = match sender {
            Side::Client => (&pair.client, &pair.server),
            Side::Server => (&pair.server, &pair.client),
        };
        let mut expected = vec![0; *len];
        Pattern::new(seed).fill(&mut expected);
        thread::scope(|scope| {
            scope.spawn(|| flow.write(from).unwrap());
            let mut received = vec![0; *len];
            to.read_exact(&mut received).unwrap();
            assert!(received == expected, "other bytes in burst {seed}");
        });
    }
}

fn sent_before_close_arrives() {
    let relay = Relay::start();
    check(64, (any_side(), any_flow()), |(closer, flow)| {
        let (closer, reader) = relay.connect().by_actor(closer);
        thread::scope(|scope| {
            scope.spawn(|| {
                flow.write(&closer).unwrap();
                drop(closer);
            });
            assert_eq!(flow.read(&reader), (flow.len, End::Eof));
        });
    });
}

/// Both are there before the relay looks, be it for the first end of the connection or the second.
fn end_with_last_bytes() {
    let relay = Relay::start();
    for side in SIDES {
        for len in [1, 100, 64 * KIB] {
            let (closer, other) = relay.connect().by_actor(side);
            for (from, to) in [(&closer, &other), (&other, &closer)] {
                relay.proxy.process.pause();
                (&mut &*from).write_all(&vec![b'x'; len]).unwrap();
                from.shutdown(Shutdown::Write).unwrap();
                relay.proxy.process.resume();
                assert_eq!(client::read_to_end(to), (vec![b'x'; len], End::Eof));
            }
        }
    }
}

fn half_closed_goes_on() {
    let relay = Relay::start();
    for closer in SIDES {
        let (closer, mut other) = relay.connect().by_actor(closer);
        closer.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client::read_to_end(&other), (vec![], End::Eof));
        for _ in 0..50 {
            other.write_all(b"more").unwrap();
            let mut received = [0; 4];
            (&closer).read_exact(&mut received).unwrap();
        }
        let flow = Flow::steady(8, 16 * MIB);
        thread::scope(|scope| flow.carry(scope, &other, &closer));
    }
}

/// Random amounts on their way when one end resets. The other must get a prefix and then the reset, be it
/// by its reads or by its writes: the kernel tells only one of them.
fn reset_is_passed_on() {
    let relay = Relay::start();
    check(96, (any_side(), any_flow(), any_flow(), any::<bool>()), |(side, sent, back, talks)| {
        let (resetter, peer) = relay.connect().by_actor(side);
        thread::scope(|scope| {
            scope.spawn(|| {
                sent.write(&resetter).unwrap();
                client::reset(resetter);
            });
            let writer = talks.then(|| scope.spawn(|| back.write(&peer)));
            let (received, end) = sent.read(&peer);
            assert!(received <= sent.len, "{received} bytes of {}", sent.len);
            let write = writer.map(|writer| writer.join().unwrap());
            let told = end == End::Reset || write.as_ref().is_some_and(was_reset);
            assert!(told, "no reset: read {received} bytes and {end:?}, wrote {write:?}");
        });
    });
}

/// Over Multipath TCP a reset is told once, which may be to a write, and then that nobody is connected.
fn is_reset(kind: ErrorKind) -> bool {
    let is_told_before = TRANSPORT.get().has_mptcp_clients() && kind == ErrorKind::NotConnected;
    is_told_before || kind == ErrorKind::ConnectionReset
}

/// An urgent byte is a byte of the stream (RFC 6093), wherever the connection comes in.
fn urgent_byte_keeps_its_place() {
    let relay = Relay::start();
    for side in SIDES {
        let (mut sender, reader) = relay.connect().by_actor(side);
        sender.write_all(b"ab").unwrap();
        SockRef::from(&sender).send_out_of_band(b"c").unwrap();
        sender.write_all(b"d").unwrap();
        sender.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client::read_to_end(&reader), (b"abcd".to_vec(), End::Eof));
    }
}

fn was_reset(result: &std::io::Result<()>) -> bool {
    let ends = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe];
    result.as_ref().is_err_and(|error| ends.contains(&error.kind()))
}

/// Waits until the kernel has marked a connection as reset, without reading from it or writing to it.
#[track_caller]
fn wait_for_reset(stream: &TcpStream) {
    let deadline = Instant::now() + PATIENCE;
    let error = loop {
        if let Some(error) = stream.take_error().unwrap() {
            break Err(error);
        }
        assert!(Instant::now() < deadline, "no reset");
        thread::yield_now();
    };
    assert!(was_reset(&error), "{error:?}");
}

/// Writes until nobody takes more: the buffers of both connections, and of the relay, are full.
fn write_until_stalled(mut stream: &TcpStream) {
    stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    let chunk = [0; 64 * KIB];
    let error = loop {
        if let Err(error) = stream.write_all(&chunk) {
            break error;
        }
    };
    assert_eq!(error.kind(), ErrorKind::WouldBlock);
}

fn reset_reaches_stalled_reader() {
    let relay = Relay::start();
    for side in SIDES {
        let (resetter, stalled) = relay.connect().by_actor(side);
        write_until_stalled(&resetter);
        client::reset(resetter);
        wait_for_reset(&stalled);
    }
}

/// The reader pauses for long enough that the relay, which waits for it, meets the reset, and then reads on.
/// What it is spared of the data must not look like the end of it.
fn reset_during_stall() {
    let relay = Relay::start();
    for side in SIDES {
        let (resetter, reader) = relay.connect().by_actor(side);
        write_until_stalled(&resetter);
        client::reset(resetter);
        thread::sleep(Duration::from_millis(100));
        assert_eq!(client::read_to_end(&reader).1, End::Reset);
    }
}

/// Half-closed in one direction and silent in the other: the relay reads nothing that would tell it.
fn reset_reaches_peer_after_eof() {
    let relay = Relay::start();
    for side in SIDES {
        let (resetter, peer) = relay.connect().by_actor(side);
        resetter.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client::read_to_end(&peer), (vec![], End::Eof));
        client::reset(resetter);
        wait_for_reset(&peer);
    }
}

fn reset_leaves_others_alone() {
    let relay = Relay::start();
    let bystander = relay.connect();
    let flow = Flow {
        writes: Pace { sizes: vec![MIB], pause: Duration::from_millis(5) },
        ..Flow::steady(9, 32 * MIB)
    };
    thread::scope(|scope| {
        flow.carry(scope, &bystander.client, &bystander.server);
        flow.carry(scope, &bystander.server, &bystander.client);
        for side in SIDES.into_iter().cycle().take(40) {
            let (resetter, peer) = relay.connect().by_actor(side);
            (&resetter).write_all(b"x").unwrap();
            client::reset(resetter);
            assert_eq!(client::read_to_end(&peer).1, End::Reset);
        }
    });
}

fn hundred_connections() {
    let relay = Relay::start();
    let connections: Vec<_> = (0..100)
        .map(|seed| [Flow::steady(2 * seed, 200 * KIB), Flow::steady(2 * seed + 1, 50 * KIB)])
        .collect();
    transfer(&relay, &connections);
}
