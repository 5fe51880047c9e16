//! When a refused mapping is tried again: after the host's interfaces or addresses have changed.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::libc;

use crate::notifications::{drain, subscribe};

/// What may make a mapping possible (rtnetlink(7)).
const GROUPS: [u32; 3] = [libc::RTNLGRP_LINK, libc::RTNLGRP_IPV4_IFADDR, libc::RTNLGRP_IPV6_IFADDR];

/// The time from a change to the next try, which is for all changes in it.
const PAUSE: Duration = Duration::from_secs(1);

/// The notifications, while there is a mapping that depends on them.
#[derive(Default)]
pub(super) struct Retry {
    notifications: Option<Socket>,
    due: Option<Instant>,
}

impl Retry {
    /// Watches, if that is needed.
    pub(super) fn watch(&mut self, is_needed: bool, now: Instant) {
        if !is_needed {
            *self = Self::default();
        } else if self.notifications.is_none() {
            // Without them, the next change and the next start try again.
            self.notifications = subscribe(NETLINK_ROUTE, &GROUPS).ok();
            // What has changed before was not noticed.
            self.due = self.notifications.as_ref().map(|_| now + PAUSE);
        }
    }

    /// Readable once something has changed.
    pub(super) fn notified(&self) -> Option<BorrowedFd<'_>> {
        self.notifications.as_ref().map(AsFd::as_fd)
    }

    /// Something has changed.
    pub(super) fn changed(&mut self, now: Instant) {
        if self.notifications.as_ref().is_some_and(drain) {
            self.due.get_or_insert(now + PAUSE);
        }
    }

    /// When to try again.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// It is tried again now.
    pub(super) fn done(&mut self) {
        self.due = None;
    }
}
