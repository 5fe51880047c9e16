//! The command line of `rproxy ctl`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::MappingArgs;
use crate::control::socket::DEFAULT_PATH;
use crate::mapping::endpoint::BackendSpec;
use crate::mapping::name::Name;

/// The command line of `rproxy ctl`.
#[derive(Args, Debug)]
pub struct Ctl {
    /// The control socket of the running rproxy
    #[arg(long, value_name = "PATH", default_value = DEFAULT_PATH, global = true)]
    pub(crate) control: PathBuf,
    /// Print the answer as JSON, for programs
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do with the running rproxy.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show the mappings
    List {
        /// Print the mappings as a configuration, for `--config` and `ctl apply`; not those that drain
        #[arg(long, conflicts_with = "json")]
        toml: bool,
    },
    /// Serve more mappings: all of those given, or none
    Add(Box<MappingArgs>),
    /// Serve a mapping no more; its connections go on, its UDP flows until they are quiet, 10 s at most
    Remove {
        /// The mapping, as `list` shows it
        name: Name,
    },
    /// Send new connections and all datagrams of a mapping to another backend; connections that it has go on
    Retarget {
        /// The mapping, as `list` shows it
        name: Name,
        /// The new backend; for a range all ports, or the first one
        #[arg(long, value_name = "ADDRESS:PORTS")]
        to: BackendSpec,
    },
    /// Serve exactly what a file says: all of it, or nothing changes
    Apply {
        /// A configuration file, or mappings as `list --json` prints them; - for standard input
        file: PathBuf,
    },
    /// Take no new clients, let those that are there finish, and end
    Drain,
    /// Show connections, flows, bytes and errors of each mapping
    Stats {
        /// Again and again, after so many seconds
        #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1",
              allow_negative_numbers = true, value_parser = clap::value_parser!(u64).range(1..=5))]
        watch: Option<u64>,
    },
}
