//! containerd, whose `ctr` sets a network up by CNI's library.

use std::fs;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sys::signal::Signal;
use serde_json::json;
use tempfile::TempDir;
use testkit::backend::TcpBackend;
use testkit::netns::Namespace;
use testkit::process::{Output, Process};
use testkit::require::{self, Need};
use testkit::rproxy::{portmap, rproxy};
use testkit::suite::Case;
use testkit::topology::HOST_V4;
use testkit::udp;
use testkit::{PATIENCE, eventually_within, image};

use super::node::{NETWORK, Node, case};
use crate::netns_setup::stage::{assert_reaches, assert_reaches_udp};

pub(crate) fn cases() -> Vec<Case> {
    let needs = ["containerd", "ctr", "runc", "busybox", "tar", "sha256sum"].map(Need::Program);
    vec![
        case("containerd's ctr publishes through it", containerd)
            .needs(&needs)
            .deadline(Duration::from_secs(180)),
    ]
}

/// containerd whose files are in a directory of its own.
struct Containerd<'n> {
    node: &'n Node,
    dir: TempDir,
    daemon: Process,
}

impl<'n> Containerd<'n> {
    fn new(node: &'n Node) -> Self {
        let dir = tempfile::Builder::new().prefix("rproxy-containerd-").tempdir().unwrap();
        let own = dir.path().display();
        let config = format!(
            "version = 2\nroot = '{own}/root'\nstate = '{own}/state'\ndisabled_plugins = ['io.containerd.grpc.v1.cri']\n[grpc]\n  \
             address = '{own}/containerd.sock'\n"
        );
        fs::write(dir.path().join("config.toml"), config).unwrap();
        let mut command = Command::new(require::find("containerd").unwrap());
        command.arg("--config").arg(dir.path().join("config.toml"));
        let containerd = Self { node, daemon: node.host.spawn(command), dir };
        eventually_within(PATIENCE * 3, "containerd answers", || containerd.ctr("version").status.success());
        let archive = image::docker_archive(containerd.dir.path(), "docker.io/library/small:latest");
        containerd.ctr(&format!("image import --snapshotter native {}", archive.display())).success();
        containerd
    }

    /// Runs ctr with blank-separated arguments.
    fn ctr(&self, arguments: &str) -> Output {
        self.spawn(arguments).into_output()
    }

    /// Runs a container. Its `ctr` takes the network down after it.
    fn start(&self, name: &str) -> Process {
        let image = "docker.io/library/small:latest";
        self.spawn(&format!("run --rm --cni --snapshotter native {image} {name} /bin/busybox sleep 600"))
    }

    fn spawn(&self, arguments: &str) -> Process {
        let mut command = Command::new(require::find("ctr").unwrap());
        command.arg("--address").arg(self.dir.path().join("containerd.sock"));
        command.args(["--namespace", "rproxy-test"]).args(arguments.split_whitespace());
        self.node.host.spawn(command)
    }

    /// The network of a running container.
    fn network_of(&self, name: &str) -> Namespace {
        let tasks = self.ctr("task list").success();
        let words = tasks.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let pid = words.into_iter().find(|words| words[0] == name).expect(&tasks)[1].to_owned();
        Namespace::open(&format!("/proc/{pid}/ns/net"))
    }
}

impl Drop for Containerd<'_> {
    fn drop(&mut self) {
        // Also of a case that failed.
        self.ctr("task delete --force web");
        self.ctr("container delete web");
        self.daemon.signal(Signal::SIGTERM);
        self.daemon.wait();
    }
}

/// Has `ctr` find the plugins and the list in the directories that are fixed in it, in the mount namespace of the case. It
/// passes no port mappings of its own, so the list has them for its only container.
fn install(dir: &Path) {
    ["/opt", "/etc", "/var/lib"].into_iter().for_each(make_writable);
    ["/opt/cni/bin", "/etc/cni/net.d"].into_iter().for_each(|place| fs::create_dir_all(place).unwrap());
    for plugin in ["bridge", "host-local"] {
        symlink(Path::new("/usr/lib/cni").join(plugin), Path::new("/opt/cni/bin").join(plugin)).unwrap();
    }
    symlink(portmap(), "/opt/cni/bin/rproxy-portmap").unwrap();
    let bridge = json!({
        "type": "bridge", "bridge": "cni0", "isGateway": true,
        "ipam": {
            "type": "host-local", "ranges": [[{ "subnet": "10.88.0.0/16" }]], "routes": [{ "dst": "0.0.0.0/0" }],
            "dataDir": dir.join("leases")
        }
    });
    let ports = json!([
        { "hostPort": 8080, "containerPort": 80, "protocol": "tcp" },
        { "hostPort": 8080, "containerPort": 80, "protocol": "udp" },
    ]);
    let plugin = json!({
        "type": "rproxy-portmap", "rproxy": rproxy(), "capabilities": { "portMappings": true },
        "runtimeConfig": { "portMappings": ports }
    });
    let list = json!({ "cniVersion": "1.0.0", "name": NETWORK, "plugins": [bridge, plugin] });
    // The first one is used.
    fs::write(format!("/etc/cni/net.d/0-{NETWORK}.conflist"), list.to_string()).unwrap();
}

/// Has what is written below `dir` go to the case's own /run.
fn make_writable(dir: &str) {
    let [upper, work] = ["upper", "work"].map(|kind| format!("/run/{kind}{}", dir.replace('/', "-")));
    [&upper, &work].into_iter().for_each(|dir| fs::create_dir(dir).unwrap());
    let options = format!("lowerdir={dir},upperdir={upper},workdir={work}");
    mount(Some("overlay"), dir, Some("overlay"), MsFlags::empty(), Some(options.as_str())).unwrap();
}

fn containerd(node: &Node) {
    let lists = tempfile::tempdir().unwrap();
    install(lists.path());
    let containerd = Containerd::new(node);
    for _turn in 0..2 {
        let run = containerd.start("web");
        eventually_within(PATIENCE * 3, "it is published", || node.served().len() == 2);
        let inside = containerd.network_of("web");
        let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 80));
        let _tcp = TcpBackend::echo_in(&inside, any);
        let _udp = udp::Backend::echo(udp::bind_in(&inside, any));
        assert_reaches(&node.client, HOST_V4, 8080);
        assert_reaches_udp(&node.client, HOST_V4, 8080);
        assert_reaches(&node.host, Ipv6Addr::LOCALHOST, 8080);
        containerd.ctr("task kill --signal SIGKILL web").success();
        run.wait();
        node.assert_clean();
    }
}
