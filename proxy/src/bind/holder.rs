//! Finds the program that has a port, for a message.

use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rproxy_mapping::addr::Protocol;
use rproxy_mapping::escape::escaped;

/// The state of a TCP socket that listens (`TCP_LISTEN` in net/tcp_states.h).
const LISTEN: &str = "0A";

/// Who has a port.
#[derive(Debug)]
pub(crate) enum Holder {
    /// A process, with its name.
    Process(u32, String),
    /// A process whose descriptors this one may not list, of a user with this number.
    OfUser(String),
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process(pid, _) if *pid == std::process::id() => f.write_str("this process"),
            Self::Process(pid, name) => write!(f, "{} (process {pid})", escaped(name)),
            Self::OfUser(user) => write!(f, "a process of the user with the number {user}"),
        }
    }
}

/// Who listens there. Nothing is found by a confined process, which reads no files.
pub(crate) fn of(protocol: Protocol, wanted: SocketAddr) -> Option<Holder> {
    let tables: &[&str] = match protocol {
        Protocol::Tcp => &["/proc/net/tcp", "/proc/net/tcp6"],
        Protocol::Udp => &["/proc/net/udp", "/proc/net/udp6"],
        Protocol::Sctp => return None,
    };
    let texts = tables.iter().filter_map(|table| fs::read_to_string(table).ok());
    let socket = texts.filter_map(|text| in_table(&text, protocol, wanted)).next()?;
    Some(match process_with(&format!("socket:[{}]", socket.inode)) {
        Some((pid, name)) => Holder::Process(pid, name),
        None => Holder::OfUser(socket.user),
    })
}

/// A socket in a table of the kernel.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    user: String,
    inode: String,
}

/// The first socket that excludes `wanted` (proc_net(5): local address, state, user, inode).
fn in_table(text: &str, protocol: Protocol, wanted: SocketAddr) -> Option<Found> {
    text.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_slot, local, _remote, state, _queues, _timer, _retransmits, user, _timeout, inode, ..] =
            fields[..]
        else {
            return None;
        };
        let local = parse_addr(local)?;
        let is_in_the_way = local.port() == wanted.port()
            && (protocol != Protocol::Tcp || state == LISTEN)
            && [local.ip(), wanted.ip()].iter().any(IpAddr::is_unspecified)
            || local == wanted;
        is_in_the_way.then(|| Found { user: user.to_owned(), inode: inode.to_owned() })
    })
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
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        Some((pid, name.trim_end().to_owned()))
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
                    assert_eq!(holder.to_string(), "this process", "{address}");
                }
            }
        }
    }

    #[test]
    fn connections_and_other_addresses_are_not_in_the_way() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
                     0: 0100007F:1F90 0100007F:A0A0 01 00000000:00000000 00:00000000 00000000  1000        0 17 1 0\n\
                     1: 0200007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1001        0 18 1 0\n";
        let find = |wanted: &str| in_table(table, Protocol::Tcp, wanted.parse().unwrap());
        assert_eq!(find("127.0.0.3:8080"), None);
        let found = Found { user: "1001".to_owned(), inode: "18".to_owned() };
        assert_eq!(find("0.0.0.0:8080"), Some(found));
        assert_eq!(find("0.0.0.0:8081"), None);
    }
}
