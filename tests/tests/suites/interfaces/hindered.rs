//! What is in the way of the addresses of interfaces: lost messages, other sockets and mappings, limits, and other names.

use std::fmt::Write as _;

use super::*;

pub(crate) fn cases() -> Vec<Case> {
    let needs = &[Need::Root, Need::Program("ip"), Need::Program("ss")];
    let case = |name: &str, body: fn()| Case::new(name, body).needs(needs);
    vec![
        case("what was deleted while messages were lost is left", deleted_unseen),
        case("an address stays while it has a peer", peers),
        case("an interface has other names, too", alternative_names),
        case("mappings exclude each other before there is an address", exclusive),
        case("a list applies while an address is another mapping's", list_applies),
        case("a shortage of descriptors ends", descriptors).needs(&[Need::Program("prlimit")]),
        case("an address that cannot be bound does not matter to others", unbindable),
        case("many addresses have few lines in the log", few_lines),
        case("messages name the interface", messages),
    ]
}

/// Commands of `ip -batch` whose messages are more than a socket has room for.
pub(super) fn flood() -> String {
    let mut batch = String::new();
    for number in 0..2000 {
        let (third, fourth) = (number / 250, number % 250 + 1);
        for action in ["add", "del"] {
            writeln!(batch, "address {action} 10.7.{third}.{fourth}/32 dev lo").unwrap();
        }
    }
    batch
}

/// Has `ip` do all of `batch`.
pub(super) fn do_all(stage: &Stage, batch: &str) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("batch");
    fs::write(&file, batch).unwrap();
    stage.net.host.ip(&format!("-batch {}", file.display()));
}

fn deleted_unseen() {
    let stage = Stage::new();
    let host = &stage.net.host;
    host.address("eth0", "10.0.0.21/24");
    let both = [&TO_ECHO[..], &["--host", "%lan0:81", "--to", "172.17.0.2:80", "--log-level", "debug"]];
    let process = &host.spawn(rproxy::command(&both.concat()));
    process.wait_for_line(Stream::Stdout, |line| line == "80/tcp -> %lan0:81");
    stage.until_listens("10.0.0.21:80");
    process.pause();
    let lan0 = |last: u8| format!("link add name lan0 type bridge\naddress add 10.9.0.{last}/24 dev lan0\n");
    let again = "address del 10.0.0.21/24 dev eth0\naddress add 10.0.0.21/24 dev eth0\n";
    let gone = "address del 10.0.0.21/24 dev eth0\nlink del lan0\n";
    do_all(&stage, &[&lan0(1), again, &flood(), gone, &lan0(2)].concat());
    process.resume();
    stage.until_listens("10.9.0.2:81");
    says(process, "some changes of interfaces were lost");
    stage.until_left("10.0.0.21:80");
    assert!(stage.listens("10.0.0.11:80") && !stage.listens("10.9.0.1:81"));
    host.address("lan0", "10.9.0.3/24");
    stage.until_listens("10.9.0.3:81");
}

fn peers() {
    let stage = Stage::new();
    let host = &stage.net.host;
    let _proxy = stage.start(&TO_ECHO);
    host.ip("address add 10.6.0.1 peer 10.6.0.2 dev eth0");
    host.ip("address add 10.6.0.1 peer 10.6.0.3 dev eth0");
    host.ip("address add fd00:10::21 peer fd00:10::22 dev eth0 nodad");
    stage.until_listens("10.6.0.1:80");
    stage.until_listens("[fd00:10::21]:80");
    host.ip("address del 10.6.0.1 peer 10.6.0.3 dev eth0");
    host.address("eth0", "10.0.0.21/24");
    stage.until_listens("10.0.0.21:80");
    assert!(stage.listens("10.6.0.1:80"));
    host.ip("address del 10.6.0.1 peer 10.6.0.2 dev eth0");
    stage.until_left("10.6.0.1:80");
    // The peer of one of IPv6 may change.
    host.ip("address change fd00:10::21 peer fd00:10::23 dev eth0 nodad");
    host.ip("address del fd00:10::21 peer fd00:10::23 dev eth0");
    stage.until_left("[fd00:10::21]:80");
}

