//! Opens the sockets of flows: where they come from.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rproxy_mapping::addr::{Protocol, canonical, wildcard_of};
use rproxy_mapping::source::Source;
use rproxy_sys::udp::{is_local, source_towards};
use socket2::{Domain, SockRef, Socket, Type};
use tracing::{debug, warn};

use super::local_ports::LocalPorts;
use crate::bind::source::{NotAsClient, SourceError, answers_come_back, bind_as_client, bind_to_device};
use crate::log::limit::LogLimit;
use crate::runtime::descriptors::has_run_out;
use crate::state::Target;
use crate::state::stats::FailureKind;

/// Number of local ports to try for a flow.
const PORT_TRIES: usize = 32;

/// The addresses of clients that flows use, each with that of the backend. The kernel lets two sockets have both the same,
/// and one would get the replies to the other.
#[derive(Debug, Default)]
pub(super) struct AddrsInUse(Mutex<HashSet<(SocketAddr, SocketAddr)>>);

/// An address in use by one flow, until this is dropped.
#[derive(Debug)]
pub(super) struct TakenAddrs {
    all: Arc<AddrsInUse>,
    addrs: (SocketAddr, SocketAddr),
}

impl AddrsInUse {
    /// Takes the address of `client` towards the backend of `target`, unless a flow has it.
    pub(super) fn take(self: &Arc<Self>, target: &Target, client: SocketAddr) -> Option<TakenAddrs> {
        let mut backend = target.port_mapping.backend.socket_addr();
        if target.policy.limits.udp_any_port {
            // The socket is not connected, and gets what no other one does.
            backend = SocketAddr::new(wildcard_of(backend.ip()), 0);
        }
        let addrs = (client, backend);
        self.addrs().insert(addrs).then(|| TakenAddrs { all: self.clone(), addrs })
    }

    fn addrs(&self) -> MutexGuard<'_, HashSet<(SocketAddr, SocketAddr)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for TakenAddrs {
    fn drop(&mut self) {
        self.all.addrs().remove(&self.addrs);
    }
}

/// Opens a socket on one of `ports`, and connects it to the backend of `target` unless replies from any port of the
/// backend are accepted. Returns it and its port.
///
/// # Errors
/// The errors of socket(2), bind(2) and connect(2); the last without a route.
pub(super) fn open_as_asked(
    target: &Target,
    ports: &mut LocalPorts,
    now: Instant,
) -> io::Result<(Socket, u16)> {
    let (limits, addr) = (&target.policy.limits, target.port_mapping.backend.socket_addr());
    let socket = open(target)?;
    let ip = match limits.source {
        Source::Address(ip) => ip,
        _ if limits.udp_any_port => source_towards(addr)?,
        // Unbound, so that connect(2) chooses the local address.
        _ => wildcard_of(addr.ip()),
    };
    let port = bind(&socket, ip, ports, now).map_err(|source| match limits.source {
        Source::Address(ip) => SourceError::Address { ip, source }.into(),
        _ => source,
    })?;
    connect(&socket, target)?;
    ports.taken(port);
    Ok((socket, port))
}

/// Opens a socket with the address of `client`, if `target` asks for that. Returns `None` if it has to come from the host
/// instead, which is counted and logged. If the client's port is in use, its address with another port is the next
/// best: servers know clients by the address.
///
/// # Errors
/// [`SourceError::Client`] if it must not come from the host, and the errors of socket(2).
pub(super) fn open_as_client(
    target: &Target,
    client: SocketAddr,
    in_use: &Arc<AddrsInUse>,
) -> io::Result<Option<(Socket, Option<TakenAddrs>)>> {
    let limits = &target.policy.limits;
    let source = limits.source;
    if !source.is_client() {
        return Ok(None);
    }
    let (client, backend) = (canonical(client), target.port_mapping.backend.socket_addr());
    let opened = match answers_come_back(client, backend, limits.device.as_ref()) {
        Ok(()) => open_from(target, client, in_use),
        Err(reason) => Err(reason),
    };
    match opened {
        Ok(opened) => Ok(Some(opened)),
        // The caller makes room for it.
        Err(NotAsClient::Kernel(error)) if has_run_out(&error) => Err(error),
        Err(reason) if source == Source::ClientOnly => {
            target.policy.state.stats.count_of(Protocol::Udp, FailureKind::SourceUnavailable);
            Err(SourceError::Client { client, reason }.into())
        }
        Err(reason) => {
            report_other_source(target, client, &reason);
            Ok(None)
        }
    }
}

