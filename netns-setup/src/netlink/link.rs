//! Interfaces.

use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::link::{
    BridgeStpState, InfoBridge, InfoBridgePort, InfoData, InfoKind, InfoPortData, InfoPortKind, InfoVeth,
    LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;

use super::{Client, NetlinkError};
use crate::action::{LinkChange, OffloadSizes, VethPair};
use crate::addr::Mac;
use crate::name::CONTAINER_INTERFACE;
use crate::name::IfName;
use crate::observed::Link;

/// Lists the interfaces.
///
/// # Errors
/// If the kernel refuses.
pub fn list(client: &mut Client) -> Result<Vec<Link>, NetlinkError> {
    let messages = client.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    let links = messages.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewLink(message) => Some(read(message)),
        _ => None,
    });
    Ok(links.collect())
}

pub(super) fn read(message: LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        up: message.header.flags.contains(LinkFlags::Up),
        ..Link::default()
    };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name = name,
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
            LinkAttribute::Mtu(mtu) => link.mtu = mtu,
            LinkAttribute::Address(bytes) => link.mac = bytes.try_into().ok().map(Mac),
            LinkAttribute::Controller(index) => link.master = Some(index),
            LinkAttribute::TsoMaxSize(size) => link.tso_max_size = Some(size),
            LinkAttribute::GsoMaxSize(size) => link.offload.gso = Some(size),
            LinkAttribute::GroMaxSize(size) => link.offload.gro = Some(size),
            LinkAttribute::GsoIpv4MaxSize(size) => link.offload.gso_ipv4 = Some(size),
            LinkAttribute::GroIpv4MaxSize(size) => link.offload.gro_ipv4 = Some(size),
            LinkAttribute::LinkInfo(infos) => read_info(&mut link, infos),
            _ => {}
        }
    }
    link
}

fn read_info(link: &mut Link, infos: Vec<LinkInfo>) {
    for info in infos {
        match info {
            LinkInfo::Kind(kind) => link.kind = Some(kind.to_string()),
            LinkInfo::Data(InfoData::Bridge(bridge)) => {
                link.stp = bridge.iter().any(|info| match info {
                    InfoBridge::StpState(state) => *state != BridgeStpState::Disabled,
                    _ => false,
                });
            }
            LinkInfo::PortData(InfoPortData::BridgePort(port)) => {
                link.hairpin = port.contains(&InfoBridgePort::HairpinMode(true));
            }
            _ => {}
        }
    }
}

/// Asks for a change that changes nothing.
///
/// # Errors
/// [`NetlinkError::Denied`] if this process may change nothing.
pub fn probe(client: &mut Client) -> Result<(), NetlinkError> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(IfName::loopback().to_string()));
    client.change(RouteNetlinkMessage::SetLink(message), 0)
}

/// The index of an interface.
///
/// # Errors
/// If there is none of that name.
pub fn index(client: &mut Client, name: &str) -> Result<u32, NetlinkError> {
    get(client, name).map(|link| link.index)
}

fn get(client: &mut Client, name: &str) -> Result<Link, NetlinkError> {
    let mut request = LinkMessage::default();
    request.attributes.push(LinkAttribute::IfName(name.to_owned()));
    match client.get(RouteNetlinkMessage::GetLink(request)) {
        Ok(RouteNetlinkMessage::NewLink(message)) => Ok(read(message)),
        Err(error) if !error.is(Errno::ENODEV) => Err(error),
        _ => Err(NetlinkError::NoLink(name.to_owned())),
    }
}

