//! The relay as a child of its supervisor.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rproxy_sys::process::end_with_parent;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::control::Failed;
use super::log::Lines;
use crate::model::RelayProcess;
use crate::relay::channel::{Channel, within};
use crate::relay::process;
use crate::relayed::{CONTROL, LOG};

/// How long a relay may take until it listens on its control socket.
const READY_LIMIT: Duration = Duration::from_secs(16);

/// How long it may take for an answer: thousands of ports take a second.
const ANSWER: Duration = Duration::from_secs(10);

/// How often that is tried, in milliseconds.
const LOOK: u8 = 1;

/// The longest path of a Unix socket (`sun_path`, unix(7)), in bytes.
const LONGEST_ADDRESS: usize = 107;

/// The relay, or what is needed to start it.
#[derive(Debug)]
pub(super) struct Child {
    program: PathBuf,
    running: Option<Running>,
}

#[derive(Debug)]
struct Running {
    child: std::process::Child,
    process: Option<RelayProcess>,
    /// Readable once it has ended.
    pidfd: OwnedFd,
    /// What it says.
    lines: Option<Lines>,
}

impl Child {
    pub(super) fn new(program: PathBuf) -> Self {
        Self { program, running: None }
    }

    /// The process, if it was started and not reaped yet.
    pub(super) fn process(&self) -> Option<RelayProcess> {
        self.running.as_ref().and_then(|running| running.process)
    }

    /// A descriptor that is readable once it has ended; `None` if it does not run.
    pub(super) fn ended(&self) -> Option<BorrowedFd<'_>> {
        self.running.as_ref().map(|running| running.pidfd.as_fd())
    }

    /// Reaps it if it has ended. Returns whether it does not run.
    pub(super) fn has_ended(&mut self) -> bool {
        let is_over = |running: &mut Running| !matches!(running.child.try_wait(), Ok(None));
        if self.running.as_mut().is_some_and(is_over) {
            self.running = None;
        }
        self.running.is_none()
    }

    /// Reaps it after its end, and says how it ended.
    pub(super) fn reap(&mut self) -> String {
        let ended = self.running.take().map(Running::wait);
        match ended {
            Some(Ok(status)) => how(status),
            Some(Err(error)) => format!("has ended ({error})"),
            None => "has ended".to_owned(),
        }
    }

    /// Ends it. Its connections are reset.
    pub(super) fn stop(&mut self) {
        if let Some(mut running) = self.running.take() {
            // It may have ended already.
            drop(running.child.kill());
            drop(running.wait());
        }
    }

    /// Kills it, without waiting for its end.
    pub(super) fn kill(&mut self) {
        if let Some(running) = &mut self.running {
            // It may have ended already.
            drop(running.child.kill());
        }
    }

    /// Starts it, without ports.
    pub(super) fn start(&mut self, dir: &File) -> Result<(), String> {
        self.stop();
        let started = self.spawn(dir).and_then(|()| self.connect(dir).map(drop));
        if started.is_err() {
            self.stop();
        }
        started.map_err(|why| format!("{why}{}", said(dir)))
    }

    /// Connects to its control socket.
    pub(super) fn talk(dir: &File) -> Result<Channel, Failed> {
        let channel = Channel::connect(&within(dir, CONTROL), ANSWER);
        channel.map_err(|error| Failed::Silent(unreachable(&error)))
    }

    fn spawn(&mut self, dir: &File) -> Result<(), String> {
        let failed = |error: io::Error| format!("cannot run {}: {error}", self.program.display());
        let mut command = Command::new(&self.program);
        command.arg("--control").arg(control_path(dir)).args(["--log-level", "warn"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = end_with_parent(&mut command).spawn().map_err(failed)?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).unwrap_or(Pid::INIT);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|errno| failed(errno.into()))?;
        let process = process::running(child.id());
        let lines = child.stderr.take().map(Lines::follow).transpose();
        let mut running = Running { child, process, pidfd, lines: None };
        running.lines = lines.map_err(failed)?;
        self.running = Some(running);
        Ok(())
    }

    /// Connects to its control socket as soon as it listens.
    fn connect(&mut self, dir: &File) -> Result<Channel, String> {
        let (path, deadline) = (within(dir, CONTROL), Instant::now() + READY_LIMIT);
        loop {
            let error = match Channel::connect(&path, ANSWER) {
                Ok(channel) => return Ok(channel),
                Err(error) => error,
            };
            let ended = self.ended().map(|ended| {
                // An error means that the next look is early.
                poll(&mut [PollFd::new(ended, PollFlags::POLLIN)], PollTimeout::from(LOOK))
                    .is_ok_and(|ready| ready > 0)
            });
            match ended {
                Some(false) if Instant::now() < deadline => {}
                Some(false) => return Err(unreachable(&error)),
                Some(true) | None => {
                    let how = self.reap();
                    return Err(format!("{} {how}", self.program.display()));
                }
            }
        }
    }
}

impl Running {
    /// Waits for its end, and for what it has said last.
    fn wait(mut self) -> io::Result<ExitStatus> {
        let status = self.child.wait();
        self.lines.take().into_iter().for_each(Lines::finish);
        status
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Without effect after its end was noticed.
        drop(self.child.kill());
    }
}

/// The path of its control socket, in the state directory wherever that was moved to.
fn control_path(dir: &File) -> PathBuf {
    let own = std::fs::read_link(format!("/proc/self/fd/{}", dir.as_raw_fd())).map(|dir| dir.join(CONTROL));
    match own {
        Ok(path) if path.as_os_str().len() <= LONGEST_ADDRESS => path,
        _ => Path::new("/proc").join(format!("{}/fd/{}/{CONTROL}", std::process::id(), dir.as_raw_fd())),
    }
}

fn unreachable(error: &io::Error) -> String {
    format!("its control socket cannot be reached: {error}")
}

fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("has ended with status {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "has ended".to_owned(),
    }
}

/// The last line of the log, which tells why a relay could not start.
fn said(dir: &File) -> String {
    let text = std::fs::read(within(dir, LOG)).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let last = text.lines().rev().find(|line| line.contains("rproxy"));
    last.map_or_else(String::new, |line| format!(" ({})", line.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_socket_is_in_the_directory_even_if_its_path_is_long_or_was_changed() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().canonicalize().unwrap().join("state");
        std::fs::create_dir(&path).unwrap();
        let dir = File::open(&path).unwrap();
        assert_eq!(control_path(&dir), path.join(CONTROL));
        let moved = path.with_file_name("x".repeat(120));
        std::fs::rename(&path, &moved).unwrap();
        let long = control_path(&dir);
        assert!(long.as_os_str().len() <= LONGEST_ADDRESS, "{long:?}");
        std::fs::write(&long, "").unwrap();
        assert!(moved.join(CONTROL).exists());
    }

    #[test]
    fn a_program_that_ends_at_once_is_no_relay() {
        let temp = tempfile::tempdir().unwrap();
        let dir = File::open(temp.path()).unwrap();
        let start = |program: &str| Child::new(program.into()).start(&dir).unwrap_err();
        assert!(start("/bin/false").ends_with("/bin/false has ended with status 1"));
        assert!(start("/nonexistent/rproxy").contains("cannot run /nonexistent/rproxy"));
    }
}
