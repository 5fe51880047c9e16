//! Notifications to the service manager, and the sockets that it passes (sd_notify(3), sd_listen_fds(3)).
//!
//! All of this is inactive unless the environment asks for it. docker mode does not use it, because its
//! descriptors 3 and 4 are dockerd's.

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

use nix::libc::{MSG_DONTWAIT, MSG_NOSIGNAL};
use rproxy_mapping::escape::escaped;
use rproxy_sys::fd::claim_inherited;
use sd_notify::NotifyState;
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::time::sleep;
use tracing::warn;

use crate::bind::activation::{InheritedSockets, PassedSocket};
use crate::bind::listen::{AdoptError, Listener};

/// How long to wait before repeating a notification that the service manager had no room for.
const RETRY: Duration = Duration::from_secs(1);

/// The service manager, if there is one that wants notifications.
static MANAGER: OnceLock<Mutex<ServiceManager>> = OnceLock::new();

/// Returns the sockets that were passed to this process, and to no other (`LISTEN_PID`).
///
/// Call it before anything else opens a file.
///
/// # Errors
/// [`ActivationError`]: the unit is wrong, and serving without some of its sockets would hide that.
pub fn passed_sockets() -> Result<InheritedSockets, ActivationError> {
    // Names without sockets would be an error, although both may be meant for a process that started this
    // one.
    if sd_notify::listen_fds().map_err(ActivationError::Environment)?.len() == 0 {
        return Ok(InheritedSockets::default());
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
    passed.map(adopt).collect::<Result<Vec<_>, _>>().map(InheritedSockets::new)
}

/// Opens the socket for notifications, if the service manager wants them (`NOTIFY_SOCKET`). Call it before
/// the process is confined, and while descriptors are available.
pub fn open() {
    let Some(name) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else { return };
    match ServiceManager::at(Path::new(&name)) {
        // A second call changes nothing.
        Ok(manager) => drop(MANAGER.set(Mutex::new(manager))),
        Err(error) => {
            warn!(%error, socket = %escaped(&name), "cannot notify the service manager (NOTIFY_SOCKET)");
        }
    }
}

/// Whether the service manager listens on an abstract socket (unix(7)), which confinement has to permit.
pub fn is_abstract() -> bool {
    MANAGER.get().is_some_and(|manager| lock(manager).address.as_abstract_namespace().is_some())
}

/// Notifies that clients are served.
pub fn ready() {
    tell(&State::Ready);
}

/// Notifies that the configuration is being reloaded; [`ready`] follows.
pub fn reloading() {
    tell(&State::Reloading);
}

/// Notifies that no new clients are accepted.
pub fn stopping() {
    tell(&State::Stopping);
}

/// Notifies that another process is the service from now on; it sends the following notifications.
pub fn main_process(pid: u32) {
    tell(&State::MainProcess(pid));
}

/// Resets the watchdog.
pub fn alive() {
    tell(&State::Alive);
}

/// Repeats notifications that the service manager had no room for. Never returns.
pub async fn resend() -> ! {
    until_told().await;
    std::future::pending().await
}

/// Like [`resend`], but returns when all notifications are sent.
pub async fn until_told() {
    while let Some(manager) = MANAGER.get()
        && !lock(manager).untold.is_empty()
    {
        sleep(RETRY).await;
        lock(manager).tell_the_rest();
    }
}

/// How often to call [`alive`], if at all: half of the time after which the service manager would act
/// (sd_watchdog_enabled(3)).
pub fn watchdog_interval() -> Option<Duration> {
    sd_notify::watchdog_enabled().map(|limit| limit / 2).filter(|interval| !interval.is_zero())
}

fn tell(state: &State) {
    if let Some(manager) = MANAGER.get() {
        lock(manager).tell(state);
    }
}

fn lock(manager: &Mutex<ServiceManager>) -> std::sync::MutexGuard<'_, ServiceManager> {
    manager.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The states that can be notified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ready,
    Reloading,
    Stopping,
    MainProcess(u32),
    Alive,
}

impl State {
    /// Whether this notification makes `earlier` unnecessary.
    fn replaces(self, earlier: Self) -> bool {
        match self {
            Self::Ready => earlier == Self::Ready,
            Self::Reloading | Self::Stopping => matches!(earlier, Self::Ready | Self::Reloading),
            Self::MainProcess(_) | Self::Alive => false,
        }
    }
}

/// The address of the service manager, and the notifications it had no room for. Sending never blocks.
#[derive(Debug)]
struct ServiceManager {
    socket: Socket,
    address: SockAddr,
    /// States with their text, in order. There are only a few, because newer ones replace older ones.
    untold: Vec<(State, String)>,
    /// Whether the last attempt failed, which was then logged.
    failed: bool,
}

