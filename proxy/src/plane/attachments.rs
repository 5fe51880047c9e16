//! The connections of shims, and the ports that they attach.
//!
//! One task owns all connections, in one epoll instance: thousands of idle ports cost a list entry each. Shims run
//! as root or as the user of this process; what they send is parsed as if they were anyone.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::sys::epoll::{EpollEvent, EpollFlags};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::geteuid;
use rproxy_mapping::escape::escaped;
use rproxy_mapping::name::Name;
use rproxy_shim::message::{Answer, Attach, LONGEST, Reason, Request};
use rproxy_sys::pass::{receive, send_packet};
use socket2::SockRef;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, info, warn};

use super::AttachOptions;
use super::refusal::{Refusal, bound_port};
use super::socket::{SocketError, bind_abstract};
use crate::engine::Server;
use crate::log::limit::LogLimit;
use crate::runtime::descriptors::{explain, has_run_out};
use crate::runtime::poll::{EventSource, PollSet, is_hung_up};
use crate::state::task::Detached;

/// The data of the listener's events; those of shims have their index.
const LISTENER: u64 = u32::MAX as u64;

/// Events fetched at a time.
const EVENTS: usize = 64;

/// Shims accepted in a row.
const BURST: usize = 64;

/// The maximum number of connections that have not attached a port. Another one replaces the oldest.
const MOST_WAITING: usize = 64;

/// The delay after a failed accept, mostly because descriptors are exhausted.
const PAUSE: Duration = Duration::from_millis(100);

/// The listener of a process that ports can be attached to, and the shims that have connected.
#[derive(Debug)]
pub struct Attachments {
    pub(crate) options: AttachOptions,
    pub(crate) listener: OwnedFd,
    pub(crate) shims: Vec<Shim>,
}

impl Attachments {
    /// Listens for shims.
    ///
    /// # Errors
    /// [`SocketError`]
    pub fn bind(options: AttachOptions) -> Result<Self, SocketError> {
        let listener = bind_abstract(&options.name)?;
        Ok(Self { options, listener, shims: Vec::new() })
    }
}

/// A connected shim.
#[derive(Debug)]
pub struct Shim {
    pub(crate) connection: OwnedFd,
    /// Its process, or 0 if that is in another process namespace.
    pub(crate) process: u32,
    /// The port that it has attached.
    pub(crate) port: Option<Name>,
}

/// Serves [`Attachments`] on one task.
#[derive(Debug)]
pub(crate) struct Plane {
    listener: OwnedFd,
    poll: EventSource,
    options: AttachOptions,
    shims: Vec<Option<Shim>>,
    free: Vec<usize>,
    /// Shims without a port, oldest first; some may have attached one, or be gone.
    waiting: VecDeque<usize>,
    events: [EpollEvent; EVENTS],
    /// The data of events that are not handled yet.
    reported: VecDeque<u64>,
    /// Until when no shim is accepted, because that failed.
    paused: Option<Instant>,
    /// A descriptor to give up when there are no others, so that shims need not wait for an answer.
    spare: Option<OwnedFd>,
}

impl Plane {
    /// Serves attachments on the runtime of the calling thread.
    ///
    /// # Errors
    /// Those of epoll_create1(2) and epoll_ctl(2).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub(crate) fn new(Attachments { options, listener, shims }: Attachments) -> io::Result<Self> {
        let poll = EventSource::new(PollSet::new()?)?;
        poll.epoll().add(&listener, EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
        let spare = Some(listener.try_clone()?);
        info!(name = %escaped(&options.name), "ports can be attached");
        let mut plane = Self {
            listener,
            poll,
            options,
            shims: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            events: [EpollEvent::empty(); EVENTS],
            reported: VecDeque::new(),
            paused: None,
            spare,
        };
        for shim in shims {
            plane.insert(shim)?;
        }
        Ok(plane)
    }

    /// The socket where shims connect.
    pub(crate) fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// The connected shims.
    pub(crate) fn shims(&self) -> impl Iterator<Item = &Shim> {
        self.shims.iter().flatten()
    }

    /// How ports are attached.
    pub(crate) fn options(&self) -> &AttachOptions {
        &self.options
    }

    /// Changes how ports are attached from now on. The name has to stay the same.
    pub(crate) fn set_options(&mut self, options: AttachOptions) {
        self.options = options;
    }

