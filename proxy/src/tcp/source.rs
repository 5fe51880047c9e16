//! Connects to a backend as the client, or from an address of this host.

use std::io;
use std::net::SocketAddr;

use rproxy_mapping::source::Source;
use socket2::Socket;
use tracing::debug;

use super::dial::{self, Begun};
use crate::bind::source::{
    NotAsClient, SourceError, answers_come_back, bind_as_asked, bind_as_client, bind_to_device,
};
use crate::state::Target;
use crate::state::client::ClientAddr;

/// Prepares `socket`, as [`dial::open_for`] returns it, for a connection to `target` on behalf of `client`. Begins the connection if that comes from the client's address: only connect(2) tells whether it can. Calls `fell_back` if
/// it comes from another address instead.
///
/// If the client's port is in use towards the backend, as after an earlier connection, or needs a privilege, its address
/// with another port is the next best: servers know clients by the address.
///
/// # Errors
/// [`SourceError`]: without it there must be no connection.
pub(super) fn prepare(
    socket: Socket,
    target: &Target,
    client: ClientAddr,
    fell_back: impl FnOnce(&NotAsClient),
) -> Result<Begun, SourceError> {
    let limits = &target.policy.limits;
    if !limits.source.is_client() {
        bind_as_asked(&socket, limits)?;
        return Ok(Begun::Not(socket));
    }
    bind_to_device(&socket, limits)?;
    let Some(client) = client.inet_addr() else {
        if limits.source == Source::ClientOnly {
            return Err(SourceError::NoClient);
        }
        fell_back(&NotAsClient::NoAddress);
        return Ok(Begun::Not(socket));
    };
    let addr = target.port_mapping.backend.socket_addr();
    let refused = |reason| SourceError::Client { client, reason };
    let (socket, reason) = match answers_come_back(client, addr, limits.device.as_ref()) {
        Ok(()) => {
            let begun = begin(socket, client, addr).or_else(|error| match error.is_about_port() {
                true => {
                    debug!(mapping = %target.name(), %client, %error, "another port of the client's address");
                    begin_with_other_port(target, client)
                }
                false => Err(error),
            });
            match begun {
                Ok(socket) => return Ok(Begun::Yes(socket)),
                Err(reason) => (None, reason),
            }
        }
        // Nothing was done with it.
        Err(reason) => (Some(socket), reason),
    };
    if limits.source == Source::ClientOnly {
        return Err(refused(reason));
    }
    fell_back(&reason);
    if let Some(socket) = socket {
        return Ok(Begun::Not(socket));
    }
    let socket = another(target).map_err(|source| refused(NotAsClient::Kernel(source)))?;
    Ok(Begun::Not(socket))
}

/// Begins to connect from the address and port of `client`.
fn begin(socket: Socket, client: SocketAddr, backend: SocketAddr) -> Result<Socket, NotAsClient> {
    bind_as_client(&socket, client)?;
    dial::start(&socket, backend).map_err(NotAsClient::Kernel)?;
    Ok(socket)
}

/// As [`begin`], with another port of the client's address.
fn begin_with_other_port(target: &Target, client: SocketAddr) -> Result<Socket, NotAsClient> {
    let socket = another(target).map_err(NotAsClient::Kernel)?;
    begin(socket, SocketAddr::new(client.ip(), 0), target.port_mapping.backend.socket_addr())
}

/// A socket in place of one that cannot be used any more, with what has been set for that one.
fn another(target: &Target) -> io::Result<Socket> {
    let socket = dial::open_for(target)?;
    bind_to_device(&socket, &target.policy.limits)?;
    Ok(socket)
}
