//! What executes the actions of a plan, and why one of them fails.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use nix::sys::signal::Signal;

use crate::action::Action;
use crate::firewall::tool::ToolError;
use crate::model::{MappingKey, RelayProcess};
use crate::netlink::NetlinkError;
use crate::netns::NetnsError;
use crate::publish::{HostIp, Proto};
use crate::relay::RelayError;
use crate::reserve::ReserveError;
use crate::state::StateError;

/// What carries out actions: the kernel, or a test's stand-in for it.
pub trait Executor {
    /// Carries out one action.
    ///
    /// # Errors
    /// When it fails; nothing of it has happened then.
    fn run(&mut self, action: &Action) -> Result<(), ActionError>;

    /// Binds a port of the host, 0 for any, and holds it until it is handed to a relay; returns the port.
    ///
    /// # Errors
    /// When it is in use, or the address is not one of this host.
    fn reserve(&mut self, proto: Proto, host: HostIp, port: u16) -> Result<u16, ReserveError>;

    /// The relays that [`Executor::run`] has started and not stopped.
    fn relays(&self) -> &BTreeMap<MappingKey, RelayProcess>;

    /// The signal that asks this program to end, if one has come. From the first call on, it is left to the caller
    /// to end.
    fn interrupted(&mut self) -> Option<Signal> {
        None
    }
}

/// Why an action failed.
#[derive(Debug, thiserror::Error)]
pub enum ActionError {
    /// The kernel refused a change of an interface, address or route.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A namespace could not be made, entered or removed.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A program that loads rules failed.
    #[error(transparent)]
    Tool(#[from] ToolError),
    /// A relay could not be started or stopped.
    #[error(transparent)]
    Relay(#[from] RelayError),
    /// A host port could not be bound.
    #[error(transparent)]
    Reserve(#[from] ReserveError),
    /// A kernel parameter could not be set.
    #[error("cannot set {key}: {source}")]
    Sysctl {
        /// Which.
        key: String,
        /// Why.
        source: io::Error,
    },
    /// The state could not be written.
    #[error(transparent)]
    State(#[from] StateError),
    /// A signal asked this program to end.
    #[error("ended by {0}")]
    Interrupted(Signal),
    /// Connection tracking did not forget a flow.
    #[error("cannot forget UDP flows (conntrack): {0}")]
    Conntrack(#[source] io::Error),
    /// A file could not be written or removed.
    #[error("cannot change {}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}
