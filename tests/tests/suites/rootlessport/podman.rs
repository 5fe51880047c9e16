//! Rootless Podman with `rproxy` in place of its relay.
//!
//! Podman comes from Debian, with CNI for networks of several containers. Its user and its networks are those of
//! namespaces of these tests, and its only image is made here.

use std::fs::{self, Permissions};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use tempfile::TempDir;

use rproxy_mapping::addr::wildcard_of;
use testkit::backend::TcpBackend;
use testkit::client;
use testkit::eventually;
use testkit::image;
use testkit::netns::Namespace;
use testkit::process::{Output, Process, Stream, run};
use testkit::require::{self, Need};
use testkit::rootless::{AS_USER, SUBORDINATE, USER};
use testkit::rproxy::rproxy;
use testkit::suite::Case;
use testkit::topology::{HOST_V4, HOST_V6, client_and_host};
use testkit::udp::{self, Backend};

const PORT: u16 = 8080;

/// The published port of a server that names its client, which has the same number inside.
const NAMING: u16 = 8081;

/// The port of the servers in containers.
const INSIDE: u16 = 80;

/// Settings of the user, after which Podman finds its helpers in the directory that follows.
const SETTINGS: &str =
    "[engine]\ncgroup_manager = 'cgroupfs'\nevents_logger = 'file'\nruntime = 'runc'\nhelper_binaries_dir = ";

/// Where Podman finds its CNI plugins and what else belongs to the system.
const PATHS: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// As the first process of a process namespace, it is the parent of all whose own has ended.
const FIRST: &str = "echo ready; sleep infinity & wait";

pub(crate) fn cases() -> Vec<Case> {
    let programs = ["podman", "runc", "slirp4netns", "newuidmap", "setpriv", "nsenter", "busybox"];
    let programs = programs.map(Need::Program);
    let case = |name: &str, body: fn()| {
        let needs = [Need::Root, Need::Ipv6];
        Case::new(name, body).needs(&needs).needs(&programs).deadline(Duration::from_secs(180))
    };
    vec![
        case("slirp4netns: TCP and UDP, IPv4 and IPv6, and empty datagrams", slirp4netns),
        case("a network: TCP and UDP, IPv4 and IPv6, and empty datagrams", network),
        case("a range of ports", range),
        case("a taken port is told with its holder", conflict),
        case("a stop frees the port, and a restart serves it again", stop_and_restart),
        case("network connect and disconnect move clients", connect_and_disconnect),
        case("a relay that was killed frees the port, and a restart brings it back", killed),
    ]
}

/// A host with Podman for a user.
struct Podman {
    /// The first process of its processes' namespace, and the parent of that.
    process: Process,
    host: Namespace,
    outside: Namespace,
    dir: TempDir,
}

