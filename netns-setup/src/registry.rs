//! Which state directories serve a network namespace, with a copy of each state.
//!
//! Several networks can be on one host, each with its state directory, and all of them share the host's ports. A copy
//! also leads back when a state file is lost: it is written whenever the state is.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;
use serde_json::{Value, json};

use crate::model::{Network, Topology};
use crate::private_dir::{DirError, PrivateDir};
use crate::shared::Shared;
use crate::state::{COPIES, FILE, State, StateError};
use crate::{living, netns, parameters};

/// The entry of one state directory.
#[derive(Debug, Clone)]
pub struct Registry {
    dir: PathBuf,
    state_dir: PathBuf,
    /// The namespace, in the names of files.
    namespace: String,
}

/// The state of another directory in the same network namespace.
#[derive(Debug, Clone)]
pub struct Other {
    /// The directory.
    pub state_dir: PathBuf,
    /// Its state.
    pub state: State,
}

impl Registry {
    /// The entry of `state_dir` for the network namespace of the calling thread.
    ///
    /// # Errors
    /// If the kernel does not say which namespace that is.
    pub fn of(state_dir: &Path) -> io::Result<Self> {
        Self::within(Path::new(COPIES), state_dir)
    }

    fn within(dir: &Path, state_dir: &Path) -> io::Result<Self> {
        let state_dir = state_dir.canonicalize().or_else(|_| std::path::absolute(state_dir))?;
        let namespace = match netns::cookie()? {
            Some(cookie) => cookie.to_string(),
            None => format!("inode-{}", std::fs::metadata("/proc/thread-self/ns/net")?.ino()),
        };
        Ok(Self { dir: dir.to_owned(), state_dir, namespace })
    }

