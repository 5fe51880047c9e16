//! Deletes conntrack entries of UDP flows whose translation is outdated.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};

use nix::errno::Errno;
use rproxy_sys::conntrack::{Direction, Family, delete_udp};
use rproxy_sys::udp::is_local;

use crate::host_ip::HostIp;

/// Deletes the conntrack entries of UDP flows whose first packet was sent to or from one of `ports`. The latter are
/// created by late replies of whoever served the port before. The kernel lists its table once for each family,
/// however many ports there are.
///
/// The *original* direction is compared, because a translated entry has the container's port only in its
/// reply direction. For a wildcard, the address is not compared, because the entry has the concrete one.
///
/// # Errors
/// If the kernel refuses. A kernel without conntrack has no entries to delete.
pub fn forget_udp(ports: &[(HostIp, u16)]) -> io::Result<()> {
    let mut hosts: HashMap<u16, Vec<HostIp>> = HashMap::new();
    for (host, port) in ports {
        hosts.entry(*port).or_default().push(*host);
    }
    let is_meant = |addr: SocketAddr| {
        hosts.get(&addr.port()).is_some_and(|hosts| hosts.iter().any(|host| matches(*host, addr.ip())))
    };
    // Other hosts may send from the same port number.
    let mut own = HashMap::new();
    let mut is_own = |addr: SocketAddr| *own.entry(addr.ip()).or_insert_with(|| is_local(addr));
    for family in [Family::V4, Family::V6] {
        let is_stale =
            |entry: Direction| is_meant(entry.destination) || is_meant(entry.source) && is_own(entry.source);
        match delete_udp(family, is_stale) {
            Err(error) if error.raw_os_error() == Some(Errno::EPROTONOSUPPORT as i32) => return Ok(()),
            other => drop(other?),
        }
    }
    Ok(())
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
}
