//! The old process's side of an upgrade.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::signal::Signal;
use rproxy_mapping::backend::BackendHost;
use rproxy_mapping::name::Name;
use rproxy_mapping::wire::{WireLimits, WireMapping};
use rproxy_sys::pass::MOST;
use rproxy_sys::watch::Watched;
use tokio::time::timeout;
use tracing::{error, info, warn};

use super::channel::Channel;
use super::launcher::{Asked, Launcher, Reopened};
use super::{Flows, Hello, Offer, OfferedAttach, OfferedFlow, OfferedMapping, UpgradeError, VERSION, Word};
use crate::bind::return_path::ReturnPath;
use crate::bind::unix_socket::HeldSocket;
use crate::engine::Server;
use crate::engine::registry::Served;
use crate::metrics::listener::MetricsSocket;
use crate::plane::AttachOptions;
use crate::plane::attachments::Plane;
use crate::runtime::signals::Signals;
use crate::runtime::socket_file::SocketFile;
use crate::state::task::{LiveFlow, LiveFlows};
use crate::systemd;

/// How long the new process may take to prepare.
const PREPARATION: Duration = Duration::from_secs(10);

/// How long it may then take to serve, while datagrams wait. No remaining step takes long.
const PAUSE: Duration = Duration::from_secs(2);

/// How long the launcher may take to respond; it gives a process one second to exit.
const LAUNCHER_PATIENCE: Duration = Duration::from_secs(5);

/// What a process hands over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Owned<'a> {
    pub(crate) server: &'a Server,
    pub(crate) control: Option<&'a HeldSocket>,
    pub(crate) metrics: Option<&'a MetricsSocket>,
    pub(crate) plane: Option<&'a Plane>,
}

/// Handles upgrade requests.
#[derive(Debug)]
pub struct Upgrade {
    asked: Signals,
    launcher: Result<Launcher, String>,
    /// The channel to the process that has taken over.
    successor: Option<Watched>,
}

impl Upgrade {
    /// Catches `SIGUSR2` from now on.
    ///
    /// # Errors
    /// Those of [`Signals::catch`].
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn catch(launcher: io::Result<Launcher>) -> io::Result<Self> {
        let launcher = launcher.map_err(|error| error.to_string());
        Ok(Self { asked: Signals::catch([Signal::SIGUSR2])?, launcher, successor: None })
    }

    /// Takes the socket to ask what names stand for.
    pub(crate) fn take_names(&mut self) -> Option<UnixStream> {
        self.launcher.as_mut().ok().and_then(Launcher::take_names)
    }

    /// The channel to the process that has taken over, if one has.
    pub(crate) fn take_successor(&mut self) -> Option<Watched> {
        self.successor.take()
    }

    /// Waits for the signal.
    pub(crate) async fn asked(&mut self) {
        if let Err(error) = self.asked.next().await {
            error!(%error, "cannot read signals; upgrades are no longer possible");
            std::future::pending().await
        }
    }

    /// Opens the configuration with the user and directory of the start, despite confinement.
    ///
    /// # Errors
    /// [`UpgradeError::NoLauncher`]: without a launcher, only this process itself can try to open it.
    pub(crate) async fn reopen(&mut self, which: Reopened) -> Result<io::Result<File>, UpgradeError> {
        self.ask("ask the launcher for a file", async |asked| asked.open(which).await).await
    }

    /// Looks up a return path, despite confinement.
    ///
    /// # Errors
    /// [`UpgradeError::NoLauncher`]
    pub(crate) async fn look_up(
        &mut self,
        path: &ReturnPath,
    ) -> Result<io::Result<Option<String>>, UpgradeError> {
        self.ask("ask for a route", async |asked| asked.look_up(path).await).await
    }

