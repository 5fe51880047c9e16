//! How much the kernel may queue for each flow: a share of what there is for all of them.
//!
//! The kernel has one limit for all UDP sockets of the machine, and past it no socket gets anything (`udp_mem`, udp(7)).
//! A client whose side is slow could reach it with many flows, each of which is full. So the shares of a process add up to
//! a fraction of that limit, however many flows there are: the more, the smaller.

use std::fs;

use nix::unistd::{SysconfVar, sysconf};

/// What all flows have together, as a part of the limit for the machine.
const PART: usize = 8;

/// Bytes that the kernel may queue for a flow at the most: a burst of answers to one client, all the more while
/// that client's side is slower.
const MOST: usize = 4 * 1024 * 1024;

/// Bytes that it may queue for a flow at least: a few answers.
const LEAST: usize = 8 * 1024;

/// The kernel lets a socket take twice the size that is set (socket(7), `SO_RCVBUF`).
const DOUBLED: usize = 2;

/// Flows that are given another share in one turn: each takes two system calls.
pub(super) const AT_A_TIME: usize = 256;

/// What is shared, and among how many.
#[derive(Debug)]
pub(super) struct Shares {
    /// Bytes for all.
    bytes: usize,
    /// Flows that it is for: a power of two, so that shares change seldom.
    flows: usize,
}

impl Shares {
    /// Those of this machine.
    pub(super) fn of_this_host() -> Self {
        Self::new(limit() / PART)
    }

    fn new(bytes: usize) -> Self {
        Self { bytes, flows: 1 }
    }

    /// Takes note of how many flows there are. Returns whether that changes what each has.
    pub(super) fn set_flows(&mut self, flows: usize) -> bool {
        let before = self.each();
        if flows > self.flows || flows < self.flows / 4 {
            self.flows = flows.max(1).next_power_of_two();
        }
        self.each() != before
    }

    /// What the receive buffer of each is to be set to, in bytes.
    pub(super) fn each(&self) -> usize {
        (self.bytes / DOUBLED / self.flows).clamp(LEAST, MOST)
    }
}

/// The kernel's limit for all UDP sockets, in bytes. Only the first network namespace tells; elsewhere it is taken to
/// be what the kernel makes it if nobody sets it, which is somewhat less than this part of the memory.
fn limit() -> usize {
    let of = |name| sysconf(name).ok().flatten().and_then(|value| usize::try_from(value).ok());
    let page = of(SysconfVar::PAGE_SIZE).unwrap_or(4096);
    let set = fs::read_to_string("/proc/sys/net/ipv4/udp_mem").ok();
    let pages = set.as_deref().and_then(most_pages).or_else(|| Some(of(SysconfVar::_PHYS_PAGES)? / 16 * 3));
    pages.map_or(usize::MAX, |pages| pages.saturating_mul(page))
}

/// The last of three numbers.
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
