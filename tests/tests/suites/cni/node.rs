//! A node with containers whose network Debian's plugins make.

use std::fs;
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;

use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;
use testkit::netns::Namespace;
use testkit::require::Need;
use testkit::rproxy::{portmap, rproxy};
use testkit::suite::Case;
use testkit::topology;

use crate::netns_setup::stage::own_mounts;

/// Where Debian has the plugins.
const PLUGINS: &str = "/usr/lib/cni";

/// The name of the network.
pub(crate) const NETWORK: &str = "pods";

/// What every case needs.
pub(crate) const NEEDS: &[Need] =
    &[Need::Root, Need::Program("ip"), Need::Program("nft"), Need::Program("/usr/lib/cni/bridge")];

/// ```text
/// client ── eth0 10.0.0.12 ──── 10.0.0.11 eth0 ── host ── cni0 10.88.0.1 ──── 10.88.0.2 eth0 ── container
/// ```
pub(crate) struct Node {
    pub(crate) client: Namespace,
    pub(crate) host: Namespace,
    /// What `host-local` remembers.
    leases: TempDir,
}

/// A container.
pub(crate) struct Pod {
    pub(crate) id: String,
    pub(crate) netns: Namespace,
    /// What the plugin before has printed.
    pub(crate) result: String,
    pub(crate) v4: Ipv4Addr,
}

/// How a call ended.
#[derive(Debug)]
pub(crate) struct Called {
    pub(crate) status: Option<i32>,
    pub(crate) stdout: String,
    /// Warnings.
    pub(crate) stderr: String,
}

impl Called {
    /// What it has printed; warnings are not expected.
    #[track_caller]
    pub(crate) fn success(self) -> String {
        assert!(self.status == Some(0) && self.stderr.is_empty(), "{self:#?}");
        self.stdout
    }

    /// The code and the message of its error.
    #[track_caller]
    pub(crate) fn error(self) -> (u64, String) {
        assert_eq!(self.status, Some(1), "{self:#?}");
        let error: Value = serde_json::from_str(&self.stdout).expect(&self.stdout);
        assert!(error["cniVersion"].is_string(), "{error}");
        (error["code"].as_u64().unwrap(), error["msg"].as_str().unwrap().to_owned())
    }
}

/// A case that plays on a node.
pub(crate) fn case(name: impl Into<String>, play: impl FnOnce(&Node) + Send + 'static) -> Case {
    Case::new(name, move || {
        // Built before the mounts are others.
        portmap();
        let body = || {
            own_mounts();
            play(&Node::new());
        };
        thread::scope(|scope| {
            if let Err(panic) = scope.spawn(body).join() {
                std::panic::resume_unwind(panic);
            }
        });
    })
    .needs(NEEDS)
}

impl Node {
    fn new() -> Self {
        let (client, host) = topology::client_and_host();
        Self { client, host, leases: tempfile::tempdir().unwrap() }
    }

    /// A container on the bridge, with an address of each family, or of IPv4 alone.
    #[track_caller]
    pub(crate) fn pod(&self, id: &str, families: usize) -> Pod {
        let subnets = ["10.88.0.0/16", "fd00:88::/64"];
        let ranges: Vec<_> = subnets[..families].iter().map(|subnet| json!([{ "subnet": subnet }])).collect();
        let routes: Vec<_> =
            ["0.0.0.0/0", "::/0"][..families].iter().map(|dst| json!({ "dst": dst })).collect();
        let conf = json!({
            "cniVersion": "1.0.0", "name": NETWORK, "type": "bridge", "bridge": "cni0", "isGateway": true,
            "ipam": { "type": "host-local", "ranges": ranges, "routes": routes, "dataDir": self.leases.path() }
        });
        let netns = Namespace::new();
        let mut bridge = Command::new(PathBuf::from(PLUGINS).join("bridge"));
        bridge.env("CNI_NETNS", netns.path());
        let result = self.run(bridge, "ADD", id, &conf.to_string()).success();
        let parsed: Value = serde_json::from_str(&result).unwrap();
        let address = parsed["ips"][0]["address"].as_str().unwrap();
        let v4 = address.split('/').next().unwrap().parse().unwrap();
        Pod { id: id.to_owned(), netns, result, v4 }
    }

    /// The configuration of the plugin for a container with these ports.
    pub(crate) fn conf(pod: &Pod, ports: &Value, more: &Value) -> String {
        let prev: Value = serde_json::from_str(&pod.result).unwrap();
        configuration(&json!({ "runtimeConfig": { "portMappings": ports }, "prevResult": prev }), more)
    }

