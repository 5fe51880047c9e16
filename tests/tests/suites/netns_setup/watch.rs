//! `netns-setup watch`: what others flush, delete or end is there again.

use std::fs;
use std::net::UdpSocket;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::netns::Namespace;
use testkit::process::{Process, Stream};
use testkit::require::Need;
use testkit::rproxy::netns_setup;
use testkit::suite::Case;
use testkit::systemd::Systemd;
use testkit::topology::HOST_V4;
use testkit::{PATIENCE, eventually, eventually_within, require};

use super::stage::{Backend, Stage, case, for_each_firewall, reaches_tcp, serve};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = for_each_firewall("rules that are flushed come back", flushed);
    cases.extend([
        case("what is deleted comes back", deleted),
        case("a namespace that lives on without its name keeps its connection", nameless),
        case("flows that began without rules are translated again", untranslated)
            .needs(&[Need::Program("conntrack")]),
        case("relays that are killed come back", killed),
        case("commands can be run beside it", beside),
        case("it starts before there is a network, and outlives it", no_network),
        case("what it cannot repair is said once", unmendable),
        case("what it cannot repair keeps nothing else from it", hindered),
        case("a program that undoes each repair is waited for", fought),
        case("programs that undo two repairs in turn are waited for", alternating),
        case("a fight in a container keeps nothing else from it", fought_inside),
        case("it notifies a service manager, and a signal ends it", service),
        case("what it does not take", mistakes),
        case("firewalld reloads and restarts", super::firewall_managers::reloads)
            .needs(&[Need::Program("firewalld"), Need::Program("dbus-daemon")]),
        case("ufw is enabled, reloaded and disabled", super::firewall_managers::ufw)
            .needs(&[Need::Program("ufw")]),
    ]);
    cases
}

/// The service, which has compared once.
pub(crate) struct Watch {
    pub(crate) process: Process,
    pub(crate) manager: Systemd,
}

impl Watch {
    #[track_caller]
    pub(crate) fn start(stage: &Stage) -> Self {
        Self::notifying(stage, Systemd::new(), Self::command(stage))
    }

    /// Its command.
    pub(crate) fn command(stage: &Stage) -> Command {
        let mut command = Command::new(netns_setup());
        command.arg("--state-dir").arg(stage.state_dir()).arg("watch");
        stage.with_path(&mut command);
        command
    }

    /// Starts it by a command, for this service manager.
    #[track_caller]
    pub(crate) fn notifying(stage: &Stage, manager: Systemd, mut command: Command) -> Self {
        manager.notified_by(&mut command);
        let process = stage.host.spawn(command);
        assert_eq!(manager.told(), ["READY=1"]);
        Self { process, manager }
    }

    /// Waits for so many lines that say what was repaired, and returns the last.
    #[track_caller]
    pub(crate) fn repaired(&self, count: usize) -> String {
        let lines =
            self.process.wait_for_lines(Stream::Stderr, count, |line| line.contains(": repaired within "));
        lines.last().unwrap().clone()
    }

    /// Ends it in order.
    #[track_caller]
    pub(crate) fn end(&self) {
        self.process.signal(Signal::SIGTERM);
        assert!(self.process.wait().success());
    }

    pub(crate) fn says(&self, text: &str) -> String {
        self.process.wait_for_line(Stream::Stderr, |line| line.contains(text))
    }
}

/// A network with a container that publishes ports.
pub(super) fn set_up(stage: &Stage, options: &str) {
    stage.ok(&format!("up --subnet6 fd00:d0c::/64 {options}"));
    stage.ok("attach web");
    stage.ok("publish web -p 80:80 -p 53:53/udp");
    stage.ok("publish web -p 81:80 --via dnat");
}

/// Waits until nothing differs from the state.
#[track_caller]
pub(super) fn until_settled(stage: &Stage, what: &str) {
    eventually_within(PATIENCE * 2, what, || stage.run("check").status.success());
}

/// Waits until everything is as it was.
#[track_caller]
fn until_as_before(stage: &Stage, before: &str, what: &str) {
    // The time for several dumps, each of which runs dozens of programs.
    eventually_within(PATIENCE * 2, what, || stage.dump() == before);
}

fn flushed(stage: &Stage, backend: Backend) {
    set_up(stage, backend.option());
    let web = Namespace::open("/run/netns/web");
    let _server = serve(&web, 80);
    let before = stage.dump();
    let watch = Watch::start(stage);
    let flushes: &[&str] = match backend {
        Backend::Nft => &["nft flush ruleset", "nft delete table inet netns-setup-docker0"],
        Backend::IptablesNft => &["nft flush ruleset", "iptables -t nat -F", "ip6tables -F DOCKER"],
        Backend::Legacy => &["iptables -t nat -F", "iptables -F DOCKER", "ip6tables -t nat -F DOCKER"],
    };
    for (turn, flush) in flushes.iter().enumerate() {
        stage.host(flush);
        watch.repaired(turn + 1);
        // In tables of iptables, chains that are made again come in another order.
        match backend {
            Backend::Nft => until_as_before(stage, &before, flush),
            Backend::IptablesNft | Backend::Legacy => until_settled(stage, flush),
        }
        assert!(reaches_tcp(&stage.client, (HOST_V4, 80), PATIENCE), "{flush}");
        assert!(reaches_tcp(&stage.client, (HOST_V4, 81), PATIENCE), "{flush}");
    }
}

