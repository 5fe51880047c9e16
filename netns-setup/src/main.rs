//! `netns-setup` sets up the bridge, veths, addresses and firewall around `rproxy`.

#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::process::ExitCode;

use netns_setup::cli::{Cli, Unparsed};
use netns_setup::kernel::Kernel;
use rproxy_mapping::escape::escaped;

fn main() -> ExitCode {
    let (mut out, mut log) = (io::stdout().lock(), io::stderr().lock());
    // Write errors are ignored: there is nowhere to report them.
    let cli = match Cli::from_args(std::env::args_os().collect()) {
        Ok(cli) => cli,
        Err(Unparsed::Asked(text)) => {
            drop(write!(out, "{text}"));
            return ExitCode::SUCCESS;
        }
        Err(Unparsed::Wrong(message)) => {
            drop(writeln!(log, "netns-setup: {message}; see `netns-setup --help`"));
            return ExitCode::from(2);
        }
    };
    let hints = cli.hints();
    match cli.run(&mut Kernel::default(), &mut out, &mut log) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            drop(writeln!(log, "netns-setup: {}", escaped(&hints.complete(&error.to_string()))));
            ExitCode::from(error.exit_code())
        }
    }
}
