//! Routes.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Client, NetlinkError, link};
use crate::addr::Cidr;
use crate::name::CONTAINER_INTERFACE;
use crate::observed::Route;

/// Lists the unicast routes of the main table, for both families.
///
/// # Errors
/// If the kernel refuses.
pub fn list(client: &mut Client) -> Result<Vec<Route>, NetlinkError> {
    let mut routes = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RouteMessage::default();
        request.header.address_family = family;
        for message in client.dump(&RouteNetlinkMessage::GetRoute(request))? {
            if let RouteNetlinkMessage::NewRoute(message) = message {
                routes.extend(read(&message));
            }
        }
    }
    Ok(routes)
}

pub(super) fn read(message: &RouteMessage) -> Option<Route> {
    if message.header.table != RouteHeader::RT_TABLE_MAIN || message.header.kind != RouteType::Unicast {
        return None;
    }
    let mut route = Route { destination: None, gateway: None, oif: None };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => {
                let prefix = message.header.destination_prefix_length;
                route.destination = ip(to).map(|ip| Cidr { ip, prefix });
            }
            RouteAttribute::Gateway(via) => route.gateway = ip(via),
            RouteAttribute::Oif(index) => route.oif = Some(*index),
            _ => {}
        }
    }
    Some(route)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}

/// Adds the default route of a container.
///
/// # Errors
/// If the kernel refuses.
pub fn add_default(client: &mut Client, gateway: IpAddr) -> Result<(), NetlinkError> {
    let message = default_route(client, gateway)?;
    client.change(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// Removes the default route of a container.
///
/// # Errors
/// If the kernel refuses.
pub fn delete_default(client: &mut Client, gateway: IpAddr) -> Result<(), NetlinkError> {
    let message = default_route(client, gateway)?;
    client.change(RouteNetlinkMessage::DelRoute(message), 0)
}

fn default_route(client: &mut Client, gateway: IpAddr) -> Result<RouteMessage, NetlinkError> {
    let mut message = RouteMessage::default();
    message.header.address_family =
        if gateway.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Boot;
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    let oif = link::index(client, CONTAINER_INTERFACE)?;
    message.attributes = vec![RouteAttribute::Gateway(gateway.into()), RouteAttribute::Oif(oif)];
    Ok(message)
}
