//! `down`: everything is removed, also what is left of a network whose state was lost.

use serde_json::json;

use super::locked::{LockedState, Lost};
use super::{Options, Report};
use crate::action::Action;
use crate::error::Error;
use crate::executor::Executor;
use crate::model::Topology;
use crate::name::IfName;
use crate::persist;
use crate::plan::{Scope, Step};
use crate::relayed::FILES;

/// Removes everything that this program created.
pub(super) fn down(options: &Options, executor: &mut dyn Executor) -> Result<Report, Error> {
    let mut locked = LockedState::open_with(options, Lost::Restore)?;
    let restored = locked.restored.clone();
    let mut orphans = locked.orphans()?.into_iter();
    let orphan = orphans.next();
    let mut rest = Vec::new();
    if let Some(orphan) = &orphan {
        // It fails before anything is removed.
        locked.state.current.network = Some(orphan.network()?);
        // The bridge is removed last: a `down` that was interrupted finds the network by it.
        rest = remove(orphan.rest()?, options, executor)?;
    }
    let mut plan = locked.change(Topology::default(), &Scope::All, options, executor)?;
    plan.steps.splice(..0, rest);
    let files = persist::leftovers(&locked.persisted()?).into_iter().map(Action::RemoveFile);
    plan.steps.extend(remove(files, options, executor)?);
    // A supervisor that was killed has left them.
    if !options.dry_run {
        FILES.iter().for_each(|name| drop(std::fs::remove_file(options.state_dir.join(name))));
    }
    let left = orphan.map(|orphan| orphan.left());
    let others: Vec<IfName> = orphans.map(|orphan| orphan.bridge()).collect();
    let more =
        others.iter().map(|bridge| format!("the state of {bridge} was lost, too: `down` again removes it"));
    let warnings =
        restored.into_iter().chain(left).chain(more).chain(plan.problems.iter().cloned()).collect();
    let line = match plan.steps.is_empty() {
        true => "nothing was up",
        false if !others.is_empty() => "one network whose state was lost is removed",
        false => "everything that netns-setup created is removed",
    };
    Ok(Report::of(&plan, vec![line.to_owned()], json!(null)).warning(warnings))
}

/// Removes what is not part of a topology. Returns the steps.
fn remove(
    actions: impl IntoIterator<Item = Action>,
    options: &Options,
    executor: &mut dyn Executor,
) -> Result<Vec<Step>, Error> {
    let steps: Vec<Step> = actions.into_iter().map(Step::on_fresh).collect();
    if !options.dry_run {
        steps.iter().try_for_each(|step| executor.run(&step.action)).map_err(Error::Leftover)?;
    }
    Ok(steps)
}