    /// Has the launcher do something.
    async fn ask<T>(
        &mut self,
        step: &'static str,
        request: impl AsyncFnOnce(&Asked) -> io::Result<io::Result<T>>,
    ) -> Result<io::Result<T>, UpgradeError> {
        let launcher = self.launcher.as_ref().map_err(|reason| UpgradeError::NoLauncher(reason.clone()))?;
        let asked = launcher.ask().map_err(UpgradeError::talk(step))?;
        let gone = match timeout(LAUNCHER_PATIENCE, request(&asked)).await {
            Ok(Ok(done)) => return Ok(done),
            Ok(Err(error)) => Err(error),
            // The launcher waits for a file system that does not respond. This process must not.
            Err(late) => Ok(Err(io::Error::from(late))),
        };
        // A late response would be mistaken for that to another request.
        let no_answer = "it does not answer".to_owned();
        let reason = gone.as_ref().err().map_or(no_answer, ToString::to_string);
        self.launcher = Err(reason.clone());
        gone.map_err(|_gone| UpgradeError::NoLauncher(reason))
    }

    /// Lets a new process take over. Returns whether it did. If not, or if this is dropped before, this
    /// process continues to serve.
    pub(crate) async fn attempt(&mut self, owned: Owned<'_>) -> bool {
        let Self { asked, launcher, successor } = self;
        // On the heap, because it is large and rarely needed.
        let mut attempt = Box::pin(attempt(launcher, owned));
        loop {
            tokio::select! {
                Ok(_signal) = asked.next() => warn!("an upgrade is under way; another one has to wait for it"),
                result = &mut attempt => match result {
                    Ok((process, channel)) => {
                        info!(process, "a new process has taken over");
                        *successor = Some(channel.into_inner());
                        return true;
                    }
                    Err(error) => {
                        error!(%error, "not upgraded; this process continues to serve");
                        return false;
                    }
                },
            }
        }
    }
}

async fn attempt(
    launcher: &mut Result<Launcher, String>,
    owned: Owned<'_>,
) -> Result<(u32, Channel), UpgradeError> {
    if std::process::id() == 1 {
        return Err(UpgradeError::Init);
    }
    let there = launcher.as_ref().map_err(|reason| UpgradeError::NoLauncher(reason.clone()))?;
    let asked = there.ask().map_err(UpgradeError::talk("ask for a new process"))?;
    let result = match NewProcess::start(asked).await {
        Ok(new) => match new.hand_over(owned).await {
            Ok(()) => Ok((new.process, new.channel)),
            Err(error) => Err(new.end(error).await),
        },
        Err(error) => Err(error),
    };
    if let Err(UpgradeError::NoLauncher(reason)) = &result {
        // A late response would be mistaken for that to another request.
        *launcher = Err(reason.clone());
    }
    result
}

/// A new process that has not taken over yet.
struct NewProcess {
    process: u32,
    channel: Channel,
    launcher: Asked,
}

impl NewProcess {
    async fn start(asked: Asked) -> Result<Self, UpgradeError> {
        let started = answer(asked.start()).await?;
        let (process, socket) =
            started.map_err(|(program, source)| UpgradeError::Start { program, source })?;
        let channel = Channel::new(socket).map_err(UpgradeError::talk("talk to the new process"))?;
        Ok(Self { process, channel, launcher: asked })
    }

    /// All steps up to the point where this process may stop serving.
    async fn hand_over(&self, owned: Owned<'_>) -> Result<(), UpgradeError> {
        let server = owned.server;
        in_time(PREPARATION, "prepare itself", self.offer(owned)).await?;
        let paused = Paused(server);
        let flows = server.pause().await;
        in_time(PAUSE, "serve", self.pass_on(server, &flows)).await?;
        std::mem::forget(paused);
        // No step from here on waits, so the sequence cannot be interrupted. The new process serves even if
        // one fails.
        drop(self.launcher.keep());
        systemd::main_process(self.process);
        drop(self.channel.send_at_once(&Word::Yours));
        Ok(())
    }

