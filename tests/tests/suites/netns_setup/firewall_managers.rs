//! Firewall managers that load their rules anew beside `netns-setup watch`.

use std::fs;
use std::path::Path;
use std::process::Command;

use nix::mount::{MsFlags, mount};
use tempfile::TempDir;
use testkit::process::Process;
use testkit::{PATIENCE, eventually, eventually_within, require};

use super::stage::Stage;
use super::watch::{Watch, until_settled};

/// `firewalld` on the host of a stage, with a message bus of its own.
struct Firewalld {
    process: Process,
    _bus: Process,
}

impl Firewalld {
    /// Starts it with a value of `FirewallBackend` (firewalld.conf(5)).
    fn start(stage: &Stage, backend: &str) -> Self {
        let file = Path::new("/etc/firewalld/firewalld.conf");
        let text = fs::read_to_string(file).unwrap();
        let lines = text.lines().filter(|line| !line.starts_with("FirewallBackend="));
        let lines: Vec<_> =
            lines.map(str::to_owned).chain([format!("FirewallBackend={backend}\n")]).collect();
        fs::write(file, lines.join("\n")).unwrap();
        fs::create_dir_all("/run/dbus").unwrap();
        let socket = "/run/dbus/system_bus_socket";
        let mut bus = require::command("dbus-daemon");
        bus.args(["--system", "--nofork", "--nopidfile", &format!("--address=unix:path={socket}")]);
        let bus = stage.host.spawn(bus);
        eventually("the message bus listens", || Path::new(socket).exists());
        let mut command = require::command("firewalld");
        command.args(["--nofork", "--nopid"]);
        let process = stage.host.spawn(command);
        let firewalld = Self { process, _bus: bus };
        eventually_within(PATIENCE * 2, "firewalld runs", || {
            let mut command = require::command("firewall-cmd");
            command.arg("--state");
            stage.host.spawn(command).into_output().status.success()
        });
        firewalld
    }
}

pub(super) fn reloads(stage: &Stage) {
    let _configuration = own_copy("/etc/firewalld");
    for backend in ["nftables", "iptables"] {
        for firewall in ["nft", "iptables"] {
            stage.ok(&format!("up --firewall {firewall}"));
            stage.ok("attach web");
            stage.ok("publish web -p 80:80");
            let watch = Watch::start(stage);
            let firewalld = Firewalld::start(stage, backend);
            until_settled(stage, "firewalld has started");
            stage.host("firewall-cmd --reload");
            until_settled(stage, "firewalld has reloaded");
            stage.host("firewall-cmd --complete-reload");
            until_settled(stage, "firewalld has reloaded completely");
            firewalld.process.signal(nix::sys::signal::Signal::SIGTERM);
            firewalld.process.wait();
            until_settled(stage, "firewalld has ended");
            if firewall == "iptables" {
                // It flushes these tables each time.
                watch.repaired(2);
            }
            watch.end();
            stage.ok("down");
        }
    }
}

pub(super) fn ufw(stage: &Stage) {
    let _configuration = own_copy("/etc/ufw");
    stage.ok("up --firewall iptables");
    stage.ok("attach web");
    stage.ok("publish web -p 80:80");
    let watch = Watch::start(stage);
    for command in ["ufw --force enable", "ufw reload", "ufw disable"] {
        stage.host(command);
        until_settled(stage, command);
    }
    // It fails if a repair comes between its steps.
    stage.host.command("/lib/ufw/ufw-init flush-all");
    watch.repaired(1);
    until_settled(stage, "flush-all");
}

/// Lets the case change a directory of the system as its own.
fn own_copy(directory: &str) -> TempDir {
    let copy = tempfile::tempdir().unwrap();
    let mut command = Command::new("cp");
    command.args(["--archive", &format!("{directory}/."), copy.path().to_str().unwrap()]);
    testkit::process::run(command).success();
    mount(Some(copy.path()), directory, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    copy
}
