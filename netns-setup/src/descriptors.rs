//! The limit of open files, of which each port of a relay takes one.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the soft limit to the hard limit. Commands are often started with 1024, which only programs that use
/// select(2) need (getrlimit(2)). If that fails, the limit is as it was.
pub fn raise_limit() {
    if let Ok((_soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).ok();
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
