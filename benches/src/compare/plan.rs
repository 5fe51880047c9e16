//! The plan of a comparison.

use std::process::exit;
use std::thread;
use std::time::Duration;

use crate::cli::Compare;
use crate::peers::{self, Client, Kind, Peer, PeerError};
use crate::workload::{UnknownWorkload, Workload};

/// How long a measurement may take beyond its duration before the run is aborted as hanging. Even the largest
/// workloads need only a fraction of it for opening connections.
const SLACK: Duration = Duration::from_secs(30);

/// The peers of a quick run.
const QUICK: [&str; 2] = ["rproxy", peers::REFERENCE];

/// Workloads and the peers to run them on.
pub(crate) struct Plan {
    pub(crate) workloads: Vec<Workload>,
    pub(crate) peers: Vec<Peer>,
    missing: Vec<PeerError>,
    steps: u32,
    rounds: u32,
    duration: Duration,
}

/// There is nothing to run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlanError {
    #[error("--only: {0}")]
    Workload(#[from] UnknownWorkload),
    #[error("--peers: {0}")]
    Peer(#[from] PeerError),
    #[error("none of the peers is installed")]
    NoPeer,
}

impl Plan {
    /// Parses the options. Peers that are not installed are left out.
    pub(crate) fn new(options: &Compare) -> Result<Self, PlanError> {
        let mut workloads = Vec::new();
        for name in &options.only {
            workloads.extend(Workload::select(name)?);
        }
        if workloads.is_empty() {
            workloads = if options.quick { Workload::quick() } else { Workload::all() };
        }
        let names: Vec<&str> = match (options.peers.is_empty(), options.quick) {
            (true, false) => peers::NAMES.into(),
            (true, true) => QUICK.into(),
            (false, _) => options.peers.iter().map(String::as_str).collect(),
        };
        let (mut peers, mut missing) = (Vec::new(), Vec::new());
        for name in names {
            match Peer::find(name) {
                Ok(peer) => peers.push(peer),
                Err(error @ PeerError::Missing(_)) => missing.push(error),
                Err(error) => return Err(error.into()),
            }
        }
        if peers.is_empty() {
            return Err(PlanError::NoPeer);
        }
        let steps = steps_of_round(&workloads, &peers) * options.rounds;
        Ok(Self { workloads, peers, missing, steps, rounds: options.rounds, duration: options.duration })
    }

    /// Prints what will be done, and what will not.
    pub(crate) fn announce(&self) {
        let names: Vec<_> = self.peers.iter().map(|peer| peer.name.as_str()).collect();
        eprintln!(
            "{} workloads × {} rounds of {:?} on: {}",
            self.workloads.len(),
            self.rounds,
            self.duration,
            names.join(", ")
        );
        for missing in &self.missing {
            eprintln!("left out: {missing}");
        }
    }

    /// The number of measurements in all rounds.
    pub(crate) fn steps(&self) -> usize {
        self.steps as usize
    }

    /// Exits, and thereby ends all other processes, if the run takes far too long: a hanging process cannot
    /// be asked to end.
    pub(crate) fn watch(&self) {
        let limit = (self.duration + SLACK) * (self.steps + self.rounds);
        thread::spawn(move || {
            thread::sleep(limit);
            eprintln!("benches: not done after {limit:?}: ending");
            exit(1);
        });
    }
}

fn steps_of_round(workloads: &[Workload], peers: &[Peer]) -> u32 {
    let steps = workloads.iter().map(|workload| match workload {
        Workload::Start => 1,
        other => peers.iter().filter(|peer| applies(*other, peer)).count(),
    });
    u32::try_from(steps.sum::<usize>()).unwrap_or(u32::MAX)
}

/// Whether a workload is meaningful for a peer.
pub(crate) fn applies(workload: Workload, peer: &Peer) -> bool {
    match workload {
        // Only relays TCP.
        _ if workload.is_udp() && matches!(peer.kind, Kind::Haproxy(_)) => false,
        // Datagrams of QUIC have no header before them.
        _ if workload.is_quic() && matches!(peer.kind, Kind::Standalone(_, Client::Header)) => false,
        // With more than one flow, it passes datagrams of one client to the process of another.
        _ if workload.is_udp() && peer.kind == Kind::Socat => {
            matches!(workload, Workload::UdpRr { flows: 1, .. })
        }
        Workload::Start => matches!(peer.kind, Kind::Docker(_) | Kind::Attached),
        Workload::ScaleMappings { .. } => peer.name == "rproxy-standalone",
        // The kernel's paths have no port of their own for each of several mappings.
        Workload::UdpPorts { .. } => peer.has_processes(),
        Workload::TcpIdle { .. } | Workload::Footprint => peer.has_processes(),
        // With a process per idle connection, the curve would not be comparable.
        Workload::ScaleTcp { .. } | Workload::ScaleUdp { .. } => {
            peer.has_processes() && peer.kind != Kind::Socat
        }
        _ => true,
    }
}
