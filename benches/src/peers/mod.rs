//! The peers: how each is started for a set of mappings, and what can be measured on it.

mod config;
mod rules;

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rproxy_shim::message::NAME_VARIABLE;
use tempfile::TempDir;
use testkit::docker_proxy::{self, DockerProxy, Status};
use testkit::process::{Process, Stream};
use testkit::require;
use testkit::rproxy::{rproxy, rproxy_shim};

use crate::account::Family;
use crate::message::{self, service};
use crate::quic;
use crate::wiring::{Protocol, Wiring};
pub(crate) use rules::Active;
use rules::Rules;

/// How long a peer may take until it is ready.
const READY: Duration = Duration::from_secs(10);

/// The start of the abstract names where shims attach their ports. Several planes run at a time.
const PLANE: &str = "rproxy-benches";

/// The number of planes so far.
static PLANES: AtomicU32 = AtomicU32::new(0);

/// How often it is probed.
const ASK: Duration = Duration::from_millis(5);

/// How long a probe waits for its answer.
const PATIENCE: Duration = Duration::from_millis(500);

/// A peer that relays clients to the backend.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    /// The name that the user gives it.
    pub(crate) name: String,
    /// Its kind.
    pub(crate) kind: Kind,
}

/// The kinds of peers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A process for each mapping, with docker-proxy's command line.
    Docker(PathBuf),
    /// One process for all mappings of a protocol, started with `rproxy`'s command line.
    Standalone(PathBuf, Client),
    /// A process for each mapping, with docker-proxy's command line, that attaches to one `rproxy`.
    Attached,
    Haproxy(Client),
    Nginx,
    Socat,
    /// Address translation in the host's kernel.
    Dnat,
    /// The container's own address, routed by the host.
    Direct,
}

/// What the backend learns about the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Client {
    /// Nothing: it sees the peer.
    Hidden,
    /// Connections and datagrams come from the client's address.
    Source,
    /// A header of the PROXY protocol tells it, in version 2.
    Header,
}

/// A port of the host that is mapped to the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) protocol: Protocol,
    pub(crate) port: u16,
}

/// Why a peer cannot take part.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PeerError {
    #[error("unknown peer '{0}'; the known ones are {known}, NAME=PATH is one that is started as dockerd does, and NAME=standalone:PATH another rproxy", known = [&NAMES[..], &ON_REQUEST].concat().join(", "))]
    Unknown(String),
    #[error("{0} is not installed")]
    Missing(String),
    #[error("{peer}: cannot {step}: {source}")]
    Io { peer: String, step: &'static str, source: io::Error },
    #[error("{peer} does not serve {protocol}: {reason}")]
    Refused { peer: String, protocol: Protocol, reason: String },
    #[error("{peer} is not ready after {READY:?}")]
    NotReady { peer: String },
    #[error("{peer} has ended: {said}")]
    Ended { peer: String, said: String },
}

/// All peers, in the order of the table.
pub(crate) const NAMES: [&str; 9] = [
    "rproxy",
    "rproxy-plane",
    "rproxy-standalone",
    "docker-proxy",
    "haproxy",
    "nginx",
    "socat",
    "dnat",
    "none",
];

/// Peers that take part only if they are named: what it costs to let the backend know the client.
pub(crate) const ON_REQUEST: [&str; 4] =
    ["rproxy-source", "rproxy-header", "haproxy-source", "haproxy-header"];

/// The reference peer.
pub(crate) const REFERENCE: &str = "docker-proxy";

impl Peer {
    /// Finds a peer by its name; `NAME=PATH` is another docker-proxy, and `NAME=standalone:PATH` another `rproxy`.
    ///
    /// # Errors
    /// [`PeerError`], also when it is not installed.
    pub(crate) fn find(name: &str) -> Result<Self, PeerError> {
        if let Some((name, path)) = name.split_once('=') {
            let (path, kind): (_, fn(PathBuf) -> Kind) = match path.strip_prefix("standalone:") {
                Some(path) => (PathBuf::from(path), |path| Kind::Standalone(path, Client::Hidden)),
                None => (PathBuf::from(path), Kind::Docker),
            };
            let there =
                path.is_file().then_some(()).ok_or_else(|| PeerError::Missing(path.display().to_string()));
            return there.map(|()| Self { name: name.into(), kind: kind(path) });
        }
        let kind = match name {
            "rproxy" => Kind::Docker(rproxy().into()),
            "rproxy-standalone" => Kind::Standalone(rproxy().into(), Client::Hidden),
            "rproxy-source" => Kind::Standalone(rproxy().into(), Client::Source),
            "rproxy-header" => Kind::Standalone(rproxy().into(), Client::Header),
            "rproxy-plane" => Kind::Attached,
            "docker-proxy" => Kind::Docker(installed("docker-proxy")?),
            "haproxy" => installed("haproxy").map(|_| Kind::Haproxy(Client::Hidden))?,
            "haproxy-source" => installed("haproxy").map(|_| Kind::Haproxy(Client::Source))?,
            "haproxy-header" => installed("haproxy").map(|_| Kind::Haproxy(Client::Header))?,
            "nginx" => installed("nginx").and_then(|_| config::nginx_stream_module()).map(|_| Kind::Nginx)?,
            "socat" => installed("socat").map(|_| Kind::Socat)?,
            "dnat" => installed("nft").map(|_| Kind::Dnat)?,
            "none" => Kind::Direct,
            other => return Err(PeerError::Unknown(other.into())),
        };
        Ok(Self { name: name.into(), kind })
    }

