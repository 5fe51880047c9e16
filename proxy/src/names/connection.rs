//! The connection to a resolver. The launcher starts one when there is a question, and another one in its place when it has
//! ended, or is silent although it should answer: because it is stopped, or hangs.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::time::Duration;

use nix::errno::Errno;
use nix::unistd::write;
use rproxy_sys::pass;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep_until};

use super::conversation::{Conversation, Heard};
use super::message::{Answer, BEAT, Question};

/// For how long nothing may be heard of a resolver that has questions.
const SILENCE: Duration = BEAT.saturating_mul(5);

/// The shortest time between the starts of two resolvers.
const PAUSE: Duration = Duration::from_secs(1);

/// The request for another resolver.
pub(crate) const ANOTHER: u8 = b'r';

/// The connection to a resolver, whichever runs.
#[derive(Debug)]
pub(super) struct Connection {
    launcher: Launcher,
    state: State,
    /// When a resolver may be requested.
    next_start: Instant,
    /// When something has to have been heard.
    silent_at: Instant,
    /// The number of questions without an answer.
    open: usize,
    /// Whether this resolver was heard.
    was_heard: bool,
}

#[derive(Debug)]
enum State {
    /// There is none.
    None,
    /// One was requested.
    Requested,
    /// One answers.
    Open(Conversation),
}

/// What happens.
#[derive(Debug)]
pub(super) enum Event {
    /// A question is answered.
    Answer(Answer),
    /// More can be asked.
    Ready,
    /// No open question will be answered.
    Ended(Ended),
}

/// Why a resolver is replaced.
#[derive(Debug)]
pub(super) struct Ended {
    /// What has happened.
    pub(super) why: Reason,
    /// Whether it has answered anything before.
    pub(super) was_heard: bool,
}

/// What has happened to a resolver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    Ended,
    Silent,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ended => f.write_str("the resolver has ended"),
            Self::Silent => write!(f, "the resolver has said nothing for {} s", SILENCE.as_secs()),
        }
    }
}

impl Connection {
    /// To the resolvers that the launcher at the other end of this socket starts.
    pub(super) fn by(launcher: StdUnixStream) -> Self {
        let now = Instant::now();
        Self {
            launcher: Launcher::Idle(launcher),
            state: State::None,
            next_start: now,
            silent_at: now,
            open: 0,
            was_heard: false,
        }
    }

