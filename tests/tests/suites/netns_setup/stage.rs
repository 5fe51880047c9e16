//! The environment of a case: an outside neighbour, and a private `/run`.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;
use testkit::backend::{TcpBackend, echo};
use testkit::netns::Namespace;
use testkit::process::Output;
use testkit::require::{self, Need};
use testkit::rproxy::netns_setup;
use testkit::suite::Case;
use testkit::topology::{self, HOST_V4, HOST_V6};
use testkit::udp;

/// What every case needs.
const NEEDS: &[Need] = &[
    Need::Root,
    Need::Program("ip"),
    Need::Program("nft"),
    Need::Program("iptables-save"),
    Need::Program("iptables-legacy-save"),
];

/// A case runs hundreds of small programs, on a machine that may have other things to do.
const DEADLINE: Duration = Duration::from_secs(300);

/// How long a packet that must not arrive is waited for. A mistake shows sooner; a correct drop costs this much.
pub(crate) const SILENCE: Duration = Duration::from_millis(700);

/// ```text
/// client ── eth0 10.0.0.12 ──── 10.0.0.11 eth0 ── host ── docker0 …
/// ```
/// The client has routes to the containers' subnets through the host, as an intruder would.
pub(crate) struct Stage {
    pub(crate) client: Namespace,
    pub(crate) host: Namespace,
    state: TempDir,
    /// Where `iptables` and its relatives mean the legacy ones.
    legacy: Option<TempDir>,
}

/// A case that plays on a stage.
pub(crate) fn case(name: &str, play: fn(&Stage)) -> Case {
    Case::new(name, move || Stage::play(false, play)).needs(NEEDS).deadline(DEADLINE)
}

/// A case that plays for each backend.
pub(crate) fn for_each_firewall(name: &str, play: fn(&Stage, Backend)) -> Vec<Case> {
    let of = |backend: Backend| {
        let body = move || Stage::play(backend == Backend::Legacy, |stage| play(stage, backend));
        Case::new(format!("{name} ({backend:?})"), body).needs(NEEDS).deadline(DEADLINE)
    };
    vec![of(Backend::Nft), of(Backend::IptablesNft), of(Backend::Legacy)]
}

/// Who writes the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Backend {
    Nft,
    IptablesNft,
    Legacy,
}

impl Backend {
    pub(crate) fn option(self) -> &'static str {
        match self {
            Self::Nft => "--firewall nft",
            Self::IptablesNft | Self::Legacy => "--firewall iptables",
        }
    }
}

impl Stage {
    /// Sets the stage on a thread whose mounts are its own, plays, and clears it.
    pub(crate) fn play(legacy: bool, play: impl FnOnce(&Self) + Send) {
        // Built outside: cargo needs the real /run for nothing, but may as well have it.
        netns_setup();
        let body = || {
            own_mounts();
            play(&Self::new(legacy));
        };
        thread::scope(|scope| {
            if let Err(panic) = scope.spawn(body).join() {
                std::panic::resume_unwind(panic);
            }
        });
    }

    fn new(legacy: bool) -> Self {
        let (client, host) = topology::client_and_host();
        client.ip(&format!("route add 172.17.0.0/16 via {HOST_V4}"));
        client.ip(&format!("-6 route add fd00:d0c::/64 via {HOST_V6}"));
        let state = tempfile::tempdir().unwrap();
        Self { client, host, state, legacy: legacy.then(legacy_tools) }
    }

    pub(crate) fn state_dir(&self) -> PathBuf {
        self.state.path().join("state")
    }

    /// Runs `netns-setup` on the host.
    #[track_caller]
    pub(crate) fn run(&self, arguments: &str) -> Output {
        let mut command = Command::new(netns_setup());
        command.arg("--state-dir").arg(self.state_dir());
        command.args(arguments.split_whitespace());
        self.with_path(&mut command);
        self.host.spawn(command).into_output()
    }