    /// Whether it is rproxy, so that a failure is ours.
    pub(crate) fn is_ours(&self) -> bool {
        self.name.starts_with("rproxy")
    }

    /// Whether there are processes to account for.
    pub(crate) fn has_processes(&self) -> bool {
        !matches!(self.kind, Kind::Dnat | Kind::Direct)
    }

    /// Starts it with these mappings, and waits until all of them are served.
    ///
    /// # Errors
    /// [`PeerError`]
    pub(crate) fn start(&self, wiring: &Wiring, mappings: &[Mapping]) -> Result<Running, PeerError> {
        let mut running = Running::new(self, wiring);
        match &self.kind {
            Kind::Docker(path) => {
                for mapping in mappings {
                    running.start_docker_proxy(wiring, path, *mapping);
                }
            }
            Kind::Attached => {
                running.start_plane(wiring)?;
                for mapping in mappings {
                    running.start_docker_proxy(wiring, rproxy_shim(), *mapping);
                }
            }
            Kind::Standalone(path, client) => {
                for protocol in Protocol::ALL {
                    running.start_standalone(wiring, (path, *client), mappings, protocol)?;
                }
            }
            Kind::Haproxy(client) => running.start_haproxy(wiring, *client, mappings)?,
            Kind::Nginx => running.start_nginx(wiring, mappings)?,
            Kind::Socat => {
                for mapping in mappings {
                    running.start_socat(wiring, *mapping);
                }
            }
            Kind::Dnat => running.rules = Some(Rules::Dnat(mappings.to_vec())),
            Kind::Direct => {}
        }
        if let Kind::Standalone(_, Client::Source) | Kind::Haproxy(Client::Source) = self.kind {
            running.rules = Some(Rules::ReturnPath);
        }
        running.note(wiring, mappings)?;
        Ok(running)
    }
}

fn installed(program: &str) -> Result<PathBuf, PeerError> {
    require::find(program).ok_or_else(|| PeerError::Missing(program.into()))
}

/// A running peer. Dropping it ends all of its processes.
pub(crate) struct Running {
    peer: Peer,
    processes: Vec<Started>,
    /// The abstract name where its shims attach their ports.
    plane: Option<String>,
    /// The rules that the kernel has while it is measured.
    rules: Option<Rules>,
    /// The address of the first mapping of each protocol.
    addresses: Vec<(Protocol, SocketAddr)>,
    /// Protocols that it does not serve, and why.
    refused: Vec<(Protocol, String)>,
    /// Configuration and run-time files.
    directory: Option<TempDir>,
    host: Ipv4Addr,
}

/// A process and, for a docker-proxy, its status pipe.
enum Started {
    Docker(DockerProxy),
    Plain(Process),
}

impl Started {
    fn process(&self) -> &Process {
        match self {
            Self::Docker(proxy) => &proxy.process,
            Self::Plain(process) => process,
        }
    }
}

impl Running {
    fn new(peer: &Peer, wiring: &Wiring) -> Self {
        Self {
            peer: peer.clone(),
            processes: Vec::new(),
            plane: None,
            rules: None,
            addresses: Vec::new(),
            refused: Vec::new(),
            directory: None,
            host: wiring.host_address(),
        }
    }

    /// The peer.
    pub(crate) fn peer(&self) -> &Peer {
        &self.peer
    }

    /// The address for clients over `protocol`.
    ///
    /// # Errors
    /// [`PeerError::Refused`] if it does not serve the protocol.
    pub(crate) fn address(&self, protocol: Protocol) -> Result<SocketAddr, PeerError> {
        let found = self.addresses.iter().find(|(served, _)| *served == protocol);
        found.map(|(_, address)| *address).ok_or_else(|| {
            let refusal = self.refused.iter().find(|(refused, _)| *refused == protocol);
            let reason = refusal.map_or("no such mapping", |(_, reason)| reason);
            PeerError::Refused { peer: self.peer.name.clone(), protocol, reason: reason.into() }
        })
    }

