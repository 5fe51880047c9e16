//! The side of a machine: plays the cases that are listed, and reports over the console.

use std::env;
use std::fs;
use std::process::ExitCode;

use super::report;
use crate::role;
use crate::suite::Case;

/// The role of the process in a machine that plays the cases.
const ROLE: &str = "guest";

/// The file that lists the cases to play, one a line, from the root directory.
pub(super) const LIST: &str = "cases";

/// Set in a machine.
const VARIABLE: &str = "RPROXY_TEST_GUEST";

/// Whether this process runs in a machine.
pub fn is_here() -> bool {
    env::var_os(VARIABLE).is_some() || is_player()
}

fn is_player() -> bool {
    role::asked().is_some_and(|role| role == [ROLE])
}

/// Plays the listed ones of `cases`, if this process was started for that.
///
/// # Panics
/// If there is no list.
pub fn play(cases: &[Case]) -> Option<ExitCode> {
    if !is_player() {
        return None;
    }
    let list = fs::read_to_string(format!("/{LIST}")).unwrap();
    for name in list.lines() {
        report::begin(name);
        let case = cases.iter().find(|case| case.name() == name);
        report::end(name, case.map(|case| case.play_apart(VARIABLE)));
    }
    Some(ExitCode::SUCCESS)
}
