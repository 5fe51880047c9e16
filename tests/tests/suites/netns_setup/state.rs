//! The state file: lost, damaged, older, newer, and beside others on the same host.

use std::fs;

use testkit::process::Output;
use testkit::rproxy::netns_setup;
use testkit::suite::Case;

use super::stage::{Stage, assert_same, case};

/// A state file of a version that wrote no number.
const OLD: &str = include_str!("../../../testdata/netns-setup-state-0.json");

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("a state file that is lost comes back", lost),
        case("a state file that is lost is taken down", lost_down),
        case("a state file of a newer version is refused", newer),
        case("a state file of an older version is read", older),
        case("two state directories do not share what there is once", shared),
        case("the last of two networks switches forwarding off", forwarding),
        case("a state directory that was moved serves the same network", moved),
    ]
}

/// What is said of a loss, and how it happens.
type Loss = (&'static str, fn(&Stage));

/// Ways to lose the state file.
const LOSSES: [Loss; 5] = [
    ("is missing", |stage| fs::remove_file(file(stage)).unwrap()),
    ("is missing", |stage| fs::remove_dir_all(stage.state_dir()).unwrap()),
    ("is empty", |stage| fs::write(file(stage), "").unwrap()),
    ("is truncated", |stage| {
        let text = fs::read(file(stage)).unwrap();
        fs::write(file(stage), &text[..text.len() / 2]).unwrap();
    }),
    ("makes no sense", |stage| fs::write(file(stage), "{}").unwrap()),
];

fn file(stage: &Stage) -> std::path::PathBuf {
    stage.state_dir().join("state.json")
}

fn set_up(stage: &Stage) {
    stage.ok("up --persist");
    stage.ok("attach web");
    stage.ok("publish web -p 80:80 -p 81:80 --via dnat");
    stage.ok("publish web -p 82:80");
    stage.ok("transparent up --interface docker0");
}

fn lost(stage: &Stage) {
    set_up(stage);
    let (intact, listed) = (stage.dump(), stage.ok("list"));
    for (why, lose) in LOSSES {
        lose(stage);
        for command in ["list", "check", "attach db", "up", "transparent up --interface docker0"] {
            let (code, said) = stage.fails(command);
            assert!(code == 1 && said.contains(why), "{command}: {said}");
            assert!(said.contains("run `netns-setup repair --state-dir "), "{command}: {said}");
            assert_eq!(said.lines().count(), 1, "{command}: {said}");
        }
        let output = stage.run("repair");
        assert!(output.stderr.contains(why) && output.stderr.contains("restored from a copy"), "{output:#?}");
        output.success();
        assert_eq!(stage.ok("list"), listed, "{why}");
        assert_eq!(stage.ok("check"), "everything is as it should be\n", "{why}");
        assert_same(&stage.dump(), &intact, why);
    }
}

fn lost_down(stage: &Stage) {
    let bare = stage.dump();
    for (why, lose) in LOSSES {
        set_up(stage);
        lose(stage);
        stage.ok("down");
        assert_same(&stage.dump(), &bare, why);
        assert_eq!(fs::read_dir("/run/netns-setup-registry").unwrap().count(), 0, "{why}");
    }
}

fn newer(stage: &Stage) {
    set_up(stage);
    let text = fs::read_to_string(file(stage)).unwrap();
    let mut newer: serde_json::Value = serde_json::from_str(&text).unwrap();
    newer["version"] = 99.into();
    fs::write(file(stage), newer.to_string()).unwrap();
    let before = stage.dump();
    for command in ["list", "check", "repair", "down", "attach db"] {
        let (code, said) = stage.fails(command);
        assert!(
            code == 1 && said.contains("version 99") && said.contains("use the newer"),
            "{command}: {said}"
        );
    }
    assert_same(&stage.dump(), &before, "after all");
    assert_eq!(fs::read_to_string(file(stage)).unwrap(), newer.to_string());
    fs::write(file(stage), text).unwrap();
}

fn older(stage: &Stage) {
    fs::create_dir(stage.state_dir()).unwrap();
    fs::write(file(stage), OLD).unwrap();
    assert!(stage.ok("list").contains("*:80->80/tcp (dnat)"));
    // There is nothing of it here, as after a reboot.
    stage.ok("repair");
    assert_eq!(stage.ok("check"), "everything is as it should be\n");
    assert!(fs::read_to_string(file(stage)).unwrap().contains("\"version\": 2"));
}

fn beside(stage: &Stage, arguments: &str) -> Output {
    let mut command = std::process::Command::new(netns_setup());
    command.arg("--state-dir").arg(stage.state_dir().with_file_name("beside"));
    command.args(arguments.split_whitespace());
    stage.host.spawn(command).into_output()
}

fn shared(stage: &Stage) {
    set_up(stage);
    let own = stage.state_dir();
    let named = |output: Output, part: &str| {
        assert_eq!(output.status.code(), Some(1), "{output:#?}");
        assert!(output.stderr.contains(part), "{output:#?}");
        assert!(output.stderr.contains(&format!("--state-dir {}", own.display())), "{output:#?}");
    };
    let before = stage.dump();
    named(beside(stage, "up"), "the bridge docker0 belongs to the network with");
    named(beside(stage, "transparent up --interface eth0"), "transparent sockets need is set up with");
    assert_same(&stage.dump(), &before, "after all");
    beside(stage, "up --bridge br7 --subnet 172.30.0.0/16").success();
    beside(stage, "attach db").success();
    named(beside(stage, "publish db -p 80:80 --via dnat"), "host port *:80/tcp is published by web of");
    named(
        beside(stage, "publish db -p 10.0.0.11:82:80"),
        "host port 10.0.0.11:82/tcp is published by web of",
    );
    beside(stage, "publish db -p 90:80 --via dnat").success();
    let (_, said) = stage.fails("publish web -p 90:80 --via dnat");
    assert!(said.contains("is published by db of") && said.contains("/beside"), "{said}");
    beside(stage, "check").success();
    beside(stage, "down").success();
    assert_same(&stage.dump(), &before, "after all");
    stage.ok("publish web -p 90:80 --via dnat");
}

fn forwarding(stage: &Stage) {
    let bare = stage.dump();
    let (one, two) = ("up --bridge br1 --subnet 172.18.0.0/24", "up --bridge br2 --subnet 172.19.0.0/24");
    for first_goes_first in [true, false] {
        stage.ok(one);
        beside(stage, &format!("{two} --subnet6 fd00:19::/64")).success();
        let forwards = || stage.host("sysctl -n net.ipv4.ip_forward");
        let (first, last): (&dyn Fn(), &dyn Fn()) =
            (&|| drop(stage.ok("down")), &|| drop(beside(stage, "down").success()));
        let (first, last) = if first_goes_first { (first, last) } else { (last, first) };
        first();
        assert_eq!(forwards(), "1\n", "the other network needs it");
        let check = if first_goes_first { beside(stage, "check") } else { stage.run("check") };
        check.success();
        last();
        assert_same(&stage.dump(), &bare, "after both");
    }
}

fn moved(stage: &Stage) {
    set_up(stage);
    let elsewhere = stage.state_dir().with_file_name("beside");
    fs::rename(stage.state_dir(), &elsewhere).unwrap();
    beside(stage, "check").success();
    beside(stage, "publish web -p 90:80").success();
    fs::rename(&elsewhere, stage.state_dir()).unwrap();
    assert_eq!(stage.ok("check"), "everything is as it should be\n");
}
