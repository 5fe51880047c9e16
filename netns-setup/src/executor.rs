//! Executes the actions of a plan.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;

use nix::sys::signal::Signal;
use rproxy_mapping::addr::Protocol;

use crate::action::Action;
use crate::firewall::tool::ToolError;
use crate::host_ip::HostIp;
use crate::name::Name;
use crate::netlink::NetlinkError;
use crate::netns::NetnsError;
use crate::relay::RelayError;
use crate::reserve::ReserveError;
use crate::state::StateError;

/// Executes actions: the kernel, or a test double.
pub trait Executor {
    /// Executes one action.
    ///
    /// # Errors
    /// If it fails. It may have had an effect nevertheless.
    fn run(&mut self, action: &Action) -> Result<(), ActionError>;

    /// Binds a port of the host, 0 for any, and holds it until it is passed to a relay; returns the port.
    ///
    /// # Errors
    /// If it is in use, or the address does not belong to this host.
    fn reserve(&mut self, proto: Protocol, host: HostIp, port: u16) -> Result<u16, ReserveError>;

    /// The cookies of the namespaces that [`Executor::run`] has created, as far as the kernel has them.
    fn namespaces(&self) -> &BTreeMap<Name, u64>;

    /// The signal that asks this program to end, if one has arrived. From the first call on, signals no
    /// longer end the program by themselves.
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
    /// A stale conntrack entry could not be deleted.
    #[error("cannot delete conntrack entries of UDP flows: {0}")]
    Conntrack(#[source] io::Error),
    /// The result could not be observed.
    #[error("cannot tell whether everything is as before: {0}")]
    Unknown(String),
    /// A file could not be written or removed.
    #[error("cannot change {}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}
