//! The start: binds the sockets or takes them over from an old process, and confines the process before it serves.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::signal::Signal;
use rproxy_mapping::addr::{BackendAddr, HostSocketAddr, Protocol};
use rproxy_mapping::backend::BackendHost;
use rproxy_mapping::endpoint::HostSpec;
use rproxy_mapping::escape::escaped;
use rproxy_mapping::host::HostAddr;
use rproxy_mapping::overlap::{OverlapError, refuse_overlap};
use rproxy_mapping::{HostPorts, Mapping, PortMapping};
use rproxy_sys::link;
use tokio::runtime::Runtime;
use tracing::{Level, debug, enabled, info};

use super::manager::{Configuration, Drain, Manager, Reload};
use crate::bind::activation::{InheritedError, InheritedSockets};
use crate::bind::family::{NO_IPV6, has_ipv6};
use crate::bind::listen::BindError;
use crate::bind::return_path::{Reported, ReturnPath, ReturnPaths};
use crate::bind::source::can_reach;
use crate::bind::unix_socket::{SocketError, UnixSocket};
use crate::bind::{Bound, BoundError, BoundPort, routes};
use crate::cli::Serve;
use crate::config::{self, ConfigError};
use crate::engine::private::{PrivateSocketError, PrivateSockets};
use crate::engine::{Growth, Server};
use crate::links::Links;
use crate::log::access::AccessLog;
use crate::log::console::Output;
use crate::log::destination::{AccessLogError, Destination};
use crate::loops::LoopError;
use crate::metrics::addr::MetricsAddr;
use crate::metrics::listener::{ListenError, MetricsListener};
use crate::names::{Names, NamesError};
use crate::plane;
use crate::plane::attachments::Attachments;
use crate::runtime::descriptors::explain;
use crate::runtime::signals::StopSignals;
use crate::runtime::{new_runtime, start_thread};
use crate::sandbox::{self, Changes, Needs, SandboxError, Sources};
use crate::state::recorder::Recorder;
use crate::state::task::LiveFlows;
use crate::systemd::{self, ActivationError};
use crate::udp::stale;
use crate::upgrade::{self, Launcher, Sockets, Upgrade, UpgradeError, take_over};

/// Stack size of the thread that writes the access log.
const LOG_STACK_SIZE: usize = 128 * 1024;
/// What errors about the control socket begin with.
const CONTROL: &str = "--control ";

/// The source of this process's listening sockets.
pub(super) enum Origin {
    /// It binds them itself, except for those passed by a service manager.
    Fresh(InheritedSockets),
    /// An upgrade: the process that still serves passes them over this socket.
    OldProcess(OwnedFd),
}

impl Origin {
    /// Claims the descriptors that were passed to this process.
    ///
    /// # Errors
    /// Why they cannot be used.
    pub(super) fn claim() -> Result<Self, StartError> {
        let passed = systemd::passed_sockets();
        match upgrade::claim()? {
            Some(channel) => Ok(Self::OldProcess(channel)),
            None => Ok(Self::Fresh(passed?)),
        }
    }
}

/// Completes every step that has to precede readiness: binds all host addresses, or none.
pub(super) fn start(
    mappings: Vec<Mapping>,
    origin: Result<Origin, StartError>,
    launcher: io::Result<Launcher>,
    options: &Serve,
) -> Result<(Runtime, Manager), StartError> {
    let origin = origin?;
    let runtime = new_runtime().map_err(setup("create the event loop"))?;
    let entered = runtime.enter();
    let mut upgrade = Upgrade::catch(launcher).map_err(setup("catch signals"))?;
    let names = Names::new(upgrade.take_names());
    let links = links(&mappings, options);
    let configuration = options.config.clone().map(|file| Configuration {
        file,
        attach: options.attach.clone(),
        metrics: options.metrics.clone(),
    });
    let access_log = options.access_log_file().map(Path::to_owned);
    let reload = is_reloaded(options).then(|| Reload::catch(configuration, access_log));
    let reload = reload.transpose().map_err(setup("catch signals"))?;
    drop(entered);
    let Started { mut server, control, metrics, attach, stop } = match origin {
        Origin::Fresh(passed) => start_fresh(&runtime, mappings, passed, Followed { names, links }, options)?,
        Origin::OldProcess(channel) => {
            start_upgraded(&runtime, &mappings, channel, Followed { names, links }, options)?
        }
    };
    server.announce();
    server.tell_interfaces();
    systemd::ready();
    let drain = Drain { timeout: options.drain_timeout, after_upgrade: options.upgrade_drain_timeout() };
    let watchdog = systemd::watchdog_interval();
    Ok((runtime, Manager { server, stop, drain, control, metrics, attach, reload, watchdog, upgrade }))
}

