//! The addresses of the interfaces that mappings listen at, as rtnetlink(7) tells them.
//!
//! A confined process that keeps `CAP_NET_ADMIN` must not be able to change interfaces and routes. So the socket is opened
//! without that capability, which the kernel remembers (`netlink_ns_capable`). Whoever needs no interface is told of none.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, SocketAddrV6};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::libc;
use rproxy_mapping::Mapping;
use rproxy_mapping::addr::ScopedIp;
use rproxy_mapping::host::InterfaceName;
use rproxy_mapping::name::Name;
use rproxy_sys::link::{self, Change};
use rproxy_sys::watch::Watched;
use tokio::io::Interest;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, warn};

/// How often interfaces are listed again at once, if they change meanwhile or changes were lost.
const TRIES: u32 = 4;

/// How long after that, or after an error, they are listed again.
const LATER: Duration = Duration::from_secs(1);

/// The minimum Jaro-Winkler similarity for a name to be considered a misspelling of another.
const SIMILAR: f64 = 0.8;

/// What is logged if the kernel had more to tell than the socket has room for.
const LOST: &str = "some changes of interfaces were lost; listing all of them";

/// The most interfaces that a message lists.
const LISTED: usize = 16;

/// The addresses of interfaces.
#[derive(Debug, Default)]
pub(crate) struct Links {
    socket: Option<Socket>,
    table: Table,
    /// How the interfaces stood that mappings listen at, when it was logged.
    told: BTreeMap<InterfaceName, Standing>,
    /// The addresses that cannot be served, and why, as it was logged.
    refused: HashMap<(Name, ScopedIp), String>,
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

/// How an interface stands that mappings listen at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// There is none of this name.
    Missing,
    /// It has no address that can be bound.
    WithoutAddress,
    WithAddress,
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

    /// Waits until mappings may be elsewhere than their interfaces. Dropped at any point, nothing is lost.
    pub(crate) async fn changed(&mut self) {
        while !std::mem::take(&mut self.is_due) {
            tokio::select! {
                // Reading the error has cleared it.
                received = readable(&mut self.socket) => if let Err(error) = received {
                    debug!(%error, "{LOST}");
                    self.again = Some(Instant::now());
                },
                () = at(self.again) => {}
            }
            if let Err(error) = self.catch_up() {
                warn!(%error, "cannot learn what addresses interfaces have; trying again");
                self.again = Some(Instant::now() + LATER);
            }
        }
    }

    /// Has mappings compared with their interfaces again.
    pub(crate) fn look_again(&mut self) {
        self.is_due = true;
    }

    /// Records that a mapping cannot be served at an address, and logs it unless that is known.
    pub(crate) fn refuse(&mut self, mapping: &Name, ip: ScopedIp, reason: String) {
        if self.refused.get(&(mapping.clone(), ip)) != Some(&reason) {
            warn!(%mapping, address = %ip, reason, "an address of the interface is not served; trying again when something changes");
            self.refused.insert((mapping.clone(), ip), reason);
        }
    }

    /// Whether there are addresses that cannot be served.
    pub(crate) fn has_refused(&self) -> bool {
        !self.refused.is_empty()
    }

    /// Forgets all refusals but those of the addresses for which `is_open`.
    pub(crate) fn keep_refused(&mut self, is_open: impl Fn(&Name, ScopedIp) -> bool) {
        self.refused.retain(|(name, ip), _reason| is_open(name, *ip));
    }

