//! What a process asks its resolver, and is answered: a line of JSON each.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// The longest line, in bytes. Answers with more addresses than fit are cut (64 addresses take 3 KiB).
pub(super) const LONGEST_LINE: usize = 8 * 1024;

/// The most addresses of an answer.
pub(super) const MOST_ADDRESSES: usize = 64;

/// A name to be looked up.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Question {
    pub(super) name: String,
}

/// What a name stands for.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Answer {
    pub(super) name: String,
    pub(super) result: Result<Found, String>,
}

/// Addresses, in the order in which they are to be tried, those of them that are of this machine, and for how many seconds
/// they are valid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Found {
    pub(super) addresses: Vec<IpAddr>,
    pub(super) own: Vec<IpAddr>,
    pub(super) seconds: u64,
}
