//! Sockets on link-local addresses: each is bound to an interface by its index, and one that comes back has another index.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use rproxy_mapping::interfaces::Interfaces;
use socket2::SockRef;

use super::held::{Held, HeldPort};
use crate::host_ip::HostIp;
use crate::interfaces::HostInterfaces;
use crate::model::MappingKey;
use crate::reserve;

/// Whether a port is on such an address.
pub(super) fn has_any(held: &Held) -> bool {
    held.ports().any(|port| matches!(port.key.host, HostIp::Scoped(..)))
}

/// Binds again what can be on an interface that has come back. Returns the ports whose interface is gone, or whose address
/// is, and why.
pub(super) fn bind_again(held: &mut Held) -> Vec<(MappingKey, String)> {
    let lost: Vec<_> = held.held().filter(|held| is_lost(held)).map(|held| held.port.key).collect();
    let again = lost.into_iter().filter_map(|key| match bind(key) {
        Ok(socket) => {
            held.replace_socket(&key, socket);
            None
        }
        Err(why) => Some((key, why)),
    });
    again.collect()
}

/// Whether the interface that the socket is bound to is not the one of that name.
fn is_lost(held: &HeldPort) -> bool {
    let HostIp::Scoped(_, interface) = held.port.key.host else { return false };
    let bound = SockRef::from(&*held.socket).local_addr().ok().and_then(|address| address.as_socket());
    let index = match bound {
        Some(SocketAddr::V6(address)) => Some(address.scope_id()),
        _ => None,
    };
    HostInterfaces.index_of(interface.as_str()) != index
}

fn bind(key: MappingKey) -> Result<OwnedFd, String> {
    if let HostIp::Scoped(ip, interface) = key.host
        && HostInterfaces.index_of(interface.as_str()).is_none()
    {
        return Err(format!("the interface {interface} of {ip} is gone"));
    }
    let (socket, _port) = reserve::bind(key.proto, key.host, key.port).map_err(|error| error.to_string())?;
    reserve::open(&socket).map_err(|error| error.to_string())?;
    Ok(socket.into())
}
