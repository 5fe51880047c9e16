//! The manager: the one owner of the server, who carries out what signals and clients ask for.
//!
//! It has a thread of its own if there is anything to manage, so that binding ten thousand sockets or
//! reading a long configuration delays no byte. Without a thread to be had, it runs on that of the first worker.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::pin::pin;
use std::time::Duration;

use nix::sys::signal::Signal;
use rproxy_sys::memory::release_unused;
use serde_json::{Value, json};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Interval, sleep, timeout};
use tracing::{debug, error, info, warn};

use super::clients::{self, Call, Reply};
use super::protocol::{self, Refusal, Request};
use super::socket::{ControlSocket, SocketFile};
use super::wire::WireMapping;
use crate::addr::AddrError;
use crate::change::Changed;
use crate::config;
use crate::endpoint::BackendSpec;
use crate::mapping::Mapping;
use crate::name::Name;
use crate::ports::PortRange;
use crate::runtime::{new_runtime, start_thread};
use crate::server::{ServeError, Server};
use crate::signals::{Signals, StopSignals};
use crate::systemd;
use crate::upgrade::Upgrade;

/// Requests that may wait to be carried out.
const CALLS: usize = 4;

/// How long the client may take for its answer that ends the process.
const LAST_ANSWER: Duration = Duration::from_secs(1);

/// Stack of the manager's thread: parsers recurse.
const STACK_SIZE: usize = 1024 * 1024;

/// A configuration file that is read anew at `SIGHUP`.
pub struct Reload {
    signal: Signals,
    file: PathBuf,
}

impl Reload {
    /// Starts to catch the signal; to be called before the file is read for the first time, so that no
    /// change is missed.
    ///
    /// # Errors
    /// Those of [`Signals::catch`].
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn of_file(file: PathBuf) -> io::Result<Self> {
        Ok(Self { signal: Signals::catch([Signal::SIGHUP])?, file })
    }
}

/// How long connections may go on once no new ones are let in.
#[derive(Clone, Copy, Debug)]
pub struct Drain {
    /// After a signal, or when a client asks for the end.
    pub timeout: Duration,
    /// After an upgrade, if there is a limit at all.
    pub after_upgrade: Option<Duration>,
}

/// What a manager has to look after.
pub struct Manager {
    /// What is managed.
    pub server: Server,
    /// What ends it.
    pub stop: StopSignals,
    /// How long connections may go on then.
    pub drain: Drain,
    /// Where clients connect, if they may.
    pub control: Option<ControlSocket>,
    /// Where mappings come from, if they can change.
    pub reload: Option<Reload>,
    /// How often the service manager is told that all is well, if it wants to know.
    pub watchdog: Option<Duration>,
    /// What lets another process take its place.
    pub upgrade: Upgrade,
}

impl Manager {
    /// Manages until a signal or a client ends it, on a thread of its own if there is more to do than
    /// waiting for that, and if there is one to be had.
    ///
    /// # Errors
    /// [`ServeError`]
    pub async fn run(self) -> Result<(), ManageError> {
        if self.control.is_none() && self.reload.is_none() {
            return self.manage().await;
        }
        let runtime = match new_runtime() {
            Ok(runtime) => runtime,
            Err(error) => return self.manage_beside_clients(&error).await,
        };
        let (ended, end) = oneshot::channel();
        let manage = move |(runtime, manager): (Runtime, Self)| {
            // Whoever waits for it may have ended.
            ended.send(runtime.block_on(manager.manage())).ok();
        };
        if let Err((error, (runtime, manager))) =
            start_thread("rproxy-control", STACK_SIZE, (runtime, self), manage)
        {
            // Where none may be dropped that waits for its threads.
            runtime.shutdown_background();
            return manager.manage_beside_clients(&error).await;
        }
        // A panic there has been reported.
        end.await.unwrap_or(Err(ManageError::Gone))
    }

    /// Manages on the thread of the first worker, whose clients wait for long changes then.
    async fn manage_beside_clients(self, error: &io::Error) -> Result<(), ManageError> {
        warn!(%error, "cannot start the control thread; the first worker does its work, and large changes delay its clients");
        self.manage().await
    }