    /// Publishes ports of a container.
    #[track_caller]
    pub(crate) fn add(&self, pod: &Pod, ports: &Value, more: &Value) {
        self.call("ADD", &pod.id, &Self::conf(pod, ports, more)).success();
    }

    /// Ends what was published.
    #[track_caller]
    pub(crate) fn delete(&self, pod: &Pod) {
        self.call("DEL", &pod.id, &configuration(&json!({}), &json!({}))).success();
    }

    /// Calls the plugin.
    pub(crate) fn call(&self, command: &str, id: &str, conf: &str) -> Called {
        let mut plugin = Command::new(portmap());
        plugin.env("CNI_NETNS", "/run/netns/is-not-entered");
        self.run(plugin, command, id, conf)
    }

    /// Runs a plugin, which reads `conf`.
    pub(crate) fn run(&self, mut plugin: Command, command: &str, id: &str, conf: &str) -> Called {
        plugin.env("CNI_COMMAND", command).env("CNI_CONTAINERID", id).env("CNI_IFNAME", "eth0");
        plugin.env("CNI_PATH", PLUGINS);
        plugin.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let output = self.host.run(|| {
            let mut child = plugin.spawn().unwrap();
            // It may end before it has read all of it.
            drop(child.stdin.take().unwrap().write_all(conf.as_bytes()));
            child.wait_with_output().unwrap()
        });
        Called {
            status: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap().trim_end().to_owned(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// The rules of the plugin.
    pub(crate) fn rules(&self) -> String {
        let tables = self.host.command("nft list tables").success();
        let is_there = tables.contains("inet rproxy-portmap");
        if is_there {
            self.host.command("nft -s list table inet rproxy-portmap").success()
        } else {
            String::new()
        }
    }

    /// What the relay serves, by its own account; nothing if none runs.
    pub(crate) fn served(&self) -> Vec<String> {
        let socket = "/run/rproxy-portmap/relay.sock";
        let mut ctl = Command::new(rproxy());
        ctl.args(["ctl", "--control", socket, "--json", "list"]);
        let output = self.host.run(|| ctl.output().unwrap());
        if !output.status.success() {
            return Vec::new();
        }
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        let mappings = answer["mappings"].as_array().unwrap_or_else(|| panic!("{answer}"));
        mappings.iter().map(|mapping| mapping["name"].as_str().unwrap().to_owned()).collect()
    }

    /// The process of the plugin whose command line has this word.
    #[track_caller]
    pub(crate) fn process(&self, word: &str) -> Pid {
        let own = self.host.run(|| fs::read_link("/proc/thread-self/ns/net").unwrap());
        let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| {
            let path = entry.unwrap().path();
            let line = fs::read_to_string(path.join("cmdline")).unwrap_or_default();
            let is_it = line.split('\0').any(|part| part == word) && line.contains("/run/rproxy-portmap");
            let is_here = path.join("ns/net").read_link().is_ok_and(|namespace| namespace == own);
            (is_it && is_here).then(|| path.file_name().unwrap().to_str().unwrap().parse::<i32>().unwrap())
        });
        let [process] = processes.collect::<Vec<_>>()[..] else { panic!("not one process with {word}") };
        Pid::from_raw(process)
    }

    /// Expects that nothing of the plugin is left.
    #[track_caller]
    pub(crate) fn assert_clean(&self) {
        assert_eq!(self.rules(), "");
        let files = fs::read_dir("/run/rproxy-portmap").into_iter().flatten();
        let left: Vec<_> = files.map(|file| file.unwrap().path()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// A configuration of the plugin, whose keys `more` replaces.
pub(crate) fn configuration(with: &Value, more: &Value) -> String {
    let mut conf =
        json!({ "cniVersion": "1.1.0", "name": NETWORK, "type": "rproxy-portmap", "rproxy": rproxy() });
    let keys = conf.as_object_mut().unwrap();
    keys.extend(with.as_object().unwrap().clone());
    keys.extend(more.as_object().unwrap().clone());
    conf.to_string()
}

impl Drop for Node {
    fn drop(&mut self) {
        // The relay lives on its own, so also a case that failed has to end it.
        for network in [NETWORK, "others"] {
            let none = json!({ "name": network, "cni.dev/valid-attachments": [] });
            let collected = self.call("GC", "none", &configuration(&json!({}), &none));
            if !thread::panicking() {
                collected.success();
            }
        }
    }
}
