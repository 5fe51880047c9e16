//! The listening socket of the HTTP server, bound before confinement or passed by an old process.

use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;

use rproxy_mapping::addr::Protocol;
use socket2::SockRef;

use super::addr::MetricsAddr;
use super::descriptors::OpenDescriptors;
use crate::bind::listen::{self, AdoptError, BindError, Listener};
use crate::bind::unix_socket::{HeldSocket, SocketError, UnixSocket};

/// What errors begin with.
const OPTION: &str = "--metrics";

/// The same for a Unix socket, up to its path.
const UNIX_OPTION: &str = "--metrics unix:";

/// A bound socket. Dropping it removes its file, if it has one.
#[derive(Debug)]
pub struct MetricsListener {
    addr: MetricsAddr,
    socket: Socket,
    /// Opened before confinement, as the socket is.
    descriptors: Option<OpenDescriptors>,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixSocket),
}

/// A socket that the server accepts from.
#[derive(Debug)]
pub(crate) enum Acceptor {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// What the manager keeps of the socket: another descriptor of it, to be passed to a new process, and its file, which
/// is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct MetricsSocket {
    /// The address as requested.
    pub(crate) addr: MetricsAddr,
    held: Held,
}

#[derive(Debug)]
enum Held {
    Tcp(OwnedFd),
    Unix(HeldSocket),
}

impl MetricsListener {
    /// Binds `addr`.
    ///
    /// # Errors
    /// [`ListenError`], whose message suggests what would work.
    pub fn bind(addr: MetricsAddr) -> Result<Self, ListenError> {
        let socket = match &addr {
            MetricsAddr::Tcp(at) => {
                let failed = |source| {
                    ListenError::Tcp(BindError {
                        protocol: Protocol::Tcp,
                        addr: (*at).into(),
                        interface: None,
                        among: None,
                        more: 1,
                        source,
                    })
                };
                let listener = listen::bind_tcp(*at, false).map_err(failed)?;
                // A response is delivered in full, unlike a connection of a client that is cut.
                SockRef::from(&listener).set_linger(None).map_err(failed)?;
                Socket::Tcp(listener)
            }
            MetricsAddr::Unix(path) => {
                Socket::Unix(UnixSocket::bind(UNIX_OPTION, path).map_err(ListenError::Unix)?)
            }
        };
        Ok(Self { addr, socket, descriptors: OpenDescriptors::watch() })
    }

    /// Adopts a socket that another process bound to `addr`. A file belongs to that process until
    /// [`MetricsListener::own`].
    ///
    /// # Errors
    /// [`ListenError`]
    pub fn adopt(socket: OwnedFd, addr: MetricsAddr) -> Result<Self, ListenError> {
        let socket = match &addr {
            MetricsAddr::Tcp(at) => {
                let listener = match Listener::adopt(socket, Protocol::Tcp)? {
                    Listener::Tcp(listener) => listener,
                    Listener::Udp(_) | Listener::Sctp(_) | Listener::Unix(_) => {
                        return Err(AdoptError::WrongKind(Protocol::Tcp).into());
                    }
                };
                let bound = listener.local_addr().map_err(AdoptError::Setup)?;
                if bound.ip() != at.ip() || at.port() != 0 && bound.port() != at.port() {
                    return Err(ListenError::Elsewhere(addr));
                }
                SockRef::from(&listener).set_linger(None).map_err(AdoptError::Setup)?;
                Socket::Tcp(listener)
            }
            MetricsAddr::Unix(path) => {
                Socket::Unix(UnixSocket::adopt(UNIX_OPTION, socket, path).map_err(ListenError::Unix)?)
            }
        };
        Ok(Self { addr, socket, descriptors: OpenDescriptors::watch() })
    }

    /// Makes this process the owner of the socket's file.
    pub fn own(&mut self) {
        if let Socket::Unix(socket) = &mut self.socket {
            socket.own();
        }
    }

