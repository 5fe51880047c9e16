//! The relay of a network: one process, supervised, that serves all ports.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;

use netns_setup::reserve;
use nix::fcntl::OFlag;
use serde_json::{Value, json};
use testkit::docker_proxy::{self, DockerProxy, Status};
use testkit::netns::Namespace;
use testkit::rproxy::{netns_setup, rproxy};
use testkit::suite::Case;
use testkit::topology::{HOST_V4, HOST_V6};
use testkit::{PATIENCE, eventually};

use super::stage::{
    Backend, Echo, Stage, assert_out_of_reach, assert_reaches, assert_reaches_udp, assert_same, case,
    for_each_firewall, serve,
};

pub(crate) fn cases() -> Vec<Case> {
    let mut cases = vec![
        case("one relay serves all containers and ends with the last port", one),
        case("the relay has nothing of the command that starts it", detached),
        case("clients wait while a relay that crashed is started again", crash),
        case("a relay that cannot be started again is reported", broken),
        case("the relay ends with its supervisor and comes back", supervisor_killed),
        case("a relay that the state directory does not know any more is replaced", forgotten),
        case("relays of an earlier version are replaced", earlier),
        case("a port that is unpublished is free at once", free_at_once),
        case("the state directory may have a long path", long_path),
    ];
    cases.extend(for_each_firewall("two thousand ports of both protocols with few descriptors", many));
    cases
}

/// Containers called `web` and `db` that answer at port 80.
fn set_up(stage: &Stage, options: &str) -> [(Namespace, Echo); 2] {
    stage.ok(&format!("up {options}"));
    ["web", "db"].map(|name| {
        let container = stage.attach(name);
        let echo = serve(&container, 80);
        (container, echo)
    })
}

/// The processes of the stage's network whose command line has this word.
fn processes(stage: &Stage, word: &str) -> Vec<u32> {
    let inode = |path: &Path| fs::metadata(path).map(|data| std::os::unix::fs::MetadataExt::ino(&data));
    let host = inode(&stage.host.path()).unwrap();
    let all =
        fs::read_dir("/proc").unwrap().filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok());
    let is_meant = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|part| part.ends_with(word.as_bytes()))
            && inode(Path::new(&format!("/proc/{pid}/ns/net"))).is_ok_and(|inode| inode == host)
    };
    all.filter(is_meant).collect()
}

/// The process of the relay, as `list` shows it.
pub(super) fn relay(stage: &Stage) -> u32 {
    let list: Value = serde_json::from_str(&stage.ok("list --json")).unwrap();
    let mappings = list.as_array().unwrap().iter().flat_map(|one| one["mappings"].as_array().unwrap());
    let mut pids = mappings.filter_map(|mapping| mapping["relay"]["pid"].as_u64());
    u32::try_from(pids.next().unwrap()).unwrap()
}

pub(super) fn parent(pid: u32) -> u32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.lines().find_map(|line| line.strip_prefix("PPid:")).unwrap().trim().parse().unwrap()
}

