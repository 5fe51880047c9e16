//! Listening Unix sockets. The file of one is accessible to its owner only, unless somebody asks for more, and removed in the
//! end.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::fcntl::AtFlags;
use nix::libc;
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, Uid, fchownat};
use rproxy_mapping::escape::escaped;
use rproxy_mapping::permissions::{FileMode, SocketPermissions};
use rproxy_mapping::unix::UnixAddr;
use rproxy_shim::listen::BACKLOG;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::accounts;
use crate::runtime::descriptors::explain;
use crate::runtime::socket_file::{SocketFile, identity};

/// A bound socket. Dropping it removes its file.
#[derive(Debug)]
pub struct UnixSocket {
    /// An abstract address has none.
    file: Option<SocketFile>,
    listener: UnixListener,
}

/// The file of a socket with the socket, for passing it to another process. Dropping it removes the file, and then closes the
/// socket.
#[derive(Debug)]
pub(crate) struct HeldSocket {
    file: Option<SocketFile>,
    socket: OwnedFd,
}

impl UnixSocket {
    /// Binds `path`. Replaces a socket on which no process listens. `option` is what errors begin with, such as
    /// `--control ` or `--metrics unix:`.
    ///
    /// # Errors
    /// [`SocketError`]
    pub fn bind(option: &'static str, path: &Path) -> Result<Self, SocketError> {
        let error = |fault| SocketError::new(option, path, fault);
        let addr = SockAddr::unix(path).map_err(|source| error(SocketFault::Bind(source)))?;
        Self::bind_at(&addr, Some(path), &SocketPermissions::default()).map_err(error)
    }

    /// Binds a socket for the clients of a mapping. Replaces a socket on which no process listens.
    ///
    /// # Errors
    /// [`SocketFault`]; no file is left.
    pub(crate) fn listen(addr: &UnixAddr, permissions: &SocketPermissions) -> Result<Self, SocketFault> {
        let at = SockAddr::unix(addr.sun_path()).map_err(SocketFault::Bind)?;
        Self::bind_at(&at, addr.path(), permissions)
    }

    fn bind_at(
        addr: &SockAddr,
        path: Option<&Path>,
        permissions: &SocketPermissions,
    ) -> Result<Self, SocketFault> {
        path.map_or(Ok(()), remove_stale)?;
        let socket =
            Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).map_err(SocketFault::Bind)?;
        // The file gets the mode of the socket (unix_bind in net/unix/af_unix.c), so that nobody else can
        // ever connect.
        fchmod(socket.as_fd(), Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(|errno| SocketFault::Bind(errno.into()))?;
        socket.bind(addr).map_err(SocketFault::Bind)?;
        let file = path.map(|path| SocketFile::of_own(path.to_owned()));
        if let Some(file) = &file {
            // Before anybody can connect.
            set_permissions(file, permissions)?;
        }
        socket.listen(BACKLOG).map_err(SocketFault::Bind)?;
        Ok(Self { file, listener: socket.into() })
    }

    /// Adopts a socket that another process bound to `path`. The file belongs to that process until
    /// [`UnixSocket::own`].
    ///
    /// # Errors
    /// [`SocketFault::NotPassed`]
    pub fn adopt(option: &'static str, socket: OwnedFd, path: &Path) -> Result<Self, SocketError> {
        let error = |reason: String| SocketError::new(option, path, SocketFault::NotPassed(reason));
        let adopt = || -> io::Result<Option<Self>> {
            let socket = Socket::from(socket);
            let is_it = socket.local_addr()?.as_pathname() == Some(path) && socket.is_listener()?;
            if is_it { Self::adopt_listener(socket).map(Some) } else { Ok(None) }
        };
        let adopted = adopt().map_err(|source| error(source.to_string()))?;
        adopted.ok_or_else(|| error("it does not listen there".to_owned()))
    }

    /// Adopts a listening socket of another process, to which its file belongs.
    ///
    /// # Errors
    /// Those of getsockname(2) and fcntl(2).
    pub(crate) fn adopt_listener(socket: Socket) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let path = socket.local_addr()?.as_pathname().map(Path::to_owned);
        Ok(Self { file: path.map(SocketFile::of_another), listener: socket.into() })
    }

    /// Where it listens, if a mapping can be written that does.
    pub(crate) fn local_addr(&self) -> Option<UnixAddr> {
        let addr = self.listener.local_addr().ok()?;
        let path = addr.as_pathname().and_then(Path::to_str).map(str::to_owned);
        let name = addr.as_abstract_name().and_then(|name| std::str::from_utf8(name).ok());
        path.or_else(|| Some(format!("@{}", name?)))?.parse().ok()
    }

    /// Makes this process the owner of the file, which it then removes on exit.
    pub fn own(&mut self) {
        self.file.iter().for_each(SocketFile::own);
    }

    /// Splits into the listener and its file.
    pub(crate) fn into_parts(self) -> (UnixListener, Option<SocketFile>) {
        (self.listener, self.file)
    }

    /// Splits into the listener, and what is held until the end.
    ///
    /// # Errors
    /// Those of dup(2).
    pub(crate) fn into_held(self) -> io::Result<(UnixListener, HeldSocket)> {
        let socket = self.listener.try_clone()?.into();
        Ok((self.listener, HeldSocket { file: self.file, socket }))
    }
}

