//! The mappings that are served, by name.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet, btree_map};
use std::net::SocketAddr;
use std::sync::Arc;

use rproxy_mapping::addr::{BackendAddr, HostSocketAddr, Protocol, Protocols};
use rproxy_mapping::name::Name;
use rproxy_mapping::ports::PortRange;
use rproxy_mapping::source::Source;
use rproxy_mapping::{Mapping, PortMapping};

use crate::bind::return_path::ReturnPaths;
use crate::engine::sweep::Sweep;
use crate::names::Names;
use crate::runtime::poll::WatchedListener;
use crate::runtime::socket_file::SocketFile;
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
    /// The process that has attached it, unless it was requested.
    pub(crate) process: Option<u32>,
}

impl Served {
    /// The mapping as requested.
    pub fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// The process that has attached this port, unless it is a mapping that was requested.
    pub fn process(&self) -> Option<u32> {
        self.process
    }

    /// Its counters.
    pub fn stats(&self) -> &Stats {
        &self.policy.state.stats
    }

    /// The protocol and address of each socket, and the backends behind it: one for each address of a name.
    pub(crate) fn targets(&self) -> impl Iterator<Item = ((Protocol, HostSocketAddr), BackendAddr)> {
        self.ports.iter().flat_map(|binding| {
            let first = &binding.target.port_mapping;
            let others = binding.target.named.iter().flat_map(|host| host.addresses().iter());
            let all = std::iter::once(first.clone()).chain(others.map(move |ip| first.at(*ip)));
            all.map(|PortMapping { protocol, host, backend, .. }| ((protocol, host), backend))
        })
    }

    /// The host port of each socket, in order; the actual port where there was a choice. A Unix socket has none.
    pub fn host_ports(&self) -> impl Iterator<Item = u16> {
        self.ports.iter().filter_map(|binding| binding.target.port_mapping.host.port())
    }

    /// The files of its Unix sockets.
    pub(crate) fn files(&self) -> impl Iterator<Item = &SocketFile> {
        self.ports.iter().filter_map(|binding| binding.port.file())
    }
}

/// A removed mapping.
#[derive(Debug)]
struct Departed {
    name: Name,
    protocols: Protocols,
    state: Arc<MappingState>,
}

/// What is counted under the name of a mapping.
#[derive(Clone, Debug)]
pub(crate) struct Counted {
    /// The name.
    pub(crate) name: Name,
    /// What its connections are counted as, if there are or were any: as TCP, if the name has changed its protocol.
    pub(crate) connections: Option<Protocol>,
    /// Whether there are or were UDP ports.
    pub(crate) has_udp: bool,
    /// Whether the name of its backend resolves now, if that has a name and is served.
    pub(crate) is_resolved: Option<bool>,
    /// The counters of the mapping that is served, and of removed ones.
    states: Vec<Arc<MappingState>>,
    /// Those of mappings that are not known any more.
    ended: Option<Arc<Stats>>,
}

impl Counted {
    /// The sum of a counter.
    pub(crate) fn sum(&self, counter: impl Fn(&Stats) -> u64) -> u64 {
        self.all().map(counter).sum()
    }

    /// All counters.
    pub(crate) fn all(&self) -> impl Iterator<Item = &Stats> {
        self.states.iter().map(|state| &state.stats).chain(self.ended.as_deref())
    }
}

/// All mappings, by name.
#[derive(Debug, Default)]
pub struct Registry {
    served: BTreeMap<Name, Served>,
    /// The number of changes.
    revision: u64,
    ports: Ports,
    /// Removed mappings, some of which may have finished.
    departed: Vec<Departed>,
    /// The totals of removed mappings that have finished and are listed no longer, by the name of what is still counted.
    ended: BTreeMap<Name, Arc<Stats>>,
    sweep: Sweep,
    /// Boxed, because most processes have none.
    pub(crate) return_paths: Box<ReturnPaths>,
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

    /// A number that every change of a served mapping increases, for readers that know what was served before.
    pub(crate) fn revision(&self) -> u64 {
        self.revision
    }

