//! Measures the times from exec to ready in a separate process. It is small and single-threaded, and executes
//! nothing between vfork(2) and exec, so that the size of the harness does not affect the result.

use std::fs::File;
use std::io::{self, Read};
use std::net::SocketAddrV4;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{dup, pipe2};
use testkit::docker_proxy::{STATUS_FD, mapping};

use crate::cli::StartTimes;

/// The maximum duration of a start, in milliseconds. Beyond that, it has failed.
const PATIENCE_MS: u16 = 10_000;

/// The times of one program, in nanoseconds.
pub(crate) type Nanoseconds = Vec<u64>;

/// A start failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("{}: cannot {step}: {source}", program.display())]
    Io { program: PathBuf, step: &'static str, source: io::Error },
    #[error("{} said '{said}' instead of being ready", program.display())]
    NotReady { program: PathBuf, said: String },
}

/// Starts the programs in rotation, so that all run under the same conditions.
///
/// # Errors
/// [`StartError`]
pub(crate) fn run(options: &StartTimes) -> Result<Vec<Nanoseconds>, StartError> {
    let mut times = vec![Vec::new(); options.programs.len()];
    for _ in 0..options.times {
        for (program, times) in options.programs.iter().zip(&mut times) {
            let took = time_start(program, options.port, options.to)?;
            times.push(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        }
    }
    Ok(times)
}

fn time_start(program: &Path, port: u16, backend: SocketAddrV4) -> Result<Duration, StartError> {
    let failed = |step| move |source| StartError::Io { program: program.into(), step, source };
    let (status, inherited) = status_pipe().map_err(failed("make a status pipe"))?;
    let arguments = mapping("tcp", ([0, 0, 0, 0], port).into(), backend.into());
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let start = Instant::now();
    let mut child = command.spawn().map_err(failed("start it"))?;
    drop(inherited);
    let mut said = [0; 2];
    let read = wait_readable(&status).and_then(|()| File::from(status).read(&mut said));
    let took = start.elapsed();
    end(&mut child).map_err(failed("end it"))?;
    match read.map_err(failed("read its status"))? {
        2 if said == *b"0\n" => Ok(took),
        len => {
            let said = String::from_utf8_lossy(&said[..len]).into_owned();
            Err(StartError::NotReady { program: program.into(), said })
        }
    }
}

/// A pipe whose writing end has the descriptor that docker-proxy expects, and is inherited. It is put there
/// by closing and duplicating, so nothing else in this process may open files meanwhile.
fn status_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let holder = File::open("/dev/null")?;
    let (reading, writing) = pipe2(OFlag::O_CLOEXEC)?;
    if holder.as_raw_fd() != STATUS_FD {
        return Err(io::Error::other("descriptor 3 is taken"));
    }
    drop(holder);
    // The lowest free number, without close-on-exec.
    let inherited = dup(&writing)?;
    Ok((reading, inherited))
}

/// Kills the process, because docker-proxy 20.10 may miss a signal that arrives right after it is ready.
fn end(child: &mut Child) -> io::Result<()> {
    child.kill()?;
    child.wait().map(drop)
}

fn wait_readable(fd: &impl AsFd) -> io::Result<()> {
    match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(PATIENCE_MS))? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}
