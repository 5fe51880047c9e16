//! Reserves host ports by binding them before anything else is done.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

use nix::sys::socket::{setsockopt, sockopt};
use rproxy_mapping::addr::Protocol;
use rproxy_mapping::interfaces::Interfaces;
use socket2::{Domain, Protocol as Transport, SockFilter, Socket, Type};

use crate::host_ip::HostIp;
use crate::interfaces::HostInterfaces;

/// Why a host port could not be reserved.
#[derive(Debug, thiserror::Error)]
pub enum ReserveError {
    /// It is in use.
    #[error("host port {port}/{proto} on {host} is in use: stop what holds it, or choose another")]
    InUse {
        /// The protocol.
        proto: Protocol,
        /// Where.
        host: HostIp,
        /// Which.
        port: u16,
    },
    /// The address does not belong to this host.
    #[error("{0} is not an address of this host")]
    NotLocal(HostIp),
    /// Ports of services need a privilege (ip(7)).
    #[error(
        "no permission to bind host port {port}/{proto} on {host}: publish a higher one, or allow it with `sysctl -w net.ipv4.ip_unprivileged_port_start={port}`"
    )]
    Denied {
        /// The protocol.
        proto: Protocol,
        /// Where.
        host: HostIp,
        /// Which.
        port: u16,
    },
    /// Each socket needs a descriptor.
    #[error(
        "no more files can be opened for host port {port}/{proto} on {host}: raise the limit with `ulimit -Hn`, or publish fewer ports with --via proxy or both"
    )]
    Descriptors {
        /// The protocol.
        proto: Protocol,
        /// Where.
        host: HostIp,
        /// Which.
        port: u16,
    },
    /// This kernel has no SCTP.
    #[error("this kernel has no SCTP for host port {0}/sctp: load its module with `modprobe sctp`")]
    NoSctp(u16),
    /// Anything else.
    #[error("cannot bind host port {port}/{proto} on {host}: {source}")]
    Bind {
        /// The protocol.
        proto: Protocol,
        /// Where.
        host: HostIp,
        /// Which.
        port: u16,
        /// Why.
        source: io::Error,
    },
}

/// Binds a port, 0 for any free one, and returns the socket and its port.
///
/// Until [`open`] is called, the socket receives nothing. Traffic that arrives before the rules are installed
/// would take another path than later traffic.
///
/// # Errors
/// If the port is in use, or the address does not belong to this host.
pub fn bind(proto: Protocol, host: HostIp, port: u16) -> Result<(Socket, u16), ReserveError> {
    let bound = match host {
        HostIp::Any => bind_dual_stack(proto, port),
        HostIp::Ip(ip) => bind_one(proto, SocketAddr::new(ip, port), true),
        HostIp::Scoped(ip, interface) => match HostInterfaces.index_of(interface.as_str()) {
            Some(index) => bind_one(proto, SocketAddrV6::new(ip, port, 0, index).into(), true),
            None => Err(io::ErrorKind::AddrNotAvailable.into()),
        },
    };
    bound.map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ReserveError::InUse { proto, host, port },
        io::ErrorKind::AddrNotAvailable => ReserveError::NotLocal(host),
        io::ErrorKind::PermissionDenied => ReserveError::Denied { proto, host, port },
        _ if source.raw_os_error() == Some(nix::libc::EPROTONOSUPPORT) => ReserveError::NoSctp(port),
        _ if source.raw_os_error() == Some(nix::libc::EMFILE) => {
            ReserveError::Descriptors { proto, host, port }
        }
        _ => ReserveError::Bind { proto, host, port, source },
    })
}

/// Binds one socket for both families, `:::80`, or for IPv4 alone on a host without IPv6.
fn bind_dual_stack(proto: Protocol, port: u16) -> io::Result<(Socket, u16)> {
    match bind_one(proto, (Ipv6Addr::UNSPECIFIED, port).into(), false) {
        Err(error) if error.raw_os_error() == Some(nix::libc::EAFNOSUPPORT) => {
            bind_one(proto, (Ipv4Addr::UNSPECIFIED, port).into(), true)
        }
        other => other,
    }
}

fn bind_one(proto: Protocol, address: SocketAddr, v6_only: bool) -> io::Result<(Socket, u16)> {
    let kind = match proto {
        Protocol::Tcp | Protocol::Sctp => Type::STREAM,
        Protocol::Udp => Type::DGRAM,
    };
    let transport = (proto == Protocol::Sctp).then_some(Transport::SCTP);
    let socket = Socket::new(Domain::for_address(address), kind.cloexec(), transport)?;
    if address.is_ipv6() {
        socket.set_only_v6(v6_only)?;
    }
    match proto {
        // Connections of a previous container may still be in TIME_WAIT.
        Protocol::Tcp | Protocol::Sctp => socket.set_reuse_address(true)?,
        // The relay replies from the address that the client sent to.
        Protocol::Udp if address.is_ipv6() => setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?,
        Protocol::Udp => setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?,
    }
    // BPF_RET | BPF_K with 0 bytes to keep (linux/bpf_common.h): drop everything.
    socket.attach_filter(&[SockFilter::new(0x06, 0, 0, 0)])?;
    socket.bind(&address.into())?;
    if proto.has_connections() {
        // Two sockets with SO_REUSEADDR can share a port until one listens. The kernel limits this to
        // somaxconn.
        socket.listen(i32::from(u16::MAX))?;
    }
    let port = socket.local_addr()?.as_socket().map_or(address.port(), |address| address.port());
    Ok((socket, port))
}

/// Lets the socket receive. One that was bound by somebody else may do so already.
///
/// # Errors
/// If the kernel refuses.
pub fn open(socket: &Socket) -> io::Result<()> {
    match socket.detach_filter() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn addr(text: &str) -> HostIp {
        text.parse().unwrap()
    }

    #[test]
    fn a_port_can_be_had_once() {
        for proto in [Protocol::Tcp, Protocol::Udp] {
            let (_first, port) = bind(proto, addr("127.0.0.1"), 0).unwrap();
            assert_ne!(port, 0);
            let error = bind(proto, addr("127.0.0.1"), port).unwrap_err();
            assert!(matches!(error, ReserveError::InUse { .. }), "{error}");
            assert!(error.to_string().contains(&port.to_string()));
        }
    }

    #[test]
    fn every_address_means_both_families() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        assert!(matches!(bind(Protocol::Tcp, HostIp::Any, port), Err(ReserveError::InUse { .. })));
    }

    #[test]
    fn an_address_of_another_host_is_refused() {
        // RFC 5737: never an address of this host.
        let error = bind(Protocol::Tcp, addr("192.0.2.1"), 0).unwrap_err();
        assert_eq!(error.to_string(), "192.0.2.1 is not an address of this host");
    }
}
