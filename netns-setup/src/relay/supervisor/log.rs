//! The log of the supervisor, which is its standard error.

use std::io::{self, Write};

/// Writes a line to the log.
pub(super) fn log(line: &str) {
    // There is nowhere to report an error.
    drop(writeln!(io::stderr(), "netns-setup: {line}"));
}
