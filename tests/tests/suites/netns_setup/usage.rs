//! Bad input: one clear line, the right exit status, and nothing changed.

use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;

use testkit::netns::Namespace;
use testkit::require;
use testkit::rproxy::netns_setup;
use testkit::suite::Case;

use super::stage::{Backend, Stage, assert_same, case, for_each_firewall};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = for_each_firewall("a dry run prints commands that do the same", printed_commands);
    cases.extend(for_each_firewall("chains and rules of others that drop are named", dropping));
    cases.extend([
        case("bad input changes nothing", bad_input),
        case("a name that is taken", taken),
        case("a subnet that is in use", overlap),
        case("a host port that is in use", port_in_use),
        case("a foreign bridge and foreign chains", foreign),
        case("a firewall that is not installed", no_firewall),
        case("only root is allowed", not_root),
        case("root without the privilege", no_capability),
        case("a dry run changes nothing", dry_run),
        case("rules of others that interfere are named", interference),
        case("the demonstration needs no firewall", demo_without_rules),
        case("a container is found by its identifier", by_id),
        case("ports are unpublished as they are listed", listed),
        case("containers without IPv6 on request", without_ipv6),
        case("errors are JSON on request", json_errors),
        case("a repair that cannot mend everything says so", partly_mended),
        case("a port that needs a privilege", privileged_port),
        case("a namespace that would end with the process", hidden_mounts),
        case("two runs at once are serialised", at_once),
    ]);
    cases
}

/// Expects a failure with exactly one line, and no change.
#[track_caller]
fn refused(stage: &Stage, arguments: &str, expected: i32, part: &str) {
    let before = stage.dump();
    let (code, message) = stage.fails(arguments);
    assert_eq!(code, expected, "{arguments}: {message}");
    assert!(message.contains(part), "{arguments}: {message}");
    assert_eq!(message.lines().count(), 1, "{arguments}: {message}");
    assert_same(&stage.dump(), &before, arguments);
}

fn bad_input(stage: &Stage) {
    refused(stage, "attach web", 1, "run `netns-setup up --state-dir ");
    refused(stage, "publish web -p 80", 1, "run `netns-setup up --state-dir ");
    refused(stage, "attach ../web", 2, "not a container name");
    refused(stage, "up --subnet 172.17.0.1/16", 2, "the network is 172.17.0.0/16");
    refused(stage, "up --mtu 70000", 2, "65535");
    refused(stage, "up --subnet 127.0.0.0/8", 2, "has loopback addresses");
    refused(stage, "up --subnet6 ff00::/64", 2, "has multicast addresses");
    refused(stage, "up --bridge all", 2, "not an interface name");
    refused(stage, "up --bridge a\u{1b}[31m", 2, "a\\u{1b}[31m");
    refused(stage, "up --frobnicate", 2, "unexpected argument '--frobnicate' found");
    refused(stage, "publish web", 2, "which ports to publish is missing: add them, as in `-p 8080:80`");
    refused(stage, "check", 1, "there is no network: run `netns-setup up --state-dir ");
    refused(stage, "unpublish *:80->80/tcp", 1, "run `netns-setup up --state-dir ");
    assert_eq!(stage.ok("repair"), "there is no network: nothing to repair\n");
    stage.ok("up");
    refused(stage, "publish web -p 80", 1, "there is no container web");
    refused(stage, "detach web", 1, "there is no container web");
    refused(stage, "attach web --ip 10.1.1.1", 1, "choose from 172.17.0.2 to 172.17.255.254");
    refused(stage, "attach web --netns /nonexistent", 1, "cannot open the network namespace /nonexistent");
    refused(stage, "attach web --netns /etc/hostname", 1, "/etc/hostname is not a network namespace");
    refused(stage, "attach web --netns /proc/self/ns/net", 1, "the host's own");
    refused(stage, "up --subnet 172.18.0.0/16", 1, "run `netns-setup down --state-dir ");
    refused(stage, "attach web --firewall iptables", 1, "--firewall nft");
    stage.ok("attach web");
    refused(stage, "publish web -p 80:80/sctp", 2, "netns-setup publishes no sctp");
    refused(stage, "publish web -P", 1, "exposes no ports");
    refused(
        stage,
        "publish web -p 255.255.255.255:80:80",
        2,
        "is a broadcast address, to which no client can connect",
    );
    refused(stage, "publish web -p [ff02::1]:80:80", 2, "(multicast), to which no client can connect");
    refused(stage, "publish web -p 192.0.2.1:80:80", 1, "not an address of this host");
    refused(stage, "publish web -p [::1]:80:80 --via dnat", 2, "--subnet6");
    refused(stage, "unpublish web -p 80:80", 1, "web does not publish");
    refused(stage, "unpublish *:80->80/tcp", 1, "no container publishes *:80:80/tcp");
    refused(stage, "unpublish *:80->80", 2, "write it as `netns-setup list` shows it");
    refused(stage, "publish web -p 80:80 --rproxy /nonexistent", 1, "/nonexistent");
    refused(stage, "publish web -p 80:80 --rproxy /none\u{1b}", 1, "/none\\u{1b}");
    assert_eq!(stage.ok("publish web -p 80:80 -p 80:80"), "*:80/tcp -> 172.17.0.2:80\n");
    assert_eq!(stage.ok("publish web -p 80:80"), "*:80/tcp -> 172.17.0.2:80\n");
    refused(stage, "publish web -p 80:80 --via dnat", 1, "published with --via both already");
}

