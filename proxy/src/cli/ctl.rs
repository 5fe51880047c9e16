//! The command line of `rproxy ctl`.

use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args, Subcommand, ValueEnum};
use rproxy_mapping::endpoint::BackendSpec;
use rproxy_mapping::name::Name;

use super::MappingArgs;
use super::values::parse_backend;
use crate::control::chosen::{ClientFilter, NamePattern};
use crate::control::protocol;
use crate::control::{DEFAULT_PATH, SERVICE_PATH};

/// The command line of `rproxy ctl`.
#[derive(Args, Debug)]
pub struct Ctl {
    /// The control socket of the running rproxy [default: that of the service, /run/rproxy/control.sock, if it runs, or
    /// else /run/rproxy.sock]
    #[arg(long, value_name = "PATH", global = true)]
    control: Option<PathBuf>,
    /// Print the response as JSON, for programs, and also an error: {"error":{"kind":…,"message":…}}
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Ctl {
    /// The path of the control socket.
    pub(crate) fn control(&self) -> &Path {
        let of_service = Path::new(SERVICE_PATH);
        let default = || if of_service.exists() { of_service } else { Path::new(DEFAULT_PATH) };
        self.control.as_deref().unwrap_or_else(default)
    }
}

/// Some connections and flows: those that have all of what is given.
#[derive(Args, Debug)]
pub(crate) struct Chosen {
    /// Those of mappings of this name, in which * stands for any text
    #[arg(long, value_name = "NAME", group = "which")]
    mapping: Option<NamePattern>,
    /// Those of clients at this address, with this port if there is one, or in this network
    #[arg(long, value_name = "ADDRESS|ADDRESS:PORT|NETWORK", group = "which", value_parser = parse_client)]
    client: Option<String>,
    /// The one with this number, as in `connections`
    #[arg(long, value_name = "NUMBER", group = "which", value_parser = parse_id)]
    id: Option<u64>,
}

impl Chosen {
    /// The same in a request.
    pub(crate) fn to_request(&self) -> protocol::Chosen {
        let Self { mapping, client, id } = self;
        let mapping = mapping.as_ref().map(ToString::to_string);
        protocol::Chosen { mapping, client: client.clone(), id: *id, ..protocol::Chosen::default() }
    }
}

fn parse_client(text: &str) -> Result<String, String> {
    text.parse().map(|_filter: ClientFilter| text.to_owned())
}

fn parse_id(text: &str) -> Result<u64, String> {
    let wrong = |_error| "not the number of a connection; `rproxy ctl connections` shows it as ID".to_owned();
    text.parse().map_err(wrong)
}

/// The commands for a running rproxy.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the mappings
    List {
        /// Print the mappings as a configuration, for `--config` and `ctl apply`; without those that drain
        #[arg(long, conflicts_with = "json")]
        toml: bool,
    },
    /// Add mappings: all that are given, or none
    Add(Box<MappingArgs>),
    /// Remove a mapping; its connections continue, its UDP flows until they are quiet, at most 10 s
    Remove {
        /// The name of the mapping, as in `list`
        name: Name,
        /// Reset its connections and end its flows at once
        #[arg(long)]
        cut: bool,
    },
    /// Send new connections and all datagrams of a mapping to another backend; existing connections continue
    Retarget {
        /// The name of the mapping, as in `list`
        name: Name,
        /// The new backend, by its address or its name, which is looked up again; for a range all ports, or only the first
        #[arg(long, value_name = "ADDRESS:PORTS", value_parser = parse_backend)]
        to: BackendSpec,
        /// Reset the connections to the old backend
        #[arg(long)]
        cut: bool,
    },
    /// Replace all mappings with those of a file; if that fails, nothing changes
    Apply {
        /// A configuration file, or mappings as printed by `list --json`; - for standard input
        file: PathBuf,
        /// Reset the connections and end the flows of mappings that are removed
        #[arg(long)]
        cut: bool,
    },
    /// Accept no new clients, let existing ones finish, and exit
    Drain,
    /// Show the connections and flows: client, backend, state, age, bytes and rates
    Connections {
        #[command(flatten)]
        chosen: Chosen,
        /// Show at most so many, the oldest first [default: 10000]
        #[arg(long, value_name = "COUNT")]
        limit: Option<usize>,
    },
    /// Reset connections and end flows
    #[command(group = ArgGroup::new("which").required(true).multiple(true))]
    Cut {
        #[command(flatten)]
        chosen: Chosen,
        /// All that this process has
        #[arg(long, group = "which", conflicts_with_all = ["mapping", "client", "id"])]
        all: bool,
    },
    /// Show connections, flows, bytes and errors of each mapping
    Stats(StatsArgs),
}

/// The arguments of `stats`.
#[derive(Args, Debug)]
pub(crate) struct StatsArgs {
    /// Show rates too, and redraw every so many seconds; what is not a terminal gets one table or line of JSON
    /// after the other
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1",
          allow_negative_numbers = true, value_parser = parse_seconds)]
    pub(crate) watch: Option<u64>,
    /// Show only mappings of this name, in which * stands for any text; may be repeated
    #[arg(long, value_name = "NAME")]
    pub(crate) mapping: Vec<NamePattern>,
    /// Show the mappings with the largest number first, or by name; rates (per second) need --watch
    #[arg(long, value_name = "KEY", default_value = "name")]
    pub(crate) sort: SortKey,
}

fn parse_seconds(text: &str) -> Result<u64, String> {
    let seconds = text.parse().ok().filter(|seconds| (1..=3600).contains(seconds));
    seconds.ok_or_else(|| "not a number of seconds from 1 to 3600; write one such as 5".to_owned())
}

/// What mappings are sorted by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum SortKey {
    Name,
    Connections,
    ConnectionsTotal,
    Flows,
    FlowsTotal,
    BytesIn,
    BytesOut,
    DatagramsIn,
    DatagramsOut,
    Errors,
    RateConnections,
    RateFlows,
    RateIn,
    RateOut,
    RateDatagramsIn,
    RateDatagramsOut,
}

impl SortKey {
    /// Whether it is a rate, which takes two looks at the counters.
    pub(crate) fn is_rate(self) -> bool {
        matches!(
            self,
            Self::RateConnections
                | Self::RateFlows
                | Self::RateIn
                | Self::RateOut
                | Self::RateDatagramsIn
                | Self::RateDatagramsOut
        )
    }
}
