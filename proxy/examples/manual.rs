//! Writes the manual pages of `rproxy` and its commands, and completions for shells, into a directory:
//! `cargo run --release -p rproxy --example manual -- DIRECTORY`.
//!
//! They follow from the definition of the command line. They are not part of the program, as they would take
//! memory in each process.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;
use rproxy::cli::Cli;
use rproxy::console;

fn main() -> ExitCode {
    let Some(directory) = env::args_os().nth(1).map(PathBuf::from) else {
        console::err(&"manual: the directory to write into is missing");
        return ExitCode::from(2);
    };
    match write(&directory) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            console::err(&format_args!("manual: {}: {error}", directory.display()));
            ExitCode::FAILURE
        }
    }
}

fn write(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    clap_mangen::generate_to(Cli::command(), directory)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut Cli::command(), "rproxy", directory)?;
    }
    Ok(())
}
