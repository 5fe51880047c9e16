//! The manager: the one owner of the server, who carries out what signals and clients ask for.
//!
//! It has a thread of its own if there is anything to manage, so that binding ten thousand sockets or
//! reading a long configuration delays no byte.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::pin::pin;
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use rproxy_sys::memory::release_unused;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Interval, timeout};
use tracing::{error, info};

use super::clients::{self, Call, Reply};
use super::protocol::{self, Refusal, Request};
use super::socket::{ControlSocket, SocketFile};
use super::wire::WireMapping;
use crate::addr::BackendAddr;
use crate::change::Changed;
use crate::config;
use crate::mapping::Mapping;
use crate::name::Name;
use crate::ports::PortRange;
use crate::runtime::new_runtime;
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

/// What a manager has to look after.
pub struct Manager {
    /// What is managed.
    pub server: Server,
    /// What ends it.
    pub stop: StopSignals,
    /// How long connections may go on then.
    pub drain_timeout: Duration,
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
    /// waiting for that.
    ///
    /// # Errors
    /// [`ServeError`], and those of starting a thread.
    pub async fn run(self) -> Result<(), ManageError> {
        if self.control.is_none() && self.reload.is_none() {
            return self.manage(None).await;
        }
        let runtime = new_runtime().map_err(ManageError::Thread)?;
        let (ended, end) = oneshot::channel();
        let manage = move || {
            let result = runtime.block_on(async move {
                let mut manager = self;
                let control = manager.control.take().map(ControlSocket::into_parts);
                manager.manage(control).await
            });
            ended.send(result).ok();
        };
        let builder = thread::Builder::new().name("rproxy-control".to_owned()).stack_size(STACK_SIZE);
        builder.spawn(manage).map_err(ManageError::Thread)?;
        // A panic there has been reported.
        end.await.unwrap_or(Err(ManageError::Gone))
    }

    async fn manage(self, control: Option<(UnixListener, SocketFile)>) -> Result<(), ManageError> {
        let Self { mut server, mut stop, drain_timeout, mut reload, watchdog, mut upgrade, .. } = self;
        let mut watchdog = watchdog.map(tokio::time::interval);
        let (calls, mut called) = mpsc::channel(CALLS);
        let file = control.map(|(listener, file)| {
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
                    let Some(()) = or_stopped(Box::pin(reread(reload.as_ref(), &mut server)), &mut stop).await else {
                        break false;
                    };
                }
                () = upgrade.asked() => {
                    let attempt = upgrade.carry_out(&server, file.as_ref().map(AsFd::as_fd));
                    match unless_stopped(attempt, &server, &mut stop, &mut watchdog).await {
                        Some(false) => {}
                        ended => break ended.is_some(),
                    }
                }
                () = tick(&mut watchdog) => tell_alive(&server).await,
                Some(call) = called.recv() => {
                    let Some(false) = or_stopped(Box::pin(answer(call, &mut server)), &mut stop).await else {
                        break false;
                    };
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
        tokio::select! {
            () = server.drain(drain_timeout) => {}
            signal = last_call(&mut stop, succeeded) => info!(signal, "ending at once"),
        }
        Ok(())
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

/// Waits for the signal that ends connections at once. The end of a process that another one `succeeded` was
/// not asked for by a signal, so that the first one only asks for what is under way.
async fn last_call(stop: &mut StopSignals, succeeded: bool) -> &'static str {
    if succeeded {
        let signal = stop.next().await;
        info!(signal, "ending already; once more ends at once");
    }
    stop.next().await
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
async fn reread(reload: Option<&Reload>, server: &mut Server) {
    let Some(reload) = reload else { return };
    systemd::reloading();
    let applied = match config::read(&reload.file) {
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
    let to_addr = to.parse::<BackendAddr>().map_err(|error| wrong(&error))?.socket_addr();
    // An unknown name is for the server to refuse.
    let count = server.registry().get(name).map_or(1, |served| served.mapping().backend_ports().count());
    let last = u16::try_from(count - 1).ok().and_then(|more| to_addr.port().checked_add(more));
    let last = last.ok_or_else(|| wrong(&format_args!("there are no {count} ports from there on")))?;
    let ports = PortRange::new(to_addr.port(), last).map_err(|error| wrong(&error))?;
    Ok(server.retarget(name, to_addr.into(), ports).await?)
}

/// Why managing ended.
#[derive(Debug, thiserror::Error)]
pub enum ManageError {
    /// The server cannot go on.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// There is no thread to manage on.
    #[error("cannot start the control thread: {0}")]
    Thread(#[source] io::Error),
    /// The manager is gone.
    #[error("the control thread ended by itself")]
    Gone,
}
