//! The front end for rootless Podman: its program `rootlessport`, which publishes the ports of a container on the host.
//!
//! Podman starts it by this name, with a JSON text on standard input (`contract`). It binds on the host, and then enters
//! the network namespace of the container, as a whole: sockets stay in the namespace they were made in, so listeners
//! are those of the host, and everything that is opened later, for backends, is inside. The data path is that of the
//! other front ends.
//!
//! Errors before readiness are printed on standard output, which Podman shows to the user, and not on standard error,
//! which it logs (`setupRootlessPortMappingViaRLK` in Podman's `libpod`).

mod contract;
mod reload;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, IsTerminal, Write, stdin, stdout};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::fcntl::{F_GETFL, F_SETFL, OFlag, fcntl};
use nix::libc;
use nix::sys::signal::Signal;
use rproxy_mapping::Mapping;
use rproxy_mapping::escape::escaped;
use rproxy_sys::watch::Watched;
use rustix::stdio::{dup2_stderr, dup2_stdout};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::io::Interest;
use tokio::runtime::Runtime;
use tracing::{error, info, warn};

use self::contract::{Contract, ContractError};
use self::reload::{ReloadError, ReloadSocket, Request};
use crate::bind::Bound;
use crate::bind::listen::BindError;
use crate::engine::{Growth, ServeError, Server};
use crate::log::{LogConfig, console};
use crate::runtime::signals::StopSignals;
use crate::runtime::{new_runtime, prepare, raise_descriptor_limit};
use crate::sandbox::{self, Mode, Needs, SandboxError};
use crate::state::task::LiveFlows;

/// The name by which Podman starts it.
const NAME: &str = "rootlessport";

/// What Podman reads when clients are served.
const READY: &[u8] = b"1";

/// Signals without a meaning to it.
const MEANINGLESS: [Signal; 4] = [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGALRM];

/// Whether the program was started by the name of this front end.
pub fn is_name(program: &OsStr) -> bool {
    Path::new(program).file_name() == Some(OsStr::new(NAME))
}

