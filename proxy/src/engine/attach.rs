//! Ports that other processes bind and attach: one for each port that a container runtime publishes.
//!
//! Such a process passes its listening socket, and keeps it. When it no longer wants the port to be served, the
//! listener is closed at once here, because the other process cannot end before the port is free. What becomes
//! of connections and flows depends on the reason.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use rproxy_mapping::addr::{Protocols, ScopedIp};
use rproxy_mapping::limits::Limits;
use rproxy_mapping::name::Name;
use rproxy_mapping::ports::{PortError, PortRange};
use rproxy_mapping::{Mapping, MappingError, PortMapping};
use tokio::time::Instant;
use tracing::info;

use crate::bind::BoundPort;
use crate::bind::activation::InheritedSockets;
use crate::engine::Server;
use crate::engine::change::{BindKey, Changed, Removal};
use crate::engine::change_error::{ChangeError, by};
use crate::engine::registry::Served;
use crate::loops::whereabouts::Whereabouts;
use crate::loops::{Hop, LoopError, refuse_loops};
use crate::state::task::{Cut, Detached, LiveFlows};
use crate::state::{MappingPolicy, Target};

/// How long flows whose runtime has ended wait for their port to be attached again. A runtime that restarts
/// publishes the ports of its running containers again within that time.
const PARKED_FOR: Duration = Duration::from_secs(10);

