//! A stand-in for systemd: what it passes to a service, and what it is told (sd_notify(3),
//! sd_listen_fds(3)).

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::Command;

use command_fds::{CommandFdExt, FdMapping};
use tempfile::TempDir;

use crate::PATIENCE;
use crate::rproxy::rproxy;

/// Where passed sockets begin.
const LISTEN_FDS_START: i32 = 3;

/// The service manager of one service.
pub struct Systemd {
    socket: UnixDatagram,
    dir: TempDir,
}

impl Default for Systemd {
    fn default() -> Self {
        Self::new()
    }
}

impl Systemd {
    /// One that listens to what it is told.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(dir.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { socket, dir }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("notify")
    }

    /// `rproxy` as a service with these arguments, not started yet.
    pub fn command(&self, arguments: &[&str]) -> Command {
        self.command_with_sockets(arguments, Vec::new())
    }

    /// The same with sockets that are passed under names.
    pub fn command_with_sockets(&self, arguments: &[&str], sockets: Vec<(&str, OwnedFd)>) -> Command {
        self.command_for("$$", arguments, sockets)
    }

    /// The same with sockets that are passed to the process `pid`: a word for the shell, in which `$$`
    /// is the process itself.
    pub fn command_for(&self, pid: &str, arguments: &[&str], sockets: Vec<(&str, OwnedFd)>) -> Command {
        self.command_of(rproxy(), pid, arguments, sockets)
    }

    /// The same with a program at another path.
    pub fn command_of(
        &self,
        program: &Path,
        pid: &str,
        arguments: &[&str],
        sockets: Vec<(&str, OwnedFd)>,
    ) -> Command {
        let mut command = Command::new("/bin/sh");
        // Its own process id is known to nobody before it runs.
        command.args(["-c", &format!(r#"LISTEN_PID={pid} exec "$0" "$@""#)]).arg(program).args(arguments);
        command.env("NOTIFY_SOCKET", self.path());
        if sockets.is_empty() {
            return command;
        }
        let names: Vec<&str> = sockets.iter().map(|(name, _socket)| *name).collect();
        command.env("LISTEN_FDS", names.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        let fds = (LISTEN_FDS_START..).zip(sockets);
        let fds = fds.map(|(child_fd, (_name, parent_fd))| FdMapping { parent_fd, child_fd }).collect();
        command.fd_mappings(fds).unwrap();
        command
    }

    /// Waits for the next message, and gives its lines.
    #[track_caller]
    pub fn told(&self) -> Vec<String> {
        let mut message = [0; 4096];
        let len = self.socket.recv(&mut message).expect("the service says something");
        String::from_utf8_lossy(&message[..len]).lines().map(String::from).collect()
    }

    /// Whether nothing more was said.
    pub fn has_heard_all(&self) -> bool {
        self.socket.set_nonblocking(true).unwrap();
        let is_empty = self.socket.recv(&mut [0; 4096]).is_err();
        self.socket.set_nonblocking(false).unwrap();
        is_empty
    }
}
