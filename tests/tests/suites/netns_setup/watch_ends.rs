//! A signal ends `netns-setup watch` whatever it waits for, and no step is left half done.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::libc::O_NONBLOCK;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tempfile::TempDir;
use testkit::eventually;
use testkit::process::Stream;
use testkit::require;
use testkit::rproxy::netns_setup;
use testkit::suite::Case;
use testkit::systemd::Systemd;

use super::stage::{Stage, case};
use super::watch::{Watch, set_up, until_settled};

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("while another command holds the lock", locked),
        case("while nobody reads what it says", unread),
        case("while a program that lists rules hangs", hanging),
        case("after a program that changes rules has ended", acting),
        case("a service manager at an abstract socket is told", abstract_socket),
    ]
}

/// Ends it while it waits for something.
#[track_caller]
fn ends(watch: &Watch) {
    watch.process.signal(Signal::SIGTERM);
    assert_eq!(watch.manager.told(), ["STOPPING=1"]);
    assert!(watch.process.wait().success());
}

fn locked(stage: &Stage) {
    set_up(stage, "");
    let watch = Watch::start(stage);
    let state_dir = File::open(stage.state_dir()).unwrap();
    let lock = Flock::lock(state_dir, FlockArg::LockExclusive).unwrap();
    stage.host("nft flush ruleset");
    eventually("it waits for the lock", || fs::read_to_string("/proc/locks").unwrap().contains("-> FLOCK"));
    ends(&watch);
    drop(lock);
    stage.ok("repair");
}

fn unread(stage: &Stage) {
    set_up(stage, "");
    let temp = tempfile::tempdir().unwrap();
    let path = temp.path().join("log");
    mkfifo(&path, Mode::S_IRWXU).unwrap();
    let mut pipe =
        fs::OpenOptions::new().read(true).write(true).custom_flags(O_NONBLOCK).open(&path).unwrap();
    while pipe.write(&[b'\n'; 4096]).is_ok() {}
    let manager = Systemd::new();
    let mut command = require::command("sh");
    // Its own standard error is the pipe.
    command.args(["-c", r#"exec "$0" --state-dir "$1" watch 2>"$2""#]).arg(netns_setup());
    command.arg(stage.state_dir()).arg(&path);
    let watch = Watch::notifying(stage, manager, command);
    stage.host("nft flush ruleset");
    until_settled(stage, "it repairs nevertheless");
    ends(&watch);
}

/// A directory with an `nft` that does what a script says once there is a file.
struct FakeNft(TempDir);

impl FakeNft {
    fn new(then: &str) -> Self {
        let temp = tempfile::tempdir().unwrap();
        let (dir, real) = (temp.path().display(), require::find("nft").unwrap());
        let script = format!(
            "#!/bin/sh\ncd {dir}\nif [ -e flag ]; then\n{then}\nfi\nexec {} \"$@\"\n",
            real.display()
        );
        let file = temp.path().join("nft");
        fs::write(&file, script).unwrap();
        fs::set_permissions(&file, PermissionsExt::from_mode(0o755)).unwrap();
        Self(temp)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A service that finds it first.
    fn watch(&self, stage: &Stage) -> Watch {
        let path = std::env::var("PATH").unwrap_or_default();
        let mut command = Watch::command(stage);
        command.env("PATH", format!("{}:{path}", self.0.path().display()));
        Watch::notifying(stage, Systemd::new(), command)
    }
}

fn is_alive(pid_file: &Path) -> bool {
    let pid = fs::read_to_string(pid_file).unwrap();
    let status = fs::read_to_string(format!("/proc/{}/status", pid.trim())).unwrap_or_default();
    // One that nobody has reaped yet has ended, too.
    !status.is_empty() && !status.contains("State:\tZ")
}

fn hanging(stage: &Stage) {
    set_up(stage, "");
    let nft = FakeNft::new("echo $$ >pid.new; mv pid.new pid; exec sleep 600");
    let watch = nft.watch(stage);
    fs::write(nft.path("flag"), "").unwrap();
    stage.host("ip link set docker0 mtu 1400");
    eventually("it hangs", || nft.path("pid").exists());
    ends(&watch);
    eventually("no program is left", || !is_alive(&nft.path("pid")));
    stage.ok("repair");
}

fn acting(stage: &Stage) {
    set_up(stage, "");
    // Only what replaces a table, not what is loaded to compare it.
    let nft = FakeNft::new(
        "if [ \"$1\" = -f ]; then cat >script; if grep -q 'delete table' script; then echo >begun; cat go; fi\nexec \
         /usr/bin/env nft \"$@\" <script; fi",
    );
    // The real one is the next in the path.
    let script = fs::read_to_string(nft.path("nft")).unwrap();
    let real = require::find("nft").unwrap();
    fs::write(nft.path("nft"), script.replace("/usr/bin/env nft", real.to_str().unwrap())).unwrap();
    mkfifo(&nft.path("go"), Mode::S_IRWXU).unwrap();
    let watch = nft.watch(stage);
    fs::write(nft.path("flag"), "").unwrap();
    stage.host("nft flush ruleset");
    eventually("it acts", || nft.path("begun").exists());
    watch.process.signal(Signal::SIGTERM);
    fs::write(nft.path("go"), "").unwrap();
    assert_eq!(watch.manager.told(), ["STOPPING=1"]);
    assert!(watch.process.wait().success());
    assert!(stage.host("nft list tables").contains("netns-setup-docker0"), "the step is done");
    stage.ok("repair");
}

fn abstract_socket(stage: &Stage) {
    // Such a socket belongs to a network namespace.
    let manager = stage.host.run(Systemd::abstract_socket);
    let watch = Watch::notifying(stage, manager, Watch::command(stage));
    watch.process.wait_for_line(Stream::Stderr, |line| line.contains("watching the network of"));
    ends(&watch);
}