fn taken(stage: &Stage) {
    stage.ok("up");
    stage.ok("attach web");
    refused(stage, "attach web", 1, "the name web is taken");
    stage.host("ip netns add other");
    refused(stage, "attach other", 1, "the network namespace other exists already");
    let used = Namespace::new();
    used.ip("link add eth0 type bridge");
    refused(
        stage,
        &format!("attach third --netns {}", used.path().display()),
        1,
        "has an interface eth0 already",
    );
    refused(stage, "attach third --ip 172.17.0.2", 1, "172.17.0.2 is in use");
    stage.ok("detach web");
    stage.ok("attach web");
    stage.host("ip netns delete other");
}

fn overlap(stage: &Stage) {
    stage.host.ip("route add 172.17.4.0/24 via 10.0.0.12");
    refused(stage, "up", 1, "overlaps the route to 172.17.4.0/24 by eth0");
    refused(stage, "up --subnet 10.0.0.0/24", 1, "overlaps the route to 10.0.0.0/24 by eth0");
    refused(stage, "up --subnet 172.20.0.0/16 --subnet6 fd00:10::/64", 1, "choose another with --subnet6");
    stage.ok("up --subnet 172.20.0.0/16");
}

fn port_in_use(stage: &Stage) {
    stage.ok("up");
    stage.ok("attach web");
    stage.ok("attach db");
    let _taken = stage.host.run(|| TcpListener::bind("127.0.0.1:80").unwrap());
    refused(stage, "publish web -p 80:80", 1, "host port 80/tcp on * is in use");
    refused(stage, "publish web -p 80:80 --via dnat", 1, "host port 80/tcp on * is in use");
    assert_eq!(stage.ok("publish web -p 80-82:80"), "*:81/tcp -> 172.17.0.2:80\n");
    refused(stage, "publish db -p 81:80", 1, "published by web already");
    refused(stage, "publish db -p 127.0.0.1:81:80 --via dnat", 1, "published by web already");
    // A port that only the kernel serves has no socket to tell; the state does.
    stage.ok("publish web -p 90:80 --via dnat");
    refused(stage, "publish db -p 90:80", 1, "published by web already");
    let locked = stage.host.run(|| TcpListener::bind("0.0.0.0:90").unwrap());
    let output = stage.run("check");
    assert_eq!(output.status.code(), Some(1), "{output:#?}");
    assert!(output.stdout.contains("*:90/tcp of web: host port 90/tcp on * is in use"), "{output:#?}");
    let output = stage.run("repair");
    assert!(output.stderr.contains("netns-setup cannot repair"), "{output:#?}");
    drop(locked);
    assert_eq!(stage.ok("check"), "everything is as it should be\n");
}

