//! `check` and `repair`: compare the state with the system.

use std::path::Path;

use serde_json::json;

use super::locked::{LockedState, Lost};
use super::restore::Restorable;
use super::{Options, Report};
use crate::error::{Error, finding};
use crate::executor::Executor;
use crate::firewall::detect;
use crate::model::Topology;
use crate::observe::observe_rest;
use crate::plan::{self, Inputs, Plan, Scope};
use crate::reserve;
use crate::state::State;

/// Reports the differences.
pub(super) fn check(options: &Options) -> Result<Report, Error> {
    let dry = Options { dry_run: true, ..options.clone() };
    let locked = LockedState::open(&dry)?;
    let owned = locked.state.owned();
    let Restorable { desired, waiting, given_up } =
        Restorable::look(&locked.state, locked.state.desired().clone(), options)?;
    let (desired, state_dir) = (&desired, options.state_dir.as_path());
    let observed = observe_rest(&owned, desired, &Scope::All, state_dir)?;
    let (owned, rproxy) = (&owned, Path::new("rproxy"));
    let inputs = Inputs {
        owned,
        desired,
        observed: &observed,
        scope: &Scope::All,
        rproxy,
        state_dir,
        is_repair: true,
    };
    // What is in the way of every change is a difference, too.
    let plan = plan::plan(inputs).map_err(|error| Error::Unmendable(vec![error.to_string()]))?;
    let interrupted = locked.state.pending.iter().map(|_| "an earlier command was interrupted".to_owned());
    let found = plan.steps.iter().map(|step| finding(&step.action));
    let problems = plan.problems.into_iter().chain(waiting).chain(taken_ports(&locked.state.current));
    differences(interrupted.chain(given_up).chain(found), problems)?;
    if let Some(orphan) = locked.orphans()?.first() {
        return Err(orphan.error());
    }
    if locked.state == State::default() {
        return Err(Error::NoNetwork);
    }
    let mut warnings = plan.warnings;
    warnings.extend(
        owned.network.as_ref().map(|network| detect::interference(network, owned)).unwrap_or_default(),
    );
    let lines = vec!["everything is as it should be".to_owned()];
    Ok(Report { lines, warnings, result: json!({ "differences": [] }), ..Report::default() })
}

/// Fails if something differs; the error says whether `repair` helps.
pub(super) fn differences(
    mendable: impl Iterator<Item = String>,
    problems: impl IntoIterator<Item = String>,
) -> Result<(), Error> {
    let mut all: Vec<_> = mendable.collect();
    let mendable = all.len();
    all.extend(problems);
    match (all.len() - mendable, mendable) {
        (0, 0) => Ok(()),
        (_, 0) => Err(Error::Unmendable(all)),
        (unmendable, _) => Err(Error::Differs { found: all, unmendable }),
    }
}

/// Warns about ports that only the kernel serves and on which another program listens. Nothing keeps them
/// bound, and traffic from outside does not reach that program. Each port is bound for a moment, which
/// traffic from outside does not notice.
fn taken_ports(topology: &Topology) -> impl Iterator<Item = String> {
    let unheld = topology.active().filter(|(_, _, mapping)| !mapping.via.has_relay());
    unheld.filter_map(|(name, _, mapping)| {
        let taken = reserve::bind(mapping.proto, mapping.host, mapping.host_port).err()?;
        Some(format!("{} of {name}: {taken}", mapping.key()))
    })
}

/// What [`mend`] has done.
#[derive(Debug)]
pub struct Mended {
    /// The steps that it took, and what no step can repair.
    pub plan: Plan,
    /// The state after it.
    pub state: State,
    /// How a lost state was restored.
    pub restored: Option<String>,
    /// What an interrupted command began, and is given up.
    pub given_up: Vec<String>,
}

impl Mended {
    /// Whether anything differed.
    #[must_use]
    pub fn is_changed(&self) -> bool {
        !self.plan.is_empty() || self.restored.is_some()
    }
}

/// Repairs what differs, and finishes an interrupted command. `known` is the state after the last repair of this process,
/// from which a lost one is restored if there is no copy, either.
///
/// # Errors
/// If the system cannot be observed, or a step fails.
pub fn mend(options: &Options, known: Option<&State>, executor: &mut dyn Executor) -> Result<Mended, Error> {
    let mut locked = LockedState::open_with(options, Lost::Repair(known))?;
    let restored = locked.restored.clone();
    if locked.unusable.is_some() {
        // No port can be passed to the relay, which has those that it serves.
        let desired = locked.state.owned();
        let plan = locked.repair(desired, options, executor)?;
        return Ok(Mended { plan, state: locked.state, restored, given_up: Vec::new() });
    }
    let Restorable { desired, waiting, given_up } =
        Restorable::reserve(&locked.state, locked.state.desired().clone(), options, executor)?;
    let mut plan = locked.repair(desired, options, executor)?;
    plan.problems.extend(waiting);
    plan.problems.extend(locked.orphans()?.iter().map(|orphan| orphan.error().to_string()));
    Ok(Mended { plan, state: locked.state, restored, given_up })
}

/// The command `repair`.
pub(super) fn repair(options: &Options, executor: &mut dyn Executor) -> Result<Report, Error> {
    let Mended { plan, state, restored, given_up } = mend(options, None, executor)?;
    let problems: Vec<_> = plan.problems.iter().cloned().chain(taken_ports(&state.current)).collect();
    if !problems.is_empty() {
        return Err(Error::Unmendable(problems.into_iter().chain(given_up).collect()));
    }
    let warnings = restored.iter().cloned().chain(given_up).collect();
    let line = match plan.steps.len() {
        0 if state == State::default() => "there is no network: nothing to repair".to_owned(),
        0 if restored.is_none() => "nothing to repair".to_owned(),
        0 => "the state is restored, and nothing else has to be repaired".to_owned(),
        1 => "repaired with 1 step".to_owned(),
        steps => format!("repaired with {steps} steps"),
    };
    Ok(Report::of(&plan, vec![line], json!(null)).warning(warnings))
}