/// What mappings may follow.
struct Followed {
    names: Names,
    links: Links,
}

/// The addresses of interfaces, if mappings may have some.
fn links(mappings: &[Mapping], options: &Serve) -> Links {
    if may_change(options) || follow_interfaces(mappings.iter()) {
        Links::new(sandbox::without_net_admin(link::open))
    } else {
        Links::default()
    }
}

/// Whether some of these mappings listen at the addresses of interfaces.
fn follow_interfaces<'m>(mut mappings: impl Iterator<Item = &'m Mapping>) -> bool {
    mappings.any(|mapping| mapping.interface().is_some())
}

/// Has mappings listen where their interfaces have addresses now.
fn locate(mappings: &mut [Mapping], links: &mut Links) -> Result<(), StartError> {
    if follow_interfaces(mappings.iter()) {
        links.look().map_err(StartError::Interfaces)?;
        mappings.iter_mut().for_each(|mapping| *mapping = links.located(mapping));
        refuse_overlap(mappings)?;
    }
    Ok(())
}

/// What a started process owns.
struct Started {
    server: Server,
    control: Option<UnixSocket>,
    metrics: Option<MetricsListener>,
    attach: Option<Attachments>,
    stop: StopSignals,
}

/// Binds the mappings, of the configuration if there is one, and prints where they listen.
fn start_fresh(
    runtime: &Runtime,
    mappings: Vec<Mapping>,
    passed: InheritedSockets,
    mut followed: Followed,
    options: &Serve,
) -> Result<Started, StartError> {
    let entered = runtime.enter();
    let config = options.config.as_deref().map(config::read).transpose()?;
    let attach = options.attach_options(config.as_ref());
    let metrics = options.metrics_addr(config.as_ref()).cloned();
    let mut mappings = config.map_or(mappings, |config| config.mappings);
    // Only now: reading a pipe may take long, and until then signals end this process at once.
    let mut stop = catch_stop_signals(options)?;
    if let (Some(control), Some(MetricsAddr::Unix(path))) = (options.control.as_deref(), &metrics)
        && control == path
    {
        return Err(StartError::OnePath(path.clone()));
    }
    let control = options.control.as_deref().map(|path| UnixSocket::bind(CONTROL, path)).transpose()?;
    let metrics = metrics.map(MetricsListener::bind).transpose()?;
    let attach = attach.map(Attachments::bind).transpose()?;
    drop(entered);
    let private = private_sockets(options, metrics.as_ref());
    mappings.iter().try_for_each(|mapping| private.refuse(mapping.backend()).map_err(StartError::Private))?;
    runtime.block_on(unless_stopped(followed.names.resolve(&mut mappings), &mut stop))??;
    locate(&mut mappings, &mut followed.links)?;
    let _entered = runtime.enter();
    let bound = Bound::bind_all(mappings, passed);
    let bound = bound.map_err(|error| bind_error(error, metrics.as_ref(), options))?;
    // Only now it is known which addresses lead back.
    followed.names.refuse_unresolved_of(bound.iter().map(|bound| &bound.mapping))?;
    stale::forget_flows_to(bound.iter().flat_map(|bound| &bound.ports).map(|port| &port.port_mapping));
    let ready = ready_lines(&bound);
    // Before confinement, because a terminal has to be reopened.
    let output = Output::open();
    let mut server = prepare_server(bound, attach.is_some(), metrics.as_ref(), followed, options)?;
    server.private = private;
    server.start(LiveFlows::default());
    match server.access_log() {
        // Its lines follow, and are not mixed with these.
        Some(log) if options.access_log == Some(Destination::Output) => log.begin(output.write_now(&ready)),
        log => {
            output.write(runtime.handle(), &ready);
            log.iter().for_each(|log| log.begin(Vec::new()));
        }
    }
    Ok(Started { server, control, metrics, attach, stop })
}

