//! Measurements on fresh processes, because the history of the running ones would affect them.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::unistd::Pid;
use rproxy_shim::message::NAME_VARIABLE;
use testkit::rproxy::{rproxy, rproxy_shim};

use crate::account::{CpuTimes, Family};
use crate::cage::OWN_PROGRAM;
use crate::load::{Idle, Target};
use crate::metric::{Metric, Values};
use crate::peers::{Kind, Mapping, Peer, PeerError, Running};
use crate::report::Failure;
use crate::start_times::Nanoseconds;
use crate::wiring::{Protocol, Wiring};

/// The first port for peers that are started for a measurement, below those of the others.
const FIRST_PORT: u16 = 10_000;

/// The number of mappings in `footprint`.
const MAPPINGS: u16 = 100;

/// How long a process may take to become idle.
const REST: Duration = Duration::from_millis(200);

/// Starts a peer with `count` mappings.
pub(super) fn start(
    wiring: &Wiring,
    peer: &Peer,
    protocol: Protocol,
    count: u16,
) -> Result<Running, PeerError> {
    let mapping = |port| Mapping { protocol, port };
    let mappings: Vec<_> = (FIRST_PORT..FIRST_PORT + count).map(mapping).collect();
    let running = peer.start(wiring, &mappings)?;
    running.address(protocol)?;
    thread::sleep(REST);
    Ok(running)
}

/// The memory and descriptors that idle connections add to a peer.
pub(super) fn idle(
    wiring: &Wiring,
    peer: &Peer,
    connections: usize,
    threads: usize,
) -> Result<Values, Failure> {
    let of_peer = |error: PeerError| Failure::of_peer(&error);
    let running = start(wiring, peer, Protocol::Tcp, 1).map_err(of_peer)?;
    let address = running.address(Protocol::Tcp).map_err(of_peer)?;
    let target = Target { address, duration: Duration::ZERO, threads, cpu: &CpuTimes::default };
    let before = running.family().footprint();
    let opened = wiring.client().run(|| Idle::open(target, connections));
    let _idle = opened.map_err(|error| Failure::of_load(&error, peer))?;
    thread::sleep(REST);
    let after = running.family().footprint();
    let each = |before: f64, after: f64| (after - before) / connections as f64;
    Ok(vec![
        (Metric::PrivatePerConnection, each(before.private, after.private)),
        (Metric::FdsPerConnection, each(before.fds, after.fds)),
    ])
}

/// The resource use of an unused mapping.
pub(super) fn footprint(wiring: &Wiring, peer: &Peer) -> Result<Values, PeerError> {
    // The mapping that was probed for readiness is not idle, but only one of a hundred.
    let running = start(wiring, peer, Protocol::Tcp, MAPPINGS)?;
    let all = running.family().footprint();
    let each = |sum: f64| sum / f64::from(MAPPINGS);
    Ok(vec![
        (Metric::Private, each(all.private)),
        (Metric::Pss, each(all.pss)),
        (Metric::Threads, each(all.threads)),
    ])
}

/// Times from exec to ready, of peers that are started in rotation.
pub(super) fn start_times(wiring: &Wiring, peers: &[&Peer], times: usize) -> Result<Vec<Values>, Failure> {
    let mut command = Command::new(OWN_PROGRAM);
    command.args(["start-times", "--times", &times.to_string(), "--port", &FIRST_PORT.to_string()]);
    command.args(["--to", &wiring.backend().to_string()]);
    command.args(peers.iter().filter_map(|peer| match &peer.kind {
        Kind::Docker(path) => Some(path.as_path()),
        Kind::Attached => Some(rproxy_shim()),
        _ => None,
    }));
    let attached = peers.iter().find(|peer| peer.kind == Kind::Attached);
    let plane = attached.map(|peer| peer.start(wiring, &[])).transpose();
    let plane = plane.map_err(|error| Failure::of_peer(&error))?;
    // Only a shim heeds it.
    command.envs(plane.as_ref().and_then(Running::plane).map(|name| (NAME_VARIABLE, name)));
    let output = wiring.host().spawn(command).into_output();
    if !output.status.success() {
        return Err(Failure::failed(&output.stderr.trim()));
    }
    let times: Vec<Nanoseconds> =
        serde_json::from_str(&output.stdout).map_err(|error| Failure::failed(&error))?;
    let median = |mut times: Nanoseconds| {
        times.sort_unstable();
        vec![(Metric::Start, times[times.len() / 2] as f64 / 1e6)]
    };
    Ok(times.into_iter().map(median).collect())
}

/// The time from exec until one process serves many mappings, and its memory then.
pub(super) fn many_mappings(wiring: &Wiring, count: usize) -> Result<Values, Failure> {
    let mut command = Command::new(rproxy());
    command.args(["--log-level", "warn"]).stdout(Stdio::piped()).stderr(Stdio::null());
    for port in (FIRST_PORT..).take(count) {
        command.args(["--host", &format!("0.0.0.0:{port}"), "--to", &wiring.backend().to_string()]);
    }
    let start = Instant::now();
    let child = wiring.host().run(|| command.spawn()).map_err(|error| Failure::failed(&error))?;
    let mut child = Ended(child);
    let lines = child.0.stdout.take().map_or(0, |stdout| read_lines(stdout, count));
    let took = start.elapsed();
    if lines < count {
        return Err(Failure::failed(&format_args!("{lines} of {count} mappings were ready")));
    }
    thread::sleep(REST);
    let pid = i32::try_from(child.0.id()).map(Pid::from_raw).map_err(|error| Failure::failed(&error))?;
    let footprint = Family::of(vec![pid]).footprint();
    Ok(vec![(Metric::Start, took.as_secs_f64() * 1e3), (Metric::Private, footprint.private)])
}

/// Reads `count` lines, or until the process exits.
fn read_lines(stdout: ChildStdout, count: usize) -> usize {
    BufReader::new(stdout).lines().map_while(Result::ok).take(count).count()
}

/// A process that is killed when this is dropped.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // It may have exited already.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}
