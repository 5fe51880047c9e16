//! Changing what a running server serves.
//!
//! A change is prepared first: everything that can fail, above all binding, happens on sockets that
//! nobody is served on yet. Then it is committed, which cannot fail; or dropped, and nothing has
//! changed. Sockets go over from a mapping that goes to one that comes, if both listen there.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Weak};

use tracing::info;

use crate::addr::{HostAddr, Protocol, ScopedIp};
use crate::bound::{Bound, BoundPort};
use crate::listen::BindError;
use crate::mapping::{Forward, HostPorts, LoopError, Mapping, MappingError};
use crate::name::Name;
use crate::overlap::{OverlapError, refuse_overlap};
use crate::plan::{Plan, plan};
use crate::poll::Port;
use crate::ports::PortRange;
use crate::registry::Served;
use crate::server::Server;
use crate::service::{Assignment, Route, Service};
use crate::udp::stale;

/// Why a change was not made; nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// Another mapping has the name.
    #[error("the name {0} is taken by another mapping; choose another, or remove that one first")]
    NameTaken(Name),
    /// No mapping has the name.
    #[error("there is no mapping {0}; `rproxy ctl list` shows which there are")]
    Unknown(Name),
    /// Two mappings want the same port.
    #[error("{}: {_0}", .0.mapping.name())]
    Overlap(#[from] OverlapError),
    /// A host port cannot be bound.
    #[error("{name}: {source}")]
    Bind {
        /// The mapping.
        name: Name,
        /// Why.
        source: BindError,
    },
    /// The new backend does not fit.
    #[error("{name}: {source}")]
    Mapping {
        /// The mapping.
        name: Name,
        /// Why.
        source: MappingError,
    },
    /// The kernel refused to watch a socket.
    #[error("{name}: cannot watch a listener: {source}")]
    Watch {
        /// The mapping.
        name: Name,
        /// What epoll_ctl(2) answered.
        source: io::Error,
    },
}

/// What a change came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// Mappings that are served since.
    pub added: usize,
    /// Mappings that lead elsewhere since, or have other limits.
    pub changed: usize,
    /// Mappings that are not served since.
    pub removed: usize,
    /// Mappings that were not touched.
    pub unchanged: usize,
}

impl Server {
    /// Serves more mappings, or none of them.
    ///
    /// # Errors
    /// [`ChangeError`]
    pub async fn add(&mut self, mappings: Vec<Mapping>) -> Result<Changed, ChangeError> {
        let mut add = Vec::with_capacity(mappings.len());
        for mapping in mappings {
            let name = mapping.name();
            if self.registry.get(&name).is_some() || add.iter().any(|(other, _mapping)| *other == name) {
                return Err(ChangeError::NameTaken(name));
            }
            add.push((name, mapping));
        }
        self.carry_out(Plan { add, unchanged: self.registry.len(), ..Plan::default() }).await
    }

    /// Serves a mapping no more. Its connections and flows go on.
    ///
    /// # Errors
    /// [`ChangeError::Unknown`]
    pub async fn remove(&mut self, name: &Name) -> Result<Changed, ChangeError> {
        if self.registry.get(name).is_none() {
            return Err(ChangeError::Unknown(name.clone()));
        }
        let unchanged = self.registry.len() - 1;
        self.carry_out(Plan { remove: vec![name.clone()], unchanged, ..Plan::default() }).await
    }

    /// Makes new connections and flows of a mapping go to another backend. Those that it has go on.
    ///
    /// # Errors
    /// [`ChangeError::Unknown`], or [`ChangeError::Mapping`] if the ports do not fit.
    pub async fn retarget(
        &mut self,
        name: &Name,
        backend: ScopedIp,
        ports: PortRange,
    ) -> Result<Changed, ChangeError> {
        let Some(served) = self.registry.get(name) else {
            return Err(ChangeError::Unknown(name.clone()));
        };
        let wrong = |source| ChangeError::Mapping { name: name.clone(), source };
        let old = served.mapping.backend_ports();
        if old.count() != ports.count() {
            return Err(wrong(MappingError::Lengths { host: old, backend: ports }));
        }
        let mut mapping = served.mapping.retargeted(backend, ports).map_err(wrong)?;
        if mapping.name() != *name {
            // The default name of a random port has the backend's in it.
            mapping = mapping.named(name.clone());
        }
        let unchanged = self.registry.len() - 1;
        self.carry_out(Plan { change: vec![(name.clone(), mapping)], unchanged, ..Plan::default() }).await
    }

