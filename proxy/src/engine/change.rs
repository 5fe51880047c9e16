//! Changes of what a running server serves.
//!
//! A change is first prepared: every step that can fail, binding above all, uses sockets on which no client
//! is served yet. Then it is committed, which cannot fail, or dropped, and nothing has changed. An added
//! mapping reuses the socket of a removed one if both listen on the same address and port.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::sync::{Arc, Weak};

use rproxy_mapping::addr::{HostSocketAddr, Protocol, ScopedIp};
use rproxy_mapping::backend::BackendHost;
use rproxy_mapping::limits::Limits;
use rproxy_mapping::name::Name;
use rproxy_mapping::overlap::{Overlap, OverlapError, exclude_each_other, overlaps, refuse_overlap};
use rproxy_mapping::ports::PortRange;
use rproxy_mapping::{HostPorts, Mapping, MappingError, PortMapping};
use socket2::{Domain, Socket, Type};
use tokio::task::consume_budget;

use crate::bind::activation::InheritedSockets;
use crate::bind::listen::BindError;
use crate::bind::{Bound, BoundPort};
use crate::engine::Server;
use crate::engine::change_error::ChangeError;
use crate::engine::listening::{announce_all, announce_removed};
use crate::engine::plan::{Plan, plan};
use crate::engine::registry::Served;
use crate::engine::sweep::Sweep;
use crate::loops::whereabouts::Whereabouts;
use crate::loops::{Hop, Place, refuse_loops};
use crate::names::names_of;
use crate::runtime::poll::WatchedListener;
use crate::runtime::start_thread;
use crate::state::{Binding, MappingPolicy, Target};
use crate::udp::stale;

/// Stack size of the thread that searches the conntrack table.
const STACK_SIZE: usize = 256 * 1024;

/// What becomes of the connections and flows of mappings that are removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// They continue, and UDP sockets stay open for them.
    Drain,
    /// They end, and all sockets are closed when the change is done.
    Cut,
}

/// The result of a change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// Mappings that were added.
    pub added: usize,
    /// Mappings that got another backend or other limits.
    pub changed: usize,
    /// Mappings that were removed.
    pub removed: usize,
    /// Mappings that were not touched.
    pub unchanged: usize,
}

impl Server {
    /// Adds all of these mappings, or none. They use the sockets in `passed` that listen on their ports, and each of
    /// these has to be one of theirs.
    ///
    /// # Errors
    /// [`ChangeError`]
    pub async fn add(
        &mut self,
        mappings: Vec<Mapping>,
        passed: InheritedSockets,
    ) -> Result<Changed, ChangeError> {
        let mappings = self.located(mappings)?;
        let mut names = HashSet::with_capacity(mappings.len());
        for mapping in &mappings {
            let name = mapping.name();
            let served = self.registry.get(&name);
            if let (Some(served), None) = (served, mapping.given_name()) {
                // The name is a default name, so the conflict may be about the port that it is derived from.
                refuse_overlap(&[served.mapping.clone(), mapping.clone()])?;
            }
            if served.is_some() || !names.insert(name.clone()) {
                return Err(ChangeError::NameTaken(name));
            }
        }
        self.refuse_overlap_with_served(&mappings)?;
        // Those that are followed already may stand for others by now.
        names_of(mappings.iter()).iter().for_each(|name| self.names.renew(name));
        let add = mappings.into_iter().map(|mapping| (mapping.name(), mapping)).collect();
        let unchanged = self.registry.requested().count();
        self.execute(Plan { add, unchanged, ..Plan::default() }, passed, Removal::Drain).await
    }

    /// Refuses new mappings that overlap each other, or served ones where bind(2) would not tell: an interface may have no
    /// address yet.
    fn refuse_overlap_with_served(&self, new: &[Mapping]) -> Result<(), OverlapError> {
        refuse_overlap(new)?;
        let follows = |mapping: &Mapping| mapping.interface().is_some();
        let new_follow = new.iter().any(follows);
        let is_meant = |mapping: &&Mapping| follows(mapping) || new_follow && mapping.host().is_wildcard();
        let served = self.registry.requested().map(|(_name, served)| &served.mapping).filter(is_meant);
        let all: Vec<&Mapping> = served.chain(new).collect();
        let first_new = all.len() - new.len();
        let found = overlaps(all.iter().copied()).into_iter().find(|overlap| overlap.second >= first_new);
        match found {
            Some(Overlap { first, second, port }) => Err(OverlapError::new(all[second], all[first], port)),
            None => Ok(()),
        }
    }

