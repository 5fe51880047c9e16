//! The programs of this workspace in their release builds, and a standalone `rproxy`.

use std::env;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Once, OnceLock};

use crate::netns::Namespace;
use crate::process::{Process, Stream};

/// The release build of `rproxy`.
pub fn rproxy() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| release_dir().join("rproxy"))
}

/// The release build of `rproxy-shim`, which has `rproxy` beside it.
pub fn rproxy_shim() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| release_dir().join("rproxy-shim"))
}

/// The release build of `netns-setup`.
pub fn netns_setup() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| release_dir().join("netns-setup"))
}

/// The release build of `rproxy-portmap`.
pub fn portmap() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| release_dir().join("rproxy-portmap"))
}

/// The directory of the project.
pub fn tree() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The directory that cargo builds into, with the programs that write the manuals.
pub fn target_with_manuals() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let target = release_dir().parent().unwrap().to_owned();
        // As `cargo test` builds them, so that nothing has to be built again after it.
        cargo_build(&target, &["--workspace", "--examples"]);
        target
    })
}

/// Done once the release binaries are up to date.
static BUILT: Once = Once::new();

/// Makes this process use the release binaries as they are, since the one that started it has built them.
pub(crate) fn trust_build() {
    BUILT.call_once(|| ());
}

/// Builds the release binaries once, and returns their directory. Cargo itself builds the binaries of a
/// package only for that package's own tests.
fn release_dir() -> PathBuf {
    let target = target_dir();
    BUILT.call_once(|| build(&target));
    target.join("release")
}

/// The directory of what cargo builds.
pub(crate) fn target_dir() -> PathBuf {
    // This binary is at TARGET/PROFILE/deps/NAME or, if it is not a test, at TARGET/PROFILE/NAME, wherever the
    // target directory is.
    let own_path = env::current_exe().unwrap();
    let mut dirs = own_path.ancestors().skip(1).skip_while(|dir| dir.ends_with("deps"));
    dirs.nth(1).unwrap().to_owned()
}

fn build(target: &Path) {
    // The whole workspace, like `cargo build --release`: the packages of one build share the features of
    // their dependencies, so building fewer packages would rebuild them.
    cargo_build(target, &["--release", "--workspace", "--bins"]);
}

fn cargo_build(target: &Path, what: &[&str]) {
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--locked"])
        .args(what)
        .arg("--target-dir")
        .arg(target)
        .current_dir(tree())
        .status()
        .expect("cannot run cargo");
    assert!(status.success(), "cargo cannot build {what:?}: {status}");
}

/// A command for `rproxy` with the given arguments.
pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(rproxy());
    command.args(arguments);
    command
}

/// A standalone `rproxy` that has bound all of its mappings.
pub struct Standalone {
    /// The running proxy.
    pub process: Process,
    /// What it printed about each mapping, in order.
    pub ready: Vec<Ready>,
}

/// A line of `docker port`: `80/tcp -> 0.0.0.0:49153`, or `unix:/run/app.sock -> 0.0.0.0:49153`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ready {
    /// The port of the backend; 0 of a Unix socket.
    pub container_port: u16,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// The address that the mapping listens on.
    pub address: SocketAddr,
}

impl Standalone {
    /// Starts `rproxy` with `--host` and `--to` pairs among its arguments, and waits until it is ready.
    #[track_caller]
    pub fn start(arguments: &[&str]) -> Self {
        Self::ready(Process::spawn(command(arguments)), arguments)
    }

    /// Like [`Standalone::start`], inside a namespace.
    #[track_caller]
    pub fn start_in(namespace: &Namespace, arguments: &[&str]) -> Self {
        Self::ready(namespace.spawn(command(arguments)), arguments)
    }

    /// Relays one free port of the IPv4 loopback address to a backend.
    #[track_caller]
    pub fn relay_to(backend: SocketAddr, more_arguments: &[&str]) -> Self {
        let backend = backend.to_string();
        let pair = ["--host", "127.0.0.1:0", "--to", &backend];
        Self::start(&[&pair, more_arguments].concat())
    }

    /// Waits for the output of an `rproxy` that was started with `arguments`.
    #[track_caller]
    pub fn ready(process: Process, arguments: &[&str]) -> Self {
        let mappings = arguments.iter().filter(|argument| argument.starts_with("--host")).count();
        let ready = process
            .wait_for_lines(Stream::Stdout, mappings, |_| true)
            .iter()
            .map(|line| Ready::parse(line).unwrap_or_else(|| panic!("not a ready line: {line:?}")))
            .collect();
        Self { process, ready }
    }

    /// The address of the first mapping for a client in the same namespace.
    pub fn address(&self) -> SocketAddr {
        self.ready[0].reachable()
    }
}

impl Ready {
    /// Parses a line. Docker formerly printed `:::80` instead of `[::]:80`, so that is accepted as an
    /// address, too.
    pub fn parse(line: &str) -> Option<Self> {
        let (container, address) = line.split_once(" -> ")?;
        let (container_port, protocol) = match container.starts_with("unix:") {
            true => ("0", "tcp"),
            false => container.split_once('/')?,
        };
        let (host, port) = address.rsplit_once(':')?;
        let host: IpAddr = host.trim_matches(['[', ']']).parse().ok()?;
        Some(Self {
            container_port: container_port.parse().ok()?,
            protocol: protocol.into(),
            address: SocketAddr::new(host, port.parse().ok()?),
        })
    }

    /// The address that a client can connect to: loopback for a wildcard.
    pub fn reachable(&self) -> SocketAddr {
        let host = match self.address.ip() {
            IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
            specific => specific,
        };
        SocketAddr::new(host, self.address.port())
    }
}
