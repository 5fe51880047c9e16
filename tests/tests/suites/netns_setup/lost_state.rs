//! A state that cannot be written, or is lost or moved, keeps nothing from being repaired that does not need it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use nix::mount::{MsFlags, mount};
use testkit::netns::Namespace;
use testkit::process::Output;
use testkit::rproxy::netns_setup;
use testkit::suite::Case;
use testkit::topology::HOST_V4;
use testkit::{PATIENCE, eventually};

use super::stage::{Stage, assert_same, case, reaches_tcp, serve};
use super::watch::{Watch, set_up, until_settled};

/// Where the copies are.
const COPIES: &str = "/run/netns-setup-registry";

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("a full disk leaves what needs no new state", full),
        case("copies that cannot be written leave what needs no new state", full_copies),
        case("a directory that cannot be used leaves the kernel's part", unusable),
        case("a state and its copy that are both removed are known to the service", forgotten),
        case("a network that nobody knows any more is named, and can be taken down", unknown),
        case("a network whose copy alone is lost is left alone by others", lost_copy),
        case("a copy that cannot be read may be that of any network", damaged_copy),
        case("two networks that nobody knows any more are taken down one after the other", two_unknown),
        case("a network that is taken down does not come back", taken_down),
        case("a copy that is removed is written again", copy),
        case("a state directory that is moved is watched where it is", moved),
    ]
}

/// Fills a file system to its last byte.
fn fill(dir: &Path) {
    fs::write(dir.join("filler"), vec![0; 1 << 20]).unwrap_err();
}

fn full(stage: &Stage) {
    let dir = stage.state_dir();
    fs::create_dir(&dir).unwrap();
    // In the mount namespace of the case.
    mount(Some("tmpfs"), &dir, Some("tmpfs"), MsFlags::empty(), Some("mode=0700,size=256k")).unwrap();
    set_up(stage, "");
    stage.ok("attach db");
    let before = stage.dump();
    fill(&dir);
    stage.host("nft flush ruleset");
    stage.host("ip link set docker0 down");
    assert!(stage.ok("repair").contains("repaired with"), "that takes no new state");
    assert_eq!(stage.dump(), before);

    stage.host("ip netns delete db");
    stage.host("nft flush ruleset");
    let repair = stage.run("repair");
    assert_eq!(repair.status.code(), Some(1), "{repair:#?}");
    assert!(repair.stdout.contains("No space left") && repair.stdout.contains("no new state"), "{repair:#?}");
    assert!(stage.host("nft list tables").contains("netns-setup-docker0"));
    assert!(!stage.host("ip netns list").contains("db"), "nobody would know it again");
    fs::remove_file(dir.join("filler")).unwrap();
    stage.ok("repair");
    stage.ok("check");
    assert_eq!(stage.dump(), before);
}

fn full_copies(stage: &Stage) {
    fs::create_dir(COPIES).unwrap();
    mount(Some("tmpfs"), COPIES, Some("tmpfs"), MsFlags::empty(), Some("mode=0700,size=256k")).unwrap();
    set_up(stage, "");
    let before = stage.dump();
    fill(Path::new(COPIES));
    stage.host("ip netns delete web");
    stage.host("nft flush ruleset");
    let repair = stage.run("repair");
    assert!(repair.status.code() == Some(1) && repair.stdout.contains("No space left"), "{repair:#?}");
    assert!(stage.host("nft list tables").contains("netns-setup-docker0"));
    let check = stage.run("check");
    assert!(!check.stdout.contains("interrupted"), "the claim is taken back: {check:#?}");
    fs::remove_file(Path::new(COPIES).join("filler")).unwrap();
    stage.ok("repair");
    assert_eq!(stage.dump(), before);
}

