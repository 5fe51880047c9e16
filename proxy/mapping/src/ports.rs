//! Ports and ranges of ports.

use std::fmt;
use std::str::FromStr;

/// Ports from `first` to `last`, both included; at least one, and never port 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    /// The range of random ports, as in Docker (RFC 6335, section 6: dynamic ports; moby's `portallocator` omits the
    /// first).
    pub const EPHEMERAL: Self = Self { first: 49_153, last: u16::MAX };

    /// In place of the ports of a Unix socket: it has none, so its mapping has a single host port.
    pub const OF_UNIX: Self = Self { first: 1, last: 1 };

    /// The ports from `first` to `last`.
    ///
    /// # Errors
    /// [`PortError`] if `last` is below `first`, or if a port is 0.
    pub fn new(first: u16, last: u16) -> Result<Self, PortError> {
        match (first, last) {
            (0, _) => Err(PortError::NotAPort("0".to_owned())),
            (first, last) if first > last => Err(PortError::Backwards { first, last }),
            (first, last) => Ok(Self { first, last }),
        }
    }

    /// A single port.
    ///
    /// # Errors
    /// [`PortError`] for port 0.
    pub fn single(port: u16) -> Result<Self, PortError> {
        Self::new(port, port)
    }

    /// The lowest port.
    pub fn first(self) -> u16 {
        self.first
    }

    /// The highest port.
    pub fn last(self) -> u16 {
        self.last
    }

    /// The number of ports, from 1 to 65,535.
    pub fn count(self) -> usize {
        usize::from(self.last - self.first) + 1
    }

    /// The port, if the range has only one.
    ///
    /// # Errors
    /// [`PortError::Several`]
    pub fn one(self) -> Result<u16, PortError> {
        if self.is_single() { Ok(self.first) } else { Err(PortError::Several(self)) }
    }

    /// Whether the range has only one port.
    pub fn is_single(self) -> bool {
        self.first == self.last
    }

    /// Whether the range contains `port`.
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    /// Whether the ranges have a common port.
    pub fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }

    /// The ports in order.
    pub fn iter(self) -> std::ops::RangeInclusive<u16> {
        self.first..=self.last
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self { first, last } if first == last => write!(f, "{first}"),
            Self { first, last } => write!(f, "{first}-{last}"),
        }
    }
}

impl FromStr for PortRange {
    type Err = PortError;

    fn from_str(text: &str) -> Result<Self, PortError> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        Self::new(port(first)?, port(last)?)
    }
}

/// Parses digits only. The standard library would also accept a sign.
fn port(text: &str) -> Result<u16, PortError> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let port = text.parse().ok().filter(|port| digits && *port != 0);
    port.ok_or_else(|| PortError::NotAPort(text.to_owned()))
}

/// Why a text is neither a port nor a range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    /// Not a number from 1 to 65,535.
    #[error("'{0}' is not a port; write a number from 1 to 65535, or a range such as 8000-8010")]
    NotAPort(String),
    /// A range where only one port is allowed.
    #[error("one port is wanted, and {0} are several; write one of them")]
    Several(PortRange),
    /// The last port is below the first.
    #[error("the range {first}-{last} ends before it starts; write {last}-{first}")]
    Backwards {
        /// The port written first.
        first: u16,
        /// The port written last.
        last: u16,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_or_a_range_is_read_and_printed() {
        for (text, count) in [("1", 1), ("80", 1), ("8000-8010", 11), ("1-65535", 65_535)] {
            let range: PortRange = text.parse().expect(text);
            assert_eq!(range.count(), count, "{text}");
            assert_eq!(range.iter().count(), count, "{text}");
            assert_eq!(range.to_string(), text);
        }
    }

    #[test]
    fn what_is_no_port_is_named() {
        for (text, part) in [
            ("", "'' is not a port"),
            ("0", "'0' is not a port"),
            ("+80", "'+80' is not a port"),
            ("65536", "'65536' is not a port"),
            ("80-", "'' is not a port"),
            ("80-81-82", "'81-82' is not a port"),
            ("8010-8000", "write 8000-8010"),
        ] {
            let message = text.parse::<PortRange>().expect_err(text).to_string();
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    #[test]
    fn ranges_overlap_when_they_share_a_port() {
        let range = |text: &str| text.parse::<PortRange>().unwrap();
        assert!(range("80").overlaps(range("80")));
        assert!(range("80-90").overlaps(range("90-99")));
        assert!(range("80-90").overlaps(range("85")));
        assert!(!range("80-89").overlaps(range("90-99")));
    }
}
