//! The socket where Podman tells that a container has another address, at `podman network connect` and `disconnect`.
//!
//! It is a Unix socket for packets. A client sends a JSON string, the new address, and gets `OK`, or why it cannot be
//! used (`reloadRootlessRLKPortMapping` in Podman's `libpod`).

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use rproxy_mapping::escape::escaped;
use rproxy_sys::pass::{receive, send_packet};
use rproxy_sys::watch::Watched;
use rustix::fs::{Mode, OFlags, open};
use rustix::net::{SocketFlags, accept_with};
use tokio::io::Interest;
use tokio::time::{sleep, timeout};
use tracing::warn;

use super::contract::ReloadPlace;

/// Room for a request, an address.
const LONGEST: usize = 1024;

/// How long a client may take to send it.
const PATIENCE: Duration = Duration::from_secs(1);

/// The listening socket. Dropping it removes its file.
#[derive(Debug)]
pub(super) struct ReloadSocket {
    listener: Watched,
    path: PathBuf,
}

/// A request that waits for its answer.
#[derive(Debug)]
pub(super) struct Request {
    client: OwnedFd,
    /// What was sent.
    pub(super) packet: Vec<u8>,
}

impl ReloadSocket {
    /// Listens there. A socket that was left there is replaced: there is one relay for a container.
    ///
    /// # Errors
    /// [`ReloadError`]
    pub(super) fn bind(place: &ReloadPlace) -> Result<Self, ReloadError> {
        let path = place.directory.join(&place.name);
        let error = |source| ReloadError { path: path.clone(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(&place.directory).map_err(error)?;
        let listener = listen_at(&place.directory, &place.name).map_err(error)?;
        let listener = Watched::new(listener, Interest::READABLE).map_err(error)?;
        Ok(Self { listener, path })
    }

    /// Its file.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the next request.
    pub(super) async fn next(&self) -> Request {
        loop {
            match self.attempt().await {
                Ok(request) => return request,
                Err(error) => {
                    warn!(%error, "cannot receive a request of Podman");
                    // A late client has taken its time; what else fails might fail at once, for ever.
                    if error.kind() != io::ErrorKind::TimedOut {
                        sleep(PATIENCE).await;
                    }
                }
            }
        }
    }

    async fn attempt(&self) -> io::Result<Request> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let client = self.listener.io(Interest::READABLE, |fd| Ok(accept_with(fd, flags)?)).await?;
        let watched = Watched::new(client.try_clone()?, Interest::READABLE)?;
        let mut packet = vec![0; LONGEST];
        let received = watched.io(Interest::READABLE, |fd| receive(fd, &mut packet));
        let received = timeout(PATIENCE, received).await.map_err(|_late| io::ErrorKind::TimedOut)??;
        // A longer one has more than fit, and is no address.
        packet.truncate(received.length);
        Ok(Request { client, packet })
    }
}

impl Request {
    /// Answers it.
    pub(super) fn answer(self, text: &str) {
        if let Err(error) = send_packet(self.client.as_fd(), text.as_bytes()) {
            warn!(%error, "cannot answer a request of Podman");
        }
    }
}

impl Drop for ReloadSocket {
    fn drop(&mut self) {
        // If this fails, the file remains, and the next relay replaces it.
        drop(fs::remove_file(&self.path));
    }
}

/// Binds by way of the directory, since an address has room for 107 bytes only (unix(7)).
fn listen_at(directory: &Path, name: &str) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
    let directory = open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let path = format!("/proc/self/fd/{}/{name}", directory.as_raw_fd());
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    bind(listener.as_raw_fd(), &UnixAddr::new(path.as_str())?)?;
    listen(&listener, Backlog::MAXCONN)?;
    Ok(listener)
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen at {}, where Podman tells addresses: {source}", escaped(path))]
pub(super) struct ReloadError {
    path: PathBuf,
    source: io::Error,
}

#[cfg(test)]
mod tests {
    use nix::sys::socket::connect;
    use rproxy_sys::pass::receive_waiting;

    use super::*;
    use crate::runtime::new_runtime;

    #[test]
    fn a_request_is_received_and_answered_also_where_a_path_is_long() {
        let dir = tempfile::tempdir().unwrap();
        // Together longer than an address.
        let place =
            ReloadPlace { directory: dir.path().join("a".repeat(100)).join("rp"), name: "f".repeat(64) };
        new_runtime().unwrap().block_on(async {
            // The first one was killed.
            std::mem::forget(ReloadSocket::bind(&place).unwrap());
            let socket = ReloadSocket::bind(&place).unwrap();
            let client = socket_of_client(&place);
            send_packet(client.as_fd(), b"\"10.0.0.1\"\n").unwrap();
            let request = socket.next().await;
            assert_eq!(request.packet, b"\"10.0.0.1\"\n");
            request.answer("OK");
            let mut answer = [0; 9];
            assert_eq!(receive_waiting(client.as_fd(), &mut answer).unwrap().length, 2);
            let path = socket.path().to_owned();
            drop(socket);
            assert!(!path.exists());
        });
    }

    fn socket_of_client(place: &ReloadPlace) -> OwnedFd {
        let client = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        let directory = open(&place.directory, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let path = format!("/proc/self/fd/{}/{}", directory.as_raw_fd(), place.name);
        connect(client.as_raw_fd(), &UnixAddr::new(path.as_str()).unwrap()).unwrap();
        client
    }
}
