//! The memory of the process.
#![expect(unsafe_code, reason = "the allocator is the C library's")]

#[cfg(target_env = "gnu")]
use nix::libc;

/// Returns freed memory to the system if the C library keeps it (`malloc_trim(3)`, glibc).
pub fn release_unused() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it only touches free memory, under the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}