impl HeldSocket {
    /// Leaves the file to another process.
    pub(crate) fn leave(&mut self) {
        self.file.iter().for_each(SocketFile::leave);
    }
}

impl AsFd for HeldSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Sets who may connect to the socket of `file`, which this process has bound.
///
/// # Errors
/// [`SocketFault::Permissions`], and [`SocketFault::Replaced`] if the file is another one by now.
pub(crate) fn set_permissions(file: &SocketFile, permissions: &SocketPermissions) -> Result<(), SocketFault> {
    let opened = match file.open() {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(SocketFault::Bind(error)),
        opened => opened.ok().flatten().ok_or(SocketFault::Replaced)?,
    };
    let SocketPermissions { mode, user, group } = permissions;
    if let Some(user) = user.as_deref() {
        let given = accounts::user_id(user).and_then(|uid| give_to(&opened, Some(Uid::from_raw(uid)), None));
        given.map_err(|reason| SocketFault::permissions("socket_user", user, reason))?;
    }
    if let Some(group) = group.as_deref() {
        let given =
            accounts::group_id(group).and_then(|gid| give_to(&opened, None, Some(Gid::from_raw(gid))));
        given.map_err(|reason| SocketFault::permissions("socket_group", group, reason))?;
    }
    let mode = mode.unwrap_or(FileMode::PRIVATE);
    // There is no other way before Linux 6.6 (fchmodat2(2)) to the file of a descriptor that is for its path alone.
    let path = format!("/proc/self/fd/{}", opened.as_raw_fd());
    fs::set_permissions(path, fs::Permissions::from_mode(mode.bits())).map_err(|error| {
        let reason = format!("{error}; that takes the user who owns the file");
        SocketFault::permissions("socket_mode", &mode.to_string(), reason)
    })
}

/// Makes a user or a group the owner of an open file.
fn give_to(file: &File, user: Option<Uid>, group: Option<Gid>) -> Result<(), String> {
    fchownat(file, "", user, group, AtFlags::AT_EMPTY_PATH).map_err(|errno| {
        let error = io::Error::from(errno);
        format!(
            "{error}; that takes root, or for a group, to be in it, and a process that is not confined yet"
        )
    })
}

/// Removes the socket of a process that was killed.
fn remove_stale(path: &Path) -> Result<(), SocketFault> {
    match fs::symlink_metadata(path) {
        Err(_not_there) => return Ok(()),
        Ok(metadata) if !metadata.file_type().is_socket() => return Err(SocketFault::NotASocket),
        Ok(_socket) => {}
    }
    let found = identity(path);
    match probe(path) {
        // Not if another process has replaced it meanwhile.
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && identity(path) == found => {
            fs::remove_file(path).map_err(SocketFault::Bind)
        }
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EACCES)) => {
            Err(SocketFault::Bind(error))
        }
        _ => Err(SocketFault::InUse),
    }
}

/// Connects to a socket, without waiting for room in its backlog.
fn probe(path: &Path) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    socket.connect(&SockAddr::unix(path)?)
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
    /// Somebody listens on it, perhaps this process.
    #[error("somebody listens there already; give this one another path")]
    InUse,
    /// The path exists, but is not a socket.
    #[error("there is a file which is not a socket; give another path")]
    NotASocket,
    /// The file of the socket is another one.
    #[error("its file was replaced or removed by somebody else; remove the mapping and add it again")]
    Replaced,
    /// The passed socket is another one, for this reason.
    #[error("the socket that was passed cannot be used: {0}")]
    NotPassed(String),
    /// The file cannot have the mode or owner that is asked for.
    #[error("{option} = \"{value}\": {reason}")]
    Permissions {
        /// The option that asks for it.
        option: &'static str,
        /// Its value.
        value: String,
        /// Why.
        reason: String,
    },
    /// The kernel refused.
    #[error("cannot listen there: {}{}", explain(.0, 1), way_out(.0))]
    Bind(#[source] io::Error),
}

impl SocketFault {
    fn permissions(option: &'static str, value: &str, reason: String) -> Self {
        Self::Permissions { option, value: value.to_owned(), reason }
    }
}

/// As the error of a listener.
impl From<SocketFault> for io::Error {
    fn from(fault: SocketFault) -> Self {
        let kind = match &fault {
            SocketFault::InUse => io::ErrorKind::AddrInUse,
            SocketFault::Bind(source) => source.kind(),
            _ => io::ErrorKind::Other,
        };
        match fault {
            // Where it cannot listen is said by whoever reports it.
            SocketFault::Bind(source) => {
                Self::new(kind, format!("{}{}", explain(&source, 1), way_out(&source)))
            }
            fault => Self::new(kind, fault),
        }
    }
}

