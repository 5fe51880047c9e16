//! The ports of one container, for thousands of look-ups.

use std::collections::HashMap;

use rproxy_mapping::addr::Protocol;

use crate::host_ip::HostIp;
use crate::model::{Mapping, MappingKey};
use crate::publish::{HostPort, PortRequest};

/// What requests and mappings that satisfy them have in common.
type Common = (Protocol, HostIp, u16);

/// The mappings of a container.
#[derive(Debug, Default)]
pub(super) struct OwnPorts {
    mappings: Vec<Mapping>,
    by_key: HashMap<MappingKey, usize>,
    by_common: HashMap<Common, Vec<usize>>,
}

impl OwnPorts {
    pub(super) fn of(mappings: Vec<Mapping>) -> Self {
        let mut ports = Self::default();
        mappings.into_iter().for_each(|mapping| ports.put(mapping));
        ports
    }

    /// The mapping that satisfies `request`, if there is one.
    pub(super) fn fulfilling(&self, request: &PortRequest) -> Option<&Mapping> {
        let similar = match exact(request) {
            Some(key) => self.by_key.get(&key).map(std::slice::from_ref),
            None => self.by_common.get(&common(request)).map(Vec::as_slice),
        };
        let similar = similar.into_iter().flatten().map(|index| &self.mappings[*index]);
        similar.into_iter().find(|mapping| mapping.fulfils(request))
    }

    /// Puts a mapping in the place of the one with its port, or behind the others.
    pub(super) fn put(&mut self, mapping: Mapping) {
        if let Some(index) = self.by_key.get(&mapping.key()) {
            self.mappings[*index].suspended = mapping.suspended;
            return;
        }
        let index = self.mappings.len();
        self.by_key.insert(mapping.key(), index);
        let common = (mapping.proto, mapping.host, mapping.container_port);
        self.by_common.entry(common).or_default().push(index);
        self.mappings.push(mapping);
    }

    pub(super) fn into_mappings(self) -> Vec<Mapping> {
        self.mappings
    }
}

/// Requests, of which mappings satisfy some.
#[derive(Debug)]
pub(super) struct Requests<'a> {
    exact: HashMap<MappingKey, Vec<&'a PortRequest>>,
    others: HashMap<Common, Vec<&'a PortRequest>>,
}

impl<'a> Requests<'a> {
    pub(super) fn of(requests: &'a [PortRequest]) -> Self {
        let (mut exactly, mut others) = (HashMap::<_, Vec<_>>::new(), HashMap::<_, Vec<_>>::new());
        for request in requests {
            match exact(request) {
                Some(key) => exactly.entry(key).or_default().push(request),
                None => others.entry(common(request)).or_default().push(request),
            }
        }
        Self { exact: exactly, others }
    }

    /// Whether a mapping satisfies one of them.
    pub(super) fn are_fulfilled_by(&self, mapping: &Mapping) -> bool {
        let common = (mapping.proto, mapping.host, mapping.container_port);
        let similar = [self.exact.get(&mapping.key()), self.others.get(&common)];
        similar.into_iter().flatten().flatten().any(|request| mapping.fulfils(request))
    }
}

fn common(request: &PortRequest) -> Common {
    (request.proto, request.host, request.container_port)
}

/// The port, if only one satisfies the request.
fn exact(request: &PortRequest) -> Option<MappingKey> {
    let PortRequest { proto, host, host_port, .. } = *request;
    match host_port {
        HostPort::Exactly(port) => Some(MappingKey { proto, host, port }),
        HostPort::Random | HostPort::FirstFreeOf(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testdata;

    #[test]
    fn a_mapping_is_found_by_what_is_requested_and_changed_by_its_port() {
        let mappings = testdata::with_ports(3).endpoints.into_values().next().unwrap().mappings;
        let mut ports = OwnPorts::of(mappings.clone());
        let request = |host_port| PortRequest {
            proto: Protocol::Tcp,
            host: HostIp::Any,
            host_port,
            container_port: 80,
        };
        let found =
            |ports: &OwnPorts, host_port| ports.fulfilling(&request(host_port)).map(|found| found.host_port);
        assert_eq!(found(&ports, HostPort::Exactly(1001)), Some(1001));
        assert_eq!(found(&ports, HostPort::Exactly(1003)), None);
        assert_eq!(found(&ports, HostPort::Random), None, "none was chosen at random");
        ports.put(Mapping { suspended: true, ..mappings[1].clone() });
        ports.put(Mapping { host_port: 1003, ..mappings[1].clone() });
        let mappings = ports.into_mappings();
        assert_eq!(
            mappings.iter().map(|mapping| mapping.suspended).collect::<Vec<_>>(),
            [false, true, false, false]
        );
    }
}
