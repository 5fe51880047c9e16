//! What IPsec policies of this program block, out of reach of whoever flushes the rules.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use crate::addr::Cidr;

/// The priority of the policies. Those of lower numbers come first, so those of a VPN do.
const PRIORITY: u32 = 4_000_000_000;

/// The addresses of the host that it does not expect from the network.
const LOOPBACK: Cidr = Cidr { ip: IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), prefix: 8 };

/// A blocked way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Block {
    /// What other hosts send to containers by this host.
    Routed(Cidr),
    /// What containers send to the host's loopback addresses, which `route_localnet` opens for them.
    ToLoopback(Cidr),
    /// An exception: what is forwarded to the bridge's own address is a reply to a container, translated from that address.
    /// The container has connected to a port that the kernel leads to a container, and the bridge has not switched the reply
    /// by itself, as it does with br_netfilter.
    Reply(IpAddr),
}

impl Block {
    /// Where blocked packets come from, if that matters.
    #[must_use]
    pub fn source(self) -> Option<Cidr> {
        match self {
            Self::ToLoopback(subnet) => Some(subnet),
            Self::Routed(_) | Self::Reply(_) => None,
        }
    }

    /// Where they are sent to.
    #[must_use]
    pub fn destination(self) -> Cidr {
        match self {
            Self::Routed(subnet) => subnet,
            Self::ToLoopback(_) => LOOPBACK,
            Self::Reply(ip) => Cidr { ip, prefix: if ip.is_ipv4() { 32 } else { 128 } },
        }
    }

    /// Whether they are forwarded; if not, this host is the receiver.
    #[must_use]
    pub fn is_forwarded(self) -> bool {
        matches!(self, Self::Routed(_) | Self::Reply(_))
    }

    /// Whether such packets pass, although they are among those that are blocked otherwise.
    #[must_use]
    pub fn is_exception(self) -> bool {
        matches!(self, Self::Reply(_))
    }

    /// The priority of the policy: an exception comes first.
    #[must_use]
    pub fn priority(self) -> u32 {
        PRIORITY - u32::from(self.is_exception())
    }
}

impl fmt::Display for Block {
    /// As `ip xfrm policy` takes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(source) = self.source() {
            write!(f, "src {source} ")?;
        }
        write!(f, "dst {} dir {}", self.destination(), if self.is_forwarded() { "fwd" } else { "in" })
    }
}
