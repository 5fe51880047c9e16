//! Where sockets for backends come from: an address of the host, or that of a client (`IP_TRANSPARENT`, ip(7)).

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::libc;
use rproxy_mapping::addr::canonical;
use rproxy_mapping::limits::Limits;
use rproxy_mapping::source::{Device, Source};
use rproxy_sys::socket::choose_port_on_connect;
use rustix::net::connect_unspec;
use socket2::{Domain, Socket, Type};

use super::routes::{are_on_one_link, scope_of};

/// Binds a new socket for a backend to the interface and the address of the host that `limits` ask for. The port is left
/// to connect(2).
///
/// # Errors
/// [`SourceError`]
pub(crate) fn bind_as_asked(socket: &Socket, limits: &Limits) -> Result<(), SourceError> {
    bind_to_device(socket, limits)?;
    let Source::Address(ip) = limits.source else { return Ok(()) };
    let bound =
        choose_port_on_connect(socket.as_fd()).and_then(|()| socket.bind(&SocketAddr::new(ip, 0).into()));
    bound.map_err(|source| SourceError::Address { ip, source })
}

/// Binds a new socket to the interface that `limits` ask for.
///
/// # Errors
/// [`SourceError::Device`]
pub(crate) fn bind_to_device(socket: &Socket, limits: &Limits) -> Result<(), SourceError> {
    let Some(device) = &limits.device else { return Ok(()) };
    let bound = socket.bind_device(Some(device.name().as_bytes()));
    bound.map_err(|source| SourceError::Device { device: device.clone(), source })
}

/// Finds out whether connections to `backend` can come from the address and the interface that `limits` ask for. Sends
/// nothing.
///
/// # Errors
/// [`SourceError`], and that of connect(2) as one of the address.
pub(crate) fn can_reach(limits: &Limits, backend: SocketAddr) -> Result<(), SourceError> {
    if limits.device.is_none() && !matches!(limits.source, Source::Address(_)) {
        return Ok(());
    }
    // Without a socket, nothing is found out; clients get the same error.
    let Ok(probe) = Socket::new(Domain::for_address(backend), Type::DGRAM, None) else { return Ok(()) };
    bind_as_asked(&probe, limits)?;
    let Source::Address(ip) = limits.source else { return Ok(()) };
    probe.connect(&backend.into()).map_err(|source| match source.kind() {
        io::ErrorKind::InvalidInput => SourceError::Unroutable { ip, backend: backend.ip() },
        _ => SourceError::Address { ip, source },
    })
}

/// Why a socket does not come from where it should.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SourceError {
    #[error("cannot send from {ip}: {}", explain(source))]
    Address { ip: IpAddr, source: io::Error },
    /// The kernel lets no packet with this address leave the host (`__mkroute_output`, net/ipv4/route.c).
    #[error("cannot send from {ip}: it is of this host alone, and {backend} is elsewhere")]
    Unroutable { ip: IpAddr, backend: IpAddr },
    #[error("cannot send by the interface {device}: {}", explain(source))]
    Device { device: Device, source: io::Error },
    #[error("the client {client} cannot be its own source: {reason}")]
    Client { client: SocketAddr, reason: NotAsClient },
    /// Over a Unix socket, a proxy in front has told of no client.
    #[error("there is no client's address to be its source: {}", NotAsClient::NoAddress)]
    NoClient,
}

impl From<SourceError> for io::Error {
    fn from(error: SourceError) -> Self {
        let kind = match &error {
            SourceError::Address { source, .. } | SourceError::Device { source, .. } => source.kind(),
            SourceError::Client { .. } | SourceError::NoClient | SourceError::Unroutable { .. } => {
                io::ErrorKind::Other
            }
        };
        Self::new(kind, error)
    }
}

fn explain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrNotAvailable => "it is not an address of this host".to_owned(),
        io::ErrorKind::PermissionDenied => "this takes CAP_NET_ADMIN or CAP_NET_RAW".to_owned(),
        _ => error.to_string(),
    }
}

fn explain_for_client(error: &io::Error) -> String {
    match error.kind() {
        // The last is of a datagram socket (inet_dgram_connect, net/ipv4/af_inet.c).
        io::ErrorKind::AddrNotAvailable | io::ErrorKind::AddrInUse | io::ErrorKind::WouldBlock => {
            "all ports of its address are in use towards the backend".to_owned()
        }
        _ => explain(error),
    }
}

