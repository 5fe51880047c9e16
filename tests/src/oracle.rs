//! Runs the same cases against `rproxy`, against `rproxy-shim` and, as the oracle, against the `docker-proxy` of Debian's
//! docker.io (20.10), all started like by dockerd.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{self, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::sys::signal::Signal;

use crate::client;
use crate::docker_proxy::{DockerProxy, Status, mapping};
use crate::plane::Plane;
use crate::process::Process;
use crate::require::{self, Need};
use crate::rproxy::{rproxy, rproxy_shim};
use crate::suite::Case;

/// Long enough for a program that exits when asked to.
pub const AT_ONCE: Duration = Duration::from_secs(5);

/// A program under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// Ours.
    Rproxy,
    /// Our shim, where it finds nothing to attach to.
    Shim,
    /// Our shim, attached to an `rproxy`.
    AttachedShim,
    /// docker-proxy.
    Oracle,
}

/// The programs for which a case holds.
#[derive(Clone, Copy, Debug)]
pub enum Holds {
    /// For both.
    ForBoth,
    /// For each in its own way, intentionally, for this reason.
    Differently(&'static str),
    /// Only for `rproxy`; the oracle cannot pass it, for this reason.
    ForRproxy(&'static str),
}

/// The name of a case, the programs for which it holds, and its body.
pub type Row = (&'static str, Holds, fn(Subject));

/// The cases of a row.
pub fn cases((name, holds, body): &'static Row) -> Vec<Case> {
    let case = |title, subject: Subject| {
        let run = move || {
            let _plane = (subject == Subject::AttachedShim).then(|| Plane::start(&subject.plane()));
            body(subject);
        };
        Case::new(title, run).needs(&[Need::Ipv6])
    };
    let (title, has_oracle) = match holds {
        Holds::ForBoth => (name.to_string(), true),
        Holds::Differently(why) => (format!("{name} (differs: {why})"), true),
        Holds::ForRproxy(why) => (format!("{name} (alone: {why})"), false),
    };
    let mut cases = vec![
        case(format!("rproxy: {title}"), Subject::Rproxy),
        case(format!("rproxy-shim: {title}"), Subject::Shim),
        case(format!("attached rproxy-shim: {title}"), Subject::AttachedShim),
    ];
    if has_oracle {
        let oracle = case(format!("docker-proxy: {title}"), Subject::Oracle);
        cases.push(oracle.needs(&[Need::Program("docker-proxy")]));
    }
    cases
}

impl Subject {
    /// The path of the program.
    pub fn program(self) -> PathBuf {
        match self {
            Self::Rproxy => rproxy().into(),
            Self::Shim | Self::AttachedShim => rproxy_shim().into(),
            Self::Oracle => require::find("docker-proxy").unwrap(),
        }
    }

    /// Sets what the program needs in its environment: a shim looks for nothing but what a test has started.
    pub fn prepare(self, command: &mut Command) {
        command.env("RPROXY_ATTACH", self.plane());
    }

    /// The name where a shim looks for a process to attach to. Each case has a process of its own.
    fn plane(self) -> String {
        format!("rproxy-tests-{self:?}-{}", process::id())
    }

    /// Starts it with these arguments.
    #[track_caller]
    pub fn start(self, arguments: &[String]) -> DockerProxy {
        self.start_with(arguments, None, OFlag::empty())
    }

    #[track_caller]
    fn start_with(self, arguments: &[String], listener: Option<OwnedFd>, pipe: OFlag) -> DockerProxy {
        DockerProxy::start_by(&self.program(), arguments, listener, pipe, |mut command| {
            self.prepare(&mut command);
            Process::spawn(command)
        })
    }

    /// Starts it for a mapping and waits until it serves.
    #[track_caller]
    pub fn serve(self, protocol: &str, host: SocketAddr, container: SocketAddr) -> DockerProxy {
        let mut proxy = self.start(&mapping(protocol, host, container));
        assert_eq!(proxy.status(), Status::Ready);
        proxy
    }

    /// Starts it with `listener`, which it has to adopt.
    #[track_caller]
    pub fn adopt(self, protocol: &str, listener: impl Into<OwnedFd>, container: SocketAddr) -> DockerProxy {
        // dockerd passes the address of the socket; the socket takes precedence.
        let mut arguments = mapping(protocol, client::own_address(), container);
        arguments.push("-use-listen-fd".into());
        self.start_with(&arguments, Some(listener.into()), OFlag::empty())
    }

    /// Ends it with a signal, like dockerd does.
    #[track_caller]
    pub fn stop(self, proxy: &DockerProxy, signal: Signal) -> ExitStatus {
        proxy.process.signal(signal);
        if self == Self::Oracle {
            // 20.10 sometimes does not exit, which is not our concern.
            let deadline = Instant::now() + AT_ONCE;
            while proxy.process.is_running() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(10));
            }
            proxy.process.signal(Signal::SIGKILL);
        }
        proxy.process.wait_within(AT_ONCE)
    }

    /// Checks that it says that it is ready with one write, and nothing after it.
    #[track_caller]
    pub fn assert_ready_is_one_write(self, protocol: &str) {
        let arguments = mapping(protocol, client::own_address(), client::own_address());
        let mut proxy = self.start_with(&arguments, None, OFlag::O_DIRECT);
        assert_eq!(proxy.read_status_packet().as_deref(), Some(&b"0\n"[..]));
        assert_eq!(proxy.read_status_packet(), None, "more than the status");
        assert!(proxy.process.is_running());
    }

    /// Starts it where it cannot listen; returns its message, which names the address.
    #[track_caller]
    pub fn failure_at(self, protocol: &str, address: SocketAddr) -> String {
        let message = self.failure(&mapping(protocol, address, client::own_address()));
        assert!(message.contains(&address.to_string()), "{message:?}");
        message
    }

    /// Checks that it exited in order after a signal.
    #[track_caller]
    pub fn assert_ended(self, status: ExitStatus) {
        // docker-proxy 20.10 reports readiness before it handles signals, and is then killed by them.
        if self != Self::Oracle || status.signal().is_none() {
            assert_eq!(status.code(), Some(0));
        }
    }

    /// Starts it with arguments for which it has to report failure; returns its message.
    #[track_caller]
    pub fn failure(self, arguments: &[String]) -> String {
        failure_of(self.start(arguments))
    }
}

/// The message of a proxy that reports failure.
#[track_caller]
pub fn failure_of(mut proxy: DockerProxy) -> String {
    let Status::Failed(message) = proxy.status() else {
        panic!("no failure on descriptor 3");
    };
    assert_eq!(proxy.process.wait().code(), Some(1));
    message
}