    /// Asks what a name stands for.
    ///
    /// # Errors
    /// `EAGAIN` while no more questions are taken, which [`Self::next`] waits for; otherwise the launcher is gone.
    pub(super) fn ask(&mut self, question: &Question, now: Instant) -> io::Result<()> {
        match &self.state {
            State::Open(conversation) => {
                // If the resolver is gone, the next read says so.
                conversation.ask(question).map_err(|_any| io::ErrorKind::WouldBlock)?;
                if self.open == 0 {
                    self.silent_at = now + SILENCE;
                }
                self.open += 1;
                return Ok(());
            }
            State::None if now >= self.next_start => {
                self.launcher.request()?;
                (self.next_start, self.silent_at) = (now + PAUSE, now + SILENCE);
                (self.state, self.was_heard) = (State::Requested, false);
            }
            State::None | State::Requested => {}
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Waits for what happens next; if it `is_full`, until it takes another question, too. Dropped at any point, nothing is
    /// lost.
    ///
    /// # Errors
    /// The launcher is gone.
    pub(super) async fn next(&mut self, is_full: bool) -> io::Result<Event> {
        let Self { launcher, state, next_start, silent_at, open, was_heard } = self;
        loop {
            match state {
                State::None if is_full => {
                    sleep_until(*next_start).await;
                    return Ok(Event::Ready);
                }
                State::None => std::future::pending().await,
                State::Requested => tokio::select! {
                    biased;
                    socket = launcher.receive() => {
                        (*state, *silent_at) = (State::Open(Conversation::over(socket?)?), Instant::now() + SILENCE);
                        return Ok(Event::Ready);
                    }
                    () = sleep_until(*silent_at) => return Ok(self.end(Reason::Silent)),
                },
                State::Open(conversation) => tokio::select! {
                    biased;
                    heard = conversation.hear(is_full) => {
                        let Ok(heard) = heard else { return Ok(self.end(Reason::Ended)) };
                        let Some(heard) = heard else { return Ok(Event::Ready) };
                        (*silent_at, *was_heard) = (Instant::now() + SILENCE, true);
                        if let Heard::Answer(answer) = heard {
                            *open = open.saturating_sub(1);
                            return Ok(Event::Answer(answer));
                        }
                    }
                    () = sleep_until(*silent_at), if *open > 0 => return Ok(self.end(Reason::Silent)),
                },
            }
        }
    }

    fn end(&mut self, why: Reason) -> Event {
        (self.state, self.open) = (State::None, 0);
        Event::Ended(Ended { why, was_heard: self.was_heard })
    }
}

/// The socket to the launcher.
#[derive(Debug)]
enum Launcher {
    /// Nothing was requested yet.
    Idle(StdUnixStream),
    /// The socket is watched by the runtime where a resolver was requested first, which the process has until its end.
    Watched(UnixStream),
}

impl Launcher {
    /// Requests another resolver.
    fn request(&mut self) -> io::Result<()> {
        if let Self::Idle(socket) = self {
            socket.set_nonblocking(true)?;
            *self = Self::Watched(UnixStream::from_std(socket.try_clone()?)?);
        }
        let Self::Watched(stream) = self else { return Ok(()) };
        // Those that came too late were replaced.
        while pass::receive_descriptors(stream.as_fd()).is_ok() {}
        // Not by the runtime, which knows whether it can be written only later.
        match write(&stream, &[ANOTHER]) {
            // It has not read the earlier ones, each of which is as good.
            Ok(_) | Err(Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Waits for the socket to the resolver that was requested.
    async fn receive(&self) -> io::Result<OwnedFd> {
        let Self::Watched(stream) = self else { return std::future::pending().await };
        let receive = || pass::receive_descriptors(stream.as_fd());
        loop {
            match stream.async_io(Interest::READABLE, receive).await {
                Ok(mut sockets) => {
                    if let Some(socket) = sockets.pop() {
                        return Ok(socket);
                    }
                }
                // Too many descriptors are open, so that it has none.
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {}
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::names::shares::FIRST;
    use crate::runtime::new_runtime;

    fn question() -> Question {
        Question { name: "a".to_owned(), share: FIRST }
    }

    /// Asks as soon as it can, and returns the other end of the conversation.
    async fn asked(connection: &mut Connection, launcher: &mut StdUnixStream) -> StdUnixStream {
        let (ours, theirs) = StdUnixStream::pair().unwrap();
        while let State::None = connection.state {
            assert!(connection.ask(&question(), Instant::now()).is_err(), "there is none");
            if let State::None = connection.state {
                assert!(matches!(connection.next(true).await, Ok(Event::Ready)));
            }
        }
        let mut request = [0];
        launcher.read_exact(&mut request).unwrap();
        pass::send_descriptors(launcher.as_fd(), &[theirs.as_fd()]).unwrap();
        while connection.ask(&question(), Instant::now()).is_err() {
            assert!(matches!(connection.next(true).await, Ok(Event::Ready)));
        }
        ours
    }

    async fn ended(connection: &mut Connection) -> (Reason, bool) {
        match connection.next(false).await {
            Ok(Event::Ended(Ended { why, was_heard })) => (why, was_heard),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_resolver_that_ends_or_is_silent_is_replaced() {
        new_runtime().unwrap().block_on(async {
            let (ours, mut launcher) = StdUnixStream::pair().unwrap();
            let mut connection = Connection::by(ours);
            drop(asked(&mut connection, &mut launcher).await);
            assert_eq!(ended(&mut connection).await, (Reason::Ended, false));
            let mut resolver = asked(&mut connection, &mut launcher).await;
            resolver.write_all(b"\n").unwrap();
            assert_eq!(ended(&mut connection).await, (Reason::Silent, true));
            // One that comes too late is not used.
            let (_late, theirs) = StdUnixStream::pair().unwrap();
            pass::send_descriptors(launcher.as_fd(), &[theirs.as_fd()]).unwrap();
            let mut resolver = asked(&mut connection, &mut launcher).await;
            resolver.write_all(b"{\"name\":\"a\",\"result\":{\"Err\":\"no\"},\"share\":2}\n").unwrap();
            assert!(matches!(connection.next(false).await, Ok(Event::Answer(Answer { share: 2, .. }))));
            drop(launcher);
            drop(resolver);
            assert_eq!(ended(&mut connection).await, (Reason::Ended, true));
            while connection
                .ask(&question(), Instant::now())
                .is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
            {
                connection.next(true).await.unwrap();
            }
        });
    }
}
