//! A process that serves attached ports, and ports for it.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rproxy_shim::message::{Attach, Reason, Request, TCP, UDP};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

use testkit::process::{self, Process, Stream};
use testkit::shim::{Reply, Shim};
use testkit::upgradable::{Program, upgrade};

/// A process that serves attached ports, and its successors.
pub(crate) struct Plane {
    /// The first process. It captures the output of its successors. It is reaped before the program ends the others.
    pub(crate) first: Process,
    pub(crate) program: Program,
    /// The process that serves.
    pub(crate) pid: Pid,
    upgrades: usize,
}

impl Plane {
    /// Starts one with a control socket and these arguments.
    #[track_caller]
    pub(crate) fn start(more: &[&str]) -> Self {
        Self::start_by(more, Process::spawn)
    }

    /// As [`Plane::start`], using `spawn`, which may choose a namespace.
    #[track_caller]
    pub(crate) fn start_by(more: &[&str], spawn: impl FnOnce(std::process::Command) -> Process) -> Self {
        let program = Program::new();
        let first = Self::spawn(&program, more, spawn);
        let pid = first.pid();
        Self { first, program, pid, upgrades: 0 }
    }

    fn spawn(
        program: &Program,
        more: &[&str],
        spawn: impl FnOnce(std::process::Command) -> Process,
    ) -> Process {
        let (attach, control) = (format!("--attach={}", name()), program.control());
        let arguments = [&[&*attach, "--control", control.to_str().unwrap()], more].concat();
        let process = spawn(program.command(&arguments));
        process.wait_for_line(Stream::Stderr, |line| line.contains("confined"));
        process
    }

    /// Starts another one after this one has released its name. Returns this one, which may still drain.
    #[track_caller]
    pub(crate) fn restart(&mut self, more: &[&str]) -> Process {
        let next = Self::spawn(&self.program, more, Process::spawn);
        (self.pid, self.upgrades) = (next.pid(), 0);
        std::mem::replace(&mut self.first, next)
    }

    /// Lets a new process take over.
    #[track_caller]
    pub(crate) fn upgrade(&mut self) {
        self.pid = upgrade(&self.first, self.upgrades, self.pid);
        self.upgrades += 1;
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid, signal).unwrap();
    }

    /// Waits for a line of its log.
    #[track_caller]
    pub(crate) fn wait_for_log(&self, part: &str) -> String {
        self.first.wait_for_line(Stream::Stderr, |line| line.contains(part))
    }

    /// Runs `rproxy ctl`.
    #[track_caller]
    pub(crate) fn ctl(&self, arguments: &[&str]) -> process::Output {
        self.program.ctl(arguments)
    }

    /// Runs `rproxy ctl --json`, which must succeed.
    #[track_caller]
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        serde_json::from_str(&self.ctl(&[arguments, &["--json"]].concat()).success()).unwrap()
    }

    /// The counters of a port, which may drain.
    #[track_caller]
    pub(crate) fn stats(&self, port: &Port) -> Value {
        let (stats, name) = (self.json(&["stats"]), port.name());
        let all = ["mappings", "draining"].map(|key| stats[key].as_array().unwrap().clone()).concat();
        all.into_iter().find(|stats| stats["name"] == *name).unwrap_or_else(|| panic!("no {name} in {stats}"))
    }
}

/// The name under which the process of this case serves; each case has a process of its own.
pub(crate) fn name() -> String {
    format!("rproxy-tests/attach/{}", std::process::id())
}

/// Connects as a shim does.
#[track_caller]
pub(crate) fn connect() -> Shim {
    Shim::connect(&name()).unwrap()
}

/// A port that a shim has attached. Dropping it is the death of the shim.
pub(crate) struct Port {
    pub(crate) shim: Shim,
    pub(crate) socket: Socket,
    backend: SocketAddr,
    protocol: u8,
}

impl Port {
    /// Binds and attaches a TCP port.
    #[track_caller]
    pub(crate) fn tcp(host: SocketAddr, backend: SocketAddr) -> Self {
        Self::attach(listen(host, true).unwrap(), TCP, backend)
    }

    /// Binds and attaches a UDP port.
    #[track_caller]
    pub(crate) fn udp(host: SocketAddr, backend: SocketAddr) -> Self {
        Self::attach(bind_udp(host).unwrap(), UDP, backend)
    }

    /// Attaches a socket.
    #[track_caller]
    pub(crate) fn attach(socket: Socket, protocol: u8, backend: SocketAddr) -> Self {
        Self::attach_by(connect(), socket, protocol, backend)
    }

    /// Attaches a socket over a connection.
    #[track_caller]
    pub(crate) fn attach_by(shim: Shim, socket: Socket, protocol: u8, backend: SocketAddr) -> Self {
        assert_eq!(ask(&shim, protocol, backend, &[socket.as_fd()]), Reply::Serving);
        Self { shim, socket, backend, protocol }
    }

    /// Attaches its socket to the next process.
    #[track_caller]
    pub(crate) fn again(self) -> Self {
        Self::attach(self.socket, self.protocol, self.backend)
    }

    /// Where clients connect.
    pub(crate) fn address(&self) -> SocketAddr {
        self.socket.local_addr().unwrap().as_socket().unwrap()
    }

    /// The name that it has for users.
    pub(crate) fn name(&self) -> String {
        let protocol = if self.protocol == TCP { "tcp" } else { "udp" };
        format!("docker/{protocol}/{}", self.address())
    }

    /// Detaches it, and ends as a shim does.
    #[track_caller]
    pub(crate) fn end(self, reason: Reason) {
        assert_eq!(self.shim.detach(reason), Reply::Detached);
    }
}

/// Asks for sockets to be served as one port.
#[track_caller]
pub(crate) fn ask(shim: &Shim, protocol: u8, backend: SocketAddr, sockets: &[BorrowedFd<'_>]) -> Reply {
    shim.ask(Request::Attach(Attach { protocol, backend }), sockets)
}

/// A TCP socket that listens, with `SO_REUSEADDR` or without.
pub(crate) fn listen(host: SocketAddr, reuse: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(host), Type::STREAM, None)?;
    socket.set_reuse_address(reuse)?;
    socket.bind(&host.into())?;
    socket.listen(4096)?;
    Ok(socket)
}

/// A UDP socket.
pub(crate) fn bind_udp(host: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(host), Type::DGRAM, None)?;
    socket.bind(&host.into())?;
    Ok(socket)
}

/// Checks that another program can have the port of a TCP socket at once, without `SO_REUSEADDR`.
#[track_caller]
pub(crate) fn assert_free_tcp(host: SocketAddr) {
    let bound = listen(host, false);
    assert!(bound.is_ok(), "{host}/tcp is not free: {bound:?}");
}

/// As [`assert_free_tcp`], for UDP.
#[track_caller]
pub(crate) fn assert_free_udp(host: SocketAddr) {
    let bound = bind_udp(host);
    assert!(bound.is_ok(), "{host}/udp is not free: {bound:?}");
}
