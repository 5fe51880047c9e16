//! Why a port is not attached, and whether another process might serve it.

use std::os::fd::OwnedFd;

use rproxy_mapping::PortMapping;
use rproxy_mapping::addr::{AddrError, BackendAddr, HostSocketAddr, Protocol, ScopedIp};
use rproxy_mapping::name::Name;
use rproxy_shim::message::{self, Answer, Attach, MessageError};

use crate::bind::BoundPort;
use crate::bind::listen::{AdoptError, Listener};
use crate::engine::attach::AttachError;

/// Why a port is not attached.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    /// The packet is not a request.
    #[error("the request of the shim cannot be read: {0}")]
    Message(#[from] MessageError),
    /// Not exactly one descriptor came with the request.
    #[error("{0} descriptors came with the request of the shim; one socket is needed")]
    Descriptors(usize),
    /// The descriptor could not be received.
    #[error("the socket could not be received: too many files are open")]
    NotReceived,
    /// The shim has attached a port already.
    #[error("the shim has attached {0} already; each port needs a connection of its own")]
    Second(Name),
    /// The protocol is not served.
    #[error("the protocol with the number {0} is not served; TCP and UDP are")]
    Protocol(u8),
    /// The address of the container cannot be connected to.
    #[error("the address of the container: {0}")]
    Backend(#[from] AddrError),
    /// The socket is not a listener for the protocol.
    #[error("the socket cannot be used: {0}")]
    Socket(#[from] AdoptError),
    /// The engine refuses it.
    #[error(transparent)]
    Attach(#[from] AttachError),
}

impl Refusal {
    /// The only one of `descriptors`.
    pub(super) fn socket_of(mut descriptors: Vec<OwnedFd>, is_incomplete: bool) -> Result<OwnedFd, Self> {
        match (descriptors.pop(), descriptors.len()) {
            _ if is_incomplete => Err(Self::NotReceived),
            (Some(socket), 0) => Ok(socket),
            (None, _) => Err(Self::Descriptors(0)),
            (Some(_last), others) => Err(Self::Descriptors(others + 1)),
        }
    }

    /// The answer with `text`: final if nobody could serve the port.
    pub(super) fn answer<'a>(&self, text: &'a str) -> Answer<'a> {
        let is_final = match self {
            Self::Message(MessageError::Version(_)) | Self::NotReceived | Self::Protocol(_) => false,
            Self::Attach(AttachError::Watch(_) | AttachError::Mapping(_) | AttachError::Port(_)) => false,
            Self::Attach(AttachError::Taken { .. } | AttachError::Requested(_) | AttachError::Loop(_)) => {
                true
            }
            Self::Message(_)
            | Self::Descriptors(_)
            | Self::Second(_)
            | Self::Backend(_)
            | Self::Socket(_) => true,
        };
        if is_final { Answer::Refused(text) } else { Answer::Unavailable(text) }
    }
}

/// The port that a shim has bound.
pub(super) fn bound_port(
    Attach { protocol, backend }: Attach,
    socket: OwnedFd,
) -> Result<BoundPort, Refusal> {
    let protocol = match protocol {
        message::TCP => Protocol::Tcp,
        message::UDP => Protocol::Udp,
        other => return Err(Refusal::Protocol(other)),
    };
    let backend = BackendAddr::new(backend, backend.port())?.of_one()?;
    let listener = Listener::adopt(socket, protocol)?;
    // Both are replaced by those of the socket.
    let host = HostSocketAddr::new(ScopedIp::ANY, 0);
    Ok(BoundPort::adopt(PortMapping { protocol, host, backend, v6only: false }, listener))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    fn attach(protocol: u8, backend: &str) -> Attach {
        Attach { protocol, backend: backend.parse().unwrap() }
    }

    fn tcp() -> OwnedFd {
        TcpListener::bind("127.0.0.1:0").unwrap().into()
    }

    #[test]
    fn a_port_listens_where_its_socket_does() {
        let socket = UdpSocket::bind("[::1]:0").unwrap();
        let address = socket.local_addr().unwrap();
        let port = bound_port(attach(message::UDP, "172.17.0.2:53"), socket.into()).unwrap();
        assert_eq!(port.port_mapping.host, address.into());
        assert_eq!(port.port_mapping.backend.socket_addr().to_string(), "172.17.0.2:53");
    }

    #[test]
    fn exactly_one_descriptor_is_needed() {
        for (count, is_incomplete, wanted) in
            [(0, false, "0 desc"), (2, false, "2 desc"), (1, true, "too many")]
        {
            let descriptors = (0..count).map(|_| tcp()).collect();
            let refusal = Refusal::socket_of(descriptors, is_incomplete).unwrap_err();
            assert!(refusal.to_string().contains(wanted), "{refusal}");
        }
        Refusal::socket_of(vec![tcp()], false).unwrap();
    }

    #[test]
    fn only_what_another_process_might_do_is_not_final() {
        let is_final = |refusal: &Refusal| matches!(refusal.answer("why"), Answer::Refused("why"));
        for (refused, wanted) in [
            (bound_port(attach(132, "192.0.2.1:80"), tcp()), false),
            (bound_port(attach(message::UDP, "192.0.2.1:80"), tcp()), true),
            (bound_port(attach(message::TCP, "224.0.0.1:80"), tcp()), true),
            (bound_port(attach(message::TCP, "192.0.2.1:0"), tcp()), true),
        ] {
            let refusal = refused.unwrap_err();
            assert_eq!(is_final(&refusal), wanted, "{refusal}");
        }
        assert!(!is_final(&Refusal::NotReceived) && !is_final(&MessageError::Version(2).into()));
        assert!(is_final(&MessageError::NotAMessage.into()) && is_final(&Refusal::Descriptors(2)));
    }
}
