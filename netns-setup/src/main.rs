//! `netns-setup` sets up the bridge, veths, addresses and firewall around `rproxy`.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use netns_setup::cli::{Cli, Failure, Unparsed, asks_for_json};
use netns_setup::kernel::Kernel;
use netns_setup::{descriptors, relay};

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    if let Some(status) = relay::supervisor::run_if_asked(&args) {
        return status;
    }
    descriptors::raise_limit();
    let (mut out, mut log) = (io::stdout().lock(), io::stderr().lock());
    let json = asks_for_json(&args);
    let failure = match Cli::from_args(args) {
        Ok(cli) => {
            let hints = cli.hints();
            match cli.run(&mut Kernel::default(), &mut out, &mut log) {
                Ok(()) => return ExitCode::SUCCESS,
                Err(error) => Failure::of(&error, &hints),
            }
        }
        Err(Unparsed::Asked(text)) => {
            drop(write!(out, "{text}"));
            return ExitCode::SUCCESS;
        }
        Err(Unparsed::Wrong(message)) => Failure::usage(&message),
    };
    // Write errors are ignored: there is nowhere to report them.
    drop(match json {
        true => writeln!(out, "{}", failure.json()),
        false => writeln!(log, "netns-setup: {}", failure.message),
    });
    ExitCode::from(failure.status)
}
