//! Unnamed network namespaces, which exist while a [`Namespace`], or a process in them, does.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

use crate::process::{Output, Process};
use crate::require;

/// A network namespace, kept alive only by this value's file descriptor, so that even a suite that crashes
/// does not leave one behind.
///
/// Only dedicated threads enter it; a test's own thread stays in its namespace.
/// ```no_run
/// # use testkit::netns::Namespace;
/// let (left, right) = (Namespace::new(), Namespace::new());
/// left.veth("a", &right, "b");
/// left.ip("address add 10.0.0.1/24 dev a");
/// right.ip("address add 10.0.0.2/24 dev b");
/// left.command("ping -c 1 10.0.0.2").success();
/// ```
pub struct Namespace {
    file: File,
}

impl Namespace {
    /// Creates a namespace whose only interface, `lo`, is up.
    ///
    /// # Panics
    /// If this process may not create one; a case declares that with [`require::Need::Root`].
    pub fn new() -> Self {
        let file = on_new_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("cannot create a network namespace");
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        let namespace = Self { file };
        namespace.ip("link set lo up");
        namespace
    }

    /// Opens the namespace at a path of the form `/proc/…/ns/net`.
    ///
    /// # Panics
    /// If there is none.
    #[track_caller]
    pub fn open(path: &str) -> Self {
        match File::open(path) {
            Ok(file) => Self { file },
            Err(error) => panic!("cannot open {path}: {error}"),
        }
    }

    /// Runs `task` on a thread inside the namespace. Sockets that it opens stay in the namespace, even if the
    /// caller uses them elsewhere.
    pub fn run<T: Send>(&self, task: impl FnOnce() -> T + Send) -> T {
        on_new_thread(|| {
            setns(&self.file, CloneFlags::CLONE_NEWNET).expect("cannot enter a network namespace");
            task()
        })
    }

    /// Starts a process inside the namespace.
    #[track_caller]
    pub fn spawn(&self, command: Command) -> Process {
        Process::spawn_by(command, |command| self.run(|| command.spawn()))
    }

    /// Runs a program with space-separated arguments to its end, inside the namespace.
    ///
    /// # Panics
    /// If it is not installed.
    #[track_caller]
    pub fn command(&self, line: &str) -> Output {
        let mut words = line.split_whitespace();
        let mut command = require::command(words.next().expect("a program"));
        command.args(words);
        self.spawn(command).into_output()
    }

    /// Runs `ip` with space-separated arguments inside the namespace and returns its output.
    ///
    /// # Panics
    /// If `ip` fails.
    #[track_caller]
    pub fn ip(&self, arguments: &str) -> String {
        self.command(&format!("ip {arguments}")).success()
    }

    /// Connects this namespace to another with a pair of interfaces, both up.
    #[track_caller]
    pub fn veth(&self, name: &str, peer: &Self, peer_name: &str) {
        let peer_path = peer.path();
        self.ip(&format!(
            "link add name {name} type veth peer name {peer_name} netns {}",
            peer_path.display()
        ));
        self.ip(&format!("link set dev {name} up"));
        peer.ip(&format!("link set dev {peer_name} up"));
    }

    /// Adds an address with a prefix length. It is usable at once: duplicate address detection, which would
    /// delay an IPv6 address by a second, is not needed in a namespace.
    #[track_caller]
    pub fn address(&self, interface: &str, address: &str) {
        let nodad = if address.contains(':') { "nodad" } else { "" };
        self.ip(&format!("address add {address} dev {interface} {nodad}"));
    }

    /// A path by which other processes can refer to the namespace while this value lives, as in `ip … netns
    /// PATH` and `nsenter --net=PATH`.
    /// take it, while this value lives.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()).into()
    }
}

impl Default for Namespace {
    fn default() -> Self {
        Self::new()
    }
}

/// Runs `task` on a thread that ends afterwards, because a thread that has changed its namespace must not be
/// reused. A panic is propagated to the caller.
fn on_new_thread<T: Send>(task: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| match scope.spawn(task).join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