fn alternative_names() {
    let stage = Stage::new();
    let host = &stage.net.host;
    host.ip("link property add dev eth0 altname enp0s3");
    let proxy = stage.start(&["--host", "%enp0s3:80", "--to", "172.17.0.2:80"]);
    stage.serves((HOST_V4, 80));
    host.ip("link property del dev eth0 altname enp0s3");
    stage.until_left("10.0.0.11:80");
    says(&proxy.process, "there is no interface enp0s3");
    host.ip("link property add dev eth0 altname enp0s3");
    stage.until_listens("10.0.0.11:80");
}

fn exclusive() {
    let stage = Stage::new();
    let server = Controlled::start_in(&stage.net.host, &[]);
    let add = |name: &str, host: &str| {
        let named = if name.is_empty() { vec![] } else { vec!["--name", name] };
        server.ctl(&[&["add"][..], &named, &["--host", host, "--to", "172.17.0.2:80"]].concat())
    };
    let added = add("", "%etho:85");
    let warning = "rproxy: warning: %etho:85/tcp: there is no interface etho; its mappings are served when it \
                   appears; did you mean eth0?";
    assert!(added.status.success() && added.stderr.starts_with(warning), "{added:#?}");
    assert!(add("all", "0.0.0.0:87").status.success());
    for (name, host, part) in [
        ("", "0.0.0.0:85", "port 85 is taken by the mapping %etho:85/tcp"),
        ("z", "%etho:85", "port 85 is taken by the mapping %etho:85/tcp"),
        ("", "%etho:87", "port 87 is taken by the mapping all"),
        ("", "%eth0:87", "port 87 is taken by the mapping all"),
    ] {
        let refused = add(name, host);
        assert!(refused.status.code() == Some(1) && refused.stderr.contains(part), "{host}: {refused:#?}");
        assert!(refused.stderr.contains("choose another port"), "{refused:#?}");
    }
    assert!(add("", "0.0.0.0:86").status.success(), "it is another port");
    let file = server.file("list.json", &server.ctl(&["list", "--json"]).success());
    let applied = server.ctl(&["apply", file.to_str().unwrap()]);
    assert!(applied.stderr.starts_with(warning), "{applied:#?}");
    assert_eq!(applied.success().trim(), "0 added, 0 changed, 0 removed, 3 not touched");
}

fn list_applies() {
    let stage = Stage::new();
    let host = &stage.net.host;
    let server = Controlled::start_in(host, &TO_ECHO);
    let own = ["add", "--name", "own", "--host", "10.0.0.22:80", "--to", "172.17.0.2:80", "--freebind"];
    server.ctl(&own).success();
    host.address("eth0", "10.0.0.22/24");
    says(&server.process, "is not served");
    let file = server.file("list.json", &server.ctl(&["list", "--json"]).success());
    let apply = || server.ctl(&["apply", file.to_str().unwrap()]).success().trim().to_owned();
    assert_eq!(apply(), "0 added, 0 changed, 0 removed, 2 not touched");
    server.ctl(&["retarget", "%eth0:80/tcp", "--to", "172.17.0.2:81"]).success();
    assert_eq!(apply(), "0 added, 1 changed, 0 removed, 1 not touched");
    server.ctl(&["remove", "own"]).success();
    stage.until_listens("10.0.0.22:80");
}

fn descriptors() {
    let stage = Stage::new();
    let proxy = stage.start(&TO_ECHO);
    let process = &proxy.process;
    client::ping(&stage.connect((HOST_V4, 80)).unwrap());
    let before = process.descriptors();
    process.limit_descriptors(3);
    stage.net.host.address("eth0", "10.0.0.21/24");
    assert!(says(process, "is not served").contains("too many open files"));
    assert!(!stage.listens("10.0.0.21:80"));
    process.limit_descriptors(before + 64);
    stage.until_listens("10.0.0.21:80");
}

