//! Execution of `rproxy` in place of this process.

use core::ffi::CStr;

use rproxy_sys_raw::errno::Errno;
use rproxy_sys_raw::process::{Arguments, read_link};

/// The program that serves a port by itself.
const PROGRAM: &[u8] = b"rproxy";

/// Where programs are if `PATH` is not set (execvp(3)).
const DEFAULT_PATH: &[u8] = b"/bin:/usr/bin";

/// The longest path with its NUL (`PATH_MAX`).
const LONGEST: usize = 4096;

/// The file that was tried, beside this program, and what the kernel answered.
pub(crate) struct Failure {
    path: Path,
    error: Errno,
}

/// Replaces this process by `rproxy`, with the same arguments: the one beside this program, or else one in `PATH`.
/// Returns only if there is none that can be executed.
// Its buffers must not be part of the stack of a process that sleeps.
#[inline(never)]
pub(crate) fn execute(arguments: &mut Arguments) -> Failure {
    let mut link = [0; LONGEST];
    let own = read_link(c"/proc/self/exe", &mut link).unwrap_or_default();
    let slash = own.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    let beside = Path::new(&own[..slash]);
    let mut failure = Failure { error: arguments.execute(beside.as_c_str()), path: beside };
    let path = arguments.variable("PATH").unwrap_or(DEFAULT_PATH);
    // An empty one would be the working directory, which is not the installer's choice.
    for directory in path.split(|byte| *byte == b':').filter(|directory| directory.starts_with(b"/")) {
        let candidate = Path::new(directory);
        match arguments.execute(candidate.as_c_str()) {
            Errno::NOENT | Errno::NOTDIR => {}
            error if failure.error == Errno::NOENT => failure = Failure { path: candidate, error },
            _ => {}
        }
    }
    failure
}

impl Failure {
    /// Writes what was tried, in parts.
    pub(crate) fn describe(&self, write: &mut dyn FnMut(&[u8])) {
        write(b"cannot execute ");
        write(self.path.as_c_str().to_bytes());
        write(b": ");
        let mut digits = [0; 20];
        match self.error {
            Errno::NOENT => {
                write(b"there is no such file, and no rproxy in PATH; install it beside rproxy-shim")
            }
            Errno::ACCES | Errno::PERM => write(b"permission denied; make it executable"),
            Errno(number) => {
                write(b"error ");
                write(decimal(number, &mut digits));
                write(b" of execve(2)");
            }
        }
    }
}

/// The digits of a number.
fn decimal(mut number: usize, digits: &mut [u8; 20]) -> &[u8] {
    let mut start = digits.len();
    loop {
        start -= 1;
        // A digit fits a byte.
        digits[start] = b'0' + u8::try_from(number % 10).unwrap_or(0);
        number /= 10;
        if number == 0 || start == 0 {
            return &digits[start..];
        }
    }
}

/// The path of a program, which ends with NUL.
struct Path([u8; LONGEST]);

impl Path {
    /// `rproxy` in a directory. A path that is too long becomes an empty one, which no file has.
    fn new(directory: &[u8]) -> Self {
        let mut path = Self([0; LONGEST]);
        let parts = [directory, b"/", PROGRAM];
        if parts.iter().map(|part| part.len()).sum::<usize>() < LONGEST {
            let mut end = 0;
            for part in parts {
                path.0[end..][..part.len()].copy_from_slice(part);
                end += part.len();
            }
        }
        path
    }

    fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or_default()
    }
}
