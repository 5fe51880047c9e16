//! Live control: clients of a Unix [`socket`] say what is to be served, while it is served.
//!
//! They speak the [`protocol`], in which mappings are written as JSON ([`mapping::wire`](crate::mapping::wire)), and get
//! [`answers`]; what they ask for is done to the server (`requests`).

pub mod answers;
pub(crate) mod clients;
pub mod protocol;
pub(crate) mod requests;
pub mod socket;