fn foreign(stage: &Stage) {
    stage.host.ip("link add docker0 type bridge");
    refused(stage, "up", 1, "docker0 exists already and is not ours");
    stage.host.ip("link delete docker0");
    stage.host("iptables -t nat -N DOCKER");
    refused(stage, "up --firewall iptables", 1, "use --firewall nft");
    stage.host("iptables -t nat -X DOCKER");
}

/// Chains and rules of others, whoever has made them, and what names them while they drop.
fn dropping(stage: &Stage, backend: Backend) {
    stage.ok(&format!("up --subnet6 fd00:d0c::/64 {}", backend.option()));
    stage.ok("attach web");
    stage.ok("publish web -p 80:80");
    assert_eq!(stage.run("check").stderr, "");
    let base = |family: &str, hook: &str, policy: &str| {
        format!(
            "nft add table {family} fw; nft add chain {family} fw c {{ type filter hook {hook} priority 7 ; policy {policy} ; }}"
        )
    };
    for (make, unmake, finding) in [
        (
            base("inet", "forward", "drop"),
            "nft delete table inet fw",
            "the chain c of the nft table inet fw drops forwarded packets by its policy",
        ),
        (
            base("ip6", "forward", "drop"),
            "nft delete table ip6 fw",
            "of the nft table ip6 fw drops forwarded packets by its policy",
        ),
        (
            base("ip", "input", "drop"),
            "nft delete table ip fw",
            "of the nft table ip fw drops packets to this host by its policy",
        ),
        (
            format!(
                "{}; nft add rule inet fw c iifname docker0 counter drop",
                base("inet", "forward", "accept")
            ),
            "nft delete table inet fw",
            "by its rule `iifname \"docker0\" counter drop`",
        ),
        (
            format!("{}; nft add rule inet fw c counter reject", base("inet", "forward", "accept")),
            "nft delete table inet fw",
            "by its rule `counter reject",
        ),
    ] {
        shell(stage, &make);
        for command in ["check", "up --subnet6 fd00:d0c::/64"] {
            let output = stage.run(command);
            assert!(output.stderr.contains(finding), "{make}: {output:#?}");
        }
        shell(stage, unmake);
        assert_eq!(stage.run("check").stderr, "", "{make}");
    }
    if backend != Backend::Legacy {
        dropping_legacy(stage);
    }
}

/// iptables-legacy, which `nft` does not list.
fn dropping_legacy(stage: &Stage) {
    for tool in ["iptables-legacy", "ip6tables-legacy"] {
        stage.host(&format!("{tool} -P FORWARD DROP"));
        let output = stage.run("check");
        let finding =
            format!("the chain FORWARD of {tool}'s table filter drops forwarded packets by its policy");
        assert!(output.stderr.contains(&finding), "{output:#?}");
        stage.host(&format!("{tool} -P FORWARD ACCEPT"));
    }
}

fn shell(stage: &Stage, script: &str) {
    for line in script.split("; nft ") {
        stage.host(&format!("nft {}", line.trim_start_matches("nft ")));
    }
}

