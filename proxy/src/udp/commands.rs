//! Handles commands of the engine: which listeners to serve, and how.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Instant;

use nix::sys::epoll::EpollFlags;
use rproxy_mapping::limits::Limits;
use tracing::error;

use super::flows::mapping_of;
use super::relay::{QUIET, UdpRelay};
use super::table::FlowId;
use super::token::{Token, interest};
use super::turn::Turn;
use crate::state::record::Ending;
use crate::state::task::{Command, Cut, Detached, FlowCommand, LiveFlows};
use crate::state::{Binding, Target};

/// Maximum number of turns for what clients have sent to a listener before it is closed: as much as its receive buffer
/// holds, even if more arrives meanwhile.
const LAST_TURNS: usize = 256;

impl UdpRelay {
    /// Handles a command.
    pub(super) fn handle(&mut self, command: Command) {
        match command {
            Command::Serve(bindings) => self.assign(bindings),
            Command::Retarget(bindings, done) => {
                self.assign(bindings);
                // The requester may not wait for the result.
                done.send(()).ok();
            }
            Command::Release(ports, done) => {
                let now = Instant::now();
                ports.iter().for_each(|port| self.listeners.release(port.number(), now));
                drop(ports);
                self.close_listeners(now);
                // The requester may not wait for the result.
                done.send(()).ok();
            }
            Command::Close(ports, reason, closed) => {
                let numbers: HashSet<usize> = ports.iter().map(|port| port.number()).collect();
                let flows = self.close_at_once(&numbers, reason);
                // The sockets are closed before the requester is notified, which may not wait.
                drop(ports);
                closed.send(flows).ok();
            }
            Command::Cut(cut, done) => {
                if let Cut::Recorded(records) = cut {
                    self.cut(&records);
                }
                // The requester may not wait for the result.
                done.send(()).ok();
            }
            Command::Leave => self.leave(),
            Command::Flows(FlowCommand::Pause(tell)) => drop(tell.send(self.pause())),
            Command::Flows(FlowCommand::Resume) => self.resume(),
            Command::Flows(FlowCommand::Adopt(flows)) => self.adopt(flows),
            Command::Flows(FlowCommand::GiveWay(ports, done)) => {
                self.give_way(&ports);
                // The requester may not wait for the result.
                done.send(()).ok();
            }
        }
    }

    /// Applies the bindings of listeners. Flows that the new bindings do not permit end, and a client that continues to
    /// send gets a new flow. Other flows get the new bounds.
    fn assign(&mut self, bindings: Vec<Binding>) {
        let now = Instant::now();
        let (mut theirs, mut access) = (HashSet::new(), HashSet::new());
        let mut proxies = HashMap::new();
        let mut limits = HashMap::new();
        for binding in bindings {
            let (number, new) = (binding.port.number(), binding.target.clone());
            let Some(old) = self.listeners.assign(binding, now) else { continue };
            if mapping_of(&old) != mapping_of(&new)
                || old.port_mapping.backend != new.port_mapping.backend
                || path_of(&old) != path_of(&new)
            {
                theirs.insert(number);
            } else if old.policy.limits.access != new.policy.limits.access {
                access.insert(number);
            }
            if old.policy.limits.proxy_protocol.accept != new.policy.limits.proxy_protocol.accept {
                proxies.insert(number, old.clone());
            }
            if old.policy.limits != new.policy.limits {
                limits.insert(mapping_of(&new), new);
            }
        }
        self.end_flows_of_sources(|listeners, key, source| {
            let number = key.listener as usize;
            let is_proxy =
                |target: &Target| target.policy.limits.proxy_protocol.expects_header(Some(key.client.ip()));
            let is_of_other_kind = |old: &Arc<Target>| is_proxy(old) != is_proxy(&listeners[number].target);
            if theirs.contains(&number) || proxies.get(&number).is_some_and(is_of_other_kind) {
                return Some(Ending::Removed);
            }
            let is_denied = access.contains(&number) && !listeners[number].target.policy.would_admit(source);
            is_denied.then_some(Ending::Denied)
        });
        self.capacity.asked = self.listeners.most_asked();
        let own = self.table.len();
        self.table.set_most(self.capacity.most(own, now));
        for (mapping, target) in limits {
            let bounds = self.capacity.bounds(mapping, &target.policy.limits, self.table.len(), now);
            self.table.rebound(&bounds, now);
            for ended in self.table.take_surplus(&bounds) {
                self.displace(ended);
            }
        }
    }