    /// Removes a mapping.
    ///
    /// # Errors
    /// [`ChangeError::Unknown`], [`ChangeError::Attached`]
    pub async fn remove(&mut self, name: &Name, removal: Removal) -> Result<Changed, ChangeError> {
        self.requested(name)?;
        let unchanged = self.registry.requested().count() - 1;
        let plan = Plan { remove: vec![name.clone()], unchanged, ..Plan::default() };
        self.execute(plan, InheritedSockets::default(), removal).await
    }

    /// Sends new connections and all datagrams of a mapping to another backend. Existing connections
    /// continue.
    ///
    /// # Errors
    /// [`ChangeError::Unknown`], [`ChangeError::Attached`], or [`ChangeError::Mapping`] if the number of ports
    /// differs.
    pub async fn retarget(
        &mut self,
        name: &Name,
        backend: BackendHost,
        ports: PortRange,
    ) -> Result<Changed, ChangeError> {
        let served = self.requested(name)?;
        let wrong = |source| ChangeError::Mapping { name: name.clone(), source };
        let old = served.mapping.backend_ports();
        if old.count() != ports.count() {
            return Err(wrong(MappingError::Lengths { host: old, backend: ports }));
        }
        let mut mapping = served.mapping.retargeted(backend, ports).map_err(wrong)?;
        if mapping.name() != *name {
            // The default name of a random port contains the backend's port.
            mapping = mapping.named(name.clone());
        }
        if let Some(host) = mapping.backend().name() {
            // It may be asked for because that stands for others by now.
            self.names.renew(host);
        }
        let unchanged = self.registry.requested().count() - 1;
        let plan = Plan { change: vec![(name.clone(), mapping)], unchanged, ..Plan::default() };
        self.execute(plan, InheritedSockets::default(), Removal::Drain).await
    }

    /// Sends new connections and all datagrams of all mappings to this address, at the same ports. Existing connections
    /// continue. It is for listeners in another network namespace than the backends, where no mapping leads back to itself.
    ///
    /// # Errors
    /// [`ChangeError::Mapping`] if it is not the address of a machine.
    pub(crate) async fn move_backends(&mut self, backend: &BackendHost) -> Result<(), ChangeError> {
        let requested = self.registry.requested().map(|(name, Served { mapping, .. })| {
            let moved = mapping.retargeted(backend.clone(), mapping.backend_ports());
            match moved.map_err(|source| ChangeError::Mapping { name: name.clone(), source }) {
                Ok(moved) => self.prepare_change(name.clone(), moved.named(name.clone())),
                Err(error) => Err(error),
            }
        });
        let changed = requested.collect::<Result<_, _>>()?;
        self.commit(Prepared::changing(changed), Removal::Drain).await;
        Ok(())
    }

    /// The mapping with this name, if it was requested.
    fn requested(&self, name: &Name) -> Result<&Served, ChangeError> {
        self.refuse_attached(name)?;
        self.registry.get(name).ok_or_else(|| ChangeError::Unknown(name.clone()))
    }

    /// Refuses the name of an attached port.
    ///
    /// # Errors
    /// [`ChangeError::Attached`]
    pub fn refuse_attached(&self, name: &Name) -> Result<(), ChangeError> {
        match self.registry.get(name).and_then(Served::process) {
            Some(process) => Err(ChangeError::Attached { name: name.clone(), process }),
            None => Ok(()),
        }
    }

    /// Serves exactly these mappings from now on, beside attached ports. Unchanged ones are not touched. New ones use
    /// the sockets in `passed` that listen on their ports, and each of these has to be one of theirs.
    ///
    /// # Errors
    /// [`ChangeError`]
    pub async fn apply(
        &mut self,
        wanted: Vec<Mapping>,
        passed: InheritedSockets,
        removal: Removal,
    ) -> Result<Changed, ChangeError> {
        let plan = self.plan_to(wanted)?;
        self.names.renew_all();
        self.execute(plan, passed, removal).await
    }