/// Takes over the mappings, sockets and flows of the process at the other end of `channel`, which continues
/// to serve if this fails.
fn start_upgraded(
    runtime: &Runtime,
    mappings: &[Mapping],
    channel: OwnedFd,
    mut followed: Followed,
    options: &Serve,
) -> Result<Started, StartError> {
    let entered = runtime.enter();
    let mut stop = catch_stop_signals(options)?;
    let fixed = (!may_change(options)).then_some(mappings);
    let Sockets { mut bound, mut control, mut metrics, attach, old } =
        runtime.block_on(take_over(channel, fixed, options.control.as_deref()))?;
    // A name that does not resolve now did so for the old process, perhaps.
    runtime.block_on(unless_stopped(followed.names.resolve_bound(&mut bound), &mut stop))?;
    if follow_interfaces(bound.iter().map(|bound| &bound.mapping)) {
        // Mappings stay where the old process has them until this one serves.
        followed.links.look().map_err(StartError::Interfaces)?;
    }
    let mut server = prepare_server(bound, attach.is_some(), metrics.as_ref(), followed, options)?;
    server.private = private_sockets(options, metrics.as_ref());
    drop(entered);
    server.access_log().iter().for_each(|log| log.begin(Vec::new()));
    server.succeed(runtime.block_on(old.hand_over_to(&server))?);
    control.iter_mut().for_each(UnixSocket::own);
    metrics.iter_mut().for_each(MetricsListener::own);
    Ok(Started { server, control, metrics, attach, stop })
}

/// Waits for a step of the start, or for a signal that ends this process first.
async fn unless_stopped<T>(step: impl Future<Output = T>, stop: &mut StopSignals) -> Result<T, StartError> {
    tokio::select! {
        biased;
        signal = stop.next() => {
            info!(signal, "ending, before anything was served");
            Err(StartError::Stopped)
        }
        result = step => Ok(result),
    }
}

fn catch_stop_signals(options: &Serve) -> Result<StopSignals, StartError> {
    let hang_up = if is_reloaded(options) { &[][..] } else { &[Signal::SIGHUP] };
    let meaningless = [hang_up, &[Signal::SIGUSR1, Signal::SIGALRM]].concat();
    StopSignals::catch(&meaningless).map_err(setup("catch signals"))
}

/// Whether there is a file that `SIGHUP` has this process read or open again.
fn is_reloaded(options: &Serve) -> bool {
    options.config.is_some() || options.access_log_file().is_some()
}

/// Whether the requested mappings may change later.
pub(super) fn may_change(options: &Serve) -> bool {
    options.control.is_some() || options.config.is_some()
}

