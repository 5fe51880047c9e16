//! Starts the supervisor of a network.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use command_fds::{CommandFdExt, FdMapping};

use super::RelayError;
use super::channel::within;
use super::find::{NETWORK, STATE_DIR, SUPERVISE};
use crate::relayed::{LOG, Launch, SUPERVISOR};

/// The descriptor at which a supervisor gets the socket where commands connect.
pub const LISTENER: RawFd = 3;

/// The name of the supervisor among the processes, and of its file.
const OWN_NAME: &str = "netns-setup";

/// Starts a supervisor. It can be connected to at once; what it is asked waits until it is ready.
///
/// # Errors
/// If it cannot be started.
pub fn start(launch: &Launch) -> Result<(), RelayError> {
    let state_dir = launch.state_dir.canonicalize().map_err(prepare("open", &launch.state_dir))?;
    let dir = File::open(&state_dir).map_err(prepare("open", &state_dir))?;
    let listener = listen(&dir, &state_dir)?;
    let (log, program) = (open_log(&state_dir)?, own_program(&launch.program)?);
    let failed = |source| RelayError::Run { program: program.clone(), source };
    let mut command = Command::new(&program);
    command
        .arg0(OWN_NAME)
        .arg(SUPERVISE)
        .args([NETWORK, launch.network.as_str()])
        .arg(STATE_DIR)
        .arg(&state_dir)
        .arg("--rproxy")
        .arg(std::path::absolute(&launch.program).unwrap_or_else(|_| launch.program.clone()))
        .current_dir("/")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .fd_mappings(vec![FdMapping { parent_fd: OwnedFd::from(listener), child_fd: LISTENER }])
        .map_err(|error| failed(io::Error::other(error)))?;
    let mut child = command.spawn().map_err(failed)?;
    // If this process lives longer, the supervisor must not stay a zombie. If not, init reaps it.
    let reap = thread::Builder::new().name("reaper".to_owned()).spawn(move || child.wait().map(drop));
    reap.map(drop).map_err(failed)
}

/// Listens for the supervisor. A socket that an earlier one has left is replaced.
fn listen(dir: &File, state_dir: &Path) -> Result<UnixListener, RelayError> {
    let path = within(dir, SUPERVISOR);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(prepare("replace", &state_dir.join(SUPERVISOR))(error));
        }
        _ => {}
    }
    UnixListener::bind(&path).map_err(prepare("listen at", &state_dir.join(SUPERVISOR)))
}

fn open_log(state_dir: &Path) -> Result<File, RelayError> {
    let path = state_dir.join(LOG);
    let flags = nix::libc::O_NOFOLLOW;
    let mut options = OpenOptions::new();
    // The supervisor reads it to shorten it.
    let log = options.read(true).append(true).create(true).mode(0o600).custom_flags(flags).open(&path);
    log.map_err(prepare("open", &path))
}

/// Whether this program supervises if it is asked to, whatever its file is called.
static IS_SUPERVISOR: AtomicBool = AtomicBool::new(false);

/// Says that this program supervises if it is asked to.
pub(super) fn offer_to_supervise() {
    IS_SUPERVISOR.store(true, Ordering::Relaxed);
}

/// The file of this program, or `netns-setup` beside `rproxy` if another program uses this one as a library.
fn own_program(rproxy: &Path) -> Result<PathBuf, RelayError> {
    if IS_SUPERVISOR.load(Ordering::Relaxed) {
        // Also after the file was replaced.
        return Ok("/proc/self/exe".into());
    }
    let beside = rproxy.with_file_name(OWN_NAME);
    if beside.is_file() { Ok(beside) } else { Err(RelayError::NoSupervisor(rproxy.to_owned())) }
}

fn prepare(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RelayError {
    let path = path.to_owned();
    move |source| RelayError::Prepare { step, path, source }
}
