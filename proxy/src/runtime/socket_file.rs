//! The file of a Unix socket that this process listens on.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::libc;

/// The file of a socket. Dropping it removes the file, which has to happen before the socket is closed: while
/// a process listens, no other one replaces its file.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Device and inode, because the file may have been replaced. `None` while it belongs to another process.
    identity: Mutex<Option<(u64, u64)>>,
}

impl SocketFile {
    /// The file of a socket that this process has bound.
    pub(crate) fn of_own(path: PathBuf) -> Self {
        let file = Self::of_another(path);
        file.own();
        file
    }

    /// The file of a socket that another process has bound.
    pub(crate) fn of_another(path: PathBuf) -> Self {
        Self { path, identity: Mutex::new(None) }
    }

    /// Makes this process its owner, which removes it in the end.
    pub(crate) fn own(&self) {
        *self.identity() = identity(&self.path);
    }

    /// Leaves it to another process.
    pub(crate) fn leave(&self) {
        *self.identity() = None;
    }

    /// Whether this process is its owner, and it is still the same.
    pub(crate) fn is_owned(&self) -> bool {
        let known = *self.identity();
        known.is_some() && identity(&self.path) == known
    }

    /// Whether this process is its owner, or was until somebody has replaced or removed it.
    pub(crate) fn was_owned(&self) -> bool {
        self.identity().is_some()
    }

    /// Opens the file itself, not what it may lead to, for whoever changes it; `None` if it is another one by now.
    ///
    /// # Errors
    /// Those of open(2).
    pub(crate) fn open(&self) -> io::Result<Option<File>> {
        let file =
            OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(&self.path)?;
        let metadata = file.metadata()?;
        let is_same = *self.identity() == Some((metadata.dev(), metadata.ino()));
        Ok((is_same && metadata.file_type().is_socket()).then_some(file))
    }

    /// Removes it, if this process is its owner and it is still the same.
    pub(crate) fn remove(&self) {
        let known = self.identity().take();
        if known.is_some() && identity(&self.path) == known {
            // If this fails, the file remains, and the next process replaces it.
            drop(fs::remove_file(&self.path));
        }
    }

    fn identity(&self) -> MutexGuard<'_, Option<(u64, u64)>> {
        self.identity.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Device and inode of what is at `path`.
pub(crate) fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}