/// Why a socket for a backend cannot come from the address of a client.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NotAsClient {
    #[error("it is of another family than the backend")]
    Family,
    /// A proxy in front has told that.
    #[error("it is not the address of a host")]
    Nobody,
    #[error("it comes by a Unix socket, and its proxy has told of no address")]
    NoAddress,
    /// The backend would answer to itself, or by way of the loopback interface.
    #[error("it is on this host")]
    Local,
    /// The backend would answer to it without the host in between.
    #[error("it is on the link of the backend")]
    SameLink,
    /// It means another host, or none, on any other link.
    #[error("its link-local address is of another link than the backend")]
    OtherLink,
    /// The backend's answers would leave by the link of the client.
    #[error("the backend is on this host")]
    LocalBackend,
    #[error("{}", explain_for_client(.0))]
    Kernel(io::Error),
}

impl NotAsClient {
    /// Whether another port of the client's address may do: that of the client is in use, or below 1024 without
    /// `CAP_NET_BIND_SERVICE` (`EACCES`, bind(2); of an address, it would be `EPERM`).
    pub(crate) fn is_about_port(&self) -> bool {
        let Self::Kernel(error) = self else { return false };
        matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
            || error.raw_os_error() == Some(libc::EACCES)
    }
}

/// Whether a backend's answers to `client` come by this host, so that the client's address can be the source. `device` is the
/// interface that leads to the backend, if one was asked for.
///
/// A client on the backend's link would get the answers directly.
///
/// # Errors
/// [`NotAsClient`]
pub(crate) fn answers_come_back(
    client: SocketAddr,
    backend: SocketAddr,
    device: Option<&Device>,
) -> Result<(), NotAsClient> {
    if client.is_ipv4() != backend.is_ipv4() {
        return Err(NotAsClient::Family);
    }
    if client.ip().is_unspecified() || client.ip().is_multicast() || client.ip() == Ipv4Addr::BROADCAST {
        return Err(NotAsClient::Nobody);
    }
    if client.ip().is_loopback() {
        return Err(NotAsClient::Local);
    }
    if let Some(link) = scope_of(client) {
        let other = scope_of(backend).is_some_and(|of_backend| link != of_backend);
        return Err(if other { NotAsClient::OtherLink } else { NotAsClient::SameLink });
    }
    let own = towards(client).map_err(|error| match error.kind() {
        // The broadcast address of a network (connect(2)).
        io::ErrorKind::PermissionDenied => NotAsClient::Nobody,
        _ => NotAsClient::Kernel(error),
    })?;
    if own == client.ip() {
        return Err(NotAsClient::Local);
    }
    let towards = lately_towards(backend).map_err(NotAsClient::Kernel)?;
    if towards == backend.ip() {
        return Err(NotAsClient::LocalBackend);
    }
    // Without routes, the link is known by the address that the host has there.
    match are_on_one_link(client.ip(), backend, device).unwrap_or(towards == own) {
        true => Err(NotAsClient::SameLink),
        false => Ok(()),
    }
}

/// The source address of a datagram to `addr`. The sockets for that are opened once by each thread: a client that has been
/// accepted must not lack a descriptor.
fn towards(addr: SocketAddr) -> io::Result<IpAddr> {
    thread_local! {
        static PROBES: RefCell<[Option<Socket>; 2]> = const { RefCell::new([None, None]) };
    }
    PROBES.with_borrow_mut(|probes| {
        let place = &mut probes[usize::from(addr.is_ipv6())];
        let probe = match place.take() {
            Some(probe) => probe,
            None => Socket::new(Domain::for_address(addr), Type::DGRAM, None)?,
        };
        probe.connect(&addr.into())?;
        let local = probe.local_addr()?.as_socket();
        // Otherwise, the next connect would keep the source address of this one. If it fails, there is another socket.
        if connect_unspec(&probe).is_ok() {
            *place = Some(probe);
        }
        local.map(|local| local.ip()).ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
    })
}

/// How long the source address towards a backend is assumed to be the same.
const KNOWN_FOR: Duration = Duration::from_secs(1);

/// The source address towards a backend, of which there are few: three calls less for each connection.
fn lately_towards(backend: SocketAddr) -> io::Result<IpAddr> {
    thread_local! {
        static KNOWN: RefCell<HashMap<IpAddr, (Instant, IpAddr)>> = RefCell::default();
    }
    let now = Instant::now();
    KNOWN.with_borrow_mut(|known| {
        if let Some((until, source)) = known.get(&backend.ip())
            && now < *until
        {
            return Ok(*source);
        }
        // Those of backends that are gone.
        known.retain(|_backend, (until, _source)| now < *until);
        let source = towards(backend)?;
        known.insert(backend.ip(), (now + KNOWN_FOR, source));
        Ok(source)
    })
}

