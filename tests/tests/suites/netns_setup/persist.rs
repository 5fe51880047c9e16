//! S17: forwarding that survives a reboot, in a mount namespace of the case.

use std::fs;

use testkit::suite::Case;

use super::stage::{Stage, assert_same, case};

const FILE: &str = "/etc/sysctl.d/60-netns-setup-docker0.conf";

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("forwarding is made permanent on request", permanent),
        case("a file that an administrator wrote is kept", of_others),
        case("a file that a reboot left is known again", rebooted),
        case("two networks have a file each", two_networks),
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
    fs::remove_file(FILE).unwrap();
    assert!(stage.run("check").stdout.contains("60-netns-setup-docker0.conf differs"));
    stage.ok("repair");
    assert!(fs::exists(FILE).unwrap());
    stage.ok("down");
    assert!(!fs::exists(FILE).unwrap());
    assert_eq!(stage.host("sysctl -n net.ipv4.ip_forward"), "0\n");
}

fn of_others(stage: &Stage) {
    const ADMINS: &str = "net.ipv4.ip_forward = 1\nvm.swappiness = 1\n";
    let said = |output: testkit::process::Output| output.stderr + &output.stdout;
    fs::write(FILE, ADMINS).unwrap();
    let (code, refused) = stage.fails("up --persist");
    assert!(code == 1 && refused.contains(&format!("the file {FILE} exists already")), "{refused}");
    fs::remove_file(FILE).unwrap();
    stage.ok("up --persist");
    // Also if it becomes the administrator's later.
    let changed = fs::read_to_string(FILE).unwrap() + "vm.swappiness = 1\n";
    for text in [ADMINS, &changed] {
        fs::write(FILE, text).unwrap();
        for command in ["check", "repair", "up --persist"] {
            let said = said(stage.run(command));
            assert!(said.contains("was changed by somebody else"), "{command}: {said}");
        }
        let output = stage.run("down");
        assert!(output.stderr.contains("it is left"), "{output:#?}");
        output.success();
        assert_eq!(fs::read_to_string(FILE).unwrap(), text);
        fs::remove_file(FILE).unwrap();
        stage.ok("up --persist");
    }
}

fn rebooted(stage: &Stage) {
    let forget = || {
        stage.ok("up --persist");
        let text = fs::read_to_string(FILE).unwrap();
        stage.ok("down");
        // All that a reboot leaves.
        fs::write(FILE, text).unwrap();
    };
    forget();
    assert_eq!(stage.ok("down --dry-run"), format!("rm {FILE}\n"));
    stage.ok("down");
    assert!(!fs::exists(FILE).unwrap());
    forget();
    let said = stage.ok("up");
    assert!(said.contains(FILE), "{said}");
    stage.ok("down");
    assert!(!fs::exists(FILE).unwrap());
}

fn two_networks(stage: &Stage) {
    let beside = stage.state_dir().with_file_name("beside");
    let other = |arguments: &str| {
        let mut command = std::process::Command::new(testkit::rproxy::netns_setup());
        command.args(arguments.split_whitespace()).arg("--state-dir").arg(&beside);
        stage.host.spawn(command).into_output().success()
    };
    stage.ok("up --persist");
    other("up --persist --bridge br7 --subnet 172.30.0.0/16");
    stage.ok("down");
    let left: Vec<_> =
        fs::read_dir("/etc/sysctl.d").unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["60-netns-setup-br7.conf"]);
    // The first one has switched forwarding off, as it had switched it on, which the other one notices.
    other("repair");
    other("check");
    other("down");
    assert_eq!(fs::read_dir("/etc/sysctl.d").unwrap().count(), 0);
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