    /// The steps after which exactly these mappings are served, beside attached ports.
    pub(super) fn plan_to(&mut self, wanted: Vec<Mapping>) -> Result<Plan, ChangeError> {
        let wanted = self.located(wanted)?;
        refuse_overlap(&wanted)?;
        let served = self.registry.requested().map(|(name, served)| (name, &served.mapping));
        plan(served, wanted).map_err(ChangeError::NameTaken)
    }

    pub(super) async fn execute(
        &mut self,
        plan: Plan,
        passed: InheritedSockets,
        removal: Removal,
    ) -> Result<Changed, ChangeError> {
        let changed = Changed {
            added: plan.add.len(),
            changed: plan.change.len(),
            removed: plan.remove.len(),
            unchanged: plan.unchanged,
        };
        refuse_unreachable(&plan)?;
        self.refuse_private(&plan)?;
        let prepared = async {
            let plan = self.with_addresses(plan).await?;
            Box::pin(self.prepare(plan, passed)).await
        };
        let prepared = prepared.await.and_then(|prepared| {
            self.change_permissions(&prepared)?;
            Ok(prepared)
        });
        match prepared {
            Ok(prepared) => self.commit(prepared, removal).await,
            Err(error) => {
                self.keep_names();
                return Err(error);
            }
        }
        Ok(changed)
    }

    /// Refuses backends that are for the user of this process alone.
    fn refuse_private(&self, plan: &Plan) -> Result<(), ChangeError> {
        plan.add.iter().chain(&plan.change).try_for_each(|(name, mapping)| {
            let refused = self.private.refuse(mapping.backend());
            refused.map_err(|source| ChangeError::Private { name: name.clone(), source })
        })
    }

    /// Completes every step that can fail. Dropped at any point, it has changed nothing.
    async fn prepare(&mut self, plan: Plan, passed: InheritedSockets) -> Result<Prepared, ChangeError> {
        self.refuse_loops(&plan)?;
        let changed = plan.change.into_iter().map(|(name, mapping)| self.prepare_change(name, mapping));
        let changed = changed.collect::<Result<_, _>>()?;
        let spare = self.sockets_of(&plan.remove);
        let added = Vec::with_capacity(plan.add.len());
        let mut add = plan.add;
        let missing = add.iter().map(|(_name, mapping)| mapping.sockets()).sum();
        let mut prepared =
            Prepared { added, changed, removed: plan.remove, spare, passed, unpassed: Vec::new(), missing };
        // Mappings with a choice of ports are bound last.
        add.sort_by_key(|(_name, mapping)| mapping.host_ports().freedom());
        for (name, mapping) in add {
            let served = self.prepare_new(&name, mapping, &mut prepared).await?;
            prepared.missing -= served.ports.len();
            prepared.added.push((name, served));
        }
        refuse_unused(&prepared.passed)?;
        self.refuse_loops_of_chosen(&prepared)?;
        Ok(prepared)
    }

    /// The sockets of some mappings.
    fn sockets_of(&self, names: &[Name]) -> Spare {
        let served = names.iter().filter_map(|name| self.registry.get(name));
        let ports = served.flat_map(|served| &served.ports);
        ports.map(|Binding { port, target }| (BindKey::of(&target.port_mapping), port.clone())).collect()
    }

    /// Refuses mappings that lead back to themselves, as far as their ports are known.
    fn refuse_loops(&self, plan: &Plan) -> Result<(), ChangeError> {
        self.refuse_loops_by(plan, &mut Whereabouts::default())
    }

