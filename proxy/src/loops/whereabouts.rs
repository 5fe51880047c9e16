//! Which addresses belong to this machine: in this network namespace, on any interface or by any route.
//!
//! Found with sockets that send nothing. rtnetlink(7) would answer directly, but a confined process that
//! keeps `CAP_NET_ADMIN` must not be able to change interfaces and routes.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;

use rproxy_mapping::addr::ScopedIp;
use rproxy_sys::socket::ipv6_mtu;
use socket2::{Domain, Socket, Type};
use tracing::debug;

/// Any port will do, because nothing is sent.
const PORT: u16 = 9;

/// Only the loopback interface has an MTU this large (`IPV6_MTU`, ipv6(7)).
const LOOPBACK_MTU: u32 = 65_536;

/// Where packets to an address arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// This machine: it has the address, or a route of type `local` to it (ip-route(8)).
    Here,
    /// All machines of a network.
    Broadcast,
    /// Another machine, or none.
    Elsewhere,
}

/// A cache of the destinations of addresses.
#[derive(Debug, Default)]
pub struct Whereabouts(HashMap<ScopedIp, Destination>);

impl Whereabouts {
    /// What was found out before, about these addresses.
    pub fn known(destinations: impl IntoIterator<Item = (ScopedIp, Destination)>) -> Self {
        Self(destinations.into_iter().collect())
    }

    /// Where packets to `ip` arrive. If the kernel cannot tell, only the well-known addresses are recognised.
    pub fn of(&mut self, ip: ScopedIp) -> Destination {
        *self.0.entry(ip).or_insert_with(|| match ip.ip() {
            // A connect to the unspecified address reaches this machine.
            address if address.is_unspecified() => Destination::Here,
            IpAddr::V4(Ipv4Addr::LOCALHOST) | IpAddr::V6(Ipv6Addr::LOCALHOST) => Destination::Here,
            IpAddr::V4(Ipv4Addr::BROADCAST) => Destination::Broadcast,
            address => {
                let found = if address.is_ipv4() { find_v4(ip) } else { find_v6(ip) };
                found.unwrap_or_else(|error| {
                    debug!(%error, address = %ip, "cannot find out where it leads");
                    Destination::Elsewhere
                })
            }
        })
    }
}

/// An address of this machine can be bound. So can other addresses with `net.ipv4.ip_nonlocal_bind`, which
/// then have no route, and broadcast addresses, to which sending is not permitted (`SO_BROADCAST`).
fn find_v4(ip: ScopedIp) -> io::Result<Destination> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None)?;
    match socket.bind(&ip.at(0).into()) {
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => return Ok(Destination::Elsewhere),
        // It belongs to this machine, but has no free port.
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => return Ok(Destination::Here),
        bound => bound?,
    }
    match socket.connect(&ip.at(PORT).into()) {
        Ok(()) => Ok(Destination::Here),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(Destination::Broadcast),
        Err(_nowhere) => Ok(Destination::Elsewhere),
    }
}

/// This machine uses its own address as the source of packets to it (RFC 6724, section 5, rule 1), and the
/// loopback interface for addresses with a local route.
fn find_v6(ip: ScopedIp) -> io::Result<Destination> {
    let socket = Socket::new(Domain::IPV6, Type::DGRAM, None)?;
    if socket.connect(&ip.at(PORT).into()).is_err() {
        return Ok(Destination::Elsewhere);
    }
    let socket = UdpSocket::from(socket);
    let is_own = |local: SocketAddr| local.ip() == ip.ip();
    let is_here = is_own(socket.local_addr()?) || ipv6_mtu(socket.as_fd())? >= LOOPBACK_MTU;
    Ok(if is_here { Destination::Here } else { Destination::Elsewhere })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_every_machine_has_is_found() {
        let mut whereabouts = Whereabouts::default();
        for (ip, expected) in [
            ("127.0.0.1", Destination::Here),
            ("127.1.2.3", Destination::Here),
            ("[::1]", Destination::Here),
            ("0.0.0.0", Destination::Here),
            ("[::]", Destination::Here),
            ("255.255.255.255", Destination::Broadcast),
            ("127.255.255.255", Destination::Broadcast),
            // For documentation, and to be discarded (RFC 5737, RFC 6666).
            ("192.0.2.1", Destination::Elsewhere),
            ("[100::1]", Destination::Elsewhere),
        ] {
            assert_eq!(whereabouts.of(ip.parse().unwrap()), expected, "{ip}");
        }
        // Addresses of every machine that the kernel is asked about.
        assert_eq!(find_v4("127.1.2.3".parse().unwrap()).unwrap(), Destination::Here);
        assert_eq!(find_v6("[::1]".parse().unwrap()).unwrap(), Destination::Here);
    }
}
