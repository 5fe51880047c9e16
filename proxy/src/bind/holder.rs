//! Finds the program that has a port, for a message.

use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rproxy_mapping::addr::Protocol;
use rproxy_mapping::escape::escaped;
use rustix::process::geteuid;

/// The state of a TCP socket that listens (`TCP_LISTEN` in net/tcp_states.h).
const LISTEN: &str = "0A";

/// Who has a port.
#[derive(Debug)]
pub(crate) enum Holder {
    /// A process, with its name.
    Process(u32, String),
    /// No process that root sees.
    Hidden,
    /// One of the user of this process, whose descriptors this one may not list: it is in another user namespace.
    SameUser,
    /// One of another user, whose number may not be mapped in this user namespace.
    OtherUser,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(pid, _) if *pid == std::process::id() => f.write_str("this process"),
            Self::Process(pid, name) => write!(f, "{} (process {pid})", escaped(name)),
            Self::Hidden => f.write_str("the kernel (VXLAN, WireGuard, NFS), or in another PID namespace"),
            Self::SameUser => f.write_str("another program of this user"),
            Self::OtherUser => f.write_str("another user's program"),
        }
    }
}

/// What the tables of the kernel tell of a port.
#[derive(Debug)]
pub(crate) struct Taken {
    pub(crate) by: Holder,
    /// Whether it is in the way for sure. What listens at an IPv6 wildcard may be for IPv6 alone, and then something has the
    /// port that the tables do not show, such as a socket that is only bound.
    pub(crate) is_sure: bool,
}

/// Who listens there. Nothing is found by a confined process, which reads no files.
pub(crate) fn of(protocol: Protocol, wanted: SocketAddr) -> Option<Taken> {
    let tables: &[&str] = match protocol {
        Protocol::Tcp => &["/proc/net/tcp", "/proc/net/tcp6"],
        Protocol::Udp => &["/proc/net/udp", "/proc/net/udp6"],
        Protocol::Sctp => return None,
    };
    let texts: Vec<_> = tables.iter().filter_map(|table| fs::read_to_string(table).ok()).collect();
    let (certainty, socket) = in_tables(&texts, protocol, wanted)?;
    let by = match process_with(&format!("socket:[{}]", socket.inode)) {
        Some((pid, name)) => Holder::Process(pid, name),
        None if sees_all_processes() => Holder::Hidden,
        None if socket.user == geteuid().to_string() => Holder::SameUser,
        None => Holder::OtherUser,
    };
    Some(Taken { by, is_sure: certainty == Excludes::Surely })
}

/// Whether this process may list the descriptors of each process of its PID namespace: those of the first one tell. In a user
/// namespace of its own, of which the map is not that of all users, it is not root for others.
fn sees_all_processes() -> bool {
    let is_of_all = |map: String| map.split_whitespace().eq(["0", "0", "4294967295"]);
    fs::read_to_string("/proc/self/uid_map").is_ok_and(is_of_all) && fs::read_dir("/proc/1/fd").is_ok()
}

/// A socket in a table of the kernel.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    /// As this user namespace numbers it.
    user: String,
    inode: String,
}

/// A socket that excludes `wanted`; or else one that does unless it is for IPv6 alone, which the tables do not show.
fn in_tables(texts: &[String], protocol: Protocol, wanted: SocketAddr) -> Option<(Excludes, Found)> {
    let find = |sought| {
        let lines = texts.iter().flat_map(|text| text.lines().skip(1));
        let mut sockets = lines.filter_map(|line| parse(line, protocol));
        let (_local, found) = sockets.find(|(local, _)| excludes(*local, wanted) == sought)?;
        Some((sought, found))
    };
    [Excludes::Surely, Excludes::Perhaps].into_iter().find_map(find)
}

/// The local address of a socket that may be in the way, and whose it is (proc_net(5): local address, state, user, inode).
fn parse(line: &str, protocol: Protocol) -> Option<(SocketAddr, Found)> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [_slot, local, _remote, state, _queues, _timer, _retransmits, user, _timeout, inode, ..] = fields[..]
    else {
        return None;
    };
    let is_in_the_way = protocol != Protocol::Tcp || state == LISTEN;
    let found = Found { user: user.to_owned(), inode: inode.to_owned() };
    Some((parse_addr(local)?, found)).filter(|_| is_in_the_way)
}

/// Whether a socket excludes another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Excludes {
    Surely,
    Perhaps,
    Not,
}

