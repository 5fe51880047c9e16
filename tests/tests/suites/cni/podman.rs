//! Podman with CNI, which publishes through the plugin.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use tempfile::TempDir;
use testkit::backend::TcpBackend;
use testkit::image;
use testkit::netns::Namespace;
use testkit::process::Output;
use testkit::require::{self, Need};
use testkit::rproxy::portmap;
use testkit::suite::Case;
use testkit::topology::HOST_V4;
use testkit::udp;

use super::node::{NETWORK, Node, case};
use crate::netns_setup::stage::{assert_reaches, assert_reaches_udp};

pub(crate) fn cases() -> Vec<Case> {
    let needs = ["podman", "runc", "busybox", "tar"].map(Need::Program);
    vec![case("Podman publishes through it", podman).needs(&needs).deadline(Duration::from_secs(180))]
}

/// Podman whose files are in a directory of its own.
struct Podman<'n> {
    node: &'n Node,
    dir: TempDir,
}

impl<'n> Podman<'n> {
    fn new(node: &'n Node) -> Self {
        let dir = tempfile::Builder::new().prefix("rproxy-podman-").tempdir().unwrap();
        let own = dir.path().display();
        let plugins = portmap().parent().unwrap().display();
        let settings = format!(
            "[engine]\ncgroup_manager = 'cgroupfs'\nevents_logger = 'file'\nruntime = 'runc'\nenable_port_reservation = false\n[network]\n\
             network_backend = 'cni'\ncni_plugin_dirs = ['{plugins}', '/usr/lib/cni']\nnetwork_config_dir = '{own}/net.d'\n\
             default_network = '{NETWORK}'\n"
        );
        fs::write(dir.path().join("containers.conf"), settings).unwrap();
        fs::write(
            dir.path().join("storage.conf"),
            format!("[storage]\ndriver = 'vfs'\ngraphroot = '{own}/graph'\nrunroot = '{own}/run'\n"),
        )
        .unwrap();
        let routes = json!([{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }]);
        let ranges = json!([[{ "subnet": "10.88.0.0/16" }], [{ "subnet": "fd00:88::/64" }]]);
        let bridge = json!({
            "type": "bridge", "bridge": "cni0", "isGateway": true,
            "ipam": { "type": "host-local", "ranges": ranges, "routes": routes, "dataDir": format!("{own}/leases") }
        });
        let plugin = json!({ "type": "rproxy-portmap", "capabilities": { "portMappings": true } });
        let list = json!({ "cniVersion": "0.4.0", "name": NETWORK, "plugins": [bridge, plugin] });
        fs::create_dir(dir.path().join("net.d")).unwrap();
        fs::write(dir.path().join(format!("net.d/{NETWORK}.conflist")), list.to_string()).unwrap();
        let podman = Self { node, dir };
        let archive = image::busybox(podman.dir.path());
        podman.run(&format!("import {} small", archive.display())).success();
        podman
    }

    /// Runs podman with blank-separated arguments.
    fn run(&self, arguments: &str) -> Output {
        let mut command = Command::new(require::find("podman").unwrap());
        command.args(arguments.split_whitespace());
        command.env("CONTAINERS_CONF", self.dir.path().join("containers.conf"));
        command.env("CONTAINERS_STORAGE_CONF", self.dir.path().join("storage.conf"));
        self.node.host.spawn(command).into_output()
    }

    fn start(&self, name: &str, options: &str) -> Output {
        self.run(&format!("run --detach --ulimit nofile=256:256 --ulimit nproc=256:256 --name {name} {options} small busybox sleep 600"))
    }

    /// The network of a running container.
    fn network_of(&self, name: &str) -> Namespace {
        let pid = self.run(&format!("inspect --format {{{{.State.Pid}}}} {name}")).success();
        Namespace::open(&format!("/proc/{}/ns/net", pid.trim()))
    }
}

impl Drop for Podman<'_> {
    fn drop(&mut self) {
        self.run("rm --all --force --time 0");
    }
}

fn podman(node: &Node) {
    let podman = Podman::new(node);
    podman.start("web", "-p 8080-8082:80-82 -p 8080:80/udp -p 127.0.0.1:9000:80").success();
    let inside = podman.network_of("web");
    let any = |port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let _tcp = [80, 82].map(|port| TcpBackend::echo_in(&inside, any(port)));
    let _udp = udp::Backend::echo(udp::bind_in(&inside, any(80)));
    for port in [8080, 8082] {
        assert_reaches(&node.client, HOST_V4, port);
        assert_reaches(&node.host, Ipv6Addr::LOCALHOST, port);
    }
    assert_reaches_udp(&node.client, HOST_V4, 8080);
    assert_reaches_udp(&node.host, Ipv4Addr::LOCALHOST, 8080);
    assert_reaches(&node.host, Ipv4Addr::LOCALHOST, 9000);
    let holder = node.host.run(|| TcpListener::bind("0.0.0.0:8090").unwrap());
    let refused = podman.start("other", "-p 8090:80");
    assert!(!refused.status.success() && refused.stderr.contains("is taken by "), "{refused:?}");
    drop(holder);
    podman.run("restart --time 0 web").success();
    let inside = podman.network_of("web");
    let _tcp = TcpBackend::echo_in(&inside, any(80));
    assert_reaches(&node.client, HOST_V4, 8080);
    podman.run("rm --all --force --time 0").success();
    node.assert_clean();
}
