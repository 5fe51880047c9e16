//! The tasks that service listeners, as seen by their owner.
//!
//! There is one task for TCP and one for UDP. They receive commands as messages, so that the data path needs
//! no locks and any thread can send them.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use nix::sys::epoll::EpollFlags;
use rproxy_sys::udp::LocalAddr;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tracing::error;

use crate::proxy_protocol::Endpoints;
use crate::runtime::poll::{EventSource, PollSet, WatchedListener};
use crate::runtime::socket_file::SocketFile;
use crate::state::{Binding, MappingState};

/// A command to a task.
#[derive(Debug)]
pub(crate) enum Command {
    /// Serve these new listeners.
    Serve(Vec<Binding>),
    /// Serve these listeners like this from now on. The sender is notified once no client is dialled for at an old target.
    Retarget(Vec<Binding>, oneshot::Sender<()>),
    /// Accept nothing new from these listeners, let existing connections and flows finish, and close the
    /// listeners. The sender is notified once nothing new is accepted.
    Release(Vec<Arc<WatchedListener>>, oneshot::Sender<()>),
    /// Close these listeners at once, even if clients wait there. The sender gets the flows that continue, once
    /// the listeners are closed.
    Close(Vec<Arc<WatchedListener>>, Detached, oneshot::Sender<LiveFlows>),
    /// Close all listeners, because another process serves them and the paused flows.
    Leave,
    /// Reset connections and end flows. The sender is notified once their sockets are closed.
    Cut(Cut, oneshot::Sender<()>),
    /// A command about all flows; a task without flows ignores it.
    Flows(FlowCommand),
}

/// Connections and flows to be cut. Tasks find all that were accepted before they got the command.
#[derive(Clone, Debug)]
pub(crate) enum Cut {
    /// Those with these records.
    Recorded(Arc<HashSet<u64>>),
    /// The connections of a mapping. Its flows have ended with its listeners.
    ConnectionsOf(Arc<MappingState>),
}

/// Why a listener is closed at once, and so what becomes of its connections and flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Detached {
    /// Its container is gone: flows end, and pending connections are reset. Those that were accepted are for
    /// `tcp::reset_all`.
    Unpublished,
    /// The runtime has ended, but perhaps not the container: connections continue. Flows are returned, for
    /// [`FlowCommand::Adopt`] if the port is attached again.
    Orphaned,
    /// This process ends: connections continue. Flows only send replies, until they are quiet; what clients send is
    /// left to the next process that serves the listener.
    Left,
}

/// A command to the UDP task about its flows.
#[derive(Debug)]
pub(crate) enum FlowCommand {
    /// Stop receiving datagrams, and return the flows.
    Pause(oneshot::Sender<LiveFlows>),
    /// Resume after a pause.
    Resume,
    /// Also serve these flows, of listeners that are already served.
    Adopt(LiveFlows),
    /// End the flows that use these local ports. The sender is notified once the ports are free.
    GiveWay(Vec<u16>, oneshot::Sender<()>),
}

/// The flows of a process, during their handover to another one.
#[derive(Debug, Default)]
pub(crate) struct LiveFlows {
    pub(crate) flows: Vec<LiveFlow>,
    /// How many datagrams the kernel has dropped at each listener, as far as counted: number of the listener, or its
    /// [`WatchedListener::id`], and count.
    pub(crate) dropped: Vec<(usize, u32)>,
    /// The position in the rotation of local ports.
    pub(crate) ports: Option<PortTurn>,
}

/// A flow during its handover from one process to another. Neither serves it at the moment.
#[derive(Debug)]
pub(crate) struct LiveFlow {
    /// The number of its listener; between tasks and processes, its [`WatchedListener::id`].
    pub(crate) listener: usize,
    /// The address of its client.
    pub(crate) client: SocketAddr,
    /// The local address that the client sends to, if known.
    pub(crate) local: Option<LocalAddr>,
    /// Whom a proxy in front has told its client is.
    pub(crate) told: Option<Endpoints>,
    /// Whether the backend has got the header of its client, if it gets one.
    pub(crate) header: HeaderState,
    /// Whether the client has sent something after a reply.
    pub(crate) is_established: bool,
    /// Where its datagrams are sent, if its socket is not connected.
    pub(crate) peer: Option<SocketAddr>,
    /// How many replies the kernel has dropped at its socket, as far as counted.
    pub(crate) dropped: u32,
    /// Its socket towards the backend.
    pub(crate) socket: Arc<OwnedFd>,
}

/// What is known of the backend's having got the header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum HeaderState {
    /// No datagram with it was sent, or it was lost.
    #[default]
    Unsent,
    /// The kernel has taken a datagram with it.
    Sent,
    /// The backend has replied since.
    Answered,
}

/// Rounds of the permutation, after which the order of the local ports looks random.
pub(crate) const ROUNDS: usize = 4;

