//! The manager owns the server, and handles signals and the requests of control clients.
//!
//! It has its own thread if there is anything to manage, so that binding ten thousand sockets or parsing a
//! long configuration does not delay traffic. If no thread can be created, it runs on that of the first
//! worker.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::pin::pin;
use std::time::Duration;

use nix::sys::signal::Signal;
use rproxy_mapping::escape::escaped;
use rproxy_sys::memory::release_unused;
use rproxy_sys::watch::Watched;
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, Interval, sleep, sleep_until};
use tracing::{debug, error, info, warn};

use crate::bind::return_path::ReturnPath;
use crate::bind::source::can_reach;
use crate::bind::unix_socket::{HeldSocket, UnixSocket};
use crate::config::{self, Config};
use crate::control::clients::{self, Call};
use crate::control::requests::answer;
use crate::engine::change::Changed;
use crate::engine::change_error::ChangeError;
use crate::engine::old_processes::LeftConnections;
use crate::engine::{Event, ServeError, Server};
use crate::log::destination;
use crate::metrics::addr::MetricsAddr;
use crate::metrics::endpoint::{Endpoint, Queries};
use crate::metrics::listener::MetricsListener;
use crate::metrics::source::Query;
use crate::plane::AttachOptions;
use crate::plane::attachments::{Attachments, Plane, Ready};
use crate::runtime::descriptors::explain;
use crate::runtime::signals::{Signals, StopSignals};
use crate::runtime::spare::Spare;
use crate::runtime::{new_runtime, start_thread};
use crate::systemd;
use crate::upgrade::{Owned, Reopened, Upgrade};

/// The maximum number of queued requests.
const CALLS: usize = 4;

/// Stack size of the manager's thread, which parses recursively.
const STACK_SIZE: usize = 1024 * 1024;

/// What `SIGHUP` reads or opens again.
pub struct Reload {
    signal: Signals,
    /// The configuration, if there is one.
    configuration: Option<Configuration>,
    /// The file of the access log, if there is one.
    access_log: Option<PathBuf>,
    /// For opening them when all other descriptors are used: a request to the launcher takes two.
    spares: [Spare; 2],
}

/// A configuration file.
pub struct Configuration {
    /// Its path.
    pub file: PathBuf,
    /// `--attach`, and its name.
    pub attach: Option<Option<String>>,
    /// `--metrics`.
    pub metrics: Option<MetricsAddr>,
}

impl Reload {
    /// Starts to catch the signal. Call it before a file is read for the first time, so that no change is missed.
    ///
    /// # Errors
    /// Those of [`Signals::catch`].
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn catch(configuration: Option<Configuration>, access_log: Option<PathBuf>) -> io::Result<Self> {
        let spares = [Spare::of(&io::stderr()), Spare::of(&io::stderr())];
        let signal = Signals::catch([Signal::SIGHUP])?;
        Ok(Self { signal, configuration, access_log, spares })
    }

    fn is_configured(&self) -> bool {
        self.configuration.is_some()
    }
}

/// How long connections may continue once no new ones are accepted.
#[derive(Clone, Copy, Debug)]
pub struct Drain {
    /// After a signal, or at a client's request.
    pub timeout: Duration,
    /// After an upgrade, if there is a limit.
    pub after_upgrade: Option<Duration>,
}

/// What a manager owns.
pub struct Manager {
    /// The server.
    pub server: Server,
    /// The signals that end it.
    pub stop: StopSignals,
    /// The limits of the drain that follows.
    pub drain: Drain,
    /// The control socket, if there is one.
    pub control: Option<UnixSocket>,
    /// Where metrics are served, if they are.
    pub metrics: Option<MetricsListener>,
    /// Where shims attach ports, if they can.
    pub attach: Option<Attachments>,
    /// The source of reloads, if there is one.
    pub reload: Option<Reload>,
    /// How often to notify the watchdog of the service manager, if enabled.
    pub watchdog: Option<Duration>,
    /// Handles upgrades.
    pub upgrade: Upgrade,
}

