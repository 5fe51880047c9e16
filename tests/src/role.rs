//! Roles that the executable of the suites plays in processes of their own: they are to be killed, to be confined, or
//! to run as other users, and what they change of their process is nobody else's.

use std::env;
use std::ffi::OsStr;
use std::process::Command;

/// The first argument of a process that plays a role.
const FLAG: &str = "--play";

/// A command that runs this executable in a role.
pub fn command(role: &[impl AsRef<OsStr>]) -> Command {
    let mut command = Command::new(env::current_exe().unwrap());
    command.arg(FLAG).args(role);
    command
}

/// The role that this process was started for, with its arguments, if it was started for one.
pub fn asked() -> Option<Vec<String>> {
    let mut arguments = env::args().skip(1);
    (arguments.next()? == FLAG).then(|| arguments.collect())
}