    async fn offer(&self, Owned { server, control, metrics, plane }: Owned<'_>) -> io::Result<()> {
        self.channel.send(&Hello { version: VERSION }).await?;
        let mappings = server.registry().iter().map(|(_name, served)| offered_mapping(served)).collect();
        let attach = plane.map(offered_attach);
        let old_processes = server.old_processes().count();
        let (control, has_control) = (control.map(AsFd::as_fd), control.is_some());
        let metrics_addr = metrics.map(|socket| socket.addr.to_string());
        let offer = Offer { control: has_control, metrics: metrics_addr, attach, old_processes, mappings };
        self.channel.send(&offer).await?;
        let shims = plane.into_iter().flat_map(|plane| shims_in_order(plane, server));
        let own = control.into_iter().chain(metrics.map(AsFd::as_fd)).chain(plane.map(Plane::listener));
        let sockets = own.chain(server.sockets());
        let descriptors: Vec<BorrowedFd<'_>> = sockets.chain(shims).chain(server.old_processes()).collect();
        self.channel.send_descriptors(&descriptors).await?;
        self.expect(Word::Prepared).await
    }

    async fn pass_on(&self, server: &Server, live: &LiveFlows) -> io::Result<()> {
        let numbers: HashMap<usize, usize> = server.udp_listeners().collect();
        let offered: Vec<_> = live.flows.iter().filter_map(|flow| offered(flow, &numbers)).collect();
        for some in offered.chunks(MOST) {
            let (flows, descriptors): (Vec<_>, Vec<_>) = some.iter().copied().unzip();
            self.channel.send(&Flows { flows, ..Flows::default() }).await?;
            self.channel.send_descriptors(&descriptors).await?;
        }
        let dropped = live.dropped.iter().filter_map(|(number, count)| Some((*numbers.get(number)?, *count)));
        let dropped = dropped.collect();
        self.channel.send(&Flows { flows: Vec::new(), ports: live.ports, dropped }).await?;
        self.expect(Word::Serving).await
    }

    async fn expect(&self, expected: Word) -> io::Result<()> {
        let word: Word = self.channel.receive().await?;
        let unexpected = || io::Error::new(io::ErrorKind::InvalidData, format!("it said {word:?}"));
        if word == expected { Ok(()) } else { Err(unexpected()) }
    }

    /// Ends the new process because of `error`. If it has already exited by itself, returns how.
    async fn end(self, error: UpgradeError) -> UpgradeError {
        let Self { channel, launcher, .. } = self;
        // This ends a process that waits for us.
        drop(channel);
        match (answer(launcher.end()).await, is_gone(&error)) {
            (Ok(status), true) => UpgradeError::Ended(status),
            (Err(no_launcher), _) => no_launcher,
            _ => error,
        }
    }
}

fn offered_mapping(served: &Served) -> OfferedMapping {
    let (mapping, process) = (WireMapping::of(served.mapping()), served.process());
    // The name of an attached port cannot be given; it is derived from the port.
    let name = mapping.name.filter(|_name| process.is_none());
    let resolved = match served.mapping().backend() {
        BackendHost::Name(host) => host.addresses().to_vec(),
        BackendHost::Ip(_) | BackendHost::Unix(_) => Vec::new(),
    };
    let at = served.mapping().interface().map(|_name| served.mapping().addresses());
    let addresses = at.unwrap_or_default().iter().map(ToString::to_string).collect();
    let owns_file = served.files().any(SocketFile::is_owned);
    OfferedMapping { mapping: WireMapping { name, ..mapping }, resolved, addresses, owns_file, process }
}

fn offered_attach(plane: &Plane) -> OfferedAttach {
    let AttachOptions { name, limits } = plane.options();
    let waiting = plane.shims().filter(|shim| shim.port.is_none()).map(|shim| shim.process).collect();
    OfferedAttach { name: name.clone(), limits: WireLimits::of(limits), waiting }
}

