//! The supervisor: a small process that keeps the relay of a network running.
//!
//! It holds a socket for each port, so that clients wait while the relay is started again. It serves one command at a
//! time, which the lock of the state directory ensures anyway. The relay ends with it, however it ends.

mod child;
mod control;
mod group;
mod held;
mod restart;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl::set_name;
use nix::unistd::setsid;
use rproxy_sys::fd::{claim_inherited, close_unclaimed};
use rproxy_sys::memory::release_unused;

use self::child::Child;
use self::control::Failed;
use self::held::Held;
use self::restart::Backoff;
use super::channel::{Channel, Line, within};
use super::find::SUPERVISE;
use super::launch::{LISTENER, offer_to_supervise};
use super::message::{Answer, Request, Status};
use super::process;
use crate::descriptors;
use crate::relayed::FILES;

/// How long a command may take to ask, and to read its answer: longer would keep others from being served.
const COMMAND: Duration = Duration::from_secs(4);

/// The command line of a supervisor, which only [`launch`](super::launch) writes.
#[derive(Debug, Parser)]
struct Arguments {
    /// The state directory.
    #[arg(long)]
    state_dir: PathBuf,
    /// The path of `rproxy`.
    #[arg(long)]
    rproxy: PathBuf,
    /// The network, by which a supervisor is [found](super::find).
    #[arg(long = "network")]
    _network: String,
}

/// Supervises until no port is left, if that is what the arguments of this program ask for; `None` if they do not. Call it
/// at the start of `main`: it closes all descriptors that it does not need.
pub fn run_if_asked(arguments: &[OsString]) -> Option<ExitCode> {
    offer_to_supervise();
    let own = arguments.get(1..).filter(|own| own.first().is_some_and(|word| word == SUPERVISE))?;
    let supervised = Arguments::try_parse_from(own).map_err(io::Error::other).and_then(|own| run(&own));
    Some(match supervised {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log(&format!("cannot supervise the relay: {error}"));
            ExitCode::FAILURE
        }
    })
}

fn run(arguments: &Arguments) -> io::Result<()> {
    let listener = claim_inherited(LISTENER)?;
    close_unclaimed()?;
    // The terminal's signals are meant for the command that has started this process.
    setsid()?;
    // Its file may have been called by another path.
    set_name(c"netns-setup").ok();
    if let Err(error) = group::leave_unit() {
        log(&format!(
            "the relay ends with the unit that it was started in, as it cannot leave its control group: {error}"
        ));
    }
    descriptors::raise_limit();
    let dir = File::open(&arguments.state_dir)?;
    let listener = UnixListener::from(listener);
    let child = Child::new(arguments.rproxy.clone());
    let mut supervisor =
        Supervisor { dir, listener, child, held: Held::default(), backoff: Backoff::default() };
    supervisor.serve()
}

struct Supervisor {
    dir: File,
    listener: UnixListener,
    child: Child,
    held: Held,
    backoff: Backoff,
}

/// What has happened.
enum Event {
    Command,
    Ended,
    Due,
}

impl Supervisor {
    fn serve(&mut self) -> io::Result<()> {
        loop {
            match self.wait()? {
                Event::Command => {
                    // A command that is interrupted leaves; what it has changed is recorded by the next one.
                    if let Err(error) = self.listener.accept().and_then(|(stream, _)| self.converse(stream)) {
                        log(&format!("a command has not read its answer: {error}"));
                    }
                    if self.held.is_empty() {
                        return Ok(());
                    }
                    // A request of thousands of ports takes many times its own memory.
                    release_unused();
                }
                Event::Ended => {
                    let how = self.child.reap();
                    let delay = self.backoff.ended(&how, Instant::now());
                    log(&format!("the relay {how}; it is started again in {delay:?}"));
                }
                Event::Due => self.start_again(),
            }
        }
    }

    fn wait(&self) -> io::Result<Event> {
        loop {
            let mut fds = vec![PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
            let ended = self.child.ended();
            fds.extend(ended.map(|ended| PollFd::new(ended, PollFlags::POLLIN)));
            let due = self.backoff.due().filter(|_| ended.is_none());
            let left = due.map(|due| due.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(Event::Due);
            }
            let timeout = left.map_or(PollTimeout::NONE, |left| {
                // Rounded up, so as not to wake up too early again and again.
                PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX)
            });
            match poll(&mut fds, timeout) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) if fds.get(1).is_some_and(|fd| fd.any().unwrap_or(true)) => return Ok(Event::Ended),
                Ok(_) => return Ok(Event::Command),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Starts the relay with all ports. If that fails, tries again later.
    fn start_again(&mut self) {
        match self.child.start(&self.dir, &self.held) {
            Ok(()) => {
                self.backoff.started(Instant::now());
                log("the relay is started again");
            }
            Err(why) => {
                let delay = self.backoff.ended(&why, Instant::now());
                log(&format!("the relay cannot be started again: {why}; the next attempt is in {delay:?}"));
            }
        }
    }

    /// Answers the request of a command.
    fn converse(&mut self, stream: UnixStream) -> io::Result<()> {
        let mut channel = Channel::new(stream, COMMAND)?;
        let Line { text, sockets, is_incomplete } = channel.receive()?;
        let answer = match serde_json::from_slice(&text) {
            Ok(_request) if is_incomplete => Answer::Refused(descriptors::too_few(sockets.len())),
            Ok(Request::Status) => Answer::Status(self.status()),
            Ok(Request::Change { remove, add }) => match self.held.changed(&remove, add, sockets) {
                Ok(wanted) => self.change(wanted),
                Err(why) => Answer::Refused(why),
            },
            Err(error) => Answer::Refused(format!("not a request: {error}")),
        };
        channel.send(serde_json::to_string(&answer)?, &[])
    }

    fn status(&self) -> Status {
        let trouble = self.backoff.trouble().filter(|_| self.child.process().is_none());
        Status {
            supervisor: process::running(std::process::id()),
            relay: self.child.process(),
            trouble: trouble.map(str::to_owned),
            ports: self.held.ports().cloned().collect(),
        }
    }

    /// Serves exactly the ports of `wanted`.
    fn change(&mut self, wanted: Held) -> Answer {
        if wanted.is_empty() {
            self.child.stop();
            self.held = wanted;
            self.remove_files();
            return Answer::Changed;
        }
        let result = match self.child.process() {
            Some(_) => self.child.apply(&self.dir, &wanted, &self.held).or_else(|failed| match failed {
                Failed::Refused(why) if !self.child.has_ended() => Err(why),
                // It has ended just before, or it hangs.
                _ => self.child.start(&self.dir, &wanted),
            }),
            None => self.child.start(&self.dir, &wanted),
        };
        match result {
            Ok(()) => {
                self.backoff.started(Instant::now());
                self.held = wanted;
                Answer::Changed
            }
            Err(why) => {
                if self.child.process().is_none() && !self.held.is_empty() {
                    self.backoff.ended(&why, Instant::now());
                }
                Answer::Refused(why)
            }
        }
    }

    /// Removes what is of no use without a supervisor, before a command hears of its end.
    fn remove_files(&self) {
        for name in FILES {
            // A state directory that is gone has none of them.
            drop(std::fs::remove_file(within(&self.dir, name)));
        }
    }
}

/// Writes a line to the log.
fn log(line: &str) {
    // There is nowhere to report an error.
    drop(writeln!(io::stderr(), "netns-setup: {line}"));
}
