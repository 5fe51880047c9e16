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
//! only turns a hang into a failure and is no statement about how fast the event should be.

#![expect(
    clippy::unwrap_used,
    reason = "a poisoned lock or a failed set-up step ends the test, and that is all it can do"
)]

use std::time::Duration;

pub mod backend;
pub mod client;
pub mod docker_proxy;
pub mod netns;
pub mod pattern;
pub mod process;
pub mod require;
pub mod rproxy;
pub mod suite;
pub mod topology;

/// How long the harness waits for an event that is certain to come if the program under test works.
pub const PATIENCE: Duration = Duration::from_secs(20);