    /// Waits for something to [handle](Self::handle). Nothing is lost if this is dropped.
    ///
    /// # Errors
    /// Those of epoll_wait(2).
    pub(crate) async fn ready(&mut self) -> io::Result<Ready> {
        loop {
            if let Some(data) = self.reported.pop_front() {
                return Ok(Ready(data));
            }
            let paused = self.paused;
            tokio::select! {
                count = self.poll.wait(&mut self.events) => {
                    self.reported.extend(self.events[..count?].iter().map(EpollEvent::data));
                }
                () = sleep_until(paused.unwrap_or_else(Instant::now)), if paused.is_some() => {
                    self.paused = None;
                    self.watch_listener(EpollFlags::EPOLLIN);
                }
            }
        }
    }

    /// Handles what was ready.
    pub(crate) async fn handle(&mut self, Ready(data): Ready, server: &mut Server) {
        match usize::try_from(data) {
            Ok(index) if data != LISTENER => self.serve(index, server).await,
            _ => self.accept(server).await,
        }
    }

    async fn accept(&mut self, server: &mut Server) {
        static FAILED: LogLimit = LogLimit::new();

        for _ in 0..BURST {
            let index = match SockRef::from(&self.listener).accept() {
                Ok((connection, _addr)) => match self.admit(connection.into()) {
                    Some(index) => index,
                    None => continue,
                },
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if has_run_out(&error) && self.turn_away(&error) => continue,
                Err(error) => {
                    if let Some(suppressed) = FAILED.permit() {
                        warn!(
                            error = explain(&error, 1),
                            suppressed, "cannot accept a shim, which serves its port itself"
                        );
                    }
                    self.watch_listener(EpollFlags::empty());
                    self.paused = Some(Instant::now() + PAUSE);
                    return;
                }
            };
            // Its message has arrived in most cases.
            self.serve(index, server).await;
        }
    }

    /// Tells the next shim that there is no descriptor for it. Returns whether that was possible.
    fn turn_away(&mut self, error: &io::Error) -> bool {
        static TURNED_AWAY: LogLimit = LogLimit::new();

        drop(self.spare.take());
        let Ok((connection, _addr)) = SockRef::from(&self.listener).accept() else { return false };
        let text = explain(error, 2);
        if let Some(suppressed) = TURNED_AWAY.permit() {
            warn!(error = text, suppressed, "a port is not attached, and gets a process of its own");
        }
        answer(&connection, Answer::Unavailable(&text));
        drop(connection);
        self.spare = self.listener.try_clone().ok();
        true
    }

    /// Checks who has connected (`SO_PEERCRED`, unix(7)), and returns the index of the shim.
    fn admit(&mut self, connection: OwnedFd) -> Option<usize> {
        static DENIED: LogLimit = LogLimit::new();

        let credentials = getsockopt(&connection, PeerCredentials).ok()?;
        let (user, own) = (credentials.uid(), geteuid().as_raw());
        if user != 0 && user != own {
            if let Some(suppressed) = DENIED.permit() {
                warn!(user, suppressed, "a user who may not attach ports has connected");
            }
            let text = format!("user {user} may not attach ports; root and user {own} may");
            answer(&connection, Answer::Unavailable(&text));
            return None;
        }
        let process = u32::try_from(credentials.pid()).unwrap_or(0);
        match self.insert(Shim { connection, process, port: None }) {
            Ok(index) => Some(index),
            Err(error) => {
                warn!(%error, process, "cannot watch the connection of a shim, which serves its port itself");
                None
            }
        }
    }

