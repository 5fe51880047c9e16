//! The engine: the served mappings, the tasks that service them, and how they end.
//!
//! Any thread can change what a server serves ([`change`]), while its tasks stay on the runtime it was
//! started on.
//!
//! [`change`]: crate::engine::change

pub mod attach;
pub mod change;
pub mod change_error;
mod cut;
mod interfaces;
pub(crate) mod listening;
mod names;
pub(crate) mod observation;
pub(crate) mod old_processes;
mod permissions;
pub mod plan;
pub(crate) mod private;
pub mod registry;
mod sweep;
mod tasks;

use std::collections::HashSet;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rproxy_mapping::PortMapping;
use rproxy_mapping::addr::Protocol;
use rproxy_mapping::backend::HostName;
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
use crate::engine::observation::{Observation, Resources};
use crate::engine::old_processes::{LeftConnections, OldProcesses};
use crate::engine::private::PrivateSockets;
use crate::engine::registry::{Registry, Served};
use crate::engine::tasks::Tasks;
use crate::links::Links;
use crate::log::access::AccessLog;
use crate::names::Names;
use crate::runtime::poll::WatchedListener;
use crate::runtime::socket_file::SocketFile;
use crate::runtime::worker::Workers;
use crate::state::record::Record;
use crate::state::recorder::Recorder;
use crate::state::task::{Cut, Detached, ListenerTask, LiveFlows};
use crate::state::{Binding, Capacity, MappingPolicy, MappingState, Target};

/// A running set of mappings.
#[derive(Debug)]
pub struct Server {
    workers: Arc<Workers>,
    /// Notified when connections and flows end.
    capacity: Arc<Capacity>,
    /// Records connections and flows, if anybody can ask for them.
    recorder: Option<Arc<Recorder>>,
    tasks: Tasks,
    pub(crate) registry: Registry,
    /// Sockets that do not belong to a named mapping.
    nameless: Vec<Binding>,
    pub(crate) leaving: Leaving,
    /// What the names of backends stand for.
    pub(crate) names: Names,
    /// What addresses the interfaces have that mappings listen at.
    pub(crate) links: Links,
    /// Unix sockets that no mapping may lead to.
    pub(crate) private: PrivateSockets,
    /// Flows of ports that may be attached again.
    parked: Parked,
    /// Old processes with connections to attached ports.
    old_processes: OldProcesses,
}

/// What may be added to a server later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Growth {
    /// Nothing.
    None,
    /// Mappings.
    Mappings,
    /// Mappings, and ports that other processes attach. It also serves none at times.
    Attached,
}

/// What happens without a request.
#[derive(Debug)]
pub(crate) enum Event {
    /// These names of backends stand for other addresses.
    NamesChanged(HashSet<HostName>),
    /// Interfaces may have other addresses than those where mappings listen.
    AddressesChanged,
}

