//! Descriptors that a parent process left open for us at known numbers.
#![expect(unsafe_code, reason = "numbers become owned descriptors here, or are closed")]

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

use nix::fcntl::{F_GETFD, F_SETFD, FdFlag, fcntl};
use nix::libc;

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
        return Err(io::Error::from_raw_os_error(libc::EEXIST));
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

/// Closes all descriptors from 3 up that were not claimed: whoever started this process left them open without meaning
/// to, and would find a lock held, a pipe that does not end, or a port that is taken.
///
/// Call it at the start of `main`, before anything else opens a file.
///
/// # Errors
/// Those of close_range(2), and of reading `/proc/self/fd` on kernels without it.
pub fn close_unclaimed() -> io::Result<()> {
    let claimed = CLAIMED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    close_others(&claimed)
}

/// Closes all descriptors from 3 up but `kept`.
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
    // SAFETY: the callers say that nothing in this process owns these descriptors, or will use them.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if result == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    // Before Linux 5.9, or as a filter of a container runtime has it that does not know it.
    if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) {
        close_listed(first, last)
    } else {
        Err(error)
    }
}

/// As [`close_range`], one by one.
fn close_listed(first: u32, last: u32) -> io::Result<()> {
    let number = |entry: io::Result<std::fs::DirEntry>| entry.ok()?.file_name().to_str()?.parse::<u32>().ok();
    let open: Vec<u32> = std::fs::read_dir("/proc/self/fd")?.filter_map(number).collect();
    for fd in open.into_iter().filter(|fd| (first..=last).contains(fd)) {
        // SAFETY: as above. That of the directory is closed by now, which is no more than `EBADF`.
        unsafe { libc::close(fd.cast_signed()) };
    }
    Ok(())
}

/// Opens what is closed of the descriptors 0, 1 and 2, so that no other file gets their numbers.
///
/// The standard library does so with `/dev/null`, and aborts where there is none, as in a bare chroot(2). There, a directory
/// does as well: it can be neither read nor written like a file, and such errors are ignored for these three. This runs
/// before the standard library, which calls `main`.
extern "C" fn open_standard_streams() {
    for fd in 0..3 {
        // SAFETY: it only reads the number.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } == -1 {
            // The lowest number that is free is `fd`.
            // SAFETY: the path is a string with its NUL.
            let opened = unsafe { libc::open(c"/dev/null".as_ptr(), libc::O_RDWR) };
            if opened == -1 {
                // SAFETY: as above.
                unsafe { libc::open(c"/".as_ptr(), libc::O_RDONLY) };
            }
        }
    }
}

/// What the loader calls before `main` (`DT_INIT_ARRAY` of the System V ABI).
#[used]
// SAFETY: the section holds addresses of functions with this signature or a longer one, whose arguments are not looked at.
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