    /// Logs which of the interfaces in use cannot be listened at, unless that is known.
    pub(crate) fn tell(&mut self, in_use: &BTreeSet<InterfaceName>) {
        self.told.retain(|name, _standing| in_use.contains(name));
        for name in in_use {
            let standing = self.table.standing_of(*name);
            if self.told.insert(*name, standing) == Some(standing) {
                continue;
            }
            match standing {
                Standing::Missing => {
                    let hint = self.table.hint(*name);
                    warn!(interface = %name, "there is no such interface; its mappings are served when it appears{hint}");
                }
                Standing::WithoutAddress => {
                    warn!(interface = %name, "the interface has no address; its mappings are served when it gets one");
                }
                Standing::WithAddress => {}
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

/// All interfaces, by index.
#[derive(Debug, Default)]
struct Table(BTreeMap<u32, Link>);

#[derive(Debug, Default)]
struct Link {
    name: String,
    /// The addresses that can be bound, in the order in which they came, and the lengths of their prefixes.
    addresses: Vec<(ScopedIp, u8)>,
}

impl Table {
    /// Records a change. Returns whether it is one.
    fn apply(&mut self, change: Change) -> bool {
        match change {
            Change::Link { index, name } => {
                let link = self.0.entry(index).or_default();
                std::mem::replace(&mut link.name, name) != link.name
            }
            Change::NoLink { index } => self.0.remove(&index).is_some(),
            Change::Address { index, ip, prefix, is_usable: true } => {
                let (addresses, new) =
                    (&mut self.0.entry(index).or_default().addresses, (scoped(ip, index), prefix));
                let is_new = !addresses.contains(&new);
                addresses.extend(is_new.then_some(new));
                is_new
            }
            Change::Address { index, ip, prefix, is_usable: false }
            | Change::NoAddress { index, ip, prefix } => {
                let Some(link) = self.0.get_mut(&index) else { return false };
                let (gone, before) = ((scoped(ip, index), prefix), link.addresses.len());
                link.addresses.retain(|address| *address != gone);
                link.addresses.len() < before
            }
        }
    }

    fn named(&self, name: InterfaceName) -> Option<&Link> {
        self.0.values().find(|link| link.name == name.as_str())
    }

    fn addresses_of(&self, name: InterfaceName) -> Vec<ScopedIp> {
        let mut addresses: Vec<ScopedIp> = Vec::new();
        for (ip, _prefix) in self.named(name).iter().flat_map(|link| &link.addresses) {
            if !addresses.contains(ip) {
                addresses.push(*ip);
            }
        }
        addresses
    }

    fn standing_of(&self, name: InterfaceName) -> Standing {
        match self.named(name) {
            None => Standing::Missing,
            Some(link) if link.addresses.is_empty() => Standing::WithoutAddress,
            Some(_) => Standing::WithAddress,
        }
    }

    /// Which interfaces there are, for somebody who has asked for `missing`.
    fn hint(&self, missing: InterfaceName) -> String {
        let mut names: Vec<&str> =
            self.0.values().map(|link| link.name.as_str()).filter(|name| !name.is_empty()).collect();
        let score = |name: &&str| strsim::jaro_winkler(missing.as_str(), name);
        let meant = names.iter().copied().max_by(|one, other| score(one).total_cmp(&score(other)));
        let meant = meant.filter(|name| score(name) >= SIMILAR);
        let meant = meant.map_or_else(String::new, |name| format!("; did you mean {name}?"));
        let more = if names.len() > LISTED { ", and more" } else { "" };
        names.truncate(LISTED);
        format!("{meant} (there are {}{more})", names.join(", "))
    }
}

/// An address of the interface with this index.
fn scoped(ip: IpAddr, index: u32) -> ScopedIp {
    match ip {
        IpAddr::V6(ip) if ip.is_unicast_link_local() => {
            std::net::SocketAddr::from(SocketAddrV6::new(ip, 0, 0, index)).into()
        }
        ip => ip.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> InterfaceName {
        text.parse().unwrap()
    }

    fn link(index: u32, name: &str) -> Change {
        Change::Link { index, name: name.to_owned() }
    }

    fn address(index: u32, ip: &str, prefix: u8, is_usable: bool) -> Change {
        Change::Address { index, ip: ip.parse().unwrap(), prefix, is_usable }
    }

    fn no_address(index: u32, ip: &str, prefix: u8) -> Change {
        Change::NoAddress { index, ip: ip.parse().unwrap(), prefix }
    }

    fn addresses(table: &Table, interface: &str) -> Vec<String> {
        table.addresses_of(name(interface)).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn addresses_come_and_go() {
        let mut table = Table::default();
        for (change, is_one, expected) in [
            (link(2, "eth0"), true, &[][..]),
            (link(2, "eth0"), false, &[]),
            (address(2, "10.0.0.1", 24, true), true, &["10.0.0.1"]),
            (address(2, "10.0.0.1", 24, true), false, &["10.0.0.1"]),
            (address(2, "fe80::1", 64, false), false, &["10.0.0.1"]),
            (address(2, "fe80::1", 64, true), true, &["10.0.0.1", "[fe80::1%2]"]),
            (address(2, "10.0.0.1", 25, true), true, &["10.0.0.1", "[fe80::1%2]"]),
            (no_address(2, "10.0.0.1", 24), true, &["[fe80::1%2]", "10.0.0.1"]),
            (address(2, "fe80::1", 64, false), true, &["10.0.0.1"]),
            (no_address(2, "10.0.0.9", 24), false, &["10.0.0.1"]),
            (no_address(3, "10.0.0.1", 24), false, &["10.0.0.1"]),
            (Change::NoLink { index: 2 }, true, &[]),
            (Change::NoLink { index: 2 }, false, &[]),
        ] {
            assert_eq!(table.apply(change.clone()), is_one, "{change:?}");
            assert_eq!(addresses(&table, "eth0"), expected, "{change:?}");
        }
    }

    #[test]
    fn a_name_moves_with_its_interface() {
        let mut table = Table::default();
        for change in [
            address(2, "10.0.0.1", 24, true),
            link(2, "eth0"),
            link(3, "eth1"),
            address(3, "10.0.0.2", 24, true),
        ] {
            table.apply(change);
        }
        assert!(table.apply(link(2, "old")) && table.apply(link(3, "eth0")));
        assert_eq!(addresses(&table, "eth0"), ["10.0.0.2"]);
        assert_eq!(addresses(&table, "old"), ["10.0.0.1"]);
        assert_eq!(table.standing_of(name("eth1")), Standing::Missing);
    }

    #[test]
    fn an_interface_that_is_not_there_may_be_a_misspelt_one() {
        let mut table = Table::default();
        [link(1, "lo"), link(2, "eth0")].into_iter().for_each(|link| assert!(table.apply(link)));
        assert_eq!(table.hint(name("etho")), "; did you mean eth0? (there are lo, eth0)");
        assert_eq!(table.hint(name("wlan1")), " (there are lo, eth0)");
        (3..40).for_each(|index| assert!(table.apply(link(index, &format!("veth{index}")))));
        assert!(table.hint(name("wlan1")).ends_with("veth16, and more)"));
    }
}