/// Creates a bridge without spanning tree.
///
/// # Errors
/// If the kernel refuses, for example because the name is taken.
pub fn add_bridge(client: &mut Client, name: &IfName, mac: Mac, mtu: u32) -> Result<(), NetlinkError> {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_string()),
        LinkAttribute::Address(mac.0.to_vec()),
        LinkAttribute::Mtu(mtu),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Bridge),
            LinkInfo::Data(InfoData::Bridge(vec![InfoBridge::StpState(BridgeStpState::Disabled)])),
        ]),
    ];
    client.change(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// Creates a veth pair, with the container's end directly in `netns`.
///
/// # Errors
/// If the kernel refuses, for example because either name is taken.
pub fn add_veth(client: &mut Client, pair: &VethPair, netns: BorrowedFd<'_>) -> Result<(), NetlinkError> {
    let mut peer = LinkMessage::default();
    peer.attributes = vec![
        LinkAttribute::IfName(CONTAINER_INTERFACE.to_owned()),
        LinkAttribute::Address(pair.container_mac.0.to_vec()),
        LinkAttribute::Mtu(pair.mtu),
        LinkAttribute::NetNsFd(netns.as_raw_fd()),
    ];
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(pair.host.to_string()),
        LinkAttribute::Address(pair.host_mac.0.to_vec()),
        LinkAttribute::Mtu(pair.mtu),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]),
    ];
    client.change(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// Deletes an interface.
///
/// # Errors
/// If the kernel refuses.
pub fn delete(client: &mut Client, name: &IfName) -> Result<(), NetlinkError> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_string()));
    client.change(RouteNetlinkMessage::DelLink(message), 0)
}

/// Changes a property of an interface.
///
/// # Errors
/// If the kernel refuses.
pub fn set(client: &mut Client, name: &str, change: &LinkChange) -> Result<(), NetlinkError> {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    match change {
        LinkChange::Up(up) => {
            message.header.flags = if *up { LinkFlags::Up } else { LinkFlags::empty() };
            message.header.change_mask = LinkFlags::Up;
        }
        LinkChange::Address(mac) => message.attributes.push(LinkAttribute::Address(mac.0.to_vec())),
        LinkChange::Mtu(mtu) => message.attributes.push(LinkAttribute::Mtu(*mtu)),
        LinkChange::Alias(alias) => message.attributes.push(LinkAttribute::IfAlias(alias.clone())),
        LinkChange::Master(bridge) => {
            let index = bridge.as_ref().map_or(Ok(0), |bridge| index(client, bridge.as_str()))?;
            message.attributes.push(LinkAttribute::Controller(index));
        }
        LinkChange::Stp(on) => {
            let state = if *on { BridgeStpState::KernelStp } else { BridgeStpState::Disabled };
            message.attributes.push(LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Bridge),
                LinkInfo::Data(InfoData::Bridge(vec![InfoBridge::StpState(state)])),
            ]));
        }
        LinkChange::Hairpin(on) => {
            message.attributes.push(LinkAttribute::LinkInfo(vec![
                LinkInfo::PortKind(InfoPortKind::Bridge),
                LinkInfo::PortData(InfoPortData::BridgePort(vec![InfoBridgePort::HairpinMode(*on)])),
            ]));
        }
        LinkChange::Offload(sizes) => return set_offload(client, name, *sizes),
    }
    message.header.interface_family = AddressFamily::Unspec;
    match change {
        // Properties of a link's kind can only be changed with RTM_NEWLINK for the same name.
        LinkChange::Hairpin(_) | LinkChange::Stp(_) => {
            client.change(RouteNetlinkMessage::NewLink(message), 0)
        }
        _ => client.change(RouteNetlinkMessage::SetLink(message), 0),
    }
}

/// Sets the sizes within the device's limits. Larger ones are not requested, because packet sizes are an
/// optimisation that nothing depends on.
fn set_offload(client: &mut Client, name: &str, wanted: OffloadSizes) -> Result<(), NetlinkError> {
    let link = get(client, name)?;
    let within = |wanted: Option<u32>, current: Option<u32>| {
        let limit = link.tso_max_size.unwrap_or(u32::MAX);
        wanted.zip(current).map(|(wanted, _known)| wanted.min(limit))
    };
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    // The kernel also changes the IPv4 size with the other one while that is small, so the IPv4 size is set
    // last.
    message.attributes.extend(within(wanted.gso, link.offload.gso).map(LinkAttribute::GsoMaxSize));
    message
        .attributes
        .extend(wanted.gro.and(link.offload.gro).and(wanted.gro).map(LinkAttribute::GroMaxSize));
    message
        .attributes
        .extend(within(wanted.gso_ipv4, link.offload.gso_ipv4).map(LinkAttribute::GsoIpv4MaxSize));
    message.attributes.extend(
        wanted.gro_ipv4.and(link.offload.gro_ipv4).and(wanted.gro_ipv4).map(LinkAttribute::GroIpv4MaxSize),
    );
    client.change(RouteNetlinkMessage::SetLink(message), 0)
}
