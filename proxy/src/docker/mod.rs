//! The front end for container runtimes: the command line and the descriptors of docker-proxy.
//!
//! The interface is defined by moby's `cmd/docker-proxy/main_linux.go` and its caller,
//! `daemon/libnetwork/portmapper/proxy_linux.go`: Go flags, a status pipe at descriptor 3, and, with
//! `-use-listen-fd`, the listener at descriptor 4. The runtime stops the proxy with a signal and waits
//! without a limit, so nothing is drained.

pub mod flags;
mod status;

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use nix::sys::signal::Signal;
use rproxy_sys::fd::claim_inherited;
use tokio::runtime::Runtime;
use tracing::{error, info, warn};

pub use self::flags::{UsageError, is_docker_proxy_command};
use self::status::StatusPipe;
use crate::bind::BoundPort;
use crate::bind::listen::{AdoptError, BindError, Listener};
use crate::engine::Server;
use crate::log::LogConfig;
use crate::log::console;
use crate::loops::whereabouts::Whereabouts;
use crate::loops::{LoopError, refuse_loop};
use crate::runtime::signals::StopSignals;
use crate::runtime::{new_runtime, prepare, raise_descriptor_limit};
use crate::sandbox::{self, Mode, Needs, SandboxError};
use rproxy_mapping::PortMapping;
use rproxy_mapping::addr::{AddrError, BackendAddr, Protocol};
use rproxy_mapping::escape::escaped;
use rproxy_shim::flags::Flags;

/// The descriptor of the listener for `-use-listen-fd`.
const LISTENER_FD: i32 = 4;

/// Signals that dockerd's proxies ignore. A dockerd in the foreground shares its process group with them, and
/// survives these signals as well: it reloads its configuration on `SIGHUP`.
const MEANINGLESS: [Signal; 4] = [Signal::SIGHUP, Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGALRM];

