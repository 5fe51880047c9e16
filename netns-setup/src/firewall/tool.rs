//! Runs the programs that manage rules.

use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};

/// Why a program failed.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// There is no such program.
    #[error("{0} is not installed: install it, or choose another --firewall")]
    Missing(&'static str),
    /// It could not be run.
    #[error("cannot run {program}: {source}")]
    Run {
        /// The program.
        program: &'static str,
        /// Why.
        source: io::Error,
    },
    /// It exited with a failure.
    #[error("{program} failed ({status}): {message}")]
    Failed {
        /// The program.
        program: &'static str,
        /// How it ended.
        status: ExitStatus,
        /// Its output on standard error.
        message: String,
    },
}

/// Finds the path of `program`.
#[must_use]
pub fn find(program: &str) -> Option<PathBuf> {
    // Users' PATH often lacks the directories of these programs.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(usual).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// Runs `program` with `input` and returns its output.
///
/// # Errors
/// If it is missing, cannot be run, or exits with a failure.
pub fn run(program: &'static str, args: &[&str], input: &str) -> Result<String, ToolError> {
    let file = find(program).ok_or(ToolError::Missing(program))?;
    let failed = |source| ToolError::Run { program, source };
    let mut child = Command::new(file)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // The terminal's signals are meant for this program, which lets the current step finish.
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        match stdin.write_all(input.as_bytes()) {
            // It has refused the input before reading all of it; its status and message say why.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            other => other.map_err(failed)?,
        }
    }
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let message =
        said.lines().find(|line| !line.trim().is_empty()).unwrap_or("it gave no reason").trim().to_owned();
    Err(ToolError::Failed { program, status: output.status, message })
}
