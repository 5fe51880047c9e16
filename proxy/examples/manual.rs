//! Writes the manual pages of `rproxy` and its commands, and shell completions, into a directory: `cargo run
//! --release -p rproxy --example manual -- DIRECTORY`.
//!
//! They are generated from the definition of the command line. The program itself does not contain the
//! generator, which would take memory in each process.

use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::CommandFactory;
use rproxy::cli::Cli;
use rproxy::log::console;

#[path = "../../packaging/manuals.rs"]
mod manuals;

/// Sections that cannot be derived from the command line (man-pages(7)), in roff.
const SECTIONS: &str = r#"
.SH SIGNALS
.TP
.BR SIGTERM ", " SIGINT ", " SIGQUIT
Accept no new clients, let connections finish for up to \-\-drain\-timeout, and exit. A second signal exits at once.
.TP
.B SIGHUP
With \-\-config: reload the file and apply the differences. If it has errors, nothing changes. Otherwise ignored.
.TP
.B SIGUSR2
Look up the program again by its name, start it, and hand over the sockets and flows. Connections finish, for up to
\-\-upgrade\-drain\-timeout if given.
.PP
SIGHUP and SIGUSR2 are ignored while connections finish.
.SH FILES
.TP
.I /etc/rproxy/rproxy.toml
The configuration of the service, passed with \-\-config.
.TP
.I /run/rproxy/control.sock
The control socket of the service, where \(dqrproxy ctl\(dq looks first.
.TP
.I /run/rproxy.sock
The default path of the control socket; see \-\-control.
.TP
.I /etc/docker/daemon.json
Makes dockerd use rproxy\-shim or rproxy, with \(dquserland\-proxy\-path\(dq.
.TP
.I containers.conf
Has rootless Podman publish ports by rproxy, if \(dqhelper_binaries_dir\(dq begins with the directory of a link to it
named rootlessport, such as
.IR /usr/lib/rproxy/podman .
By that name, rproxy takes no arguments, and JSON of Podman on standard input.
.SH EXIT STATUS
.TP
.B 0
Success, or ended by a signal or a request.
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
    manuals::pages(Cli::command(), concat!("rproxy ", env!("CARGO_PKG_VERSION")), directory)?;
    let page = File::options().append(true).open(directory.join("rproxy.1"));
    page?.write_all(SECTIONS.as_bytes())?;
    manuals::completions(Cli::command(), "rproxy", directory)
}
