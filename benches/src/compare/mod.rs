//! Runs every workload on every peer, in rounds.
//!
//! Within a round, each workload runs on all peers in turn, and every round starts with another peer. A
//! machine that becomes faster or slower meanwhile therefore does so for all of them.

mod apart;
mod plan;

use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use crate::account::{CpuTimes, machine_cpu};
use crate::backend::cores;
use crate::cli::Compare;
use crate::fail;
use crate::load::{self, Idle, IdleFlows, LoadError, Shape, Target};
use crate::metric::Values;
use crate::peers::{Mapping, Peer, PeerError, Running};
use crate::progress::Progress;
use crate::report::{Failure, Report, Sample};
use crate::wiring::{Protocol, Wiring, WiringError};
use crate::workload::Workload;
use plan::{Plan, PlanError};

/// The port of the first peer; the others use the following ones.
const FIRST_PORT: u16 = 30_000;

/// A peer that uses less CPU time than this within [`QUIET`] has finished its previous work.
const LITTLE: Duration = Duration::from_millis(1);
const QUIET: Duration = Duration::from_millis(20);
/// The time limit for that.
const SETTLE: Duration = Duration::from_secs(3);

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
enum CompareError {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Wiring(#[from] WiringError),
    #[error(transparent)]
    Report(#[from] crate::report::WriteError),
}

/// Runs a comparison, and prints and writes its result.
pub(crate) fn main(options: &Compare) -> ExitCode {
    match compare(options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => fail(&error),
    }
}

/// Returns whether everything went well: no wrong data from any peer, and no failure of `rproxy`.
fn compare(options: &Compare) -> Result<bool, CompareError> {
    let plan = Plan::new(options)?;
    plan.announce();
    plan.watch();
    let run = Run { wiring: Wiring::new()?, options, progress: Progress::new(plan.steps()), plan: &plan };
    let samples = run.rounds();
    let report = Report::new(&plan.workloads, &plan.peers, options, samples);
    report.print();
    report.write(options.json.as_deref(), options.svg.as_deref())?;
    Ok(report.is_good())
}

struct Run<'a> {
    wiring: Wiring,
    plan: &'a Plan,
    options: &'a Compare,
    progress: Progress,
}

impl Run<'_> {
    fn rounds(mut self) -> Vec<Sample> {
        let mut samples = Vec::new();
        for round in 0..self.options.rounds {
            let peers = self.start_peers(round, &mut samples);
            for workload in &self.plan.workloads {
                self.workload(round, *workload, &peers, &mut samples);
            }
        }
        self.progress.finish();
        samples
    }

    /// Starts all peers for a round. A peer that cannot be started fails in every workload.
    fn start_peers(&self, round: u32, samples: &mut Vec<Sample>) -> Vec<Running> {
        let mut running = Vec::new();
        for (peer, port) in self.plan.peers.iter().zip(FIRST_PORT..) {
            let mappings = [Protocol::Tcp, Protocol::Udp].map(|protocol| Mapping { protocol, port });
            match peer.start(&self.wiring, &mappings) {
                Ok(peer) => running.push(peer),
                Err(error) => {
                    self.progress.note(&error.to_string());
                    let of_peer =
                        self.plan.workloads.iter().filter(|workload| plan::applies(**workload, peer));
                    samples.extend(of_peer.map(|workload| Sample {
                        workload: *workload,
                        peer: peer.name.clone(),
                        round,
                        result: Err(Failure::of_peer(&error)),
                    }));
                }
            }
        }
        running
    }

    fn workload(&mut self, round: u32, workload: Workload, peers: &[Running], samples: &mut Vec<Sample>) {
        let heading = format!("round {}/{} · {workload}", round + 1, self.options.rounds);
        let peers: Vec<_> = peers.iter().filter(|running| plan::applies(workload, running.peer())).collect();
        if workload == Workload::Start {
            self.progress.step(&heading, "all in turn");
            let peers: Vec<_> = peers.iter().map(|running| running.peer()).collect();
            samples.extend(self.starts(round, &peers));
            return;
        }
        for turn in 0..peers.len() {
            let running = peers[(turn + round as usize) % peers.len()];
            self.progress.step(&heading, &running.peer().name);
            let result = self.measure(workload, running);
            if let Err(failure) = &result {
                self.progress.note(&format!("{workload}: {}: {failure}", running.peer().name));
            }
            samples.push(Sample { workload, peer: running.peer().name.clone(), round, result });
        }
    }

