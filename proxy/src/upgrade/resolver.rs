//! The resolver of names as a child of the launcher: started by the first question, and again if it has ended.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use rproxy_sys::process::fork_child;
use rustix::process::{PidfdFlags, pidfd_open};

use crate::names::resolver;

/// The shortest time between two starts, should it end at once.
const PAUSE: Duration = Duration::from_secs(1);

/// The socket with the questions, and the process that answers them.
pub(super) struct Resolver {
    questions: Option<OwnedFd>,
    running: Option<Running>,
    started: Option<Instant>,
}

struct Running {
    process: Pid,
    /// Readable once it has ended.
    pidfd: OwnedFd,
}

/// What has happened.
enum Event {
    Request,
    Question,
    Ended,
}

impl Resolver {
    pub(super) fn new(questions: Option<OwnedFd>) -> Self {
        Self { questions, running: None, started: None }
    }

    /// Waits until `requests` is readable, and starts the resolver when it is needed meanwhile. Returns whether it can be
    /// read.
    pub(super) fn serve_until_request(&mut self, requests: &UnixStream) -> bool {
        loop {
            match self.wait(requests) {
                Ok(Event::Request) => return true,
                Ok(Event::Question) => self.start(),
                Ok(Event::Ended) => self.reap(),
                Err(_) => return false,
            }
        }
    }

    fn wait(&self, requests: &UnixStream) -> Result<Event, Errno> {
        loop {
            let pause = self.pause();
            let mut fds = vec![PollFd::new(requests.as_fd(), PollFlags::POLLIN)];
            let asked = self.questions.as_ref().filter(|_questions| pause.is_none());
            let (other, event) = match &self.running {
                Some(running) => (Some(&running.pidfd), Event::Ended),
                None => (asked, Event::Question),
            };
            fds.extend(other.map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)));
            let timeout = pause.filter(|_pause| self.running.is_none());
            let timeout = timeout.map_or(PollTimeout::NONE, |pause| {
                PollTimeout::try_from(pause.as_millis() + 1).unwrap_or(PollTimeout::MAX)
            });
            match poll(&mut fds, timeout) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) if fds[0].any().unwrap_or(true) => return Ok(Event::Request),
                Ok(_) => return Ok(event),
                Err(errno) => return Err(errno),
            }
        }
    }

    /// How long not to start it, because it was started just now.
    fn pause(&self) -> Option<Duration> {
        let left = PAUSE.saturating_sub(self.started?.elapsed());
        (!left.is_zero()).then_some(left)
    }

    fn start(&mut self) {
        self.started = Some(Instant::now());
        let questions = self.questions.as_ref().and_then(|questions| questions.try_clone().ok());
        let Some(questions) = questions else { return };
        // If it cannot be started, whoever asks gets no answer, and asks again.
        let Ok(process) = fork_child([questions], |[questions]| resolver::serve(questions)) else { return };
        let pid = rustix::process::Pid::from_raw(process.as_raw());
        match pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())) {
            Some(Ok(pidfd)) => self.running = Some(Running { process, pidfd }),
            // Before Linux 5.3, or without a descriptor: nobody would notice its end, so it is the last one.
            _ => self.questions = None,
        }
    }

    fn reap(&mut self) {
        if let Some(Running { process, .. }) = self.running.take() {
            // It has ended.
            waitpid(process, None).ok();
        }
        // The other side of the questions may be gone, too.
        let hung_up = self.questions.as_ref().is_some_and(|questions| {
            let mut fds = [PollFd::new(questions.as_fd(), PollFlags::empty())];
            poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
        });
        if hung_up {
            self.questions = None;
        }
    }
}
