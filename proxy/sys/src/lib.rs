//! The system calls of `rproxy` that no safe library offers.
//!
//! This is the only crate of the workspace that contains `unsafe`. Its functions take borrowed
//! descriptors and plain values, return [`std::io::Result`], and hold neither policy nor logging.

pub mod fd;
pub mod socket;
pub mod watch;
