//! Address types: interface addresses, subnets and the MAC addresses derived from them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An Ethernet address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The MAC address that Docker derives for a container: `02:42`, then the four bytes of its IPv4 address.
    ///
    /// It only depends on the address, so a neighbour's ARP cache stays valid when a container is replaced by
    /// another one with the same address.
    #[must_use]
    pub fn for_container(ip: Ipv4Addr) -> Self {
        let [a, b, c, d] = ip.octets();
        Self([0x02, 0x42, a, b, c, d])
    }

    /// A locally administered unicast address with the bits of `bytes` (IEEE 802, the two low bits of the
    /// first byte).
    #[must_use]
    pub fn local([first, rest @ ..]: [u8; 6]) -> Self {
        let [b, c, d, e, f] = rest;
        Self([(first & 0xfc) | 0x02, b, c, d, e, f])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Why a text is not a valid subnet.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SubnetError {
    /// The text is not an address and a prefix length.
    #[error("{0:?} is not a subnet: write it as ADDRESS/PREFIX, such as {1}")]
    Syntax(String, &'static str),
    /// Bits beyond the prefix are set, so it is unclear which network is meant.
    #[error("{given} has host bits set: the network is {network}")]
    HostBits {
        /// The given network.
        given: String,
        /// The network that contains it.
        network: String,
    },
    /// Too small for a gateway and one container, or implausibly large.
    #[error("the prefix length of {0} must be from {1} to {2}")]
    Prefix(String, u8, u8),
    /// The network is reserved, or cannot be reached through a router.
    #[error("{given} has {purpose} addresses: choose a private network, such as {example}")]
    Special {
        /// The given network.
        given: String,
        /// The purpose of its addresses.
        purpose: &'static str,
        /// A valid example.
        example: &'static str,
    },
}

/// Networks that containers cannot use, and their purposes (the registries of RFC 6890).
const SPECIAL: [(&str, u8, &str); 9] = [
    ("0.0.0.0", 8, "unspecified"),
    ("127.0.0.0", 8, "loopback"),
    ("169.254.0.0", 16, "link-local"),
    ("224.0.0.0", 4, "multicast"),
    ("240.0.0.0", 4, "reserved"),
    ("::", 96, "loopback"),
    ("::ffff:0:0", 96, "IPv4-mapped"),
    ("fe80::", 10, "link-local"),
    ("ff00::", 8, "multicast"),
];

/// Refuses a network that overlaps a special one.
fn refuse_special(network: Cidr, example: &'static str) -> Result<(), SubnetError> {
    let hit = SPECIAL
        .into_iter()
        .find(|(ip, prefix, _)| ip.parse().is_ok_and(|ip| network.overlaps(&Cidr { ip, prefix: *prefix })));
    match hit {
        None => Ok(()),
        Some((_, _, purpose)) => Err(SubnetError::Special { given: network.to_string(), purpose, example }),
    }
}

/// An example for error messages.
const EXAMPLE4: &str = "172.17.0.0/16";
const EXAMPLE6: &str = "fd00:d0c::/64";

/// An IPv4 network: the address pool of the containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet4 {
    network: Ipv4Addr,
    prefix: u8,
}

impl Subnet4 {
    /// A /30 has room for a gateway and one container; anything larger than a /8 is a mistake.
    const PREFIXES: (u8, u8) = (8, 30);

    /// The prefix length.
    #[must_use]
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The first address of the pool, which the bridge uses.
    #[must_use]
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits() + 1)
    }

    /// The broadcast address.
    #[must_use]
    pub fn broadcast(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits() | self.host_mask())
    }

    /// Whether a container may have `ip`: in the network, and not its network, gateway or broadcast address.
    #[must_use]
    pub fn is_assignable(self, ip: Ipv4Addr) -> bool {
        ip > self.gateway() && ip < self.broadcast()
    }

    /// The number of addresses for containers.
    #[must_use]
    pub fn capacity(self) -> u32 {
        self.host_mask() - 2
    }

    /// The position of `ip` in the network: 1 for the gateway, 2 for the first container.
    #[must_use]
    pub fn offset(self, ip: Ipv4Addr) -> u32 {
        ip.to_bits() & self.host_mask()
    }

    /// The address at `offset` from the network address.
    #[must_use]
    pub fn nth(self, offset: u32) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits() | (offset & self.host_mask()))
    }

    /// This network as a prefix.
    #[must_use]
    pub fn cidr(self) -> Cidr {
        Cidr { ip: self.network.into(), prefix: self.prefix }
    }

    fn host_mask(self) -> u32 {
        u32::MAX >> self.prefix
    }
}