impl Manager {
    /// Runs until a signal or a client ends it. If there is more to do than waiting for signals, it runs on
    /// its own thread if one can be created.
    ///
    /// # Errors
    /// [`ServeError`]
    pub async fn run(self) -> Result<(), ManageError> {
        let is_alone = self.control.is_none() && self.metrics.is_none() && self.attach.is_none();
        let is_followed = !self.server.names.is_empty() || !self.server.links.is_idle();
        if is_alone && self.reload.is_none() && !is_followed {
            return Box::pin(self.manage()).await;
        }
        let runtime = match new_runtime() {
            Ok(runtime) => runtime,
            Err(error) => return Box::pin(self.manage_beside_clients(&error)).await,
        };
        let (ended, end) = oneshot::channel();
        let manage = move |(runtime, manager): (Runtime, Self)| {
            // The receiver may be gone.
            ended.send(runtime.block_on(manager.manage())).ok();
        };
        if let Err((error, (runtime, manager))) =
            start_thread("rproxy-control", STACK_SIZE, (runtime, self), manage)
        {
            // A blocking shutdown would panic here.
            runtime.shutdown_background();
            return Box::pin(manager.manage_beside_clients(&error)).await;
        }
        // A panic has been reported already.
        end.await.unwrap_or(Err(ManageError::Gone))
    }

    /// Manages on the thread of the first worker, whose clients are delayed by large changes.
    async fn manage_beside_clients(self, error: &io::Error) -> Result<(), ManageError> {
        warn!(%error, "cannot start the control thread; the first worker does its work, and large changes delay its clients");
        Box::pin(self.manage()).await
    }

    async fn manage(self) -> Result<(), ManageError> {
        let Self { server, stop, drain, control, metrics, attach, reload, watchdog, upgrade } = self;
        let plane = attach.map(Plane::new).transpose().map_err(ManageError::Attach)?.map(Box::new);
        let watchdog = watchdog.map(tokio::time::interval);
        let (calls, called) = mpsc::channel(CALLS);
        let control = control.map(UnixSocket::into_held).transpose().map_err(ManageError::Control)?;
        let control = control.map(|(listener, held)| {
            tokio::spawn(serve_clients(listener, calls.clone()));
            held
        });
        let metrics = metrics
            .map(|listener| {
                Endpoint::start(
                    listener,
                    calls,
                    reload.as_ref().is_some_and(Reload::is_configured),
                    plane.is_some(),
                )
            })
            .transpose();
        let metrics = metrics.map_err(ManageError::Metrics)?;
        let mut managed =
            Managed { server, stop, control, called, metrics, plane, reload, watchdog, upgrade };
        let recorder = managed.server.recorder().cloned();
        let ended = managed.until_ended().await;
        if let Ok(succeeded) = ended {
            // On the heap, as it would make the future larger than all that comes before.
            Box::pin(managed.end(drain, succeeded)).await;
        }
        recorder.iter().for_each(|recorder| recorder.finish());
        ended.map(drop)
    }
}

/// What a running manager owns.
struct Managed {
    server: Server,
    stop: StopSignals,
    control: Option<HeldSocket>,
    called: mpsc::Receiver<Call>,
    metrics: Option<Endpoint>,
    plane: Option<Box<Plane>>,
    reload: Option<Reload>,
    watchdog: Option<Interval>,
    upgrade: Upgrade,
}

