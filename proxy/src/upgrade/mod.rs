//! Upgrades: a new process, possibly of a newer program, takes over everything that clients can see.
//!
//! On `SIGUSR2`, the old process has its launcher start the new one, and offers it the mappings, their
//! sockets and the control socket. The new process completes every step that can fail, and sends `Prepared`.
//! The old one then pauses UDP and sends its flows; the new one serves, and confirms that. Meanwhile
//! datagrams wait in the kernel, and both accept connections. If a step up to here fails or takes too long,
//! the old process continues to serve. Otherwise it lets its connections finish.
//!
//! | old process | new process |
//! |---|---|
//! | `Hello`, `Offer`, descriptors | |
//! | | `Prepared` |
//! | `Flows` and descriptors, repeatedly; the last one is empty | |
//! | | `Serving` |
//! | `Yours` | |
//!
//! The new process trusts the old one no more than a control client. It parses mappings in the same way, and
//! if they cannot change at run time, they must equal those of its command line.

mod channel;
mod launcher;
mod new;
mod old;
mod program;
mod resolver;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitStatus;

use rproxy_sys::udp::LocalAddr;
use serde::{Deserialize, Serialize};

pub use self::launcher::Launcher;
pub(crate) use self::launcher::Reopened;
pub use self::new::{OldProcess, Sockets, claim, take_over};
pub(crate) use self::old::Owned;
pub use self::old::Upgrade;
use crate::state::task::{HeaderState, PortTurn};
use rproxy_mapping::escape::escaped;
use rproxy_mapping::wire::{WireLimits, WireMapping};

/// The version of the protocol. A process refuses any other version.
const VERSION: u32 = 3;

/// The first value, in every version.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    version: u32,
}

/// What the old process has. The descriptors follow in the same order: the control socket, the socket of the metrics, the
/// socket where shims connect, then the sockets of each mapping, TCP first, each in port order, then the connections of
/// the shims that have attached a port, in the order of the mappings, then those of the others, then the channels to
/// older processes.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Offer {
    control: bool,
    /// Where metrics are served, as in `--metrics`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    metrics: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    attach: Option<OfferedAttach>,
    /// How many channels to older processes there are, whose connections drain.
    #[serde(default)]
    old_processes: usize,
    mappings: Vec<OfferedMapping>,
}

/// How ports are attached.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OfferedAttach {
    name: String,
    limits: WireLimits,
    /// The processes of the shims without a port.
    waiting: Vec<u32>,
}

/// A mapping, or an attached port.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OfferedMapping {
    mapping: WireMapping,
    /// What the name of its backend stands for, if it has one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    resolved: Vec<IpAddr>,
    /// The addresses of its interface where it listens, if it has one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    addresses: Vec<String>,
    /// Whether the process removes the file of its Unix socket in the end, if it has one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    owns_file: bool,
    /// The process that has attached the port. The mapping has no name then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    process: Option<u32>,
}

/// Some UDP flows, whose descriptors follow. An empty list ends the transfer; it has the position in the
/// rotation of local ports, and how many datagrams the kernel has dropped at each offered socket, as far as
/// counted.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Flows {
    flows: Vec<OfferedFlow>,
    ports: Option<PortTurn>,
    dropped: Vec<(usize, u32)>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OfferedFlow {
    /// The socket that the client sends to, as an index into all offered sockets.
    socket: usize,
    client: SocketAddr,
    /// The local address that the client sends to, and its interface.
    local: Option<(IpAddr, u32)>,
    /// Whom a proxy in front has told its client is, and whom that asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    told: Option<(SocketAddr, SocketAddr)>,
    /// Whether the backend has got the header of its client.
    #[serde(default)]
    header: HeaderState,
    established: bool,
    /// Where its datagrams are sent, if its socket is not connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    peer: Option<SocketAddr>,
    /// How many replies the kernel has dropped at its socket, as far as counted.
    dropped: u32,
}

impl OfferedFlow {
    fn local(&self) -> Option<LocalAddr> {
        self.local.map(|(ip, interface)| LocalAddr { ip, interface })
    }
}

/// Messages without content, each sent once, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Word {
    /// From the new process: every step that can fail is done.
    Prepared,
    /// From the new process: clients are served.
    Serving,
    /// From the old process: it no longer serves. Until then, the new process exits if the old one does.
    Yours,
}

/// Why an upgrade failed.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    /// The end of this process would end all others.
    #[error("this is the first process of a container, which ends with it; start rproxy under an init")]
    Init,
    /// The launcher is not running.
    #[error("the launcher is not running: {0}")]
    NoLauncher(String),
    /// The new process could not be started.
    #[error("cannot start {}: {source}", escaped(program))]
    Start {
        /// The path of its program.
        program: PathBuf,
        /// The error of execve(2).
        source: io::Error,
    },
    /// The new process exited.
    #[error("the new process ended ({0}); its messages are above")]
    Ended(ExitStatus),
    /// The new process took too long.
    #[error("the new process did not {step} within {seconds} seconds, and was ended")]
    Late {
        /// The step that it did not complete.
        step: &'static str,
        /// The time limit.
        seconds: u64,
    },
    /// Communication failed.
    #[error("cannot {step}: {source}")]
    Talk {
        /// The step that failed.
        step: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The offer cannot be used.
    #[error("cannot take over from the old process: {0}")]
    Offer(String),
}

impl UpgradeError {
    fn talk(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Talk { step, source }
    }
}