impl FromStr for Subnet4 {
    type Err = SubnetError;

    fn from_str(text: &str) -> Result<Self, SubnetError> {
        let syntax = || SubnetError::Syntax(text.to_owned(), EXAMPLE4);
        let (ip, prefix) = text.split_once('/').ok_or_else(syntax)?;
        let ip: Ipv4Addr = ip.parse().map_err(|_ignored| syntax())?;
        let prefix: u8 = prefix.parse().map_err(|_ignored| syntax())?;
        let (shortest, longest) = Self::PREFIXES;
        if !(shortest..=longest).contains(&prefix) {
            return Err(SubnetError::Prefix(text.to_owned(), shortest, longest));
        }
        let network = Ipv4Addr::from_bits(ip.to_bits() & !(u32::MAX >> prefix));
        let subnet = Self { network, prefix };
        if network != ip {
            return Err(SubnetError::HostBits { given: text.to_owned(), network: subnet.to_string() });
        }
        refuse_special(subnet.cidr(), EXAMPLE4)?;
        Ok(subnet)
    }
}

impl fmt::Display for Subnet4 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

/// An IPv6 network. A container's address has the same offset as its IPv4 address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet6 {
    network: Ipv6Addr,
    prefix: u8,
}

impl Subnet6 {
    /// 24 host bits are enough for every offset in the largest IPv4 pool.
    const PREFIXES: (u8, u8) = (16, 104);

    /// The prefix length.
    #[must_use]
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The address at `offset` from the network address.
    #[must_use]
    pub fn nth(self, offset: u32) -> Ipv6Addr {
        Ipv6Addr::from_bits(self.network.to_bits() | u128::from(offset))
    }

    /// The first address, which the bridge uses.
    #[must_use]
    pub fn gateway(self) -> Ipv6Addr {
        self.nth(1)
    }

    /// This network as a prefix.
    #[must_use]
    pub fn cidr(self) -> Cidr {
        Cidr { ip: self.network.into(), prefix: self.prefix }
    }
}

impl FromStr for Subnet6 {
    type Err = SubnetError;

    fn from_str(text: &str) -> Result<Self, SubnetError> {
        let syntax = || SubnetError::Syntax(text.to_owned(), EXAMPLE6);
        let (ip, prefix) = text.split_once('/').ok_or_else(syntax)?;
        let ip: Ipv6Addr = ip.parse().map_err(|_ignored| syntax())?;
        let prefix: u8 = prefix.parse().map_err(|_ignored| syntax())?;
        let (shortest, longest) = Self::PREFIXES;
        if !(shortest..=longest).contains(&prefix) {
            return Err(SubnetError::Prefix(text.to_owned(), shortest, longest));
        }
        let network = Ipv6Addr::from_bits(ip.to_bits() & !(u128::MAX >> prefix));
        let subnet = Self { network, prefix };
        if network != ip {
            return Err(SubnetError::HostBits { given: text.to_owned(), network: subnet.to_string() });
        }
        refuse_special(subnet.cidr(), EXAMPLE6)?;
        Ok(subnet)
    }
}

impl fmt::Display for Subnet6 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

/// An address with a prefix length: an interface address, or the destination of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cidr {
    /// The address.
    pub ip: IpAddr,
    /// The prefix length.
    pub prefix: u8,
}

