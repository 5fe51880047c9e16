//! The address families that this machine supports.

use std::net::UdpSocket;
use std::sync::OnceLock;

use nix::libc::EAFNOSUPPORT;
use rproxy_mapping::addr::ScopedIp;
use socket2::{Domain, Socket, Type};

/// A warning where [`everywhere`] excludes IPv6.
pub(crate) const NO_IPV6: &str =
    "this machine has no IPv6: what would listen on every address listens on those of IPv4";

/// Whether IPv6 sockets are available. A kernel built without IPv6, or booted with `ipv6.disable=1`, has none.
pub fn has_ipv6() -> bool {
    static HAS_IPV6: OnceLock<bool> = OnceLock::new();

    *HAS_IPV6.get_or_init(|| match Socket::new(Domain::IPV6, Type::DGRAM, None) {
        Ok(_socket) => true,
        // A lack of descriptors does not mean that IPv6 is missing.
        Err(error) => error.raw_os_error() != Some(EAFNOSUPPORT),
    })
}

/// Whether the IPv6 loopback address exists (`net.ipv6.conf.lo.disable_ipv6`).
pub fn has_ipv6_loopback() -> bool {
    UdpSocket::bind("[::1]:0").is_ok()
}

/// The wildcard on which a mapping without a host address listens.
pub fn everywhere() -> ScopedIp {
    if has_ipv6() { ScopedIp::ANY } else { ScopedIp::ANY_V4 }
}