    /// The copy of the state, if there is one. Only root has it.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn copy(&self) -> Result<Option<State>, StateError> {
        if !geteuid().is_root() {
            return Ok(None);
        }
        let Some(dir) = PrivateDir::open(&self.dir)? else { return Ok(None) };
        let bytes = dir.read(&self.file())?;
        // The hash of another path may be the same.
        let entry = bytes.and_then(|bytes| read(&bytes)).filter(|entry| entry.state_dir == self.state_dir);
        Ok(entry.map(|entry| entry.state))
    }

    /// The states of other directories that serve this namespace, without those of the network `own`, whose directory
    /// was moved.
    ///
    /// # Errors
    /// If they cannot be listed.
    pub fn others(&self, own: &Topology) -> Result<Vec<Other>, StateError> {
        let Some(dir) = PrivateDir::open(&self.dir)? else { return Ok(Vec::new()) };
        self.others_in(&dir, own)
    }

    fn others_in(&self, dir: &PrivateDir, own: &Topology) -> Result<Vec<Other>, StateError> {
        let id = |topology: &Topology| topology.network.as_ref().map(|network| network.id.clone());
        let is_moved = |other: &Other| id(own).is_some() && id(own) == id(&other.state.owned());
        let mut others = self.entries(dir, |name| self.is_of_namespace(name))?;
        others.retain(|other| other.state_dir != self.state_dir && !is_moved(other));
        Ok(others)
    }

    /// The states of all directories, also those that serve other namespaces.
    ///
    /// # Errors
    /// If they cannot be listed.
    pub fn all(&self) -> Result<Vec<Other>, StateError> {
        let dir = PrivateDir::open(&self.dir)?;
        dir.map_or(Ok(Vec::new()), |dir| self.entries(&dir, |_name| true))
    }

    /// A copy for this namespace that makes no sense, or is of a later version.
    ///
    /// # Errors
    /// If they cannot be listed.
    pub fn unreadable(&self) -> Result<Option<PathBuf>, StateError> {
        let Some(dir) = PrivateDir::open(&self.dir)? else { return Ok(None) };
        let files = self.files(&dir, |name| self.is_of_namespace(name))?;
        Ok(files.into_iter().find_map(|(name, entry)| entry.is_none().then(|| self.dir.join(name))))
    }

    fn entries(&self, dir: &PrivateDir, is_meant: impl Fn(&str) -> bool) -> Result<Vec<Other>, StateError> {
        let files = self.files(dir, is_meant)?;
        let mut entries: Vec<Other> = files.into_iter().filter_map(|(_name, entry)| entry).collect();
        entries.sort_by(|one, another| one.state_dir.cmp(&another.state_dir));
        Ok(entries)
    }

    /// The files that are meant, each with what it says.
    fn files(
        &self,
        dir: &PrivateDir,
        is_meant: impl Fn(&str) -> bool,
    ) -> Result<Vec<(String, Option<Other>)>, StateError> {
        let failed = |source| DirError::File { step: "list", file: self.dir.clone(), source };
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let Some(name) = name.to_str().filter(|name| name.ends_with(".json") && is_meant(name)) else {
                continue;
            };
            if let Some(bytes) = dir.read(name)? {
                files.push((name.to_owned(), read(&bytes)));
            }
        }
        Ok(files)
    }

    fn is_of_namespace(&self, name: &str) -> bool {
        name.strip_prefix(&self.namespace).is_some_and(|rest| rest.starts_with('.'))
            && name.ends_with(".json")
    }

    /// Like [`Registry::save`], if what `state` adds to `before` belongs to no other directory: that is looked up under
    /// the lock of the registry.
    ///
    /// # Errors
    /// Those of [`Registry::save`], or a [`ClaimError::Shared`].
    pub fn claim(
        &self,
        before: &Topology,
        state: &State,
        save: impl FnOnce() -> Result<(), StateError>,
    ) -> Result<(), ClaimError> {
        let dir = PrivateDir::create(&self.dir).map_err(StateError::from)?;
        let desired = state.pending.as_ref().unwrap_or(&state.current);
        let others = self.others_in(&dir, &state.owned())?;
        match shared(before, desired, &others) {
            Some(shared) => Err(shared.into()),
            None => Ok(self.write(&dir, state, save)?),
        }
    }

    /// Writes the copy after `save` has written the state.
    ///
    /// # Errors
    /// What `save` returns, or if the copy cannot be written.
    pub fn save(
        &self,
        state: &State,
        save: impl FnOnce() -> Result<(), StateError>,
    ) -> Result<(), StateError> {
        self.write(&PrivateDir::create(&self.dir)?, state, save)
    }

    fn write(
        &self,
        dir: &PrivateDir,
        state: &State,
        save: impl FnOnce() -> Result<(), StateError>,
    ) -> Result<(), StateError> {
        save()?;
        if *state == State::default() {
            return Ok(dir.remove(&self.file())?);
        }
        let encode = |source| StateError::Encode { file: self.dir.join(self.file()), source };
        let entry = json!({ "state_dir": self.state_dir, "state": state.encode().map_err(encode)? });
        dir.replace(&self.file(), entry.to_string().as_bytes())?;
        self.clean(dir, &state.owned());
        Ok(())
    }

    /// Removes entries that lead nowhere: of the same network in a directory that was moved here, and of namespaces that have
    /// ended, if the directory has no state any more, either.
    fn clean(&self, dir: &PrivateDir, own: &Topology) {
        let own = own.network.as_ref().map(|network| &network.id);
        let mut ended = BTreeMap::<u64, Vec<String>>::new();
        for name in self.names().into_iter().filter(|name| *name != self.file()) {
            let Some(entry) = dir.read(&name).ok().flatten().and_then(|bytes| read(&bytes)) else { continue };
            let network = entry.state.owned().network;
            if self.is_of_namespace(&name) {
                let is_moved = own.is_some() && network.as_ref().map(|network| &network.id) == own;
                if is_moved {
                    drop(dir.remove(&name));
                }
            } else if !entry.state_dir.join(FILE).exists()
                && let Some(cookie) = name.split('.').next().and_then(|cookie| cookie.parse().ok())
            {
                ended.entry(cookie).or_default().push(name);
            }
        }
        let living = living::find(&ended.keys().copied().collect());
        let ended = ended.into_iter().filter(|(cookie, _)| !living.contains_key(cookie));
        // What cannot be removed is of no harm.
        ended.flat_map(|(_, names)| names).for_each(|name| drop(dir.remove(&name)));
    }

    /// The files of all entries.
    fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.dir).into_iter().flatten().filter_map(Result::ok);
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        names.filter(|name| name.ends_with(".json")).collect()
    }

    /// The name of the file: the namespace and a hash of the path, which can be longer than a name.
    fn file(&self) -> String {
        // FNV-1a. Collisions are harmless where the entry is compared.
        let hash =
            self.state_dir.as_os_str().as_encoded_bytes().iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
                (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
            });
        format!("{}.{hash:016x}.json", self.namespace)
    }
}

fn read(bytes: &[u8]) -> Option<Other> {
    let mut entry: Value = serde_json::from_slice(bytes).ok()?;
    let state_dir = entry.get("state_dir")?.as_str()?.into();
    Some(Other { state_dir, state: State::decode(entry.get_mut("state")?.take()).ok()? })
}