/// The kernel binds no IPv4-mapped address, nor, without `ip vrf exec`, one of a VRF.
fn unbindable() {
    let stage = Stage::new();
    let host = &stage.net.host;
    host.ip("address add ::ffff:10.0.0.88/128 dev eth0 nodad");
    let server = Controlled::start_in(host, &TO_ECHO);
    stage.serves((HOST_V4, 80));
    let told = |count: usize| {
        let is_one = |line: &str| line.contains("is not served") && line.contains("as in a VRF");
        server.process.wait_for_lines(Stream::Stderr, count, is_one);
    };
    told(1);
    server.ctl(&["add", "--host", "%eth0:81", "--to", "172.17.0.2:80"]).success();
    stage.serves((HOST_V4, 81));
    told(2);
    host.address("eth0", "10.0.0.21/24");
    stage.until_listens("10.0.0.21:81");
    let log = server.process.captured(Stream::Stderr);
    assert_eq!(log.lines().filter(|line| line.contains("is not served")).count(), 2, "{log}");
}

fn few_lines() {
    const MANY: u64 = 60;

    let stage = Stage::new();
    // It gets no others meanwhile, of IPv6.
    let proxy = stage.start(&["--host", "%lo:80", "--to", "172.17.0.2:80"]);
    let batch = |action: &str| -> String {
        (1..=MANY).map(|last| format!("address {action} 10.8.0.{last}/32 dev lo\n")).collect()
    };
    do_all(&stage, &batch("add"));
    eventually("all are listened at", || {
        stage.listeners("t").keys().filter(|place| place.starts_with("10.8.0.")).count() == 60
    });
    do_all(&stage, &batch("del"));
    // Those with a line of their own, and those that another line counts.
    let logged = |own: &str, sum: &str| {
        let log = proxy.process.captured(Stream::Stderr);
        let count = |line: &str| line.split_once(sum)?.1.split(' ').next()?.parse::<u64>().ok();
        let own = log.lines().filter(|line| line.contains(own)).count() as u64;
        (own, own + log.lines().filter_map(count).sum::<u64>())
    };
    for (own, sum) in [("INFO serving at an address", " served="), ("no longer serving at", " left=")] {
        eventually("all are counted", || logged(own, sum).1 == MANY);
        assert!(logged(own, sum).0 < MANY, "each has its line");
    }
}

fn messages() {
    let stage = Stage::new();
    let host = &stage.net.host;
    let _theirs = host.run(|| TcpListener::bind((HOST_V4, 92)).unwrap());
    let taken = ["--host", "%eth0:92", "--to", "172.17.0.2:80"];
    let output = host.spawn(rproxy::command(&taken)).into_output();
    assert_eq!(output.status.code(), Some(1), "{output:#?}");
    let said = format!(
        "rproxy: --host %eth0:92 at 10.0.0.11: the tcp port is taken by {}; use another one, or end what has it\n",
        testkit::process::own_name()
    );
    assert_eq!(output.stderr, said);
    let server = Controlled::start_in(host, &[]);
    let refused = server.ctl(&[&["add"][..], &taken].concat());
    assert!(refused.stderr.contains("%eth0:92/tcp: cannot listen on 10.0.0.11:92/tcp"), "{refused:#?}");
    assert!(!refused.stderr.contains("port 0"), "{refused:#?}");
    for (arguments, part) in [
        (["-p", "%eth0:80", "--to", "192.0.2.1"], "write %eth0:80:80/tcp for the same host port"),
        (["--host", "eth0.web:85", "--to", "192.0.2.1:80"], "or %eth0.web for those of an interface"),
        (["--host", "[%eth0]:85", "--to", "192.0.2.1:80"], "or %eth0 for those of an interface"),
        (["--host", "eth0:1:80", "--to", "192.0.2.1:80"], "or %eth0 for those of an interface"),
    ] {
        let output = Process::spawn(rproxy::command(&arguments)).into_output();
        assert!(output.status.code() == Some(2) && output.stderr.contains(part), "{output:#?}");
    }
}