    pub(super) fn refuse_loops_by(
        &self,
        Plan { add, change, remove, .. }: &Plan,
        whereabouts: &mut Whereabouts,
    ) -> Result<(), ChangeError> {
        let (mut names, mut hops) = (Vec::new(), Vec::new());
        for (name, mapping) in add {
            hops.extend(Hop::of(names.len(), mapping));
            names.push(name);
        }
        for (name, mapping) in change {
            let served = self.registry.get(name).map_or(&[][..], |served| &served.ports);
            hops.extend(Hop::of_sockets(names.len(), mapping, on_sockets(served, mapping)));
            names.push(name);
        }
        let gone = remove.iter().chain(change.iter().map(|(name, _mapping)| name)).collect();
        let refused = refuse_loops(&hops, self.hops_without(&gone, &hops), whereabouts);
        refused.map_err(|source| ChangeError::Loop { name: names[source.mapping].clone(), source })
    }

    /// The same check for mappings whose ports have been chosen by now.
    fn refuse_loops_of_chosen(&self, prepared: &Prepared) -> Result<(), ChangeError> {
        let Prepared { added, changed, removed, .. } = prepared;
        let hops = |chosen: bool| {
            let are =
                move |served: &Served| chosen != matches!(served.mapping.host_ports(), HostPorts::Exactly(_));
            let some = added.iter().enumerate().filter(move |(_index, (_name, served))| are(served));
            some.flat_map(|(index, (_name, served))| hops_of(index, served))
        };
        let mut known: Vec<Hop<'_>> = hops(true).collect();
        let chosen = known.len();
        if chosen == 0 {
            return Ok(());
        }
        known.extend(hops(false).chain(changed.iter().flat_map(|(_name, served)| hops_of(0, served))));
        let gone = removed.iter().chain(changed.iter().map(|(name, _served)| name)).collect();
        let kept = self.hops_without(&gone, &known);
        let (chosen, others) = known.split_at(chosen);
        let others = others.iter().copied().chain(kept);
        let refused = refuse_loops(chosen, others, &mut Whereabouts::default());
        refused.map_err(|source| ChangeError::Loop { name: added[source.mapping].0.clone(), source })
    }