impl Managed {
    /// Manages until the process has to end. Returns whether another process has taken over.
    async fn until_ended(&mut self) -> Result<bool, ManageError> {
        let Self { server, stop, control, called, metrics, plane, reload, watchdog, upgrade } = self;
        loop {
            if !server.registry.return_paths.to_look_up.is_empty() {
                Box::pin(look_up(upgrade, server)).await;
            }
            let parked = server.parked_until();
            tokio::select! {
                biased;
                signal = stop.next() => {
                    info!(signal, "ending; a second signal ends at once");
                    return Ok(false);
                }
                event = server.event() => match event? {
                    Event::NamesChanged(hosts) => Box::pin(server.follow(&hosts)).await,
                    Event::AddressesChanged => Box::pin(server.follow_interfaces()).await,
                },
                () = hung_up(reload) => {
                    let addr = metrics.as_ref().map(|metrics| &metrics.socket.addr);
                    let reloaded = reload_all(reload.as_ref(), upgrade, server, plane.as_deref_mut(), addr);
                    let Some(applied) = or_stopped(Box::pin(reloaded), stop).await else { return Ok(false) };
                    let queries = queries_of(metrics).into_iter();
                    queries.zip(applied).for_each(|(queries, applied)| queries.reloaded(applied));
                }
                () = upgrade.asked() => {
                    let (control, plane) = (control.as_ref(), plane.as_deref());
                    let (socket, mut queries) = metrics.as_mut().map(Endpoint::split).unzip();
                    queries.iter_mut().for_each(|queries| queries.upgrading(false));
                    let attempt = upgrade.attempt(Owned { server, control, metrics: socket, plane });
                    match unless_stopped(attempt, server, stop, watchdog, &mut queries).await {
                        Attempt::Failed => queries.iter_mut().for_each(|queries| queries.upgrading(true)),
                        Attempt::Succeeded => return Ok(true),
                        Attempt::Stopped => return Ok(false),
                    }
                }
                () = tick(watchdog) => tell_alive(server).await,
                never = systemd::resend() => never,
                Some(call) = called.recv() => {
                    let answer = Box::pin(answer(call, server));
                    let Some(false) = or_stopped(answer, stop).await else { return Ok(false) };
                }
                (queries, query) = next_query(queries_of(metrics)) => queries.answer(query, Some(server)),
                ready = ready(plane) => {
                    Box::pin(serve_shim(ready, plane, server)).await.map_err(ManageError::Attach)?;
                }
                () = at(parked) => server.end_parked(),
            }
        }
    }

    /// Lets connections and flows finish. If another process has `succeeded` this one, it has all sockets.
    async fn end(self, drain: Drain, succeeded: bool) {
        let Self { mut server, stop, control, called, mut metrics, plane, reload, watchdog: _, upgrade } =
            self;
        // Shims look for another process from here on, unless it has them already.
        drop(plane);
        if succeeded {
            server.leave();
            control.into_iter().for_each(|mut control| control.leave());
            metrics.take().into_iter().for_each(Endpoint::leave);
        } else {
            systemd::stopping();
            drop(control);
            queries_of(&mut metrics).into_iter().for_each(|queries| queries.drain(&server));
            server.release_attached().await;
        }
        // No client is admitted from here on.
        drop(called);
        let draining = Draining { reload, upgrade, metrics };
        Box::pin(finish(server, stop, drain, succeeded, draining)).await;
    }
}

/// What a draining process still handles.
struct Draining {
    reload: Option<Reload>,
    upgrade: Upgrade,
    /// It answers until the end, unless another process does.
    metrics: Option<Endpoint>,
}

impl Draining {
    /// Logs that signals which ask for a change come too late, and answers queries. Never returns.
    async fn handle(&mut self) -> ! {
        let Self { reload, upgrade, metrics } = self;
        loop {
            let signal = tokio::select! {
                () = hung_up(reload) => Signal::SIGHUP,
                () = upgrade.asked() => Signal::SIGUSR2,
                (queries, query) = next_query(queries_of(metrics)) => {
                    queries.answer(query, None);
                    continue;
                }
            };
            warn!("{signal} is ignored: this process is draining");
        }
    }
}

/// Lets connections and flows finish, within limits.
async fn finish(
    server: Server,
    mut stop: StopSignals,
    drain: Drain,
    succeeded: bool,
    mut draining: Draining,
) {
    let (left, successor) = (server.left_connections(), draining.upgrade.take_successor());
    tokio::select! {
        () = server.drain(enough(drain, &mut stop, succeeded)) => {}
        never = serve_successor(&left, successor) => never,
        never = systemd::resend() => never,
        never = draining.handle() => never,
    }
    if succeeded {
        // Until it is notified of the other process, the service manager takes the end of this one for the
        // end of the service, and would kill all of its processes.
        tokio::select! {
            () = systemd::until_told() => {}
            signal = stop.next() => info!(signal, "ending, although the service manager was not notified of the new process"),
        }
    }
}

