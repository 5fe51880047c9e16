//! The commands. Each defines a wanted state, and `change` applies it.

mod attach;
mod change;
mod check;
mod down;
mod locked;
mod orphaned;
mod own_ports;
mod publish;
mod restore;
mod show;
mod transparent;
mod up;

use std::path::PathBuf;

use serde_json::{Value, json};

pub use attach::{Attach, NetnsChoice};
pub use check::{Mended, mend};
pub use publish::{Publish, Target, Unpublish};
pub use transparent::Transparent;
pub use up::Up;

use crate::error::Error;
use crate::executor::Executor;
use crate::firewall::detect::Choice;
use crate::name::Name;
use crate::plan::Plan;

/// The options of all commands.
#[derive(Debug, Clone)]
pub struct Options {
    /// The state directory.
    pub state_dir: PathBuf,
    /// Whether to print the steps instead of taking them.
    pub dry_run: bool,
    /// The firewall; `None` for the one in use.
    pub firewall: Option<Choice>,
    /// The path of `rproxy`; `None` to search for it.
    pub rproxy: Option<PathBuf>,
}

/// A command with its arguments.
#[derive(Debug, Clone)]
pub enum Command {
    /// Brings the network up.
    Up(Up),
    /// Takes the network down.
    Down,
    /// Adds a container.
    Attach(Attach),
    /// Removes a container.
    Detach(Name),
    /// Publishes ports.
    Publish(Publish),
    /// Unpublishes ports.
    Unpublish(Unpublish),
    /// Sets up the return path to transparent sockets, takes it down, or compares it with the state.
    Transparent(Transparent),
    /// Lists the containers.
    List,
    /// Shows one container, or all, as `docker inspect` does.
    Inspect(Option<Name>),
    /// Compares the system with the state.
    Check,
    /// Repairs what differs.
    Repair,
}

/// The output of a command.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// The steps that were taken, or would be.
    pub steps: Vec<String>,
    /// Warnings for the user.
    pub warnings: Vec<String>,
    /// The result as text.
    pub lines: Vec<String>,
    /// The result as JSON.
    pub result: Value,
    /// The whole JSON output, of a command that only shows something.
    pub shown: Option<String>,
}

impl Report {
    fn of(plan: &Plan, lines: Vec<String>, result: Value) -> Self {
        let steps = plan.steps.iter().map(ToString::to_string).collect();
        Self { steps, lines, result, warnings: plan.warnings.clone(), ..Self::default() }
    }

    /// The same report, with further warnings before its own.
    fn warning(self, mut warnings: Vec<String>) -> Self {
        warnings.extend(self.warnings);
        Self { warnings, ..self }
    }

    /// The report as JSON.
    #[must_use]
    pub fn json(&self, dry_run: bool) -> String {
        if let Some(shown) = &self.shown {
            return shown.clone();
        }
        let whole = json!({
            "changed": !dry_run && !self.steps.is_empty(),
            "dry_run": dry_run,
            "steps": self.steps,
            "warnings": self.warnings,
            "result": self.result,
        });
        format!("{whole:#}")
    }
}

/// Runs a command.
///
/// # Errors
/// If it fails, nothing has changed, unless the error says so.
pub fn run(command: &Command, options: &Options, executor: &mut dyn Executor) -> Result<Report, Error> {
    match command {
        Command::Up(up) => up.run(options, executor),
        Command::Down => down::down(options, executor),
        Command::Attach(attach) => attach.run(options, executor),
        Command::Detach(name) => attach::detach(name, options, executor),
        Command::Publish(publish) => publish.run(options, executor),
        Command::Unpublish(unpublish) => unpublish.run(options, executor),
        Command::Transparent(transparent) => transparent.run(options, executor),
        Command::List => show::list(options),
        Command::Inspect(name) => show::inspect(name.as_ref(), options),
        Command::Check => check::check(options),
        Command::Repair => check::repair(options, executor),
    }
}