    /// The abstract name where its shims attach their ports, if it has any.
    pub(crate) fn plane(&self) -> Option<&str> {
        self.plane.as_deref()
    }

    /// Its processes.
    pub(crate) fn family(&self) -> Family {
        Family::of(self.processes.iter().map(|started| started.process().pid()).collect())
    }

    /// Installs kernel rules, which only exist while they are measured, because their connection tracking
    /// would slow the other peers down.
    pub(crate) fn activate<'a>(&self, wiring: &'a Wiring) -> Option<Active<'a>> {
        self.rules.as_ref().map(|rules| Active::new(wiring, rules))
    }

    fn io(&self, step: &'static str) -> impl FnOnce(io::Error) -> PeerError {
        let peer = self.peer.name.clone();
        move |source| PeerError::Io { peer, step, source }
    }

    /// Starts the process that shims attach to, and waits until it listens.
    fn start_plane(&mut self, wiring: &Wiring) -> Result<(), PeerError> {
        let name = format!("{PLANE}-{}", PLANES.fetch_add(1, Ordering::Relaxed));
        let mut command = Command::new(rproxy());
        command.arg(format!("--attach={name}")).args(["--log-level", "warn"]);
        self.processes.push(Started::Plain(wiring.host().spawn(command)));
        let deadline = Instant::now() + READY;
        let listens = || {
            let sockets = std::fs::read_to_string("/proc/thread-self/net/unix").unwrap_or_default();
            sockets.lines().any(|line| line.ends_with(&format!(" @{name}")))
        };
        while !wiring.host().run(listens) {
            self.wait_until(deadline)?;
        }
        self.plane = Some(name);
        Ok(())
    }

    fn start_docker_proxy(&mut self, wiring: &Wiring, path: &Path, mapping: Mapping) {
        let host = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, mapping.port);
        let backend = wiring.backend_for(mapping.protocol);
        let arguments = docker_proxy::mapping(mapping.protocol.name(), host.into(), backend.into());
        let plane = self.plane.as_ref();
        let spawn = |mut command: Command| {
            command.envs(plane.map(|name| (NAME_VARIABLE, name)));
            wiring.host().spawn(command)
        };
        let mut proxy = DockerProxy::start_by(path, &arguments, None, OFlag::empty(), spawn);
        match proxy.status() {
            Status::Ready => self.processes.push(Started::Docker(proxy)),
            Status::Failed(reason) | Status::Other(reason) => {
                let reason = if reason.is_empty() { proxy.process.captured(Stream::Stderr) } else { reason };
                self.refused.push((mapping.protocol, reason.trim().replace('\n', " ")));
            }
        }
    }

    fn start_standalone(
        &mut self,
        wiring: &Wiring,
        (path, client): (&Path, Client),
        mappings: &[Mapping],
        protocol: Protocol,
    ) -> Result<(), PeerError> {
        let mappings: Vec<_> = mappings.iter().filter(|mapping| mapping.protocol == protocol).collect();
        if mappings.is_empty() {
            return Ok(());
        }
        let mut command = Command::new(path);
        command.args(["--proto", protocol.name(), "--log-level", "warn"]);
        command.args(match client {
            Client::Hidden => &[][..],
            Client::Source => &["--source", "client-only"],
            Client::Header => &["--send-proxy", "v2"],
        });
        for mapping in &mappings {
            command.args([
                "--host",
                &format!("0.0.0.0:{}", mapping.port),
                "--to",
                &wiring.backend_for(protocol).to_string(),
            ]);
        }
        let process = wiring.host().spawn(command);
        let deadline = Instant::now() + READY;
        while process.captured(Stream::Stdout).lines().count() < mappings.len() {
            if !process.is_running() {
                let reason = process.captured(Stream::Stderr);
                self.refused.push((protocol, reason.trim().into()));
                return Ok(());
            }
            self.wait_until(deadline)?;
        }
        self.processes.push(Started::Plain(process));
        Ok(())
    }

    fn start_haproxy(
        &mut self,
        wiring: &Wiring,
        client: Client,
        mappings: &[Mapping],
    ) -> Result<(), PeerError> {
        let config = config::haproxy(mappings, wiring.backend(), client);
        let path = self.write_config(&config)?;
        let mut command = require::command("haproxy");
        command.args(["-db", "-f"]).arg(path);
        self.processes.push(Started::Plain(wiring.host().spawn(command)));
        for mapping in mappings.iter().filter(|mapping| mapping.protocol != Protocol::Tcp) {
            self.refused.push((mapping.protocol, "it relays TCP only".into()));
        }
        Ok(())
    }

    fn start_nginx(&mut self, wiring: &Wiring, mappings: &[Mapping]) -> Result<(), PeerError> {
        let module = config::nginx_stream_module()?;
        let config = config::nginx(&module, mappings, |protocol| wiring.backend_for(protocol));
        let path = self.write_config(&config)?;
        let mut command = require::command("nginx");
        command.arg("-c").arg(&path).args(["-e", "stderr", "-p"]).args(path.parent());
        self.processes.push(Started::Plain(wiring.host().spawn(command)));
        Ok(())
    }

    fn start_socat(&mut self, wiring: &Wiring, mapping: Mapping) {
        let (backend, port) = (wiring.backend_for(mapping.protocol), mapping.port);
        let mut command = require::command("socat");
        match mapping.protocol {
            Protocol::Tcp => command.args([
                format!("TCP4-LISTEN:{port},fork,reuseaddr,backlog=4096,nodelay"),
                format!("TCP4:{backend},nodelay"),
            ]),
            // Only the timeout ends the process of a flow.
            Protocol::Udp | Protocol::Quic => command.args([
                "-T3".into(),
                format!("UDP4-LISTEN:{port},fork,reuseaddr"),
                format!("UDP4:{backend}"),
            ]),
        };
        self.processes.push(Started::Plain(wiring.host().spawn(command)));
    }

    fn write_config(&mut self, text: &str) -> Result<PathBuf, PeerError> {
        let directory = TempDir::new().map_err(self.io("create a directory"))?;
        let path = directory.path().join("conf");
        std::fs::write(&path, text).map_err(self.io("write its configuration"))?;
        self.directory = Some(directory);
        Ok(path)
    }

    /// Determines the address of the first mapping of each protocol, and waits until it responds.
    fn note(&mut self, wiring: &Wiring, mappings: &[Mapping]) -> Result<(), PeerError> {
        let deadline = Instant::now() + READY;
        let _active = self.activate(wiring);
        for protocol in Protocol::ALL {
            let refused = self.refused.iter().any(|(refused, _)| *refused == protocol);
            let Some(first) = mappings.iter().find(|mapping| mapping.protocol == protocol && !refused) else {
                continue;
            };
            let address: SocketAddr = match self.peer.kind {
                Kind::Direct => wiring.backend_for(protocol).into(),
                _ => (self.host, first.port).into(),
            };
            while !wiring.client().run(|| answers(protocol, address)) {
                self.wait_until(deadline)?;
            }
            self.addresses.push((protocol, address));
        }
        Ok(())
    }

    fn wait_until(&self, deadline: Instant) -> Result<(), PeerError> {
        if let Some(ended) = self.processes.iter().map(Started::process).find(|process| !process.is_running())
        {
            let said = ended.captured(Stream::Stderr).trim().replace('\n', "; ");
            return Err(PeerError::Ended { peer: self.peer.name.clone(), said });
        }
        if Instant::now() >= deadline {
            return Err(PeerError::NotReady { peer: self.peer.name.clone() });
        }
        thread::sleep(ASK);
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let roots: Vec<_> = self.processes.iter().map(|started| started.process().pid()).collect();
        let family = Family::of(roots.clone());
        // The root is killed first, so that it cannot start or restart others.
        let members = family.members();
        self.processes.clear();
        for pid in members.into_iter().filter(|pid| !roots.contains(pid)) {
            end_orphan(pid);
        }
    }
}

