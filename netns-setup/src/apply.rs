//! Applies a plan, and undoes it if a step fails.

use std::fmt;

use crate::action::Action;
use crate::executor::{ActionError, Executor};
use crate::plan::{Plan, Step};
use crate::state::StateError;

/// An action that failed.
#[derive(Debug)]
pub struct Failure {
    /// The equivalent command.
    pub command: String,
    /// The cause.
    pub source: ActionError,
}

impl Failure {
    /// That nobody can tell what a failed step has left.
    pub(crate) fn unknown(why: String) -> Self {
        Self { command: "compare the system with the state".to_owned(), source: ActionError::Unknown(why) }
    }

    /// Whether it is the failure of this step.
    pub(crate) fn is_of(&self, step: &Step) -> bool {
        self.command == step.action.to_string()
    }

    fn is_interruption(&self) -> bool {
        matches!(self.source, ActionError::Interrupted(_))
    }

    fn new(action: &Action, source: ActionError) -> Self {
        Self { command: action.to_string(), source }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A script has many lines; the first one names the tool.
        let command = self.command.lines().next().unwrap_or_default();
        write!(f, "{} (step: {command})", self.source)
    }
}

/// A plan that could not be applied.
#[derive(Debug)]
pub struct ApplyError {
    /// The step that failed.
    pub failed: Failure,
    /// What then could not be undone.
    pub left: Vec<Failure>,
    /// Why the state could not be written after that.
    pub unsaved: Option<StateError>,
    /// Whether the steps before stay, as in a repair, of which each is of use alone.
    pub is_kept: bool,
}

impl ApplyError {
    fn new(failed: Failure, left: Vec<Failure>) -> Box<Self> {
        Box::new(Self { failed, left, unsaved: None, is_kept: false })
    }
}

impl fmt::Display for ApplyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.failed)?;
        if self.is_kept {
            return f.write_str("; what was repaired before stays: run `netns-setup repair` for the rest");
        }
        if self.left.is_empty() && self.unsaved.is_none() {
            return f.write_str("; nothing was changed");
        }
        for failure in &self.left {
            write!(f, "; undoing it failed: {failure}")?;
        }
        if let Some(error) = &self.unsaved {
            write!(f, "; recording the state failed: {error}")?;
        }
        f.write_str("; run `netns-setup repair` or `netns-setup down`")
    }
}

impl std::error::Error for ApplyError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.failed.source)
    }
}

/// Applies every step, and then calls `save`, which records that they are done. If a step or `save` fails, or
/// a signal arrives, undoes the previous steps in reverse order, even if some of that fails. Returns the failures of steps
/// that may fail ([`Step::is_optional`](crate::plan::Step)).
///
/// # Errors
/// If a step or `save` fails, or a signal arrives. The step that failed may have had an effect.
pub fn apply(
    plan: &Plan,
    executor: &mut dyn Executor,
    save: impl FnOnce(&dyn Executor) -> Result<(), StateError>,
) -> Result<Vec<Failure>, Box<ApplyError>> {
    let mut tolerated = Vec::new();
    for (done, step) in plan.steps.iter().enumerate() {
        let result = match executor.interrupted() {
            Some(signal) => Err(ActionError::Interrupted(signal)),
            None => executor.run(&step.action),
        };
        match result.map_err(|source| Failure::new(&step.action, source)) {
            Ok(()) => {}
            Err(failed) if step.is_optional && !failed.is_interruption() => tolerated.push(failed),
            Err(failed) => {
                // What it may have set all the same is set back; what it may have made may be somebody else's.
                let done = done + usize::from(step.action.is_setting());
                return Err(ApplyError::new(failed, undo(plan, done, executor)));
            }
        }
    }
    save(executor).map(|()| tolerated).map_err(|error| {
        let failed = Failure { command: "record the state".to_owned(), source: error.into() };
        ApplyError::new(failed, undo(plan, plan.steps.len(), executor))
    })
}

/// Applies every step, also after failures and signals; returns the failures.
pub fn mend(plan: &Plan, executor: &mut dyn Executor) -> Vec<Failure> {
    let run = |action: &Action| executor.run(action).err().map(|source| Failure::new(action, source));
    plan.steps.iter().map(|step| &step.action).filter_map(run).collect()
}

