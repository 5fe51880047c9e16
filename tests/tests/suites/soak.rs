//! Mixed load with random faults: memory and descriptors at the end are those after warm-up.
//!
//! It takes 30 s, or `RPROXY_SOAK_SECONDS`. A seed, which is printed, determines everything random; `RPROXY_SOAK_SEED`
//! sets it.

use std::env;
use std::io::{ErrorKind, Read};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use testkit::backend::{self, TcpBackend};
use testkit::client;
use testkit::controlled::{Controlled, mapping};
use testkit::holdings::{Holdings, private_memory, wait_until_idle};
use testkit::pattern::Pattern;
use testkit::suite::Case;
use testkit::{eventually, udp};

/// Seconds of load, by default: what CI has time for.
const SECONDS: u64 = 30;

/// A tenth of the time is for warm-up, after which nothing may grow any more.
const WARM_UP: u32 = 10;

/// Clients at a time.
const CLIENTS: u64 = 8;

/// What the allocator may keep more than after warm-up, in kB: its heaps end where the last block happens to be.
const SLACK_KB: usize = 1024;

pub(crate) fn cases() -> Vec<Case> {
    let deadline = 2 * duration() + Duration::from_secs(60);
    // It takes all processors.
    vec![Case::new("nothing grows under load with faults", soak).deadline(deadline).alone()]
}

/// A number from the environment.
fn number(variable: &str) -> Option<u64> {
    env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|_err| panic!("{variable} is no number")))
}

fn duration() -> Duration {
    Duration::from_secs(number("RPROXY_SOAK_SECONDS").unwrap_or(SECONDS))
}

/// Numbers that follow from a seed.
struct Random(Pattern);

impl Random {
    fn new(seed: u64) -> Self {
        // Seeds that are near each other make streams that are not.
        Self(Pattern::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
    }

    /// A number below `limit`.
    fn below(&mut self, limit: u64) -> u64 {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        u64::from_ne_bytes(bytes) % limit
    }
}

/// What goes on.
struct Soak {
    proxy: Controlled,
    front: SocketAddr,
    /// The backend, if it is there, and where it listens.
    backend: Mutex<Option<TcpBackend>>,
    address: SocketAddr,
    datagrams: udp::Backend,
    exchanges: AtomicU64,
    faults: AtomicU64,
}

#[expect(clippy::print_stderr, reason = "what it takes to do the same again")]
fn soak() {
    let seed =
        number("RPROXY_SOAK_SEED").unwrap_or_else(|| SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs());
    eprintln!("RPROXY_SOAK_SEED={seed}");
    let soak = Soak::start();
    soak.load(seed, duration() / WARM_UP);
    let before = soak.rest();
    soak.load(seed + CLIENTS + 1, duration());
    let after = soak.rest();
    let counts = [&soak.exchanges, &soak.faults].map(|count| count.load(Ordering::Relaxed));
    eprintln!("{} exchanges, {} faults; before {before:?}, after {after:?}", counts[0], counts[1]);
    assert!(counts.iter().all(|count| *count > 0), "nothing has happened");
    assert_eq!(after.descriptors, before.descriptors);
    assert!(after.memory_kb <= before.memory_kb + SLACK_KB, "{after:?}, and after warm-up {before:?}");
}

impl Soak {
    fn start() -> Self {
        let own = client::own_loopback();
        let (front, address) = (SocketAddr::from((own, 80)), SocketAddr::from((own, 8080)));
        let datagrams = udp::Backend::echo(udp::local());
        let soak = Self {
            proxy: Controlled::start(&["--log-level", "error"]),
            front,
            backend: Mutex::new(None),
            address,
            datagrams,
            exchanges: AtomicU64::new(0),
            faults: AtomicU64::new(0),
        };
        soak.proxy.apply(&soak.mappings("10s")).success();
        soak.restart_backend();
        soak
    }

    /// The same mappings with another limit, which makes them other ones.
    fn mappings(&self, connect_timeout: &str) -> [Value; 2] {
        let mut web = mapping("web", "tcp", self.front, self.address);
        web["limits"] = json!({ "connect_timeout": connect_timeout });
        let mut dns = mapping("dns", "udp", self.front, self.datagrams.address());
        dns["limits"] = json!({ "udp_timeout": "1s" });
        [web, dns]
    }

