//! The state of a network, locked against other commands, and the ways back to one that is lost.

use std::path::PathBuf;

use netlink_sys::protocols::NETLINK_ROUTE;

use super::Options;
use crate::error::Error;
use crate::firewall::detect::Choice;
use crate::model::{self, Firewall, Network, Topology};
use crate::name::Name;
use crate::netlink::{Client, link};
use crate::observe::{self, ObserveError};
use crate::registry::{Other, Registry};
use crate::state::{self, Found, State, StateDir, StateError};

/// The state, locked against other commands.
pub(super) struct LockedState {
    /// `None` if nothing may be written and there is no directory, or if it cannot be used.
    dir: Option<StateDir>,
    registry: Registry,
    pub(super) state: State,
    /// How a lost state was restored; it is not written yet.
    pub(super) restored: Option<String>,
    /// Why the directory cannot be used. The state comes from elsewhere then, and nothing is written.
    pub(super) unusable: Option<StateError>,
    /// Whether somebody has removed the copy, which `repair` writes again.
    pub(super) lacks_copy: bool,
}

/// What to do if the state file is missing or damaged.
#[derive(Clone, Copy)]
pub(super) enum Lost<'a> {
    /// Fail if there is a copy.
    Refuse,
    /// Restore it from the copy.
    Restore,
    /// Restore it from the copy, or from what this process has last known of a network that is still there. If the
    /// directory cannot be used, the system can be repaired nevertheless.
    Repair(Option<&'a State>),
}

impl LockedState {
    /// Opens the state for a change.
    pub(super) fn open(options: &Options) -> Result<Self, Error> {
        Self::open_with(options, Lost::Refuse)
    }

    /// Opens the state for a change that may also restore it.
    pub(super) fn open_with(options: &Options, lost: Lost<'_>) -> Result<Self, Error> {
        if !nix::unistd::geteuid().is_root() {
            return Err(Error::NotRoot);
        }
        if !options.dry_run {
            let probe = Client::open(NETLINK_ROUTE).and_then(|mut client| link::probe(&mut client));
            probe.map_err(Error::NotAllowed)?;
        }
        let path = &options.state_dir;
        let dir = if options.dry_run { StateDir::open(path) } else { StateDir::create(path).map(Some) };
        Self::load(dir, options, lost)
    }

    /// Opens the state for reading; if the directory does not exist, the state is empty.
    pub(super) fn open_to_read(options: &Options) -> Result<Self, Error> {
        Self::load(StateDir::open(&options.state_dir), options, Lost::Refuse)
    }

    fn load(
        dir: Result<Option<StateDir>, StateError>,
        options: &Options,
        lost: Lost<'_>,
    ) -> Result<Self, Error> {
        let registry = Registry::of(&options.state_dir).map_err(Error::Namespace)?;
        let loaded = dir.and_then(|dir| {
            let found = dir.as_ref().map_or(Ok(Found::Missing), StateDir::load)?;
            Ok((dir, found))
        });
        let (dir, found) = match loaded {
            Err(why @ StateError::Dir(_)) => return Self::without_dir(registry, lost, why),
            other => other?,
        };
        let file = options.state_dir.join(state::FILE);
        let opened = |registry, state, restored| {
            Ok(Self { dir, registry, state, restored, unusable: None, lacks_copy: false })
        };
        let (is_missing, why) = match found {
            Found::Whole(state) => {
                let lacks_copy = matches!(lost, Lost::Repair(_)) && matches!(registry.copy(), Ok(None));
                return opened(registry, state, None).map(|opened| Self { lacks_copy, ..opened });
            }
            Found::Missing => (true, "is missing".to_owned()),
            Found::Damaged(why) => (false, why),
        };
        match (registry.copy(), lost) {
            (Ok(Some(_)), Lost::Refuse) => Err(StateError::Lost { file, why }.into()),
            (Ok(Some(state)), Lost::Restore | Lost::Repair(_)) => {
                let note = format!("the state file {} {why}: it is restored from a copy", file.display());
                opened(registry, state, Some(note))
            }
            (Ok(None) | Err(_), Lost::Repair(Some(known))) if is_there(known)? => {
                let note = format!(
                    "the state file {} {why}, and so is its copy: both are restored from what this process has last known",
                    file.display()
                );
                opened(registry, known.clone(), Some(note))
            }
            (Err(error), _) => Err(error.into()),
            (Ok(None), _) if is_missing => opened(registry, State::default(), None),
            (Ok(None), _) => Err(StateError::Damaged { file, why }.into()),
        }
    }

    /// What is known without a directory that can be used.
    fn without_dir(registry: Registry, lost: Lost<'_>, why: StateError) -> Result<Self, Error> {
        let Lost::Repair(known) = lost else { return Err(why.into()) };
        let state = match (registry.copy(), known) {
            (Ok(Some(copy)), _) => copy,
            (_, Some(known)) if is_there(known)? => known.clone(),
            _ => return Err(why.into()),
        };
        Ok(Self { dir: None, registry, state, restored: None, unusable: Some(why), lacks_copy: false })
    }

