//! What commands and the supervisor tell each other: lines of JSON. A version of its own is not needed: both are the
//! same program, and an older supervisor is replaced.

use std::hash::{DefaultHasher, Hash, Hasher};

use serde::{Deserialize, Serialize};

use crate::model::{MappingKey, RelayProcess};
use crate::relayed::RelayedPort;

/// A request. A supervisor without ports ends after its answer.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Say what is served.
    Status,
    /// Say what is served, without the ports if [`digest`] of them is this.
    Compare(u64),
    /// Cease to serve some ports, and then serve others.
    Change {
        /// The ports that are served no more. One that was not served is no error.
        remove: Vec<MappingKey>,
        /// The ports that are served from now on. A bound socket comes with the request for each that is not served yet, in
        /// this order; one that is keeps its socket.
        add: Vec<RelayedPort>,
    },
}

/// A number that two lists of ports, in their order, have in common only if they are the same.
#[must_use]
pub fn digest<'a>(ports: impl Iterator<Item = &'a RelayedPort>) -> u64 {
    let mut hasher = DefaultHasher::new();
    ports.for_each(|port| port.hash(&mut hasher));
    hasher.finish()
}

/// What is served.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// The supervisor.
    pub supervisor: Option<RelayProcess>,
    /// The relay, if it runs.
    pub relay: Option<RelayProcess>,
    /// Why it does not.
    pub trouble: Option<String>,
    /// The ports.
    pub ports: Vec<RelayedPort>,
    /// Those of them that it refuses now, and tries again.
    #[serde(default)]
    pub unserved: Vec<Unserved>,
}

/// A port that is not served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unserved {
    /// The port.
    #[serde(flatten)]
    pub key: MappingKey,
    /// Why.
    pub why: String,
}

/// An answer.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// To [`Request::Status`].
    Status(Status),
    /// To [`Request::Compare`]: the ports are those that were asked for, and left out.
    Same(Status),
    /// The change is made.
    Changed,
    /// Nothing was changed, and this is why.
    Refused(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_ports_have_another_digest() {
        let port = |number: u16| -> RelayedPort {
            let port = serde_json::json!({
                "proto": "tcp", "host": "*", "port": number, "owner": "web", "to": "172.17.0.2:80"
            });
            serde_json::from_value(port).unwrap()
        };
        let of = |ports: &[RelayedPort]| digest(ports.iter());
        let (one, other) = (port(80), port(81));
        let moved = RelayedPort { to: ([172, 17, 0, 3], 80).into(), ..one.clone() };
        let both = of(&[one.clone(), other.clone()]);
        assert_eq!(both, of(&[one.clone(), other.clone()]));
        for ports in [vec![], vec![one.clone()], vec![other.clone(), one], vec![moved, other]] {
            assert_ne!(of(&ports), both, "{ports:?}");
        }
    }
}