    /// Kills the backend and all of its connections, and starts it again.
    fn restart_backend(&self) {
        let mut backend = self.backend.lock().unwrap();
        drop(backend.take());
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.bind(&self.address.into()).unwrap();
        socket.listen(1024).unwrap();
        *backend = Some(TcpBackend::serve(TcpListener::from(socket), backend::echo));
    }

    /// Lets clients come and go, and faults happen, for a time.
    fn load(&self, seed: u64, time: Duration) {
        let end = Instant::now() + time;
        thread::scope(|scope| {
            for client in 0..CLIENTS {
                scope.spawn(move || {
                    let mut random = Random::new(seed + client);
                    while Instant::now() < end {
                        if random.below(4) == 0 {
                            self.exchange_datagrams(&mut random);
                        } else {
                            self.exchange(&mut random);
                        }
                    }
                });
            }
            let mut random = Random::new(seed + CLIENTS);
            while Instant::now() < end {
                thread::sleep(Duration::from_millis(20 + random.below(200)));
                self.fault(&mut random);
            }
        });
    }

    /// A connection with some requests; an end in order, by a reset, or by a fault, after which what came back so
    /// far has to be right.
    fn exchange(&self, random: &mut Random) {
        let Ok(stream) = TcpStream::connect(self.front) else { return };
        let mut stream = client::patient(stream);
        for _ in 0..random.below(8) {
            // Some are large enough for splicing.
            let most = if random.below(8) == 0 { 2_000_000 } else { 20_000 };
            let size = usize::try_from(1 + random.below(most)).unwrap();
            match client::try_exchange(&stream, random.below(u64::MAX), size) {
                Ok(()) => self.exchanges.fetch_add(1, Ordering::Relaxed),
                Err(error) => return assert_was_cut(&error),
            };
        }
        if random.below(3) == 0 {
            return client::reset(stream);
        }
        if let Err(error) = stream.shutdown(Shutdown::Write).and_then(|()| stream.read(&mut [0])) {
            assert_was_cut(&error);
        }
    }

    fn exchange_datagrams(&self, random: &mut Random) {
        let socket = udp::client(self.front.ip());
        socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        for _ in 0..random.below(20) {
            let size = usize::try_from(random.below(3000)).unwrap();
            socket.send_to(&udp::pattern(size, size), self.front).unwrap();
            let mut answer = [0; 3000];
            // It may be lost, or late and then be the answer to an earlier one.
            if let Ok((len, from)) = socket.recv_from(&mut answer) {
                assert_eq!(from, self.front);
                assert!(answer[..len] == udp::pattern(len, len), "another datagram of {len} bytes");
                self.exchanges.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn fault(&self, random: &mut Random) {
        self.faults.fetch_add(1, Ordering::Relaxed);
        match random.below(5) {
            0 => self.restart_backend(),
            1 => {
                self.proxy.process.pause();
                self.proxy.process.resume();
            }
            2 => drop(self.proxy.apply(&self.mappings("9s")).success()),
            3 => drop(self.proxy.apply(&self.mappings("10s")).success()),
            _ => {
                // Clients who say nothing, and are gone.
                let silent: Vec<_> = (0..50).map(|_| TcpStream::connect(self.front)).collect();
                drop(silent);
            }
        }
    }

    /// Waits until nothing goes on; says what is held then.
    fn rest(&self) -> Rest {
        let pid = self.proxy.process.pid();
        let over = |name, counter| self.proxy.stats(name)[counter] == 0;
        eventually("no connection or flow is left", || over("web", "connections") && over("dns", "flows"));
        wait_until_idle(pid);
        let Holdings { sockets, others, .. } = Holdings::of(pid);
        Rest { memory_kb: private_memory(pid), descriptors: sockets + others }
    }
}

/// What is held when nothing goes on.
#[derive(Clone, Copy, Debug)]
struct Rest {
    memory_kb: usize,
    /// Without those of pipes, of which workers keep a few.
    descriptors: usize,
}

/// A backend that was killed ends its connections by a reset or, if it had read everything, in order.
#[track_caller]
fn assert_was_cut(error: &std::io::Error) {
    let kinds = [
        ErrorKind::ConnectionReset,
        ErrorKind::BrokenPipe,
        ErrorKind::UnexpectedEof,
        ErrorKind::NotConnected,
    ];
    assert!(kinds.contains(&error.kind()), "{error}");
}