fn deleted(stage: &Stage) {
    set_up(stage, "--persist --transparent");
    let before = stage.dump();
    let watch = Watch::start(stage);
    let state = stage.state_dir().join("state.json");
    for (turn, change) in [
        "ip xfrm policy flush",
        "sysctl -q -w net.ipv4.ip_forward=0",
        "ip link set docker0 down",
        "ip address flush dev docker0",
        "ip -n web address flush dev eth0",
        "ip -n web route delete default",
        "ip route delete 172.17.0.0/16 dev docker0",
        "ip -6 route delete fd00:d0c::/64 dev docker0",
        "ip -n web route delete 172.17.0.0/16",
        "ip -n web -6 route delete fd00:d0c::/64",
        "nft add table inet netns-setup-docker0 { flags dormant; }",
        "nft add table inet netns-setup_transparent { flags dormant; }",
        "ip -n web link delete eth0",
        "ip link delete docker0",
        "ip netns delete web",
        "ip rule delete priority 50",
        "rm",
        "rm -r",
    ]
    .iter()
    .enumerate()
    {
        match *change {
            "rm" => fs::remove_file(&state).unwrap(),
            "rm -r" => fs::remove_dir_all(stage.state_dir()).unwrap(),
            command => drop(stage.host(command)),
        }
        match *change {
            "rm" | "rm -r" => eventually(change, || state.exists()),
            _ => drop(watch.repaired(turn + 1)),
        }
        until_as_before(stage, &before, change);
    }
    assert_eq!(stage.ok("check"), "everything is as it should be\n");
}

fn nameless(stage: &Stage) {
    set_up(stage, "");
    let before = stage.dump();
    // It keeps the namespace.
    let web = Namespace::open("/run/netns/web");
    let _server = serve(&web, 80);
    let process = web.spawn({
        let mut command = require::command("sleep");
        command.arg("600");
        command
    });
    let watch = Watch::start(stage);
    let link = stage.host("ip -o link show master docker0");
    for turn in 1..=2 {
        stage.host("ip netns delete web");
        let said = watch.repaired(turn);
        assert!(said.contains("the network namespace web has lost its name, and lives on"), "{said}");
        assert!(reaches_tcp(&stage.client, (HOST_V4, 80), PATIENCE), "the server in it is still connected");
        until_as_before(stage, &before, "its name");
    }
    assert_eq!(stage.host("ip -o link show master docker0"), link, "nothing was made again");
    process.signal(Signal::SIGKILL);
    process.wait();
    stage.ok("check");
}

fn untranslated(stage: &Stage) {
    set_up(stage, "");
    let web = Namespace::open("/run/netns/web");
    // The client has a route to the containers, and sees who sends.
    let there = stage.client.run(|| UdpSocket::bind("10.0.0.12:5000").unwrap());
    there.set_read_timeout(Some(PATIENCE)).unwrap();
    let socket = web.run(|| UdpSocket::bind("172.17.0.2:6000").unwrap());
    let seen = || {
        socket.send_to(b"x", "10.0.0.12:5000").unwrap();
        there.recv_from(&mut [0; 8]).unwrap().1.ip().to_string()
    };
    assert_eq!(seen(), "10.0.0.11");
    stage.host("nft flush ruleset");
    stage.host("conntrack -D -p udp");
    assert_eq!(seen(), "172.17.0.2", "there are no rules");
    let _watch = Watch::start(stage);
    assert_eq!(seen(), "10.0.0.11", "the flow goes on with a translation");
}

fn killed(stage: &Stage) {
    set_up(stage, "");
    let web = Namespace::open("/run/netns/web");
    let _server = serve(&web, 80);
    let watch = Watch::start(stage);
    for turn in 1..=2 {
        let supervisors = supervisors(stage);
        assert!(!supervisors.is_empty());
        supervisors.iter().for_each(|supervisor| kill(*supervisor, Signal::SIGKILL).unwrap());
        watch.repaired(turn);
        assert!(reaches_tcp(&stage.host, (HOST_V4, 80), PATIENCE), "relays serve again");
    }
    stage.ok("check");
}

/// The supervisors of the relays that are listed, which end with them.
fn supervisors(stage: &Stage) -> Vec<Pid> {
    let listed: serde_json::Value = serde_json::from_str(&stage.ok("list --json")).unwrap();
    let text = listed.to_string();
    let pids =
        text.split("\"pid\":").skip(1).map(|rest| rest.split(|c: char| !c.is_ascii_digit()).next().unwrap());
    let parent = |pid: &str| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap().trim().parse().unwrap()
    };
    let mut pids: Vec<i32> = pids.map(parent).collect();
    pids.sort_unstable();
    pids.dedup();
    pids.into_iter().map(Pid::from_raw).collect()
}

