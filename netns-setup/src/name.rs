//! Names that become file names, interface names or rule text; valid by construction.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::str::FromStr;

use arrayvec::ArrayString;
use serde::{Deserialize, Serialize};

use crate::addr::{Mac, serde_as_text};

/// The interface of a container, named as by Docker.
pub const CONTAINER_INTERFACE: &str = "eth0";

/// IFNAMSIZ of linux/if.h is 16 and counts the terminating NUL.
const LONGEST_INTERFACE: usize = 15;

/// Why a text is not a valid name.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum NameError {
    /// A container's name is also the name of a file under `/run/netns`.
    #[error(
        "{0:?} is not a container name: use up to 64 letters, digits, '_', '.', '-', the first a letter or digit"
    )]
    Container(String),
    /// The kernel's limit is 15 bytes; quotes and the like would change the meaning of a rule.
    #[error(
        "{0:?} is not an interface name: use up to 15 letters, digits, '_', '.', '-', the first a letter or digit"
    )]
    Interface(String),
    /// An identifier has 64 hex digits.
    #[error("{0:?} is not an identifier of 64 hex digits")]
    Id(String),
}

/// The name of a container.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(String);

/// The name of a network interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IfName(ArrayString<LONGEST_INTERFACE>);

/// An identifier in Docker's format: 256 random bits in hex.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Id(String);

impl Name {
    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl IfName {
    fn short(text: &str) -> Self {
        Self(ArrayString::from(text).expect("it is no longer than names may be"))
    }

    /// The interface that every namespace has.
    #[must_use]
    pub fn loopback() -> Self {
        Self::short("lo")
    }

    /// The interface of a container, named as by Docker.
    #[must_use]
    pub fn container() -> Self {
        Self::short(CONTAINER_INTERFACE)
    }

    /// The name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Id {
    /// An identifier of 256 random bits.
    ///
    /// # Errors
    /// If there are none.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 32];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        Ok(Self::from_bytes(bytes))
    }

    /// The identifier with these bytes.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The identifier as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// How many digits are in the names of veth pairs.
    pub const VETH_DIGITS: usize = 7;

    /// The name of the host end of an endpoint's veth pair: `veth` and seven digits, as in Docker.
    #[must_use]
    pub fn veth(&self) -> IfName {
        IfName::short(&format!("veth{}", &self.0[..Self::VETH_DIGITS]))
    }

    /// A MAC address for the host end, derived from the identifier so that a repaired pair has the same one.
    #[must_use]
    pub fn veth_mac(&self) -> Mac {
        let byte = |at: usize| u8::from_str_radix(&self.0[at..at + 2], 16).unwrap_or_default();
        Mac::local([byte(8), byte(10), byte(12), byte(14), byte(16), byte(18)])
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        // Docker allows longer names, which would be impractical as file names and in `list`.
        const LONGEST: usize = 64;
        if is_plain(text, LONGEST) {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError::Container(text.to_owned()))
        }
    }
}

impl FromStr for IfName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        // Not interfaces, but parameters for all of them, under net.ipv4.conf of sysctl.
        const SETTINGS: [&str; 2] = ["all", "default"];
        let name = ArrayString::from(text).ok();
        let name = name.filter(|name| is_plain(name, LONGEST_INTERFACE) && !SETTINGS.contains(&text));
        name.map(Self).ok_or_else(|| NameError::Interface(text.to_owned()))
    }
}

impl FromStr for Id {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let hex = text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        if text.len() == 64 && hex { Ok(Self(text.to_owned())) } else { Err(NameError::Id(text.to_owned())) }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Display for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

serde_as_text!(Name);
serde_as_text!(IfName);
serde_as_text!(Id);

/// Letters, digits and `_.-`, starting with a letter or digit: safe as a file name and inside a rule.
fn is_plain(text: &str, longest: usize) -> bool {
    let first = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    let rest = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte));
    first && rest && text.len() <= longest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_leaves_its_directory_is_refused() {
        for text in ["", "..", "../web", "a/b", "-n", ".web", "a b", "a\"b", "a\n", &"x".repeat(65)] {
            assert!(text.parse::<Name>().is_err(), "{text:?}");
        }
        for text in ["web", "web-1", "Web_1.2", "1"] {
            assert!(text.parse::<Name>().is_ok(), "{text:?}");
        }
    }

    #[test]
    fn an_interface_name_has_at_most_fifteen_bytes() {
        assert!("docker0".parse::<IfName>().is_ok());
        assert!("abcdefghijklmno".parse::<IfName>().is_ok());
        assert!("abcdefghijklmnop".parse::<IfName>().is_err());
        for text in ["br\"0", "", ".", "..", "a/b", "a b", "all", "default"] {
            assert!(text.parse::<IfName>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_veth_follows_from_the_identifier() {
        let id = Id::from_bytes([0xa1; 32]);
        assert_eq!(id.as_str().len(), 64);
        assert_eq!(id.veth().as_str(), "vetha1a1a1a");
        assert_eq!(id.veth_mac().to_string(), "a2:a1:a1:a1:a1:a1");
        assert_eq!(id.to_string().parse::<Id>().unwrap(), id);
    }
}
