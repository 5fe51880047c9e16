//! What the test suites of rproxy share: namespaces, processes, backends, and the programs under test.
//!
//! A suite is a `harness = false` binary: it lists its [`suite::Case`]s and hands them to
//! [`suite::run`]. Suites send traffic only over loopback or inside [`netns::Namespace`]s that they
//! create, and everything they start ends with the value that owns it.
//!
//! The harness panics when its own set-up fails, with the reason and what the processes involved
//! printed: a test can do nothing better with such an error. What a test decides on (an exit status,
//! a status message, a line of output) is returned as a value.
//!
//! Nothing here sleeps. Waiting means waiting for an event, for at most [`PATIENCE`]; that bound
//! only turns a hang into a failure and is no statement about how fast the event should be. What
//! the kernel tells only when it is asked, [`eventually`] asks for.

#![expect(
    clippy::unwrap_used,
    reason = "a poisoned lock or a failed set-up step ends the test, and that is all it can do"
)]

use std::thread;
use std::time::{Duration, Instant};

pub mod backend;
pub mod client;
pub mod controlled;
pub mod docker_proxy;
pub mod holdings;
pub mod mptcp;
pub mod netns;
pub mod oracle;
pub mod pattern;
pub mod process;
pub mod require;
pub mod rproxy;
pub mod suite;
pub mod systemd;
pub mod topology;
pub mod udp;
pub mod upgradable;

/// How long the harness waits for an event that is certain to come if the program under test works.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits until a condition holds that nothing signals, such as a number in `/proc`.
///
/// # Panics
/// When it does not for [`PATIENCE`].
#[track_caller]
pub fn eventually(what: &str, holds: impl FnMut() -> bool) {
    eventually_within(PATIENCE, what, holds);
}

/// Waits until something has a value.
///
/// # Panics
/// When it does not have it for [`PATIENCE`].
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

/// As [`eventually`], for what may rightly take longer.
#[track_caller]
pub fn eventually_within(patience: Duration, what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !holds() {
        assert!(Instant::now() < deadline, "not after {patience:?}: {what}");
        // Between two looks, the processor is for those that are to bring it about.
        thread::sleep(Duration::from_millis(5));
    }
}