/// Resets connections to ports that are unpublished, for the process that has taken over. Never returns.
async fn serve_successor(left: &LeftConnections, successor: Option<Watched>) -> ! {
    match successor {
        Some(channel) => left.serve(&channel).await,
        None => std::future::pending().await,
    }
}

/// Waits until a drain has to end, and returns the reason. If another process has `succeeded` this one, no
/// signal has asked for the drain. The first signal then limits it to the usual timeout.
async fn enough(drain: Drain, stop: &mut StopSignals, succeeded: bool) -> &'static str {
    const LATE: &str = "drain timeout";

    if succeeded {
        tokio::select! {
            () = passed(drain.after_upgrade) => return LATE,
            signal = stop.next() => info!(signal, "ending; a second signal ends at once"),
        }
    }
    tokio::select! {
        () = sleep(drain.timeout) => LATE,
        signal = stop.next() => {
            info!(signal, "ending at once");
            "asked for"
        }
    }
}

/// Waits for a limit; forever if there is none.
async fn passed(limit: Option<Duration>) {
    match limit {
        Some(limit) => sleep(limit).await,
        None => std::future::pending().await,
    }
}

async fn serve_clients(listener: UnixListener, calls: mpsc::Sender<Call>) {
    if let Err(error) = clients::serve(listener, calls).await {
        error!(%error, "the control socket is not served any more");
    }
}

/// Waits for a change, or returns `None` if a signal ends this process first. The change is then either not
/// made at all or complete, which no longer matters.
async fn or_stopped<T>(change: impl Future<Output = T>, stop: &mut StopSignals) -> Option<T> {
    tokio::select! {
        biased;
        signal = stop.next() => {
            info!(signal, "ending, nothing was changed; a second signal ends at once");
            None
        }
        result = change => Some(result),
    }
}

/// The outcome of an upgrade.
enum Attempt {
    /// This process continues to serve.
    Failed,
    /// Another process has taken over.
    Succeeded,
    /// A signal ends this process first.
    Stopped,
}

/// Waits for the outcome of an upgrade.
async fn unless_stopped(
    attempt: impl Future<Output = bool>,
    server: &Server,
    stop: &mut StopSignals,
    watchdog: &mut Option<Interval>,
    queries: &mut Option<&mut Queries>,
) -> Attempt {
    let mut attempt = pin!(attempt);
    loop {
        tokio::select! {
            biased;
            succeeded = &mut attempt => return if succeeded { Attempt::Succeeded } else { Attempt::Failed },
            signal = stop.next() => {
                info!(signal, "ending, not upgraded; a second signal ends at once");
                return Attempt::Stopped;
            }
            () = tick(watchdog) => tell_alive(server).await,
            (queries, query) = next_query(queries.as_deref_mut()) => queries.answer(query, Some(server)),
        }
    }
}

/// Notifies the watchdog once the server responds.
async fn tell_alive(server: &Server) {
    server.until_responsive().await;
    systemd::alive();
}

async fn hung_up(reload: &mut Option<Reload>) {
    match reload {
        Some(reload) => {
            if let Err(error) = reload.signal.next().await {
                error!(%error, "cannot read signals; reloads are no longer possible");
                std::future::pending().await
            }
        }
        None => std::future::pending().await,
    }
}

/// The queries about metrics, if those are served.
fn queries_of(metrics: &mut Option<Endpoint>) -> Option<&mut Queries> {
    metrics.as_mut().map(|metrics| &mut metrics.queries)
}

/// Waits for a query; forever if no metrics are served.
async fn next_query(queries: Option<&mut Queries>) -> (&mut Queries, Query) {
    match queries {
        Some(queries) => {
            let query = queries.next().await;
            (queries, query)
        }
        None => std::future::pending().await,
    }
}