    /// The hops of the served mappings, except for those in `gone`. Returns none if nothing in `from` leads
    /// to a port of theirs, which is cheap to determine.
    pub(super) fn hops_without<'a>(
        &'a self,
        gone: &'a HashSet<&Name>,
        from: &[Hop<'_>],
    ) -> impl Iterator<Item = Hop<'a>> {
        let is_reached = from.iter().any(|hop| {
            matches!(hop.backend, Place::Unix(_)) || self.registry.listens_on(hop.protocol, hop.backend_ports)
        });
        let served = is_reached.then(|| self.registry.iter()).into_iter().flatten();
        let kept = served.filter(|(name, _served)| !gone.contains(name));
        kept.flat_map(|(_name, served)| hops_of(0, served))
    }

    async fn prepare_new(
        &mut self,
        name: &Name,
        mapping: Mapping,
        prepared: &mut Prepared,
    ) -> Result<Served, ChangeError> {
        let policy = self.new_policy(name.clone(), mapping.shared_limits());
        if mapping.interface().is_none() {
            let ports = self.bind_ports(name, &mapping, &policy, prepared).await?;
            return Ok(Served { mapping, policy, ports, process: None });
        }
        let (mut there, mut ports) = (Vec::new(), Vec::new());
        for ip in mapping.addresses() {
            match self.bind_ports(name, &mapping.listening_at(&[*ip]), &policy, prepared).await {
                Ok(bound) => {
                    there.push(*ip);
                    ports.extend(bound);
                }
                // The interface may have lost it meanwhile.
                Err(error) if error.is_not_there() => self.links.look_again(),
                Err(error) => return Err(error),
            }
        }
        Ok(Served { mapping: mapping.listening_at(&there), policy, ports, process: None })
    }

    /// Binds the ports of a mapping, or uses sockets for them that were passed or are spare.
    pub(super) async fn bind_ports(
        &mut self,
        name: &Name,
        mapping: &Mapping,
        policy: &Arc<MappingPolicy>,
        prepared: &mut Prepared,
    ) -> Result<Vec<Binding>, ChangeError> {
        let watch_error = |source| ChangeError::Watch { name: name.clone(), source };
        let mut ports = Vec::with_capacity(mapping.sockets());
        if let HostPorts::Exactly(_) = mapping.host_ports() {
            for port_mapping in mapping.port_mappings() {
                // Yields, so that the caller can also handle signals.
                consume_budget().await;
                if let Some(passed) = prepared.passed.take_at(&port_mapping) {
                    refuse_other_families(name, &passed.port_mapping, &port_mapping)?;
                    let bound = BoundPort { port_mapping, ..passed };
                    ports.push(self.assign_of(bound, mapping, policy).map_err(watch_error)?);
                    continue;
                }
                prepared.unpassed.push(port_mapping.clone());
                let place = BindKey::of(&port_mapping);
                ports.push(match prepared.spare.remove(&place).or_else(|| self.leaving.get(&place)) {
                    Some(port) => Binding { port, target: target(mapping, port_mapping, policy) },
                    None => {
                        let bound = self.bind(port_mapping, mapping.limits()).await;
                        let bound =
                            bound.map_err(|source| self.bind_error(name, mapping, source, prepared))?;
                        self.assign_of(bound, mapping, policy).map_err(watch_error)?
                    }
                });
            }
        } else {
            consume_budget().await;
            let bound = Bound::bind(mapping.clone());
            let bound = bound.map_err(|source| self.bind_error(name, mapping, source, prepared))?;
            for port in bound.ports {
                prepared.unpassed.push(port.port_mapping.clone());
                ports.push(self.assign_of(port, mapping, policy).map_err(watch_error)?);
            }
        }
        Ok(ports)
    }

    fn assign_of(
        &mut self,
        port: BoundPort,
        mapping: &Mapping,
        policy: &Arc<MappingPolicy>,
    ) -> io::Result<Binding> {
        let target = target(mapping, port.port_mapping.clone(), policy);
        self.assign(port, target)
    }

    /// Binds a port. If flows use it as their local port, they release it.
    async fn bind(&self, port_mapping: PortMapping, limits: &Limits) -> Result<BoundPort, BindError> {
        match BoundPort::bind_for(port_mapping.clone(), limits) {
            Err(error)
                if port_mapping.protocol == Protocol::Udp
                    && error.source.kind() == io::ErrorKind::AddrInUse =>
            {
                self.give_way(port_mapping.host.port().unwrap_or(0)).await;
                BoundPort::bind_for(port_mapping, limits)
            }
            bound => bound,
        }
    }

    /// Why a mapping cannot be bound. Another mapping may be the cause, served or part of the same change.
    fn bind_error(
        &self,
        name: &Name,
        mapping: &Mapping,
        source: BindError,
        prepared: &Prepared,
    ) -> ChangeError {
        let served = self.registry.iter().chain(prepared.added.iter().map(|(name, served)| (name, served)));
        match source.taken_by(mapping, served) {
            Some((port, other, _mapping)) if prepared.removed.contains(other) => {
                ChangeError::StillBound { name: name.clone(), other: other.clone(), port }
            }
            Some((port, _name, other)) => OverlapError::new(mapping, other, port).into(),
            None => {
                let source = source.of(prepared.missing).on(mapping.interface());
                ChangeError::Bind { name: name.clone(), source }
            }
        }
    }

    /// A mapping with a new policy on its existing sockets.
    pub(super) fn prepare_change(&self, name: Name, mapping: Mapping) -> Result<(Name, Served), ChangeError> {
        let Some(old) = self.registry.get(&name) else {
            return Err(ChangeError::Unknown(name));
        };
        let mapping = mapping.listening_at(old.mapping.addresses());
        let policy = if *mapping.limits() == *old.policy.limits {
            old.policy.clone()
        } else {
            Arc::new(MappingPolicy { limits: mapping.shared_limits(), state: old.policy.state.clone() })
        };
        let sockets = old.ports.iter().zip(on_sockets(&old.ports, &mapping));
        let assign = |(old, port_mapping): (&Binding, PortMapping)| Binding {
            port: old.port.clone(),
            target: target(&mapping, port_mapping, &policy),
        };
        let ports = sockets.map(assign).collect();
        Ok((name, Served { mapping, policy, ports, process: old.process }))
    }

    /// Completes what was prepared of a mapping that gets these sockets, beside those that it has.
    pub(super) fn begin_at(&mut self, new: &[Binding], Prepared { unpassed, .. }: Prepared) {
        self.begin(new, unpassed);
    }

    /// Prepares what outlasts removed mappings for the sockets that serve from now on.
    fn begin(&mut self, new: &[Binding], unpassed: Vec<PortMapping>) {
        new.iter().for_each(|new| self.leaving.forget(&BindKey::of(&new.target.port_mapping)));
        forget_stale_flows(unpassed);
    }

    /// Applies what was prepared.
    pub(super) async fn commit(&mut self, prepared: Prepared, removal: Removal) {
        let Prepared { added, changed, removed, spare, unpassed, .. } = prepared;
        let ports = |set: &[(Name, Served)]| -> Vec<Binding> {
            set.iter().flat_map(|(_name, served)| served.ports.clone()).collect()
        };
        let (new, other) = (ports(&added), ports(&changed));
        self.begin(&new, unpassed);
        for name in &removed {
            drop(self.registry.take(name));
        }
        announce_removed(&removed);
        let mut names = Vec::with_capacity(added.len() + changed.len());
        for (name, served) in added.into_iter().chain(changed) {
            names.push(name.clone());
            self.registry.put(name, served);
        }
        self.keep_names();
        self.tell_interfaces();
        if self.links.has_refused() {
            // What was removed may have been in the way.
            self.links.look_again();
        }
        self.watch(new);
        self.change_targets(other).await;
        announce_all(names.iter().filter_map(|name| Some((name, self.registry.get(name)?))));
        match removal {
            Removal::Drain => {
                self.leaving.add(&spare);
                self.release(spare.into_values().collect()).await;
            }
            Removal::Cut => {
                self.close_unpublished(spare.into_values().collect()).await;
                self.cut_left(&removed.into_iter().collect()).await;
            }
        }
    }
}

