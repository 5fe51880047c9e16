//! A machine of its own with systemd, made of the files of this one.

use std::collections::BTreeSet;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{self, Command};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::netns::Namespace;
use crate::process::{Output, Process, run};
use crate::require::{self, Need};
use crate::upgradable::children;
use crate::{PATIENCE, cgroup, eventually};

/// What a machine takes.
pub const NEEDS: &[Need] = &[
    Need::Root,
    Need::Program(INIT),
    Need::Program("unshare"),
    Need::Program("nsenter"),
    Need::Program("ip"),
];

const INIT: &str = "/lib/systemd/systemd";

/// A directory on a machine for what it is given.
pub const SHARED: &str = "/run/host";

/// A machine with systemd that is up.
pub trait Booted: Sync {
    /// The path, for this process, of what is [`SHARED`] on that one.
    fn shared(&self) -> &Path;

    /// Runs a script of sh on it.
    #[track_caller]
    fn sh(&self, script: &str) -> Output;

    /// Runs a function in its network.
    fn within<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T;
}

/// Starts systemd on the files of this machine. What it and others write is kept in memory, above these files. Of the
/// units that are installed here, it starts the journal alone.
const BOOT: &str = r#"
set -e
shared=$1 init=$2 root=/mnt/root
shift 2
mount -t tmpfs tmpfs /mnt
mkdir /mnt/written /mnt/work "$root"
mount -t overlay -o lowerdir=/,upperdir=/mnt/written,workdir=/mnt/work overlay "$root"
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
for dir in run tmp dev; do mount -t tmpfs tmpfs "$root/$dir"; done
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s pts/ptmx "$root/dev/ptmx"
mkdir "$root/run/host"
mount --bind "$shared" "$root/run/host"
for dir; do
    mkdir -p "$root$dir"
    mount --bind "$dir" "$root$dir"
done
rm -f "$root/usr/sbin/policy-rc.d"
rm -rf "$root"/etc/systemd/system/*.wants "$root"/etc/systemd/system/*.requires
find "$root/lib/systemd/system/" -path '*.wants/*' ! -name 'systemd-journald*' -delete
printf '[Unit]\nRequires=basic.target\nAfter=basic.target\n' >"$root/etc/systemd/system/machine.target"
ip link set lo up
# A service with mounts of its own takes a root that is not a mere directory.
cd "$root"
mount --bind /mnt mnt
mkdir run/old
pivot_root . run/old
umount --lazy run/old
rmdir run/old
exec env -i container=rproxy-tests PATH=/usr/sbin:/usr/bin:/sbin:/bin NOTIFY_SOCKET=/run/host/notify \
    "$init" --system --unit=machine.target --log-target=journal
"#;

/// A machine that has been started. Dropping it ends everything on it, and forgets what was written.
pub struct Machine {
    process: Process,
    init: Pid,
    network: Namespace,
    cgroup: String,
    shared: TempDir,
}

impl Machine {
    /// Starts one on which these directories are at the paths that they have here.
    ///
    /// # Panics
    /// If it does not come up; see [`NEEDS`].
    #[track_caller]
    pub fn boot(directories: &[&Path]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let cgroup = format!("rproxy-machine-{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let shared = tempfile::tempdir().unwrap();
        let notified = UnixDatagram::bind(shared.path().join("notify")).unwrap();
        notified.set_read_timeout(Some(PATIENCE)).unwrap();
        let process = Process::spawn(boot(shared.path(), &cgroup::unified().join(&cgroup), directories));
        let mut init = Vec::new();
        eventually("the machine has its first process", || {
            init = children(process.pid());
            !init.is_empty() || !process.is_running()
        });
        let Some(&init) = init.first() else { panic!("no machine: {:#?}", process.into_output()) };
        while !is_ready(&notified) {}
        let network = Namespace::open(&format!("/proc/{init}/ns/net"));
        Self { process, init, network, cgroup, shared }
    }

    /// Its network, which has nothing but the loopback interface.
    pub fn network(&self) -> &Namespace {
        &self.network
    }

    /// The paths of what was written or removed on it, with the directories above.
    pub fn written(&self) -> BTreeSet<String> {
        self.sh("find /mnt/written -printf '/%P\\n'").success().lines().map(String::from).collect()
    }
}

impl Booted for Machine {
    fn shared(&self) -> &Path {
        self.shared.path()
    }

    fn sh(&self, script: &str) -> Output {
        let mut command = require::command("nsenter");
        command
            .arg("--target")
            .arg(self.init.to_string())
            .args(["--all", "--root", "--wd", "sh", "-c", script]);
        run(command)
    }

    fn within<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        self.network.run(act)
    }
}

/// A command that starts the machine in a control group.
fn boot(shared: &Path, cgroup: &Path, directories: &[&Path]) -> Command {
    // Its first process has to be in its own group when it leaves the namespace of the groups of this machine.
    const ENTER: &str = r#"mkdir "$0" && echo 0 >"$0/cgroup.procs" && exec unshare --cgroup "$@""#;
    let mut command = require::command("unshare");
    command.args([
        "--mount",
        "--propagation",
        "private",
        "--pid",
        "--uts",
        "--ipc",
        "--net",
        "--fork",
        "--kill-child",
    ]);
    command.args(["sh", "-c", ENTER]).arg(cgroup);
    command.args(["sh", "-c", BOOT, "sh"]).arg(shared).arg(INIT).args(directories);
    command
}

/// Whether the next message of the service manager says that all units are up.
fn is_ready(notified: &UnixDatagram) -> bool {
    let mut message = [0; 4096];
    let len = notified.recv(&mut message).expect("the machine comes up");
    String::from_utf8_lossy(&message[..len]).lines().any(|line| line == "READY=1")
}

impl Drop for Machine {
    fn drop(&mut self) {
        kill(self.init, Signal::SIGKILL).ok();
        self.process.wait();
        cgroup::remove(&self.cgroup);
    }
}
