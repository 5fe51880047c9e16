//! The engine: the served mappings, the tasks that service them, and how they end.
//!
//! Any thread can change what a server serves ([`change`]), while its tasks stay on the runtime it was
//! started on.
//!
//! [`change`]: crate::engine::change

pub mod attach;
pub mod change;
mod listening;
pub mod plan;
pub mod registry;
mod sweep;

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rproxy_mapping::addr::Protocol;
use rproxy_mapping::limits::Limits;
use rproxy_mapping::name::Name;
use socket2::SockRef;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tracing::{info, warn};

use crate::bind::listen::Listener;
use crate::bind::{Bound, BoundPort};
use crate::engine::attach::Parked;
use crate::engine::change::Leaving;
use crate::engine::registry::{Registry, Served};
use crate::runtime::poll::WatchedListener;
use crate::runtime::worker::Workers;
use crate::state::task::{Fate, FlowCommand, ListenerTask, LiveFlows};
use crate::state::{Binding, Capacity, MappingPolicy, MappingState, Target};
use crate::tcp::accept::Acceptor;
use crate::tcp::reactor;
use crate::udp::relay::UdpRelay;

/// A running set of mappings.
#[derive(Debug)]
pub struct Server {
    runtime: Handle,
    workers: Arc<Workers>,
    /// Notified when connections and flows end.
    capacity: Arc<Capacity>,
    tasks: Tasks,
    pub(crate) registry: Registry,
    /// Sockets that do not belong to a named mapping.
    nameless: Vec<Binding>,
    /// Whether TCP connections need descriptors beside flows, now or later.
    beside_tcp: bool,
    pub(crate) leaving: Leaving,
    /// Flows of ports that may be attached again.
    parked: Parked,
}

/// The tasks that service listeners. Each is started with its first listener.
#[derive(Debug, Default)]
struct Tasks {
    tcp: Option<ListenerTask>,
    udp: Option<ListenerTask>,
}

