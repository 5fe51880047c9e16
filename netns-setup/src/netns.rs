//! Network namespaces. The namespace is a property of the thread, so a separate thread enters one.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use rproxy_sys::socket::netns_cookie;
use socket2::{Domain, Socket, Type};

use crate::model::{NETNS_DIR, Netns};
use crate::name::Name;

/// An error with a namespace.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// The namespace could not be opened.
    #[error("cannot open the network namespace {}: {source}", path.display())]
    Open {
        /// Its path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is not a network namespace.
    #[error("{} is not a network namespace", .0.display())]
    NotOne(PathBuf),
    /// It is the namespace that this program runs in.
    #[error("{} is the host's own network namespace: name a container's", .0.display())]
    HostsOwn(PathBuf),
    /// The path refers to another namespace now.
    #[error("{} is another network namespace than the one that was attached: detach the container", .0.display())]
    Replaced(PathBuf),
    /// The namespace could not be entered.
    #[error("cannot enter the network namespace {}: {source}", path.display())]
    Enter {
        /// Its path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The namespace could not be created or deleted.
    #[error("cannot {step} {}: {source}", path.display())]
    Mount {
        /// The failed operation.
        step: &'static str,
        /// Its path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
}

/// An open namespace.
#[derive(Debug)]
pub struct Handle {
    file: File,
    path: PathBuf,
}

impl Handle {
    /// Opens the namespace of a container.
    ///
    /// # Errors
    /// If it is gone, or the path refers to another one.
    pub fn open(netns: &Netns) -> Result<Self, NetnsError> {
        let handle = Self::open_path(&netns.path)?;
        let cookie = netns.cookie.map(|known| Ok((known, handle.cookie()?))).transpose()?;
        let is_same = match (cookie, netns.identity) {
            (Some((known, Some(cookie))), _) => known == cookie,
            // Before Linux 5.14, or in a state of an earlier version.
            (_, Some(identity)) => handle.identity()? == identity,
            (_, None) => true,
        };
        if is_same { Ok(handle) } else { Err(NetnsError::Replaced(handle.path)) }
    }

    /// The kernel's number of the namespace; `None` before Linux 5.14.
    ///
    /// # Errors
    /// If it cannot be entered.
    pub fn cookie(&self) -> Result<Option<u64>, NetnsError> {
        let failed = |source| NetnsError::Enter { path: self.path.clone(), source };
        self.run(cookie)?.map_err(failed)
    }

    /// Opens the namespace at `path`.
    ///
    /// # Errors
    /// If there is none.
    pub fn open_path(path: &Path) -> Result<Self, NetnsError> {
        let open = || {
            OpenOptions::new().read(true).custom_flags(nix::libc::O_NOCTTY | nix::libc::O_NONBLOCK).open(path)
        };
        let file = open().map_err(|source| NetnsError::Open { path: path.to_owned(), source })?;
        Ok(Self { file, path: path.to_owned() })
    }

    /// Device and inode, which identify a namespace.
    ///
    /// # Errors
    /// If fstat(2) fails.
    pub fn identity(&self) -> Result<(u64, u64), NetnsError> {
        let failed = |source| NetnsError::Open { path: self.path.clone(), source };
        self.file.metadata().map(|meta| (meta.dev(), meta.ino())).map_err(failed)
    }

    /// Runs `work` in the namespace.
    ///
    /// # Errors
    /// If it cannot be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        let enter = || setns(&self.file, CloneFlags::CLONE_NEWNET);
        in_thread(enter, work).map_err(|source| match source.raw_os_error() {
            Some(number) if number == Errno::EINVAL as i32 => NetnsError::NotOne(self.path.clone()),
            _ => NetnsError::Enter { path: self.path.clone(), source },
        })
    }
}

impl AsFd for Handle {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Checks a namespace that the user passed, and records its identity.
///
/// # Errors
/// If it is not a network namespace, or is the host's own.
pub fn adopt(path: &Path) -> Result<Netns, NetnsError> {
    let handle = Handle::open_path(path)?;
    let identity = handle.identity()?;
    // Entering it is the only reliable check.
    let cookie = handle.cookie()?;
    if identity == Handle::open_path(Path::new("/proc/thread-self/ns/net"))?.identity()? {
        return Err(NetnsError::HostsOwn(path.to_owned()));
    }
    Ok(Netns { path: path.to_owned(), identity: Some(identity), cookie })
}

/// The number of the calling thread's namespace; `None` before Linux 5.14.
///
/// # Errors
/// If no socket can be opened.
pub fn cookie() -> io::Result<Option<u64>> {
    // Any socket has it, and this kind needs no network.
    let socket = Socket::new(Domain::UNIX, Type::DGRAM.cloexec(), None)?;
    match netns_cookie(socket.as_fd()) {
        Ok(cookie) => Ok(Some(cookie)),
        Err(error) if error.raw_os_error() == Some(Errno::ENOPROTOOPT as i32) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Runs `work` in a temporary namespace.
///
/// # Errors
/// If no namespace could be created.
pub fn scratch<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, io::Error> {
    in_thread(|| unshare(CloneFlags::CLONE_NEWNET), work)
}

fn in_thread<T: Send>(
    enter: impl FnOnce() -> nix::Result<()> + Send,
    work: impl FnOnce() -> T + Send,
) -> Result<T, io::Error> {
    thread::scope(|scope| {
        let body = || enter().map(|()| work());
        let handle = thread::Builder::new().name("netns".to_owned()).spawn_scoped(scope, body)?;
        match handle.join() {
            Ok(result) => result.map_err(io::Error::from),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Creates the namespace `name` where `ip netns` expects it; returns its cookie, as [`cookie`] does.
///
/// # Errors
/// If the name is taken or a mount fails; nothing is left behind.
pub fn add(name: &Name) -> Result<Option<u64>, NetnsError> {
    // A new namespace only lives as long as its thread, unless it is mounted.
    mount_at(name, |path| {
        scratch(|| {
            let cookie = cookie()?;
            bind(Path::new("/proc/thread-self/ns/net"), path)?;
            Ok(cookie)
        })?
    })
}

/// Mounts a namespace that was deleted, and that `handle` has kept alive, as `name` again; returns its cookie.
///
/// # Errors
/// Those of [`add`].
pub fn restore(name: &Name, handle: &Handle) -> Result<Option<u64>, NetnsError> {
    let cookie = handle.cookie()?;
    let own = PathBuf::from(format!("/proc/thread-self/fd/{}", handle.file.as_raw_fd()));
    mount_at(name, |path| bind(&own, path).map(|()| cookie))
}

fn bind(namespace: &Path, path: &Path) -> io::Result<()> {
    Ok(mount(Some(namespace), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
}

/// Creates the file for the namespace `name`, and lets `mount` mount one on it.
fn mount_at<T>(name: &Name, mount: impl FnOnce(&Path) -> io::Result<T>) -> Result<T, NetnsError> {
    prepare_dir()?;
    let path = Path::new(NETNS_DIR).join(name.as_str());
    let failed = |step: &'static str| {
        let path = path.clone();
        move |source| NetnsError::Mount { step, path, source }
    };
    match OpenOptions::new().write(true).create_new(true).mode(0o444).open(&path) {
        // Left behind by a run that was killed before the mount.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && is_leftover(&path) => {}
        other => other.map(drop).map_err(failed("create"))?,
    }
    mount(&path).map_err(|source| {
        let source = match std::fs::remove_file(&path) {
            Ok(()) => source,
            Err(second) => {
                io::Error::new(source.kind(), format!("{source}, and it could not be removed: {second}"))
            }
        };
        failed("mount a network namespace at")(source)
    })
}

/// Whether the file is empty and no namespace is mounted on it.
fn is_leftover(path: &Path) -> bool {
    let is_empty = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_file() && meta.len() == 0);
    is_empty
        && matches!(Handle::open_path(path).and_then(|handle| handle.run(|| ())), Err(NetnsError::NotOne(_)))
}

/// Deletes the namespace `name`; it ends when its last process does.
///
/// # Errors
/// If it cannot be unmounted.
pub fn delete(name: &Name) -> Result<(), NetnsError> {
    let path = Path::new(NETNS_DIR).join(name.as_str());
    match umount2(&path, MntFlags::MNT_DETACH) {
        // If its creation was interrupted, it is not mounted yet.
        Ok(()) | Err(Errno::EINVAL) => {}
        Err(errno) => {
            return Err(NetnsError::Mount { step: "unmount", path, source: errno.into() });
        }
    }
    std::fs::remove_file(&path).map_err(|source| NetnsError::Mount { step: "remove", path, source })
}

/// Whether what is mounted under `/run/netns` stays in the mount namespace of this process, which receives the mounts of
/// another one and passes none on: so it is under `ip netns exec`, and in services with private mounts.
#[must_use]
pub fn mounts_are_hidden() -> bool {
    std::fs::read_to_string("/proc/thread-self/mountinfo")
        .is_ok_and(|text| is_slave(&text, Path::new(NETNS_DIR)))
}

/// Whether the mount that `dir` is on is a slave (proc_pid_mountinfo(5), field 7).
fn is_slave(mountinfo: &str, dir: &Path) -> bool {
    let mounts = mountinfo.lines().filter_map(|line| {
        let (fields, _) = line.split_once(" - ")?;
        let mut fields = fields.split(' ').skip(4);
        let point = Path::new(fields.next()?);
        dir.starts_with(point)
            .then(|| (point.components().count(), fields.any(|field| field.starts_with("master:"))))
    });
    // The last one of a path covers the others.
    mounts.max_by_key(|(depth, _)| *depth).is_some_and(|(_, is_slave)| is_slave)
}

/// Creates `/run/netns` like `ip netns`: as a shared mount, so that all mount namespaces that share it see
/// namespaces created here and can delete them.
fn prepare_dir() -> Result<(), NetnsError> {
    let dir = Path::new(NETNS_DIR);
    let failed = |step: &'static str| move |source| NetnsError::Mount { step, path: dir.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o755).create(dir).map_err(failed("create"))?;
    let share = || mount(None::<&str>, dir, None::<&str>, MsFlags::MS_SHARED | MsFlags::MS_REC, None::<&str>);
    if share() == Ok(()) {
        return Ok(());
    }
    // It is not a mount point yet.
    mount(Some(dir), dir, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .map_err(|errno| failed("mount")(errno.into()))?;
    share().map_err(|errno| failed("share")(errno.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_that_passes_nothing_on_is_recognised() {
        let dir = Path::new("/run/netns");
        let root = "97 60 254:0 / / rw,relatime master:1 - ext4 /dev/vda rw";
        let run = "119 97 0:40 / /run rw,relatime shared:5 - tmpfs none rw";
        let own = "120 119 0:40 /netns /run/netns rw,relatime master:6 - tmpfs none rw";
        let inside = "121 120 0:4 net:[4026532320] /run/netns/h rw master:7 - nsfs nsfs rw";
        assert!(is_slave(root, dir));
        assert!(!is_slave(&format!("{root}\n{run}"), dir));
        assert!(is_slave(&format!("{root}\n{run}\n{own}\n{inside}"), dir));
        assert!(
            !is_slave(&format!("{own}\n{}", own.replace("master", "shared")), dir),
            "the last one counts"
        );
        assert!(!is_slave("", dir));
    }
}