/// The connections of all shims: those with a port in the order of the registry, then the others.
fn shims_in_order<'a>(plane: &'a Plane, server: &Server) -> Vec<BorrowedFd<'a>> {
    let with_port = plane.shims().filter_map(|shim| Some((shim.port.as_ref()?, shim.connection.as_fd())));
    let with_port: HashMap<&Name, BorrowedFd<'_>> = with_port.collect();
    let attached = server.registry().attached().filter_map(|(name, _served)| with_port.get(name).copied());
    let waiting = plane.shims().filter(|shim| shim.port.is_none()).map(|shim| shim.connection.as_fd());
    attached.chain(waiting).collect()
}

/// Converts a flow for the offer. `numbers` maps numbers of listeners to indices of offered sockets.
fn offered<'a>(flow: &'a LiveFlow, numbers: &HashMap<usize, usize>) -> Option<(OfferedFlow, BorrowedFd<'a>)> {
    let LiveFlow { listener, client, local, told, header, is_established, peer, dropped, socket } = flow;
    let local = local.map(|local| (local.ip, local.interface));
    let socket_number = *numbers.get(listener)?;
    let (client, established, peer, dropped) = (*client, *is_established, *peer, *dropped);
    let told = told.map(|told| (told.source(), told.destination()));
    let offered = OfferedFlow {
        socket: socket_number,
        client,
        local,
        told,
        header: *header,
        established,
        peer,
        dropped,
    };
    Some((offered, socket.as_fd()))
}

/// Datagrams wait in the kernel until this is dropped.
struct Paused<'a>(&'a Server);

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.0.resume();
    }
}

/// Waits for a response of the launcher, for a limited time.
async fn answer<T>(asked: impl Future<Output = io::Result<T>>) -> Result<T, UpgradeError> {
    let answer = timeout(LAUNCHER_PATIENCE, asked).await.unwrap_or_else(|late| Err(late.into()));
    answer.map_err(|error| UpgradeError::NoLauncher(error.to_string()))
}

/// Waits for a step of the new process, for `patience` at most.
async fn in_time(
    patience: Duration,
    step: &'static str,
    conversation: impl Future<Output = io::Result<()>>,
) -> Result<(), UpgradeError> {
    let late = |_elapsed| UpgradeError::Late { step, seconds: patience.as_secs() };
    let talked = timeout(patience, conversation).await.map_err(late)?;
    talked.map_err(UpgradeError::talk("talk to the new process"))
}

/// Whether the other side has closed the channel by exiting.
fn is_gone(error: &UpgradeError) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error, UpgradeError::Talk { source, .. }
        if matches!(source.kind(), BrokenPipe | ConnectionReset | UnexpectedEof))
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, UdpSocket};
    use std::os::fd::OwnedFd;
    use std::sync::Arc;

    use rproxy_sys::udp::LocalAddr;

    use super::*;
    use crate::proxy_protocol::Endpoints;
    use crate::state::task::HeaderState;

    #[test]
    fn a_flow_is_offered_as_it_is() {
        let socket: Arc<OwnedFd> = Arc::new(UdpSocket::bind("127.0.0.1:0").unwrap().into());
        let addr = |text: &str| text.parse::<SocketAddr>().unwrap();
        for is_established in [true, false] {
            let flow = LiveFlow {
                listener: 7,
                client: "192.0.2.1:5".parse().unwrap(),
                local: Some(LocalAddr { ip: "fe80::1".parse().unwrap(), interface: 3 }),
                told: Some(Endpoints::new(addr("198.51.100.1:5"), addr("198.51.100.2:53"))),
                header: HeaderState::Answered,
                is_established,
                peer: Some("192.0.2.2:9".parse().unwrap()),
                dropped: 11,
                socket: socket.clone(),
            };
            let (offered, _socket) = offered(&flow, &HashMap::from([(7, 2)])).unwrap();
            assert_eq!((offered.socket, offered.client), (2, flow.client));
            assert_eq!((offered.local(), offered.peer), (flow.local, flow.peer));
            let ends = (addr("198.51.100.1:5"), addr("198.51.100.2:53"));
            assert_eq!((offered.told, offered.header), (Some(ends), HeaderState::Answered));
            assert_eq!((offered.established, offered.dropped), (is_established, 11));
        }
    }
}
