//! The resolvers of names as children of the launcher: one is started at each request, and takes the place of the one before.

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rproxy_sys::pass::send_descriptors;
use rproxy_sys::process::fork_child;
use rustix::process::{PidfdFlags, pidfd_open};

use crate::names::resolver;

/// The most that run at the same time. More than one do if the kernel cannot end one yet, because it waits for a file system.
const MOST: usize = 4;

/// The socket with the requests, and the processes that were started.
pub(super) struct Resolvers {
    requests: Option<UnixStream>,
    running: Vec<Running>,
}

struct Running {
    process: Pid,
    /// Readable once it has ended. There is none before Linux 5.3; its end is noticed with the next request then.
    pidfd: Option<OwnedFd>,
}

/// What has happened.
enum Event {
    /// There is a request to the launcher.
    Request,
    /// There is one for another resolver.
    Another,
    /// A resolver has ended.
    Ended,
}

impl Resolvers {
    /// Those that are requested over this socket.
    pub(super) fn new(requests: Option<OwnedFd>) -> Self {
        Self { requests: requests.map(UnixStream::from), running: Vec::new() }
    }

    /// Waits until `requests` is readable, and starts resolvers meanwhile. Returns whether it can be read.
    pub(super) fn serve_until_request(&mut self, requests: &UnixStream) -> bool {
        loop {
            match self.wait(requests) {
                Ok(Event::Request) => return true,
                Ok(Event::Another) => self.replace(),
                Ok(Event::Ended) => self.reap(),
                Err(_) => return false,
            }
        }
    }

    fn wait(&self, requests: &UnixStream) -> Result<Event, Errno> {
        let pidfds = self.running.iter().filter_map(|running| running.pidfd.as_ref());
        let pidfds = pidfds.map(|pidfd| (pidfd.as_fd(), Event::Ended));
        let another = self.requests.iter().map(|requests| (requests.as_fd(), Event::Another));
        let awaited = [(requests.as_fd(), Event::Request)].into_iter().chain(another).chain(pidfds);
        let (mut fds, mut events): (Vec<PollFd<'_>>, Vec<Event>) =
            awaited.map(|(fd, event)| (PollFd::new(fd, PollFlags::POLLIN), event)).unzip();
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
            if let Some(ready) = fds.iter().position(|fd| fd.any().unwrap_or(true)) {
                return Ok(events.swap_remove(ready));
            }
        }
    }

    /// Ends the resolver and starts another one.
    fn replace(&mut self) {
        // Several requests ask for the same: a resolver that runs.
        let Some(Ok(1..)) = self.requests.as_mut().map(|requests| requests.read(&mut [0; 64])) else {
            self.requests = None;
            return;
        };
        for Running { process, .. } in &self.running {
            // It may have ended. Its number is not used again before it is reaped.
            kill(*process, Signal::SIGKILL).ok();
        }
        self.reap();
        // If none can be started, whoever asks hears nothing, and requests another one.
        if self.running.len() < MOST
            && let Ok((ours, theirs)) = UnixStream::pair()
        {
            self.running.extend(start(ours));
            self.requests
                .iter()
                .for_each(|requests| drop(send_descriptors(requests.as_fd(), &[theirs.as_fd()])));
        }
    }

    fn reap(&mut self) {
        let runs = |Running { process, .. }: &Running| {
            matches!(waitpid(*process, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive))
        };
        self.running.retain(runs);
    }
}

/// Starts a resolver that is asked over this socket.
fn start(questions: UnixStream) -> Option<Running> {
    let process = fork_child([questions.into()], |[questions]| resolver::serve(questions)).ok()?;
    let pid = rustix::process::Pid::from_raw(process.as_raw());
    Some(Running { process, pidfd: pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) })
}