impl Podman {
    fn start() -> Self {
        let (outside, host) = client_and_host();
        let dir = home();
        let mut command = require::command("unshare");
        command.args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]);
        command.args(["--mount-proc", "sh", "-c", AS_USER, "sh"]).arg(dir.path()).args(["sh", "-c", FIRST]);
        command.env("USER", USER.to_string()).env("SUBORDINATE", SUBORDINATE);
        command.env("HOME", dir.path().join("home"));
        let process = host.spawn(command);
        process.wait_for_line(Stream::Stdout, |line| line == "ready");
        let podman = Self { process, host, outside, dir };
        let archive = image::busybox(podman.dir.path());
        podman.podman(&format!("import {} small", archive.display())).success();
        podman
    }

    /// A command of the user, in the namespaces of Podman.
    fn inside(&self, program: &str) -> Command {
        let mut command = require::command("nsenter");
        let first = self.process.only_child().to_string();
        command.args(["--mount", "--pid", "--net", "--target", &first]);
        let user = USER.to_string();
        command.args(["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups", program]);
        let home = self.dir.path().join("home");
        command.current_dir(&home).env("HOME", home).env("PATH", PATHS);
        command.env("XDG_RUNTIME_DIR", self.dir.path().join("run"));
        command
    }

    /// Runs podman with blank-separated arguments.
    fn podman(&self, arguments: &str) -> Output {
        let mut command = self.inside("podman");
        command.args(arguments.split_whitespace());
        run(command)
    }

    /// Starts the container `web`, which does nothing by itself, with these options.
    fn run_web(&self, options: &str) {
        self.podman(&format!("run --detach --name web {options} small busybox sleep 600")).success();
    }

    /// The network of a running container.
    fn network_of(&self, container: &str) -> Namespace {
        let pid = self.podman(&format!("inspect --format {{{{.State.Pid}}}} {container}")).success();
        // As numbered in the namespace of its processes.
        let inside = format!("/proc/{}/root", self.process.only_child());
        Namespace::open(&format!("{inside}/proc/{}/ns/net", pid.trim()))
    }

    /// Servers in `web`.
    fn servers(&self) -> (TcpBackend, Backend) {
        let inside = self.network_of("web");
        let address = (Ipv4Addr::UNSPECIFIED, INSIDE);
        (TcpBackend::echo_in(&inside, address), Backend::echo(udp::bind_in(&inside, address)))
    }

    /// Whether nothing has the published port on the host.
    fn is_free(&self) -> bool {
        self.host.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT)).is_ok())
    }

    /// The processes that relay, as numbered on the machine.
    fn relays(&self) -> Vec<nix::unistd::Pid> {
        let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let own = namespace(&self.process.only_child().to_string());
        let processes = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.file_name());
        let processes = processes.filter_map(|name| name.to_str().map(str::to_owned));
        let is_relay = |pid: &String| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            name.trim() == "rootlessport" && namespace(pid) == own
        };
        let relays = processes.filter(|pid| pid.parse::<i32>().is_ok()).filter(is_relay);
        relays.map(|pid| nix::unistd::Pid::from_raw(pid.parse().unwrap())).collect()
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        // The end of the first process is that of all others.
        kill(self.process.only_child(), Signal::SIGKILL).ok();
        self.process.wait();
    }
}