    fn insert(&mut self, shim: Shim) -> io::Result<usize> {
        if shim.port.is_none() {
            self.make_room_for_waiting();
        }
        let index = self.free.last().copied().unwrap_or(self.shims.len());
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP, index as u64);
        self.poll.epoll().add(&shim.connection, event)?;
        if shim.port.is_none() {
            self.waiting.push_back(index);
        }
        match self.free.pop() {
            Some(index) => self.shims[index] = Some(shim),
            None => self.shims.push(Some(shim)),
        }
        Ok(index)
    }

    /// Closes the connection that has waited longest, if there are too many.
    fn make_room_for_waiting(&mut self) {
        let Self { waiting, shims, .. } = self;
        waiting.retain(|index| shims[*index].as_ref().is_some_and(|shim| shim.port.is_none()));
        if waiting.len() >= MOST_WAITING
            && let Some(index) = waiting.pop_front()
        {
            self.close(index);
        }
    }

    fn close(&mut self, index: usize) -> Option<Shim> {
        let shim = self.shims[index].take()?;
        // An upgrade may have failed after the other process has received it.
        self.poll.epoll().delete(&shim.connection).ok();
        self.free.push(index);
        Some(shim)
    }

    /// Handles the next packet of a shim.
    async fn serve(&mut self, index: usize, server: &mut Server) {
        static REFUSED: LogLimit = LogLimit::new();

        let Some(Some(shim)) = self.shims.get(index) else { return };
        let mut buffer = [0; LONGEST + 1];
        let received = match receive(shim.connection.as_fd(), &mut buffer) {
            // To recvmsg(2), an empty packet looks like the end.
            Ok(received) if received.length > 0 || !is_hung_up(&shim.connection) => received,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return;
            }
            gone => {
                debug!(process = shim.process, error = ?gone.err(), "a shim is gone");
                return self.gone(index, server).await;
            }
        };
        let packet = &buffer[..received.length.min(buffer.len())];
        let request = Request::decode(packet).map_err(Refusal::from);
        if matches!(request, Ok(Request::Attach(_))) && is_hung_up(&shim.connection) {
            warn!(process = shim.process, "a shim has given up before its port was attached");
            return self.gone(index, server).await;
        }
        let result = match request {
            Ok(Request::Attach(attach)) => {
                let socket = Refusal::socket_of(received.descriptors, received.is_incomplete);
                socket.and_then(|socket| self.attach(index, attach, socket, server))
            }
            Ok(Request::Detach(reason)) => {
                self.detach(index, reason, server).await;
                return;
            }
            Err(refusal) => Err(refusal),
        };
        let Some(Some(shim)) = self.shims.get(index) else { return };
        match result {
            Ok(()) => answer(&shim.connection, Answer::Serving),
            Err(refusal) => {
                let text = refusal.to_string();
                if let Some(suppressed) = REFUSED.permit() {
                    warn!(process = shim.process, error = text, suppressed, "a port is not attached");
                }
                answer(&shim.connection, refusal.answer(&text));
            }
        }
    }

    fn attach(
        &mut self,
        index: usize,
        attach: Attach,
        socket: OwnedFd,
        server: &mut Server,
    ) -> Result<(), Refusal> {
        let limits = self.options.effective_limits();
        let Some(Some(shim)) = self.shims.get_mut(index) else { return Ok(()) };
        if let Some(port) = &shim.port {
            return Err(Refusal::Second(port.clone()));
        }
        let port = bound_port(attach, socket)?;
        shim.port = Some(server.attach(port, shim.process, limits)?);
        Ok(())
    }

    /// Closes the port of a shim, which then ends.
    async fn detach(&mut self, index: usize, reason: Reason, server: &mut Server) {
        let Some(Some(shim)) = self.shims.get_mut(index) else { return };
        let detached = match reason {
            Reason::Unpublished => Detached::Unpublished,
            Reason::RuntimeEnded => Detached::Orphaned,
        };
        if let Some(port) = shim.port.take() {
            server.detach(&port, detached).await;
        }
        answer(&shim.connection, Answer::Detached);
    }

    async fn gone(&mut self, index: usize, server: &mut Server) {
        if let Some(Shim { port: Some(port), .. }) = self.close(index) {
            server.detach(&port, Detached::Orphaned).await;
        }
    }

    fn watch_listener(&self, flags: EpollFlags) {
        if let Err(error) = self.poll.epoll().modify(&self.listener, &mut EpollEvent::new(flags, LISTENER)) {
            warn!(%error, "cannot watch the socket where shims connect");
        }
    }
}

/// A socket that is ready.
#[derive(Debug)]
pub(crate) struct Ready(u64);

/// Sends an answer. If the shim does not read it, it is ending, and its connection will say so.
fn answer(connection: &impl AsFd, answer: Answer<'_>) {
    if let Err(error) = send_packet(connection.as_fd(), answer.encode().as_bytes()) {
        debug!(%error, "a shim does not read its answer");
    }
}