    async fn manage(self) -> Result<(), ManageError> {
        let Self { mut server, mut stop, drain, control, mut reload, watchdog, mut upgrade } = self;
        let mut watchdog = watchdog.map(tokio::time::interval);
        let (calls, mut called) = mpsc::channel(CALLS);
        let file = control.map(|control| {
            let (listener, file) = control.into_parts();
            tokio::spawn(serve_clients(listener, calls));
            file
        });
        let succeeded = loop {
            tokio::select! {
                biased;
                signal = stop.next() => {
                    info!(signal, "ending; once more ends at once");
                    break false;
                }
                error = server.failed() => return Err(error.into()),
                () = hung_up(&mut reload) => {
                    let reread = Box::pin(reread(reload.as_ref(), &mut upgrade, &mut server));
                    let Some(()) = or_stopped(reread, &mut stop).await else { break false };
                }
                () = upgrade.asked() => {
                    let attempt = upgrade.carry_out(&server, file.as_ref().map(AsFd::as_fd));
                    match unless_stopped(attempt, &server, &mut stop, &mut watchdog).await {
                        Some(false) => {}
                        ended => break ended.is_some(),
                    }
                }
                () = tick(&mut watchdog) => tell_alive(&server).await,
                never = systemd::resend() => never,
                Some(call) = called.recv() => {
                    let answer = Box::pin(answer(call, &mut server));
                    let Some(false) = or_stopped(answer, &mut stop).await else { break false };
                }
            }
        };
        if succeeded {
            server.leave();
            file.into_iter().for_each(SocketFile::leave);
        } else {
            systemd::stopping();
            drop(file);
        }
        // Nobody else is let in from here on.
        drop(called);
        finish(server, &mut stop, drain, succeeded).await;
        Ok(())
    }
}

/// Lets connections and flows come to their end, within limits.
async fn finish(server: Server, stop: &mut StopSignals, drain: Drain, succeeded: bool) {
    tokio::select! {
        () = server.drain(enough(drain, stop, succeeded)) => {}
        never = systemd::resend() => never,
    }
    if succeeded {
        // Until it hears of the other process, the service manager takes the end of this one for that of the service,
        // and ends all of it.
        tokio::select! {
            () = systemd::until_told() => {}
            signal = stop.next() => info!(signal, "ending, and the service manager knows of no other process"),
        }
    }
}

