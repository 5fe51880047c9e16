//! The command line, for people: runtimes use none.

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

use super::answer;
use super::call::Environment;
use super::version::supported;

/// Publishes ports of containers as a CNI plugin
///
/// A container runtime calls it, chained after a plugin that gives containers their addresses, in the place of `portmap`.
/// CNI_COMMAND says what to do, standard input has the configuration, standard output gets the result or the error.
/// Called without CNI_COMMAND, it says which versions of the specification it supports.
#[derive(Debug, Parser)]
#[command(name = "rproxy-portmap", version, about)]
pub struct Cli {}

/// Answers the call of a runtime, or a person.
#[must_use]
pub fn run(arguments: &[OsString]) -> ExitCode {
    let environment = Environment::of_process();
    let (mut out, mut log) = (io::stdout().lock(), io::stderr().lock());
    if environment.command.is_some() {
        return answer(&environment, &mut io::stdin().lock(), &mut out, &mut log);
    }
    // Write errors are ignored: there is nowhere to report them.
    match Cli::try_parse_from(arguments) {
        Ok(Cli {}) => {
            drop(writeln!(log, "rproxy-portmap {}, a CNI plugin", env!("CARGO_PKG_VERSION")));
            drop(writeln!(log, "CNI protocol versions supported: {}", supported()));
            ExitCode::SUCCESS
        }
        Err(error) => {
            drop(error.print());
            ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2))
        }
    }
}
