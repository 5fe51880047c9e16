//! Why a change of what a running server serves is refused.

use std::io;

use rproxy_mapping::MappingError;
use rproxy_mapping::addr::{HostSocketAddr, Protocol};
use rproxy_mapping::name::Name;
use rproxy_mapping::overlap::OverlapError;

use crate::bind::listen::BindError;
use crate::bind::unix_socket::SocketFault;
use crate::engine::private::PrivateSocketError;
use crate::loops::LoopError;
use crate::names::UnresolvedError;

/// Why a change failed; nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// Another mapping has the name.
    #[error("the name {0} is taken by another mapping; choose another (--name), or remove that one first")]
    NameTaken(Name),
    /// The name is that of an attached port.
    #[error("{name} was attached by {}, and is served until that ends; stop the container", by(*process))]
    Attached {
        /// The name.
        name: Name,
        /// The process.
        process: u32,
    },
    /// No mapping has the name.
    #[error("there is no mapping {0}; `rproxy ctl list` shows all")]
    Unknown(Name),
    /// Two mappings want the same port.
    #[error("{}: {_0}", .0.mapping.name())]
    Overlap(#[from] OverlapError),
    /// The port is bound at another address, by a mapping that this change removes.
    #[error(
        "{name}: port {port} is still bound by the mapping {other}, which this change removes; a port cannot move \
         between one address and all of them in one step: remove {other} first"
    )]
    StillBound {
        /// The mapping.
        name: Name,
        /// The removed mapping; it may be the same mapping at its old address.
        other: Name,
        /// The port.
        port: u16,
    },
    /// It would lead back to itself.
    #[error("{name}: {source}")]
    Loop {
        /// The mapping.
        name: Name,
        /// How.
        source: LoopError,
    },
    /// A host port cannot be bound.
    #[error("{}{source}", prefix(name, source))]
    Bind {
        /// The mapping.
        name: Name,
        /// Why.
        source: BindError,
    },
    /// The new backend does not fit the mapping.
    #[error("{name}: {source}")]
    Mapping {
        /// The mapping.
        name: Name,
        /// Why.
        source: MappingError,
    },
    /// The name of the backend does not resolve, and has to.
    #[error("{name}: {source}")]
    Name {
        /// The mapping.
        name: Name,
        /// Which name, and why.
        source: UnresolvedError,
    },
    /// The backend is a socket of this process that is for its own user.
    #[error("{name}: {source}")]
    Private {
        /// The mapping.
        name: Name,
        /// Which one.
        source: PrivateSocketError,
    },
    /// The process has given up Unix sockets when it was confined, because no mapping led to one.
    #[error(
        "{name}: this process cannot connect to Unix sockets ({source}), as none was a backend when it was confined; restart it with this mapping"
    )]
    UnixSocket {
        /// The name of the mapping.
        name: Name,
        /// The answer of socket(2).
        #[source]
        source: io::Error,
    },
    /// The file of a Unix socket cannot have the mode or owner that is asked for.
    #[error("{name}: {source}")]
    Permissions {
        /// The mapping.
        name: Name,
        /// Why.
        source: SocketFault,
    },
    /// What addresses interfaces have cannot be found out.
    #[error("cannot find out what addresses interfaces have: {0}; write addresses in their place")]
    Interfaces(#[source] io::Error),
    /// A socket that came with the request listens where no new mapping does.
    #[error("the socket {addr}/{protocol} that came with the request is for none of its new mappings")]
    UnusedSocket {
        /// The protocol of the socket.
        protocol: Protocol,
        /// Where it listens.
        addr: HostSocketAddr,
    },
    /// A socket that came with the request is for other clients than its mapping.
    #[error(
        "{name}: the socket {addr}/{protocol} that came with the request {}, unlike the mapping; set IPV6_V6ONLY before \
         it is bound, or v6only of the mapping",
        if *.v6only { "excludes IPv4 clients" } else { "accepts IPv4 clients" }
    )]
    OtherFamilies {
        /// The mapping.
        name: Name,
        /// The protocol of the socket.
        protocol: Protocol,
        /// Where it listens.
        addr: HostSocketAddr,
        /// Whether the socket excludes IPv4 clients.
        v6only: bool,
    },
    /// The kernel refused to watch a socket.
    #[error("{name}: cannot watch a listener: {source}")]
    Watch {
        /// The mapping.
        name: Name,
        /// The error of epoll_ctl(2).
        source: io::Error,
    },
}

impl ChangeError {
    /// The name of the mapping because of which it is refused, if there is one.
    pub fn mapping(&self) -> Option<Name> {
        match self {
            Self::Overlap(error) => Some(error.mapping.name()),
            Self::NameTaken(name)
            | Self::Unknown(name)
            | Self::Attached { name, .. }
            | Self::StillBound { name, .. }
            | Self::Loop { name, .. }
            | Self::Bind { name, .. }
            | Self::Mapping { name, .. }
            | Self::Name { name, .. }
            | Self::UnixSocket { name, .. }
            | Self::Permissions { name, .. }
            | Self::Private { name, .. }
            | Self::OtherFamilies { name, .. }
            | Self::Watch { name, .. } => Some(name.clone()),
            Self::UnusedSocket { .. } | Self::Interfaces(_) => None,
        }
    }

    /// Whether this machine has no such address, so that it cannot be bound.
    pub(super) fn is_not_there(&self) -> bool {
        matches!(self, Self::Bind { source, .. } if source.is_not_there())
    }

    /// What is wrong, with `freebind`, as the front end at hand has it, where that would work.
    pub fn with_hint(&self, freebind: &str) -> String {
        match self {
            Self::Bind { source, .. } => format!("{self}{}", source.hint(freebind)),
            _ => self.to_string(),
        }
    }
}

/// Who has attached a port. A process in another process namespace has no number here.
pub(super) fn by(process: u32) -> String {
    match process {
        0 => "a process of another process namespace".to_owned(),
        number => format!("process {number}"),
    }
}

/// The name of a mapping as a prefix to why it cannot be bound, unless the reason contains it.
fn prefix(name: &Name, error: &BindError) -> String {
    if name.as_str() == error.place() { String::new() } else { format!("{name}: ") }
}
