//! IPsec policies (linux/xfrm.h, ip-xfrm(8)) that block what is routed to a subnet, or sent to this host.
//!
//! They are out of reach of `nft flush ruleset`, `iptables -F` and the reload of a firewall. The kernel compares a
//! policy with the addresses before translation (`nf_nat_decode_session` in net/netfilter/nf_nat_proto.c): a packet to
//! a published port, or a reply to a masqueraded connection, is not one to the subnet.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{
    DecodeError, NLM_F_CREATE, NLM_F_EXCL, NetlinkDeserializable, NetlinkHeader, NetlinkPayload,
    NetlinkSerializable,
};
use netlink_sys::protocols::NETLINK_XFRM;
use nix::errno::Errno;

use super::{Client, NetlinkError};
use crate::addr::Cidr;
use crate::block::Block;

const XFRM_MSG_NEWPOLICY: u16 = 0x13;
const XFRM_MSG_DELPOLICY: u16 = 0x14;
const XFRM_MSG_GETPOLICY: u16 = 0x15;
const XFRM_POLICY_IN: u8 = 0;
const XFRM_POLICY_FWD: u8 = 2;
const XFRM_POLICY_ALLOW: u8 = 0;
const XFRM_POLICY_BLOCK: u8 = 1;

/// `struct xfrm_selector`, in bytes.
const SELECTOR: usize = 56;

/// `struct xfrm_userpolicy_info`, in bytes.
const POLICY_INFO: usize = 168;

/// `struct xfrm_userpolicy_id`, in bytes.
const POLICY_ID: usize = 64;

/// Where the fields of these structures are that are not zero.
mod at {
    use std::ops::Range;

    pub(super) const DESTINATION: usize = 0;
    pub(super) const SOURCE: usize = 16;
    pub(super) const FAMILY: Range<usize> = 40..42;
    pub(super) const DESTINATION_PREFIX: usize = 42;
    pub(super) const SOURCE_PREFIX: usize = 43;
    /// The limits in bytes and packets of `struct xfrm_lifetime_cfg`.
    pub(super) const LIMITS: Range<usize> = 56..88;
    pub(super) const PRIORITY: Range<usize> = 152..156;
    pub(super) const DIRECTION: usize = 160;
    pub(super) const ACTION: usize = 161;
    /// In `struct xfrm_userpolicy_id`.
    pub(super) const ID_DIRECTION: usize = 60;
}

/// A message about a policy.
#[derive(Debug, Clone)]
pub struct PolicyMessage {
    kind: u16,
    body: Vec<u8>,
}

impl From<PolicyMessage> for NetlinkPayload<PolicyMessage> {
    fn from(message: PolicyMessage) -> Self {
        Self::InnerMessage(message)
    }
}

impl NetlinkSerializable for PolicyMessage {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.body.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.body);
    }
}

impl NetlinkDeserializable for PolicyMessage {
    type Error = DecodeError;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Self::Error> {
        Ok(Self { kind: header.message_type, body: payload.to_vec() })
    }
}

/// Lists what this program has blocked; `None` if this kernel has no IPsec policies.
///
/// # Errors
/// If the kernel refuses.
pub fn blocked() -> Result<Option<Vec<Block>>, NetlinkError> {
    let mut client = match Client::open(NETLINK_XFRM) {
        Err(NetlinkError::Socket(error)) if error.raw_os_error() == Some(Errno::EPROTONOSUPPORT as i32) => {
            return Ok(None);
        }
        other => other?,
    };
    let request = PolicyMessage { kind: XFRM_MSG_GETPOLICY, body: vec![0; POLICY_ID] };
    Ok(Some(client.dump(&request)?.iter().filter_map(read).collect()))
}

/// What a policy of this program blocks.
fn read(message: &PolicyMessage) -> Option<Block> {
    let info: &[u8; POLICY_INFO] = message.body.get(..POLICY_INFO)?.try_into().ok()?;
    let block = match info[at::DIRECTION] {
        XFRM_POLICY_FWD if info[at::ACTION] == XFRM_POLICY_ALLOW => {
            Block::Reply(network(info, at::DESTINATION, at::DESTINATION_PREFIX)?.ip)
        }
        XFRM_POLICY_FWD => Block::Routed(network(info, at::DESTINATION, at::DESTINATION_PREFIX)?),
        XFRM_POLICY_IN => Block::ToLoopback(network(info, at::SOURCE, at::SOURCE_PREFIX)?),
        _ => return None,
    };
    let wanted = policy(block);
    // The kernel adds the index and what it has counted.
    let is_same = |range: std::ops::Range<usize>| info[range.clone()] == wanted[range];
    (is_same(0..SELECTOR) && is_same(at::PRIORITY) && is_same(at::DIRECTION..at::ACTION + 1)).then_some(block)
}

