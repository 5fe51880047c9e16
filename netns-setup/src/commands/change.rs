//! Changes the system from the current to the wanted state, tolerating failures and crashes.

use std::path::{Path, PathBuf};

use netlink_sys::protocols::NETLINK_ROUTE;

use super::Options;
use crate::action::Action;
use crate::apply::{self, ApplyError, Failure};
use crate::error::Error;
use crate::executor::Executor;
use crate::firewall::detect::Choice;
use crate::model::{Firewall, Network, Topology};
use crate::name::Name;
use crate::netlink::{Client, link};
use crate::observe::observe;
use crate::observed::Observed;
use crate::plan::{self, Inputs, Plan, Scope};
use crate::registry::{self, Other, Registry};
use crate::state::{self, Found, State, StateDir, StateError};
use crate::{model, relay};

/// The state, locked against other commands.
pub(super) struct LockedState {
    /// `None` if nothing may be written and there is no directory.
    dir: Option<StateDir>,
    registry: Registry,
    pub(super) state: State,
    /// How a lost state was restored; it is not written yet.
    pub(super) restored: Option<String>,
}

/// What to do if the state file is missing or damaged, and there is a copy.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lost {
    Refuse,
    Restore,
}

impl LockedState {
    /// Opens the state for a change.
    pub(super) fn open(options: &Options) -> Result<Self, Error> {
        Self::open_with(options, Lost::Refuse)
    }

    /// Opens the state for a change that also restores it if it is lost.
    pub(super) fn open_or_restore(options: &Options) -> Result<Self, Error> {
        Self::open_with(options, Lost::Restore)
    }

    fn open_with(options: &Options, lost: Lost) -> Result<Self, Error> {
        if !nix::unistd::geteuid().is_root() {
            return Err(Error::NotRoot);
        }
        if !options.dry_run {
            let probe = Client::open(NETLINK_ROUTE).and_then(|mut client| link::probe(&mut client));
            probe.map_err(Error::NotAllowed)?;
        }
        let path = &options.state_dir;
        let dir = if options.dry_run { StateDir::open(path)? } else { Some(StateDir::create(path)?) };
        Self::load(dir, options, lost)
    }

    /// Opens the state for reading; if the directory does not exist, the state is empty.
    pub(super) fn open_to_read(options: &Options) -> Result<Self, Error> {
        Self::load(StateDir::open(&options.state_dir)?, options, Lost::Refuse)
    }

