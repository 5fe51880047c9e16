//! One process that serves the ports of many: `rproxy --attach`.
//!
//! A container runtime starts a process for each port that it publishes. As `rproxy-shim`, that process binds the
//! port and passes the socket to this one, over a connection to an abstract Unix socket that lasts as long as the
//! port is published. The messages are in [`rproxy_shim::message`].

pub mod attachments;
mod refusal;
pub mod socket;

use nix::sys::resource::{Resource, getrlimit};
use rproxy_mapping::limits::Limits;
use rproxy_shim::message::DEFAULT_NAME;

/// One in this many descriptors may serve the connections of a single attached port, unless its limit is set.
const SHARE_OF_DESCRIPTORS: u64 = 4;

/// The descriptors of a connection: its two sockets.
const PER_CONNECTION: u64 = 2;

/// How ports are attached, as a configuration says it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AttachTable {
    /// The abstract name where shims connect.
    pub name: Option<String>,
    /// The limits of each attached port.
    pub limits: Limits,
}

/// How ports are attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachOptions {
    /// The abstract name where shims connect, without the leading NUL.
    pub name: String,
    /// The limits of each attached port.
    pub limits: Limits,
}

impl AttachOptions {
    /// The options of a process that was started with `--attach` or has a table for it, if any. A name on the command
    /// line (`--attach=NAME`) takes precedence.
    pub fn new(flag: Option<Option<&str>>, table: Option<AttachTable>) -> Option<Self> {
        if flag.is_none() && table.is_none() {
            return None;
        }
        let AttachTable { name: of_table, limits } = table.unwrap_or_default();
        // Shims bind what they attach, and its backend is an address.
        let limits = Limits { freebind: false, socket: None, require_resolved: false, ..limits };
        let name = flag.flatten().map(str::to_owned).or(of_table).unwrap_or_else(|| DEFAULT_NAME.to_owned());
        Some(Self { name, limits })
    }

    /// The limits of each attached port. All of them share the descriptors of this process, so that without a
    /// limit of connections, one port gets at most a quarter of the descriptors.
    pub(crate) fn effective_limits(&self) -> Limits {
        let descriptors = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _hard)| soft);
        let share =
            usize::try_from(descriptors / SHARE_OF_DESCRIPTORS / PER_CONNECTION).unwrap_or(usize::MAX);
        let max_connections = self.limits.max_connections.or(Some(share.max(1)));
        Limits { max_connections, ..self.limits.clone() }
    }
}