/// Opens a socket with the address and port of `client`; or, if these are in use towards the backend, with another port.
fn open_from(
    target: &Target,
    client: SocketAddr,
    in_use: &Arc<AddrsInUse>,
) -> Result<(Socket, Option<TakenAddrs>), NotAsClient> {
    if let Some(taken) = in_use.take(target, client) {
        match begin(target, client) {
            Ok(socket) => return Ok((socket, Some(taken))),
            Err(error) if error.is_about_port() => {
                debug!(%client, mapping = %target.name(), %error, "another port of the client's address");
            }
            Err(error) => return Err(error),
        }
    }
    begin(target, SocketAddr::new(client.ip(), 0)).map(|socket| (socket, None))
}

fn begin(target: &Target, client: SocketAddr) -> Result<Socket, NotAsClient> {
    let socket = open(target).map_err(NotAsClient::Kernel)?;
    // A port that the kernel chooses is nobody else's.
    socket.set_reuse_address(client.port() != 0).map_err(NotAsClient::Kernel)?;
    bind_as_client(&socket, client)?;
    connect(&socket, target).map_err(NotAsClient::Kernel)?;
    Ok(socket)
}

/// Whether the socket of a flow does not come any more from where `target` says: its interface was removed, and there may be
/// another one of that name; its address was removed from this host; or this has another one towards the backend. The address
/// of a client (`as_client`) is always right.
pub(super) fn is_stale(socket: BorrowedFd<'_>, target: &Target, as_client: bool) -> bool {
    let (limits, socket) = (&target.policy.limits, SockRef::from(&socket));
    if let Some(device) = &limits.device {
        // Fails if the interface is gone (`netdev_get_name`, net/core/dev.c).
        let bound = socket.device().ok().flatten();
        if bound.as_deref() != Some(device.name().as_bytes()) {
            return true;
        }
    }
    let Some(local) = socket.local_addr().ok().and_then(|addr| addr.as_socket()) else { return false };
    match limits.source {
        _ if as_client => false,
        Source::Address(_) => !is_local(local),
        _ => source_of_new(target).is_ok_and(|source| source != local.ip()),
    }
}

/// The address that a new flow of the host would have.
fn source_of_new(target: &Target) -> io::Result<IpAddr> {
    let probe = open(target)?;
    probe.connect(&target.port_mapping.backend.socket_addr().into())?;
    let local = probe.local_addr()?.as_socket();
    local.map(|local| local.ip()).ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
}

fn open(target: &Target) -> io::Result<Socket> {
    let addr = target.port_mapping.backend.socket_addr();
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM.nonblocking(), None)?;
    bind_to_device(&socket, &target.policy.limits)?;
    Ok(socket)
}

fn connect(socket: &Socket, target: &Target) -> io::Result<()> {
    let addr = target.port_mapping.backend.socket_addr();
    if target.policy.limits.udp_any_port { Ok(()) } else { socket.connect(&addr.into()) }
}

/// Counts and logs that the backend sees an address of this host instead of the client's.
fn report_other_source(target: &Target, client: SocketAddr, reason: &NotAsClient) {
    static OTHERS: LogLimit = LogLimit::new();

    target.policy.state.stats.count_of(Protocol::Udp, FailureKind::SourceUnavailable);
    if let Some(suppressed) = OTHERS.permit() {
        warn!(%client, mapping = %target.name(), %reason, suppressed, "flow not from its client's address");
    }
}

/// Binds `socket` to one of `ports` of `ip`.
fn bind(socket: &Socket, ip: IpAddr, ports: &mut LocalPorts, now: Instant) -> io::Result<u16> {
    let mut tried = 0;
    while tried < PORT_TRIES
        && let Some(port) = ports.candidate(now)
    {
        tried += 1;
        match socket.bind(&SocketAddr::new(ip, port).into()) {
            Ok(()) => return Ok(port),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => ports.others_have(),
            // The port is below `ip_unprivileged_port_start`.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => ports.forbidden(port),
            Err(error) => return Err(error),
        }
    }
    if tried == PORT_TRIES {
        ports.exhausted(now);
    }
    Err(io::Error::new(
        io::ErrorKind::AddrNotAvailable,
        "local ports are in use or were a moment ago (net.ipv4.ip_local_port_range; `ss -anp` shows by whom)",
    ))
}