/// Why a port is not attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// It is served.
    #[error("{name} is served already; {} has attached it", by(*process))]
    Taken {
        /// The name of the port.
        name: Name,
        /// The process that has attached it.
        process: u32,
    },
    /// A mapping listens on it.
    #[error("the mapping {0} listens there already; publish another port, or remove that mapping first")]
    Requested(Name),
    /// It would lead back to itself.
    #[error(transparent)]
    Loop(#[from] LoopError),
    /// The socket has no port.
    #[error(transparent)]
    Port(#[from] PortError),
    /// The backend's address is not that of one machine.
    #[error(transparent)]
    Mapping(#[from] MappingError),
    /// The kernel refused to watch the socket.
    #[error("cannot watch the listener: {0}")]
    Watch(#[source] io::Error),
}

impl Server {
    /// Serves a port that the process `process` has bound, and returns its name.
    ///
    /// # Errors
    /// [`AttachError`]; nothing has changed then.
    pub fn attach(&mut self, port: BoundPort, process: u32, limits: Limits) -> Result<Name, AttachError> {
        let port_mapping = port.port_mapping.clone();
        let mapping = mapping_of(&port_mapping, limits)?;
        let name = mapping.name();
        if let Some(Served { process: Some(process), .. }) = self.registry.get(&name) {
            return Err(AttachError::Taken { name, process: *process });
        }
        self.refuse_requested(&port_mapping)?;
        self.refuse_loop(&mapping)?;
        let left = self.registry.left_of(&name).map(|(index, state)| (index, state.clone()));
        let limits = mapping.shared_limits();
        // Connections that have been left by the last runtime end with the port.
        let policy = match &left {
            Some((_index, state)) => Arc::new(MappingPolicy { limits, state: state.clone() }),
            None => self.new_policy(name.clone(), limits),
        };
        let target = Target::new(port_mapping.clone(), policy.clone());
        let binding = self.assign(port, target.into()).map_err(AttachError::Watch)?;
        left.into_iter().for_each(|(index, _state)| self.registry.resume(index));
        let id = binding.port.id();
        let served = Served { mapping, policy, ports: vec![binding.clone()], process: Some(process) };
        served.announce(&name);
        self.registry.put(name.clone(), served);
        self.watch(vec![binding]);
        if let Some(flows) = self.parked.take(&port_mapping, id) {
            self.tasks.adopt(flows);
        }
        Ok(name)
    }

    /// Refuses a socket that a mapping listens on: it would serve the clients of both.
    fn refuse_requested(&self, port_mapping: &PortMapping) -> Result<(), AttachError> {
        let port = PortRange::single(port_mapping.host.port().unwrap_or(0))?;
        if !self.registry.listens_on(port_mapping.protocol, port) {
            return Ok(());
        }
        let place = BindKey::of(port_mapping);
        let listens_there =
            |served: &Served| served.ports.iter().any(|port| BindKey::of(&port.target.port_mapping) == place);
        match self.registry.requested().find(|(_name, served)| listens_there(served)) {
            Some((name, _served)) => Err(AttachError::Requested(name.clone())),
            None => Ok(()),
        }
    }

    /// Refuses a mapping that leads back to itself, or would with those that are served.
    pub(super) fn refuse_loop(&self, mapping: &Mapping) -> Result<(), LoopError> {
        let new: Vec<Hop<'_>> = Hop::of(0, mapping).collect();
        let gone = HashSet::new();
        refuse_loops(&new, self.hops_without(&gone, &new), &mut Whereabouts::default())
    }

    /// Closes an attached port. Its socket is closed in this process when this returns, unless replies are
    /// [still to be sent](Detached::Left).
    pub(crate) async fn detach(&mut self, name: &Name, reason: Detached) {
        let Some(served) = self.registry.get(name).filter(|served| served.process.is_some()) else { return };
        let targets = served.ports.iter().map(|binding| binding.target.port_mapping.clone());
        let targets: Vec<PortMapping> = targets.collect();
        let state = served.policy.state.clone();
        info!(mapping = %name, "no longer serving");
        let ports = self.registry.take(name).unwrap_or_default();
        for (port, target) in ports.into_iter().zip(targets) {
            let flows = self.close(port, reason).await;
            self.parked.put(target, flows);
        }
        if reason == Detached::Unpublished {
            self.cut(Cut::ConnectionsOf(state)).await;
            self.old_processes.reset(name).await;
        }
    }

    /// Like [`Server::apply`], and all attached ports have these `limits` from then on. Those that had others count as
    /// changed.
    ///
    /// # Errors
    /// [`ChangeError`]; nothing has changed then.
    pub async fn apply_with_attached(
        &mut self,
        wanted: Vec<Mapping>,
        limits: Option<&Limits>,
    ) -> Result<Changed, ChangeError> {
        let mut plan = self.plan_to(wanted)?;
        if let Some(limits) = limits {
            let limited = |(name, served): (&Name, &Served)| {
                let limited = served.mapping.clone().limited_in_family(limits.clone());
                (limited != served.mapping).then(|| (name.clone(), limited))
            };
            plan.change.extend(self.registry.attached().filter_map(limited));
        }
        self.execute(plan, InheritedSockets::default(), Removal::Drain).await
    }

    /// Until when flows wait for their port at most.
    pub fn parked_until(&self) -> Option<Instant> {
        self.parked.0.values().map(|parked| parked.until).min()
    }

    /// Ends the flows that have waited long enough for their port.
    pub fn end_parked(&mut self) {
        let now = Instant::now();
        self.parked.0.retain(|_port, parked| parked.until > now);
    }

    /// Closes all attached ports, because this process ends.
    pub async fn release_attached(&mut self) {
        let names: Vec<Name> = self.registry.attached().map(|(name, _served)| name.clone()).collect();
        for name in names {
            self.detach(&name, Detached::Left).await;
        }
    }
}

/// The mapping of an attached port.
fn mapping_of(port_mapping: &PortMapping, limits: Limits) -> Result<Mapping, AttachError> {
    let PortMapping { protocol, host, backend, v6only } = port_mapping;
    // Container runtimes publish no Unix sockets.
    let from = host.inet_addr().ok_or_else(|| PortError::NotAPort(host.to_string()))?;
    let (from_port, to_port) =
        (PortRange::single(from.port())?, PortRange::single(backend.socket_addr().port())?);
    let (listens, to) = ((ScopedIp::from(from).into(), Some(from_port)), (backend.host().into(), to_port));
    let mapping = Mapping::new(Protocols::One(*protocol), listens, to)?;
    let mapping = if *v6only && *mapping.host() == ScopedIp::ANY { mapping.v6only()? } else { mapping };
    Ok(mapping.named(Name::attached(*protocol, host)).limited_in_family(limits))
}

/// The flows of ports that may be attached again.
#[derive(Debug, Default)]
pub(crate) struct Parked(HashMap<BindKey, ParkedFlows>);

#[derive(Debug)]
struct ParkedFlows {
    until: Instant,
    flows: LiveFlows,
}

impl Parked {
    fn put(&mut self, port_mapping: PortMapping, flows: LiveFlows) {
        if !flows.flows.is_empty() {
            let until = Instant::now() + PARKED_FOR;
            self.0.insert(BindKey::of(&port_mapping), ParkedFlows { until, flows });
        }
    }

    /// The flows of a port, for the listener with this id.
    fn take(&mut self, port_mapping: &PortMapping, listener: usize) -> Option<LiveFlows> {
        let mut flows = self.0.remove(&BindKey::of(port_mapping))?.flows;
        flows.flows.iter_mut().for_each(|flow| flow.listener = listener);
        Some(flows)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener, UdpSocket as StdSocket};

    use rproxy_mapping::addr::Protocol;
    use tokio::net::UdpSocket;

    use super::*;
    use crate::bind::listen::Listener;
    use crate::engine::Growth;
    use crate::runtime::new_runtime;

    /// A server with an attached port, a backend, and a client with a flow.
    struct Scene {
        server: Server,
        backend: UdpSocket,
        port: StdSocket,
        name: Name,
        client: UdpSocket,
        /// The address of the flow towards the backend.
        flow: SocketAddr,
    }

    fn socket() -> UdpSocket {
        UdpSocket::from_std(listening()).unwrap()
    }

    fn address(socket: &UdpSocket) -> SocketAddr {
        socket.local_addr().unwrap()
    }

    /// A socket, also as a process that attaches it keeps it.
    fn listening() -> StdSocket {
        let socket = StdSocket::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    }

    fn attach(server: &mut Server, socket: &StdSocket, backend: &UdpSocket) -> Name {
        let host = socket.local_addr().unwrap().into();
        let backend = address(backend).to_string().parse().unwrap();
        let port_mapping = PortMapping { protocol: Protocol::Udp, host, backend, v6only: false };
        let port = BoundPort {
            port_mapping: port_mapping.clone(),
            listener: Listener::Udp(socket.try_clone().unwrap()),
        };
        server.attach(port, 7, Limits::default()).unwrap()
    }

    /// Sends from `client`, and returns the address from which `backend` receives it.
    async fn ask(client: &UdpSocket, port: &StdSocket, backend: &UdpSocket) -> SocketAddr {
        client.send_to(b"question", port.local_addr().unwrap()).await.unwrap();
        backend.recv_from(&mut [0; 9]).await.unwrap().1
    }

    impl Scene {
        async fn new() -> Self {
            let mut server = Server::prepared(Vec::new(), Growth::Attached, None).unwrap();
            let (client, backend, port) = (socket(), socket(), listening());
            let name = attach(&mut server, &port, &backend);
            let flow = ask(&client, &port, &backend).await;
            Self { server, backend, port, name, client, flow }
        }

        /// Attaches the port again, and returns the address of the client's flow then.
        async fn again(&mut self) -> SocketAddr {
            attach(&mut self.server, &self.port, &self.backend);
            ask(&self.client, &self.port, &self.backend).await
        }
    }

    #[test]
    fn flows_of_an_orphaned_port_continue_when_it_is_attached_again() {
        new_runtime().unwrap().block_on(async {
            let mut scene = Scene::new().await;
            let before = Instant::now();
            scene.server.detach(&scene.name, Detached::Orphaned).await;
            let until = scene.server.parked_until().unwrap();
            assert!((before + PARKED_FOR..=Instant::now() + PARKED_FOR).contains(&until));
            scene.server.end_parked();
            assert_eq!(scene.server.parked_until(), Some(until), "their time is not over");
            scene.backend.send_to(b"meanwhile", scene.flow).await.unwrap();
            assert_eq!(scene.again().await, scene.flow);
            assert_eq!(scene.client.recv(&mut [0; 20]).await.unwrap(), 9);
            assert_eq!(scene.server.parked_until(), None);
        });
    }

    #[test]
    fn another_port_leaves_the_flows_where_they_are() {
        new_runtime().unwrap().block_on(async {
            let mut scene = Scene::new().await;
            scene.server.detach(&scene.name, Detached::Orphaned).await;
            let other = listening();
            attach(&mut scene.server, &other, &scene.backend);
            assert!(scene.server.parked_until().is_some());
            assert_ne!(ask(&scene.client, &other, &scene.backend).await, scene.flow);
            assert_eq!(scene.again().await, scene.flow);
        });
    }

    #[test]
    fn flows_do_not_continue_with_another_backend() {
        new_runtime().unwrap().block_on(async {
            let mut scene = Scene::new().await;
            scene.server.detach(&scene.name, Detached::Orphaned).await;
            scene.backend = socket();
            assert_ne!(scene.again().await, scene.flow);
            assert_eq!(scene.server.parked_until(), None);
        });
    }

    #[test]
    fn flows_end_when_their_port_is_not_attached_in_time() {
        new_runtime().unwrap().block_on(async {
            let mut scene = Scene::new().await;
            scene.server.detach(&scene.name, Detached::Orphaned).await;
            // Their time is over.
            scene.server.parked.0.values_mut().for_each(|parked| parked.until -= PARKED_FOR);
            scene.server.end_parked();
            assert_eq!(scene.server.parked_until(), None);
            assert_ne!(scene.again().await, scene.flow);
        });
    }

    #[test]
    fn flows_of_a_port_that_is_not_published_any_more_end_at_once() {
        new_runtime().unwrap().block_on(async {
            let mut scene = Scene::new().await;
            scene.server.detach(&scene.name, Detached::Unpublished).await;
            assert_eq!(scene.server.parked_until(), None);
            assert_ne!(scene.again().await, scene.flow);
        });
    }

    #[test]
    fn a_port_is_attached_once() {
        new_runtime().unwrap().block_on(async {
            let mut server = Server::prepared(Vec::new(), Growth::Attached, None).unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let host = listener.local_addr().unwrap().into();
            let port_mapping = PortMapping {
                protocol: Protocol::Tcp,
                host,
                backend: "192.0.2.1:80".parse().unwrap(),
                v6only: false,
            };
            listener.set_nonblocking(true).unwrap();
            let mut attach = |process| {
                let listener = listener.try_clone().unwrap();
                let port =
                    BoundPort { port_mapping: port_mapping.clone(), listener: Listener::Tcp(listener) };
                server.attach(port, process, Limits::default())
            };
            attach(7).unwrap();
            let refused = attach(8).unwrap_err();
            assert!(matches!(refused, AttachError::Taken { process: 7, .. }), "{refused}");
        });
    }
}
