//! The real dockerd, and containers that need no image from elsewhere.

use std::fmt::Display;
use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{self, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use testkit::cgroup;
use testkit::client;
use testkit::netns::Namespace;
use testkit::process::{Output, Process, Stream, run};
use testkit::require::{self, Need};
use testkit::rproxy::rproxy;

/// What each daemon of these suites needs.
pub(super) const DAEMON: &[Need] = &[
    Need::Root,
    Need::Ipv6,
    Need::Program("dockerd"),
    Need::Program("docker"),
    Need::Program("iptables"),
    Need::Program("busybox"),
    Need::Program("ip"),
];

pub(super) const PAGE: &str = "published by rproxy\n";

/// A container that serves [`PAGE`] at port 80.
pub(super) const SERVER: &str = "small busybox httpd -f -p 80 -h /www";

/// The network of process `pid`, as processes are numbered where `outer` runs.
pub(super) fn network_inside(outer: impl Display, pid: impl Display) -> Namespace {
    /// proc(5), below the directory that is a process's root.
    const PROC: &str = "root/proc";
    Namespace::open(&format!("/proc/{outer}/{PROC}/{pid}/ns/net"))
}

/// A dockerd of its own: network, mounts, processes and files are all separate from the machine's.
pub(super) struct Docker {
    pub(super) process: Process,
    pub(super) namespace: Namespace,
    socket: String,
    cgroup: String,
    directory: TempDir,
}

impl Docker {
    pub(super) fn start() -> Self {
        Self::start_with(rproxy())
    }

    /// A dockerd with this userland proxy.
    pub(super) fn start_with(proxy: &Path) -> Self {
        Self::start_by(proxy, r#"exec "$@""#, &[])
    }

    /// A dockerd that is started again when it ends, and leaves its containers running then.
    pub(super) fn start_restoring(proxy: &Path) -> Self {
        Self::start_by(proxy, r#"while :; do "$@"; done"#, &["--live-restore"])
    }

    /// A dockerd that the shell starts with `script`, with more arguments.
    pub(super) fn start_by(proxy: &Path, script: &str, more: &[&str]) -> Self {
        Self::start_in(Namespace::new(), proxy, script, more)
    }

    /// As [`Docker::start_by`], on this host.
    pub(super) fn start_in(namespace: Namespace, proxy: &Path, script: &str, more: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let directory = tempfile::Builder::new().prefix("rproxy-dockerd-").tempdir().unwrap();
        let cgroup = format!("rproxy-tests-{}-{number}", process::id());
        let socket = format!("unix://{}/socket", directory.path().display());
        let mut daemon = daemon(directory.path(), &socket, &cgroup, script);
        daemon.arg("--userland-proxy-path").arg(proxy).args(more);
        Self::ready(namespace.spawn(daemon), namespace, socket, cgroup, directory)
    }

    /// A dockerd that has been started as `process`, a child of it being the first process of its process namespace. The
    /// daemon listens on `socket`, and has its files in `directory`.
    pub(super) fn ready(
        process: Process,
        namespace: Namespace,
        socket: String,
        cgroup: String,
        directory: TempDir,
    ) -> Self {
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
    pub(super) fn docker(&self, arguments: &str) -> Output {
        let mut command = self.client();
        command.args(arguments.split_whitespace());
        run(command)
    }

    /// Starts the container `web` with these options to `docker run`.
    pub(super) fn run_server(&self, options: &str) {
        self.docker(&format!("run --detach --name web {options} {SERVER}")).success();
        self.await_server();
    }

    /// Waits until the server in `web` listens, of which docker knows nothing.
    pub(super) fn await_server(&self) {
        let format = "{{.NetworkSettings.IPAddress}}";
        let ip = self.docker(&format!("inspect --format {format} web")).success();
        let address = SocketAddr::new(ip.trim().parse().unwrap(), 80);
        while self.namespace.run(|| TcpStream::connect(address)).is_err() {
            thread::yield_now();
        }
    }

    /// Starts a container that does nothing.
    pub(super) fn run_idle(&self, name: &str, options: &str) {
        self.docker(&format!("run --detach --name {name} {options} small busybox sleep 600")).success();
    }

    /// The network of a running container.
    pub(super) fn network_of(&self, container: &str) -> Namespace {
        let pid = self.docker(&format!("inspect --format {{{{.State.Pid}}}} {container}")).success();
        self.network_of_process(pid.trim())
    }

    /// The network of a process, by its id as the daemon sees it.
    pub(super) fn network_of_process(&self, pid: &str) -> Namespace {
        network_inside(self.daemon_pid().unwrap(), pid)
    }

    /// Fetches the page from a container of its own.
    pub(super) fn wget(&self, url: &str) -> Output {
        self.docker(&format!("run --rm small busybox wget -q -O - {url}"))
    }

    /// Fetches the page on the daemon's host.
    #[track_caller]
    pub(super) fn assert_served(&self, ip: impl Into<IpAddr>, port: u16) {
        let address = SocketAddr::new(ip.into(), port);
        let answer = self.namespace.run(|| client::ask(address, b"GET / HTTP/1.0\r\n\r\n")).unwrap();
        assert!(answer.ends_with(PAGE.as_bytes()), "{}", String::from_utf8_lossy(&answer));
    }

    /// Whether nobody listens on a port of an address of the daemon's host.
    pub(super) fn is_free(&self, ip: impl Into<IpAddr>, port: u16) -> bool {
        let address = SocketAddr::new(ip.into(), port);
        self.namespace.run(|| TcpListener::bind(address)).is_ok()
    }

    /// The daemon that the shell has started.
    pub(super) fn restored_daemon(&self) -> Pid {
        let shell = self.daemon_pid().unwrap();
        let children = fs::read_to_string(format!("/proc/{shell}/task/{shell}/children")).unwrap();
        let is_daemon = |pid: &&str| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "dockerd")
        };
        Pid::from_raw(children.split_whitespace().find(is_daemon).unwrap().parse().unwrap())
    }

    /// The daemon itself, or the shell that starts it; its parent is the process that made its namespaces.
    pub(super) fn daemon_pid(&self) -> Option<Pid> {
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
        cgroup::remove(&self.cgroup);
    }
}