/// Waits until a shim is ready; forever if there are none.
async fn ready(plane: &mut Option<Box<Plane>>) -> io::Result<Ready> {
    match plane {
        Some(plane) => plane.ready().await,
        None => std::future::pending().await,
    }
}

/// Serves the shim that is ready.
async fn serve_shim(
    ready: io::Result<Ready>,
    plane: &mut Option<Box<Plane>>,
    server: &mut Server,
) -> io::Result<()> {
    let ready = ready?;
    if let Some(plane) = plane {
        plane.handle(ready, server).await;
    }
    Ok(())
}

/// Looks up whether backends are reached from given addresses, and whether their answers to clients come back. Reports
/// where they do not.
async fn look_up(upgrade: &mut Upgrade, server: &mut Server) {
    for (name, policy, backend) in server.registry.take_to_look_up() {
        let Some(path) = ReturnPath::of(&policy.limits, backend) else {
            let found = can_reach(&policy.limits, backend);
            server.registry.return_paths.reported.report_source(&name, found);
            continue;
        };
        let found = match upgrade.look_up(&path).await {
            Ok(found) => found,
            // Only a process that is not confined can find out then.
            Err(no_launcher) => match path.interface_without() {
                Ok(found) => Ok(found),
                Err(error) => {
                    debug!(%name, %no_launcher, %error, "cannot find out whether answers to clients come back");
                    continue;
                }
            },
        };
        server.registry.return_paths.reported.report(&name, found);
    }
}

/// Waits until a time; forever if there is none.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

async fn tick(interval: &mut Option<Interval>) {
    match interval {
        Some(interval) => drop(interval.tick().await),
        None => std::future::pending().await,
    }
}

/// Opens the access log and reads the configuration again.
async fn reload_all(
    reload: Option<&Reload>,
    upgrade: &mut Upgrade,
    server: &mut Server,
    plane: Option<&mut Plane>,
    metrics: Option<&MetricsAddr>,
) -> Option<bool> {
    let Reload { configuration, access_log, spares, .. } = reload?;
    systemd::reloading();
    for spare in spares {
        spare.release();
    }
    server.names.renew_all();
    if let (Some(path), Some(log)) = (access_log, server.access_log()) {
        log.release_reserve();
        match open_again(Reopened::AccessLog, upgrade, || destination::open_file(path)).await {
            Ok(file) => log.reopen(file),
            Err(error) => {
                error!(path = %escaped(path), %error, "the access log stays as it is: cannot open it again")
            }
        }
    }
    let applied = match configuration {
        Some(configuration) => Some(Box::pin(reread(configuration, upgrade, server, plane, metrics)).await),
        None => None,
    };
    spares.iter().for_each(|spare| spare.refill(|| io::stderr().as_fd().try_clone_to_owned().ok()));
    systemd::ready();
    applied
}

/// Has the launcher open a file, or opens it `here` without one.
async fn open_again(
    which: Reopened,
    upgrade: &mut Upgrade,
    here: impl FnOnce() -> io::Result<File>,
) -> io::Result<File> {
    match upgrade.reopen(which).await {
        Ok(opened) => opened,
        Err(error) => {
            debug!(%error, "this process opens the file itself");
            here().map_err(without_launcher)
        }
    }
}

/// Explains the error of a confined process that has no launcher any more: a call that it may not make is an unknown one.
fn without_launcher(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(nix::libc::ENOSYS) => io::Error::other(
            "the launcher, which opens files for this confined process, is gone; restart rproxy",
        ),
        _ => error,
    }
}

/// Reloads the configuration; an error changes nothing. Returns whether it is applied.
async fn reread(
    configuration: &Configuration,
    upgrade: &mut Upgrade,
    server: &mut Server,
    plane: Option<&mut Plane>,
    metrics: Option<&MetricsAddr>,
) -> bool {
    let file = &configuration.file;
    let opened = open_again(Reopened::Configuration, upgrade, || config::open(file)).await;
    let applied = match config::read_again(file, opened) {
        Ok(config) => {
            let applied = apply(config, configuration, server, plane, metrics).await;
            applied.map_err(|error| error.with_hint())
        }
        Err(error) => Err(error.to_string()),
    };
    // The memory that planning needed is not needed any more.
    release_unused();
    let is_applied = applied.is_ok();
    match applied {
        Ok(Changed { added, changed, removed, unchanged }) => {
            info!(added, changed, removed, unchanged, "configuration reloaded");
            server.registry.look_all_up();
        }
        Err(errors) => {
            for error in errors.lines() {
                error!(error, "not reloaded; nothing has changed");
            }
        }
    }
    is_applied
}

