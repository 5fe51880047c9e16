//! Binding the host ports of mappings: all of a set, or none.
//!
//! A free port is found by binding it. Checking first whether it is free would be a race.

pub mod activation;
pub mod family;
pub(crate) mod holder;
pub mod interfaces;
pub mod listen;
pub(crate) mod return_path;
pub(crate) mod routes;
pub(crate) mod source;
pub mod unix_socket;

use std::fmt::Display;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::ControlFlow;
use std::path::Path;

use rproxy_mapping::addr::Protocol;
use rproxy_mapping::backend::BackendHost;
use rproxy_mapping::limits::Limits;
use rproxy_mapping::ports::PortRange;
use rproxy_mapping::{HostPorts, Mapping, PortMapping};
use tracing::warn;

use crate::bind::activation::{InheritedError, InheritedSockets};
use crate::bind::listen::{BindError, Listener};
use crate::loops::whereabouts::{Destination, Whereabouts};
use crate::loops::{Hop, LoopError, refuse_loop, refuse_loops};

/// A mapping whose host ports are bound: clients can connect from now on.
#[derive(Debug)]
pub struct Bound {
    /// The mapping as requested.
    pub mapping: Mapping,
    /// Its sockets, TCP first, each in port order.
    pub ports: Vec<BoundPort>,
    /// The process that has attached this port, unless it is a mapping that was requested.
    pub process: Option<u32>,
}

/// One bound port.
#[derive(Debug)]
pub struct BoundPort {
    /// The port mapping, with the actual host port.
    pub port_mapping: PortMapping,
    /// The socket.
    pub listener: Listener,
}

impl BoundPort {
    /// Binds the host address of `port_mapping`; the kernel chooses a port for 0.
    ///
    /// # Errors
    /// [`BindError`]
    pub fn bind(port_mapping: PortMapping) -> Result<Self, BindError> {
        Self::bind_for(port_mapping, &Limits::default())
    }

    /// As [`Self::bind`], in the way that the options of its mapping ask for.
    ///
    /// # Errors
    /// [`BindError`]
    pub fn bind_for(port_mapping: PortMapping, limits: &Limits) -> Result<Self, BindError> {
        let listener = Listener::bind(&port_mapping, limits)?;
        Ok(Self { port_mapping, listener }.with_real_port())
    }

    /// Uses `listener` for `port_mapping`. The address where it listens replaces the host address.
    pub fn adopt(port_mapping: PortMapping, listener: Listener) -> Self {
        let host = listener.local_addr().unwrap_or(port_mapping.host);
        let v6only = listener.is_v6only().unwrap_or(port_mapping.v6only);
        Self { port_mapping: PortMapping { host, v6only, ..port_mapping }, listener }
    }

    /// The address that clients connect to, with the actual port.
    ///
    /// # Errors
    /// Those of getsockname(2), and another one for a Unix socket.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()?.inet_addr().ok_or_else(|| io::ErrorKind::Unsupported.into())
    }

    fn with_real_port(mut self) -> Self {
        if self.port_mapping.host.port() == Some(0)
            && let Ok(addr) = self.listener.local_addr()
        {
            self.port_mapping.host = addr;
        }
        self
    }
}

impl Bound {
    /// Binds one mapping.
    ///
    /// # Errors
    /// [`BindError`] for the port that cannot be bound; the others are closed.
    pub fn bind(mapping: Mapping) -> Result<Self, BindError> {
        let limits = mapping.limits().clone();
        Self::bind_by(mapping, |port_mapping| BoundPort::bind_for(port_mapping, &limits))
    }

