//! Runs the harness in a PID namespace of its own, so that everything it starts ends with it.
//!
//! The process that the user started only holds the end of a pipe; the process that does the work is the
//! first one in the namespace. When the former ends, for whatever reason (Ctrl-C, SIGKILL), the pipe closes
//! and the latter exits. When the first process of a namespace exits, the kernel kills all others in it.
//! Network namespaces and interfaces are removed with their last process.

use std::env;
use std::io::{self, Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, ExitStatus, Stdio, exit};
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Uid, getpid};

/// Set for the process in the namespace; the value does not matter.
const INSIDE: &str = "RPROXY_BENCHES_INSIDE";

/// The running program, even if its file has been replaced by a newer build.
pub(crate) const OWN_PROGRAM: &str = "/proc/self/exe";

/// The exit status after the user has interrupted the harness, as in a shell.
const INTERRUPTED: i32 = 130;

/// The harness cannot run in namespaces of its own.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CageError {
    /// Root is required.
    #[error("this needs root: it builds network namespaces and starts the peers in them")]
    NotRoot,
    /// A system call failed.
    #[error("cannot {step}: {source}")]
    Step {
        /// The purpose of the call.
        step: &'static str,
        /// Its error.
        source: io::Error,
    },
}

fn failed<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> CageError {
    move |error| CageError::Step { step, source: error.into() }
}

/// Runs `task` in new namespaces, by starting this program again with the same arguments.
///
/// # Errors
/// [`CageError`]
pub(crate) fn run(task: impl FnOnce() -> ExitCode) -> Result<ExitCode, CageError> {
    if env::var_os(INSIDE).is_some() && getpid().as_raw() == 1 {
        settle()?;
        return Ok(task());
    }
    if !Uid::effective().is_root() {
        return Err(CageError::NotRoot);
    }
    // Only for children: this process stays where it is.
    unshare(CloneFlags::CLONE_NEWPID).map_err(failed("create a PID namespace"))?;
    let mut command = Command::new(OWN_PROGRAM);
    command.args(env::args_os().skip(1)).env(INSIDE, "1").stdin(Stdio::piped());
    if let Some(name) = env::args_os().next() {
        command.arg0(name);
    }
    let mut child = command.spawn().map_err(failed("start the harness in its namespace"))?;
    // `wait` would close the pipe first.
    let lifeline = child.stdin.take();
    let status = child.wait().map_err(failed("wait for the harness"))?;
    drop(lifeline);
    Ok(code(status))
}

fn code(status: ExitStatus) -> ExitCode {
    status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from)
}

/// Sets up the first process of the namespace.
fn settle() -> Result<(), CageError> {
    let lifeline = io::stdin();
    let watch = move || {
        // Nothing is ever written, so this returns when the process at the other end ends.
        drop(lifeline.lock().read(&mut [0]));
        abandon();
    };
    thread::Builder::new().spawn(watch).map_err(failed("watch the process outside"))?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(failed("create a mount namespace"))?;
    let nothing = None::<&str>;
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)
        .map_err(failed("keep mounts to itself"))?;
    // Shows the process ids of this namespace.
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), nothing).map_err(failed("mount /proc"))?;
    // 8,000 connections of a relay are 16,000 descriptors.
    getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_soft, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard))
        .map_err(failed("raise the limit of descriptors"))
}

#[expect(clippy::exit, reason = "the whole harness ends, whatever its threads are at")]
fn abandon() -> ! {
    // Ends the progress line; errors are ignored, because nobody may be reading.
    drop(io::stderr().write_all(b"\n"));
    exit(INTERRUPTED)
}
