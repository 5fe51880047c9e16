//! The addresses of the interfaces that mappings listen at, as rtnetlink(7) tells them.
//!
//! A confined process that keeps `CAP_NET_ADMIN` must not be able to change interfaces and routes. So the socket is opened
//! without that capability, which the kernel remembers (`netlink_ns_capable`). Whoever needs no interface is told of none.

mod lines;
mod refused;
mod table;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::libc;
use rproxy_mapping::Mapping;
use rproxy_mapping::addr::ScopedIp;
use rproxy_mapping::host::InterfaceName;
use rproxy_mapping::name::Name;
use rproxy_sys::link;
use rproxy_sys::watch::Watched;
use tokio::io::Interest;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, warn};

use self::lines::{Line, Lines};
use self::refused::Refused;
use self::table::{Standing, Table};

/// How often interfaces are listed again at once, if they change meanwhile or changes were lost.
const TRIES: u32 = 4;

/// How long after that, or after an error, they are listed again.
const LATER: Duration = Duration::from_secs(1);

/// What is logged if the kernel had more to tell than the socket has room for.
const LOST: &str = "some changes of interfaces were lost; listing all of them";

/// The addresses of interfaces.
#[derive(Debug, Default)]
pub(crate) struct Links {
    socket: Option<Socket>,
    table: Table,
    /// How the interfaces stood that mappings listen at, when it was logged.
    told: BTreeMap<InterfaceName, Standing>,
    /// The addresses that cannot be served.
    refused: Refused,
    lines: Lines,
    /// Whether mappings may be elsewhere than their interfaces.
    is_due: bool,
    /// When everything is listed again.
    again: Option<Instant>,
}

/// The socket of the kernel's messages.
#[derive(Debug)]
enum Socket {
    /// It is told nothing yet.
    Idle(OwnedFd),
    /// It is told of all changes.
    Subscribed(OwnedFd),
    /// It is watched by the runtime where it was waited for first, which the process has until its end.
    Watched(Watched),
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Idle(socket) | Self::Subscribed(socket) => socket.as_fd(),
            Self::Watched(socket) => socket.as_fd(),
        }
    }
}

impl Links {
    /// Learns addresses by this socket, which was opened without `CAP_NET_ADMIN`.
    pub(crate) fn new(socket: io::Result<OwnedFd>) -> Self {
        let socket = socket.inspect_err(|error| debug!(%error, "interfaces cannot be followed"));
        Self { socket: socket.ok().map(Socket::Idle), ..Self::default() }
    }

    /// Whether no mapping has asked for an interface yet.
    pub(crate) fn is_idle(&self) -> bool {
        !matches!(self.socket, Some(Socket::Subscribed(_) | Socket::Watched(_)))
    }