    /// Closes the released listeners whose flows are quiet, once no datagrams are queued for their clients.
    pub(super) fn close_listeners(&mut self, now: Instant) {
        let quiet = self.listeners.quiet(now, QUIET);
        if !quiet.is_empty() {
            self.end_flows(Ending::Removed, |_listeners, key| quiet.contains(&(key.listener as usize)));
            self.listeners.close(&quiet, now);
            self.capacity.asked = self.listeners.most_asked();
        }
    }

    /// Closes listeners, and all sockets that are bound to their ports. Returns their flows if they continue.
    fn close_at_once(&mut self, listeners: &HashSet<usize>, reason: Detached) -> LiveFlows {
        for number in listeners {
            match reason {
                Detached::Orphaned => self.receive_rest(*number),
                Detached::Left => self.leave_requests(*number),
                Detached::Unpublished => {}
            }
        }
        self.close_client_sockets_of(listeners);
        let live = match reason {
            Detached::Orphaned => self.take_flows(listeners),
            Detached::Left => return LiveFlows::default(),
            Detached::Unpublished => {
                self.end_flows(Ending::Removed, |_listeners, key| {
                    listeners.contains(&(key.listener as usize))
                });
                LiveFlows::default()
            }
        };
        listeners.iter().for_each(|number| self.listeners.close_one(*number));
        self.capacity.asked = self.listeners.most_asked();
        live
    }

    /// Forwards what clients have sent to a listener, which would be lost when it is closed.
    fn receive_rest(&mut self, listener: usize) {
        let mut batch = self.buffers.take();
        for _ in 0..LAST_TURNS {
            self.turn = Turn::default();
            self.serve_listener(listener, EpollFlags::EPOLLIN, &mut batch);
            if self.turn.taken() == 0 {
                break;
            }
        }
        self.send_answers(&mut batch);
        self.buffers.put_back(batch, self.turn.taken());
    }

    /// Leaves what clients send to a listener in the kernel, for another process. Replies are still sent, until the
    /// flows are quiet.
    fn leave_requests(&mut self, index: usize) {
        let Some(listener) = self.listeners.get_mut(index) else { return };
        listener.is_paused = true;
        interest(self.poll.epoll(), listener.as_fd(), Token::Listener(index), listener.wanted());
        self.listeners.release(index, Instant::now());
    }

    /// Closes a listener that another process which shares it has shut down. This cannot be undone, and epoll would
    /// report it forever.
    pub(super) fn give_up(&mut self, index: usize) {
        let reason = "the listener was shut down from outside";
        let Some(listener) = self.listeners.get_mut(index) else { return };
        error!(mapping = %listener.target.name(), host = %listener.target.port_mapping.host, "{reason}; its clients are not served any more");
        self.end_flows(Ending::Removed, |_listeners, key| key.listener as usize == index);
        if let Some(listener) = self.listeners.get_mut(index) {
            // Other processes may have it open; closing it then does not end the reports.
            self.poll.epoll().delete(listener.as_fd()).ok();
        }
        self.listeners.close_one(index);
        if self.capacity.shared.is_over() {
            self.failed = Some(io::Error::other(reason));
        }
    }

    /// Ends the flows that use some local ports, which are needed for listeners.
    fn give_way(&mut self, ports: &[u16]) {
        let Self { table, .. } = self;
        let theirs = table.iter().filter_map(|(id, _key, _at)| Some((id, table.get(id)?.1.port)));
        let theirs: Vec<FlowId> =
            theirs.filter(|(_id, port)| ports.contains(port)).map(|(id, _port)| id).collect();
        for id in theirs {
            if let Some(ended) = self.table.remove(id) {
                self.displace(ended);
            }
        }
        // A previous iteration may have ended it.
        while !self.ended.is_empty() {
            self.close_ended(self.ended.len());
        }
    }
}

/// The options that decide how a flow is opened and what its datagrams look like.
fn path_of(target: &Target) -> impl PartialEq + use<'_> {
    let Limits { udp_any_port, source, device, proxy_protocol, .. } = &*target.policy.limits;
    let header = proxy_protocol.send.map(|_version| proxy_protocol.send_udp);
    (udp_any_port, source, device, header)
}
