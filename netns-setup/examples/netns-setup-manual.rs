//! Writes the manual pages of `netns-setup`, its commands and `rproxy-portmap`, and shell completions, into a directory: `cargo run
//! --release -p netns-setup --example netns-setup-manual -- DIRECTORY`.
//!
//! They are generated from the definition of the command line.

use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::CommandFactory;
use netns_setup::cli::Cli;
use netns_setup::cni;

#[path = "../../packaging/manuals.rs"]
mod manuals;

/// Sections that cannot be derived from the command line (man-pages(7)), in roff.
const SECTIONS: &str = r#"
.SH FILES
.TP
.I /run/netns\-setup/state.json
What is set up, and the change in progress; see \-\-state\-dir.
.TP
.I /run/netns\-setup/relay.sock
The control socket of the rproxy that serves the published ports, for \(dqrproxy ctl \-\-control\(dq.
.TP
.I /run/netns\-setup/relay.log
What that rproxy and its supervisor report.
.TP
.I /run/netns\-setup\-registry
A copy of each state, by network namespace, from which \(dqrepair\(dq and \(dqdown\(dq restore one that is lost.
.TP
.I /run/netns
The network namespaces of containers, as \(dqip netns\(dq knows them.
.TP
.I /etc/sysctl.d/60\-netns\-setup\-BRIDGE.conf
Keeps forwarding enabled after a reboot; see \-\-persist of \(dqup\(dq. \(dqdown\(dq removes it, unless somebody has changed it.
.SH EXIT STATUS
.TP
.B 0
Success.
.TP
.B 1
The command failed, or \(dqcheck\(dq or \(dqrepair\(dq found what they cannot repair. Standard error says why, or standard output
with \-\-json.
.TP
.B 2
The command line is wrong.
.TP
.B 130, 143
Ended by SIGINT or SIGTERM. What was done is undone. \(dqwatch\(dq ends with 0.
.SH SEE ALSO
.BR rproxy (1),
.BR ip\-netns (8),
.BR nft (8),
.BR iptables (8)
"#;

/// The same of `rproxy-portmap`.
const PORTMAP_SECTIONS: &str = r#"
.SH ENVIRONMENT
.TP
.B CNI_COMMAND
ADD, DEL, CHECK, GC, STATUS or VERSION.
.TP
.BR CNI_CONTAINERID ", " CNI_IFNAME ", " CNI_NETNS
The container, its interface and its network namespace, of ADD, DEL and CHECK.
.SH CONFIGURATION
Standard input has the network configuration in JSON, with the keys of the specification and these:
.TP
.B policy
\(dqboth\(dq (the default): the kernel translates what comes from outside, the relay serves the rest; \(dqdnat\(dq: the kernel
translates all that it can; \(dqrelay\(dq: the relay serves everything. With \(dqdnat\(dq, route_localnet of the interface to the
container is on while a port needs it. It stays on if it was before, but not if another program needs it since.
.TP
.B rproxy
The path of rproxy; by default beside this program, then in PATH.
.TP
.B stateDir
Where it remembers what is published, by default /run/rproxy\-portmap.
.SH FILES
.TP
.I /run/rproxy\-portmap/attachments.json
What is published.
.TP
.I /run/rproxy\-portmap/relay.sock
The control socket of the rproxy that serves the ports, for \(dqrproxy ctl \-\-control\(dq.
.TP
.I /run/rproxy\-portmap/relay.log
What that rproxy and its supervisor report.
.SH EXIT STATUS
.TP
.B 0
Success.
.TP
.B 1
Failure. Standard output has the error in JSON.
.SH SEE ALSO
.BR rproxy (1),
.BR netns\-setup (1),
.BR nft (8)
"#;

fn main() -> ExitCode {
    // Write errors are ignored: there is nowhere to report them.
    let complain = |message: &str| drop(writeln!(io::stderr(), "netns-setup-manual: {message}"));
    let Some(directory) = env::args_os().nth(1).map(PathBuf::from) else {
        complain("the directory to write into is missing");
        return ExitCode::from(2);
    };
    match write(&directory) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&format!("{}: {error}", directory.display()));
            ExitCode::FAILURE
        }
    }
}

fn write(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    for (command, sections) in [(Cli::command(), SECTIONS), (cni::cli::Cli::command(), PORTMAP_SECTIONS)] {
        let name = format!("{}.1", command.get_name());
        manuals::pages(command, concat!("netns-setup ", env!("CARGO_PKG_VERSION")), directory)?;
        let page = File::options().append(true).open(directory.join(name));
        page?.write_all(sections.as_bytes())?;
    }
    manuals::completions(Cli::command(), "netns-setup", directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_command_has_a_page_and_a_completion() {
        let temp = tempfile::tempdir().unwrap();
        write(temp.path()).unwrap();
        let read = |name: &str| fs::read_to_string(temp.path().join(name)).unwrap();
        assert!(read("netns-setup.1").contains("/run/netns\\-setup\\-registry"));
        let completions = ["netns-setup.bash", "_netns-setup", "netns-setup.fish"].map(read);
        for command in Cli::command().get_subcommands() {
            let name = command.get_name();
            assert!(read(&format!("netns-setup-{name}.1")).contains(".SH SYNOPSIS"), "{name}");
            assert!(completions.iter().all(|text| text.contains(name)), "{name}");
        }
        assert!(read("rproxy-portmap.1").contains("CNI_COMMAND"));
        assert!(read("netns-setup-transparent-up.1").contains("\\-\\-interface"));
    }
}
