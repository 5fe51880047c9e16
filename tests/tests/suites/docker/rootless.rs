//! Rootless Docker: which client a container sees through RootlessKit and `rproxy`.

use std::env;
use std::fs::{self, Permissions};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use tempfile::TempDir;

use testkit::backend::TcpBackend;
use testkit::client;
use testkit::eventually;
use testkit::netns::Namespace;
use testkit::process::{Process, Stream, run};
use testkit::require::{self, Need};
use testkit::rootless::{AS_USER, SUBORDINATE, USER};
use testkit::rproxy::{Standalone, netns_setup, rproxy, rproxy_shim};
use testkit::suite::Case;
use testkit::topology::{BRIDGE, BRIDGE_V4, HOST_V4, HOST_V6, client_and_host};
use testkit::udp::Backend;

use super::client_address::{PORT, Seen, serve};
use super::daemon::{DAEMON, Docker, network_inside};

/// Inside, the links that RootlessKit makes for the files of the real root go, as in dockerd-rootless.sh of moby.
const AS_ROOT_INSIDE: &str = r#"rm -f /run/docker /run/containerd /run/xtables.lock; exec "$@""#;

/// The port of this host alone that leads to the container, and that of the `rproxy` in front of it.
const BEHIND: u16 = 5301;
const IN_FRONT: u16 = 8080;

/// The port of a container that is started before there is a plane.
const EARLY: u16 = 8081;

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

pub(crate) fn cases() -> Vec<Case> {
    let programs =
        ["rootlesskit", "slirp4netns", "newuidmap", "setpriv", "nsenter", "nft"].map(Need::Program);
    let case = |name: &str, body: fn()| {
        Case::new(name, body).needs(DAEMON).needs(&programs).deadline(Duration::from_secs(180))
    };
    vec![
        case("RootlessKit's driver builtin connects from the loopback address", builtin),
        case("an rproxy in front of RootlessKit tells the client", in_front),
        case("RootlessKit's driver slirp4netns keeps the client", slirp4netns),
    ]
}

/// A host with rootless Docker.
struct Rootless {
    docker: Docker,
    /// The network of the host, where RootlessKit listens.
    host: Namespace,
    /// An outside host.
    outside: Namespace,
    /// The files of the daemon, which [`Docker`] removes.
    dir: PathBuf,
}

impl Rootless {
    /// Starts it with this port driver, and `proxy` in place of docker-proxy.
    fn start(driver: &str, proxy: &Path) -> Self {
        let (outside, host) = client_and_host();
        let directory = home(proxy);
        let dir = directory.path().to_owned();
        let process = host.spawn(rootlesskit(&dir, driver));
        process.wait_for_line(Stream::Stderr, |line| line.contains("API listen on"));
        let socket = format!("unix://{}/run/docker.sock", dir.display());
        // Its network is not known before.
        let inside = network_inside(process.only_child(), daemon(&dir));
        // Without a cgroup of its own: a user may not make any.
        let docker = Docker::ready(process, inside, socket, String::from("none"), directory);
        Self { docker, host, outside, dir }
    }

    /// A command inside of the namespaces of the daemon, as its user enters them.
    fn inside(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = require::command("nsenter");
        command.env("PATH", path(&self.dir));
        command.args([
            "--mount",
            "--pid",
            "--net",
            "--target",
            &self.docker.daemon_pid().unwrap().to_string(),
        ]);
        let user = USER.to_string();
        command.args(["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups"]);
        command.args(["nsenter", "--user", "--net", "--mount", "--preserve-credentials"]);
        command.args(["--target", &daemon(&self.dir), program]).args(arguments);
        command
    }

    /// Runs the container that is published at [`PORT`] and [`BEHIND`], over TCP and UDP.
    fn run_web(&self) -> (TcpBackend, Backend) {
        let ports = [format!("{PORT}:{PORT}"), format!("127.0.0.1:{BEHIND}:{PORT}")];
        let options = ports.map(|port| format!("--publish {port} --publish {port}/udp")).join(" ");
        self.docker.run_idle("web", &options);
        serve(&self.docker.network_of("web"))
    }
}

