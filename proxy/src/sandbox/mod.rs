//! Confines a serving process to what the data path needs.
//!
//! A bug in code that handles untrusted bytes then has limited consequences. The layers, in order: another
//! user, if one is given (`user`); no unneeded capabilities (`privileges`); no new privileges; no files and
//! no other ports (Landlock, `reach`); no other system calls (seccomp, `calls`). Threads that start later
//! inherit all of them.

mod calls;
mod privileges;
mod reach;
pub mod user;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use nix::libc;
use rproxy_sys::memory::release_unused;
use rustix::thread::CapabilitySet;
use tracing::{info, warn};

use self::reach::Reach;
pub use self::user::User;
use crate::runtime::descriptors::explain;
use rproxy_mapping::PortMapping;
use rproxy_mapping::addr::Protocol;
use rproxy_mapping::escape::escaped;
use rproxy_mapping::limits::Limits;
use rproxy_mapping::source::Source;

/// The environment variable with the mode, for processes without a command line for it.
pub const MODE_VARIABLE: &str = "RPROXY_SANDBOX";

/// How much confinement is required.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// As much as the kernel does.
    #[default]
    Auto,
    /// All that a kernel of this version can do, or the start fails.
    Strict,
    /// None.
    Off,
}

impl Mode {
    /// The value of [`MODE_VARIABLE`]. If it is empty, or invalid, which is logged, the default.
    pub fn from_env() -> Self {
        let value = std::env::var_os(MODE_VARIABLE).unwrap_or_default();
        if value.is_empty() {
            return Self::default();
        }
        let mode = value.to_str().and_then(|text| Self::from_str(text, true).ok());
        if mode.is_none() {
            let value = escaped(&value);
            warn!("{MODE_VARIABLE} is ignored: '{value}' is not auto, strict or off; using auto");
        }
        mode.unwrap_or_default()
    }
}

/// What the process has to be able to do after confinement.
#[derive(Debug)]
pub struct Needs<'a> {
    /// The user to change to.
    pub user: Option<&'a User>,
    /// Whether UDP is relayed.
    pub udp: bool,
    /// Whether UDP is relayed from a port below 1024: client sockets may be bound to it later.
    pub low_udp_ports: bool,
    /// Whether TCP connections set a code point.
    pub dscp: bool,
    /// Whether TCP connections have other timers than by default.
    pub timers: bool,
    /// Where connections and datagrams to backends come from.
    pub sources: Sources,
    /// The ports of TCP backends.
    pub tcp_backends: Vec<u16>,
    /// The ports of SCTP backends.
    pub sctp_backends: Vec<u16>,
    /// Whether backends of TCP are Unix sockets.
    pub unix_backends: bool,
    /// Whether mappings listen on Unix sockets.
    pub unix_hosts: bool,
    /// The files of these sockets, beside which changes may bind others.
    pub unix_host_files: &'a [PathBuf],
    /// Whether the access log is written to a Unix socket, which may have to be connected again.
    pub log_socket: bool,
    /// Whether it is written to a file, which may be another one later.
    pub log_file: bool,
    /// Whether the service manager is notified through an abstract socket.
    pub abstract_sockets: bool,
    /// The Unix sockets that this process listens on, whose files are removed on exit.
    pub unix_sockets: Vec<&'a Path>,
    /// Whether metrics are served, which tell how many descriptors are open.
    pub metrics: bool,
    /// What changes at run time need, if they are possible.
    pub changes: Option<Changes<'a>>,
}

/// Where connections and datagrams to backends come from, other than the kernel chooses.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sources {
    /// Whether some come from the addresses of clients.
    pub clients: bool,
    /// Whether some come from a given address of the host.
    pub addresses: bool,
    /// Whether some have to leave by a given interface.
    pub devices: bool,
}

impl Sources {
    /// Those of mappings with these limits.
    pub fn of<'l>(limits: impl Iterator<Item = &'l Limits>) -> Self {
        limits.fold(Self::default(), |all, limits| Self {
            clients: all.clients || limits.source.is_client(),
            addresses: all.addresses || matches!(limits.source, Source::Address(_)),
            devices: all.devices || limits.device.is_some(),
        })
    }

    /// Whether sockets of TCP connections are bound.
    pub(super) fn are_bound(self) -> bool {
        self.clients || self.addresses
    }
}

/// The first port that an unprivileged process can bind (`ip_unprivileged_port_start`, ip(7)) by default.
const FIRST_UNPRIVILEGED: u16 = 1024;

impl<'a> Needs<'a> {
    /// What serving exactly these ports needs.
    pub fn to_serve<'f>(ports: impl IntoIterator<Item = &'f PortMapping>) -> Self {
        let (udp, others): (Vec<&PortMapping>, Vec<&PortMapping>) =
            ports.into_iter().partition(|port_mapping| port_mapping.protocol == Protocol::Udp);
        let backends = |protocol| {
            let ports = others.iter().filter(|port_mapping| port_mapping.protocol == protocol);
            let backends = ports.map(|port_mapping| &port_mapping.backend);
            let backends = backends.filter(|backend| backend.unix_addr().is_none());
            backends.map(|backend| backend.socket_addr().port()).collect()
        };
        Self {
            user: None,
            udp: !udp.is_empty(),
            low_udp_ports: udp
                .iter()
                .any(|port_mapping| port_mapping.host.port().is_some_and(|port| port < FIRST_UNPRIVILEGED)),
            dscp: false,
            timers: false,
            sources: Sources::default(),
            tcp_backends: backends(Protocol::Tcp),
            sctp_backends: backends(Protocol::Sctp),
            log_socket: false,
            log_file: false,
            unix_hosts: others.iter().any(|port_mapping| port_mapping.host.unix_addr().is_some()),
            unix_host_files: &[],
            unix_backends: others.iter().any(|port_mapping| port_mapping.backend.unix_addr().is_some()),
            abstract_sockets: false,
            unix_sockets: Vec::new(),
            metrics: false,
            changes: None,
        }
    }

    /// Whether TCP is relayed.
    fn tcp(&self) -> bool {
        !self.tcp_backends.is_empty() || self.unix_backends
    }

    /// Whether Unix sockets are bound later.
    fn binds_unix_sockets(&self) -> bool {
        self.changes.is_some() && self.unix_hosts
    }

    /// Whether SCTP is relayed.
    fn sctp(&self) -> bool {
        !self.sctp_backends.is_empty()
    }
}

