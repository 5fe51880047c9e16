//! Notifications of the kernel over netlink (netlink(7)): that something has changed, not what.

use std::io;
use std::os::fd::AsRawFd;

use netlink_sys::Socket;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};

/// A socket that is readable once something of one of these groups has changed.
///
/// # Errors
/// Those of bind(2) and setsockopt(2).
pub(crate) fn subscribe(protocol: isize, groups: &[u32]) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    groups.iter().try_for_each(|group| socket.add_membership(*group))?;
    Ok(socket)
}

/// Discards what a socket has received. Returns whether that is anything, or more than it had room for.
pub(crate) fn drain(socket: &Socket) -> bool {
    let mut any = false;
    // What does not fit is cut off, which does not matter here.
    while matches!(
        recv(socket.as_raw_fd(), &mut [0; 64], MsgFlags::MSG_DONTWAIT),
        Ok(_) | Err(Errno::ENOBUFS | Errno::EINTR)
    ) {
        any = true;
    }
    any
}