/// Completes every step that can fail before `bound` is served, and confines the process. `attaches` says whether
/// ports can be attached.
fn prepare_server(
    bound: Vec<Bound>,
    attaches: bool,
    metrics: Option<&MetricsListener>,
    followed: Followed,
    options: &Serve,
) -> Result<Server, StartError> {
    if !has_ipv6() && options.mappings.is_everywhere() {
        info!("{NO_IPV6}");
    }
    let mut reported = Reported::default();
    for Bound { mapping, ports, .. } in &bound {
        let backend = ports.first().map(|port| &port.port_mapping.backend);
        let backend = backend.filter(|backend| backend.is_routed()).map(BackendAddr::socket_addr);
        let Some(backend) = backend else { continue };
        match ReturnPath::of(mapping.limits(), backend) {
            Some(path) => reported.report(&mapping.name(), path.interface_without()),
            None => reported.report_source(&mapping.name(), can_reach(mapping.limits(), backend)),
        }
    }
    let files: Vec<PathBuf> = bound.iter().flat_map(Bound::files).map(Path::to_owned).collect();
    let needs = needs(options, attaches, metrics, &bound, &files);
    let growth = if attaches {
        Growth::Attached
    } else if needs.changes.is_some() {
        Growth::Mappings
    } else {
        Growth::None
    };
    let sink = options.access_log.as_ref().map(Destination::open).transpose()?;
    let access_log = sink.is_some().then(|| Arc::new(AccessLog::new(options.access_log_format())));
    // A debug line says how long a connection lasted.
    let asked = options.control.is_some() || metrics.is_some() || enabled!(Level::DEBUG);
    let recorder = (asked || access_log.is_some()).then(|| Recorder::new(access_log.clone(), asked));
    let server = Server::prepared(bound, growth, recorder.map(Arc::new));
    let mut server = server.map_err(setup("watch the listeners"))?;
    server.registry.return_paths = Box::new(ReturnPaths { reported, ..ReturnPaths::default() });
    (server.names, server.links) = (followed.names, followed.links);
    server.look_at_processors();
    if let Some(user) = &options.user {
        for error in server.udp_sockets().filter_map(|socket| user.own(socket).err()) {
            debug!(%error, %user, "cannot make the user own a UDP listener, whose clients share its send buffer");
        }
    }
    if needs.sources.clients || needs.changes.is_some() {
        routes::open();
    }
    sandbox::confine(options.sandbox, &needs)?;
    if let (Some(access_log), Some(sink)) = (access_log, sink) {
        let writer = start_thread("rproxy-log", LOG_STACK_SIZE, access_log.writer(sink), |write| write());
        writer.map_err(|(source, _writer)| setup("start the thread of the access log")(source))?;
    }
    Ok(server)
}

fn setup(step: &'static str) -> impl FnOnce(io::Error) -> StartError {
    move |source| StartError::Setup { step, source }
}

/// The sockets of this process that are for its own user.
fn private_sockets(options: &Serve, metrics: Option<&MetricsListener>) -> PrivateSockets {
    let control = options.control.as_deref();
    PrivateSockets::at(control.into_iter().chain(metrics.and_then(MetricsListener::path)))
}

/// What serving `bound`, and possible changes, need after confinement.
fn needs<'a>(
    options: &'a Serve,
    attaches: bool,
    metrics: Option<&'a MetricsListener>,
    bound: &[Bound],
    files: &'a [PathBuf],
) -> Needs<'a> {
    let configuration = options.config.as_deref();
    // What an interface gets later is bound then.
    let follows = follow_interfaces(bound.iter().map(|bound| &bound.mapping));
    let changes = (attaches || follows || may_change(options)).then_some(Changes { configuration });
    let own = options.control.as_deref().into_iter().chain(metrics.and_then(MetricsListener::path));
    let ports = bound.iter().flat_map(|bound| &bound.ports).map(|port| &port.port_mapping);
    Needs {
        user: options.user.as_ref(),
        log_file: options.access_log_file().is_some(),
        log_socket: matches!(options.access_log, Some(Destination::Socket(_))),
        abstract_sockets: systemd::is_abstract(),
        changes,
        unix_sockets: own.collect(),
        unix_host_files: files,
        metrics: metrics.is_some(),
        sources: Sources::of(bound.iter().map(|bound| bound.mapping.limits())),
        timers: bound.iter().any(|bound| bound.mapping.limits().has_timers()),
        dscp: bound.iter().any(|bound| bound.mapping.limits().dscp.is_some()),
        ..Needs::to_serve(ports)
    }
}

/// The output for `bound` in the format of `docker port`: `80/tcp -> 0.0.0.0:49153`, and for a range
/// `80-90/tcp -> 0.0.0.0:8000-8010`.
fn ready_lines(bound: &[Bound]) -> Vec<String> {
    bound.iter().flat_map(ready_lines_of).collect()
}

