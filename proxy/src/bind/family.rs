//! Which families of addresses this machine has.

use std::net::UdpSocket;
use std::sync::OnceLock;

use nix::libc::EAFNOSUPPORT;
use rproxy_mapping::addr::ScopedIp;
use socket2::{Domain, Socket, Type};

/// What is said where [`everywhere`] is less than it would be.
pub(crate) const NO_IPV6: &str =
    "this machine has no IPv6: what would listen on every address listens on those of IPv4";

/// Whether there are IPv6 sockets. A kernel that was started with `ipv6.disable=1`, or built without, has none.
pub fn has_ipv6() -> bool {
    static HAS_IPV6: OnceLock<bool> = OnceLock::new();

    *HAS_IPV6.get_or_init(|| match Socket::new(Domain::IPV6, Type::DGRAM, None) {
        Ok(_socket) => true,
        // A lack of descriptors says nothing.
        Err(error) => error.raw_os_error() != Some(EAFNOSUPPORT),
    })
}

/// Whether there is an IPv6 loopback address (`net.ipv6.conf.lo.disable_ipv6`).
pub fn has_ipv6_loopback() -> bool {
    UdpSocket::bind("[::1]:0").is_ok()
}

/// Every address of the machine: what a mapping listens on that does not say where.
pub fn everywhere() -> ScopedIp {
    if has_ipv6() { ScopedIp::ANY } else { ScopedIp::ANY_V4 }
}
