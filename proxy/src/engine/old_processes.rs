//! Old processes of upgrades, which let their connections finish.
//!
//! When a port is unpublished, their connections to it are reset as well: they keep the port, and lead to a container that
//! is gone. The process that serves sends the name of the port as a line over the channel that the upgrade used, and gets
//! an empty line once they are closed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::unistd::{read, write};
use rproxy_mapping::name::Name;
use rproxy_sys::watch::Watched;
use tokio::io::Interest;
use tokio::time::timeout;
use tracing::{debug, info, warn};

use crate::runtime::poll::is_hung_up;
use crate::runtime::worker::Workers;
use crate::state::MappingState;
use crate::tcp::reset_all;

/// How long an old process may take to reset its connections.
const PATIENCE: Duration = Duration::from_secs(2);

/// The longest line: a name.
const LONGEST: usize = 256;

/// The old processes that may still have connections.
#[derive(Debug, Default)]
pub(crate) struct OldProcesses(Vec<Watched>);

impl OldProcesses {
    /// Those at the other ends of these channels that have not ended yet.
    pub(crate) fn new(mut channels: Vec<Watched>) -> Self {
        channels.retain(|channel| !is_hung_up(channel));
        Self(channels)
    }

    /// The channels, for the next process.
    pub(crate) fn channels(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(AsFd::as_fd)
    }

    /// Has them reset their connections to an attached port.
    pub(crate) async fn reset(&mut self, name: &Name) {
        let mut left = Vec::with_capacity(self.0.len());
        for process in self.0.drain(..) {
            let asked = timeout(PATIENCE, ask(&process, name)).await;
            match asked.unwrap_or_else(|late| Err(late.into())) {
                Ok(()) => left.push(process),
                // Its last connection has ended.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    debug!("an old process has ended")
                }
                Err(error) => warn!(%error, "an old process does not reset its connections"),
            }
        }
        self.0 = left;
    }
}

async fn ask(process: &Watched, name: &Name) -> io::Result<()> {
    let line = format!("{name}\n");
    match process.io(Interest::WRITABLE, |channel| Ok(write(channel, line.as_bytes())?)).await {
        Ok(written) if written == line.len() => read_line(process).await.map(drop),
        Ok(_some) => Err(io::ErrorKind::WriteZero.into()),
        // It has ended.
        Err(_closed) => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Reads a line, without its end.
async fn read_line(channel: &Watched) -> io::Result<String> {
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        match channel.io(Interest::READABLE, |channel| Ok(read(channel, &mut byte)?)).await {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_one) if byte == *b"\n" => return Ok(String::from_utf8_lossy(&line).into_owned()),
            Ok(_one) if line.len() >= LONGEST => return Err(io::ErrorKind::FileTooLarge.into()),
            Ok(_one) => line.extend(byte),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Err(error) => return Err(error),
        }
    }
}

/// The connections that another process leaves to this one, by the attached port of each.
#[derive(Debug)]
pub(crate) struct LeftConnections {
    pub(super) workers: Arc<Workers>,
    pub(super) ports: Vec<(Name, Arc<MappingState>)>,
}

impl LeftConnections {
    /// Resets those that the process at the other end of `channel` asks for. Never returns.
    pub(crate) async fn serve(&self, channel: &Watched) -> ! {
        while let Ok(line) = read_line(channel).await {
            for (name, state) in self.ports.iter().filter(|(name, _state)| name.as_str() == line) {
                info!(mapping = %name, "resetting its connections: it is no longer published");
                reset_all(&self.workers, state).await;
            }
            if channel.io(Interest::WRITABLE, |channel| Ok(write(channel, b"\n")?)).await.is_err() {
                break;
            }
        }
        std::future::pending().await
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::runtime::new_runtime;

    fn watched(stream: UnixStream) -> Watched {
        stream.set_nonblocking(true).unwrap();
        Watched::new(stream, Interest::READABLE | Interest::WRITABLE).unwrap()
    }

    #[test]
    fn those_that_have_ended_are_not_asked_again() {
        new_runtime().unwrap().block_on(async {
            let [(one, mut other), (gone, end)] = [(); 2].map(|()| UnixStream::pair().unwrap());
            drop(end);
            let mut old = OldProcesses::new(vec![watched(gone), watched(one)]);
            other.write_all(b"\n").unwrap();
            old.reset(&"docker/tcp/0.0.0.0:80".parse().unwrap()).await;
            let mut line = [0; 22];
            other.read_exact(&mut line).unwrap();
            assert_eq!(&line, b"docker/tcp/0.0.0.0:80\n");
            assert_eq!(old.channels().count(), 1);
        });
    }

    #[test]
    fn a_line_that_never_ends_is_refused() {
        new_runtime().unwrap().block_on(async {
            let (one, mut other) = UnixStream::pair().unwrap();
            other.write_all(&[b'x'; LONGEST + 1]).unwrap();
            let error = read_line(&watched(one)).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        });
    }
}
