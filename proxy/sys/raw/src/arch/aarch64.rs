//! arm64.
#![expect(unsafe_code, reason = "an instruction that enters the kernel")]

use core::arch::asm;

/// Enters the kernel (syscall(2), "Architecture calling conventions").
///
/// # Safety
/// As [`crate::call`].
pub(crate) unsafe fn syscall(number: usize, arguments: [usize; 6]) -> isize {
    let [a, b, c, d, e, f] = arguments;
    let result;
    // SAFETY: the registers are those of the convention; the caller answers for their values.
    unsafe {
        asm!(
            "svc 0",
            in("x8") number,
            inlateout("x0") a => result,
            in("x1") b,
            in("x2") c,
            in("x3") d,
            in("x4") e,
            in("x5") f,
            options(nostack),
        );
    }
    result
}

pub(crate) mod number {
    pub(crate) const DUP3: usize = 24;
    pub(crate) const FCNTL: usize = 25;
    pub(crate) const IOCTL: usize = 29;
    pub(crate) const OPENAT: usize = 56;
    pub(crate) const CLOSE: usize = 57;
    pub(crate) const GETDENTS64: usize = 61;
    pub(crate) const READ: usize = 63;
    pub(crate) const WRITE: usize = 64;
    pub(crate) const PPOLL: usize = 73;
    pub(crate) const SIGNALFD4: usize = 74;
    pub(crate) const READLINKAT: usize = 78;
    pub(crate) const EXIT_GROUP: usize = 94;
    pub(crate) const CLOCK_GETTIME: usize = 113;
    pub(crate) const RT_SIGPROCMASK: usize = 135;
    pub(crate) const GETEUID: usize = 175;
    pub(crate) const SOCKET: usize = 198;
    pub(crate) const BIND: usize = 200;
    pub(crate) const LISTEN: usize = 201;
    pub(crate) const CONNECT: usize = 203;
    pub(crate) const SETSOCKOPT: usize = 208;
    pub(crate) const GETSOCKOPT: usize = 209;
    pub(crate) const SHUTDOWN: usize = 210;
    pub(crate) const SENDMSG: usize = 211;
    pub(crate) const EXECVE: usize = 221;
    pub(crate) const CLOSE_RANGE: usize = 436;
}
