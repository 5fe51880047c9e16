//! An upgrade: a new process, of a program that may be newer, takes over all that clients can see.
//!
//! On `SIGUSR2` the old process has its launcher start the new one, and offers it its mappings, their
//! sockets and the control socket. The new one prepares everything that can fail, and says so. Then the
//! old one takes no datagrams any more and passes its flows on, and the new one serves, and says that too.
//! Datagrams wait in the kernel meanwhile, and connections are accepted by either. Should anything fail up to
//! here, or take too long, the old process serves on; if not, it lets its connections finish.
//!
//! | old process | new process |
//! |---|---|
//! | `Hello`, `Offer`, descriptors | |
//! | | `Prepared` |
//! | `Flows` and descriptors, again and again; an empty one | |
//! | | `Serving` |
//! | `Yours` | |
//!
//! The new process believes the old one no more than a client of the control socket: mappings are read as
//! that reads them, and if they cannot be changed while it runs, they have to be those of its command line.

mod channel;
mod launcher;
mod new;
mod old;
mod program;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitStatus;

use rproxy_sys::udp::LocalAddr;
use serde::{Deserialize, Serialize};

pub use self::launcher::Launcher;
pub use self::new::{OldProcess, Sockets, claim, take_over};
pub use self::old::Upgrade;
use crate::mapping::wire::WireMapping;
use crate::state::task::PortTurn;

/// The version of what is said. A process that is offered another one refuses.
const VERSION: u32 = 2;

/// The first value, whatever the version.
#[derive(Debug, Serialize, Deserialize)]
struct Hello {
    version: u32,
}

/// What the old process has. The descriptors follow in the same order: of the control socket, then of the
/// sockets of each mapping, TCP first, each in the order of ports.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Offer {
    control: bool,
    mappings: Vec<WireMapping>,
}

/// Some UDP flows, whose descriptors follow. There are no more behind an empty list, which says whose turn is next of the
/// local ports, and for how many datagrams the sockets offered have had no room, as far as they are counted.
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
    /// Which of all the sockets offered the client sends to, counted from 0.
    socket: usize,
    client: SocketAddr,
    /// The address that the client asked, and its interface.
    local: Option<(IpAddr, u32)>,
    established: bool,
    /// Where its datagrams go, if its socket is not connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    peer: Option<SocketAddr>,
    /// For how many answers its socket has had no room, as far as they are counted.
    dropped: u32,
}

impl OfferedFlow {
    fn local(&self) -> Option<LocalAddr> {
        self.local.map(|(ip, interface)| LocalAddr { ip, interface })
    }
}

/// What is said without anything more, each once, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Word {
    /// By the new process: all that can fail is done.
    Prepared,
    /// By the new process: clients are served.
    Serving,
    /// By the old process: I serve no more. Until this is heard, the new process ends if the old one is gone.
    Yours,
}

/// Why an upgrade did not come about.
#[derive(Debug, thiserror::Error)]
pub enum UpgradeError {
    /// The end of this process would be that of all others.
    #[error("this is the first process of a container, which ends with it; start rproxy under an init")]
    Init,
    /// There is none, or none any more.
    #[error("the process that starts new ones is not there: {0}")]
    NoLauncher(String),
    /// There is no new process.
    #[error("cannot start {}: {source}", program.display())]
    Start {
        /// Its program.
        program: PathBuf,
        /// What execve(2) answered.
        source: io::Error,
    },
    /// The new process has ended.
    #[error("the new process ended ({0}); what it said is above")]
    Ended(ExitStatus),
    /// The new process takes too long.
    #[error("the new process did not {step} within {seconds} seconds, and was ended")]
    Late {
        /// What it was to do.
        step: &'static str,
        /// How long it was given.
        seconds: u64,
    },
    /// The conversation broke off.
    #[error("cannot {step}: {source}")]
    Talk {
        /// What was tried.
        step: &'static str,
        /// What came of it.
        source: io::Error,
    },
    /// What was offered cannot be used.
    #[error("cannot take over from the old process: {0}")]
    Offer(String),
}

impl UpgradeError {
    fn talk(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Talk { step, source }
    }
}
