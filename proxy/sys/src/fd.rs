//! Descriptors that a parent process left open at known numbers.
#![expect(unsafe_code, reason = "numbers become owned descriptors here, or are closed")]

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

use nix::fcntl::{F_GETFD, F_SETFD, FdFlag, fcntl};
use nix::libc;

/// The claimed numbers: an [`OwnedFd`] must be the only owner of its number.
static CLAIMED: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());

/// Takes ownership of the inherited descriptor `fd`, and sets close-on-exec on it.
///
/// Call it at the start of `main`, before anything else opens a file. Later, the number may belong to a file
/// that this process opened itself.
///
/// # Errors
/// `EBADF` if nothing is open at `fd`; `EEXIST` if `fd` is 0, 1 or 2, which the standard library owns, or was
/// already claimed.
pub fn claim_inherited(fd: RawFd) -> io::Result<OwnedFd> {
    let mut claimed = CLAIMED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if fd <= 2 || claimed.contains(&fd) {
        return Err(io::Error::from_raw_os_error(libc::EEXIST));
    }
    // SAFETY: the borrow ends with this function, and `fcntl` only reads the number. If nothing is open
    // there, it fails with EBADF.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let flags = FdFlag::from_bits_retain(fcntl(borrowed, F_GETFD)?);
    fcntl(borrowed, F_SETFD(flags | FdFlag::FD_CLOEXEC))?;
    claimed.push(fd);
    // SAFETY: `fd` is open (just checked), does not belong to the standard library, and `CLAIMED` admits each
    // number once, so this is its only owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Closes all descriptors from 3 up that were not claimed. Whoever started this process left them open by
/// accident, and could otherwise find a lock held, a pipe without an end, or a port in use.
///
/// Call it at the start of `main`, before anything else opens a file.
///
/// # Errors
/// Those of close_range(2), and of reading `/proc/self/fd` on kernels without it.
pub fn close_unclaimed() -> io::Result<()> {
    let claimed = CLAIMED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    close_others(&claimed)
}

/// Closes all descriptors from 3 up except `kept`.
pub(crate) fn close_others(kept: &[RawFd]) -> io::Result<()> {
    let mut kept: Vec<u32> = kept.iter().filter_map(|fd| u32::try_from(*fd).ok()).collect();
    kept.extend([2, u32::MAX]);
    kept.sort_unstable();
    for two in kept.windows(2) {
        let (first, last) = (two[0] + 1, two[1] - u32::from(two[1] != u32::MAX));
        if first <= last {
            close_range(first, last)?;
        }
    }
    Ok(())
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: the callers guarantee that nothing in this process owns or will use these descriptors.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    // Before Linux 5.9, or with a container runtime's filter that does not know the call.
    if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) {
        close_listed(first, last)
    } else {
        Err(error)
    }
}

/// Like [`close_range`], one by one.
fn close_listed(first: u32, last: u32) -> io::Result<()> {
    let number = |entry: io::Result<std::fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse::<u32>().ok();
    let open: Vec<u32> = std::fs::read_dir("/proc/self/fd")?.filter_map(number).collect();
    for fd in open.into_iter().filter(|fd| (first..=last).contains(fd)) {
        // SAFETY: as above. The descriptor of the directory is already closed, which only causes `EBADF`.
        unsafe { libc::close(fd.cast_signed()) };
    }
    Ok(())
}

/// Opens those of the descriptors 0, 1 and 2 that are closed, so that no other file gets their numbers.
///
/// The standard library does this with `/dev/null`, and aborts if that is missing, as in a bare chroot(2). In
/// that case a directory is used: it cannot be read or written, but the standard library ignores such errors
/// for these descriptors. This runs before the standard library's start-up code, which calls `main`.
extern "C" fn open_standard_streams() {
    for fd in 0..3 {
        // SAFETY: the call only reads the number.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } == -1 {
            // The lowest free number is `fd`.
            // SAFETY: the path is NUL-terminated.
            let opened = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) };
            if opened == -1 {
                // SAFETY: as above.
                unsafe { libc::open(c"/".as_ptr(), libc::O_RDONLY) };
            }
        }
    }
}

/// Called by the loader before `main` (`DT_INIT_ARRAY` of the System V ABI).
#[used]
// SAFETY: the section holds addresses of functions with this signature or a longer one, whose arguments are
// ignored.
#[unsafe(link_section = ".init_array")]
static BEFORE_MAIN: extern "C" fn() = open_standard_streams;

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
        assert_eq!(again.raw_os_error(), Some(libc::EEXIST));
    }

    #[test]
    fn a_closed_number_and_the_standard_streams_are_refused() {
        let closed = claim_inherited(987_654).unwrap_err();
        assert_eq!(closed.raw_os_error(), Some(libc::EBADF));
        let stdout = claim_inherited(1).unwrap_err();
        assert_eq!(stdout.raw_os_error(), Some(libc::EEXIST));
    }
}
