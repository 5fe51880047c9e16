//! The return path to transparent sockets.
//!
//! A relay whose socket is bound to the client's address (`IP_TRANSPARENT` of ip(7)) makes its backend answer
//! that address. The reply therefore reaches the host as a packet to forward. Instead, a rule in prerouting
//! marks what belongs to such a socket, a policy routing rule sends marked packets to a routing table, and its
//! only route delivers them to this host (Documentation/networking/tproxy.rst of Linux).

use rproxy_mapping::source::TRANSPARENT_MARK;

use crate::family::Family;
use crate::model::{Topology, Transparent};
use crate::name::IfName;

/// The mark, one bit that is also its mask, so that the bits of others survive.
pub const MARK: u32 = TRANSPARENT_MARK;

/// The routing table, with the number of the mark. Usual ones are below 1000, or 51820.
pub const TABLE: u32 = MARK;

/// The priority of the policy routing rules: after the table `local` (0), and before the rules of VPNs and
/// container networks, such as Tailscale's (5210) or those of the AWS VPC CNI (512 to 1536).
pub const PRIORITY: u32 = 50;

/// The policy routing rules of `topology`.
pub fn rules(topology: &Topology) -> impl Iterator<Item = (Family, IfName)> + use<'_> {
    topology.transparent.iter().flat_map(Transparent::rules)
}

/// The families for which `topology` has a route.
pub fn families(topology: &Topology) -> impl Iterator<Item = Family> + use<'_> {
    topology.transparent.iter().flat_map(Transparent::families)
}
