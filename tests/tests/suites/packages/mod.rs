//! What `packaging` installs: Debian packages, and the same files without them. Each installation is on a
//! [machine](testkit::machine) of its own.

mod contents;
mod install;
pub(crate) mod life;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use testkit::process::{Output, Process};
use testkit::require::Need;
use testkit::rproxy::{target_with_manuals, tree};
use testkit::suite::Case;

pub(crate) fn cases() -> Vec<Case> {
    testkit::modules![contents, install, life]
}

/// Building the manuals may take minutes, if nothing has built them before.
const DEADLINE: Duration = Duration::from_secs(600);

/// What building packages takes.
pub(crate) const DEBHELPER: &[Need] =
    &[Need::Program("dh"), Need::Program("dpkg-buildpackage"), Need::Program("strip")];

/// Runs a script of `packaging`.
fn packaging(script: &str, change: impl FnOnce(&mut Command)) -> Output {
    let mut command = Command::new(tree().join("packaging").join(script));
    command.env("CARGO_TARGET_DIR", target_with_manuals());
    change(&mut command);
    let process = Process::spawn(command);
    // Compression takes time.
    process.wait_within(DEADLINE);
    process.into_output()
}

/// Builds the packages as this version in `dir`, and returns their paths. `change` is for its command.
fn build(dir: &Path, version: &str, change: impl FnOnce(&mut Command)) -> Vec<PathBuf> {
    let built = packaging("deb", |command| {
        change(command.arg(dir).env("DEB_VERSION", version));
    });
    built.success().lines().map(PathBuf::from).collect()
}
