//! The abstract Unix socket where shims connect.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, UnixCredentials, bind, connect, getsockname,
    getsockopt, listen, socket, sockopt,
};
use rproxy_mapping::escape::escaped;
use rproxy_shim::message::LONGEST_NAME;

/// A name that can be listened at.
///
/// # Errors
/// Why `text` is not one.
pub fn parse_name(text: &str) -> Result<String, NameError> {
    match text.len() {
        0 => Err(NameError::Empty),
        length if length > LONGEST_NAME => Err(NameError::TooLong(length)),
        _ if text.contains('\0') => Err(NameError::Nul),
        _ if text.starts_with('@') => Err(NameError::At),
        _ => Ok(text.to_owned()),
    }
}

/// Why a text is not the name of an abstract socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// It is empty.
    #[error("the name is empty; leave it out for the default")]
    Empty,
    /// It does not fit an address.
    #[error("the name has {0} bytes, and {LONGEST_NAME} fit an address")]
    TooLong(usize),
    /// It starts with what ss(8) shows for the NUL byte of an abstract name.
    #[error("the name starts with @; leave that out, it only stands for an abstract name")]
    At,
    /// It has a NUL byte.
    #[error("the name has a NUL byte")]
    Nul,
}

/// Listens at an abstract name (unix(7)), which is visible in this network namespace alone. It is free again when
/// the last process closes the socket.
///
/// # Errors
/// [`SocketError`]
pub fn bind_abstract(name: &str) -> Result<OwnedFd, SocketError> {
    let bind_it = || -> Result<OwnedFd, Errno> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        bind(listener.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)?;
        listen(&listener, Backlog::MAXCONN)?;
        Ok(listener)
    };
    bind_it().map_err(|errno| match errno {
        Errno::EADDRINUSE => SocketError::InUse { name: name.to_owned(), holder: holder(name) },
        errno => SocketError::Bind { name: name.to_owned(), source: errno.into() },
    })
}

/// Who listens at an abstract name (`SO_PEERCRED`, unix(7)).
fn holder(name: &str) -> String {
    let find = || -> Result<UnixCredentials, Errno> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        connect(socket.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?)?;
        getsockopt(&socket, sockopt::PeerCredentials)
    };
    match find() {
        Ok(holder) => format!("process {} of user {}", holder.pid(), holder.uid()),
        Err(_unknown) => "another process".to_owned(),
    }
}

/// Checks a socket that another process has bound.
///
/// # Errors
/// [`SocketError::NotPassed`]
pub fn adopt(socket: OwnedFd, name: &str) -> Result<OwnedFd, SocketError> {
    let is_it = || -> Result<bool, Errno> {
        let addr: UnixAddr = getsockname(socket.as_raw_fd())?;
        let is_packets = getsockopt(&socket.as_fd(), sockopt::SockType)? == SockType::SeqPacket;
        let listens = getsockopt(&socket.as_fd(), sockopt::AcceptConn)?;
        Ok(addr.as_abstract() == Some(name.as_bytes()) && is_packets && listens)
    };
    match is_it() {
        Ok(true) => Ok(socket),
        _ => Err(SocketError::NotPassed(name.to_owned())),
    }
}

/// Why shims cannot connect.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another process listens there.
    #[error(
        "--attach={}: {holder} listens there already; only one can serve the ports of a network namespace under one \
         name",
        escaped(name)
    )]
    InUse {
        /// The name.
        name: String,
        /// Who listens.
        holder: String,
    },
    /// The name cannot be listened at.
    #[error("--attach={}: {source}", escaped(name))]
    Bind {
        /// The name.
        name: String,
        /// The error of the kernel.
        source: io::Error,
    },
    /// The socket that was passed is another one.
    #[error("--attach={}: the socket that was passed does not listen there", escaped(.0))]
    NotPassed(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name() -> String {
        format!("rproxy-test-{}-{:?}", std::process::id(), std::thread::current().id())
    }

    #[test]
    fn a_name_is_bound_once_and_free_once_it_is_closed() {
        let listener = bind_abstract(&name()).unwrap();
        let error = bind_abstract(&name()).unwrap_err().to_string();
        assert!(error.contains(&format!("process {} of user", std::process::id())), "{error}");
        let listener = adopt(listener, &name()).unwrap();
        assert!(matches!(adopt(listener, "another"), Err(SocketError::NotPassed(_))));
        drop(bind_abstract(&name()).unwrap());
    }

    #[test]
    fn names_fit_an_address() {
        assert_eq!(parse_name("rproxy"), Ok("rproxy".to_owned()));
        assert!(parse_name(&"x".repeat(LONGEST_NAME)).is_ok());
        for (wrong, error) in [
            ("", NameError::Empty),
            ("a\0b", NameError::Nul),
            ("@rproxy", NameError::At),
            (&"x".repeat(LONGEST_NAME + 1), NameError::TooLong(LONGEST_NAME + 1)),
        ] {
            assert_eq!(parse_name(wrong), Err(error));
        }
    }
}
