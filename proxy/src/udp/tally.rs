//! Results of relaying the datagrams of a batch: how many were relayed, and how many were lost for which reason.

use std::io;
use std::ops::{AddAssign, Range, SubAssign};

use nix::libc;
use rproxy_sys::udp::RecvBatch;
use tracing::warn;

use crate::log::limit::LogLimit;
use crate::names::suspects;
use crate::state::Target;
use crate::state::stats::FailureKind;

/// A number of datagrams and their bytes.
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

/// The results of some datagrams.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Datagrams that the kernel accepted.
    pub(super) relayed: Amount,
    /// Datagrams that the network refused, immediately or later.
    refused: u64,
    /// Datagrams for which a queue was full, or whose flow ended while they were queued.
    no_buffer: u64,
    /// Datagrams larger than the path allows.
    too_large: u64,
    /// An error of one of them.
    error: Option<io::Error>,
}

impl Tally {
    /// Counts datagrams that failed with `error`.
    pub(super) fn lose(&mut self, datagrams: u64, error: io::Error) {
        *match error.raw_os_error() {
            Some(libc::EMSGSIZE) => &mut self.too_large,
            Some(libc::ENOBUFS | libc::ENOMEM) => &mut self.no_buffer,
            _ => &mut self.refused,
        } += datagrams;
        self.error = Some(error);
    }

    /// Counts datagrams for which a queue was full.
    pub(super) fn overflow(&mut self, datagrams: u64) {
        self.no_buffer += datagrams;
    }

    /// Counts the datagrams that the kernel dropped at a socket: `dropped` in total, of which `counted` are already
    /// counted.
    pub(super) fn dropped(&mut self, dropped: u32, counted: &mut u32) {
        // The total in a datagram is that of the time it was queued, which may be older than `counted`.
        let more = dropped.wrapping_sub(*counted).cast_signed();
        if more > 0 {
            *counted = dropped;
            self.no_buffer += u64::from(more.unsigned_abs());
            self.error = Some(io::Error::other("the receive buffer of a socket was full"));
        }
    }

    /// Counts queued datagrams of a flow that has ended.
    pub(super) fn discard(&mut self, datagrams: u64) {
        if datagrams > 0 {
            self.no_buffer += datagrams;
            self.error = Some(io::Error::other("their flow is over"));
        }
    }

    /// Counts a datagram that was truncated when it was received.
    pub(super) fn cut(&mut self) {
        self.too_large += 1;
    }

    /// Whether the recorded error is this one.
    pub(super) fn met(&self, errno: i32) -> bool {
        self.error.as_ref().is_some_and(|error| error.raw_os_error() == Some(errno))
    }

    /// Whether the recorded error means that the socket has lost its peer.
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

    /// Adds the results to the counters of the mapping of `target`, towards the backend or towards clients.
    pub(super) fn settle(self, target: &Target, to: Towards) {
        let stats = &target.policy.state.stats;
        if self.relayed != Amount::default() {
            let (datagrams, bytes) = match to {
                Towards::Backend => (&stats.datagrams_in, &stats.udp_bytes_in),
                Towards::Clients => (&stats.datagrams_out, &stats.udp_bytes_out),
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
        if self.refused > 0 {
            // Nobody listens there, perhaps not any more.
            target.named.iter().for_each(|host| suspects::report(host.name()));
        }
        if let Some(suppressed) = LOST.permit() {
            let Self { refused, no_buffer, too_large, error, .. } = self;
            let error =
                error.map_or_else(|| "too many wait for a socket".to_owned(), |error| error.to_string());
            let to = to.as_str();
            let (mapping, backend) = (target.name(), &target.port_mapping.backend);
            warn!(%mapping, %backend, to, refused, no_buffer, too_large, %error, suppressed, "datagrams lost");
        }
    }
}

/// The number of datagrams dropped at a socket so far, as reported by the last of those in `slots`; usually 0.
pub(super) fn last_dropped(received: &RecvBatch, slots: Range<usize>) -> u32 {
    slots.last().map_or(0, |last| received.control(last).dropped)
}

/// Whether an error means that a connected socket was destroyed (`SOCK_DESTROY`, sock_diag(7), for example by `ss
/// --kill`). It has no peer any more and would accept datagrams of anyone. The error is the same if another process
/// that shares the socket has shut it down.
pub(super) fn is_lost_peer(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ECONNABORTED | libc::EDESTADDRREQ | libc::EPIPE))
}

/// The direction of datagrams.
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
    use std::net::UdpSocket;
    use std::os::fd::AsFd;

    use rproxy_sys::udp::{BATCH, report_class_and_drops};
    use socket2::SockRef;

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

    #[test]
    fn a_socket_that_was_destroyed_is_told_from_a_peer_that_refuses() {
        let has_lost_peer = |errno| {
            let mut tally = Tally::default();
            tally.lose(1, io::Error::from_raw_os_error(errno));
            tally.has_lost_peer()
        };
        for errno in [libc::ECONNABORTED, libc::EDESTADDRREQ, libc::EPIPE] {
            assert!(has_lost_peer(errno), "{errno}");
        }
        assert!(!has_lost_peer(libc::ECONNREFUSED) && !Tally::default().has_lost_peer());
    }

    #[test]
    fn a_datagram_tells_how_many_the_kernel_dropped_before_it() {
        let [socket, sender] = [(); 2].map(|()| UdpSocket::bind("127.0.0.1:0").unwrap());
        report_class_and_drops(socket.as_fd(), false).unwrap();
        SockRef::from(&socket).set_recv_buffer_size(1).unwrap();
        sender.connect(socket.local_addr().unwrap()).unwrap();
        let mut batch = RecvBatch::new();
        let mut receive =
            || batch.recv(socket.as_fd(), 0, BATCH, true).map(|count| last_dropped(&batch, 0..count));
        for _ in 0..BATCH {
            sender.send(&[0; 1000]).unwrap();
        }
        assert_eq!(receive().unwrap(), 0, "what came first was queued before any was dropped");
        receive().unwrap_err();
        sender.send(&[0; 1000]).unwrap();
        let dropped = receive().unwrap();
        assert!((1..BATCH).contains(&(dropped as usize)), "{dropped}");
    }
}