/// Serves what a configuration says from now on. Metrics are served at `metrics`, if they are.
async fn apply(
    config: Config,
    configuration: &Configuration,
    server: &mut Server,
    plane: Option<&mut Plane>,
    metrics: Option<&MetricsAddr>,
) -> Result<Changed, ReloadError> {
    let wanted_metrics = configuration.metrics.as_ref().or(config.metrics.as_ref());
    if metrics != wanted_metrics {
        return Err(ReloadError::metrics(metrics, wanted_metrics));
    }
    let wanted = config.attach_options(configuration.attach.as_ref().map(Option::as_deref));
    match (plane.as_deref().map(Plane::options), &wanted) {
        (None, Some(_)) => return Err(ReloadError::AttachOn),
        (Some(_), None) => return Err(ReloadError::AttachOff),
        (Some(AttachOptions { name: now, .. }), Some(AttachOptions { name, .. })) if now != name => {
            return Err(ReloadError::AttachName { now: now.clone(), wanted: name.clone() });
        }
        _ => {}
    }
    let limits = wanted.as_ref().map(AttachOptions::effective_limits);
    let changed = server.apply_with_attached(config.mappings, limits.as_ref()).await?;
    if let (Some(plane), Some(wanted)) = (plane, wanted) {
        plane.set_options(wanted);
    }
    Ok(changed)
}

/// Why a configuration cannot be applied.
#[derive(Debug, thiserror::Error)]
enum ReloadError {
    #[error(
        "attach: this process was started without it, and an upgrade (SIGUSR2) starts one like it; restart rproxy to \
         serve attached ports"
    )]
    AttachOn,
    #[error(
        "attach: the configuration has it no longer, and ports may be attached to this process; restart rproxy to stop \
         serving them"
    )]
    AttachOff,
    #[error(
        "attach.name: shims are connected to {}, which an upgrade (SIGUSR2) keeps; restart rproxy to change it to {}",
        escaped(now),
        escaped(wanted)
    )]
    AttachName { now: String, wanted: String },
    #[error(
        "metrics: they are served {now}, and the socket for that is bound at the start and kept in an upgrade (SIGUSR2); \
         restart rproxy to serve them {wanted}"
    )]
    Metrics { now: String, wanted: String },
    #[error(transparent)]
    Change(#[from] ChangeError),
}

impl ReloadError {
    /// What is wrong, and which key would help.
    fn with_hint(&self) -> String {
        match self {
            Self::Change(error) => error.with_hint("freebind = true"),
            _ => self.to_string(),
        }
    }

    /// Metrics would have to be served elsewhere.
    fn metrics(now: Option<&MetricsAddr>, wanted: Option<&MetricsAddr>) -> Self {
        let place = |addr: Option<&MetricsAddr>| {
            addr.map_or("nowhere".to_owned(), |addr| format!("at {}", escaped(&addr.to_string())))
        };
        Self::Metrics { now: place(now), wanted: place(wanted) }
    }
}

/// Why the manager ended.
#[derive(Debug, thiserror::Error)]
pub enum ManageError {
    /// The server cannot continue.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The control socket cannot be served.
    #[error("cannot serve the control socket: {}", explain(.0, 1))]
    Control(#[source] io::Error),
    /// Metrics cannot be served.
    #[error("cannot serve metrics: {}", explain(.0, 1))]
    Metrics(#[source] io::Error),
    /// Shims cannot be waited for.
    #[error("cannot wait for shims: {0}")]
    Attach(#[source] io::Error),
    /// The manager's thread is gone.
    #[error("the control thread ended by itself")]
    Gone,
}