/// What would help against an error of bind(2) or socket(2).
fn way_out(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; create its directory first",
        io::ErrorKind::PermissionDenied => {
            "; give a path in a directory that this user may write to, and a confined process one where it has listened from \
             its start on"
        }
        io::ErrorKind::ReadOnlyFilesystem => "; give a path that can be written, as below /run",
        // The longest path is shorter than `sun_path` (unix(7)).
        io::ErrorKind::InvalidInput => "; give a path of less than 108 bytes",
        _ if error.raw_os_error() == Some(libc::ENOSYS) => {
            "; this process has given up Unix sockets when it was confined, as no mapping had one: restart it with this mapping"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::os::unix::net::UnixStream;

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
        let (_listener, mut held) = UnixSocket::bind("--control ", &path).unwrap().into_held().unwrap();
        let passed = || held.as_fd().try_clone_to_owned().unwrap();
        drop(UnixSocket::adopt("--control ", passed(), &path).unwrap());
        assert!(path.exists(), "it is still the other's");
        let mut adopted = UnixSocket::adopt("--control ", passed(), &path).unwrap();
        let elsewhere = UnixSocket::adopt("--control ", passed(), Path::new("/elsewhere")).unwrap_err();
        assert!(elsewhere.to_string().contains("does not listen there"), "{elsewhere}");
        let other = UnixStream::pair().unwrap().0;
        UnixSocket::adopt("--control ", other.into(), &path).unwrap_err();
        adopted.own();
        held.leave();
        drop(held);
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
    fn that_of_a_mapping_has_the_mode_and_owner_that_are_asked_for() {
        let path = path("asked");
        let addr: UnixAddr = format!("unix:{}", path.display()).parse().unwrap();
        let gid = nix::unistd::getegid();
        let permissions = |user: Option<&str>, mode: &str| SocketPermissions {
            mode: Some(mode.parse().unwrap()),
            user: user.map(Into::into),
            group: Some(gid.to_string().into()),
        };
        let socket = UnixSocket::listen(&addr, &permissions(None, "0666")).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.permissions().mode() & 0o7777, metadata.gid()), (0o666, gid.as_raw()));
        assert_eq!(socket.local_addr(), Some(addr.clone()));
        let file = socket.file.as_ref().unwrap();
        set_permissions(file, &permissions(None, "0660")).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o660);
        // What is there by then is not touched.
        let [moved, victim] = ["moved", "victim"].map(self::path);
        fs::write(&victim, "").unwrap();
        let before = fs::metadata(&victim).unwrap().permissions();
        fs::rename(&path, &moved).unwrap();
        std::os::unix::fs::symlink(&victim, &path).unwrap();
        let replaced = set_permissions(file, &permissions(None, "0666")).unwrap_err();
        assert!(matches!(replaced, SocketFault::Replaced) && !file.is_owned() && file.was_owned());
        assert_eq!(fs::metadata(&victim).unwrap().permissions(), before);
        fs::rename(&moved, &path).unwrap();
        fs::remove_file(&victim).unwrap();
        drop(socket);
        assert!(!path.exists());
        let unknown = UnixSocket::listen(&addr, &permissions(Some("no.such.user"), "0666")).unwrap_err();
        assert!(unknown.to_string().contains("socket_user = \"no.such.user\": no user"), "{unknown}");
        assert!(!path.exists(), "nothing is left");
    }

    #[test]
    fn an_abstract_one_has_no_file() {
        let addr: UnixAddr = format!("unix:@rproxy-{}", std::process::id()).parse().unwrap();
        let socket = UnixSocket::listen(&addr, &SocketPermissions::default()).unwrap();
        assert_eq!(socket.local_addr(), Some(addr.clone()));
        let taken = UnixSocket::listen(&addr, &SocketPermissions::default()).unwrap_err();
        assert_eq!(io::Error::from(taken).kind(), io::ErrorKind::AddrInUse);
        assert!(socket.into_parts().1.is_none());
    }

    #[test]
    fn a_full_backlog_is_somebody_who_listens() {
        let path = path("full");
        let listener = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
        listener.bind(&SockAddr::unix(&path).unwrap()).unwrap();
        listener.listen(0).unwrap();
        let _waits: Vec<_> = std::iter::from_fn(|| {
            let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None).unwrap();
            socket.connect(&SockAddr::unix(&path).unwrap()).is_ok().then_some(socket)
        })
        .collect();
        assert!(matches!(fault(&path), SocketFault::InUse));
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn it_replaces_nothing_but_a_socket() {
        let path = path("file");
        fs::write(&path, "precious").unwrap();
        assert!(matches!(fault(&path), SocketFault::NotASocket));
        fs::remove_file(&path).unwrap();
    }
}