    /// The mapping called `name`.
    pub fn get(&self, name: &Name) -> Option<&Served> {
        self.served.get(name)
    }

    /// All mappings, ordered by name.
    pub fn iter(&self) -> impl Iterator<Item = (&Name, &Served)> {
        self.served.iter()
    }

    /// The mappings that were requested, ordered by name.
    pub(crate) fn requested(&self) -> impl Iterator<Item = (&Name, &Served)> {
        self.iter().filter(|(_name, served)| served.process.is_none())
    }

    /// The attached ports, ordered by name.
    pub(crate) fn attached(&self) -> impl Iterator<Item = (&Name, &Served)> {
        self.iter().filter(|(_name, served)| served.process.is_some())
    }

    /// Whether a mapping of this name is served, or was and still has connections or flows.
    pub(crate) fn knows(&self, name: &Name) -> bool {
        self.served.contains_key(name) || self.left_of(name).is_some()
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
        self.revision += 1;
        self.ports.add(&served);
        served.policy.apply_rate();
        if is_to_look_up(&served) {
            self.return_paths.to_look_up.push(name.clone());
        }
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

    /// Has all mappings looked up again whose backends see clients or a given address, or are reached by a given interface.
    pub(crate) fn look_all_up(&mut self) {
        let asked = self.served.iter().filter(|(_name, served)| is_to_look_up(served));
        self.return_paths.to_look_up = asked.map(|(name, _served)| name.clone()).collect();
    }

    /// Those of these mappings that were put since the last call: how they are served, and their backends. A mapping leads
    /// to one address.
    pub(crate) fn take_to_look_up(&mut self) -> Vec<(Name, Arc<MappingPolicy>, SocketAddr)> {
        let names = std::mem::take(&mut self.return_paths.to_look_up);
        if !names.is_empty() {
            self.return_paths.reported.keep(|name| self.served.contains_key(name));
        }
        let way = |name: Name| {
            let served = self.get(&name)?;
            let backend = &served.ports.first()?.target.port_mapping.backend;
            backend.is_routed().then(|| (name, served.policy.clone(), backend.socket_addr()))
        };
        names.into_iter().filter_map(way).collect()
    }

    /// Removes the mapping called `name` and returns its listeners. It is listed as draining while in use.
    pub(crate) fn take(&mut self, name: &Name) -> Option<Vec<Arc<WatchedListener>>> {
        let (name, mut served) = self.served.remove_entry(name)?;
        self.revision += 1;
        self.ports.remove(&served);
        let ports = served.ports.drain(..).map(|binding| binding.port).collect();
        self.depart(name, served);
        Some(ports)
    }

    /// The state of the connections that a removed mapping of this name still has, and its index for
    /// [`Registry::resume`].
    pub(crate) fn left_of(&self, name: &Name) -> Option<(usize, &Arc<MappingState>)> {
        let is_it = |departed: &Departed| departed.name == *name && is_in_use(&departed.state);
        let index = self.departed.iter().position(is_it)?;
        Some((index, &self.departed[index].state))
    }

    /// No longer lists a removed mapping as draining, because its connections belong to a served one again.
    pub(crate) fn resume(&mut self, index: usize) {
        self.departed.swap_remove(index);
    }

    /// The states of attached ports, also of those that have connections left.
    pub(crate) fn states_of_attached(&self) -> Vec<(Name, Arc<MappingState>)> {
        let served = self.attached().map(|(name, served)| (name.clone(), served.policy.state.clone()));
        let departed = self.departed.iter().map(|departed| (departed.name.clone(), departed.state.clone()));
        served.chain(departed).collect()
    }

    fn depart(&mut self, name: Name, served: Served) {
        let protocols = served.mapping.protocols();
        self.departed.push(Departed { name, protocols, state: served.policy.state.clone() });
        if self.sweep.is_due(self.departed.len()) {
            self.forget_finished();
            self.sweep.done(self.departed.len());
        }
    }

    /// Lists removed mappings that have finished no longer. Their totals remain while something is counted under the
    /// same name, so that the sum of a name does not decrease.
    fn forget_finished(&mut self) {
        let (in_use, finished): (Vec<Departed>, Vec<Departed>) =
            std::mem::take(&mut self.departed).into_iter().partition(|departed| is_in_use(&departed.state));
        let counted: HashSet<&Name> =
            self.served.keys().chain(in_use.iter().map(|departed| &departed.name)).collect();
        for Departed { name, state, .. } in finished {
            if counted.contains(&name) {
                self.ended.entry(name).or_default().absorb(&state.stats);
            }
        }
        self.ended.retain(|name, _totals| counted.contains(name));
        self.departed = in_use;
    }

    /// What is counted under each name: by the served mapping, and by those that had the name before, as far as known. A
    /// name is listed while it is served or drains.
    pub(crate) fn counted(&self, names: &Names) -> Vec<Counted> {
        let mut removed: BTreeMap<&Name, Vec<&Departed>> = BTreeMap::new();
        for departed in &self.departed {
            removed.entry(&departed.name).or_default().push(departed);
        }
        let mut counted = Vec::with_capacity(self.served.len());
        for (name, served) in &self.served {
            let before = removed.remove(name).unwrap_or_default();
            let now = (served.mapping.protocols(), &served.policy.state);
            let is_resolved = names.is_resolved(&served.mapping);
            counted.push(Counted { is_resolved, ..self.counted_as(name, Some(now), &before) });
        }
        removed.retain(|_name, before| before.iter().any(|departed| is_in_use(&departed.state)));
        counted.extend(removed.iter().map(|(name, before)| self.counted_as(name, None, before)));
        counted
    }

    fn counted_as(
        &self,
        name: &Name,
        served: Option<(Protocols, &Arc<MappingState>)>,
        before: &[&Departed],
    ) -> Counted {
        let before = before.iter().map(|departed| (departed.protocols, &departed.state));
        let all: Vec<(Protocols, &Arc<MappingState>)> = served.into_iter().chain(before).collect();
        let has =
            |protocol: Protocol| all.iter().any(|(protocols, _)| protocols.iter().any(|one| one == protocol));
        Counted {
            name: name.clone(),
            connections: [Protocol::Tcp, Protocol::Sctp].into_iter().find(|protocol| has(*protocol)),
            has_udp: has(Protocol::Udp),
            is_resolved: None,
            states: all.iter().map(|(_, state)| Arc::clone(state)).collect(),
            ended: self.ended.get(name).cloned(),
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
    port_mappings.filter_map(|port_mapping| Some((port_mapping.protocol, port_mapping.host.port()?)))
}

fn is_in_use(state: &MappingState) -> bool {
    state.stats.connections.get() + state.stats.flows.get() > 0
}

/// Whether it has to be looked up whether connections can come from where they should.
fn is_to_look_up(served: &Served) -> bool {
    let limits = &served.policy.limits;
    limits.source != Source::Auto || limits.device.is_some()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use rproxy_mapping::PortMapping;

    use super::*;
    use crate::runtime::poll::PollSet;
    use crate::state::{ConnectionGuard, FlowGuard, Target};

    /// A mapping with one socket, as served with `state`.
    fn served(set: &PollSet, state: &Arc<MappingState>) -> Served {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = socket.local_addr().unwrap().to_string().parse().unwrap();
        let backend = "192.0.2.1:80".parse().unwrap();
        let policy = Arc::new(MappingPolicy { limits: Arc::default(), state: state.clone() });
        let port_mapping = PortMapping { protocol: Protocol::Tcp, host, backend, v6only: false };
        let target = Arc::new(Target::new(port_mapping, policy.clone()));
        let binding = Binding { port: Arc::new(set.add(socket).unwrap()), target };
        let backend = ("192.0.2.1".parse().unwrap(), "80".parse().unwrap());
        let mapping =
            Mapping::new(Protocols::One(Protocol::Tcp), ("127.0.0.1".parse().unwrap(), None), backend);
        Served { mapping: mapping.unwrap(), policy, ports: vec![binding], process: None }
    }

    fn draining(registry: &Registry) -> Vec<String> {
        registry.draining().map(|(name, _stats)| name.to_string()).collect()
    }

    #[test]
    fn a_port_is_known_while_a_mapping_has_it() {
        let (set, state) = (PollSet::new().unwrap(), Arc::default());
        let web: Name = "web".parse().unwrap();
        let mut registry = Registry::default();
        let one = served(&set, &state);
        let port = one.host_ports().next().unwrap();
        let ports: PortRange = port.to_string().parse().unwrap();
        assert_ne!(port, 0);
        registry.put(web.clone(), one);
        assert!(registry.listens_on(Protocol::Tcp, ports) && !registry.listens_on(Protocol::Udp, ports));
        assert_eq!(registry.take(&web).unwrap().len(), 1);
        assert!(!registry.listens_on(Protocol::Tcp, ports));
        assert!(registry.is_empty() && registry.take(&web).is_none());
    }

    #[test]
    fn a_mapping_drains_from_its_removal_to_the_end_of_its_last_connection() {
        let (set, state) = (PollSet::new().unwrap(), Arc::<MappingState>::default());
        let web: Name = "web".parse().unwrap();
        let mut registry = Registry::default();
        registry.put(web.clone(), served(&set, &state));
        let connection = ConnectionGuard::take(&registry.get(&web).unwrap().ports[0].target);
        // Served otherwise, it goes on; the connections of another one of that name do so by themselves.
        registry.put(web.clone(), served(&set, &state));
        assert_eq!(draining(&registry), Vec::<String>::new());
        registry.put(web.clone(), served(&set, &Arc::default()));
        assert_eq!(draining(&registry), ["web"]);
        registry.take(&web).unwrap();
        assert_eq!(draining(&registry), ["web"], "the other one has none");
        drop(connection);
        assert_eq!(draining(&registry), Vec::<String>::new());
    }

    #[test]
    fn a_mapping_drains_while_it_has_connections_or_flows_and_as_many_of_both() {
        let (set, state) = (PollSet::new().unwrap(), Arc::<MappingState>::default());
        let web: Name = "web".parse().unwrap();
        let mut registry = Registry::default();
        assert_eq!(registry.len(), 0);
        registry.put(web.clone(), served(&set, &state));
        assert!(registry.len() == 1 && !registry.is_empty());
        let target = registry.get(&web).unwrap().ports[0].target.clone();
        let (connection, flow) = (ConnectionGuard::take(&target), FlowGuard::take(&target));
        registry.take(&web).unwrap();
        assert_eq!(draining(&registry), ["web"]);
        drop(connection);
        assert_eq!(draining(&registry), ["web"]);
        drop(flow);
        assert_eq!(draining(&registry), Vec::<String>::new());
    }

    #[test]
    fn what_is_counted_under_a_name_does_not_decrease_while_it_is_listed() {
        let set = PollSet::new().unwrap();
        let web: Name = "web".parse().unwrap();
        let total = |registry: &Registry| {
            let counted = registry.counted(&Names::default());
            let web = counted.iter().find(|counted| counted.name.to_string() == "web")?;
            Some(web.sum(|stats| stats.connections_total.get()))
        };
        let mut registry = Registry::default();
        let connect = |registry: &mut Registry| {
            registry.put(web.clone(), served(&set, &Arc::default()));
            let connection = ConnectionGuard::take(&registry.get(&web).unwrap().ports[0].target);
            registry.take(&web).unwrap();
            connection
        };
        let first = connect(&mut registry);
        assert_eq!(total(&registry), Some(1), "it drains");
        let second = connect(&mut registry);
        registry.put(web.clone(), served(&set, &Arc::default()));
        assert_eq!(total(&registry), Some(2));
        drop((first, second));
        assert_eq!(total(&registry), Some(2), "both have ended");
        registry.forget_finished();
        assert!(registry.departed.is_empty());
        assert_eq!(total(&registry), Some(2));
        registry.take(&web).unwrap();
        assert_eq!(total(&registry), None, "nothing is counted any more");
        registry.forget_finished();
        assert!(registry.ended.is_empty(), "so that nothing is kept for names that come no more");
    }
}