/// Refuses sockets that no mapping has taken: whoever passed them expects them to be served.
fn refuse_unused(passed: &InheritedSockets) -> Result<(), ChangeError> {
    let Some(listener) = passed.first_left() else { return Ok(()) };
    let protocol = listener.protocol();
    let addr = listener.local_addr().unwrap_or(HostSocketAddr::new(ScopedIp::ANY, 0));
    Err(ChangeError::UnusedSocket { protocol, addr })
}

/// Refuses a passed socket on all addresses that accepts other clients than the mapping would.
fn refuse_other_families(name: &Name, is: &PortMapping, wanted: &PortMapping) -> Result<(), ChangeError> {
    let PortMapping { protocol, host, v6only, .. } = is.clone();
    // Only all addresses of IPv6 can include those of IPv4 (ipv6(7)).
    let is_wildcard = host.inet_addr().is_some_and(|addr| addr.ip().is_unspecified());
    if v6only == wanted.v6only || !is_wildcard {
        return Ok(());
    }
    Err(ChangeError::OtherFamilies { name: name.clone(), protocol, addr: host, v6only })
}

/// Refuses a backend that is a Unix socket if this process may not open one.
fn refuse_unreachable(plan: &Plan) -> Result<(), ChangeError> {
    let mut all = plan.add.iter().chain(&plan.change);
    let unix = all.find(|(_name, mapping)| matches!(mapping.backend(), BackendHost::Unix(_)));
    let Some((name, _mapping)) = unix else { return Ok(()) };
    let opened = Socket::new(Domain::UNIX, Type::STREAM, None);
    opened.map(drop).map_err(|source| ChangeError::UnixSocket { name: name.clone(), source })
}

/// The port mappings of `mapping` for existing sockets, at the addresses where they listen.
fn on_sockets(sockets: &[Binding], mapping: &Mapping) -> impl Iterator<Item = PortMapping> {
    sockets.iter().zip(mapping.port_mappings()).map(|(old, new)| {
        let PortMapping { host, v6only, .. } = old.target.port_mapping.clone();
        PortMapping { host, v6only, ..new }
    })
}

fn hops_of(index: usize, served: &Served) -> Vec<Hop<'_>> {
    Hop::of_sockets(index, &served.mapping, served.ports.iter().map(|port| port.target.port_mapping.clone()))
}

