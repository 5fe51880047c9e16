//! What the process may still do once it serves: as little as the data path needs.
//!
//! Everything is in place by then, so that a mistake in what handles strangers' bytes cannot become more
//! than that. In order: another user, if one is given (`user`); no capability that is not needed
//! (`privileges`); no new privileges; no files, and no other ports (Landlock, `reach`); no other system
//! calls (seccomp, `calls`). Threads that start later have all of it, too.

mod calls;
mod privileges;
mod reach;
pub mod user;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use rproxy_sys::memory::release_unused;
use tracing::info;

pub use self::user::User;
use crate::addr::Protocol;
use crate::mapping::Forward;

/// The variable that sets the mode where there is no command line for it.
pub const MODE_VARIABLE: &str = "RPROXY_SANDBOX";

/// How much confinement there has to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// As much as the kernel has.
    #[default]
    Auto,
    /// All of it, or the start fails.
    Strict,
    /// None.
    Off,
}

impl Mode {
    /// What [`MODE_VARIABLE`] says, and if that makes no sense, the default.
    pub fn from_env() -> Self {
        let value = std::env::var(MODE_VARIABLE).ok();
        value.and_then(|text| Self::from_str(&text, true).ok()).unwrap_or_default()
    }
}

/// What the process has to be able to do once it is confined.
#[derive(Debug)]
pub struct Needs<'a> {
    /// The user to go on as.
    pub user: Option<&'a User>,
    /// Whether UDP is relayed.
    pub udp: bool,
    /// The ports of backends that are reached over TCP.
    pub tcp_backends: Vec<u16>,
    /// Whether what listens on an abstract socket is told what goes on: a service manager.
    pub abstract_sockets: bool,
    /// What changes need, if there can be any.
    pub changes: Option<Changes<'a>>,
}

impl<'a> Needs<'a> {
    /// What it takes to serve these ports, and never anything else.
    pub fn to_serve<'f>(ports: impl IntoIterator<Item = &'f Forward>) -> Self {
        let (udp, tcp): (Vec<&Forward>, Vec<&Forward>) =
            ports.into_iter().partition(|forward| forward.protocol == Protocol::Udp);
        let tcp_backends = tcp.iter().map(|forward| forward.backend.socket_addr().port()).collect();
        Self { user: None, udp: !udp.is_empty(), tcp_backends, abstract_sockets: false, changes: None }
    }

    /// Whether TCP is relayed.
    fn tcp(&self) -> bool {
        !self.tcp_backends.is_empty()
    }
}

/// What it takes to serve something else than at the start. Any address may be bound, and any backend be
/// reached.
#[derive(Clone, Copy, Debug, Default)]
pub struct Changes<'a> {
    /// The control socket, to be removed in the end.
    pub socket: Option<&'a Path>,
    /// The configuration, to be read again; by way of its directory, as another file may take its place.
    pub configuration: Option<&'a Path>,
}

/// Confines the process as far as `mode` asks for and the kernel allows, and says so in the log. To be
/// called before other threads are started.
///
/// # Errors
/// [`SandboxError`]: for [`Mode::Strict`] whatever cannot be had; else only a user that cannot be changed to.
pub fn confine(mode: Mode, needs: &Needs<'_>) -> Result<(), SandboxError> {
    let strict = mode == Mode::Strict;
    let kept = privileges::needed(needs);
    let socket = needs.changes.and_then(|changes| changes.socket);
    if let (Some(user), Some(socket)) = (needs.user, socket) {
        privileges::give_to(user, socket)?;
    }
    privileges::change_user(needs.user, kept)?;
    if mode == Mode::Off {
        info!("not confined, as asked for");
        return Ok(());
    }
    let capabilities = Layer::new("capabilities", privileges::keep(kept), strict)?;
    let no_new_privs = Layer::new("no_new_privs", privileges::refuse_new(), strict)?;
    let landlock = Layer::new("landlock", reach::restrict(needs, strict), strict)?;
    let seccomp = Layer::new("seccomp", calls::restrict(needs), strict)?;
    info!(%capabilities, %no_new_privs, %landlock, %seccomp, "confined");
    // Compiling a filter takes more memory than an idle mapping.
    release_unused();
    Ok(())
}

/// What became of a part of the confinement.
struct Layer(Result<String, io::Error>);

impl Layer {
    fn new(name: &'static str, result: io::Result<String>, strict: bool) -> Result<Self, SandboxError> {
        match result {
            Err(source) if strict => Err(SandboxError::Unavailable { name, source }),
            result => Ok(Self(result)),
        }
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Ok(state) => f.write_str(state),
            Err(error) => write!(f, "unavailable: {error}"),
        }
    }
}

/// Why the process cannot be confined.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// Something that strict confinement has to have.
    #[error("--sandbox strict: no {name} here: {source}; --sandbox auto goes without what is missing")]
    Unavailable {
        /// What is missing.
        name: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The user cannot be changed.
    #[error("--user {user}: cannot change to it: {source}; that takes root")]
    User {
        /// The user, as it was given.
        user: String,
        /// Why.
        source: io::Error,
    },
    /// A file cannot be given to the user.
    #[error("--user {user}: cannot make it the owner of {}: {source}", path.display())]
    Owner {
        /// The user, as it was given.
        user: String,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}