impl Server {
    /// Prepares to serve `mappings` on the runtime of the calling thread, and on further ones when needed, so
    /// that `start` cannot fail. With `may_change`, TCP mappings may be added later.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn prepared(mappings: Vec<Bound>, may_change: bool) -> io::Result<Self> {
        let mut server = Self::new();
        let mut ports = mappings.iter().flat_map(|bound| &bound.ports);
        server.beside_tcp = may_change || ports.any(|port| port.port_mapping.protocol == Protocol::Tcp);
        for Bound { mapping, ports, process } in mappings {
            let policy = server.new_policy(mapping.limits().clone());
            let ports =
                ports.into_iter().map(|port| server.assign(port, &policy)).collect::<Result<_, _>>()?;
            server.registry.put(mapping.name(), Served { mapping, policy, ports, process });
        }
        Ok(server)
    }

    /// Starts to serve what was prepared, and the `flows` that another process served before.
    pub(crate) fn start(&self, flows: LiveFlows) {
        self.watch(self.bindings().cloned().collect());
        if let Some(udp) = &self.tasks.udp {
            udp.flows(FlowCommand::Adopt(flows));
        }
    }

    /// Logs what is served, and where. Call it once clients are served.
    pub fn announce(&self) {
        self.registry.iter().for_each(|(name, served)| served.announce(name));
        for Binding { target, .. } in &self.nameless {
            info!(mapping = %target.port_mapping, "serving");
        }
    }

    /// Starts to serve bound ports, each with its own limits, on the runtime of the calling thread.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start_ports(ports: impl IntoIterator<Item = (BoundPort, Limits)>) -> io::Result<Self> {
        let mut server = Self::new();
        for (port, limits) in ports {
            let policy = server.new_policy(limits);
            let binding = server.assign(port, &policy)?;
            server.nameless.push(binding);
        }
        server.watch(server.nameless.clone());
        Ok(server)
    }

    fn new() -> Self {
        let runtime = Handle::current();
        Self {
            workers: Arc::new(Workers::new(runtime.clone(), reactor::prepare)),
            runtime,
            capacity: Arc::default(),
            tasks: Tasks::default(),
            registry: Registry::default(),
            nameless: Vec::new(),
            beside_tcp: false,
            leaving: Leaving::default(),
            parked: Parked::default(),
        }
    }

    /// Counts the processors available to workers before confinement blocks the files with the quota.
    pub fn look_at_processors(&self) {
        self.workers.look_at_processors();
    }

    /// The served mappings.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    pub(crate) fn new_policy(&self, limits: Limits) -> Arc<MappingPolicy> {
        Arc::new(MappingPolicy { limits, state: Arc::new(MappingState::new(self.capacity.clone())) })
    }

    /// Adds a bound port to the listeners, to be served later.
    pub(crate) fn assign(&mut self, port: BoundPort, policy: &Arc<MappingPolicy>) -> io::Result<Binding> {
        let BoundPort { port_mapping, listener } = port;
        let task = self.task(port_mapping.protocol)?;
        let port = match listener {
            Listener::Tcp(listener) => task.add(listener)?,
            Listener::Udp(socket) => task.add(socket)?,
        };
        let target = Arc::new(Target { port_mapping, policy: policy.clone() });
        Ok(Binding { port, target })
    }

    /// The task for `protocol`, which is started on first use.
    fn task(&mut self, protocol: Protocol) -> io::Result<&ListenerTask> {
        let _entered = self.runtime.enter();
        match protocol {
            Protocol::Tcp => match &mut self.tasks.tcp {
                Some(task) => Ok(task),
                none => Ok(none.insert(ListenerTask::spawn(|poll, commands| {
                    Acceptor::new(poll, commands, self.capacity.clone(), self.workers.clone()).run()
                })?)),
            },
            Protocol::Udp => match &mut self.tasks.udp {
                Some(task) => Ok(task),
                none => {
                    let beside_tcp = self.beside_tcp;
                    Ok(none.insert(ListenerTask::spawn(|poll, commands| {
                        UdpRelay::new(poll, commands, beside_tcp, self.workers.datagrams()).run()
                    })?))
                }
            },
        }
    }

    /// Starts to serve listeners that were assigned.
    pub(crate) fn watch(&self, bindings: Vec<Binding>) {
        for (task, bindings) in self.by_task(bindings, protocol_of) {
            task.watch(bindings);
        }
    }

    /// Changes how listeners are served.
    pub(crate) fn change_targets(&self, bindings: Vec<Binding>) {
        for (task, bindings) in self.by_task(bindings, protocol_of) {
            task.change_targets(bindings);
        }
    }

    /// Accepts nothing new from listeners, and closes them once they are drained. Returns when nothing new is
    /// accepted.
    pub(crate) async fn release(&self, ports: Vec<(Protocol, Arc<WatchedListener>)>) {
        for (task, ports) in self.by_task(ports, |(protocol, _port)| *protocol) {
            let released = task.release(ports.into_iter().map(|(_protocol, port)| port).collect());
            // If the task is gone, so are its listeners.
            drop(released.await);
        }
    }

    /// Closes a listener at once. Returns the flows that continue, once it is closed.
    pub(crate) async fn close(
        &self,
        protocol: Protocol,
        port: Arc<WatchedListener>,
        fate: Fate,
    ) -> LiveFlows {
        let task = match protocol {
            Protocol::Tcp => &self.tasks.tcp,
            Protocol::Udp => &self.tasks.udp,
        };
        let Some(task) = task else { return LiveFlows::default() };
        // If the task is gone, so are its listeners and flows.
        task.close(vec![port], fate).await.unwrap_or_default()
    }

    /// Waits until the tasks have handled all earlier commands.
    pub(crate) async fn until_responsive(&self) {
        for task in [&self.tasks.tcp, &self.tasks.udp].into_iter().flatten() {
            // If the task is gone, `failed` reports it.
            drop(task.release(Vec::new()).await);
        }
    }

    /// The sockets of named mappings, in the order of [`Registry::iter`].
    fn bindings(&self) -> impl Iterator<Item = &Binding> {
        self.registry.iter().flat_map(|(_name, served)| &served.ports)
    }

    /// The descriptors of all sockets.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.bindings().map(|binding| binding.port.as_fd())
    }

    /// The descriptors of the UDP sockets.
    pub(crate) fn udp_sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let udp = self.bindings().filter(|binding| udp_number(binding).is_some());
        udp.map(|binding| binding.port.as_fd())
    }

    /// The numbers of the UDP listeners, and their indices in [`Server::sockets`].
    pub(crate) fn udp_listeners(&self) -> impl Iterator<Item = (usize, usize)> {
        let numbered = self.bindings().enumerate();
        numbered.filter_map(|(place, binding)| Some((udp_number(binding)?, place)))
    }

    /// The numbers of the listeners of some mappings, or `None` for TCP.
    pub(crate) fn udp_listeners_of(&self, names: &[Name]) -> Vec<Option<usize>> {
        let served = names.iter().filter_map(|name| self.registry.get(name));
        served.flat_map(|served| &served.ports).map(udp_number).collect()
    }

    /// Leaves all datagrams in the kernel until [`Server::resume`], and returns the flows.
    pub(crate) async fn pause(&self) -> LiveFlows {
        let Some(udp) = &self.tasks.udp else { return LiveFlows::default() };
        let (flows, given) = oneshot::channel();
        udp.flows(FlowCommand::Pause(flows));
        // If the task is gone, so are its flows.
        given.await.unwrap_or_default()
    }

    /// Ends flows that use one of these local ports, so that it can be bound.
    pub(crate) async fn give_way(&self, ports: Vec<u16>) {
        let Some(udp) = &self.tasks.udp else { return };
        let (done, is_done) = oneshot::channel();
        udp.flows(FlowCommand::GiveWay(ports, done));
        // If the task is gone, so are its flows.
        drop(is_done.await);
    }

    /// Resumes after [`Server::pause`].
    pub(crate) fn resume(&self) {
        self.tasks.udp.iter().for_each(|udp| udp.flows(FlowCommand::Resume));
    }

    /// Leaves all sockets and the paused flows to another process that already serves them. Connections
    /// continue.
    pub(crate) fn leave(&self) {
        [&self.tasks.tcp, &self.tasks.udp].into_iter().flatten().for_each(ListenerTask::leave);
    }

    fn by_task<T>(
        &self,
        items: Vec<T>,
        protocol: impl Fn(&T) -> Protocol,
    ) -> impl Iterator<Item = (&ListenerTask, Vec<T>)> {
        let (tcp, udp) = items.into_iter().partition::<Vec<T>, _>(|item| protocol(item) == Protocol::Tcp);
        let tasks = [(&self.tasks.tcp, tcp), (&self.tasks.udp, udp)];
        tasks
            .into_iter()
            .filter(|(_task, items)| !items.is_empty())
            .filter_map(|(task, items)| Some((task.as_ref()?, items)))
    }

    /// Waits until a task has ended although it was not asked to, and returns why.
    pub async fn failed(&mut self) -> ServeError {
        async fn ended(task: &mut Option<ListenerTask>) -> Option<io::Error> {
            match task {
                Some(task) => task.ended().await.err(),
                None => std::future::pending().await,
            }
        }
        tokio::select! {
            error = ended(&mut self.tasks.tcp) => ServeError::new(Protocol::Tcp, error),
            error = ended(&mut self.tasks.udp) => ServeError::new(Protocol::Udp, error),
        }
    }

    /// Stops accepting, and lets connections and flows finish until `enough` returns a reason to stop
    /// waiting.
    pub async fn drain(self, enough: impl Future<Output = &'static str>) {
        let Self { workers, tasks: Tasks { tcp, udp }, registry, nameless, .. } = self;
        // They hold sockets, which the tasks are to close.
        drop((registry, nameless));
        let (tcp, udp) = (tcp.map(ListenerTask::finish), udp.map(ListenerTask::finish));
        if let Some(tcp) = tcp {
            // A failure has been reported already, and does not matter here.
            drop(tcp.await);
        }
        info!(connections = workers.connections(), "draining");
        let ended = async {
            workers.until_idle().await;
            if let Some(udp) = udp {
                drop(udp.await);
            }
        };
        tokio::select! {
            biased;
            () = ended => {}
            reason = enough => {
                warn!(connections = workers.connections(), "{reason}: resetting the remaining connections");
            }
        }
    }

    /// Ends at once. The listeners are shut down, because another process may have them open too (a runtime
    /// that bound them for us), and no client may be left in a backlog that nobody services.
    pub fn abandon(self) {
        let all = self.bindings().chain(&self.nameless);
        for listener in all.filter(|binding| protocol_of(binding) == Protocol::Tcp) {
            if let Err(error) = SockRef::from(listener.port.as_ref()).shutdown(Shutdown::Both) {
                warn!(%error, "cannot shut a listener down");
            }
        }
    }
}