/// Deletes stale conntrack entries of new ports in the background: searching the table takes 20 ms, however
/// few entries it has. Without a thread for it, the caller waits. Those of sockets that were passed are left alone: clients
/// may have sent to them, and a reply without an entry would begin one that looks as if this host had begun the flow.
fn forget_stale_flows(mut udp: Vec<PortMapping>) {
    udp.retain(|port_mapping| port_mapping.protocol == Protocol::Udp);
    if !udp.is_empty() {
        let forget = |udp: Vec<PortMapping>| stale::forget_flows_to(&udp);
        if let Err((_error, udp)) = start_thread("rproxy-stale", STACK_SIZE, udp, forget) {
            forget(udp);
        }
    }
}

/// A change whose failing steps are all done.
#[derive(Default)]
pub(super) struct Prepared {
    added: Vec<(Name, Served)>,
    changed: Vec<(Name, Served)>,
    removed: Vec<Name>,
    /// Sockets of removed mappings that no added one uses.
    spare: Spare,
    /// Sockets that were passed for added mappings and that none has taken yet.
    passed: InheritedSockets,
    /// The ports of added mappings that have taken none.
    unpassed: Vec<PortMapping>,
    /// The number of sockets still to be bound or reused.
    missing: usize,
}

impl Prepared {
    /// A change that needs this number of sockets.
    pub(super) fn missing(sockets: usize) -> Self {
        Self { missing: sockets, ..Self::default() }
    }

    /// The mappings that are served from then on.
    pub(super) fn served(&self) -> impl Iterator<Item = &(Name, Served)> {
        self.changed.iter().chain(&self.added)
    }

    /// The names of mappings that change or are removed.
    pub(super) fn names_before(&self) -> impl Iterator<Item = &Name> {
        self.changed.iter().map(|(name, _served)| name).chain(&self.removed)
    }

    /// A change of mappings that keep their sockets.
    pub(super) fn changing(changed: Vec<(Name, Served)>) -> Self {
        Self { changed, ..Self::default() }
    }
}

type Spare = HashMap<BindKey, Arc<WatchedListener>>;

impl BindError {
    /// If served mappings occupy each candidate port, returns the lowest port and the mapping that has it.
    fn taken_by<'a>(
        &self,
        mapping: &Mapping,
        mut served: impl Iterator<Item = (&'a Name, &'a Served)>,
    ) -> Option<(u16, &'a Name, &'a Mapping)> {
        if self.source.kind() != io::ErrorKind::AddrInUse {
            return None;
        }
        if self.addr.unix_addr().is_some() {
            let listens =
                |other: &Served| other.ports.iter().any(|port| port.target.port_mapping.host == self.addr);
            let (name, other) = served.find(|(_name, other)| listens(other))?;
            return Some((PortRange::OF_UNIX.first(), name, &other.mapping));
        }
        let wanted = self.among.or(PortRange::single(self.addr.port()?).ok())?;
        let mut taken = BTreeMap::new();
        for (name, other) in served {
            for Binding { target, .. } in &other.ports {
                let there = &target.port_mapping;
                let Some(port) = there.host.port() else { continue };
                let here =
                    |ip| mapping.port_mapping(ip, there.protocol, port, mapping.backend_ports().first());
                let is_in_the_way = wanted.contains(port)
                    && mapping.protocols().contains(there.protocol)
                    && mapping.addresses().iter().any(|ip| exclude_each_other(&here(*ip), there));
                if is_in_the_way {
                    taken.entry(port).or_insert((name, &other.mapping));
                }
            }
        }
        let (port, (name, other)) = taken.first_key_value()?;
        (taken.len() == wanted.count()).then_some((*port, *name, *other))
    }
}

/// Released sockets that are still open. UDP sockets stay open until their flows are quiet.
#[derive(Debug, Default)]
pub(crate) struct Leaving {
    sockets: HashMap<BindKey, Weak<WatchedListener>>,
    sweep: Sweep,
}

