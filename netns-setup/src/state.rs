//! The state directory: what this program maintains, and the change in progress.

use std::fs::{DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, openat, renameat};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};
use serde::{Deserialize, Serialize};

use crate::model::Topology;

/// The default of `--state-dir`. `/run` is emptied by a reboot, like the network.
pub const DEFAULT_DIR: &str = "/run/netns-setup";

const FILE: &str = "state.json";
const NEW_FILE: &str = "state.json.new";

/// The content of the state file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// What is in place.
    pub current: Topology,
    /// The target of the change in progress. It is written before the first change and cleared after the
    /// last, so it remains if the command is killed in between.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending: Option<Topology>,
}

impl State {
    /// Everything that may exist and belongs to this program: an interrupted command may or may not have
    /// completed a step.
    #[must_use]
    pub fn owned(&self) -> Topology {
        match &self.pending {
            Some(pending) => pending.union(&self.current),
            None => self.current.clone(),
        }
    }
}

/// An error with the state directory.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The directory could not be created.
    #[error("cannot create the state directory {}: {source}; choose another with --state-dir", dir.display())]
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
    /// Other users could replace the state file.
    #[error("the state directory {} can be changed by other users: choose one that only its owner can write", .0.display())]
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
    /// The file has another format, possibly that of a later version.
    #[error("{} is not a state file of this version: {source}; remove what it lists by hand, then the file", file.display())]
    Syntax {
        /// The file.
        file: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
}

/// The state directory, open and locked: one command at a time.
#[derive(Debug)]
pub struct StateDir {
    dir: Flock<OwnedFd>,
    path: PathBuf,
}