impl Cidr {
    /// Whether the networks overlap.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        let shorter = self.prefix.min(other.prefix);
        match (self.ip, other.ip) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                (a.to_bits() ^ b.to_bits()).checked_shr(32 - u32::from(shorter)).unwrap_or(0) == 0
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                (a.to_bits() ^ b.to_bits()).checked_shr(128 - u32::from(shorter)).unwrap_or(0) == 0
            }
            _ => false,
        }
    }

    /// The network that it belongs to: the same without host bits.
    #[must_use]
    pub fn network(&self) -> Self {
        let ip = match self.ip {
            IpAddr::V4(ip) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0);
                Ipv4Addr::from_bits(ip.to_bits() & mask).into()
            }
            IpAddr::V6(ip) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix)).unwrap_or(0);
                Ipv6Addr::from_bits(ip.to_bits() & mask).into()
            }
        };
        Self { ip, prefix: self.prefix }
    }

    /// Whether the network has this address.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        let prefix = if ip.is_ipv4() { 32 } else { 128 };
        self.overlaps(&Self { ip, prefix })
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.ip, self.prefix)
    }
}

/// Serialises a type as text, so that the state file uses the same syntax as the command line.
macro_rules! serde_as_text {
    ($type:ty) => {
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}
pub(crate) use serde_as_text;

serde_as_text!(Subnet4);
serde_as_text!(Subnet6);

#[cfg(test)]
mod tests {
    use super::*;

    fn cidr(ip: &str, prefix: u8) -> Cidr {
        Cidr { ip: ip.parse().unwrap(), prefix }
    }

    #[test]
    fn the_mac_of_a_container_carries_its_address() {
        let mac = Mac::for_container(Ipv4Addr::new(172, 17, 0, 2));
        assert_eq!(mac.to_string(), "02:42:ac:11:00:02");
    }

    #[test]
    fn a_local_mac_is_unicast_and_locally_administered() {
        let Mac([first, ..]) = Mac::local([0xff; 6]);
        assert_eq!(first & 0b11, 0b10);
    }

    #[test]
    fn the_default_subnet_has_the_story_s_addresses() {
        let subnet: Subnet4 = "172.17.0.0/16".parse().unwrap();
        assert_eq!(subnet.gateway(), Ipv4Addr::new(172, 17, 0, 1));
        assert_eq!(subnet.nth(2), Ipv4Addr::new(172, 17, 0, 2));
        assert_eq!(subnet.broadcast(), Ipv4Addr::new(172, 17, 255, 255));
        assert_eq!(subnet.capacity(), 65_533);
        assert!(!subnet.is_assignable(subnet.gateway()));
        assert!(!subnet.is_assignable(subnet.broadcast()));
        assert!(!subnet.is_assignable(Ipv4Addr::new(172, 18, 0, 2)));
    }

    #[test]
    fn the_smallest_subnet_has_room_for_one_container() {
        let subnet: Subnet4 = "10.1.1.4/30".parse().unwrap();
        assert_eq!(subnet.capacity(), 1);
        assert!(subnet.is_assignable(Ipv4Addr::new(10, 1, 1, 6)));
    }

    #[test]
    fn a_subnet_that_is_none_is_refused_with_a_way_out() {
        for (text, part) in [
            ("172.17.0.0", "ADDRESS/PREFIX"),
            ("172.17.0.0/x", "ADDRESS/PREFIX"),
            ("172.17.0.1/16", "the network is 172.17.0.0/16"),
            ("172.17.0.0/31", "from 8 to 30"),
            ("0.0.0.0/0", "from 8 to 30"),
        ] {
            let error = text.parse::<Subnet4>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        assert!("fd00::/120".parse::<Subnet6>().is_err());
        assert!("fd00::1/64".parse::<Subnet6>().is_err());
    }

    #[test]
    fn an_ipv6_address_has_the_offset_of_the_ipv4_address() {
        let subnet: Subnet6 = "fd00:d0c::/64".parse().unwrap();
        assert_eq!(subnet.nth(2), "fd00:d0c::2".parse::<Ipv6Addr>().unwrap());
    }

    #[test]
    fn overlap_is_symmetric_and_knows_the_families() {
        assert!(cidr("172.17.0.0", 16).overlaps(&cidr("172.17.5.0", 24)));
        assert!(cidr("172.17.5.0", 24).overlaps(&cidr("172.17.0.0", 16)));
        assert!(!cidr("172.17.0.0", 16).overlaps(&cidr("172.18.0.0", 16)));
        assert!(cidr("0.0.0.0", 0).overlaps(&cidr("172.18.0.0", 16)));
        assert!(!cidr("::", 0).overlaps(&cidr("172.18.0.0", 16)));
    }
}