/// An address of a selector with its prefix.
fn network(info: &[u8; POLICY_INFO], address: usize, prefix: usize) -> Option<Cidr> {
    let octets: [u8; 16] = info[address..][..16].try_into().ok()?;
    let ip = match i32::from(u16::from_ne_bytes(info[at::FAMILY].try_into().ok()?)) {
        nix::libc::AF_INET => Ipv4Addr::from([octets[0], octets[1], octets[2], octets[3]]).into(),
        nix::libc::AF_INET6 => Ipv6Addr::from(octets).into(),
        _ => return None,
    };
    Some(Cidr { ip, prefix: info[prefix] })
}

/// Blocks a way.
///
/// # Errors
/// If the kernel refuses, for example because somebody has a policy for the same addresses.
pub fn block(block: Block) -> Result<(), NetlinkError> {
    let message = PolicyMessage { kind: XFRM_MSG_NEWPOLICY, body: policy(block).to_vec() };
    Client::open(NETLINK_XFRM)?.change(message, NLM_F_CREATE | NLM_F_EXCL)
}

/// Takes such a policy away; does nothing if somebody else has.
///
/// # Errors
/// If the kernel refuses.
pub fn unblock(block: Block) -> Result<(), NetlinkError> {
    let mut body = vec![0; POLICY_ID];
    body[..SELECTOR].copy_from_slice(&policy(block)[..SELECTOR]);
    body[at::ID_DIRECTION] = direction(block);
    match Client::open(NETLINK_XFRM)?.change(PolicyMessage { kind: XFRM_MSG_DELPOLICY, body }, 0) {
        Err(error) if error.is(Errno::ENOENT) => Ok(()),
        other => other,
    }
}

fn direction(block: Block) -> u8 {
    if block.is_forwarded() { XFRM_POLICY_FWD } else { XFRM_POLICY_IN }
}

fn policy(block: Block) -> [u8; POLICY_INFO] {
    let mut info = [0; POLICY_INFO];
    let mut write = |Cidr { ip, prefix }: Cidr, address: usize, length: usize| {
        match ip {
            IpAddr::V4(ip) => info[address..][..4].copy_from_slice(&ip.octets()),
            IpAddr::V6(ip) => info[address..][..16].copy_from_slice(&ip.octets()),
        }
        info[length] = prefix;
    };
    let destination = block.destination();
    write(destination, at::DESTINATION, at::DESTINATION_PREFIX);
    if let Some(source) = block.source() {
        write(source, at::SOURCE, at::SOURCE_PREFIX);
    }
    let family = if destination.ip.is_ipv4() { nix::libc::AF_INET } else { nix::libc::AF_INET6 };
    info[at::FAMILY].copy_from_slice(&u16::try_from(family).unwrap_or_default().to_ne_bytes());
    info[at::LIMITS].fill(0xff);
    info[at::PRIORITY].copy_from_slice(&block.priority().to_ne_bytes());
    info[at::DIRECTION] = direction(block);
    info[at::ACTION] = if block.is_exception() { XFRM_POLICY_ALLOW } else { XFRM_POLICY_BLOCK };
    info
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_of_this_program_is_recognised_and_no_other() {
        let [v4, v6] = [("172.17.0.0", 16), ("fd00:d0c::", 64)]
            .map(|(ip, prefix)| Cidr { ip: ip.parse().unwrap(), prefix });
        let replies = [Block::Reply(v4.ip), Block::Reply(v6.ip)];
        for block in [Block::Routed(v4), Block::Routed(v6), Block::ToLoopback(v4)].into_iter().chain(replies)
        {
            let body = policy(block).to_vec();
            let read_changed = |at: Option<usize>| {
                let mut body = body.clone();
                at.into_iter().for_each(|at| body[at] ^= 1);
                read(&PolicyMessage { kind: XFRM_MSG_NEWPOLICY, body })
            };
            assert_eq!(read_changed(None), Some(block));
            for other in [at::DIRECTION, at::ACTION, at::PRIORITY.start, 36, 44] {
                assert_eq!(read_changed(Some(other)), None, "{other}");
            }
            for short in 0..POLICY_INFO {
                assert_eq!(read(&PolicyMessage { kind: 0, body: body[..short].to_vec() }), None);
            }
        }
    }
}
