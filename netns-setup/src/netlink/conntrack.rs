//! Connection tracking: forgetting UDP flows that would keep to a translation that no longer holds.

use std::net::IpAddr;

use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Protocol, Tuple,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::errno::Errno;

use super::{Client, NetlinkError};
use crate::publish::HostAddr;

/// Deletes the UDP entries whose first packet was sent to `port` on `host`.
///
/// The *original* destination is compared: an entry that was translated carries the container's port in its reply
/// direction only. For a wildcard the address is not compared, because the entry has the concrete one.
///
/// # Errors
/// When the kernel refuses; a kernel without connection tracking has nothing to forget.
pub fn flush_udp(host: HostAddr, port: u16) -> Result<(), NetlinkError> {
    let mut client = match Client::open(NETLINK_NETFILTER) {
        Err(NetlinkError::Socket(error)) if error.raw_os_error() == Some(Errno::EPROTONOSUPPORT as i32) => {
            return Ok(());
        }
        other => other?,
    };
    for family in [NetfilterProtoFamily::IPv4, NetfilterProtoFamily::IPv6] {
        let request = |message| NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), message);
        let entries = client.dump(&request(ConntrackMessage::Get(vec![])))?;
        for tuple in entries.into_iter().filter_map(original_tuple).filter(|tuple| is_for(tuple, host, port))
        {
            let delete = request(ConntrackMessage::Delete(vec![ConntrackAttribute::CtaTupleOrig(tuple)]));
            match client.change(delete, 0) {
                // It ended by itself in the meantime.
                Err(error) if error.is(Errno::ENOENT) => {}
                other => other?,
            }
        }
    }
    Ok(())
}

fn original_tuple(message: NetfilterMessage) -> Option<Vec<Tuple>> {
    let NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) = message.inner else {
        return None;
    };
    attributes.into_iter().find_map(|attribute| match attribute {
        ConntrackAttribute::CtaTupleOrig(tuple) => Some(tuple),
        _ => None,
    })
}

fn is_for(tuple: &[Tuple], host: HostAddr, port: u16) -> bool {
    let (mut udp, mut port_matches, mut destination) = (false, false, None);
    for part in tuple {
        match part {
            Tuple::Proto(parts) => {
                udp = parts.contains(&ProtoTuple::Protocol(Protocol::Udp));
                port_matches = parts.contains(&ProtoTuple::DestinationPort(port));
            }
            Tuple::Ip(parts) => {
                destination = parts.iter().find_map(|part| match part {
                    IPTuple::DestinationAddress(ip) => Some(*ip),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    udp && port_matches && destination.is_some_and(|ip| address_matches(host, ip))
}

fn address_matches(host: HostAddr, ip: IpAddr) -> bool {
    match host {
        HostAddr::Any => true,
        HostAddr::Ip(wanted) if wanted.is_unspecified() => wanted.is_ipv4() == ip.is_ipv4(),
        HostAddr::Ip(wanted) => wanted == ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple(protocol: Protocol, ip: &str, port: u16) -> Vec<Tuple> {
        vec![
            Tuple::Ip(vec![
                IPTuple::SourceAddress("10.0.0.9".parse().unwrap()),
                IPTuple::DestinationAddress(ip.parse().unwrap()),
            ]),
            Tuple::Proto(vec![
                ProtoTuple::Protocol(protocol),
                ProtoTuple::SourcePort(53),
                ProtoTuple::DestinationPort(port),
            ]),
        ]
    }

    #[test]
    fn only_flows_to_that_port_and_address_are_meant() {
        let to = |text: &str| text.parse::<HostAddr>().unwrap();
        assert!(is_for(&tuple(Protocol::Udp, "10.0.0.11", 5353), HostAddr::Any, 5353));
        assert!(is_for(&tuple(Protocol::Udp, "10.0.0.11", 5353), to("10.0.0.11"), 5353));
        assert!(is_for(&tuple(Protocol::Udp, "10.0.0.11", 5353), to("0.0.0.0"), 5353));
        assert!(!is_for(&tuple(Protocol::Udp, "10.0.0.11", 5353), to("[::]"), 5353));
        assert!(!is_for(&tuple(Protocol::Udp, "10.0.0.12", 5353), to("10.0.0.11"), 5353));
        assert!(!is_for(&tuple(Protocol::Udp, "10.0.0.11", 53), HostAddr::Any, 5353));
        assert!(!is_for(&tuple(Protocol::Tcp, "10.0.0.11", 5353), HostAddr::Any, 5353));
    }
}
