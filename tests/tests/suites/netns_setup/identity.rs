//! What somebody else has made under a name of ours is neither changed nor deleted.

use std::net::Ipv4Addr;

use testkit::suite::Case;

use super::stage::{Stage, assert_reaches, assert_same, case, serve};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("a bridge that somebody else made again is left alone", bridge),
        case("a bridge from before there were tags is ours", untagged),
        case("a namespace that somebody else made again is left alone", namespace),
        case("a namespace that was passed is not its successor", passed),
        case("an interface with the name of a veth pair is left alone", veth),
    ]
}

/// Expects `check` and `repair` to say what they cannot mend, and to change nothing.
#[track_caller]
fn unmendable(stage: &Stage, part: &str) {
    let before = stage.dump();
    let check = stage.run("check");
    assert_eq!(check.status.code(), Some(1), "{check:#?}");
    assert!(check.stdout.contains(part), "{check:#?}");
    assert!(check.stderr.contains("cannot repair"), "{check:#?}");
    let (code, said) = stage.fails("repair");
    let shown = stage.run("repair").stdout;
    assert!(code == 1 && (said.contains(part) || shown.contains(part)), "{said}{shown}");
    assert_same(&stage.dump(), &before, "repair");
}

fn bridge(stage: &Stage) {
    let bare = stage.dump();
    stage.ok("up");
    stage.ok("attach web");
    stage.host("ip link delete dev docker0");
    stage.host("ip link add name docker0 address 02:00:00:00:00:09 type bridge");
    unmendable(stage, "docker0 is not the one that netns-setup made");
    assert!(stage.fails("attach db").1.contains("is not the one"), "nothing is wired to it");
    stage.ok("down");
    assert!(stage.host("ip link show dev docker0").contains("02:00:00:00:00:09"));
    stage.host("ip link delete dev docker0");
    assert_same(&stage.dump(), &bare, "after all");
}

fn untagged(stage: &Stage) {
    stage.ok("up");
    stage.ok("attach web");
    let intact = stage.host("ip link show dev docker0");
    assert!(intact.contains("alias netns-setup:"), "{intact}");
    stage.host.ip("link set dev docker0 alias uplink");
    let check = stage.run("check");
    assert!(check.stdout.contains("the alias of docker0 is not"), "{check:#?}");
    stage.ok("repair");
    assert_eq!(stage.host("ip link show dev docker0"), intact);
}

/// Deletes a namespace, and makes another one. It has the inode of the first, as nsfs gives out the lowest that is free.
fn make_again(stage: &Stage, name: &str) {
    stage.host(&format!("ip netns delete {name}"));
    // The kernel takes the interfaces down later.
    while stage.host("ip -br link show type veth").contains("veth") {}
    stage.host(&format!("ip netns add {name}"));
}

fn namespace(stage: &Stage) {
    stage.ok("up");
    stage.ok("attach web");
    stage.ok("publish web -p 80:80");
    make_again(stage, "web");
    unmendable(stage, "the network namespace web is not the one that netns-setup made");
    stage.ok("detach web");
    assert!(stage.host("ip netns list").contains("web"));
    assert_eq!(stage.ok("check"), "everything is as it should be\n");
    stage.host("ip netns delete web");
}

fn passed(stage: &Stage) {
    stage.ok("up");
    stage.host("ip netns add mine");
    stage.ok("attach web --netns /run/netns/mine");
    make_again(stage, "mine");
    unmendable(stage, "the namespace of web is gone");
    stage.ok("detach web");
    assert_eq!(stage.host("ip -n mine -br link").lines().count(), 1, "there is only lo");
    stage.ok("attach web --netns /run/netns/mine");
    stage.ok("down");
    stage.host("ip netns delete mine");
}

fn veth(stage: &Stage) {
    stage.ok("up");
    let web = stage.attach("web");
    let _server = serve(&web, 80);
    stage.ok("attach db");
    let shown: serde_json::Value = serde_json::from_str(&stage.ok("list --json")).unwrap();
    let veth = shown[0]["veth"].as_str().unwrap();
    stage.host(&format!("ip link delete dev {veth}"));
    stage.host(&format!("ip link add name {veth} type bridge"));
    unmendable(stage, &format!("the interface {veth} has the name of db's"));
    // It keeps nothing else from being mended.
    stage.host("ip link set dev docker0 down");
    let (_, said) = stage.fails("repair");
    assert!(said.contains("cannot repair"), "{said}");
    assert_reaches(&stage.host, Ipv4Addr::new(172, 17, 0, 2), 80);
    stage.ok("down");
    assert!(stage.host("ip -br link").contains(veth));
}