/// Binds a new socket with `SO_REUSEADDR` to the address of `client`, and to its port unless that is 0. Clients use a port
/// for several servers, and this host has a socket for each.
///
/// # Errors
/// [`NotAsClient::Kernel`]
pub(crate) fn bind_as_client(socket: &Socket, client: SocketAddr) -> Result<(), NotAsClient> {
    let client = canonical(client);
    let bind = || {
        match client {
            SocketAddr::V4(_) => socket.set_ip_transparent_v4(true),
            SocketAddr::V6(_) => socket.set_ip_transparent_v6(true),
        }?;
        if client.port() == 0 {
            choose_port_on_connect(socket.as_fd())?;
        }
        socket.bind(&client.into())
    };
    bind().map_err(NotAsClient::Kernel)
}

#[cfg(test)]
mod tests {
    use rproxy_sys::udp::source_towards;
    use socket2::{Domain, Type};

    use super::*;

    fn socket() -> Socket {
        Socket::new(Domain::IPV4, Type::STREAM, None).unwrap()
    }

    #[test]
    fn clients_whose_answers_would_take_another_way_are_told_from_others() {
        let comes_back = |client: &str, backend: &str| {
            answers_come_back(client.parse().unwrap(), backend.parse().unwrap(), None)
        };
        assert!(matches!(comes_back("192.0.2.1:7", "[::1]:80"), Err(NotAsClient::Family)));
        for nobody in ["0.0.0.0:7", "224.0.0.1:7", "255.255.255.255:7"] {
            assert!(matches!(comes_back(nobody, "192.0.2.1:80"), Err(NotAsClient::Nobody)), "{nobody}");
        }
        assert!(matches!(comes_back("127.0.0.1:7", "127.0.0.2:80"), Err(NotAsClient::Local)));
        assert!(matches!(comes_back("[::1]:7", "[::1]:80"), Err(NotAsClient::Local)));
        assert!(matches!(comes_back("[fe80::1%1]:7", "[::1]:80"), Err(NotAsClient::SameLink)));
        assert!(matches!(comes_back("[fe80::1%1]:7", "[fe80::2%1]:80"), Err(NotAsClient::SameLink)));
        assert!(matches!(comes_back("[fe80::1%1]:7", "[fe80::2%2]:80"), Err(NotAsClient::OtherLink)));
    }

    #[test]
    fn the_source_address_is_that_of_each_destination_in_turn() {
        // A broadcast needs a permission that the socket does not have, and the next one is none the worse for it.
        towards("255.255.255.255:9".parse().unwrap()).unwrap_err();
        for addr in ["127.0.0.1:9", "127.0.0.2:9", "[::1]:9", "127.0.0.1:80"] {
            let addr = addr.parse().unwrap();
            assert_eq!(towards(addr).unwrap(), source_towards(addr).unwrap());
        }
    }

    #[test]
    fn a_socket_comes_from_the_address_that_is_asked_for() {
        let ip = Ipv4Addr::new(127, 0, 0, 9).into();
        let limits = Limits { source: Source::Address(ip), ..Limits::default() };
        let socket = socket();
        bind_as_asked(&socket, &limits).unwrap();
        let local = socket.local_addr().unwrap().as_socket().unwrap();
        assert_eq!(local, SocketAddr::new(ip, 0), "the port is chosen later");
    }

    #[test]
    fn what_cannot_be_bound_is_named() {
        let nobodys = Limits { source: Source::Address([192, 0, 2, 1].into()), ..Limits::default() };
        let error = bind_as_asked(&socket(), &nobodys).unwrap_err();
        assert_eq!(error.to_string(), "cannot send from 192.0.2.1: it is not an address of this host");
        let backend = ([192, 0, 2, 1], 80).into();
        let local = Limits { source: Source::Address([127, 0, 0, 1].into()), ..Limits::default() };
        let error = can_reach(&local, backend).unwrap_err().to_string();
        assert_eq!(error, "cannot send from 127.0.0.1: it is of this host alone, and 192.0.2.1 is elsewhere");
        can_reach(&local, ([127, 0, 0, 2], 80).into()).unwrap();
        can_reach(&nobodys, backend).unwrap_err();
        let nowhere = Limits { device: Some("nonesuch0".parse().unwrap()), ..Limits::default() };
        let error = can_reach(&nowhere, backend).unwrap_err().to_string();
        assert!(error.starts_with("cannot send by the interface nonesuch0: "), "{error}");
        let error = bind_as_asked(&socket(), &nowhere).unwrap_err().to_string();
        assert!(error.starts_with("cannot send by the interface nonesuch0: "), "{error}");
    }
}