    /// The paths of the Unix sockets that it listens on.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        self.ports.iter().filter_map(|port| port.port_mapping.host.unix_addr()?.path())
    }

    /// Whether it listens where requested, rather than where an inherited socket does.
    pub fn is_where_asked(&self) -> bool {
        let asked = self.mapping.port_mappings().map(|port_mapping| port_mapping.host);
        asked.eq(self.ports.iter().map(|port| port.port_mapping.host.clone()))
    }

    /// Binds one mapping, or uses inherited sockets from `passed` for it.
    fn take_or_bind(mapping: Mapping, passed: &mut InheritedSockets) -> Result<Self, BoundError> {
        if let Some(ports) = passed.take_named(&mapping)? {
            return Ok(Self { mapping, ports, process: None });
        }
        let limits = mapping.limits().clone();
        let bind = |port_mapping| BoundPort::bind_for(port_mapping, &limits);
        let take_or_bind =
            |port_mapping| passed.take_at(&port_mapping).map_or_else(|| bind(port_mapping), Ok);
        Ok(Self::bind_by(mapping, take_or_bind)?)
    }

    /// Binds the host ports of `mapping` with `bind`.
    fn bind_by(
        mapping: Mapping,
        bind: impl FnMut(PortMapping) -> Result<BoundPort, BindError>,
    ) -> Result<Self, BindError> {
        let ports = match mapping.host_ports() {
            HostPorts::Exactly(_) if mapping.interface().is_some() => {
                return Self::bind_at_interface(&mapping, bind);
            }
            HostPorts::Exactly(_) => mapping.port_mappings().map(bind).collect::<Result<_, _>>()?,
            HostPorts::FirstFree(range) => {
                let backend_port = mapping.backend_ports().first();
                bind_one_of(&mapping, range.iter(), backend_port)?
            }
            HostPorts::Random => bind_random(&mapping)?,
        };
        Ok(Self { mapping, ports, process: None })
    }

    /// Binds the host ports of `mapping` at each address that its interface still has.
    fn bind_at_interface(
        mapping: &Mapping,
        mut bind: impl FnMut(PortMapping) -> Result<BoundPort, BindError>,
    ) -> Result<Self, BindError> {
        let (mut there, mut ports) = (Vec::new(), Vec::new());
        for ip in mapping.addresses() {
            let bound: Result<Vec<_>, _> = mapping.port_mappings_at(*ip).map(&mut bind).collect();
            match bound {
                Err(error) if error.is_not_there() => {}
                bound => {
                    ports.extend(bound.map_err(|error| error.on(mapping.interface()))?);
                    there.push(*ip);
                }
            }
        }
        Ok(Self { mapping: mapping.listening_at(&there), ports, process: None })
    }

    /// Binds all mappings and returns them in the same order. Mappings with several candidate ports are bound
    /// last, so that they do not take a port that another one needs. Sockets in `passed` are used instead of
    /// binding; those that no mapping takes are closed.
    ///
    /// # Errors
    /// [`BoundError`] for the first port that cannot be bound, or that would lead back to itself; all others
    /// are closed.
    pub fn bind_all(mappings: Vec<Mapping>, mut passed: InheritedSockets) -> Result<Vec<Self>, BoundError> {
        let mut turns: Vec<(usize, Mapping)> = mappings.into_iter().enumerate().collect();
        turns.sort_by_key(|(_index, mapping)| mapping.host_ports().freedom());
        let mut missing: usize = turns.iter().map(|(_index, mapping)| mapping.sockets()).sum();
        let mut bind = |(index, mapping): (usize, Mapping)| {
            let sockets = mapping.sockets();
            let bound = Self::take_or_bind(mapping, &mut passed).map_err(|error| error.of(missing))?;
            missing -= sockets;
            Ok::<_, BoundError>((index, bound))
        };
        let mut bound: Vec<_> = turns.into_iter().map(&mut bind).collect::<Result<_, _>>()?;
        bound.sort_by_key(|(index, _bound)| *index);
        let mut bound: Vec<Self> = bound.into_iter().map(|(_index, bound)| bound).collect();
        let named = Self::leave_out_names(&mut bound);
        Self::refuse_loops(&bound)?;
        Self::lead_to_usable(&mut bound, named);
        Ok(bound)
    }

    /// Leaves out the addresses of names that lead back.
    pub(crate) fn leave_out_loops(bound: &mut [Self]) {
        let named = Self::leave_out_names(bound);
        Self::lead_to_usable(bound, named);
    }

    /// Has names stand for nothing. Returns the mappings as they were, with their indexes.
    fn leave_out_names(bound: &mut [Self]) -> Vec<(usize, Mapping)> {
        let is_named = |bound: &Self| bound.mapping.backend().name().is_some();
        let named = bound.iter_mut().enumerate().filter(|(_index, bound)| is_named(bound));
        let without = |(index, bound): (usize, &mut Self)| {
            let mapping = bound.mapping.clone();
            bound.lead_to(mapping.resolved(&[]));
            (index, mapping)
        };
        named.map(without).collect()
    }

    /// Has these mappings lead to those addresses of their names that do not lead back.
    fn lead_to_usable(bound: &mut [Self], named: Vec<(usize, Mapping)>) {
        let mut whereabouts = Whereabouts::default();
        for (index, mapping) in named {
            let BackendHost::Name(host) = mapping.backend() else { continue };
            let is_usable = |ip: &IpAddr| {
                whereabouts.of((*ip).into()) != Destination::Here
                    || Self::refuse_loops_at(bound, Some((index, *ip)), &mut whereabouts)
                        .inspect_err(|reason| report_unused(*ip, reason))
                        .is_ok()
            };
            let usable: Vec<IpAddr> = host.addresses().iter().copied().filter(is_usable).collect();
            let is_known = !host.addresses().is_empty();
            bound[index].lead_to(if is_known { mapping.leading_to(&usable) } else { mapping });
        }
    }

    /// Has the ports lead to the backend of `mapping`, which is the same but for the addresses of its name.
    pub(crate) fn lead_to(&mut self, mapping: Mapping) {
        let first = mapping.backend().first_ip().ip();
        for BoundPort { port_mapping, .. } in &mut self.ports {
            *port_mapping = port_mapping.at(first);
        }
        self.mapping = mapping;
    }

    /// Refuses a set of bound mappings if one of them leads back to itself.
    ///
    /// # Errors
    /// [`LoopError`] with the index of the mapping.
    pub fn refuse_loops(bound: &[Self]) -> Result<(), LoopError> {
        Self::refuse_loops_at(bound, None, &mut Whereabouts::default())
    }

    /// The same, if the mapping at an index has its backend at another address.
    fn refuse_loops_at(
        bound: &[Self],
        moved: Option<(usize, IpAddr)>,
        whereabouts: &mut Whereabouts,
    ) -> Result<(), LoopError> {
        let hops = bound.iter().enumerate().flat_map(|(index, bound)| {
            let ip = moved.filter(|(moved, _ip)| *moved == index).map(|(_index, ip)| ip);
            let at = |port_mapping: &PortMapping| match ip {
                Some(ip) => port_mapping.at(ip),
                None => port_mapping.clone(),
            };
            Hop::of_sockets(index, &bound.mapping, bound.ports.iter().map(|port| at(&port.port_mapping)))
        });
        refuse_loops(&hops.collect::<Vec<_>>(), [], whereabouts)
    }
}

