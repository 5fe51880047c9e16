//! Ends the process after a signal, whatever it waits for.
//!
//! A comparison may wait for the lock of another command, or for a program that does not end. Nothing is half done then,
//! unless steps are being taken: these are awaited for a while.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use rproxy_mapping::addr::Protocol;

use super::notify::{Phase, notify};
use crate::action::Action;
use crate::executor::{ActionError, Executor};
use crate::host_ip::HostIp;
use crate::name::Name;
use crate::reserve::ReserveError;
use crate::signals::Signals;

/// How long an orderly end may take if no step is being taken.
const PROMPT: Duration = Duration::from_millis(500);

/// How long a step may take to end, and to be recorded or undone. A service manager waits longer (`TimeoutStopSec=`).
const STEPS: Duration = Duration::from_secs(10);

/// Whether steps are being taken.
#[derive(Debug, Clone, Default)]
pub(super) struct Acting(Arc<AtomicBool>);

impl Acting {
    pub(super) fn end(&self) {
        self.0.store(false, Ordering::SeqCst);
    }

    fn is(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// Notes that steps are being taken, from the first one on.
pub(super) struct Noting<E> {
    pub(super) executor: E,
    pub(super) acting: Acting,
}

impl<E: Executor> Executor for Noting<E> {
    fn run(&mut self, action: &Action) -> Result<(), ActionError> {
        self.acting.0.store(true, Ordering::SeqCst);
        self.executor.run(action)
    }

    fn reserve(&mut self, proto: Protocol, host: HostIp, port: u16) -> Result<u16, ReserveError> {
        self.executor.reserve(proto, host, port)
    }

    fn namespaces(&self) -> &BTreeMap<Name, u64> {
        self.executor.namespaces()
    }

    fn interrupted(&mut self) -> Option<Signal> {
        self.executor.interrupted()
    }
}

/// Ends the process after a signal, unless this is dropped in time.
pub(super) struct Guard {
    /// Its end is noticed by the thread that waits.
    _done: UnixStream,
}

impl Guard {
    /// # Errors
    /// Those of socketpair(2), sigaction(2) and clone(2).
    pub(super) fn start(signals: &Signals, acting: Acting) -> io::Result<Self> {
        let wake = signals.wake()?;
        let (done, ended) = UnixStream::pair()?;
        let wait = move || {
            let is_over = |limit| has_ended(&ended, limit);
            if !(wait_for_either(&wake, &ended) || is_over(PROMPT) || acting.is() && is_over(STEPS)) {
                notify(Phase::Stopping);
                std::process::exit(0);
            }
        };
        thread::Builder::new().name("guard".to_owned()).spawn(wait)?;
        Ok(Self { _done: done })
    }
}

/// Waits for a signal, or for the end of the other; returns whether that has come.
fn wait_for_either(wake: &UnixStream, ended: &UnixStream) -> bool {
    loop {
        let mut fds = [wake, ended].map(|stream| PollFd::new(stream.as_fd(), PollFlags::POLLIN));
        // Only EINTR is possible.
        if poll(&mut fds, PollTimeout::NONE).is_ok() {
            return fds[1].any().unwrap_or(false);
        }
    }
}

/// Whether `stream` ends within `limit`. Signals that interrupt the wait make it longer.
fn has_ended(stream: &UnixStream, limit: Duration) -> bool {
    loop {
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(stream.as_fd(), PollFlags::POLLIN)], limit) {
            Err(Errno::EINTR) => {}
            ready => return ready.is_ok_and(|ready| ready > 0),
        }
    }
}
