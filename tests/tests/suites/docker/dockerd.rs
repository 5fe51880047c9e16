//! The real dockerd with `rproxy` as its userland proxy: published ports work as before.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use testkit::backend::TcpBackend;
use testkit::client;
use testkit::eventually;
use testkit::holdings::private_memory;
use testkit::load;
use testkit::netns::Namespace;
use testkit::process::{Output, Process, Stream, run};
use testkit::require::{self, Need};
use testkit::rproxy::{self, rproxy, rproxy_shim};
use testkit::shim::Shim;
use testkit::suite::Case;
use testkit::udp::{self, Backend, bind_in};

/// What each daemon of this suite needs.
const DAEMON: &[Need] = &[
    Need::Root,
    Need::Ipv6,
    Need::Program("dockerd"),
    Need::Program("docker"),
    Need::Program("iptables"),
    Need::Program("busybox"),
    Need::Program("ip"),
];

const PAGE: &str = "published by rproxy\n";

/// A container that serves [`PAGE`] at port 80.
const SERVER: &str = "small busybox httpd -f -p 80 -h /www";

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &str, body: fn()| Case::new(name, body).needs(DAEMON);
    vec![
        case("a port is published on every address", published_everywhere),
        case("a port is published on one address", published_on_one_address),
        case("a free port is chosen and reported", free_port_is_reported),
        case("rproxy is the process that serves", rproxy_serves).needs(&[Need::Program("ps")]),
        case("rproxy-shim attaches what is published", shim_attaches).needs(&[Need::Program("ps")]),
        case("rproxy-shim with nothing to attach to", shim_serves).needs(&[Need::Program("ps")]),
        case("a restart of dockerd with live-restore: connections and flows go on", live_restore),
        case("a range of 500 ports takes little memory", range).needs(&[Need::Program("ps")]),
        case("containers reach a port through the host", containers_reach_it),
        case("docker stop frees the port", stop_frees_port),
        case("a port in use fails docker run with rproxy's message", taken_port_is_explained),
        case("docker restart right after traffic", restart_after_traffic),
        case("a UDP port answers the host and other containers", udp_from_host_and_containers),
    ]
}

/// A dockerd of its own: network, mounts, processes and files are all separate from the machine's.
struct Docker {
    process: Process,
    namespace: Namespace,
    socket: String,
    cgroup: String,
    directory: TempDir,
}

impl Docker {
    fn start() -> Self {
        Self::start_with(rproxy())
    }