impl ServiceManager {
    fn at(name: &Path) -> io::Result<Self> {
        let bytes = name.as_os_str().as_bytes();
        if bytes.starts_with(b"vsock:") {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "VSOCK addresses are not supported"));
        }
        let address = match bytes.strip_prefix(b"@") {
            // The name of an abstract socket begins with a NUL.
            Some(rest) => SockAddr::unix(std::ffi::OsStr::from_bytes(&[b"\0", rest].concat()))?,
            None => SockAddr::unix(name)?,
        };
        let socket = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
        Ok(Self { socket, address, untold: Vec::new(), failed: false })
    }

    fn tell(&mut self, state: &State) {
        self.untold.retain(|(earlier, _words)| !state.replaces(*earlier));
        match words(*state) {
            Ok(words) => self.untold.push((*state, words)),
            Err(error) => warn!(%error, "cannot notify the service manager of a reload"),
        }
        self.tell_the_rest();
        // The next one says the same.
        self.untold.retain(|(state, _words)| *state != State::Alive);
    }

    /// Sends pending notifications in order, as far as there is room.
    fn tell_the_rest(&mut self) {
        while let Some((_state, words)) = self.untold.first() {
            let flags = MSG_DONTWAIT | MSG_NOSIGNAL;
            let result = self.socket.send_to_with_flags(words.as_bytes(), &self.address, flags);
            match &result {
                Err(error) if has_no_room(error) && !self.failed => {
                    warn!("the service manager does not read notifications (NOTIFY_SOCKET); retrying");
                }
                Err(error) if !self.failed => {
                    warn!(%error, "cannot notify the service manager (NOTIFY_SOCKET)");
                }
                _ => {}
            }
            self.failed = result.is_err();
            if result.is_err_and(|error| has_no_room(&error)) {
                return;
            }
            self.untold.remove(0);
        }
    }
}

/// Whether the receiver's queue is full (`EAGAIN`), or memory is short (send(2)).
fn has_no_room(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock || error.raw_os_error() == Some(nix::libc::ENOBUFS)
}

/// The text of sd_notify(3).
fn words(state: State) -> io::Result<String> {
    Ok(match state {
        State::Ready => NotifyState::Ready.to_string(),
        State::Reloading => format!("{}\n{}", NotifyState::Reloading, NotifyState::monotonic_usec_now()?),
        State::Stopping => NotifyState::Stopping.to_string(),
        State::MainProcess(pid) => NotifyState::MainPid(pid).to_string(),
        State::Alive => NotifyState::Watchdog.to_string(),
    })
}

/// Why passed sockets cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ActivationError {
    /// The variables contradict each other.
    #[error("LISTEN_FDS: the environment is inconsistent: {0}; start rproxy from its unit")]
    Environment(#[source] io::Error),
    /// Nothing is open at the descriptor.
    #[error("LISTEN_FDS: no socket {} was passed at descriptor {number}: {source}", escaped(name))]
    Missing {
        /// The descriptor.
        number: i32,
        /// Its name in the unit.
        name: String,
        /// What fcntl(2) answered.
        source: io::Error,
    },
    /// The descriptor is something else.
    #[error("LISTEN_FDS: the socket {} at descriptor {number} cannot be used: {source}", escaped(name))]
    Unusable {
        /// The descriptor.
        number: i32,
        /// Its name in the unit.
        name: String,
        /// Why.
        source: AdoptError,
    },
}

#[cfg(test)]
mod tests {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};

    use super::*;

    /// A service manager at an abstract name, and the socket that receives its notifications.
    fn pair(name: &str) -> (UnixDatagram, ServiceManager) {
        let name = format!("rproxy-test-{name}-{}", std::process::id());
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        socket.set_nonblocking(true).unwrap();
        (socket, ServiceManager::at(Path::new(&format!("@{name}"))).unwrap())
    }

    /// The first line of each notification received.
    fn told(socket: &UnixDatagram) -> Vec<String> {
        let mut message = [0; 256];
        let next = || socket.recv(&mut message).ok().map(|len| message[..len].to_vec());
        let text = |message: Vec<u8>| String::from_utf8(message).unwrap().lines().next().unwrap().to_owned();
        std::iter::from_fn(next).map(text).collect()
    }

    #[test]
    fn what_there_was_no_room_for_is_told_later_and_in_its_last_state() {
        let (socket, mut manager) = pair("full");
        manager.tell(&State::Ready);
        assert_eq!(told(&socket), ["READY=1"]);
        // Until the queue is full; none of these is repeated.
        while !manager.failed {
            manager.tell(&State::Alive);
        }
        assert!(manager.untold.is_empty());
        for state in [State::Reloading, State::Ready, State::Reloading, State::Ready, State::MainProcess(7)] {
            manager.tell(&state);
        }
        assert_eq!(manager.untold.len(), 3);
        assert!(told(&socket).iter().all(|line| line == "WATCHDOG=1"));
        manager.tell(&State::Alive);
        assert_eq!(told(&socket), ["RELOADING=1", "READY=1", "MAINPID=7", "WATCHDOG=1"]);
        manager.tell(&State::Stopping);
        assert_eq!(told(&socket), ["STOPPING=1"]);
    }

    #[test]
    fn one_that_is_gone_is_told_nothing_and_nothing_is_kept_for_it() {
        let (socket, mut manager) = pair("gone");
        drop(socket);
        manager.tell(&State::Ready);
        assert!(manager.failed && manager.untold.is_empty());
    }

    #[test]
    fn names_are_paths_or_abstract() {
        assert!(ServiceManager::at(Path::new("/run/notify")).unwrap().address.as_pathname().is_some());
        for name in ["vsock:2:1234", &"x".repeat(200)] {
            assert!(ServiceManager::at(Path::new(name)).is_err(), "{name}");
        }
    }
}
