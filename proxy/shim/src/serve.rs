//! From the listening socket to the end: attached to a plane, or in search of one.

use core::time::Duration;

use rproxy_shim::message::{Answer, Attach, LONGEST, Reason, Request};
use rproxy_sys_raw::errno::Errno;
use rproxy_sys_raw::fd::write_error;
use rproxy_sys_raw::process::Arguments;
use rproxy_sys_raw::signal::{self, ALRM, HUP, INT, PIPE, QUIT, Signals, TERM, USR1, USR2};
use rproxy_sys_raw::time::now;

use crate::listener::Listener;
use crate::plane::{ConnectError, Connection, Plane, Reading};
use crate::program;
use crate::status::Status;

/// How long the plane may take to serve the port, or to answer at all.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);

/// How long it may take to close the port.
const DETACH_TIMEOUT: Duration = Duration::from_secs(1);

/// The first and the longest delay between two attempts to find a plane.
const RETRY_FROM: Duration = Duration::from_millis(10);
const RETRY_TO: Duration = Duration::from_secs(1);

/// How long clients wait for another plane.
const ABSENCE_TIMEOUT: Duration = Duration::from_secs(10);

/// Catches the signals that end a proxy, and those that mean nothing to it: a dockerd in the foreground shares its
/// process group with its proxies. All of them stay blocked while another program replaces this one: `rproxy` reads
/// the same ones from a descriptor (`SIGPIPE` it ignores), so that none is lost in between, and none kills it.
///
/// # Errors
/// Those of sigprocmask(2) and signalfd(2).
pub(crate) fn catch_signals() -> Result<Signals, Errno> {
    Signals::catch(&[INT, TERM, QUIT, HUP, USR1, USR2, ALRM, PIPE])
}

/// A published port.
pub(crate) struct Shim<'a> {
    pub(crate) arguments: &'a mut Arguments,
    pub(crate) listener: Listener,
    /// The status pipe, until the runtime has been told that clients are served.
    pub(crate) status: Option<Status>,
    pub(crate) signals: Signals,
    pub(crate) plane: Plane,
    pub(crate) attach: Attach,
}

/// How the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// A signal ended it, in order.
    Signal,
    /// It could not start, and has reported that.
    Failed,
}

/// The outcome of an attempt to be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// There is no plane.
    NoPlane,
    /// There is one, but it does not serve the port.
    Declined,
    /// A plane has served it, and is gone.
    Lost,
    /// The process ends.
    Ended(Ended),
}

/// What a wait ended with.
enum Event {
    Readable,
    Timeout,
    Stop(Reason),
}

/// The attempts since a plane was lost.
struct Attempts {
    since: Duration,
    delay: Duration,
}

impl Attempts {
    fn starting_with(delay: Duration) -> Self {
        Self { since: now(), delay }
    }

    fn are_over(&self) -> bool {
        now().saturating_sub(self.since) >= ABSENCE_TIMEOUT
    }

    /// When to make the next one.
    fn next(&mut self) -> Duration {
        let next = now().saturating_add(self.delay);
        self.delay = self.delay.saturating_mul(2).min(RETRY_TO);
        next
    }
}

