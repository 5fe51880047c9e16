//! `netns-setup`, in network and mount namespaces of each case's own: what it makes, what it lets through,
//! what is left when it fails, and how it grows.

#![expect(clippy::unwrap_used, reason = "a failed step ends the test")]

mod faults;
mod persist;
mod rules;
mod scale;
mod stage;
mod story;
mod traffic;
mod usage;

use std::process::ExitCode;

use rproxy_tests::suite;

fn main() -> ExitCode {
    // A case about sudden death runs this very program as the one that dies.
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(code) = faults::run_doomed(&arguments) {
        return code;
    }
    let suites = [
        story::cases(),
        usage::cases(),
        rules::cases(),
        traffic::cases(),
        faults::cases(),
        persist::cases(),
        scale::cases(),
    ];
    suite::run(suites.into_iter().flatten().collect())
}
