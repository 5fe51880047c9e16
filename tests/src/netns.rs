//! Network namespaces without names: they exist while a [`Namespace`], or a process in them, does.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

use crate::process::{Output, Process};
use crate::require;

/// A network namespace, kept alive by this value's file descriptor alone, so that not even a suite that
/// crashes leaves one behind.
///
/// Only threads made for the purpose enter it: what a test's own thread does stays where it was.
/// ```no_run
/// # use rproxy_tests::netns::Namespace;
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
    /// A new namespace in which nothing but `lo` exists, and is up.
    ///
    /// # Panics
    /// When this process may not create one; a case says so with [`require::Need::Root`].
    pub fn new() -> Self {
        let file = on_new_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("cannot create a network namespace");
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        let namespace = Self { file };
        namespace.ip("link set lo up");
        namespace
    }

    /// The namespace that a path of the form `/proc/…/ns/net` names.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn open(path: &str) -> Self {
        match File::open(path) {
            Ok(file) => Self { file },
            Err(error) => panic!("cannot open {path}: {error}"),
        }
    }

    /// Runs `task` on a thread inside the namespace. Sockets that it opens belong there for good, also
    /// when the caller uses them elsewhere.
    pub fn run<T: Send>(&self, task: impl FnOnce() -> T + Send) -> T {
        on_new_thread(|| {
            setns(&self.file, CloneFlags::CLONE_NEWNET).expect("cannot enter a network namespace");
            task()
        })
    }

    /// Starts a process that is born inside the namespace.
    #[track_caller]
    pub fn spawn(&self, command: Command) -> Process {
        Process::spawn_by(command, |command| self.run(|| command.spawn()))
    }

    /// Runs a program with blank-separated arguments to its end, inside the namespace.
    ///
    /// # Panics
    /// When it is not installed.
    #[track_caller]
    pub fn command(&self, line: &str) -> Output {
        let mut words = line.split_whitespace();
        let mut command = require::command(words.next().expect("a program"));
        command.args(words);
        self.spawn(command).into_output()
    }

    /// Runs `ip` with blank-separated arguments inside the namespace and returns what it prints.
    ///
    /// # Panics
    /// When `ip` fails.
    #[track_caller]
    pub fn ip(&self, arguments: &str) -> String {
        self.command(&format!("ip {arguments}")).success()
    }

    /// Joins this namespace to another with a pair of interfaces, both up.
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

    /// Adds an address with its prefix length. It can be used at once: duplicate address detection, which
    /// would keep an IPv6 address unusable for a second, has nothing to find in a namespace.
    #[track_caller]
    pub fn address(&self, interface: &str, address: &str) {
        let nodad = if address.contains(':') { "nodad" } else { "" };
        self.ip(&format!("address add {address} dev {interface} {nodad}"));
    }

    /// A path that names the namespace to other processes, as `ip … netns PATH` and `nsenter --net=PATH`
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

/// Runs `task` on a thread that ends with it, since a thread that changed its namespace must not go on
/// to do other work. A panic goes on in the caller.
fn on_new_thread<T: Send>(task: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| match scope.spawn(task).join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