/// Undoes the first `done` steps in reverse order; returns what could not be undone.
fn undo(plan: &Plan, done: usize, executor: &mut dyn Executor) -> Vec<Failure> {
    let mut left = Vec::new();
    for step in plan.steps[..done].iter().rev() {
        for action in &step.undo {
            if let Err(source) = executor.run(action) {
                left.push(Failure::new(action, source));
            }
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use nix::sys::signal::Signal;
    use rproxy_mapping::addr::Protocol;

    use super::*;
    use crate::host_ip::HostIp;
    use crate::name::Name;
    use crate::private_dir::DirError;
    use crate::reserve::ReserveError;

    /// Records the actions, and fails where it is told to.
    #[derive(Default)]
    struct Recording {
        log: Vec<String>,
        fail: Vec<&'static str>,
        namespaces: BTreeMap<Name, u64>,
        signal_after: Option<usize>,
    }

    impl Executor for Recording {
        fn run(&mut self, action: &Action) -> Result<(), ActionError> {
            let command = action.to_string();
            let fails = self.fail.contains(&command.as_str());
            self.log.push(command);
            if fails {
                Err(ActionError::Sysctl { key: "test".to_owned(), source: std::io::ErrorKind::Other.into() })
            } else {
                Ok(())
            }
        }

        fn reserve(&mut self, _: Protocol, _: HostIp, port: u16) -> Result<u16, ReserveError> {
            Ok(port)
        }

        fn namespaces(&self) -> &BTreeMap<Name, u64> {
            &self.namespaces
        }

        fn interrupted(&mut self) -> Option<Signal> {
            (self.signal_after == Some(self.log.len())).then_some(Signal::SIGINT)
        }
    }

    fn plan(names: &[&str]) -> Plan {
        let name = |text: &&str| -> Name { text.parse().unwrap() };
        let step = |text| Step {
            action: Action::AddNetns(name(text)),
            undo: vec![Action::DeleteNetns(name(text))],
            is_optional: false,
        };
        Plan { steps: names.iter().map(step).collect(), ..Plan::default() }
    }

    #[test]
    fn steps_run_in_order() {
        let mut executor = Recording::default();
        apply(&plan(&["a", "b"]), &mut executor, |_| Ok(())).unwrap();
        assert_eq!(executor.log, ["ip netns add a", "ip netns add b"]);
    }

    #[test]
    fn what_cannot_be_written_down_is_undone() {
        let mut executor = Recording::default();
        let save = |_: &dyn Executor| Err(DirError::Exposed("/nonexistent".into()).into());
        let error = apply(&plan(&["a", "b"]), &mut executor, save).unwrap_err();
        assert_eq!(executor.log[2..], ["ip netns delete b", "ip netns delete a"]);
        assert!(error.to_string().contains("/nonexistent"), "{error}");
    }

    #[test]
    fn a_signal_ends_it_before_the_next_step() {
        let mut executor = Recording { signal_after: Some(1), ..Recording::default() };
        let error = apply(&plan(&["a", "b"]), &mut executor, |_| Ok(())).unwrap_err();
        assert_eq!(executor.log, ["ip netns add a", "ip netns delete a"]);
        assert!(error.to_string().starts_with("ended by SIGINT"), "{error}");
    }

    #[test]
    fn what_was_done_is_undone_last_first() {
        let mut executor = Recording { fail: vec!["ip netns add c"], ..Recording::default() };
        let error = apply(&plan(&["a", "b", "c", "d"]), &mut executor, |_| Ok(())).unwrap_err();
        assert_eq!(executor.log[3..], ["ip netns delete b", "ip netns delete a"]);
        assert!(error.left.is_empty());
        assert!(error.to_string().ends_with("nothing was changed"), "{error}");
    }

    #[test]
    fn a_value_is_set_back_even_if_setting_it_has_failed() {
        let set = |value: &str| Action::SetSysctl { key: "a".to_owned(), value: value.to_owned() };
        let step = Step { action: set("1"), undo: vec![set("0")], is_optional: false };
        let mut executor = Recording { fail: vec!["sysctl -w a=1"], ..Recording::default() };
        apply(&Plan { steps: vec![step], ..Plan::default() }, &mut executor, |_| Ok(())).unwrap_err();
        assert_eq!(executor.log, ["sysctl -w a=1", "sysctl -w a=0"]);
    }

    #[test]
    fn a_step_that_may_fail_stops_nothing() {
        let mut executor = Recording { fail: vec!["ip netns add b"], ..Recording::default() };
        let mut plan = plan(&["a", "b", "c"]);
        plan.steps[1].is_optional = true;
        let tolerated = apply(&plan, &mut executor, |_| Ok(())).unwrap();
        assert_eq!(executor.log, ["ip netns add a", "ip netns add b", "ip netns add c"]);
        assert!(tolerated[0].to_string().ends_with("(step: ip netns add b)"), "{tolerated:?}");
    }

    #[test]
    fn mending_goes_on_after_failures_and_signals() {
        let fail = vec!["ip netns add a"];
        let mut executor = Recording { fail, signal_after: Some(1), ..Recording::default() };
        assert_eq!(mend(&plan(&["a", "b"]), &mut executor).len(), 1);
        assert_eq!(executor.log, ["ip netns add a", "ip netns add b"]);
    }

    #[test]
    fn undoing_goes_on_and_reports_everything() {
        let fail = vec!["ip netns add c", "ip netns delete b"];
        let mut executor = Recording { fail, ..Recording::default() };
        let error = apply(&plan(&["a", "b", "c"]), &mut executor, |_| Ok(())).unwrap_err();
        assert_eq!(executor.log.last().unwrap(), "ip netns delete a");
        assert_eq!(error.left.len(), 1);
        assert!(error.to_string().contains("repair"), "{error}");
    }
}