impl Leaving {
    fn add(&mut self, sockets: &Spare) {
        self.sockets.extend(sockets.iter().map(|(place, port)| (place.clone(), Arc::downgrade(port))));
        if self.sweep.is_due(self.sockets.len()) {
            self.sockets.retain(|_place, port| port.strong_count() > 0);
            self.sweep.done(self.sockets.len());
        }
    }

    /// The socket with this key, if it is still open.
    fn get(&self, place: &BindKey) -> Option<Arc<WatchedListener>> {
        self.sockets.get(place)?.upgrade()
    }

    /// Records that the socket with this key is served again.
    fn forget(&mut self, place: &BindKey) {
        self.sockets.remove(place);
    }
}

/// What a socket is bound to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct BindKey {
    protocol: Protocol,
    host: HostSocketAddr,
    v6only: bool,
}

impl BindKey {
    pub(super) fn of(port_mapping: &PortMapping) -> Self {
        let PortMapping { protocol, host, v6only, .. } = port_mapping.clone();
        Self { protocol, host, v6only }
    }
}

fn target(mapping: &Mapping, port_mapping: PortMapping, policy: &Arc<MappingPolicy>) -> Arc<Target> {
    Arc::new(Target::of(mapping, port_mapping, policy.clone()))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use rproxy_mapping::interfaces::NoInterfaces;
    use rproxy_mapping::wire::WireMapping;

    use super::*;
    use crate::runtime::poll::PollSet;

    /// A binding to `host` of a socket that is bound elsewhere.
    fn binding(set: &PollSet, host: &str, v6only: bool) -> Binding {
        let (host, backend) = (host.parse().unwrap(), "192.0.2.1:80".parse().unwrap());
        let policy = Arc::new(MappingPolicy { limits: Arc::default(), state: Arc::default() });
        let port = Arc::new(set.add(UdpSocket::bind("127.0.0.1:0").unwrap()).unwrap());
        Binding {
            port,
            target: Arc::new(Target::new(
                PortMapping { protocol: Protocol::Udp, host, backend, v6only },
                policy,
            )),
        }
    }

    #[test]
    fn a_released_socket_is_found_while_it_is_open_and_others_leave_nothing_behind() {
        let set = PollSet::new().unwrap();
        let mut leaving = Leaving::default();
        let release = |leaving: &mut Leaving, Binding { port, target }: Binding| {
            let place = BindKey::of(&target.port_mapping);
            leaving.add(&Spare::from([(place.clone(), port)]));
            place
        };
        let (kept, taken) = (binding(&set, "10.0.0.11:53", false), binding(&set, "10.0.0.11:54", false));
        let [place, other] = [&kept, &taken].map(|binding| release(&mut leaving, binding.clone()));
        assert!(Arc::ptr_eq(&leaving.get(&other).unwrap(), &taken.port));
        leaving.forget(&other);
        assert!(leaving.get(&other).is_none(), "it is served again");
        for port in 1..=300 {
            let place = release(&mut leaving, binding(&set, &format!("10.0.0.12:{port}"), false));
            assert!(leaving.get(&place).is_none(), "it is closed");
        }
        assert!(Arc::ptr_eq(&leaving.get(&place).unwrap(), &kept.port));
        assert!(leaving.sockets.len() < 150, "{} of 300 are left", leaving.sockets.len());
    }

    #[test]
    fn a_changed_mapping_stays_where_its_sockets_listen() {
        let set = PollSet::new().unwrap();
        let sockets = [binding(&set, "[::]:8080", true)];
        let json = r#"{"name":"web","host":"::","host_ports":"80","to":"192.0.2.2","to_ports":"81"}"#;
        let wire: WireMapping = serde_json::from_str(json).unwrap();
        let mapping = wire.read(&NoInterfaces, ScopedIp::ANY).unwrap();
        let changed: Vec<PortMapping> = on_sockets(&sockets, &mapping).collect();
        let [PortMapping { host, v6only, backend, .. }] = &changed[..] else { panic!("{changed:?}") };
        assert_eq!((host.to_string().as_str(), *v6only), ("[::]:8080", true));
        assert_eq!(backend.to_string(), "192.0.2.2:81");
    }
}