    /// A dockerd with this userland proxy.
    fn start_with(proxy: &Path) -> Self {
        Self::start_by(proxy, r#"exec "$@""#, &[])
    }

    /// A dockerd that is started again when it ends, and leaves its containers running then.
    fn start_restoring(proxy: &Path) -> Self {
        Self::start_by(proxy, r#"while :; do "$@"; done"#, &["--live-restore"])
    }

    /// A dockerd that the shell starts with `script`, with more arguments.
    fn start_by(proxy: &Path, script: &str, more: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let directory = tempfile::Builder::new().prefix("rproxy-dockerd-").tempdir().unwrap();
        let cgroup = format!("rproxy-tests-{}-{number}", process::id());
        let socket = format!("unix://{}/socket", directory.path().display());
        let namespace = Namespace::new();
        let mut daemon = daemon(directory.path(), &socket, &cgroup, script);
        daemon.arg("--userland-proxy-path").arg(proxy).args(more);
        let process = namespace.spawn(daemon);
        let docker = Self { process, namespace, socket, cgroup, directory };
        docker.process.wait_for_line(Stream::Stderr, |line| line.contains("API listen on"));
        docker.import_image();
        docker
    }

    /// An image with nothing but busybox and a page in it.
    fn import_image(&self) {
        let root = self.directory.path().join("image");
        fs::create_dir_all(root.join("bin")).unwrap();
        fs::create_dir(root.join("www")).unwrap();
        fs::copy(require::find("busybox").unwrap(), root.join("bin/busybox")).unwrap();
        symlink("busybox", root.join("bin/sh")).unwrap();
        fs::write(root.join("www/index.html"), PAGE).unwrap();
        let archive = root.with_extension("tar");
        let mut tar = require::command("tar");
        tar.arg("-C").arg(&root).arg("-cf").arg(&archive).arg(".");
        run(tar).success();
        let mut import = self.client();
        import.args(["import", "--change", "EXPOSE 80"]).arg(&archive).arg("small");
        run(import).success();
    }

    /// The docker client, without a user's settings.
    fn client(&self) -> Command {
        let mut command = require::command("docker");
        command.env("DOCKER_CONFIG", self.directory.path()).args(["--host", &self.socket]);
        command
    }

    /// Runs the docker client with blank-separated arguments.
    fn docker(&self, arguments: &str) -> Output {
        let mut command = self.client();
        command.args(arguments.split_whitespace());
        run(command)
    }

    /// Starts the container `web` with these options to `docker run`.
    fn run_server(&self, options: &str) {
        self.docker(&format!("run --detach --name web {options} {SERVER}")).success();
        self.await_server();
    }

    /// Waits until the server in `web` listens, of which docker knows nothing.
    fn await_server(&self) {
        let format = "{{.NetworkSettings.IPAddress}}";
        let ip = self.docker(&format!("inspect --format {format} web")).success();
        let address = SocketAddr::new(ip.trim().parse().unwrap(), 80);
        while self.namespace.run(|| TcpStream::connect(address)).is_err() {
            thread::yield_now();
        }
    }

    /// Starts a container that does nothing.
    fn run_idle(&self, name: &str, options: &str) {
        self.docker(&format!("run --detach --name {name} {options} small busybox sleep 600")).success();
    }

    /// The network of a running container.
    fn network_of(&self, container: &str) -> Namespace {
        let id = self.docker(&format!("inspect --format {{{{.Id}}}} {container}")).success();
        let cgroup = Path::new(&self.cgroup).join(id.trim()).join("cgroup.procs");
        let processes =
            cgroup_roots().into_iter().find_map(|root| fs::read_to_string(root.join(&cgroup)).ok());
        let process = processes.unwrap().lines().next().unwrap().to_owned();
        Namespace::open(&format!("/proc/{process}/ns/net"))
    }

    /// Fetches the page from a container of its own.
    fn wget(&self, url: &str) -> Output {
        self.docker(&format!("run --rm small busybox wget -q -O - {url}"))
    }

    /// Fetches the page on the daemon's host.
    #[track_caller]
    fn assert_served(&self, ip: impl Into<IpAddr>, port: u16) {
        let address = SocketAddr::new(ip.into(), port);
        let answer = self.namespace.run(|| client::ask(address, b"GET / HTTP/1.0\r\n\r\n")).unwrap();
        assert!(answer.ends_with(PAGE.as_bytes()), "{}", String::from_utf8_lossy(&answer));
    }

    /// Whether nobody listens on a port of an address of the daemon's host.
    fn is_free(&self, ip: impl Into<IpAddr>, port: u16) -> bool {
        let address = SocketAddr::new(ip.into(), port);
        self.namespace.run(|| TcpListener::bind(address)).is_ok()
    }

    /// The daemon that the shell has started.
    fn restored_daemon(&self) -> Pid {
        let shell = self.daemon_pid().unwrap();
        let children = fs::read_to_string(format!("/proc/{shell}/task/{shell}/children")).unwrap();
        let is_daemon = |pid: &&str| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "dockerd")
        };
        Pid::from_raw(children.split_whitespace().find(is_daemon).unwrap().parse().unwrap())
    }

    /// The daemon itself, or the shell that starts it; its parent is the process that made its namespaces.
    fn daemon_pid(&self) -> Option<Pid> {
        let parent = self.process.pid();
        let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).ok()?;
        Some(Pid::from_raw(children.trim().parse().ok()?))
    }
}

