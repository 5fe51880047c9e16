//! What a process asks its resolver, and is answered: a line of JSON each.

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The longest line, in bytes. Answers with more addresses than fit are cut (64 addresses take 3 KiB).
pub(super) const LONGEST_LINE: usize = 8 * 1024;

/// The most addresses of an answer.
pub(super) const MOST_ADDRESSES: usize = 64;

/// A name to be looked up.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Question {
    pub(super) name: String,
    /// The [share](super::shares) where it begins.
    pub(super) share: usize,
}

/// What a name stands for.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Answer {
    pub(super) name: String,
    pub(super) result: Result<Found, String>,
    /// The share that the time which it took belongs to.
    pub(super) share: usize,
}

/// What a resolver writes every [`BEAT`] instead, while there are questions that it has not answered.
pub(super) const STILL_THERE: &[u8] = b"\n";

/// See [`STILL_THERE`].
pub(super) const BEAT: Duration = Duration::from_secs(1);

/// Addresses, in the order in which they are to be tried, those of them that are of this machine, and for how many seconds
/// they are valid.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Found {
    pub(super) addresses: Vec<IpAddr>,
    pub(super) own: Vec<IpAddr>,
    pub(super) seconds: u64,
}
