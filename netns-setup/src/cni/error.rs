//! What can go wrong, as the runtime hears of it (CNI specification 1.1.0, section 5, "Error").

use std::io;
use std::path::PathBuf;

use crate::firewall::tool::ToolError;
use crate::hints::Hints;
use crate::private_dir::DirError;
use crate::relay::RelayError;
use crate::reserve::ReserveError;
use crate::shared::Shared;
use crate::state::StateError;

/// An error of the plugin.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// A version that this plugin does not know, or that lacks the command.
    #[error("{0}")]
    Version(String),
    /// A key of the configuration whose meaning this plugin does not have.
    #[error("{key} is not supported: {way_out}")]
    Unsupported {
        /// The key.
        key: &'static str,
        /// What does the same.
        way_out: &'static str,
    },
    /// Variables of the environment that are missing or wrong.
    #[error("{0}")]
    Environment(String),
    /// Standard input could not be read.
    #[error("cannot read the configuration from standard input: {0}")]
    Read(#[source] io::Error),
    /// Standard input is no JSON.
    #[error("the configuration on standard input is not valid JSON: {0}")]
    Decode(#[source] serde_json::Error),
    /// The configuration is wrong.
    #[error("{0}")]
    Config(String),
    /// No port can be published now.
    #[error("{0}")]
    NotReady(String),
    /// Somebody else has a host port.
    #[error("host port {port} for container {container} is taken by {holder}")]
    PortTaken {
        /// The port.
        port: String,
        /// The container that was to have it.
        container: String,
        /// Who has it.
        holder: String,
    },
    /// A host port could not be bound.
    #[error(transparent)]
    Reserve(#[from] ReserveError),
    /// A network of `netns-setup` has a host port.
    #[error(transparent)]
    Shared(#[from] Shared),
    /// The rules could not be changed.
    #[error("{}", of_tool(.0))]
    Rules(#[from] ToolError),
    /// The relay could not be changed.
    #[error("{}", of_relay(.0))]
    Relay(#[from] RelayError),
    /// The directory of the state could not be used.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// The states of networks of `netns-setup` could not be read.
    #[error(transparent)]
    States(#[from] StateError),
    /// The state is of another network namespace.
    #[error(
        "{} belongs to another network namespace: give this one a directory of its own with \"stateDir\"", .0.display()
    )]
    OtherNamespace(PathBuf),
    /// The state cannot be read.
    #[error(
        "cannot read {}: {source}; remove it, and the next call takes away what is published; then start the containers again",
        file.display()
    )]
    State {
        /// The file.
        file: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// The state was written by a newer version.
    #[error("{} has the version {version}, which this plugin does not know: install the newer one again", file.display())]
    OtherVersion {
        /// The file.
        file: PathBuf,
        /// Its version.
        version: u32,
    },
    /// The directory is that of a network of `netns-setup`, or of all of them.
    #[error("{} belongs to netns-setup: choose another \"stateDir\"", .0.display())]
    OtherDirectory(PathBuf),
    /// Another directory has ports in this network namespace.
    #[error(
        "{} already has the ports of this network namespace, which cannot be in {} as well: choose one \"stateDir\" for all networks",
        other.display(),
        own.display()
    )]
    SecondDirectory {
        /// That of this call.
        own: PathBuf,
        /// The other one.
        other: PathBuf,
    },
    /// The network namespace cannot be told.
    #[error("cannot tell the network namespace: {0}")]
    Namespace(#[source] io::Error),
    /// No random bits.
    #[error("cannot read /dev/urandom: {0}")]
    Random(#[source] io::Error),
    /// The host's routes or a kernel parameter could not be read or set.
    #[error("cannot {step}: {source}")]
    Host {
        /// What was tried.
        step: String,
        /// Why.
        source: io::Error,
    },
    /// A stale conntrack entry could not be deleted.
    #[error("cannot delete conntrack entries of UDP flows: {0}")]
    Conntrack(#[source] io::Error),
    /// The return path of transparent sockets could not be changed.
    #[error("the answers of containers to their clients' addresses: {}", Hints::about(dir).complete(&source.to_string()))]
    ReturnPath {
        /// The state directory, which the commands in messages have to name.
        dir: PathBuf,
        /// Why.
        source: Box<crate::error::Error>,
    },
    /// What is there differs from what was set up.
    #[error("{}", .0.join("; "))]
    Differs(Vec<String>),
    /// Several parts of a removal failed.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Several(Vec<Self>),
}

/// The way out by the keys of the configuration: the options of `netns-setup` are not those of this plugin.
fn of_tool(error: &ToolError) -> String {
    match error {
        ToolError::Missing(program) => {
            format!("{program} is not installed: install nftables, or choose \"policy\": \"relay\"")
        }
        other => other.to_string(),
    }
}

fn of_relay(error: &RelayError) -> String {
    match error {
        RelayError::Run { program, source } => {
            format!("cannot run {}: {source}; name rproxy with \"rproxy\"", program.display())
        }
        RelayError::Conversation(source) => format!(
            "cannot talk to the relay's supervisor: {source}; if that goes on, kill the process whose command line has \
             supervise-relay, and the next call starts another"
        ),
        other => other.to_string(),
    }
}

impl CniError {
    /// The number for the runtime: below 100 those of the specification, from 100 on those of `docs/cni.md`.
    #[must_use]
    pub fn code(&self) -> u32 {
        match self {
            Self::Version(_) => 1,
            Self::Unsupported { .. } => 2,
            Self::Environment(_) => 4,
            Self::Read(_) => 5,
            Self::Decode(_) => 6,
            Self::Config(_) => 7,
            Self::NotReady(_) => 50,
            Self::PortTaken { .. } | Self::Shared(_) => 100,
            Self::Reserve(_) => 101,
            Self::Rules(_) | Self::Host { .. } | Self::Conntrack(_) | Self::ReturnPath { .. } => 102,
            Self::Relay(_) => 103,
            Self::Dir(_)
            | Self::States(_)
            | Self::OtherNamespace(_)
            | Self::OtherVersion { .. }
            | Self::OtherDirectory(_)
            | Self::SecondDirectory { .. }
            | Self::State { .. }
            | Self::Namespace(_)
            | Self::Random(_) => 104,
            Self::Differs(_) => 105,
            Self::Several(errors) => errors.first().map_or(104, Self::code),
        }
    }

    /// Where the specification says more, if the message does not.
    #[must_use]
    pub fn details(&self) -> &'static str {
        match self {
            Self::Environment(_) => "CNI specification 1.1.0, section 2, \"Parameters\"",
            _ => "",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_no_options_of_another_program() {
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        for (error, way_out) in [
            (CniError::from(ToolError::Missing("nft")), "\"policy\": \"relay\""),
            (RelayError::Run { program: "/x".into(), source: missing() }.into(), "with \"rproxy\""),
            (RelayError::Conversation(missing()).into(), "the next call starts another"),
        ] {
            let said = error.to_string();
            assert!(said.contains(way_out) && !said.contains("--") && !said.contains("repair"), "{said}");
        }
    }
}
