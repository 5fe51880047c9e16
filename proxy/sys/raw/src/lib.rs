//! System calls without a libc, for a program that has neither a heap nor the standard library.
//!
//! Each function is one system call, or the few that belong together, with its numbers and structures as the kernel
//! defines them (`include/uapi`). Integers have the layout of 64-bit Linux, which x86-64 and arm64 share; what
//! differs between the two is in `arch`.
//!
//! The crate has no dependencies. Cargo builds a dependency of several programs once, with the features that any of
//! them wants, so that `libc` or `rustix` would bring the standard library with them.

#![no_std]

mod arch;
pub mod errno;
pub mod fd;
pub mod process;
pub mod signal;
pub mod socket;
pub mod time;

#[cfg(test)]
extern crate std;

use errno::Errno;

/// Calls the kernel, and separates errors from results.
///
/// # Safety
/// Pointers among the arguments must be valid for what the call reads and writes, and descriptors must not belong
/// to somebody who relies on them, if the call closes or replaces them.
#[expect(unsafe_code, reason = "what the kernel does with the arguments depends on them")]
unsafe fn call<const COUNT: usize>(number: usize, arguments: [usize; COUNT]) -> Result<usize, Errno> {
    let mut all = [0; 6];
    all[..COUNT].copy_from_slice(&arguments);
    // SAFETY: as this function requires.
    let result = unsafe { arch::syscall(number, all) };
    // Results from -4095 to -1 are errors (include/linux/err.h, MAX_ERRNO).
    match result {
        -4095..0 => Err(Errno(result.unsigned_abs())),
        _ => Ok(result.cast_unsigned()),
    }
}
