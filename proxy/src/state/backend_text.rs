//! Backends as people are shown them.

use std::fmt::{self, Display, Formatter};

use rproxy_mapping::addr::BackendAddr;
use rproxy_mapping::backend::HostName;
use serde::{Serialize, Serializer};

/// The address of a backend, or its name and port while that leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BackendText<'a> {
    Addr(&'a BackendAddr),
    Name(&'a HostName, u16),
}

impl<'a> BackendText<'a> {
    /// The text of a backend, whose `name` leads nowhere if it has one.
    pub(crate) fn of(backend: &'a BackendAddr, name: Option<&'a HostName>) -> Self {
        let port = backend.socket_addr().port();
        name.map_or(Self::Addr(backend), |name| Self::Name(name, port))
    }
}

impl Display for BackendText<'_> {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Addr(addr) => addr.fmt(formatter),
            Self::Name(name, port) => write!(formatter, "{name}:{port}"),
        }
    }
}

impl Serialize for BackendText<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}
