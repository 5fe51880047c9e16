//! Starts a program like dockerd starts its userland proxy, and reads its status like dockerd does.
//!
//! The interface is that of moby's `daemon/libnetwork/portmapper/proxy_linux.go`: the mapping in flags, a
//! status pipe at descriptor 3, optionally a bound and listening socket at 4.

use std::fs::File;
use std::io::Read;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, ExitStatus};

use command_fds::{CommandFdExt, FdMapping};
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::unistd::pipe2;

use crate::process::Process;

/// The descriptor of the status pipe.
pub const STATUS_FD: i32 = 3;
/// The descriptor of the listening socket, with `-use-listen-fd`.
pub const LISTEN_FD: i32 = 4;

/// What a proxy has written to its status pipe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// `0\n`: it serves the mapping.
    Ready,
    /// `1\n` and a message, which dockerd shows to its user.
    Failed(String),
    /// The pipe was closed without a status, or with something else.
    Other(String),
}

/// A proxy started like by dockerd. Dropping it kills it.
pub struct DockerProxy {
    /// The running proxy.
    pub process: Process,
    status: File,
}

impl DockerProxy {
    /// Starts `program` with these arguments and, at [`LISTEN_FD`], this socket.
    #[track_caller]
    pub fn start(program: &Path, arguments: &[String], listener: Option<OwnedFd>) -> Self {
        Self::start_by(program, arguments, listener, OFlag::empty(), Process::spawn)
    }

    /// Like [`DockerProxy::start`], with a status pipe that preserves the boundaries of writes: each
    /// [`DockerProxy::read_status_packet`] returns one write.
    #[track_caller]
    pub fn start_with_packet_pipe(program: &Path, arguments: &[String]) -> Self {
        Self::start_by(program, arguments, None, OFlag::O_DIRECT, Process::spawn)
    }

    /// Starts a proxy with `spawn`, which may choose a namespace.
    #[track_caller]
    pub fn start_by(
        program: &Path,
        arguments: &[String],
        listener: Option<OwnedFd>,
        pipe_flags: OFlag,
        spawn: impl FnOnce(Command) -> Process,
    ) -> Self {
        let (status, proxys_end) = pipe2(OFlag::O_CLOEXEC | pipe_flags).unwrap();
        let mut fds = vec![FdMapping { parent_fd: proxys_end, child_fd: STATUS_FD }];
        fds.extend(listener.map(|parent_fd| FdMapping { parent_fd, child_fd: LISTEN_FD }));
        let mut command = Command::new(program);
        command.args(arguments).fd_mappings(fds).unwrap();
        Self { process: spawn(command), status: status.into() }
    }

    /// Waits for the status: one read of two bytes, like dockerd, then the rest unless it is success.
    pub fn status(&mut self) -> Status {
        let mut start = [0; 2];
        let len = self.status.read(&mut start).unwrap();
        if &start[..len] == b"0\n" {
            return Status::Ready;
        }
        let mut text = String::from_utf8_lossy(&start[..len]).into_owned();
        self.status.read_to_string(&mut text).unwrap();
        match text.strip_prefix("1\n") {
            Some(message) => Status::Failed(message.into()),
            None => Status::Other(text),
        }
    }

    /// Waits for the next write to a packet pipe; `None` at its end.
    pub fn read_status_packet(&mut self) -> Option<Vec<u8>> {
        let mut packet = vec![0; 4096];
        let len = self.status.read(&mut packet).unwrap();
        packet.truncate(len);
        (len > 0).then_some(packet)
    }

    /// Stops it like dockerd does: SIGINT, then a wait for its exit.
    #[track_caller]
    pub fn stop(&self) -> ExitStatus {
        self.process.signal(Signal::SIGINT);
        self.process.wait()
    }
}

/// The arguments for a mapping, in dockerd's order.
pub fn mapping(protocol: &str, host: SocketAddr, container: SocketAddr) -> Vec<String> {
    let (host_ip, host_port) = (host.ip().to_string(), host.port().to_string());
    let (container_ip, container_port) = (container.ip().to_string(), container.port().to_string());
    [
        ["-proto", protocol],
        ["-host-ip", &host_ip],
        ["-host-port", &host_port],
        ["-container-ip", &container_ip],
        ["-container-port", &container_port],
    ]
    .concat()
    .into_iter()
    .map(String::from)
    .collect()
}