/// Why something was not claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Something in it belongs to another state directory.
    #[error(transparent)]
    Shared(#[from] Shared),
    /// It could not be written.
    #[error(transparent)]
    State(#[from] StateError),
}

/// The first thing that `desired` adds to `before` and that another directory has.
#[must_use]
pub fn shared(before: &Topology, desired: &Topology, others: &[Other]) -> Option<Shared> {
    others
        .iter()
        .find_map(|Other { state_dir, state }| Shared::between(before, desired, &state.owned(), state_dir))
}

/// The kernel parameters that the networks of other directories need.
#[must_use]
pub fn needed(others: &[Other]) -> BTreeSet<String> {
    let networks = others.iter().filter_map(|other| other.state.owned().network);
    let of = |network: Network| {
        let forwarding = parameters::forwarding(&network).into_iter().map(|needed| needed.key);
        forwarding.chain(network.sysctls.into_iter().map(|change| change.key))
    };
    networks.flat_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Firewall;
    use crate::shared::What;
    use crate::testdata;

    fn registry(temp: &tempfile::TempDir, state_dir: &str) -> Registry {
        Registry::within(&temp.path().join("registry"), &temp.path().join(state_dir)).unwrap()
    }

    fn state() -> State {
        State { current: testdata::story(), pending: None }
    }

    fn save(registry: &Registry, state: &State) -> Result<(), ClaimError> {
        registry.claim(&Topology::default(), state, || Ok(()))
    }

    #[test]
    fn a_copy_is_there_until_the_state_is_empty() {
        let temp = tempfile::tempdir().unwrap();
        let registry = registry(&temp, "one");
        assert_eq!(registry.copy().unwrap(), None);
        save(&registry, &state()).unwrap();
        let is_root = geteuid().is_root();
        assert_eq!(registry.copy().unwrap(), is_root.then(state));
        save(&registry, &State::default()).unwrap();
        assert_eq!(registry.copy().unwrap(), None);
    }

    #[test]
    fn a_state_that_was_not_saved_has_no_copy() {
        let temp = tempfile::tempdir().unwrap();
        let registry = registry(&temp, "one");
        let failed = || Err(DirError::Exposed("/x".into()).into());
        assert!(registry.save(&state(), failed).is_err());
        assert!(
            registry
                .others_in(&PrivateDir::open(&registry.dir).unwrap().unwrap(), &Topology::default())
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn what_another_directory_has_is_refused_by_its_name() {
        let temp = tempfile::tempdir().unwrap();
        let (one, two) = (registry(&temp, "one"), registry(&temp, "two"));
        save(&one, &state()).unwrap();
        let mut theirs = state();
        theirs.current.network.as_mut().unwrap().id = crate::name::Id::from_bytes([7; 32]);
        let error = save(&two, &theirs).unwrap_err().to_string();
        assert!(error.starts_with("the bridge docker0 belongs to") && error.contains("/one"), "{error}");
        theirs.current.network.as_mut().unwrap().bridge = "br7".parse().unwrap();
        let error = save(&two, &theirs).unwrap_err().to_string();
        assert!(
            error.contains("host port *:80/tcp is published by web of") && error.contains("/one"),
            "{error}"
        );
        theirs.current.endpoints.clear();
        save(&two, &theirs).unwrap();
        // What is there already can be changed and taken down.
        two.claim(&state().current, &state(), || Ok(())).unwrap();
    }

    #[test]
    fn transparent_sockets_and_dockers_chains_are_shared_too() {
        let others = |state: State| [Other { state_dir: "/x".into(), state }];
        let transparent = testdata::transparent(Firewall::Nft);
        let theirs = others(State { current: transparent.clone(), pending: None });
        let none = Topology::default();
        assert!(matches!(shared(&none, &transparent, &theirs).unwrap().what, What::Transparent));
        assert!(shared(&transparent, &transparent, &theirs).is_none());
        let mut ours = testdata::story();
        ours.network.as_mut().unwrap().firewall = Firewall::Iptables;
        let theirs = others(State { current: ours.clone(), pending: None });
        ours.network.as_mut().unwrap().bridge = "br7".parse().unwrap();
        assert!(matches!(shared(&none, &ours, &theirs).unwrap().what, What::Chains));
    }

    #[test]
    fn a_directory_that_was_moved_is_the_same_network() {
        let temp = tempfile::tempdir().unwrap();
        save(&registry(&temp, "one"), &state()).unwrap();
        save(&registry(&temp, "two"), &state()).unwrap();
        let left = registry(&temp, "two").names();
        assert_eq!(left, [registry(&temp, "two").file()], "it is not where it was");
    }

    #[test]
    fn entries_of_namespaces_that_have_ended_are_removed_with_their_state() {
        let temp = tempfile::tempdir().unwrap();
        let own = registry(&temp, "own");
        // No namespace has these numbers.
        let of =
            |namespace: &str, dir: &str| Registry { namespace: namespace.to_owned(), ..registry(&temp, dir) };
        let (ended, kept) = (of("1000000001", "ended"), of("1000000002", "kept"));
        std::fs::create_dir(temp.path().join("kept")).unwrap();
        std::fs::write(temp.path().join("kept").join(FILE), "").unwrap();
        for registry in [&ended, &kept, &own] {
            save(registry, &state()).unwrap();
        }
        let mut names = own.names();
        names.sort();
        let mut wanted = vec![kept.file(), own.file()];
        wanted.sort();
        assert_eq!(names, wanted);
    }
}
