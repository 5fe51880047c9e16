//! Listening Unix sockets with a file, which is accessible to its owner only and removed on exit.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::stat::{Mode, fchmod};
use rproxy_mapping::escape::escaped;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::runtime::descriptors::explain;

/// The length of the accept queue.
const BACKLOG: i32 = 16;

/// A bound socket. Dropping it removes its file.
#[derive(Debug)]
pub struct UnixSocket {
    file: SocketFile,
    listener: UnixListener,
}

/// The file of a socket. Dropping it removes the file, which has to happen before the socket is closed: while
/// a process listens, no other one replaces its file.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Device and inode, because the file may have been replaced. `None` while it belongs to another process.
    identity: Option<(u64, u64)>,
    /// The socket itself, for passing it to another process.
    socket: OwnedFd,
}

impl UnixSocket {
    /// Binds `path`. Replaces a socket on which no process listens. `option` is what errors begin with, such as
    /// `--control ` or `--metrics unix:`.
    ///
    /// # Errors
    /// [`SocketError`]
    pub fn bind(option: &'static str, path: &Path) -> Result<Self, SocketError> {
        let error = |source| SocketError::new(option, path, SocketFault::Bind(source));
        let addr = SockAddr::unix(path).map_err(error)?;
        remove_stale(path).map_err(|fault| SocketError::new(option, path, fault))?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).map_err(error)?;
        // The file gets the mode of the socket (unix_bind in net/unix/af_unix.c), so that nobody else can
        // ever connect.
        fchmod(socket.as_fd(), Mode::S_IRUSR | Mode::S_IWUSR).map_err(|errno| error(errno.into()))?;
        socket.bind(&addr).map_err(error)?;
        let another = socket.try_clone().map_err(error)?;
        let file = SocketFile { path: path.to_owned(), identity: identity(path), socket: another.into() };
        socket.listen(BACKLOG).map_err(error)?;
        Ok(Self { listener: socket.into(), file })
    }

    /// Adopts a socket that another process bound to `path`. The file belongs to that process until
    /// [`UnixSocket::own`].
    ///
    /// # Errors
    /// [`SocketFault::NotPassed`]
    pub fn adopt(option: &'static str, socket: OwnedFd, path: &Path) -> Result<Self, SocketError> {
        let error = |reason: String| SocketError::new(option, path, SocketFault::NotPassed(reason));
        let adopt = || -> io::Result<(UnixListener, bool)> {
            let socket = Socket::from(socket);
            let bound_to = socket.local_addr()?;
            let is_it = bound_to.as_pathname() == Some(path) && socket.is_listener()?;
            socket.set_nonblocking(true)?;
            Ok((socket.into(), is_it))
        };
        let (listener, is_it) = adopt().map_err(|source| error(source.to_string()))?;
        if !is_it {
            return Err(error("it does not listen there".to_owned()));
        }
        let another = listener.try_clone().map_err(|source| error(source.to_string()))?;
        Ok(Self {
            listener,
            file: SocketFile { path: path.to_owned(), identity: None, socket: another.into() },
        })
    }

    /// Makes this process the owner of the file, which it then removes on exit.
    pub fn own(&mut self) {
        self.file.identity = identity(&self.file.path);
    }

    /// Splits into the listener and its file.
    pub(crate) fn into_parts(self) -> (UnixListener, SocketFile) {
        (self.listener, self.file)
    }
}

impl SocketFile {
    /// Leaves the file to another process.
    pub(crate) fn leave(&mut self) {
        self.identity = None;
    }
}

impl AsFd for SocketFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            // If this fails, the file remains, and the next process replaces it.
            drop(fs::remove_file(&self.path));
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Removes the socket of a process that was killed.
fn remove_stale(path: &Path) -> Result<(), SocketFault> {
    match fs::symlink_metadata(path) {
        Err(_not_there) => return Ok(()),
        Ok(metadata) if !metadata.file_type().is_socket() => return Err(SocketFault::NotASocket),
        Ok(_socket) => {}
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(SocketFault::Bind)
        }
        _ => Err(SocketFault::InUse),
    }
}

/// Why a socket cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{option}{}: {fault}", escaped(path))]
pub struct SocketError {
    /// The option that asks for the socket, up to the path.
    pub option: &'static str,
    /// The path.
    pub path: PathBuf,
    /// What is wrong.
    pub fault: SocketFault,
}

impl SocketError {
    fn new(option: &'static str, path: &Path, fault: SocketFault) -> Self {
        Self { option, path: path.to_owned(), fault }
    }
}

/// What is wrong with a socket or its path.
#[derive(Debug, thiserror::Error)]
pub enum SocketFault {
    /// Another process listens on it.
    #[error("another process listens there; give this one another path")]
    InUse,
    /// The path exists, but is not a socket.
    #[error("there is a file which is not a socket; give another path")]
    NotASocket,
    /// The passed socket is another one, for this reason.
    #[error("the socket that was passed cannot be used: {0}")]
    NotPassed(String),
    /// The kernel refused.
    #[error("cannot listen there: {}{}", explain(.0, 1), way_out(.0))]
    Bind(#[source] io::Error),
}

/// What would help against an error of bind(2) or socket(2).
fn way_out(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; create its directory first",
        io::ErrorKind::PermissionDenied => "; give a path in a directory that this user may write to",
        io::ErrorKind::ReadOnlyFilesystem => "; give a path that can be written, as below /run",
        // The longest path is shorter than `sun_path` (unix(7)).
        io::ErrorKind::InvalidInput => "; give a path of less than 108 bytes",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn path(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("rproxy-socket-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        dir.join(name)
    }

    fn fault(path: &Path) -> SocketFault {
        UnixSocket::bind("--control ", path).unwrap_err().fault
    }

    #[test]
    fn it_is_for_its_owner_and_goes_with_the_process() {
        let path = path("own");
        let (listener, file) = UnixSocket::bind("--control ", &path).unwrap().into_parts();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert!(matches!(fault(&path), SocketFault::InUse));
        fs::remove_file(&path).unwrap();
        let (_other, others_file) = UnixSocket::bind("--control ", &path).unwrap().into_parts();
        drop(file);
        assert!(path.exists(), "it is another's by now");
        drop(listener);
        drop(others_file);
        assert!(!path.exists());
    }

    #[test]
    fn it_can_be_another_processs() {
        let path = path("passed");
        let (_listener, mut file) = UnixSocket::bind("--control ", &path).unwrap().into_parts();
        let passed = || file.as_fd().try_clone_to_owned().unwrap();
        drop(UnixSocket::adopt("--control ", passed(), &path).unwrap());
        assert!(path.exists(), "it is still the other's");
        let mut adopted = UnixSocket::adopt("--control ", passed(), &path).unwrap();
        let elsewhere = UnixSocket::adopt("--control ", passed(), Path::new("/elsewhere")).unwrap_err();
        assert!(elsewhere.to_string().contains("does not listen there"), "{elsewhere}");
        let other = UnixStream::pair().unwrap().0;
        UnixSocket::adopt("--control ", other.into(), &path).unwrap_err();
        adopted.own();
        file.leave();
        drop(file);
        assert!(path.exists());
        drop(adopted);
        assert!(!path.exists());
    }

    #[test]
    fn it_takes_the_place_of_one_that_nobody_listens_on() {
        let path = path("stale");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        assert!(UnixSocket::bind("--control ", &path).is_ok());
    }

    #[test]
    fn it_replaces_nothing_but_a_socket() {
        let path = path("file");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(fault(&path), SocketFault::NotASocket));
        fs::remove_file(&path).unwrap();
    }
}
