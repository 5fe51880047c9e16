//! Live control: a process that is told what to serve while it serves.
//!
//! [`manager`] owns the server. It is told by signals, and by the clients of a Unix [`socket`], who
//! speak the [`protocol`] in which mappings are written as [`wire`] says. [`ctl`] is such a client.

mod clients;
pub mod ctl;
pub mod manager;
pub mod protocol;
pub mod socket;
mod table;
mod unreachable;
pub mod wire;