    /// Serves exactly these mappings from now on. What did not change is not touched.
    ///
    /// # Errors
    /// [`ChangeError`]
    pub async fn apply(&mut self, wanted: Vec<Mapping>) -> Result<Changed, ChangeError> {
        refuse_overlap(&wanted)?;
        let served = self.registry.iter().map(|(name, served)| (name, &served.mapping));
        let plan = plan(served, wanted).map_err(ChangeError::NameTaken)?;
        self.carry_out(plan).await
    }

    async fn carry_out(&mut self, plan: Plan) -> Result<Changed, ChangeError> {
        let changed = Changed {
            added: plan.add.len(),
            changed: plan.change.len(),
            removed: plan.remove.len(),
            unchanged: plan.unchanged,
        };
        let prepared = self.prepare(plan)?;
        self.commit(prepared).await;
        Ok(changed)
    }

    /// Everything that can fail.
    fn prepare(&mut self, plan: Plan) -> Result<Prepared, ChangeError> {
        let mut spare = self.spare_sockets(&plan.remove);
        let changed = plan.change.into_iter().map(|(name, mapping)| self.prepare_change(name, mapping));
        let changed = changed.collect::<Result<_, _>>()?;
        let mut added = Vec::with_capacity(plan.add.len());
        // Those that may choose choose last.
        let (exact, choosing): (Vec<_>, Vec<_>) = plan
            .add
            .into_iter()
            .partition(|(_, mapping)| matches!(mapping.host_ports(), HostPorts::Exactly(_)));
        for (name, mapping) in exact.into_iter().chain(choosing) {
            let served = self.prepare_new(&name, mapping, &mut spare)?;
            added.push((name, served));
        }
        Ok(Prepared { added, changed, removed: plan.remove, spare })
    }

    /// The sockets of mappings that go, or went and still have flows.
    fn spare_sockets(&mut self, removed: &[Name]) -> Spare {
        let mut spare = self.leaving.sockets();
        let ports =
            removed.iter().filter_map(|name| self.registry.get(name)).flat_map(|served| &served.ports);
        spare.extend(ports.map(|Assignment { port, route }| (Place::of(&route.forward), port.clone())));
        spare
    }

    fn prepare_new(
        &mut self,
        name: &Name,
        mapping: Mapping,
        spare: &mut Spare,
    ) -> Result<Served, ChangeError> {
        let watch_error = |source| ChangeError::Watch { name: name.clone(), source };
        let service = self.new_service(mapping.limits().clone());
        let mut ports = Vec::with_capacity(mapping.sockets());
        if let HostPorts::Exactly(_) = mapping.host_ports() {
            for forward in mapping.forwards() {
                ports.push(match spare.remove(&Place::of(&forward)) {
                    Some(port) => Assignment { port, route: route(forward, &service) },
                    None => {
                        let bound = BoundPort::bind(forward);
                        let bound = bound.map_err(|source| self.bind_error(name, &mapping, source))?;
                        self.assign(bound, &service).map_err(watch_error)?
                    }
                });
            }
        } else {
            let bound = Bound::bind(mapping.clone());
            let bound = bound.map_err(|source| self.bind_error(name, &mapping, source))?;
            for port in bound.ports {
                ports.push(self.assign(port, &service).map_err(watch_error)?);
            }
        }
        Ok(Served { mapping, service, ports })
    }