/// Whether a socket at `local` excludes one at `wanted`.
fn excludes(local: SocketAddr, wanted: SocketAddr) -> Excludes {
    let (local_ip, wanted_ip) = (local.ip().to_canonical(), wanted.ip().to_canonical());
    // Each interface has the link-local addresses for itself, and the tables do not show which one is meant.
    let is_on_a_link = matches!(local_ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
    if local.port() != wanted.port() || is_on_a_link {
        return Excludes::Not;
    }
    match local_ip.is_ipv4() == wanted_ip.is_ipv4() {
        true if local_ip == wanted_ip || local_ip.is_unspecified() || wanted_ip.is_unspecified() => {
            Excludes::Surely
        }
        // `[::]` may be for both families.
        false if [local_ip, wanted_ip].iter().any(|ip| ip.is_ipv6() && ip.is_unspecified()) => {
            Excludes::Perhaps
        }
        _ => Excludes::Not,
    }
}

/// `0100007F:1F90`: words in the order of the machine's bytes, and the port.
fn parse_addr(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |text: &str| u32::from_str_radix(text, 16).ok().map(u32::to_ne_bytes);
    let ip = match ip.len() {
        8 => IpAddr::from(Ipv4Addr::from(word(ip)?)),
        32 => {
            let mut bytes = [0; 16];
            for (index, part) in bytes.chunks_mut(4).enumerate() {
                part.copy_from_slice(&word(ip.get(index * 8..index * 8 + 8)?)?);
            }
            Ipv6Addr::from(bytes).into()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// The first process that has `socket` open, among those whose descriptors this one may list.
fn process_with(socket: &str) -> Option<(u32, String)> {
    let pids = fs::read_dir("/proc").ok()?.flatten();
    pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()).find_map(|pid| {
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
        let mut links = descriptors.filter_map(|entry| fs::read_link(entry.path()).ok());
        links.any(|link| link.as_os_str() == socket).then_some(())?;
        // The kernel cuts it to 15 bytes, also within a character.
        let name = fs::read(format!("/proc/{pid}/comm")).ok()?;
        Some((pid, String::from_utf8_lossy(&name).trim_end().to_owned()))
    })
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    #[test]
    fn whoever_listens_is_found_also_at_a_wildcard() {
        for address in ["127.0.0.1:0", "0.0.0.0:0", "[::]:0"] {
            let Ok(tcp) = TcpListener::bind(address) else { continue };
            let udp = UdpSocket::bind(address).unwrap();
            for (protocol, port) in [
                (Protocol::Tcp, tcp.local_addr().unwrap().port()),
                (Protocol::Udp, udp.local_addr().unwrap().port()),
            ] {
                for wanted in [SocketAddr::from(([127, 0, 0, 1], port)), ([0; 4], port).into()] {
                    let holder = of(protocol, wanted).expect(address);
                    assert_eq!(holder.by.to_string(), "this process", "{address}");
                }
            }
        }
    }

    #[test]
    fn only_a_socket_that_excludes_it_is_found() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
                     0: 0100007F:1F90 0100007F:A0A0 01 00000000:00000000 00:00000000 00000000  1000        0 17 1 0\n\
                     1: 0200007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1001        0 18 1 0\n\
                     2: 00000000:1F91 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1001        0 19 1 0\n";
        let table_v6 = "  sl  local_address                         remote_address                        st\n\
                        0: 00000000000000000000000001000000:1F91 00000000000000000000000000000000:0000 0A 0:0 0:0 0 1002 0 20 1 0\n\
                        1: 00000000000000000000000000000000:1F92 00000000000000000000000000000000:0000 0A 0:0 0:0 0 1002 0 21 1 0\n\
                        2: 0000000000000000FFFF00000300007F:1F93 00000000000000000000000000000000:0000 0A 0:0 0:0 0 1002 0 22 1 0\n\
                        3: 000080FE000000000000000001000000:1F94 00000000000000000000000000000000:0000 0A 0:0 0:0 0 1002 0 23 1 0\n";
        let tables = [table, table_v6].map(str::to_owned);
        for (wanted, inode) in [
            ("127.0.0.3:8080", None),
            ("0.0.0.0:8080", Some("18")),
            ("[::1]:8080", None),
            ("[::]:8080", Some("18")),
            ("[::1]:8081", Some("20")),
            ("[::]:8081", Some("20")),
            ("127.0.0.1:8081", Some("19")),
            ("127.0.0.1:8082", Some("21")),
            ("127.0.0.3:8083", Some("22")),
            ("[::1]:8083", None),
            ("0.0.0.0:8084", None),
            ("[fe80::1]:8084", None),
        ] {
            let found = in_tables(&tables, Protocol::Tcp, wanted.parse().unwrap());
            let is_perhaps = ["[::]:8080", "127.0.0.1:8082"].contains(&wanted);
            let certainty = if is_perhaps { Excludes::Perhaps } else { Excludes::Surely };
            let expected = inode.map(|inode| (certainty, inode));
            let found = found.as_ref().map(|(certainty, found)| (*certainty, &*found.inode));
            assert_eq!(found, expected, "{wanted}");
        }
    }
}
