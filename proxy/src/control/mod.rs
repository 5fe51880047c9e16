//! Live control: clients of a [Unix socket](crate::bind::unix_socket) change what is served.
//!
//! They use the [`protocol`], with mappings in JSON ([`mapping::wire`](rproxy_mapping::wire)), and receive
//! [`answers`]; `requests` executes their requests on the server.

pub mod answers;
pub(crate) mod chosen;
pub(crate) mod clients;
pub(crate) mod field;
mod lines;
pub mod protocol;
pub(crate) mod requests;
mod sockets;
mod strict;

/// The default path of the socket.
pub const DEFAULT_PATH: &str = "/run/rproxy.sock";

/// The path of the socket of the service, in a directory of its user (`contrib/systemd/rproxy.service`).
pub const SERVICE_PATH: &str = "/run/rproxy/control.sock";