    /// Why a mapping cannot be bound; it may be because of another one.
    fn bind_error(&self, name: &Name, mapping: &Mapping, source: BindError) -> ChangeError {
        let others = self.registry.iter().filter(|(other, _served)| *other != name);
        let mut all: Vec<Mapping> = others.map(|(_name, served)| served.mapping.clone()).collect();
        all.push(mapping.clone());
        match refuse_overlap(&all) {
            Err(overlap) if *overlap.mapping == *mapping => ChangeError::Overlap(overlap),
            _ => ChangeError::Bind { name: name.clone(), source },
        }
    }

    /// A mapping on the sockets that it has, otherwise served.
    fn prepare_change(&self, name: Name, mapping: Mapping) -> Result<(Name, Served), ChangeError> {
        let Some(old) = self.registry.get(&name) else {
            return Err(ChangeError::Unknown(name));
        };
        let service = if *mapping.limits() == old.service.limits {
            old.service.clone()
        } else {
            Arc::new(Service { limits: mapping.limits().clone(), live: old.service.live.clone() })
        };
        let loops = |error: LoopError| ChangeError::Mapping { name: name.clone(), source: error.into() };
        let ports = old.ports.iter().zip(mapping.forwards()).map(|(old, new)| {
            let forward = Forward { host: old.route.forward.host, ..new }.refuse_loop().map_err(loops)?;
            Ok(Assignment { port: old.port.clone(), route: route(forward, &service) })
        });
        let ports = ports.collect::<Result<_, ChangeError>>()?;
        Ok((name, Served { mapping, service, ports }))
    }

    /// Does what was prepared.
    async fn commit(&mut self, prepared: Prepared) {
        let Prepared { added, changed, removed, spare } = prepared;
        let ports = |set: &[(Name, Served)]| -> Vec<Assignment> {
            set.iter().flat_map(|(_name, served)| served.ports.clone()).collect()
        };
        let (new, other) = (ports(&added), ports(&changed));
        forget_stale_flows(&new);
        for name in &removed {
            info!(%name, "serving no more");
            drop(self.registry.take(name));
        }
        for (name, served) in added.into_iter().chain(changed) {
            info!(%name, mapping = %served.mapping, backend = %served.mapping.backend(), "serving");
            self.registry.put(name, served);
        }
        self.change_routes(other);
        self.serve(new);
        self.leaving.add(&spare);
        self.release(spare.into_iter().map(|(place, port)| (place.protocol, port)).collect()).await;
    }
}

/// Makes the kernel forget flows to new ports, without waiting for it: looking through the table of
/// connections takes 20 ms, however few there are.
fn forget_stale_flows(new: &[Assignment]) {
    let udp = new.iter().map(|new| new.route.forward).filter(|forward| forward.protocol == Protocol::Udp);
    let udp: Vec<Forward> = udp.collect();
    if !udp.is_empty() {
        drop(tokio::task::spawn_blocking(move || stale::forget_flows_to(&udp)));
    }
}

/// A change of which everything that can fail is done.
struct Prepared {
    added: Vec<(Name, Served)>,
    changed: Vec<(Name, Served)>,
    removed: Vec<Name>,
    /// Sockets of removed mappings that no added one uses.
    spare: Spare,
}

type Spare = HashMap<Place, Arc<Port>>;

/// Sockets that were released, as long as they are open: those of UDP stay until their flows are
/// quiet.
#[derive(Debug, Default)]
pub(crate) struct Leaving(HashMap<Place, Weak<Port>>);

impl Leaving {
    fn add(&mut self, sockets: &Spare) {
        self.0.extend(sockets.iter().map(|(place, port)| (*place, Arc::downgrade(port))));
    }

    /// Those that are open, and forgets the others.
    fn sockets(&mut self) -> Spare {
        self.0.retain(|_place, port| port.strong_count() > 0);
        self.0.iter().filter_map(|(place, port)| Some((*place, port.upgrade()?))).collect()
    }
}

/// What a socket is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Place {
    protocol: Protocol,
    host: HostAddr,
    v6only: bool,
}

impl Place {
    fn of(forward: &Forward) -> Self {
        Self { protocol: forward.protocol, host: forward.host, v6only: forward.v6only }
    }
}

fn route(forward: Forward, service: &Arc<Service>) -> Arc<Route> {
    Arc::new(Route { forward, service: service.clone() })
}
