//! What became of the datagrams of a batch: how many were relayed, and how many were lost and why.

use std::io;
use std::ops::{AddAssign, Range, SubAssign};

use nix::libc;
use rproxy_sys::udp::RecvBatch;
use tracing::warn;

use crate::log::limit::LogLimit;
use crate::state::Target;
use crate::state::stats::FailureKind;

/// How much some datagrams are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Amount {
    pub(super) datagrams: u64,
    pub(super) bytes: u64,
}

impl AddAssign for Amount {
    fn add_assign(&mut self, other: Self) {
        self.datagrams += other.datagrams;
        self.bytes += other.bytes;
    }
}

impl SubAssign for Amount {
    fn sub_assign(&mut self, other: Self) {
        self.datagrams -= other.datagrams;
        self.bytes -= other.bytes;
    }
}

/// What became of some datagrams.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// What the kernel took.
    pub(super) relayed: Amount,
    /// Datagrams that the network refused, at once or later.
    refused: u64,
    /// Datagrams that there was no room for, or whose flow ended while they waited.
    no_buffer: u64,
    /// Datagrams that are larger than the way takes.
    too_large: u64,
    /// The error that one of them met.
    error: Option<io::Error>,
}

impl Tally {
    /// Some datagrams met `error`.
    pub(super) fn lose(&mut self, datagrams: u64, error: io::Error) {
        *match error.raw_os_error() {
            Some(libc::EMSGSIZE) => &mut self.too_large,
            Some(libc::ENOBUFS | libc::ENOMEM) => &mut self.no_buffer,
            _ => &mut self.refused,
        } += datagrams;
        self.error = Some(error);
    }

    /// Some datagrams found no room where they would have waited.
    pub(super) fn overflow(&mut self, datagrams: u64) {
        self.no_buffer += datagrams;
    }

    /// The kernel has had no room for `dropped` datagrams of a socket by now, of which `counted` are counted already.
    pub(super) fn dropped(&mut self, dropped: u32, counted: &mut u32) {
        // A datagram says how many there were when it was queued, which may be before they were counted.
        let more = dropped.wrapping_sub(*counted).cast_signed();
        if more > 0 {
            *counted = dropped;
            self.no_buffer += u64::from(more.unsigned_abs());
            self.error = Some(io::Error::other("the receive buffer of a socket was full"));
        }
    }

    /// Some datagrams waited for a flow that is over.
    pub(super) fn discard(&mut self, datagrams: u64) {
        if datagrams > 0 {
            self.no_buffer += datagrams;
            self.error = Some(io::Error::other("their flow is over"));
        }
    }

    /// A datagram was cut when it was received.
    pub(super) fn cut(&mut self) {
        self.too_large += 1;
    }

    /// Whether the error that one of them met is this one.
    pub(super) fn met(&self, errno: i32) -> bool {
        self.error.as_ref().is_some_and(|error| error.raw_os_error() == Some(errno))
    }

    /// Whether one of them met a socket that has lost its peer.
    pub(super) fn has_lost_peer(&self) -> bool {
        self.error.as_ref().is_some_and(is_lost_peer)
    }

    fn lost(&self) -> [(FailureKind, u64); 3] {
        [
            (FailureKind::DatagramRefused, self.refused),
            (FailureKind::NoBuffer, self.no_buffer),
            (FailureKind::TooLarge, self.too_large),
        ]
    }

    /// Counts it for the mapping of `route`: on the way to the backend, or to clients.
    pub(super) fn settle(self, target: &Target, to: Towards) {
        let stats = &target.policy.state.stats;
        if self.relayed != Amount::default() {
            let (datagrams, bytes) = match to {
                Towards::Backend => (&stats.datagrams_in, &stats.bytes_in),
                Towards::Clients => (&stats.datagrams_out, &stats.bytes_out),
            };
            datagrams.add(self.relayed.datagrams);
            bytes.add(self.relayed.bytes);
        }
        if self.lost().iter().any(|(_trouble, count)| *count > 0) {
            self.tell_lost(target, to);
        }
    }

    #[cold]
    fn tell_lost(self, target: &Target, to: Towards) {
        static LOST: LogLimit = LogLimit::new();

        let stats = &target.policy.state.stats;
        self.lost().iter().for_each(|(failure_kind, count)| stats.count_many(*failure_kind, *count));
        if let Some(suppressed) = LOST.permit() {
            let Self { refused, no_buffer, too_large, error, .. } = self;
            let error =
                error.map_or_else(|| "too many wait for a socket".to_owned(), |error| error.to_string());
            let to = to.as_str();
            warn!(mapping = %target.port_mapping, to, refused, no_buffer, too_large, %error, suppressed, "datagrams lost");
        }
    }
}

/// How many datagrams a socket has had no room for, as the last one of those in `slots` says. Mostly there have been
/// none, ever.
pub(super) fn last_dropped(received: &RecvBatch, slots: Range<usize>) -> u32 {
    slots.last().map_or(0, |last| received.control(last).dropped)
}

/// Whether an error is that of a connected socket that was destroyed (`SOCK_DESTROY`, sock_diag(7)), as by `ss --kill`:
/// it goes on without a peer, and would take datagrams of anybody. Or of one that whoever has it open, too, has shut down.
pub(super) fn is_lost_peer(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ECONNABORTED | libc::EDESTADDRREQ | libc::EPIPE))
}

/// Which way datagrams go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Towards {
    Backend,
    Clients,
}

impl Towards {
    fn as_str(self) -> &'static str {
        match self {
            Self::Backend => "backend",
            Self::Clients => "clients",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_dropped_counts_once() {
        let lost = |reports: &[u32], mut counted: u32| {
            let mut tally = Tally::default();
            reports.iter().for_each(|dropped| tally.dropped(*dropped, &mut counted));
            tally.lost()[1].1
        };
        assert_eq!(lost(&[3, 3, 5], 0), 5);
        assert_eq!(lost(&[41, 82, 83], 82), 1, "what was queued before it was counted");
        assert_eq!(lost(&[2], u32::MAX), 3, "it wraps round");
    }

    #[test]
    fn what_is_lost_has_a_reason() {
        let mut tally = Tally::default();
        for errno in [libc::EPERM, libc::ECONNREFUSED, libc::EMSGSIZE, libc::ENOBUFS] {
            tally.lose(2, io::Error::from_raw_os_error(errno));
        }
        tally.cut();
        tally.overflow(1);
        tally.discard(0);
        assert!(tally.met(libc::ENOBUFS), "nothing was discarded, which is no error");
        tally.discard(5);
        assert!(!tally.met(libc::ENOBUFS));
        assert_eq!(tally.lost().map(|(_trouble, count)| count), [4, 8, 3]);
    }
}
