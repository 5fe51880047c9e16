//! The commands of the specification.

use std::fmt;

use super::error::CniError;

/// The value of `CNI_COMMAND`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Publish the ports of a container.
    Add,
    /// Publish them no more.
    Del,
    /// Compare what is there with what was set up.
    Check,
    /// Remove what no valid attachment has.
    Gc,
    /// Say whether an `ADD` is possible.
    Status,
    /// List the supported versions.
    Version,
}

impl Command {
    const ALL: [Self; 6] = [Self::Add, Self::Del, Self::Check, Self::Gc, Self::Status, Self::Version];

    /// Reads the value of `CNI_COMMAND`.
    ///
    /// # Errors
    /// If there is no such command.
    pub fn parse(text: &str) -> Result<Self, CniError> {
        let found = Self::ALL.into_iter().find(|command| command.to_string() == text);
        found.ok_or_else(|| {
            let known = Self::ALL.map(|command| command.to_string()).join(", ");
            CniError::Environment(format!("CNI_COMMAND {text:?} is not a command: use one of {known}"))
        })
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Gc => "GC",
            Self::Status => "STATUS",
            Self::Version => "VERSION",
        })
    }
}
