//! The names of mappings, for users and for the control socket.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::addr::ScopedIp;
use crate::{HostPorts, Mapping};

/// The maximum length of a name in bytes, larger than that of any default name.
const LONGEST: usize = 128;

/// A name that needs no quotes in a table, a log line or a shell.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(Arc<str>);

impl Name {
    /// The default name of a mapping, derived from where clients connect: `8080/tcp` on all addresses,
    /// `10.0.0.11:8080/tcp` on one. If the host port is not chosen yet, the backend port distinguishes mappings:
    /// `random:80/tcp`, `8000-8010:80/tcp`.
    pub fn of(mapping: &Mapping) -> Self {
        let host = match mapping.host() {
            ScopedIp::ANY if !mapping.is_v6only() => String::new(),
            ScopedIp::ANY_V4 => String::new(),
            one => format!("{one}:"),
        };
        let (backend, protocols) = (mapping.backend_ports(), mapping.protocols());
        Self(match mapping.host_ports() {
            HostPorts::Exactly(range) => format!("{host}{range}/{protocols}").into(),
            HostPorts::FirstFree(range) => format!("{host}{range}:{backend}/{protocols}").into(),
            HostPorts::Random => format!("{host}random:{backend}/{protocols}").into(),
        })
    }

    /// The text of the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for Name {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._:/+%#@[]-".contains(&byte);
        if text.is_empty() || text.len() > LONGEST || text.starts_with('-') || !text.bytes().all(plain) {
            return Err(NameError(text.chars().take(LONGEST).collect()));
        }
        Ok(Self(text.into()))
    }
}

/// Why a text is not a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a name; write 1 to 128 letters, digits or any of ._:/+%#@[]-, not '-' first")]
pub struct NameError(String);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Protocols;

    fn name(host: &str, ports: Option<&str>) -> String {
        let host = (host.parse().unwrap(), ports.map(|ports| ports.parse().unwrap()));
        let backend = ("172.17.0.2".parse().unwrap(), "80".parse().unwrap());
        Name::of(&Mapping::new(Protocols::Both, host, backend).unwrap()).to_string()
    }

    #[test]
    fn default_names_say_where_clients_connect() {
        for (host, ports, expected) in [
            ("[::]", Some("8080"), "8080/tcp+udp"),
            ("0.0.0.0", Some("8080"), "8080/tcp+udp"),
            ("10.0.0.11", Some("8080"), "10.0.0.11:8080/tcp+udp"),
            ("::1", Some("8080"), "[::1]:8080/tcp+udp"),
            ("::", Some("8000-8010"), "8000-8010:80/tcp+udp"),
            ("10.0.0.11", None, "10.0.0.11:random:80/tcp+udp"),
        ] {
            let name = name(host, ports);
            assert_eq!(name, expected);
            assert!(name.parse::<Name>().is_ok(), "{name}");
        }
    }

    #[test]
    fn names_need_no_quotes() {
        for wrong in ["", "-x", "a b", "a\nb", "käse", "\"", &"x".repeat(129)] {
            assert!(wrong.parse::<Name>().is_err(), "{wrong}");
        }
    }
}