    fn load(dir: Option<StateDir>, options: &Options, lost: Lost) -> Result<Self, Error> {
        let registry = Registry::of(&options.state_dir).map_err(Error::Namespace)?;
        let found = dir.as_ref().map_or(Ok(Found::Missing), StateDir::load)?;
        let file = options.state_dir.join(state::FILE);
        let (is_missing, why) = match found {
            Found::Whole(state) => return Ok(Self { dir, registry, state, restored: None }),
            Found::Missing => (true, "is missing".to_owned()),
            Found::Damaged(why) => (false, why),
        };
        let (state, restored) = match (registry.copy()?, lost) {
            (Some(_), Lost::Refuse) => return Err(StateError::Lost { file, why }.into()),
            (Some(state), Lost::Restore) => {
                let note = format!("the state file {} {why}: it is restored from a copy", file.display());
                (state, Some(note))
            }
            (None, _) if is_missing => (State::default(), None),
            (None, _) => return Err(StateError::Damaged { file, why }.into()),
        };
        Ok(Self { dir, registry, state, restored })
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

    /// Changes the system from the state to `desired`, or only prints how with `--dry-run`.
    ///
    /// The intent is written before the first step. If a step fails, the previous steps are undone and the
    /// state is as before. If this program is killed, both states are in the file, and `repair` or `down`
    /// continues.
    pub(super) fn change(
        &mut self,
        desired: Topology,
        scope: &Scope,
        options: &Options,
        executor: &mut dyn Executor,
    ) -> Result<Plan, Error> {
        let others = self.others()?;
        let task = Task { scope, options, relay: RelayFailure::Refused, others: &others };
        self.carry_out(desired, &task, executor)
    }

    /// Like [`LockedState::change`] of everything, but a relay that fails is a problem of the plan, and hinders nothing
    /// else.
    pub(super) fn restore(
        &mut self,
        desired: Topology,
        options: &Options,
        executor: &mut dyn Executor,
    ) -> Result<Plan, Error> {
        let others = self.others()?;
        let task = Task { scope: &Scope::All, options, relay: RelayFailure::Tolerated, others: &others };
        self.carry_out(desired, &task, executor)
    }

    fn carry_out(
        &mut self,
        desired: Topology,
        task: &Task<'_>,
        executor: &mut dyn Executor,
    ) -> Result<Plan, Error> {
        let owned = self.state.owned();
        if let Some(shared) = registry::shared(&owned, &desired, task.others) {
            return Err(shared.into());
        }
        let (observed, mut plan) = task.plan(&owned, &desired)?;
        task.check_relay(&mut plan)?;
        let is_repair = task.relay == RelayFailure::Tolerated && owned == desired;
        if is_repair {
            // What cannot be repaired keeps nothing else from it.
            plan.steps.iter_mut().for_each(|step| step.is_optional = true);
        }
        let settled =
            self.restored.is_none() && self.state.pending.is_none() && self.state.current == desired;
        let nothing_to_do = settled && plan.is_empty();
        if !(task.options.dry_run || nothing_to_do) {
            let failed = self.execute(&plan, desired, &observed, task, executor)?;
            plan.steps.retain(|step| !failed.iter().any(|failed| failed.is_of(step)));
            plan.problems.extend(failed.iter().map(ToString::to_string));
        }
        Ok(plan)
    }

    /// Returns the failures of steps that may fail.
    fn execute(
        &mut self,
        plan: &Plan,
        desired: Topology,
        observed: &Observed,
        task: &Task<'_>,
        executor: &mut dyn Executor,
    ) -> Result<Vec<Failure>, Error> {
        if let Some(signal) = executor.interrupted() {
            return Err(Error::Interrupted(signal));
        }
        let before = self.state.clone();
        // An earlier command may have been interrupted, too: what it left stays ours.
        self.claim(State { current: before.owned(), pending: Some(without_cookies(desired.clone(), plan)) })?;
        let save = |executor: &dyn Executor| {
            let mut current = desired.clone();
            note(&mut current, observed, executor);
            forget_singles(&mut current, task.scope);
            self.save(State { current, pending: None })
        };
        let mut error = match apply::apply(plan, executor, save) {
            Ok(failed) => return Ok(failed),
            Err(error) => error,
        };
        if before.pending.is_none() {
            task.widened(plan).undo_rest(&self.state.owned(), &before.current, &mut error, executor);
        }
        // Record what could not be undone.
        let (mut current, pending) = match error.left.is_empty() {
            true => (before.current, before.pending),
            false => (before.owned(), Some(desired)),
        };
        note(&mut current, observed, executor);
        error.unsaved = self.save(State { current, pending }).err();
        Err(error.into())
    }

    /// Writes the state, unless what is new in it belongs to another state directory.
    fn claim(&mut self, state: State) -> Result<(), Error> {
        if let Some(dir) = &self.dir {
            self.registry.claim(&self.state.owned(), &state, || dir.save(&state))?;
        }
        self.note_saved(state);
        Ok(())
    }

    fn save(&mut self, state: State) -> Result<(), StateError> {
        if let Some(dir) = &self.dir {
            self.registry.save(&state, || dir.save(&state))?;
        }
        self.note_saved(state);
        Ok(())
    }

    fn note_saved(&mut self, state: State) {
        self.state = state;
        self.restored = None;
    }
}

/// A change that a command asks for.
struct Task<'a> {
    scope: &'a Scope,
    options: &'a Options,
    relay: RelayFailure,
    /// The other networks of the host.
    others: &'a [Other],
}

