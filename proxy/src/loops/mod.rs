//! Detects mappings that lead back to themselves, directly or through others. There, each connection would
//! open another one, and each datagram another flow, until resources run out.
//!
//! A backend leads back to this process if its address belongs to this machine and one of our sockets is
//! bound to that address or to the wildcard of its family. Sockets of other programs are unknown.

mod hop;
pub mod whereabouts;

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::path::Path;

use crate::loops::whereabouts::{Destination, Whereabouts};
use rproxy_mapping::addr::{AddrError, Protocol, ScopedIp};
use rproxy_mapping::overlap::BindScope;
use rproxy_mapping::ports::PortRange;
use rproxy_mapping::unix::UnixAddr;
use rproxy_mapping::{Mapping, PortMapping};

pub use self::hop::{Hop, Place};

/// The maximum number of steps of a loop that a message shows.
const SHOWN: usize = 8;

/// Why mappings cannot be served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct LoopError {
    /// [`Hop::mapping`] of the mapping at fault.
    pub mapping: usize,
    /// What is wrong.
    pub reason: LoopReason,
}

/// What is wrong with the backend of a mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoopReason {
    /// The steps form a loop. Each is given by where it listens; the first is repeated at the end.
    Ring(Vec<String>),
    /// It leads to its own socket.
    Itself {
        /// Where it listens.
        listens: String,
        /// The address of the backend, if it is another address of this machine.
        own: Option<String>,
    },
    /// A broadcast address cannot be a backend.
    Many(ScopedIp),
}

impl fmt::Display for LoopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Itself { listens, own } => {
                write!(f, "{listens} would forward to itself")?;
                if let Some(ip) = own {
                    write!(f, ", since {ip} is an address of this machine")?;
                }
                f.write_str("; choose another port or another backend")
            }
            Self::Ring(steps) => {
                match steps.len().saturating_sub(SHOWN) {
                    0 => f.write_str(&steps.join(" -> "))?,
                    hidden => {
                        let (begin, end) = (&steps[..SHOWN / 2], &steps[SHOWN / 2 + hidden..]);
                        write!(f, "{} -> {hidden} more -> {}", begin.join(" -> "), end.join(" -> "))?;
                    }
                }
                f.write_str(" would form a loop; choose another backend for one of them")
            }
            Self::Many(ip) => AddrError::Broadcast(*ip).fmt(f),
        }
    }
}

/// Refuses the mappings in `new` if one of them leads back to itself, through them or through `others`, which
/// are already served. `others` is only iterated if a loop is possible. Mappings whose ports are not chosen
/// yet are checked when they are.
///
/// # Errors
/// [`LoopError`] for the first such mapping.
pub fn refuse_loops<'a>(
    new: &[Hop<'a>],
    others: impl IntoIterator<Item = Hop<'a>>,
    whereabouts: &mut Whereabouts,
) -> Result<(), LoopError> {
    refuse(new, others, |place| match place {
        Place::Ip(ip) => whereabouts.of(ip),
        Place::Unix(_) => Destination::Here,
    })
}

/// [`refuse_loops`] for a whole set, before it is bound.
///
/// # Errors
/// [`LoopError`]
pub fn refuse_loops_among<'a>(mappings: impl IntoIterator<Item = &'a Mapping>) -> Result<(), LoopError> {
    let hops: Vec<_> =
        mappings.into_iter().enumerate().flat_map(|(index, mapping)| Hop::of(index, mapping)).collect();
    refuse_loops(&hops, [], &mut Whereabouts::default())
}

/// [`refuse_loops`] for a single socket.
///
/// # Errors
/// [`LoopError`]
pub fn refuse_loop(socket: &PortMapping, whereabouts: &mut Whereabouts) -> Result<(), LoopError> {
    let hop = Hop::of_socket(0, socket);
    refuse_loops(hop.as_slice(), [], whereabouts)
}

