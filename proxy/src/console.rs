//! Lines for the person or program that started us. They may have closed their end by now, which
//! changes nothing for the clients: errors are ignored.

use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

/// Writes a line to standard output.
pub fn out(line: &impl Display) {
    drop(writeln!(io::stdout().lock(), "{line}"));
}

/// Writes a line to standard error.
pub fn err(line: &impl Display) {
    drop(writeln!(io::stderr().lock(), "{line}"));
}

/// Says why nothing came of it, on standard error, and gives the status to end with.
pub fn fail(error: &impl Display) -> ExitCode {
    for line in error.to_string().lines() {
        err(&format_args!("rproxy: {line}"));
    }
    ExitCode::FAILURE
}