impl Server {
    /// Prepares to serve `mappings` on the runtime of the calling thread, and on further ones when needed, so
    /// that `start` cannot fail. `growth` says what may be added later.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub(crate) fn prepared(
        mappings: Vec<Bound>,
        growth: Growth,
        recorder: Option<Arc<Recorder>>,
    ) -> io::Result<Self> {
        let mut server = Self { recorder, ..Self::new(growth) };
        let mut ports = mappings.iter().flat_map(|bound| &bound.ports);
        server.tasks.has_tcp = ports.any(|port| port.port_mapping.protocol.has_connections());
        for Bound { mapping, ports, process } in mappings {
            let policy = server.new_policy(mapping.name(), mapping.shared_limits());
            let assign = |port: BoundPort| {
                let target = Target::of(&mapping, port.port_mapping.clone(), policy.clone());
                server.assign(port, target.into())
            };
            let ports = ports.into_iter().map(assign).collect::<Result<_, _>>()?;
            server.registry.put(mapping.name(), Served { mapping, policy, ports, process });
        }
        Ok(server)
    }

    /// Starts to serve what was prepared, and the `flows` that another process served before.
    pub(crate) fn start(&self, flows: LiveFlows) {
        self.watch(self.bindings().cloned().collect());
        self.tasks.adopt(flows);
    }

    /// Logs what is served, and where. Call it once clients are served.
    pub fn announce(&self) {
        listening::announce_all(self.registry.iter());
        for Binding { target, .. } in &self.nameless {
            let PortMapping { protocol, host, backend, .. } = &target.port_mapping;
            info!(mapping = %target.name(), %host, %backend, %protocol, "serving");
        }
    }

    /// Starts to serve a bound port as the only one, without limits, on the runtime of the calling thread.
    ///
    /// # Errors
    /// Those of epoll_ctl(2).
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start_port(port: BoundPort) -> io::Result<Self> {
        let mut server = Self::new(Growth::None);
        let name = Name::attached(port.port_mapping.protocol, &port.port_mapping.host);
        let policy = server.new_policy(name, Arc::default());
        let target = Arc::new(Target::new(port.port_mapping.clone(), policy));
        let binding = server.assign(port, target)?;
        server.nameless.push(binding);
        server.watch(server.nameless.clone());
        Ok(server)
    }

    fn new(growth: Growth) -> Self {
        let runtime = Handle::current();
        let workers = Arc::new(Workers::new(runtime.clone()));
        let capacity = Arc::<Capacity>::default();
        Self {
            tasks: Tasks::new(runtime, workers.clone(), capacity.clone(), growth),
            workers,
            capacity,
            recorder: None,
            registry: Registry::default(),
            nameless: Vec::new(),
            leaving: Leaving::default(),
            names: Names::default(),
            links: Links::default(),
            private: PrivateSockets::default(),
            parked: Parked::default(),
            old_processes: OldProcesses::default(),
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

    pub(crate) fn new_policy(&self, name: Name, limits: Arc<Limits>) -> Arc<MappingPolicy> {
        Arc::new(MappingPolicy {
            limits,
            state: Arc::new(MappingState::new(name, self.capacity.clone(), self.recorder.clone())),
        })
    }

    /// Adds a bound port to the listeners, to be served later.
    pub(crate) fn assign(&mut self, port: BoundPort, target: Arc<Target>) -> io::Result<Binding> {
        let BoundPort { port_mapping, listener } = port;
        let task = self.tasks.for_listener(port_mapping.protocol)?;
        let port = match listener {
            Listener::Tcp(listener) => task.add(listener)?,
            Listener::Udp(socket) => task.add(socket)?,
            Listener::Sctp(socket) => task.add(socket)?,
            Listener::Unix(socket) => {
                let (listener, file) = socket.into_parts();
                task.add_with(listener, file)?
            }
        };
        Ok(Binding { port, target })
    }

    /// Starts to serve listeners that were assigned.
    pub(crate) fn watch(&self, bindings: Vec<Binding>) {
        for (task, bindings) in self.tasks.group(bindings, |binding| &binding.port) {
            task.watch(bindings);
        }
    }

    /// Changes how listeners are served. Returns when no client is dialled for at an old target any more.
    pub(crate) async fn change_targets(&self, bindings: Vec<Binding>) {
        for (task, bindings) in self.tasks.group(bindings, |binding| &binding.port) {
            // If the task is gone, so are its listeners.
            drop(task.change_targets(bindings).await);
        }
    }

    /// Accepts nothing new from listeners, and closes them once they are drained. Returns when nothing new is
    /// accepted.
    pub(crate) async fn release(&self, ports: Vec<Arc<WatchedListener>>) {
        for (task, ports) in self.tasks.group(ports, AsRef::as_ref) {
            // If the task is gone, so are its listeners.
            drop(task.release(ports).await);
        }
    }

    /// Closes a listener at once. Returns the flows that continue, once it is closed.
    pub(crate) async fn close(&self, port: Arc<WatchedListener>, reason: Detached) -> LiveFlows {
        let Some(task) = self.tasks.of(&port) else { return LiveFlows::default() };
        // If the task is gone, so are its listeners and flows.
        task.close(vec![port], reason).await.unwrap_or_default()
    }

    /// Waits until the tasks have handled all earlier commands.
    pub(crate) async fn until_responsive(&self) {
        for answer in self.probe_tasks() {
            // If the task is gone, `failed` reports it.
            drop(answer.await);
        }
    }

    /// What can be seen of this server.
    pub(crate) fn observe(&self) -> Observation {
        Observation {
            counted: self.registry.counted(&self.names),
            mappings: self.registry.len(),
            attached: self.registry.attached().count(),
            resources: self.resources(),
        }
    }

    /// Numbers for the list of mappings in [`Self::observe`]: their revision, how many drain, and how often names have begun to
    /// resolve or ceased to.
    pub(crate) fn mappings_version(&self) -> (u64, usize, u64) {
        (self.registry.revision(), self.registry.draining().count(), self.names.turns())
    }

    /// What this server uses, which takes no time however many mappings there are.
    pub(crate) fn resources(&self) -> Resources {
        Resources {
            workers: self.workers.clone(),
            shared: self.tasks.shared().cloned(),
            access_log: self.access_log().cloned(),
        }
    }

    /// Probes the liveness of the tasks. They have handled all earlier commands once all receivers have got an answer.
    pub(crate) fn probe_tasks(&self) -> Vec<oneshot::Receiver<()>> {
        self.tasks.all().map(|task| task.release(Vec::new())).collect()
    }

    /// The recorder of connections and flows, if there is one.
    pub(crate) fn recorder(&self) -> Option<&Arc<Recorder>> {
        self.recorder.as_ref()
    }

    /// The access log, if there is one.
    pub(crate) fn access_log(&self) -> Option<&Arc<AccessLog>> {
        self.recorder()?.access_log()
    }

    /// What is live, in the order of opening; nothing if it is not recorded.
    pub(crate) fn live(&self) -> Vec<Arc<Record>> {
        self.recorder.as_ref().map(|recorder| recorder.live()).unwrap_or_default()
    }

    /// Resets connections and ends flows. Returns when their sockets are closed.
    pub(crate) async fn cut(&self, cut: Cut) {
        let commanded: Vec<_> = self.tasks.all().map(|task| task.cut(cut.clone())).collect();
        for is_done in commanded {
            // If the task is gone, so are its connections and flows, or they end.
            drop(is_done.await);
        }
    }

    /// Cuts what has these records, at the request of a client.
    pub(crate) async fn cut_recorded(&self, records: &[Arc<Record>]) {
        if !records.is_empty() {
            info!(connections = records.len(), "cutting, as requested by a control client");
            self.cut(Cut::Recorded(Arc::new(records.iter().map(|record| record.id).collect()))).await;
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

    /// The files of Unix sockets.
    fn files(&self) -> impl Iterator<Item = &SocketFile> {
        self.bindings().filter_map(|binding| binding.port.file())
    }

    /// Makes this process the owner of the files of these mappings.
    pub(crate) fn own_files_of(&self, names: &[Name]) {
        let served = names.iter().filter_map(|name| self.registry.get(name));
        served.flat_map(Served::files).for_each(SocketFile::own);
    }

    /// The descriptors of the UDP sockets.
    pub(crate) fn udp_sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let udp = self.bindings().filter(|binding| udp_id(binding).is_some());
        udp.map(|binding| binding.port.as_fd())
    }

    /// The [ids](WatchedListener::id) of the UDP listeners, and their indices in [`Server::sockets`].
    pub(crate) fn udp_listeners(&self) -> impl Iterator<Item = (usize, usize)> {
        let numbered = self.bindings().enumerate();
        numbered.filter_map(|(place, binding)| Some((udp_id(binding)?, place)))
    }

    /// The [ids](WatchedListener::id) of the listeners of some mappings, or `None` for TCP.
    pub(crate) fn udp_listeners_of(&self, names: &[Name]) -> Vec<Option<usize>> {
        let served = names.iter().filter_map(|name| self.registry.get(name));
        served.flat_map(|served| &served.ports).map(udp_id).collect()
    }

    /// Leaves all datagrams in the kernel until [`Server::resume`], and returns the flows.
    pub(crate) async fn pause(&self) -> LiveFlows {
        self.tasks.pause().await
    }

    /// Ends flows that use this local port, so that it can be bound.
    pub(crate) async fn give_way(&self, port: u16) {
        self.tasks.give_way(&[port]).await;
    }

    /// Resumes after [`Server::pause`].
    pub(crate) fn resume(&self) {
        self.tasks.resume();
    }

    /// Takes over from old processes, which let their connections finish.
    pub(crate) fn succeed(&mut self, old_processes: OldProcesses) {
        self.old_processes = old_processes;
    }

    /// The channels to the old processes.
    pub(crate) fn old_processes(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.old_processes.channels()
    }

    /// The connections to attached ports, which another process may have this one reset.
    pub(crate) fn left_connections(&self) -> LeftConnections {
        LeftConnections { workers: self.workers.clone(), ports: self.registry.states_of_attached() }
    }

    /// Leaves all sockets and the paused flows to another process that already serves them. Connections
    /// continue.
    pub(crate) fn leave(&self) {
        self.files().for_each(SocketFile::leave);
        self.tasks.all().for_each(ListenerTask::leave);
    }

    /// Waits for what happens without a request. Dropped at any point, nothing is lost.
    ///
    /// # Errors
    /// A task has ended although it was not asked to.
    pub(crate) async fn event(&mut self) -> Result<Event, ServeError> {
        tokio::select! {
            biased;
            error = self.tasks.failed() => Err(error),
            hosts = self.names.changed() => Ok(Event::NamesChanged(hosts)),
            () = self.links.changed() => Ok(Event::AddressesChanged),
        }
    }

    /// Waits until a task has ended although it was not asked to, and returns why.
    pub async fn failed(&mut self) -> ServeError {
        self.tasks.failed().await
    }

    /// Stops accepting, and lets connections and flows finish until `enough` returns a reason to stop
    /// waiting.
    pub async fn drain(self, enough: impl Future<Output = &'static str>) {
        let Self { workers, tasks, registry, nameless, .. } = self;
        // They hold sockets, which the tasks are to close.
        drop((registry, nameless));
        let (tcp, udp) = tasks.finish();
        if let Some(tcp) = tcp {
            // A failure has been reported already, and does not matter here.
            drop(tcp.await);
        }
        info!(connections = workers.connections(), "draining");
        let ended = async {
            workers.until_idle().await;
            for task in udp {
                drop(task.await);
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
    /// that bound them for us), and no client may be left in a backlog that nobody services. That of SCTP cannot be shut
    /// down (sctp_disconnect in net/sctp/socket.c).
    pub fn abandon(self) {
        let all = self.bindings().chain(&self.nameless);
        for listener in all.filter(|binding| protocol_of(binding) == Protocol::Tcp) {
            if let Err(error) = SockRef::from(listener.port.as_ref()).shutdown(Shutdown::Both) {
                warn!(%error, "cannot shut a listener down");
            }
        }
    }
}

/// The [`WatchedListener::id`] of a listener, if it is UDP.
fn udp_id(binding: &Binding) -> Option<usize> {
    (protocol_of(binding) == Protocol::Udp).then(|| binding.port.id())
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
    use crate::bind::activation::InheritedSockets;
    use crate::engine::change::{Changed, Removal};
    use crate::engine::change_error::ChangeError;
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
        let mut server = Server::prepared(vec![named], Growth::None, None).unwrap();
        let policy = server.new_policy(Name::default(), Arc::default());
        let target = Target::new(nameless.port_mapping.clone(), policy);
        let binding = server.assign(nameless, target.into()).unwrap();
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

    fn udp_socket() -> tokio::net::UdpSocket {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        tokio::net::UdpSocket::from_std(socket).unwrap()
    }

    #[test]
    fn flows_of_two_ports_are_relayed_by_two_workers_once_both_are_active() {
        let runtime = new_runtime().unwrap();
        let workers = runtime.block_on(async {
            let backend = udp_socket();
            let to = backend.local_addr().unwrap().port();
            let bound = ["one", "other"].map(|name| {
                let json = format!(
                    r#"{{"name":"{name}","host":"127.0.0.1","to":"127.0.0.1","to_ports":"{to}","proto":"udp"}}"#
                );
                let mapping = serde_json::from_str::<WireMapping>(&json).unwrap();
                Bound::bind(mapping.read(&NoInterfaces, ScopedIp::ANY).unwrap()).unwrap()
            });
            let hosts = bound.each_ref().map(|bound| bound.ports[0].local_addr().unwrap());
            let server = Server::prepared(bound.into(), Growth::None, None).unwrap();
            server.start(LiveFlows::default());
            let mut running = Vec::new();
            for host in hosts {
                let client = udp_socket();
                // The second one may arrive while the task moves.
                for number in 0..50_u8 {
                    client.send_to(&[number], host).await.unwrap();
                    let (mut byte, mut reply) = ([0], [0]);
                    let (_length, flow) = backend.recv_from(&mut byte).await.unwrap();
                    backend.send_to(&byte, flow).await.unwrap();
                    client.recv_from(&mut reply).await.unwrap();
                    assert_eq!((byte, reply), ([number], [number]));
                }
                running.push(server.workers.runtimes().len());
            }
            server.drain(std::future::ready("over")).await;
            running
        });
        let most = std::thread::available_parallelism().map_or(1, usize::from);
        assert_eq!(workers, [1, most.min(2)]);
    }

    #[test]
    fn a_change_that_fails_leaves_no_socket_and_no_name() {
        new_runtime().unwrap().block_on(async {
            let mut server = Server::prepared(Vec::new(), Growth::Mappings, None).unwrap();
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
            let refused = server.add(wanted(), InheritedSockets::default()).await.unwrap_err();
            let ChangeError::Bind { name, source } = refused else { panic!("{refused}") };
            assert_eq!((name.as_str(), source.more), ("taken", 1), "the other one was bound");
            server.apply(wanted(), InheritedSockets::default(), Removal::Drain).await.unwrap_err();
            TcpListener::bind(("127.0.0.77", free_port)).unwrap();
            assert!(server.registry.is_empty() && server.registry.draining().next().is_none());
            assert_eq!(server.add(vec![at("free", free_port)], InheritedSockets::default()).await.unwrap().added, 1);
        });
    }

    #[test]
    fn a_change_says_how_many_mappings_it_leaves_alone() {
        new_runtime().unwrap().block_on(async {
            let bound = ["one", "two", "three"].map(|name| Bound::bind(mapping(name)).unwrap());
            let mut server = Server::prepared(bound.into(), Growth::Mappings, None).unwrap();
            let two = "two".parse().unwrap();
            let added = server.add(vec![mapping("four")], InheritedSockets::default()).await.unwrap();
            assert_eq!(added, Changed { added: 1, unchanged: 3, ..Changed::default() });
            let (backend, ports) = ("192.0.2.2".parse().unwrap(), "81".parse().unwrap());
            let changed = server.retarget(&two, backend, ports).await.unwrap();
            assert_eq!(changed, Changed { changed: 1, unchanged: 3, ..Changed::default() });
            let removed = server.remove(&two, Removal::Drain).await.unwrap();
            assert_eq!(removed, Changed { removed: 1, unchanged: 3, ..Changed::default() });
        });
    }

    #[test]
    fn a_mapping_keeps_its_default_name_when_it_gets_another_backend() {
        new_runtime().unwrap().block_on(async {
            let mut server = Server::prepared(Vec::new(), Growth::Mappings, None).unwrap();
            let json = r#"{"host":"127.0.0.1","to":"192.0.2.1","to_ports":"80"}"#;
            let mapping = serde_json::from_str::<WireMapping>(json).unwrap();
            server
                .add(vec![mapping.read(&NoInterfaces, ScopedIp::ANY).unwrap()], InheritedSockets::default())
                .await
                .unwrap();
            let name = server.registry.iter().next().unwrap().0.clone();
            for port in ["81", "82"] {
                server.retarget(&name, "192.0.2.2".parse().unwrap(), port.parse().unwrap()).await.unwrap();
                let served = server.registry.get(&name).unwrap();
                assert_eq!(served.mapping.name(), name);
                assert_eq!(served.mapping.backend_ports().to_string(), port);
            }
        });
    }

    #[test]
    fn udp_listeners_are_told_from_those_of_tcp() {
        new_runtime().unwrap().block_on(async {
            let mut server = Server::prepared(Vec::new(), Growth::Mappings, None).unwrap();
            let at = |name: &str, proto: &str| {
                let json = format!(
                    r#"{{"name":"{name}","proto":"{proto}","host":"127.0.0.1","to":"192.0.2.1","to_ports":"80"}}"#
                );
                serde_json::from_str::<WireMapping>(&json).unwrap().read(&NoInterfaces, ScopedIp::ANY).unwrap()
            };
            server.add(vec![at("a", "udp"), at("b", "tcp"), at("c", "udp"), at("d", "udp")], InheritedSockets::default()).await.unwrap();
            let ids: Vec<usize> = server.bindings().map(|binding| binding.port.id()).collect();
            let listeners: Vec<_> = server.udp_listeners().collect();
            assert_eq!(listeners, [0, 2, 3].map(|place| (ids[place], place)));
            let names = ["d", "b"].map(|name| name.parse().unwrap());
            assert_eq!(server.udp_listeners_of(&names), [Some(ids[3]), None]);
            assert_eq!(server.udp_sockets().count(), 3);
        });
    }

    #[test]
    fn a_port_of_another_program_is_not_said_to_be_taken_by_a_mapping_of_the_other_protocol() {
        new_runtime().unwrap().block_on(async {
            let mut server = Server::prepared(Vec::new(), Growth::Mappings, None).unwrap();
            // An address that no other test binds.
            let theirs = UdpSocket::bind("127.0.0.78:0").unwrap();
            let port = theirs.local_addr().unwrap().port();
            let at = |proto: &str| {
                let json = format!(
                    r#"{{"name":"{proto}","proto":"{proto}","host":"127.0.0.78","host_ports":"{port}","to":"192.0.2.1","to_ports":"80"}}"#
                );
                serde_json::from_str::<WireMapping>(&json).unwrap().read(&NoInterfaces, ScopedIp::ANY).unwrap()
            };
            server.add(vec![at("tcp")], InheritedSockets::default()).await.unwrap();
            let error = server.add(vec![at("udp")], InheritedSockets::default()).await.unwrap_err();
            assert!(matches!(error, ChangeError::Bind { .. }), "{error}");
        });
    }
}
