//! The tasks that service the listeners of a server: one for TCP, and one or more for UDP.

use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};

use rproxy_mapping::addr::Protocol;
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::engine::{Growth, ServeError};
use crate::runtime::poll::{MOST_SETS, PollSet, WatchedListener};
use crate::runtime::worker::Workers;
use crate::state::Capacity;
use crate::state::task::{FlowCommand, ListenerTask, LiveFlows, TaskHandle};
use crate::tcp::accept::Acceptor;
use crate::udp::relay::UdpRelay;
use crate::udp::shared::Shared;

/// The tasks. Each is started with its first listener.
#[derive(Debug)]
pub(super) struct Tasks {
    runtime: Handle,
    workers: Arc<Workers>,
    /// Notified when connections and flows end.
    capacity: Arc<Capacity>,
    growth: Growth,
    /// Whether there are mappings with connections from the start.
    pub(super) has_tcp: bool,
    tcp: Option<ListenerTask>,
    udp: Vec<ListenerTask>,
    /// What the UDP tasks share.
    shared: Option<Arc<Shared>>,
}

impl Tasks {
    pub(super) fn new(
        runtime: Handle,
        workers: Arc<Workers>,
        capacity: Arc<Capacity>,
        growth: Growth,
    ) -> Self {
        let (has_tcp, tcp, udp, shared) = (false, None, Vec::new(), None);
        Self { runtime, workers, capacity, growth, has_tcp, tcp, udp, shared }
    }

    /// The task for another listener, which is started if necessary.
    ///
    /// # Errors
    /// Those of epoll_create1(2) and epoll_ctl(2).
    pub(super) fn for_listener(&mut self, protocol: Protocol) -> io::Result<&ListenerTask> {
        let _entered = self.runtime.enter();
        let may_be_idle = self.growth == Growth::Attached;
        match protocol {
            Protocol::Tcp | Protocol::Sctp => match &mut self.tcp {
                Some(task) => Ok(task),
                none => Ok(none.insert(ListenerTask::spawn(PollSet::new()?, |poll, commands| {
                    let (capacity, workers) = (self.capacity.clone(), self.workers.clone());
                    Acceptor::new(poll, commands, capacity, workers, may_be_idle).run()
                })?)),
            },
            Protocol::Udp => self.for_udp_listener(),
        }
    }

    /// The UDP task with the fewest listeners. There is a task per listener, up to the number of processors, so that
    /// a flooded port does not slow down those of other tasks.
    fn for_udp_listener(&mut self) -> io::Result<&ListenerTask> {
        let (index, fewest) = self
            .udp
            .iter()
            .map(|task| task.listeners().len())
            .enumerate()
            .min_by_key(|(_index, listeners)| *listeners)
            .unwrap_or((0, usize::MAX));
        if self.udp.is_empty() || fewest > 0 && self.udp.len() < self.workers.most().min(MOST_SETS) {
            // TCP connections need descriptors beside flows, now or later.
            let beside_tcp = self.has_tcp || self.growth != Growth::None;
            let may_be_idle = self.growth == Growth::Attached;
            let shared = || Arc::new(Shared::of_this_host(beside_tcp, may_be_idle));
            let shared = self.shared.get_or_insert_with(shared).clone();
            let (set, workers) = (PollSet::numbered(self.udp.len())?, self.workers.clone());
            let task = ListenerTask::spawn(set, |poll, commands| {
                UdpRelay::new(poll, commands, shared, workers).run()
            })?;
            self.udp.push(task);
            return Ok(&self.udp[self.udp.len() - 1]);
        }
        Ok(&self.udp[index])
    }