impl StateDir {
    /// Opens `path` and waits for the lock; returns `None` if the directory does not exist.
    ///
    /// # Errors
    /// If it is not a directory, is writable by others, or cannot be locked.
    pub fn open(path: &Path) -> Result<Option<Self>, StateError> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = match nix::fcntl::open(path, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::ENOENT) => return Ok(None),
            Err(source) => {
                return Err(StateError::Open { dir: path.to_owned(), source });
            }
        };
        let stat = fstat(&fd).map_err(|source| StateError::Open { dir: path.to_owned(), source })?;
        let writable_by_others = stat.st_mode & 0o022 != 0;
        if writable_by_others || stat.st_uid != geteuid().as_raw() {
            return Err(StateError::Exposed(path.to_owned()));
        }
        // The directory itself is locked, because a separate lock file could be removed while a command waits
        // for it.
        let dir = Flock::lock(fd, FlockArg::LockExclusive)
            .map_err(|(_fd, source)| StateError::Lock { dir: path.to_owned(), source })?;
        Ok(Some(Self { dir, path: path.to_owned() }))
    }

    /// Like [`StateDir::open`], but creates the directory if it does not exist.
    ///
    /// # Errors
    /// Those of [`StateDir::open`], or if it cannot be created.
    pub fn create(path: &Path) -> Result<Self, StateError> {
        let failed = |source| StateError::Create { dir: path.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)?;
        Self::open(path)?.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))
    }

    /// Reads the state; empty if there is no file.
    ///
    /// # Errors
    /// If the file cannot be read or parsed.
    pub fn load(&self) -> Result<State, StateError> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = match openat(&*self.dir, FILE, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::ENOENT) => return Ok(State::default()),
            Err(errno) => return Err(self.failed("open", FILE)(errno.into())),
        };
        let mut text = String::new();
        File::from(fd).read_to_string(&mut text).map_err(self.failed("read", FILE))?;
        serde_json::from_str(&text)
            .map_err(|source| StateError::Syntax { file: self.path.join(FILE), source })
    }

    /// Replaces the state atomically: readers, and a restart after a crash, see the old file or the new one.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, state: &State) -> Result<(), StateError> {
        if *state == State::default() {
            return self.clear();
        }
        let text = serde_json::to_vec_pretty(state)
            .map_err(|source| StateError::Syntax { file: self.path.join(FILE), source })?;
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(&*self.dir, NEW_FILE, flags, Mode::S_IRUSR | Mode::S_IWUSR)
            .map_err(|errno| self.failed("create", NEW_FILE)(errno.into()))?;
        let mut file = File::from(fd);
        file.write_all(&text).map_err(self.failed("write", NEW_FILE))?;
        file.sync_all().map_err(self.failed("sync", NEW_FILE))?;
        renameat(&*self.dir, NEW_FILE, &*self.dir, FILE)
            .map_err(|errno| self.failed("replace", FILE)(errno.into()))?;
        self.sync()
    }

    fn clear(&self) -> Result<(), StateError> {
        match unlinkat(&*self.dir, FILE, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => self.sync(),
            Err(errno) => Err(self.failed("remove", FILE)(errno.into())),
        }
    }

    fn sync(&self) -> Result<(), StateError> {
        nix::unistd::fsync(&*self.dir).map_err(|errno| self.failed("sync", "")(errno.into()))
    }

    fn failed(&self, step: &'static str, file: &str) -> impl FnOnce(io::Error) -> StateError {
        let file = self.path.join(file);
        move |source| StateError::File { step, file, source }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;
    use crate::model::{Endpoint, Netns};
    use crate::name::{Id, Name};

    fn private_dir() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    fn state_with(name: &str) -> State {
        let name: Name = name.parse().unwrap();
        let endpoint = Endpoint {
            id: Id::from_bytes([7; 32]),
            ip: [172, 17, 0, 2].into(),
            ip_requested: false,
            netns: Netns::made(&name),
            exposed: vec![],
            mappings: vec![],
        };
        let current = Topology { endpoints: [(name, endpoint)].into(), ..Topology::default() };
        State { current, pending: None }
    }

    #[test]
    fn what_was_saved_is_read_back() {
        let temp = private_dir();
        let dir = StateDir::create(&temp.path().join("a/b")).unwrap();
        assert_eq!(dir.load().unwrap(), State::default());
        let state = State { pending: Some(Topology::default()), ..state_with("web") };
        dir.save(&state).unwrap();
        assert_eq!(dir.load().unwrap(), state);
        assert!(!temp.path().join("a/b").join(NEW_FILE).exists());
    }

    #[test]
    fn an_empty_state_leaves_no_file() {
        let temp = private_dir();
        let dir = StateDir::create(temp.path()).unwrap();
        dir.save(&state_with("web")).unwrap();
        dir.save(&State::default()).unwrap();
        assert!(!temp.path().join(FILE).exists());
        dir.save(&State::default()).unwrap();
    }

    #[test]
    fn what_is_owned_is_the_old_and_the_new() {
        let old = state_with("old");
        let state = State { pending: Some(state_with("new").current), ..old };
        let names: Vec<_> = state.owned().endpoints.keys().map(ToString::to_string).collect();
        assert_eq!(names, ["new", "old"]);
    }

    #[test]
    fn symbolic_links_are_not_followed() {
        let temp = private_dir();
        let (real, link) = (temp.path().join("real"), temp.path().join("link"));
        let dir = StateDir::create(&real).unwrap();
        symlink(&real, &link).unwrap();
        assert!(matches!(StateDir::open(&link), Err(StateError::Open { .. })));

        let victim = temp.path().join("victim");
        std::fs::write(&victim, "precious").unwrap();
        symlink(&victim, real.join(NEW_FILE)).unwrap();
        assert!(dir.save(&state_with("web")).is_err());
        symlink(&victim, real.join(FILE)).unwrap();
        assert!(dir.load().is_err());
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "precious");
    }

    #[test]
    fn a_directory_that_others_can_write_is_refused() {
        let temp = private_dir();
        std::fs::set_permissions(temp.path(), PermissionsExt::from_mode(0o777)).unwrap();
        assert!(matches!(StateDir::open(temp.path()), Err(StateError::Exposed(_))));
    }

    #[test]
    fn one_command_at_a_time() {
        let temp = private_dir();
        let first = StateDir::create(temp.path()).unwrap();
        let path = temp.path().to_owned();
        let second = std::thread::spawn(move || StateDir::open(&path).unwrap().unwrap().load().unwrap());
        // Whenever the other thread gets here, it can only continue after this save.
        first.save(&state_with("web")).unwrap();
        drop(first);
        assert_eq!(second.join().unwrap(), state_with("web"));
    }
}
