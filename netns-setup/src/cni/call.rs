//! What a runtime asks for: the environment and standard input (CNI specification 1.1.0, section 2).

use std::io::Read;
use std::path::PathBuf;

use serde_json::Value;

use super::attachment::{AttachmentId, check_name, is_interface};
use super::command::Command;
use super::conf::Conf;
use super::error::CniError;
use super::version::Version;

/// The longest configuration, in bytes. That of a container with all ports of two protocols has 15 MB.
const LONGEST_INPUT: u64 = 32 * 1024 * 1024;

/// The variables of the environment.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// `CNI_COMMAND`.
    pub command: Option<String>,
    /// `CNI_CONTAINERID`.
    pub container: Option<String>,
    /// `CNI_NETNS`.
    pub netns: Option<PathBuf>,
    /// `CNI_IFNAME`.
    pub interface: Option<String>,
}

impl Environment {
    /// That of this process. An empty variable is none.
    #[must_use]
    pub fn of_process() -> Self {
        let var = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let text = |name| var(name).map(|value| value.to_string_lossy().into_owned());
        Self {
            command: text("CNI_COMMAND"),
            container: text("CNI_CONTAINERID"),
            netns: var("CNI_NETNS").map(PathBuf::from),
            interface: text("CNI_IFNAME"),
        }
    }

    /// Refuses an environment that lacks what a command needs, or has what cannot be.
    fn check(&self, command: Command) -> Result<(), CniError> {
        let is_of_container = matches!(command, Command::Add | Command::Del | Command::Check);
        let needs_netns = matches!(command, Command::Add | Command::Check);
        let needed = [
            ("CNI_CONTAINERID", is_of_container, self.container.is_some()),
            ("CNI_NETNS", needs_netns, self.netns.is_some()),
            ("CNI_IFNAME", is_of_container, self.interface.is_some()),
        ];
        let missing: Vec<_> = needed
            .iter()
            .filter(|(_, is_needed, is_there)| *is_needed && !is_there)
            .map(|part| part.0)
            .collect();
        if !missing.is_empty() {
            return Err(CniError::Environment(format!("{command} needs {}", missing.join(", "))));
        }
        if let Some(container) = self.container.as_deref().filter(|_| is_of_container) {
            check_name("CNI_CONTAINERID", container).map_err(CniError::Environment)?;
        }
        match self.interface.as_deref().filter(|_| is_of_container) {
            Some(interface) if !is_interface(interface) => Err(CniError::Environment(format!(
                "CNI_IFNAME {interface:?} is not an interface name: use up to 15 bytes without '/', ':' and spaces"
            ))),
            _ => Ok(()),
        }
    }
}

/// A call of the plugin.
#[derive(Debug)]
pub struct Call {
    /// What to do.
    pub command: Command,
    /// For which attachment; `None` for commands that are not about one.
    pub attachment: Option<AttachmentId>,
    /// The configuration.
    pub conf: Conf,
}

/// What was understood of a call, so that also an error is answered in the right version.
#[derive(Debug)]
pub struct Understood {
    /// The version for the answer.
    pub version: Version,
    /// The call; `None` for `VERSION`, whose answer is there already.
    pub call: Result<Call, CniError>,
}

/// Reads a call of `command`.
#[must_use]
pub fn understand(command: Command, environment: &Environment, conf: &Value, text: &str) -> Understood {
    let version = match Version::of(conf) {
        Ok(version) => version,
        Err(error) => return Understood { version: Version::NEWEST, call: Err(error) },
    };
    let call = || {
        version.check_has(command)?;
        environment.check(command)?;
        let conf = match command {
            Command::Del | Command::Gc => Conf::read_to_remove(text)?,
            _ => Conf::read(text)?,
        };
        let of_container = environment.container.clone().zip(environment.interface.clone());
        let of_container = of_container
            .filter(|_| matches!(command, Command::Add | Command::Del | Command::Check))
            .map(|(container, interface)| AttachmentId { network: conf.name.clone(), container, interface });
        Ok(Call { command, attachment: of_container, conf })
    };
    Understood { version, call: call() }
}

/// Reads the command.
///
/// # Errors
/// If there is no such command.
pub fn command(environment: &Environment) -> Result<Command, CniError> {
    match &environment.command {
        Some(command) => Command::parse(command),
        None => Err(CniError::Environment("CNI_COMMAND is missing".to_owned())),
    }
}

/// Reads standard input: its text, and the JSON in it. An empty input is an empty object, which `VERSION` may have.
///
/// # Errors
/// If it cannot be read, or is no JSON.
pub fn read(input: &mut dyn Read) -> Result<(String, Value), CniError> {
    let mut text = String::new();
    input.take(LONGEST_INPUT).read_to_string(&mut text).map_err(CniError::Read)?;
    let json = if text.trim().is_empty() { "{}" } else { &text };
    let value = serde_json::from_str(json).map_err(CniError::Decode)?;
    Ok((text, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment() -> Environment {
        Environment {
            command: None,
            container: Some("c1".to_owned()),
            netns: Some("/run/netns/c1".into()),
            interface: Some("eth0".to_owned()),
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let none = Environment::default();
        let error = |command| none.check(command).unwrap_err().to_string();
        assert_eq!(error(Command::Add), "ADD needs CNI_CONTAINERID, CNI_NETNS, CNI_IFNAME");
        assert_eq!(error(Command::Del), "DEL needs CNI_CONTAINERID, CNI_IFNAME");
        none.check(Command::Gc).unwrap();
        environment().check(Command::Add).unwrap();
        let no_netns = Environment { netns: None, ..environment() };
        no_netns.check(Command::Del).unwrap();
        assert_eq!(no_netns.check(Command::Check).unwrap_err().code(), 4);
        assert!(command(&none).is_err());
        assert!(Command::parse("add").unwrap_err().to_string().contains("use one of ADD, DEL, CHECK"));
    }

    #[test]
    fn an_interface_that_cannot_be_is_refused() {
        for interface in ["a/b", "a:b", "..", "sixteen-letters-", "a b"] {
            let wrong = Environment { interface: Some(interface.to_owned()), ..environment() };
            assert_eq!(wrong.check(Command::Del).unwrap_err().code(), 4, "{interface}");
        }
    }
}
