//! The library of rproxy's test suites: namespaces, processes, backends, and the programs under test.
//!
//! A suite is a module that lists its [`suite::Case`]s. The `main` of a `harness = false` binary passes those of all
//! suites to [`suite::run`].
//! Suites send traffic only over loopback or inside [`netns::Namespace`]s that they create, and everything
//! they start ends with the value that owns it.
//!
//! The library panics if its own set-up fails, and prints the reason and the output of the processes
//! involved: a test cannot handle such an error better. What a test checks (an exit status, a status message,
//! a line of output) is returned as a value.
//!
//! There are no sleeps. Waiting means waiting for an event, for at most [`PATIENCE`]. That limit only turns a
//! hang into a failure, and says nothing about how soon the event should occur. Kernel state without events
//! is polled with [`eventually`].

#![expect(
    clippy::unwrap_used,
    reason = "a poisoned lock or a failed set-up step ends the test, and that is all it can do"
)]

use std::thread;
use std::time::{Duration, Instant};

pub mod backend;
pub mod browser;
pub mod cgroup;
pub mod client;
pub mod controlled;
pub mod docker_proxy;
pub mod fake_plane;
pub mod holdings;
pub mod image;
pub mod load;
pub mod machine;
pub mod mptcp;
pub mod netns;
pub mod oracle;
pub mod pattern;
pub mod plane;
pub mod process;
pub mod require;
pub mod role;
pub mod rootless;
pub mod rproxy;
pub mod sctp;
pub mod shim;
pub mod suite;
pub mod systemd;
pub mod terminal;
pub mod topology;
pub mod trace;
pub mod transparent;
pub mod udp;
pub mod unix;
pub mod upgradable;
pub mod vm;

/// How long to wait for an event that is certain to occur if the program under test works.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Polls until a condition holds for which there is no event, such as a number in `/proc`.
///
/// # Panics
/// If it does not hold within [`PATIENCE`].
#[track_caller]
pub fn eventually(what: &str, holds: impl FnMut() -> bool) {
    eventually_within(PATIENCE, what, holds);
}

/// Polls until a value equals the expected one.
///
/// # Panics
/// If it does not within [`PATIENCE`].
#[track_caller]
pub fn eventually_equal<T: PartialEq + std::fmt::Debug>(
    what: &str,
    wanted: &T,
    mut value: impl FnMut() -> T,
) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let value = value();
        if value == *wanted {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: {value:?} and not {wanted:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Like [`eventually`], for conditions that may take longer.
#[track_caller]
pub fn eventually_within(patience: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !holds() {
        assert!(Instant::now() < deadline, "not after {patience:?}: {what}");
        // Between two checks, yields to the processes that are to fulfil the condition.
        thread::sleep(Duration::from_millis(5));
    }
}