fn beside(stage: &Stage) {
    let watch = Watch::start(stage);
    set_up(stage, "--persist");
    stage.ok("attach db");
    for _ in 0..5 {
        stage.ok("publish db -p 90-99:80 -p 100:80/udp");
        stage.ok("unpublish db");
    }
    stage.ok("detach db");
    stage.ok("check");
    stage.ok("down");
    watch.end();
    let log = watch.process.captured(Stream::Stderr);
    assert_eq!(log.lines().count(), 1, "only what it watches: {log}");
}

fn no_network(stage: &Stage) {
    let watch = Watch::start(stage);
    set_up(stage, "");
    let before = stage.dump();
    stage.host("nft flush ruleset");
    watch.repaired(1);
    until_as_before(stage, &before, "rules");
    stage.ok("down");
    set_up(stage, "");
    stage.host("nft flush ruleset");
    watch.repaired(2);
    stage.ok("check");
}

fn unmendable(stage: &Stage) {
    set_up(stage, "");
    let watch = Watch::start(stage);
    // Somebody else's bridge under the name.
    stage.host("ip link delete docker0");
    watch.repaired(1);
    // So that it does not come first.
    watch.process.pause();
    stage.host("ip link delete docker0");
    stage.host("ip link add docker0 type bridge");
    watch.process.resume();
    let said = watch.says("the interface docker0 is not the one that netns-setup made");
    assert!(said.contains("run `netns-setup repair --state-dir "), "{said}");
    stage.host("ip link set docker0 mtu 1400");
    stage.host("nft flush ruleset");
    watch.says("nft table netns-setup-docker0");
    stage.host("ip link delete docker0");
    watch.says("everything is as it should be again");
    let log = watch.process.captured(Stream::Stderr);
    assert_eq!(log.matches("is not the one that netns-setup made").count(), 1, "{log}");
    stage.ok("check");
}

fn hindered(stage: &Stage) {
    set_up(stage, "");
    let watch = Watch::start(stage);
    // Adding the default route by the bridge fails, as there is one.
    stage.host("ip -n web route replace default via 172.17.0.77");
    watch.says("(step: ip -n web route add default via 172.17.0.1");
    stage.host("nft flush ruleset");
    assert!(watch.repaired(1).contains("nft table netns-setup-docker0"));
    assert!(stage.host("nft list tables").contains("netns-setup-docker0"));
    stage.host("ip -n web route replace default via 172.17.0.1");
    watch.says("everything is as it should be again");
    let log = watch.process.captured(Stream::Stderr);
    assert_eq!(log.matches("(step: ip -n web route").count(), 1, "{log}");
    stage.ok("check");
}

fn fought_inside(stage: &Stage) {
    set_up(stage, "");
    let watch = Watch::start(stage);
    let mut other = require::command("sh");
    other.args(["-c", "while ip -n web address flush dev eth0; do :; done"]);
    let other = stage.host.spawn(other);
    watch.says("the next one is not before 4 s");
    stage.host("nft flush ruleset");
    watch.says("nft table netns-setup-docker0");
    other.signal(Signal::SIGKILL);
    other.wait();
    until_settled(stage, "nobody undoes the repair any more");
}

fn fought(stage: &Stage) {
    set_up(stage, "");
    let watch = Watch::start(stage);
    let mut other = require::command("sh");
    other.args(["-c", "while nft flush ruleset; do :; done"]);
    let other = stage.host.spawn(other);
    for delay in [1, 2] {
        watch.says(&format!("undoes the repairs again and again; the next one is not before {delay} s"));
    }
    other.signal(Signal::SIGKILL);
    other.wait();
    until_settled(stage, "nobody undoes the repair any more");
}

fn alternating(stage: &Stage) {
    set_up(stage, "");
    let watch = Watch::start(stage);
    let mut other = require::command("sh");
    let script = "while nft flush ruleset; do until nft list tables | grep -q netns-setup; do :; done
        ip link set docker0 down; until ip link show docker0 | grep -q ,UP; do :; done; done";
    other.args(["-c", script]);
    let other = stage.host.spawn(other);
    for delay in [1, 2] {
        watch.says(&format!("undoes the repairs again and again; the next one is not before {delay} s"));
    }
    other.signal(Signal::SIGKILL);
    other.wait();
    until_settled(stage, "nobody undoes the repairs any more");
}

fn service(stage: &Stage) {
    set_up(stage, "");
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let watch = Watch::start(stage);
        watch.process.signal(signal);
        assert_eq!(watch.manager.told(), ["STOPPING=1"]);
        assert!(watch.process.wait().success());
    }
    stage.ok("check");
}

fn mistakes(stage: &Stage) {
    for option in ["--json", "--dry-run"] {
        let output = stage.run(&format!("{option} watch"));
        assert_eq!(output.status.code(), Some(2), "{output:#?}");
        let said = [output.stdout, output.stderr].concat();
        assert!(said.contains("watch takes neither --dry-run nor --json"), "{said}");
    }
}