/// Logs that a name stands for an address which would lead back.
pub(crate) fn report_unused(address: IpAddr, reason: &impl Display) {
    warn!(%address, %reason, "an address of the backend is not used");
}

/// Binds a random port for each port of the backend, the same for TCP and UDP.
fn bind_random(mapping: &Mapping) -> Result<Vec<BoundPort>, BindError> {
    let range = PortRange::EPHEMERAL;
    let start = usize::try_from(RandomState::new().hash_one(()) >> 32).unwrap_or(0) % range.count();
    let mut ports = range.iter().cycle().skip(start);
    let mut bound = Vec::with_capacity(mapping.sockets());
    for backend_port in mapping.backend_ports().iter() {
        // At most the whole range once, continuing after the last port found.
        bound.extend(bind_one_of(mapping, ports.by_ref().take(range.count()), backend_port)?);
    }
    bound.sort_by_key(|port| port.port_mapping.protocol == Protocol::Udp);
    Ok(bound)
}

/// Binds the first port that is free for all protocols of the mapping.
fn bind_one_of(
    mapping: &Mapping,
    candidates: impl Iterator<Item = u16>,
    backend_port: u16,
) -> Result<Vec<BoundPort>, BindError> {
    let bind = |port: u16| -> Result<Vec<BoundPort>, BindError> {
        let port_mappings = mapping.addresses().iter().flat_map(|ip| {
            mapping.protocols().iter().map(|protocol| mapping.port_mapping(*ip, protocol, port, backend_port))
        });
        port_mappings.map(|port_mapping| BoundPort::bind_for(port_mapping, mapping.limits())).collect()
    };
    let mut whereabouts = Whereabouts::default();
    let mut reaches_itself = |port: &u16| {
        let protocol = mapping.protocols().iter().next().unwrap_or(Protocol::Tcp);
        let mut sockets =
            mapping.addresses().iter().map(|ip| mapping.port_mapping(*ip, protocol, *port, backend_port));
        *port == backend_port && sockets.any(|socket| refuse_loop(&socket, &mut whereabouts).is_err())
    };
    let mut candidates = candidates.filter(|port| !reaches_itself(port));
    let tried = candidates.try_fold(None, |_taken, port| match bind(port) {
        Ok(bound) => ControlFlow::Break(Ok(bound)),
        Err(error) if error.source.kind() == io::ErrorKind::AddrInUse => ControlFlow::Continue(Some(error)),
        Err(error) => ControlFlow::Break(Err(error)),
    });
    match tried {
        ControlFlow::Break(result) => result,
        ControlFlow::Continue(last) => Err(BindError::all_taken(mapping, last)),
    }
}

