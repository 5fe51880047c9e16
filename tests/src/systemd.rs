//! A substitute for systemd: passes sockets to a service and receives its notifications (sd_notify(3),
//! sd_listen_fds(3)).

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;

use command_fds::{CommandFdExt, FdMapping};
use nix::sys::socket::{UnixAddr, bind};
use tempfile::TempDir;

use crate::PATIENCE;
use crate::rproxy::rproxy;

/// The first descriptor of passed sockets.
const LISTEN_FDS_START: i32 = 3;

/// The service manager of one service.
pub struct Systemd {
    socket: UnixDatagram,
    /// The value of `NOTIFY_SOCKET`.
    name: OsString,
    _dir: Option<TempDir>,
}

impl Default for Systemd {
    fn default() -> Self {
        Self::new()
    }
}

impl Systemd {
    /// One that receives notifications.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        Self::at(UnixDatagram::bind(&path).unwrap(), path.into(), Some(dir))
    }

    /// One that receives notifications on an abstract socket (unix(7)).
    pub fn abstract_socket() -> Self {
        let socket = UnixDatagram::unbound().unwrap();
        // The kernel chooses a name for a socket without one.
        bind(socket.as_raw_fd(), &UnixAddr::new_unnamed()).unwrap();
        let address = socket.local_addr().unwrap();
        let name = [b"@", address.as_abstract_name().unwrap()].concat();
        Self::at(socket, OsString::from_vec(name), None)
    }

    fn at(socket: UnixDatagram, name: OsString, dir: Option<TempDir>) -> Self {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { socket, name, _dir: dir }
    }

    /// Fills the queue of messages. Returns how many it took.
    pub fn fill(&self) -> usize {
        let sender = UnixDatagram::unbound().unwrap();
        sender.set_nonblocking(true).unwrap();
        let address = self.socket.local_addr().unwrap();
        std::iter::from_fn(|| sender.send_to_addr(b"FILLER", &address).ok()).count()
    }

    /// Reads what [`Systemd::fill`] has sent, and anything before that.
    #[track_caller]
    pub fn empty(&self, count: usize) -> Vec<Vec<String>> {
        let mut others = Vec::new();
        let mut fillers = 0;
        while fillers < count {
            let told = self.told();
            if told == ["FILLER"] { fillers += 1 } else { others.push(told) }
        }
        others
    }

    /// A command for `rproxy` as a service with these arguments.
    pub fn command(&self, arguments: &[&str]) -> Command {
        self.command_with_sockets(arguments, Vec::new())
    }

    /// The same, with named sockets passed to it.
    pub fn command_with_sockets(&self, arguments: &[&str], sockets: Vec<(&str, OwnedFd)>) -> Command {
        self.command_for("$$", arguments, sockets)
    }

    /// The same, with sockets passed to the process `pid`, a word for the shell; `$$` is the process itself.
    pub fn command_for(&self, pid: &str, arguments: &[&str], sockets: Vec<(&str, OwnedFd)>) -> Command {
        self.command_of(rproxy(), pid, arguments, sockets)
    }

    /// The same, with a program at another path.
    pub fn command_of(
        &self,
        program: &Path,
        pid: &str,
        arguments: &[&str],
        sockets: Vec<(&str, OwnedFd)>,
    ) -> Command {
        let mut command = Command::new("/bin/sh");
        // Its process id is not known before it runs.
        command.args(["-c", &format!(r#"LISTEN_PID={pid} exec "$0" "$@""#)]).arg(program).args(arguments);
        command.env("NOTIFY_SOCKET", &self.name);
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

    /// Has a command notify it, which takes no sockets.
    pub fn notified_by(&self, command: &mut Command) {
        command.env("NOTIFY_SOCKET", &self.name);
    }

    /// Waits for the next message, and returns its lines.
    #[track_caller]
    pub fn told(&self) -> Vec<String> {
        let mut message = [0; 4096];
        let len = self.socket.recv(&mut message).expect("the service says something");
        String::from_utf8_lossy(&message[..len]).lines().map(String::from).collect()
    }

    /// Whether no further message has arrived.
    pub fn has_heard_all(&self) -> bool {
        self.socket.set_nonblocking(true).unwrap();
        let is_empty = self.socket.recv(&mut [0; 4096]).is_err();
        self.socket.set_nonblocking(false).unwrap();
        is_empty
    }
}