fn refuse<'a>(
    new: &[Hop<'a>],
    others: impl IntoIterator<Item = Hop<'a>>,
    mut whereabouts: impl FnMut(Place<'_>) -> Destination,
) -> Result<(), LoopError> {
    let mut leads_here = false;
    for hop in new {
        let mapping = hop.mapping;
        match whereabouts(hop.backend) {
            Destination::Here => leads_here = true,
            Destination::Broadcast => {
                let Place::Ip(ip) = hop.backend else { continue };
                return Err(LoopError { mapping, reason: LoopReason::Many(ip) });
            }
            // The machine may get this address later (`net.ipv4.ip_nonlocal_bind`).
            Destination::Elsewhere if hop.is_own_backend() => {
                let listens = hop.at(hop.host_ports.first());
                return Err(LoopError { mapping, reason: LoopReason::Itself { listens, own: None } });
            }
            Destination::Elsewhere => {}
        }
    }
    if !leads_here {
        return Ok(());
    }
    Listeners::new(new.iter().copied().chain(others).collect()).find_ring(new.len(), whereabouts)
}

/// The scopes of the sockets that a backend may be.
fn scopes_reached(backend: Place<'_>) -> Vec<BindScope> {
    match backend {
        Place::Ip(ip) => BindScope::reached_by(ip).to_vec(),
        Place::Unix(addr) => vec![BindScope::Unix(located(addr))],
    }
}

/// The same socket by a path without links, of which the last part need not exist yet.
fn located(addr: &UnixAddr) -> UnixAddr {
    let Some(path) = addr.path() else { return addr.clone() };
    let whole = fs::canonicalize(path);
    let located = whole.ok().or_else(|| Some(fs::canonicalize(path.parent()?).ok()?.join(path.file_name()?)));
    let text = located.as_deref().and_then(Path::to_str);
    text.and_then(|text| text.parse().ok()).unwrap_or_else(|| addr.clone())
}

/// One port of a hop.
type Step = (usize, u16);

/// Which hop listens on which port.
struct Listeners<'a> {
    hops: Vec<Hop<'a>>,
    /// The hops by where they listen, sorted by their first port.
    at: HashMap<(Protocol, BindScope), Vec<(PortRange, usize)>>,
}

impl<'a> Listeners<'a> {
    fn new(hops: Vec<Hop<'a>>) -> Self {
        let mut at: HashMap<_, Vec<(PortRange, usize)>> = HashMap::new();
        for (index, hop) in hops.iter().enumerate() {
            let place = match hop.host {
                Place::Ip(ip) => BindScope::of(ip, hop.v6only),
                Place::Unix(addr) => BindScope::Unix(located(addr)),
            };
            at.entry((hop.protocol, place)).or_default().push((hop.host_ports, index));
        }
        at.values_mut().for_each(|ranges| ranges.sort_by_key(|(range, index)| (range.first(), *index)));
        Self { hops, at }
    }

