//! A relay or supervisor that hangs, and one that is started in a unit of systemd.

use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::machine::{self, Booted, Machine};
use testkit::require::Need;
use testkit::rproxy::{netns_setup, rproxy};
use testkit::suite::Case;
use testkit::topology::HOST_V4;

use super::relay::{parent, relay};
use super::stage::{Stage, assert_reaches, case, serve};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("a supervisor that hangs is replaced", supervisor),
        case("a relay that hangs is replaced with the next change", relay_hangs),
        Case::new("the relay outlives the unit that has started it", unit)
            .needs(machine::NEEDS)
            .needs(&[Need::Program("nft")]),
    ]
}

fn stop(pid: u32) {
    kill(Pid::from_raw(pid.try_into().unwrap()), Signal::SIGSTOP).unwrap();
}

fn supervisor(stage: &Stage) {
    stage.ok("up");
    let web = stage.attach("web");
    let _server = serve(&web, 80);
    stage.ok("publish web -p 80:80");
    let (first, before) = (relay(stage), parent(relay(stage)));
    stop(before);
    let (_, said) = stage.fails("publish web -p 81:80");
    assert!(said.contains("cannot talk to the relay's supervisor"), "{said}");
    stage.ok("repair");
    assert_reaches(&stage.host, HOST_V4, 80);
    assert!(relay(stage) != first && parent(relay(stage)) != before);
    stage.ok("check");
}

fn relay_hangs(stage: &Stage) {
    stage.ok("up");
    let web = stage.attach("web");
    let _server = serve(&web, 80);
    stage.ok("publish web -p 80:80");
    let (first, supervisor) = (relay(stage), parent(relay(stage)));
    stop(first);
    stage.ok("publish web -p 81:80");
    for port in [80, 81] {
        assert_reaches(&stage.host, HOST_V4, port);
    }
    assert!(relay(stage) != first && parent(relay(stage)) == supervisor);
}

fn unit() {
    let programs: Vec<&Path> = [netns_setup(), rproxy()].map(|program| program.parent().unwrap()).into();
    let machine = Machine::boot(&programs[..1]);
    let program = netns_setup().display();
    // systemd-run waits until all of it has run.
    let publish = format!("{program} up && {program} attach web && {program} publish web -p 80:80");
    let run = format!("systemd-run --unit=net -p Type=oneshot -p RemainAfterExit=yes sh -c '{publish}'");
    machine.sh(&run).success();
    let supervisor = || machine.sh("pgrep -x netns-setup").success();
    let before = supervisor();
    let group = machine.sh(&format!("cat /proc/{}/cgroup", before.trim())).success();
    assert!(!group.contains("net.service"), "{group}");
    machine.sh("systemctl stop net").success();
    assert_eq!(supervisor(), before, "it goes on");
    machine.sh(&format!("{program} check")).success();
    machine.sh(&format!("{program} down")).success();
}
