//! The load-testing harness of rproxy: it puts load on relays, and compares them on one wiring.
//!
//! `benches/README.md` says what it measures and how to read what it prints.

#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for the terminal")]

mod account;
mod backend;
mod batch;
mod cage;
mod cli;
mod compare;
mod gro;
mod load;
mod machine;
mod message;
mod metric;
mod pattern;
mod peers;
mod progress;
mod quic;
mod report;
mod sock;
mod start_times;
mod wiring;
mod workload;

use std::fmt::Display;
use std::net::SocketAddrV4;
use std::process::ExitCode;

use clap::Parser;
use nix::unistd::Pid;

use account::{CpuTimes, Family};
use backend::{Backend, cores};
use cli::{Cli, Command, Load, StartTimes};
use load::Target;
use workload::Workload;

/// The exit status of a run that found wrong data, or in which `rproxy` failed.
const FAILED: u8 = 1;

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Compare(options) => match cage::run(|| compare::main(&options)) {
            Ok(code) => code,
            Err(error) => fail(&error),
        },
        Command::Load(options) => load_one(&options),
        Command::Serve { address } => serve(address),
        Command::List => list(),
        Command::StartTimes(options) => start_times(&options),
    }
}

fn fail(error: &impl Display) -> ExitCode {
    eprintln!("benches: {error}");
    ExitCode::from(FAILED)
}

fn load_one(options: &Load) -> ExitCode {
    let family = options.pid.map(|pid| Family::of(vec![Pid::from_raw(pid)]));
    let target = Target {
        address: options.to,
        duration: options.duration,
        threads: options.threads.unwrap_or_else(cores),
        // The relay and the backend may be on other machines.
        cpu: &|| CpuTimes { peer: family.as_ref().map(Family::cpu), machine: None },
    };
    let values = match load::run(options.workload, target) {
        Ok(values) => values,
        Err(error) => return fail(&format_args!("{}: {error}", options.workload)),
    };
    match options.json {
        true => println!("{}", report::json_of(&values)),
        false => {
            for (metric, value) in values {
                println!("{:>12} {}", metric.show(value), metric.heading());
            }
        }
    }
    ExitCode::SUCCESS
}

fn serve(address: SocketAddrV4) -> ExitCode {
    match Backend::start(address) {
        Ok(backend) => {
            println!("{}", backend.address());
            println!("{} for QUIC", backend.quic());
            backend.serve();
            ExitCode::SUCCESS
        }
        Err(error) => fail(&error),
    }
}

fn list() -> ExitCode {
    println!("workloads:");
    for workload in Workload::all() {
        println!("  {workload}");
    }
    println!("peers:\n  {}", peers::NAMES.join("\n  "));
    println!("peers on request:\n  {}", peers::ON_REQUEST.join("\n  "));
    ExitCode::SUCCESS
}

fn start_times(options: &StartTimes) -> ExitCode {
    match start_times::run(options) {
        Ok(times) => {
            println!("{}", serde_json::json!(times));
            ExitCode::SUCCESS
        }
        Err(error) => fail(&error),
    }
}