/// The directory of a daemon with `proxy`, with that of its user.
fn home(proxy: &Path) -> TempDir {
    let directory = tempfile::Builder::new().prefix("rproxy-rootless-").tempdir().unwrap();
    let dir = directory.path();
    fs::set_permissions(dir, Permissions::from_mode(0o755)).unwrap();
    for (name, mode) in [("home", 0o700), ("run", 0o700), ("bin", 0o755), ("path", 0o755)] {
        let path = dir.join(name);
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        chown(&path, Some(USER), Some(USER)).unwrap();
    }
    // The user may have no access to the directory of the build.
    let bin = dir.join("bin");
    for program in [rproxy(), rproxy_shim(), netns_setup()] {
        fs::copy(program, bin.join(program.file_name().unwrap())).unwrap();
    }
    // RootlessKit's program executes it by this name.
    symlink(bin.join(proxy.file_name().unwrap()), dir.join("path/docker-proxy")).unwrap();
    fs::write(dir.join("daemon.json"), "{}").unwrap();
    directory
}

/// Where the daemon finds its programs: the userland proxy, and those of the system. The link to it is not beside the
/// programs.
fn path(dir: &Path) -> String {
    let path = env::var("PATH").unwrap_or_default();
    let dir = dir.display();
    format!("{dir}/path:{dir}/bin:{path}:/usr/local/sbin:/usr/sbin:/sbin")
}

/// dockerd, as dockerd-rootless.sh of moby starts it.
fn rootlesskit(dir: &Path, driver: &str) -> Command {
    let mut command = require::command("unshare");
    command.args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.args(["sh", "-c", AS_USER, "sh"]).arg(dir).arg("rootlesskit");
    command.args([
        "--net=slirp4netns",
        "--mtu=65520",
        "--slirp4netns-sandbox=auto",
        "--slirp4netns-seccomp=auto",
    ]);
    command.args(["--disable-host-loopback", "--copy-up=/etc", "--copy-up=/run", "--propagation=rslave"]);
    command.arg(format!("--port-driver={driver}"));
    command.args(["sh", "-c", AS_ROOT_INSIDE, "sh", "dockerd", "--storage-driver", "vfs", "--config-file"]);
    command.arg(dir.join("daemon.json"));
    command.env("USER", USER.to_string()).env("SUBORDINATE", SUBORDINATE).env("PATH", path(dir));
    command
        .env("HOME", dir.join("home"))
        .env("XDG_RUNTIME_DIR", dir.join("run"))
        .env("TMPDIR", dir.join("home"));
    command
}

/// The process of the daemon, in its process namespace.
fn daemon(dir: &Path) -> String {
    fs::read_to_string(dir.join("run/docker.pid")).unwrap().trim().to_owned()
}

/// The `rproxy --attach` inside.
struct Plane<'d> {
    rootless: &'d Rootless,
    process: Process,
}

impl<'d> Plane<'d> {
    /// Starts one with these keys of `[attach]`, and waits until shims can attach to it.
    fn start(rootless: &'d Rootless, attach: &str) -> Self {
        write_config(&rootless.dir, attach);
        let [config, control] =
            ["rproxy.toml", "run/control"].map(|name| rootless.dir.join(name).display().to_string());
        let command = rootless.inside("rproxy", &["--attach", "--config", &config, "--control", &control]);
        let plane = Self { rootless, process: Process::spawn(command) };
        let ctl = || run(rootless.inside("rproxy", &["ctl", "--control", &control, "list"]));
        eventually("the plane serves its control socket", || ctl().status.success());
        plane
    }

    /// Gives attached ports these keys instead.
    fn change(&self, attach: &str) {
        write_config(&self.rootless.dir, attach);
        kill(self.process.only_child(), Signal::SIGHUP).unwrap();
        self.process.wait_for_line(Stream::Stderr, |line| line.contains("configuration reloaded"));
    }

    /// How many connections and flows did not come from their client's address.
    fn not_as_client(&self) -> u64 {
        let control = self.rootless.dir.join("run/control").display().to_string();
        let stats =
            run(self.rootless.inside("rproxy", &["ctl", "--control", &control, "stats", "--json"])).success();
        let stats: Value = serde_json::from_str(&stats).unwrap();
        let counters = stats["mappings"].as_array().unwrap().iter();
        counters.filter_map(|port| port["errors"]["source_unavailable"].as_u64()).sum()
    }
}

fn write_config(dir: &Path, attach: &str) {
    fs::write(dir.join("rproxy.toml"), format!("[attach]\n{attach}\n")).unwrap();
}