impl Shim<'_> {
    /// Has the port served until a signal arrives.
    pub(crate) fn serve(&mut self) -> Ended {
        let mut attempts = Attempts::starting_with(RETRY_FROM);
        loop {
            match self.attempt() {
                Outcome::Ended(ended) => return ended,
                Outcome::Lost => attempts = Attempts::starting_with(RETRY_FROM),
                Outcome::NoPlane if self.status.is_none() && !attempts.are_over() => {}
                Outcome::NoPlane | Outcome::Declined => {
                    if let Some(ended) = self.replace() {
                        return ended;
                    }
                    attempts = Attempts::starting_with(RETRY_TO);
                }
            }
            if let Event::Stop(_) = self.wait(None, Some(attempts.next())) {
                return self.stop();
            }
        }
    }

    /// Connects to the plane, and waits for as long as that serves the port.
    fn attempt(&mut self) -> Outcome {
        let deadline = now().saturating_add(ANSWER_TIMEOUT);
        loop {
            match self.plane.connect() {
                Ok(connection) => return self.attach(&connection, deadline),
                Err(ConnectError::Busy) if now() < deadline => {
                    if let Event::Stop(_) = self.wait(None, Some(now().saturating_add(RETRY_FROM))) {
                        return Outcome::Ended(self.stop());
                    }
                }
                Err(ConnectError::Busy) => {
                    say(b"the plane accepts no connection");
                    return Outcome::Declined;
                }
                Err(ConnectError::Stranger) => {
                    say(b"neither root nor the own user listens at the name of the plane");
                    return Outcome::NoPlane;
                }
                Err(ConnectError::Absent) => return Outcome::NoPlane,
            }
        }
    }

    /// Hands the socket over, reports that the port is served once it is, and waits for the end of that.
    fn attach(&mut self, connection: &Connection, answer_by: Duration) -> Outcome {
        let request = Request::Attach(self.attach);
        if connection.send(request, Some(self.listener.socket())).is_err() {
            return Outcome::NoPlane;
        }
        let mut deadline = Some(answer_by);
        loop {
            let mut packet = [0; LONGEST + 1];
            let answer = match self.wait(Some(connection), deadline) {
                Event::Stop(reason) => return Outcome::Ended(self.detach(connection, reason)),
                Event::Timeout => {
                    say(b"the plane does not answer");
                    return Outcome::Declined;
                }
                Event::Readable => connection.receive(&mut packet),
            };
            match answer {
                Reading::Nothing => {}
                Reading::Closed if deadline.is_none() => return Outcome::Lost,
                Reading::Closed => return Outcome::NoPlane,
                Reading::Answer(Answer::Serving) => {
                    deadline = None;
                    if let Some(status) = self.status.take() {
                        status.ready();
                    }
                }
                Reading::Answer(Answer::Refused(reason)) if self.status.is_some() => {
                    return Outcome::Ended(self.fail(|write| write(reason.as_bytes())));
                }
                Reading::Answer(Answer::Refused(reason) | Answer::Unavailable(reason)) => {
                    say(reason.as_bytes());
                    return Outcome::Declined;
                }
                Reading::Answer(Answer::Detached) | Reading::Unknown => {
                    say(b"the plane gives an unknown answer");
                    return Outcome::Declined;
                }
            }
        }
    }

    /// Has the plane close the port. If it does not in time, clients of TCP are refused nevertheless.
    fn detach(&self, connection: &Connection, reason: Reason) -> Ended {
        let deadline = now().saturating_add(DETACH_TIMEOUT);
        let mut waits = connection.send(Request::Detach(reason), None).is_ok();
        while waits {
            let left = deadline.saturating_sub(now());
            waits = match signal::wait(None, Some(connection.fd()), Some(left)) {
                Ok(true) => {
                    let mut packet = [0; LONGEST + 1];
                    !matches!(
                        connection.receive(&mut packet),
                        Reading::Closed | Reading::Answer(Answer::Detached)
                    )
                }
                Ok(false) => false,
                Err(_interrupted) => true,
            };
            waits = waits && now() < deadline;
        }
        self.stop()
    }

    /// Ends after a signal, without a plane.
    fn stop(&self) -> Ended {
        // Somebody may have a copy of the socket: a plane that hangs, or the runtime.
        self.listener.shut_down();
        Ended::Signal
    }

    /// Reports that the port cannot be served.
    fn fail(&mut self, describe: impl FnOnce(&mut dyn FnMut(&[u8]))) -> Ended {
        if let Some(status) = self.status.take() {
            status.failed(describe);
        }
        Ended::Failed
    }

    /// Replaces this process by `rproxy`, which serves the port by itself. If there is none, a start has failed; a port
    /// that was served stays open.
    fn replace(&mut self) -> Option<Ended> {
        if self.stop_requested().is_some() {
            return Some(self.stop());
        }
        let socket = self.listener.socket();
        // Without the socket, `rproxy` says that it lacks it.
        let _inherited = socket.set_inherited(true);
        if let Some(status) = &self.status {
            status.set_inherited();
        }
        let failure = program::execute(self.arguments);
        if self.status.is_some() {
            return Some(self.fail(|write| failure.describe(write)));
        }
        write_error(b"rproxy-shim: ");
        failure.describe(&mut write_error);
        write_error(b"\n");
        let _inherited = self.listener.socket().set_inherited(false);
        None
    }

    /// Waits until something can be read from the connection, a signal asks the process to end, or the deadline.
    fn wait(&self, connection: Option<&Connection>, deadline: Option<Duration>) -> Event {
        loop {
            if let Some(reason) = self.stop_requested() {
                return Event::Stop(reason);
            }
            let left = deadline.map(|deadline| deadline.saturating_sub(now()));
            if left == Some(Duration::ZERO) {
                return Event::Timeout;
            }
            // An error is an interruption.
            if signal::wait(Some(&self.signals), connection.map(Connection::fd), left) == Ok(true) {
                return Event::Readable;
            }
        }
    }

    /// The signal that asks the process to end, if one is queued. Others mean nothing.
    fn stop_requested(&self) -> Option<Reason> {
        loop {
            match self.signals.next()? {
                INT => return Some(Reason::Unpublished),
                TERM | QUIT => return Some(Reason::RuntimeEnded),
                _ => {}
            }
        }
    }
}

/// Writes a line to standard error.
fn say(text: &[u8]) {
    write_error(b"rproxy-shim: ");
    write_error(text);
    write_error(b"\n");
}