    /// Finds out what addresses interfaces have now. From then on, changes are followed.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub(crate) fn look(&mut self) -> io::Result<()> {
        let no_socket = || io::Error::other("the kernel has not given a socket of rtnetlink(7)");
        match self.socket.take().ok_or_else(no_socket)? {
            Socket::Idle(socket) => {
                let subscribed = link::subscribe(socket.as_fd());
                let is_subscribed = subscribed.is_ok();
                self.socket =
                    Some(if is_subscribed { Socket::Subscribed(socket) } else { Socket::Idle(socket) });
                subscribed?;
                self.list()
            }
            socket => {
                self.socket = Some(socket);
                self.catch_up()
            }
        }
    }

    /// `mapping` where its interface has addresses, as far as known.
    pub(crate) fn located(&self, mapping: &Mapping) -> Mapping {
        let addresses = mapping.interface().map(|name| self.table.addresses_of(name)).unwrap_or_default();
        mapping.listening_at(&addresses)
    }

    /// The addresses that an interface has, as far as known.
    pub(crate) fn addresses_of(&self, name: InterfaceName) -> Vec<ScopedIp> {
        self.table.addresses_of(name)
    }

    /// Why nothing can be listened at of an interface, as far as known, if so.
    pub(crate) fn problem_of(&self, name: InterfaceName) -> Option<String> {
        self.table.problem_of(name)
    }

    /// Waits until mappings may be elsewhere than their interfaces. Dropped at any point, nothing is lost.
    pub(crate) async fn changed(&mut self) {
        while !std::mem::take(&mut self.is_due) {
            let wake_up = self.wake_up();
            tokio::select! {
                // Reading the error has cleared it. What comes before all is listed again is part of that.
                received = readable(&mut self.socket), if self.again.is_none() => if let Err(error) = received {
                    debug!(%error, "{LOST}");
                    self.again = Some(Instant::now());
                },
                () = at(wake_up) => self.woken_up(Instant::now()),
            }
            if let Err(error) = self.catch_up() {
                warn!(%error, "cannot learn what addresses interfaces have; trying again");
                self.again = Some(Instant::now() + LATER);
            }
        }
    }

    /// When there is something to do without a message.
    fn wake_up(&self) -> Option<Instant> {
        [self.again, self.refused.again(), self.lines.due()].into_iter().flatten().min()
    }

    fn woken_up(&mut self, now: Instant) {
        let is_due = |time: Option<Instant>| time.is_some_and(|time| time <= now);
        self.is_due |= is_due(self.refused.again());
        if is_due(self.lines.due()) {
            self.lines.sum_up();
        }
    }

    /// Has mappings compared with their interfaces again.
    pub(crate) fn look_again(&mut self) {
        self.is_due = true;
    }

    /// Records that a mapping cannot be served at an address, and logs it unless that is known.
    pub(crate) fn refuse(&mut self, mapping: &Name, ip: ScopedIp, reason: String) {
        if self.refused.add(mapping, ip, &reason) {
            self.lines.log(Line::Refused(&reason), mapping, ip);
        }
    }

    /// As [`Self::refuse`], for what the kernel does not bind although it has told of it: that is so for a moment before an
    /// address can be bound, so that it is logged if it lasts.
    pub(crate) fn refuse_early(&mut self, mapping: &Name, ip: ScopedIp, reason: String) {
        if self.refused.has(mapping, ip) {
            self.refuse(mapping, ip, reason);
        } else {
            self.refused.add(mapping, ip, "");
        }
    }

    /// Whether there are addresses that cannot be served.
    pub(crate) fn has_refused(&self) -> bool {
        !self.refused.is_empty()
    }

    /// Forgets all refusals but those of the addresses for which `is_open`, which are tried again some time.
    pub(crate) fn keep_refused(&mut self, is_open: impl Fn(&Name, ScopedIp) -> bool) {
        self.refused.keep(Instant::now(), is_open);
    }

    /// Logs that a mapping is served at an address.
    pub(crate) fn log_served(&mut self, mapping: &Name, ip: ScopedIp) {
        self.lines.log(Line::Served, mapping, ip);
    }

    /// Logs that a mapping is no longer served at an address.
    pub(crate) fn log_left(&mut self, mapping: &Name, ip: ScopedIp) {
        self.lines.log(Line::Left, mapping, ip);
    }

    /// Logs which of the interfaces in use cannot be listened at, unless that is known.
    pub(crate) fn tell(&mut self, in_use: &BTreeSet<InterfaceName>) {
        self.told.retain(|name, _standing| in_use.contains(name));
        for name in in_use {
            let standing = self.table.standing_of(*name);
            if self.told.insert(*name, standing) != Some(standing)
                && let Some(problem) = self.table.problem_of(*name)
            {
                warn!("{problem}");
            }
        }
    }

    /// Takes all messages of the kernel.
    fn catch_up(&mut self) -> io::Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        if self.again.is_some() {
            return self.list();
        }
        let mut buffer = Vec::new();
        loop {
            let table = &mut self.table;
            let mut is_changed = false;
            let received =
                link::receive(socket.as_fd(), &mut buffer, |change| is_changed |= table.apply(change));
            self.is_due |= is_changed;
            match received {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    debug!(%error, "{LOST}");
                    return self.list();
                }
                received => received?,
            }
        }
    }

    /// Lists all interfaces and addresses.
    fn list(&mut self) -> io::Result<()> {
        let Some(socket) = &self.socket else { return Ok(()) };
        let (mut tries, mut is_whole) = (0, false);
        let mut table = Table::default();
        // Until it is done: what was queued is gone if it fails.
        self.again = Some(Instant::now() + LATER);
        while !is_whole && tries < TRIES {
            table = Table::default();
            is_whole = link::dump(socket.as_fd(), |change| {
                table.apply(change);
            })?;
            tries += 1;
        }
        (self.table, self.is_due) = (table, true);
        self.again = (!is_whole).then(|| Instant::now() + LATER);
        Ok(())
    }
}

/// Waits for a message; forever if there is nothing to wait for.
///
/// # Errors
/// Messages were lost.
async fn readable(socket: &mut Option<Socket>) -> io::Result<()> {
    if let Some(Socket::Subscribed(subscribed)) = socket {
        match subscribed.try_clone().and_then(|socket| Watched::new(socket, Interest::READABLE)) {
            Ok(watched) => *socket = Some(Socket::Watched(watched)),
            Err(error) => warn!(%error, "the addresses of interfaces are not followed any more"),
        }
    }
    match socket {
        Some(Socket::Watched(watched)) => watched.io(Interest::READABLE, link::has_message).await,
        _ => std::future::pending().await,
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}