/// The client in a header of version 2.
fn told_in(header: &[u8]) -> IpAddr {
    const ADDRESSES: usize = 16;
    let addresses = &header[ADDRESSES..];
    // Two addresses and two ports.
    match addresses.len() {
        12 => <[u8; 4]>::try_from(&addresses[..4]).unwrap().into(),
        36 => <[u8; 16]>::try_from(&addresses[..16]).unwrap().into(),
        _ => panic!("not a header: {header:?}"),
    }
}

/// With an `rproxy` for each port, and with a plane.
fn builtin() {
    let own = Rootless::start("builtin", rproxy());
    let _servers = own.run_web();
    for (client, ip) in clients(&own) {
        for seen in Seen::by(client, (ip, PORT).into()) {
            assert_eq!((seen.peer.ip(), seen.header.len()), (BRIDGE_V4.into(), 0), "{ip}");
        }
    }
    drop(own);
    let rootless = Rootless::start("builtin", rproxy_shim());
    // Without a plane, a shim finds the rproxy beside the file that the link leads to.
    rootless.docker.run_idle("early", &format!("--publish {EARLY}:{EARLY}"));
    let early = TcpBackend::echo_in(&rootless.docker.network_of("early"), (Ipv4Addr::UNSPECIFIED, EARLY));
    rootless.outside.run(|| client::assert_echoes((HOST_V4, EARLY).into()));
    drop(early);
    let plane = Plane::start(&rootless, "source = 'client'\nsend_proxy = 'v2'");
    let _servers = rootless.run_web();
    for (count, (client, ip)) in (1..).zip(clients(&rootless)) {
        for seen in Seen::by(client, (ip, PORT).into()) {
            let driver = if ip.is_ipv4() { LOOPBACK } else { Ipv6Addr::LOCALHOST.into() };
            assert_eq!((seen.peer.ip(), told_in(&seen.header)), (BRIDGE_V4.into(), driver), "{ip}");
        }
        assert_eq!(plane.not_as_client(), 2 * count, "{ip}");
    }
}

/// Clients of each family, outside and on the host, and the addresses that they ask.
fn clients(rootless: &Rootless) -> [(&Namespace, IpAddr); 4] {
    let (outside, host) = (&rootless.outside, &rootless.host);
    [
        (outside, HOST_V4.into()),
        (outside, HOST_V6.into()),
        (host, LOOPBACK),
        (host, Ipv6Addr::LOCALHOST.into()),
    ]
}

fn in_front() {
    let rootless = Rootless::start("builtin", rproxy_shim());
    let accept = "accept_proxy = ['127.0.0.1', '::1']";
    let plane = Plane::start(&rootless, &format!("{accept}\nsource = 'client'"));
    let _servers = rootless.run_web();
    let state = rootless.dir.join("run/netns-setup").display().to_string();
    let setup = ["transparent", "up", "--interface", BRIDGE, "--state-dir", &state];
    run(rootless.inside("netns-setup", &setup)).success();
    let listen = format!("[::]:{IN_FRONT}");
    let to = format!("127.0.0.1:{BEHIND}");
    let front = ["--proto", "tcp+udp", "--send-proxy", "v2", "--host", &listen, "--to", &to];
    let _front = Standalone::start_in(&rootless.host, &front);
    for seen in Seen::by(&rootless.outside, (HOST_V4, IN_FRONT).into()) {
        assert_eq!((seen.peer, seen.header.len()), (seen.own, 0));
    }
    assert_eq!(plane.not_as_client(), 0);
    // The container has no IPv6 address.
    for seen in Seen::by(&rootless.outside, (HOST_V6, IN_FRONT).into()) {
        assert_eq!((seen.peer.ip(), seen.header.len()), (BRIDGE_V4.into(), 0));
    }
    assert_eq!(plane.not_as_client(), 2);
    plane.change(&format!("{accept}\nsend_proxy = 'v2'"));
    for ip in [IpAddr::from(HOST_V4), HOST_V6.into()] {
        for seen in Seen::by(&rootless.outside, (ip, IN_FRONT).into()) {
            assert_eq!((seen.peer.ip(), &seen.header), (BRIDGE_V4.into(), &seen.told()));
        }
    }
}

fn slirp4netns() {
    let rootless = Rootless::start("slirp4netns", rproxy());
    let _servers = rootless.run_web();
    for seen in Seen::by(&rootless.outside, (HOST_V4, PORT).into()) {
        assert_eq!((seen.peer, seen.header.len()), (seen.own, 0));
    }
}
