//! System call filters (seccomp(2)).
#![expect(unsafe_code, reason = "the kernel takes the filter by a raw pointer")]

use std::io;

use nix::libc;

/// Restricts the calling thread, and threads that it starts, to the system calls that `filter` allows,
/// irrevocably. Requires `no_new_privs` (prctl(2)).
///
/// Speculation mitigations, which kernels before 5.16 enable together with a filter, stay unchanged
/// (`SECCOMP_FILTER_FLAG_SPEC_ALLOW`): they protect programs that run foreign code, and are expensive.
///
/// # Errors
/// Those of seccomp(2); `EINVAL` for an invalid filter, or a kernel without `CONFIG_SECCOMP_FILTER`.
pub fn install(filter: &[libc::sock_filter]) -> io::Result<()> {
    let len = u16::try_from(filter.len()).map_err(|_err| io::ErrorKind::InvalidInput)?;
    // The kernel only reads the filter.
    let program = libc::sock_fprog { len, filter: filter.as_ptr().cast_mut() };
    let (operation, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW);
    // SAFETY: `program` points to `len` instructions, which are copied during the call.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, operation, flags, &raw const program) };
    if result == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_without_an_end_is_refused() {
        let load_number = libc::sock_filter { code: 0x20, jt: 0, jf: 0, k: 0 };
        assert_eq!(install(&[load_number]).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
}
