//! How a connection ended.

use std::io;

use crate::state::record::Ending;

/// How a connection ended.
#[derive(Debug)]
pub(super) struct Finish {
    /// Who ended it, and how.
    pub(super) ending: Ending,
    /// What broke it; `None` if both sides ended in order.
    pub(super) failure: Option<io::Error>,
}

/// A side of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) enum Side {
    Client,
    Backend,
}

impl Side {
    /// The opposite side.
    pub(super) fn other(self) -> Self {
        match self {
            Self::Client => Self::Backend,
            Self::Backend => Self::Client,
        }
    }

    /// This side was the first to end its stream, and nothing failed.
    pub(super) fn closed(self) -> Finish {
        let ending = match self {
            Self::Client => Ending::ClientClosed,
            Self::Backend => Ending::BackendClosed,
        };
        Finish { ending, failure: None }
    }

    /// This side has failed with `error`.
    pub(super) fn failed(self, error: io::Error) -> Finish {
        let ending = match (self, error.kind()) {
            (Self::Client, io::ErrorKind::TimedOut) => Ending::ClientTimeout,
            (Self::Client, _) => Ending::ClientReset,
            (Self::Backend, io::ErrorKind::TimedOut) => Ending::BackendTimeout,
            (Self::Backend, _) => Ending::BackendReset,
        };
        Finish { ending, failure: Some(error) }
    }
}
