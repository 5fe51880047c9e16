//! Descriptors that a parent process left open for us at known numbers.
#![expect(unsafe_code, reason = "a number becomes an owned descriptor here")]

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

use nix::fcntl::{F_GETFD, F_SETFD, FdFlag, fcntl};

/// The numbers handed out so far: an [`OwnedFd`] must be the only owner of its number.
static CLAIMED: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());

/// Takes ownership of a descriptor inherited at number `fd`, and sets close-on-exec on it.
///
/// Call it at the start of `main`, before anything else opens a file: later, the number may belong
/// to something that this process opened itself.
///
/// # Errors
/// `EBADF` if nothing is open at `fd`; `EEXIST` if `fd` is one of 0, 1 and 2, which the standard
/// library owns, or was claimed before.
pub fn claim_inherited(fd: RawFd) -> io::Result<OwnedFd> {
    let mut claimed = CLAIMED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if fd <= 2 || claimed.contains(&fd) {
        return Err(io::Error::from_raw_os_error(nix::libc::EEXIST));
    }
    // SAFETY: the borrow ends with this function, and `fcntl` only reads the number: if nothing is
    // open there it answers EBADF.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let flags = FdFlag::from_bits_retain(fcntl(borrowed, F_GETFD)?);
    fcntl(borrowed, F_SETFD(flags | FdFlag::FD_CLOEXEC))?;
    claimed.push(fd);
    // SAFETY: `fd` is open (just asked), is none of the standard library's, and `CLAIMED` lets each
    // number through once, so this is its only owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::{AsRawFd, IntoRawFd};

    use super::*;

    #[test]
    fn an_inherited_descriptor_is_claimed_once_and_marked_close_on_exec() {
        let fd = File::open("/dev/null").unwrap().into_raw_fd();
        let claimed = claim_inherited(fd).unwrap();
        assert_eq!(claimed.as_raw_fd(), fd);
        let flags = FdFlag::from_bits_retain(fcntl(&claimed, F_GETFD).unwrap());
        assert!(flags.contains(FdFlag::FD_CLOEXEC));
        let again = claim_inherited(fd).unwrap_err();
        assert_eq!(again.raw_os_error(), Some(nix::libc::EEXIST));
    }

    #[test]
    fn a_closed_number_and_the_standard_streams_are_refused() {
        let closed = claim_inherited(987_654).unwrap_err();
        assert_eq!(closed.raw_os_error(), Some(nix::libc::EBADF));
        let stdout = claim_inherited(1).unwrap_err();
        assert_eq!(stdout.raw_os_error(), Some(nix::libc::EEXIST));
    }
}
