//! The system calls of `rproxy` that no safe library wraps as needed.
//!
//! Only this crate, `rproxy-sys-raw` and the start of `rproxy-shim` contain `unsafe`. Its functions take borrowed
//! descriptors and plain values, return [`std::io::Result`], and contain neither policy nor logging.

mod cmsg;
pub mod conntrack;
pub mod fd;
pub mod link;
pub mod memory;
pub mod netlink;
pub mod pass;
pub mod process;
pub mod route;
pub mod sctp;
pub mod seccomp;
pub mod socket;
pub mod udp;
pub mod watch;

use std::io;

/// Converts the result of a system call: -1 becomes the error in `errno`.
fn check(result: i32) -> io::Result<i32> {
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}
