//! Connects to a backend as the client, or from an address of this host.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;

use rproxy_mapping::addr::BackendAddr;
use rproxy_mapping::limits::Limits;
use rproxy_mapping::source::Source;
use rproxy_sys::socket::set_traffic_class;
use socket2::Socket;
use tracing::debug;

use super::dial::{self, Begun};
use crate::bind::source::{
    NotAsClient, SourceError, answers_come_back, bind_as_asked, bind_as_client, bind_to_device,
};

/// Prepares `socket`, as [`dial::open`] returns it, for a connection to `backend` on behalf of `client`, as `limits` have
/// it. Begins the connection if that comes from the client's address: only connect(2) tells whether it can. Calls `fell_back` if
/// it comes from another address instead.
///
/// If the client's port is in use towards the backend, as after an earlier connection, or needs a privilege, its address
/// with another port is the next best: servers know clients by the address.
///
/// # Errors
/// [`SourceError`]: without it there must be no connection.
pub(super) fn prepare(
    socket: Socket,
    backend: BackendAddr,
    client: SocketAddr,
    limits: &Limits,
    fell_back: impl FnOnce(&NotAsClient),
) -> Result<Begun, SourceError> {
    if !limits.source.is_client() {
        bind_as_asked(&socket, limits)?;
        return Ok(Begun::Not(socket));
    }
    let addr = backend.socket_addr();
    let refused = |reason| SourceError::Client { client, reason };
    bind_to_device(&socket, limits)?;
    let (socket, reason) = match answers_come_back(client, addr, limits.device.as_ref()) {
        Ok(()) => {
            let begun = begin(socket, client, addr).or_else(|error| match error.is_about_port() {
                true => {
                    debug!(%client, %error, "another port of the client's address");
                    begin_with_other_port(backend, client, limits)
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
    let socket = another(backend, limits).map_err(|source| refused(NotAsClient::Kernel(source)))?;
    Ok(Begun::Not(socket))
}

/// Begins to connect from the address and port of `client`.
fn begin(socket: Socket, client: SocketAddr, backend: SocketAddr) -> Result<Socket, NotAsClient> {
    bind_as_client(&socket, client)?;
    dial::start(&socket, backend).map_err(NotAsClient::Kernel)?;
    Ok(socket)
}

/// As [`begin`], with another port of the client's address.
fn begin_with_other_port(
    backend: BackendAddr,
    client: SocketAddr,
    limits: &Limits,
) -> Result<Socket, NotAsClient> {
    let socket = another(backend, limits).map_err(NotAsClient::Kernel)?;
    begin(socket, SocketAddr::new(client.ip(), 0), backend.socket_addr())
}

/// A socket in place of one that cannot be used any more, with what has been set for that one.
fn another(backend: BackendAddr, limits: &Limits) -> io::Result<Socket> {
    let socket = dial::open(backend)?;
    if let Some(dscp) = limits.dscp
        && let Err(error) =
            set_traffic_class(socket.as_fd(), backend.socket_addr().is_ipv6(), dscp.bits() << 2)
    {
        debug!(backend = %backend.socket_addr(), %error, "cannot set the code point of a connection");
    }
    bind_to_device(&socket, limits)?;
    Ok(socket)
}