fn no_firewall(stage: &Stage) {
    // Programs are looked for in the usual directories too, so those have to be empty.
    let script = "mount -t tmpfs none /usr/sbin; PATH=/nonexistent exec \"$@\"";
    let run = |firewall: &str| {
        let mut command = require::command("unshare");
        command.args(["--mount", "/bin/sh", "-c", script, "sh"]).arg(netns_setup());
        command.args(["up", "--firewall", firewall, "--state-dir"]).arg(stage.state_dir());
        stage.host.spawn(command).into_output()
    };
    let before = stage.dump();
    for (firewall, part) in [
        ("nft", "nft is not installed"),
        ("iptables", "iptables-save is not installed"),
        ("auto", "neither nft nor iptables is installed"),
    ] {
        let output = run(firewall);
        assert_eq!(output.status.code(), Some(1), "{output:#?}");
        assert!(output.stderr.contains(part), "{output:#?}");
        assert_eq!(output.stderr.lines().count(), 1, "{output:#?}");
    }
    assert_same(&stage.dump(), &before, "after all");
    assert!(run("none").status.success());
}

fn not_root(stage: &Stage) {
    // A copy that others can get at.
    let copy = tempfile::Builder::new().permissions(PermissionsExt::from_mode(0o755)).tempdir().unwrap();
    let program = copy.path().join("netns-setup");
    std::fs::copy(netns_setup(), &program).unwrap();
    let mut command = require::command("setpriv");
    command.args(["--reuid", "65534", "--clear-groups"]).arg(program).arg("up");
    let output = stage.host.spawn(command).into_output();
    assert_eq!(output.status.code(), Some(1), "{output:#?}");
    assert!(output.stderr.contains("needs root"), "{output:#?}");
}

fn no_capability(stage: &Stage) {
    let before = stage.dump();
    let mut command = require::command("setpriv");
    command.args(["--bounding-set=-net_admin", "--inh-caps=-net_admin"]).arg(netns_setup());
    command.args(["up", "--state-dir"]).arg(stage.state_dir());
    let output = stage.host.spawn(command).into_output();
    assert_eq!(output.status.code(), Some(1), "{output:#?}");
    assert!(output.stderr.contains("it needs CAP_NET_ADMIN"), "{output:#?}");
    assert_eq!(output.stderr.lines().count(), 1, "{output:#?}");
    assert_same(&stage.dump(), &before, "after all");
    assert!(!stage.state_dir().exists());
}

fn dry_run(stage: &Stage) {
    let before = stage.dump();
    let plan = stage.ok("up --dry-run");
    assert!(plan.contains("ip link add name docker0"), "{plan}");
    assert_same(&stage.dump(), &before, "after all");
    assert!(!stage.state_dir().exists());
    stage.ok("up");
    let before = stage.dump();
    assert!(stage.ok("attach web --dry-run").contains("ip netns add web"));
    assert!(stage.ok("down --dry-run").contains("ip link delete dev docker0"));
    assert_same(&stage.dump(), &before, "after all");
}

fn interference(stage: &Stage) {
    stage.host("iptables -P FORWARD DROP");
    let output = stage.run("up --firewall nft");
    let policy = "the chain FORWARD of the nft table ip filter drops forwarded packets by its policy";
    assert!(output.stderr.contains(policy), "{output:#?}");
    assert!(stage.run("check").stderr.contains(policy));
    stage.host("iptables -A FORWARD -i docker0 -j ACCEPT");
    assert_eq!(stage.run("check").stderr, "");
    stage.host("iptables -F FORWARD");
    stage.ok("down");
    let chosen: serde_json::Value = serde_json::from_str(&stage.ok("up --firewall auto --json")).unwrap();
    assert_eq!(chosen["result"]["network"]["firewall"], "iptables");
    stage.ok("down");
    stage.host("iptables -P FORWARD ACCEPT");
    stage.host("iptables -t nat -N DOCKER");
    let output = stage.run("up --firewall auto");
    assert!(output.stderr.contains("holds Docker's chains"), "{output:#?}");
    assert!(output.status.success(), "{output:#?}");
    stage.ok("down");
    stage.host("iptables -t nat -X DOCKER");
}

fn demo_without_rules(stage: &Stage) {
    let mut command = std::process::Command::new(netns_setup());
    command.args(["demo", "--firewall", "none"]);
    let shown = stage.host.spawn(command).into_output().success();
    assert!(shown.contains("hairpin") && shown.contains("nothing is closed"), "{shown}");
    assert!(shown.ends_with("everything that netns-setup created is removed\n"), "{shown}");
}

