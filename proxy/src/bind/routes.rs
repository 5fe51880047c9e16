//! Whether two addresses are on one link, by the routes of this host.
//!
//! The routes are read from files that are opened before the process is confined, as [proc_net(5)] has them: a confined
//! process with `CAP_NET_ADMIN` and a socket of rtnetlink(7) could also change routes. The files have the main table (IPv6: all
//! of them), where the links that containers and neighbours are on are found.
//!
//! [proc_net(5)]: https://man7.org/linux/man-pages/man5/proc_net.5.html

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rproxy_mapping::interfaces::Interfaces;
use rproxy_mapping::source::Device;

use super::interfaces::HostInterfaces;

/// The files with the routes of IPv4 and IPv6.
const FILES: [&str; 2] = ["/proc/thread-self/net/route", "/proc/thread-self/net/ipv6_route"];

/// How long routes are assumed to be the same.
const KNOWN_FOR: Duration = Duration::from_secs(1);

/// Reading routes takes at most one in this many parts of the time.
const SHARE: u32 = 200;

/// The maximum number of bytes to read: some thousand routes. Hosts that have more are routers of the internet.
const MOST_BYTES: usize = 1 << 20;

/// `RTF_GATEWAY`, `RTF_REJECT` (linux/route.h) and `RTF_LOCAL` (linux/ipv6_route.h).
const GATEWAY: u32 = 0x2;
const REJECT: u32 = 0x200;
const LOCAL: u32 = 0x8000_0000;

/// Opens the files, which a confined process cannot do. Call it before the process is confined, if clients' addresses may be
/// used later.
pub(crate) fn open() {
    files();
}

fn files() -> &'static [Option<File>; 2] {
    static OPENED: OnceLock<[Option<File>; 2]> = OnceLock::new();
    OPENED.get_or_init(|| FILES.map(|path| File::open(path).ok()))
}

/// Whether `client` and `backend` are reached by the same interface, and the client without a gateway. `device` is the
/// interface by which the backend has to be reached, if there is one. `None` if that cannot be told: there are no such routes, too
/// many of them, or no file.
pub(super) fn are_on_one_link(client: IpAddr, backend: SocketAddr, device: Option<&Device>) -> Option<bool> {
    let routes = lately(client)?;
    let to_client = routes.to(client)?;
    if to_client.has_gateway {
        return Some(false);
    }
    let of_client = routes.interfaces.get(to_client.interface)?;
    if let Some(device) = device {
        return Some(device.name() == of_client);
    }
    if let Some(scope) = scope_of(backend) {
        return HostInterfaces.index_of(of_client).map(|index| index == scope);
    }
    routes.to(backend.ip()).map(|to_backend| to_backend.interface == to_client.interface)
}

/// The index of the interface of a link-local address.
pub(super) fn scope_of(addr: SocketAddr) -> Option<u32> {
    match addr {
        SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() => Some(v6.scope_id()),
        _ => None,
    }
}

/// The routes that are no longer than [`KNOWN_FOR`] old, for the family of `ip`. Threads share them.
fn lately(ip: IpAddr) -> Option<Arc<Routes>> {
    type Known = [Option<(Instant, Option<Arc<Routes>>)>; 2];
    static SHARED: Mutex<Known> = Mutex::new([None, None]);
    thread_local! {
        static OWN: RefCell<Known> = const { RefCell::new([None, None]) };
    }
    let (family, now) = (usize::from(ip.is_ipv6()), Instant::now());
    OWN.with_borrow_mut(|own| {
        if let Some((until, routes)) = &own[family]
            && now < *until
        {
            return routes.clone();
        }
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if shared[family].as_ref().is_none_or(|(until, _routes)| *until <= now) {
            let routes = files()[family].as_ref().and_then(|file| whole(file).ok());
            let routes = routes.map(|text| Arc::new(Routes::parse(&text, ip.is_ipv4())));
            let pause = now.elapsed().saturating_mul(SHARE).max(KNOWN_FOR);
            shared[family] = Some((now + pause, routes));
        }
        own[family].clone_from(&shared[family]);
        own[family].as_ref().and_then(|(_until, routes)| routes.clone())
    })
}

/// The text of a file, of which each read returns a part.
fn whole(file: &File) -> io::Result<String> {
    let (mut bytes, mut part) = (Vec::new(), [0; 4096]);
    loop {
        let offset = u64::try_from(bytes.len()).map_err(io::Error::other)?;
        match file.read_at(&mut part, offset)? {
            0 => return String::from_utf8(bytes).map_err(io::Error::other),
            len => bytes.extend_from_slice(&part[..len]),
        }
        if bytes.len() > MOST_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
    }
}

/// Routes of one family.
#[derive(Debug, Default)]
struct Routes {
    /// The names of interfaces.
    interfaces: Vec<String>,
    /// The lengths of prefixes that occur, longest first.
    lengths: Vec<u32>,
    /// The best route for each prefix: its length, and its bits from the highest on.
    best: HashMap<(u32, u128), Route>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Route {
    /// Its position in [`Routes::interfaces`].
    interface: usize,
    has_gateway: bool,
    metric: u32,
}

impl Routes {
    /// Parses a file of proc_net(5). Lines that are not routes are skipped.
    fn parse(text: &str, is_ipv4: bool) -> Self {
        let (mut routes, mut places) = (Self::default(), HashMap::new());
        for line in text.lines() {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let Some(Line { interface, prefix, length, flags, metric }) =
                (if is_ipv4 { Line::of_ipv4(&fields) } else { Line::of_ipv6(&fields) })
            else {
                continue;
            };
            if flags & (REJECT | LOCAL) != 0 {
                continue;
            }
            let place = *places.entry(interface).or_insert_with(|| {
                routes.interfaces.push(interface.to_owned());
                routes.interfaces.len() - 1
            });
            let route = Route { interface: place, has_gateway: flags & GATEWAY != 0, metric };
            let best = routes.best.entry((length, prefix)).or_insert(route);
            if metric < best.metric {
                *best = route;
            }
        }
        routes.lengths = routes.best.keys().map(|(length, _prefix)| *length).collect();
        routes.lengths.sort_unstable_by(|one, other| other.cmp(one));
        routes.lengths.dedup();
        routes
    }

