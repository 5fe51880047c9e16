//! Starts and stops `rproxy` as dockerd starts and stops docker-proxy.

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use command_fds::{CommandFdExt, FdMapping};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{WaitPidFlag, waitpid};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use socket2::Socket;

use crate::action::RelayCommand;
use crate::firewall::tool;
use crate::model::RelayProcess;

/// The time that dockerd gives a proxy to report readiness.
const READY_LIMIT: Duration = Duration::from_secs(16);

/// dockerd waits forever after SIGINT. A relay in this mode ends at once, unless it is broken.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// The descriptors that docker-proxy expects.
const STATUS_FD: i32 = 3;
const LISTEN_FD: i32 = 4;

/// An error of a relay.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The program could not be run.
    #[error("cannot run {}: {source}; name rproxy with --rproxy", program.display())]
    Run {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It reported an error.
    #[error("{} could not start: {message}", program.display())]
    Refused {
        /// The program.
        program: PathBuf,
        /// The message.
        message: String,
    },
    /// It exited without reporting.
    #[error("{} exited without reporting: it has to support -use-listen-fd", .0.display())]
    Silent(PathBuf),
    /// It took too long.
    #[error("{} was not ready within {} seconds", .0.display(), READY_LIMIT.as_secs())]
    NotReady(PathBuf),
    /// Its socket could not be prepared.
    #[error("cannot hand over the socket: {0}")]
    Socket(#[source] io::Error),
    /// It could not be stopped.
    #[error("cannot stop the relay with pid {pid}: {source}")]
    Stop {
        /// The process.
        pid: u32,
        /// Why.
        source: io::Error,
    },
}

/// Finds `rproxy`: at the given path, beside this program, or in `PATH`.
#[must_use]
pub fn program(given: Option<&Path>) -> Option<PathBuf> {
    let beside =
        || std::env::current_exe().ok().map(|own| own.with_file_name("rproxy")).filter(|file| file.is_file());
    given.map(Path::to_owned).or_else(beside).or_else(|| tool::find("rproxy"))
}

/// Starts a relay on `socket` and waits until it is ready.
///
/// # Errors
/// If it cannot be run or is not ready in time; no process is left behind.
pub fn start(command: &RelayCommand, socket: Socket) -> Result<RelayProcess, RelayError> {
    let program = command.program.clone();
    let failed = |source| RelayError::Run { program: command.program.clone(), source };
    let (reader, writer) = io::pipe().map_err(failed)?;
    let mut process = Command::new(&program);
    process
        .args(command.args())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // The terminal's signals are meant for this program, not for the relay, which outlives it.
        .process_group(0)
        .fd_mappings(vec![
            FdMapping { parent_fd: writer.into(), child_fd: STATUS_FD },
            FdMapping { parent_fd: OwnedFd::from(socket), child_fd: LISTEN_FD },
        ])
        .map_err(|error| failed(io::Error::other(error)))?;
    let mut child = process.spawn().map_err(failed)?;
    // The child has its own copies of the descriptors; ours must be closed so that end of file is detected.
    drop(process);
    let ready = wait_ready(reader, &program).and_then(|()| {
        let gone = || RelayError::Silent(program.clone());
        let started = stat(child.id()).map(|(_, started)| started).ok_or_else(gone)?;
        Ok(RelayProcess { pid: child.id(), started })
    });
    if ready.is_err() {
        // It is of no use any more, and may have exited already.
        drop(child.kill());
        drop(child.wait());
    }
    ready
}

fn wait_ready(mut reader: io::PipeReader, program: &Path) -> Result<(), RelayError> {
    let failed = |source| RelayError::Run { program: program.to_owned(), source };
    if !wait_readable(&reader, READY_LIMIT).map_err(failed)? {
        return Err(RelayError::NotReady(program.to_owned()));
    }
    // "0\n" in one write, or "1\n", a message and the end of the file.
    let mut status = [0; 2];
    let read = reader.read(&mut status).map_err(failed)?;
    match &status[..read] {
        b"0\n" => Ok(()),
        b"1\n" => {
            let mut message = String::new();
            reader.take(4096).read_to_string(&mut message).map_err(failed)?;
            Err(RelayError::Refused { program: program.to_owned(), message: message.trim().to_owned() })
        }
        _ => Err(RelayError::Silent(program.to_owned())),
    }
}

fn wait_readable(fd: impl AsFd, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout) {
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok(ready) => return Ok(ready > 0),
        }
    }
}

