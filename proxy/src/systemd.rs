//! What a service manager is told, and the sockets that it passes (sd_notify(3), sd_listen_fds(3)).
//!
//! Nothing here does anything unless the environment asks for it, and docker mode does not look: the
//! descriptors 3 and 4 are dockerd's there.

use std::io;
use std::time::Duration;

use rproxy_sys::fd::claim_inherited;
use sd_notify::NotifyState;
use tracing::warn;

use crate::activation::{Passed, PassedSocket};
use crate::listen::{AdoptError, Listener};

/// Takes the sockets that were passed to this process, and to no other (`LISTEN_PID`).
///
/// Call it before anything else opens a file.
///
/// # Errors
/// [`ActivationError`]: then the unit is wrong, and serving without some sockets would hide it.
pub fn passed_sockets() -> Result<Passed, ActivationError> {
    // Names without sockets would be an error, though both may be for a process that started this one.
    if sd_notify::listen_fds().map_err(ActivationError::Environment)?.len() == 0 {
        return Ok(Passed::default());
    }
    let passed = sd_notify::listen_fds_with_names().map_err(ActivationError::Environment)?;
    let adopt = |(number, name): (i32, String)| -> Result<PassedSocket, ActivationError> {
        let fd = claim_inherited(number);
        let fd = fd.map_err(|source| ActivationError::Missing { number, name: name.clone(), source })?;
        match Listener::adopt_any(fd) {
            Ok(listener) => Ok(PassedSocket { name, listener }),
            Err(source) => Err(ActivationError::Unusable { number, name, source }),
        }
    };
    passed.map(adopt).collect::<Result<Vec<_>, _>>().map(Passed::new)
}

/// Whether there is a service manager that wants to be told.
pub fn is_there() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// Clients are served.
pub fn ready() {
    notify(&[NotifyState::Ready]);
}

/// The configuration is being read anew; [`ready`] is next.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => notify(&[NotifyState::Reloading, now]),
        Err(error) => warn!(%error, "cannot tell the service manager of a reload"),
    }
}

/// No new clients are let in any more.
pub fn stopping() {
    notify(&[NotifyState::Stopping]);
}

/// Another process is the service from now on, and will be the one to tell.
pub fn main_process(pid: u32) {
    notify(&[NotifyState::MainPid(pid)]);
}

/// All is well.
pub fn alive() {
    notify(&[NotifyState::Watchdog]);
}

/// How often [`alive`] has to be said, if at all: half of the time after which the service manager
/// would act (sd_watchdog_enabled(3)).
pub fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|limit| limit / 2).filter(|interval| !interval.is_zero())
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!(%error, "cannot tell the service manager (NOTIFY_SOCKET)");
    }
}

/// Why sockets that were passed cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ActivationError {
    /// The variables contradict each other.
    #[error("LISTEN_FDS: the environment makes no sense: {0}; start rproxy from its unit")]
    Environment(#[source] io::Error),
    /// Nothing is open there.
    #[error("LISTEN_FDS: no socket {name} was passed at descriptor {number}: {source}")]
    Missing {
        /// The descriptor.
        number: i32,
        /// Its name in the unit.
        name: String,
        /// What fcntl(2) answered.
        source: io::Error,
    },
    /// It is something else.
    #[error("LISTEN_FDS: the socket {name} at descriptor {number} cannot be used: {source}")]
    Unusable {
        /// The descriptor.
        number: i32,
        /// Its name in the unit.
        name: String,
        /// Why.
        source: AdoptError,
    },
}
