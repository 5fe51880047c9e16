//! The tasks that serve listeners, as seen by whoever tells them what to serve.
//!
//! There is one for TCP and one for UDP. They are told by messages, so that nothing on the data path
//! is locked, and so that they can be told from any thread.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::sys::epoll::EpollFlags;
use rproxy_sys::udp::LocalAddr;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tracing::error;

use crate::runtime::poll::{EventSource, PollSet, WatchedListener};
use crate::state::Binding;

/// A command to a task.
#[derive(Debug)]
pub(crate) enum Command {
    /// Serve these listeners so from now on, whether they are new or not.
    Serve(Vec<Binding>),
    /// Let what goes on with these listeners finish, take nothing new, and close them. The
    /// sender is told when nothing new is taken any more.
    Release(Vec<Arc<WatchedListener>>, oneshot::Sender<()>),
    /// Close all listeners that are served: another process serves them, and the flows that are paused.
    Leave,
    /// Do something with all flows, if you have any.
    Flows(FlowCommand),
}

/// A command to the UDP task about its flows.
#[derive(Debug)]
pub(crate) enum FlowCommand {
    /// Take no datagrams, and say which flows there are.
    Pause(oneshot::Sender<LiveFlows>),
    /// Go on after a pause.
    Resume,
    /// Serve these flows, too, of listeners that are served already.
    Adopt(LiveFlows),
    /// End the flows that use these local ports. The sender is told when the ports are free.
    GiveWay(Vec<u16>, oneshot::Sender<()>),
}

/// The flows of a process on their way to another one.
#[derive(Debug, Default)]
pub(crate) struct LiveFlows {
    pub(crate) flows: Vec<LiveFlow>,
    /// For how many datagrams listeners have had no room: their numbers, and what is counted already.
    pub(crate) dropped: Vec<(usize, u32)>,
    /// Which local port is next.
    pub(crate) ports: Option<PortTurn>,
}

/// A flow on its way from one process to another, which is served by neither at the moment.
#[derive(Debug)]
pub(crate) struct LiveFlow {
    /// The number of its listener.
    pub(crate) listener: usize,
    /// Who sends to it.
    pub(crate) client: SocketAddr,
    /// Which of our addresses it sends to, if that is known.
    pub(crate) local: Option<LocalAddr>,
    /// Whether the client has gone on after an answer.
    pub(crate) is_established: bool,
    /// Where its datagrams go, if its socket is not connected.
    pub(crate) peer: Option<SocketAddr>,
    /// For how many answers its socket has had no room, as far as they are counted.
    pub(crate) dropped: u32,
    /// Its socket towards the backend.
    pub(crate) socket: Arc<OwnedFd>,
}

/// Rounds after which the order of the local ports looks random.
pub(crate) const ROUNDS: usize = 4;

/// Whose turn is next among the local ports. A process that continues there uses the most recent ones last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PortTurn {
    /// The first and the last port.
    pub(crate) range: (u16, u16),
    /// Whose turn it is, from 0.
    pub(crate) turn: usize,
    /// What makes the order another one in each process.
    pub(crate) keys: [u64; ROUNDS],
}

/// The commands to a task, which drains when all senders are gone.
pub(crate) type Commands = mpsc::UnboundedReceiver<Command>;

/// A task that serves listeners.
#[derive(Debug)]
pub(crate) struct ListenerTask {
    set: PollSet,
    commands: mpsc::UnboundedSender<Command>,
    task: JoinHandle<io::Result<()>>,
}

impl ListenerTask {
    /// Starts what `task` makes of its listeners and its commands.
    ///
    /// # Errors
    /// Those of epoll_create1(2) and epoll_ctl(2).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub(crate) fn spawn<T>(task: impl FnOnce(EventSource, Commands) -> T) -> io::Result<Self>
    where
        T: Future<Output = io::Result<()>> + Send + 'static,
    {
        let set = PollSet::new()?;
        let (sender, commands) = mpsc::unbounded_channel();
        let task = tokio::spawn(task(EventSource::new(set.clone())?, commands));
        Ok(Self { set, commands: sender, task })
    }

    /// Makes `socket` one of its listeners. Nothing happens with it before [`Self::serve`].
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub(crate) fn add(&self, socket: impl Into<OwnedFd>) -> io::Result<Arc<WatchedListener>> {
        self.set.add(socket).map(Arc::new)
    }

    /// Serves listeners that were added, so from now on.
    pub(crate) fn serve(&self, bindings: Vec<Binding>) {
        let ports: Vec<_> = bindings.iter().map(|binding| binding.port.clone()).collect();
        self.tell(Command::Serve(bindings));
        for port in ports {
            // That nothing more is received would else look like a datagram that is never there.
            if let Err(error) = port.watch(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP) {
                error!(%error, "cannot watch a listener");
            }
        }
    }

    /// Serves listeners otherwise from now on, which are served already.
    pub(crate) fn change(&self, bindings: Vec<Binding>) {
        self.tell(Command::Serve(bindings));
    }

    /// Takes nothing new from listeners, and closes them in the end. The receiver is told when the
    /// former is so.
    pub(crate) fn release(&self, ports: Vec<Arc<WatchedListener>>) -> oneshot::Receiver<()> {
        let (done, is_done) = oneshot::channel();
        self.tell(Command::Release(ports, done));
        is_done
    }

    /// Closes all listeners, and gives up the flows that are paused.
    pub(crate) fn leave(&self) {
        self.tell(Command::Leave);
    }

    /// Tells a UDP task what to do with its flows.
    pub(crate) fn flows(&self, command: FlowCommand) {
        self.tell(Command::Flows(command));
    }

    /// Waits until the task has ended, which it does by itself only if it failed.
    ///
    /// # Errors
    /// Those of epoll_wait(2).
    pub(crate) async fn ended(&mut self) -> io::Result<()> {
        // A panic has been reported where it happened.
        (&mut self.task).await.unwrap_or(Ok(()))
    }

    /// Lets the task finish; what goes on with its listeners still does.
    pub(crate) fn finish(self) -> JoinHandle<io::Result<()>> {
        self.task
    }

    fn tell(&self, command: Command) {
        if self.commands.send(command).is_err() {
            error!("the task that serves listeners is gone");
        }
    }
}