/// dockerd as the first process of a process namespace, or the shell that starts it again: when that goes, the kernel ends containerd, every
/// container and every proxy, and undoes their mounts. It gets an empty `/run`, lest it use the machine's
/// containerd.
fn daemon(directory: &Path, socket: &str, cgroup: &str, script: &str) -> Command {
    fs::write(directory.join("daemon.json"), "{}").unwrap();
    let mut command = require::command("unshare");
    command.env("TMPDIR", directory).args(["--mount", "--propagation", "private"]);
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.args(["sh", "-c", &format!("mount -t tmpfs tmpfs /run && {script}"), "sh"]);
    command.arg(require::find("dockerd").unwrap());
    command.arg("--config-file").arg(directory.join("daemon.json"));
    command.arg("--data-root").arg(directory.join("data"));
    command.arg("--exec-root").arg(directory.join("exec"));
    command.arg("--pidfile").arg(directory.join("pid"));
    command.args(["--host", socket, "--storage-driver", "vfs"]);
    command.args(["--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent", cgroup]);
    command
}

impl Drop for Docker {
    fn drop(&mut self) {
        // The end of its parent, which waits for it, is then the end of everything inside.
        if let Some(pid) = self.daemon_pid() {
            kill(pid, Signal::SIGKILL).ok();
            self.process.wait();
        }
        for root in cgroup_roots() {
            remove_cgroup(&root.join(&self.cgroup)).ok();
        }
    }
}

/// The root of the one hierarchy, or of each of several.
fn cgroup_roots() -> Vec<PathBuf> {
    let root = Path::new("/sys/fs/cgroup");
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).chain([root.into()]).collect()
}