/// When a drain has lasted long enough; says why. The end of a process that another one `succeeded` was not asked for by
/// a signal, so that the first one asks for what is under way, but within the usual limit.
async fn enough(drain: Drain, stop: &mut StopSignals, succeeded: bool) -> &'static str {
    const LATE: &str = "drain timeout";

    if succeeded {
        tokio::select! {
            () = passed(drain.after_upgrade) => return LATE,
            signal = stop.next() => info!(signal, "ending; once more ends at once"),
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

/// Waits for a limit, if there is one.
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

/// What a change comes to, or `None` if a signal ends this process before. Nothing has changed then, or all of it
/// has, which makes no difference any more.
async fn or_stopped<T>(change: impl Future<Output = T>, stop: &mut StopSignals) -> Option<T> {
    tokio::select! {
        biased;
        signal = stop.next() => {
            info!(signal, "ending, and not changed; once more ends at once");
            None
        }
        result = change => Some(result),
    }
}

/// What an upgrade comes to, or `None` if a signal ends this process before.
async fn unless_stopped(
    attempt: impl Future<Output = bool>,
    server: &Server,
    stop: &mut StopSignals,
    watchdog: &mut Option<Interval>,
) -> Option<bool> {
    let mut attempt = pin!(attempt);
    loop {
        tokio::select! {
            biased;
            result = &mut attempt => return Some(result),
            signal = stop.next() => {
                info!(signal, "ending, and not upgraded; once more ends at once");
                return None;
            }
            () = tick(watchdog) => tell_alive(server).await,
        }
    }
}

/// Tells the service manager that all is well, once it is.
async fn tell_alive(server: &Server) {
    server.until_responsive().await;
    systemd::alive();
}

async fn hung_up(reload: &mut Option<Reload>) {
    match reload {
        Some(reload) => {
            if let Err(error) = reload.signal.next().await {
                error!(%error, "cannot read signals; nothing is reloaded any more");
                std::future::pending().await
            }
        }
        None => std::future::pending().await,
    }
}

async fn tick(interval: &mut Option<Interval>) {
    match interval {
        Some(interval) => drop(interval.tick().await),
        None => std::future::pending().await,
    }
}

/// Serves what the file says now; an error changes nothing.
async fn reread(reload: Option<&Reload>, upgrade: &mut Upgrade, server: &mut Server) {
    let Some(Reload { file, .. }) = reload else { return };
    systemd::reloading();
    let opened = match upgrade.open_configuration().await {
        Ok(opened) => opened,
        Err(error) => {
            debug!(%error, "the configuration is opened by this process itself");
            config::open(file)
        }
    };
    let applied = match config::read_again(file, opened) {
        Ok(mappings) => server.apply(mappings).await.map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    // What planning took, too, is needed no more.
    release_unused();
    match applied {
        Ok(Changed { added, changed, removed, unchanged }) => {
            info!(added, changed, removed, unchanged, "configuration reloaded");
        }
        Err(errors) => {
            for error in errors.lines() {
                error!(error, "not reloaded; nothing has changed");
            }
        }
    }
    systemd::ready();
}

/// Does what a client asks for, and tells it. Gives whether that ends the process; the client knows by then.
async fn answer(Call { request, answer }: Call, server: &mut Server) -> bool {
    let is_last = request == Request::Drain;
    let (until_told, told) = oneshot::channel();
    let result = carry_out(request, server).await;
    // The client may be gone.
    answer.send(Reply { result, until_told }).ok();
    if is_last {
        // One that does not take its answer is not waited for.
        timeout(LAST_ANSWER, told).await.ok();
        info!("ending, as a control client asks");
    }
    is_last
}

async fn carry_out(request: Request, server: &mut Server) -> Result<Value, Refusal> {
    let changed = match request {
        Request::List => return Ok(protocol::list(server.registry())),
        Request::Stats => return Ok(protocol::stats(server.registry())),
        Request::Drain => return Ok(json!({})),
        Request::Add { mappings } => {
            let mappings = read(&mappings)?;
            let names: Vec<Name> = mappings.iter().map(Mapping::name).collect();
            let changed = server.add(mappings).await?;
            let mut answer = protocol::changed(changed);
            answer["mappings"] = protocol::show(server.registry(), &names);
            return Ok(answer);
        }
        Request::Apply { mappings } => server.apply(read(&mappings)?).await?,
        Request::Remove { name } => server.remove(&parse_name(&name)?).await?,
        Request::Retarget { name, to } => retarget(server, &parse_name(&name)?, &to).await?,
    };
    Ok(protocol::changed(changed))
}

fn read(mappings: &[WireMapping]) -> Result<Vec<Mapping>, Refusal> {
    let read = |mapping: &WireMapping| {
        mapping.read().map_err(|error| match &mapping.name {
            Some(name) => Refusal::bad_request(format!("mapping {}: {error}", name.escape_debug())),
            None => Refusal::bad_request(error.to_string()),
        })
    };
    mappings.iter().map(read).collect()
}

fn parse_name(name: &str) -> Result<Name, Refusal> {
    name.parse().map_err(|error: crate::name::NameError| Refusal::bad_request(error.to_string()))
}

async fn retarget(server: &mut Server, name: &Name, to: &str) -> Result<Changed, Refusal> {
    let wrong = |error: &dyn std::fmt::Display| Refusal::bad_request(format!("to {to}: {error}"));
    let BackendSpec { ip, ports } = to.parse().map_err(|error: AddrError| wrong(&error))?;
    // An unknown name is for the server to refuse.
    let count = server.registry().get(name).map_or(1, |served| served.mapping().backend_ports().count());
    let Ok(first) = ports.one() else { return Ok(server.retarget(name, ip, ports).await?) };
    let last = u16::try_from(count - 1).ok().and_then(|more| first.checked_add(more));
    let last = last.ok_or_else(|| wrong(&format_args!("there are no {count} ports from there on")))?;
    let ports = PortRange::new(first, last).map_err(|error| wrong(&error))?;
    Ok(server.retarget(name, ip, ports).await?)
}

/// Why managing ended.
#[derive(Debug, thiserror::Error)]
pub enum ManageError {
    /// The server cannot go on.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The manager is gone.
    #[error("the control thread ended by itself")]
    Gone,
}