/// Runs as docker-proxy until a signal ends it. `args` exclude the program's name.
pub fn main(args: &[OsString]) -> ExitCode {
    let status = StatusPipe::claim();
    let flags = match flags::parse(args) {
        Ok(flags) => flags,
        Err(usage) => {
            console::err(&usage);
            // As in Go's flag package, a request for help is not an error.
            return if usage.is_help() { ExitCode::SUCCESS } else { ExitCode::from(2) };
        }
    };
    if flags.version {
        let (commit, version) = (env!("RPROXY_COMMIT"), env!("CARGO_PKG_VERSION"));
        console::out(&format_args!("docker-proxy (commit {commit}) version {version}"));
        return ExitCode::SUCCESS;
    }
    let inherited = flags.use_listen_fd.then(|| claim_inherited(LISTENER_FD));
    prepare(LogConfig::from_env());
    raise_descriptor_limit();
    let mode = Mode::from_env();
    let Started { runtime, mut server, mut stop, needs } = match start(&flags, inherited, mode) {
        Ok(started) => started,
        Err(error) => {
            error!(%error, "cannot start");
            report(status.failed(&error));
            return ExitCode::FAILURE;
        }
    };
    report(status.ready());
    // After readiness, so that the runtime need not wait for it, but before any client is served.
    if mode != Mode::Strict
        && let Err(error) = confine(mode, &needs, &server)
    {
        warn!(%error, "not confined");
    }
    server.announce();
    let ended = runtime.block_on(async {
        tokio::select! {
            signal = stop.next() => Ok(signal),
            error = server.failed() => Err(error),
        }
    });
    server.abandon();
    match ended {
        Ok(signal) => info!(signal, "ending"),
        Err(error) => {
            error!(%error, "ending");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// What a started proxy owns.
struct Started {
    runtime: Runtime,
    server: Server,
    stop: StopSignals,
    needs: Needs<'static>,
}

/// Completes every step that has to precede readiness.
fn start(
    flags: &Flags<'_>,
    inherited: Option<io::Result<OwnedFd>>,
    mode: Mode,
) -> Result<Started, StartError> {
    let setup = |step| move |source| StartError::Setup { step, source };
    let bound = bind(flags, inherited)?;
    let needs = Needs::to_serve([&bound.port_mapping]);
    let runtime = new_runtime().map_err(setup("create the event loop"))?;
    let entered = runtime.enter();
    let stop = StopSignals::catch(&MEANINGLESS).map_err(setup("catch signals"))?;
    let server = Server::start_port(bound).map_err(setup("watch the listener"))?;
    drop(entered);
    if mode == Mode::Strict {
        confine(mode, &needs, &server)?;
    }
    Ok(Started { runtime, server, stop, needs })
}

/// Confines the process, after counting the CPUs, whose files it can no longer read then.
fn confine(mode: Mode, needs: &Needs<'_>, server: &Server) -> Result<(), SandboxError> {
    server.look_at_processors();
    sandbox::confine(mode, needs)
}

/// Logs a failed report. If the runtime is gone, nobody reads the pipe, and a signal will follow.
fn report(written: io::Result<()>) {
    if let Err(error) = written {
        warn!(%error, "cannot write to the status pipe");
    }
}

/// Binds the host address of the flags, or adopts the passed listener.
fn bind(flags: &Flags<'_>, inherited: Option<io::Result<OwnedFd>>) -> Result<BoundPort, StartError> {
    let port_mapping = port_mapping(flags)?;
    let bound = match inherited {
        None => BoundPort::bind(port_mapping)?,
        Some(listener) => {
            let fd = listener.map_err(StartError::NoListener)?;
            let listener = Listener::adopt(fd, port_mapping.protocol).map_err(StartError::Listener)?;
            BoundPort::adopt(port_mapping, listener)
        }
    };
    refuse_loop(&bound.port_mapping, &mut Whereabouts::default())?;
    Ok(bound)
}

fn port_mapping(flags: &Flags<'_>) -> Result<PortMapping, StartError> {
    let protocol = match flags.proto {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        other => return Err(StartError::Protocol(other.to_owned())),
    };
    let port = |flag, port: i64| {
        u16::try_from(port).map_err(|_err| match port {
            -1 => StartError::MissingPort(flag),
            _ => StartError::Port { flag, port },
        })
    };
    let host_port = port("-host-port", flags.host_port)?;
    let container_port = port("-container-port", flags.container_port)?;
    let backend =
        BackendAddr::try_from(flags.container_ip.at(container_port)).map_err(StartError::Container)?;
    let port_mapping = PortMapping {
        protocol,
        host: flags.host_ip.at(host_port).into(),
        backend: backend.of_one().map_err(StartError::ContainerIp)?,
        // As Go's "tcp6": the runtime starts a separate proxy for IPv4.
        v6only: true,
    };
    Ok(port_mapping)
}

/// Why the proxy could not start; the runtime shows the message to the user.
#[derive(Debug, thiserror::Error)]
enum StartError {
    /// An unsupported protocol.
    #[error("-proto {}: this protocol is not supported; tcp, udp and sctp are", escaped(.0))]
    Protocol(String),
    /// A port that is missing; Go's default is -1.
    #[error("{0} is missing; give the port, as in {0} 80")]
    MissingPort(&'static str),
    /// A number that is not a port.
    #[error("{flag} {port}: ports are numbers from 0 to 65535")]
    Port {
        /// The flag at fault.
        flag: &'static str,
        /// Its value.
        port: i64,
    },
    /// The container's address cannot be connected to.
    #[error("-container-port: {0}")]
    Container(#[source] AddrError),
    /// The container's address is a broadcast or multicast address.
    #[error("-container-ip: {0}")]
    ContainerIp(#[source] AddrError),
    /// The mapping leads to itself.
    #[error(transparent)]
    Loop(#[from] LoopError),
    /// The host address cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Nothing is open at descriptor 4.
    #[error("-use-listen-fd: no socket was passed at descriptor 4: {0}")]
    NoListener(#[source] io::Error),
    /// Something else is open at descriptor 4.
    #[error("-use-listen-fd: descriptor 4 cannot be used: {0}")]
    Listener(#[source] AdoptError),
    /// The process cannot be confined.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The runtime cannot be set up.
    #[error("cannot {step}: {source}")]
    Setup {
        /// What was tried.
        step: &'static str,
        /// What the kernel answered.
        source: io::Error,
    },
}
