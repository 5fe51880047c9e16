//! Writes the manual pages of `rproxy` and its commands, and completions for shells, into a directory:
//! `cargo run --release -p rproxy --example manual -- DIRECTORY`.
//!
//! They follow from the definition of the command line. They are not part of the program, as they would take
//! memory in each process.

use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;
use rproxy::cli::Cli;
use rproxy::log::console;

/// What the command line does not say (man-pages(7)), in roff.
const SECTIONS: &str = r#"
.SH SIGNALS
.TP
.BR SIGTERM ", " SIGINT ", " SIGQUIT
Take no new clients, let connections finish for \-\-drain\-timeout, and end. A second one ends at once.
.TP
.B SIGHUP
With \-\-config: read the file again, and change what differs. A mistake changes nothing. Otherwise ignored.
.TP
.B SIGUSR2
Let the program that is now called as this one take over its sockets and flows. Connections finish, for
\-\-upgrade\-drain\-timeout if that is given.
.SH FILES
.TP
.I /etc/rproxy.toml
The configuration that the service of contrib/systemd serves; \-\-config names it.
.TP
.I /run/rproxy.sock
The control socket, unless \-\-control names another one.
.TP
.I /etc/docker/daemon.json
Has dockerd use rproxy, by \(dquserland\-proxy\-path\(dq.
.SH EXIT STATUS
.TP
.B 0
It ended as it was asked to, or did what was asked.
.TP
.B 1
The start failed, serving failed, the configuration is wrong, or the running rproxy refused. Standard error says why.
.TP
.B 2
The command line is wrong.
"#;

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
    let page = File::options().append(true).open(directory.join("rproxy.1"));
    page?.write_all(SECTIONS.as_bytes())?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut Cli::command(), "rproxy", directory)?;
    }
    Ok(())
}
