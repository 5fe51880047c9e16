//! The resolver: a process beside a confined one, which looks names up as this machine does: in `/etc/hosts`, and by DNS with
//! the name servers, search domains and options of `/etc/resolv.conf` (resolv.conf(5)).
//!
//! It is a process because these files may change, and because it reads what strangers have sent. Nothing that it has been
//! told is kept: whoever asks knows for how long an answer is valid.

use std::cell::{Cell, RefCell};
use std::fs::{self, Metadata};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::{Duration, Instant};

use hickory_resolver::config::{LookupIpStrategy, ResolveHosts};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::{Query, ResponseCode};
use hickory_resolver::proto::rr::{Name, RecordType};
use hickory_resolver::system_conf::parse_resolv_conf;
use hickory_resolver::{Hosts, TokioResolver};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{Mutex, Notify};
use tokio::task::{JoinError, JoinHandle, LocalSet, spawn_local};
use tokio::time::sleep;

use super::message::{Answer, BEAT, Found, LONGEST_LINE, MOST_ADDRESSES, Question, STILL_THERE};
use super::shares::{FIRST, Shares};
use crate::loops::whereabouts::{Destination, Whereabouts};
use crate::runtime::new_runtime;
use crate::sandbox;

/// The name of the process; at most 15 bytes (`PR_SET_NAME`, prctl(2)).
const NAME: &std::ffi::CStr = c"rproxy-resolver";

/// How long to wait for the addresses of both families until those of one are enough.
const LONG: Duration = Duration::from_secs(2);

const RESOLV_CONF: &str = "/etc/resolv.conf";
const HOSTS: &str = "/etc/hosts";

/// For how long what a file says is valid, in seconds: to ask again takes a look at whether it has changed.
const OF_FILE: u64 = 5;

/// The longest time that an answer is valid, in seconds, as in resolvers (BIND's `max-cache-ttl` is a week, hickory's a day).
const LONGEST: u64 = 24 * 60 * 60;

/// Answers questions until the other side closes the socket. Call it in a process of its own, without threads.
pub(crate) fn serve(socket: OwnedFd) {
    // For readers of process lists only, so errors do not matter.
    rustix::thread::set_name(NAME).ok();
    rproxy_sys::process::set_title("rproxy: resolver").ok();
    // What a kernel cannot do is missing in the process that asks as well, which says so.
    sandbox::confine_resolver();
    // There is nobody to report an error to: whoever asks gets no answer.
    if let Ok(runtime) = new_runtime() {
        LocalSet::new().block_on(&runtime, converse(socket)).ok();
    }
}

async fn converse(socket: OwnedFd) -> io::Result<()> {
    let socket = UnixStream::from(socket);
    socket.set_nonblocking(true)?;
    let (questions, answers) = tokio::net::UnixStream::from_std(socket)?.into_split();
    let desk = Rc::new(Desk { answers: Mutex::new(answers), open: Cell::new(0), opened: Notify::new() });
    spawn_local(desk.clone().beat());
    let shares = Rc::new(Shares::new());
    let source = Rc::new(RefCell::new(Source::default()));
    let mut questions = BufReader::new(questions).take(0);
    let mut line = Vec::new();
    loop {
        line.clear();
        questions.set_limit(LONGEST_LINE as u64);
        if questions.read_until(b'\n', &mut line).await? == 0 {
            return Ok(());
        }
        // What is not a question is of nobody who could read an answer.
        let Ok(Question { name, share }) = serde_json::from_slice(&line) else { continue };
        let (source, shares, asked) = (source.clone(), shares.clone(), name.clone());
        let looked_up = spawn_local(async move {
            let begin = || {
                // As of now: it may have waited.
                let current = source.borrow_mut().current();
                let asked = &asked;
                async move { current.look_up(asked).await }
            };
            shares.look_up(share, begin).await
        });
        spawn_local(desk.clone().answer(name, looked_up));
    }
}

/// Where answers go out.
struct Desk {
    answers: Mutex<OwnedWriteHalf>,
    /// The number of questions without an answer.
    open: Cell<usize>,
    /// Notified of the first of them.
    opened: Notify,
}

impl Desk {
    /// Answers a question. If that cannot be written, the other side is gone, which ends this process.
    async fn answer(self: Rc<Self>, name: String, looked_up: JoinHandle<(Result<Found, String>, usize)>) {
        self.open.set(self.open.get() + 1);
        self.opened.notify_one();
        let failed = |error: JoinError| (Err(format!("the resolver has failed: {error}")), FIRST);
        let (result, share) = looked_up.await.unwrap_or_else(failed);
        self.write(&Answer { name, result, share }).await.ok();
        self.open.set(self.open.get() - 1);
    }

    async fn write(&self, answer: &Answer) -> io::Result<()> {
        let mut line = serde_json::to_vec(answer)?;
        line.push(b'\n');
        self.answers.lock().await.write_all(&line).await
    }

