//! What operators see: the HTTP server of `--metrics`.
//!
//! The manager's thread serves it: `server` accepts a limited number of connections, and `routes` answers requests. It
//! asks the manager through a `source::Source` for a `snapshot`, from which `exposition` writes the `families` of
//! metrics in a `format`. Nothing here touches the data path. The owner of all is an `endpoint::Endpoint`.

pub mod addr;
mod connections;
mod descriptors;
pub(crate) mod endpoint;
mod exposition;
mod families;
mod format;
pub mod listener;
mod page;
mod response;
mod routes;
mod server;
mod snapshot;
pub(crate) mod source;
pub(crate) mod status;