    /// Searches for a loop that one of the first `new` hops leads to. Each port leads to at most one other,
    /// so each is visited once.
    fn find_ring(
        &self,
        new: usize,
        mut whereabouts: impl FnMut(Place<'_>) -> Destination,
    ) -> Result<(), LoopError> {
        let in_circle = self.in_circles(&mut whereabouts);
        let mut seen: HashMap<Step, usize> = HashMap::new();
        let starts = (0..new).filter(|hop| in_circle[*hop]);
        let starts = starts.flat_map(|hop| self.steps_on(hop).map(move |port| (hop, port)));
        for (walk, start) in starts.enumerate() {
            let (mut path, mut next) = (Vec::new(), Some(start));
            while let Some(step) = next {
                match seen.get(&step) {
                    Some(earlier) if *earlier == walk => return Err(self.ring(&path, step, new)),
                    Some(_earlier) => break,
                    None => {}
                }
                seen.insert(step, walk);
                path.push(step);
                next = self.step_on(step, &mut whereabouts);
            }
        }
        Ok(())
    }

    /// Which hops can be part of a loop, or lead to one, regardless of the ports. Only these need the walk
    /// through all ports of their ranges.
    fn in_circles(&self, mut whereabouts: impl FnMut(Place<'_>) -> Destination) -> Vec<bool> {
        let mut leads_to = vec![0_usize; self.hops.len()];
        let mut led_to_by: Vec<Vec<usize>> = vec![Vec::new(); self.hops.len()];
        for (hop, leads_to) in leads_to.iter_mut().enumerate() {
            if whereabouts(self.hops[hop].backend) != Destination::Here {
                continue;
            }
            for (_range, next) in self.ranges_reached(hop) {
                *leads_to += 1;
                led_to_by[next].push(hop);
            }
        }
        let mut in_circle = vec![true; self.hops.len()];
        let mut ends: Vec<usize> = (0..self.hops.len()).filter(|hop| leads_to[*hop] == 0).collect();
        while let Some(end) = ends.pop() {
            in_circle[end] = false;
            for before in &led_to_by[end] {
                leads_to[*before] -= 1;
                if leads_to[*before] == 0 {
                    ends.push(*before);
                }
            }
        }
        in_circle
    }

    /// The ports of a hop that are forwarded to a port on which one of these hops may listen.
    fn steps_on(&self, hop: usize) -> impl Iterator<Item = u16> {
        let from = self.hops[hop];
        self.ranges_reached(hop).flat_map(move |(range, _next)| {
            let first = range.first().max(from.backend_ports.first());
            let last = range.last().min(from.backend_ports.last());
            (first..=last).map(move |port| from.host_port(port))
        })
    }

    /// The listeners that a hop may lead to: their ports, and their hops.
    fn ranges_reached(&self, hop: usize) -> impl Iterator<Item = (PortRange, usize)> {
        let hop = self.hops[hop];
        let ranges = scopes_reached(hop.backend).into_iter().filter_map(move |place| {
            let ranges = self.at.get(&(hop.protocol, place))?;
            // A range that begins earlier may overlap it. The ranges of one scope do not overlap each other.
            let begin = ranges.partition_point(|(range, _)| range.first() <= hop.backend_ports.first());
            let ranges = &ranges[begin.saturating_sub(1)..];
            Some(ranges.iter().take_while(move |(range, _)| range.first() <= hop.backend_ports.last()))
        });
        ranges.flatten().copied().filter(move |(range, _)| range.overlaps(hop.backend_ports))
    }

    /// The next step after a port, if one of these hops listens there.
    fn step_on(
        &self,
        (hop, port): Step,
        mut whereabouts: impl FnMut(Place<'_>) -> Destination,
    ) -> Option<Step> {
        let hop = &self.hops[hop];
        let port = hop.backend_port(port);
        let mut places = scopes_reached(hop.backend).into_iter();
        let found = places.find_map(|place| self.listening(hop.protocol, place, port))?;
        (whereabouts(hop.backend) == Destination::Here).then_some((found, port))
    }

    fn listening(&self, protocol: Protocol, place: BindScope, port: u16) -> Option<usize> {
        let ranges = self.at.get(&(protocol, place))?;
        let before = ranges.partition_point(|(range, _)| range.first() <= port).checked_sub(1)?;
        let (range, hop) = ranges[before];
        range.contains(port).then_some(hop)
    }

    /// The loop at the end of `path`, whose last step leads to `back_at`. The mapping at fault is one of the
    /// first `new`: one in the loop if there is one, otherwise the one that leads to it.
    fn ring(&self, path: &[Step], back_at: Step, new: usize) -> LoopError {
        let begin = path.iter().position(|step| *step == back_at).unwrap_or(0);
        let ring = &path[begin..];
        let (at_fault, _port) = *ring.iter().find(|(hop, _port)| *hop < new).unwrap_or(&path[0]);
        let mapping = self.hops[at_fault].mapping;
        if let [(hop, port)] = ring {
            let hop = &self.hops[*hop];
            let own = Some(hop.backend).filter(|backend| *backend != hop.host);
            let own = own.map(|backend| backend.to_string());
            return LoopError { mapping, reason: LoopReason::Itself { listens: hop.at(*port), own } };
        }
        let mut steps: Vec<String> = ring.iter().map(|(hop, port)| self.hops[*hop].at(*port)).collect();
        steps.extend(steps.first().cloned());
        LoopError { mapping, reason: LoopReason::Ring(steps) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rproxy_mapping::endpoint::{BackendSpec, HostSpec};
    use rproxy_mapping::overlap::overlaps;

    use super::*;

    /// `HOST:PORTS/PROTOCOL BACKEND:PORTS`, with `only ` in front of a `[::]` without IPv4 clients.
    fn mapping(text: &str) -> Mapping {
        let (text, v6only) = text.strip_prefix("only ").map_or((text, false), |text| (text, true));
        let (listens, to) = text.split_once(' ').unwrap();
        if text.contains("unix:") {
            return unix_mapping(listens, to);
        }
        let (host, ports) = listens.rsplit_once(':').unwrap();
        let (ports, protocols) = ports.split_once('/').unwrap();
        let (backend, backend_ports) = to.rsplit_once(':').unwrap();
        let listens = (host.parse().unwrap(), Some(ports.parse().unwrap()));
        let to = (backend.parse().unwrap(), backend_ports.parse().unwrap());
        let mapping = Mapping::new(protocols.parse().unwrap(), listens, to).unwrap();
        if v6only { mapping.v6only().unwrap() } else { mapping }
    }

    /// The same with a Unix socket on one side, or on both.
    fn unix_mapping(listens: &str, to: &str) -> Mapping {
        let HostSpec { host, ports } = listens.parse().unwrap();
        let BackendSpec { host: backend, ports: backend_ports } = to.parse().unwrap();
        Mapping::new("tcp".parse().unwrap(), (host, ports), (backend, backend_ports)).unwrap()
    }

    /// A machine with loopback and one address of each family, on a network with a broadcast address.
    fn whereabouts(place: Place<'_>) -> Destination {
        match place.to_string().as_str() {
            unix if unix.starts_with("unix:") => Destination::Here,
            "10.0.0.1" | "[fd00::1]" | "127.0.0.1" | "127.0.0.2" | "[::1]" => Destination::Here,
            "10.0.0.255" => Destination::Broadcast,
            _ => Destination::Elsewhere,
        }
    }

    fn refused(new: &[&str], others: &[&str]) -> Option<String> {
        let [new, others] = [new, others].map(|set| set.iter().map(|text| mapping(text)).collect::<Vec<_>>());
        let new: Vec<_> = new.iter().enumerate().flat_map(|(index, new)| Hop::of(index, new)).collect();
        let others = others.iter().flat_map(|other| Hop::of(0, other));
        refuse(&new, others, whereabouts).err().map(|error| error.to_string())
    }

    #[track_caller]
    fn assert_served(set: &[&str]) {
        assert_eq!(refused(set, &[]), None, "{set:?}");
    }

    #[test]
    fn a_unix_socket_leads_to_whoever_listens_there() {
        let itself = refused(&["unix:/run/a unix:/run/a"], &[]).unwrap();
        assert!(itself.contains("unix:/run/a would forward to itself; choose"), "{itself}");
        refused(&["unix:/tmp/a unix:/tmp/./a"], &[]).expect("another spelling");
        refused(&["unix:/proc/self/cwd/a unix:/proc/thread-self/cwd/a"], &[]).expect("behind links");
        let ring = refused(&["0.0.0.0:80 unix:/run/a", "unix:/run/a unix:@b"], &["unix:@b 127.0.0.1:80"]);
        let ring = ring.unwrap();
        assert!(ring.contains("80/tcp -> unix:/run/a -> unix:@b -> 80/tcp would form a loop"), "{ring}");
        assert_served(&["unix:/run/a unix:/run/b", "unix:@a unix:@b", "unix:/run/c 127.0.0.1:80"]);
    }

    #[test]
    fn a_mapping_to_its_own_socket_is_refused() {
        for itself in [
            "0.0.0.0:80/tcp 127.0.0.1:80",
            "0.0.0.0:80/udp 127.0.0.2:80",
            "[::]:80/tcp 127.0.0.1:80",
            "[::]:80/tcp [::1]:80",
            "only [::]:80/tcp [fd00::1]:80",
            "0.0.0.0:80/tcp 10.0.0.1:80",
            "10.0.0.1:80-90/tcp+udp 10.0.0.1:80-90",
            // An address that the machine does not have yet.
            "10.0.0.7:80/tcp 10.0.0.7:80",
        ] {
            let message = refused(&[itself], &[]).expect(itself);
            // The message gives the reason if it is not obvious.
            let (host, backend) = itself.rsplit_once(' ').unwrap();
            let (ip, _ports) = backend.rsplit_once(':').unwrap();
            let why = if host.starts_with(ip) {
                ""
            } else {
                &format!(", since {ip} is an address of this machine")
            };
            let words = format!("would forward to itself{why}; choose another port");
            assert!(message.contains(&words), "{message}");
        }
    }

    #[test]
    fn where_others_listen_is_no_loop() {
        assert_served(&["0.0.0.0:80/tcp [::1]:80"]);
        assert_served(&["only [::]:80/tcp 127.0.0.1:80"]);
        assert_served(&["0.0.0.0:80/tcp 127.0.0.1:81"]);
        assert_served(&["10.0.0.1:80/tcp 127.0.0.1:80"]);
        assert_served(&["0.0.0.0:80/tcp 172.17.0.2:80"]);
        assert_served(&["[::]:8000-8010/tcp 127.0.0.1:8011-8021"]);
        // TCP leads to a UDP port, and UDP to a port without a listener.
        assert_served(&["0.0.0.0:80/tcp 127.0.0.1:81", "0.0.0.0:81/udp 127.0.0.1:80"]);
        // A chain without a loop.
        assert_served(&["0.0.0.0:80/tcp 127.0.0.1:81", "0.0.0.0:81/tcp 127.0.0.1:82"]);
        assert_served(&["[::]:8000-8010/tcp 127.0.0.1:8001-8011"]);
    }

    #[test]
    fn a_ring_is_named() {
        let ring = ["[::]:8080/tcp 127.0.0.1:9090", "127.0.0.1:9090/tcp 10.0.0.1:8080"];
        let message = refused(&ring, &[]).unwrap();
        let expected = "8080/tcp -> 127.0.0.1:9090/tcp -> 8080/tcp would form a loop; choose another backend for one of them";
        assert_eq!(message, expected);
        assert!(refused(&ring[..1], &ring[1..]).is_some());
        assert!(refused(&ring[1..], &ring[..1]).is_some());
        let ports = ["0.0.0.0:70-80/udp 127.0.0.1:170-180", "0.0.0.0:172/udp 127.0.0.1:72"];
        assert!(refused(&ports, &[]).unwrap().starts_with("72/udp -> 172/udp -> 72/udp would"));
        let long: Vec<_> = (1..100).map(|port| format!("[::]:{port}/tcp [::1]:{}", port % 99 + 1)).collect();
        let long: Vec<_> = long.iter().map(String::as_str).collect();
        let message = refused(&long, &[]).unwrap();
        assert!(message.starts_with("1/tcp -> 2/tcp -> 3/tcp -> 4/tcp -> 92 more -> 97/tcp"), "{message}");
        assert!(message.contains(" -> 99/tcp -> 1/tcp would form a loop"), "{message}");
    }

    #[test]
    fn a_broadcast_address_is_refused() {
        let message = refused(&["0.0.0.0:80/udp 10.0.0.255:81"], &[]).unwrap();
        assert!(message.contains("10.0.0.255 is a broadcast address"), "{message}");
    }

    #[test]
    fn ports_of_sockets_are_put_together() {
        let one = mapping("0.0.0.0:8000-8019/tcp+udp 127.0.0.1:9000-9019");
        let hops = Hop::of_sockets(0, &one, one.port_mappings());
        let of_mapping: Vec<_> = Hop::of(0, &one).collect();
        assert_eq!(format!("{hops:?}"), format!("{of_mapping:?}"));
        let others = one.port_mappings().step_by(2);
        assert_eq!(Hop::of_sockets(0, &one, others).len(), 20);
    }

    #[test]
    fn ten_thousand_ranges_take_no_time() {
        let host = |index: usize| format!("127.0.{}.{}", index / 100, index % 100 + 3);
        let chain = |index: usize| format!("{}:1-1000/tcp {}:1-1000", host(index), host(index + 1));
        let chain: Vec<Mapping> = (0..1000).map(|index| mapping(&chain(index))).collect();
        assert_eq!(refuse_loops_among(&chain), Ok(()));
    }

    prop_compose! {
        fn any_mapping()(
            host in prop::sample::select(vec![
                "[::]", "only [::]", "0.0.0.0", "127.0.0.1", "10.0.0.1", "10.0.0.7", "[::1]", "[fd00::1]",
            ]),
            backend in prop::sample::select(vec![
                "127.0.0.1", "127.0.0.2", "10.0.0.1", "10.0.0.7", "10.0.0.8", "[::1]", "[fd00::1]",
            ]),
            protocols in prop::sample::select(vec!["tcp", "udp", "tcp+udp"]),
            (first, to, more) in (1..12_u16, 1..12_u16, 0..4_u16),
        ) -> Mapping {
            mapping(&format!("{host}:{first}-{}/{protocols} {backend}:{to}-{}", first + more, to + more))
        }
    }

    /// Whether datagrams or connections to a backend reach this socket.
    fn is_reached(socket: &PortMapping, from: &PortMapping) -> bool {
        let (host, to) = (socket.host.inet_addr().unwrap(), from.backend.socket_addr());
        let takes = match (ScopedIp::from(host), to.is_ipv4()) {
            (ScopedIp::ANY, is_v4) => !(is_v4 && socket.v6only),
            (ScopedIp::ANY_V4, is_v4) => is_v4,
            (one, _is_v4) => one == to.into(),
        };
        let to_itself = socket == from && host.ip() == to.ip();
        let here = whereabouts(Place::Ip(to.into())) == Destination::Here || to_itself;
        socket.protocol == from.protocol && host.port() == to.port() && takes && here
    }

    /// Whether one of the sockets leads back to itself: follows each for as many steps as there are sockets.
    fn has_ring(sockets: &[PortMapping]) -> bool {
        sockets.iter().any(|start| {
            let step = |at: &&PortMapping| sockets.iter().find(|socket| is_reached(socket, at));
            std::iter::successors(Some(start), step).nth(sockets.len()).is_some()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 3000, ..ProptestConfig::default() })]

        #[test]
        fn a_set_is_refused_exactly_if_following_each_port_never_ends(
            mut set in prop::collection::vec(any_mapping(), 1..9), known in 0..8_usize,
        ) {
            while let Some(overlap) = overlaps(&set).first() {
                set.remove(overlap.second);
            }
            let sockets: Vec<PortMapping> = set.iter().flat_map(Mapping::port_mappings).collect();
            let hops: Vec<_> = set.iter().enumerate().flat_map(|(index, one)| Hop::of(index, one)).collect();
            let whole = refuse(&hops, [], whereabouts);
            prop_assert_eq!(whole.is_err(), has_ring(&sockets), "{}: {:?}", set.iter().map(|one| format!("{one} to {}; ", one.backend())).collect::<String>(), whole);

            // In two steps, of which the first was allowed.
            let (old, new) = set.split_at(known.min(set.len()));
            let old_sockets: Vec<PortMapping> = old.iter().flat_map(Mapping::port_mappings).collect();
            if !has_ring(&old_sockets) {
                let new: Vec<_> = new.iter().enumerate().flat_map(|(index, one)| Hop::of(index, one)).collect();
                let later = refuse(&new, old.iter().flat_map(|old| Hop::of(0, old)), whereabouts);
                prop_assert_eq!(later.is_err(), whole.is_err(), "{:?}", later);
            }
        }
    }
}