    /// Shows that this process is alive while questions are open.
    async fn beat(self: Rc<Self>) {
        loop {
            self.opened.notified().await;
            while self.open.get() > 0 {
                sleep(BEAT).await;
                self.answers.lock().await.write_all(STILL_THERE).await.ok();
            }
        }
    }
}

/// What the files of this machine say, as long as they are the same.
#[derive(Default)]
struct Source {
    stamps: Option<[Stamp; 2]>,
    current: Rc<Current>,
}

/// What tells one version of a file from another; `None` if it cannot be read.
type Stamp = Option<(u64, u64, u64, i64, i64)>;

impl Source {
    fn current(&mut self) -> Rc<Current> {
        let stamps = [RESOLV_CONF, HOSTS].map(|path| fs::metadata(path).ok().map(|file| stamp(&file)));
        if self.stamps != Some(stamps) {
            self.stamps = Some(stamps);
            self.current = Rc::new(Current::read());
        }
        self.current.clone()
    }
}

fn stamp(file: &Metadata) -> (u64, u64, u64, i64, i64) {
    (file.dev(), file.ino(), file.size(), file.ctime(), file.ctime_nsec())
}

/// What the files of this machine say.
#[derive(Default)]
struct Current {
    hosts: Hosts,
    /// The name servers, or why there are none.
    dns: Option<Result<TokioResolver, String>>,
}

impl Current {
    fn read() -> Self {
        Self { hosts: Hosts::from_system().unwrap_or_default(), dns: Some(name_servers()) }
    }

    async fn look_up(&self, name: &str) -> Result<Found, String> {
        if let Some(addresses) = self.in_hosts(name) {
            return Ok(found(addresses, OF_FILE));
        }
        // RFC 6761, section 6.3: not a matter of DNS.
        let absolute = format!(".{}", name.trim_end_matches('.'));
        if absolute.ends_with(".localhost") {
            let local = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
            return Ok(found(local.to_vec(), OF_FILE));
        }
        let resolver = match &self.dns {
            Some(Ok(resolver)) => resolver,
            Some(Err(why)) => return Err(why.clone()),
            None => return Err("no name servers are known".to_owned()),
        };
        // The answer is kept by whoever asks.
        resolver.clear_cache();
        let both = async {
            let answer = resolver.lookup_ip(name).await.map_err(|error| explain(&error))?;
            Ok::<_, String>((answer.iter().collect(), answer.valid_until()))
        };
        let (addresses, until): (Vec<IpAddr>, Instant) = tokio::select! {
            biased;
            both = both => both?,
            one = of_one_family(resolver, name) => one,
        };
        if addresses.is_empty() {
            return Err(NO_ADDRESS.to_owned());
        }
        let left = until.saturating_duration_since(Instant::now());
        // Rounded up: the resolver counts from the moment of the answer on.
        let seconds = (left + Duration::from_millis(500)).as_secs().min(LONGEST);
        Ok(found(addresses, seconds))
    }

    fn in_hosts(&self, name: &str) -> Option<Vec<IpAddr>> {
        let name: Name = name.parse().ok()?;
        let of = |kind| self.hosts.lookup_static_host(&Query::query(name.clone(), kind));
        let found = [RecordType::A, RecordType::AAAA].into_iter().filter_map(of);
        let addresses: Vec<IpAddr> = found
            .flat_map(|found| {
                found.answers().iter().filter_map(|record| record.data.ip_addr()).collect::<Vec<_>>()
            })
            .collect();
        (!addresses.is_empty()).then_some(addresses)
    }
}

/// The addresses of the family that is answered first, once both have taken long: there are name servers that are silent when
/// asked for a type that they do not know (RFC 4074, section 4.1). They are valid until then.
async fn of_one_family(resolver: &TokioResolver, name: &str) -> (Vec<IpAddr>, Instant) {
    sleep(LONG).await;
    let addresses =
        |answer: &Lookup| answer.answers().iter().filter_map(|record| record.data.ip_addr()).collect();
    tokio::select! {
        Ok(answer) = resolver.ipv4_lookup(name) => (addresses(&answer), answer.valid_until()),
        Ok(answer) = resolver.ipv6_lookup(name) => (addresses(&answer), answer.valid_until()),
        else => std::future::pending().await,
    }
}

fn name_servers() -> Result<TokioResolver, String> {
    let unusable = |error: &NetError| format!("{RESOLV_CONF} cannot be used: {error}");
    let text = fs::read(RESOLV_CONF).unwrap_or_default();
    let parsed = parse_resolv_conf(usable(&String::from_utf8_lossy(&text)));
    let (config, mut options) = parsed.map_err(|error| unusable(&error))?;
    options.ip_strategy = LookupIpStrategy::Ipv4AndIpv6;
    options.use_hosts_file = ResolveHosts::Never;
    let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
    *builder.options_mut() = options;
    builder.build().map_err(|error| unusable(&error))
}

