//! Hands flows over to another process, and takes them over from one.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Instant;

use rproxy_mapping::addr::canonical;
use socket2::{SockAddr, SockRef};
use tracing::warn;

use super::flow::Flow;
use super::flows::mapping_of;
use super::key::FlowKey;
use super::relay::UdpRelay;
use super::table::FlowId;
use super::token::Wanted;
use super::token::{Token, event, interest};
use crate::log::limit::LogLimit;
use crate::state::record::Ending;
use crate::state::task::{LiveFlow, LiveFlows};

impl UdpRelay {
    /// Pauses the listeners: datagrams stay in the kernel. Returns the current flows. Released listeners and their
    /// flows continue, and so do queued datagrams.
    pub(super) fn pause(&mut self) -> LiveFlows {
        self.retire_all();
        self.pause_listeners(true);
        let flows = self.paused_flows().into_iter().filter_map(|id| self.pause_flow(id)).collect();
        let listeners = self.listeners.iter_served();
        let dropped = listeners.map(|(number, listener)| (number, listener.dropped));
        let dropped = dropped.filter(|(_number, dropped)| *dropped != 0).collect();
        LiveFlows { flows, dropped, ports: self.capacity.shared.ports().turn() }
    }

    /// Continues as if the handover had not started.
    pub(super) fn resume(&mut self) {
        for id in self.paused_flows() {
            if let Some((key, _flow)) = self.table.get(id) {
                self.listeners[key.listener as usize].waiting.push_back(id);
            }
        }
        self.pause_listeners(false);
    }

    /// Resumes the paused listeners and flows.
    pub(super) fn leave(&mut self) {
        self.paused_flows().into_iter().for_each(|id| self.let_go(id));
        // Released listeners hold ports that the other process may need.
        self.end_flows(Ending::HandedOver, |_listeners, _key| true);
        self.listeners.close_all(Instant::now());
    }

    /// Takes over flows of another process. If that fails for one, the client's next datagram opens a new flow.
    pub(super) fn adopt(&mut self, LiveFlows { flows, dropped, ports }: LiveFlows) {
        static FAILED: LogLimit = LogLimit::new();

        let now = Instant::now();
        if let Some(turn) = ports {
            self.capacity.shared.ports().go_on(turn);
        }
        for (number, dropped) in dropped {
            if let Some(listener) = self.listeners.get_mut(number) {
                listener.dropped = dropped;
            }
        }
        for flow in flows {
            let (client, listener) = (flow.client, flow.listener);
            if let Err(error) = self.adopt_one(flow, now)
                && let Some(suppressed) = FAILED.permit()
            {
                let target = self.listeners.get_mut(listener).map(|listener| &listener.target);
                let mapping = target.map(|target| tracing::field::display(target.name()));
                warn!(mapping, client = %canonical(client), %error, suppressed, "cannot take a flow over");
            }
        }
    }

