//! The state file: what this program maintains, and the change in progress.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::model::Topology;
use crate::private_dir::{DirError, PrivateDir};

/// Where the copies of states are. `/run` is emptied by a reboot, like the network.
pub const COPIES: &str = "/run/netns-setup-registry";

/// The default of `--state-dir`. `/run` is emptied by a reboot, like the network.
pub const DEFAULT_DIR: &str = "/run/netns-setup";

/// The state file in the state directory.
pub const FILE: &str = "state.json";

/// The version of the format. Only a change that an earlier program would misread takes another number; a field that it
/// can ignore, and that has a default, does not. Files without a number, of programs before there were any, are 0.
const VERSION: u64 = 2;

/// Changes with each boot, and with it all numbers of the kernel (random(4)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

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

    /// What is wanted: the target of the change in progress, or what is in place.
    #[must_use]
    pub fn desired(&self) -> &Topology {
        self.pending.as_ref().unwrap_or(&self.current)
    }

    /// The text of the file.
    ///
    /// # Errors
    /// If a path in it is not UTF-8.
    pub fn encode(&self) -> Result<Value, serde_json::Error> {
        let mut value = serde_json::to_value(self)?;
        value["version"] = VERSION.into();
        value["boot"] = boot().into();
        Ok(value)
    }

    /// Reads what [`State::encode`] made, now or in an earlier version.
    ///
    /// # Errors
    /// If it is of a later version, or makes no sense.
    pub fn decode(value: Value) -> Result<Self, Unreadable> {
        // A program before there were versions wrote none.
        let version = value.get("version").map_or(Some(0), Value::as_u64);
        match version {
            Some(0..=VERSION) => {}
            Some(version) => return Err(Unreadable::Newer(version)),
            None => return Err(Unreadable::Damaged("has no version".to_owned())),
        }
        let other_boot = value.get("boot").is_some_and(|known| *known != Value::from(boot()));
        let damaged = |error: serde_json::Error| Unreadable::Damaged(format!("makes no sense ({error})"));
        let mut state = Self::deserialize(value).map_err(damaged)?;
        if other_boot {
            state.current.forget_boot();
            state.pending.iter_mut().for_each(Topology::forget_boot);
        }
        Ok(state)
    }
}

fn boot() -> Option<String> {
    std::fs::read_to_string(BOOT_ID).ok().map(|id| id.trim().to_owned())
}

/// Why a state could not be read.
#[derive(Debug, PartialEq, Eq)]
pub enum Unreadable {
    /// A later program wrote it, in this version.
    Newer(u64),
    /// What is wrong with it.
    Damaged(String),
}