/// Ends a process whose parent is gone. The harness has adopted it, as the first process of its namespace.
fn end_orphan(pid: Pid) {
    // It may have exited already.
    if kill(pid, Signal::SIGKILL).is_ok() {
        nix::sys::wait::waitpid(pid, None).ok();
    }
}

/// Whether a mapping works end to end.
fn answers(protocol: Protocol, address: SocketAddr) -> bool {
    let mut message = [0; message::HEADER];
    message::write(&mut message, service::ECHO, 0, 0);
    let answered = match protocol {
        Protocol::Tcp => exchange_tcp(address, &message).map(|answer| answer == message),
        Protocol::Udp => exchange_udp(address, &message).map(|answer| answer == message),
        Protocol::Quic => connected(address).and_then(|socket| quic::probe(&socket)).map(|()| true),
    };
    answered.unwrap_or(false)
}

fn exchange_tcp(address: SocketAddr, message: &[u8]) -> io::Result<[u8; message::HEADER]> {
    use std::io::{Read, Write};
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(message)?;
    let mut answer = [0; message::HEADER];
    stream.read_exact(&mut answer)?;
    Ok(answer)
}

fn exchange_udp(address: SocketAddr, message: &[u8]) -> io::Result<[u8; message::HEADER]> {
    let socket = connected(address)?;
    socket.send(message)?;
    let mut answer = [0; message::HEADER];
    socket.recv(&mut answer)?;
    Ok(answer)
}

fn connected(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}