    /// Runs it where `iptables` and its relatives mean the other ones than usual.
    #[track_caller]
    pub(crate) fn run_switched(&self, arguments: &str) -> Output {
        let legacy = self.legacy.is_none().then(legacy_tools);
        let mut command = Command::new(netns_setup());
        command.arg("--state-dir").arg(self.state_dir());
        command.args(arguments.split_whitespace());
        put_first(legacy.as_ref(), &mut command);
        self.host.spawn(command).into_output()
    }

    /// Runs it and expects it to succeed; returns what it prints.
    #[track_caller]
    pub(crate) fn ok(&self, arguments: &str) -> String {
        self.run(arguments).success()
    }

    /// Runs it and expects it to fail; returns its exit status and its only line.
    #[track_caller]
    pub(crate) fn fails(&self, arguments: &str) -> (i32, String) {
        let output = self.run(arguments);
        assert!(!output.status.success(), "{arguments} should have failed: {output:#?}");
        (output.status.code().unwrap(), output.stderr)
    }

    /// Runs any program on the host.
    #[track_caller]
    pub(crate) fn host(&self, line: &str) -> String {
        let mut words = line.split_whitespace();
        let name = words.next().unwrap();
        let legacy = self.legacy.as_ref().map(|dir| dir.path().join(name));
        let path = legacy.filter(|path| path.exists()).or_else(|| require::find(name)).unwrap();
        let mut command = Command::new(path);
        command.args(words);
        self.host.spawn(command).into_output().success()
    }

    pub(crate) fn with_path(&self, command: &mut Command) {
        put_first(self.legacy.as_ref(), command);
    }

    /// Attaches a container whose namespace belongs to the test.
    #[track_caller]
    pub(crate) fn attach(&self, name: &str) -> Namespace {
        let namespace = Namespace::new();
        self.ok(&format!("attach {name} --netns {}", namespace.path().display()));
        namespace
    }

    /// Everything that `netns-setup` could change, in a form in which equal means equal: without indices, without
    /// what the kernel makes by itself a moment later.
    pub(crate) fn dump(&self) -> String {
        let tool = |line: &str| output_of(&self.host, line);
        let mut text = dump_side(|arguments| tool(&format!("ip {arguments}")));
        for save in ["iptables-save", "ip6tables-save", "iptables-legacy-save", "ip6tables-legacy-save"] {
            // The tools make and remove empty tables as they please.
            let rules = tool(save);
            let rules = rules.lines().filter(|line| line.starts_with("-A") || line.ends_with("- [0:0]"));
            rules.for_each(|line| writeln!(text, "{save}: {line}").unwrap());
        }
        // A table that is restored comes last.
        let tables = tool("nft list tables");
        let tables: BTreeSet<&str> = tables.lines().filter(|line| line.contains("netns-setup")).collect();
        tables.iter().for_each(|table| text.push_str(&tool(&format!("nft -s list {table}"))));
        for family in ["-4", "-6"] {
            text.push_str(&sorted(&format!("{family} rule"), &tool(&format!("ip {family} rule"))));
            let routes = tool(&format!("ip {family} route show table all"));
            let routes = routes.lines().filter(|line| line.contains(" table 4096"));
            routes.for_each(|line| writeln!(text, "{family} route: {line}").unwrap());
        }
        text.push_str(&sorted("xfrm", &tool("ip -o xfrm policy")));
        text.push_str(&self.host.run(dump_settings));
        for name in tool("ip netns list").lines().filter_map(|line| line.split_whitespace().next()) {
            writeln!(text, "--- {name}").unwrap();
            text.push_str(&dump_side(|arguments| tool(&format!("ip -n {name} {arguments}"))));
        }
        for file in std::fs::read_dir("/etc/sysctl.d").unwrap() {
            let path = file.unwrap().path();
            writeln!(text, "{}: {:?}", path.display(), std::fs::read_to_string(&path)).unwrap();
        }
        text
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // Relays live on their own, so also a test that failed has to end them.
        let output = self.run("down");
        if !thread::panicking() {
            output.success();
        }
    }
}