    fn measure(&self, workload: Workload, running: &Running) -> Result<Values, Failure> {
        let peer = running.peer();
        let of_peer = |error: PeerError| Failure::of_peer(&error);
        match workload {
            Workload::TcpIdle { connections } => apart::idle(&self.wiring, peer, connections, cores()),
            Workload::Footprint => apart::footprint(&self.wiring, peer).map_err(of_peer),
            Workload::ScaleMappings { count } => apart::many_mappings(&self.wiring, count),
            Workload::UdpPorts { ports } => {
                let fresh = apart::start(&self.wiring, peer, Protocol::Udp, ports).map_err(of_peer)?;
                self.load(workload, &fresh)
            }
            // No other workload needs a mapping to its port.
            Workload::QuicDown { .. } | Workload::QuicRr { .. } => {
                let fresh = apart::start(&self.wiring, peer, Protocol::Quic, 1).map_err(of_peer)?;
                self.load(workload, &fresh)
            }
            // Idle connections or flows end with the peer's processes, so they do not occupy ports of other
            // peers.
            Workload::ScaleTcp { .. } | Workload::ScaleUdp { .. } => {
                let fresh = apart::start(&self.wiring, peer, protocol(workload), 1).map_err(of_peer)?;
                self.load(workload, &fresh)
            }
            _ => self.load(workload, running),
        }
    }

    fn load(&self, workload: Workload, running: &Running) -> Result<Values, Failure> {
        let peer = running.peer();
        let address = running.address(protocol(workload)).map_err(|error| Failure::of_peer(&error))?;
        let _active = running.activate(&self.wiring);
        let family = running.family();
        let target = Target {
            address,
            duration: self.options.duration,
            threads: self.options.threads.unwrap_or_else(cores),
            cpu: &|| CpuTimes { peer: peer.has_processes().then(|| family.cpu()), machine: machine_cpu() },
        };
        let result = self.wiring.client().run(|| put_load(workload, target));
        settle(target);
        result.map_err(|error| Failure::of_load(&error, peer))
    }

    fn starts(&self, round: u32, peers: &[&Peer]) -> Vec<Sample> {
        let times = self.options.starts.div_ceil(self.options.rounds as usize);
        let sample = |peer: &Peer, result| Sample {
            workload: Workload::Start,
            peer: peer.name.clone(),
            round,
            result,
        };
        match apart::start_times(&self.wiring, peers, times) {
            Ok(values) => peers.iter().zip(values).map(|(peer, values)| sample(peer, Ok(values))).collect(),
            Err(failure) => peers.iter().map(|peer| sample(peer, Err(failure.clone()))).collect(),
        }
    }
}

fn protocol(workload: Workload) -> Protocol {
    match workload.is_udp() {
        true if workload.is_quic() => Protocol::Quic,
        true => Protocol::Udp,
        false => Protocol::Tcp,
    }
}

fn put_load(workload: Workload, target: Target<'_>) -> Result<Values, LoadError> {
    match workload {
        Workload::ScaleTcp { idle } => {
            let _idle = Idle::open(target, idle)?;
            load::rr(target, 64)
        }
        Workload::ScaleUdp { idle } => {
            let _idle = IdleFlows::open(target, idle)?;
            load::udp_rr(target, Shape { flows: 64, window: 8, size: 64, ports: 1 })
        }
        workload => load::run(workload, target),
    }
}

/// Waits until the peer has finished closing connections, so that the next peer has the machine to itself.
fn settle(target: Target<'_>) {
    let deadline = Instant::now() + SETTLE;
    loop {
        let before = (target.cpu)();
        thread::sleep(QUIET);
        let used = (target.cpu)().since(before).peer;
        if used.is_none_or(|used| used < LITTLE) || Instant::now() >= deadline {
            return;
        }
    }
}
