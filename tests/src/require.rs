//! The requirements of cases, and where programs are found.

use std::env;
use std::fmt;
use std::net::{Ipv6Addr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::unistd::Uid;

use crate::mptcp;
use crate::vm::debian::Debian;
use crate::vm::kernel::Kernel;

/// Set to `1` if every case must run, as in CI: an unmet [`Need`] then fails the case instead of ignoring it.
pub const STRICT: &str = "RPROXY_REQUIRE_ROOT_TESTS";

/// Where Debian installs daemons. The `PATH` of users, and of some root shells, lacks these directories.
const SYSTEM_DIRS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// A requirement of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// The privilege to create namespaces and to change the user.
    Root,
    /// A program, by file name.
    Program(&'static str),
    /// An IPv6 loopback address.
    Ipv6,
    /// Multipath TCP in the kernel, enabled (`net.mptcp.enabled`).
    Mptcp,
    /// A kernel of Debian's packages, for a virtual machine.
    Kernel(&'static Kernel),
    /// A whole Debian, for a virtual machine.
    Debian,
}

impl Need {
    /// Whether this machine fulfils it.
    pub fn is_met(self) -> bool {
        match self {
            Self::Root => Uid::effective().is_root(),
            Self::Program(name) => find(name).is_some(),
            Self::Ipv6 => TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok(),
            Self::Mptcp => mptcp::is_there(),
            Self::Kernel(kernel) => kernel.fetch().is_ok(),
            Self::Debian => Debian::make().is_ok(),
        }
    }
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => f.write_str("root"),
            Self::Program(name) => write!(f, "the program {name} (tests/run installs it)"),
            Self::Ipv6 => f.write_str("IPv6 on loopback"),
            Self::Mptcp => f.write_str("Multipath TCP"),
            Self::Kernel(kernel) => match kernel.fetch() {
                Ok(()) => kernel.fmt(f),
                Err(reason) => write!(f, "{kernel}, which cannot be fetched: {reason}"),
            },
            Self::Debian => match Debian::make() {
                Ok(()) => f.write_str("a whole Debian"),
                Err(reason) => write!(f, "a whole Debian, which cannot be made: {reason}"),
            },
        }
    }
}

/// Whether an unmet need is a failure; see [`STRICT`].
pub fn strict() -> bool {
    env::var_os(STRICT).is_some_and(|value| value == "1")
}

/// The path of a program in `PATH` or in the system directories.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(SYSTEM_DIRS.map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| is_executable(file))
}

/// A command for a program that [`find`] finds.
///
/// # Panics
/// If the program is not installed.
#[track_caller]
pub fn command(program: &str) -> Command {
    match find(program) {
        Some(path) => Command::new(path),
        None => panic!("{program} is not installed (tests/run installs it)"),
    }
}

fn is_executable(file: &Path) -> bool {
    file.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}