/// Removes a cgroup with those inside it. Their files cannot be removed, and need not be.
fn remove_cgroup(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_cgroup(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

fn published_everywhere() {
    let docker = Docker::start();
    docker.run_server("--publish 8080:80");
    docker.assert_served(Ipv4Addr::LOCALHOST, 8080);
    docker.assert_served(Ipv4Addr::new(172, 17, 0, 1), 8080);
    // The container has no IPv6 address.
    docker.assert_served(Ipv6Addr::LOCALHOST, 8080);
}

fn published_on_one_address() {
    let docker = Docker::start();
    docker.run_server("--publish 127.0.0.1:8080:80");
    docker.assert_served(Ipv4Addr::LOCALHOST, 8080);
    assert!(docker.is_free(Ipv6Addr::LOCALHOST, 8080));
    assert!(docker.is_free(Ipv4Addr::new(172, 17, 0, 1), 8080));
}

fn free_port_is_reported() {
    let docker = Docker::start();
    docker.run_server("--publish-all");
    let ports = docker.docker("port web 80").success();
    let port = |line: &str| line.rsplit_once(':').unwrap().1.parse().unwrap();
    for line in ports.lines() {
        let host: IpAddr = match line.starts_with("0.0.0.0:") {
            true => Ipv4Addr::LOCALHOST.into(),
            false => Ipv6Addr::LOCALHOST.into(),
        };
        docker.assert_served(host, port(line));
    }
    assert_eq!(ports.lines().count(), 2, "{ports}");
}

/// Checks which program serves port 8080: as many processes as there are families.
#[track_caller]
fn assert_served_by(docker: &Docker, program: &Path) {
    let mut ps = require::command("ps");
    ps.args(["-o", "pid=", "--ppid", &docker.daemon_pid().unwrap().to_string()]);
    let children = run(ps).success();
    let command_line =
        |pid: &str| fs::read_to_string(format!("/proc/{}/cmdline", pid.trim())).unwrap_or_default();
    let proxies: Vec<_> =
        children.lines().filter(|pid| command_line(pid).contains("-host-port\08080\0")).collect();
    assert_eq!(proxies.len(), 2, "one for each family: {children}");
    for pid in proxies {
        assert_eq!(fs::read_link(format!("/proc/{}/exe", pid.trim())).unwrap(), program);
    }
}

fn rproxy_serves() {
    let docker = Docker::start();
    docker.run_server("--publish 8080:80");
    assert_served_by(&docker, rproxy());
}

fn shim_attaches() {
    let docker = Docker::start_with(rproxy_shim());
    let _plane = docker.namespace.spawn(rproxy::command(&["--attach"]));
    eventually("shims can connect", || Shim::connect_in(&docker.namespace, "rproxy").is_ok());
    for _ in 0..2 {
        docker.run_server("--publish 8080:80");
        assert_served_by(&docker, rproxy_shim());
        docker.assert_served(Ipv4Addr::LOCALHOST, 8080);
        docker.assert_served(Ipv6Addr::LOCALHOST, 8080);
        docker.docker("rm --force web").success();
        assert!(docker.is_free(Ipv4Addr::UNSPECIFIED, 8080));
        assert!(docker.is_free(Ipv6Addr::UNSPECIFIED, 8080));
    }
}

fn shim_serves() {
    let docker = Docker::start_with(rproxy_shim());
    docker.run_server("--publish 8080:80");
    assert_served_by(&docker, rproxy());
    docker.assert_served(Ipv4Addr::LOCALHOST, 8080);
    docker.docker("rm --force web").success();
    assert!(docker.is_free(Ipv4Addr::UNSPECIFIED, 8080));
}

/// dockerd is killed under traffic, and publishes the ports again.
fn live_restore() {
    const DNS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 5300);
    const WEB: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);

    let docker = Docker::start_restoring(rproxy_shim());
    let plane = docker.namespace.spawn(rproxy::command(&["--attach"]));
    eventually("shims can connect", || Shim::connect_in(&docker.namespace, "rproxy").is_ok());
    docker.run_idle("web", "--publish 8080:80 --publish 5300:53/udp");
    let network = docker.network_of("web");
    let _echo = TcpBackend::echo_in(&network, (Ipv4Addr::UNSPECIFIED, 80));
    let _naming = Backend::naming(bind_in(&network, (Ipv4Addr::UNSPECIFIED, 53)));
    let stream = docker.namespace.run(|| client::connect(WEB));
    let socket = bind_in(&docker.namespace, (Ipv4Addr::UNSPECIFIED, 0));
    let flow = udp::flow_of(&socket, DNS);
    let transfer = |number: usize| client::exchange(&stream, number as u64, 100_000);
    load::meanwhile(1, transfer, |transfers| {
        transfers.wait_for(3);
        kill(docker.restored_daemon(), Signal::SIGKILL).unwrap();
        docker.process.wait_for_lines(Stream::Stderr, 2, |line| line.contains("API listen on"));
        transfers.wait_for(3);
    });
    assert_eq!(udp::flow_of(&socket, DNS), flow);
    docker.namespace.run(|| client::assert_echoes(WEB));
    docker.docker("stop --time 0 web").success();
    assert_eq!(client::read_to_end(&stream).1, client::End::Reset);
    for port in [8080, 5300] {
        assert!(docker.is_free(Ipv4Addr::UNSPECIFIED, port));
        assert!(docker.is_free(Ipv6Addr::UNSPECIFIED, port));
    }
    assert!(docker.namespace.run(|| std::net::UdpSocket::bind("0.0.0.0:5300")).is_ok());
    assert!(plane.is_running());
}