/// Stops a relay and waits until it has exited. If it already has, that is not an error.
///
/// # Errors
/// If it cannot be signalled or does not exit.
pub fn stop(process: RelayProcess) -> Result<(), RelayError> {
    let pid = process.pid;
    let failed = |source: io::Error| RelayError::Stop { pid, source };
    let Some(raw) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return Ok(());
    };
    let pidfd = match pidfd_open(raw, PidfdFlags::empty()) {
        Err(rustix::io::Errno::SRCH) => return Ok(()),
        other => other.map_err(|errno| failed(errno.into()))?,
    };
    // The pidfd pins the process: if it is the right one now, it stays the right one.
    if !is_alive(process) {
        return Ok(());
    }
    for signal in [Signal::INT, Signal::KILL] {
        match pidfd_send_signal(&pidfd, signal) {
            Err(rustix::io::Errno::SRCH) => break,
            other => other.map_err(|errno| failed(errno.into()))?,
        }
        if wait_readable(&pidfd, STOP_LIMIT).map_err(failed)? {
            break;
        }
    }
    // It is only a child of this process if this run started it; otherwise init reaps it.
    let _reaped = waitpid(nix::unistd::Pid::from_raw(raw.as_raw_nonzero().get()), Some(WaitPidFlag::WNOHANG));
    if is_alive(process) { Err(failed(io::ErrorKind::TimedOut.into())) } else { Ok(()) }
}

/// Whether this very process is still running.
#[must_use]
pub fn is_alive(process: RelayProcess) -> bool {
    stat(process.pid).is_some_and(|(state, started)| state != "Z" && started == process.started)
}

/// Finds a relay with the arguments of `command` in the caller's network namespace. An interrupted run may
/// have started one without recording its PID.
#[must_use]
pub fn find(command: &RelayCommand) -> Option<RelayProcess> {
    let args = command.args();
    let own = namespace(Path::new("/proc/thread-self/ns/net"))?;
    let pids = fs::read_dir("/proc").ok()?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid| {
        is_relay(*pid, &args) && namespace(&PathBuf::from(format!("/proc/{pid}/ns/net"))) == Some(own)
    })
    .find_map(|pid| stat(pid).map(|(_, started)| RelayProcess { pid, started }))
}

fn is_relay(pid: u32, args: &[String]) -> bool {
    let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else {
        return false;
    };
    let mut words = line.split(|byte| *byte == 0);
    let program = words.next().unwrap_or_default();
    let is_rproxy =
        program.rsplit(|byte| *byte == b'/').next().is_some_and(|name| name.starts_with(b"rproxy"));
    is_rproxy && words.take(args.len()).eq(args.iter().map(String::as_bytes))
}

fn namespace(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

/// The state and start time of a process (proc_pid_stat(5), fields 3 and 22).
fn stat(pid: u32) -> Option<(String, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, which may contain anything.
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?.to_owned();
    Some((state, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use rproxy_mapping::addr::Protocol;

    use super::*;
    use crate::host_ip::HostIp;
    use crate::model::MappingKey;
    use crate::reserve;

    /// A relay that is this shell script.
    fn script(text: &str) -> (tempfile::TempDir, RelayCommand, Socket) {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("rproxy-stand-in");
        fs::write(&program, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        let host: HostIp = "127.0.0.1".parse().unwrap();
        let (socket, port) = reserve::bind(Protocol::Tcp, host, 0).unwrap();
        let key = MappingKey { proto: Protocol::Tcp, host, port };
        let command = RelayCommand { program, key, container_ip: [172, 17, 0, 2].into(), container_port: 80 };
        (dir, command, socket)
    }

    #[test]
    fn a_relay_that_reports_ready_runs_until_it_is_stopped() {
        let (_dir, command, socket) = script("echo 0 >&3; exec sleep 600 <&4");
        let process = start(&command, socket).unwrap();
        assert!(is_alive(process));
        let another = RelayProcess { started: process.started + 1, ..process };
        stop(another).unwrap();
        assert!(is_alive(process), "a process with another start time is not the one that was meant");
        stop(process).unwrap();
        assert!(!is_alive(process));
        stop(process).unwrap();
    }

    #[test]
    fn a_relay_that_fails_is_quoted() {
        let (_dir, command, socket) = script("printf '1\\nno such thing' >&3; exit 1");
        let error = start(&command, socket).unwrap_err();
        assert!(error.to_string().ends_with("could not start: no such thing"), "{error}");
    }

    #[test]
    fn a_relay_without_a_word_is_an_error() {
        let (_dir, command, socket) = script("exit 0");
        assert!(matches!(start(&command, socket), Err(RelayError::Silent(_))));
    }

    #[test]
    fn a_program_that_is_missing_is_named() {
        let (_dir, command, socket) = script("");
        let command = RelayCommand { program: "/nonexistent/rproxy".into(), ..command };
        assert!(start(&command, socket).unwrap_err().to_string().contains("/nonexistent/rproxy"));
    }

    #[test]
    fn a_relay_is_found_by_what_it_was_asked_to_do() {
        let (_dir, command, socket) = script("echo 0 >&3; while :; do sleep 600 & wait; done");
        // The interpreter has the script's name as its first argument, so that must not be what it is found
        // by.
        let process = start(&command, socket).unwrap();
        let found = find(&command);
        stop(process).unwrap();
        assert_eq!(found, None);
    }
}