/// What changes at run time need, in addition to binding any address and connecting to any backend.
#[derive(Clone, Copy, Debug, Default)]
pub struct Changes<'a> {
    /// The configuration. Its whole directory is permitted, because another file may replace it.
    pub configuration: Option<&'a Path>,
}

/// Confines the process as far as `mode` requires and the kernel supports, and logs the result. Call it
/// before other threads are started.
///
/// # Errors
/// [`SandboxError`]: for [`Mode::Strict`] any missing layer, unless the kernel is older than that; otherwise only a failed
/// change of the user.
pub fn confine(mode: Mode, needs: &Needs<'_>) -> Result<(), SandboxError> {
    let strict = mode == Mode::Strict;
    let kept = privileges::needed(needs);
    if let Some(user) = needs.user {
        needs.unix_sockets.iter().try_for_each(|path| privileges::give_to(user, path))?;
    }
    privileges::change_user(needs.user, kept)?;
    if mode == Mode::Off {
        info!("not confined, as requested");
        return Ok(());
    }
    let capabilities = Layer::new("capabilities", privileges::keep(kept), strict)?;
    let no_new_privs = Layer::new("no_new_privs", privileges::refuse_new(), strict)?;
    let reach = reach::restrict(needs);
    let lacking = reach.as_ref().ok().and_then(Reach::lacking).filter(|_| strict);
    let landlock = Layer::new("landlock", reach.map(|reach| reach.to_string()), strict)?;
    let seccomp = Layer::new("seccomp", calls::restrict(needs), strict)?;
    info!(%capabilities, %no_new_privs, %landlock, %seccomp, "confined");
    [&capabilities, &no_new_privs, &landlock, &seccomp].into_iter().for_each(Layer::warn);
    if let Some(lacking) = lacking {
        let kernel = reach::release();
        warn!(%kernel, "--sandbox strict: this kernel is too old for Landlock to restrict {lacking}");
    }
    // Compiling a filter takes more memory than an idle mapping has.
    release_unused();
    Ok(())
}

/// Opens a socket by which even a process with `CAP_NET_ADMIN` cannot change interfaces and routes.
///
/// # Errors
/// Those of `open`, capget(2) and capset(2).
pub(crate) fn without_net_admin<T>(open: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    privileges::without_net_admin(open)
}

/// Confines a process that looks names up, as far as the kernel can: no capabilities, no new privileges, nothing to write,
/// and no TCP but to name servers. It reads any file that its user can, because `/etc/resolv.conf` may be a link to anywhere.
pub(crate) fn confine_resolver() {
    // Without one of them, it can do what the launcher can that has started it.
    privileges::keep(CapabilitySet::empty()).ok();
    privileges::refuse_new().ok();
    reach::restrict_resolver().ok();
}

/// The result of one layer.
struct Layer {
    name: &'static str,
    result: io::Result<String>,
}

impl Layer {
    fn new(name: &'static str, result: io::Result<String>, strict: bool) -> Result<Self, SandboxError> {
        match result {
            Err(source) if strict => Err(SandboxError::Unavailable { name, source }),
            result => Ok(Self { name, result }),
        }
    }

    /// Warns about a failure, unless this kernel lacks the layer.
    fn warn(&self) {
        if let Some(reason) = self.failure() {
            warn!(layer = self.name, reason, "a sandbox layer that this kernel supports has failed");
        }
    }

    /// The reason of a failure and how to fix it, unless this kernel lacks the layer.
    fn failure(&self) -> Option<String> {
        let error = self.result.as_ref().err()?;
        let is_lacking = error.kind() == io::ErrorKind::Unsupported
            || matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EOPNOTSUPP));
        (!is_lacking).then(|| explain(error, 1))
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.result {
            Ok(state) => f.write_str(state),
            Err(error) => write!(f, "unavailable: {error}"),
        }
    }
}

/// Why the process cannot be confined.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A layer that strict confinement requires failed.
    #[error("--sandbox strict: {name} unavailable: {}; --sandbox auto does without", explain(source, 1))]
    Unavailable {
        /// The name of the layer.
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
    /// The owner of a file cannot be changed to the user.
    #[error("--user {user}: cannot make it the owner of {}: {source}", escaped(path))]
    Owner {
        /// The user, as it was given.
        user: String,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_that_the_kernel_has_and_that_cannot_be_had_is_worth_a_warning() {
        let failure = |error: io::Error| Layer::new("landlock", Err(error), false).unwrap().failure();
        for lacking in [libc::ENOSYS, libc::EOPNOTSUPP] {
            assert_eq!(failure(io::Error::from_raw_os_error(lacking)), None);
        }
        let reason = failure(io::Error::from_raw_os_error(libc::EMFILE)).unwrap();
        assert!(reason.contains("ulimit -n"), "{reason}");
        assert!(failure(io::Error::from_raw_os_error(libc::EPERM)).is_some());
        assert_eq!(Layer::new("landlock", Ok("enforced".to_owned()), false).unwrap().failure(), None);
    }
}
