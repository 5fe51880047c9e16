//! Which host ports are published, for thousands of look-ups.

use std::collections::HashMap;

use rproxy_mapping::addr::Protocol;

use crate::host_ip::HostIp;
use crate::model::{MappingKey, Topology};
use crate::name::Name;

/// The published ports with the containers that have them.
#[derive(Debug, Clone, Default)]
pub struct Taken(HashMap<(Protocol, u16), Vec<(HostIp, Name)>>);

impl Taken {
    /// Those of a topology.
    #[must_use]
    pub fn of(topology: &Topology) -> Self {
        let mut taken = Self::default();
        topology.mappings().for_each(|(owner, _, mapping)| taken.insert(mapping.key(), owner));
        taken
    }

    /// Adds one.
    pub fn insert(&mut self, key: MappingKey, owner: &Name) {
        self.0.entry((key.proto, key.port)).or_default().push((key.host, owner.clone()));
    }

    /// The container whose port excludes `key`.
    #[must_use]
    pub fn owner_of(&self, key: MappingKey) -> Option<&Name> {
        let same_number = self.0.get(&(key.proto, key.port)).into_iter().flatten();
        same_number.into_iter().find(|(host, _)| host.overlaps(key.host)).map(|(_, owner)| owner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testdata;

    #[test]
    fn a_port_is_taken_on_overlapping_addresses() {
        let mut taken = Taken::of(&testdata::everything());
        let key = |proto, host: &str, port| MappingKey { proto, host: host.parse().unwrap(), port };
        let owner = |taken: &Taken, key| taken.owner_of(key).map(ToString::to_string);
        assert_eq!(owner(&taken, key(Protocol::Tcp, "10.0.0.11", 80)).as_deref(), Some("web"));
        assert_eq!(owner(&taken, key(Protocol::Udp, "*", 54)).as_deref(), Some("dns"));
        assert_eq!(owner(&taken, key(Protocol::Udp, "10.0.0.12", 54)), None);
        assert_eq!(owner(&taken, key(Protocol::Udp, "*", 80)), None);
        let new = key(Protocol::Udp, "*", 80);
        taken.insert(new, &"web".parse().unwrap());
        assert_eq!(owner(&taken, new).as_deref(), Some("web"));
    }
}
