//! Mappings that the relay cannot serve any more: the others go on, and these come back.

use std::fs;

use testkit::eventually;
use testkit::netns::Namespace;
use testkit::suite::Case;
use testkit::topology::HOST_V4;

use super::relay::{parent, relay};
use super::stage::{Echo, Stage, assert_out_of_reach, assert_reaches, case, serve};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("a container whose address the host has got is left out until it has lost it", own_address),
        case("all mappings may be refused, and come back", all),
        case("a link-local address whose interface is gone is left out until it is back", interface),
    ]
}

/// Containers called `web` and `db` that answer at port 80.
fn set_up(stage: &Stage) -> [(Namespace, Echo); 2] {
    stage.ok("up");
    ["web", "db"].map(|name| {
        let container = stage.attach(name);
        let echo = serve(&container, 80);
        (container, echo)
    })
}

/// Has the relay crash, so that it is started again with all mappings.
fn restart(stage: &Stage) {
    let first = relay(stage);
    stage.host(&format!("kill -KILL {first}"));
    eventually("it is started again", || {
        let list: serde_json::Value = serde_json::from_str(&stage.ok("list --json")).unwrap();
        let pids = list.to_string();
        pids.contains("\"pid\"") && relay(stage) != first
    });
}

fn log(stage: &Stage) -> String {
    fs::read_to_string(stage.state_dir().join("relay.log")).unwrap()
}

const WEB: &str =
    "*:80/tcp of web is not served now: web/tcp/[::]:80: 80/tcp (web/tcp/[::]:80) would forward to itself";

fn own_address(stage: &Stage) {
    let _containers = set_up(stage);
    stage.ok("publish web -p 80:80 --via proxy");
    stage.ok("publish web -p 81:80 --via proxy");
    stage.ok("publish db -p 90:80 --via proxy");
    stage.host("ip address add 172.17.0.2/32 dev lo");
    restart(stage);
    let supervisor = parent(relay(stage));
    eventually("the others are served", || stage.run("check").stdout.contains(WEB));
    assert_reaches(&stage.client, HOST_V4, 90);
    let output = stage.run("list");
    assert!(output.status.success() && output.stderr.contains("*:80/tcp is not served now: "), "{output:#?}");
    let output = stage.run("repair");
    assert!(!output.status.success() && output.stdout.contains(WEB), "{output:#?}");
    // Changes go on.
    stage.ok("publish db -p 91:80 --via proxy");
    assert_reaches(&stage.client, HOST_V4, 91);
    stage.ok("unpublish db -p 90:80");
    assert_out_of_reach(&stage.client, HOST_V4, 90);
    // What a command asks for is served, or the command fails, and changes nothing.
    let before = stage.dump();
    let (code, said) = stage.fails("publish web -p 85:85 --via proxy");
    assert!(code == 1 && said.contains("(web/tcp/[::]:85) would forward to itself"), "{said}");
    super::stage::assert_same(&stage.dump(), &before, "nothing was changed");
    assert_reaches(&stage.client, HOST_V4, 91);
    // Port 81 leads to port 80 of the host, which nobody serves.
    let refused = "host port *:80/tcp is not served until that is possible: ";
    assert_eq!(log(stage).matches(refused).count(), 1, "{}", log(stage));
    stage.host("ip address del 172.17.0.2/32 dev lo");
    eventually("it is served again", || stage.run("check").status.success());
    for port in [80, 81, 91] {
        assert_reaches(&stage.client, HOST_V4, port);
    }
    assert!(log(stage).contains("host port *:80/tcp is served again"), "{}", log(stage));
    assert_eq!(parent(relay(stage)), supervisor);
}

fn all(stage: &Stage) {
    let _containers = set_up(stage);
    stage.ok("publish web -p 80:80 --via proxy");
    stage.ok("publish db -p 10.0.0.11:90:80 -p 10.0.0.11:90:80/udp --via proxy");
    stage.ok("unpublish db -p 10.0.0.11:90:80/udp");
    // One that leads to itself, and one that leads to the other's port.
    stage.ok("publish db -p 80:80/udp --via proxy");
    stage.ok("unpublish db -p 10.0.0.11:90:80");
    for address in ["172.17.0.2", "172.17.0.3"] {
        stage.host(&format!("ip address add {address}/32 dev lo"));
    }
    restart(stage);
    eventually("all are refused", || {
        let said = stage.run("check").stdout;
        said.contains("*:80/tcp of web is not served now")
            && said.contains("*:80/udp of db is not served now")
    });
    // A refused one is removed.
    stage.ok("unpublish db");
    let said = stage.run("check").stdout;
    assert!(said.contains("*:80/tcp of web") && !said.contains("of db"), "{said}");
    for address in ["172.17.0.2", "172.17.0.3"] {
        stage.host(&format!("ip address del {address}/32 dev lo"));
    }
    // With the next change, or before.
    stage.ok("publish db -p 81:80 --via proxy");
    stage.ok("check");
    for port in [80, 81] {
        assert_reaches(&stage.client, HOST_V4, port);
    }
}

fn interface(stage: &Stage) {
    let make = || {
        stage.host("ip link add wan7 type veth peer name peer7");
        stage.host("ip link set wan7 up");
        stage.host("ip link set peer7 up");
        stage.host("ip address add fe80::77/64 dev wan7 nodad");
    };
    let _containers = set_up(stage);
    make();
    stage.ok("publish web -p [fe80::77%wan7]:80:80 -p [fe80::77%wan7]:80:80/udp --via proxy");
    stage.ok("publish db -p 90-92:80-82 --via proxy");
    let first = relay(stage);
    stage.host("ip link del wan7");
    let lost = "[fe80::77%wan7]:80/tcp of web is not served now: the interface wan7 of fe80::77 is gone";
    eventually("that is noticed", || stage.run("check").stdout.contains(lost));
    // Changes that pass everything, and those that pass only what is new.
    stage.ok("unpublish db -p 91:81");
    stage.ok("publish db -p 95:80 --via proxy");
    for port in [90, 95] {
        assert_reaches(&stage.client, HOST_V4, port);
    }
    restart(stage);
    eventually("the others are served", || stage.run("check").stdout.contains(lost));
    assert_reaches(&stage.client, HOST_V4, 90);
    assert_ne!(relay(stage), first);
    // Another index.
    stage.host("ip link add other7 type veth peer name other8");
    make();
    eventually("it is served again", || stage.run("check").status.success());
    let scope = stage.host.run(|| nix::net::if_::if_nametoindex("wan7").unwrap());
    let address = std::net::SocketAddrV6::new("fe80::77".parse().unwrap(), 80, 0, scope);
    assert!(super::stage::reaches_tcp(&stage.host, address, testkit::PATIENCE));
    for port in [90, 95] {
        assert_reaches(&stage.client, HOST_V4, port);
    }
    stage.host("ip link del wan7");
    eventually("that is noticed again", || stage.run("check").stdout.contains(lost));
    stage.ok("unpublish web");
    stage.ok("check");
}
