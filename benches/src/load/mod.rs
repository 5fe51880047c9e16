//! The load generator: a thread per core, each with its share of the connections or flows.
//!
//! All connections are opened before the measurement begins.

mod bulk;
mod crr;
mod exchange;
mod get;
mod idle;
mod quic;
mod quic_down;
mod quic_rr;
mod rr;
mod udp_bulk;
mod udp_down;
mod udp_rr;

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::account::CpuTimes;
use crate::metric::{CpuOf, Metric, Unit, Values};
use crate::pattern::Wrong;
use crate::workload::Workload;

pub(crate) use bulk::bulk;
pub(crate) use crr::crr;
pub(crate) use get::get;
pub(crate) use idle::{Idle, IdleFlows};
pub(crate) use quic_down::quic_down;
pub(crate) use quic_rr::quic_rr;
pub(crate) use rr::rr;
pub(crate) use udp_bulk::udp_bulk;
pub(crate) use udp_down::{SIZE as DATAGRAM, WINDOW, udp_down};
pub(crate) use udp_rr::{Shape, udp_rr};

/// How long a workload may take to finish after its end. Responses that have not arrived by then are lost.
const GRACE: Duration = Duration::from_secs(10);

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(10);

/// How often a thread checks the clock at least.
const TICK: Duration = Duration::from_millis(50);

/// The size of a request and of its response, in bytes: a small HTTP request.
pub(crate) const MESSAGE: usize = 128;

/// The target of a load, its duration, and whose CPU time to measure.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    /// The address that clients connect to.
    pub(crate) address: SocketAddr,
    /// The duration of the load.
    pub(crate) duration: Duration,
    /// Threads of the load generator.
    pub(crate) threads: usize,
    /// The CPU times used so far.
    pub(crate) cpu: &'a (dyn Fn() -> CpuTimes + Sync),
}

/// Why a load failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    /// A system call failed.
    #[error("cannot {step}: {source}")]
    Io {
        /// The purpose of the call.
        step: &'static str,
        /// Its error.
        source: io::Error,
    },
    /// The received data differs from the sent data.
    #[error("wrong data: {0}")]
    Wrong(#[from] Wrong),
    /// There was no response.
    #[error("no answer for {GRACE:?}: {0}")]
    Stalled(String),
}

impl LoadError {
    /// An error of the call that `step` describes.
    pub(crate) fn io(step: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io { step, source }
    }

    /// Whether the data was wrong, rather than missing.
    pub(crate) fn is_wrong(&self) -> bool {
        matches!(self, Self::Wrong(_))
    }
}

/// Runs one workload that only consists of load.
///
/// # Errors
/// [`LoadError`]
pub(crate) fn run(workload: Workload, target: Target<'_>) -> Result<Values, LoadError> {
    match workload {
        Workload::TcpBulk { streams, direction } => bulk(target, streams, direction),
        Workload::TcpRr { connections } => rr(target, connections),
        Workload::TcpCrr { connections } => crr(target, connections),
        Workload::TcpGet { size, connections } => get(target, size, connections),
        Workload::UdpRr { flows, window, size } => udp_rr(target, Shape { flows, window, size, ports: 1 }),
        Workload::UdpPorts { ports } => udp_rr(target, Shape { flows: 64, window: 8, size: 64, ports }),
        Workload::UdpBulk { size, gso } => udp_bulk(target, size, gso),
        Workload::UdpDown { flows } => udp_down(target, flows),
        Workload::QuicDown { connections } => quic_down(target, connections),
        Workload::QuicRr { connections, window } => quic_rr(target, connections, window),
        other => Err(LoadError::io("run it as a load")(io::Error::other(format!(
            "{other} needs the processes of `compare`"
        )))),
    }
}

/// The duration of a load, and its cost.
#[derive(Clone, Copy, Debug)]
struct Span {
    elapsed: Duration,
    cpu: CpuTimes,
}

impl Span {
    fn rate(self, count: u64) -> f64 {
        count as f64 / self.elapsed.as_secs_f64()
    }

    /// The CPU times for `count` of these units, as far as they are known.
    fn costs(self, unit: Unit, count: f64) -> impl Iterator<Item = (Metric, f64)> {
        let costs = [(CpuOf::Peer, self.cpu.peer), (CpuOf::Machine, self.cpu.machine)];
        costs.into_iter().filter(move |_| count > 0.0).filter_map(move |(whose, cpu)| {
            let seconds = cpu?.as_secs_f64() / count;
            Some((Metric::Cpu(whose, unit), seconds * unit.per_second()))
        })
    }
}

/// Runs `drive` on a thread for each share, and measures the total time.
fn measure<C: Send, R: Send>(
    target: Target<'_>,
    shares: Vec<C>,
    drive: impl Fn(C) -> Result<R, LoadError> + Sync,
) -> Result<(Vec<R>, Span), LoadError> {
    let (cpu, start) = ((target.cpu)(), Instant::now());
    let results = in_threads(shares, drive)?;
    let (elapsed, end) = (start.elapsed(), (target.cpu)());
    Ok((results, Span { elapsed, cpu: end.since(cpu) }))
}

fn in_threads<C: Send, R: Send>(
    shares: Vec<C>,
    task: impl Fn(C) -> Result<R, LoadError> + Sync,
) -> Result<Vec<R>, LoadError> {
    thread::scope(|scope| {
        let task = &task;
        let threads: Vec<_> = shares.into_iter().map(|share| scope.spawn(move || task(share))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

/// Opens `count` connections on several threads, and returns them in shares.
fn connect(target: Target<'_>, count: usize) -> Result<Vec<Vec<TcpStream>>, LoadError> {
    in_threads(shares(count, target.threads), |share| {
        share.into_iter().map(|_| connect_one(target.address)).collect()
    })
}

fn connect_one(address: SocketAddr) -> Result<TcpStream, LoadError> {
    let stream = TcpStream::connect_timeout(&address, CONNECT).map_err(LoadError::io("connect"))?;
    stream.set_nodelay(true).map_err(LoadError::io("set TCP_NODELAY"))?;
    Ok(stream)
}

/// Distributes the numbers below `count` to `threads` shares, none of which is empty.
fn shares(count: usize, threads: usize) -> Vec<Vec<usize>> {
    let threads = threads.clamp(1, count.max(1));
    (0..threads).map(|thread| (thread..count).step_by(threads).collect()).collect()
}

/// A histogram of nanoseconds up to a minute, with three significant digits.
fn latencies() -> Histogram<u64> {
    // The arguments are constants that hdrhistogram documents as valid.
    Histogram::new_with_max(60_000_000_000, 3).unwrap_or_else(|_| unreachable!("valid bounds"))
}

fn record(histogram: &mut Histogram<u64>, latency: Duration) {
    histogram.saturating_record(u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX));
}

/// The quantiles of several histograms, in microseconds.
fn quantiles(histograms: impl IntoIterator<Item = Histogram<u64>>) -> Values {
    let mut all = latencies();
    for histogram in histograms {
        // They were created by the same function, so the ranges agree.
        all.add(histogram).unwrap_or_else(|_| unreachable!("equal bounds"));
    }
    [(Metric::P50, 0.5), (Metric::P99, 0.99), (Metric::P999, 0.999)]
        .map(|(metric, quantile)| (metric, all.value_at_quantile(quantile) as f64 / 1e3))
        .into()
}