/// Compares two dumps and shows only what differs.
#[track_caller]
pub(crate) fn assert_same(is: &str, should_be: &str, what: &str) {
    let only_in = |one: &str, other: &str| -> Vec<String> {
        one.lines().filter(|line| !other.lines().any(|theirs| theirs == *line)).map(str::to_owned).collect()
    };
    let (new, gone) = (only_in(is, should_be), only_in(should_be, is));
    // If neither has a line of its own, their order differs.
    let moved = is.lines().zip(should_be.lines()).find(|(is, should_be)| is != should_be);
    assert!(is == should_be, "{what}:\nnew: {new:#?}\ngone: {gone:#?}\nfirst difference: {moved:#?}");
}

/// What a program prints inside a namespace. Unlike the harness's processes it is not followed by threads, of which
/// the many small programs of a dump would need many.
fn output_of(namespace: &Namespace, line: &str) -> String {
    let mut words = line.split_whitespace();
    let mut command = require::command(words.next().unwrap());
    command.args(words);
    let output = namespace.run(|| command.output().unwrap());
    assert!(output.status.success(), "{line}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The settings of the calling thread's namespace that forwarding and routing depend on.
fn dump_settings() -> String {
    let dirs = ["ipv4", "ipv6"].into_iter().flat_map(|family| {
        ["all", "default", "eth0", "docker0"]
            .map(|name| PathBuf::from(format!("/proc/sys/net/{family}/conf/{name}")))
    });
    let files =
        dirs.filter_map(|dir| std::fs::read_dir(dir).ok()).flatten().map(|entry| entry.unwrap().path());
    let mut lines: Vec<String> = files
        .chain([PathBuf::from("/proc/sys/net/ipv4/ip_forward")])
        .filter_map(|path| {
            Some(format!("{} = {}", path.display(), std::fs::read_to_string(&path).ok()?.trim()))
        })
        .collect();
    lines.sort();
    lines.join("\n") + "\n"
}

/// Rules or policies, one in each line. Those of one priority have no order.
fn sorted(what: &str, listed: &str) -> String {
    let mut lines: Vec<String> = listed.lines().map(|line| format!("{what}: {line}\n")).collect();
    lines.sort();
    lines.concat()
}

/// Interfaces, addresses and routes.
fn dump_side(ip: impl Fn(&str) -> String) -> String {
    let mut lines = Vec::new();
    let json = |arguments: &str| -> Vec<serde_json::Value> { serde_json::from_str(&ip(arguments)).unwrap() };
    for link in json("-j -d link") {
        let keys = [
            "ifname",
            "address",
            "mtu",
            "master",
            "gso_max_size",
            "gro_max_size",
            "gso_ipv4_max_size",
            "gro_ipv4_max_size",
        ];
        let is_up = link["flags"].as_array().unwrap().iter().any(|flag| flag == "UP");
        let values: Vec<_> = keys.iter().map(|key| format!("{key}={}", link[key])).collect();
        lines.push(format!("link up={is_up} {} {}", values.join(" "), link["linkinfo"]["info_kind"]));
    }
    for link in json("-j address") {
        for address in link["addr_info"].as_array().into_iter().flatten() {
            // The kernel's own come and go with its timers.
            if address["local"].as_str().is_some_and(|ip| ip.starts_with("fe80::") && ip != "fe80::1") {
                continue;
            }
            lines.push(format!("address {} {}/{}", link["ifname"], address["local"], address["prefixlen"]));
        }
    }
    for family in ["-4", "-6"] {
        // Those of link-local addresses come and go with the kernel's timers too.
        let routes =
            json(&format!("-j {family} route")).into_iter().filter(|route| route["dst"] != "fe80::/64");
        lines
            .extend(routes.map(|route| {
                format!("route {} via {} dev {}", route["dst"], route["gateway"], route["dev"])
            }));
    }
    lines.sort();
    lines.join("\n") + "\n"
}

/// An echo server on every address of a namespace, for connections and datagrams.
pub(crate) struct Echo {
    _tcp: TcpBackend,
    _udp: udp::Backend,
}

pub(crate) fn serve(namespace: &Namespace, port: u16) -> Echo {
    let (tcp, udp) = namespace.run(|| {
        let any = SocketAddr::new(IpAddr::from([0_u16; 8]), port);
        (TcpListener::bind(any).unwrap(), UdpSocket::bind(any).unwrap())
    });
    Echo { _tcp: TcpBackend::serve(tcp, echo), _udp: udp::Backend::echo(udp) }
}

/// Whether a connection from `namespace` to `address` is echoed.
pub(crate) fn reaches_tcp(namespace: &Namespace, address: impl Into<SocketAddr>, patience: Duration) -> bool {
    let address = address.into();
    let exchange = || -> std::io::Result<bool> {
        let mut stream = TcpStream::connect_timeout(&address, patience)?;
        stream.set_read_timeout(Some(patience))?;
        stream.write_all(b"ping")?;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer)?;
        Ok(&answer == b"ping")
    };
    namespace.run(|| exchange().unwrap_or(false))
}

/// Whether a datagram from `namespace` to `address` is echoed, from where it was sent to.
pub(crate) fn reaches_udp(namespace: &Namespace, address: impl Into<SocketAddr>, patience: Duration) -> bool {
    let address = address.into();
    let exchange = || -> std::io::Result<bool> {
        let any: IpAddr = if address.is_ipv4() { [0_u8; 4].into() } else { [0_u16; 8].into() };
        let socket = UdpSocket::bind((any, 0))?;
        socket.set_read_timeout(Some(patience))?;
        socket.connect(address)?;
        socket.send(b"ping")?;
        let mut answer = [0; 8];
        Ok(socket.recv(&mut answer)? == 4 && &answer[..4] == b"ping")
    };
    namespace.run(|| exchange().unwrap_or(false))
}

#[track_caller]
pub(crate) fn assert_reaches(from: &Namespace, ip: impl Into<IpAddr>, port: u16) {
    let address = SocketAddr::new(ip.into(), port);
    assert!(reaches_tcp(from, address, testkit::PATIENCE), "no connection to {address}");
}

#[track_caller]
pub(crate) fn assert_reaches_udp(from: &Namespace, ip: impl Into<IpAddr>, port: u16) {
    let address = SocketAddr::new(ip.into(), port);
    assert!(reaches_udp(from, address, testkit::PATIENCE), "no answer from {address}");
}

#[track_caller]
pub(crate) fn assert_out_of_reach(from: &Namespace, ip: impl Into<IpAddr>, port: u16) {
    let address = SocketAddr::new(ip.into(), port);
    assert!(!reaches_tcp(from, address, SILENCE), "a connection to {address} got through");
    assert!(!reaches_udp(from, address, SILENCE), "a datagram to {address} got through");
}

/// Returns the calling thread mounts of its own, with an empty `/run` and an empty `/etc/sysctl.d`.
pub(crate) fn own_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    for dir in ["/run", "/etc/sysctl.d"] {
        mount(Some("tmpfs"), dir, Some("tmpfs"), MsFlags::empty(), Some("mode=0755")).unwrap();
    }
}

/// Has a command find its programs in a directory first.
fn put_first(dir: Option<&TempDir>, command: &mut Command) {
    if let Some(dir) = dir {
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", dir.path().display()));
    }
}

/// A directory in which the names of iptables mean the legacy tools.
fn legacy_tools() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for family in ["iptables", "ip6tables"] {
        for suffix in ["", "-save", "-restore"] {
            let tool = require::find(&format!("{family}-legacy{suffix}")).unwrap();
            symlink(tool, dir.path().join(format!("{family}{suffix}"))).unwrap();
        }
    }
    dir
}
