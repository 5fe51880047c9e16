//! Detects mappings that claim the same port of the same address.

use std::collections::HashMap;
use std::fmt;

use crate::addr::{HostSocketAddr, Protocol, ScopedIp, SockAddr};
use crate::host::{HostAddr, InterfaceName};
use crate::ports::PortRange;
use crate::unix::UnixAddr;
use crate::{HostPorts, Mapping, PortMapping};

/// Two mappings of a set that cannot both be bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// The index of the earlier mapping.
    pub first: usize,
    /// The index of the conflicting mapping.
    pub second: usize,
    /// The lowest port that both claim; no matter which at a Unix socket.
    pub port: u16,
}

/// The overlaps within a set of mappings, by their indexes, at least one for each mapping that is part of any. Ports
/// that are not chosen yet do not overlap.
///
/// It takes O(n log n), because a set may have tens of thousands of mappings at as many addresses.
pub fn overlaps<'a>(mappings: impl IntoIterator<Item = &'a Mapping>) -> Vec<Overlap> {
    let mut taken: HashMap<(Protocol, BindScope), Vec<Wanted>> = HashMap::new();
    for (index, mapping) in mappings.into_iter().enumerate() {
        let HostPorts::Exactly(range) = mapping.host_ports() else {
            continue;
        };
        for protocol in mapping.protocols().iter() {
            for place in BindScope::all_of(mapping) {
                taken.entry((protocol, place)).or_default().push((range, index));
            }
        }
    }
    let mut found = Vec::new();
    for wanted in taken.values_mut() {
        sort(wanted);
        within(wanted, &mut found);
    }
    for protocol in Protocol::ALL {
        for wide in [BindScope::All, BindScope::AllV4, BindScope::AllV6] {
            let Some(others) = taken.get(&(protocol, wide.clone())) else { continue };
            let covered = taken
                .iter()
                .filter(|((of, place), _wanted)| *of == protocol && place.covered_by().contains(&wide));
            let mut covered: Vec<Wanted> = covered.flat_map(|(_place, wanted)| wanted).copied().collect();
            sort(&mut covered);
            between(&covered, others, &mut found);
            between(others, &covered, &mut found);
        }
    }
    found.sort_by_key(|overlap| (overlap.second, overlap.first));
    found.dedup_by_key(|overlap| (overlap.second, overlap.first));
    found
}

/// Whether two bindings of the same port and protocol exclude each other.
pub fn exclude_each_other(one: &PortMapping, other: &PortMapping) -> bool {
    let [one, other] =
        [one, other].map(|port_mapping| BindScope::of_socket(&port_mapping.host, port_mapping.v6only));
    one == other || one.covered_by().contains(&other) || other.covered_by().contains(&one)
}

/// Ports, and the index of the mapping that claims them.
type Wanted = (PortRange, usize);

fn sort(wanted: &mut [Wanted]) {
    wanted.sort_by_key(|(range, index)| (range.first(), *index));
}

/// The addresses on which a mapping listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum BindScope {
    /// Every address.
    All,
    /// Every IPv4 address.
    AllV4,
    /// Every IPv6 address, without IPv4 clients.
    AllV6,
    /// One address.
    One(ScopedIp),
    /// Whatever addresses an interface has.
    Interface(InterfaceName),
    /// A Unix socket.
    Unix(UnixAddr),
}

impl BindScope {
    /// The scope of a socket at `host`, which may exclude IPv4 clients.
    pub fn of(host: ScopedIp, v6only: bool) -> Self {
        match host {
            ScopedIp::ANY if v6only => Self::AllV6,
            ScopedIp::ANY => Self::All,
            ScopedIp::ANY_V4 => Self::AllV4,
            ip => Self::One(ip),
        }
    }

    /// The scope of a socket that is bound to `host`.
    pub fn of_socket(host: &HostSocketAddr, v6only: bool) -> Self {
        match host.sockaddr() {
            SockAddr::Inet(addr) => Self::of((*addr).into(), v6only),
            SockAddr::Unix(addr) => Self::Unix(addr.clone()),
        }
    }

