//! Interface addresses.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Client, NetlinkError, link};
use crate::addr::Cidr;

/// Lists the addresses with the indices of their interfaces.
///
/// # Errors
/// If the kernel refuses.
pub fn list(client: &mut Client) -> Result<Vec<(u32, Cidr)>, NetlinkError> {
    let messages = client.dump(&RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    let addresses = messages.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewAddress(message) => read(&message),
        _ => None,
    });
    Ok(addresses.collect())
}

pub(super) fn read(message: &AddressMessage) -> Option<(u32, Cidr)> {
    // IFA_LOCAL is the interface's own address, if present; IFA_ADDRESS is the peer's on a point-to-point
    // link.
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(ip) => Some(*ip),
        _ => None,
    });
    let ip = local.or(address)?;
    Some((message.header.index, Cidr { ip, prefix: message.header.prefix_len }))
}

/// Adds an address to an interface.
///
/// # Errors
/// If the kernel refuses.
pub fn add(client: &mut Client, name: &str, address: Cidr) -> Result<(), NetlinkError> {
    let mut message = message(client, name, address)?;
    match address.ip {
        IpAddr::V4(ip) => {
            let broadcast = ip.to_bits() | (u32::MAX >> address.prefix);
            message.attributes.push(AddressAttribute::Broadcast(broadcast.into()));
        }
        IpAddr::V6(_) => message.header.flags = AddressHeaderFlags::Nodad,
    }
    client.change(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// Removes an address.
///
/// # Errors
/// If the kernel refuses.
pub fn delete(client: &mut Client, name: &str, address: Cidr) -> Result<(), NetlinkError> {
    let message = message(client, name, address)?;
    client.change(RouteNetlinkMessage::DelAddress(message), 0)
}

fn message(client: &mut Client, name: &str, address: Cidr) -> Result<AddressMessage, NetlinkError> {
    let mut message = AddressMessage::default();
    message.header.family = if address.ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.prefix_len = address.prefix;
    message.header.index = link::index(client, name)?;
    message.attributes = vec![AddressAttribute::Local(address.ip), AddressAttribute::Address(address.ip)];
    Ok(message)
}
