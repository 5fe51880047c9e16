//! Asks the supervisor, on behalf of a command.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use socket2::Socket;

use super::RelayError;
use super::channel::{Channel, within};
use super::launch;
use super::message::{Answer, Request, Status, digest};
use crate::model::MappingKey;
use crate::relayed::{Launch, RelayedPort, SUPERVISOR};

/// How long a supervisor may take to say what it serves. It does so at once, unless it hangs.
const STATUS: Duration = Duration::from_secs(5);

/// How long it may take for a change. Thousands of ports take a second; in the worst case, it gives up a relay that hangs,
/// and starts another one.
const CHANGE: Duration = Duration::from_secs(45);

/// What the supervisor of the network with this state directory serves; `None` if none runs.
///
/// # Errors
/// If it does not answer.
pub fn status(state_dir: &Path) -> Result<Option<Status>, RelayError> {
    match ask(state_dir, &Request::Status, &[]) {
        Ok(Answer::Status(status)) => Ok(Some(status)),
        Ok(Answer::Same(_) | Answer::Changed | Answer::Refused(_)) => {
            Err(talk(io::ErrorKind::InvalidData.into()))
        }
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(talk(error)),
    }
}

/// The same, asked by somebody who has `expected`, in the order of the keys: if that is what it serves, thousands of ports
/// need not be told.
///
/// # Errors
/// If it does not answer.
pub fn compare(state_dir: &Path, expected: &[&RelayedPort]) -> Result<Option<Status>, RelayError> {
    match ask(state_dir, &Request::Compare(digest(expected.iter().copied())), &[]) {
        Ok(Answer::Status(status)) => Ok(Some(status)),
        Ok(Answer::Same(status)) => {
            let ports = expected.iter().copied().cloned().collect();
            Ok(Some(Status { ports, ..status }))
        }
        Err(error) if is_gone(&error) => Ok(None),
        // A supervisor of an older version does not know the request.
        Ok(Answer::Changed | Answer::Refused(_)) => status(state_dir),
        Err(error) => Err(talk(error)),
    }
}

/// Has the supervisor serve more ports, each with its socket. Starts one if none runs.
///
/// # Errors
/// If that fails; no port is served then that was not before.
pub fn serve(launch: &Launch, ports: &[RelayedPort], sockets: &[Socket]) -> Result<(), RelayError> {
    change(launch, &[], ports, sockets)
}

/// Has the supervisor cease to serve some ports, and serve others. A port that it serves already keeps its socket; for
/// each other one there has to be a socket, in the same order. Starts a supervisor if none runs.
///
/// # Errors
/// If that fails; what is served is the same then.
pub fn change(
    launch: &Launch,
    remove: &[MappingKey],
    add: &[RelayedPort],
    sockets: &[Socket],
) -> Result<(), RelayError> {
    let request = Request::Change { remove: remove.to_vec(), add: add.to_vec() };
    let sockets: Vec<_> = sockets.iter().map(AsFd::as_fd).collect();
    let answer = match ask(&launch.state_dir, &request, &sockets) {
        Err(error) if is_gone(&error) && !add.is_empty() => {
            launch::start(launch)?;
            ask(&launch.state_dir, &request, &sockets)
        }
        Err(error) if is_gone(&error) => return Ok(()),
        answer => answer,
    };
    changed(answer.map_err(talk)?)
}

/// Has the supervisor cease to serve ports. If none runs, nothing is served.
///
/// # Errors
/// If that fails.
pub fn cease(state_dir: &Path, ports: &[MappingKey]) -> Result<(), RelayError> {
    let request = Request::Change { remove: ports.to_vec(), add: Vec::new() };
    match ask(state_dir, &request, &[]) {
        Err(error) if is_gone(&error) => Ok(()),
        answer => changed(answer.map_err(talk)?),
    }
}

fn changed(answer: Answer) -> Result<(), RelayError> {
    match answer {
        Answer::Changed => Ok(()),
        Answer::Refused(why) => Err(RelayError::Refused(why)),
        Answer::Status(_) | Answer::Same(_) => Err(talk(io::ErrorKind::InvalidData.into())),
    }
}

fn ask(state_dir: &Path, request: &Request, sockets: &[BorrowedFd<'_>]) -> io::Result<Answer> {
    let patience = match request {
        Request::Status | Request::Compare(_) => STATUS,
        Request::Change { .. } => CHANGE,
    };
    let mut channel = connect(state_dir, patience)?;
    channel.send(serde_json::to_string(request)?, sockets)?;
    Ok(serde_json::from_slice(&channel.receive()?.text)?)
}

fn connect(state_dir: &Path, patience: Duration) -> io::Result<Channel> {
    let dir = File::open(state_dir)?;
    Channel::connect(&within(&dir, SUPERVISOR), patience)
}

/// Whether the error means that there is no supervisor, or that it has just ended.
fn is_gone(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof};
    matches!(error.kind(), NotFound | ConnectionRefused | ConnectionReset | BrokenPipe | UnexpectedEof)
}

fn talk(error: io::Error) -> RelayError {
    RelayError::Conversation(error)
}
