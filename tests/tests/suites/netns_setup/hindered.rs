//! What is in the way of a part of a repair keeps nothing else from being repaired.

use std::fs;

use testkit::PATIENCE;
use testkit::netns::Namespace;
use testkit::suite::Case;
use testkit::topology::HOST_V4;

use super::stage::{Backend, Stage, case, for_each_firewall, reaches_tcp, serve};
use super::watch::set_up;

pub(crate) fn cases() -> Vec<Case> {
    let mut cases =
        for_each_firewall("somebody else's bridge leaves the rules and the relay", foreign_bridge);
    cases.extend([case("what cannot be looked at leaves the rest", unreadable)]);
    cases
}

/// Expects `repair` to repair something and to say what is in the way of the rest; returns what it says.
#[track_caller]
fn repairs_the_rest(stage: &Stage, hindrance: &str) {
    let repair = stage.run("repair");
    assert_eq!(repair.status.code(), Some(1), "{repair:#?}");
    assert!(repair.stdout.contains(hindrance), "{repair:#?}");
    // What it could repair is repaired by now.
    let check = stage.run("check");
    assert!(
        check.stdout.contains(hindrance) && check.stderr.contains("that netns-setup cannot repair"),
        "{check:#?}"
    );
}

fn foreign_bridge(stage: &Stage, backend: Backend) {
    set_up(stage, backend.option());
    let rules = || match backend {
        Backend::Nft => stage.host("nft list ruleset"),
        Backend::IptablesNft | Backend::Legacy => stage.host("iptables-save"),
    };
    stage.host("ip link delete docker0");
    stage.host("ip link add name docker0 address 02:00:00:00:00:09 type bridge");
    match backend {
        Backend::Nft => stage.host("nft flush ruleset"),
        Backend::IptablesNft | Backend::Legacy => stage.host("iptables -t nat -F"),
    };
    stage.host("sysctl -q -w net.ipv4.ip_forward=0");
    assert!(!rules().contains("dport 81") && !rules().contains("81 : 172.17.0.2"));
    repairs_the_rest(stage, "docker0 is not the one that netns-setup made");
    assert!(rules().contains("dport 81") || rules().contains("81 : 172.17.0.2"), "{}", rules());
    assert_eq!(stage.host("sysctl -n net.ipv4.ip_forward").trim(), "1");
    let theirs = stage.host("ip -d link show dev docker0");
    assert!(theirs.contains("02:00:00:00:00:09") && theirs.contains("state DOWN"), "{theirs}");
    assert!(stage.host("ip -br link show master docker0").is_empty(), "nothing is connected to it");
    stage.host("ip link delete docker0");
    stage.ok("repair");
    let _server = serve(&Namespace::open("/run/netns/web"), 80);
    assert!(reaches_tcp(&stage.client, (HOST_V4, 80), PATIENCE));
}

fn unreadable(stage: &Stage) {
    set_up(stage, "--persist");
    let file = "/etc/sysctl.d/60-netns-setup-docker0.conf";
    // The case's own directory, in its own mount namespace.
    fs::remove_file(file).unwrap();
    fs::create_dir(file).unwrap();
    stage.host("nft flush ruleset");
    stage.host("ip link set docker0 down");
    repairs_the_rest(stage, file);
    assert!(stage.host("nft list tables").contains("netns-setup-docker0"));
    fs::remove_dir(file).unwrap();
    stage.ok("repair");
    stage.ok("check");
}