/// What a file says without search domains that cannot be names, of which one must not disable all others. Without a name server,
/// that of this machine is asked (resolv.conf(5)).
fn usable(text: &str) -> String {
    let mut lines: Vec<String> = text.lines().filter_map(usable_line).collect();
    if !lines.iter().any(|line| line.split_whitespace().next() == Some("nameserver")) {
        lines.push(format!("nameserver {}", Ipv4Addr::LOCALHOST));
    }
    lines.join("\n")
}

fn usable_line(line: &str) -> Option<String> {
    let mut words = line.split_whitespace();
    let Some(keyword @ ("search" | "domain")) = words.next() else { return Some(line.to_owned()) };
    let domains = words.take_while(|word| !word.starts_with(['#', ';']));
    let domains: Vec<&str> = domains.filter(|word| Name::from_str_relaxed(word).is_ok()).collect();
    (!domains.is_empty()).then(|| format!("{keyword} {}", domains.join(" ")))
}

const NO_ADDRESS: &str = "the name has no address";

/// Why a name was not found.
fn explain(error: &NetError) -> String {
    match error {
        NetError::Timeout => "no name server has answered".to_owned(),
        NetError::NoConnections => "no name server could be reached".to_owned(),
        NetError::Dns(DnsError::NoRecordsFound(none)) => match none.response_code {
            ResponseCode::NXDomain => "there is no such name".to_owned(),
            ResponseCode::NoError => NO_ADDRESS.to_owned(),
            code => format!("the name servers have answered: {code}"),
        },
        other => other.to_string(),
    }
}

fn found(addresses: Vec<IpAddr>, seconds: u64) -> Found {
    let addresses = in_order(addresses);
    let mut whereabouts = Whereabouts::default();
    let is_own = |ip: &&IpAddr| whereabouts.of((**ip).into()) == Destination::Here;
    let own = addresses.iter().filter(is_own).copied().collect();
    Found { addresses, own, seconds }
}

/// The order in which addresses are tried: those that this host has a route to first, and families in turn, beginning with
/// IPv6 (RFC 8305, section 4; RFC 6724, section 6, rule 1). Within a family, the order of the answer stays.
fn in_order(mut addresses: Vec<IpAddr>) -> Vec<IpAddr> {
    let mut seen = std::collections::HashSet::new();
    addresses.retain(|ip| seen.insert(*ip));
    let (mut reached, rest): (Vec<_>, Vec<_>) = addresses.into_iter().partition(|ip| has_route(*ip));
    reached = interleaved(&reached);
    reached.extend(interleaved(&rest));
    reached.truncate(MOST_ADDRESSES);
    reached
}

fn interleaved(addresses: &[IpAddr]) -> Vec<IpAddr> {
    let (v6, v4): (Vec<IpAddr>, Vec<IpAddr>) = addresses.iter().partition(|ip| ip.is_ipv6());
    let (mut v6, mut v4) = (v6.into_iter(), v4.into_iter());
    let mut ordered = Vec::with_capacity(addresses.len());
    while ordered.len() < addresses.len() {
        ordered.extend(v6.next());
        ordered.extend(v4.next());
    }
    ordered
}

/// Whether this host would send to an address. A connect of UDP sends nothing (udp(7)).
fn has_route(ip: IpAddr) -> bool {
    let own: IpAddr = match ip {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    UdpSocket::bind((own, 0)).and_then(|socket| socket.connect(SocketAddr::new(ip, 9))).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn families_take_turns() {
        let mixed = ips(&["10.0.0.1", "10.0.0.2", "fd00::1", "10.0.0.3"]);
        assert_eq!(interleaved(&mixed), ips(&["fd00::1", "10.0.0.1", "10.0.0.2", "10.0.0.3"]));
        assert_eq!(interleaved(&[]), ips(&[]));
    }

    #[test]
    fn what_cannot_be_used_of_a_file_does_not_spoil_the_rest() {
        for (text, expected) in [
            ("nameserver 192.0.2.1\nsearch a.b..c t -bad-", "nameserver 192.0.2.1\nsearch t"),
            ("search a..b\nnameserver 192.0.2.1", "nameserver 192.0.2.1"),
            ("domain internal ; a comment\nnameserver ::1", "domain internal\nnameserver ::1"),
            ("options ndots:2", "options ndots:2\nnameserver 127.0.0.1"),
            ("", "nameserver 127.0.0.1"),
        ] {
            assert_eq!(usable(text), expected, "{text}");
            parse_resolv_conf(usable(text)).unwrap();
        }
    }

    #[test]
    fn an_address_counts_once() {
        assert_eq!(in_order(ips(&["127.0.0.2", "127.0.0.1", "127.0.0.2"])), ips(&["127.0.0.2", "127.0.0.1"]));
    }
}