    /// What the UDP tasks share, once there is one.
    pub(super) fn shared(&self) -> Option<&Arc<Shared>> {
        self.shared.as_ref()
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &ListenerTask> {
        self.tcp.iter().chain(&self.udp)
    }

    /// The task that services `listener`.
    pub(super) fn of(&self, listener: &WatchedListener) -> Option<&ListenerTask> {
        self.all().find(|task| task.listeners().contains(listener))
    }

    /// Groups `items` by the tasks that service their listeners.
    pub(super) fn group<T>(
        &self,
        items: Vec<T>,
        listener: impl Fn(&T) -> &WatchedListener,
    ) -> Vec<(&ListenerTask, Vec<T>)> {
        let mut groups: Vec<(&ListenerTask, Vec<T>)> = self.all().map(|task| (task, Vec::new())).collect();
        for item in items {
            let group = groups.iter_mut().find(|(task, _items)| task.listeners().contains(listener(&item)));
            if let Some((_task, group)) = group {
                group.push(item);
            }
        }
        groups.retain(|(_task, items)| !items.is_empty());
        groups
    }

    /// Leaves all datagrams in the kernel until [`Self::resume`], and returns the flows.
    pub(super) async fn pause(&self) -> LiveFlows {
        let mut all = LiveFlows::default();
        for task in &self.udp {
            let (flows, given) = oneshot::channel();
            task.flows(FlowCommand::Pause(flows));
            // If the task is gone, so are its flows.
            let LiveFlows { mut flows, mut dropped, ports } = given.await.unwrap_or_default();
            flows.iter_mut().for_each(|flow| flow.listener = task.listeners().id_of(flow.listener));
            dropped.iter_mut().for_each(|(listener, _count)| *listener = task.listeners().id_of(*listener));
            all.flows.append(&mut flows);
            all.dropped.append(&mut dropped);
            all.ports = ports.or(all.ports);
        }
        all
    }

    /// Resumes after [`Self::pause`].
    pub(super) fn resume(&self) {
        self.udp.iter().for_each(|task| task.flows(FlowCommand::Resume));
    }

    /// Also serves these flows, of listeners that are already served.
    pub(super) fn adopt(&self, LiveFlows { flows, dropped, ports }: LiveFlows) {
        let mut by_task: HashMap<usize, LiveFlows> = HashMap::new();
        for mut flow in flows {
            let (task, number) = (flow.listener % MOST_SETS, flow.listener / MOST_SETS);
            flow.listener = number;
            by_task.entry(task).or_default().flows.push(flow);
        }
        for (listener, count) in dropped {
            by_task.entry(listener % MOST_SETS).or_default().dropped.push((listener / MOST_SETS, count));
        }
        // All tasks take local ports in the same turn.
        by_task.entry(0).or_default().ports = ports;
        for (index, flows) in by_task {
            if let Some(task) = self.udp.get(index) {
                task.flows(FlowCommand::Adopt(flows));
            }
        }
    }

    /// Ends flows that use one of these local ports, so that it can be bound.
    pub(super) async fn give_way(&self, ports: &[u16]) {
        for task in &self.udp {
            let (done, is_done) = oneshot::channel();
            task.flows(FlowCommand::GiveWay(ports.to_vec(), done));
            // If the task is gone, so are its flows.
            drop(is_done.await);
        }
    }

    /// Waits until a task has ended although it was not asked to, and returns why.
    pub(super) async fn failed(&mut self) -> ServeError {
        poll_fn(|context| self.poll_failed(context)).await
    }

    fn poll_failed(&mut self, context: &mut Context<'_>) -> Poll<ServeError> {
        let tcp = self.tcp.iter_mut().map(|task| (Protocol::Tcp, task));
        let udp = self.udp.iter_mut().map(|task| (Protocol::Udp, task));
        for (protocol, task) in tcp.chain(udp) {
            if let Poll::Ready(ended) = task.poll_ended(context) {
                return Poll::Ready(ServeError::new(protocol, ended.err()));
            }
        }
        Poll::Pending
    }

    /// Makes all tasks drain their listeners and end: first TCP's, if there is one, then those of UDP.
    pub(super) fn finish(self) -> (Option<TaskHandle>, Vec<TaskHandle>) {
        (self.tcp.map(ListenerTask::finish), self.udp.into_iter().map(ListenerTask::finish).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, UdpSocket as StdSocket};
    use std::os::fd::AsFd;

    use rproxy_mapping::PortMapping;
    use rproxy_mapping::name::Name;
    use tokio::net::UdpSocket;

    use super::*;
    use crate::bind::BoundPort;
    use crate::bind::listen::Listener;
    use crate::engine::Server;
    use crate::runtime::new_runtime;
    use crate::state::{Binding, MappingPolicy, Target};

    fn socket() -> UdpSocket {
        let socket = StdSocket::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        UdpSocket::from_std(socket).unwrap()
    }

    /// Ports of a server.
    struct Ports {
        server: Server,
        policy: Arc<MappingPolicy>,
        bindings: Vec<Binding>,
    }

    impl Ports {
        fn serve(sockets: impl IntoIterator<Item = BoundPort>) -> Self {
            let mut server = Server::prepared(Vec::new(), Growth::Mappings, None).unwrap();
            let policy = server.new_policy(Name::default(), Arc::default());
            let assigned = sockets.into_iter().map(|port| {
                let target = Target::new(port.port_mapping.clone(), policy.clone());
                server.assign(port, target.into()).unwrap()
            });
            let bindings: Vec<Binding> = assigned.collect();
            server.watch(bindings.clone());
            Self { server, policy, bindings }
        }

        /// Serves the same sockets, as another process does.
        fn again(&self) -> Self {
            Self::serve(self.bindings.iter().map(|Binding { port, target }| {
                let socket = StdSocket::from(port.as_fd().try_clone_to_owned().unwrap());
                BoundPort { port_mapping: target.port_mapping.clone(), listener: Listener::Udp(socket) }
            }))
        }

        fn flows(&self) -> u64 {
            self.policy.state.stats.flows.get()
        }
    }

    /// A bound port, and its address.
    fn port(backend: SocketAddr) -> (BoundPort, SocketAddr) {
        let (host, backend) = ("127.0.0.1:0".parse().unwrap(), backend.to_string().parse().unwrap());
        let port_mapping = PortMapping { protocol: Protocol::Udp, host, backend, v6only: false };
        let port = BoundPort::bind(port_mapping).unwrap();
        let front = port.local_addr().unwrap();
        (port, front)
    }

    #[test]
    fn flows_of_several_tasks_are_handed_over_each_to_that_of_its_listener() {
        new_runtime().unwrap().block_on(async {
            let backend = socket();
            // More than processors, so that a task has several.
            let most = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_SETS);
            let (sockets, fronts): (Vec<_>, Vec<_>) =
                (0..2 * most + 1).map(|_| port(backend.local_addr().unwrap())).unzip();
            let old = Ports::serve(sockets);
            assert_eq!(old.server.tasks.udp.len(), most);
            let mut clients = Vec::new();
            for front in fronts {
                let client = socket();
                client.connect(front).await.unwrap();
                client.send(b"question").await.unwrap();
                let (_length, flow) = backend.recv_from(&mut [0; 9]).await.unwrap();
                clients.push((client, flow));
            }
            let count = clients.len();

            let mut flows = old.server.pause().await;
            assert_eq!(flows.flows.len(), count);
            for (binding, (client, _flow)) in old.bindings.iter().zip(&clients) {
                let client = client.local_addr().unwrap();
                let of = flows.flows.iter().find(|flow| flow.client == client).unwrap();
                assert_eq!(of.listener, binding.port.id());
            }
            // Nothing is received meanwhile.
            let new = old.again();
            for flow in &mut flows.flows {
                let place = old.bindings.iter().position(|binding| binding.port.id() == flow.listener);
                flow.listener = new.bindings[place.unwrap()].port.id();
            }
            new.server.tasks.adopt(flows);
            old.server.leave();
            old.server.until_responsive().await;
            assert_eq!(old.flows(), 0);
            for (client, flow) in &clients {
                client.send(b"again").await.unwrap();
                assert_eq!(backend.recv_from(&mut [0; 9]).await.unwrap(), (5, *flow));
            }
            new.server.until_responsive().await;
            assert_eq!(new.flows(), count as u64);
            assert_eq!(new.policy.state.stats.flows_total.get(), count as u64);
        });
    }

    #[test]
    fn flows_of_all_tasks_continue_when_a_handover_is_given_up() {
        new_runtime().unwrap().block_on(async {
            let backend = socket();
            let (sockets, fronts): (Vec<_>, Vec<_>) =
                (0..3).map(|_| port(backend.local_addr().unwrap())).unzip();
            let ports = Ports::serve(sockets);
            let client = socket();
            let mut flows = Vec::new();
            for front in &fronts {
                client.send_to(b"question", front).await.unwrap();
                flows.push(backend.recv_from(&mut [0; 9]).await.unwrap().1);
            }
            assert_eq!(ports.server.pause().await.flows.len(), flows.len());
            for front in &fronts {
                client.send_to(b"meanwhile", front).await.unwrap();
            }
            ports.server.until_responsive().await;
            assert!(backend.try_recv(&mut [0; 9]).is_err());
            ports.server.resume();
            let mut continued = Vec::new();
            for _ in &flows {
                continued.push(backend.recv_from(&mut [0; 9]).await.unwrap().1);
            }
            continued.sort_unstable();
            flows.sort_unstable();
            assert_eq!(continued, flows);
        });
    }
}