fn is_there(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

fn one(stage: &Stage) {
    let _containers = set_up(stage, "");
    stage.ok("publish web -p 80:80 -p 80:80/udp --via proxy");
    let first = relay(stage);
    stage.ok("publish db -p 81:80 -p 10.0.0.11:82:80/udp");
    stage.ok("publish db -p 83:80 --via dnat");
    assert_eq!(relay(stage), first, "it is told, not started again");
    assert_eq!(processes(stage, "supervise-relay"), [parent(first)]);
    for port in [80, 81, 83] {
        assert_reaches(&stage.client, HOST_V4, port);
    }
    for port in [80, 81] {
        assert_reaches(&stage.client, HOST_V6, port);
    }
    assert_reaches_udp(&stage.client, HOST_V4, 80);
    assert_reaches_udp(&stage.client, HOST_V4, 82);
    let control = stage.state_dir().join("relay.sock");
    let mut ctl = Command::new(rproxy());
    ctl.args(["ctl", "list", "--json", "--control"]).arg(&control);
    let shown: Value = serde_json::from_str(&testkit::process::run(ctl).success()).unwrap();
    let names: Vec<_> =
        shown["mappings"].as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["db/tcp/[::]:81", "db/udp/10.0.0.11:82", "web/tcp/[::]:80", "web/udp/[::]:80"]);
    let list: Value = serde_json::from_str(&stage.ok("list --json")).unwrap();
    assert_eq!(list[0]["mappings"][2]["relay"], json!(null), "the kernel alone serves it: {list}");
    stage.ok("detach web");
    assert_out_of_reach(&stage.client, HOST_V4, 80);
    assert_reaches(&stage.client, HOST_V4, 81);
    assert_eq!(relay(stage), first);
    stage.ok("unpublish db");
    eventually("it ends with its last port", || {
        !is_there(first) && processes(stage, "supervise-relay").is_empty()
    });
    for file in ["relay.sock", "supervisor.sock", "relay.log"] {
        assert!(!stage.state_dir().join(file).exists(), "{file}");
    }
    assert_eq!(stage.ok("check"), "everything is as it should be\n");
}

fn detached(stage: &Stage) {
    let _containers = set_up(stage, "");
    let leak = fs::File::open("/etc/passwd").unwrap();
    let mut command = Command::new("sh");
    let arguments =
        ["--state-dir", stage.state_dir().to_str().unwrap(), "publish", "web", "-p", "80:80"].join(" ");
    command.args(["-c", &format!("exec \"$0\" {arguments} 7</etc/passwd")]).arg(netns_setup());
    command.current_dir(stage.state_dir()).env("SECRET", "x");
    stage.host.spawn(command).into_output().success();
    drop(leak);
    let relay = relay(stage);
    for pid in [relay, parent(relay)] {
        let of = |name: &str| format!("/proc/{pid}/{name}");
        assert_eq!(fs::read_link(of("cwd")).unwrap(), Path::new("/"), "{pid}");
        assert_eq!(fs::read(of("environ")).unwrap(), b"", "{pid}");
        let files = fs::read_dir(of("fd")).unwrap().filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
        assert!(!files.into_iter().any(|file| file == Path::new("/etc/passwd")), "{pid}");
        let session = nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(pid.cast_signed()))).unwrap();
        assert_eq!(session.as_raw(), parent(relay).cast_signed(), "{pid}");
        assert_eq!(fs::read_link(of("fd/0")).unwrap(), Path::new("/dev/null"), "{pid}");
    }
    let stderr = |pid: u32| fs::read_link(format!("/proc/{pid}/fd/2")).unwrap();
    assert_eq!(stderr(parent(relay)), stage.state_dir().join("relay.log"));
    assert!(stderr(relay).to_str().unwrap().starts_with("pipe:"), "{:?}", stderr(relay));
}

fn crash(stage: &Stage) {
    let _containers = set_up(stage, "");
    stage.ok("publish web -p 80:80 -p 80:80/udp --via proxy");
    let first = relay(stage);
    // While it stands still, a client is queued.
    stage.host(&format!("kill -STOP {first}"));
    let address: SocketAddr = (HOST_V4, 80).into();
    let mut waiting = stage.client.run(|| TcpStream::connect(address).unwrap());
    waiting.set_read_timeout(Some(PATIENCE)).unwrap();
    waiting.write_all(b"ping").unwrap();
    stage.host(&format!("kill -KILL {first}"));
    let mut answer = [0; 4];
    waiting.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"ping");
    assert_reaches_udp(&stage.client, HOST_V4, 80);
    let second = relay(stage);
    assert_ne!(second, first);
    assert_eq!(stage.ok("check"), "everything is as it should be\n");
    let log = fs::read_to_string(stage.state_dir().join("relay.log")).unwrap();
    assert!(log.contains("the relay was ended by signal 9; it is started again at once"), "{log}");
    // It takes changes as before.
    stage.ok("publish db -p 81:80");
    assert_reaches(&stage.client, HOST_V4, 81);
    stage.ok("unpublish web");
    assert_out_of_reach(&stage.client, HOST_V4, 80);
}

