//! Deletes conntrack entries of UDP flows whose translation is outdated.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};

use nix::errno::Errno;
use rproxy_sys::conntrack::{Direction, Entry, Family, delete_udp};
use rproxy_sys::udp::is_local;

use crate::addr::Cidr;
use crate::host_ip::HostIp;

/// The flows that begin with a change of the rules.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stale {
    /// Those to or from these ports of the host. The latter are created by late replies of whoever served the port before.
    pub ports: Vec<(HostIp, u16)>,
    /// Those out of these subnets that are not translated, as if there were no rules.
    pub subnets: Vec<Cidr>,
}

/// Deletes the conntrack entries of stale UDP flows. The kernel lists its table once for each family, however many ports
/// there are.
///
/// The *original* direction is compared with the ports, because a translated entry has the container's port only in its
/// reply direction. For a wildcard, the address is not compared, because the entry has the concrete one.
///
/// # Errors
/// If the kernel refuses. A kernel without conntrack has no entries to delete.
pub fn forget_udp(stale: &Stale) -> io::Result<()> {
    let mut hosts: HashMap<u16, Vec<HostIp>> = HashMap::new();
    for (host, port) in &stale.ports {
        hosts.entry(*port).or_default().push(*host);
    }
    let is_meant = |addr: SocketAddr| {
        hosts.get(&addr.port()).is_some_and(|hosts| hosts.iter().any(|host| matches(*host, addr.ip())))
    };
    // Other hosts may send from the same port number.
    let mut own = HashMap::new();
    let mut is_own = |addr: SocketAddr| *own.entry(addr.ip()).or_insert_with(|| is_local(addr));
    for family in [Family::V4, Family::V6] {
        let is_stale = |entry: Entry| {
            let Direction { source, destination } = entry.original;
            is_meant(destination)
                || is_meant(source) && is_own(source)
                || is_untranslated(entry, &stale.subnets) && !is_own(destination)
        };
        match delete_udp(family, is_stale) {
            Err(error) if error.raw_os_error() == Some(Errno::EPROTONOSUPPORT as i32) => return Ok(()),
            other => drop(other?),
        }
    }
    Ok(())
}

/// Whether a flow leaves one of these subnets under its own address.
fn is_untranslated(Entry { original, reply }: Entry, subnets: &[Cidr]) -> bool {
    let leaves =
        |subnet: &Cidr| subnet.contains(original.source.ip()) && !subnet.contains(original.destination.ip());
    subnets.iter().any(leaves) && reply.is_some_and(|reply| reply.destination == original.source)
}

fn matches(host: HostIp, ip: IpAddr) -> bool {
    match host.ip() {
        None => true,
        Some(wanted) if wanted.is_unspecified() => wanted.is_ipv4() == ip.is_ipv4(),
        Some(wanted) => wanted == ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_that_address_is_meant() {
        let ip: IpAddr = "10.0.0.11".parse().unwrap();
        let host = |text: &str| text.parse::<HostIp>().unwrap();
        for same in ["*", "10.0.0.11", "0.0.0.0"] {
            assert!(matches(host(same), ip), "{same}");
        }
        for other in ["[::]", "10.0.0.12"] {
            assert!(!matches(host(other), ip), "{other}");
        }
    }

    #[test]
    fn a_flow_out_of_the_subnet_is_stale_until_it_is_translated() {
        let subnets = [Cidr { ip: [172, 17, 0, 0].into(), prefix: 16 }];
        let is_stale = |from: &str, to: &str, seen: &str| {
            let [source, destination, seen] = [from, to, seen].map(|text| text.parse().unwrap());
            let reply = Some(Direction { source: destination, destination: seen });
            is_untranslated(Entry { original: Direction { source, destination }, reply }, &subnets)
        };
        assert!(is_stale("172.17.0.2:9", "8.8.8.8:53", "172.17.0.2:9"));
        assert!(!is_stale("172.17.0.2:9", "8.8.8.8:53", "10.0.0.11:9"), "it is translated");
        assert!(!is_stale("172.17.0.2:9", "172.17.0.3:53", "172.17.0.2:9"), "it stays inside");
        assert!(!is_stale("10.0.0.12:9", "172.17.0.2:53", "10.0.0.12:9"), "it comes in");
    }
}