/// The directory of the user, and of the programs that Podman is to find.
fn home() -> TempDir {
    let directory = tempfile::Builder::new().prefix("rproxy-podman-").tempdir().unwrap();
    let dir = directory.path();
    fs::set_permissions(dir, Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(dir.join("bin")).unwrap();
    // The user may have no access to the directory of the build.
    fs::copy(rproxy(), dir.join("bin/rproxy")).unwrap();
    symlink("rproxy", dir.join("bin/rootlessport")).unwrap();
    let settings = dir.join("home/.config/containers");
    fs::create_dir_all(&settings).unwrap();
    fs::create_dir(dir.join("run")).unwrap();
    fs::write(settings.join("containers.conf"), format!("{SETTINGS}['{}']\n", dir.join("bin").display()))
        .unwrap();
    fs::write(settings.join("storage.conf"), "[storage]\ndriver = 'vfs'\n").unwrap();
    for name in ["run", "home", "home/.config", "home/.config/containers"] {
        let path = dir.join(name);
        fs::set_permissions(&path, Permissions::from_mode(0o700)).unwrap();
        chown(&path, Some(USER), Some(USER)).unwrap();
    }
    directory
}

/// Checks that clients of both families are served, outside and on the host.
#[track_caller]
fn assert_served(podman: &Podman) {
    let loopback = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
    let outside = [IpAddr::from(HOST_V4), HOST_V6.into()];
    for (client, ips) in [(&podman.host, loopback), (&podman.outside, outside)] {
        for ip in ips {
            let front = SocketAddr::new(ip, PORT);
            client.run(|| {
                client::assert_echoes(front);
                let socket = udp::client(wildcard_of(ip));
                for datagram in [b"one".as_slice(), b"", b"two"] {
                    udp::assert_echoes(&socket, front, datagram);
                }
            });
        }
    }
}

/// The options for [`PORT`], and that of a server that names its client.
fn published() -> String {
    format!("--publish {PORT}:{INSIDE} --publish {PORT}:{INSIDE}/udp --publish {NAMING}:{NAMING}/udp")
}

/// The address of its client that a container sees.
fn seen(podman: &Podman) -> IpAddr {
    let inside = podman.network_of("web");
    let _naming = Backend::naming(udp::bind_in(&inside, (Ipv4Addr::UNSPECIFIED, NAMING)));
    let front = (HOST_V4, NAMING).into();
    podman.outside.run(|| udp::flow_of(&udp::client(Ipv4Addr::UNSPECIFIED), front)).ip()
}

fn slirp4netns() {
    let podman = Podman::start();
    podman.run_web(&published());
    let _servers = podman.servers();
    assert_served(&podman);
    assert_eq!(seen(&podman), Ipv4Addr::new(10, 0, 2, 100));
}

fn network() {
    let podman = Podman::start();
    podman.podman("network create one").success();
    podman.run_web(&format!("--network one {}", published()));
    let _servers = podman.servers();
    assert_served(&podman);
    let format = "{{range.NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
    let own = podman.podman(&format!("inspect --format {format} web")).success();
    assert_eq!(seen(&podman).to_string(), own.trim());
}

fn range() {
    const COUNT: u16 = 20;

    let podman = Podman::start();
    let last = COUNT - 1;
    podman.run_web(&format!("--publish 127.0.0.1:{PORT}-{}:{INSIDE}-{}/udp", PORT + last, INSIDE + last));
    let inside = podman.network_of("web");
    for number in [0, 1, last] {
        let _backend = Backend::echo(udp::bind_in(&inside, (Ipv4Addr::UNSPECIFIED, INSIDE + number)));
        let front = (Ipv4Addr::LOCALHOST, PORT + number).into();
        podman.host.run(|| udp::assert_echoes(&udp::local(), front, b"datagram"));
    }
}

fn conflict() {
    let podman = Podman::start();
    let holder = podman.host.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).unwrap());
    let start = || podman.podman(&format!("run --detach --name two {} small busybox sleep 600", published()));
    let output = start();
    assert_eq!(output.status.code(), Some(126), "{output:?}");
    let told = format!(
        "rootlessport cannot listen on [::]:{PORT}/tcp: the tcp port is taken, perhaps by another user's program; `ss -antp"
    );
    assert!(output.stderr.contains(&told), "{}", output.stderr);
    drop(holder);
    podman.podman("rm two").success();
    podman.run_web(&published());
    let output = start();
    // Podman passes the protocols in any order.
    let told = ["tcp", "udp"]
        .map(|proto| format!("[::]:{PORT}/{proto}: the {proto} port is taken by rootlessport (process "));
    assert!(told.iter().any(|told| output.stderr.contains(told)), "{}", output.stderr);
    let _servers = podman.servers();
    assert_served(&podman);
}

fn stop_and_restart() {
    let podman = Podman::start();
    podman.run_web(&published());
    {
        let _servers = podman.servers();
        let connected = podman.host.run(|| client::connect((Ipv4Addr::LOCALHOST, PORT).into()));
        client::ping(&connected);
        podman.podman("restart --time 0 web").success();
        assert!(client::try_exchange(&connected, 1, 1).is_err(), "the server is another one");
    }
    let servers = podman.servers();
    assert_served(&podman);
    drop(servers);
    podman.podman("stop --time 0 web").success();
    eventually("the port is free", || podman.is_free());
    eventually("no relay is left", || podman.relays().is_empty());
}

fn connect_and_disconnect() {
    let podman = Podman::start();
    for network in ["one", "two"] {
        podman.podman(&format!("network create {network}")).success();
    }
    podman.run_web(&format!("--network one {}", published()));
    let _servers = podman.servers();
    assert_served(&podman);
    let relays = podman.relays();
    podman.podman("network connect two web").success();
    assert_served(&podman);
    // What is left is an address of the other network.
    podman.podman("network disconnect one web").success();
    assert_served(&podman);
    assert_eq!(podman.relays(), relays);
}

fn killed() {
    let podman = Podman::start();
    podman.run_web(&published());
    for relay in podman.relays() {
        kill(relay, Signal::SIGKILL).unwrap();
    }
    eventually("the port is free", || podman.is_free());
    podman.host.run(|| TcpStream::connect((Ipv4Addr::LOCALHOST, PORT)).unwrap_err());
    podman.podman("restart --time 0 web").success();
    let _servers = podman.servers();
    assert_served(&podman);
}
