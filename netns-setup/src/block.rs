//! What IPsec policies of this program block, out of reach of whoever flushes the rules.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use crate::addr::Cidr;

/// The priority of the policies. Those of lower numbers come first, so those of a VPN do.
pub const PRIORITY: u32 = 4_000_000_000;

/// The addresses of the host that it does not expect from the network.
const LOOPBACK: Cidr = Cidr { ip: IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), prefix: 8 };

/// A blocked way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Block {
    /// What other hosts send to containers by this host.
    Routed(Cidr),
    /// What containers send to the host's loopback addresses, which `route_localnet` opens for them.
    ToLoopback(Cidr),
}

impl Block {
    /// The subnet of the containers.
    #[must_use]
    pub fn subnet(self) -> Cidr {
        match self {
            Self::Routed(subnet) | Self::ToLoopback(subnet) => subnet,
        }
    }

    /// Where blocked packets come from, if that matters.
    #[must_use]
    pub fn source(self) -> Option<Cidr> {
        matches!(self, Self::ToLoopback(_)).then(|| self.subnet())
    }

    /// Where they are sent to.
    #[must_use]
    pub fn destination(self) -> Cidr {
        match self {
            Self::Routed(subnet) => subnet,
            Self::ToLoopback(_) => LOOPBACK,
        }
    }

    /// Whether they are forwarded; if not, this host is the receiver.
    #[must_use]
    pub fn is_forwarded(self) -> bool {
        matches!(self, Self::Routed(_))
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