    /// The path of the socket's file, if it has one.
    pub fn path(&self) -> Option<&Path> {
        match &self.addr {
            MetricsAddr::Tcp(_) => None,
            MetricsAddr::Unix(path) => Some(path),
        }
    }

    /// The address with the port that the kernel has chosen.
    pub(crate) fn bound(&self) -> MetricsAddr {
        match &self.socket {
            Socket::Tcp(listener) => {
                listener.local_addr().map_or_else(|_unknown| self.addr.clone(), MetricsAddr::Tcp)
            }
            Socket::Unix(_) => self.addr.clone(),
        }
    }

    /// Takes the directory of descriptors, if there is one.
    pub(super) fn take_descriptors(&mut self) -> Option<OpenDescriptors> {
        self.descriptors.take()
    }

    /// Splits into what the server and the manager need.
    ///
    /// # Errors
    /// Those of dup(2).
    pub(crate) fn into_parts(self) -> io::Result<(Acceptor, MetricsSocket)> {
        let (acceptor, held) = match self.socket {
            Socket::Tcp(listener) => {
                let another = listener.as_fd().try_clone_to_owned()?;
                (Acceptor::Tcp(listener), Held::Tcp(another))
            }
            Socket::Unix(socket) => {
                let (listener, held) = socket.into_held()?;
                (Acceptor::Unix(listener), Held::Unix(held))
            }
        };
        Ok((acceptor, MetricsSocket { addr: self.addr, held }))
    }
}

impl MetricsSocket {
    /// Leaves the file to another process.
    pub(crate) fn leave(&mut self) {
        if let Held::Unix(held) = &mut self.held {
            held.leave();
        }
    }
}

impl AsFd for MetricsSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.held {
            Held::Tcp(socket) => socket.as_fd(),
            Held::Unix(held) => held.as_fd(),
        }
    }
}

/// Why metrics cannot be served at an address.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The port cannot be bound.
    #[error("{OPTION} {}: {}", .0.addr, .0.reason())]
    Tcp(BindError),
    /// The Unix socket cannot be bound.
    #[error(transparent)]
    Unix(SocketError),
    /// The passed descriptor is no listening socket.
    #[error("{OPTION}: the socket that was passed cannot be used: {0}")]
    NotPassed(#[from] AdoptError),
    /// The passed socket is bound to another address.
    #[error("{OPTION} {0}: the socket that was passed listens elsewhere")]
    Elsewhere(MetricsAddr),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loopback() -> MetricsAddr {
        "127.0.0.1:0".parse().unwrap()
    }

    #[test]
    fn a_socket_is_passed_to_another_process_that_was_asked_for_the_same() {
        let listener = MetricsListener::bind(loopback()).unwrap();
        let bound = listener.bound();
        let (_acceptor, kept) = listener.into_parts().unwrap();
        let passed = || kept.as_fd().try_clone_to_owned().unwrap();
        for asked in [kept.addr.clone(), bound.clone()] {
            assert_eq!(MetricsListener::adopt(passed(), asked).unwrap().bound(), bound);
        }
        for other in ["127.0.0.2:0", "127.0.0.1:1", "[::1]:0"] {
            let error = MetricsListener::adopt(passed(), other.parse().unwrap()).unwrap_err();
            assert!(matches!(error, ListenError::Elsewhere(_)), "{error}");
        }
        let unix = MetricsListener::adopt(passed(), "unix:/run/x".parse().unwrap());
        assert!(matches!(unix, Err(ListenError::Unix(_))));
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(matches!(MetricsListener::adopt(udp.into(), loopback()), Err(ListenError::NotPassed(_))));
    }

    #[test]
    fn a_taken_port_is_named() {
        let listener = MetricsListener::bind(loopback()).unwrap();
        let message = MetricsListener::bind(listener.bound()).unwrap_err().to_string();
        assert!(
            message.starts_with(&format!("--metrics {}: the tcp port is taken", listener.bound())),
            "{message}"
        );
    }
}
