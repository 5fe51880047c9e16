//! Which interfaces there are, and their addresses.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddrV6};

use rproxy_mapping::addr::ScopedIp;
use rproxy_mapping::host::InterfaceName;
use rproxy_sys::link::{Address, Change};

/// The minimum Jaro-Winkler similarity for a name to be considered a misspelling of another.
const SIMILAR: f64 = 0.8;

/// The most interfaces that a message lists.
const LISTED: usize = 16;

/// How an interface stands that mappings listen at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// There is none of this name.
    Missing,
    /// It has no address that can be bound.
    WithoutAddress,
    WithAddress,
}

/// All interfaces, by index.
#[derive(Debug, Default)]
pub(super) struct Table(BTreeMap<u32, Link>);

#[derive(Debug, Default)]
struct Link {
    /// Its name, and then its alternative ones.
    names: Vec<String>,
    /// The addresses that can be bound, in the order in which they came.
    addresses: Vec<Address>,
}

impl Table {
    /// Records a change. Returns whether it is one.
    pub(super) fn apply(&mut self, change: Change) -> bool {
        match change {
            Change::Link { index, names } => {
                let link = self.0.entry(index).or_default();
                std::mem::replace(&mut link.names, names) != link.names
            }
            Change::NoLink { index } => self.0.remove(&index).is_some(),
            Change::Address { index, address, is_usable: true } => {
                let addresses = &mut self.0.entry(index).or_default().addresses;
                let is_new = !addresses.contains(&address);
                addresses.extend(is_new.then_some(address));
                is_new
            }
            Change::Address { index, address, is_usable: false } | Change::NoAddress { index, address } => {
                let Some(link) = self.0.get_mut(&index) else { return false };
                let before = link.addresses.len();
                link.addresses.retain(|other| *other != address);
                link.addresses.len() < before
            }
        }
    }

    fn named(&self, name: InterfaceName) -> Option<(u32, &Link)> {
        let is_named = |link: &Link| link.names.iter().any(|other| other == name.as_str());
        self.0.iter().find(|(_index, link)| is_named(link)).map(|(index, link)| (*index, link))
    }

    pub(super) fn addresses_of(&self, name: InterfaceName) -> Vec<ScopedIp> {
        let mut addresses: Vec<ScopedIp> = Vec::new();
        let Some((index, link)) = self.named(name) else { return addresses };
        for ip in link.addresses.iter().map(|address| scoped(address.ip, index)) {
            if !addresses.contains(&ip) {
                addresses.push(ip);
            }
        }
        addresses
    }

    pub(super) fn standing_of(&self, name: InterfaceName) -> Standing {
        match self.named(name) {
            None => Standing::Missing,
            Some((_index, link)) if link.addresses.is_empty() => Standing::WithoutAddress,
            Some(_) => Standing::WithAddress,
        }
    }

    /// Why nothing can be listened at, if so.
    pub(super) fn problem_of(&self, name: InterfaceName) -> Option<String> {
        match self.standing_of(name) {
            Standing::Missing => {
                let hint = self.hint(name);
                Some(format!("there is no interface {name}; its mappings are served when it appears{hint}"))
            }
            Standing::WithoutAddress => {
                Some(format!("the interface {name} has no address; its mappings are served when it gets one"))
            }
            Standing::WithAddress => None,
        }
    }

    /// Which interfaces there are, for somebody who has asked for `missing`.
    fn hint(&self, missing: InterfaceName) -> String {
        let mut names: Vec<&str> = self.0.values().flat_map(|link| &link.names).map(String::as_str).collect();
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
        Change::Link { index, names: vec![name.to_owned()] }
    }

    fn of(ip: &str, prefix: u8, peer: &str) -> Address {
        let ip: IpAddr = ip.parse().unwrap();
        Address { ip, network: ip.is_ipv4().then(|| (peer.parse().unwrap(), prefix)) }
    }

    fn address(index: u32, ip: &str, prefix: u8, is_usable: bool) -> Change {
        Change::Address { index, address: of(ip, prefix, ip), is_usable }
    }

    fn no_address(index: u32, ip: &str, prefix: u8) -> Change {
        Change::NoAddress { index, address: of(ip, prefix, ip) }
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
    fn an_address_stays_while_it_has_a_peer() {
        let mut table = Table::default();
        let [one, other] = ["10.6.0.2", "10.6.0.3"].map(|peer| of("10.6.0.1", 32, peer));
        table.apply(link(2, "eth0"));
        for address in [one, other] {
            assert!(table.apply(Change::Address { index: 2, address, is_usable: true }));
        }
        assert!(table.apply(Change::NoAddress { index: 2, address: other }));
        assert_eq!(addresses(&table, "eth0"), ["10.6.0.1"]);
        assert!(table.apply(Change::NoAddress { index: 2, address: one }));
        assert!(addresses(&table, "eth0").is_empty());
    }

    #[test]
    fn an_alternative_name_is_one() {
        let mut table = Table::default();
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        table.apply(address(2, "10.0.0.1", 24, true));
        assert!(table.apply(Change::Link { index: 2, names: names(&["eth0", "enp0s3"]) }));
        assert_eq!(addresses(&table, "enp0s3"), ["10.0.0.1"]);
        assert_eq!(table.hint(name("enp0s4")), "; did you mean enp0s3? (there are eth0, enp0s3)");
        assert!(table.apply(Change::Link { index: 2, names: names(&["eth0"]) }));
        assert_eq!(table.standing_of(name("enp0s3")), Standing::Missing);
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