    /// Like [`LockedState::open`], for commands that require a completed previous one.
    pub(super) fn open_settled(options: &Options) -> Result<Self, Error> {
        let locked = Self::open(options)?;
        if locked.state.pending.is_some() {
            return Err(Error::Unfinished);
        }
        if let (Some(choice), Some(network)) = (options.firewall, &locked.state.current.network) {
            check_firewall(choice, network)?;
        }
        Ok(locked)
    }

    /// Like [`LockedState::open`], for a change of what transparent sockets need: if the previous command was not
    /// completed, it may have changed only that.
    pub(super) fn open_for_transparent(options: &Options) -> Result<Self, Error> {
        let locked = Self::open(options)?;
        let current = &locked.state.current;
        let others =
            |pending: &Topology| pending.network != current.network || pending.endpoints != current.endpoints;
        if locked.state.pending.as_ref().is_some_and(others) { Err(Error::Unfinished) } else { Ok(locked) }
    }

    /// The network; fails if it is not up.
    pub(super) fn network(&self) -> Result<&Network, Error> {
        self.state.current.network.as_ref().ok_or(Error::NoNetwork)
    }

    /// The container whose identifier begins with `text`, if no container has that name, as Docker finds it.
    pub(super) fn by_id(&self, text: &Name) -> Result<Option<Name>, Error> {
        let endpoints = &self.state.current.endpoints;
        let mut found =
            endpoints.iter().filter(|(_, endpoint)| endpoint.id.as_str().starts_with(text.as_str()));
        match (endpoints.contains_key(text), found.next(), found.next()) {
            (true, _, _) | (_, None, _) => Ok(None),
            (_, Some((name, _)), None) => Ok(Some(name.clone())),
            (_, Some((one, _)), Some((another, _))) => {
                Err(Error::Ambiguous { text: text.clone(), one: one.clone(), another: another.clone() })
            }
        }
    }

    /// The states of other directories that serve the same host.
    pub(super) fn others(&self) -> Result<Vec<Other>, StateError> {
        self.registry.others(&self.state.owned())
    }

    /// A copy of a state on this host that cannot be read.
    pub(super) fn unreadable_copy(&self) -> Result<Option<PathBuf>, StateError> {
        self.registry.unreadable()
    }

    /// The files for kernel parameters that a network of any state directory has, in any network namespace.
    pub(super) fn persisted(&self) -> Result<Vec<PathBuf>, StateError> {
        let states = self.registry.all()?;
        let networks = states.into_iter().filter_map(|other| other.state.owned().network);
        Ok(networks.filter_map(|network| network.persist).collect())
    }

    /// A container; fails if it does not exist.
    pub(super) fn endpoint(&self, name: &Name) -> Result<&model::Endpoint, Error> {
        self.state.current.endpoints.get(name).ok_or_else(|| Error::NoContainer(name.clone()))
    }

    /// Writes the state, unless what is new in it belongs to another state directory.
    pub(super) fn claim(&mut self, state: State) -> Result<(), Error> {
        if let Some(dir) = &self.dir {
            self.registry.claim(&self.state.owned(), &state, || dir.save(&state))?;
        }
        self.note_saved(state);
        Ok(())
    }

    /// Writes the state that was before a claim that failed: what could be written of that would look like a command that
    /// was interrupted.
    pub(super) fn take_back(&self, before: &State) {
        // If nothing can be written, the old file is there.
        drop(self.dir.as_ref().map(|dir| dir.save(before)));
    }

    /// Writes the state.
    pub(super) fn save(&mut self, state: State) -> Result<(), StateError> {
        if let Some(dir) = &self.dir {
            self.registry.save(&state, || dir.save(&state))?;
        }
        self.note_saved(state);
        Ok(())
    }

    fn note_saved(&mut self, state: State) {
        self.state = state;
        self.restored = None;
        self.lacks_copy = false;
    }
}

/// Whether the network of a state is still there, so that nobody has taken it down.
fn is_there(state: &State) -> Result<bool, Error> {
    let Some(network) = state.owned().network else { return Ok(false) };
    let host = observe::side().map_err(ObserveError::Host)?;
    let bridge = host.link(network.bridge.as_str());
    Ok(bridge.is_some_and(|link| network.is_bridge(link.alias.as_deref(), link.mac)))
}

fn check_firewall(choice: Choice, network: &Network) -> Result<(), Error> {
    let wanted = match choice {
        Choice::Auto => return Ok(()),
        Choice::Nft => Firewall::Nft,
        Choice::Iptables => Firewall::Iptables,
        Choice::None => Firewall::None,
    };
    if wanted == network.firewall { Ok(()) } else { Err(Error::OtherFirewall(network.firewall)) }
}