/// The number of a listener, if it is UDP.
fn udp_number(binding: &Binding) -> Option<usize> {
    (protocol_of(binding) == Protocol::Udp).then(|| binding.port.number())
}

fn protocol_of(binding: &Binding) -> Protocol {
    binding.target.port_mapping.protocol
}

/// Why a server cannot continue.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Waiting for connections or datagrams failed.
    #[error("cannot wait for {protocol} clients: {source}")]
    Wait {
        /// The protocol of the clients.
        protocol: Protocol,
        /// The error of epoll_wait(2).
        source: io::Error,
    },
    /// The task of a protocol has ended.
    #[error("the {0} relay ended by itself")]
    Ended(Protocol),
}

impl ServeError {
    fn new(protocol: Protocol, error: Option<io::Error>) -> Self {
        match error {
            Some(source) => Self::Wait { protocol, source },
            None => Self::Ended(protocol),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::fd::OwnedFd;

    use rproxy_mapping::Mapping;
    use rproxy_mapping::addr::ScopedIp;
    use rproxy_mapping::interfaces::NoInterfaces;
    use rproxy_mapping::wire::WireMapping;

    use super::*;
    use crate::engine::change::{ChangeError, Changed};
    use crate::runtime::new_runtime;

    fn mapping(name: &str) -> Mapping {
        let json = format!(r#"{{"name":"{name}","host":"127.0.0.1","to":"192.0.2.1","to_ports":"80"}}"#);
        serde_json::from_str::<WireMapping>(&json).unwrap().read(&NoInterfaces, ScopedIp::ANY).unwrap()
    }

    fn is_listening(socket: &OwnedFd) -> bool {
        SockRef::from(socket).is_listener().unwrap()
    }

    #[test]
    fn an_abandoned_server_listens_nowhere_even_if_another_process_has_the_sockets() {
        let runtime = new_runtime().unwrap();
        let _entered = runtime.enter();
        let named = Bound::bind(mapping("web")).unwrap();
        let nameless = Bound::bind(mapping("other")).unwrap().ports.pop().unwrap();
        let addr = named.ports[0].local_addr().unwrap();
        let mut server = Server::prepared(vec![named], false).unwrap();
        let policy = server.new_policy(Limits::default());
        let binding = server.assign(nameless, &policy).unwrap();
        server.nameless.push(binding);
        let all = server.bindings().chain(&server.nameless);
        // As a runtime keeps them that has bound them.
        let kept: Vec<OwnedFd> =
            all.map(|binding| binding.port.as_fd().try_clone_to_owned().unwrap()).collect();
        assert!(kept.len() == 2 && kept.iter().all(is_listening));
        server.abandon();
        assert!(!kept.iter().any(is_listening));
        TcpStream::connect(addr).unwrap_err();
    }

    #[test]
    fn a_change_that_fails_leaves_no_socket_and_no_name() {
        new_runtime().unwrap().block_on(async {
            let mut server = Server::prepared(Vec::new(), true).unwrap();
            // An address that no other test binds.
            let [free, taken] = [(); 2].map(|()| TcpListener::bind("127.0.0.77:0").unwrap());
            let [free_port, taken_port] = [&free, &taken].map(|socket| socket.local_addr().unwrap().port());
            drop(free);
            let at = |name: &str, port: u16| {
                let json = format!(
                    r#"{{"name":"{name}","host":"127.0.0.77","host_ports":"{port}","to":"192.0.2.1","to_ports":"80"}}"#
                );
                serde_json::from_str::<WireMapping>(&json).unwrap().read(&NoInterfaces, ScopedIp::ANY).unwrap()
            };
            let wanted = || vec![at("free", free_port), at("taken", taken_port)];
            server.add(wanted()).await.unwrap_err();
            server.apply(wanted()).await.unwrap_err();
            TcpListener::bind(("127.0.0.77", free_port)).unwrap();
            assert!(server.registry.is_empty() && server.registry.draining().next().is_none());
            assert_eq!(server.add(vec![at("free", free_port)]).await.unwrap().added, 1);
        });
    }

    #[test]
    fn a_change_says_how_many_mappings_it_leaves_alone() {
        new_runtime().unwrap().block_on(async {
            let bound = ["one", "two", "three"].map(|name| Bound::bind(mapping(name)).unwrap());
            let mut server = Server::prepared(bound.into(), true).unwrap();
            let two = "two".parse().unwrap();
            let added = server.add(vec![mapping("four")]).await.unwrap();
            assert_eq!(added, Changed { added: 1, unchanged: 3, ..Changed::default() });
            let (backend, ports) = ("192.0.2.2".parse().unwrap(), "81".parse().unwrap());
            let changed = server.retarget(&two, backend, ports).await.unwrap();
            assert_eq!(changed, Changed { changed: 1, unchanged: 3, ..Changed::default() });
            let removed = server.remove(&two).await.unwrap();
            assert_eq!(removed, Changed { removed: 1, unchanged: 3, ..Changed::default() });
        });
    }

    #[test]
    fn a_port_of_another_program_is_not_said_to_be_taken_by_a_mapping_of_the_other_protocol() {
        new_runtime().unwrap().block_on(async {
            let mut server = Server::prepared(Vec::new(), true).unwrap();
            // An address that no other test binds.
            let theirs = UdpSocket::bind("127.0.0.78:0").unwrap();
            let port = theirs.local_addr().unwrap().port();
            let at = |proto: &str| {
                let json = format!(
                    r#"{{"name":"{proto}","proto":"{proto}","host":"127.0.0.78","host_ports":"{port}","to":"192.0.2.1","to_ports":"80"}}"#
                );
                serde_json::from_str::<WireMapping>(&json).unwrap().read(&NoInterfaces, ScopedIp::ANY).unwrap()
            };
            server.add(vec![at("tcp")]).await.unwrap();
            let error = server.add(vec![at("udp")]).await.unwrap_err();
            assert!(matches!(error, ChangeError::Bind { .. }), "{error}");
        });
    }
}
