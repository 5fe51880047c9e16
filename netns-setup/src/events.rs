//! What tells that something may have changed: notifications of the kernel, processes that end, and the state file.

use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use netlink_sys::Socket;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE, NETLINK_XFRM};
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::model::{NETNS_DIR, RelayProcess};
use crate::notifications::{drain, subscribe};
use crate::relay::process;
use crate::signals::Signals;
use crate::state;

/// Interfaces, addresses, routes, rules, and the kernel parameters of interfaces (rtnetlink(7)).
const ROUTE_GROUPS: [u32; 9] = [
    libc::RTNLGRP_LINK,
    libc::RTNLGRP_IPV4_IFADDR,
    libc::RTNLGRP_IPV6_IFADDR,
    libc::RTNLGRP_IPV4_ROUTE,
    libc::RTNLGRP_IPV6_ROUTE,
    libc::RTNLGRP_IPV4_RULE,
    libc::RTNLGRP_IPV6_RULE,
    libc::RTNLGRP_IPV4_NETCONF,
    libc::RTNLGRP_IPV6_NETCONF,
];

/// IPsec policies (`XFRMNLGRP_POLICY` of include/uapi/linux/xfrm.h).
const POLICY_GROUPS: [u32; 1] = [4];

/// Tables, chains, rules and sets of nftables, which iptables-nft uses, too.
const RULE_GROUPS: [u32; 1] = [libc::NFNLGRP_NFTABLES as u32];

/// What happens to the state file, or to its directory. This program writes it by renaming another one.
const STATE_EVENTS: AddWatchFlags = AddWatchFlags::IN_DELETE
    .union(AddWatchFlags::IN_MOVED_FROM)
    .union(AddWatchFlags::IN_MOVED_TO)
    .union(AddWatchFlags::IN_CLOSE_WRITE)
    .union(AddWatchFlags::IN_DELETE_SELF)
    .union(AddWatchFlags::IN_MOVE_SELF);

/// Why changes cannot be noticed.
#[derive(Debug, thiserror::Error)]
#[error("cannot watch {what}: {source}")]
pub struct WatchError {
    what: &'static str,
    source: io::Error,
}

fn watch_error<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> WatchError {
    move |source| WatchError { what, source: source.into() }
}

/// The sources of events.
#[derive(Debug)]
pub struct Events {
    notifications: Vec<Socket>,
    files: Inotify,
    state_dir: Option<WatchDescriptor>,
    /// The directory of named namespaces: one that a process lives in is deleted without a notification of the kernel.
    namespaces: Option<WatchDescriptor>,
    supervisor: Option<(RelayProcess, OwnedFd)>,
    /// Readable once a signal has arrived.
    signals: UnixStream,
}

impl Events {
    /// Begins to watch the network namespace of the calling thread, and those that its interfaces have peers in.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn open(signals: &Signals) -> Result<Self, WatchError> {
        let signals = signals.wake().map_err(watch_error("signals"))?;
        let routes = subscribe(NETLINK_ROUTE, &ROUTE_GROUPS).map_err(watch_error("interfaces and routes"))?;
        // The containers' as well: their namespaces have identifiers here, because of the veth pairs (network_namespaces(7)).
        routes.set_listen_all_namespaces(true).map_err(watch_error("the containers' interfaces"))?;
        let rules = optional(subscribe(NETLINK_NETFILTER, &RULE_GROUPS)).map_err(watch_error("rules"))?;
        let policies =
            optional(subscribe(NETLINK_XFRM, &POLICY_GROUPS)).map_err(watch_error("IPsec policies"))?;
        let files = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)
            .map_err(watch_error("the state"))?;
        Ok(Self {
            notifications: [Some(routes), rules, policies].into_iter().flatten().collect(),
            files,
            state_dir: None,
            namespaces: None,
            supervisor: None,
            signals,
        })
    }

    /// Watches this supervisor of the relay from now on, and this state directory, which may be another one of that name.
    /// Returns whether the supervisor runs, if there is one.
    pub fn follow(&mut self, supervisor: Option<RelayProcess>, state_dir: &Path) -> bool {
        // If there is none, there is no network, and its bridge will be noticed.
        self.state_dir = self.watch_instead(self.state_dir, state_dir, STATE_EVENTS);
        self.namespaces = self.watch_instead(self.namespaces, Path::new(NETNS_DIR), AddWatchFlags::IN_DELETE);
        let before = self.supervisor.take().filter(|(known, _)| Some(*known) == supervisor);
        let opened = || supervisor.and_then(|process| Some((process, pidfd(process.pid)?)));
        // A descriptor may be of another process that has got the number since.
        self.supervisor = before.or_else(opened).filter(|(process, _)| process::is_alive(*process));
        supervisor.is_none() || self.supervisor.is_some()
    }

    /// Watches what is at `path` by now instead of what was there, which may be elsewhere by now, and stay there.
    fn watch_instead(
        &self,
        before: Option<WatchDescriptor>,
        path: &Path,
        events: AddWatchFlags,
    ) -> Option<WatchDescriptor> {
        let watched = self.files.add_watch(path, events).ok();
        if let Some(before) = before.filter(|before| Some(*before) != watched) {
            // The kernel itself forgets one that was deleted.
            let _forgotten = self.files.rm_watch(before);
        }
        watched
    }

    /// Waits until something may have changed, or until `end`. Returns whether something may have.
    ///
    /// # Errors
    /// Those of poll(2), but for `EINTR`.
    pub fn wait(&mut self, end: Instant) -> Result<bool, WatchError> {
        let left = end.saturating_duration_since(Instant::now());
        // Rounded up, or it would return a little too early again and again.
        let left = left + Duration::from_millis(1);
        let fds = self.notifications.iter().map(AsFd::as_fd);
        let fds = fds.chain([self.files.as_fd(), self.signals.as_fd()]);
        let fds = fds.chain(self.supervisor.iter().map(|(_, fd)| fd.as_fd()));
        let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Ok(0) | Err(Errno::EINTR) => Ok(false),
            Ok(_some) => Ok(self.take()),
            Err(errno) => Err(watch_error("for events")(errno)),
        }
    }

    /// Takes all events. Returns whether one of them is about what this program maintains.
    fn take(&mut self) -> bool {
        let notified = self.notifications.iter().filter(|socket| drain(socket)).count() > 0;
        let files = self.are_files_changed();
        let ended = self.supervisor.take_if(|(_, fd)| is_readable(fd.as_fd()));
        drop((&self.signals).read(&mut [0; 16]));
        notified || files || ended.is_some()
    }

    fn are_files_changed(&self) -> bool {
        let Ok(events) = self.files.read_events() else { return false };
        let is_state = |name: &Option<_>| name.as_deref().is_none_or(|name: &OsStr| name == state::FILE);
        events.iter().any(|event| Some(event.wd) == self.namespaces || is_state(&event.name))
    }
}

/// `None` if this kernel lacks the protocol, and so what it is about.
fn optional(socket: io::Result<Socket>) -> io::Result<Option<Socket>> {
    match socket {
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => Ok(None),
        other => other.map(Some),
    }
}

fn pidfd(pid: u32) -> Option<OwnedFd> {
    let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
    pidfd_open(pid, PidfdFlags::empty()).ok()
}

fn is_readable(fd: BorrowedFd<'_>) -> bool {
    poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}