fn by_id(stage: &Stage) {
    stage.ok("up");
    stage.ok("attach web");
    let id = |name: &str| {
        let shown: serde_json::Value = serde_json::from_str(&stage.ok(&format!("inspect {name}"))).unwrap();
        shown[0]["Id"].as_str().unwrap().to_owned()
    };
    let whole = id("web");
    let short = &whole[..12];
    assert_eq!(id(short), whole);
    stage.ok(&format!("publish {short} -p 80:80"));
    stage.ok(&format!("unpublish {short} -p 80:80"));
    // A name comes first.
    stage.ok(&format!("attach {short}"));
    assert_ne!(id(short), whole);
    stage.ok(&format!("detach {short}"));
    stage.ok(&format!("detach {whole}"));
    refused(stage, &format!("inspect {short}"), 1, "there is no container");
    // Seventeen identifiers have sixteen first digits.
    (0..17).for_each(|number| drop(stage.ok(&format!("attach c{number}"))));
    let firsts: Vec<char> = (0..17).map(|number| id(&format!("c{number}")).chars().next().unwrap()).collect();
    let twice = firsts.iter().find(|first| firsts.iter().filter(|other| other == first).count() > 1).unwrap();
    refused(stage, &format!("inspect {twice}"), 1, "write more digits, or the name");
}

fn listed(stage: &Stage) {
    stage.ok("up --subnet6 fd00:d0c::/64");
    stage.ok("attach web");
    stage.ok("attach db");
    stage.ok("publish web -p 80:80 -p 127.0.0.1:90:90/tcp+udp -p [::1]:91:91 -p 0:92 --via proxy");
    let list = || {
        let text = stage.ok("list");
        let lines: Vec<_> = text.lines().map(str::to_owned).collect();
        let [_, _, web] = &lines[..] else { panic!("{text}") };
        let columns = web.split_once("172.17.0.2,fd00:d0c::2 ").expect(&text).1.trim();
        columns.split_once(' ').map_or_else(Vec::new, |(_veth, ports)| {
            ports.trim().split(", ").map(str::to_owned).collect::<Vec<_>>()
        })
    };
    let ports = list();
    assert_eq!(ports.len(), 5, "{ports:?}");
    let unpublish = |arguments: &[&str]| {
        let mut command = std::process::Command::new(netns_setup());
        command.arg("--state-dir").arg(stage.state_dir()).arg("unpublish").args(arguments);
        stage.host.spawn(command).into_output()
    };
    assert_eq!(ports[0], "*:80->80/tcp (proxy)");
    let wrong = unpublish(&["db", "-p", &ports[0]]);
    assert!(wrong.stderr.contains("db does not publish *:80:80/tcp"), "{wrong:#?}");
    assert_eq!(unpublish(&[&ports[0]]).success(), "*:80/tcp is no longer published\n");
    unpublish(&["web", "-p", &ports[1], "-p", ports[2].split(' ').next().unwrap()]).success();
    // As publish prints it.
    unpublish(&["[::1]:91/tcp -> 172.17.0.2:91"]).success();
    assert_eq!(list(), ports[4..]);
    unpublish(&[&ports[4]]).success();
    assert_eq!(list(), Vec::<String>::new());
}

fn without_ipv6(stage: &Stage) {
    stage.ok("up --disable-ipv6");
    stage.ok("attach web");
    assert_eq!(stage.host("ip -n web -6 address"), "");
    let db = stage.attach("db");
    let shown = db.ip("-6 -br address");
    assert!(
        shown.contains("::1") && !shown.contains("fe80"),
        "only eth0 of a namespace that was passed: {shown}"
    );
    stage.host("nsenter --net=/run/netns/web sysctl -w net.ipv6.conf.all.disable_ipv6=0");
    assert!(stage.run("check").stdout.contains("net.ipv6.conf.all.disable_ipv6 in /run/netns/web is not 1"));
    stage.ok("repair");
    assert_eq!(stage.host("ip -n web -6 address"), "");
    refused(stage, "up", 1, "the network is up with --bridge docker0 --subnet 172.17.0.0/16 --disable-ipv6");
    refused(stage, "up --disable-ipv6 --subnet6 fd00:d0c::/64", 2, "cannot be used with");
    stage.ok("down");
    stage.ok("up");
    stage.ok("attach web");
    assert!(stage.host("ip -n web -6 address").contains("::1"));
}

