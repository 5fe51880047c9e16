//! `netns-setup` wires the bridge, veths, addresses and firewall that `rproxy` serves.

#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;
use netns_setup::cli::Cli;
use netns_setup::kernel::Kernel;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help goes to the output, mistakes to the error stream; a closed one is nobody's loss.
            drop(error.print());
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let (mut out, mut log) = (io::stdout().lock(), io::stderr().lock());
    match cli.run(&mut Kernel::default(), &mut out, &mut log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            drop(writeln!(log, "netns-setup: {error}"));
            ExitCode::from(error.exit_code())
        }
    }
}
