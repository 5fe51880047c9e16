//! The mappings that are served, by name.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, btree_map};
use std::sync::Arc;

use rproxy_mapping::Mapping;
use rproxy_mapping::addr::Protocol;
use rproxy_mapping::name::Name;
use rproxy_mapping::ports::PortRange;

use crate::engine::sweep::Sweep;
use crate::runtime::poll::WatchedListener;
use crate::state::stats::Stats;
use crate::state::{Binding, MappingPolicy, MappingState};

/// A mapping that is served, and its sockets.
#[derive(Debug)]
pub struct Served {
    /// The mapping as requested.
    pub(crate) mapping: Mapping,
    /// How its clients are served.
    pub(crate) policy: Arc<MappingPolicy>,
    /// Its sockets, TCP first, each in port order.
    pub(crate) ports: Vec<Binding>,
}

impl Served {
    /// The mapping as requested.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Its counters.
    pub fn stats(&self) -> &Stats {
        &self.policy.state.stats
    }

    /// The host port of each socket, in order; the actual port where there was a choice.
    pub fn host_ports(&self) -> impl Iterator<Item = u16> {
        self.ports.iter().map(|binding| binding.target.port_mapping.host.socket_addr().port())
    }
}

/// A removed mapping.
#[derive(Debug)]
struct Departed {
    name: Name,
    state: Arc<MappingState>,
}

/// All mappings, by name.
#[derive(Debug, Default)]
pub struct Registry {
    served: BTreeMap<Name, Served>,
    ports: Ports,
    /// Removed mappings, some of which may have finished.
    departed: Vec<Departed>,
    sweep: Sweep,
}

impl Registry {
    /// How many mappings are served.
    pub fn len(&self) -> usize {
        self.served.len()
    }

    /// Whether no mapping is served.
    pub fn is_empty(&self) -> bool {
        self.served.is_empty()
    }

    /// The mapping called `name`.
    pub fn get(&self, name: &Name) -> Option<&Served> {
        self.served.get(name)
    }

    /// All mappings, ordered by name.
    pub fn iter(&self) -> impl Iterator<Item = (&Name, &Served)> {
        self.served.iter()
    }

    /// Whether a mapping listens on one of `ports`, on any address.
    pub(crate) fn listens_on(&self, protocol: Protocol, ports: PortRange) -> bool {
        ports.iter().any(|port| self.ports.0.contains_key(&(protocol, port)))
    }

    /// The removed mappings that still have connections or flows.
    pub fn draining(&self) -> impl Iterator<Item = (&Name, &Stats)> {
        let draining = self.departed.iter().filter(|departed| is_in_use(&departed.state));
        draining.map(|departed| (&departed.name, &departed.state.stats))
    }

    /// Adds a mapping, or replaces the one with the same name.
    pub(crate) fn put(&mut self, name: Name, served: Served) {
        self.ports.add(&served);
        match self.served.entry(name) {
            btree_map::Entry::Vacant(entry) => drop(entry.insert(served)),
            btree_map::Entry::Occupied(mut entry) => {
                let replaced = entry.insert(served);
                self.ports.remove(&replaced);
                let same = Arc::ptr_eq(&replaced.policy.state, &entry.get().policy.state);
                if !same {
                    let name = entry.key().clone();
                    self.depart(name, replaced);
                }
            }
        }
    }

    /// Removes the mapping called `name` and returns its listeners. It is listed as draining while in use.
    pub(crate) fn take(&mut self, name: &Name) -> Option<Vec<Arc<WatchedListener>>> {
        let (name, mut served) = self.served.remove_entry(name)?;
        self.ports.remove(&served);
        let ports = served.ports.drain(..).map(|binding| binding.port).collect();
        self.depart(name, served);
        Some(ports)
    }

    fn depart(&mut self, name: Name, served: Served) {
        self.departed.push(Departed { name, state: served.policy.state.clone() });
        if self.sweep.is_due(self.departed.len()) {
            self.departed.retain(|departed| is_in_use(&departed.state));
            self.sweep.done(self.departed.len());
        }
    }
}

/// The number of sockets at each port.
#[derive(Debug, Default)]
struct Ports(HashMap<(Protocol, u16), u32>);

impl Ports {
    fn add(&mut self, served: &Served) {
        for port in ports_of(served) {
            *self.0.entry(port).or_default() += 1;
        }
    }

    fn remove(&mut self, served: &Served) {
        for port in ports_of(served) {
            if let Entry::Occupied(mut count) = self.0.entry(port) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                }
            }
        }
    }
}

fn ports_of(served: &Served) -> impl Iterator<Item = (Protocol, u16)> {
    let port_mappings = served.ports.iter().map(|binding| &binding.target.port_mapping);
    port_mappings.map(|port_mapping| (port_mapping.protocol, port_mapping.host.socket_addr().port()))
}

fn is_in_use(state: &MappingState) -> bool {
    state.stats.connections.get() + state.stats.flows.get() > 0
}