    /// The scopes of a mapping. One of an interface has that of the interface, and those of its addresses, as far as known.
    fn all_of(mapping: &Mapping) -> impl Iterator<Item = Self> {
        let ones = mapping.addresses().iter().map(|ip| Self::of(*ip, mapping.is_v6only()));
        let whole = match mapping.host() {
            HostAddr::Ip(_) => None,
            HostAddr::Interface(name) => Some(Self::Interface(*name)),
            HostAddr::Unix(addr) => Some(Self::Unix(addr.clone())),
        };
        whole.into_iter().chain(ones)
    }

    /// The scopes that receive what is sent to `ip`, an address of this machine, the most specific first.
    pub fn reached_by(ip: ScopedIp) -> [Self; 3] {
        [Self::One(ip), Self::All, if ip.ip().is_ipv4() { Self::AllV4 } else { Self::AllV6 }]
    }

    /// The other scopes that conflict with this one.
    fn covered_by(&self) -> &'static [Self] {
        match self {
            Self::All | Self::Unix(_) => &[],
            Self::AllV4 | Self::AllV6 => &[Self::All],
            // Its addresses may be of either family.
            Self::Interface(_) => &[Self::All, Self::AllV4, Self::AllV6],
            Self::One(ip) if ip.ip().is_ipv4() => &[Self::All, Self::AllV4],
            Self::One(_) => &[Self::All, Self::AllV6],
        }
    }
}

/// Overlaps among ranges of one scope, sorted by their first port.
fn within(ranges: &[Wanted], found: &mut Vec<Overlap>) {
    for (widest, range) in widest_so_far(ranges).zip(ranges.iter().skip(1)) {
        found.extend(overlap(&widest, range));
    }
}

/// Overlaps between the ranges of two scopes, both sorted by their first port: one for each range of the first that has
/// any.
fn between(ones: &[Wanted], others: &[Wanted], found: &mut Vec<Overlap>) {
    let widest: Vec<Wanted> = widest_so_far(others).collect();
    for one in ones {
        // Of the ranges that start before this one ends, the one that ends last.
        let starting = others.partition_point(|(range, _index)| range.first() <= one.0.last());
        let other = starting.checked_sub(1).and_then(|last| widest.get(last));
        found.extend(other.and_then(|other| overlap(one, other)));
    }
}

/// For each range, the one that ends last among it and the ranges before it.
fn widest_so_far(ranges: &[Wanted]) -> impl Iterator<Item = Wanted> {
    ranges.iter().scan(None, |widest: &mut Option<Wanted>, range| {
        let is_wider = widest.is_none_or(|widest| range.0.last() > widest.0.last());
        if is_wider {
            *widest = Some(*range);
        }
        *widest
    })
}

fn overlap(a: &Wanted, b: &Wanted) -> Option<Overlap> {
    let port = a.0.first().max(b.0.first());
    let (first, second) = (a.1.min(b.1), a.1.max(b.1));
    a.0.overlaps(b.0).then_some(Overlap { first, second, port })
}

/// Two mappings that cannot both be bound, as a message for users.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct OverlapError {
    /// The later mapping.
    pub mapping: Box<Mapping>,
    /// The mapping that it conflicts with.
    pub other: Box<Mapping>,
    /// The lowest port that both claim.
    pub port: u16,
}

impl OverlapError {
    /// The error that `mapping` cannot have `port`, because `other` has it.
    pub fn new(mapping: &Mapping, other: &Mapping, port: u16) -> Self {
        Self { mapping: mapping.clone().into(), other: other.clone().into(), port }
    }
}

