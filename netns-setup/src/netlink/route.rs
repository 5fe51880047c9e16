//! Routes.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use nix::errno::Errno;

use super::{Client, NetlinkError, link, rule};
use crate::action::CONNECTED_METRIC;
use crate::addr::Cidr;
use crate::family::Family;
use crate::name::{CONTAINER_INTERFACE, IfName};
use crate::observed::{Route, TableRoute};
use crate::transparent::TABLE;

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

/// Adds the route that an address of an interface brings with it.
///
/// # Errors
/// If the kernel refuses.
pub fn add_connected(client: &mut Client, name: &str, address: Cidr) -> Result<(), NetlinkError> {
    let message = connected_route(client, name, address)?;
    client.change(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// Removes it.
///
/// # Errors
/// If the kernel refuses.
pub fn delete_connected(client: &mut Client, name: &str, address: Cidr) -> Result<(), NetlinkError> {
    let message = connected_route(client, name, address)?;
    client.change(RouteNetlinkMessage::DelRoute(message), 0)
}

/// The same as the kernel's own (`fib_add_ifaddr` of net/ipv4/fib_frontend.c, `addrconf_prefix_route` of
/// net/ipv6/addrconf.c).
fn connected_route(client: &mut Client, name: &str, address: Cidr) -> Result<RouteMessage, NetlinkError> {
    let (network, oif) = (address.network(), link::index(client, name)?);
    let mut message = RouteMessage::default();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Kernel;
    message.header.kind = RouteType::Unicast;
    message.header.destination_prefix_length = network.prefix;
    message.attributes = vec![RouteAttribute::Destination(network.ip.into()), RouteAttribute::Oif(oif)];
    if address.ip.is_ipv4() {
        message.header.address_family = AddressFamily::Inet;
        message.header.scope = RouteScope::Link;
        message.attributes.push(RouteAttribute::PrefSource(address.ip.into()));
    } else {
        message.header.address_family = AddressFamily::Inet6;
        message.header.scope = RouteScope::Universe;
        message.attributes.push(RouteAttribute::Priority(CONNECTED_METRIC));
    }
    Ok(message)
}

/// Lists the routes of this program's table, for both families.
///
/// # Errors
/// If the kernel refuses.
pub fn list_local(client: &mut Client) -> Result<Vec<TableRoute>, NetlinkError> {
    let mut routes = Vec::new();
    for family in [Family::V4, Family::V6] {
        let mut request = RouteMessage::default();
        request.header.address_family = rule::address_family(family);
        for message in client.dump(&RouteNetlinkMessage::GetRoute(request))? {
            if let RouteNetlinkMessage::NewRoute(message) = message {
                // A kernel without the family answers with all others.
                let is_asked = message.header.address_family == rule::address_family(family);
                routes.extend(read_local(&message, family).filter(|_| is_asked));
            }
        }
    }
    Ok(routes)
}

pub(super) fn read_local(message: &RouteMessage, family: Family) -> Option<TableRoute> {
    let mut table = message.header.table.into();
    let mut route = TableRoute {
        family,
        is_local: message.header.kind == RouteType::Local,
        destination: None,
        oif: None,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Destination(to) => {
                let prefix = message.header.destination_prefix_length;
                route.destination = ip(to).map(|ip| Cidr { ip, prefix }).filter(|to| to.prefix > 0);
            }
            RouteAttribute::Oif(index) => route.oif = Some(*index),
            _ => {}
        }
    }
    (table == TABLE).then_some(route)
}

/// Adds the route that delivers every address to this host.
///
/// # Errors
/// If the kernel refuses.
pub fn add_local(client: &mut Client, family: Family) -> Result<(), NetlinkError> {
    let message = local_route(client, family)?;
    client.change(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// Removes it; does nothing if somebody else has.
///
/// # Errors
/// If the kernel refuses.
pub fn delete_local(client: &mut Client, family: Family) -> Result<(), NetlinkError> {
    let mut message = local_route(client, family)?;
    // Whoever has added it again: these match any.
    message.header.protocol = RouteProtocol::Unspec;
    message.header.scope = RouteScope::NoWhere;
    match client.change(RouteNetlinkMessage::DelRoute(message), 0) {
        Err(error) if error.is(Errno::ESRCH) => Ok(()),
        other => other,
    }
}

fn local_route(client: &mut Client, family: Family) -> Result<RouteMessage, NetlinkError> {
    let mut message = RouteMessage::default();
    message.header.address_family = rule::address_family(family);
    message.header.protocol = RouteProtocol::Boot;
    message.header.scope = RouteScope::Host;
    message.header.kind = RouteType::Local;
    let oif = link::index(client, IfName::loopback().as_str())?;
    // The header has eight bits for the table.
    message.attributes = vec![RouteAttribute::Table(TABLE), RouteAttribute::Oif(oif)];
    Ok(message)
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
