//! The command line.

use std::net::{SocketAddr, SocketAddrV4};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::workload::Workload;

/// Puts load on relays and compares them.
#[derive(Debug, Parser)]
#[command(name = "benches", version)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run workloads on several peers, interleaved, in namespaces of its own (needs root)
    Compare(Compare),
    /// Run one workload against an address behind which `serve` runs
    Load(Load),
    /// Run the backend
    Serve {
        /// The address to listen on, for TCP and UDP; QUIC has the next port
        address: SocketAddrV4,
    },
    /// List the workloads and peers
    List,
    /// Measure start times; used by `compare`
    #[command(hide = true)]
    StartTimes(StartTimes),
}

#[derive(Args, Debug)]
pub(crate) struct Compare {
    /// Workloads or groups of them, such as tcp-bulk,udp-rr-64x8-64B [default: all]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub(crate) only: Vec<String>,
    /// Peers; NAME=PATH adds a program with docker-proxy's command line [default: all]
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pub(crate) peers: Vec<String>,
    /// Rounds, in each of which every workload runs on every peer
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(crate) rounds: u32,
    /// The duration of a measurement
    #[arg(long, default_value = "2s", default_value_if("quick", "true", "500ms"), value_parser = duration)]
    pub(crate) duration: Duration,
    /// Compare in two minutes: rproxy and docker-proxy in the workloads that a change shows in, for 500 ms each, unless
    /// other options say otherwise
    #[arg(long)]
    pub(crate) quick: bool,
    /// Starts of each program in all rounds of `start`
    #[arg(long, default_value_t = 200)]
    pub(crate) starts: usize,
    /// Threads of the load generator [default: one per core]
    #[arg(long)]
    pub(crate) threads: Option<usize>,
    /// Write every value of every round to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Write charts to this file
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct Load {
    /// Such as tcp-rr-64; other numbers are possible
    pub(crate) workload: Workload,
    /// The address to connect to
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) to: SocketAddr,
    /// The duration
    #[arg(long, default_value = "5s", value_parser = duration)]
    pub(crate) duration: Duration,
    /// Threads [default: one per core]
    #[arg(long)]
    pub(crate) threads: Option<usize>,
    /// Process of the relay, to account for its CPU time
    #[arg(long)]
    pub(crate) pid: Option<i32>,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Args, Debug)]
pub(crate) struct StartTimes {
    /// Starts per program
    #[arg(long)]
    pub(crate) times: usize,
    /// The backend of the mapping
    #[arg(long)]
    pub(crate) to: SocketAddrV4,
    /// The port of the mapping
    #[arg(long)]
    pub(crate) port: u16,
    /// The programs
    pub(crate) programs: Vec<PathBuf>,
}

/// `200ms`, `2s`: long enough for a meaningful measurement, and at most ten minutes.
fn duration(text: &str) -> Result<Duration, String> {
    let duration = humantime::parse_duration(text).map_err(|error| error.to_string())?;
    let sensible = Duration::from_millis(50)..=Duration::from_secs(600);
    sensible.contains(&duration).then_some(duration).ok_or_else(|| "not between 50ms and 10m".into())
}
