//! What differs between the processors: the instruction that enters the kernel, and the numbers of the calls
//! (`arch/x86/entry/syscalls/syscall_64.tbl`, `include/uapi/asm-generic/unistd.h`).

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
pub(crate) use aarch64::{number, syscall};
#[cfg(target_arch = "x86_64")]
pub(crate) use x86_64::{number, syscall};

#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
compile_error!("rproxy-sys-raw knows the system calls of Linux on x86-64 and arm64");
