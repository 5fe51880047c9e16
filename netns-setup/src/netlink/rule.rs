//! Policy routing rules.

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;

use super::{Client, NetlinkError};
use crate::addr::Cidr;
use crate::family::Family;
use crate::name::IfName;
use crate::observed::{PolicyRule, RuleTarget};
use crate::transparent::{MARK, PRIORITY, TABLE};

/// Lists the rules of a family in the kernel's order.
///
/// # Errors
/// If the kernel refuses, or lacks policy routing for that family.
pub fn list(client: &mut Client, family: Family) -> Result<Vec<PolicyRule>, NetlinkError> {
    let mut request = RuleMessage::default();
    request.header.family = address_family(family);
    let messages = match client.dump(&RouteNetlinkMessage::GetRule(request)) {
        // Without CONFIG_IP_MULTIPLE_TABLES or its counterpart, nothing answers.
        Err(error) if error.is(Errno::EAFNOSUPPORT) || error.is(Errno::EOPNOTSUPP) => {
            return Err(NetlinkError::NoPolicyRouting(family));
        }
        other => other?,
    };
    let rules = messages.into_iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewRule(message) if message.header.family == address_family(family) => {
            Some(read(&message))
        }
        _ => None,
    });
    Ok(rules.collect())
}

pub(super) fn read(message: &RuleMessage) -> PolicyRule {
    let mut rule = PolicyRule {
        priority: 0,
        iif: None,
        fwmark: None,
        source: None,
        target: RuleTarget::Table(message.header.table.into()),
        is_partial: message.header.tos != 0,
        is_negated: message.header.flags.contains(RuleFlags::Invert),
        for_output: false,
    };
    let (mut mark, mut mask, mut goto) = (None, None, 0);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Iifname(name) => rule.iif = Some(name.clone()),
            RuleAttribute::Oifname(_) => rule.for_output = true,
            RuleAttribute::FwMark(value) => mark = Some(*value),
            RuleAttribute::FwMask(value) => mask = Some(*value),
            RuleAttribute::Goto(priority) => goto = *priority,
            RuleAttribute::Table(table) => rule.target = RuleTarget::Table(*table),
            RuleAttribute::Source(ip) => {
                rule.source = Some(Cidr { ip: *ip, prefix: message.header.src_len });
            }
            RuleAttribute::Destination(_)
            | RuleAttribute::L3MDev(true)
            | RuleAttribute::UidRange(_)
            | RuleAttribute::IpProtocol(_)
            | RuleAttribute::SourcePortRange(_)
            | RuleAttribute::DestinationPortRange(_)
            | RuleAttribute::TunId(_) => rule.is_partial = true,
            _ => {}
        }
    }
    // The kernel reports a mask of zero, which means that it does not look at the mark.
    rule.fwmark = mark.or(mask.map(|_| 0)).zip(mask.or(Some(u32::MAX))).filter(|(_, mask)| *mask != 0);
    rule.target = match message.header.action {
        RuleAction::ToTable => rule.target,
        RuleAction::Nop => RuleTarget::Nothing,
        RuleAction::Goto => RuleTarget::Goto(goto),
        RuleAction::Blackhole => RuleTarget::Refusal("blackhole"),
        RuleAction::Unreachable => RuleTarget::Refusal("unreachable"),
        RuleAction::Prohibit => RuleTarget::Refusal("prohibit"),
        _ => RuleTarget::Refusal("unknown"),
    };
    rule
}

/// Adds the rule for marked packets from an interface, which need not exist.
///
/// # Errors
/// If the kernel refuses.
pub fn add(client: &mut Client, family: Family, iif: &IfName) -> Result<(), NetlinkError> {
    client.change(RouteNetlinkMessage::NewRule(message(family, iif)), NLM_F_CREATE | NLM_F_EXCL)
}

/// Removes it; does nothing if somebody else has.
///
/// # Errors
/// If the kernel refuses.
pub fn delete(client: &mut Client, family: Family, iif: &IfName) -> Result<(), NetlinkError> {
    match client.change(RouteNetlinkMessage::DelRule(message(family, iif)), 0) {
        Err(error) if error.is(Errno::ENOENT) => Ok(()),
        other => other,
    }
}

fn message(family: Family, iif: &IfName) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = address_family(family);
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Iifname(iif.to_string()),
        RuleAttribute::Priority(PRIORITY),
        RuleAttribute::FwMark(MARK),
        RuleAttribute::FwMask(MARK),
        // The header has eight bits for the table.
        RuleAttribute::Table(TABLE),
    ];
    message
}

pub(super) fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}
