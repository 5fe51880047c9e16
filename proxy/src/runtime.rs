//! What a process sets up before it serves.

use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::runtime::{Builder, Runtime};
use tracing::warn;

/// A runtime for one thread, with sockets, timers and signals.
///
/// # Errors
/// What epoll_create1(2) or eventfd(2) answered.
pub fn new_runtime() -> io::Result<Runtime> {
    // Sockets are in epoll instances of their own, so that few events are the runtime's: little room will do.
    Builder::new_current_thread().enable_io().enable_time().max_io_events_per_tick(64).build()
}

/// Raises the soft limit of descriptors to the hard one: a connection takes two. Services are often
/// started with 1024, which only programs that use select(2) need (getrlimit(2)).
pub fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_soft, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(%error, "cannot raise the limit of descriptors");
    }
}
