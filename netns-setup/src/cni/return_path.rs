//! Has the answers of containers reach the relay where it connects to them by the client's address: the part of
//! `netns-setup transparent`, with a state directory of its own in that of the plugin.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::error::CniError;
use crate::commands::{self, Command, Options, Transparent};
use crate::error::Error;
use crate::kernel::Kernel;
use crate::name::IfName;
use crate::state;

/// The directory in the plugin's.
const DIRECTORY: &str = "return-path";

/// Sets it up for the interfaces that `after` has beyond `before`, and takes it down for those that it lacks.
pub(super) fn change(
    state_dir: &Path,
    before: &BTreeSet<IfName>,
    after: &BTreeSet<IfName>,
) -> Result<(), CniError> {
    let (new, gone): (Vec<_>, Vec<_>) =
        (after.difference(before).copied().collect(), before.difference(after).copied().collect());
    let directory = state_dir.join(DIRECTORY);
    let failed = |error| CniError::ReturnPath { dir: directory.clone(), source: Box::new(error) };
    if !new.is_empty() {
        match run(&directory, &Command::Transparent(Transparent::Up(new))) {
            // It is set up by somebody else; the relay reports an interface that it lacks.
            Err(Error::Shared(_)) => {}
            other => other.map_err(failed)?,
        }
    }
    if !directory.exists() {
        return Ok(());
    }
    if after.is_empty() {
        // Also after a call that was killed: `down` takes away what the copy of a lost state has.
        run(&directory, &Command::Down).map_err(failed)?;
        drop(fs::remove_file(directory.join(state::FILE)));
        drop(fs::remove_dir(&directory));
    } else if !gone.is_empty() {
        run(&directory, &Command::Transparent(Transparent::Down(gone))).map_err(failed)?;
    }
    Ok(())
}

fn run(state_dir: &Path, command: &Command) -> Result<(), Error> {
    let options = Options { state_dir: state_dir.to_owned(), dry_run: false, firewall: None, rproxy: None };
    commands::run(command, &options, &mut Kernel::default()).map(drop)
}