/// A thousand shims and their plane.
fn range() {
    const MOST_KB: usize = 55 * 1024;

    // Its rules of the firewall take longer than all else.
    let docker = Docker::start_by(rproxy_shim(), r#"exec "$@""#, &["--iptables=false", "--ip6tables=false"]);
    let plane = docker.namespace.spawn(rproxy::command(&["--attach"]));
    eventually("shims can connect", || Shim::connect_in(&docker.namespace, "rproxy").is_ok());
    let ports = "127.0.0.1:20000-20499:20000-20499";
    docker.run_idle("web", &format!("--publish {ports} --publish {ports}/udp"));
    let daemon = docker.daemon_pid().unwrap();
    let mut ps = require::command("ps");
    ps.args(["-o", "pid=,comm=", "--ppid", &daemon.to_string()]);
    let children = run(ps).success();
    let shims = children.lines().filter_map(|line| line.trim().split_once(' '));
    let shims = shims.filter(|(_pid, name)| name.trim() == "rproxy-shim");
    let shims: Vec<Pid> = shims.map(|(pid, _name)| Pid::from_raw(pid.parse().unwrap())).collect();
    assert_eq!(shims.len(), 1_000, "{children}");
    let memory: usize = shims.iter().chain([&plane.pid()]).map(|pid| private_memory(*pid)).sum();
    assert!(memory <= MOST_KB, "{memory} kB");
    let echo = TcpBackend::echo_in(&docker.network_of("web"), (Ipv4Addr::UNSPECIFIED, 20_499));
    docker.namespace.run(|| client::assert_echoes((Ipv4Addr::LOCALHOST, 20_499).into()));
    drop(echo);
    docker.docker("rm --force web").success();
    assert!((20_000..20_500).all(|port| docker.is_free(Ipv4Addr::LOCALHOST, port)));
}

fn containers_reach_it() {
    let docker = Docker::start();
    docker.run_server("--publish 8080:80");
    let url = "http://172.17.0.1:8080/";
    assert_eq!(docker.wget(url).success(), PAGE);
    let itself = docker.docker(&format!("exec web busybox wget -q -O - {url}"));
    assert_eq!(itself.success(), PAGE);
}

fn stop_frees_port() {
    let docker = Docker::start();
    docker.run_server("--publish 8080:80");
    let open = docker.namespace.run(|| client::connect((Ipv4Addr::LOCALHOST, 8080).into()));
    // The server, as the first process of its container, ignores the signal that would stop it.
    docker.docker("stop --time 0 web").success();
    assert!(docker.is_free(Ipv4Addr::UNSPECIFIED, 8080));
    assert!(docker.is_free(Ipv6Addr::UNSPECIFIED, 8080));
    client::read_to_end(&open);
    docker.docker("start web").success();
    docker.await_server();
    docker.assert_served(Ipv4Addr::LOCALHOST, 8080);
}

fn taken_port_is_explained() {
    let docker = Docker::start();
    let _taken = docker.namespace.run(|| TcpListener::bind("0.0.0.0:8080").unwrap());
    let output = docker.docker(&format!("run --detach --publish 8080:80 {SERVER}"));
    assert!(!output.status.success(), "{output:#?}");
    let message = "starting userland proxy: cannot listen on 0.0.0.0:8080";
    assert!(output.stderr.contains(message), "{output:#?}");
}

/// The answer has to come from the address that was asked, also where the daemon's rules leave a container's
/// datagrams to the proxy (libnetwork#1729).
fn udp_from_host_and_containers() {
    let docker = Docker::start();
    docker.run_idle("server", "--publish 5300:53/udp");
    docker.run_idle("client", "");
    let backend = bind_in(&docker.network_of("server"), (Ipv4Addr::UNSPECIFIED, 53));
    let _backend = Backend::echo(backend);
    let on_host = bind_in(&docker.namespace, (Ipv4Addr::UNSPECIFIED, 0));
    let in_container = bind_in(&docker.network_of("client"), (Ipv4Addr::UNSPECIFIED, 0));
    for size in [0, 1, 1_400, 20_000] {
        udp::assert_echoes(&on_host, (Ipv4Addr::LOCALHOST, 5300).into(), &vec![7; size]);
        udp::assert_echoes(&on_host, (Ipv4Addr::new(172, 17, 0, 1), 5300).into(), &vec![7; size]);
        udp::assert_echoes(&in_container, (Ipv4Addr::new(172, 17, 0, 1), 5300).into(), &vec![7; size]);
    }
}

/// The connections that were just closed keep their addresses for a while, and must not keep the port.
fn restart_after_traffic() {
    let docker = Docker::start();
    docker.run_server("--publish 8080:80");
    for _ in 0..3 {
        docker.assert_served(Ipv4Addr::LOCALHOST, 8080);
        docker.assert_served(Ipv6Addr::LOCALHOST, 8080);
        docker.docker("restart --time 0 web").success();
        docker.await_server();
    }
    docker.assert_served(Ipv4Addr::LOCALHOST, 8080);
}