fn ready_lines_of(bound: &Bound) -> Vec<String> {
    let mapping = &bound.mapping;
    match mapping.host_ports() {
        HostPorts::Exactly(range) if bound.is_where_asked() => {
            let backend_ports = mapping.backend_ports();
            let line = |host: &HostAddr| {
                let host = HostSpec { host: host.clone(), ports: Some(range) };
                let of_protocol = move |protocol| match mapping.backend() {
                    BackendHost::Unix(addr) => format!("{addr} -> {host}"),
                    _ => format!("{backend_ports}/{protocol} -> {host}"),
                };
                mapping.protocols().iter().map(of_protocol)
            };
            match mapping.addresses() {
                // A Unix socket has none, and the interface has none yet.
                [] => line(mapping.host()).collect(),
                addresses => addresses.iter().flat_map(|ip| line(&(*ip).into())).collect(),
            }
        }
        _ => {
            let line = |port: &BoundPort| {
                let PortMapping { backend, protocol, host, .. } = &port.port_mapping;
                match backend.unix_addr() {
                    Some(addr) => format!("{addr} -> {host}"),
                    None => format!("{}/{protocol} -> {host}", backend.socket_addr().port()),
                }
            };
            bound.ports.iter().map(line).collect()
        }
    }
}

/// Names the command-line option of a port that cannot be bound.
fn bind_error(error: BoundError, metrics: Option<&MetricsListener>, options: &Serve) -> StartError {
    match error {
        BoundError::InheritedSockets(source) => StartError::InheritedSockets(source),
        BoundError::Loop(source) => StartError::Loop(source),
        BoundError::Bind(source) => {
            let own = metrics.map(MetricsListener::bound).filter(|metrics| is_taken_by(metrics, &source));
            let (asked, freebind) = match &options.config {
                Some(file) => (format!("--config {}:", escaped(file)), "freebind = true"),
                None => {
                    let words = options.mappings.words_for(&source.addr);
                    (words.to_owned(), "--freebind")
                }
            };
            match own {
                Some(metrics) => StartError::OwnMetrics { asked, at: source.addr.clone(), metrics },
                None => StartError::Bind { asked, source, freebind },
            }
        }
    }
}

/// Whether the port that cannot be bound is the one where this process serves its metrics.
fn is_taken_by(metrics: &MetricsAddr, error: &BindError) -> bool {
    let MetricsAddr::Tcp(metrics) = metrics else { return false };
    let Some(addr) = error.addr.inet_addr() else { return false };
    let [own, asked] = [metrics.ip(), addr.ip()].map(|ip| ip.to_canonical());
    error.source.kind() == io::ErrorKind::AddrInUse
        && error.protocol == Protocol::Tcp
        && metrics.port() == addr.port()
        && (own == asked || own.is_unspecified() || asked.is_unspecified())
}

/// Why the start failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    #[error("a signal has ended the start")]
    Stopped,
    #[error("{asked} {}: {}{}", source.requested(), source.reason(), source.hint(freebind))]
    Bind { asked: String, source: BindError, freebind: &'static str },
    #[error("{asked} {at}: --metrics {metrics} takes this tcp port; give one of the two another port")]
    OwnMetrics { asked: String, at: HostSocketAddr, metrics: MetricsAddr },
    #[error("--metrics unix:{}: --control has the same path; give one of the two another path", escaped(.0))]
    OnePath(PathBuf),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Names(#[from] NamesError),
    #[error("cannot find out what addresses interfaces have: {0}; write addresses in their place")]
    Interfaces(#[source] io::Error),
    #[error("{}: {_0}", .0.mapping.name())]
    Overlap(#[from] OverlapError),
    /// A mapping leads to a socket that is for the user of this process.
    #[error(transparent)]
    Private(PrivateSocketError),
    #[error(transparent)]
    InheritedSockets(InheritedError),
    #[error(transparent)]
    Loop(LoopError),
    #[error(transparent)]
    Activation(#[from] ActivationError),
    #[error(transparent)]
    Control(#[from] SocketError),
    #[error(transparent)]
    Metrics(#[from] ListenError),
    #[error(transparent)]
    Attach(#[from] plane::socket::SocketError),
    #[error(transparent)]
    Upgrade(#[from] UpgradeError),
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error(transparent)]
    AccessLog(#[from] AccessLogError),
    #[error("cannot {step}: {}", explain(source, 1))]
    Setup { step: &'static str, source: io::Error },
}