impl fmt::Display for OverlapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mapping, other, port } = self;
        if mapping.host().unix_addr().is_some() {
            return write!(
                f,
                "its socket is that of the mapping {} ({other}); choose another path",
                other.name()
            );
        }
        write!(f, "port {port} is taken by the mapping {} ({other})", other.name())?;
        match (mapping.host(), other.host()) {
            (HostAddr::Ip(ScopedIp::ANY), HostAddr::Ip(ip))
            | (HostAddr::Ip(ip), HostAddr::Ip(ScopedIp::ANY))
                if ip.ip().is_ipv4() =>
            {
                f.write_str("; [::] serves IPv4 clients too, unless v6only is set")
            }
            (a, b) if a == b => f.write_str("; choose another port"),
            (a, b) if !a.is_wildcard() && !b.is_wildcard() => {
                let interface = a.interface().or(b.interface()).map(|name| name.to_string());
                write!(
                    f,
                    "; the interface {} has that address: choose another port",
                    interface.unwrap_or_default()
                )
            }
            (a, b) => {
                let wide = if a.is_wildcard() { a } else { b };
                write!(f, "; {wide} stands for all addresses: choose another port, or one address")
            }
        }
    }
}

/// Refuses a set of mappings if two claim the same port.
///
/// # Errors
/// [`OverlapError`] for the first overlap.
pub fn refuse_overlap(mappings: &[Mapping]) -> Result<(), OverlapError> {
    match overlaps(mappings).first() {
        None => Ok(()),
        Some(Overlap { first, second, port }) => {
            Err(OverlapError::new(&mappings[*second], &mappings[*first], *port))
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mapping(text: &str) -> Mapping {
        if text.starts_with("unix:") {
            let host = (text.parse().unwrap(), Some(PortRange::OF_UNIX));
            let backend = ("192.0.2.1".parse().unwrap(), PortRange::OF_UNIX);
            return Mapping::new("tcp".parse().unwrap(), host, backend).unwrap();
        }
        let (host, rest) = text.rsplit_once(':').unwrap();
        let (ports, proto) = rest.split_once('/').unwrap();
        let ports: PortRange = ports.parse().unwrap();
        let (host, v6only) = host.strip_prefix("only ").map_or((host, false), |host| (host, true));
        let host = (host.parse().unwrap(), Some(ports));
        let backend = ("192.0.2.1".parse().unwrap(), ports);
        let mapping = Mapping::new(proto.parse().unwrap(), host, backend).unwrap();
        if v6only { mapping.v6only().unwrap() } else { mapping }
    }

    fn overlap(a: &str, b: &str) -> bool {
        let (a, b) = (mapping(a), mapping(b));
        let found = !overlaps([&a, &b]).is_empty();
        assert_eq!(found, !overlaps([&b, &a]).is_empty(), "{a} {b}: it depends on the order");
        found
    }

    #[test]
    fn mappings_overlap_when_one_packet_fits_both() {
        assert!(overlap("10.0.0.11:80/tcp", "10.0.0.11:80/tcp"));
        assert!(overlap("10.0.0.11:80-90/tcp", "10.0.0.11:90-99/tcp"));
        assert!(overlap("0.0.0.0:80/tcp", "[::]:80/tcp"));
        assert!(overlap("127.0.0.1:80/tcp", "[::]:80/tcp"));
        assert!(overlap("[::1]:80/tcp", "only [::]:80/tcp"));
        assert!(overlap("127.0.0.1:80/tcp", "0.0.0.0:80/tcp+udp"));
        assert!(!overlap("0.0.0.0:80/tcp", "only [::]:80/tcp"));
        assert!(!overlap("127.0.0.1:80/tcp", "only [::]:80/tcp"));
        assert!(!overlap("0.0.0.0:80/tcp", "0.0.0.0:80/udp"));
        assert!(!overlap("[::1]:80/tcp", "0.0.0.0:80/tcp"));
        assert!(!overlap("10.0.0.11:80/tcp", "10.0.0.12:80/tcp"));
        assert!(!overlap("0.0.0.0:80-89/tcp", "0.0.0.0:90-99/tcp"));
    }

    #[test]
    fn an_interface_overlaps_what_its_addresses_do() {
        let eth0 = |addresses: &[&str]| {
            let addresses: Vec<ScopedIp> = addresses.iter().map(|ip| ip.parse().unwrap()).collect();
            mapping("%eth0:80/tcp").listening_at(&addresses)
        };
        let message = |one: &Mapping, other: &str| {
            let set = [mapping(other), one.clone()];
            refuse_overlap(&set).map_err(|error| error.to_string())
        };
        let (none, both) = (eth0(&[]), eth0(&["10.0.0.1", "[fd00::1]"]));
        for wide in ["[::]:80/tcp", "0.0.0.0:80/tcp", "only [::]:80/tcp"] {
            assert!(message(&none, wide).unwrap_err().contains("stands for all addresses"), "{wide}");
        }
        for one in ["10.0.0.1:80/tcp", "[fd00::1]:80/tcp"] {
            assert_eq!(message(&none, one), Ok(()));
            assert!(
                message(&both, one).unwrap_err().contains("the interface eth0 has that address"),
                "{one}"
            );
        }
        assert!(message(&none, "%eth0:80/tcp").unwrap_err().contains("choose another port"));
        for other in
            ["%eth1:80/tcp", "unix:/run/a.sock", "10.0.0.2:80/tcp", "10.0.0.1:80/udp", "0.0.0.0:81/tcp"]
        {
            assert_eq!(message(&both, other), Ok(()), "{other}");
        }
    }

    #[test]
    fn a_unix_socket_overlaps_itself_alone() {
        for other in ["unix:/run/b.sock", "unix:@a", "[::]:1/tcp", "%eth0:1/tcp"] {
            assert!(!overlap("unix:/run/a.sock", other), "{other}");
        }
        let message = refuse_overlap(&[mapping("unix:/run/a.sock"), mapping("unix:/run/a.sock")]);
        assert_eq!(
            message.unwrap_err().to_string(),
            "its socket is that of the mapping unix:/run/a.sock (unix:/run/a.sock:1/tcp); choose another path"
        );
    }

    #[test]
    fn the_other_mapping_is_named_with_a_way_out() {
        let set = [mapping("0.0.0.0:80/tcp"), mapping("[::]:80/tcp")];
        let message = refuse_overlap(&set).unwrap_err().to_string();
        assert!(message.contains("port 80 is taken by the mapping 80/tcp (0.0.0.0:80:80/tcp)"), "{message}");
        assert!(message.contains("unless v6only"), "{message}");
        let set = [mapping("10.0.0.1:80/tcp"), mapping("0.0.0.0:80/tcp")];
        assert!(refuse_overlap(&set).unwrap_err().to_string().contains("0.0.0.0 stands for all"));
    }

    fn any_mapping() -> impl Strategy<Value = Mapping> {
        let host =
            proptest::sample::select(vec!["only [::]", "[::]", "0.0.0.0", "10.0.0.1", "10.0.0.2", "[::1]"]);
        let proto = proptest::sample::select(vec!["tcp", "udp", "sctp", "tcp+udp"]);
        (host, 1..30_u16, 0..6_u16, proto).prop_map(|(host, first, more, proto)| {
            mapping(&format!("{host}:{first}-{}/{proto}", first + more))
        })
    }

    proptest! {
        #[test]
        fn a_set_has_overlaps_exactly_if_a_pair_does(
            set in proptest::collection::vec(any_mapping(), 0..8)
        ) {
            let pairs = (0..set.len()).flat_map(|b| (0..b).map(move |a| (a, b)));
            let by_pair: Vec<_> = pairs.filter(|(a, b)| !overlaps([&set[*a], &set[*b]]).is_empty()).collect();
            let by_set: Vec<_> = overlaps(&set).iter().map(|o| (o.first, o.second)).collect();
            prop_assert_eq!(by_set.is_empty(), by_pair.is_empty());
            prop_assert!(by_set.iter().all(|pair| by_pair.contains(pair)), "{:?} {:?}", by_set, by_pair);
        }
    }
}
