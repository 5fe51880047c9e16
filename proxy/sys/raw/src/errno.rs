//! Errors of system calls (errno(3)).

/// The number of an error (`include/uapi/asm-generic/errno-base.h` and `errno.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errno(pub usize);

impl Errno {
    /// Not permitted.
    pub const PERM: Self = Self(1);
    /// No such file.
    pub const NOENT: Self = Self(2);
    /// Interrupted by a signal.
    pub const INTR: Self = Self(4);
    /// Nothing is open at the descriptor.
    pub const BADF: Self = Self(9);
    /// Try again.
    pub const AGAIN: Self = Self(11);
    /// Permission denied.
    pub const ACCES: Self = Self(13);
    /// Not a directory.
    pub const NOTDIR: Self = Self(20);
    /// An invalid argument.
    pub const INVAL: Self = Self(22);
    /// The name is too long.
    pub const NAMETOOLONG: Self = Self(36);
    /// The kernel, or a filter of a container runtime, does not know the call.
    pub const NOSYS: Self = Self(38);
    /// The socket does not know the option.
    pub const NOPROTOOPT: Self = Self(92);
    /// The socket does not support this.
    pub const OPNOTSUPP: Self = Self(95);
}
