//! What operators see: the HTTP server of `--metrics`.
//!
//! The manager's thread serves it: [`server`] accepts a limited number of connections, [`routes`] answers requests with
//! what the manager says to a [`source::Query`]. Nothing here touches the data path.

pub mod addr;
mod connections;
pub(crate) mod endpoint;
pub mod listener;
mod page;
mod response;
mod routes;
mod server;
pub(crate) mod source;
pub(crate) mod status;