fn broken(stage: &Stage) {
    let _containers = set_up(stage, "");
    let copy = stage.state_dir().join("rproxy");
    fs::copy(rproxy(), &copy).unwrap();
    stage.ok(&format!("publish web -p 80:80 --rproxy {}", copy.display()));
    let first = relay(stage);
    fs::rename(&copy, copy.with_extension("away")).unwrap();
    stage.host(&format!("kill -KILL {first}"));
    eventually("that is reported", || stage.run("check").stdout.contains("the relay does not run: "));
    let (code, said) = stage.fails("publish web -p 81:80");
    assert!(code == 1 && said.contains("cannot run") && said.contains("nothing was changed"), "{said}");
    fs::rename(copy.with_extension("away"), &copy).unwrap();
    eventually("it comes back", || stage.run("check").status.success());
    assert_reaches(&stage.client, HOST_V4, 80);
}

fn supervisor_killed(stage: &Stage) {
    let _containers = set_up(stage, "");
    for again in ["repair", "publish db -p 81:80", "unpublish web -p 82:80"] {
        stage.ok("publish web -p 80:80 -p 82:80");
        let first = relay(stage);
        stage.host(&format!("kill -KILL {}", parent(first)));
        eventually("it ends, too", || !is_there(first));
        let output = stage.run("check");
        assert!(output.stdout.contains("the relay does not serve "), "{output:#?}");
        stage.ok(again);
        stage.ok("repair");
        assert_eq!(stage.ok("check"), "everything is as it should be\n", "{again}");
        assert_reaches(&stage.client, HOST_V4, 80);
        stage.ok("unpublish web");
    }
    stage.ok("publish web -p 80:80");
    stage.host(&format!("kill -KILL {}", parent(relay(stage))));
    stage.ok("down");
    assert_eq!(fs::read_dir(stage.state_dir()).unwrap().count(), 0);
}

fn forgotten(stage: &Stage) {
    let bare = stage.dump();
    for mend in ["repair", "down"] {
        let _containers = set_up(stage, "");
        stage.ok("publish web -p 80:80 -p 80:80/udp");
        let first = relay(stage);
        fs::remove_dir_all(stage.state_dir()).unwrap();
        stage.ok(mend);
        eventually("the old one has ended", || !is_there(first));
        if mend == "repair" {
            assert_eq!(stage.ok("check"), "everything is as it should be\n");
            assert_eq!(processes(stage, "supervise-relay"), [parent(relay(stage))]);
            assert_reaches(&stage.client, HOST_V4, 80);
            stage.ok("down");
        }
        assert_same(&stage.dump(), &bare, mend);
        eventually("nothing runs", || processes(stage, "supervise-relay").is_empty());
    }
}

/// A relay as an earlier version started it, for the container `web`.
fn single(stage: &Stage, port: u16) -> DockerProxy {
    let any = "*".parse().unwrap();
    let reserve = || reserve::bind(rproxy_mapping::addr::Protocol::Tcp, any, port).unwrap().0;
    let socket = stage.host.run(reserve);
    reserve::open(&socket).unwrap();
    let mut arguments = docker_proxy::mapping(
        "tcp",
        format!("[::]:{port}").parse().unwrap(),
        "172.17.0.2:80".parse().unwrap(),
    );
    arguments.push("-use-listen-fd".to_owned());
    let spawn = |command| stage.host.spawn(command);
    let mut relay = DockerProxy::start_by(rproxy(), &arguments, Some(socket.into()), OFlag::empty(), spawn);
    assert_eq!(relay.status(), Status::Ready);
    relay
}

