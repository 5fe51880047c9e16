//! The relay of a network: one `rproxy` that serves all of its ports.
//!
//! A supervisor ([`supervisor`]) starts it, holds the sockets of all ports, and starts it again when it ends. Commands
//! ask the supervisor for changes ([`client`]), over a Unix socket in the state directory.

pub mod channel;
pub mod client;
pub mod find;
pub mod launch;
pub mod message;
pub mod process;
pub mod supervisor;

use std::io;
use std::path::{Path, PathBuf};

use crate::firewall::tool;

/// An error of the relay.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// A program could not be run.
    #[error("cannot run {}: {source}; name rproxy with --rproxy", program.display())]
    Run {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The supervisor's program is missing.
    #[error("cannot find netns-setup beside {}, which has to supervise it", .0.display())]
    NoSupervisor(PathBuf),
    /// The supervisor's files could not be prepared.
    #[error("cannot {step} {}: {source}", path.display())]
    Prepare {
        /// What was tried.
        step: &'static str,
        /// With which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The conversation with the supervisor failed.
    #[error("cannot talk to the relay's supervisor: {0}; `netns-setup repair` starts another")]
    Conversation(#[source] io::Error),
    /// The supervisor refused a change.
    #[error("the relay cannot serve that: {0}")]
    Refused(String),
    /// The sockets could not be prepared.
    #[error("cannot hand over the sockets: {0}")]
    Socket(#[source] io::Error),
    /// A process could not be stopped.
    #[error("cannot stop the process {pid}: {source}")]
    Stop {
        /// The process.
        pid: u32,
        /// Why.
        source: io::Error,
    },
}

/// Finds `rproxy`: at the given path, beside this program, or in `PATH`.
#[must_use]
pub fn program(given: Option<&Path>) -> Option<PathBuf> {
    let beside =
        || std::env::current_exe().ok().map(|own| own.with_file_name("rproxy")).filter(|file| file.is_file());
    given.map(Path::to_owned).or_else(beside).or_else(|| tool::find("rproxy"))
}
