//! The versions of the CNI specification that this plugin knows.

use serde_json::{Value, json};

use super::command::Command;
use super::error::CniError;

/// All of them, the oldest first.
const SUPPORTED: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// A supported version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(usize);

impl Version {
    const V0_4_0: Self = Self(2);
    const V1_1_0: Self = Self(4);
    /// The newest one, for answers to callers who have not said which they know.
    pub const NEWEST: Self = Self(SUPPORTED.len() - 1);

    /// The version of a configuration. One without is older than 0.3.0.
    ///
    /// # Errors
    /// If this plugin does not support it.
    pub fn of(conf: &Value) -> Result<Self, CniError> {
        let Some(text) = conf.get("cniVersion").and_then(Value::as_str) else {
            return Err(unsupported("cniVersion is missing in the configuration"));
        };
        let found = SUPPORTED.iter().position(|known| *known == text);
        found.map(Self).ok_or_else(|| unsupported(&format!("cniVersion {text:?} is unknown")))
    }

    /// Refuses a command that this version does not have.
    ///
    /// # Errors
    /// If it does not have it.
    pub fn check_has(self, command: Command) -> Result<(), CniError> {
        let since = match command {
            Command::Add | Command::Del | Command::Version => Self(0),
            Command::Check => Self::V0_4_0,
            Command::Gc | Command::Status => Self::V1_1_0,
        };
        if self >= since {
            return Ok(());
        }
        let (since, own) = (since.as_str(), self.as_str());
        Err(unsupported(&format!("{command} exists since version {since}, not in {own}")))
    }

    /// As in `cniVersion`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        SUPPORTED[self.0]
    }
}

/// The versions, for people.
#[must_use]
pub fn supported() -> String {
    SUPPORTED.join(", ")
}

fn unsupported(what: &str) -> CniError {
    CniError::Version(format!("{what}; this plugin supports {}", supported()))
}

/// The answer to `VERSION`. It has the version of the question, whatever that is.
#[must_use]
pub fn answer(conf: &Value) -> String {
    let asked = conf.get("cniVersion").and_then(Value::as_str).unwrap_or(Version::NEWEST.as_str());
    json!({ "cniVersion": asked, "supportedVersions": SUPPORTED }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_have_their_commands() {
        let of = |text: &str| Version::of(&json!({ "cniVersion": text })).unwrap();
        assert!(of("0.3.1").check_has(Command::Check).is_err());
        assert!(of("0.4.0").check_has(Command::Check).is_ok());
        let error = of("1.0.0").check_has(Command::Gc).unwrap_err().to_string();
        assert!(error.starts_with("GC exists since version 1.1.0, not in 1.0.0"), "{error}");
        assert!(of("1.1.0").check_has(Command::Status).is_ok());
    }

    #[test]
    fn an_unknown_version_is_named_with_the_known_ones() {
        for conf in [json!({}), json!({ "cniVersion": "0.2.0" }), json!({ "cniVersion": 1 })] {
            let error = Version::of(&conf).unwrap_err();
            assert_eq!(error.code(), 1);
            assert!(error.to_string().ends_with("supports 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0"), "{error}");
        }
        assert!(answer(&json!({ "cniVersion": "9.0.0" })).contains(r#""cniVersion":"9.0.0""#));
    }
}
