//! What tells flows apart.

use std::net::{IpAddr, SocketAddr};

use rproxy_sys::udp::LocalAddr;

/// What tells flows apart. docker-proxy looks at the client alone; but answers have to come from the
/// address that was asked, and a client may ask several.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct FlowKey {
    /// Which listener received it.
    pub(super) listener: u32,
    /// Who sent it, in the family of the listener's socket.
    pub(super) client: SocketAddr,
    /// Which of our addresses it was sent to, if the socket reports it.
    pub(super) local: Option<LocalAddr>,
}

impl FlowKey {
    pub(super) fn new(listener: usize, client: SocketAddr, local: Option<LocalAddr>) -> Self {
        let listener = u32::try_from(listener).expect("descriptors run out before listeners do");
        Self { listener, client, local: local.map(forget_interface) }
    }
}

/// Answers take the route that the table gives, which need not be the way that the question came.
/// Only a link-local address means nothing without its interface.
fn forget_interface(local: LocalAddr) -> LocalAddr {
    match local.ip {
        IpAddr::V6(ip) if ip.is_unicast_link_local() => local,
        _ => LocalAddr { interface: 0, ..local },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interface_matters_only_to_link_local_addresses() {
        let client = "[fe80::2]:1".parse().unwrap();
        let key = |ip: &str, interface| {
            FlowKey::new(0, client, Some(LocalAddr { ip: ip.parse().unwrap(), interface }))
        };
        assert_eq!(key("10.0.0.1", 1), key("10.0.0.1", 2));
        assert_eq!(key("2001:db8::1", 1), key("2001:db8::1", 2));
        assert_ne!(key("fe80::1", 1), key("fe80::1", 2));
    }
}
