//! The receive buffer size of each flow: a share of a total for all flows.
//!
//! The kernel has one limit for all UDP sockets of the machine, beyond which no socket receives anything (`udp_mem`,
//! udp(7)). A slow client could reach it with many flows whose buffers are full. The shares of a process therefore add
//! up to a fraction of that limit, whatever the number of flows.

use std::fs;

use nix::unistd::{SysconfVar, sysconf};

/// All flows together get one part in this many of the machine's limit.
const PART: usize = 8;

/// The maximum receive buffer of a flow in bytes: enough for a burst of replies to one client, whose link may be slower
/// than the backend's.
const MOST: usize = 4 * 1024 * 1024;

/// The minimum receive buffer of a flow in bytes: some replies.
const LEAST: usize = 8 * 1024;

/// The kernel doubles the size that is set (socket(7), `SO_RCVBUF`).
const DOUBLED: usize = 2;

/// Number of flows whose buffer is changed in one turn: each takes two system calls.
pub(super) const AT_A_TIME: usize = 256;

/// The total, and the number of flows that share it.
#[derive(Debug)]
pub(super) struct Shares {
    /// The total in bytes.
    bytes: usize,
    /// The number of flows, rounded to a power of two so that shares seldom change.
    flows: usize,
}

impl Shares {
    /// The shares on this machine.
    pub(super) fn of_this_host() -> Self {
        Self::new(limit() / PART)
    }

    fn new(bytes: usize) -> Self {
        Self { bytes, flows: 1 }
    }

    /// Updates the number of flows. Returns whether that changes the shares.
    pub(super) fn set_flows(&mut self, flows: usize) -> bool {
        let before = self.each();
        if flows > self.flows || flows < self.flows / 4 {
            self.flows = flows.max(1).next_power_of_two();
        }
        self.each() != before
    }

    /// The receive buffer size of each flow in bytes.
    pub(super) fn each(&self) -> usize {
        (self.bytes / DOUBLED / self.flows).clamp(LEAST, MOST)
    }
}

/// The kernel's limit for all UDP sockets, in bytes. It is visible only in the initial network namespace. Elsewhere,
/// the kernel's default is assumed, which is slightly less than this fraction of the memory.
fn limit() -> usize {
    let of = |name| sysconf(name).ok().flatten().and_then(|value| usize::try_from(value).ok());
    let page = of(SysconfVar::PAGE_SIZE).unwrap_or(4096);
    let set = fs::read_to_string("/proc/sys/net/ipv4/udp_mem").ok();
    let pages = set.as_deref().and_then(most_pages).or_else(|| Some(of(SysconfVar::_PHYS_PAGES)? / 16 * 3));
    pages.map_or(usize::MAX, |pages| pages.saturating_mul(page))
}

/// Parses the last of three numbers.
fn most_pages(setting: &str) -> Option<usize> {
    setting.split_whitespace().nth(2)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_more_flows_the_smaller_are_their_shares() {
        let mut shares = Shares::new(64 * 1024 * 1024);
        let mut at = |flows| {
            shares.set_flows(flows);
            shares.each()
        };
        assert_eq!(at(1), MOST);
        assert_eq!(at(8), MOST);
        assert_eq!(at(9), MOST / 2);
        assert_eq!(at(16), MOST / 2);
        assert_eq!(at(1000), 32 * 1024);
        assert_eq!(at(100_000), LEAST);
        assert_eq!(at(16), MOST / 2);
    }

    #[test]
    fn shares_grow_again_and_not_to_and_fro() {
        let mut shares = Shares::new(64 * 1024 * 1024);
        assert!(shares.set_flows(1025));
        assert!(!(600..=1025).rev().chain(600..=1025).any(|flows| shares.set_flows(flows)));
        assert!(shares.set_flows(0));
        assert_eq!(shares.each(), MOST);
    }

    #[test]
    fn the_limit_is_the_last_number() {
        assert_eq!(most_pages("575802\t767736\t1151604\n"), Some(1_151_604));
        assert_eq!(most_pages(""), None);
        assert!(limit() > 1024 * 1024);
    }
}
