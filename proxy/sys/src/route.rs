//! Looks up routes (rtnetlink(7), `RTM_GETROUTE`; `ip route get`). This takes no privilege.

use std::io;
use std::net::IpAddr;

use netlink_packet_core::NetlinkPayload;
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::sys::socket::SockProtocol;

use crate::netlink::Client;

/// The index of the interface by which packets leave for `to`, if the route has one.
///
/// # Errors
/// `ENETUNREACH` without a route, and those of socket(2).
pub fn interface_towards(to: IpAddr) -> io::Result<Option<u32>> {
    let route = look_up(to, Vec::new())?;
    Ok(route.attributes.into_iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(index),
        _ => None,
    }))
}

/// Whether packets from `from` to `to` that come in by the interface with this index, and have this firewall `mark`, are
/// delivered to this host.
///
/// # Errors
/// Those of socket(2).
pub fn is_delivered(from: IpAddr, to: IpAddr, interface: u32, mark: u32) -> io::Result<bool> {
    let of_packet = vec![
        RouteAttribute::Source(address(from)),
        RouteAttribute::Iif(interface),
        RouteAttribute::Mark(mark),
    ];
    match look_up(to, of_packet) {
        Ok(route) => Ok(route.header.kind == RouteType::Local),
        // The packet would be dropped: there is no route, forwarding is off, or its source is not plausible.
        Err(error) if error.raw_os_error().is_some() => Ok(false),
        Err(error) => Err(error),
    }
}

fn look_up(to: IpAddr, of_packet: Vec<RouteAttribute>) -> io::Result<RouteMessage> {
    let client = Client::open(SockProtocol::NetlinkRoute)?;
    let mut request = RouteMessage::default();
    let (family, bits) = if to.is_ipv4() { (AddressFamily::Inet, 32) } else { (AddressFamily::Inet6, 128) };
    request.header.address_family = family;
    request.header.destination_prefix_length = bits;
    if of_packet.iter().any(|attribute| matches!(attribute, RouteAttribute::Source(_))) {
        request.header.source_prefix_length = bits;
    }
    request.attributes = of_packet;
    request.attributes.push(RouteAttribute::Destination(address(to)));
    client.send(RouteNetlinkMessage::GetRoute(request), 0)?;
    client.receive(|payload| match payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route)) => Some(route),
        _ => None,
    })
}

fn address(ip: IpAddr) -> RouteAddress {
    match ip {
        IpAddr::V4(ip) => RouteAddress::Inet(ip),
        IpAddr::V6(ip) => RouteAddress::Inet6(ip),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_interface_leads_to_this_host() {
        let this: IpAddr = [127, 0, 0, 1].into();
        assert_eq!(interface_towards(this).unwrap(), Some(1));
        // It leads to others only by way of other interfaces.
        assert!(!is_delivered([127, 0, 0, 1].into(), [198, 51, 100, 1].into(), 1, 0x1000).unwrap());
    }
}
