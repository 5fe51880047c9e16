//! Changes the system from the current to the wanted state, tolerating failures and crashes.

use std::path::Path;

use super::Options;
use super::locked::LockedState;
use crate::action::Action;
use crate::apply::{self, ApplyError, Failure};
use crate::error::Error;
use crate::executor::Executor;
use crate::model::Topology;
use crate::observe::{observe, observe_rest};
use crate::observed::Observed;
use crate::plan::{self, Inputs, Plan, PlanError, Scope};
use crate::registry::{self, Other};
use crate::relay;
use crate::state::{State, StateError};

impl LockedState {
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
        let task = Task { scope, options, tolerated: Tolerated::Nothing, others: &others };
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
        let task = Task { scope: &Scope::All, options, tolerated: Tolerated::Relay, others: &others };
        self.carry_out(desired, &task, executor)
    }

    /// Like [`LockedState::restore`], but nothing that cannot be repaired hinders anything else: it is a problem of the
    /// plan.
    pub(super) fn repair(
        &mut self,
        desired: Topology,
        options: &Options,
        executor: &mut dyn Executor,
    ) -> Result<Plan, Error> {
        // Nothing new is claimed that they could have.
        let others = self.others().unwrap_or_default();
        let task = Task { scope: &Scope::All, options, tolerated: Tolerated::Everything, others: &others };
        match &self.unusable {
            Some(why) => self.repair_unrecorded(why, &task, executor),
            None => self.carry_out(desired, &task, executor),
        }
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
        let is_tolerant = task.tolerated == Tolerated::Everything;
        let is_repair = is_tolerant && owned == desired;
        if task.tolerated != Tolerated::Nothing && owned == desired {
            // What cannot be repaired keeps nothing else from it.
            plan.steps.iter_mut().for_each(|step| step.is_optional = true);
        }
        if is_repair {
            // Each step is of use alone.
            plan.steps.iter_mut().for_each(|step| step.undo.clear());
        }
        let settled = self.restored.is_none()
            && !self.lacks_copy
            && self.state.pending.is_none()
            && self.state.current == desired;
        let nothing_to_do = settled && plan.is_empty();
        if task.options.dry_run || nothing_to_do {
            return Ok(plan);
        }
        if let Some(signal) = executor.interrupted() {
            return Err(Error::Interrupted(signal));
        }
        let before = self.state.clone();
        if !(settled && is_repair && plan.keeps_namespaces()) {
            match self.begin(&desired, &plan) {
                Err(Error::State(why)) if is_tolerant && (before.pending.is_none() || is_repair) => {
                    self.take_back(&before);
                    return self.repair_unrecorded(&why, task, executor);
                }
                other => other?,
            }
        }
        let failed =
            self.execute(&plan, Change { before, desired, observed: &observed, is_repair }, task, executor)?;
        note_failures(&mut plan, &failed);
        Ok(plan)
    }

    /// Records what is about to be done. An earlier command may have been interrupted, too: what it left stays ours.
    fn begin(&mut self, desired: &Topology, plan: &Plan) -> Result<(), Error> {
        let pending = Some(without_cookies(desired.clone(), plan));
        self.claim(State { current: self.state.owned(), pending })
    }

    /// Repairs what takes no new state, as none can be written.
    fn repair_unrecorded(
        &self,
        why: &StateError,
        task: &Task<'_>,
        executor: &mut dyn Executor,
    ) -> Result<Plan, Error> {
        let wanted = self.state.owned();
        let (observed, mut plan) = task.plan(&wanted, &wanted)?;
        if !plan.keeps_namespaces() {
            // They would not be known again.
            let kept = wanted.endpoints.keys().filter(|name| !plan.makes(name)).cloned().collect();
            plan = task.plan_from(&observed, &Scope::Only(kept), &wanted, &wanted)?;
        }
        task.check_relay(&mut plan)?;
        if self.unusable.is_some() {
            // It cannot be asked, and another one would take its place.
            plan.steps.retain(|step| !step.is_of_relay());
        }
        plan.steps.iter_mut().for_each(|step| (step.is_optional, step.undo) = (true, Vec::new()));
        if !task.options.dry_run {
            let failed = apply::apply(&plan, executor, |_| Ok(()))?;
            note_failures(&mut plan, &failed);
        }
        plan.problems.push(format!("{why}: only what takes no new state is repaired"));
        Ok(plan)
    }

    /// Returns the failures of steps that may fail.
    fn execute(
        &mut self,
        plan: &Plan,
        Change { before, desired, observed, is_repair }: Change<'_>,
        task: &Task<'_>,
        executor: &mut dyn Executor,
    ) -> Result<Vec<Failure>, Error> {
        let save = |executor: &dyn Executor| {
            let mut current = desired.clone();
            note(&mut current, observed, executor);
            forget_singles(&mut current, task.scope);
            let state = State { current, pending: None };
            if state == self.state { Ok(()) } else { self.save(state) }
        };
        let mut error = match apply::apply(plan, executor, save) {
            Ok(failed) => return Ok(failed),
            Err(error) => error,
        };
        if is_repair {
            error.is_kept = true;
            return Err(error.into());
        }
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
}

/// Counts failed steps as problems.
fn note_failures(plan: &mut Plan, failed: &[Failure]) {
    plan.steps.retain(|step| !failed.iter().any(|failed| failed.is_of(step)));
    plan.problems.extend(failed.iter().map(ToString::to_string));
}

/// From what to what, and what was observed before.
struct Change<'a> {
    before: State,
    desired: Topology,
    observed: &'a Observed,
    is_repair: bool,
}

/// A change that a command asks for.
struct Task<'a> {
    scope: &'a Scope,
    options: &'a Options,
    tolerated: Tolerated,
    /// The other networks of the host.
    others: &'a [Other],
}

/// What may fail while everything else is done.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tolerated {
    /// The change fails with any part of it.
    Nothing,
    /// The relay.
    Relay,
    /// Everything, and what somebody else has replaced is left to them.
    Everything,
}

impl Task<'_> {
    fn plan(&self, owned: &Topology, desired: &Topology) -> Result<(Observed, Plan), Error> {
        let observe = if self.tolerated == Tolerated::Everything { observe_rest } else { observe };
        let mut observed = observe(owned, desired, self.scope, &self.options.state_dir)?;
        observed.needed_elsewhere = registry::needed(self.others);
        let plan = self.plan_from(&observed, self.scope, owned, desired)?;
        Ok((observed, plan))
    }

    fn plan_from(
        &self,
        observed: &Observed,
        scope: &Scope,
        owned: &Topology,
        desired: &Topology,
    ) -> Result<Plan, PlanError> {
        let rproxy = relay::program(self.options.rproxy.as_deref());
        let rproxy = rproxy.as_deref().unwrap_or(Path::new("rproxy"));
        let (state_dir, is_repair) = (&self.options.state_dir, self.tolerated == Tolerated::Everything);
        plan::plan(Inputs { owned, desired, observed, scope, rproxy, state_dir, is_repair })
    }

    /// Fails if the relay is needed and cannot be started, or lets it fail.
    fn check_relay(&self, plan: &mut Plan) -> Result<(), Error> {
        let is_missing = plan.serves() && relay::program(self.options.rproxy.as_deref()).is_none();
        match self.tolerated {
            Tolerated::Nothing if is_missing => return Err(Error::NoRelay),
            Tolerated::Nothing => {}
            Tolerated::Relay | Tolerated::Everything if is_missing => {
                plan.steps.retain(|step| !step.serves());
                plan.problems.push(Error::NoRelay.to_string());
            }
            Tolerated::Relay | Tolerated::Everything => {
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