/// Why a set of mappings cannot be bound.
#[derive(Debug, thiserror::Error)]
pub enum BoundError {
    /// A port cannot be bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The number of inherited sockets does not match.
    #[error(transparent)]
    InheritedSockets(#[from] InheritedError),
    /// A mapping leads back to itself.
    #[error(transparent)]
    Loop(#[from] LoopError),
}

impl BoundError {
    /// Sets the number of sockets still to be bound, including the one that failed.
    fn of(self, more: usize) -> Self {
        match self {
            Self::Bind(error) => Self::Bind(error.of(more)),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};

    use super::*;

    fn bind(ports: Option<PortRange>, proto: &str, backend_ports: &str) -> Result<Bound, BindError> {
        let host = ("127.0.0.1".parse().unwrap(), ports);
        let backend = ("192.0.2.1".parse().unwrap(), backend_ports.parse().unwrap());
        let mapping = Mapping::new(proto.parse().unwrap(), host, backend).unwrap();
        Bound::bind(mapping)
    }

    fn host_ports(bound: &Bound) -> Vec<u16> {
        bound.ports.iter().map(|port| port.port_mapping.host.port().unwrap()).collect()
    }

    #[test]
    fn random_ports_are_ephemeral_and_the_same_for_both_protocols() {
        let bound = bind(None, "tcp+udp", "80-83").unwrap();
        let ports = host_ports(&bound);
        assert_eq!(ports[..4], ports[4..]);
        assert!(ports.iter().all(|port| PortRange::EPHEMERAL.contains(*port)), "{ports:?}");
        for port in bound.ports {
            assert_eq!(port.local_addr().ok(), port.port_mapping.host.inet_addr());
        }
    }

    /// Two consecutive free ports, and the socket that occupies the first.
    fn taken_and_free() -> (TcpListener, PortRange) {
        (1..)
            .find_map(|_| {
                let taken = TcpListener::bind("127.0.0.1:0").unwrap();
                let port = taken.local_addr().unwrap().port();
                let next = port.checked_add(1)?;
                TcpListener::bind(("127.0.0.1", next)).ok()?;
                UdpSocket::bind(("127.0.0.1", next)).ok()?;
                Some((taken, PortRange::new(port, next).unwrap()))
            })
            .unwrap()
    }

    #[test]
    fn the_first_port_that_is_free_for_both_protocols_is_taken() {
        let (_taken, range) = taken_and_free();
        let bound = bind(Some(range), "tcp+udp", "80").unwrap();
        assert_eq!(host_ports(&bound), [range.last(), range.last()]);
        let message = bind(Some(range), "tcp", "80").unwrap_err().to_string();
        assert!(message.contains("none of its ports is free"), "{message}");
    }
}