/// Runs a command that fails with `--json`; returns what it prints.
#[track_caller]
fn json_error(stage: &Stage, arguments: &str) -> serde_json::Value {
    let output = stage.run(&format!("{arguments} --json"));
    assert_eq!(output.stderr, "", "{arguments}");
    let shown: serde_json::Value = serde_json::from_str(&output.stdout).unwrap();
    assert_eq!(shown["exit_status"].as_i64(), output.status.code().map(i64::from), "{shown}");
    shown
}

fn json_errors(stage: &Stage) {
    let error = |arguments: &str| json_error(stage, arguments)["error"].as_str().unwrap().to_owned();
    assert!(error("attach web").starts_with("there is no network: run `netns-setup up --state-dir "));
    stage.ok("up");
    assert!(error("publish web -p 80").starts_with("there is no container web"));
    assert!(error("publish web -p x").contains("'x' is not a port"));
    assert!(error("frobnicate").contains("unrecognized subcommand 'frobnicate'"));
    assert!(error("demo").contains("demo takes neither"));
    stage.ok("attach web");
    let published: serde_json::Value =
        serde_json::from_str(&stage.ok("publish web -p 80:80 --json")).unwrap();
    assert!(published["result"]["mappings"][0]["relay"]["pid"].is_u64(), "{published}");
    stage.host("ip link set dev docker0 down");
    let found = json_error(stage, "check");
    assert_eq!(found["differences"], serde_json::json!(["docker0 is down"]));
}

fn partly_mended(stage: &Stage) {
    stage.ok("up");
    stage.host("ip netns add mine");
    stage.ok("attach web --netns /run/netns/mine");
    stage.host("ip netns delete mine");
    let (_, said) = stage.fails("repair");
    assert!(said.contains("1 difference found that netns-setup cannot repair"), "{said}");
    stage.host("ip link set dev docker0 type bridge stp_state 1");
    let output = stage.run("check");
    assert!(output.stdout.contains("the spanning tree protocol of docker0 is on\n"), "{output:#?}");
    let part = "for 1 of them; the last one is not for netns-setup to repair";
    assert!(output.stderr.contains("2 differences found") && output.stderr.contains(part), "{output:#?}");
    stage.fails("repair");
    assert!(stage.host("ip -d link show dev docker0").contains("stp_state 0"));
    stage.ok("detach web");
    assert_eq!(stage.ok("check"), "everything is as it should be\n");
}

fn privileged_port(stage: &Stage) {
    stage.ok("up");
    stage.ok("attach web");
    let publish = || {
        let mut command = require::command("setpriv");
        command.args(["--bounding-set=-net_bind_service", "--inh-caps=-net_bind_service"]);
        command.arg(netns_setup()).args(["publish", "web", "-p", "80:80", "--state-dir"]);
        command.arg(stage.state_dir());
        stage.host.spawn(command).into_output()
    };
    let output = publish();
    assert_eq!(output.status.code(), Some(1), "{output:#?}");
    let way_out = "sysctl -w net.ipv4.ip_unprivileged_port_start=80";
    assert!(output.stderr.contains(&format!("`{way_out}`")), "{output:#?}");
    stage.host(way_out);
    publish().success();
}

