//! The side of a machine: plays the cases that are listed, and reports over the console.

use std::env;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use super::report;
use crate::machine::{Booted, SHARED};
use crate::process::{Output, Process};
use crate::suite::Case;
use crate::{require, role};

/// The role of the process in a machine that plays the cases.
const ROLE: &str = "guest";

/// The file that lists the cases to play, one a line, from the root directory. A case that begins is taken from it.
pub(super) const LIST: &str = "cases";

/// The suites, as cargo arranges them.
pub(super) const SUITES: &str = "target/debug/deps/suites";

/// In the list: those behind it are for the next start of the machine.
pub const RESTART: &str = "restart";

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
    let file = format!("/{LIST}");
    let list = fs::read_to_string(&file).unwrap();
    let mut rest = list.as_str();
    while let Some(name) = rest.lines().next() {
        rest = rest[name.len()..].trim_start_matches('\n');
        fs::write(&file, rest).unwrap();
        if name == RESTART {
            break;
        }
        report::begin(name);
        let case = cases.iter().find(|case| case.name() == name);
        report::end(name, case.map(|case| case.play_apart(VARIABLE)));
    }
    Some(ExitCode::SUCCESS)
}

/// The machine that this process runs in.
pub struct Here;

/// How long a script may run. Everything takes about ten times as long as without emulation.
const PATIENCE: Duration = Duration::from_secs(300);

impl Booted for Here {
    fn shared(&self) -> &Path {
        Path::new(SHARED)
    }

    fn sh(&self, script: &str) -> Output {
        let mut shell = require::command("sh");
        shell.args(["-c", script]);
        let shell = Process::spawn(shell);
        shell.wait_within(PATIENCE);
        shell.into_output()
    }

    fn within<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        act()
    }
}
