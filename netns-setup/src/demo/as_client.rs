//! An `rproxy` that connects to its backend as the client.

use std::io::{self, BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A running `rproxy`, which ends with this value.
pub(super) struct AsClient(Child);

impl AsClient {
    /// The arguments after the program's name.
    pub(super) const ARGS: [&str; 6] =
        ["--host", "10.0.0.11:8080", "--to", "172.17.0.2:80", "--source", "client"];

    /// Starts it, and waits until it serves.
    ///
    /// # Errors
    /// If it cannot be run, or ends before.
    pub(super) fn start(program: &Path) -> io::Result<Self> {
        let mut command = Command::new(program);
        command.args(Self::ARGS).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        // The terminal's signals are meant for the demonstration, which ends it.
        let relay = Self(command.process_group(0).spawn()?);
        relay.serving()
    }

    fn serving(mut self) -> io::Result<Self> {
        let mut line = String::new();
        let stdout = self.0.stdout.take();
        // It prints what it serves, as soon as it does.
        if let Some(stdout) = stdout {
            BufReader::new(stdout).read_line(&mut line)?;
        }
        if line.is_empty() { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(self) }
    }
}

impl Drop for AsClient {
    fn drop(&mut self) {
        // It has nothing to finish, and may have ended already.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}
