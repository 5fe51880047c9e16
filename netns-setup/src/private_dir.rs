//! A directory that only its owner can change, whose files are replaced as a whole.

use std::fs::{DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, openat, renameat};
use nix::sys::stat::{FileStat, Mode, fstat, lstat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};

/// How often to open a directory that others remove.
const TRIES: usize = 100;

/// An error with such a directory.
#[derive(Debug, thiserror::Error)]
pub enum DirError {
    /// The directory could not be created.
    #[error("cannot create the state directory {}: {source}; choose another", dir.display())]
    Create {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The directory could not be opened; symbolic links are not followed.
    #[error("cannot open the state directory {}: {source}", dir.display())]
    Open {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: Errno,
    },
    /// Other users could replace the files.
    #[error("the directory {} can be changed by other users: make it root's alone, with `chown root` and `chmod 700`, if its files are to be trusted", .0.display())]
    Exposed(PathBuf),
    /// The lock could not be taken.
    #[error("cannot lock the state directory {}: {source}", dir.display())]
    Lock {
        /// The directory.
        dir: PathBuf,
        /// Why.
        source: Errno,
    },
    /// A file operation failed.
    #[error("cannot {step} {}: {source}", file.display())]
    File {
        /// What was tried.
        step: &'static str,
        /// With which file.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The directory, open and locked: one command at a time.
#[derive(Debug)]
pub struct PrivateDir {
    dir: Flock<OwnedFd>,
    path: PathBuf,
}

impl PrivateDir {
    /// Opens `path` and waits for the lock; returns `None` if the directory does not exist.
    ///
    /// # Errors
    /// If it is not a directory, is writable by others, or cannot be locked.
    pub fn open(path: &Path) -> Result<Option<Self>, DirError> {
        let mut opened = Self::open_once(path)?;
        for _try in 0..TRIES {
            if opened.as_ref().is_none_or(Self::is_at_path) {
                break;
            }
            // While this one waited for the lock, another one has removed the directory.
            opened = Self::open_once(path)?;
        }
        Ok(opened)
    }

    /// Whether the directory is still the one at its path.
    fn is_at_path(&self) -> bool {
        let identity = |stat: FileStat| (stat.st_dev, stat.st_ino);
        let own = fstat(&*self.dir).ok().map(identity);
        own.is_none() || own == lstat(&self.path).ok().map(identity)
    }

    fn open_once(path: &Path) -> Result<Option<Self>, DirError> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = match nix::fcntl::open(path, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::ENOENT) => return Ok(None),
            Err(source) => {
                return Err(DirError::Open { dir: path.to_owned(), source });
            }
        };
        let stat = fstat(&fd).map_err(|source| DirError::Open { dir: path.to_owned(), source })?;
        let writable_by_others = stat.st_mode & 0o022 != 0;
        if writable_by_others || stat.st_uid != geteuid().as_raw() {
            return Err(DirError::Exposed(path.to_owned()));
        }
        // The directory itself is locked, because a separate lock file could be removed while a command waits
        // for it.
        let dir = Flock::lock(fd, FlockArg::LockExclusive)
            .map_err(|(_fd, source)| DirError::Lock { dir: path.to_owned(), source })?;
        Ok(Some(Self { dir, path: path.to_owned() }))
    }

    /// Like [`PrivateDir::open`], but creates the directory if it does not exist.
    ///
    /// # Errors
    /// Those of [`PrivateDir::open`], or if it cannot be created.
    pub fn create(path: &Path) -> Result<Self, DirError> {
        let failed = |source| DirError::Create { dir: path.to_owned(), source };
        // Another one may remove it at once.
        for _try in 0..TRIES {
            DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
            if let Some(opened) = Self::open(path)? {
                return Ok(opened);
            }
        }
        Err(failed(io::ErrorKind::NotFound.into()))
    }

    /// Reads a file; `None` if there is none.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, DirError> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = match openat(&*self.dir, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::ENOENT) => return Ok(None),
            Err(errno) => return Err(self.failed("open", name)(errno.into())),
        };
        let mut bytes = Vec::new();
        File::from(fd).read_to_end(&mut bytes).map_err(self.failed("read", name))?;
        Ok(Some(bytes))
    }

    /// Replaces a file atomically: readers, and a restart after a crash, see the old file or the new one. Until then,
    /// its name ends in `.new`.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), DirError> {
        let new = format!("{name}.new");
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(&*self.dir, new.as_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(|errno| self.failed("create", &new)(errno.into()))?;
        let mut file = File::from(fd);
        file.write_all(bytes).map_err(self.failed("write", &new))?;
        file.sync_all().map_err(self.failed("sync", &new))?;
        renameat(&*self.dir, new.as_str(), &*self.dir, name)
            .map_err(|errno| self.failed("replace", name)(errno.into()))?;
        self.sync()
    }

    /// Removes a file, if it is there.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn remove(&self, name: &str) -> Result<(), DirError> {
        match unlinkat(&*self.dir, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => self.sync(),
            Err(errno) => Err(self.failed("remove", name)(errno.into())),
        }
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn sync(&self) -> Result<(), DirError> {
        nix::unistd::fsync(&*self.dir).map_err(|errno| self.failed("sync", "")(errno.into()))
    }

    fn failed(&self, step: &'static str, file: &str) -> impl FnOnce(io::Error) -> DirError {
        let file = self.path.join(file);
        move |source| DirError::File { step, file, source }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn symbolic_links_are_not_followed() {
        let temp = tempfile::tempdir().unwrap();
        let (real, link) = (temp.path().join("real"), temp.path().join("link"));
        let dir = PrivateDir::create(&real).unwrap();
        symlink(&real, &link).unwrap();
        assert!(matches!(PrivateDir::open(&link), Err(DirError::Open { .. })));

        let victim = temp.path().join("victim");
        std::fs::write(&victim, "precious").unwrap();
        symlink(&victim, real.join("file.new")).unwrap();
        assert!(dir.replace("file", b"new").is_err());
        symlink(&victim, real.join("file")).unwrap();
        assert!(dir.read("file").is_err());
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "precious");
    }

    #[test]
    fn a_directory_that_is_removed_is_none() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("state");
        let first = PrivateDir::create(&path).unwrap();
        let (there, gone) = (path.clone(), path.clone());
        let makers = std::thread::spawn(move || PrivateDir::create(&there).unwrap().replace("file", b"new"));
        let waiter = std::thread::spawn(move || PrivateDir::open(&gone).unwrap().map(|dir| dir.read("file")));
        // Whether the others wait for the lock by now or come later: what they get is there.
        std::fs::remove_dir(&path).unwrap();
        drop(first);
        makers.join().unwrap().unwrap();
        waiter.join().unwrap().transpose().unwrap();
        assert_eq!(std::fs::read_to_string(path.join("file")).unwrap(), "new");
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        std::fs::set_permissions(temp.path(), PermissionsExt::from_mode(0o777)).unwrap();
        assert!(matches!(PrivateDir::open(temp.path()), Err(DirError::Exposed(_))));
    }

    #[test]
    fn a_file_is_replaced_and_removed_as_a_whole() {
        let temp = tempfile::tempdir().unwrap();
        let dir = PrivateDir::create(&temp.path().join("a/b")).unwrap();
        assert_eq!(dir.read("file").unwrap(), None);
        dir.replace("file", b"one").unwrap();
        dir.replace("file", b"two").unwrap();
        assert_eq!(dir.read("file").unwrap().as_deref(), Some(&b"two"[..]));
        assert!(!dir.path().join("file.new").exists());
        dir.remove("file").unwrap();
        dir.remove("file").unwrap();
        assert_eq!(dir.read("file").unwrap(), None);
    }
}