    /// The route to `ip`: that with the longest prefix.
    fn to(&self, ip: IpAddr) -> Option<Route> {
        let bits = match ip {
            IpAddr::V4(v4) => u128::from(v4.to_bits()) << 96,
            IpAddr::V6(v6) => v6.to_bits(),
        };
        let of_length = |length: &u32| {
            let mask = u128::MAX.checked_shl(128 - length).unwrap_or_default();
            self.best.get(&(*length, bits & mask)).copied()
        };
        self.lengths.iter().find_map(of_length)
    }
}

/// A line of a file with routes.
struct Line<'t> {
    interface: &'t str,
    /// The prefix, from the highest bit on, and its length in bits.
    prefix: u128,
    length: u32,
    flags: u32,
    metric: u32,
}

impl<'t> Line<'t> {
    /// `Iface Destination Gateway Flags RefCnt Use Metric Mask …`: addresses are words of the machine's byte order in memory.
    fn of_ipv4(fields: &[&'t str]) -> Option<Self> {
        let [interface, destination, _gateway, flags, _references, _use, metric, mask, ..] = fields else {
            return None;
        };
        let address = |text: &str| u32::from_str_radix(text, 16).map(u32::from_be).ok();
        Some(Self {
            interface,
            prefix: u128::from(address(destination)?) << 96,
            length: address(mask)?.leading_ones(),
            flags: u32::from_str_radix(flags, 16).ok()?,
            metric: metric.parse().ok()?,
        })
    }

    /// `Destination Length Source Length NextHop Metric RefCnt Use Flags Iface`, in hexadecimal.
    fn of_ipv6(fields: &[&'t str]) -> Option<Self> {
        let [destination, length, _source, _length, _next, metric, _references, _use, flags, interface] =
            fields
        else {
            return None;
        };
        let number = |text: &str| u32::from_str_radix(text, 16).ok();
        let prefix = Ipv6Addr::from_bits(u128::from_str_radix(destination, 16).ok()?);
        let length = number(length).filter(|length| *length <= 128)?;
        let (flags, metric) = (number(flags)?, number(metric)?);
        Some(Self { interface, prefix: prefix.to_bits(), length, flags, metric })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V4: &str = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
eth0\t00000000\tFE00000A\t0003\t0\t0\t100\t00000000\t0\t0\t0
eth0\t0000000A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0
docker0\t000011AC\t00000000\t0001\t0\t0\t5\t0000FFFF\t0\t0\t0
wlan0\t000011AC\t00000000\t0001\t0\t0\t600\t0000FFFF\t0\t0\t0
docker0\t000012AC\t020011AC\t0003\t0\t0\t0\t0000FFFF\t0\t0\t0
*\t0000A8C0\t00000000\t0201\t0\t0\t0\t0000FFFF\t0\t0\t0
veth1\t090011AC\t00000000\t0005\t0\t0\t0\tFFFFFFFF\t0\t0\t0
";

    const V6: &str = "\
fd000010000000000000000000000000 40 00000000000000000000000000000000 00 00000000000000000000000000000000 00000100 00000002 00000000 00000001     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 fd000010000000000000000000000001 00000400 00000003 00000000 00000003     eth0
00000000000000000000000000000000 00 00000000000000000000000000000000 00 00000000000000000000000000000000 00000001 00000003 00000000 80000001       lo
fd000010000000000000000000000002 80 00000000000000000000000000000000 00 00000000000000000000000000000000 00000000 00000004 00000000 80200001     eth0
";

    fn way(routes: &Routes, to: &str) -> Option<(String, bool)> {
        let route = routes.to(to.parse().unwrap())?;
        Some((routes.interfaces[route.interface].clone(), route.has_gateway))
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn the_longest_prefix_of_the_best_metric_is_the_route() {
        let routes = Routes::parse(V4, true);
        for (to, interface, has_gateway) in [
            ("10.0.0.12", "eth0", false),
            ("10.0.1.12", "eth0", true),
            ("172.17.0.2", "docker0", false),
            ("172.17.0.9", "veth1", false),
            ("172.18.0.2", "docker0", true),
        ] {
            assert_eq!(way(&routes, to), Some((interface.to_owned(), has_gateway)), "{to}");
        }
    }

    #[test]
    fn routes_to_this_host_lead_to_no_link() {
        let routes = Routes::parse(V6, false);
        assert_eq!(way(&routes, "fd00:10::2"), Some(("eth0".to_owned(), false)));
        assert_eq!(way(&routes, "2001:db8::1"), Some(("eth0".to_owned(), true)));
        assert_eq!(way(&Routes::parse("", false), "::1"), None);
        for cut in 0..V6.len() {
            Routes::parse(&V6[..cut], false);
            Routes::parse(&V6[..cut], true);
        }
    }

    #[test]
    fn the_file_of_this_host_is_read() {
        let [v4, _v6] = files();
        let text = whole(v4.as_ref().unwrap()).unwrap();
        assert!(text.starts_with("Iface"), "{text}");
    }
}
