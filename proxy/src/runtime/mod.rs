//! Process setup and runtimes.

pub(crate) mod descriptors;
pub(crate) mod poll;
pub mod signals;
pub(crate) mod socket_file;
pub(crate) mod spare;
pub(crate) mod worker;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use rproxy_sys::fd::close_unclaimed;
use rproxy_sys::process::ignore;
use tokio::runtime::{Builder, Runtime};
use tracing::warn;

use crate::log::{self, LogConfig};

/// Creates a single-threaded runtime with sockets, timers and signals.
///
/// # Errors
/// Those of epoll_create1(2) and eventfd(2).
pub fn new_runtime() -> io::Result<Runtime> {
    // A wake-up rarely has more. The default makes room for 1024 (12 kB).
    Builder::new_current_thread().enable_io().enable_time().max_io_events_per_tick(64).build()
}

/// Runs `body` with `state` on a new thread with a stack of `stack` bytes.
///
/// # Errors
/// The error of clone(2), and `state`, so that the caller can go on without the thread. `EAGAIN` is the limit
/// of tasks (`RLIMIT_NPROC`, or the `pids.max` of a cgroup), `ENOMEM` a lack of memory.
pub(crate) fn start_thread<T: Send + 'static>(
    name: &str,
    stack: usize,
    state: T,
    body: impl FnOnce(T) + Send + 'static,
) -> Result<(), (io::Error, T)> {
    let slot = Arc::new(Mutex::new(Some(state)));
    let of_thread = slot.clone();
    let take = |slot: &Mutex<Option<T>>| slot.lock().unwrap_or_else(PoisonError::into_inner).take();
    let started = thread::Builder::new()
        .name(name.to_owned())
        .stack_size(stack)
        .spawn(move || take(&of_thread).map(body));
    match started {
        Ok(_thread) => Ok(()),
        // If no thread was started, the state is still there.
        Err(error) => Err((error, take(&slot).expect("only a thread takes the state"))),
    }
}

/// Sets up a serving process: closes unclaimed descriptors and starts the log. Call it once, after claiming
/// what was passed and before opening any other file.
pub(crate) fn prepare(log: LogConfig) {
    let closed = close_unclaimed();
    log::init(log);
    if let Err(error) = closed {
        warn!(%error, "cannot close inherited descriptors");
    }
    // A log line that cannot be written is lost. It must neither end the process, as at `RLIMIT_FSIZE`
    // (setrlimit(2)), nor stop it, as in the background of a terminal with `TOSTOP` (termios(3)).
    for signal in [Signal::SIGXFSZ, Signal::SIGTTOU] {
        if let Err(error) = ignore(signal) {
            warn!(%error, %signal, "cannot ignore a signal");
        }
    }
}

/// Raises the soft limit of descriptors to the hard limit, because a connection takes two. Services are often
/// started with a limit of 1024, which only programs that use select(2) need (getrlimit(2)).
pub fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_soft, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        warn!(%error, "cannot raise the limit of descriptors");
    }
}
