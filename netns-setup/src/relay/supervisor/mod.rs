//! The supervisor: a small process that keeps the relay of a network running.
//!
//! It holds a socket for each port, so that clients wait while the relay is started again. It serves one command at a
//! time, which the lock of the state directory ensures anyway. The relay ends with it, however it ends.

mod child;
mod control;
mod group;
mod held;
mod log;
mod refused;
mod restart;
mod retry;
mod scoped;
mod serving;
mod settings;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::File;
use std::io;
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

use self::held::Held;
use self::log::log;
use self::restart::Backoff;
use self::retry::Retry;
use self::serving::Serving;
use super::channel::{Channel, Line, within};
use super::find::SUPERVISE;
use super::launch::{LISTENER, offer_to_supervise};
use super::message::{Answer, Request, Status, digest};
use super::process;
use crate::descriptors;
use crate::model::MappingKey;
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
    settings::reset();
    let dir = File::open(&arguments.state_dir)?;
    let listener = UnixListener::from(listener);
    let mut supervisor = Supervisor {
        dir,
        listener,
        serving: Serving::new(arguments.rproxy.clone()),
        held: Held::default(),
        backoff: Backoff::default(),
        retry: Retry::default(),
    };
    supervisor.serve()
}

struct Supervisor {
    dir: File,
    listener: UnixListener,
    serving: Serving,
    held: Held,
    backoff: Backoff,
    retry: Retry,
}

/// What has happened.
#[derive(Clone, Copy)]
enum Event {
    /// A command connects.
    Command,
    /// The relay has ended.
    Ended,
    /// The relay is to be started again.
    Due,
    /// Interfaces or addresses have changed.
    Changed,
    /// What the relay has refused is to be tried again.
    Retry,
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
                    let how = self.serving.reap();
                    let delay = self.backoff.ended(&how, Instant::now());
                    log(&format!("the relay {how}; it is started again {}", restart::when(delay)));
                }
                Event::Due => self.start_again(),
                Event::Changed => self.retry.changed(Instant::now()),
                Event::Retry => self.try_again(),
            }
            self.retry.watch(self.serving.lacks_any() || scoped::has_any(&self.held), Instant::now());
        }
    }

    fn wait(&self) -> io::Result<Event> {
        loop {
            let ended = self.serving.ended();
            let start = self.backoff.due().filter(|_| ended.is_none()).map(|due| (due, Event::Due));
            let retry = self.retry.due().filter(|_| ended.is_some()).map(|due| (due, Event::Retry));
            let next = start.into_iter().chain(retry).min_by_key(|(due, _event)| *due);
            let left = next.map(|(due, event)| (due.saturating_duration_since(Instant::now()), event));
            if let Some((Duration::ZERO, event)) = left {
                return Ok(event);
            }
            let timeout = left.map_or(PollTimeout::NONE, |(left, _event)| {
                // Rounded up, so as not to wake up too early again and again.
                PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX)
            });
            let sources = [
                (ended, Event::Ended),
                (Some(self.listener.as_fd()), Event::Command),
                (self.retry.notified(), Event::Changed),
            ];
            let sources = sources.into_iter().filter_map(|(fd, event)| Some((fd?, event)));
            let (mut fds, events): (Vec<_>, Vec<_>) =
                sources.map(|(fd, event)| (PollFd::new(fd, PollFlags::POLLIN), event)).unzip();
            match poll(&mut fds, timeout) {
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
                Ok(_) => {
                    let mut ready = fds.iter().zip(events).filter(|(fd, _)| fd.any().unwrap_or(true));
                    if let Some((_, event)) = ready.next() {
                        return Ok(event);
                    }
                }
            }
        }
    }

    /// Starts the relay with all ports. If that fails, tries again later.
    fn start_again(&mut self) {
        match self.serving.start(&self.dir, &mut self.held) {
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

    /// Tries again what the relay has refused.
    fn try_again(&mut self) {
        self.retry.done();
        if self.serving.settle(&self.dir, &mut self.held).is_err() {
            // It hangs.
            self.serving.kill();
        }
    }

    /// Answers the request of a command.
    fn converse(&mut self, stream: UnixStream) -> io::Result<()> {
        let mut channel = Channel::new(stream, COMMAND)?;
        let Line { text, sockets, is_incomplete } = channel.receive()?;
        let answer = match serde_json::from_slice(&text) {
            Ok(_request) if is_incomplete => Answer::Refused(descriptors::too_few(sockets.len())),
            Ok(Request::Status) => Answer::Status(self.status()),
            Ok(Request::Compare(expected)) if digest(self.held.ports()) == expected => {
                Answer::Same(self.status_without_ports())
            }
            Ok(Request::Compare(_)) => Answer::Status(self.status()),
            Ok(Request::Change { remove, add }) => {
                let asked = add.iter().map(|port| port.key).collect();
                match self.held.changed(&remove, add, sockets) {
                    Ok(wanted) => self.change(wanted, &asked),
                    Err(why) => Answer::Refused(why),
                }
            }
            Err(error) => Answer::Refused(format!("not a request: {error}")),
        };
        channel.send(serde_json::to_string(&answer)?, &[])
    }

    fn status(&self) -> Status {
        Status { ports: self.held.ports().cloned().collect(), ..self.status_without_ports() }
    }

    fn status_without_ports(&self) -> Status {
        let trouble = self.backoff.trouble().filter(|_| self.serving.process().is_none());
        Status {
            supervisor: process::running(std::process::id()),
            relay: self.serving.process(),
            trouble: trouble.map(str::to_owned),
            ports: Vec::new(),
            unserved: self.serving.unserved(),
        }
    }

    /// Serves exactly the ports of `wanted`; those that were `asked` for for certain.
    fn change(&mut self, wanted: Held, asked: &BTreeSet<MappingKey>) -> Answer {
        if wanted.is_empty() {
            self.serving.stop();
            self.held = wanted;
            self.remove_files();
            return Answer::Changed;
        }
        match self.serving.change(&self.dir, &mut self.held, wanted, asked) {
            Ok(()) => {
                self.backoff.started(Instant::now());
                Answer::Changed
            }
            Err(why) => {
                if self.serving.process().is_none() && !self.held.is_empty() {
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