/// Runs as rootlessport until the container ends, or a signal ends it. `args` exclude the program's name.
pub fn main(args: &[OsString]) -> ExitCode {
    if let Some(first) = args.first() {
        let first = escaped(first);
        console::err(&format_args!(
            "{NAME}: '{first}': this name of rproxy takes no arguments, but JSON of Podman on standard input; rproxy by its own name has options"
        ));
        return ExitCode::from(2);
    }
    if stdin().is_terminal() {
        console::err(&format_args!(
            "{NAME}: Podman starts this program, and passes JSON on standard input, which is a terminal; `man rproxy` says how Podman finds it"
        ));
        return ExitCode::from(2);
    }
    let contract = match contract::read(stdin().lock()) {
        Ok(contract) => contract,
        Err(error) => {
            console::out(&error);
            return ExitCode::from(2);
        }
    };
    prepare(LogConfig::from_env());
    raise_descriptor_limit();
    // Confinement, which can fail, comes after standard output is replaced.
    let output = stdout().as_fd().try_clone_to_owned().map(File::from);
    let Started { runtime, server, ends, reload } = match start(contract) {
        Ok(started) => started,
        Err(error) => {
            // Without its output, Podman shows the log.
            drop(output.and_then(|mut output| writeln!(output, "{error}")));
            return ExitCode::FAILURE;
        }
    };
    // A Podman that goes on, as a service does, waits for its end.
    drop(output);
    server.announce();
    match runtime.block_on(serve(server, ends, reload.as_ref())) {
        Ok(reason) => info!("ending: {reason}"),
        Err(error) => {
            error!(%error, "ending");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// What a started relay owns.
struct Started {
    runtime: Runtime,
    server: Server,
    ends: Ends,
    reload: Option<ReloadSocket>,
}

/// What ends it.
struct Ends {
    exit: Watched,
    stop: StopSignals,
}

/// Completes every step up to readiness.
fn start(contract: Contract) -> Result<Started, StartError> {
    let setup = |step| move |source| StartError::Setup { step, source };
    let Contract { mappings, netns, exit, ready, reload } = contract;
    // Whatever the file is, this does not wait.
    let namespace = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&netns);
    // What is wrong with it is logged, while there is a log.
    let mode = Mode::from_env();
    let bound = bind(mappings)?;
    // While there is one thread. Those that start later are inside, too.
    namespace
        .and_then(|namespace| {
            Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?)
        })
        .map_err(|source| StartError::Namespace { path: netns, source })?;
    let runtime = new_runtime().map_err(setup("create the event loop"))?;
    let entered = runtime.enter();
    let stop = StopSignals::catch(&MEANINGLESS).map_err(setup("catch signals"))?;
    let exit = watch_exit(exit).map_err(setup("watch ExitFD"))?;
    let reload = reload.map(|place| ReloadSocket::bind(&place)).transpose()?;
    let nowhere = File::options().write(true).open("/dev/null").map_err(setup("open /dev/null"))?;
    let ports = bound.iter().flat_map(|bound| &bound.ports).map(|port| port.port_mapping.clone());
    let ports: Vec<_> = ports.collect();
    let unix_sockets = reload.iter().map(ReloadSocket::path).collect();
    let needs = Needs { unix_sockets, ..Needs::to_serve(&ports) };
    let server = Server::prepared(bound, Growth::None, None).map_err(setup("watch the listeners"))?;
    server.look_at_processors();
    // Nothing reads them later: Podman ends, while this process goes on.
    let replaced = dup2_stdout(&nowhere).and_then(|()| dup2_stderr(&nowhere));
    replaced.map_err(|errno| StartError::Setup { step: "replace standard output", source: errno.into() })?;
    sandbox::confine(mode, &needs)?;
    server.start(LiveFlows::default());
    drop(entered);
    File::from(ready).write_all(READY).map_err(setup("report readiness at ReadyFD"))?;
    Ok(Started { runtime, server, ends: Ends { exit, stop }, reload })
}

/// Binds all, or none.
fn bind(mappings: Vec<Mapping>) -> Result<Vec<Bound>, BindError> {
    mappings.into_iter().map(Bound::bind).collect()
}

fn watch_exit(exit: OwnedFd) -> io::Result<Watched> {
    let flags = OFlag::from_bits_retain(fcntl(&exit, F_GETFL)?);
    fcntl(&exit, F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Watched::new(exit, Interest::READABLE)
}

/// Serves until the container ends, or a signal comes, and returns which.
async fn serve(
    mut server: Server,
    mut ends: Ends,
    reload: Option<&ReloadSocket>,
) -> Result<&'static str, ServeError> {
    let reason = loop {
        let request = async {
            match reload {
                Some(socket) => socket.next().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = until_closed(&ends.exit) => break "the container has ended",
            signal = ends.stop.next() => break signal,
            error = server.failed() => return Err(error),
            request = request => move_container(&mut server, request).await,
        }
    };
    server.abandon();
    Ok(reason)
}

/// Waits until all others have closed their end.
async fn until_closed(exit: &Watched) {
    let mut bytes = [0; 64];
    loop {
        match exit.io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, &mut bytes)?)).await {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(0) | Err(_) => return,
            Ok(_ignored) => {}
        }
    }
}

/// Sends clients to the address of a request from now on.
async fn move_container(server: &mut Server, request: Request) {
    let wanted = serde_json::from_slice::<String>(&request.packet).map_err(|error| error.to_string());
    let ip = wanted.and_then(|text| contract::child_ip(&text).map_err(|error| error.to_string()));
    let moved = match ip {
        Ok(ip) => server.move_backends(&ip.into()).await.map_err(|error| error.to_string()),
        Err(error) => Err(error),
    };
    match moved {
        Ok(()) => request.answer("OK"),
        Err(error) => {
            warn!(%error, "a request of Podman is refused");
            request.answer(&format!("{NAME}: the new address cannot be used: {}", escaped(&error)));
        }
    }
}

/// Why it cannot start; Podman shows the message to the user, after the name of the program.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error("NetNSPath {}: cannot enter this network namespace: {source}", escaped(path))]
    Namespace { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Reload(#[from] ReloadError),
    #[error(transparent)]
    Contract(#[from] ContractError),
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error("cannot {step}: {source}")]
    Setup { step: &'static str, source: io::Error },
}