fn earlier(stage: &Stage) {
    let file = stage.state_dir().join("state.json");
    for (change, replaced) in [
        ("repair", true),
        ("publish web -p 90:80", true),
        ("unpublish web", true),
        ("publish db -p 90:80", false),
    ] {
        let _containers = set_up(stage, "");
        stage.ok("publish web -p 80:80 -p 81:80");
        let supervisor = parent(relay(stage));
        stage.host(&format!("kill -KILL {supervisor}"));
        while stage.host("ss -Hlnt").contains("*:80") {}
        // As the earlier version left it: one process is recorded, and one is not.
        let relays = [80, 81].map(|port| single(stage, port));
        let mut state: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
        state["version"] = 1.into();
        let pid = relays[0].process.pid();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let started: u64 = stat.rsplit_once(") ").unwrap().1.split(' ').nth(19).unwrap().parse().unwrap();
        let mappings = state["current"]["endpoints"]["web"]["mappings"].as_array_mut().unwrap();
        mappings[0]["relay"] = json!({ "pid": pid.as_raw(), "started": started });
        mappings[1]["relay"] = json!(null);
        fs::write(&file, state.to_string()).unwrap();
        let output = stage.run("check");
        assert!(output.stdout.contains("the relay of *:80/tcp alone, of an earlier version"), "{output:#?}");
        stage.ok(change);
        assert_eq!(relays.iter().any(|relay| relay.process.is_running()), !replaced, "{change}");
        stage.ok("repair");
        assert!(!relays.iter().any(|relay| relay.process.is_running()), "{change}");
        assert_eq!(stage.ok("check"), "everything is as it should be\n", "{change}");
        if !change.starts_with("unpublish") {
            assert_reaches(&stage.client, HOST_V4, 80);
            assert_reaches(&stage.client, HOST_V4, 81);
        }
        assert!(!fs::read_to_string(&file).unwrap().contains("started"), "{change}");
        stage.ok("down");
    }
}

fn free_at_once(stage: &Stage) {
    let _containers = set_up(stage, "");
    for _again in 0..5 {
        stage.ok("publish web -p 80:80 -p 80:80/udp --via proxy");
        assert_reaches(&stage.client, HOST_V4, 80);
        assert_reaches_udp(&stage.client, HOST_V4, 80);
        stage.ok("unpublish web");
        stage.ok("publish db -p 80:80 -p 80:80/udp --via proxy");
        assert_reaches_udp(&stage.client, HOST_V4, 80);
        stage.ok("unpublish db -p 80:80/udp");
        stage.ok("publish web -p 80:80/udp");
        assert_reaches_udp(&stage.client, HOST_V4, 80);
        stage.ok("unpublish web");
        stage.ok("unpublish db");
    }
}

fn long_path(stage: &Stage) {
    let dir = stage.state_dir().join("x".repeat(120)).join("state");
    let run = |arguments: &str| {
        let mut command = Command::new(netns_setup());
        command.arg("--state-dir").arg(&dir).args(arguments.split_whitespace());
        stage.host.spawn(command).into_output().success()
    };
    run("up");
    run("attach web");
    run("publish web -p 80:80");
    assert!(stage.host("ss -Hlnt").contains("*:80"));
    // Also after it was moved.
    assert_eq!(run("check"), "everything is as it should be\n");
    run("down");
}

fn many(stage: &Stage, backend: Backend) {
    let _containers = set_up(stage, backend.option());
    let rules =
        || stage.host("nft list ruleset").lines().count() + stage.host("iptables-save").lines().count();
    let before = rules();
    let mut command = Command::new("sh");
    let state_dir = stage.state_dir();
    let ports = "publish web -p 20000-21999:20000-21999 -p 20000-21999:20000-21999/udp -p 80:80 --via proxy";
    command
        .args(["-c", &format!("ulimit -Sn 1024; exec \"$0\" --state-dir {} {ports}", state_dir.display())]);
    command.arg(netns_setup());
    stage.with_path(&mut command);
    stage.host.spawn(command).into_output().success();
    assert!(rules() <= before + 10, "rules do not depend on ports that only the relay serves");
    assert_eq!(stage.ok("check"), "everything is as it should be\n");
    assert_reaches(&stage.client, HOST_V4, 80);
    stage.ok("unpublish web -p 80:80");
    stage.ok("unpublish web");
    eventually("nothing runs", || processes(stage, "supervise-relay").is_empty());
}