fn unusable(stage: &Stage) {
    set_up(stage, "");
    let _server = serve(&Namespace::open("/run/netns/web"), 80);
    let dir = stage.state_dir();
    let relays = stage.ok("list --json");
    fs::set_permissions(&dir, PermissionsExt::from_mode(0o777)).unwrap();
    stage.host("nft flush ruleset");
    let repair = stage.run("repair");
    assert_eq!(repair.status.code(), Some(1), "{repair:#?}");
    assert!(repair.stdout.contains("can be changed by other users"), "{repair:#?}");
    assert!(stage.host("nft list tables").contains("netns-setup-docker0"));
    assert!(reaches_tcp(&stage.host, (HOST_V4, 80), PATIENCE));
    fs::set_permissions(&dir, PermissionsExt::from_mode(0o700)).unwrap();
    stage.ok("check");
    assert_eq!(stage.ok("list --json"), relays, "the relay was left alone");
}

fn forgotten(stage: &Stage) {
    set_up(stage, "");
    let before = stage.dump();
    let watch = Watch::start(stage);
    fs::remove_dir_all(COPIES).unwrap();
    fs::remove_dir_all(stage.state_dir()).unwrap();
    watch.says("both are restored from what this process has last known");
    until_settled(stage, "the state is restored");
    assert_eq!(stage.dump(), before);
    assert!(fs::read_dir(COPIES).unwrap().next().is_some());
}

fn unknown(stage: &Stage) {
    let bare = stage.dump();
    set_up(stage, "");
    stage.ok("attach db");
    fs::remove_dir_all(COPIES).unwrap();
    fs::remove_file(stage.state_dir().join("state.json")).unwrap();
    let intact = stage.dump();
    let finding = "made the bridge docker0, but the state of its network and the copy in /run/netns-setup-registry are gone";
    for command in ["check", "repair", "up", "up --dry-run"] {
        let output = stage.run(command);
        let said = [output.stdout, output.stderr].concat();
        assert_eq!(output.status.code(), Some(1), "{command}: {said}");
        assert!(
            said.contains(finding) && said.contains("run `netns-setup down --state-dir "),
            "{command}: {said}"
        );
        assert_eq!(stage.dump(), intact, "{command}");
    }
    // The service says so, too.
    let watch = Watch::start(stage);
    watch.says(finding);
    watch.end();
    let down = stage.run("down");
    assert!(
        down.status.success() && down.stderr.contains("left are namespaces of its containers"),
        "{down:#?}"
    );
    assert!(down.stdout.contains("everything that netns-setup created is removed"), "{down:#?}");
    stage.host("ip netns delete web");
    stage.host("ip netns delete db");
    stage.host("sysctl -q -w net.ipv4.ip_forward=0");
    stage.host("sysctl -q -w net.ipv6.conf.all.forwarding=0");
    stage.host("sysctl -q -w net.ipv4.conf.all.accept_redirects=1");
    assert_same(&stage.dump(), &bare, "nothing else is left");
    assert_eq!(stage.host("ss -Hltn sport = 80"), "", "the relay has ended");
    set_up(stage, "");
    stage.ok("check");
}

/// Runs it for another state directory.
fn other(stage: &Stage, arguments: &str) -> Output {
    let mut command = Command::new(netns_setup());
    command.arg("--state-dir").arg(stage.state_dir().with_file_name("other"));
    command.args(arguments.split_whitespace());
    stage.host.spawn(command).into_output()
}

fn lost_copy(stage: &Stage) {
    set_up(stage, "");
    let intact = stage.dump();
    fs::remove_dir_all(COPIES).unwrap();
    assert!(other(stage, "down").success().contains("nothing was up"));
    let check = other(stage, "check");
    assert!(check.stderr.contains("there is no network"), "{check:#?}");
    assert_eq!(stage.dump(), intact);
    stage.ok("check");
}

