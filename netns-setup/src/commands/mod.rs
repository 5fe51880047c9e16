//! The commands: each says what is wanted, and leaves it to `change` to get there.

mod attach;
mod change;
mod check;
mod publish;
mod show;
mod up;

use std::path::PathBuf;

use serde_json::{Value, json};

pub use attach::{Attach, NetnsChoice};
pub use publish::{Publish, Unpublish};
pub use up::Up;

use crate::error::Error;
use crate::executor::Executor;
use crate::firewall::detect::Choice;
use crate::name::Name;
use crate::plan::Step;

/// What every command takes.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the state is.
    pub state_dir: PathBuf,
    /// Whether to say what would be done instead of doing it.
    pub dry_run: bool,
    /// Which firewall; `None` for whichever the network has.
    pub firewall: Option<Choice>,
    /// The relay's program; `None` to look for it.
    pub rproxy: Option<PathBuf>,
}

/// A command with its arguments.
#[derive(Debug, Clone)]
pub enum Command {
    /// Brings the network up.
    Up(Up),
    /// Takes everything down.
    Down,
    /// Adds a container.
    Attach(Attach),
    /// Removes one.
    Detach(Name),
    /// Publishes ports.
    Publish(Publish),
    /// Takes that back.
    Unpublish(Unpublish),
    /// Lists the containers.
    List,
    /// Shows one container, or all, as `docker inspect` does.
    Inspect(Option<Name>),
    /// Compares what is there with the state.
    Check,
    /// Mends what differs.
    Repair,
}

/// What a command has to say.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// The steps that were done, or would be.
    pub steps: Vec<String>,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// The result for people.
    pub lines: Vec<String>,
    /// The result for programs.
    pub result: Value,
    /// The JSON output as a whole, of a command that only shows something.
    pub shown: Option<String>,
}

impl Report {
    fn of(steps: &[Step], lines: Vec<String>, result: Value) -> Self {
        let steps = steps.iter().map(ToString::to_string).collect();
        Self { steps, lines, result, ..Self::default() }
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
/// When it cannot be done; nothing has been changed then, unless the error says so.
pub fn run(command: &Command, options: &Options, executor: &mut dyn Executor) -> Result<Report, Error> {
    match command {
        Command::Up(up) => up.run(options, executor),
        Command::Down => up::down(options, executor),
        Command::Attach(attach) => attach.run(options, executor),
        Command::Detach(name) => attach::detach(name, options, executor),
        Command::Publish(publish) => publish.run(options, executor),
        Command::Unpublish(unpublish) => unpublish.run(options, executor),
        Command::List => show::list(options),
        Command::Inspect(name) => show::inspect(name.as_ref(), options),
        Command::Check => check::check(options),
        Command::Repair => check::repair(options, executor),
    }
}