    fn adopt_one(&mut self, flow: LiveFlow, now: Instant) -> io::Result<()> {
        let LiveFlow { listener, client, local, told, header, is_established, peer, dropped, socket } = flow;
        let key = FlowKey::new(listener, client, local);
        let key = told.as_ref().map_or(key, |told| key.told(told, &self.told_hasher));
        let source = told.map_or(client, |told| told.source()).ip();
        let Some(listener) = self.listeners.get_mut(listener) else { return Ok(()) };
        let target = listener.target.clone();
        let is_from_proxy = target.policy.limits.proxy_protocol.expects_header(Some(client.ip()));
        let is_permitted = target.policy.would_admit(source) && (told.is_none() || is_from_proxy);
        if self.table.find(&key).is_some() || !is_permitted {
            return Ok(());
        }
        let address = |address: io::Result<SockAddr>| Ok::<_, io::Error>(address?.as_socket());
        let connected = SockRef::from(&socket);
        let backend = target.port_mapping.backend.socket_addr();
        let leads_there = match peer {
            Some(peer) => peer.ip() == backend.ip(),
            None => address(connected.peer_addr())? == Some(backend),
        };
        if !leads_there || peer.is_some() != target.policy.limits.udp_any_port {
            // It belongs to the former backend of the mapping.
            return Ok(());
        }
        let local = address(connected.local_addr())?;
        // That of a client is not one of those that flows use in rotation.
        let may_be_clients = target.policy.limits.source.is_client();
        let is_clients = |local: &SocketAddr| may_be_clients && local.ip() == source.to_canonical();
        let port = local.filter(|local| !is_clients(local)).map_or(0, |local| local.port());
        let mut flow = Flow::adopt(socket, peer, port, &target, &self.capacity.budget);
        flow.dropped = dropped;
        if let Some(local) = local.filter(is_clients) {
            flow.client_addrs = self.capacity.shared.client_addrs.take(&target, local).map(Box::new);
        }
        flow.speak_for(&key, told.as_ref());
        flow.header.iter_mut().for_each(|it| it.set_state(header));
        let bounds = self.capacity.bounds(mapping_of(&target), &target.policy.limits, self.table.len(), now);
        self.make_room(&bounds, source);
        let id = self.table.next_id();
        self.poll.epoll().add(&flow, event(Token::Flow(id), Wanted::RECEIVE))?;
        self.capacity.shared.ports().adopted(port);
        flow.set_share(self.capacity.shares.each());
        self.table.insert(key, (&bounds, source), flow, now);
        if is_established {
            self.table.establish(id, now);
        }
        Ok(())
    }

    /// Leaves the replies of a flow in the kernel, and returns it for another listener or process.
    fn pause_flow(&mut self, id: FlowId) -> Option<LiveFlow> {
        let is_established = self.table.is_established(id);
        let (key, flow) = self.table.get_mut(id)?;
        // It is treated as waiting for its listener; resuming starts it again.
        flow.is_waiting = true;
        interest(self.poll.epoll(), flow.as_fd(), Token::Flow(id), flow.wanted());
        let FlowKey { listener, client, local, .. } = *key;
        let (listener, peer, dropped) = (listener as usize, flow.peer, flow.dropped);
        let (told, socket) = (flow.told.as_deref().copied(), flow.socket());
        let header = flow.header.as_ref().map(|header| header.state()).unwrap_or_default();
        Some(LiveFlow { listener, client, local, told, header, is_established, peer, dropped, socket })
    }

    /// Removes a flow whose socket stays open elsewhere.
    fn let_go(&mut self, id: FlowId) {
        let Some(mut ended) = self.table.remove(id) else { return };
        ended.flow.is_shared = true;
        self.end(ended, Ending::HandedOver);
    }

    /// Removes the flows of some listeners, and returns them to be [adopted](Self::adopt) by others.
    pub(super) fn take_flows(&mut self, listeners: &HashSet<usize>) -> LiveFlows {
        let ids = self.flows_of(listeners);
        let flows = ids.iter().filter_map(|id| self.pause_flow(*id)).collect();
        ids.into_iter().for_each(|id| self.let_go(id));
        // At once: epoll cannot watch a socket for two flows.
        while !self.ended.is_empty() {
            self.close_ended(self.ended.len());
        }
        LiveFlows { flows, ..LiveFlows::default() }
    }

    fn pause_listeners(&mut self, is_paused: bool) {
        let epoll = self.poll.epoll();
        for (number, listener) in self.listeners.iter_served() {
            listener.is_paused = is_paused;
            if is_paused {
                // All flows are about to wait.
                listener.waiting.clear();
            }
            interest(epoll, listener.as_fd(), Token::Listener(number), listener.wanted());
        }
    }

    fn paused_flows(&mut self) -> Vec<FlowId> {
        let served = self.listeners.iter_served();
        let paused = served.filter(|(_number, listener)| listener.is_paused);
        let paused: HashSet<usize> = paused.map(|(number, _listener)| number).collect();
        self.flows_of(&paused)
    }

    /// The flows of some listeners.
    pub(super) fn flows_of(&self, listeners: &HashSet<usize>) -> Vec<FlowId> {
        let flows = self.table.iter().filter(|(_id, key, _at)| listeners.contains(&(key.listener as usize)));
        flows.map(|(id, _key, _at)| id).collect()
    }
}
