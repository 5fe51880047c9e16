//! Whether what backends answer to the addresses of clients is delivered to this host.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rproxy_mapping::source::TRANSPARENT_MARK;
use rproxy_sys::route::{interface_towards, is_delivered};

use super::interfaces::HostInterfaces;

/// Clients that nobody has: addresses for documentation (RFC 5737, RFC 3849).
const CLIENT_V4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
const CLIENT_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);

/// The index of the loopback interface in each network namespace.
const LOOPBACK: u32 = 1;

/// The command that is missing for `backend`, if one is. It takes netlink sockets, so it has to be called before the process
/// is confined.
///
/// # Errors
/// Those of socket(2), and `ENETUNREACH` without a route to the backend.
pub(crate) fn missing_command(backend: SocketAddr) -> io::Result<Option<String>> {
    let interface = interface_towards(backend.ip())?;
    // A backend on this host does not see clients; that is reported for each.
    let Some(interface) = interface.filter(|index| *index != LOOPBACK) else { return Ok(None) };
    let client: IpAddr = if backend.is_ipv4() { CLIENT_V4.into() } else { CLIENT_V6.into() };
    if is_delivered(backend.ip(), client, interface, TRANSPARENT_MARK)? {
        return Ok(None);
    }
    let name = HostInterfaces.name_of(interface).unwrap_or_else(|| interface.to_string());
    Ok(Some(format!("netns-setup transparent up --interface {name}")))
}