fn hidden_mounts(stage: &Stage) {
    stage.ok("up");
    let run = |arguments: &str| {
        // As `ip netns exec` does to what its command sees.
        let mut command = require::command("unshare");
        command.args(["--mount", "--propagation", "slave"]).arg(netns_setup());
        command.args(arguments.split_whitespace()).arg("--state-dir").arg(stage.state_dir());
        stage.host.spawn(command).into_output()
    };
    stage.host("mkdir -p /run/netns");
    stage.host("mount --bind /run/netns /run/netns");
    stage.host("mount --make-shared /run/netns");
    let before = stage.dump();
    let output = run("attach web");
    assert_eq!(output.status.code(), Some(1), "{output:#?}");
    assert!(output.stderr.contains("the namespace of web would end with this process"), "{output:#?}");
    assert_same(&stage.dump(), &before, "attach");
    stage.ok("attach web");
    run("check").success();
    stage.host("ip netns delete web");
    let output = run("repair");
    assert_eq!(output.status.code(), Some(1), "{output:#?}");
    stage.ok("repair");
    assert_eq!(stage.ok("check"), "everything is as it should be\n");
}

fn at_once(stage: &Stage) {
    stage.ok("up");
    let runs: Vec<_> = (0..8)
        .map(|number| {
            let mut command = std::process::Command::new(netns_setup());
            command.args(["attach", &format!("c{number}"), "--state-dir"]).arg(stage.state_dir());
            stage.host.spawn(command)
        })
        .collect();
    let mut given: Vec<String> = runs.into_iter().map(|run| run.into_output().success()).collect();
    given.sort();
    let expected: Vec<_> = (2..10).map(|last| format!("172.17.0.{last}\n")).collect();
    assert_eq!(given, expected);
    assert_eq!(stage.ok("check"), "everything is as it should be\n");
}

/// What `--dry-run` prints is run by a shell, and has to come to what the command itself comes to.
fn printed_commands(stage: &Stage, backend: Backend) {
    let commands = [
        format!("up --subnet6 fd00:d0c::/64 --persist {}", backend.option()),
        "attach web".to_owned(),
        "transparent up --interface docker0 eth0".to_owned(),
        "transparent down --interface docker0".to_owned(),
        "publish web -p 80:80 -p 10.0.0.11:53:53/udp --via dnat".to_owned(),
        "unpublish web -p 80:80".to_owned(),
        "detach web".to_owned(),
        "down".to_owned(),
    ];
    for (at, command) in commands.iter().enumerate() {
        stage.ok(command);
        let by_itself = without_random(&stage.dump());
        let mut by_hand = String::new();
        Stage::play(backend == Backend::Legacy, |other| {
            commands[..at].iter().for_each(|earlier| drop(other.ok(earlier)));
            let mut shell = require::command("sh");
            // Deleting no flow is a failure to `conntrack`, and there are none.
            let script = other.ok(&format!("{command} --dry-run"));
            let script: Vec<&str> = script.lines().filter(|line| !line.starts_with("conntrack ")).collect();
            shell.args([
                "-e",
                "-c",
                &script.join(
                    "
",
                ),
            ]);
            other.with_path(&mut shell);
            other.host.spawn(shell).into_output().success();
            by_hand = without_random(&other.dump());
        });
        assert_same(&by_hand, &by_itself, command);
    }
}

/// A dump without what is drawn by lot: names of veths and the addresses of those that have no number of ours.
fn without_random(dump: &str) -> String {
    let is_mac =
        |word: &str| word.len() == 19 && word.matches(':').count() == 5 && !word.starts_with("\"02:42:");
    let plain = |word: &str| match word {
        word if word.starts_with("ifname=\"veth") => "ifname=veth".to_owned(),
        word if word.strip_prefix("address=").is_some_and(is_mac) => "address=random".to_owned(),
        word => word.to_owned(),
    };
    let line = |line: &str| line.split(' ').map(plain).collect::<Vec<_>>().join(" ") + "\n";
    let mut lines: Vec<String> = dump.lines().map(line).collect();
    lines.sort();
    lines.concat()
}
