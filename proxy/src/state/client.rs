//! Who a client is.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rproxy_mapping::addr::canonical;
use serde::{Serialize, Serializer};

/// A client: an address, or over a Unix socket, the process that has connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ClientAddr {
    /// An IP address and a port.
    Inet(SocketAddr),
    /// A process, by the time when it connected.
    Unix(Credentials),
}

/// What the kernel knows of the process at the other end of a Unix socket (`SO_PEERCRED`, unix(7)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Credentials {
    /// Its number; 0 for one of another process namespace.
    pub(crate) pid: i32,
    /// Its user.
    pub(crate) uid: u32,
    /// Its group.
    pub(crate) gid: u32,
}

impl Credentials {
    /// Those of the peer of a connected Unix socket.
    ///
    /// # Errors
    /// Those of getsockopt(2).
    pub(crate) fn of_peer(socket: &impl AsFd) -> io::Result<Self> {
        let peer = getsockopt(socket, PeerCredentials)?;
        Ok(Self { pid: peer.pid(), uid: peer.uid(), gid: peer.gid() })
    }
}

impl ClientAddr {
    /// The IP address, if it has one.
    pub(crate) fn ip(self) -> Option<IpAddr> {
        self.inet_addr().map(|addr| addr.ip())
    }

    /// The IP address and port, if it has one.
    pub(crate) fn inet_addr(self) -> Option<SocketAddr> {
        match self {
            Self::Inet(addr) => Some(addr),
            Self::Unix(_) => None,
        }
    }

    /// The process, if it has no address.
    pub(crate) fn credentials(self) -> Option<Credentials> {
        match self {
            Self::Inet(_) => None,
            Self::Unix(credentials) => Some(credentials),
        }
    }

    /// The same, with an IPv4-mapped IPv6 address as the IPv4 address.
    pub(crate) fn canonical(self) -> Self {
        match self {
            Self::Inet(addr) => Self::Inet(canonical(addr)),
            Self::Unix(_) => self,
        }
    }
}

impl From<SocketAddr> for ClientAddr {
    fn from(addr: SocketAddr) -> Self {
        Self::Inet(addr)
    }
}

/// One word, as in a line of text.
impl fmt::Display for ClientAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inet(addr) => addr.fmt(f),
            Self::Unix(Credentials { pid, uid, gid }) => write!(f, "unix:pid={pid},uid={uid},gid={gid}"),
        }
    }
}

/// As in a line of text.
impl Serialize for ClientAddr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Inet(addr) => addr.serialize(serializer),
            Self::Unix(_) => serializer.collect_str(self),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use rustix::process::{getgid, getpid, getuid};

    use super::*;

    #[test]
    fn a_process_is_known_by_what_the_kernel_says() {
        let (socket, _peer) = UnixStream::pair().unwrap();
        let client = ClientAddr::Unix(Credentials::of_peer(&socket).unwrap());
        let (pid, uid, gid) = (getpid().as_raw_nonzero(), getuid().as_raw(), getgid().as_raw());
        assert_eq!(client.to_string(), format!("unix:pid={pid},uid={uid},gid={gid}"));
        assert_eq!((client.ip(), client.inet_addr(), client.canonical()), (None, None, client));
    }
}