fn damaged_copy(stage: &Stage) {
    set_up(stage, "");
    let intact = stage.dump();
    let copies: Vec<_> = fs::read_dir(COPIES).unwrap().map(|entry| entry.unwrap().path()).collect();
    let copy = copies.iter().find(|path| path.extension().is_some_and(|ending| ending == "json")).unwrap();
    fs::write(copy, "{").unwrap();
    fs::remove_file(stage.state_dir().join("state.json")).unwrap();
    for command in ["down", "check"] {
        let refused = other(stage, command);
        assert_eq!(refused.status.code(), Some(1), "{command}: {refused:#?}");
        assert!(
            refused.stderr.contains(&format!("the copy {}, which", copy.display())),
            "{command}: {refused:#?}"
        );
    }
    assert_eq!(stage.dump(), intact);
    fs::remove_file(copy).unwrap();
    stage.ok("down");
    assert!(!stage.host("ip link").contains("docker0"));
}

fn two_unknown(stage: &Stage) {
    set_up(stage, "");
    other(stage, "up --bridge br1 --subnet 10.81.0.0/24").success();
    fs::remove_dir_all(COPIES).unwrap();
    for dir in [stage.state_dir(), stage.state_dir().with_file_name("other")] {
        fs::remove_file(dir.join("state.json")).unwrap();
    }
    let up = other(stage, "up --bridge br1 --subnet 10.81.0.0/24");
    assert!(up.stderr.contains("netns-setup made the bridge br1, but"), "{up:#?}");
    // The state of something else does not hide them.
    stage.ok("transparent up --interface docker0");
    let check = stage.run("check");
    assert!(
        check.status.code() == Some(1) && check.stderr.contains("netns-setup made the bridge"),
        "{check:#?}"
    );
    let first = stage.run("down");
    assert!(first.stdout.contains("one network whose state was lost is removed"), "{first:#?}");
    assert!(first.stderr.contains("was lost, too: `down` again removes it"), "{first:#?}");
    assert!(stage.ok("down").contains("everything that netns-setup created is removed"));
    let links = stage.host("ip link");
    assert!(!links.contains("docker0") && !links.contains("br1"), "{links}");
}

fn taken_down(stage: &Stage) {
    let before = stage.dump();
    set_up(stage, "");
    let watch = Watch::start(stage);
    stage.ok("down");
    stage.host("sysctl -q -w net.ipv4.ip_forward=0");
    watch.end();
    assert_eq!(stage.dump(), before);
    assert!(!stage.state_dir().join("state.json").exists());
}

fn copy(stage: &Stage) {
    set_up(stage, "");
    fs::remove_dir_all(COPIES).unwrap();
    stage.ok("repair");
    fs::remove_file(stage.state_dir().join("state.json")).unwrap();
    stage.ok("repair");
    stage.ok("check");
}

fn moved(stage: &Stage) {
    set_up(stage, "");
    let _server = serve(&Namespace::open("/run/netns/web"), 80);
    let relays = stage.ok("list --json");
    let watch = Watch::start(stage);
    let dir = stage.state_dir();
    let other = dir.with_file_name("other");
    for turn in 1..=2 {
        fs::rename(&dir, &other).unwrap();
        watch.says(&format!("was moved to {}, where it is watched", other.display()));
        stage.host("nft flush ruleset");
        watch.repaired(turn);
        assert!(!dir.exists(), "no other state directory is made");
        fs::rename(&other, &dir).unwrap();
        watch.says("everything is as it should be again");
    }
    stage.ok("check");
    assert!(reaches_tcp(&stage.host, (HOST_V4, 80), PATIENCE));
    assert_eq!(stage.ok("list --json"), relays, "the relay was left alone");
    // Only the directory and that of the namespaces are watched.
    let watches = || {
        let infos = fs::read_dir(format!("/proc/{}/fdinfo", watch.process.pid())).unwrap();
        let texts = infos.filter_map(|info| fs::read_to_string(info.unwrap().path()).ok());
        texts.map(|text| text.matches("inotify wd:").count()).sum::<usize>()
    };
    eventually("other directories are forgotten", || watches() == 2);
    watch.end();
}