/// An error with the state.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The directory or a file in it could not be used.
    #[error(transparent)]
    Dir(#[from] DirError),
    /// The state cannot be written as JSON.
    #[error("cannot write {}: {source}", file.display())]
    Encode {
        /// The file.
        file: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// A later program wrote it.
    #[error("{} has version {version} of the format, and this netns-setup knows versions up to {VERSION}: use the newer netns-setup that wrote it", file.display())]
    Newer {
        /// The file.
        file: PathBuf,
        /// Its version.
        version: u64,
    },
    /// The file is missing or damaged, and there is a way back.
    #[error("the state file {} {why}: run `netns-setup repair` to restore it, or `netns-setup down`", file.display())]
    Lost {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// The file is damaged, and there is no copy.
    #[error("the state file {} {why}, and there is no whole copy of it in {}: remove it, and what `ip link`, `ip netns` and `nft list tables` show of it", file.display(), COPIES)]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// What is at the place of the state file.
#[derive(Debug, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "there is one of them in a run, and it is taken apart at once")]
pub enum Found {
    /// The state.
    Whole(State),
    /// No file.
    Missing,
    /// A file that makes no sense, and why.
    Damaged(String),
}

/// The whole state in a directory, if there is one. Without a lock: a command of that directory may change it.
#[must_use]
pub fn peek(dir: &Path) -> Option<State> {
    let value = serde_json::from_slice(&std::fs::read(dir.join(FILE)).ok()?).ok()?;
    State::decode(value).ok()
}

/// The state directory, open and locked: one command at a time.
#[derive(Debug)]
pub struct StateDir(PrivateDir);

impl StateDir {
    /// Opens `path` and waits for the lock; returns `None` if the directory does not exist.
    ///
    /// # Errors
    /// If it is not a directory, is writable by others, or cannot be locked.
    pub fn open(path: &Path) -> Result<Option<Self>, StateError> {
        Ok(PrivateDir::open(path)?.map(Self))
    }

    /// Like [`StateDir::open`], but creates the directory if it does not exist.
    ///
    /// # Errors
    /// Those of [`StateDir::open`], or if it cannot be created.
    pub fn create(path: &Path) -> Result<Self, StateError> {
        Ok(Self(PrivateDir::create(path)?))
    }

    /// Reads the state.
    ///
    /// # Errors
    /// If the file cannot be read, or is of a later version.
    pub fn load(&self) -> Result<Found, StateError> {
        let Some(bytes) = self.0.read(FILE)? else { return Ok(Found::Missing) };
        if bytes.iter().all(|byte| byte.is_ascii_whitespace() || *byte == 0) {
            return Ok(Found::Damaged("is empty".to_owned()));
        }
        let value = match serde_json::from_slice(&bytes) {
            Ok(value) => value,
            Err(error) if error.is_eof() => return Ok(Found::Damaged("is truncated".to_owned())),
            Err(error) => return Ok(Found::Damaged(format!("is not JSON ({error})"))),
        };
        match State::decode(value) {
            // An empty one is not written, so somebody has emptied it.
            Ok(state) if state == State::default() => Ok(Found::Missing),
            Ok(state) => Ok(Found::Whole(state)),
            Err(Unreadable::Newer(version)) => {
                Err(StateError::Newer { file: self.0.path().join(FILE), version })
            }
            Err(Unreadable::Damaged(why)) => Ok(Found::Damaged(why)),
        }
    }

    /// Replaces the state atomically: readers, and a restart after a crash, see the old file or the new one.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, state: &State) -> Result<(), StateError> {
        if *state == State::default() {
            return Ok(self.0.remove(FILE)?);
        }
        let failed = |source| StateError::Encode { file: self.0.path().join(FILE), source };
        let text = state.encode().and_then(|value| serde_json::to_vec_pretty(&value)).map_err(failed)?;
        Ok(self.0.replace(FILE, &text)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Endpoint, Netns};
    use crate::name::{Id, Name};
    use crate::testdata;

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

    fn dir_with(text: &str) -> (tempfile::TempDir, StateDir) {
        let temp = tempfile::tempdir().unwrap();
        let dir = StateDir::create(temp.path()).unwrap();
        std::fs::write(temp.path().join(FILE), text).unwrap();
        (temp, dir)
    }

    #[test]
    fn what_was_saved_is_read_back() {
        let temp = tempfile::tempdir().unwrap();
        let dir = StateDir::create(&temp.path().join("a/b")).unwrap();
        assert_eq!(dir.load().unwrap(), Found::Missing);
        let state = State { pending: Some(Topology::default()), ..state_with("web") };
        dir.save(&state).unwrap();
        assert_eq!(dir.load().unwrap(), Found::Whole(state));
    }

    #[test]
    fn an_empty_state_leaves_no_file() {
        let temp = tempfile::tempdir().unwrap();
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
    fn a_file_of_before_there_were_versions_is_read() {
        let mut old = state_with("web").encode().unwrap();
        old.as_object_mut().unwrap().remove("version");
        old.as_object_mut().unwrap().remove("boot");
        let (_temp, dir) = dir_with(&old.to_string());
        assert_eq!(dir.load().unwrap(), Found::Whole(state_with("web")));
    }

    #[test]
    fn a_file_of_a_later_version_is_refused() {
        let mut new = state_with("web").encode().unwrap();
        new["version"] = 99.into();
        let (_temp, dir) = dir_with(&new.to_string());
        let error = dir.load().unwrap_err().to_string();
        assert!(error.contains("version 99") && error.contains("up to 2"), "{error}");
    }

    #[test]
    fn a_damaged_file_is_told_from_a_missing_one() {
        let whole = state_with("web").encode().unwrap().to_string();
        for (text, expected) in [
            ("", "is empty"),
            ("\n", "is empty"),
            ("\0\0\0", "is empty"),
            (&whole[..whole.len() / 2], "is truncated"),
            ("{}", "makes no sense"),
            ("[]", "makes no sense"),
            ("{\"version\": -1}", "has no version"),
            ("\u{1b}[31m", "is not JSON"),
        ] {
            let (_temp, dir) = dir_with(text);
            let found = dir.load().unwrap();
            assert!(
                matches!(&found, Found::Damaged(why) if why.starts_with(expected)),
                "{text:?}: {found:?}"
            );
        }
    }

    #[test]
    fn after_a_reboot_no_process_or_namespace_is_the_recorded_one() {
        let mut topology = testdata::story();
        let web = topology.endpoints.values_mut().next().unwrap();
        web.netns.cookie = Some(7);
        web.mappings[0].relay = Some(crate::model::RelayProcess { pid: 7, started: 7 });
        let mut value = State { current: topology, pending: None }.encode().unwrap();
        value["boot"] = "another".into();
        let state = State::decode(value).unwrap();
        let web = state.current.endpoints.values().next().unwrap();
        assert_eq!((web.netns.cookie, web.mappings[0].relay), (Some(0), None));
    }

    #[test]
    fn one_command_at_a_time() {
        let temp = tempfile::tempdir().unwrap();
        let first = StateDir::create(temp.path()).unwrap();
        let path = temp.path().to_owned();
        let second = std::thread::spawn(move || StateDir::open(&path).unwrap().unwrap().load().unwrap());
        // Whenever the other thread gets here, it can only continue after this save.
        first.save(&state_with("web")).unwrap();
        drop(first);
        assert_eq!(second.join().unwrap(), Found::Whole(state_with("web")));
    }
}
