//! Runs the programs that manage rules.

use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use rproxy_sys::process::end_with_parent;

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
    /// It did not end, and was killed.
    #[error("`{command}` did not end within {} s, and was killed", limit.as_secs())]
    Hung {
        /// The program with its arguments.
        command: String,
        /// How long it was waited for.
        limit: Duration,
    },
}

/// How long a program may take. With a hundred thousand rules of others, they take a few seconds, and may wait as long for
/// each other.
const LIMIT: Duration = Duration::from_secs(15);

/// How long it may take after one has hung, until one ends in time. What hangs once mostly hangs again, as when another
/// process keeps a lock: a command that has to undo what it has done must not wait as long for each step.
const AFTER_HANG: Duration = Duration::from_secs(2);

/// Whether the last program has hung.
static HAS_HUNG: AtomicBool = AtomicBool::new(false);

/// Finds the path of `program`.
#[must_use]
pub fn find(program: &str) -> Option<PathBuf> {
    // Users' PATH often lacks the directories of these programs.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(usual).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// Runs `program` with `input` and returns its output. It ends with this thread, and changes nothing then: each of these
/// programs changes rules at its end, as one transaction.
///
/// # Errors
/// If it is missing, cannot be run, exits with a failure, or does not end.
pub fn run(program: &'static str, args: &[&str], input: &str) -> Result<String, ToolError> {
    let file = find(program).ok_or(ToolError::Missing(program))?;
    run_at(program, &file, args, input)
}

/// The same, with the program at this path.
///
/// # Errors
/// If it cannot be run, exits with a failure, or does not end.
pub fn run_at(program: &'static str, file: &Path, args: &[&str], input: &str) -> Result<String, ToolError> {
    let limit = if HAS_HUNG.load(Ordering::Relaxed) { AFTER_HANG } else { LIMIT };
    let result = run_file(program, file, args, input, limit);
    HAS_HUNG.store(matches!(result, Err(ToolError::Hung { .. })), Ordering::Relaxed);
    result
}

fn run_file(
    program: &'static str,
    file: &Path,
    args: &[&str],
    input: &str,
    limit: Duration,
) -> Result<String, ToolError> {
    let failed = |source| ToolError::Run { program, source };
    let mut command = Command::new(file);
    command
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // The terminal's signals are meant for this program, which lets the current step finish.
        .process_group(0);
    let child = end_with_parent(&mut command).spawn().map_err(failed)?;
    let (output, is_hung) = within(limit, child, input).map_err(failed)?;
    if is_hung {
        return Err(ToolError::Hung { command: [&[program], args].concat().join(" "), limit });
    }
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let message =
        said.lines().find(|line| !line.trim().is_empty()).unwrap_or("it gave no reason").trim().to_owned();
    Err(ToolError::Failed { program, status: output.status, message })
}

/// What a child says after this input, and whether it was killed, with the children that it has in its process group, as it
/// did not end in time.
fn within(limit: Duration, mut child: Child, input: &str) -> io::Result<(Output, bool)> {
    let group = i32::try_from(child.id()).map(Pid::from_raw).map_err(io::Error::other)?;
    let (ended, wait) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let watch = move || {
            let is_hung = wait.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
            if is_hung {
                // It may have ended at this moment, and is not reaped before its output ends.
                let _killed = killpg(group, Signal::SIGKILL);
            }
            is_hung
        };
        let watch = thread::Builder::new().name("patience".to_owned()).spawn_scoped(scope, watch)?;
        let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes()));
        let output = child.wait_with_output();
        drop(ended);
        let is_hung = watch.join().unwrap_or(false);
        match written {
            // It has refused the input before reading all of it; its status and message say why.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            other => other?,
        }
        Ok((output?, is_hung))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, input: &str, limit: Duration) -> Result<String, ToolError> {
        run_file("sh", Path::new("/bin/sh"), &["-c", script], input, limit)
    }

    #[test]
    fn a_program_that_ends_is_waited_for() {
        assert_eq!(shell("cat", "text", LIMIT).unwrap(), "text");
        let error = shell("echo why >&2; exit 3", "", LIMIT).unwrap_err();
        assert_eq!(error.to_string(), "sh failed (exit status: 3): why");
        // More than a pipe holds, which it does not read.
        assert!(shell("exit 3", &"x".repeat(1 << 20), LIMIT).is_err());
    }

    #[test]
    fn one_that_does_not_end_is_killed_with_its_children() {
        let short = Duration::from_millis(50);
        for (script, input) in
            [("sleep 600", ""), ("sleep 600 & wait", ""), ("sleep 600", &*"x".repeat(1 << 20))]
        {
            let error = shell(script, input, short).unwrap_err();
            assert!(matches!(error, ToolError::Hung { .. }), "{script}: {error}");
            assert_eq!(error.to_string(), format!("`sh -c {script}` did not end within 0 s, and was killed"));
        }
    }
}
