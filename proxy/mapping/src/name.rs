//! The names of mappings, for users and for the control socket.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::addr::{HostSocketAddr, Protocol, ScopedIp};
use crate::escape::needs_no_quotes;
use crate::host::HostAddr;
use crate::{HostPorts, Mapping};

/// The maximum length of a name in bytes, larger than that of any default name.
const LONGEST: usize = 128;

/// The start of the names of attached ports, which mappings cannot have.
const ATTACHED: &str = "docker/";

/// A name that needs no quotes in a table, a log line or a shell.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(Arc<str>);

impl Name {
    /// The default name of a mapping, derived from where clients connect: `8080/tcp` on all addresses,
    /// `10.0.0.11:8080/tcp` on one, `%eth0:8080/tcp` on those of an interface, `unix:/run/front.sock` at a Unix socket. If the
    /// host port is not chosen yet, the backend port distinguishes mappings: `random:80/tcp`, `8000-8010:80/tcp`, and
    /// `random:unix/tcp` if it has none.
    pub fn of(mapping: &Mapping) -> Self {
        let host = match mapping.host() {
            HostAddr::Ip(ScopedIp::ANY) if !mapping.is_v6only() => String::new(),
            HostAddr::Ip(ScopedIp::ANY_V4) => String::new(),
            HostAddr::Unix(addr) => return Self(addr.to_string().into()),
            one => format!("{one}:"),
        };
        let (backend, protocols) = (mapping.backend_part(), mapping.protocols());
        Self(match mapping.host_ports() {
            HostPorts::Exactly(range) => format!("{host}{range}/{protocols}").into(),
            HostPorts::FirstFree(range) => format!("{host}{range}:{backend}/{protocols}").into(),
            HostPorts::Random => format!("{host}random:{backend}/{protocols}").into(),
        })
    }

    /// The name of a port that a container runtime's process has attached: `docker/tcp/0.0.0.0:8080`.
    pub fn attached(protocol: Protocol, host: &HostSocketAddr) -> Self {
        Self(format!("{ATTACHED}{protocol}/{host}").into())
    }

    /// Parses the name that a user gives to a mapping.
    ///
    /// # Errors
    /// [`NameError`], also for the names of attached ports.
    pub fn given(text: &str) -> Result<Self, NameError> {
        if text.starts_with(ATTACHED) {
            return Err(NameError::Reserved);
        }
        text.parse()
    }

    /// The text of the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(any(test, feature = "testdata"))]
impl Default for Name {
    /// The name of a mapping in a test that needs one.
    fn default() -> Self {
        Self("mapping".into())
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
        if text.is_empty() || text.len() > LONGEST || text.starts_with('-') || !needs_no_quotes(text) {
            return Err(NameError::Invalid(text.chars().take(LONGEST).collect()));
        }
        Ok(Self(text.into()))
    }
}

/// Why a text is not a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// It has characters that a name cannot have, or too many.
    #[error("{0:?} is not a name; write 1 to 128 letters, digits or any of ._:/+%#@[]-, not '-' first")]
    Invalid(String),
    /// It is reserved for an attached port.
    #[error("names that start with {ATTACHED} are those of attached ports; choose another")]
    Reserved,
}

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
            ("eth0", Some("8080"), "%eth0:8080/tcp+udp"),
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

    #[test]
    fn names_of_attached_ports_can_be_asked_for_and_not_given() {
        for (protocol, host, expected) in [
            (Protocol::Tcp, "0.0.0.0:8080", "docker/tcp/0.0.0.0:8080"),
            (Protocol::Udp, "[::]:53", "docker/udp/[::]:53"),
        ] {
            let name = Name::attached(protocol, &host.parse().unwrap());
            assert_eq!(name.as_str(), expected);
            assert_eq!(expected.parse(), Ok(name));
            assert_eq!(Name::given(expected), Err(NameError::Reserved));
        }
        assert_eq!(Name::given("docker"), "docker".parse());
    }
}
