//! What a runtime adds and deletes, and the names of its parts.

use std::fmt;

use serde::{Deserialize, Serialize};

/// An interface of a container in a network: what a runtime adds and deletes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AttachmentId {
    /// The name of the network.
    pub network: String,
    /// The identifier of the container.
    pub container: String,
    /// The interface in the container.
    pub interface: String,
}

impl fmt::Display for AttachmentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, network {})", self.container, self.interface, self.network)
    }
}

/// Refuses a name that the specification does not allow for networks and containers.
///
/// # Errors
/// A message that calls it `what`.
pub fn check_name(what: &str, name: &str) -> Result<(), String> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    match name.bytes().next() {
        Some(first) if first.is_ascii_alphanumeric() && name.bytes().all(is_plain) => Ok(()),
        _ => Err(format!(
            "{what} {name:?} is not a name: use letters, digits, '_', '.', '-', the first a letter or digit"
        )),
    }
}

/// `dev_valid_name` of net/core/dev.c.
pub(super) fn is_interface(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && !matches!(name, "." | "..")
        && !name.contains(|letter: char| letter == '/' || letter == ':' || letter.is_whitespace())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_cannot_be_are_refused() {
        for container in ["", "-c", "a/b", "a b", "é"] {
            assert!(check_name("CNI_CONTAINERID", container).is_err(), "{container}");
        }
        for interface in ["", "a/b", "a:b", "..", "sixteen-letters-", "a b"] {
            assert!(!is_interface(interface), "{interface}");
        }
        assert!(is_interface("fifteen-letters"));
    }
}
