//! Lines for the person or program that started us. They may have closed their end by now, which
//! changes nothing for the clients: errors are ignored.

use std::fmt::Display;
use std::io::{self, Write};

/// Writes a line to standard output.
pub fn out(line: &impl Display) {
    drop(writeln!(io::stdout().lock(), "{line}"));
}

/// Writes a line to standard error.
pub fn err(line: &impl Display) {
    drop(writeln!(io::stderr().lock(), "{line}"));
}
