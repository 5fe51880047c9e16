//! S17: forwarding that survives a reboot, in a mount namespace of the case.

use std::fs;

use testkit::suite::Case;

use super::stage::{Stage, assert_same, case};

const FILE: &str = "/etc/sysctl.d/60-netns-setup.conf";

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("forwarding is made permanent on request", permanent),
        case("forwarding that was enabled stays enabled", stays_on),
        case("a setting that forwarding changes as a side effect is restored", in_passing),
    ]
}

fn permanent(stage: &Stage) {
    stage.ok("up");
    assert!(!fs::exists(FILE).unwrap(), "only on request");
    let said = stage.ok("up --persist");
    assert!(said.contains(FILE), "{said}");
    // As after a reboot: the file alone switches forwarding on.
    stage.host("sysctl -w net.ipv4.ip_forward=0");
    stage.host(&format!("sysctl -p {FILE}"));
    assert_eq!(stage.host("sysctl -n net.ipv4.ip_forward"), "1\n");
    fs::write(FILE, "net.ipv4.ip_forward = 0\n").unwrap();
    assert!(stage.run("check").stdout.contains("60-netns-setup.conf differs"));
    stage.ok("repair");
    stage.ok("down");
    assert!(!fs::exists(FILE).unwrap());
    assert_eq!(stage.host("sysctl -n net.ipv4.ip_forward"), "0\n");
}

fn stays_on(stage: &Stage) {
    stage.host("sysctl -w net.ipv4.ip_forward=1");
    stage.host("sysctl -w net.ipv6.conf.all.forwarding=1");
    let before = stage.dump();
    stage.ok("up --subnet6 fd00:d0c::/64");
    stage.ok("down");
    assert_same(&stage.dump(), &before, "after all");
    assert_eq!(stage.host("sysctl -n net.ipv4.ip_forward"), "1\n");
}

fn in_passing(stage: &Stage) {
    for value in ["0", "1"] {
        stage.host(&format!("sysctl -w net.ipv4.conf.all.accept_redirects={value}"));
        let before = stage.dump();
        stage.ok("up");
        stage.ok("down");
        assert_same(&stage.dump(), &before, "after all");
    }
}