/// The position in the rotation of local ports. A process that continues from it uses the most recently used
/// ports last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct PortTurn {
    /// The first and the last port.
    pub(crate) range: (u16, u16),
    /// The index of the next port in the rotation.
    pub(crate) turn: usize,
    /// The keys of the permutation, different in each process.
    pub(crate) keys: [u64; ROUNDS],
}

/// The commands to a task. The task drains when all senders are gone.
pub(crate) type Commands = mpsc::UnboundedReceiver<Command>;

/// A task that services listeners.
#[derive(Debug)]
pub(crate) struct ListenerTask {
    set: PollSet,
    commands: mpsc::UnboundedSender<Command>,
    task: TaskHandle,
}

/// The result of a task, once it has ended.
pub(crate) type TaskHandle = JoinHandle<io::Result<()>>;

impl ListenerTask {
    /// Spawns the future that `task` returns for the listeners of `set` and its commands.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub(crate) fn spawn<T>(set: PollSet, task: impl FnOnce(EventSource, Commands) -> T) -> io::Result<Self>
    where
        T: Future<Output = io::Result<()>> + Send + 'static,
    {
        let (sender, commands) = mpsc::unbounded_channel();
        let task = tokio::spawn(task(EventSource::new(set.clone())?, commands));
        Ok(Self { set, commands: sender, task })
    }

    /// Adds `socket` to the task's listeners. It is not serviced before [`Self::watch`].
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub(crate) fn add(&self, socket: impl Into<OwnedFd>) -> io::Result<Arc<WatchedListener>> {
        self.set.add(socket).map(Arc::new)
    }

    /// As [`Self::add`], with the file of a Unix socket if it has one.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    pub(crate) fn add_with(
        &self,
        socket: impl Into<OwnedFd>,
        file: Option<SocketFile>,
    ) -> io::Result<Arc<WatchedListener>> {
        self.set.add_with(socket, file).map(Arc::new)
    }

    /// Starts to serve listeners that were added.
    pub(crate) fn watch(&self, bindings: Vec<Binding>) {
        let ports: Vec<_> = bindings.iter().map(|binding| binding.port.clone()).collect();
        self.tell(Command::Serve(bindings));
        for port in ports {
            // Without EPOLLRDHUP, a listener that was shut down would be readable without ever returning a
            // datagram.
            if let Err(error) = port.watch(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP) {
                error!(%error, "cannot watch a listener");
            }
        }
    }

    /// Changes how listeners are served that are already served. The receiver is notified once no client is dialled for at
    /// an old target.
    pub(crate) fn change_targets(&self, bindings: Vec<Binding>) -> oneshot::Receiver<()> {
        let (done, is_done) = oneshot::channel();
        self.tell(Command::Retarget(bindings, done));
        is_done
    }

    /// Accepts nothing new from listeners, and closes them once they are drained. The receiver is notified
    /// when nothing new is accepted.
    pub(crate) fn release(&self, ports: Vec<Arc<WatchedListener>>) -> oneshot::Receiver<()> {
        let (done, is_done) = oneshot::channel();
        self.tell(Command::Release(ports, done));
        is_done
    }

    /// Closes listeners at once. The receiver gets the flows that continue, once they are closed.
    pub(crate) fn close(
        &self,
        ports: Vec<Arc<WatchedListener>>,
        reason: Detached,
    ) -> oneshot::Receiver<LiveFlows> {
        let (closed, is_closed) = oneshot::channel();
        self.tell(Command::Close(ports, reason, closed));
        is_closed
    }

    /// Resets connections and ends flows. The receiver is notified once their sockets are closed.
    pub(crate) fn cut(&self, cut: Cut) -> oneshot::Receiver<()> {
        let (done, is_done) = oneshot::channel();
        self.tell(Command::Cut(cut, done));
        is_done
    }

    /// Closes all listeners and drops the paused flows.
    pub(crate) fn leave(&self) {
        self.tell(Command::Leave);
    }

    /// Sends a command about its flows to a UDP task.
    pub(crate) fn flows(&self, command: FlowCommand) {
        self.tell(Command::Flows(command));
    }

    /// Polls until the task has ended, which it only does on its own if it failed.
    ///
    /// # Errors
    /// Those of epoll_wait(2).
    pub(crate) fn poll_ended(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // A panic has been reported where it happened.
        Pin::new(&mut self.task).poll(context).map(|ended| ended.unwrap_or(Ok(())))
    }

    /// The listeners of the task.
    pub(crate) fn listeners(&self) -> &PollSet {
        &self.set
    }

    /// Closes the command channel, so that the task drains its listeners and ends.
    pub(crate) fn finish(self) -> TaskHandle {
        self.task
    }

    fn tell(&self, command: Command) {
        if self.commands.send(command).is_err() {
            error!("the task that serves listeners is gone");
        }
    }
}