/// What a relay that fails means for a change.
#[derive(Clone, Copy, PartialEq, Eq)]
enum RelayFailure {
    /// The change fails.
    Refused,
    /// Everything else is done.
    Tolerated,
}

impl Task<'_> {
    fn plan(&self, owned: &Topology, desired: &Topology) -> Result<(Observed, Plan), Error> {
        let state_dir = &self.options.state_dir;
        let mut observed = observe(owned, desired, self.scope, state_dir)?;
        observed.needed_elsewhere = registry::needed(self.others);
        let rproxy = relay::program(self.options.rproxy.as_deref());
        let rproxy = rproxy.as_deref().unwrap_or(Path::new("rproxy"));
        let plan =
            plan::plan(Inputs { owned, desired, observed: &observed, scope: self.scope, rproxy, state_dir })?;
        Ok((observed, plan))
    }

    /// Fails if the relay is needed and cannot be started, or lets it fail.
    fn check_relay(&self, plan: &mut Plan) -> Result<(), Error> {
        let is_missing = plan.serves() && relay::program(self.options.rproxy.as_deref()).is_none();
        match self.relay {
            RelayFailure::Refused if is_missing => return Err(Error::NoRelay),
            RelayFailure::Refused => {}
            RelayFailure::Tolerated if is_missing => {
                plan.steps.retain(|step| !step.serves());
                plan.problems.push(Error::NoRelay.to_string());
            }
            RelayFailure::Tolerated => {
                let serving = plan.steps.iter_mut().filter(|step| step.serves());
                serving.for_each(|step| step.is_optional = true);
            }
        }
        Ok(())
    }

    /// The same task, in whose observation rules of nft are compared if `plan` changes them.
    fn widened(&self, plan: &Plan) -> Task<'_> {
        let is_changed = plan.steps.iter().any(|step| matches!(step.action, Action::Nft(_)));
        let scope = match self.scope {
            Scope::Only(_) if is_changed => &Scope::All,
            scope => scope,
        };
        Task { scope, ..*self }
    }

    /// Takes back what a failed step has done in spite of that. Everything else is undone already, as far as `error` has
    /// nothing left.
    fn undo_rest(
        &self,
        owned: &Topology,
        before: &Topology,
        error: &mut ApplyError,
        executor: &mut dyn Executor,
    ) {
        match self.plan(owned, before) {
            Ok((_observed, rest)) => {
                let failed = apply::mend(&rest, executor);
                // What could not be undone a moment ago is part of the rest.
                error.left = failed;
            }
            Err(why) => error.left.push(Failure::unknown(why.to_string())),
        }
    }
}

/// The same, in which namespaces that are made again are not known yet: if this program is killed before it has recorded
/// their cookies, they are its own all the same.
fn without_cookies(mut topology: Topology, plan: &Plan) -> Topology {
    for step in &plan.steps {
        if let Action::AddNetns(name) = &step.action
            && let Some(endpoint) = topology.endpoints.get_mut(name)
        {
            endpoint.netns.cookie = None;
        }
    }
    topology
}

/// Records what only turned out when it was created: namespaces.
fn note(topology: &mut Topology, observed: &Observed, executor: &dyn Executor) {
    let made = executor.namespaces();
    for (name, endpoint) in &mut topology.endpoints {
        let known = made.get(name).or_else(|| observed.cookies.get(name));
        endpoint.netns.cookie = known.copied().or(endpoint.netns.cookie);
    }
}

/// Forgets the relays of an earlier version, which have ended.
fn forget_singles(topology: &mut Topology, scope: &Scope) {
    let endpoints = topology.endpoints.iter_mut().filter(|(name, _)| scope.contains(name));
    let mappings = endpoints.flat_map(|(_, endpoint)| &mut endpoint.mappings);
    mappings.for_each(|mapping| mapping.relay = None);
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
