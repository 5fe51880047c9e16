//! The limit of open files, of which each port of a relay takes one.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the soft limit to the hard limit. Commands are often started with 1024, which only programs that use
/// select(2) need (getrlimit(2)). If that fails, the limit is as it was.
pub fn raise_limit() {
    if let Ok((_soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).ok();
    }
}

/// The limit of a process that serves the ports of all containers, unless its own is higher: that of the kernel by default.
const MANY: u64 = 1024 * 1024;

/// Raises both limits as far as a process may be given them that serves the ports of all containers. Without the right to
/// raise the hard limit, raises the soft limit to that.
pub fn raise_hard_limit() {
    let kernel = std::fs::read_to_string("/proc/sys/fs/nr_open").ok();
    let most = kernel.and_then(|most| most.trim().parse().ok()).unwrap_or(MANY).min(MANY);
    let hard = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_soft, hard)| hard);
    if hard >= most || setrlimit(Resource::RLIMIT_NOFILE, most, most).is_err() {
        raise_limit();
    }
}

/// Says that only `received` sockets could be opened.
#[must_use]
pub fn too_few(received: usize) -> String {
    let limit = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(soft, _hard)| soft);
    format!(
        "the limit of {limit} open files is reached after {received} sockets: raise it with `ulimit -Hn`, or publish fewer ports with --via proxy or both"
    )
}
