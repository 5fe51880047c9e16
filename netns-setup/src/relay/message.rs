//! What commands and the supervisor tell each other: lines of JSON. A version of its own is not needed: both are the
//! same program, and an older supervisor is replaced.

use serde::{Deserialize, Serialize};

use crate::model::{MappingKey, RelayProcess};
use crate::relayed::RelayedPort;

/// A request. A supervisor without ports ends after its answer.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Say what is served.
    Status,
    /// Cease to serve some ports, and then serve others.
    Change {
        /// The ports that are served no more. One that was not served is no error.
        remove: Vec<MappingKey>,
        /// The ports that are served from now on. A bound socket comes with the request for each that is not served yet, in
        /// this order; one that is keeps its socket.
        add: Vec<RelayedPort>,
    },
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
    /// The change is made.
    Changed,
    /// Nothing was changed, and this is why.
    Refused(String),
}
